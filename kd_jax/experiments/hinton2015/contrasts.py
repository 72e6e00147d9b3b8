"""Ways to train, compared by the errors of each seed."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from kd_jax.experiments.hinton2015.plan import Plan, Results
from kd_jax.stats import holm, paired_comparison


class Contrast(NamedTuple):
    """A comparison of two ways to train, paired by seed. p_corrected: by Holm's method, for those of one width."""

    what: str
    n: int
    mean_difference: float
    ci95: tuple[float, float] | None
    p_value: float | None
    p_corrected: float | None


def contrasts(found: Results, plan: Plan) -> list[Contrast]:
    """Distilled against alone, others against distilled, T = 20 against 8; and of the smallest width the better T."""
    main = plan.widths[0].units
    alone, distilled, own = f"alone-{main}", f"distilled-{main}", f"{main} units, T = {plan.temperature:g}"
    against = (
        (f"{own} against alone", alone, distilled),
        (f"{main} units, mean logits over shifts against those of one view", distilled, "averaged"),
        (f"{own} against alone, both with shifts", "alone-shifted", "distilled-shifted"),
        (f"{own}, with shifts in the transfer set against without", distilled, "distilled-shifted"),
    )
    errors = {name: [run["errors"] for run in part["runs"]] for name, part in found.items()}
    pairs = {main: [(what, errors[a], errors[b]) for what, a, b in against if a in errors and b in errors]}
    by_width, smallest = temperature_errors(found, plan), min(width.units for width in plan.widths)
    for units, of_width in by_width.items():
        if units != smallest and {8.0, 20.0} <= set(of_width):
            what = f"{units} units, T = 20 against T = 8"
            pairs.setdefault(units, []).append((what, of_width[8.0], of_width[20.0]))
    given = [contrast for several in pairs.values() for contrast in _contrasts(several)]
    return given + (_better_against_others(smallest, by_width[smallest]) if smallest in by_width else [])


def sentence(contrast: Contrast) -> str:
    """A comparison as a person reads it."""
    said = f"{contrast.what}: {contrast.mean_difference:+.1f}".replace("-", "−")
    if contrast.ci95 is None:
        return f"{said} (n = {contrast.n}: too few or too alike to give an interval)"
    low, high = (f"{value:+.1f}".replace("-", "−") for value in contrast.ci95)
    corrected = f", corrected {contrast.p_corrected:.2g}" if contrast.p_corrected != contrast.p_value else ""
    return f"{said} (95 % interval {low} to {high}, n = {contrast.n}, p = {contrast.p_value:.2g}{corrected})"


def _contrasts(pairs: list[tuple[str, list[int], list[int]]]) -> list[Contrast]:
    """Of `(what, baseline, treatment)`, with p-values corrected for their number (Holm 1979)."""
    compared = [(what, paired_comparison(before, after, metric="errors")) for what, before, after in pairs]
    known = [place for place, (_, c) in enumerate(compared) if c.p_value is not None]
    corrected = dict(zip(known, holm([compared[place][1].p_value for place in known]), strict=True))
    return [
        Contrast(what, c.n, c.mean_difference, c.ci95, c.p_value, corrected.get(i))
        for i, (what, c) in enumerate(compared)
    ]


def _better_against_others(units: int, own: Mapping[float | None, list[int]]) -> list[Contrast]:
    """The better of T = 2.5 and 4 against every other temperature.

    Which of them is better is known from the same errors, so p is corrected for what the other would have been told by.
    """
    candidates = sorted((t for t in (2.5, 4.0) if t in own), key=lambda t: np.mean(own[t]))
    pairs: dict[frozenset[float], tuple[str, list[int], list[int]]] = {}
    for one in candidates:
        what = f"{units} units, T = {one:g}, the better of 2.5 and 4, against T = "
        for t in (t for t in own if t is not None and t != one):
            pairs.setdefault(frozenset((one, t)), (f"{what}{t:g}", own[t], own[one]))
    known = zip(pairs, _contrasts(list(pairs.values())), strict=True)
    return [contrast for pair, contrast in known if candidates[0] in pair]


def temperature_errors(found: Results, plan: Plan) -> dict[int, dict[float | None, list[int]]]:
    """Errors of every seed by units and temperature, None for those alone; widths that are not done are left out."""
    given: dict[int, dict[float | None, list[int]]] = {}
    for width in plan.widths:
        names = [f"{kind}-{width.units}" for kind in ("alone", "distilled", "temperature")]
        own: dict[float | None, list[int]] = {}
        for run in (run for name in names if name in found for run in found[name]["runs"]):
            own.setdefault(run.get("temperature"), []).append(run["errors"])
        if {None, *width.temperatures} <= set(own):
            given[width.units] = {t: own[t] for t in sorted(own, key=lambda t: 0 if t is None else t)}
    return given
