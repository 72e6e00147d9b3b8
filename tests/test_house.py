"""The order of the rooms, as docs/design.md lists them: no import goes up, none in a circle, and no file is long."""

import ast
import importlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "kd_jax"
MOST_LINES = 350

# None is known, and none is to come: (from, to).
STILL_UPWARD: set[tuple[str, str]] = set()


def rooms(text: str) -> list[str]:
    """The paths of the list, from low to high."""
    lines = [line.partition(": ")[0] for line in text.splitlines() if line.startswith("- `kd_jax/")]
    return [room for line in lines for room in re.findall(r"`(kd_jax/[^`]+)`", line)]


def files() -> dict[str, Path]:
    """Every module by its name."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported(source: str, modules: set[str]) -> Iterator[str]:
    """The modules of kd_jax that a file imports, also inside functions and for types alone."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names if name.name.partition(".")[0] == "kd_jax")
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute here"
            if node.module and node.module.partition(".")[0] == "kd_jax":
                for name in node.names:
                    inner = f"{node.module}.{name.name}"
                    yield inner if inner in modules else node.module


def room_of(path: str, order: list[str]) -> int:
    """The place of a file in the list, its own before its folder's. Raises `ValueError` where it has none."""
    inside = [i for i, room in enumerate(order) if room.endswith("/") and path.startswith(room)]
    fitting = [i for i, room in enumerate(order) if path == room] or inside
    if len(fitting) != 1:
        raise ValueError(f"{path} is in {len(fitting)} rooms of docs/design.md: give it one line there")
    return fitting[0]


def upward(sources: dict[str, str], paths: dict[str, str], order: list[str]) -> set[tuple[str, str]]:
    """The imports that go to a higher room."""
    return {
        (name, other)
        for name, source in sources.items()
        for other in imported(source, set(sources))
        if room_of(paths[other], order) > room_of(paths[name], order)
    }


def circle(sources: dict[str, str], without: set[tuple[str, str]] = frozenset()) -> list[str]:  # type: ignore[assignment]
    """The modules of a circle of imports; none where there is no circle."""
    others = {
        name: sorted({o for o in imported(source, set(sources)) if o != name and (name, o) not in without})
        for name, source in sources.items()
    }
    done: set[str] = set()

    def walk(name: str, way: list[str]) -> list[str]:
        if name in way:
            return [*way[way.index(name) :], name]
        if name in done:
            return []
        for other in others[name]:
            if found := walk(other, [*way, name]):
                return found
        done.add(name)
        return []

    return next((found for name in others if (found := walk(name, []))), [])


@pytest.fixture(scope="module")
def order() -> list[str]:
    return rooms((ROOT / "docs" / "design.md").read_text())


@pytest.fixture(scope="module")
def sources() -> dict[str, str]:
    """Of every module but `kd_jax.experiments`, which is a folder of rooms and has nothing itself."""
    found = {name: path.read_text() for name, path in files().items()}
    assert len(found.pop("kd_jax.experiments").splitlines()) == 1
    return found


@pytest.fixture(scope="module")
def paths() -> dict[str, str]:
    return {name: path.relative_to(ROOT).as_posix() for name, path in files().items()}


def test_every_room_of_the_list_exists(order: list[str]) -> None:
    assert len(order) > 20
    for room in order:
        assert (ROOT / room).is_dir() if room.endswith("/") else (ROOT / room).is_file(), room


def test_no_import_goes_up(sources: dict[str, str], paths: dict[str, str], order: list[str]) -> None:
    assert upward(sources, paths, order) == STILL_UPWARD


def test_no_imports_go_in_a_circle(sources: dict[str, str]) -> None:
    assert circle(sources, STILL_UPWARD) == []


@pytest.mark.parametrize(
    "line",
    [
        "from kd_jax.train.step import fit",
        "from kd_jax.train import step",
        "import kd_jax.train.step",
        "def f():\n    from kd_jax.train import step",
        "if TYPE_CHECKING:\n    from kd_jax.train.step import fit",
    ],
)
def test_an_import_that_goes_up_is_found_however_it_is_written(
    line: str, sources: dict[str, str], paths: dict[str, str], order: list[str]
) -> None:
    changed = sources | {"kd_jax.stats": sources["kd_jax.stats"] + f"\n{line}\n"}
    assert upward(changed, paths, order) == STILL_UPWARD | {("kd_jax.stats", "kd_jax.train.step")}


def test_a_circle_within_a_room_is_found(sources: dict[str, str]) -> None:
    changed = sources | {"kd_jax.files.zips": sources["kd_jax.files.zips"] + "\nfrom kd_jax.files import npy\n"}
    assert set(circle(changed, STILL_UPWARD)) == {"kd_jax.files.npy", "kd_jax.files.zips"}


@pytest.mark.parametrize("path", sorted(files().values()), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_file_is_long(path: Path) -> None:
    lines = path.read_text().count("\n")
    assert lines <= MOST_LINES, f"{path} has {lines} lines: split it by the questions that it answers"


def done_by(program: str) -> str:
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout


def test_importing_kd_jax_imports_nothing_else_and_touches_no_signal() -> None:
    program = """
import signal, sys
numbers = [signal.SIGINT, signal.SIGTERM]
for number in numbers:
    signal.signal(number, signal.default_int_handler)
before = {name.partition(".")[0] for name in sys.modules}
import kd_jax
after = {name.partition(".")[0] for name in sys.modules}
print(sorted(after - before - sys.stdlib_module_names))
import kd_jax.run, kd_jax.sweep, kd_jax.reproduce
print([signal.getsignal(number) is signal.default_int_handler for number in numbers])
"""
    assert done_by(program) == "['kd_jax']\n[True, True]\n"


def test_no_public_name_and_no_command_imports_what_few_need() -> None:
    program = """
import sys, kd_jax, kd_jax.run, kd_jax.sweep, kd_jax.reproduce, kd_jax.export.__main__
for name in kd_jax.__all__:
    getattr(kd_jax, name)
heavy = ("matplotlib", "tensorflow", "tensorflow_datasets", "orbax", "scipy", "torch", "onnxruntime", "jax2onnx")
print([name for name in heavy if name in sys.modules])
"""
    assert done_by(program) == "[]\n"


def test_public_names_are_what_they_are_for_types_too() -> None:
    """The list that imports follow, and the one that type checkers read, are the same."""
    import kd_jax

    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    typed = {}
    for node in block.body:
        assert isinstance(node, ast.ImportFrom)
        for name in node.names:
            assert name.asname == name.name
            typed[name.name] = node.module
    assert sorted(typed) == sorted(kd_jax.__all__)
    assert set(kd_jax.__all__) <= set(dir(kd_jax))
    for name, module in typed.items():
        home = importlib.import_module(str(module))
        value = getattr(kd_jax, name)
        assert value is (importlib.import_module(f"{module}.{name}") if home is kd_jax else getattr(home, name))


def test_a_function_with_the_name_of_its_module_stays_the_function() -> None:
    program = """
import kd_jax.evaluate, kd_jax
from kd_jax import evaluate
print(callable(evaluate), callable(kd_jax.evaluate), kd_jax.losses.__name__)
try:
    kd_jax.nothing
except AttributeError as error:
    print(error)
"""
    assert done_by(program) == "True True kd_jax.losses\nmodule 'kd_jax' has no attribute 'nothing'\n"
