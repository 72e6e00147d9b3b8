"""kd_jax and the notebook's PyTorch, step by step: same initial parameters, batches and dropout masks.

After every step the loss, the gradient, Adam's state and every parameter are compared, tensor by tensor, by
max |a - b| / max |b|, with b PyTorch's. Not element by element: an element that is small because its terms cancel
carries the rounding of those terms, so its own relative error has no bound in any arithmetic.

In float64 they agree to 1e-9 for 500 steps; measured were 5e-14 for students and 4e-12 for the teacher. In float32
three things add up. Rounding, 1e-7 a step. Adam: its first steps are as long as the learning rate whatever the
gradient, so that an element that is only rounding steps anywhere; and 1 - 0.999^t loses digits in optax's float32,
which makes early steps wrong by 1e-5, all alike. And ReLU, whose gradient jumps: once a unit near 0 is on in one
framework and off in the other, the gradients differ by one example's share. With 40 units that is rare. With 2,400 it
starts after 20 to 40 steps, and each such unit makes others likelier, so the teachers part: a float64 training whose
learning rate is 1e-5 too large parts from its twin in the same way, at the same steps.
"""

import itertools
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kd_jax
from kd_jax import CROSS_ENTROPY, Examples, Hyperparameters, KDWeights, Network, Output, Recipe, methods, train

torch = pytest.importorskip("torch", reason="PyTorch is not installed: pip install 'kd-jax[parity]'")

from benchmarks import torch_reference as reference  # noqa: E402

STEPS = 500
# Before any unit of 2,400 is on in one framework and off in the other.
TEACHER_STEPS_IN_FLOAT32 = 10

TEACHER_SIZES, STUDENT_SIZES = (784, 1200, 1200, 10), (784, 20, 20, 10)
LEARNING_RATE = 3e-4
NOTEBOOK_WEIGHTS = KDWeights(0.5, 20.0)
TORCH_LAYERS = ("fc1", "fc2", "fc3")

# Method of kd_jax -> soft loss of the reference.
DISTILLED = {
    "kd": (methods.KD, reference.kl_with_t_squared),
    "kd-without-t2": (methods.KD_WITHOUT_T_SQUARED, reference.kl_without_t_squared),
    "kd-as-written": (methods.KD_AS_WRITTEN, reference.as_written),
}


class Deviation(NamedTuple):
    """max |a - b| / max |b| of the worst tensor of each kind; 0 where they are the same, infinite where only b is 0."""

    loss: Any
    gradients: Any
    first_moments: Any
    second_moments: Any
    params: Any


class Pair(NamedTuple):
    """One training in both frameworks. masks: whether kd_jax's dropout masks are carried over to PyTorch."""

    recipe: Recipe
    model: Any
    adam: Any = reference.notebook_adam
    soft: Any = None
    masks: bool = False


