"""Who may import whom: read from the source of every file, imports inside functions included."""

import ast
import sys
from pathlib import Path

import pytest

import vitrify

ROOT = Path(vitrify.__file__).parent

# Part -> the parts it may import. Every part may import vitrify.errors, vitrify.files and the package itself.
ALLOWED = {
    "errors": set(),
    "files": set(),
    "ops": set(),
    "nn": {"ops"},
    "convert": {"nn"},
    "recipes": {"convert"},
    "cost": {"ops", "nn", "convert"},
    "accelerator": {"ops", "nn", "convert", "cost"},
    "models": set(),
    "data": set(),
    "artefact": {"convert", "models", "nn"},
    "train": {"convert", "artefact", "data", "nn", "ops"},
    # artefact: released checkpoints are read, and models described, by what it has for that.
    "nvs": {"convert", "train", "data", "cost", "nn", "artefact"},
    "tvm": {"ops", "nn", "convert", "artefact"},
    # models: it builds them by name, and they register themselves with timm when they are imported.
    # cost: its floors are what `vitrify probe` measures.
    "bench": {"ops", "nn", "convert", "models", "cost"},
}
# These stand at the top: they may import everything.
TOP = {"report", "cli", "__main__", "__init__"}
# These import nothing but torch (and triton) and the standard library.
TORCH_ONLY = {"ops", "nn"}

FILES = sorted(path for path in ROOT.rglob("*.py"))


def part_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported(source: str, package: str) -> set[str]:
    """Return every module that the source imports, relative imports resolved against `package`."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parents, *filter(None, [base])])
            # `from vitrify import artefact` imports a part, `from vitrify.ops import x` a name.
            found.update(f"{base}.{alias.name}" if base == "vitrify" else base for alias in node.names)
    return found


def forbidden(source: str, part: str, package: str) -> list[str]:
    modules = [name.split(".") for name in imported(source, package)]
    names = {name[1] for name in modules if name[0] == "vitrify" and len(name) > 1}
    # Public names (`from vitrify import Recipe`) are the package's lazy way into their parts.
    parts = {vitrify._PUBLIC[name].split(".")[1] if name in vitrify._PUBLIC else name for name in names}
    return sorted(parts - ALLOWED[part] - {part, "errors", "files", "__version__"})


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_downwards(path):
    part = part_of(path)
    if part in TOP:
        return
    assert part in ALLOWED, f"{part} is a new part of the package: say in ALLOWED what it may import"
    package = ".".join(["vitrify", *path.relative_to(ROOT).parts[:-1]])
    assert forbidden(path.read_text(), part, package) == []


@pytest.mark.parametrize(
    "path", [p for p in FILES if part_of(p) in TORCH_ONLY], ids=lambda path: str(path.relative_to(ROOT))
)
def test_the_primitives_need_torch_alone(path):
    tops = {name.split(".")[0] for name in imported(path.read_text(), "vitrify")}
    assert tops <= {"torch", "triton", "vitrify"} | set(sys.stdlib_module_names)


@pytest.mark.parametrize(
    ("line", "part", "found"),
    [
        ("from vitrify.convert import Recipe", "nn", ["convert"]),
        ("def f():\n    import vitrify.train.loop", "artefact", ["train"]),
        ("from vitrify import Recipe, save", "ops", ["artefact", "convert"]),
        ("from vitrify import cli", "train", ["cli"]),
        ("from ..nn import cores", "ops", ["nn"]),
        ("from vitrify.errors import InputError\nfrom vitrify.files import flush\nfrom vitrify.ops import x", "nn", []),
        ("import vitrify\nfrom vitrify import __version__", "ops", []),
    ],
)
def test_the_check_sees_each_way_to_import(line, part, found):
    assert forbidden(line, part, f"vitrify.{part}") == found
