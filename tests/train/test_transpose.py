"""A loop whose tall kernels lie transposed trains as single steps do, and others are left alone."""

from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kd_jax as kd
from kd_jax.data.batch import epoch_order, take
from kd_jax.optimizers import adam, max_norm
from kd_jax.train import transpose
from kd_jax.train.fit import scan_steps
from kd_jax.train.step import Training, TrainState, init, step

KEY = jax.random.key(7)
RNG = np.random.default_rng(0)
DATA = kd.Batch(jnp.asarray(RNG.normal(size=(80, 36)), jnp.float32), jnp.asarray(RNG.integers(0, 3, 80)))
# 36 → 4 is tall, 4 → 40 is wide, 40 → 3 is tall: a wide kernel must not be taken for a transposed one.
NETWORK = kd.mlp([36, 4, 40, 3]).network
ALONE = kd.CrossEntropy()


@dataclass(frozen=True)
class Regressed(kd.Method):
    """A method with a tall kernel of its own, which maps the 40 units of the second layer to three numbers."""

    needs_teacher: ClassVar[bool] = False

    @property
    def student_features(self) -> tuple[str, ...]:
        return ("hidden.1",)

    def init(self, key: Any, student: Any, teacher: Any) -> kd.Parts:
        return kd.Parts(0.1 * jax.random.normal(key, (40, 3)))

    def loss(self, parts: Any, student: Any, teacher: Any, batch: Any, step: Any) -> Any:
        return {"distance": jnp.sum((student.features["hidden.1"] @ parts.learned - 1) ** 2, axis=-1)}


def bounded_sgd() -> optax.GradientTransformation:
    return optax.chain(optax.sgd(1e-2), max_norm(1e-3))


ELEMENTWISE = {
    "sgd": optax.sgd(1e-2),
    "momentum": optax.sgd(1e-2, momentum=0.9, nesterov=True),
    "adam": optax.adam(1e-2),
    "own adam": adam(1e-2),
    "adamw": optax.adamw(optax.schedules.cosine_decay_schedule(1e-2, 20), weight_decay=1e-2),
    "rmsprop": optax.rmsprop(1e-2),
}
OTHERS = {
    "max_norm": bounded_sgd(),
    "clipped by norm": optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(1e-2)),
    "adafactor": optax.adafactor(1e-2),
    "lamb": optax.lamb(1e-2),
}


def order() -> jax.Array:
    return epoch_order(KEY, 0, examples=80, batch_size=8)


def carried(training: Training, method: kd.Method = ALONE) -> set[tuple[int, ...]]:
    """Shapes of what the loop of the steps carries."""
    state = init(KEY, training, method, take(DATA, jnp.arange(8)))
    traced = jax.make_jaxpr(lambda s: scan_steps(s, KEY, DATA, None, order(), method, training=training))(state)
    (scan,) = (equation for equation in traced.eqns if equation.primitive.name == "scan")
    return {atom.aval.shape for atom in scan.invars}


def both(training: Training, method: kd.Method, data: kd.Batch = DATA) -> tuple[TrainState, TrainState]:
    """After an epoch as one loop, and step by step."""
    first = init(KEY, training, method, take(data, jnp.arange(8)))
    if data.inputs.dtype == jnp.float64:
        wide = lambda leaf: leaf.astype(jnp.float64) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf  # noqa: E731
        first = jax.tree.map(wide, first)
    loop = jax.jit(lambda s: scan_steps(s, KEY, data, None, order(), method, training=training)[0])
    one = jax.jit(lambda s, batch: step(s, batch, None, KEY, method, training=training)[0])
    single = first
    for rows in order():
        single = one(single, take(data, rows))
    return loop(first), single


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_elementwise_optimizers_are_known(name: str, standard_promotion: None) -> None:
    assert transpose.elementwise(ELEMENTWISE[name])
    assert {(4, 36), (4, 40), (3, 40)} <= carried(Training(NETWORK, ELEMENTWISE[name]))


@pytest.mark.parametrize("name", OTHERS)
def test_an_optimizer_that_looks_at_whole_units_is_not_transposed(name: str, standard_promotion: None) -> None:
    assert not transpose.elementwise(OTHERS[name])
    shapes = carried(Training(NETWORK, OTHERS[name]))
    assert (36, 4) in shapes
    assert (4, 36) not in shapes


@pytest.mark.parametrize(("name", "method"), [("adamw", ALONE), ("momentum", ALONE), ("own adam", Regressed())])
def test_a_transposed_loop_trains_as_single_steps_do(name: str, method: kd.Method, standard_promotion: None) -> None:
    training = Training(NETWORK, ELEMENTWISE[name])
    state, expected = both(training, method)
    assert jax.tree.map(jnp.shape, state) == jax.tree.map(jnp.shape, expected)
    for found, wanted in zip(jax.tree.leaves(state), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=2e-4, atol=2e-5)


def test_a_method_s_own_kernels_stay_as_they_are() -> None:
    assert (40, 3) in carried(Training(NETWORK, adam(1e-2)), Regressed())


def test_in_float64_they_agree_to_rounding() -> None:
    with jax.enable_x64(True):
        data = DATA._replace(inputs=DATA.inputs.astype(jnp.float64))
        for found, wanted in zip(*map(jax.tree.leaves, both(Training(NETWORK, adam(1e-2)), ALONE, data)), strict=True):
            np.testing.assert_allclose(found, wanted, rtol=1e-9, atol=1e-11)


def test_a_norm_is_kept_of_whole_units() -> None:
    state, _ = both(Training(NETWORK, bounded_sgd()), ALONE)
    kernel = np.asarray(NETWORK.split(state.variables)[0]["hidden"][0]["kernel"])
    assert (np.sum(kernel**2, axis=0) <= 1e-3 * (1 + 1e-5)).all()


def test_what_is_transposed_twice_is_what_it_was() -> None:
    variables = NETWORK.init(KEY)
    which = transpose.tall(NETWORK.split(variables)[0])
    assert list(which) == [False, True, False, False, False, True]
    other = transpose.Transposed(NETWORK, which)
    turned = other.transpose(variables)
    assert turned[0]["hidden"][0]["kernel"].shape == (4, 36)
    assert turned[0]["hidden"][1]["kernel"].shape == (4, 40)
    jax.tree.map(np.testing.assert_array_equal, other.back(turned), variables)
    x = DATA.inputs[:3]
    np.testing.assert_array_equal(other.apply(turned, x)[0].logits, NETWORK.apply(variables, x)[0].logits)


def many_rows(params: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.shape[0] > 20, params)


def test_a_mask_by_the_number_of_rows_is_obeyed(standard_promotion: None) -> None:
    """Such an optimiser is elementwise, and not blind to a transposed kernel."""
    optimizer = optax.adamw(1e-2, weight_decay=1.0, mask=many_rows)
    assert transpose.elementwise(optimizer)
    training = Training(NETWORK, optimizer)
    assert (4, 36) not in carried(training)
    state, expected = both(training, ALONE)
    for found, wanted in zip(jax.tree.leaves(state), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=2e-4, atol=2e-5)
