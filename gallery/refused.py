"""What stops a script before any work starts."""


class Refused(Exception):
    """Something that the user can fix. Its message is the one line to show."""
