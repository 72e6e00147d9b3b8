"""One training in kd_jax and in PyTorch at once: same initial parameters, batches and dropout masks.

Every array is in the order and the shapes of kd_jax: a layer's bias, then its kernel [inputs, outputs].
"""

import itertools
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch

import kd_jax
from benchmarks import torch_reference as reference
from kd_jax import CrossEntropy, Network, Output
from kd_jax.experiments import images as of_images
from kd_jax.experiments.images import Images, Settings, Setup

STEPS = 500
KEY_SEED, ORDER_SEED = 42, 42
LEARNING_RATE = reference.LEARNING_RATE
TEACHER_SIZES, STUDENT_SIZES = (784, 1200, 1200, 10), (784, 20, 20, 10)


class Case(NamedTuple):
    """One of the trainings that are compared. soft: PyTorch's soft loss. adam: its optimiser, eager or fused.

    steps: how many, from the first.
    """

    sizes: tuple[int, ...]
    model: Callable[[], Any]
    method: Any = CrossEntropy()
    soft: Any = None
    dropout: float = 0.0
    adam: Any = reference.notebook_adam
    steps: int = STEPS


class Step(NamedTuple):
    """What a step computed. Each is a list with one array for each tensor; on: which hidden units are above 0."""

    loss: Any
    gradients: Any
    first_moments: Any
    second_moments: Any
    params: Any
    on: Any


class Deviation(NamedTuple):
    """How far a training is from another, of the worst tensor of each kind, by one of two measures.

    Element by element: the smallest atol / max |b| with which |a - b| <= atol + rtol |b| for every element; for rtol 0
    that is max |a - b| / max |b|.

    As vectors: ||a - b|| / ||b||.
    """

    loss: Any
    gradients: Any
    first_moments: Any
    second_moments: Any
    params: Any


class Flips(NamedTuple):
    """Hidden units that are on in one training and off in the other, of the whole batch.

    count: how many. near: the largest |input| of their ReLU, relative to the largest of their layer.
    """

    count: Any
    near: Any


class Float32(NamedTuple):
    """In float32, element by element where not said otherwise: one value for each step.

    one_step: kd_jax from PyTorch after one step from PyTorch's state.
    adam: kd_jax's Adam from PyTorch's, each with its own state, both given PyTorch's gradients.
    free: kd_jax's training from PyTorch's, which restarts from PyTorch's state after each step with a flip. Parameters
        as vectors, as Adam moves one whose gradient is only rounding by any length up to the learning rate.
    one_step_flips, free_flips: where they have units that are on in one framework and off in the other.
    ours, theirs: kd_jax's and PyTorch's training from PyTorch's training in float64, rounded to float32: of the steps
        before the first flip between the three.
    """

    one_step: Deviation
    adam: Deviation
    free: Deviation
    one_step_flips: Flips
    free_flips: Flips
    ours: Deviation
    theirs: Deviation


class Data(NamedTuple):
    """As many real images as the steps need, each once, and the order of their rows.

    ours, theirs: the logits of one trained teacher for each image, by kd_jax and by PyTorch, for each type.
    """

    images: Images
    order: Any
    ours: dict[str, Any]
    theirs: dict[str, Any]


def load() -> Data:
    """The teacher has seen 3,200 images: its answers are neither flat nor certain."""
    mnist, count = kd_jax.load("mnist"), STEPS * reference.BATCH_SIZE
    images = Images(mnist.train_images[:count], mnist.train_labels[:count])
    network, key, settings = (
        kd_jax.mlp(TEACHER_SIZES, dropout=0.5).network,
        jax.random.key(7),
        _settings(CrossEntropy()),
    )
    state = of_images.init(key, settings, setup=Setup(network))
    steps = jax.jit(partial(of_images.scan_steps, setup=Setup(network)))
    state, _ = steps(state, key, jax.tree.map(jnp.asarray, images), np.arange(3200).reshape(-1, 32), settings)
    params = jax.tree.map(np.asarray, network.split(state.variables)[0])
    ours, theirs = {}, {}
    for dtype in ("float32", "float64"):
        with _precision(dtype):
            pixels = of_images.scale(jnp.asarray(images.images), jnp.dtype(dtype))
            output, _ = network.apply(network.merge(_cast(params, dtype), {}), pixels)
            ours[dtype] = np.asarray(output.logits)
        theirs[dtype] = reference.predict(_load(reference.Teacher(), params, dtype), torch.tensor(np.asarray(pixels)))
    order = np.random.default_rng(ORDER_SEED).permutation(count).astype(np.int32).reshape(STEPS, -1)
    return Data(images, order, ours, theirs)


