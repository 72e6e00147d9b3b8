from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kd_jax as kd
from kd_jax.errors import MethodError
from kd_jax.methods.base import LossFunction, Sum, as_method, as_parts, terms_of, weighted

LOGITS = jnp.array([[1.0, 2.0, 4.0], [0.0, 1.0, -1.0]])
STUDENT, TEACHER = kd.Output(LOGITS), kd.Output(LOGITS[::-1])
BATCH = kd.Batch(None, jnp.array([1, 0]))
STEP = jnp.int32(0)


@dataclass(frozen=True)
class Counting(kd.Method):
    """Learns a number and carries how often it was asked."""

    scale: float = 1.0
    paths: tuple[str, ...] = ()
    needs_teacher: ClassVar[bool] = False

    @property
    def student_features(self) -> tuple[str, ...]:
        return self.paths

    def init(self, key: Any, student: Any, teacher: Any) -> kd.Parts:
        return kd.Parts(jax.random.uniform(key, (), jnp.float32), jnp.int32(0))

    def loss(self, parts: Any, student: Any, teacher: Any, batch: Any, step: Any) -> Any:
        return {"count": self.scale * parts.learned * jnp.ones(2)}, parts.carried + 1


def terms(method: kd.Method, parts: kd.Parts | None = None) -> tuple[dict[str, jax.Array], Any]:
    own = method.init(jax.random.key(0), STUDENT, TEACHER) if parts is None else parts
    return terms_of(method, own, STUDENT, TEACHER, BATCH, STEP)


def test_numbers_are_leaves_and_names_are_static() -> None:
    method = Counting(2.0, ("a",))
    assert jax.tree.leaves(method) == [2.0]
    again = jax.tree.map(lambda x: 3 * x, method)
    assert again == Counting(6.0, ("a",))
    assert jax.tree.structure(method) == jax.tree.structure(Counting(5.0, ("a",)))
    assert jax.tree.structure(method) != jax.tree.structure(Counting(2.0, ("b",)))
    assert [str(path[0]) for path, _ in jax.tree.leaves_with_path(kd.KD())] == [".alpha", ".temperature"]


def test_sums_take_functions_and_refuse_the_rest() -> None:
    own = lambda student, teacher: student[:, 0]  # noqa: E731
    assert kd.KD() + own == Sum((kd.KD(), LossFunction(own)))
    assert own + kd.KD() == Sum((LossFunction(own), kd.KD()))
    assert sum([kd.KD(), kd.CrossEntropy()]) == kd.KD() + kd.CrossEntropy()
    for mistake in (lambda: kd.KD() + 3, lambda: 3 + kd.KD(), lambda: kd.KD() + "x"):
        with pytest.raises(MethodError, match=r"method is .*: give a kd\.Method"):
            mistake()


def test_a_grid_is_a_vmap_that_compiles_once() -> None:
    traces = []

    @jax.jit
    @jax.vmap
    def losses(method: kd.Method) -> jax.Array:
        traces.append(1)
        return jnp.mean(terms(method, kd.Parts())[0]["soft"])

    for temperatures in ([1.0, 4.0, 20.0], [2.0, 3.0, 5.0]):
        grid = kd.KD(jnp.full(3, 0.5), jnp.array(temperatures))
        found = losses(grid)
        for i, temperature in enumerate(temperatures):
            alone = jnp.mean(terms(kd.KD(0.5, temperature), kd.Parts())[0]["soft"])
            np.testing.assert_allclose(found[i], alone, rtol=1e-6)
    assert len(traces) == 1


def test_methods_add_up_and_are_scaled() -> None:
    method = kd.KD(alpha=0.5) + 100 * Counting(2.0, ("a",)) + kd.CrossEntropy() * 0.5
    assert isinstance(method, Sum)
    assert len(method.methods) == 3
    assert method.student_features == ("a",)
    assert method.needs_teacher
    assert method.needs_labels
    found, carried = terms(method)
    assert list(found) == ["hard", "soft", "count", "hard_2"]
    alone = terms(kd.CrossEntropy(), kd.Parts())[0]["hard"]
    np.testing.assert_allclose(found["hard_2"], 0.5 * alone, rtol=1e-6)
    np.testing.assert_allclose(found["hard"], 0.5 * alone, rtol=1e-6)
    assert carried == ((), 1, ())


def test_parts_of_a_sum_have_keys_of_their_own() -> None:
    learned = (Counting() + Counting()).init(jax.random.key(0), STUDENT, TEACHER).learned
    assert learned[0] != learned[1]


