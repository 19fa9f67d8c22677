"""The root of every error that edge-phi3 raises on purpose: one tree, one sentence each.

Each part of the house derives its own errors from `EdgePhi3Error`; the command line turns any of them into one line
on stderr and exit code 1, the service into a JSON ``{"detail": ...}``.
"""


class EdgePhi3Error(Exception):
    """An error whose text is written for the person who can act on it.

    ``str(error)`` is a whole sentence: what was wrong, what is allowed, and which field or file.
    """


class InternalError(EdgePhi3Error):
    """An error of ours that ended one request; its text is what the request's owner may know."""

    def __init__(self, detail: str = "The request met an error inside the service; its log tells more.") -> None:
        super().__init__(detail)


class WrongUsageError(EdgePhi3Error):
    """The command was called in a way that it cannot be: exit code 2."""
