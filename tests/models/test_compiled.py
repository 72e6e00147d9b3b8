"""Programs of models and teachers: compiled once for what is equal, and forgotten with what they were made of."""

import gc
import weakref
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import DATA, HOW, Table, X, net

import kd_jax as kd
from kd_jax.models import compiled

pytestmark = pytest.mark.usefixtures("quick_compiling")
W = np.ones((6, 4), np.float32)


def test_equal_values_are_traced_once_and_others_anew() -> None:
    traces = []

    def times(x: jax.Array, *, by: Any) -> jax.Array:
        traces.append(by)
        return x * by[0]

    for by, count in (((2.0,), 1), ((2.0,), 1), ((3.0,), 2)):
        np.testing.assert_array_equal(compiled.call(times, X, by=by), X * np.float32(by[0]))
        assert len(traces) == count
    # A list has no hash: it is known as the object that it is.
    by = [2.0]
    for one, count in ((by, 3), (by, 3), ([2.0], 4)):
        compiled.call(times, X, by=one)
        assert len(traces) == count


def test_a_function_of_its_own_looks_as_it_is() -> None:
    @dataclass
    class Scale:
        by: Any
        mixes = True

        def __call__(self, params: Any, x: jax.Array) -> jax.Array:
            return x * self.by

    one = compiled.hashable(Scale(jnp.ones(6)))
    assert one != compiled.hashable(Scale(jnp.ones(6)))
    assert one.mixes
    assert not hasattr(one, "of_batch")
    assert compiled.hashable(len) is len
    # Networks of it are compared, too.
    models = [kd.from_function(Scale(jnp.full((1, 6), value)), {}) for value in (1.0, 2.0)]
    assert models[0].network != models[1].network
    for model, value in zip(models, (1.0, 2.0), strict=True):
        np.testing.assert_array_equal(kd.predict(model, X), value * X)
        assert kd.evaluate(model, DATA._replace(labels=None), teacher=models[0])["kl_to_teacher"] >= 0


@pytest.mark.parametrize("kind", ["function", "model"])
def test_a_teacher_is_freed_with_all_that_was_compiled_for_it(kind: str) -> None:
    """Also what a function closes over, which is a part of its programs."""
    own: Any = Table(W)
    values = jnp.asarray(W)
    teacher: Any = kd.Model(own.network, {}) if kind == "model" else lambda x: x @ values
    gone = weakref.ref(own if kind == "model" else teacher)
    if kind == "model":
        teacher(X)
        kd.predict(teacher, X)
    kd.evaluate(net().init(0), DATA, teacher=teacher)
    kd.cached(teacher, X, keep="top-k", k=2)
    kd.distill(net(), teacher, DATA, validation=DATA, **HOW | {"epochs": 2})
    del own, teacher, values
    gc.collect()
    assert gone() is None
