"""Measure the plan of the code: rooms, floors, circles, the longest function and argument list, lines.

    python tools/measure_house.py              # this checkout
    python tools/measure_house.py CHECKOUT     # another one, e.g. an older commit in a git worktree

A room is a file or a folder directly in src/ewavit, apart from the doors (`__init__.py`, `distributed.py`).
Every import counts: at the top, in functions, and under TYPE_CHECKING. An arrow leads from a room to one that
it imports. Floors are the rooms on the longest path of arrows, where rooms in a circle share one. A circle
is a set of files that import each other.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Hashable, Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import TypeVar

Node = TypeVar("Node", bound=Hashable)
Graph = dict[Node, set[Node]]
DOORS = ("ewavit", "ewavit.distributed")


def module_name(file: Path, source: Path) -> str:
    """`ewavit.core.moe` for src/ewavit/core/moe.py, `ewavit.core` for its `__init__.py`."""
    parts = file.relative_to(source).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(file: Path, name: str, modules: set[str]) -> Iterator[str]:
    """The modules of the package that a file imports."""
    package = name.split(".") if file.name == "__init__.py" else name.split(".")[:-1]
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in modules)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            below = {f"{module}.{alias.name}" for alias in node.names} & modules
            yield from below or {module} & modules


def room(name: str) -> str:
    """The room of a module."""
    parts = name.split(".")
    return parts[1] if len(parts) > 1 else ""


def components(graph: Graph[Node]) -> list[set[Node]]:
    """The sets of nodes that reach each other; most have one node."""

    @cache
    def reached(start: Node) -> frozenset[Node]:
        seen, waiting = {start}, [start]
        while waiting:
            new = graph[waiting.pop()] - seen
            seen |= new
            waiting += new
        return frozenset(seen)

    found: list[set[Node]] = []
    for node in graph:
        if not any(node in group for group in found):
            found.append({other for other in reached(node) if node in reached(other)})
    return found


def floors(graph: Graph[Node]) -> int:
    """Nodes on the longest path; nodes that reach each other count once."""
    groups = components(graph)
    of = {node: number for number, group in enumerate(groups) for node in group}

    @cache
    def height(number: int) -> int:
        below = {of[target] for node in groups[number] for target in graph[node]} - {number}
        return 1 + max(map(height, below), default=0)

    return max(height(number) for number in range(len(groups)))


def functions(files: Iterable[Path]) -> Iterator[tuple[str, int, int]]:
    """Name, lines and arguments of every function. Decorators and `self` do not count, docstrings do."""
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                spec = node.args
                names = [arg.arg for arg in (*spec.posonlyargs, *spec.args, *spec.kwonlyargs)]
                names += [arg.arg for arg in (spec.vararg, spec.kwarg) if arg]
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                count = len([name for name in names if name not in ("self", "cls")])
                yield f"{file.name}:{node.name}", lines, count


def kinds_of_lines(files: Iterable[Path]) -> tuple[int, int]:
    """Lines of code, and of docstrings and comments; blank lines between them count as neither."""
    code = text = 0
    for file in files:
        tree, lines = ast.parse(file.read_text()), file.read_text().splitlines()
        told = {number for number, line in enumerate(lines, 1) if line.strip().startswith("#")}
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node):
                told |= set(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
        text += len(told)
        code += sum(bool(line.strip()) and number not in told for number, line in enumerate(lines, 1))
    return code, text


def main() -> None:
    root = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent.parent
    source = root / "src"
    files = {module_name(file, source): file for file in sorted((source / "ewavit").rglob("*.py"))}
    inside = {name: file for name, file in files.items() if name not in DOORS}
    graph = {name: set(imports(file, name, set(inside))) - {name} for name, file in inside.items()}
    rooms: Graph[str] = {room(name): set() for name in inside}
    for name, targets in graph.items():
        rooms[room(name)] |= {room(target) for target in targets} - {room(name)}
    circles = [group for group in components(graph) if len(group) > 1]
    every = list(functions(files.values()))
    longest, widest = max(every, key=lambda f: f[1]), max(every, key=lambda f: f[2])
    rows = {
        "rooms": f"{len(rooms)}: {', '.join(rooms)}",
        "arrows between rooms": sum(map(len, rooms.values())),
        "floors": floors(rooms),
        "circles of files": f"{len(circles)}" + "".join(f"; {', '.join(sorted(c))}" for c in circles),
        "longest function, lines": f"{longest[1]} ({longest[0]})",
        "functions above 60 lines": sum(lines > 60 for _, lines, _ in every),
        "longest argument list": f"{widest[2]} ({widest[0]})",
        "argument lists above 8": sum(count > 8 for _, _, count in every),
    }
    code, text = kinds_of_lines(files.values())
    rows |= {"lines of code in src": f"{code:,}", "docstrings and comments in src": f"{text:,}"}
    for folder in ("src", "src/ewavit/core", "tests", "benchmarks", "tools"):
        lines = sum(len(file.read_text().splitlines()) for file in (root / folder).rglob("*.py"))
        rows[f"lines of Python in {folder}"] = f"{lines:,}"
    for what, value in rows.items():
        print(f"{what:38}{value}")


if __name__ == "__main__":
    main()
