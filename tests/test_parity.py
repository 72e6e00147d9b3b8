"""kd_jax and the notebook's PyTorch, step by step: same initial parameters, batches and dropout masks.

After every step the loss, the gradient, Adam's state and every parameter are compared, tensor by tensor, by
max |a - b| / max |b|, with b PyTorch's. Not element by element: an element that is small because its terms cancel carries the
rounding of those terms, so its own relative error has no bound in any arithmetic.
"""

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
from kd_jax import CROSS_ENTROPY, KD, KD_AS_WRITTEN, KD_WITHOUT_T_SQUARED, Examples, Hyperparameters, KDWeights, Network
from kd_jax import Output, Recipe, train

torch = pytest.importorskip("torch", reason="PyTorch is not installed: pip install 'kd-jax[parity]'")

from benchmarks import torch_reference as reference  # noqa: E402

STEPS = 500
TOLERANCE = 1e-9

TEACHER_SIZES, STUDENT_SIZES = (784, 1200, 1200, 10), (784, 20, 20, 10)
LEARNING_RATE = 3e-4
NOTEBOOK_WEIGHTS = KDWeights(0.5, 20.0)
TORCH_LAYERS = ("fc1", "fc2", "fc3")

# Method of kd_jax -> soft loss of the reference.
DISTILLED = {
    "kd": (KD, reference.kl_with_t_squared),
    "kd-without-t2": (KD_WITHOUT_T_SQUARED, reference.kl_without_t_squared),
    "kd-as-written": (KD_AS_WRITTEN, reference.as_written),
}


class Deviation(NamedTuple):
    """max |a - b| / max |b| of the worst tensor of each kind; 0 where both are 0, infinite where only b is."""

    loss: Any
    gradients: Any
    first_moments: Any
    second_moments: Any
    params: Any


class Pair(NamedTuple):
    """One training in both frameworks. masks: whether kd_jax's dropout masks are carried over to PyTorch."""

    recipe: Recipe
    model: Any
    soft: Any = None
    masks: bool = False


@pytest.fixture(params=[pytest.param(jnp.float64, id="float64")])
def dtype(request) -> Iterator[Any]:
    """The type that everything is computed in; no implicit promotion of types or ranks while it holds."""
    with ExitStack() as stack:
        stack.enter_context(jax.enable_x64(request.param == jnp.float64))
        stack.enter_context(jax.numpy_rank_promotion("raise"))
        yield request.param


@pytest.fixture(scope="module")
def mnist() -> kd_jax.Dataset:
    return kd_jax.load("mnist")


@pytest.fixture(scope="module")
def examples(mnist) -> Examples:
    """As many real images as 500 batches need, each once."""
    count = STEPS * reference.BATCH_SIZE
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
    pair = Pair(_recipe(_with_masks(network, TEACHER_SIZES), CROSS_ENTROPY, dtype), reference.Teacher(), masks=True)
    _agree(_train_both(pair, examples, Hyperparameters(LEARNING_RATE), dtype))


def test_student(dtype, examples):
    pair = Pair(_recipe(kd_jax.mlp(STUDENT_SIZES), CROSS_ENTROPY, dtype), reference.Student())
    _agree(_train_both(pair, examples, Hyperparameters(LEARNING_RATE), dtype))


@pytest.mark.parametrize("name", DISTILLED)
def test_distilled_student(name, dtype, examples, teacher_params):
    method, soft = DISTILLED[name]
    pair = Pair(_recipe(kd_jax.mlp(STUDENT_SIZES), method, dtype), reference.Student(), soft)
    hyperparameters = Hyperparameters(LEARNING_RATE, NOTEBOOK_WEIGHTS)
    _agree(_train_both(pair, examples, hyperparameters, dtype, teacher_params))


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
    """`network`, whose state tells the dropout masks of its last step: the activations where every unit is 1 before it."""
    layers = [{"kernel": jnp.zeros(shape), "bias": jnp.ones(shape[1])} for shape in zip(sizes, sizes[1:], strict=False)]
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
    pair: Pair, examples: Examples, hyperparameters: Hyperparameters, dtype: Any, teacher_params: Any = None
) -> Deviation:
    """Trains in both frameworks at once; every field has one value for each step."""
    key, torch_dtype = jax.random.key(42), torch.float64 if dtype == jnp.float64 else torch.float32
    state = _cast(jax.jit(partial(train.init, recipe=pair.recipe))(key, hyperparameters), dtype)
    model, teacher = pair.model.to(torch_dtype).train(), None
    model.load_state_dict(_torch_weights(state.params))
    optimizer = reference.notebook_adam(model)
    if teacher_params is not None:
        teacher = reference.Teacher().to(torch_dtype).eval()
        teacher.load_state_dict(_torch_weights(_cast(teacher_params, dtype)))
        examples = examples._replace(teacher=_lookup(_cast(teacher_params, dtype), examples.images, dtype))
    order = np.random.default_rng(42).permutation(len(examples.labels)).astype(np.int32).reshape(-1, 32)[:STEPS]
    step = jax.jit(partial(train.train_step, recipe=pair.recipe))
    # The labels have the type that argmax gives, as nothing is promoted implicitly in the tests.
    examples = jax.tree.map(jnp.asarray, examples._replace(labels=examples.labels.astype(jax.dtypes.canonicalize_dtype(int))))
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


def _agree(deviation):
    print({k: (v.max(), v[0], v[9], v[99]) for k, v in deviation._asdict().items()})
    for kind, values in deviation._asdict().items():
        assert values.shape == (STEPS,)
        assert (values <= TOLERANCE).all(), (kind, values.max())
