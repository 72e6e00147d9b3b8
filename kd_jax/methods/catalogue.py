"""Methods by name: what each is, needs and takes by default, read off the classes; and made from texts `name=value`."""

import dataclasses
import difflib
import inspect
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from types import MappingProxyType
from typing import Any, NamedTuple

from kd_jax import methods
from kd_jax.errors import ConfigError
from kd_jax.files import npy
from kd_jax.methods.base import LossFunction, Method, Sum, Wrapped
from kd_jax.methods.bounds import is_whole

Named = Mapping[str, type[Method]]

_AUTHORS = re.compile(r"((?:[A-Z][\w'-]+(?:, | and ))*[A-Z][\w'-]+(?: et al\.)?) \((\d{4})\)")
_ARXIV = re.compile(r"arxiv\.org/abs/([\d.]+\d)")
# Fields that are paths of features, of the student's and of the teacher's.
_PATHS = ("feature", "hint", "first", "features")
_GUIDES = ("teacher_feature", "guided", "teacher_first", "guides")
# What is made of other methods, or of a function.
_BASES = (LossFunction, Sum, Wrapped)


class Entry(NamedTuple):
    """A method in a few words. defaults: texts by name; `required` where there is none."""

    name: str
    paper: str
    needs: tuple[str, ...]
    defaults: dict[str, str]


@cache
def named() -> Named:
    """Every method that comes with kd_jax, by its name in small letters."""
    known = (getattr(methods, name) for name in methods.__all__)
    return MappingProxyType({
        one.__name__.lower(): one for one in known
        if isinstance(one, type) and issubclass(one, Method) and dataclasses.is_dataclass(one)
        and not issubclass(one, _BASES)
    })  # fmt: skip


def entry(name: str, method: type[Method]) -> Entry:
    """What a class says of itself: its docstring has the paper, its fields the defaults."""
    text = " ".join((inspect.getdoc(method) or "").split())
    authors, arxiv = _AUTHORS.search(text), _ARXIV.search(text)
    paper = f"{authors[1]} ({authors[2]})" if authors else "no paper"
    return Entry(name, paper + (f", arXiv {arxiv[1]}" if arxiv else ""), _needs(method), _defaults(method))


def has_features(method: type[Method]) -> bool:
    """Whether a class compares features by path."""
    return any(field.name in _PATHS for field in dataclasses.fields(method))  # type: ignore[arg-type]


def listing(known: Named, instead: Mapping[str, str] = MappingProxyType({})) -> str:
    """A line for each method: name, paper, needs, defaults. instead: what some show, by name."""
    entries = [entry(name, known[name]) for name in sorted(known)]
    rows = [("name", "paper", "needs", "defaults")] + [
        (
            one.name,
            one.paper,
            ", ".join(one.needs),
            instead.get(one.name) or " ".join(f"{k}={v}" for k, v in one.defaults.items()),
        )
        for one in entries
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return "\n".join(
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[3]]).rstrip()
        for row in rows
    )


def find(name: str, known: Named) -> str:
    """A method's name, however it is written (`reverse-kl`, `ReverseKL`). Raises `ConfigError` with the nearest."""
    if name in known:
        return name
    plain = {_plain(one): one for one in known}
    if _plain(name) in plain:
        return plain[_plain(name)]
    close = plain.get(_nearest(_plain(name), plain) or "", "kd")
    raise ConfigError(f"unknown method {name!r}: use {close} or another that --method list shows")


def make(name: str, method: type[Method], options: Sequence[str]) -> Method:
    """A method with its defaults but for options `name=value`. Raises `ConfigError`; an unknown one has the nearest."""
    fields = {field.name: field for field in dataclasses.fields(method)}  # type: ignore[arg-type]
    given: dict[str, Any] = {}
    for text in options:
        key, equals, value = text.partition("=")
        if not equals or not value:
            raise ConfigError(f"--method-option is {text!r}: give it as name=value, such as temperature=4")
        paths = {"student": _PATHS, "teacher": _GUIDES}.get(key, ())
        key = next((path for path in paths if path in fields), key)
        if key not in fields:
            close = _nearest(key, fields, cutoff=0.4)
            has = f"did you mean {close}?" if close else f"it has {', '.join(fields) or 'none'}"
            raise ConfigError(f"unknown option {key!r} of {name}: {has}")
        if key in given:
            raise ConfigError(f"--method-option has {key} twice: give it once (python -m kd_jax.sweep takes lists)")
        given[key] = _value(key, value, fields[key])
    missing = [
        field.name for field in fields.values() if field.default is dataclasses.MISSING and field.name not in given
    ]
    if missing and missing[0] in _PATHS:
        raise ConfigError(
            f"{name} compares features: name them, --method-option student=PATH teacher=PATH (of several "
            "student=PATH,PATH teacher=PATH,PATH), by paths that kd.feature_names lists"
        )
    if missing:
        raise ConfigError(f"{name} needs {missing[0]}: give --method-option {missing[0]}=…, or train with kd.distill")
    return method(**given)


def _value(name: str, text: str, field: Any) -> Any:
    """A text as the type of a field, and of its default. Raises `ConfigError`; `DataError` for a file of an array."""
    default = field.default
    if isinstance(default, bool):
        if text not in ("true", "false"):
            raise ConfigError(f"--method-option {name} is {text!r}: it must be true or false")
        return text == "true"
    if name in ("features", "guides"):
        return tuple(text.split(","))
    if field.type is Any:
        if not text.endswith(".npy"):
            raise ConfigError(f"--method-option {name} is {text!r}: it must be a file .npy, which holds the array")
        return npy.read_npy(text, None)
    several = isinstance(default, tuple)
    whole = is_whole(field)
    if isinstance(default, str) or (default is None and not whole) or name in (*_PATHS, "last"):
        return text
    try:
        parts = [int(part) if whole else float(part) for part in (text.split(",") if several else (text,))]
    except ValueError:
        kind = "a whole number" if whole else "a number"
        kind = f"{'whole ' if whole else ''}numbers joined by commas" if several else kind
        raise ConfigError(f"--method-option {name} is {text!r}: it must be {kind}") from None
    return tuple(parts) if several else parts[0]


def _needs(method: type[Method]) -> tuple[str, ...]:
    fields = dataclasses.fields(method)  # type: ignore[arg-type]
    required = [field.name for field in fields if field.default is dataclasses.MISSING]
    one = method(**{name: "path" if name in (*_PATHS, "last") else 1.0 for name in required})
    features = has_features(method)
    needs = {
        "logits": one.needs_teacher and not features, "features": features, "labels": one.needs_labels,
        "batch": one.couples_batch, "rows": one.needs_rows,
    }  # fmt: skip
    return tuple(name for name, needed in needs.items() if needed)


def _defaults(method: type[Method]) -> dict[str, str]:
    return {
        field.name: "required" if field.default is dataclasses.MISSING else _shown(field.default)
        for field in dataclasses.fields(method)  # type: ignore[arg-type]
    }


def _shown(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    if isinstance(value, tuple):
        return ",".join(map(_shown, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _plain(name: str) -> str:
    return re.sub(r"[-_ ]", "", name).lower()


def _nearest(name: str, known: Iterable[str], cutoff: float = 0.5) -> str | None:
    """The most alike, of equals the shortest."""
    alike = {one: difflib.SequenceMatcher(None, name, one).ratio() for one in known}
    best = min(alike, key=lambda one: (-alike[one], len(one), one), default=None)
    return best if best is not None and alike[best] >= cutoff else None
