"""Methods of features: each is its loss, of the features at its paths."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kd_jax as kd
from kd_jax import losses
from kd_jax.errors import MethodError, ShapeError
from kd_jax.methods.base import as_parts, terms_of

RNG = np.random.default_rng(6)


def output(*shape: int) -> kd.Output:
    return kd.Output(jnp.zeros((5, 3)), {"here": jnp.asarray(RNG.normal(size=shape), jnp.float32)})


MAPS, OTHER_MAPS = output(5, 4, 4, 6), output(5, 4, 4, 6)
FLAT, OTHER_FLAT = output(5, 7), output(5, 7)
F, G, A, B = (one.features["here"] for one in (MAPS, OTHER_MAPS, FLAT, OTHER_FLAT))
BATCH = kd.Batch(jnp.zeros((5, 1)))

PLAIN: dict[str, tuple[Any, Any, Any, Any]] = {
    "at": (kd.AT("here"), MAPS, OTHER_MAPS, lambda: losses.at(F, G)),
    "nst": (kd.NST("here"), MAPS, OTHER_MAPS, lambda: losses.nst(F, G)),
    "sp": (kd.SP("here"), MAPS, OTHER_MAPS, lambda: losses.sp(F, G)),
    "pkt": (kd.PKT("here"), FLAT, OTHER_FLAT, lambda: losses.pkt(A, B)),
    "cosine": (kd.Cosine("here"), FLAT, OTHER_FLAT, lambda: losses.cosine(A, B)),
}


def terms(
    method: kd.Method, student: kd.Output, teacher: kd.Output | None, learned: Any = (), batch: Any = BATCH
) -> Any:
    return terms_of(method, kd.Parts(learned, ()), student, teacher, batch, jnp.int32(0))[0]


@pytest.mark.parametrize("name", PLAIN)
def test_the_only_term_is_the_loss(name: str) -> None:
    method, student, teacher, expected = PLAIN[name]
    found = terms(method, student, teacher)
    assert set(found) == {name}
    np.testing.assert_allclose(found[name], expected(), rtol=1e-6)
    assert method.student_features == method.teacher_features == ("here",)
    with pytest.raises(MethodError, match="needs a teacher"):
        terms(method, student, None)


def test_a_teachers_feature_may_have_another_path() -> None:
    teacher = kd.Output(jnp.zeros((5, 3)), {"there": G})
    found = terms(kd.AT("here", "there"), MAPS, teacher)
    np.testing.assert_allclose(found["at"], losses.at(F, G))


def test_rkd_has_two_terms_with_their_weights() -> None:
    found = terms(kd.RKD("here", distance=2.0, angle=3.0), FLAT, OTHER_FLAT)
    np.testing.assert_allclose(found["distance"], 2 * losses.rkd_distance(A, B), rtol=1e-6)
    np.testing.assert_allclose(found["angle"], 3 * losses.rkd_angle(A, B), rtol=1e-6)


LEARNED = {
    "fitnet": kd.FitNet("here"),
    "hiddenstates": kd.HiddenStates("here"),
    "srd": kd.SRD("here"),
    "vid": kd.VID("here"),
    "cc": kd.CC("here", width=9),
}


@pytest.mark.parametrize("name", LEARNED)
def test_projectors_are_made_from_the_shapes_and_have_a_gradient(name: str) -> None:
    method, teacher = LEARNED[name], output(5, 11)
    shapes = [jax.eval_shape(lambda one: one, one) for one in (FLAT, teacher)]
    learned = as_parts(method.init(jax.random.key(0), *shapes), method).learned
    again = as_parts(method.init(jax.random.key(1), *shapes), method).learned
    assert jax.tree.structure(learned) == jax.tree.structure(again)

    def loss(learned: Any) -> jax.Array:
        return jnp.mean(terms(method, FLAT, teacher, learned)[name])

    value, gradients = jax.value_and_grad(loss)(learned)
    assert np.isfinite(value)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))
    assert any((np.asarray(leaf) != 0).any() for leaf in jax.tree.leaves(gradients))
    if name == "cc":
        assert learned["student"]["kernel"].shape == (7, 9)


def test_an_absent_example_does_not_matter_to_relations() -> None:
    batch = kd.Batch(jnp.zeros((5, 1)), None, jnp.asarray([1, 1, 1, 1, 0], jnp.float32))
    other = kd.Output(OTHER_FLAT.logits, {"here": B.at[4].set(9.0)})
    for method in (kd.SP("here"), kd.PKT("here"), kd.RKD("here")):
        first, second = (terms(method, FLAT, one, batch=batch) for one in (OTHER_FLAT, other))
        for name, values in first.items():
            np.testing.assert_allclose(values[:4], second[name][:4], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("method", [kd.AT("head"), kd.NST("head")])
def test_a_feature_without_positions_is_no_map(method: kd.Method) -> None:
    """Over a single position all is constant: the loss would be 0 whatever the student says."""
    flat = kd.Output(jnp.zeros((4, 3)), {"head": jnp.ones((4, 5))})
    with pytest.raises(ShapeError, match=r"the feature 'head' has the shape \(4, 5\), and .* compares maps: name one"):
        method.loss(kd.Parts(), flat, flat, kd.Batch(None), jnp.int32(0))
