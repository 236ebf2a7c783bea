"""Who imports whom: modules import downwards only, and the specification stands alone.

Imports are read from the source, those inside of functions too.
"""

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# A module imports from the lines above its own, and from its own folder. `river_ext` is what importing it
# runs, the ops; its other names come from their modules when they are asked for.
ORDER = (
    ("river_ext._C", "river_ext.errors", "river_ext.threads", "river_ext.progress"),
    ("river_ext.variants", "river_ext.registration", "river_ext.checks", "river_ext.demo_tasks"),
    ("river_ext.ops",),
    ("river_ext",),
    ("river_ext.loading",),
    ("river_ext.quant",),
    ("river_ext.quant.imported",),
    ("river_ext.engine",),
    ("river_ext.calibration",),
    ("river_ext.model",),
    ("river_ext.evaluation", "river_ext.trace", "river_ext.thresholds", "river_ext.random_model"),
    ("river_ext.serve", "river_ext.benchmark", "river_ext.huggingface"),
    ("river_ext.scale",),
    ("river_cli",),
    ("river_ext.cli",),
    ("bench.lib",),
    ("bench.cpu", "bench.gpu", "bench.memory"),
    ("bench.figures", "bench.tables"),
    ("bench.report",),
)
LINES = {room: number for number, rooms in enumerate(ORDER) for room in rooms}
FOLDERS = {room for room in LINES if (ROOT / room.replace(".", "/")).is_dir() and room != "river_ext"}
PACKAGES = ("river_ext", "river_cli", "bench")
SPECIFICATION = "river_ext.reference"


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {name_of(path): path for package in PACKAGES for path in (ROOT / package).rglob("*.py")}


def imports_of(module: str) -> Iterator[str]:
    """Every module of this repository that `module` imports, but for what type checkers alone see."""
    package = module if MODULES[module].name == "__init__.py" else module.rpartition(".")[0]
    for node in nodes_that_run(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if is_ours(alias.name))
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            base = ".".join([*parents, *filter(None, [node.module])])
            for alias in node.names if is_ours(base) else ():
                inner = f"{base}.{alias.name}"
                yield inner if inner in MODULES or inner in LINES else base


def is_ours(module: str) -> bool:
    return module.partition(".")[0] in PACKAGES


def nodes_that_run(tree: ast.AST) -> Iterator[ast.AST]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        yield node
        yield from nodes_that_run(node)


def room_of(module: str) -> str:
    """The entry of ORDER that the module is, or the folder in which it lies."""
    room = module
    while room not in LINES:
        room = room.rpartition(".")[0]
        assert room in FOLDERS, f"{module} has no line in ORDER"
    return room


@pytest.mark.parametrize("module", sorted(MODULES.keys() - {SPECIFICATION, "bench"}))
def test_modules_import_downwards(module):
    room = room_of(module)
    for imported in imports_of(module):
        below = room_of(imported)
        same = below == room and room in FOLDERS
        assert same or LINES[below] < LINES[room], f"{module} imports {imported}"


def test_modules_import_each_other_in_no_circle():
    graph = {module: set(imports_of(module)) - {module} for module in MODULES}
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


def test_the_specification_imports_nothing_of_the_package():
    assert not list(imports_of(SPECIFICATION))


def test_nothing_imports_the_specification():
    importing = [module for module in MODULES if SPECIFICATION in imports_of(module)]
    assert not importing


def test_imports_are_seen():
    """In all their forms; else the other tests would pass on nothing."""
    assert {"river_ext.ops", "river_ext.quant.w4", "river_ext.engine.network"} <= set(
        imports_of("river_ext.engine.matmul")
    )
    inside_of_a_function = "river_ext.demo_tasks.generator"
    assert inside_of_a_function in imports_of("river_ext.evaluation.measure")
    assert "river_ext.threads" in imports_of("river_ext.model") and "bench.lib.gpu" in imports_of(
        "bench.gpu.ring"
    )
    assert "river_ext.loading.config" not in imports_of("river_ext.loading.families")  # for type checkers
