"""Trainings on a mesh, for tests/train/test_sharding.py: a process of its own, whose CPU counts as 8 devices.

Prints, as JSON, what each function below found, by its name; an exception as its text.
"""

import contextlib
import io
import json
import shutil
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, PartitionSpec
from pages import ROOT, blocks, run
from small import Table

import kd_jax as kd
from kd_jax.errors import ConfigError, DataError

RNG = np.random.default_rng(0)
SGD = optax.sgd(0.05, momentum=0.9)
METHOD = kd.KD(0.3) + kd.SP("first")


def mesh(*sizes: int, names: tuple[str, ...] = ("data", "model")) -> Mesh:
    """Of the first devices, with explicit axes, as JAX makes them."""
    return jax.make_mesh(sizes, names[: len(sizes)], devices=jax.devices()[: int(np.prod(sizes))])


class Net(nnx.Module):
    """In float64, with batch statistics and dropout. named: with metadata that divides its width over `model`."""

    def __init__(self, width: int, rngs: nnx.Rngs, *, named: bool = True, axis: str = "model"):
        def made(initial: Any, *names: str | None) -> Any:
            return nnx.with_partitioning(initial, names) if named else initial

        lecun, zeros, wide = nnx.initializers.lecun_normal(), nnx.initializers.zeros, {"param_dtype": jnp.float64}
        self.first = nnx.Linear(
            6, width, kernel_init=made(lecun, None, axis), bias_init=made(zeros, axis), rngs=rngs, **wide
        )
        self.norm = nnx.BatchNorm(width, rngs=rngs, **wide)
        # Flax has these in float32.
        self.norm.mean, self.norm.var = nnx.BatchStat(jnp.zeros(width)), nnx.BatchStat(jnp.ones(width))
        self.dropout = nnx.Dropout(0.2, rngs=rngs)
        self.head = nnx.Linear(width, 4, kernel_init=made(lecun, axis, None), rngs=rngs, **wide)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.head(nnx.relu(self.dropout(self.norm(self.first(x)))))


class Naming(Net):
    """A module that names an axis of the mesh in its call."""

    def __call__(self, x: jax.Array) -> jax.Array:
        return super().__call__(jax.lax.with_sharding_constraint(x, PartitionSpec("data")))


def noise(key: Any, inputs: jax.Array, train: bool) -> jax.Array:
    return inputs + 0.1 * jax.random.normal(key, inputs.shape) if train else inputs


def rule(path: str, shape: tuple[int, ...]) -> PartitionSpec | None:
    return PartitionSpec(None, "model") if path.endswith("kernel") else None


RULES = kd.Sharding(student=rule, teacher=rule, zero=True)
STUDENT, TEACHER = Net(8, nnx.Rngs(0), named=False), Net(16, nnx.Rngs(1), named=False)
X = RNG.normal(size=(64, 6))
Y = np.asarray(kd.predict(TEACHER, X).argmax(-1), np.int32)
WEIGHTS = np.where(np.arange(64) % 5 == 0, 0.0, RNG.uniform(0.5, 2, 64))
DATA = kd.Batch(X, Y, WEIGHTS)
BATCHES = list(kd.batches(DATA, key=7, batch_size=8, epochs=1))
# The same in all functions, so that a program is compiled once; a loop of one step compiles fastest.
HOW: dict[str, Any] = {"method": METHOD, "optimizer": SGD, "epochs": 2, "prepare": noise}
MEMORY: dict[str, Any] = {**HOW, "batch_size": 8}
COMPARED: dict[str, Any] = {**MEMORY, "seeds": 3, "methods": {"kd": kd.KD(0.3)}}
del COMPARED["method"]


def made(rngs: nnx.Rngs) -> Net:
    """The student of comparisons."""
    return Net(8, rngs, named=False)


def apart(one: Any, other: Any) -> float:
    """The largest difference of two trees."""
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return max(float(np.max(np.abs(np.asarray(a, np.float64) - np.asarray(b, np.float64)))) for a, b in pairs)


