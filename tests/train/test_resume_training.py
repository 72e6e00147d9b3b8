"""A training that was stopped goes on to the same bytes."""

import inspect
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from slowly import all_but_first
from small import DATA, HOW, X, Y, assert_close, assert_same, net, table, teacher

import kd_jax as kd
from kd_jax.errors import CheckpointError, ConfigError, DataError, MismatchError
from kd_jax.methods.base import LossFunction
from kd_jax.train import done as of_done
from kd_jax.train import loop as of_loop
from kd_jax.train.checkpoint import Store
from kd_jax.train.resume import Folder, description, opened

pytestmark = pytest.mark.usefixtures("quick_compiling")
BATCHES = list(kd.batches(DATA, key=7, batch_size=4, epochs=3))
NAMED = {"optimizer": optax.sgd(0.1, momentum=0.9), "method": kd.KD(0.3) + kd.FitNet("hidden.0"), "epochs": 3}


class Positioned:
    """An iterator that tells where it is, as Grain's do."""

    def __init__(self, kind: type = dict):
        self.at, self.kind, self.restored = 0, kind, False

    def __iter__(self) -> "Positioned":
        return self

    def __next__(self) -> kd.Batch:
        self.at += 1
        return BATCHES[(self.at - 1) % len(BATCHES)]

    def get_state(self) -> Any:
        return {"at": self.at} if self.kind is dict else str(self.at).encode()

    def set_state(self, state: Any) -> None:
        self.at, self.restored = int(state["at"] if self.kind is dict else state), True


class Stopped(Exception):  # noqa: N818
    pass


class Stopping:
    """An iterable of the same batches that breaks down at one of them."""

    def __init__(self, source: Any, after: int):
        self.source, self.left = source, after

    def __iter__(self) -> "Stopping":
        self.iterator = iter(self.source)
        return self

    def __next__(self) -> Any:
        self.left -= 1
        if self.left < 0:
            raise Stopped
        return next(self.iterator)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["source"], name)


def generator() -> Iterator[kd.Batch]:
    yield from BATCHES


SOURCES = {
    "a state of a dict": lambda: Positioned(dict),
    "a state of bytes": lambda: Positioned(bytes),
    "an iterator without a state": generator,
    "an iterable": lambda: BATCHES,
}


def train(data: Any, folder: Path | None = None, **more: Any) -> kd.Result:
    named = NAMED | ({"batch_size": 4} if isinstance(data, kd.Batch) else {"steps": 6}) | more
    return kd.distill(net(), teacher(), data, checkpoint=folder, **named)


def assert_equal(found: kd.Result, wanted: kd.Result) -> None:
    assert_same(found.state, wanted.state)
    for name, values in wanted.history.items():
        if name != "seconds":
            np.testing.assert_array_equal(found.history[name], values)


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("where", all_but_first(["amid an epoch", "between epochs"]))
def test_a_resumed_training_on_an_iterator_equals_one_that_was_not_stopped(
    source: str, where: str, tmp_path: Path
) -> None:
    make = SOURCES[source]
    whole = train(make())

    def stop(epoch: Any) -> None:
        if epoch.number == 2:
            raise Stopped

    amid = where == "amid an epoch"
    first = Stopping(make(), 11) if amid else make()
    with pytest.raises(Stopped):
        train(first, tmp_path, checkpoint_steps=2 if amid else None, callbacks=stop)
    again = make()
    resumed = train(Stopping(again, 99) if amid else again, tmp_path, checkpoint_steps=2 if amid else None, resume=True)
    assert_equal(resumed, whole)
    if isinstance(again, Positioned):
        assert again.restored


@pytest.mark.parametrize("every", [None, 2, 4])
def test_a_resumed_training_in_memory_equals_one_that_was_not_stopped(every: int | None, tmp_path: Path) -> None:
    """With the best, of a validation, and stopped early as it would have been."""
    stopping = kd.callbacks.early_stopping("validation_nll", patience=2)
    more = {"validation": DATA, "best": "nll", "checkpoint_steps": every, "epochs": 5}
    whole = train(DATA, tmp_path / "whole", callbacks=stopping, **more)

    def stop(epoch: Any) -> None:
        if epoch.number == 2:
            raise Stopped

    with pytest.raises(Stopped):
        train(DATA, tmp_path / "own", callbacks=[stopping, stop], **more)
    fresh = kd.callbacks.early_stopping("validation_nll", patience=2)
    resumed = train(DATA, tmp_path / "own", callbacks=fresh, resume=True, **more)
    assert_equal(resumed, whole)
    assert resumed.best_epoch == whole.best_epoch
    assert_same(resumed.student.variables, whole.student.variables)


