"""What can go wrong with a stack. Every message says what to change; the command line prints it as one line."""


class StackError(Exception):
    """Base of everything ``triptych`` reports without a traceback, and then ends with ``status``.

    That is 2, as where ``argparse`` sees it, for what is wrong with how the command was called.
    """

    status = 1


class ComposeError(StackError):
    """The compose file says something that cannot be run as it stands."""

    status = 2


class OptionError(StackError):
    """A command line option does not fit."""

    status = 2


class StartError(StackError):
    """The stack, or one of its services, did not come up."""


class CrashLoopError(StackError):
    """A service dies faster than it is worth starting again, or cannot start as it is set up."""


class ServerError(StackError):
    """The server is not reachable, or refused what it was asked."""
