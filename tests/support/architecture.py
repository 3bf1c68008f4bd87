"""What the files of a package import, and what of it breaks the order of docs/architecture.md.

A file has the name that it is imported by, as ``package.kernels.eager``. An import inside a
function, or for types only, counts as any other.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass
from pathlib import Path

MOST_LINES = 350
MOST_FILES_AT_ROOT = 6

# What a folder, or a file at the root, may import besides what is in it: the package without its
# own name. "" is the package's __init__.py.
BELOW = {
    "kernels": (),
    "functional": ("kernels",),
    "modules": ("functional", "kernels"),
    "convert.state": ("modules", "functional", "kernels"),
    "convert.recording": ("convert.state", "modules", "functional", "kernels"),
    "convert.recognition": (
        *("convert.recording", "convert.state", "modules", "functional", "kernels"),
    ),
    "convert": ("modules", "functional", "kernels"),
    "memory": ("kernels.layout",),
    "models": ("modules", "functional.modes", "kernels"),
    "fit": ("memory", "modules", "functional.modes", "kernels"),
    "training": ("fit", "convert", "models", "memory", "modules", "functional.modes"),
    "cli": ("training", "fit", "models", "convert", "memory", "modules", "functional", "kernels"),
    "__main__": ("cli",),
    "": ("training", "fit", "models", "convert", "memory", "modules", "functional", "kernels"),
}
# Where a package may be imported that not everyone has.
OPTIONAL = {
    "triton": ("kernels.triton",),
    "lightning": ("training.run", "training.callbacks"),
    "matplotlib": ("training.pictures", "training.summary", "memory.report"),
    "rich": ("training.pictures", "training.summary"),
}


@dataclass(frozen=True)
class Import:
    """``source`` names ``module``, and of it ``name`` or nothing."""

    source: str
    line: int
    module: str
    name: str = ""

    def target(self, files: dict[str, Path]) -> str:
        """The file that is imported, or the module where it is none of ``files``."""
        whole = f"{self.module}.{self.name}"
        return whole if whole in files else self.module

    def __str__(self) -> str:
        return f"{self.source}, line {self.line}: {self.module} {self.name}".rstrip()


def files_of(root: Path) -> dict[str, Path]:
    """The files of a package by the names that they are imported by."""
    files = {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root.parent).with_suffix("").parts
        files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return files


def imports_of(root: Path) -> list[Import]:
    """Every import in the files of a package."""
    found = []
    for source, path in files_of(root).items():
        folder = source if path.name == "__init__.py" else source.rpartition(".")[0]
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found += [Import(source, node.lineno, alias.name) for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                module = node.module or ""
                if node.level:
                    above = folder.split(".")[: 1 - node.level or None]
                    module = ".".join([*above, module]).rstrip(".")
                found += [Import(source, node.lineno, module, alias.name) for alias in node.names]
    return found


def is_in(name: str, folder: str) -> bool:
    return name == folder or name.startswith(f"{folder}.")


def going_up(root: Path) -> list[str]:
    """Imports of files of the package that are not below the importing one's folder."""
    files, package = files_of(root), root.name
    faults = []
    for found in imports_of(root):
        source = found.source.removeprefix(package).removeprefix(".")
        folder = max((name for name in BELOW if is_in(source, name)), key=len)
        allowed = [f"{package}.{name}" for name in (folder, *BELOW[folder]) if name]
        target = found.target(files)
        if is_in(target, package) and not any(is_in(target, name) for name in allowed):
            faults.append(str(found))
    return faults


def circles(root: Path) -> list[str]:
    """Files that import themselves by way of others."""
    files = files_of(root)
    graph: dict[str, set[str]] = {name: set() for name in files}
    for found in imports_of(root):
        graph[found.source] |= {found.target(files)} & files.keys()
    done: set[str] = set()
    faults = []

    def walk(name: str, way: list[str]) -> None:
        if name in way:
            faults.append(" → ".join([*way[way.index(name) :], name]))
        elif name not in done:
            for target in sorted(graph[name]):
                walk(target, [*way, name])
            done.add(name)

    for name in graph:
        walk(name, [])
    return faults


def optional_elsewhere(root: Path) -> list[str]:
    """Optional packages imported outside of the files that need them."""
    faults = []
    for found in imports_of(root):
        places = OPTIONAL.get(found.module.partition(".")[0])
        if places and not any(is_in(found.source, f"{root.name}.{place}") for place in places):
            faults.append(str(found))
    return faults


def crowded_root(root: Path) -> list[str]:
    """The files at the root, if there are too many."""
    found = sorted(path.name for path in root.glob("*.py"))
    return found if len(found) > MOST_FILES_AT_ROOT else []


def long_files(root: Path) -> list[str]:
    counts = {
        name: len(path.read_text(encoding="utf-8").splitlines())
        for name, path in files_of(root).items()
    }
    return [f"{name}: {count} lines" for name, count in counts.items() if count > MOST_LINES]


def imported_tests(root: Path) -> list[str]:
    """Imports of a test, or of a ``conftest``, by files under ``root``."""
    stems = {path.stem for path in root.rglob("*.py")}
    tests = {stem for stem in stems if stem.startswith("test_") or stem == "conftest"}
    return [
        str(found) for found in imports_of(root) if tests & {*found.module.split("."), found.name}
    ]
