"""Marks of tests that take long."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest


def all_but(quick: Callable[[Any], bool], cases: Sequence[Any]) -> list[Any]:
    """The cases of a parametrised test, `slow` but for those that are quick."""
    return [
        case if quick(case) else pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.slow)
        for case in cases
    ]


def all_but_first(cases: Sequence[Any]) -> list[Any]:
    """Likewise, of which the first is quick."""
    return all_but(lambda case: case is cases[0], cases)
