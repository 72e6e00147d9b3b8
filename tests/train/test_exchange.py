"""What several processes tell each other, with a service that says what others said; real ones: test_processes.py."""

import json
import threading
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import pytest

import kd_jax as kd
from kd_jax.errors import CheckpointError, ConfigError, DataError, NotFiniteError, RunError
from kd_jax.train import exchange as module
from kd_jax.train.exchange import Exchange, by_all, digest_here, flat, in_step, meet, shapes, together


class Service:
    """That of `jax.distributed`, as process 0 of 2 sees it. others: what process 1 says at each place."""

    def __init__(self, *others: str, absent: bool = False):
        self.others, self.absent = others, absent
        self.own: dict[str, str] = {}
        self.waited: list[tuple[str, int]] = []

    def key_value_set(self, key: str, value: str) -> None:
        assert key not in self.own
        self.own[key] = value

    def wait_at_barrier(self, name: str, milliseconds: int) -> None:
        self.waited.append((name, milliseconds))
        if self.absent:
            raise jax.errors.JaxRuntimeError("DEADLINE_EXCEEDED: Barrier timed out.")

    def key_value_dir_get(self, place: str) -> list[tuple[str, str]]:
        number = int(place.split("/")[-2])
        other = self.others[number] if number < len(self.others) else ""
        own = [(key, text) for key, text in self.own.items() if key.startswith(place)]
        return ([(f"{place}1", other)] if other else []) + own


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Any:
    def serve(*others: str, absent: bool = False) -> Service:
        service = Service(*others, absent=absent)
        # Before JAX would ask the service for others.
        jax.devices()
        monkeypatch.setattr(jax._src.distributed.global_state, "client", service)
        monkeypatch.setattr(jax, "process_count", lambda: 2)
        monkeypatch.setattr(module, "is_shared", lambda mesh: mesh == "shared")
        return service

    return serve


def test_what_is_said_at_a_place_is_of_that_place_alone(served: Any) -> None:
    service = served("", "a fault", "")
    told = Exchange("name")
    assert told("mine") == {0: "mine"}
    assert told.said() == {1: "a fault"}
    assert told("again") == {0: "again", 1: "a fault"}
    assert told() == {}
    assert [name for name, _ in service.waited] == ["name"] * 3


@pytest.mark.parametrize("error", [CheckpointError("a", "b"), NotFiniteError("nan"), DataError("odd")])
def test_an_error_of_one_process_is_raised_in_all(error: Exception, served: Any) -> None:
    service = served()
    told = Exchange("name")

    def work() -> None:
        raise error

    with pytest.raises(type(error)):
        by_all(work, told)
    served(*service.own.values())
    with pytest.raises(type(error), match=f"^process 1: {error}$"):
        by_all(lambda: 3, Exchange("name"))
    assert by_all(lambda: 3, told) == 3


def test_an_error_of_another_kind_names_its_process(served: Any) -> None:
    served("!RunError!process 1 ended with OSError: see what it says")
    with pytest.raises(RunError, match=r"^process 1 ended with OSError: see what it says$"):
        by_all(lambda: 3, Exchange("name"))


def batches(*sizes: int) -> Iterator[tuple[Any, int]]:
    for place, size in enumerate(sizes):
        yield kd.Batch(np.zeros((size, 2), np.float32)), place


def drawn(epoch: int, *sizes: int) -> list[int]:
    return [place for _, place in in_step(batches(*sizes), Exchange("batches"), epoch, threading.Event())]


FOUR, THREE = (shapes(kd.Batch(np.zeros((size, 2), np.float32))) for size in (4, 3))


def test_batches_are_given_while_all_have_them(served: Any) -> None:
    """What is as before is not said again."""
    service = served(FOUR, "", THREE, "no batch")
    assert drawn(0, 4, 4, 3) == [0, 1, 2]
    assert list(service.own.values()) == [FOUR, THREE, "no batch"]


