"""Numbers and lists as results are written: JSON, Markdown, and mean ± standard deviation."""

import json
import re
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np

from kd_jax.stats import summarise


def json_text(content: Any, indent: int | None = 2) -> str:
    """JSON, without numbers that are none. A list of numbers is one line."""
    text = json.dumps(content, indent=indent, ensure_ascii=False, allow_nan=False) + "\n"
    # No string of JSON has a line break.
    return re.sub(r"\[\n([-+.\de,\s]+)\]", lambda found: f"[{' '.join(found[1].split())}]", text)


def plain(values: Any) -> Any:
    """Python's numbers, of an array of any rank; of float32 with no more digits than it has."""
    array = np.asarray(values)
    return (array.astype(str).astype(np.float64) if array.dtype == np.float32 else array).tolist()


def spread(values: Any, form: str, *, per_cent: bool = False) -> str:
    """Mean ± standard deviation over the seeds, or the one value there is."""
    summary = summarise(np.asarray(values, np.float64) * (100 if per_cent else 1))
    mean = format(summary.mean, form)
    return mean if summary.sd is None else f"{mean} ± {format(summary.sd, form.replace('+', ''))}"


def say(text: str) -> None:
    """Prints a line now. Where that is not possible (a full disk), stderr is told once, and the run goes on."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        raise
    except OSError as error:
        if not _told:
            _told.append(True)
            print(
                f"kd_jax: the output cannot be printed ({error.strerror or error}): the run goes on, and its results "
                "will be in its folder",
                file=sys.stderr, flush=True,
            )  # fmt: skip


_told: list[bool] = []


def counted(number: int, word: str) -> str:
    """So many of something."""
    return f"{number:,} {word}{'s' * (number != 1)}"


def listed(lines: Mapping[str, str]) -> str:
    """Lines by name as a list of Markdown."""
    return "\n".join(f"- {name}: {text}" for name, text in lines.items() if text)
