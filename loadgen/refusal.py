"""What a command says of arguments that it cannot do anything with."""

from pathlib import Path


class WrongArgument(ValueError):
    """An argument that makes no sense; the message says what to change."""


def text_of(file: Path, option: str) -> str:
    """What stands in a file that an option names. Raises WrongArgument: it cannot be read."""
    try:
        return file.read_text(encoding="utf-8")
    except OSError as error:
        raise WrongArgument(f"{option} {file}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise WrongArgument(f"{option} {file}: this is no text") from None


def check_written(file: Path, option: str) -> None:
    """Raises WrongArgument: what is to be written there in the end cannot be."""
    if not file.absolute().parent.is_dir():
        raise WrongArgument(f"{option} {file}: the folder does not exist; make it first")
    if file.is_dir():
        raise WrongArgument(f"{option} {file}: this is a folder; name a file")


class Refused(SystemExit):
    """Ends the command as ``argparse`` does where it finds the mistake itself: one line, and exit status 2."""

    def __init__(self, line: str) -> None:
        super().__init__(line)
        self.code = 2
