"""Steps of several batches in one program are the steps of each."""

import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from small import DATA, SGD, X, Y, assert_close, assert_same, net, teacher

import kd_jax as kd
from kd_jax.errors import DataError
from kd_jax.methods import Method
from kd_jax.methods.base import Parts
from kd_jax.teacher import as_teacher
from kd_jax.train import groups
from kd_jax.train import sources as of_sources
from kd_jax.train.done import Position
from kd_jax.train.groups import Cuts, Group

pytest.importorskip("grain")
HOW: dict[str, Any] = {"optimizer": optax.sgd(0.1, momentum=0.9), "progress": False}
PLACE = Position(None, 0)


def few(count: int, width: int = 6) -> list[kd.Batch]:
    return [kd.Batch(np.full((2, width), place, np.float32), np.full(2, place % 4, np.int32)) for place in range(count)]


@pytest.fixture
def lengths(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Steps of each program that a stream calls."""
    found: list[int] = []
    original = of_sources.Stream.epoch

    def epoch(self: Any, *given: Any) -> Any:
        for done in original(self, *given):
            found.append(done.steps)
            yield done

    monkeypatch.setattr(of_sources.Stream, "epoch", epoch)
    return found


@pytest.mark.parametrize(
    ("most", "every", "start", "wanted"),
    [
        (4, None, 0, [4, 4, 3]),
        (1, None, 0, [1] * 11),
        (4, 6, 0, [4, 2, 4, 1]),
        (4, 3, 0, [3, 3, 3, 2]),
        (4, 3, 4, [2, 3, 3, 3]),
        (8, 1, 0, [1] * 11),
    ],
)
def test_a_group_ends_where_it_is_full_or_a_checkpoint_is_due(
    most: int, every: int | None, start: int, wanted: list[int]
) -> None:
    cuts = Cuts(lambda batch: most, every, start)
    found = [group for batch in few(11) for group in cuts.add((batch, PLACE))]
    found += cuts.rest()
    assert [len(group) for group in found] == wanted
    assert [batch.inputs[0, 0] for group in found for batch, _ in group] == list(range(11))
    assert list(cuts.rest()) == []


def test_a_group_has_batches_of_equal_shapes() -> None:
    cuts = Cuts(lambda batch: 4, None, 0)
    batches = [*few(3), *few(1, 5), *few(2)]
    found = [group for batch in batches for group in cuts.add((batch, PLACE))]
    assert [len(group) for group in [*found, *cuts.rest()]] == [3, 1, 2]


@pytest.mark.parametrize(
    ("shape", "wanted"), [((2, 6), 8), ((256, 1024), 4), ((1024, 1000), 1), ((1024, 4000), 1), ((2**20,), 1)]
)
def test_the_bytes_of_a_batch_say_how_many_are_a_group(shape: tuple[int, ...], wanted: int) -> None:
    assert groups.Sizes(None)(kd.Batch(np.zeros(shape, np.float32))) == wanted


def test_what_a_teacher_says_of_a_batch_counts_too() -> None:
    """It may be wide where the inputs are small, and is kept as often."""
    wide = as_teacher(kd.cached(np.zeros((24, 2**17), np.float32)))
    batch = kd.Batch(X[:4], Y[:4], None, np.arange(4, dtype=np.int32))
    assert groups.Sizes(wide)(batch) == 1
    assert groups.Sizes(as_teacher(kd.cached(np.zeros((24, 2**16), np.float32))))(batch) == 3
    assert groups.Sizes(as_teacher(teacher()))(batch) == 8


def test_the_bits_of_a_step_are_the_same_in_every_group() -> None:
    """Whatever lies behind the batches of the group."""

    def one(state: Any, batch: kd.Batch, teacher: None) -> Any:
        slopes = jax.grad(lambda weights: jnp.mean(jnp.tanh(batch.inputs @ weights) ** 2))(state)
        loss = jnp.sum(jnp.abs(slopes))
        return state - 0.3 * slopes, groups.Packed((jnp.stack([loss, loss / 3]),), (("loss", "third"),))

    rng = np.random.default_rng(0)
    batches = [kd.Batch(rng.normal(size=(3, 6)).astype(np.float32)) for _ in range(8)]
    first = jnp.asarray(rng.normal(size=(6, 4)), jnp.float32)
    run = jax.jit(groups.loop, static_argnums=(0, 5))

    def trained(*sizes: int) -> tuple[Any, list[float]]:
        state, numbers, at = first, [], 0
        for size in sizes:
            group = Group.of(batches[at : at + size], 8)
            state, packed = run(one, state, group.batch, None, group.count, 8)
            assert packed.values[0].shape == (8, 2)
            numbers += np.asarray(packed.values[0])[:size].tolist()
            at += size
        return np.asarray(state), numbers

    whole = trained(8)
    for sizes in ((3, 5), (1,) * 8, (7, 1)):
        state, numbers = trained(*sizes)
        np.testing.assert_array_equal(state, whole[0])
        assert numbers == whole[1]
    state = first
    for batch in batches:
        state, packed = groups.loop(one, state, batch, None, 1, 1)
        assert packed.values[0].shape == (1, 2)
    np.testing.assert_allclose(state, whole[0], rtol=1e-5)


@pytest.mark.parametrize(("more", "wanted"), [({}, [8, 4] * 2), ({"checkpoint_steps": 5}, [5, 5, 2] * 2)])
@pytest.mark.parametrize("cached", [False, True])
def test_a_stream_in_groups_is_the_training_in_memory(
    more: dict[str, Any], wanted: list[int], cached: bool, lengths: list[int], tmp_path: Any
) -> None:
    known = kd.cached(teacher(), X) if cached else teacher()
    folder = {"checkpoint": tmp_path} if more else {}
    data = kd.stream(DATA, batch_size=2, key=3)
    stream = kd.distill(net(), known, data, epochs=2, key=3, **HOW, **more, **folder)
    assert lengths == wanted
    memory = kd.distill(net(), known, DATA, epochs=2, batch_size=2, key=3, **HOW)
    assert_close(stream.model.variables, memory.model.variables, rtol=1e-5, atol=1e-6)
    for name in ("loss", "accuracy", "soft"):
        np.testing.assert_allclose(stream.history[name], memory.history[name], rtol=1e-5)


@pytest.mark.slow
def test_how_often_it_is_kept_changes_no_bit(tmp_path: Any) -> None:
    data = kd.stream(DATA, batch_size=2)
    named = HOW | {"epochs": 2}
    whole = kd.distill(net(), teacher(), data, **named)
    often = kd.distill(net(), teacher(), data, checkpoint=tmp_path, checkpoint_steps=5, **named)
    assert_same(often.model.variables, whole.model.variables)


def test_an_iterator_of_the_user_is_not_drawn_from_beforehand(lengths: list[int]) -> None:
    kd.distill(net(), None, few(5), epochs=1, **HOW)
    assert lengths == [1] * 5


def test_the_batches_before_one_that_cannot_be_read_are_trained_on(lengths: list[int]) -> None:
    rows = np.asarray(kd.stream(DATA, batch_size=2)[5].inputs)

    class Torn:
        def __len__(self) -> int:
            return len(X)

        def __getitem__(self, row: int) -> Any:
            if X[row].tolist() in rows.tolist():
                raise DataError(f"the example {row} is torn: leave it out")
            return X[row], Y[row]

    with pytest.raises(DataError, match="is torn: leave it out"):
        kd.distill(net(), None, kd.stream(Torn(), batch_size=2, ahead=1, threads=1), epochs=1, optimizer=SGD)
    assert lengths == [5]


@pytest.mark.slow
def test_examples_of_several_lengths_are_groups_of_their_own(lengths: list[int]) -> None:
    """A batch has one; the next may have another."""
    sizes = [4, 4, 6, 6, 6, 4]

    class Ragged:
        def __len__(self) -> int:
            return len(sizes)

        def __getitem__(self, row: int) -> Any:
            return np.full(sizes[row], 1 + row, np.float32), np.int32(row % 3)

    def mean(params: Any, inputs: jax.Array) -> jax.Array:
        return jnp.mean(inputs, axis=1, keepdims=True) * params

    model = kd.from_function(mean, jnp.ones((1, 3)))
    data = kd.stream(Ragged(), batch_size=1)
    order = [sizes[int(data[step].inputs[0, 0]) - 1] for step in range(6)]
    stream = kd.distill(model, None, data, epochs=1, optimizer=SGD)
    runs = [1]
    for before, now in itertools.pairwise(order):
        runs = [*runs[:-1], runs[-1] + 1] if now == before else [*runs, 1]
    assert lengths == runs
    singly = kd.distill(model, None, [data[step] for step in range(6)], epochs=1, optimizer=SGD)
    assert_close(stream.model.variables, singly.model.variables, rtol=1e-5, atol=1e-7)


def test_a_large_batch_between_small_ones_is_a_group_of_its_own() -> None:
    sizes = groups.Sizes(None)
    cuts = Cuts(sizes, None, 0)
    batches = [*few(2), *few(2, 2**20), *few(3)]
    found = [group for batch in batches for group in cuts.add((batch, PLACE))]
    assert [len(group) for group in [*found, *cuts.rest()]] == [2, 1, 1, 3]
    assert [sizes(batch) for batch in batches] == [8, 8, 1, 1, 8, 8, 8]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the teacher is right on")
@pytest.mark.parametrize("given", [few(5), kd.stream(DATA, batch_size=2)])
@pytest.mark.parametrize("kind", ["number", "key"])
def test_a_teacher_may_have_numbers_of_python_and_keys(given: Any, kind: str) -> None:
    variables = {"scale": 2.0, "bias": np.zeros((1, 4), np.float32)}
    if kind == "key":
        variables |= {"scale": np.float32(2), "key": jax.random.key(0)}  # type: ignore[dict-item]
    known = kd.from_function(lambda params, x: x[:, :4] * params["scale"] + params["bias"], variables)
    result = kd.distill(net(), known, given, epochs=1, optimizer=SGD)
    assert np.isfinite(result.history["loss"]).all()


@dataclasses.dataclass(frozen=True)
class Counting(Method):
    """Its state is a whole number at first, and a float from the first step on."""

    needs_teacher = False

    def init(self, key: Any, student: Any, teacher: Any) -> Parts:
        return Parts(carried={"steps": jnp.zeros((), jnp.int32)})

    def loss(self, parts: Any, student: Any, teacher: Any, batch: Any, step: Any) -> Any:
        hard = optax.softmax_cross_entropy_with_integer_labels(student.logits, batch.labels)
        steps = parts.carried["steps"].astype(jnp.float32) + jnp.float32(1)
        return {"hard": hard, "count": steps}, {"steps": steps}


@pytest.mark.slow
@pytest.mark.parametrize("given", [few(12), kd.stream(DATA, batch_size=2)])
def test_a_method_s_state_may_become_another_type_in_the_first_step(given: Any) -> None:
    result = kd.distill(net(), None, given, method=Counting(), epochs=1, optimizer=SGD)
    np.testing.assert_allclose(result.history["count"], [6.5])
