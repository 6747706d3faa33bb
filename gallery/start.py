"""How a script starts and ends: refused, interrupted or read no further, it prints one line or none, no traceback."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from typing import Any


def command(run: Callable[[], int]) -> int:
    """Runs a script and returns its exit status: that of `run`, 2 if refused, 130 after Ctrl-C, 141 if nobody reads on.

    `run` imports what it needs. Until it calls `raise_on_ctrl_c`, Ctrl-C ends the process at once: an import that is
    interrupted ends in any kind of traceback, and there is nothing yet to put in order.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not where the shell ignores the signal
        signal.signal(signal.SIGINT, _leave)
    from gallery.refused import Refused

    try:
        try:
            status = run()
        except SystemExit as stop:  # of argparse
            status = stop.code if isinstance(stop.code, int) else 0
        except Refused as refused:
            print(f"{os.path.basename(sys.argv[0])}: {refused}", file=sys.stderr)
            status = 2
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for stream in (sys.stdout, sys.stderr):  # Python flushes both once more
            os.dup2(nowhere, stream.fileno())
        return 141


def raise_on_ctrl_c() -> None:
    """From here on, Ctrl-C raises KeyboardInterrupt, so that no file is left half written."""
    if signal.getsignal(signal.SIGINT) is _leave:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _leave(*_: Any) -> None:
    os._exit(130)
