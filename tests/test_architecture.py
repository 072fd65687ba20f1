"""The rooms of docs/architecture.md: who may import whom, and how large files and functions may be.

Imports are read from the source, those inside functions included; those under `if TYPE_CHECKING:` never run and do not
count.
"""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
SOURCE = REPOSITORY / "src" / "mirasol"

PAGE = (REPOSITORY / "docs" / "architecture.md").read_text(encoding="utf-8")
ROW = re.compile(r"^\| `(\w+)` \| .* \| ([\w`, ]*) ?\|$", re.MULTILINE)
HELPERS = ("files", "json_values", "console", "processes")


def read_arrows() -> dict[str, set[str]]:
    """The rooms that each room may import, itself left out, as the page's table has them."""
    arrows = {room: {"errors", *re.findall(r"\w+", allowed)} for room, allowed in ROW.findall(PAGE)}
    for room in arrows.keys() - {"config", "model"}:
        arrows[room] |= set(HELPERS)
    return arrows | {helper: {"errors"} for helper in HELPERS} | {"errors": set()}


ROOMS = read_arrows()
FILES_OF_A_ROOM, LINES_OF_A_FILE, LINES_OF_A_FUNCTION, USUAL_LINES, SHARE_OF_USUAL = 18, 600, 100, 45, 0.9

# What still breaks a rule: entries are only ever taken out.
IMPORTS_TO_MEND: set[tuple[str, str]] = set()
CIRCLES_TO_MEND: set[frozenset[str]] = set()
ROOMS_TO_MEND: set[str] = set()


def list_modules() -> dict[str, Path]:
    """Every module of the package by its dotted name without `mirasol.`."""
    modules = {}
    for path in sorted(SOURCE.rglob("*.py")):
        parts = path.relative_to(SOURCE).with_suffix("").parts
        modules[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return modules


MODULES = list_modules()


@cache
def parse(module: str) -> ast.Module:
    return ast.parse(MODULES[module].read_text(encoding="utf-8"))


@cache
def find_imports(module: str) -> frozenset[str]:
    """The package's modules that a module imports when it runs, wherever in it the import is."""
    found = set()
    skipped = set()
    for node in ast.walk(parse(module)):
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            skipped |= {id(inner) for statement in node.body for inner in ast.walk(statement)}
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: imports are absolute"
            names = {f"{node.module}.{name.name}" for name in node.names}
            modules = {name for name in names if name.removeprefix("mirasol.") in MODULES}
            found |= modules if modules == names else {*modules, node.module}
    inside = {name.removeprefix("mirasol.") for name in found if name.startswith("mirasol.")}
    return frozenset(inside & MODULES.keys() - {module, ""})


def find_room(module: str) -> str:
    return module.split(".")[0]


def list_names(module: str) -> set[str]:
    """What can be imported from a module: the names it binds at its top level, and its submodules."""
    names = {name.rpartition(".")[2] for name in MODULES if name.rpartition(".")[0] == module}
    statements = list(parse(module).body)
    for node in statements:
        if isinstance(node, ast.If | ast.Try):
            statements += [*node.body, *node.orelse]
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names |= {name.asname or name.name for name in node.names}
        else:
            names |= {inner.id for inner in ast.walk(node) if isinstance(inner, ast.Name)}
    return names


@pytest.mark.parametrize("folder", ["src", "tests", "benchmarks", "docs"])
def test_every_imported_name_exists(folder):
    """Imports inside functions fail only when they run: here all are looked up."""
    absent = []
    for path in sorted((REPOSITORY / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.ImportFrom) or not (node.module or "").startswith("mirasol."):
                continue
            module = node.module.removeprefix("mirasol.")
            names = {name.name for name in node.names}
            known = list_names(module) if module in MODULES else set()
            absent += [f"{path.relative_to(REPOSITORY)}:{node.lineno}: {module}.{name}" for name in names - known]
    assert absent == []


def test_every_room_is_known():
    assert {find_room(module) for module in MODULES} - {""} <= ROOMS.keys()


def test_rooms_import_only_what_the_arrows_allow():
    broken = {
        (module, imported)
        for module in MODULES
        if module
        for imported in find_imports(module)
        if find_room(imported) not in (find_room(module), *ROOMS[find_room(module)])
    }
    assert broken <= IMPORTS_TO_MEND


def test_no_rooms_import_each_other_in_a_circle():
    assert find_circles({room: frozenset(allowed) for room, allowed in ROOMS.items()}) == []


def test_no_modules_import_each_other_in_a_circle():
    circles = {frozenset(component) for component in find_circles({m: find_imports(m) for m in MODULES if m})}
    assert circles <= CIRCLES_TO_MEND


def find_circles(edges: dict[str, frozenset[str]]) -> list[list[str]]:
    """The groups of modules that reach each other (Tarjan's strongly connected components of more than one)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    groups = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for following in edges[node]:
            if following not in index:
                visit(following)
                low[node] = min(low[node], low[following])
            elif following in stack:
                low[node] = min(low[node], index[following])
        if low[node] == index[node]:
            place = stack.index(node)
            group = stack[place:]
            del stack[place:]
            if len(group) > 1:
                groups.append(sorted(group))

    for node in edges:
        if node not in index:
            visit(node)
    return groups


def test_circles_are_found():
    edges = {"a": frozenset("b"), "b": frozenset("c"), "c": frozenset("a"), "d": frozenset("a"), "e": frozenset()}
    assert find_circles(edges) == [["a", "b", "c"]]


@pytest.mark.parametrize("folder", sorted({path.parent for path in MODULES.values()}), ids=lambda path: path.name)
def test_no_room_has_too_many_files(folder):
    files = [path for path in folder.glob("*.py") if path.name != "__init__.py"]
    assert len(files) <= FILES_OF_A_ROOM or folder.name in ROOMS_TO_MEND, [path.name for path in files]


def test_no_file_is_too_long():
    lengths = {module: len(path.read_text(encoding="utf-8").splitlines()) for module, path in MODULES.items()}
    assert {module: length for module, length in lengths.items() if length > LINES_OF_A_FILE} == {}


def test_functions_are_short():
    lengths = {}
    for module in MODULES:
        for node in ast.walk(parse(module)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lengths[f"{module}.{node.name}:{node.lineno}"] = node.end_lineno - node.lineno + 1
    assert {name: length for name, length in lengths.items() if length > LINES_OF_A_FUNCTION} == {}
    usual = sum(length <= USUAL_LINES for length in lengths.values())
    assert usual / len(lengths) >= SHARE_OF_USUAL