@pytest.mark.parametrize("two", [np.float32(2), np.array(2.0, np.float32), jnp.float32(2), 2])
def test_any_number_scales(two: Any) -> None:
    for method in (two * kd.CrossEntropy(), kd.CrossEntropy() * two):
        assert isinstance(method, kd.Method)
        wanted = 2 * terms(kd.CrossEntropy(), kd.Parts())[0]["hard"]
        np.testing.assert_allclose(terms(method, kd.Parts())[0]["hard"], wanted, rtol=1e-6)


def test_a_term_of_weight_0_is_not_computed() -> None:
    nothing = jnp.array([jnp.nan, jnp.inf, 1.0])
    value, gradient = jax.value_and_grad(lambda x: jnp.sum(weighted(0.0, x)))(nothing)
    assert value == 0
    np.testing.assert_array_equal(gradient, [0, 0, 0])
    assert jnp.isnan(weighted(1e-30, nothing)[0])


@pytest.mark.parametrize("traced", [False, True])
def test_a_method_of_weight_0_has_no_gradient_where_its_own_is_not_finite(traced: bool) -> None:
    def gradient(factor: Any) -> jax.Array:
        def loss(logits: jax.Array) -> jax.Array:
            method = factor * LossFunction(lambda student, teacher: jnp.sqrt(jnp.sum((student - LOGITS) ** 2, axis=-1)))
            (values,) = terms_of(method, kd.Parts(), kd.Output(logits), None, BATCH, STEP)[0].values()
            return jnp.sum(values)

        return jax.grad(loss)(LOGITS)

    computed = jax.jit(gradient) if traced else gradient
    np.testing.assert_array_equal(computed(0.0), 0)
    assert np.all(np.isnan(computed(1.0)))


def test_a_function_with_numbers_of_its_own_gets_no_labels_for_them() -> None:
    scaled = as_method(lambda s, t, scale=2.0: scale * jnp.sum(s, axis=-1))
    assert not scaled.needs_labels
    np.testing.assert_allclose(terms(scaled)[0]["loss"], 2 * LOGITS.sum(-1))
    assert as_method(lambda s, t, labels=None: s[:, 0]).needs_labels
    of_labels = as_method(lambda s, t, y, scale=2.0: scale * y.astype(jnp.float32))
    np.testing.assert_allclose(terms(of_labels)[0]["loss"], [2, 0])


def test_functions_are_methods() -> None:
    three = as_method(lambda s, t, y: jnp.sum(s * t, axis=-1) * y.astype(jnp.float32))
    two = as_method(lambda s, t: {"a": s[:, 0], "b": t[:, 0]})
    assert isinstance(three, LossFunction)
    assert three.needs_labels
    assert not two.needs_labels
    np.testing.assert_allclose(terms(three)[0]["loss"], [np.sum(LOGITS[0] * LOGITS[1]), 0], rtol=1e-6)
    assert list(terms(two)[0]) == ["a", "b"]
    assert as_method(kd.KD) == kd.KD()
    # The name of the whole loss stays that of the whole.
    assert list(terms(three + kd.CrossEntropy())[0]) == ["loss_2", "hard"]


@pytest.mark.parametrize("wrong", [3, "kd", None, lambda s: s, lambda a, b, c, d: a, max])
def test_what_is_no_method_is_refused(wrong: Any) -> None:
    with pytest.raises(MethodError, match=r"method is .*: give a kd\.Method"):
        as_method(wrong)


@pytest.mark.parametrize(
    ("result", "says"),
    [
        (jnp.array([1, 2]), "of type int32: it must be a float array"),
        (2.0, "of type float: it must"),
        ({}, "has no terms"),
        ({"a": [1.0]}, "of type list"),
    ],
)
def test_other_results_of_a_loss_are_refused(result: Any, says: str) -> None:
    class Odd(kd.Method):
        def loss(self, parts: Any, student: Any, teacher: Any, batch: Any, step: Any) -> Any:
            return result

    with pytest.raises(MethodError, match=says):
        terms(Odd())


def test_other_parts_are_refused() -> None:
    assert as_parts(None, kd.KD()) == kd.Parts()
    assert as_parts((1, 2), kd.KD()) == kd.Parts(1, 2)
    with pytest.raises(MethodError, match=r"KD.init gave a dict: it must return kd.Parts\(learned, carried\)"):
        as_parts({"kernel": 1}, kd.KD())