def test_early_stopping_counts_what_was_before(tmp_path: Path) -> None:
    """A loss that only grows, and two epochs of patience: epoch 3 is the last, resumed or not."""
    named = {"epochs": 6, "batch_size": 4, "optimizer": optax.sgd(-0.05)}

    def once(*also: Any, **more: Any) -> kd.Result:
        callbacks = [kd.callbacks.early_stopping("loss", patience=2), *also]
        return kd.distill(net(), None, DATA, callbacks=callbacks, **named, **more)

    def stop(epoch: Any) -> None:
        if epoch.number == 2:
            raise Stopped

    assert len(once().history["loss"]) == 3
    with pytest.raises(Stopped):
        once(stop, checkpoint=tmp_path)
    assert len(once(checkpoint=tmp_path, resume=True).history["loss"]) == 3


def test_a_finished_training_is_given_back(tmp_path: Path) -> None:
    whole = train(DATA, tmp_path)
    assert_equal(train(DATA, tmp_path, resume=True), whole)


def test_a_folder_with_a_training_is_not_written_over(tmp_path: Path) -> None:
    train(DATA, tmp_path, epochs=1)
    with pytest.raises(ConfigError, match="already holds a training: go on with resume=True"):
        train(DATA, tmp_path, epochs=1)


CHANGES = {
    "settings.method": {"method": kd.KD(0.4) + kd.FitNet("hidden.0")},
    "settings.key": {"key": 1},
    "settings.epochs": {"epochs": 2},
    "optimizer": {"optimizer": optax.sgd(0.2, momentum=0.9)},
    "data": {"data": kd.Batch(X + 1, Y)},
    "teacher": {"teacher": teacher(6, 9, 4)},
}


@pytest.mark.parametrize("what", CHANGES)
def test_another_training_is_not_resumed(what: str, tmp_path: Path) -> None:
    named = {"data": DATA, "teacher": teacher(), "batch_size": 4, **NAMED, "epochs": 1}
    kd.distill(net(), named.pop("teacher"), named.pop("data"), checkpoint=tmp_path, **named)
    other = {"data": DATA, "teacher": teacher(), "batch_size": 4, **NAMED, "epochs": 1} | CHANGES[what]
    with pytest.raises(
        MismatchError, match=f"(another {what}|{what}[a-z.]* is .*): go on with what it was started with"
    ):
        kd.distill(net(), other.pop("teacher"), other.pop("data"), checkpoint=tmp_path, resume=True, **other)


def test_a_function_that_computes_something_else_is_another_training(tmp_path: Path) -> None:
    """What it closes over is not in its name."""

    def loss(factor: float) -> Any:
        return lambda student, taught, labels: factor * jnp.sum((student - taught) ** 2, axis=-1)

    named = {"batch_size": 4, "epochs": 1, "optimizer": optax.sgd(0.01), "checkpoint": tmp_path}
    kd.distill(net(), teacher(), DATA, method=loss(1.0), **named)
    kd.distill(net(), teacher(), DATA, method=loss(1.0), resume=True, **named)
    with pytest.raises(MismatchError, match="has another computation of a step: go on with what it was started with"):
        kd.distill(net(), teacher(), DATA, method=loss(5.0), resume=True, **named)


def kept(path: Path) -> list[str]:
    return sorted(str(one.relative_to(path)) for one in path.rglob("*") if one.is_file() and one.name != ".lock")


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("whose", ["of somebody else", "of a training"])
def test_checkpoints_that_nothing_describes_stay(whose: str, resume: bool, tmp_path: Path) -> None:
    if whose == "of a training":
        kd.distill(net(), None, DATA, checkpoint=tmp_path, **HOW)
        (tmp_path / "run.json").unlink()
    else:
        (tmp_path / "checkpoints" / "my_resnet").mkdir(parents=True)
        (tmp_path / "checkpoints" / "my_resnet" / "weights.bin").write_bytes(b"mine")
    before = kept(tmp_path)
    with pytest.raises(CheckpointError, match=r"run\.json is gone, and .*: restore it, or choose another folder for c"):
        kd.distill(net(), None, DATA, checkpoint=tmp_path, resume=resume, **HOW)
    assert kept(tmp_path) == before


