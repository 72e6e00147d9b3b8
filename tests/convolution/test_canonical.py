import re
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from kd_jax.convolution import canonical, onednn, onednn_form

NUMBERS = {
    1: [("NHC", "HIO", "NHC"), ("NCH", "OIH", "NCH"), ("CHN", "IHO", "HNC")],
    2: [("NHWC", "HWIO", "NHWC"), ("NCHW", "OIHW", "NCHW"), ("CHWN", "IHWO", "HWNC")],
    3: [("NDHWC", "DHWIO", "NDHWC"), ("NCDHW", "OIDHW", "NCDHW"), ("CDHWN", "IDHWO", "DHWNC")],
}
TOLERANCE = {jnp.float32: 1e-5, jnp.bfloat16: 2e-2, jnp.float64: 1e-13}


def assert_close(found: Any, expected: Any, dtype: Any = jnp.float32) -> None:
    """Equal but for the rounding of `dtype`, relative to the largest number of an array."""
    for own, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert own.dtype == other.dtype
        assert own.shape == other.shape
        own, other = (np.asarray(array, np.float64) for array in (own, other))
        np.testing.assert_allclose(own, other, rtol=0, atol=TOLERANCE[dtype] * max(1.0, np.abs(other).max(initial=0)))


def normal(seed: int, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


@st.composite
def configurations(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, ...], dict[str, Any], Any]:
    """Shapes of inputs and kernel, parameters of `lax.conv_general_dilated`, and a type."""
    dims = draw(st.integers(1, 3))
    numbers = draw(st.sampled_from(NUMBERS[dims]))

    def several(low: int, high: int) -> tuple[int, ...]:
        return tuple(draw(st.lists(st.integers(low, high), min_size=dims, max_size=dims)))

    groups = draw(st.sampled_from(["one", "features", "depthwise", "batch"]))
    count = 1 if groups == "one" else draw(st.integers(2, 3))
    inputs = 1 if groups == "depthwise" else draw(st.integers(1, 3))
    batch = draw(st.integers(1, 2)) * (count if groups == "batch" else 1)
    outputs = draw(st.integers(1, 2)) * count
    kernel, dilation = several(1, 3), several(1, 2)
    padding = [(draw(st.integers(-1, 2)), draw(st.integers(0, 2))) for _ in range(dims)]
    size = {
        "N": batch,
        "C": inputs * (count if groups in ("features", "depthwise") else 1),
        "I": inputs,
        "O": outputs,
    }
    space = dict(zip("DHW"[-dims:] if dims > 1 else "H", several(5, 7), strict=True))
    windows = dict(zip(space, kernel, strict=True))
    parameters = {
        "window_strides": several(1, 2),
        "padding": draw(st.sampled_from(["SAME", "VALID", padding])),
        "lhs_dilation": several(1, 2),
        "rhs_dilation": dilation,
        "dimension_numbers": numbers,
        "feature_group_count": count if groups in ("features", "depthwise") else 1,
        "batch_group_count": count if groups == "batch" else 1,
    }
    if isinstance(parameters["padding"], str) and max(parameters["lhs_dilation"]) > 1:
        parameters["padding"] = padding
    dtype = draw(st.sampled_from([jnp.float32, jnp.bfloat16, jnp.float64]))
    lhs = tuple({**size, **space}[axis] for axis in numbers[0])
    rhs = tuple({**size, **windows}[axis] for axis in numbers[1])
    return lhs, rhs, parameters, dtype


@settings(max_examples=6, deadline=None, suppress_health_check=list(HealthCheck))
@given(configurations())
def test_convolutions_and_their_gradients_are_those_of_jax(configuration: Any) -> None:
    assert_as_in_jax(*configuration)


@pytest.mark.skipif(bool(onednn.why_not()), reason=onednn.why_not())
@settings(max_examples=6, deadline=None, suppress_health_check=list(HealthCheck))
@given(configurations())
def test_those_of_onednn_are_those_of_jax_however_small_they_are(configuration: Any) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onednn_form, "_WORTH", 0)
        assert_as_in_jax(*configuration[:3], jnp.float32)


