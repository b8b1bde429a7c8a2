"""What a command says of arguments that it cannot do anything with."""


class WrongArgument(ValueError):
    """An argument that makes no sense; the message says what to change."""


class Refused(SystemExit):
    """Ends the command as ``argparse`` does where it finds the mistake itself: one line, and exit status 2."""

    def __init__(self, line: str) -> None:
        super().__init__(line)
        self.code = 2