def in_float64(case: Case, data: Data, rtol: float = 1e-9) -> Deviation:
    """Trains in both frameworks and compares kd_jax with PyTorch after every step: one value for each."""
    with _precision("float64"):
        ours = KdJax(case, data, "float64")
        theirs = PyTorch(case, data, "float64", ours.initial.variables[0])
        state, apart = ours.initial, []
        for number, rows in enumerate(data.order[: case.steps], start=1):
            state, step = ours.step(state, rows)
            reached = theirs.step(rows, ours.masks(state))
            assert int(state.step) == int(state.optimizer_state.adam.count) == number == theirs.count()
            apart.append(_deviation(step, reached, partial(_apart, rtol=rtol)))
    return _stack(apart)


def in_float32(case: Case, data: Data) -> Float32:
    """Trains in both frameworks, and in PyTorch in float64 as well, and compares after every step."""
    with _precision("float32"):
        ours = KdJax(case, data, "float32")
        theirs, truth = (PyTorch(case, data, dtype, ours.initial.variables[0]) for dtype in ("float32", "float64"))
        free, adam, parted, apart, from_truth = ours.initial, _Adam(ours.initial.variables[0]), False, [], []
        for number, rows in enumerate(data.order[: case.steps]):
            free, went = ours.step(free, rows)
            # Waited for, as PyTorch's step changes in place the memory that is read here.
            _, one = jax.block_until_ready(ours.step(ours.restart(free, theirs, number), rows))
            masks = ours.masks(free)
            step = theirs.step(rows, masks)
            one_step, by_adam, freely = (_deviation(other, step, _apart) for other in (one, adam.step(step), went))
            freely = freely._replace(params=_deviation(went, step, _distance).params)
            flips = [theirs.flips(other, step) for other in (one, went)]
            apart.append((one_step, by_adam, freely, *flips))
            if not parted:
                exact = truth.step(rows, masks)
                parted = any(truth.flips(other, exact).count for other in (went, step))
            if not parted:
                rounded = Step(*([np.asarray(x, np.float32) for x in kind] for kind in exact[:5]), exact.on)
                from_truth.append(tuple(_deviation(training, rounded, _apart) for training in (went, step)))
            if flips[1].count:
                free = jax.tree.map(np.array, ours.restart(free, theirs, number + 1))
                parted = True
    assert from_truth, "in the first step already units are on in one training and off in another"
    return Float32(*map(_stack, zip(*apart, strict=True)), *map(_stack, zip(*from_truth, strict=True)))


class Recorded(NamedTuple):
    """The state of an optimiser that also tells the gradients that it was given."""

    gradients: Any
    adam: Any


class KdJax:
    """kd_jax's own training step, with its default optimiser; its state also tells gradients, masks and units."""

    def __init__(self, case: Case, data: Data, dtype: str) -> None:
        network = Observed(kd_jax.mlp(case.sizes, dropout=case.dropout).network, case.sizes, case.dropout > 0)
        setup = Setup(network, dtype=jnp.dtype(dtype))
        setup = setup._replace(optimizer=partial(_recording, setup.optimizer))
        self.key, self.settings = jax.random.key(KEY_SEED), _settings(case.method)
        self.initial = _cast(jax.jit(partial(of_images.init, setup=setup))(self.key, self.settings), dtype)
        # The labels have the type that argmax gives, as nothing is promoted implicitly in the tests.
        images = data.images._replace(labels=data.images.labels.astype(jax.dtypes.canonicalize_dtype(int)))
        if case.soft:
            images = images._replace(logits=data.ours[dtype])
        self.images = jax.tree.map(jnp.asarray, images)
        self._step = jax.jit(partial(of_images.train_step, setup=setup))

    def step(self, state: Any, rows: Any) -> tuple[Any, Step]:
        """The next state, and what the step computed."""
        state, metrics = self._step(state, self.key, self.images, rows, self.settings)
        gradients, adam = state.optimizer_state
        params, (_, on) = state.variables
        trees = ([metrics.loss], gradients, adam.mu, adam.nu, params, on)
        return state, Step(*map(jax.tree.leaves, trees))

    def masks(self, state: Any) -> Any:
        """Of the step that led to `state`, for PyTorch; None without dropout."""
        _, (masks, _) = state.variables
        return [torch.tensor(np.asarray(mask)) for mask in masks] or None

    def restart(self, state: Any, theirs: "PyTorch", steps: int) -> Any:
        """`state` with PyTorch's parameters and moments after so many steps. Shares memory with PyTorch."""
        params, observed = state.variables
        structure = jax.tree.structure(params)
        params, mu, nu = (jax.tree.unflatten(structure, part) for part in theirs.state())
        adam = optax.ScaleByAdamState(np.int32(steps), mu, nu)
        recorded = Recorded(state.optimizer_state.gradients, adam)
        return state._replace(variables=(params, observed), optimizer_state=recorded, step=np.int32(steps))