def assert_as_in_jax(lhs: Any, rhs: Any, parameters: dict[str, Any], dtype: Any) -> None:

    def both(lhs: jax.Array, rhs: jax.Array, weights: jax.Array) -> Any:
        out, back = jax.vjp(lambda *args: lax.conv_general_dilated(*args, **parameters), lhs, rhs)
        return out, back(weights)

    with jax.enable_x64(dtype == jnp.float64):
        arrays = normal(0, lhs, dtype), normal(1, rhs, dtype)
        out = jax.eval_shape(lambda *args: lax.conv_general_dilated(*args, **parameters), *arrays)
        arrays = *arrays, normal(2, out.shape, dtype)
        compiled = jax.jit(canonical(both)).lower(*arrays).compile()
        assert_close(compiled(*arrays), jax.jit(both)(*arrays), dtype)
        assert (
            not slow_forms_of(compiled)[0]
            or parameters["feature_group_count"] > 1
            or parameters["batch_group_count"] > 1
        )


POINTS = {
    "one axis of two": ((4, 9, 1, 3), (5, 1, 3, 2), {"window_strides": (2, 3), "padding": ((2, 1), (0, 0))}),
    "two of three": ((2, 1, 7, 1, 3), (1, 3, 1, 3, 2), {"padding": "SAME", "rhs_dilation": (1, 2, 2)}),
    "all": ((2, 1, 1, 3), (1, 1, 3, 2), {"padding": "VALID"}),
    "not one that is padded": ((2, 7, 1, 3), (3, 1, 3, 2), {"padding": ((1, 1), (1, 0))}),
    "not one with a window": ((2, 7, 1, 3), (3, 2, 3, 2), {"padding": ((1, 1), (1, 0)), "lhs_dilation": (2, 2)}),
    "of groups": ((2, 7, 1, 6), (3, 1, 1, 6), {"padding": "SAME", "feature_group_count": 6}),
}


@pytest.mark.parametrize("name", POINTS)
def test_axes_of_one_position_are_left_out(name: str) -> None:
    lhs, rhs, parameters = POINTS[name]
    parameters = {"window_strides": (1,) * (len(lhs) - 2), **parameters}
    numbers = NUMBERS[len(lhs) - 2][0]

    def both(lhs: jax.Array, rhs: jax.Array, weights: jax.Array) -> Any:
        out, back = jax.vjp(
            lambda *args: lax.conv_general_dilated(*args, dimension_numbers=numbers, **parameters), lhs, rhs
        )
        return out, back(weights)

    arrays = normal(0, lhs), normal(1, rhs)
    shape = jax.eval_shape(
        lambda *args: lax.conv_general_dilated(*args, dimension_numbers=numbers, **parameters), *arrays
    ).shape
    arrays = *arrays, normal(2, shape)
    assert_close(jax.jit(canonical(both))(*arrays), both(*arrays))


