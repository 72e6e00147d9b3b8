import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kd_jax.data.dataset import Dataset
from kd_jax.methods import logits as methods
from kd_jax.models.network import Output, from_function, mlp
from kd_jax.train import step as train
from kd_jax.train.step import Examples, Hyperparameters, Recipe

KEY = jax.random.key(7)
WEIGHTS = methods.KDWeights(jnp.float32(0.5), jnp.float32(3.0))


@pytest.fixture
def examples(small_dataset: Dataset) -> Examples:
    return Examples(jnp.asarray(small_dataset.train_images), jnp.asarray(small_dataset.train_labels))


@pytest.fixture
def taught(examples: Examples) -> Examples:
    """Each image's teacher logits tell its own number, so that one that is looked up wrongly is seen."""
    numbers = jnp.arange(240, dtype=jnp.float32)
    return examples._replace(teacher=Output(jnp.stack([numbers, -numbers, 0 * numbers], axis=1) / 100))


def hyperparameters(rate: float = 1e-2, weights: object = ()) -> Hyperparameters:
    return Hyperparameters(jnp.float32(rate), weights)


def test_a_student_learns(examples: Examples) -> None:
    _, metrics = train.fit(KEY, examples, hyperparameters(), recipe=Recipe(mlp([36, 16, 3]), batch_size=8), epochs=6)
    assert metrics.loss.shape == (6,)
    assert metrics.accuracy[-1] > 0.95
    assert metrics.loss[-1] < metrics.loss[0] / 2


def test_every_epoch_shows_every_image_once_in_another_order() -> None:
    orders = [train.epoch_order(KEY, epoch, examples=50, batch_size=7) for epoch in range(3)]
    for order in orders:
        assert order.shape == (7, 7)
        assert len(np.unique(order)) == 49
    assert (orders[0] != orders[1]).any()
    whole = train.epoch_order(KEY, 0, examples=48, batch_size=8)
    np.testing.assert_array_equal(np.sort(whole.ravel()), np.arange(48))


def test_a_batch_larger_than_the_data_is_refused() -> None:
    with pytest.raises(ValueError, match="batch_size is 51: it must be at most the 50 examples"):
        train.epoch_order(KEY, 0, examples=50, batch_size=51)


def test_steps_see_the_teachers_logits_of_their_own_images(taught: Examples) -> None:
    """Every image carries its number in its pixels, and its teacher's logits the same number."""
    numbers = jnp.arange(240)
    images = jnp.zeros((240, 6, 6, 1), jnp.uint8).at[:, 0, 0, 0].set(numbers.astype(jnp.uint8))
    marked = taught._replace(images=images)
    network = from_function(
        lambda key: jnp.zeros(()),
        lambda params, x: jnp.stack([x[:, 0, 0, 0] * 255, params * x[:, 0, 0, 0], 0 * x[:, 0, 0, 0]], axis=1),
    )

    def mismatch(weights: object, learned: object, student: Output, teacher: Output, labels: jax.Array) -> jax.Array:
        return jnp.abs(jnp.round(student.logits[:, 0]) - jnp.round(teacher.logits[:, 0] * 100))

    recipe = Recipe(network, methods.Method(lambda key: (), mismatch), optimizer=optax.sgd, batch_size=16)
    _, metrics = jax.vmap(lambda key: train.fit(key, marked, hyperparameters(), recipe=recipe, epochs=2))(
        jax.random.split(KEY, 3)
    )
    np.testing.assert_array_equal(metrics.loss, np.zeros((3, 2)))


def test_one_step_is_one_update_of_the_mean_loss(taught: Examples) -> None:
    """Against the same step, written out with plain SGD."""
    network = mlp([36, 8, 3])
    recipe = Recipe(network, methods.KD, optimizer=optax.sgd, batch_size=8)
    given = hyperparameters(0.1, WEIGHTS)
    state = train.init(KEY, given, recipe=recipe)
    rows = jnp.arange(3, 11)
    found, metrics = train.train_step(state, KEY, taught, rows, given, recipe=recipe)

    def loss(params: object) -> jax.Array:
        pixels = taught.images[rows].astype(jnp.float32) / 255
        z = network.apply(params, state.state, pixels, train=True, key=KEY)[0].logits
        hard = optax.losses.softmax_cross_entropy_with_integer_labels(z, taught.labels[rows])
        t = jax.nn.log_softmax(taught.teacher.logits[rows] / 3)
        soft = jnp.sum(jnp.exp(t) * (t - jax.nn.log_softmax(z / 3)), axis=-1)
        return jnp.mean(0.5 * hard + 0.5 * 9 * soft)

    value, gradient = jax.value_and_grad(loss)(state.params)
    expected = jax.tree.map(lambda p, g: p - 0.1 * g, state.params, gradient)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), found.params, expected)
    assert metrics.loss == pytest.approx(float(value), rel=1e-5)
    assert found.step == 1


def test_alpha_1_trains_as_labels_alone(taught: Examples) -> None:
    weights = WEIGHTS._replace(alpha=jnp.float32(1))
    alone, _ = train.fit(KEY, taught, hyperparameters(), recipe=Recipe(mlp([36, 8, 3])), epochs=2)
    distilled, _ = train.fit(
        KEY, taught, hyperparameters(weights=weights), recipe=Recipe(mlp([36, 8, 3]), methods.KD), epochs=2
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), distilled.params, alone.params)


