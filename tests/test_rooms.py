"""The house: a file imports its own wing and earlier ones, the core needs torch alone, no circle."""

import ast
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import ewavit

PACKAGE = Path(ewavit.__file__).parent
# A wing may import itself and every wing before it. Integrations import the core only.
ORDER = (
    "errors", "files", "core", "integrations", "data", "points", "tasks", "training", "study", "compare",
    "cli",
)  # fmt: skip
FILES = sorted(PACKAGE.rglob("*.py"))
# What users import from; the wings never import the door.
DOOR = [PACKAGE / "__init__.py", PACKAGE / "distributed.py"]


def room(file: Path) -> str:
    """`ewavit.core.moe` for ewavit/core/moe.py, `ewavit.core` for the wing's own file."""
    parts = file.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def wing(name: str) -> str:
    return name.split(".")[1] if "." in name else ""


def imports(file: Path, late: bool = True) -> set[str]:
    """The modules that a file imports; with `late`, within functions and under TYPE_CHECKING as well."""
    tree = ast.parse(file.read_text())
    nodes = ast.walk(tree) if late else iter(tree.body)
    package = room(file).split(".") if file.name == "__init__.py" else room(file).split(".")[:-1]
    found: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            rooms = {f"{module}.{alias.name}" for alias in node.names} & ROOMS
            found |= rooms or {module}
    return found


ROOMS = {room(file) for file in FILES}


@pytest.mark.parametrize("file", [file for file in FILES if file not in DOOR], ids=room)
def test_a_file_imports_its_own_wing_and_earlier_ones(file):
    mine = wing(room(file))
    # Integrations import no other wing than the core and what is before it.
    last = "core" if mine == "integrations" else mine
    allowed = {*ORDER[: ORDER.index(last) + 1], mine}
    for name in imports(file):
        if name.split(".")[0] == "ewavit" and name != "ewavit":  # `import ewavit` alone is the door's version
            assert wing(name) in allowed, f"{room(file)} imports {name}"


@pytest.mark.parametrize("file", [f for f in FILES if wing(room(f)) in ("core", "errors", "files")], ids=room)
def test_the_core_imports_torch_and_the_standard_library_only(file):
    for name in imports(file):
        top = name.split(".")[0]
        assert top in {"torch", "ewavit"} | sys.stdlib_module_names, f"{room(file)} imports {name}"


def test_no_files_import_each_other_in_a_circle():
    graph = {room(file): imports(file) & ROOMS - {room(file)} for file in FILES if file not in DOOR}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as circle:
        pytest.fail(" -> ".join(circle.args[1]))


def test_every_file_belongs_to_a_wing():
    assert {wing(room(file)) for file in FILES if file not in DOOR} <= set(ORDER)


def test_the_door_imports_nothing_but_the_errors_until_a_name_is_used():
    def wings(file: Path, late: bool) -> set[str]:
        return {wing(name) for name in imports(file, late) if name.startswith("ewavit")}

    door, distributed = DOOR
    assert wings(door, late=False) == {"errors"}
    assert wings(door, late=True) <= {
        "errors",
        "core",
        "distributed",
        "training",
    }  # `load` opens the trainer
    assert wings(distributed, late=True) == {"core"}


@pytest.mark.parametrize("file", sorted(Path(__file__).parent.glob("test_*.py")), ids=lambda file: file.stem)
def test_no_test_imports_another_one(file):
    nodes = ast.walk(ast.parse(file.read_text()))
    found = [node for node in nodes if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {getattr(node, "module", None) or node.names[0].name for node in found}
    assert not {name for name in names if name.startswith("test_")}
