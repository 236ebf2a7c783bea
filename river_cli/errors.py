"""The error of a command that was called in a wrong way, found before river_ext is loaded."""


class UsageError(Exception):
    """The message is one line that names the value and what is accepted, as that of a RiverError."""
