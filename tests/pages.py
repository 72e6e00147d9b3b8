"""What the tests of the README and of docs/ share: code blocks, and a few images of MNIST to run them on."""

import re
from pathlib import Path
from typing import NamedTuple

import jax

import kd_jax as kd
from kd_jax.data.dataset import Dataset, make_dataset

ROOT = Path(__file__).parents[1]
GUIDES = sorted((ROOT / "docs" / "guides").glob("*.md"))
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


class Block(NamedTuple):
    """Python code of a page. output: what stands below it, in a block of text; None where nothing does."""

    code: str
    output: str | None
    line: int


def blocks(path: Path) -> list[Block]:
    text = path.read_text()
    found = re.finditer(r"```python\n(.*?)```(?:\n\n```text\n(.*?)```)?", text, re.DOTALL)
    return [Block(match[1], match[2], text[: match.start(1)].count("\n")) for match in found]


def run(path: Path, block: Block, names: dict[str, object]) -> None:
    """Executes a block as a user does; an error names the page and the line."""
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        exec(compile("\n" * block.line + block.code, str(path), "exec"), names)


def few_images(train: int = 384, test: int = 100) -> Dataset:
    whole = kd.load("mnist")
    seen, asked = (whole.train_images, whole.train_labels), (whole.test_images, whole.test_labels)
    return make_dataset("few", *(part[:train] for part in seen), *(part[:test] for part in asked))
