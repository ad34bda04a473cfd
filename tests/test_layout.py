"""README's tree is the package: every room is in it once, and no import runs back up."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import catkernels

PACKAGE = Path(catkernels.__file__).parent


def tree() -> list[str]:
    """The rooms of README's tree, in the order of reading."""
    readme = (PACKAGE.parent / "README.md").read_text()
    lines = readme.partition("\ncatkernels/\n")[2].partition("\nbenchmarks/")[0].splitlines()
    # two spaces at least stand between a line's names and what is said of them
    names = " ".join(line.strip().partition("  ")[0] for line in lines)
    return [name.removesuffix("/") for name in names.split()]


def imported(file: Path) -> Iterator[str]:
    """The full names of all modules that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def room(name: str) -> str | None:
    """The file or folder of the package's root that a full name leads into."""
    package, _, rest = name.partition(".")
    stem = rest.partition(".")[0]
    if package != "catkernels" or not stem:
        return None
    return next((path for path in (stem, f"{stem}.py") if (PACKAGE / path).exists()), None)


def test_every_room_is_in_it_once():
    named = sorted(tree())
    rooms = (path.name for path in PACKAGE.iterdir() if path.suffix in ("", ".py"))
    assert named == sorted(name for name in rooms if name != "__pycache__")


def test_no_import_runs_back_up():
    place = {name: index for index, name in enumerate(tree())}
    for file in PACKAGE.rglob("*.py"):
        own = place[file.relative_to(PACKAGE).parts[0]]
        up = [name for name in imported(file) if place.get(room(name), own) < own]
        assert not up, f"{file} imports what stands above it: {up}"


def test_only_the_kernels_import_triton():
    importing = {
        file.relative_to(PACKAGE).parts[0]
        for file in PACKAGE.rglob("*.py")
        if any(name.partition(".")[0] == "triton" for name in imported(file))
    }
    assert importing == {"kernels"}
