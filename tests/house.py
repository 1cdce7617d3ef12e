"""How the house stands, and what of it goes too far: rooms, circles, arrows that run back, sizes.

    python tests/house.py [checkout]

A room is a folder of the package; files beside the folders stand for themselves. An arrow is an import of one file by
another; it runs back where it leads from a floor to one above, or to a sibling that is to be independent, by the floors
in the checkout's own pyproject.toml. Prints a table for any version of the project, and exits 1 with the name of each
thing beyond a limit, and of test files that pytest would confuse. import-linter says which lines make an arrow or a
circle; it does not see sizes, nor which part of torch is imported.
"""

from __future__ import annotations

import ast
import statistics
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import grimp

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PACKAGE = "minitron_nemo"
ROOM_LINES, MODULE_LINES, MEDIAN_LINES, FUNCTION_LINES = 3000, 500, 170, 60
TALKS = ("parallel", "platform", "runtime")
"""Where torch.distributed is imported."""


@dataclass(frozen=True)
class Module:
    name: str
    """Below the package: `pruning.plan`; that of a folder itself is the folder's."""
    lines: int
    functions: list[tuple[str, int]]
    """(name, lines from its `def` to its end)."""
    talks: bool
    """Whether it names torch.distributed."""

    @property
    def room(self) -> str:
        return self.name.partition(".")[0]


def read_module(file: Path, package: Path) -> Module:
    text = file.read_text()
    tree = ast.parse(text)
    parts = file.relative_to(package).with_suffix("").parts
    nodes = list(ast.walk(tree))
    functions = [
        (node.name, node.end_lineno - node.lineno + 1)
        for node in nodes
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno is not None
    ]
    return Module(
        ".".join(parts[:-1] if parts[-1] == "__init__" else parts),
        len(text.splitlines()),
        functions,
        any(map(_names_torch_distributed, nodes)),
    )


def _names_torch_distributed(node: ast.AST) -> bool:
    if isinstance(node, ast.Import):
        return any(alias.name.startswith("torch.distributed") for alias in node.names)
    if isinstance(node, ast.ImportFrom):
        of_torch = node.module == "torch" and any(alias.name == "distributed" for alias in node.names)
        return of_torch or (node.module or "").startswith("torch.distributed")
    return isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.distributed"


def read_arrows(source: Path) -> set[tuple[str, str]]:
    """(importer, imported), modules by their names below the package."""
    sys.path.insert(0, str(source))
    graph = grimp.build_graph(PACKAGE, cache_dir=None)
    below = f"{PACKAGE}."
    return {
        (importer.removeprefix(below), imported.removeprefix(below))
        for importer in graph.modules
        for imported in graph.find_modules_directly_imported_by(importer)
        if importer.startswith(below) and imported.startswith(below)
    }


def circles(arrows: Iterable[tuple[str, str]]) -> list[list[str]]:
    """Groups whose members all reach one another."""
    reached: dict[str, set[str]] = {}
    for start, end in arrows:
        reached.setdefault(start, set()).add(end)
    while True:
        further = {start: ends.union(*(reached.get(end, ()) for end in ends)) for start, ends in reached.items()}
        if further == reached:
            break
        reached = further
    found = {start: sorted(end for end in ends if start in reached.get(end, ())) for start, ends in reached.items()}
    return sorted({tuple(group): list(group) for group in found.values() if len(group) > 1}.values())


def read_floors(pyproject: Path) -> list[tuple[set[str], bool]]:
    """From the uppermost down: (rooms of the floor, whether they are independent)."""
    contracts = tomllib.loads(pyproject.read_text())["tool"]["importlinter"]["contracts"]
    layers = next((each["layers"] for each in contracts if each["type"] == "layers"), [])
    return [({name.strip("() ") for name in layer.replace("|", ":").split(":")}, "|" in layer) for layer in layers]


