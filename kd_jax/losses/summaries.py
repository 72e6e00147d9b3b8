"""Feature losses that compare a summary of a student's map with the teacher's: one value for each example.

Features are `[batch, *space, channels]`. Where the sizes of two maps differ, the larger is pooled to the smaller.
"""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from kd_jax.errors import ShapeError
from kd_jax.losses.maps import (
    Features,
    Pool,
    Scalar,
    Values,
    as_features,
    as_pair,
    as_same,
    average_pool,
    both,
    cells,
    match_space,
    max_pool,
    same_channels,
)
from kd_jax.losses.vectors import as_weights, dot, power, scaled, unit


def at(student: Features, teacher: Features, *, exponent: Scalar = 2.0) -> Values:
    r"""Attention transfer of one stage: the mean over the positions of $(q_s - q_t)^2$, $q = a / \|a\|_2$. `[batch]`.

    $a$ is the mean over the channels of $|f|^p$, a vector of the positions. Zagoruyko & Komodakis (2017),
    https://arxiv.org/abs/1612.03928. Their equation 2 has the norm $\|q_s - q_t\|_2$ (torchdistill's mode "paper");
    their code, RepDistiller and mdistiller have the mean square, as here, and sum over the stages.

    student, teacher: `[batch, *space, channels]`; channels may differ; the larger map is average-pooled before its
    powers are taken, as in public code. A map of zeros has q = 0. exponent: p.
    """
    student, teacher = match_space(student, teacher)
    gap = _attention(student, exponent) - _attention(teacher, exponent)
    return jnp.mean(jnp.square(gap), axis=-1)


def nst(student: Features, teacher: Features) -> Values:
    r"""Neuron selectivity transfer: squared MMD of the channels' maps, with the kernel $(u^T v)^2$, `[batch]`.

    $\overline{k(s_i, s_j)} + \overline{k(t_i, t_j)} - 2 \overline{k(s_i, t_j)}$, means over pairs of channels, whose
    maps have length 1. Huang & Wang (2017), https://arxiv.org/abs/1707.01219. RepDistiller and mdistiller are the same.

    student, teacher: `[batch, *space, channels]`; channels may differ; the larger map is average-pooled.
    """
    student, teacher = (unit(_channels(features)) for features in match_space(student, teacher))
    within = _mean(jnp.square(dot(student, student))) + _mean(jnp.square(dot(teacher, teacher)))
    return within - 2 * _mean(jnp.square(dot(student, teacher)))


def fsp(
    student_first: Features,
    student_last: Features,
    teacher_first: Features,
    teacher_last: Features,
    *,
    pool: Pool = max_pool,
) -> Values:
    r"""Flow of solution procedure: the mean of $(G_s - G_t)^2$, $G_{ij} = \frac{1}{HW} \sum_x f_{x,i} g_{x,j}$.

    f and g are the first and last map of a stage. Yim et al. (2017), A gift from knowledge distillation, has the sum;
    RepDistiller takes the mean, as here, torchdistill the norms of the columns of $G_s - G_t$, not squared.

    The maps are `[batch, *space, channels]`: student and teacher have the same
    channels, else ShapeError; sizes may differ. pool: how the larger map of a stage is brought to the smaller:
    `max_pool` as in the paper and torchdistill, `average_pool` as in RepDistiller. Returns `[batch]`.
    """
    for name, student, teacher in (("first", student_first, teacher_first), ("last", student_last, teacher_last)):
        s, t = as_pair(student, teacher)
        if s.shape[-1] != t.shape[-1]:
            raise ShapeError(
                f"{both(s, t)} of the {name} layer differ in channels, and FSP has no projector: choose others"
            )
    flows = _flow(student_first, student_last, pool) - _flow(teacher_first, teacher_last, pool)
    return _mean(jnp.square(flows))


