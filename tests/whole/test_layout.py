"""Imports point one way, and nothing but the documented packages is needed."""

import ast
import sys
from pathlib import Path

import pytest

import dp_hooks

PACKAGE = Path(dp_hooks.__file__).parent

# Each layer may import from the layers above it in this list, and from its own.
LAYERS = [
    {"errors"},
    {"_validate", "_tree"},
    {"rules", "slots", "noise", "clipping", "accounting", "report", "no_dropout", "eager"},
    {"gradients", "model_check", "sampling", "batch_axes", "attachments", "buffers", "surroundings"},
    {"lifted_gradients", "site_calls", "two_pass", "grad_samples", "passes"},
    {"lifting"},
    {"paths", "sites"},
    {"taps", "trials"},
    {"hook_controller"},
    {"judgement"},
    {"observed_call"},
    {"self_check"},
    {"optimizer"},
    {"scope"},
    {"privacy_engine", "step", "explain"},
    {"__init__"},
]
RANK = {name: i for i, layer in enumerate(LAYERS) for name in layer}
ALLOWED = {"torch", "opacus", "typing_extensions"}
FILES = sorted(PACKAGE.rglob("*.py"))


def _module(path):
    """Return the top-level module of the package that ``path`` belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def _imports(path):
    """Return (modules of this package, other packages) imported by the file, wherever in it the import stands."""
    depth = len(path.relative_to(PACKAGE).parts)
    inside, outside = set(), set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            outside |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            outside.add(str(node.module).split(".")[0])
        elif isinstance(node, ast.ImportFrom) and node.level == depth:
            inside |= {node.module.split(".")[0]} if node.module else {alias.name for alias in node.names}
    return inside, outside


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_one_way(path):
    """A file imports only from its own layer or lower ones, and each file belongs to a layer."""
    inside, _ = _imports(path)
    rank = RANK[_module(path)]
    upward = {name for name in inside if RANK[name] > rank}
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