def running_back(arrows: Iterable[tuple[str, str]], floors: list[tuple[set[str], bool]]) -> list[tuple[str, str]]:
    place = {room: number for number, (rooms, _) in enumerate(floors) for room in rooms}
    found = []
    for arrow in sorted(arrows):
        start, end = (name.partition(".")[0] for name in arrow)
        if start == end or start not in place or end not in place:
            continue
        if place[start] > place[end] or (place[start] == place[end] and floors[place[start]][1]):
            found.append(arrow)
    return found


def too_much(modules: list[Module], rooms: Mapping[str, list[Module]]) -> list[str]:
    """What is beyond a limit: its name, its size, the limit."""
    found = []
    for room, inside in rooms.items():
        if (lines := sum(module.lines for module in inside)) > ROOM_LINES:
            found.append(f"{room}/ has {lines} lines; the limit of a room is {ROOM_LINES}.")
    for module in modules:
        if module.lines > MODULE_LINES:
            found.append(f"{module.name} has {module.lines} lines; the limit of a module is {MODULE_LINES}.")
        for name, lines in module.functions:
            if lines > FUNCTION_LINES:
                found.append(f"{module.name}.{name} has {lines} lines; the limit of a function is {FUNCTION_LINES}.")
        if module.talks and module.room not in TALKS:
            found.append(f"{module.name} names torch.distributed; only {', '.join(TALKS)} may.")
    if (median := statistics.median(module.lines for module in modules)) > MEDIAN_LINES:
        found.append(f"The median module has {median:g} lines; the limit is {MEDIAN_LINES}.")
    return found


def alike(tests: Path) -> list[str]:
    """Test files of one name: without packages around them, pytest takes the second for the first."""
    places: dict[str, list[str]] = {}
    for file in sorted(tests.rglob("test_*.py")):
        places.setdefault(file.name, []).append(str(file.relative_to(tests.parent)))
    return [f"{' and '.join(files)} have one name; pytest wants two." for files in places.values() if len(files) > 1]


def show(modules: list[Module], rooms: Mapping[str, list[Module]], arrows: set[tuple[str, str]], root: Path) -> None:
    print(f"{'room':16}{'files':>6}{'lines':>8}")
    for room, inside in sorted(rooms.items(), key=lambda each: -sum(module.lines for module in each[1])):
        print(f"{room + '/':16}{len(inside):6}{sum(module.lines for module in inside):8}")
    beside = [module for module in modules if module.room not in rooms]
    print(f"{'(beside them)':16}{len(beside):6}{sum(module.lines for module in beside):8}")
    print(f"{'all':16}{len(modules):6}{sum(module.lines for module in modules):8}\n")

    between = {(start.partition(".")[0], end.partition(".")[0]) for start, end in arrows}
    for what, found in (("rooms", circles(pair for pair in between if pair[0] != pair[1])), ("files", circles(arrows))):
        print(f"circles of {what}: {len(found)}" + "".join(f"\n    {', '.join(group)}" for group in found))
    back = running_back(arrows, read_floors(root / "pyproject.toml"))
    print(f"arrows that run back: {len(back)} of {len(arrows)}" + "".join(f"\n    {a} -> {b}" for a, b in back))

    sizes = sorted(module.lines for module in modules)
    longest = max(modules, key=lambda module: module.lines)
    print(f"\nlines of a module: median {statistics.median(sizes):g}, p90 {sizes[int(0.9 * len(sizes))]}, ", end="")
    print(f"max {longest.lines} ({longest.name})")
    lines, name = max((lines, f"{module.name}.{name}") for module in modules for name, lines in module.functions)
    print(f"longest function: {lines} ({name})")


def main() -> int:
    root = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parents[1]).resolve()
    package = root / "src" / PACKAGE
    modules = [read_module(file, package) for file in sorted(package.rglob("*.py"))]
    rooms = {
        folder.name: [module for module in modules if module.room == folder.name]
        for folder in sorted(package.iterdir())
        if (folder / "__init__.py").is_file()
    }
    show(modules, rooms, read_arrows(root / "src"), root)
    offences = too_much(modules, rooms) + alike(root / "tests")
    if offences:
        print("\n" + "\n".join(offences))
    return 1 if offences else 0


if __name__ == "__main__":
    sys.exit(main())
