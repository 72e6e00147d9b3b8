"""How `make docs` builds the pages: from the repository's Markdown files as they stand, and from the docstrings."""

import dataclasses
import inspect
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import kd_jax  # noqa: E402
import kd_jax.errors  # noqa: E402
import kd_jax.losses  # noqa: E402
import kd_jax.methods  # noqa: E402

project = "kd_jax"
author = "the kd_jax maintainers"
version = release = kd_jax.__version__
language = "en"

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx_copybutton"]
# The sources lie in the repository's root, so that a link holds there, in an editor and in the pages.
root_doc = "README"
include_patterns = [
    "README.md", "CHANGELOG.md", "CONTRIBUTING.md", "docs/**", "results/**", "kd_jax/data/sources/MNIST-LICENSE.md",
]  # fmt: skip
exclude_patterns = [".*", "build", "dist", "runs"]
nitpicky = True
# Types in signatures are shown as they are, and link where they can.
nitpick_ignore_regex = [("py:class", ".*")]
# Tables of results are read where they are linked: they stand in no list of contents, and some have no title.
suppress_warnings = ["toc.not_included", "myst.header"]

myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_class_signature = "mixed"
default_role = "code"
add_module_names = False
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 90

html_theme = "furo"
html_title = f"kd_jax {release}"
html_static_path = ["_static"]
html_css_files = ["pages.css"]
# `index.html`, which leads to the root page.
html_extra_path = ["_html"]
html_copy_source = False
html_show_copyright = False
copybutton_exclude = ".linenos, .gp, .go"

CONTENTS = """

```{toctree}
:hidden:
:caption: Learn

docs/start
docs/guides/models
docs/guides/data
docs/guides/teachers
docs/guides/methods
docs/guides/schemes
docs/guides/features
docs/guides/training
docs/guides/comparisons
docs/guides/resuming
docs/guides/pytorch
docs/guides/language-models
docs/guides/export
Several devices <docs/scale>
Large vocabularies <docs/large-vocabulary>
```

```{toctree}
:hidden:
:caption: Evidence

docs/experiments
docs/examples
docs/real-models
docs/results
docs/trust
docs/speed
Beside public code <docs/parity>
```

```{toctree}
:hidden:
:caption: Reference

docs/api
Design <docs/design>
CONTRIBUTING
CHANGELOG
```
"""

_CODE = re.compile(r"(`+[^`]+`+)")


def setup(app: Any) -> None:
    """Hooks of Sphinx."""
    app.connect("source-read", add_contents)
    app.connect("autodoc-process-docstring", as_restructured_text)
    app.connect("autodoc-process-signature", with_short_types)
    app.connect("autodoc-skip-member", is_field)


def add_contents(app: Any, name: str, source: list[str]) -> None:
    """The list of contents, at the end of the README, which stays plain Markdown."""
    if name == "README":
        source[0] += CONTENTS


def with_short_types(app: Any, what: str, name: str, thing: Any, options: Any, arguments: str, result: str) -> Any:
    """`Float[Array, 'batch classes']` and `Scalar`, as they are written in the code."""

    def short(text: str) -> str:
        return text and text.replace("jaxlib._jax.Array", "Array").replace("float | int | Num[Array, '...']", "Scalar")

    return short(arguments), short(result)


def is_field(app: Any, what: str, name: str, thing: Any, skip: bool, options: Any) -> bool | None:
    """Fields of named tuples stand in the signature and the docstring already."""
    return True if type(thing).__name__ == "_tuplegetter" else None


def as_restructured_text(app: Any, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    """Our docstrings: paragraphs, in which `name: text` tells of an argument or a field."""
    names = "|".join(map(re.escape, _names(thing)))
    label = rf"(?:{names})(?:, (?:{names}))*: "
    written: list[str] = []
    for paragraph in re.split(r"\n\s*\n", "\n".join(lines).strip()):
        text = " ".join(paragraph.split())
        items = re.split(rf"(?:(?<=^)|(?<=[.;] ))(?={label})", text) if names else [text]
        for item in filter(None, map(str.strip, items)):
            known = re.match(label, item) if names else None
            if known is None:
                written += [_escaped(item), ""]
            else:
                told = re.sub(r";$", ".", item[known.end() :])
                written += [f"* **{known[0][:-2]}**: {_escaped(told)}", ""]
    lines[:] = written


def _names(thing: Any) -> list[str]:
    """Of the arguments of a function, or the fields of a class."""
    if inspect.isclass(thing):
        fields = [field.name for field in dataclasses.fields(thing)] if dataclasses.is_dataclass(thing) else []
        fields += getattr(thing, "_fields", ())
        return list(dict.fromkeys([*fields, *getattr(thing, "__annotations__", {})]))
    try:
        return [name for name in inspect.signature(thing).parameters if name != "self"]
    except (TypeError, ValueError):
        return []


def _escaped(text: str) -> str:
    """Code as code, or as a link to what it names; and no other marks."""
    parts = _CODE.split(text)
    return "\\ ".join(
        _code(part) if part.startswith("`") else re.sub(r"([*_|\\])", r"\\\1", part) for part in filter(None, parts)
    )


def _code(part: str) -> str:
    inner = part.strip("`")
    called = re.sub(r"\((?:…)?\)$", "", inner.removeprefix("kd."))
    loss = called.removeprefix("losses.")
    if called in kd_jax.methods.__all__ and called != "as_method":
        return f":py:obj:`{inner} <kd_jax.methods.{called}>`"
    if called in vars(kd_jax.errors):
        return f":py:obj:`{inner} <kd_jax.errors.{called}>`"
    if called in kd_jax.__all__ and not inspect.ismodule(getattr(kd_jax, called)):
        return f":py:obj:`{inner} <kd_jax.{called}>`"
    if loss != called and loss in kd_jax.losses.__all__:
        return f":py:obj:`{inner} <kd_jax.losses.{loss}>`"
    return f"``{inner}``"
