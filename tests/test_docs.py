"""The README and the pages of docs/: their code runs, they name what exists, and every link leads somewhere."""

import contextlib
import dataclasses
import importlib.util
import inspect
import io
import re
from pathlib import Path

import pytest
from pages import GUIDES, PAGES, ROOT, Block, blocks, few_images, run
from slowly import all_but

import kd_jax as kd

README, START = ROOT / "README.md", ROOT / "docs" / "start.md"
METHODS = ROOT / "docs" / "guides" / "methods.md"

pytestmark = pytest.mark.usefixtures("quick_compiling")


def words(text: str) -> list[list[str]]:
    """Of each line, without what depends on the data: numbers, the width of columns, and how a conclusion ends."""
    return [re.findall(r"[a-z_]+", line.partition("seeds): ")[0]) for line in text.splitlines()]


@pytest.fixture(scope="module")
def started(quick_compiling: None) -> dict[str, object]:
    """What the first block of the README leaves; the rest of it, the start page and the guides go on from it."""
    few, printed = few_images(), io.StringIO()
    names: dict[str, object] = {"__name__": "docs"}
    first = blocks(README)[0]
    with pytest.MonkeyPatch.context() as monkeypatch, contextlib.redirect_stdout(printed):
        monkeypatch.setattr(kd, "load", lambda source: few)
        run(README, first, names)
    assert words(printed.getvalue()) == words(first.output or "")
    return names


@pytest.mark.parametrize(
    "path",
    all_but(lambda path: path.stem in ("README", "start", "training"), [README, START, *GUIDES]),
    ids=lambda path: path.stem,
)
def test_the_code_runs_on_a_few_images(
    path: Path, started: dict[str, object], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:  # fmt: skip
    """And prints what stands below it; the README's numbers are of all images."""
    pytest.importorskip({"pytorch": "torch", "export": "jax2onnx"}.get(path.stem, "jax"))
    monkeypatch.chdir(tmp_path)
    names = dict(started)
    written = blocks(path)
    assert written
    for block in written[1:] if path in (README, START) else written:
        if "litert" in block.code and importlib.util.find_spec("litert_converter") is None:
            continue
        capsys.readouterr()
        run(path, block, names)
        if block.output is not None:
            form = words if path == README else str
            assert form(capsys.readouterr().out) == form(block.output), f"line {block.line} of {path.name}"


def test_the_start_page_and_the_readme_begin_with_the_same_code_and_output() -> None:
    (first, *_), (same, *_) = blocks(START), blocks(README)
    assert first[:2] == same[:2]


def test_a_block_that_fails_names_its_page_and_line() -> None:
    with pytest.raises(ZeroDivisionError) as caught:
        run(Path("page.md"), Block("1 / 0\n", None, 41), {})
    assert (str(caught.traceback[-1].path), caught.traceback[-1].lineno + 1) == ("page.md", 42)


def row_of(method: type) -> str:
    """The first cell of a method's row: its name, and the defaults of its numbers."""
    fields = [
        field.name if field.default is dataclasses.MISSING else f"{field.name}={field.default!r}"
        for field in dataclasses.fields(method)  # type: ignore[arg-type]
    ]
    return f"{method.__name__}({', '.join(fields)})"


def test_the_page_of_methods_lists_every_method_with_its_defaults() -> None:
    """Add the row that is missing to the table of its family."""
    public = [getattr(kd, name) for name in kd.__all__]
    methods = [one for one in public if inspect.isclass(one) and issubclass(one, kd.Method) and one is not kd.Method]
    assert len(methods) > 30
    rows = re.findall(r"^\| `(\w+\(.*?\))` \|", METHODS.read_text(), re.MULTILINE)
    assert sorted(rows) == sorted(map(row_of, methods))


def test_the_api_pages_have_every_public_name() -> None:
    written = "\n".join(path.read_text() for path in (ROOT / "docs" / "api").glob("*.md"))
    named = set(re.findall(r"auto(?:function|class|data):: kd_jax\.([\w.]+)", written))
    modules = set(re.findall(r"automodule:: kd_jax\.([\w.]+)", written))
    public = {name for name in kd.__all__ if not inspect.ismodule(getattr(kd, name))}
    whole = set(kd.methods.__all__) | set(vars(kd.errors))
    assert modules >= {"losses", "methods", "errors", "callbacks", "optimizers"}
    assert public - named - whole == set()


def anchors(path: Path) -> set[str]:
    """Of the headings of a page, as GitHub and the built pages make them."""
    text = re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL)
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.strip().lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_link_leads_to_a_file_and_a_heading(path: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL)):
        if "://" in link:
            continue
        file, _, anchor = link.partition("#")
        target = (path.parent / file).resolve() if file else path
        assert target.is_file(), f"{link} of {path.name} is no file"
        assert not anchor or anchor in anchors(target), f"{link} of {path.name} is no heading"


def test_every_file_that_a_page_names_is_there() -> None:
    text = "\n".join(path.read_text() for path in PAGES)
    named = set(re.findall(r"`((?:tests|kd_jax|benchmarks)/[\w/]+\.(?:py|sh))", text))
    assert len(named) > 15
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []


def test_every_option_that_a_page_names_exists() -> None:
    from benchmarks import throughput
    from kd_jax import reproduce, run, sweep
    from kd_jax.export import __main__ as export

    parsers = [command._parser() for command in (run, sweep, reproduce, export, throughput)]
    known = {text for parser in parsers for action in parser._actions for text in action.option_strings}
    for example in (ROOT / "examples").glob("*.py"):
        known |= set(re.findall(r'add_argument\("(--[a-z-]+)"', example.read_text()))
    text = "\n".join(path.read_text() for path in PAGES)
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", text))
    assert len(named) > 15
    assert named - known == set()


def test_public_names_that_the_pages_use_exist() -> None:
    """`kd.something`, in text as in code."""
    text = "\n".join(path.read_text() for path in PAGES if path.name != "design.md")
    for name in set(re.findall(r"(?<![\w.])kd\.(\w+(?:\.\w+)?)", text)):
        found = kd
        for part in name.split("."):
            found = getattr(found, part)