def pieces(tree: Any) -> dict[str, list[int]]:
    """The shape of what one device has of each array."""
    leaves = jax.tree.leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): list(leaf.addressable_shards[0].data.shape)
            for path, leaf in leaves}  # fmt: skip


def refusal(function: Callable[[], Any]) -> str:
    try:
        function()
    except (ConfigError, DataError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


def the_same_parameters() -> dict[str, float]:
    """After 200 steps, with dropout, random views, batch statistics, weights, and losses that couple a batch."""
    how = {**MEMORY, "epochs": 25}
    alone = kd.distill(STUDENT, TEACHER, DATA, **how)
    found = {}
    for name, on, sharding in [
        *((str(n), mesh(n), None) for n in (1, 2, 4, 8)), ("4x2", mesh(4, 2), RULES)
    ]:  # fmt: skip
        result = kd.distill(STUDENT, TEACHER, DATA, mesh=on, sharding=sharding, **how)
        assert int(result.state.step) == 200
        # The means of an epoch are in float32.
        assert apart(alone.history["loss"], result.history["loss"]) < 1e-7
        found[name] = apart(alone.state, result.state)
    return {**found, "moved": apart(kd.from_nnx(STUDENT).variables["params"], alone.model.variables["params"])}


def other_sources() -> dict[str, float]:
    """An iterator of batches, and `kd.fit`; with axes that XLA partitions; below a mesh of the user's."""
    alone, on = kd.distill(STUDENT, TEACHER, BATCHES, **HOW), mesh(4, 2)
    more: dict[str, Any] = {**MEMORY, "sharding": RULES}
    of_memory = kd.distill(STUDENT, TEACHER, DATA, mesh=on, **more)
    automatic = Mesh(on.devices, on.axis_names, axis_types=(jax.sharding.AxisType.Auto,) * 2)
    with jax.set_mesh(on):
        below = kd.distill(STUDENT, TEACHER, DATA, mesh=on, **more)
    state, _ = kd.fit(0, DATA, STUDENT, teacher=TEACHER, mesh=on, **more)
    return {
        "iterator": apart(alone.state, kd.distill(STUDENT, TEACHER, BATCHES, mesh=on, sharding=RULES, **HOW).state),
        "fit": apart(of_memory.state, state),
        "automatic axes": apart(of_memory.state, kd.distill(STUDENT, TEACHER, DATA, mesh=automatic, **more).state),
        "below a mesh": apart(of_memory.state, below.state),
    }


def coupled() -> dict[str, float]:
    """A loss that couples a batch sees the whole of it: such methods together, with weights, a batch over 8 devices.

    And batches that are mixed, whose partners lie on other devices.
    """
    methods = {
        "float64": kd.SP("first") + kd.RKD("first") + kd.PKT("first") + kd.DIST() + kd.MLKD(),
        # What they learn and remember is in float32.
        "float32": kd.CC("first", width=4) + kd.SRD("first") + kd.CRD("first", examples=64, width=4, negatives=8),
    }
    data = kd.Batch(X, Y, WEIGHTS, np.arange(64, dtype=np.int32))
    short = {**MEMORY, "epochs": 1, "prepare": None}
    found: dict[str, Any] = {}
    for kind, method in methods.items():
        how = {**short, "method": kd.CrossEntropy() + method}
        alone, divided = (kd.distill(STUDENT, TEACHER, data, mesh=on, **how) for on in (None, mesh(8)))
        found[kind] = apart(alone.model.variables, divided.model.variables)
        found |= {
            name: apart(values, divided.history[name]) for name, values in alone.history.items() if name != "seconds"
        }
    pictures = kd.Batch(X.reshape(64, 3, 2, 1).astype(np.float32), Y)
    how = {**short, "method": kd.KD(), "prepare": kd.augment.chain(kd.augment.mixup(), kd.augment.cutmix(), flat)}
    alone, divided = (kd.distill(STUDENT, TEACHER, pictures, mesh=on, **how) for on in (None, mesh(8)))
    found["mixed"] = apart(alone.state, divided.state)
    return found


def convolutions_and_attention() -> dict[str, dict[str, float]]:
    """A residual network of images and a decoder of padded text after 200 steps, in float64 and float32: how far the
    parameters, as one vector, are from those of one device, by its length.

    The decoder's matrices are divided over `model` on 4 x 2.
    """

    def of_type(make: Callable[[nnx.Rngs], nnx.Module], seed: int, dtype: Any) -> kd.Model:
        """With parameters of the type, and so all that is computed of them."""
        model = kd.from_nnx(make).init(seed)
        return kd.Model(model.network, jax.tree.map(lambda leaf: leaf.astype(dtype), model.variables))

    def trained(pair: Any, data: kd.Batch, method: Any, on: Mesh | None, sharding: Any = None) -> Any:
        how: dict[str, Any] = {"method": method, "optimizer": SGD, "epochs": 50, "batch_size": 16, "key": 1}
        result = kd.distill(*pair, data, mesh=on, sharding=None if on is None else sharding, **how)
        assert int(result.state.step) == 200
        return vector(result.model)

    def vector(model: kd.Model) -> Any:
        return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(model.variables["params"])])

    rng = np.random.default_rng(5)
    length = rng.integers(3, 9, 64)
    text = kd.token_batch(rng.integers(0, 20, (64, 8)).astype(np.int32), segments=1 * (np.arange(8) < length[:, None]))
    pictures = rng.normal(size=(64, 8, 8, 3))
    kinds: dict[str, Any] = {
        "resnet8": (lambda rngs: kd.models.resnet8(num_classes=4, rngs=rngs), kd.KD(0.5) + kd.SP("layer3"), None),
        "decoder": (lambda rngs: kd.models.transformer(20, layers=2, width=16, rngs=rngs), kd.KD(0.5), RULES),
    }
    found: dict[str, dict[str, float]] = {}
    for dtype in ("float64", "float32"):
        for name, (make, method, rules) in kinds.items():
            pair = [of_type(make, seed, dtype) for seed in (3, 4)]
            data = text if name == "decoder" else kd.Batch(pictures.astype(dtype), Y)
            alone = trained(pair, data, method, None)
            assert alone.dtype == dtype
            assert np.linalg.norm(alone - vector(pair[0])) > 1
            found[f"{name}, {dtype}"] = {
                f"{count}": float(np.linalg.norm(trained(pair, data, method, mesh(*sizes), rules) - alone)
                                  / np.linalg.norm(alone))
                for count, sizes in (("1", (1, 1)), ("2", (2, 1)), ("8", (8, 1)), ("4x2", (4, 2)))
                if rules or count != "4x2"
            }  # fmt: skip
    return found


