import ctypes
import os
import re
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from kd_jax.convolution import canonical, onednn, onednn_form

pytestmark = pytest.mark.skipif(bool(onednn.why_not()), reason=onednn.why_not())

# Inputs, kernel, strides, padding, dilation of the kernel.
CASES = {
    "3 x 3": ((5, 9, 8, 4), (3, 3, 4, 8), (1, 1), ((1, 1), (1, 1)), (1, 1)),
    "strided": ((4, 9, 8, 3), (3, 3, 3, 5), (2, 2), ((1, 1), (0, 1)), (1, 1)),
    "strided, something left over": ((4, 11, 10, 8), (3, 2, 8, 8), (3, 2), ((0, 0), (0, 0)), (1, 1)),
    "dilated": ((3, 12, 9, 8), (3, 3, 8, 8), (1, 1), ((2, 2), (1, 2)), (2, 2)),
    "more padding than needed": ((2, 6, 6, 8), (3, 3, 8, 8), (1, 1), ((3, 2), (2, 4)), (1, 1)),
    "one axis": ((6, 20, 8), (5, 8, 16), (2,), ((2, 2),), (1,)),
    "three axes": ((2, 6, 5, 7, 4), (3, 2, 3, 4, 8), (1, 1, 2), ((1, 1), (0, 1), (1, 1)), (1, 1, 1)),
    "1 x 1, strided": ((4, 8, 8, 8), (1, 1, 8, 16), (2, 2), ((0, 0), (0, 0)), (1, 1)),
    "1 x 1, strides of 3 and 2": ((3, 9, 12, 4), (1, 1, 4, 8), (3, 2), ((0, 0), (0, 0)), (1, 1)),
    "1 x 1, strided, padded": ((3, 9, 12, 4), (1, 1, 4, 8), (2, 3), ((1, 0), (0, 2)), (1, 1)),
    "one channel": ((4, 12, 12, 1), (5, 5, 1, 6), (1, 1), ((2, 2), (2, 2)), (1, 1)),
}
GROUPED = {
    "depthwise": (8, ((5, 9, 8, 8), (3, 3, 1, 8), (1, 1), ((1, 1), (1, 1)), (1, 1))),
    "depthwise, strided": (8, ((4, 9, 8, 8), (3, 3, 1, 8), (2, 2), ((0, 1), (1, 1)), (1, 1))),
    "depthwise, two outputs each": (8, ((4, 9, 8, 8), (3, 3, 1, 16), (1, 1), ((1, 1), (1, 1)), (2, 1))),
    "three groups": (3, ((4, 9, 8, 24), (3, 3, 8, 48), (1, 1), ((1, 1), (1, 1)), (1, 1))),
    "two groups, strided": (2, ((4, 11, 8, 16), (3, 3, 8, 32), (2, 2), ((1, 1), (1, 0)), (1, 1))),
    "1 x 1, four groups": (4, ((3, 6, 5, 16), (1, 1, 4, 32), (1, 1), ((0, 0), (0, 0)), (1, 1))),
    "two groups, one axis": (2, ((6, 20, 16), (5, 8, 32), (2,), ((2, 2),), (1,))),
}
CASES |= {name: case for name, (_, case) in GROUPED.items()}
NUMBERS = {1: ("NHC", "HIO", "NHC"), 2: ("NHWC", "HWIO", "NHWC"), 3: ("NDHWC", "DHWIO", "NDHWC")}


@pytest.fixture(autouse=True)
def _all_of_them(monkeypatch):
    monkeypatch.setattr(onednn_form, "_WORTH", 0)


def groups_of(case):
    return GROUPED[case][0] if case in GROUPED else 1


def convolved(x, kernel, case):
    _, _, strides, padding, dilation = CASES[case]
    numbers = NUMBERS[len(strides)]
    options = {"rhs_dilation": dilation, "dimension_numbers": numbers, "feature_group_count": groups_of(case)}
    return lax.conv_general_dilated(x, kernel, strides, padding, **options)


