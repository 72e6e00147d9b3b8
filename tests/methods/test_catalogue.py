"""What the classes say of themselves."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import kd_jax as kd
from kd_jax.errors import ConfigError, DataError
from kd_jax.methods import catalogue

KNOWN = catalogue.named()


def test_every_public_method_is_in_it_and_no_wrapper() -> None:
    public = {name for name in kd.__all__ if isinstance(getattr(kd, name), type)}
    classes = {n for n in public if issubclass(getattr(kd, n), kd.Method)} - {"Method"}
    assert {one.__name__ for one in KNOWN.values()} == classes
    assert {"standardised", "sum", "scaled", "lossfunction", "softloss"}.isdisjoint(KNOWN)


def subclasses(method: type) -> list[type]:
    return [one for sub in method.__subclasses__() for one in (sub, *subclasses(sub))]


MADE = [one for one in subclasses(kd.Method) if "__dataclass_params__" in vars(one) and "kd_jax" in one.__module__]


@pytest.mark.parametrize("method", MADE, ids=lambda method: method.__name__)
def test_none_can_be_changed(method: Any) -> None:
    """What is compiled is kept by their value."""
    assert method.__dataclass_params__.frozen


@pytest.mark.parametrize("name", sorted(KNOWN))
def test_each_has_a_paper_and_its_own_defaults(name: str) -> None:
    found = catalogue.entry(name, KNOWN[name])
    assert (found.paper == "no paper") == (name in ("crossentropy", "kdwithouttsquared"))
    assert found.needs
    assert list(found.defaults) == [field.name for field in dataclasses.fields(KNOWN[name])]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "paper", "needs", "defaults"),
    [
        ("dkd", "Zhao et al. (2022), arXiv 2203.08679", "logits labels",
         {"alpha": "1", "beta": "8", "temperature": "4", "hard": "1", "warmup": "0"}),
        ("crd", "Tian, Krishnan and Isola (2020), arXiv 1910.10699", "features batch rows", {"negatives": "16384"}),
        ("fsp", "Yim et al. (2017)", "features", {"first": "required", "pool": "max"}),
        ("mlkd", "Jin et al. (2023)", "logits labels batch", {"temperature": "2,3,4,5,6"}),
        ("virtualteacher", "Yuan et al. (2020), arXiv 1909.11723", "labels", {"probability": "0.99"}),
        ("sampledkl", "Anshumann et al. (2025), arXiv 2503.16870", "logits", {"samples": "50"}),
    ],
)  # fmt: skip
def test_some_are_as_their_papers_have_them(name: str, paper: str, needs: str, defaults: dict[str, str]) -> None:
    found = catalogue.entry(name, KNOWN[name])
    assert (found.paper, " ".join(found.needs)) == (paper, needs)
    assert defaults.items() <= found.defaults.items()


def test_the_listing_has_a_line_for_each() -> None:
    lines = catalogue.listing(KNOWN).splitlines()
    assert lines[0].split() == ["name", "paper", "needs", "defaults"]
    assert [line.split()[0] for line in lines[1:]] == sorted(KNOWN)
    assert all(line == line.rstrip() for line in lines)


@pytest.mark.parametrize("name", ["reversekl", "reverse-kl", "ReverseKL", "reverse_kl"])
def test_a_name_may_be_written_in_any_way(name: str) -> None:
    assert catalogue.find(name, KNOWN) == "reversekl"


@pytest.mark.parametrize(("name", "nearest"), [("dkdd", "dkd"), ("fitnets", "fitnet"), ("kl", "kd"), ("?", "kd")])
def test_an_unknown_name_has_the_nearest(name: str, nearest: str) -> None:
    with pytest.raises(ConfigError, match=rf"use {nearest} or another that --method list shows"):
        catalogue.find(name, KNOWN)


@pytest.mark.parametrize(
    ("name", "options", "method"),
    [
        ("dkd", ["beta=2", "temperature=1.5"], kd.DKD(beta=2.0, temperature=1.5)),
        ("topkkl", ["k=3", "rest=zero"], kd.TopKKL(k=3, rest="zero")),
        ("skewreversekl", ["detached=true"], kd.SkewReverseKL(detached=True)),
        ("mlkd", ["temperature=1,2.5"], kd.MLKD((1.0, 2.5))),
        ("at", ["feature=conv1", "teacher_feature=conv2"], kd.AT("conv1", "conv2")),
        ("taid", ["steps=100", "hard=1"], kd.TAID(100.0, hard=1.0)),
        ("fsp", ["student=a", "last=b"], kd.FSP("a", "b")),
        ("fitnet", ["student=conv1", "teacher=conv2"], kd.FitNet("conv1", "conv2")),
        ("reviewkd", ["student=a,b", "teacher=c,d"], kd.ReviewKD(("a", "b"), ("c", "d"))),
        ("kd", [], kd.KD()),
        ("semckd", ["student=a", "width=32"], kd.SemCKD(("a",), width=32)),
        ("reviewkd", ["student=a", "levels=4,2,1"], kd.ReviewKD(("a",), levels=(4, 2, 1))),
        ("sampledkl", ["samples=3", "power=2"], kd.SampledKL(3, 2.0)),
    ],
)
def test_a_method_is_made_of_texts(name: str, options: list[str], method: kd.Method) -> None:
    assert catalogue.make(name, KNOWN[name], options) == method


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("dkd", ["betta=2"], "unknown option 'betta' of dkd: did you mean beta?"),
        ("dkd", ["x=2"], "unknown option 'x' of dkd: it has alpha, beta, temperature, hard, warmup"),
        ("crossentropy", ["x=2"], "it has none"),
        ("dkd", ["beta"], "'beta': give it as name=value, such as temperature=4"),
        ("dkd", ["beta=two"], "--method-option beta is 'two': it must be a number"),
        ("topkkl", ["k=2.5"], "--method-option k is '2.5': it must be a whole number"),
        ("mlkd", ["temperature=1;2"], "it must be numbers joined by commas"),
        ("reviewkd", ["student=a", "levels=4,2.5"], "it must be whole numbers joined by commas"),
        ("semckd", ["student=a", "width=wide"], "it must be a whole number"),
        ("ofd", ["student=a", "margin=-1"], "margin is '-1': it must be a file .npy, which holds the array"),
        ("wkd", ["similarity=eye"], "similarity is 'eye': it must be a file .npy"),
        ("skewreversekl", ["detached=yes"], "it must be true or false"),
        ("dkd", ["beta=2", "beta=3"], "--method-option has beta twice"),
        ("taid", [], "taid needs steps: give --method-option steps=…, or train with kd.distill"),
        ("wkd", [], "wkd needs similarity: give"),
        ("at", [], "at compares features: name them, --method-option student=PATH teacher=PATH"),
        ("kd", ["student=x"], "unknown option 'student' of kd"),
    ],
)
def test_what_is_no_option_is_told(name: str, options: list[str], says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        catalogue.make(name, KNOWN[name], options)
    assert says in str(caught.value)


def test_what_is_given_is_of_the_types_of_the_defaults() -> None:
    made: Any = catalogue.make("reviewkd", KNOWN["reviewkd"], ["student=a", "levels=4,2"])
    assert all(type(level) is int for level in made.levels)


def test_arrays_are_read_from_files(tmp_path: Path) -> None:
    np.save(tmp_path / "alike.npy", np.eye(4, dtype=np.float32))
    made: Any = catalogue.make("wkd", KNOWN["wkd"], [f"similarity={tmp_path / 'alike.npy'}"])
    np.testing.assert_array_equal(made.similarity, np.eye(4))
    with pytest.raises(DataError, match=r"none\.npy"):
        catalogue.make("wkd", KNOWN["wkd"], [f"similarity={tmp_path / 'none.npy'}"])


def test_whoever_writes_a_method_has_it_read_too() -> None:
    @dataclasses.dataclass(frozen=True)
    class Own(kd.Method):
        """Somebody and Other (2031), https://arxiv.org/abs/3101.00001: something."""

        weight: float = 2.0

    found: Any = catalogue.entry("own", Own)
    assert found == ("own", "Somebody and Other (2031), arXiv 3101.00001", ("logits",), {"weight": "2"})