@pytest.mark.parametrize("shape", [(64, 128, 1, 8), (64, 1, 128, 8)])
def test_onednn_sees_one_axis_where_there_is_one(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    original = onednn_form.convolution

    def convolution(own: Any, **more: Any) -> Any:
        seen.append(own.dims)
        return original(own, **more)

    monkeypatch.setattr(onednn_form, "convolution", convolution)
    window = tuple(5 if size > 1 else 1 for size in shape[1:3])
    kernel = jax.ShapeDtypeStruct((*window, 8, 8), jnp.float32)
    inputs = jax.ShapeDtypeStruct(shape, jnp.float32)

    def loss(inputs: jax.Array, kernel: jax.Array) -> jax.Array:
        numbers = NUMBERS[2][0]
        return jnp.sum(lax.conv_general_dilated(inputs, kernel, (1, 1), "SAME", dimension_numbers=numbers) ** 2)

    jax.make_jaxpr(canonical(jax.grad(loss, argnums=(0, 1))))(inputs, kernel)
    assert seen == [1, 1, 1]


GROUPS = {
    "depthwise": ((8, 6, 7, 6), (3, 3, 1, 6), 6, 1),
    "depthwise, strided, two outputs each": ((5, 6, 7, 3), (3, 3, 1, 6), 3, 2),
    "a few small groups together": ((4, 6, 7, 8), (3, 3, 2, 8), 4, 1),
    "some small groups together": ((4, 6, 7, 24), (3, 2, 2, 36), 12, 1),
    "many small groups together, in a loop": ((3, 4, 5, 72), (2, 1, 2, 144), 36, 2),
    "some large groups": ((2, 6, 7, 10), (3, 3, 5, 40), 2, 1),
    "many large groups, in a loop": ((2, 4, 5, 18), (2, 2, 2, 180), 9, 1),
    "one by one": ((2, 4, 5, 12), (1, 1, 4, 9), 3, 2),
}


@pytest.mark.parametrize("name", GROUPS)
def test_grouped_convolutions_and_their_gradients_are_those_of_jax(name: str) -> None:
    lhs, rhs, groups, stride = GROUPS[name]
    x, kernel = normal(0, lhs), normal(1, rhs)

    def loss(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return jnp.sum(jnp.sin(conv(x, kernel, stride=stride, groups=groups)))

    gradients = jax.value_and_grad(loss, argnums=(0, 1))
    changed = jax.jit(canonical(gradients)).lower(x, kernel).compile()
    assert_close(changed(x, kernel), jax.jit(gradients)(x, kernel))
    assert not slow_forms_of(changed)[0]
    assert "feature_group_count" not in changed.as_text()


def conv(x: jax.Array, kernel: jax.Array, *, stride: int = 1, groups: int = 1) -> jax.Array:
    numbers = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(
        x, kernel, (stride, stride), "SAME", dimension_numbers=numbers, feature_group_count=groups
    )


def slow_forms(fun: Callable[..., Any], *args: Any) -> tuple[list[str], int]:
    """The orders of axes in the compiled program for which XLA has no kernel, and how many convolutions there are."""
    return slow_forms_of(jax.jit(fun).lower(*args).compile())


def slow_forms_of(compiled: Any) -> tuple[list[str], int]:
    text = compiled.as_text()
    found = re.findall(r"dim_labels=(\w+->\w+)", text) + re.findall(r"\w+_reversal=\w+", text)
    return [form for form in found if not re.fullmatch(r"b(0?1?2?)f_\1io->b\1f", form)], len(found)


class NNXNetwork(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.first = nnx.Conv(3, 8, (3, 3), strides=2, rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.grouped = nnx.Conv(8, 8, (3, 3), feature_group_count=2, rngs=rngs)
        self.dilated = nnx.Conv(8, 8, (3, 3), kernel_dilation=2, rngs=rngs)
        self.depthwise = nnx.Conv(8, 8, (3, 3), feature_group_count=8, rngs=rngs)
        self.transposed = nnx.ConvTranspose(8, 4, (3, 3), strides=2, rngs=rngs)
        self.head = nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = nnx.relu(self.norm(self.first(x)))
        x = nnx.relu(self.depthwise(self.dilated(nnx.relu(self.grouped(x)))))
        return self.head(jnp.mean(self.transposed(x), (1, 2)))


class LinenNetwork(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.relu(nn.BatchNorm(use_running_average=False)(nn.Conv(8, (3, 3), strides=2)(x)))
        x = nn.relu(nn.remat(nn.Conv)(8, (3, 3), feature_group_count=4, name="grouped")(x))
        x = nn.relu(nn.ConvTranspose(8, (3, 3), strides=(2, 2))(x))
        return nn.Dense(3)(jnp.mean(x, (1, 2)))


def training(kind: str) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """Three steps of training in a scan, and what it is called with."""
    x, labels = normal(0, (4, 8, 8, 3)), jnp.asarray([0, 1, 2, 0])
    apply: Callable[[Any, Any], tuple[jax.Array, Any]]
    if kind == "nnx":
        graph, params, state = nnx.split(NNXNetwork(nnx.Rngs(0)), nnx.Param, ...)

        def apply(params: Any, state: Any) -> tuple[jax.Array, Any]:
            model = nnx.merge(graph, params, state, copy=True)
            logits = model(x)
            return logits, nnx.state(model, nnx.Not(nnx.Param))
    else:
        network = LinenNetwork()
        variables = network.init(jax.random.key(0), x)
        params, state = variables["params"], variables["batch_stats"]

        def apply(params: Any, state: Any) -> tuple[jax.Array, Any]:
            variables = {"params": params, "batch_stats": state}
            logits, changed = network.apply(variables, x, mutable=["batch_stats"])
            return logits, changed["batch_stats"]

    optimizer = optax.sgd(0.1, momentum=0.9)

    def step(carry: Any, _: None) -> tuple[Any, jax.Array]:
        params, state, moments = carry

        def mean_loss(params: Any) -> tuple[jax.Array, Any]:
            logits, changed = apply(params, state)
            return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels)), changed

        (loss, state), gradients = jax.value_and_grad(mean_loss, has_aux=True)(params)
        updates, moments = optimizer.update(gradients, moments)
        return (optax.apply_updates(params, updates), state, moments), loss

    return lambda *carry: lax.scan(step, carry, None, length=3), (params, state, optimizer.init(params))


@pytest.mark.parametrize("kind", ["nnx", "linen"])
def test_no_convolution_of_a_training_loop_is_left_without_a_fast_kernel(kind: str) -> None:
    train, start = training(kind)
    slow, _ = slow_forms(train, *start)
    assert slow  # else XLA itself does what `canonical` is there for
    slow, count = slow_forms(canonical(train), *start)
    assert not slow
    assert count > 0
    assert_close(jax.jit(canonical(train))(*start), jax.jit(train)(*start))


@pytest.mark.parametrize("order", ["vmap inside", "vmap outside"])
def test_no_convolution_of_vmapped_trainings_is_left_without_a_fast_kernel(order: str) -> None:
    train, start = training("nnx")
    starts = jax.tree.map(lambda array: jnp.stack([array, array * 2, array]), start)
    mapped = canonical(jax.vmap(train)) if order == "vmap inside" else jax.vmap(canonical(train))
    slow, _ = slow_forms(mapped, *starts)
    assert not slow
    assert_close(jax.jit(mapped)(*starts), jax.jit(jax.vmap(train))(*starts))


@jax.custom_vjp
def with_own_gradient(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return conv(x, kernel)


def _forward(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, Any]:
    return conv(x, kernel), (x, kernel)


def _backward(saved: Any, weights: jax.Array) -> Any:
    return jax.tree.map(lambda own: 2 * own, jax.vjp(conv, *saved)[1](weights))


with_own_gradient.defvjp(_forward, _backward)


@jax.custom_jvp
def with_own_tangent(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return conv(x, kernel)


@with_own_tangent.defjvp
def _tangent(primals: Any, tangents: Any) -> Any:
    return conv(*primals), 3 * conv(tangents[0], primals[1]) + conv(primals[0], tangents[1])


CALLS: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
    "jit": jax.jit(conv),
    "remat": jax.checkpoint(conv),
    "cond": lambda x, kernel: lax.cond(jnp.sum(x) > 0, conv, lambda x, kernel: conv(x, 2 * kernel), x, kernel),
    "switch in map": lambda x, kernel: lax.map(
        lambda i: lax.switch(i, [conv, lambda x, k: -conv(x, k)], x, kernel), jnp.arange(2)
    ),
    "nested scans": lambda x, kernel: lax.scan(
        lambda x, _: lax.scan(lambda x, _: (jnp.tanh(conv(x, kernel)), None), x, None, length=2), x, None, length=2
    )[0],
    "vmap": jax.vmap(lambda x, kernel: conv(x[None], kernel)[0], in_axes=(0, None)),
    "vmap over kernels": jax.vmap(conv, in_axes=(None, 0)),
    "custom_vjp": with_own_gradient,
    "custom_jvp": with_own_tangent,
    "closed-over constant": lambda x, kernel: conv(jnp.asarray(np.ones(x.shape, np.float32)) * x, kernel) + 1.0,
}


@pytest.mark.parametrize("where", ["gradient inside", "gradient outside"])
@pytest.mark.parametrize("name", CALLS)
def test_every_kind_of_call_is_reached_and_keeps_its_values_and_gradients(name: str, where: str) -> None:
    x, kernel = normal(0, (2, 5, 6, 3)), normal(1, (3, 3, 3, 3))
    if name == "vmap over kernels":
        kernel = jnp.stack([kernel, 2 * kernel])

    def gradients(call: Callable[..., jax.Array]) -> Callable[..., Any]:
        return jax.value_and_grad(lambda x, kernel: jnp.sum(jnp.sin(call(x, kernel))), argnums=(0, 1))

    own = gradients(CALLS[name])
    changed = canonical(own) if where == "gradient inside" else gradients(canonical(CALLS[name]))
    assert_close(jax.jit(changed)(x, kernel), jax.jit(own)(x, kernel))
    if where == "gradient inside":
        assert orders(changed, x, kernel) == {FAST_2D}


FAST_2D = "lhs_spec=(0, 3, 1, 2), rhs_spec=(3, 2, 0, 1), out_spec=(0, 3, 1, 2)"


def orders(fun: Callable[..., Any], *args: Any) -> set[str]:
    """The orders of axes of all convolutions of `fun`, in whatever it calls."""
    return set(re.findall(r"ConvDimensionNumbers\((lhs_spec.*?out_spec=\(.*?\))\)", str(jax.make_jaxpr(fun)(*args))))


def kernel_gradient(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return jax.grad(lambda kernel: jnp.sum(jnp.sin(conv(x, kernel))))(kernel)


def test_collectives_and_manual_axes_are_kept() -> None:
    x, kernel = normal(0, (2, 5, 6, 3)), normal(1, (3, 3, 3, 3))

    def mean(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return lax.pmean(kernel_gradient(x, kernel), "data")

    mapped = jax.vmap(canonical(lambda x: mean(x[None], kernel)), axis_name="data")
    expected = jax.vmap(lambda x: mean(x[None], kernel), axis_name="data")(x)
    assert_close(mapped(x), expected)

    # Depthwise convolutions have another form where nothing is sharded, which makes arrays of its own.
    mesh = Mesh(np.asarray(jax.devices()[:1]), ("data",))
    specs = {"in_specs": (PartitionSpec("data"), PartitionSpec()), "out_specs": PartitionSpec()}
    for groups in (1, 3):
        kernel = kernel[:, :, : 3 // groups]

        def reduced(x: jax.Array, kernel: jax.Array, groups: int = groups) -> jax.Array:
            own = jax.grad(lambda kernel: jnp.sum(jnp.sin(conv(x, kernel, groups=groups))))(kernel)
            return lax.pmean(own, "data")

        shards = jax.shard_map(reduced, mesh=mesh, **specs)
        within = jax.shard_map(canonical(reduced), mesh=mesh, **specs)
        expected = jax.jit(shards)(x, kernel)
        assert orders(shards, x, kernel) != {FAST_2D}
        for changed in (canonical(shards), within):
            assert orders(changed, x, kernel) == {FAST_2D}
            assert_close(jax.jit(changed)(x, kernel), expected)


def test_a_precision_and_the_type_of_sums_are_kept() -> None:
    x, kernel = normal(0, (2, 5, 6, 3), jnp.bfloat16), normal(1, (3, 3, 3, 3), jnp.bfloat16)

    def exact(x: jax.Array, kernel: jax.Array) -> jax.Array:
        numbers = ("NHWC", "OHWI", "NCHW")
        options = {"precision": lax.Precision.HIGHEST, "preferred_element_type": jnp.float32}
        return lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=numbers, **options)

    found = canonical(exact)(x, kernel)
    assert found.dtype == jnp.float32
    assert_close(found, exact(x, kernel))
    assert "HIGHEST" in str(jax.make_jaxpr(canonical(exact))(x, kernel))


@pytest.mark.parametrize("platform", ["gpu", "tpu"])
def test_other_platforms_get_the_function_as_it_is(platform: str) -> None:
    args = normal(0, (2, 5, 6, 3)), normal(1, (3, 3, 3, 3))
    untouched = canonical(kernel_gradient, platform=platform)
    assert str(jax.make_jaxpr(untouched)(*args)) == str(jax.make_jaxpr(kernel_gradient)(*args))
    assert orders(canonical(kernel_gradient), *args) == {FAST_2D}


def test_the_device_that_the_user_chose_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    args = normal(0, (2, 5, 6, 3)), normal(1, (3, 3, 3, 3))
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert orders(canonical(kernel_gradient), *args) != {FAST_2D}
    for device in ("cpu", jax.devices("cpu")[0]):
        with jax.default_device(device):
            assert orders(canonical(kernel_gradient), *args) == {FAST_2D}


def test_a_function_without_convolutions_has_the_same_program() -> None:
    def loss(params: Any, x: jax.Array, scale: float) -> jax.Array:
        hidden = jax.checkpoint(lambda x: jax.nn.relu(x @ params["kernel"]))(x)
        return jnp.mean(jax.nn.logsumexp(scale * hidden, axis=-1)) + jnp.asarray(0.0, x.dtype)

    def train(params: Any, x: jax.Array, *, scale: float) -> Any:
        def step(params: Any, _: None) -> tuple[Any, Any]:
            value, gradients = jax.value_and_grad(loss)(params, x, scale)
            return jax.tree.map(lambda own, gradient: own - gradient, params, gradients), {"loss": value, "none": None}

        return lax.scan(step, params, None, length=3)

    args = {"kernel": normal(1, (4, 5))}, normal(0, (6, 4))
    plain = jax.jit(train).lower(*args, scale=2.0).as_text()
    assert jax.jit(canonical(train)).lower(*args, scale=2.0).as_text() == plain
    # Types that give way to others (weak types) stay so.
    assert jax.eval_shape(canonical(lambda x: x * 2), 1.0).weak_type


def test_a_rewritten_function_can_be_rewritten_again() -> None:
    args = normal(0, (2, 5, 6, 3)), normal(1, (3, 3, 3, 3))
    once, twice = canonical(kernel_gradient), canonical(canonical(kernel_gradient))
    assert str(jax.make_jaxpr(once)(*args)) == str(jax.make_jaxpr(twice)(*args))


def test_a_function_that_is_called_twice_is_lowered_once() -> None:
    shared = jax.jit(kernel_gradient)

    def both(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return shared(x, shared(x, kernel))

    args = normal(0, (2, 5, 6, 3)), normal(1, (3, 3, 3, 3))
    plain, changed = (jax.jit(fun).lower(*args).as_text() for fun in (both, canonical(both)))
    assert changed.count("func.func private") == plain.count("func.func private")


def test_random_keys_and_effects_pass_through() -> None:
    seen = []

    def noisy(key: jax.Array, x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, jax.Array]:
        key, own = jax.random.split(key)
        gradient = kernel_gradient(x + jax.random.normal(own, x.shape), kernel)
        jax.debug.callback(lambda value: seen.append(float(value)), jnp.sum(gradient))
        return key, gradient

    args = jax.random.key(3), normal(0, (2, 5, 6, 3)), normal(1, (3, 3, 3, 3))
    key, gradient = jax.jit(canonical(noisy))(*args)
    expected_key, expected = noisy(*args)
    jax.effects_barrier()
    assert (jax.random.key_data(key) == jax.random.key_data(expected_key)).all()
    assert_close(gradient, expected)
    assert len(seen) == 2


@pytest.mark.parametrize(
    ("size", "window", "stride", "padding"),
    [((2,), (2,), (3,), ((7, -2),)), ((2, 2), (1, 1), (2, 2), ((3, -1), (6, 0)))],
)
def test_a_padding_below_0_that_leaves_nothing_of_an_axis_is_as_in_jax(size, window, stride, padding) -> None:
    x, kernel = normal(0, (2, *size, 3)), normal(1, (*window, 3, 4))

    def both(x: jax.Array, kernel: jax.Array) -> Any:
        def convolved(*args: jax.Array) -> jax.Array:
            return lax.conv_general_dilated(*args, stride, padding, dimension_numbers=NUMBERS[len(size)][0])

        out, back = jax.vjp(convolved, x, kernel)
        return out, back(out)

    assert_close(jax.jit(canonical(both))(x, kernel), both(x, kernel))
