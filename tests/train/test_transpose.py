from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kd_jax.data.dataset import Dataset
from kd_jax.methods import logits as methods
from kd_jax.models.network import Output, mlp
from kd_jax.optimizers import adam, max_norm
from kd_jax.train import step as train
from kd_jax.train import transpose as layout
from kd_jax.train.step import Examples, Hyperparameters, Recipe, TrainState

KEY = jax.random.key(7)
HYPERPARAMETERS = Hyperparameters(jnp.float32(1e-2))


@pytest.fixture
def examples(small_dataset: Dataset) -> Examples:
    return Examples(jnp.asarray(small_dataset.train_images), jnp.asarray(small_dataset.train_labels))


def bounded_sgd(learning_rate: Any) -> optax.GradientTransformation:
    return optax.chain(optax.sgd(learning_rate), max_norm(1e-3))


def regressed() -> methods.Method:
    """A method with a tall kernel of its own, which maps the 40 units of the second layer to three numbers."""

    def loss(weights: Any, learned: Any, student: Output, teacher: Any, labels: Any) -> jax.Array:
        found = student.features[1] @ learned
        return methods.CROSS_ENTROPY.loss(weights, (), student, teacher, labels) + jnp.sum((found - 1) ** 2, axis=-1)

    return methods.Method(lambda key: 0.1 * jax.random.normal(key, (40, 3)), loss)


def recipe(optimizer: Any = adam, method: methods.Method = methods.CROSS_ENTROPY) -> Recipe:
    """36 → 4 is tall, 4 → 40 is wide, 40 → 3 is tall: a wide kernel must not be taken for a turned one."""
    return Recipe(mlp([36, 4, 40, 3]), method, optimizer, batch_size=8)


def carried(examples: Examples, given: Recipe) -> set[tuple[int, ...]]:
    """Shapes of what the loop of the steps carries."""
    state = train.init(KEY, HYPERPARAMETERS, recipe=given)
    order = train.epoch_order(KEY, 0, examples=240, batch_size=8)
    traced = jax.make_jaxpr(lambda s: train.scan_steps(s, KEY, examples, order, HYPERPARAMETERS, recipe=given))(state)
    (scan,) = (equation for equation in traced.eqns if equation.primitive.name == "scan")
    return {atom.aval.shape for atom in scan.invars}


def step_by_step(examples: Examples, given: Recipe) -> TrainState:
    step = jax.jit(lambda state, rows: train.train_step(state, KEY, examples, rows, HYPERPARAMETERS, recipe=given)[0])
    state = train.init(KEY, HYPERPARAMETERS, recipe=given)
    for rows in train.epoch_order(KEY, 0, examples=240, batch_size=8):
        state = step(state, rows)
    return state


@pytest.mark.parametrize(
    ("optimizer", "method"), [*((each, methods.CROSS_ENTROPY) for each in layout.ELEMENTWISE), (adam, regressed())]
)
def test_a_turned_loop_trains_as_single_steps_do(
    examples: Examples, optimizer: Any, method: methods.Method, request: pytest.FixtureRequest
) -> None:
    if optimizer is not adam:
        request.getfixturevalue("standard_promotion")
    given = recipe(optimizer, method)
    if layout.pays(optimizer):
        assert (4, 36) in carried(examples, given)
    state, _ = train.train_epoch(
        train.init(KEY, HYPERPARAMETERS, recipe=given), KEY, examples, 0, HYPERPARAMETERS, recipe=given
    )
    expected = step_by_step(examples, given)
    assert jax.tree.map(jnp.shape, state) == jax.tree.map(jnp.shape, expected)
    for found, wanted in zip(jax.tree.leaves(state), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=2e-4, atol=2e-5)


def test_in_float64_they_agree_to_rounding(examples: Examples) -> None:
    with jax.enable_x64(True):
        given = recipe()._replace(dtype=jnp.float64)
        own = Hyperparameters(jnp.float64(1e-2))
        first = jax.tree.map(
            lambda leaf: leaf.astype(jnp.float64) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf,
            train.init(KEY, own, recipe=given),
        )
        order = train.epoch_order(KEY, 0, examples=240, batch_size=8)
        together, _ = train.scan_steps(first, KEY, examples, order, own, recipe=given)
        step = jax.jit(lambda state, rows: train.train_step(state, KEY, examples, rows, own, recipe=given)[0])
        single = first
        for rows in order:
            single = step(single, rows)
        for found, wanted in zip(jax.tree.leaves(together), jax.tree.leaves(single), strict=True):
            np.testing.assert_allclose(found, wanted, rtol=1e-9, atol=1e-11)


def test_an_optimizer_that_looks_at_whole_units_is_not_turned(examples: Examples) -> None:
    given = recipe(bounded_sgd)
    assert (36, 4) in carried(examples, given)
    assert (4, 36) not in carried(examples, given)
    state, _ = train.train_epoch(
        train.init(KEY, HYPERPARAMETERS, recipe=given), KEY, examples, 0, HYPERPARAMETERS, recipe=given
    )
    kernel = np.asarray(state.params["hidden"][0]["kernel"])
    assert (np.sum(kernel**2, axis=0) <= 1e-3 * (1 + 1e-5)).all()


def test_what_is_turned_twice_is_what_it_was() -> None:
    params = mlp([36, 4, 40, 3]).init(KEY)[0]
    which = layout.tall(params)
    assert jax.tree.leaves(which) == [False, True, False, False, False, True]
    turned = layout.turn(params, which)
    assert turned["hidden"][0]["kernel"].shape == (4, 36)
    assert turned["hidden"][1]["kernel"].shape == (4, 40)
    jax.tree.map(np.testing.assert_array_equal, layout.turn(turned, which), params)