def ft(student: Features, teacher: Features, *, exponent: Scalar = 1.0) -> Values:
    r"""Factor transfer: the mean over a factor's elements of $|u_s - u_t|^p$, $u = f / \|f\|_2$. `[batch]`.

    Kim et al. (2018), https://arxiv.org/abs/1802.04977, whose sum the authors' code and torchdistill divide by
    the number of elements, as here. RepDistiller compares the attention maps of the factors instead, as `at` does.

    student: the translator's factor. teacher: the paraphraser's. Both of one shape `[batch, *space, channels]`, else
    ShapeError. A factor of zeros has u = 0. exponent: p.
    """
    student, teacher = as_same(student, teacher, "the translator must make factors of the paraphraser's shape")
    axes = tuple(range(1, student.ndim))
    return _mean(power(unit(student, axes) - unit(teacher, axes), exponent))


def ickd(student: Features, teacher: Features, *, weights: Features | None = None) -> Values:
    r"""Inter-channel correlation (ICKD-C): $\|G_s - G_t\|_F^2 / C$, rows of $G = F F^T$ of length 1. `[batch]`.

    F is an example's map, channels by positions. Liu et al. (2021), https://arxiv.org/abs/2202.03680; the
    authors' CIFAR code has this mean; their ImageNet code and torchdistill divide by the batch once more.

    student: embedded, say by a 1x1 convolution. teacher. `[batch, *space, channels]`, with the same channels, else
    ShapeError; sizes may differ. weights: `[batch]`: a weight of 0 makes an example absent, with the value 0. No value
    depends on other examples.
    """
    student, teacher = as_pair(student, teacher)
    same_channels(student, teacher)
    weighting = as_weights(weights, student)
    s, t = (_gram(weighting.only(features)) for features in (student, teacher))
    return jnp.sum(jnp.square(s - t), axis=(1, 2)) / student.shape[-1]


def cat_kd(student: Features, teacher: Features, *, resolution: int = 2, normalised: bool = True) -> Values:
    r"""Class attention transfer: mean squared error of class activation maps pooled to `resolution`. `[batch]`.

    Guo et al. (2023), https://arxiv.org/abs/2304.12777. Maps are average-pooled, then each class's map is divided by
    its length where `normalised`; a map of zeros stays. The authors' weights for some pairs hold without it.

    student, teacher: `[batch, *space, classes]`: see `class_activation_maps`; sizes may differ, classes may not. An
    axis of fewer positions stays as it is, so both need the same then. Raises ShapeError.
    """
    student, teacher = as_pair(student, teacher)
    same_channels(student, teacher)
    if resolution < 1:
        raise ShapeError(f"a resolution of {resolution} has no positions: give at least 1")
    student, teacher = (average_pool(f, [min(resolution, n) for n in f.shape[1:-1]]) for f in (student, teacher))
    student, teacher = as_same(student, teacher, f"at the resolution {resolution}: choose a smaller one")
    if normalised:
        axes = tuple(range(1, student.ndim - 1))
        student, teacher = unit(student, axes), unit(teacher, axes)
    return _mean(jnp.square(student - teacher))


def class_activation_maps(features: Features, kernel: Features) -> Array:
    """Class activation maps for `cat_kd`: of `[batch, *space, channels]` and a classifier's `[channels, classes]`.

    Their means over the space are the logits without bias. So a network keeps its pooling and linear layer.
    """
    features = as_features(features)
    kernel = jnp.asarray(kernel, features.dtype)
    if kernel.ndim != 2 or kernel.shape[0] != features.shape[-1]:
        raise ShapeError(
            f"a kernel {list(kernel.shape)} does not fit features {list(features.shape)}: "
            f"give [{features.shape[-1]}, classes]"
        )
    return dot(features, kernel.T)


def wkd_f(
    student: Features, teacher: Features, *, ratio: Scalar = 2.0, grid: int = 1, epsilon: Scalar = 1e-5
) -> Values:
    r"""WKD-F: $\sum_c \rho (\mu_s - \mu_t)^2 + (\sigma_s - \sigma_t)^2$ of means and deviations. `[batch]`.

    The squared 2-Wasserstein distance of Gaussians with diagonal covariances, its mean part weighted by `ratio`.
    Lv et al. (2024), https://arxiv.org/abs/2412.08139. $\sigma = \sqrt{v + \epsilon}$, v with n - 1 as
    in the authors' code. With grid > 1, the mean over grid^n cells of the map.

    student: projected. teacher. `[batch, *space, channels]`, with the same channels; sizes may differ. Raises
    ShapeError where a cell has one position, which has no deviation. Usual weights: 0.02, ratio 2.
    """
    student, teacher = as_pair(student, teacher)
    same_channels(student, teacher)
    (mean, deviation), (teacher_mean, teacher_deviation) = (_gaussians(f, grid, epsilon) for f in (student, teacher))
    gaps = jnp.asarray(ratio, mean.dtype) * jnp.square(mean - teacher_mean) + jnp.square(deviation - teacher_deviation)
    return jnp.mean(jnp.sum(gaps, axis=-1), axis=-1)