@pytest.mark.parametrize("several", [False, True])
def test_another_model_of_another_library_is_another_training(several: bool, tmp_path: Path) -> None:
    first, same, other = ([table(seed), teacher()] if several else table(seed) for seed in (0, 0, 1))
    kd.distill(net(), first, DATA, checkpoint=tmp_path, **HOW)
    kd.distill(net(), same, DATA, checkpoint=tmp_path, resume=True, **HOW)
    with pytest.raises(MismatchError, match="has another model of the teacher: go on with what it was started with"):
        kd.distill(net(), other, DATA, checkpoint=tmp_path, resume=True, **HOW)


def test_what_a_teacher_calls_back_is_told_to_be_unknown(tmp_path: Path) -> None:
    def calling(x: jax.Array) -> jax.Array:
        return jax.pure_callback(lambda x: x[:, :4], jax.ShapeDtypeStruct((len(x), 4), np.float32), x)

    kd.distill(net(), calling, DATA, checkpoint=tmp_path, **HOW)
    with pytest.warns(UserWarning, match="nothing is known of functions of Python that the teacher calls"):
        kd.distill(net(), calling, DATA, checkpoint=tmp_path, resume=True, **HOW)


@pytest.mark.parametrize("where", ["data", "validation"])
def test_other_batches_of_a_list_are_not_resumed(where: str, tmp_path: Path) -> None:
    how = {"checkpoint": tmp_path, "optimizer": HOW["optimizer"], "epochs": 1}
    given = {"data": BATCHES, "validation": BATCHES[:2]}
    changed = [batch._replace(inputs=-batch.inputs) for batch in given[where]]
    kd.distill(net(), None, **given, **how)
    kd.distill(net(), None, **given, **how, resume=True)
    with pytest.raises(MismatchError, match=f"has another (settings.batches of {where}|list of batches)"):
        kd.distill(net(), None, **given | {where: changed}, **how, resume=True)


def test_another_first_batch_of_an_iterator_is_warned_of(tmp_path: Path) -> None:
    """An iterable may have another order each time."""
    how = {"checkpoint": tmp_path, "optimizer": HOW["optimizer"], "epochs": 1, "steps": 3}
    kd.distill(net(), None, iter(BATCHES), **how)
    with pytest.warns(UserWarning, match="the first batch is another than that of the training in"):
        kd.distill(net(), None, iter(BATCHES[::-1]), **how, resume=True)


def test_what_earlier_versions_did_not_keep_is_warned_of(tmp_path: Path) -> None:
    said: list[str] = []
    older = {"settings": {"epochs": 1}, "data": "builtins.list", "teacher": "0" * 64}
    newer = {**older, "list of batches": "1" * 64, "first batch": "2" * 64, "model of the teacher": None}
    newer["settings"] = {"epochs": 1, "development": "3" * 64, "batches of validation": None}
    with opened(tmp_path, older, resume=False, warn=said.append):
        pass
    with opened(tmp_path, newer, resume=True, warn=said.append):
        pass
    assert [sentence.partition(" did not keep its ")[2].partition(":")[0] for sentence in said] == [
        "development", "list of batches",
    ]  # fmt: skip


def my_loss(student: Any, teacher: Any, labels: Any) -> Any:
    return student[:, 0]


class Plain(kd.Method):
    """No dataclass."""

    def __init__(self, function: Any, weights: Any = None):
        self.function, self.weights = function, weights


