"""The house's import rules (see docs and the table in the design), checked over the whole tree."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
OURS = {"common", "services", "gateway", "loadgen", "compose", "tests"}

# What of ours each room may import, beside itself. The most specific room that fits a file counts.
ALLOWED: dict[str, tuple[str, ...]] = {
    "common.messages": (),
    "common.engine": ("common.messages", "common.models", "common.mempool", "common.policies"),
    "common.policies": ("common.messages",),
    "common.bus": ("common.messages",),
    "common.tensors": ("common.messages",),
    "common.runtime": ("common",),
    "common.language": ("common",),
    "common.mempool": ("common.messages", "common.bus", "common.tensors"),
    "common.models": (),
    "common.models.length_predictor": (
        *("common.messages", "common.models", "common.policies"),
        *("common.engine", "common.mempool"),  # training has the main model answer
    ),
    "common.parallel": ("common.messages",),
    "gateway": ("common",),
    "loadgen": ("common",),
    "compose": ("common", "services", "gateway", "loadgen"),
}
HEAVY = {"torch", "diffusers", "transformers", "ucxx", "safetensors"}
# A policy sees time, chance and the world only as arguments.
IMPURE = {
    "asyncio",
    "time",
    "random",
    "secrets",
    "torch",
    "nats",
    "ucxx",
    "os",
    "socket",
    "threading",
    "datetime",
    "uuid",
}


def _files(room: str) -> list[Path]:
    return sorted((ROOT / room.replace(".", "/")).rglob("*.py"))


def _imports(file: Path) -> set[str]:
    """Every module a file imports, wherever in it the import stands."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"), str(file))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            found.add(node.module or "")
            # ``from common import bus`` imports the module common.bus.
            found.update(f"{node.module}.{alias.name}" for alias in node.names if node.module in OURS)
    return found


def _within(module: str, room: str) -> bool:
    return module == room or module.startswith(room + ".")


def _rooms() -> dict[str, tuple[str, ...]]:
    services = [path.name for path in (ROOT / "services").iterdir() if (path / "__init__.py").exists()]
    return ALLOWED | {f"services.{name}": ("common",) for name in services}


@pytest.mark.parametrize("room", sorted(_rooms()))
def test_a_room_imports_only_what_it_may(room: str) -> None:
    allowed = (*_rooms()[room], room)
    inner = {file for other in _rooms() if other.startswith(room + ".") for file in _files(other)}
    for file in sorted(set(_files(room)) - inner):
        for module in _imports(file):
            if module.partition(".")[0] in OURS and module not in OURS:
                assert any(_within(module, other) for other in allowed), f"{file.relative_to(ROOT)} imports {module}"


def test_no_room_lacks_a_rule() -> None:
    with_code = {file.relative_to(ROOT).parts for top in ("common", "services") for file in _files(top)}
    rooms = {".".join(parts[:2]) for parts in with_code if len(parts) > 2}
    assert rooms <= set(_rooms())


def _reached(start: set[str]) -> dict[str, str]:
    """Every module that importing ``start`` imports, ours followed into their files, with who imports it."""
    reached: dict[str, str] = {}
    waiting = [(module, "the start") for module in start]
    while waiting:
        module, importer = waiting.pop()
        if module in reached:
            continue
        reached[module] = importer
        if module.partition(".")[0] not in OURS:
            continue
        parts = module.split(".")
        for depth in range(1, len(parts) + 1):
            base = ROOT.joinpath(*parts[:depth])
            for file in (base.with_suffix(".py"), base / "__init__.py"):
                if file.exists():
                    waiting += [(found, ".".join(parts[:depth])) for found in _imports(file)]
    return reached


@pytest.mark.parametrize("light", ["gateway", "services.scheduler", "common.messages", "common.policies", "common.bus"])
def test_light_processes_load_no_heavy_library(light: str) -> None:
    modules = {".".join(file.relative_to(ROOT).with_suffix("").parts) for file in _files(light)}
    for module, importer in _reached(modules).items():
        assert module.partition(".")[0] not in HEAVY, f"{light}: {importer} imports {module}"


def test_policies_are_pure() -> None:
    for file in _files("common.policies"):
        for module in _imports(file):
            assert module.partition(".")[0] not in IMPURE, f"{file.relative_to(ROOT)} imports {module}"


def test_the_command_line_answers_without_loading_the_stack() -> None:
    """``triptych --help`` must not wait for libraries: what a command needs is imported when it runs."""
    top_level = {
        alias.name if isinstance(node, ast.Import) else node.module or ""
        for node in ast.parse((ROOT / "compose" / "cli.py").read_text(encoding="utf-8")).body
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }
    assert all(
        module.partition(".")[0] in sys.stdlib_module_names or module == "compose.errors" for module in top_level
    )