def test_pairs_start_from_the_same_parameters_whatever_their_method(taught: Examples) -> None:
    alone = train.init(KEY, hyperparameters(), recipe=Recipe(mlp([36, 8, 3])))
    distilled = train.init(KEY, hyperparameters(weights=WEIGHTS), recipe=Recipe(mlp([36, 8, 3]), methods.KD))
    jax.tree.map(np.testing.assert_array_equal, alone.params, distilled.params)


@pytest.mark.parametrize("units", [8, 4])
def test_a_seed_gives_the_same_bits_again_and_inside_a_vmap(taught: Examples, units: int) -> None:
    """Kernels of 36 inputs and 4 units train turned."""
    recipe = Recipe(mlp([36, units, 3], dropout=0.5), methods.KD, batch_size=8)
    fit = jax.jit(lambda key: train.fit(key, taught, hyperparameters(weights=WEIGHTS), recipe=recipe, epochs=2)[0])
    keys = jax.random.split(KEY, 3)
    alone, again = fit(keys[1]), fit(keys[1])
    jax.tree.map(np.testing.assert_array_equal, alone.params, again.params)
    together = jax.vmap(fit)(keys)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[1], b), together.params, alone.params)
    assert any((a[0] != a[1]).any() for a in jax.tree.leaves(together.params))


def test_learned_parts_of_a_method_are_trained(examples: Examples) -> None:
    def loss(weights: object, learned: jax.Array, student: Output, teacher: object, labels: jax.Array) -> jax.Array:
        return (learned - 2) ** 2 + jnp.zeros(len(labels))

    method = methods.Method(lambda key: jnp.zeros(()), loss)
    state, _ = train.fit(KEY, examples, hyperparameters(0.1), recipe=Recipe(mlp([36, 4, 3]), method), epochs=30)
    assert state.learned == pytest.approx(2, abs=0.1)


def test_hyperparameters_are_a_grid_without_another_trace(taught: Examples) -> None:
    recipe, traces = Recipe(mlp([36, 4, 3]), methods.KD), []

    def fit(temperature: jax.Array) -> jax.Array:
        traces.append(1)
        weights = WEIGHTS._replace(temperature=temperature)
        return train.fit(KEY, taught, hyperparameters(weights=weights), recipe=recipe, epochs=1)[1].loss

    grid = jax.jit(jax.vmap(fit))
    losses = grid(jnp.array([1.0, 4.0, 20.0]))
    grid(jnp.array([2.0, 3.0, 5.0]))
    assert len(traces) == 1
    assert len(np.unique(losses)) == 3


def test_a_method_without_its_teacher_says_so(examples: Examples) -> None:
    with pytest.raises(ValueError, match="needs a teacher"):
        train.fit(KEY, examples, hyperparameters(weights=WEIGHTS), recipe=Recipe(mlp([36, 4, 3]), methods.KD), epochs=1)


@pytest.mark.parametrize(("method", "factor"), [(methods.KD, 9.0), (methods.KD_WITHOUT_T_SQUARED, 1.0)])
def test_methods_mix_by_alpha(method: methods.Method, factor: float) -> None:
    student, teacher = Output(jnp.array([[1.0, 2.0, 4.0]])), Output(jnp.array([[3.0, 1.0, 0.0]]))
    p = np.exp(np.array([3, 1, 0]) / 3) / np.exp(np.array([3, 1, 0]) / 3).sum()
    q = np.exp(np.array([1, 2, 4]) / 3) / np.exp(np.array([1, 2, 4]) / 3).sum()
    hard = -np.log(np.exp(2) / np.exp([1, 2, 4]).sum())
    expected = 0.5 * hard + 0.5 * factor * np.sum(p * np.log(p / q))
    found = method.loss(WEIGHTS, (), student, teacher, jnp.array([1]))
    np.testing.assert_allclose(found, [expected], rtol=1e-5)


MISTAKES = {
    "scaled images": ({"images": jnp.zeros((240, 6, 6, 1))}, "type"),
    "too few labels": ({"labels": jnp.zeros(200, jnp.int32)}, "240 images and 200 labels"),
    "another teacher's logits": (
        {"teacher": Output(jnp.zeros((100, 3)))},
        "240 images and the teacher's logits of 100",
    ),
    "bare logits": ({"teacher": jnp.zeros((240, 3))}, "logits as Output"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_examples_that_do_not_fit_together_are_refused(taught: Examples, mistake: str) -> None:
    changed, says = MISTAKES[mistake]
    wrong = Examples(**{**taught._asdict(), **changed})
    recipe = Recipe(mlp([36, 4, 3]), methods.KD, optimizer=optax.sgd)
    # Images of another type are refused by the jaxtyping of `scale` already, which users do not have.
    with pytest.raises((ValueError, TypeError), match=says):
        train.fit(KEY, wrong, hyperparameters(weights=WEIGHTS), recipe=recipe, epochs=1)


def test_a_method_without_its_weights_says_so(taught: Examples) -> None:
    recipe = Recipe(mlp([36, 4, 3]), methods.KD, optimizer=optax.sgd)
    with pytest.raises(ValueError, match="KDWeights"):
        train.fit(KEY, taught, hyperparameters(), recipe=recipe, epochs=1)