@pytest.mark.parametrize(
    ("others", "sizes", "said"),
    [
        ((FOUR, "", "no batch"), (4, 4, 4), "of process 1 end after 2 of epoch 3, and process 0 has more: give all"),
        ((FOUR, ""), (4,), "of process 0 end after 1 of epoch 3, and process 1 has more: give all"),
        ((FOUR, THREE), (4, 4), r"batch 2 of epoch 3 has inputs float32\[3, 2\] in process 1, and inputs "),
        ((FOUR, "!DataError!a label is 9"), (4, 4), "^process 1: a label is 9$"),
    ],
)
def test_batches_that_others_do_not_have_are_refused(others: Any, sizes: Any, said: str, served: Any) -> None:
    served(*others)
    with pytest.raises(DataError, match=said):
        drawn(2, *sizes)


def test_batches_that_are_wanted_no_more_free_those_that_wait(served: Any) -> None:
    service, stop = served(FOUR, "", ""), threading.Event()
    given = in_step(batches(4, 4, 4), Exchange("batches"), 0, stop)
    next(given)
    given.close()
    assert list(service.own.values())[-1] == "!RunError!process 0 stopped amid an epoch: see what it says"
    service = served(FOUR, "", "")
    given = in_step(batches(4, 4, 4), Exchange("batches"), 0, stop)
    next(given)
    stop.set()
    assert next(given, None) is None
    assert "stopped amid an epoch" in list(service.own.values())[-1]


@together
def trained(given: Any, mesh: Any = None, fail: str = "") -> str:
    if fail == "before":
        raise ConfigError("too large: choose less")
    meet(given)
    if fail == "after":
        raise ConfigError("too large: choose less")
    return "trained"


def test_a_training_of_one_process_meets_nobody(served: Any) -> None:
    service = served(absent=True)
    assert trained({"epochs": 1}, mesh="own") == "trained"
    assert not service.waited


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"settings.epochs": 1, "data": "0" * 64}, ""),
        ({"settings.epochs": 2, "data": "0" * 64}, "settings.epochs is 2 in process 1, and 1 in process 0: give all"),
        ({"settings.epochs": 1, "data": "1" * 64}, "process 1 has another data than process 0: give all"),
        ({"settings.epochs": 1}, "process 1 has another data than process 0: give all"),
    ],
)
def test_all_processes_are_given_the_same(other: Any, said: str, served: Any) -> None:
    served(json.dumps(other))
    given = {"settings": {"epochs": 1}, "data": "0" * 64}
    if not said:
        assert trained(given, mesh="shared") == "trained"
        return
    with pytest.raises(ConfigError, match=said):
        trained(given, mesh="shared")


def test_one_that_does_not_begin_is_told(served: Any) -> None:
    service = served(absent=True)
    with pytest.raises(RunError, match="process 0 of 2 has waited 600 seconds for all others to begin this training"):
        trained({}, mesh="shared")
    assert [milliseconds for _, milliseconds in service.waited] == [600_000]


@pytest.mark.parametrize(("fail", "tells"), [("before", True), ("after", False)])
def test_one_that_fails_before_the_others_know_it_tells_them(fail: str, tells: bool, served: Any) -> None:
    service = served("{}")
    with pytest.raises(ConfigError, match="too large: choose less"):
        trained({}, mesh="shared", fail=fail)
    assert (list(service.own.values()) == ["!ConfigError!too large: choose less"]) is tells


def test_long_settings_are_compared_by_their_digest(served: Any) -> None:
    service = served(json.dumps({"method": "0" * 64}))
    with pytest.raises(ConfigError, match="process 1 has another method than process 0"):
        trained({"method": "KD" * 200}, mesh="shared")
    assert all(len(text) < 100 for text in service.own.values())


def test_settings_of_settings_have_names_with_dots() -> None:
    assert flat({"a": {"b": 1, "c": {"d": 2}}, "e": 3}) == {"a.b": 1, "a.c.d": 2, "e": 3}


def test_a_digest_is_of_the_values() -> None:
    one, two = digest_here({"a": np.zeros(3)}), digest_here({"a": np.ones(3)})
    assert one == digest_here({"a": np.zeros(3)}) != two