class PyTorch:
    """The reference's training step."""

    def __init__(self, case: Case, data: Data, dtype: str, params: Any) -> None:
        self.soft, self.dtype = case.soft, getattr(torch, dtype)
        self.model = _load(case.model(), params, dtype).train()
        self.teacher_logits = data.theirs[dtype] if case.soft else None
        self.optimizer = case.adam(self.model)
        self.images = torch.from_numpy(np.asarray(data.images.images))
        self.labels = torch.from_numpy(np.asarray(data.images.labels)).long()
        self.inputs: list[Any] = []
        for layer in (self.model.fc1, self.model.fc2):
            layer.register_forward_hook(lambda _, __, output: self.inputs.append(output.detach().numpy()))

    def step(self, rows: Any, masks: Any) -> Step:
        """Changes the model in place, and with it the arrays of earlier steps."""
        picked = torch.from_numpy(rows).long()
        taught = None if self.teacher_logits is None else self.teacher_logits[picked]
        batch = reference.Batch(self.images[picked].to(self.dtype) / 255, self.labels[picked], taught)
        self.inputs.clear()
        loss = reference.train_step(self.model, self.optimizer, batch, soft=self.soft, masks=masks)
        on = [inputs > 0 for inputs in self.inputs]
        if masks is not None:
            on = [above & mask.numpy() for above, mask in zip(on, masks, strict=True)]
        params, *moments = self.state()
        gradients = [parameter.grad.numpy().T for parameter in _parameters(self.model)]
        return Step([loss.numpy()], gradients, *moments, params, on)

    def state(self) -> tuple[Any, Any, Any]:
        """Parameters, first and second moments."""
        parameters = _parameters(self.model)
        states = [self.optimizer.state.get(parameter) for parameter in parameters]
        params = [parameter.detach().numpy().T for parameter in parameters]
        moments = (
            [np.zeros_like(p) if s is None else s[name].numpy().T for p, s in zip(params, states, strict=True)]
            for name in ("exp_avg", "exp_avg_sq")
        )
        return params, *moments

    def count(self) -> int:
        """Steps that Adam has done."""
        return int(self.optimizer.state[self.model.fc1.weight]["step"])

    def flips(self, other: Step, step: Step) -> Flips:
        """Of `step`, which is the last."""
        differ = [np.asarray(a) != b for a, b in zip(other.on, step.on, strict=True)]
        sizes = map(np.abs, self.inputs)
        near = max(float(np.max(z, initial=0.0, where=where) / z.max()) for z, where in zip(sizes, differ, strict=True))
        return Flips(sum(int(where.sum()) for where in differ), near)


class _Adam:
    """kd_jax's default Adam alone, on PyTorch's gradients."""

    def __init__(self, params: Any) -> None:
        self.params = jax.tree.leaves(params)
        optimizer = Setup._field_defaults["optimizer"](LEARNING_RATE)
        self.state = optimizer.init(self.params)

        @jax.jit
        def update(gradients: Any, state: Any, params: Any) -> Any:
            updates, state = optimizer.update(gradients, state, params)
            return optax.apply_updates(params, updates), state

        self._update = update

    def step(self, given: Step) -> Step:
        self.params, self.state = self._update(given.gradients, self.state, self.params)
        return given._replace(first_moments=self.state.mu, second_moments=self.state.nu, params=self.params)


def _precision(dtype: str) -> ExitStack:
    """The type that everything is computed in; nothing is promoted silently while it holds."""
    stack = ExitStack()
    stack.enter_context(jax.enable_x64(dtype == "float64"))
    stack.enter_context(jax.numpy_dtype_promotion("strict"))
    stack.enter_context(jax.numpy_rank_promotion("raise"))
    return stack


def _recording(optimizer: Any, learning_rate: Any) -> optax.GradientTransformation:
    wrapped = optimizer(learning_rate)

    def update(gradients: Any, state: Recorded, params: Any) -> tuple[Any, Recorded]:
        updates, adam = wrapped.update(gradients, state.adam, params)
        return updates, Recorded(gradients, adam)

    return optax.GradientTransformation(lambda params: Recorded(params, wrapped.init(params)), update)


