"""Where batches come from: data in memory and iterators give the same training."""

import itertools
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import optax
import pytest
from small import DATA, SGD, X, Y, assert_close, assert_same, leaves, net, teacher

import kd_jax as kd
from kd_jax.errors import ConfigError, DataError, NotFiniteError
from kd_jax.teacher import as_teacher
from kd_jax.train import loop as of_loop
from kd_jax.train import sources as of_sources
from kd_jax.train.checks import make_training
from kd_jax.train.sizes import chunk_lengths, loop_lengths

pytestmark = pytest.mark.usefixtures("quick_compiling")
MEMORY = {"optimizer": optax.sgd(0.1, momentum=0.9), "method": kd.KD(0.3), "key": 7}


class Counted:
    """An iterable that begins anew each time, and tells how often."""

    def __init__(self, batches: list[Any]):
        self.batches, self.begun, self.given = batches, 0, 0

    def __iter__(self) -> Iterator[Any]:
        self.begun += 1
        for batch in self.batches:
            self.given += 1
            yield batch


def batches(epochs: int = 2) -> list[kd.Batch]:
    return list(kd.batches(DATA, key=7, batch_size=8, epochs=epochs))


def test_memory_and_an_iterator_in_the_same_order_give_the_same_parameters() -> None:
    """Within 1e-5 of the values: one is a loop in one program, the other a program for each step."""
    memory = kd.distill(net(), teacher(), DATA, epochs=2, batch_size=8, **MEMORY)
    stream = kd.distill(net(), teacher(), iter(batches()), epochs=2, steps=3, **MEMORY)
    assert_close(stream.model.variables, memory.model.variables, rtol=1e-5, atol=1e-6)
    for name in ("loss", "hard", "soft", "accuracy"):
        np.testing.assert_allclose(stream.history[name], memory.history[name], rtol=1e-5)
    other = kd.distill(net(), teacher(), reversed(batches()), epochs=2, steps=3, **MEMORY)
    assert any(
        (a != b).any() for a, b in zip(leaves(other.model.variables), leaves(stream.model.variables), strict=True)
    )


def test_an_iterable_begins_anew_in_every_epoch_without_steps() -> None:
    data = Counted(batches(1))
    result = kd.distill(net(), teacher(), data, epochs=3, **MEMORY)
    assert int(result.state.step) == 9
    assert (data.begun, data.given) == (3, 9)
    flat = kd.distill(net(), teacher(), iter(batches(1) * 3), epochs=3, steps=3, **MEMORY)
    assert_same(result.model.variables, flat.model.variables)


def test_few_steps_of_an_iterator_wait_to_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each has its temporary memory on a CPU: before a fifth is called, the first has ended."""
    called: list[Any] = []
    waited: list[tuple[int, int]] = []
    original, wait = of_sources.Stream.epoch, jax.block_until_ready

    def epoch(self: Any, *given: Any) -> Iterator[Any]:
        for done in original(self, *given):
            called.append(done.metrics)
            yield done

    def waits(value: Any) -> Any:
        place = [place for place, metrics in enumerate(called) if metrics is value]
        if place:
            waited.append((len(called), place[0]))
        return wait(value)

    monkeypatch.setattr(of_sources.Stream, "epoch", epoch)
    monkeypatch.setattr(of_loop.jax, "block_until_ready", waits)
    kd.distill(net(), None, list(kd.batches(DATA, key=0, batch_size=2, epochs=1)), epochs=1, optimizer=SGD)
    assert waited == [(count, count - 5) for count in range(5, 13)]


def test_an_epoch_of_many_steps_keeps_few_arrays(monkeypatch: pytest.MonkeyPatch) -> None:
    """And their means are those of all steps."""
    data = list(kd.batches(DATA, key=0, batch_size=2, epochs=1))
    whole = kd.distill(net(), None, data, epochs=2, optimizer=SGD)
    parts: list[list[int]] = []
    joined = of_loop._joined

    def counted(given: Any, steps: Any) -> Any:
        parts.append([len(part["examples"]) for part in given.values()])
        return joined(given, steps)

    monkeypatch.setattr(of_loop, "_TOGETHER", 5)
    monkeypatch.setattr(of_loop, "_joined", counted)
    again = kd.distill(net(), None, data, epochs=2, optimizer=SGD)
    assert parts == [[1] * 5, [1] * 5, [5, 5, 1, 1]] * 2
    for name in ("loss", "accuracy"):
        np.testing.assert_array_equal(again.history[name], whole.history[name])


def test_steps_go_on_where_the_epoch_before_ended() -> None:
    """Of an iterable, too, which begins anew where it ends; nothing is lost between."""
    data = Counted(batches(1))
    result = kd.distill(net(), teacher(), data, epochs=3, steps=2, **MEMORY)
    flat = kd.distill(net(), teacher(), iter(batches(1) * 2), epochs=3, steps=2, **MEMORY)
    assert_same(result.model.variables, flat.model.variables)


def test_no_more_is_drawn_than_is_trained_on() -> None:
    drawn = []

    def endless() -> Iterator[Any]:
        for number in itertools.count():
            drawn.append(number)
            yield X[:8], Y[:8]

    kd.distill(net(), None, endless(), epochs=2, steps=2, optimizer=SGD)
    time.sleep(0.05)
    assert len(drawn) == 4


def test_a_batch_counts_by_its_examples() -> None:
    """The mean of an epoch's losses, of batches of 8 and of 16."""
    result = kd.distill(net(), None, [(X[:8], Y[:8]), (X[8:], Y[8:])], optimizer=optax.sgd(0.0), key=7)
    whole = kd.distill(net(), None, [(X, Y)], optimizer=optax.sgd(0.0), key=7)
    np.testing.assert_allclose(result.history["loss"], whole.history["loss"], rtol=1e-6)