def both(case):
    """The outputs, and the gradients for other outputs."""

    def run(x, kernel, other):
        out, back = jax.vjp(lambda *args: convolved(*args, case), x, kernel)
        return out, *back(other)

    return run


def arrays(case, dtype=np.float32):
    inputs, kernel, *_ = CASES[case]
    generator = np.random.default_rng(0)
    x, w = (generator.normal(size=shape).astype(dtype) for shape in (inputs, kernel))
    out = jax.eval_shape(lambda *args: convolved(*args, case), x, w)
    return x, w, generator.normal(size=out.shape).astype(dtype)


def oracle(case, x, kernel, other):
    """The same in float64, number by number."""
    _, _, strides, padding, dilation = CASES[case]
    x, kernel, other = (np.asarray(array, np.float64) for array in (x, kernel, other))
    padded = np.pad(x, ((0, 0), *padding, (0, 0)))
    out, of_padded, of_kernel = np.zeros(other.shape), np.zeros(padded.shape), np.zeros(kernel.shape)
    for place in np.ndindex(*kernel.shape[:-2]):
        for at in np.ndindex(*other.shape[1:-1]):
            seen = (
                slice(None),
                *(a * stride + p * step for a, stride, p, step in zip(at, strides, place, dilation, strict=True)),
            )
            here = (slice(None), *at)
            for group in range(groups_of(case)):
                ours, theirs = (
                    slice(group * size, (group + 1) * size)
                    for size in (kernel.shape[-2], kernel.shape[-1] // groups_of(case))
                )
                out[*here, theirs] += padded[*seen, ours] @ kernel[*place, :, theirs]
                of_padded[*seen, ours] += other[*here, theirs] @ kernel[*place, :, theirs].T
                of_kernel[*place, :, theirs] += padded[*seen, ours].T @ other[*here, theirs]
    inner = tuple(slice(low, low + size) for (low, _), size in zip(padding, x.shape[1:-1], strict=True))
    return out, of_padded[(slice(None), *inner)], of_kernel


def calls(compiled):
    return re.findall(r'custom_call_target="kd_jax\.onednn\.(\w+)', compiled.as_text())


@pytest.mark.parametrize("case", CASES)
def test_a_convolution_and_its_gradients_are_those_of_a_sum_number_by_number(case):
    given = arrays(case)
    compiled = jax.jit(canonical(both(case))).lower(*given).compile()
    names = calls(compiled)
    assert names.count("kernel") == 1
    assert "forward" in names
    for own, other in zip(compiled(*given), oracle(case, *given), strict=True):
        np.testing.assert_allclose(own, other, rtol=0, atol=2e-6 * np.abs(other).max())


@pytest.mark.parametrize("case", ["depthwise", "three groups", "two groups, strided", "two groups, one axis", "3 x 3"])
def test_the_gradient_of_a_kernel_reads_inputs_as_they_lie(case):
    inputs = ",".join(map(str, CASES[case][0]))
    compiled = jax.jit(canonical(both(case))).lower(*arrays(case)).compile()
    moved = re.findall(rf"f32\[{inputs}\]\S* (?:fusion|copy|transpose)\(", compiled.as_text())
    assert not moved


@pytest.mark.parametrize("case", ["1 x 1, strided", "strided, something left over"])
def test_inputs_that_a_stride_leaves_out_are_not_cut_off_for_onednn(case):
    compiled = jax.jit(canonical(both(case))).lower(*arrays(case)).compile()
    assert sorted(calls(compiled)) == ["forward", "inputs", "kernel"]
    inputs = "x".join(map(str, CASES[case][0]))
    assert compiled.as_text().count(f".{inputs}.") == 3


@pytest.mark.parametrize(
    ("inputs", "kernel", "strides", "dilation"),
    [
        ((4, 8, 8, 8), (1, 1, 8, 16), (1, 1), (1, 1)),
        ((4, 8, 8, 8), (1, 1, 8, 16), (1, 1), (2, 2)),
        ((4, 1, 1, 8), (1, 1, 8, 16), (2, 2), (1, 1)),
    ],
)
def test_a_matrix_product_is_left_to_xla(inputs, kernel, strides, dilation):
    def total(x, kernel):
        out = lax.conv_general_dilated(x, kernel, strides, "VALID", rhs_dilation=dilation, dimension_numbers=NUMBERS[2])
        return jnp.sum(jnp.sin(out))

    given = np.ones(inputs, np.float32), np.ones(kernel, np.float32)
    assert calls(jax.jit(canonical(jax.grad(total))).lower(*given).compile()) == []
    assert calls(jax.jit(canonical(jax.grad(total, 1))).lower(*given).compile()) == []


def test_inputs_that_a_padding_below_0_takes_away_are_cut_off_for_onednn():
    def convolved(x, kernel):
        return lax.conv_general_dilated(x, kernel, (1, 1), ((0, -2), (-1, 1)), dimension_numbers=NUMBERS[2])

    rng = np.random.default_rng(0)
    x, kernel = (rng.normal(size=shape).astype(np.float32) for shape in ((3, 9, 8, 8), (3, 3, 8, 8)))
    compiled = jax.jit(canonical(convolved)).lower(x, kernel).compile()
    assert calls(compiled) == ["forward"]
    cut = lax.conv_general_dilated(x[:, :-2, 1:], kernel, (1, 1), ((0, 0), (0, 1)), dimension_numbers=NUMBERS[2])
    np.testing.assert_allclose(compiled(x, kernel), cut, rtol=0, atol=1e-4)


def test_a_window_as_large_as_its_inputs_is_a_matrix_product_for_the_kernel():
    def total(kernel, x):
        return jnp.sum(jnp.sin(lax.conv_general_dilated(x, kernel, (4, 4), "VALID", dimension_numbers=NUMBERS[2])))

    given = np.ones((4, 4, 8, 16), np.float32), np.ones((4, 4, 4, 8), np.float32)
    assert calls(jax.jit(canonical(jax.grad(total))).lower(*given).compile()) == []


def test_in_a_loop_it_is_the_same_call_and_the_same_bits_at_every_run():
    x, kernel, other = arrays("3 x 3")

    def loop(x, kernel):
        def body(carried, _):
            out, of_x, of_kernel = both("3 x 3")(*carried, other)
            return (carried[0] - 0.1 * of_x, carried[1] - 0.1 * of_kernel), jnp.sum(out)

        return lax.scan(canonical(body), (x, kernel), None, length=3)

    compiled = jax.jit(loop).lower(x, kernel).compile()
    assert "while" in compiled.as_text()
    assert sorted(calls(compiled)) == ["forward", "forward", "kernel"]
    first = jax.tree.leaves(compiled(x, kernel))
    for _ in range(5):
        assert all(np.array_equal(a, b) for a, b in zip(first, jax.tree.leaves(compiled(x, kernel)), strict=True))


def test_programs_that_run_at_once_do_not_disturb_one_another():
    given = arrays("strided")
    compiled = jax.jit(canonical(both("strided"))).lower(*given).compile()
    expected = compiled(*given)
    doubled = compiled(*(2 * array for array in given))
    with ThreadPoolExecutor(4) as threads:
        runs = [threads.submit(compiled, *(factor * array for array in given)) for factor in (1, 2) * 20]
        for run, other in zip(runs, (expected, doubled) * 20, strict=True):
            assert all(np.array_equal(a, b) for a, b in zip(run.result(), other, strict=True))


def test_with_many_cores_all_calls_come_from_one_thread(monkeypatch):
    library = onednn._library()[0]
    assert library is not None
    given = arrays("3 x 3")
    compiled = jax.jit(canonical(both("3 x 3"))).lower(*given).compile()
    expected = compiled(*given)
    with ThreadPoolExecutor(1) as thread:
        monkeypatch.setattr(library, "thread", thread)
        assert all(np.array_equal(a, b) for a, b in zip(compiled(*given), expected, strict=True))
        assert len(thread._threads) == 1


def test_it_can_be_differentiated_and_mapped_from_outside():
    x, kernel, _ = arrays("3 x 3")

    def loss(x, kernel):
        return jnp.mean(convolved(x, kernel, "3 x 3") ** 2)

    own = jax.jit(jax.hessian(lambda s: canonical(loss)(s * x, s * kernel)))(1.0)
    np.testing.assert_allclose(own, jax.jit(jax.hessian(lambda s: loss(s * x, s * kernel)))(1.0), rtol=1e-5)
    kernels = jnp.stack([kernel, 2 * kernel])
    mapped = jax.jit(jax.vmap(canonical(loss), (None, 0)))(x, kernels)
    np.testing.assert_allclose(mapped, jax.vmap(loss, (None, 0))(x, kernels), rtol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float64])