@dataclass(frozen=True)
class Observed(Network):
    """`network`, whose state tells the dropout masks of its last step, and which units were above 0.

    The masks are the activations of the same network with the same key, where every unit is 1 before dropout.
    """

    network: Network
    sizes: tuple[int, ...]
    dropout: bool

    def init(self, key: Any) -> Any:
        """Those of the network, with masks and units of nothing."""
        none = tuple(jnp.zeros((reference.BATCH_SIZE, width), bool) for width in self.sizes[1:-1])
        return self.network.split(self.network.init(key))[0], (none if self.dropout else (), none)

    def apply(
        self, variables: Any, inputs: Any, *, train: bool = False, key: Any = None, features: tuple[str, ...] = ()
    ) -> tuple[Output, Any]:
        """What the network says."""
        assert train
        assert not features
        output, on = self._units(variables[0], inputs, key)
        return output, (self._units(self._ones(), inputs, key)[1] if self.dropout else (), on)

    def split(self, variables: Any) -> tuple[Any, Any]:
        """Both of the pair."""
        return variables

    def merge(self, params: Any, state: Any) -> Any:
        """As a pair."""
        return params, state

    def _units(self, params: Any, inputs: Any, key: Any) -> tuple[Output, tuple[Any, ...]]:
        names = tuple(f"activations.{layer}" for layer in range(len(self.sizes) - 2))
        variables = self.network.merge(params, {})
        output, _ = self.network.apply(variables, inputs, train=True, key=key, features=names)
        return Output(output.logits), tuple(output.features[name] > 0 for name in names)

    def _ones(self) -> Any:
        layers = [{"kernel": jnp.zeros(shape), "bias": jnp.ones(shape[1])} for shape in itertools.pairwise(self.sizes)]
        return {"hidden": dict(enumerate(layers[:-1])), "output": layers[-1]}


def _settings(method: Any) -> Settings:
    return Settings(LEARNING_RATE, method)


def _deviation(ours: Step, theirs: Step, measure: Callable[..., float]) -> Deviation:
    return Deviation(*(float(np.max(list(map(measure, *kind)))) for kind in zip(ours[:5], theirs[:5], strict=True)))


def _apart(a: Any, b: Any, rtol: float = 0.0) -> float:
    """Element by element."""
    gap = size = 0.0
    for theirs, gaps in _gaps(a, b):
        np.abs(gaps, out=gaps)
        if rtol:
            gaps -= rtol * np.abs(theirs)
        # Unlike max, NumPy's keeps what is no number.
        gap = float(np.maximum(gap, gaps.max()))
        size = float(np.maximum(size, np.abs(theirs).max()))
    return 0.0 if gap <= 0 else gap / size


def _distance(a: Any, b: Any) -> float:
    """As vectors."""
    gap = size = 0.0
    for theirs, gaps in _gaps(a, b):
        gap, size = gap + float(np.vdot(gaps, gaps)), size + float(np.vdot(theirs, theirs))
    return (gap / size) ** 0.5 if gap else 0.0


def _gaps(a: Any, b: Any) -> Iterator[tuple[Any, Any]]:
    """`b` and a - b, in parts that a processor's cache holds, several times as fast as whole."""
    a, b = np.atleast_1d(np.asarray(a)), np.atleast_1d(b)
    if a is b:
        return
    for start in range(0, len(a), 64):
        theirs = b[start : start + 64]
        yield theirs, a[start : start + 64] - theirs


def _stack(rows: Any) -> Any:
    return jax.tree.map(lambda *values: np.array(values), *rows)


def _parameters(model: Any) -> list[Any]:
    return [getattr(layer, kind) for layer in (model.fc1, model.fc2, model.fc3) for kind in ("bias", "weight")]


def _load(model: Any, params: Any, dtype: str) -> Any:
    """Kernels keep kd_jax's order in memory, so that they are compared without being transposed."""
    for parameter, leaf in zip(_parameters(model), jax.tree.leaves(params), strict=True):
        assert parameter.shape == leaf.T.shape
        tensor = torch.from_numpy(np.array(leaf)).to(getattr(torch, dtype))
        parameter.data = tensor.T if tensor.ndim == 2 else tensor
    return model


def _cast(tree: Any, dtype: str) -> Any:
    return jax.tree.map(lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree)
