"""The layers of CONTRIBUTING.md: who may import whom. Imports are read, not run."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = {"bstack": ROOT / "bstack", "bstk": ROOT / "format" / "bstk"}

# Ground floor first. A part may import its own floor and those below it; a part of the house that is on no floor fails.
FLOORS = [
    ["bstk"],
    ["bstack.errors", "bstack.folders", "bstack.memory", "bstack.progress", "bstack.settings", "bstack.workdir"],
    ["bstack.numerics", "bstack.kernels"],
    ["bstack.models", "bstack.codecs", "bstack.ordering"],
    ["bstack.calibration", "bstack.packed"],
    ["bstack.eval"],
    ["bstack.compression", "bstack.engine"],
    ["bstack.bench", "bstack.hub", "bstack.serve"],
    ["bstack.cli"],
    ["bstack", "bstack.__main__"],
]
FLOOR = {part: number for number, parts in enumerate(FLOORS) for part in parts}

# Stricter than the floors: arrays in, arrays out. These know neither models nor files.
ONLY = {
    "bstack.numerics": set(),
    "bstack.kernels": {"bstk", "bstack.errors"},
    "bstack.codecs": {"bstk", "bstack.errors", "bstack.settings", "bstack.numerics", "bstack.kernels"},
}


def modules():
    found = {}
    for package, folder in SOURCES.items():
        for file in sorted(folder.rglob("*.py")):
            parts = [package, *file.relative_to(folder).with_suffix("").parts]
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


MODULES = modules()


def imports(name):
    """Every module that a module imports, at its top or inside a function, as a full name."""
    file = MODULES[name]
    package = name if file.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                full = f"{base}.{alias.name}"
                yield full if full in MODULES else base


def part(name):
    """The part of the house that a module belongs to."""
    return name if name in FLOOR else part(name.rpartition(".")[0]) if "." in name else name


def home(name):
    """As `part`, but a module of the package bstack itself belongs only where it is listed."""
    found = part(name)
    return name if found == "bstack" != name else found


OURS = {name: {target for target in imports(name) if target.split(".")[0] in SOURCES} - {name} for name in MODULES}


def test_every_module_has_a_floor():
    assert sorted(name for name in MODULES if home(name) not in FLOOR) == []


def test_nothing_imports_upward():
    upward = {
        (name, target)
        for name, targets in OURS.items()
        for target in targets
        if FLOOR[home(target)] > FLOOR[home(name)]
    }
    assert upward == set()


@pytest.mark.parametrize("inside", ONLY)
def test_parts_that_know_only_arrays(inside):
    allowed = ONLY[inside] | {inside}
    found = {home(target) for name, targets in OURS.items() if home(name) == inside for target in targets}
    assert found <= allowed


def test_compressing_needs_neither_the_bench_nor_the_engine():
    reached, left = set(), [name for name in MODULES if home(name) == "bstack.compression"]
    while left:
        name = left.pop()
        if name not in reached:
            reached.add(name)
            left += OURS.get(name, ())
    assert not {name for name in reached if home(name) in ("bstack.bench", "bstack.engine")}


def circle(graph):
    """Some circle of a graph, as a list of names; empty when there is none."""
    done, path = set(), []

    def visit(name):
        if name in path:
            return [*path[path.index(name) :], name]
        if name in done:
            return []
        path.append(name)
        for target in sorted(graph.get(name, ())):
            if found := visit(target):
                return found
        path.pop()
        done.add(name)
        return []

    return next((found for name in sorted(graph) if (found := visit(name))), [])


def test_no_circles_among_modules():
    assert circle(OURS) == []


def test_no_circles_among_parts():
    parts = {}
    for name, targets in OURS.items():
        parts.setdefault(home(name), set()).update({home(target) for target in targets} - {home(name)})
    assert circle(parts) == []


def test_circles_are_found():
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]


# What the container asks of other packages, and where: zstd, which Python has in `compression` from 3.14 on. requests (with its
# urllib3) is optional.
OUTSIDE = {"bstk.frames": {"backports"}, "bstk.http": {"requests", "urllib3"}}


def test_the_container_needs_nothing_but_zstd():
    outside = {}
    for name in MODULES:
        if home(name) == "bstk":
            outside[name] = (
                {target.split(".")[0] for target in imports(name)} - sys.stdlib_module_names - {"bstk", "compression"}
            )
    assert {name: found for name, found in outside.items() if found} == OUTSIDE


def test_the_container_imports_its_http_client_inside_functions():
    top = ast.parse(MODULES["bstk.http"].read_text(encoding="utf-8")).body
    assert not {"requests", "urllib3"} & {
        name
        for node in top
        for name in ast.unparse(node).replace(".", " ").split()
        if isinstance(node, (ast.Import, ast.ImportFrom))
    }


def test_the_command_line_imports_no_torch_at_its_top():
    # What a command needs of the arithmetic half it imports inside its function; tests/cli/test_main.py runs it.
    heavy = {"torch", "transformers", "numpy", "safetensors"}
    for name, file in MODULES.items():
        if home(name) in ("bstack.cli", "bstack", *FLOORS[1]):
            top = ast.parse(file.read_text(encoding="utf-8")).body
            found = {alias.name.split(".")[0] for node in top if isinstance(node, ast.Import) for alias in node.names}
            found |= {node.module.split(".")[0] for node in top if isinstance(node, ast.ImportFrom) and node.module}
            assert not found & heavy, name


def test_the_floors_stand_in_the_docs():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    for place in [p.removeprefix("bstack.") for p in FLOOR if p not in ("bstack", "bstack.__main__")]:
        assert f"`{place}`" in text, place


@pytest.mark.parametrize(
    ("name", "own", "users"), [("OMP_WAIT_POLICY", "PASSIVE", "ACTIVE"), ("OPENBLAS_THREAD_TIMEOUT", "4", "20")]
)
def test_threads_that_wait_let_go_of_the_processor(name, own, users):
    """In the command line, before torch and numpy are imported: their libraries read the variable when they are loaded."""
    code = (
        "import os, sys, atexit\n"
        f"def show(): print(os.environ['{name}'], file=sys.stderr)\n"
        "atexit.register(show); sys.argv[1:] = ['--help']\n"
        "from bstack.__main__ import main; assert not {'torch', 'numpy'} & sys.modules.keys(); main()"
    )
    environment = {key: value for key, value in os.environ.items() if key != name}
    for given, expected in (({}, own), ({name: users}, users)):
        run = subprocess.run(
            [sys.executable, "-c", code], env=environment | given, capture_output=True, text=True, check=True
        )
        assert run.stderr.strip() == expected


@pytest.mark.slow
def test_importing_the_library_leaves_the_environment_alone():
    code = "import os; before = dict(os.environ); import bstack; bstack.load; assert before == dict(os.environ)"
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
