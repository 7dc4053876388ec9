"""Imports point one way, and nothing but the documented packages is needed."""

import ast
import sys
from pathlib import Path

import pytest

import dp_hooks

PACKAGE = Path(dp_hooks.__file__).parent

# Each layer may import from the layers above it in this list, and from its own.
LAYERS = [
    "errors",
    "_validate _tree _operations distributed",
    "_no_randomness",
    "_rerun privacy.noise",
    "rules privacy.clipping privacy.accounting privacy.report",
    "gradients privacy.sampling",
    "capture.calls",
    "capture.samples",
    "capture",
    "checks",
    "training integrations",
    "",
]
RANK = {name: i for i, layer in enumerate(LAYERS) for name in layer.split(" ")}
ALLOWED = {"torch", "opacus", "typing_extensions"}
FILES = sorted(PACKAGE.rglob("*.py"))


def _module(path):
    """Return the dotted name of the module in ``path``, without that of the package."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix("__init__").rstrip(".")


def _rank(module):
    """Return the rank of the longest listed name that ``module`` is or is in."""
    while module not in RANK:
        module = module.rpartition(".")[0]
    return RANK[module]


def _is_module(name):
    """Whether ``name`` is a file or a folder of the package."""
    path = PACKAGE / name.replace(".", "/")
    return path.with_suffix(".py").exists() or (path / "__init__.py").exists()


def _imports(path):
    """Return (modules of this package, other packages) imported by the file, wherever in it the import stands."""
    here = path.relative_to(PACKAGE).parts
    inside, outside = set(), set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            outside |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            outside.add(str(node.module).split(".")[0])
        elif isinstance(node, ast.ImportFrom):
            base = [*here[: len(here) - node.level], *(node.module.split(".") if node.module else [])]
            names = [".".join([*base, alias.name]) for alias in node.names]
            if node.module:
                names.append(".".join(base))
            inside |= {name for name in names if _is_module(name)}
    return inside, outside


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_one_way(path):
    """A file imports only from its own layer or lower ones, and each file belongs to a layer."""
    inside, _ = _imports(path)
    rank = _rank(_module(path))
    upward = {name for name in inside if _rank(name) > rank}
    assert not upward


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_only_declared_packages_are_imported(path):
    """The package needs torch, opacus and typing_extensions, and nothing else outside the standard library."""
    _, outside = _imports(path)
    assert outside <= ALLOWED | set(sys.stdlib_module_names)


def test_siblings_do_not_import_in_circles():
    """Within a layer, no two modules import each other."""
    edges = {(_module(p), name) for p in FILES for name in _imports(p)[0] if name != _module(p)}
    assert not {(a, b) for a, b in edges if (b, a) in edges}


def test_public_names_are_importable_and_typed():
    """Every name in ``__all__`` exists, and the package says that it is typed."""
    assert all(hasattr(dp_hooks, name) for name in dp_hooks.__all__)
    assert (PACKAGE / "py.typed").exists()


@pytest.mark.parametrize("path", sorted(Path(__file__).parent.glob("test_*.py")), ids=lambda p: p.name)
def test_every_test_says_what_it_shows(path):
    """Each test function has a docstring that states the behaviour it shows."""
    tests = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.FunctionDef)]
    silent = [n.name for n in tests if n.name.startswith("test_") and not ast.get_docstring(n)]
    assert not silent
