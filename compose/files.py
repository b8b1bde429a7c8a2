"""Files that a command is to write."""

from pathlib import Path

from compose.errors import OptionError


def prepare_file(path: Path) -> None:
    """Make the folder a file goes into, and find out now, not after the work, that the file cannot be written.

    Raises:
        OptionError: it cannot.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OptionError(f"cannot write {path}: {error.strerror}") from error
    if path.is_dir():
        raise OptionError(f"cannot write {path}: it is a folder; name a file")


def write_whole(path: Path, text: str) -> None:
    """Write the file so that it appears only once it is whole.

    Raises:
        OptionError: it cannot be written.
    """
    partial = path.with_name(f".{path.name}.part")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise OptionError(f"cannot write {path}: {error.strerror}") from error