def test_a_method_is_described_alike_in_every_process() -> None:
    """No address of a function, and arrays by what they hold."""
    assert description(Plain(my_loss)) == "Plain(function=my_loss, weights=None)"
    assert description(Plain({"a": [my_loss, 1]})) == "Plain(function=dict(a=[my_loss, 1]), weights=None)"
    assert description(Plain({"a": [2, 1]})) == "Plain(function={'a': [2, 1]}, weights=None)"
    assert description(Plain(my_loss, np.zeros(2000))) != description(Plain(my_loss, np.arange(2000) / 1e9))
    assert description(LossFunction(my_loss)) == "LossFunction(function=my_loss)"
    assert description(kd.KD() + 2 * kd.FitNet("a")) == (
        "Sum(methods=(KD(alpha=0.1, temperature=4.0), Scaled(method=FitNet(hint='a', guided=None), factor=2)))"
    )
    one, two = (description(kd.KD(jnp.arange(2000.0) + add)) for add in (0, 1))
    assert one != two
    assert description(kd.KD(jnp.float32(0.5))) == description(kd.KD(0.5))
    assert jax.tree.leaves(kd.KD()) == [0.1, 4.0]


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(3, None), (4, 23), (5, 1)])
def test_checkpoints_at_other_steps_skip_none(
    before: int, after: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped amid an epoch, where the chunks of the resumed training do not begin: every step is done once."""
    named = {"epochs": 2, "batch_size": 1, "optimizer": optax.sgd(0.1)}
    whole = kd.distill(net(), None, DATA, **named)
    saves: list[int] = []
    original = Folder.save

    def save(self: Folder, progress: Any) -> None:
        original(self, progress)
        saves.append(progress.start)
        if progress.epoch == 1 and progress.start:
            raise Stopped

    monkeypatch.setattr(Folder, "save", save)
    with pytest.raises(Stopped):
        kd.distill(net(), None, DATA, checkpoint=tmp_path, checkpoint_steps=before, **named)
    monkeypatch.undo()
    assert saves[-1] == before
    resumed = kd.distill(net(), None, DATA, checkpoint=tmp_path, checkpoint_steps=after, resume=True, **named)
    assert int(resumed.state.step) == 48
    assert_close(resumed.state.variables, whole.state.variables)
    assert_close(resumed.history["loss"], whole.history["loss"])


@pytest.mark.slow
def test_an_interrupt_while_metrics_are_awaited_loses_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It comes at every place in turn where the loop looks at an array."""
    named = {"epochs": 1, "batch_size": 2, "optimizer": optax.sgd(0.1), "checkpoint_steps": 3}
    whole = kd.distill(net(), None, DATA, checkpoint=tmp_path / "whole", **named)
    for place in range(1, 12, 2):
        left = [place]

        def array(*given: Any, left: list[int] = left) -> Any:
            left[0] -= 1
            if left[0] == 0:
                raise KeyboardInterrupt
            return np.array(*given)

        folder = tmp_path / str(place)
        monkeypatch.setattr(of_done, "np", SimpleNamespace(**vars(np) | {"array": array}))
        with pytest.raises(KeyboardInterrupt):
            kd.distill(net(), None, DATA, checkpoint=folder, **named)
        monkeypatch.undo()
        assert_equal(kd.distill(net(), None, DATA, checkpoint=folder, resume=True, **named), whole)


def test_an_interrupt_while_a_step_of_an_iterator_is_awaited_keeps_those_called(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = list(kd.batches(DATA, key=0, batch_size=2, epochs=1))
    named = {"epochs": 1, "optimizer": optax.sgd(0.1)}
    whole = kd.distill(net(), None, batches, **named)
    wait = jax.block_until_ready
    left = [3]

    def waits(value: Any) -> Any:
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt
        return wait(value)

    monkeypatch.setattr(of_loop.jax, "block_until_ready", waits)
    with pytest.raises(KeyboardInterrupt):
        kd.distill(net(), None, batches, checkpoint=tmp_path, **named)
    monkeypatch.undo()
    assert list((tmp_path / "checkpoints").iterdir())
    assert_equal(kd.distill(net(), None, batches, checkpoint=tmp_path, resume=True, **named), whole)


@pytest.mark.usefixtures("standard_promotion")
def test_numbers_of_numpy_and_an_optimiser_with_a_key_are_kept(tmp_path: Path) -> None:
    """The optimiser's own key is not given away either: it serves a second training."""
    noisy = optax.chain(optax.add_noise(0.01, 0.5, jax.random.key(3)), optax.sgd(0.1))
    how: dict[str, Any] = {"optimizer": noisy, "batch_size": np.int32(8), "epochs": np.int64(2)}
    # Without the run-time types of the tests, which users do not have.
    distill = inspect.unwrap(kd.distill)
    whole = distill(net(), None, DATA, **how)

    def stop(epoch: kd.callbacks.Epoch) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        distill(net(), None, DATA, checkpoint=tmp_path, checkpoint_steps=np.int16(1), callbacks=stop, **how)
    again = distill(net(), None, DATA, checkpoint=tmp_path, checkpoint_steps=np.int16(1), resume=True, **how)
    assert_same(again.model.variables, whole.model.variables)


def test_a_history_that_is_read_is_that_which_was_written(tmp_path: Path) -> None:
    how = {**HOW, "epochs": 2, "validation": DATA, "checkpoint": tmp_path}
    whole = kd.distill(net(), None, DATA, **how)
    again = kd.distill(net(), None, DATA, resume=True, **how)
    assert list(again.history) == list(whole.history)
    assert {name: values.dtype for name, values in again.history.items()} == {
        name: values.dtype for name, values in whole.history.items()
    }
    assert whole.history["validation_correct"].dtype == np.int64


@pytest.mark.parametrize("data", ["memory", "iterable"])
def test_an_interrupt_behind_the_steps_of_an_epoch_loses_none(data: str, tmp_path: Path) -> None:
    how = {**HOW, "epochs": 4} if data == "memory" else {"optimizer": HOW["optimizer"], "epochs": 4}
    given = DATA if data == "memory" else BATCHES[:3]

    def stop(epoch: kd.callbacks.Epoch) -> None:
        if epoch.number == 3:
            raise KeyboardInterrupt

    whole = kd.distill(net(), None, given, **how)
    with pytest.raises(KeyboardInterrupt):
        kd.distill(net(), None, given, checkpoint=tmp_path, callbacks=stop, **how)
    assert (tmp_path / "checkpoints" / "training" / "000000009").is_dir()
    assert_equal(kd.distill(net(), None, given, checkpoint=tmp_path, resume=True, **how), whole)


def test_a_random_key_and_an_empty_array_may_be_state(tmp_path: Path) -> None:
    """With weights and validation, too, and in a folder, from which a training goes on."""
    start = {"key": jax.random.key(3), "none": jnp.zeros((0, 2))}

    def apply(params: Any, state: Any, x: Any) -> Any:
        key, own = jax.random.split(state["key"])
        return x @ params + jax.random.normal(own, (1, 4)), {**state, "key": key}

    data = DATA._replace(weights=np.ones(24, np.float32))
    named: dict[str, Any] = {"optimizer": optax.sgd(0.1), "batch_size": 8, "checkpoint": tmp_path, "validation": DATA}
    model = kd.from_function(apply, jnp.zeros((6, 4)), state=start)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(of_loop, "_PAUSE", 0.0)
        whole = kd.distill(model, None, data, epochs=2, **named)
    again = kd.distill(model, None, data, epochs=2, resume=True, **named)
    assert_same(again.state.variables["params"], whole.state.variables["params"])
    keys = [one.state.variables["state"]["key"] for one in (whole, again)]
    assert keys[0] == keys[1] != start["key"]
    assert again.state.variables["state"]["none"].shape == (0, 2)


def test_names_that_no_checkpoint_can_have_are_told_before_the_first_step(tmp_path: Path) -> None:
    model = kd.from_function(
        lambda p, x: x @ p["a"]["w"] + x @ p["a.w"], {"a": {"w": np.ones((6, 4))}, "a.w": np.ones((6, 4))}
    )
    with pytest.raises(DataError, match=r"two arrays of the training have the name variables\.a\.w: rename one"):
        kd.distill(model, None, DATA, batch_size=8, optimizer=optax.sgd(0.1), checkpoint=tmp_path)


def test_other_measures_and_another_best_are_another_training(tmp_path: Path) -> None:
    measures = {"first": lambda logits, labels: logits[:, 0]}
    how = {**HOW, "epochs": 1, "validation": DATA, "checkpoint": tmp_path}
    kd.distill(net(), None, DATA, **how, measures=measures, best="first", higher=True)
    for other in ({"measures": {}, "best": "nll"}, {"measures": measures, "best": "first", "higher": False}):
        with pytest.raises(MismatchError, match="and the training in"):
            kd.distill(net(), None, DATA, **how, **other, resume=True)


def test_the_first_checkpoint_is_there_before_the_second_epoch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However slowly it is written: a training that is killed goes on from it."""
    write, seen = Store._write, list[int]()

    def slow(*given: Any) -> None:
        time.sleep(0.5)
        write(*given)

    def look(epoch: kd.callbacks.Epoch) -> None:
        seen.append(len(list((tmp_path / "checkpoints").rglob("sha256.txt"))))

    monkeypatch.setattr(Store, "_write", slow)
    kd.distill(net(), None, DATA, checkpoint=tmp_path, callbacks=look, **(HOW | {"epochs": 3}))
    assert seen == [0, 1, 1]


def test_steps_between_checkpoints_need_a_folder() -> None:
    with pytest.raises(ConfigError, match="checkpoint_steps is 5 without a folder: give checkpoint=DIR, too"):
        kd.distill(net(), None, DATA, checkpoint_steps=5, **HOW)