def test_other_types_are_left_to_xla(dtype):
    with jax.enable_x64(dtype == jnp.float64):
        given = [jnp.asarray(array, dtype) for array in arrays("3 x 3")]
        assert calls(jax.jit(canonical(both("3 x 3"))).lower(*given).compile()) == []


def test_small_ones_are_left_to_xla(monkeypatch):
    monkeypatch.undo()
    assert calls(jax.jit(canonical(both("3 x 3"))).lower(*arrays("3 x 3")).compile()) == []


def test_on_a_mesh_of_several_devices_xla_divides_them():
    given = arrays("3 x 3")
    for size in (1, 2):
        mesh = jax.sharding.AbstractMesh((size,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
        with jax.sharding.use_abstract_mesh(mesh):
            written = str(jax.make_jaxpr(canonical(both("3 x 3")))(*given))
        assert ("kd_jax.onednn" in written) == (size == 1)


def test_padding_below_0_is_cut_off_beforehand():
    x, kernel, _ = arrays("3 x 3")

    def cropped(x):
        return lax.conv_general_dilated(x, kernel, (2, 2), ((-1, 2), (0, -2)), dimension_numbers=NUMBERS[2])

    expected = lax.conv_general_dilated(x[:, 1:, :-2], kernel, (2, 2), ((0, 2), (0, 0)), dimension_numbers=NUMBERS[2])
    np.testing.assert_allclose(jax.jit(canonical(cropped))(x), expected, atol=1e-5)


def test_where_it_is_missing_or_switched_off_xla_computes_and_the_reason_is_told(monkeypatch):
    given = arrays("3 x 3")
    caches = (onednn._loaded,)
    for change, reason in (
        (lambda: monkeypatch.setenv("KD_JAX_ONEDNN", "0"), "KD_JAX_ONEDNN is 0"),
        (lambda: monkeypatch.setattr(onednn, "PACKAGE", "no-such-package"), "no-such-package is not installed"),
    ):
        with monkeypatch.context():
            for cache in caches:
                cache.cache_clear()
            change()
            try:
                assert onednn.why_not() == reason
                assert calls(jax.jit(canonical(both("3 x 3"))).lower(*given).compile()) == []
            finally:
                monkeypatch.delenv("KD_JAX_ONEDNN", raising=False)
                for cache in caches:
                    cache.cache_clear()


def test_openmp_finds_the_settings_of_the_user(monkeypatch):
    """It reads them once, for oneDNN and for PyTorch."""
    before, seen, opened = dict(os.environ), [], ctypes.CDLL

    def watched(path):
        seen.append(dict(os.environ))
        return opened(path)

    monkeypatch.setattr(ctypes, "CDLL", watched)
    assert onednn._loaded.__wrapped__()[0] is not None
    assert len(seen) >= 1
    assert all(settings == before for settings in seen)