def test_an_iterator_that_ends_too_early_is_told() -> None:
    with pytest.raises(DataError, match="the iterator ended after 1 of the 2 steps of epoch 2: give fewer steps"):
        kd.distill(net(), None, iter([(X[:8], Y[:8])] * 3), epochs=2, steps=2, optimizer=SGD)
    once = [[(X[:8], Y[:8])]]

    class Once:
        def __iter__(self) -> Iterator[Any]:
            return iter(once.pop() if once else [])

    with pytest.raises(DataError, match="the iterator of training batches is empty in epoch 2"):
        kd.distill(net(), None, Once(), epochs=2, optimizer=SGD)


def test_what_an_iterator_raises_reaches_the_user() -> None:
    def broken() -> Iterator[Any]:
        yield X[:8], Y[:8]
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        kd.distill(net(), None, broken(), steps=3, optimizer=SGD)


def test_labels_outside_are_told_in_any_batch() -> None:
    with pytest.raises(DataError, match="the label 7 is outside the 4 classes"):
        kd.distill(net(), None, [(X[:8], Y[:8]), (X[:8], np.full(8, 7))], optimizer=SGD)


@pytest.mark.parametrize("kind", ["memory", "stream"])
def test_a_training_stops_at_the_first_loss_that_is_not_finite(kind: str) -> None:
    """In epoch 1, of inputs whose logits overflow. At step 1 no learning rate is to blame."""
    huge = np.where(np.arange(24)[:, None] < 20, X, np.float32(3e38)).astype(np.float32)
    where = r"the loss is not finite at step (1 of epoch 1: look for parameters|\d of epoch 1: choose a smaller)"
    if kind == "memory":
        with pytest.raises(NotFiniteError, match=where):
            kd.distill(net(), None, (huge, Y), batch_size=8, optimizer=SGD)
    else:
        with pytest.raises(NotFiniteError, match=r"at step [23] of epoch 1: choose a smaller"):
            kd.distill(net(), None, [(X[:8], Y[:8]), (huge[16:], Y[16:]), (X[:8], Y[:8])], optimizer=SGD)


@pytest.mark.parametrize("kind", ["memory", "stream"])
def test_infinite_inputs_are_named_where_they_lie_in_memory(kind: str) -> None:
    bad = np.where(np.arange(24)[:, None] < 20, X, np.inf).astype(np.float32)
    if kind == "memory":
        with pytest.raises(NotFiniteError, match="the inputs of example 20 are infinite, and so is the loss"):
            kd.distill(net(), None, (bad, Y), batch_size=8, optimizer=SGD)
    else:
        with pytest.raises(NotFiniteError, match="at step 2 of epoch 1"):
            kd.distill(net(), None, [(X[:8], Y[:8]), (bad[16:], Y[16:]), (X[:8], Y[:8])], optimizer=SGD)


@pytest.mark.parametrize("kind", ["memory", "stream"])
def test_parameters_that_are_not_finite_are_told_although_every_loss_is(kind: str) -> None:
    """The loss of the one step is of before the update."""
    data, named = ((X[:8], Y[:8]), {"batch_size": 8}) if kind == "memory" else ([(X[:8], Y[:8])], {})
    with pytest.raises(NotFiniteError, match="a parameter or a moment of the optimiser is not finite after step 1"):
        kd.distill(net(), None, data, optimizer=optax.sgd(float("inf")), **named)


