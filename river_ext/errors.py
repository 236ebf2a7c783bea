"""The one exception that a user's input can cause."""


class RiverError(ValueError):
    """Bad input. The message is one line that names the offending file or value and what is accepted.

    Names from files end up in messages, so anything unprintable in them is replaced.
    """

    def __init__(self, message: str):
        super().__init__("".join(c if c.isprintable() else "?" for c in " ".join(message.split())))
