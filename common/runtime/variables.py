"""Variables of ours in the environment that nobody reads: told of at the start, with the name that was perhaps meant.

Known are those that the compose file fills in, and the settings of the process itself. A warning and no error: the
variables of another version may stand in an environment, or what an orchestrator makes of a service's name.
"""

import re
from collections.abc import Collection, Iterable
from difflib import get_close_matches
from pathlib import Path

from pydantic_settings import BaseSettings

PREFIX = "TRIPTYCH_"
COMPOSE_FILE = Path(__file__).resolve().parents[2] / "compose" / "compose.yaml"
# How long kill tests are, and the like: of no concern to what they start.
_OF_TESTS = "TRIPTYCH_TEST_"
_FILLED_IN = re.compile(rf"(?<!\$)\$\{{?({PREFIX}\w+)")


def stack_variables(compose_file: Path = COMPOSE_FILE) -> frozenset[str]:
    """The variables that the compose file fills in.

    Raises:
        OSError: it cannot be read.
    """
    return frozenset(_FILLED_IN.findall(compose_file.read_text(encoding="utf-8")))


def settings_variables(kind: type[BaseSettings]) -> frozenset[str]:
    """The variables that hold these settings."""
    return frozenset(f"{PREFIX}{name.upper()}" for name in kind.model_fields)


def unknown_variables(environment: Iterable[str], known: Collection[str]) -> dict[str, str | None]:
    """The names of ours in ``environment`` that are not known, in order, each with the nearest known one, if any is."""
    ours = (name for name in environment if name.startswith(PREFIX) and not name.startswith(_OF_TESTS))
    return {name: _nearest(name, known) for name in sorted(ours) if name not in known}


def _nearest(name: str, known: Collection[str]) -> str | None:
    # Without what all have in common, which would make any two alike.
    found = get_close_matches(name.removeprefix(PREFIX), [one.removeprefix(PREFIX) for one in sorted(known)], n=1)
    return f"{PREFIX}{found[0]}" if found else None