@pytest.mark.parametrize(
    ("steps", "lengths"),
    [(1875, {75}), (1, {1}), (30, {1}), (7, {1}), (468, {18}), (938, {67}), (1873, {75, 73}), (59, {3, 2}), (100, {4})],
)
def test_an_epoch_is_cut_into_equal_chunks_where_a_number_of_them_divides_it(steps: int, lengths: set[int]) -> None:
    assert set(chunk_lengths(steps, 25)) == lengths


def test_the_loops_of_an_epoch_are_neither_many_short_ones_nor_few_long_ones() -> None:
    for steps in range(1, 32):
        assert sum(loop_lengths(steps)) == steps
        assert len(set(loop_lengths(steps))) == 1
        assert min(loop_lengths(steps)) >= min(8, steps)
    assert loop_lengths(15) == [15]
    assert loop_lengths(24) == [8] * 3
    assert loop_lengths(31) == [31]
    for steps in range(32, 2000):
        loops = loop_lengths(steps)
        assert sum(loops) == steps
        assert min(loops) >= 8
        assert len(set(loops)) == 1 or max(loops) - min(loops) == 1
        assert 5 <= len(loops) <= 20 or steps < 80
    assert loop_lengths(64) == [8] * 8
    assert loop_lengths(82) == [9] * 2 + [8] * 8
    assert loop_lengths(781) == [71] * 11


@pytest.mark.parametrize("parts", [1, 2, 8, 20, 40])
def test_no_loop_needs_more_of_a_kept_teacher_than_a_part(parts: int) -> None:
    for steps in (1, 7, 25, 31, 33, 41, 50, 100, 937):
        loops = loop_lengths(steps, parts)
        assert sum(loops) == steps
        assert max(loops) <= -(-steps // parts)
        assert min(loops) >= 1
    assert loop_lengths(50, -(-40 * 50 // 1000)) == [10] * 5


def test_checkpoints_within_an_epoch_do_not_cut_its_loops_shorter_than_a_teacher_needs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A part of 1,000 steps that a teacher has in 40 parts needs its share of these."""
    known = as_teacher(np.zeros((1000, 4), np.float32))
    monkeypatch.setattr(type(known), "parts", 40)
    data = kd.Batch(np.zeros((1000, 6), np.float32), np.zeros(1000, np.int32))
    given = (data, known, jax.random.key(0), kd.KD(), make_training(net(), SGD))
    assert of_sources.Memory(*given, batch_size=1, every=50).lengths == [10] * 100
    assert of_sources.Memory(*given, batch_size=1, every=None).lengths == [25] * 40


@pytest.mark.parametrize("reports", [1, 2, 10, 25])
def test_chunks_always_make_an_epoch(reports: int) -> None:
    for steps in (*range(1, 400), 1000, 1873, 1875):
        chunks = chunk_lengths(steps, reports)
        assert sum(chunks) == steps
        assert min(chunks) > 0
        assert len(set(chunks)) <= 2
        assert len(chunks) <= 2 * reports + 1


W = np.zeros((24, 7), np.float32)


@pytest.mark.parametrize(
    ("second", "says"),
    [
        (kd.Batch(W, Y), r"the student cannot be called with inputs of float32\[24, 7\]"),
        (kd.Batch(X), "CrossEntropy needs labels, and the data has none"),
        (kd.Batch(X, Y, np.ones((24, 3))), r"the weights have the shape \(24, 3\)"),
        (kd.Batch(X[:0], Y[:0]), "a batch of the iterator has 0 examples: leave it out"),
    ],
)
def test_a_later_batch_that_does_not_fit_is_one_sentence(second: kd.Batch, says: str) -> None:
    with pytest.raises((ConfigError, DataError), match=says) as error:
        kd.distill(net(), None, [DATA, second], optimizer=SGD)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("first", [True, False])
def test_a_batch_without_any_weight_is_as_if_absent(first: bool) -> None:
    """It comes first or last; the means are of those that count."""
    absent = kd.Batch(X, Y, np.zeros(24))
    result = kd.distill(net(), None, [absent, DATA] if first else [DATA, absent], optimizer=SGD)
    alone = kd.distill(net(), None, [DATA], optimizer=SGD)
    assert_close(result.model.variables, alone.model.variables)
    for name in ("loss", "accuracy"):
        np.testing.assert_allclose(result.history[name], alone.history[name], rtol=1e-5)


def test_an_epoch_without_any_weight_is_refused() -> None:
    with pytest.raises(DataError, match="the weights sum to 0"):
        kd.distill(net(), None, [kd.Batch(X, Y, np.zeros(24))] * 2, optimizer=SGD)