def reviewkd(student: Features, teacher: Features, *, levels: Sequence[int] = (4, 2, 1)) -> Values:
    r"""ReviewKD's hierarchical context loss of one stage: $\sum_i 2^{-i} m_i / \sum_i 2^{-i}$, `[batch]`.

    $m_0$ is the mean squared error of the maps, $m_1, m_2, \dots$ that of the maps average-pooled to each of `levels`
    that is smaller than the map. Chen et al. (2021), https://arxiv.org/abs/2104.09044. Public code looks
    at the height alone; here an axis that is no larger than a level stays, and a level that changes none is left out.

    student: what the fusion made of the student's stages (`reviewkd_fuse`). teacher. Both of one shape
    `[batch, *space, channels]`, else ShapeError.
    """
    student, teacher = as_same(student, teacher, "the fusion must give the teacher's shape")
    value, weight, total = _mean(jnp.square(student - teacher)), 1.0, 1.0
    for level in levels:
        space = [min(level, size) for size in student.shape[1:-1]]
        if space != list(student.shape[1:-1]):
            weight /= 2
            total += weight
            value += weight * _mean(jnp.square(average_pool(student, space) - average_pool(teacher, space)))
    return value / total


def _attention(features: Array, exponent: Scalar) -> Array:
    """The attention map of each example, of length 1: `[batch, positions]`."""
    features = scaled(features, tuple(range(1, features.ndim)))
    return unit(jnp.mean(power(features, exponent), axis=-1).reshape(features.shape[0], -1))


def _channels(features: Array) -> Array:
    """`[batch, channels, positions]`."""
    return jnp.swapaxes(features.reshape(features.shape[0], -1, features.shape[-1]), 1, 2)


def _gram(features: Array) -> Array:
    """The products of an example's channels, with rows of length 1: `[batch, channels, channels]`."""
    channels = _channels(scaled(features, tuple(range(1, features.ndim))))
    return unit(dot(channels, channels))


def _flow(first: Features, last: Features, pool: Pool) -> Array:
    """The FSP matrix: `[batch, first channels, last channels]`."""
    first, last = (_channels(features) for features in match_space(first, last, pool))
    return dot(first, last) / first.shape[-1]


def _gaussians(features: Array, grid: int, epsilon: Scalar) -> tuple[Array, Array]:
    """Means and deviations of the cells of a map: `[batch, cells, channels]` each."""
    space = features.shape[1:-1]
    counts = [min(cell.stop - cell.start for cell in cells(size, grid)) if grid > 0 else 0 for size in space]
    smallest = int(np.prod(counts))
    if smallest < 2:
        raise ShapeError(
            f"a grid of {grid} over features {list(features.shape)} leaves cells of {smallest} positions, and "
            "deviations need 2: choose a smaller grid of at least 1, or a larger map"
        )
    blocks = [features]
    for axis, size in enumerate(space, start=1):
        blocks = [block[(slice(None),) * axis + (cell,)] for block in blocks for cell in cells(size, grid)]
    axes = range(1, features.ndim - 1)
    means = jnp.stack([jnp.mean(block, axis=axes) for block in blocks], axis=1)
    variances = jnp.stack([jnp.var(block, axis=axes, ddof=1) for block in blocks], axis=1)
    variances += jnp.asarray(epsilon, features.dtype)
    return means, jnp.sqrt(variances)


def _mean(values: Array) -> Array:
    return jnp.mean(values, axis=range(1, values.ndim))
