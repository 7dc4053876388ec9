"""The package's rooms: how many, how large, and which may import from which."""

import ast
import statistics
import sys
from pathlib import Path

import pytest

import dp_hooks

PACKAGE = Path(dp_hooks.__file__).parent
TESTS = Path(__file__).parent.parent
FILES = sorted(PACKAGE.rglob("*.py"))

# For every room, what it may import from: those of lower rank, unless they are never to meet. Its own files, always.
ROOMS = [
    {"errors"},
    {"_validate", "_tree", "_operations", "_precision", "_dropout_masks"},
    {"_no_randomness"},
    {"_rerun"},
    {"rules", "privacy.noise", "distributed"},
    {"gradients", "privacy.accounting"},
    {"capture.calls", "privacy.clipping", "privacy.plots"},
    {"capture.samples", "privacy.sampling"},
    {"capture", "privacy.report"},
    {"checks", "privacy"},
    {"training"},
    {"audit"},
    {"integrations"},
    {"__init__"},
    {"__main__"},
]
RANK = {room: rank for rank, rooms in enumerate(ROOMS) for room in rooms}
# Neither imports from the other.
APART = [({"privacy", "distributed"}, {"rules", "gradients", "capture", "checks"}), ({"privacy"}, {"distributed"})]
# numpy: opacus itself depends on it (numpy>=1.15 in its metadata), so it is always there; for privacy loss distributions.
TRUSTED = {"torch", "opacus", "typing_extensions", "numpy"}

# Outside of integrations, and imported where it is used: what draws, and the stream of an audited cipher where there is one.
OPTIONAL = {"privacy.plots": {"matplotlib"}, "privacy.noise.secret_bytes": {"cryptography"}}

MOST_FILES_ON_TOP = 10
MOST_FOLDERS_ON_TOP = 9
MOST_LINES = {
    "a file": 450,
    "the rest": 16_500,
    "privacy": 5_800,
    "integrations": 2_500,
    "audit": 1_800,
    "the file in the middle": 130,
}