class Maps(nnx.Module):
    """Two maps of 3 x 2 positions, in float32."""

    def __init__(self, width: int, rngs: nnx.Rngs):
        self.one, self.two = nnx.Linear(1, width, rngs=rngs), nnx.Linear(width, width, rngs=rngs)
        self.head = nnx.Linear(width, 4, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.head(nnx.relu(self.two(nnx.relu(self.one(x.reshape(len(x), 3, 2, 1))))).mean((1, 2)))


def coupled_maps() -> dict[str, float]:
    """Likewise of methods that learn with a batch's own mean and variance, or compare its examples' maps.

    Not `FT` and `ReviewKD`, whose convolutions on a mesh take a minute to compile.
    """
    method = kd.ICKD("two") + kd.AB("two") + kd.OFD("two") + kd.WKDF("two") + kd.SemCKD(("one", "two"))
    data = kd.Batch(X.astype(np.float32), Y, WEIGHTS.astype(np.float32))
    how = {**MEMORY, "epochs": 1, "prepare": None, "method": kd.CrossEntropy() + method}
    pair = Maps(3, nnx.Rngs(0)), Maps(5, nnx.Rngs(1))
    alone, divided = (kd.distill(*pair, data, mesh=on, **how) for on in (None, mesh(8)))
    found = {"parameters": apart(alone.model.variables, divided.model.variables)}
    return found | {
        name: apart(values, divided.history[name]) / max(1.0, float(np.max(np.abs(values))))
        for name, values in alone.history.items() if name != "seconds"
    }  # fmt: skip


def flat(key: Any, inputs: jax.Array, train: bool) -> jax.Array:
    return inputs.reshape(len(inputs), 6)


def divided() -> dict[str, Any]:
    """What one device has of a batch inside of the compiled step: of data in memory, and of an iterator."""
    found: dict[str, Any] = {}
    for name, data in {"memory": DATA, "iterator": BATCHES}.items():
        seen: list[Any] = []

        def look(key: Any, inputs: jax.Array, train: bool, seen: list[Any] = seen) -> jax.Array:
            if train:
                jax.debug.inspect_array_sharding(inputs, callback=seen.append)
            return inputs

        how = {**(MEMORY if data is DATA else HOW), "epochs": 1, "prepare": look}
        kd.distill(STUDENT, TEACHER, data, mesh=mesh(4, 2), **how)
        found[name] = sorted({str(one.shard_shape((8, 6))) for one in seen})
    return found


def where_it_lies() -> dict[str, Any]:
    """Student and teacher by their own metadata, the optimiser's state as the student's and over `data`."""
    on = mesh(2, 4)
    seen: dict[str, Any] = {}
    with jax.set_mesh(on):
        teacher = Net(16, nnx.Rngs(1))
    seen["teacher"] = pieces(nnx.to_pure_dict(nnx.state(teacher, nnx.Param)))
    how = {**MEMORY, "mesh": on, "epochs": 1}
    zero = kd.Sharding(zero=True)
    result = kd.distill(lambda rngs: Net(8, rngs), teacher, DATA, sharding=zero, validation=DATA, **how)
    seen["student"] = pieces(result.model.variables["params"])
    seen["module"] = [type(result.student).__name__, pieces(nnx.to_pure_dict(nnx.state(result.student, nnx.Param)))]
    seen["optimizer"] = pieces(result.state.optimizer_state[0].trace)
    result = kd.distill(STUDENT, TEACHER, DATA, mesh=mesh(4, 2), sharding=RULES, **{**MEMORY, "epochs": 1})
    seen["by a rule"] = pieces(result.model.variables["params"])
    seen["accuracy"] = kd.evaluate(result.student, DATA)["accuracy"]
    return seen


def models_of_another_library() -> dict[str, float]:
    """A teacher that is called back, asked once, in every step, and for a validation; in one batch, and in several."""
    weights = (0.1 * np.random.default_rng(1).normal(size=(6, 4))).astype(np.float32)

    def calling(x: jax.Array) -> jax.Array:
        shape = jax.ShapeDtypeStruct((len(x), 4), np.float32)
        return jax.pure_callback(lambda x: np.asarray(x, np.float32) @ weights, shape, x)

    many = kd.Batch(np.tile(X, (20, 1)), np.tile(Y, 20))
    teachers = {"model": kd.Model(Table(weights).network, {}), "function": calling}
    short = {**HOW, "method": kd.KD(0.3), "prepare": None}
    kinds: dict[str, Any] = {
        "kept": (many, {"batch_size": 640}), "live": (many, {"batch_size": 640, "prepare": noise}),
        "validation": (DATA, {"batch_size": 8, "validation": many, "epochs": 1}), "iterator": (BATCHES, {}),
    }  # fmt: skip
    found = {}
    for name, (data, more) in kinds.items():
        # Both teachers say the same, so that one training without a mesh serves both.
        alone = kd.distill(STUDENT, calling, data, **(short | more))
        for kind, teacher in teachers.items():
            on_it = kd.distill(STUDENT, teacher, data, mesh=mesh(2), **(short | more))
            found[f"{name}, {kind}"] = apart(alone.state, on_it.state)
            measures = (name for name in alone.history if name != "seconds")
            found[f"{name}, {kind}"] += max(apart(alone.history[one], on_it.history[one]) for one in measures)
    return found


def a_module_that_names_axes() -> float:
    with tempfile.TemporaryDirectory() as folder:
        how = {**MEMORY, "mesh": mesh(8), "checkpoint": folder}
        found = kd.distill(Naming(8, nnx.Rngs(0), named=False), TEACHER, DATA, **how)
    return apart(found.state, kd.distill(STUDENT, TEACHER, DATA, **MEMORY).state)


def goes_on() -> dict[str, float]:
    """A training that broke off after an epoch goes on, on the same mesh, on another, and on none."""

    class Stop(Exception):  # noqa: N818
        pass

    def stop(epoch: Any) -> None:
        if epoch.number == 2:
            raise Stop

    first: dict[str, Any] = {"mesh": mesh(4, 2), "sharding": RULES}
    how = {**MEMORY, "epochs": 3}
    whole, found = kd.distill(STUDENT, TEACHER, DATA, **first, **how), {}
    with tempfile.TemporaryDirectory() as folder:
        with contextlib.suppress(Stop):
            kd.distill(STUDENT, TEACHER, DATA, checkpoint=folder, callbacks=stop, **first, **how)
        for name, more in (("same", first), ("other", {"mesh": mesh(8)}), ("none", {})):
            begun = shutil.copytree(folder, Path(folder) / name, ignore=shutil.ignore_patterns("same", "other"))
            result = kd.distill(STUDENT, TEACHER, DATA, checkpoint=begun, resume=True, **more, **how)
            found[name] = apart(whole.state, result.state)
    return found


def seeds() -> dict[str, Any]:
    """Losses of three seeds on 1 and 2 devices, one among 8, a comparison that goes on, and one that has all."""
    data = kd.Batch(X, Y)

    def bits(**more: Any) -> Any:
        table = kd.compare(made, TEACHER, data, data, **(COMPARED | more))
        return [table.values["kd"]["nll"].tolist(), table.history["kd"]["loss"].tolist()]

    found: dict[str, Any] = {"1": bits(mesh=mesh(1, names=("seed",)))}
    with tempfile.TemporaryDirectory() as folder:
        found["2"] = bits(mesh=mesh(2, names=("seed",)), folder=folder)
        found["read"] = bits(mesh=mesh(8, names=("seed",)), folder=folder, resume=True)
    found["8"] = bits(mesh=mesh(8, names=("seed",)), seeds=[1])
    found["data"] = bits(mesh=mesh(4), seeds=[1])
    # A teacher whose arrays were put on a device of the mesh, and on one outside of it.
    for name, device in (("inside", 1), ("outside", 5)):
        table = kd.compare(
            made, on(TEACHER, device), data, data, mesh=mesh(2, names=("seed",)), **(COMPARED | {"seeds": [1]})
        )
        found[name] = [table.values["kd"]["nll"].tolist(), table.history["kd"]["loss"].tolist()]
    return found


def on(module: Net, device: int) -> Net:
    """A copy that was put on a device."""
    graph, state = nnx.split(module)
    return nnx.merge(graph, jax.device_put(state, jax.devices()[device]))


def moves() -> float:
    """A student of one mesh is trained on by another, as it would be from its values alone."""
    first = kd.distill(STUDENT, TEACHER, DATA, mesh=mesh(2), **MEMORY).student
    other = kd.distill(on(first, 7), TEACHER, DATA, mesh=mesh(4), **MEMORY)
    same = kd.distill(first, TEACHER, DATA, mesh=mesh(4), **MEMORY)
    return apart(nnx.state(other.student, nnx.Param), nnx.state(same.student, nnx.Param))


def one_program() -> dict[str, float]:
    """`compare` and `distill` on one mesh, in turn; the comparison of `seeds` again, so that it compiles nothing.

    The student that was trained on the mesh teaches, and the mesh may be the one that the user's own code runs below.
    """
    on, data = mesh(4), kd.Batch(X, Y)

    def losses(teacher: Any) -> Any:
        table = kd.compare(made, teacher, data, data, mesh=on, **(COMPARED | {"seeds": [1]}))
        return table.history["kd"]["loss"]

    def distilled(**more: Any) -> Any:
        return kd.distill(STUDENT, TEACHER, DATA, **MEMORY, **more)

    before, alone, first, after = losses(TEACHER), distilled(), distilled(mesh=on), losses(TEACHER)
    with jax.set_mesh(on):
        below = losses(TEACHER)
    return {
        "compare after": apart(before, after), "compare below": apart(before, below),
        "distill": apart(alone.state, first.state), "distill after": apart(first.state, distilled(mesh=on).state),
        "taught": apart(losses(alone.student), losses(first.student)),
    }  # fmt: skip


def refusals() -> list[str]:
    def distilled(data: Any = DATA, student: Any = STUDENT, **more: Any) -> str:
        how = HOW if data is BATCHES else {**MEMORY, **more}
        return refusal(lambda: kd.distill(student, TEACHER, data, **(how | more)))

    both, compared = mesh(4, 2, names=("data", "seed")), {"methods": {"kd": kd.KD()}, "epochs": 1, "optimizer": SGD}

    def embedded(rngs: nnx.Rngs) -> Net:
        return Net(8, rngs, axis="embed")

    return [
        distilled(mesh=mesh(8), batch_size=12),
        distilled([batch._replace(inputs=batch.inputs[:6], labels=batch.labels[:6], weights=batch.weights[:6])
                   for batch in BATCHES], mesh=mesh(4), batch_size=None),
        distilled(mesh=mesh(8), student=embedded),
        distilled(mesh=mesh(8), sharding=kd.Sharding(teacher=lambda path, shape: PartitionSpec(*[None] * 9))),
        distilled(mesh=mesh(8), sharding=kd.Sharding(student=lambda path, shape: PartitionSpec("data"))),
        distilled(mesh=both),
        refusal(lambda: kd.compare(embedded, TEACHER, DATA, DATA, batch_size=8, mesh=both, **compared)),
        refusal(lambda: kd.compare(embedded, TEACHER, DATA, DATA, batch_size=6, mesh=mesh(4), **compared)),
    ]  # fmt: skip


def the_page() -> list[str]:
    """What the code of `docs/scale.md` prints, and what stands below it."""
    page, said = ROOT / "docs" / "scale.md", []
    images = RNG.normal(size=(256, 784)).astype(np.float32)
    data = kd.Batch(images, RNG.integers(0, 10, 256).astype(np.int32))
    names: dict[str, Any] = {"train": data, "test": data, "student": kd.mlp([784, 8, 10])}
    names["teacher"] = kd.mlp([784, 16, 10]).init(1)
    for block in blocks(page):
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            run(page, block, names)
        said += [printed.getvalue(), block.output or ""]
    return said


FUNCTIONS = (
    the_same_parameters, other_sources, coupled, coupled_maps, divided, where_it_lies, a_module_that_names_axes,
    goes_on, moves, one_program, seeds, convolutions_and_attention, models_of_another_library, refusals, the_page,
)  # fmt: skip


def main(asked: list[str]) -> None:
    """All of them, those whose names are asked for, or after `but` all others."""
    found: dict[str, Any] = {}
    are_left_out = asked[:1] == ["but"]
    names = asked[1:] if are_left_out else asked
    assert {function.__name__ for function in FUNCTIONS} >= set(names), names
    for function in FUNCTIONS:
        if not names or (function.__name__ in names) != are_left_out:
            try:
                found[function.__name__] = function()
            except Exception:
                found[function.__name__] = traceback.format_exc()
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    assert jax.device_count() == 8
    main(sys.argv[1:])
