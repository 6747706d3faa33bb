"""What stops a script before any work starts."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any


class Refused(Exception):
    """Something that the user can fix. Its message is the one line to show."""


@contextlib.contextmanager
def refusing(*errors: type[Exception], text: Callable[[Any], str] = str) -> Iterator[None]:
    """Raises Refused, with the `text` of the error, in place of these errors."""
    try:
        yield
    except errors as error:
        raise Refused(text(error)) from error