def name_of(path):
    """Return the dotted name of a file below the package; a folder's ``__init__`` has the folder's name."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


NAMES = {name_of(path): path for path in FILES}


def room_of(name):
    """Return the room that a file is in: the longest part of its name that has a rank."""
    while name and name not in RANK:
        name = name.rpartition(".")[0]
    assert name, "a file in no room: give it a rank"
    return name


def imports_of(path):
    """Return ``{(file, name)}`` imported from the package, wherever the import stands, and ``{package}`` from outside."""
    inside, outside = set(), set()
    here = path.relative_to(PACKAGE).parent.parts
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            outside |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            outside.add(str(node.module).split(".")[0])
        elif isinstance(node, ast.ImportFrom):
            base = here[: len(here) - node.level + 1] + tuple((node.module or "").split(".") if node.module else ())
            for alias in node.names:
                whole = ".".join((*base, alias.name))  # a file, or a name in one
                inside.add((whole, "") if whole in NAMES else (".".join(base) or "__init__", alias.name))
    return inside, outside


each_file = pytest.mark.parametrize("path", FILES, ids=name_of)


@each_file
def test_imports_point_one_way(path):
    """A file imports from rooms below its own only, and from its own; some rooms never meet."""
    mine = room_of(name_of(path))
    for name, _ in imports_of(path)[0]:
        other = room_of(name)
        assert other == mine or RANK[other] < RANK[mine], f"{mine} imports {name}"
        for some, others in APART:
            pair = {mine.split(".")[0], other.split(".")[0]}
            assert not (pair & some and pair & others), f"{mine} imports {name}"


def test_files_of_a_room_do_not_import_in_circles():
    """Within a room there is an order of files, too: no file imports itself by way of others."""
    edges = {}
    for name, path in NAMES.items():
        found = {other for other, _ in imports_of(path)[0] if room_of(other) == room_of(name)}
        edges[name] = found

    def reached(start):
        seen, todo = set(), list(edges[start])
        while todo:
            name = todo.pop()
            if name not in seen:
                seen.add(name)
                todo.extend(edges.get(name, ()))
        return seen

    assert not [name for name in edges if name in reached(name)]


@each_file
def test_names_with_an_underscore_stay_in_their_room(path):
    """No private name of another room is imported, nor looked up in one of its files."""
    mine, inside = room_of(name_of(path)), imports_of(path)[0]
    foreign = {(name, what) for name, what in inside if room_of(name) != mine}
    assert not {(name, what) for name, what in foreign if what.startswith("_")}
    assert not {name for name, _ in foreign if any(p.startswith("_") for p in name.split(".")[1:])}
    files = {name.rpartition(".")[2] for name, what in foreign if not what}
    looked_up = {
        f"{node.value.id}.{node.attr}"
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in files
        if node.attr.startswith("_") and not node.attr.startswith("__")
    }
    assert not looked_up


@each_file
def test_only_declared_packages_are_imported(path):
    """The package needs torch, opacus, typing_extensions and numpy; what is optional is met in integrations, and in plots."""
    _, outside = imports_of(path)
    if room_of(name_of(path)) != "integrations":
        assert outside <= TRUSTED | OPTIONAL.get(name_of(path), set()) | set(sys.stdlib_module_names)


def test_what_is_optional_is_imported_where_it_is_used():
    """Files that may import an optional package do so inside functions, never when ``dp_hooks`` is imported."""
    for name, packages in OPTIONAL.items():
        body = ast.parse(NAMES[name].read_text()).body
        on_top = {ast.unparse(node) for node in body if isinstance(node, (ast.Import, ast.ImportFrom))}
        assert not {line for line in on_top if any(package in line for package in packages)}


def test_the_house_is_small():
    """There is a bar for the number of files and folders on top, and for the lines of a file and of all."""
    lines = {name: len(path.read_text().splitlines()) for name, path in NAMES.items()}
    assert len(list(PACKAGE.glob("*.py"))) <= MOST_FILES_ON_TOP
    assert len([d for d in PACKAGE.iterdir() if d.is_dir() and d.name != "__pycache__"]) <= MOST_FOLDERS_ON_TOP
    assert {name: n for name, n in lines.items() if n > MOST_LINES["a file"]} == {}
    assert statistics.median(lines.values()) <= MOST_LINES["the file in the middle"]
    for room in ("privacy", "integrations", "audit"):
        inside = [name for name in lines if room_of(name).split(".")[0] == room]
        assert sum(lines.pop(name) for name in inside) < MOST_LINES[room]
    assert sum(lines.values()) < MOST_LINES["the rest"]


def test_public_names_are_importable_and_typed():
    """Every name in ``__all__`` exists, and the package says that it is typed."""
    assert all(hasattr(dp_hooks, name) for name in dp_hooks.__all__)
    assert (PACKAGE / "py.typed").exists()


@pytest.mark.parametrize("path", sorted(TESTS.rglob("test_*.py")), ids=lambda p: str(p.relative_to(TESTS)))
def test_every_test_says_what_it_shows(path):
    """Each test function has a docstring that states the behaviour it shows."""
    tests = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.FunctionDef)]
    silent = [n.name for n in tests if n.name.startswith("test_") and not ast.get_docstring(n)]
    assert not silent


FACTORIES = "arange empty eye full linspace normal ones rand randint randn randperm tensor zeros".split()


@pytest.mark.parametrize("path", FILES, ids=map(name_of, FILES))
def test_new_tensors_say_on_which_device_they_are(path):
    """With ``torch.set_default_device`` a tensor that does not say so is somewhere else."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in {f"torch.{name}" for name in FACTORIES}:
            assert any(keyword.arg == "device" for keyword in node.keywords), f"line {node.lineno}"