# Measured in float32: students up to 2e-5, 5e-5, 4e-5, 2e-5 and 4e-4; teacher 6e-7, 3e-5, 2e-5, 1e-5 and 4e-4. The
# bounds leave room for one example's share of a gradient, as another machine may round a unit to the other side of 0.
BOUNDS = {
    jnp.float64: Deviation(1e-9, 1e-9, 1e-9, 1e-9, 1e-9),
    jnp.float32: Deviation(loss=1e-3, gradients=5e-2, first_moments=5e-2, second_moments=5e-2, params=2e-2),
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """PyTorch's threads would wait for cores that XLA's threads hold."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=[pytest.param(dtype, id=dtype.__name__) for dtype in BOUNDS])
def dtype(request: pytest.FixtureRequest) -> Iterator[Any]:
    """The type that everything is computed in; nothing is promoted silently while it holds."""
    with ExitStack() as stack:
        stack.enter_context(jax.enable_x64(request.param == jnp.float64))
        stack.enter_context(jax.numpy_dtype_promotion("strict"))
        stack.enter_context(jax.numpy_rank_promotion("raise"))
        yield request.param


@pytest.fixture(scope="module")
def examples() -> Examples:
    """As many real images as 500 batches need, each once."""
    mnist, count = kd_jax.load("mnist"), STEPS * reference.BATCH_SIZE
    return Examples(mnist.train_images[:count], mnist.train_labels[:count])


@pytest.fixture(scope="module")
def teacher_params(examples) -> Any:
    """Of a teacher that has seen 3,200 images: its answers are neither flat nor certain."""
    recipe, key = _recipe(kd_jax.mlp(TEACHER_SIZES, dropout=0.5)), jax.random.key(7)
    hyperparameters = Hyperparameters(LEARNING_RATE)
    state = train.init(key, hyperparameters, recipe=recipe)
    order = np.arange(3200).reshape(-1, 32)
    steps = jax.jit(partial(train.train_steps, recipe=recipe))
    return jax.tree.map(np.asarray, steps(state, key, examples, order, hyperparameters)[0].params)


def test_teacher(dtype, examples):
    network = kd_jax.mlp(TEACHER_SIZES, dropout=0.5)
    recipe = _recipe(_with_masks(network, TEACHER_SIZES), CROSS_ENTROPY, dtype)
    pair = Pair(recipe, reference.Teacher(), adam=reference.tuned_adam, masks=True)
    steps = STEPS if dtype == jnp.float64 else TEACHER_STEPS_IN_FLOAT32
    _agree(_train_both(pair, examples, Hyperparameters(LEARNING_RATE), dtype, steps=steps), dtype, steps)


def test_student(dtype, examples):
    pair = Pair(_recipe(kd_jax.mlp(STUDENT_SIZES), CROSS_ENTROPY, dtype), reference.Student())
    _agree(_train_both(pair, examples, Hyperparameters(LEARNING_RATE), dtype), dtype)


@pytest.mark.parametrize("name", DISTILLED)
def test_distilled_student(name, dtype, examples, teacher_params):
    method, soft = DISTILLED[name]
    pair = Pair(_recipe(kd_jax.mlp(STUDENT_SIZES), method, dtype), reference.Student(), soft=soft)
    hyperparameters = Hyperparameters(LEARNING_RATE, NOTEBOOK_WEIGHTS)
    _agree(_train_both(pair, examples, hyperparameters, dtype, teacher_params=teacher_params), dtype)


def _agree(deviation: Deviation, dtype: Any, steps: int = STEPS) -> None:
    for kind, values, bound in zip(Deviation._fields, deviation, BOUNDS[dtype], strict=True):
        assert values.shape == (steps,)
        worst = int(np.argmax(np.where(np.isfinite(values), values, np.inf)))
        assert (values <= bound).all(), f"{kind}: {values[worst]:.2e} after step {worst + 1}, more than {bound:.0e}"


class Recorded(NamedTuple):
    gradients: Any
    adam: Any


def _recipe(network: Network, method: Any = CROSS_ENTROPY, dtype: Any = jnp.float32) -> Recipe:
    """With the project's default optimiser, whose state also tells the gradients that `train_step` gave to it."""
    recipe = Recipe(network, method, dtype=dtype)

    def optimizer(learning_rate: Any) -> optax.GradientTransformation:
        default = recipe.optimizer(learning_rate)

        def update(gradients: Any, state: Recorded, params: Any) -> tuple[Any, Recorded]:
            # Types are promoted inside optax, whose step count is an integer; nowhere else.
            with jax.numpy_dtype_promotion("standard"):
                updates, adam = default.update(gradients, state.adam, params)
            return updates, Recorded(gradients, adam)

        return optax.GradientTransformation(lambda params: Recorded(params, default.init(params)), update)

    return recipe._replace(optimizer=optimizer)


def _with_masks(network: Network, sizes: tuple[int, ...]) -> Network:
    """`network`, whose state tells the dropout masks of its last step.

    They are the activations of the same network with the same key, where every unit is 1 before dropout.
    """
    layers = [{"kernel": jnp.zeros(shape), "bias": jnp.ones(shape[1])} for shape in itertools.pairwise(sizes)]
    ones = {"hidden": dict(enumerate(layers[:-1])), "output": layers[-1]}

    def masks(images: Any, key: Any) -> tuple[Any, ...]:
        return tuple(kept > 0 for kept in network.apply(ones, {}, images, train=True, key=key)[0].features)

    def init(key: Any) -> Any:
        images = jnp.zeros((reference.BATCH_SIZE, sizes[0]))
        return network.init(key)[0], masks(images, key)

    def apply(params: Any, state: Any, images: Any, *, train: bool, key: Any) -> tuple[Output, Any]:
        return network.apply(params, {}, images, train=train, key=key)[0], masks(images, key)

    return Network(init, apply)


def _train_both(
    pair: Pair,
    examples: Examples,
    hyperparameters: Hyperparameters,
    dtype: Any,
    *,
    teacher_params: Any = None,
    steps: int = STEPS,
) -> Deviation:
    """Trains in both frameworks at once; every field has one value for each step."""
    key, torch_dtype = jax.random.key(42), torch.float64 if dtype == jnp.float64 else torch.float32
    state = _cast(jax.jit(partial(train.init, recipe=pair.recipe))(key, hyperparameters), dtype)
    model, teacher = pair.model.to(torch_dtype).train(), None
    model.load_state_dict(_torch_weights(state.params))
    optimizer = pair.adam(model)
    if teacher_params is not None:
        teacher = reference.Teacher().to(torch_dtype).eval()
        teacher.load_state_dict(_torch_weights(_cast(teacher_params, dtype)))
        examples = examples._replace(teacher=_lookup(_cast(teacher_params, dtype), examples.images, dtype))
    order = np.random.default_rng(42).permutation(len(examples.labels)).astype(np.int32).reshape(-1, 32)[:steps]
    step = jax.jit(partial(train.train_step, recipe=pair.recipe))
    # The labels have the type that argmax gives, as nothing is promoted implicitly in the tests.
    integers = jax.dtypes.canonicalize_dtype(int)
    examples = jax.tree.map(jnp.asarray, examples._replace(labels=examples.labels.astype(integers)))
    images = torch.tensor(np.asarray(examples.images)).to(torch_dtype) / 255
    labels = torch.tensor(np.asarray(examples.labels)).long()

    deviations = []
    for number, rows in enumerate(order, start=1):
        state, metrics = step(state, key, examples, rows, hyperparameters)
        masks = [torch.tensor(np.asarray(mask)) for mask in state.state] if pair.masks else None
        picked = torch.tensor(rows).long()
        batch = reference.Batch(images[picked], labels[picked])
        if teacher is not None:
            with torch.no_grad():
                batch = batch._replace(teacher_logits=teacher(batch.images))
        loss = reference.train_step(model, optimizer, batch, soft=pair.soft, masks=masks)
        gradients, (adam, *_) = state.optimizer_state
        assert int(state.step) == int(adam.count) == number == int(_moments(model, optimizer, "step")[0])
        trees = (gradients[0], adam.mu[0], adam.nu[0], state.params)
        ours = ([metrics.loss], *map(_in_torch_order, trees))
        moments = [_moments(model, optimizer, name) for name in ("exp_avg", "exp_avg_sq")]
        theirs = ([loss], [parameter.grad for parameter in model.parameters()], *moments, list(model.parameters()))
        deviation = _deviation(ours, jax.tree.map(lambda tensor: tensor.detach().numpy(), theirs))
        # Waited for, as PyTorch's next step changes in place the memory that is read here.
        deviations.append(jax.device_get(deviation))
    return jax.tree.map(lambda *values: np.array(values), *deviations)


@jax.jit
def _deviation(ours: Any, theirs: Any) -> Deviation:
    def relative(a: Any, b: Any) -> Any:
        gap, size = jnp.max(jnp.abs(a - b.T)), jnp.max(jnp.abs(b))
        return jnp.where(gap == 0, 0.0, gap / size)

    return Deviation(*(jnp.max(jnp.stack(list(map(relative, *kind)))) for kind in zip(ours, theirs, strict=True)))


def _in_torch_order(params: Any) -> list[Any]:
    layers = [*params.get("hidden", {}).values(), params["output"]]
    return [array for layer in layers for array in (layer["kernel"], layer["bias"])]


def _torch_weights(params: Any) -> dict[str, Any]:
    names = [f"{layer}.{kind}" for layer in TORCH_LAYERS for kind in ("weight", "bias")]
    arrays = [torch.from_numpy(np.array(array).T) for array in _in_torch_order(params)]
    return dict(zip(names, arrays, strict=True))


def _moments(model: Any, optimizer: Any, name: str) -> list[Any]:
    return [optimizer.state[parameter][name] for parameter in model.parameters()]


def _cast(tree: Any, dtype: Any) -> Any:
    return jax.tree.map(lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree)


def _lookup(params: Any, images: Any, dtype: Any) -> Output:
    """The teacher's logits of every image, in evaluation mode, as kd_jax computes them."""
    network = kd_jax.mlp(TEACHER_SIZES, dropout=0.5)
    scaled = train.scale(jnp.asarray(images), dtype)
    return Output(network.apply(params, {}, scaled, train=False, key=jax.random.key(0))[0].logits)
