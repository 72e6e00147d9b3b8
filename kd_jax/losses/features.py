"""Feature losses that compare a student's map with a teacher's, element by element: one value for each example.

What is learned (a regressor, a projector, variances) is applied by the caller or given as an argument. Features are
`[batch, *space, channels]`. For losses of a summary of a map see `summaries`, of pairs of examples `relations`.
"""

import jax
import jax.numpy as jnp
from jax.scipy.stats import norm
from jaxtyping import Array

from kd_jax.errors import ShapeError
from kd_jax.losses.maps import (
    Features,
    Scalar,
    Values,
    as_features,
    as_pair,
    as_same,
    average_pool,
    both,
    per_channel,
    wide,
)
from kd_jax.losses.vectors import smooth_l1


def fitnet(student: Features, teacher: Features) -> Values:
    r"""FitNets' hint loss: the mean over an example's elements of $(r(s) - t)^2$, `[batch]`.

    Romero et al. (2015), https://arxiv.org/abs/1412.6550, has half the sum;
    RepDistiller, mdistiller and torchdistill take the mean, as here.

    student: the regressed hint $r(s)$. teacher: t. Both of one shape `[batch, *space, channels]`, else ShapeError.
    """
    student, teacher = as_same(
        student, teacher, "apply a regressor to the student's, say match_space and a convolution"
    )
    return _mean(jnp.square(student - teacher))


def vid(mean: Features, teacher: Features, variance: Features, *, epsilon: Scalar = 1e-5) -> Values:
    r"""Variational information distillation: the mean of $\frac12 [(\mu(s) - t)^2 / \sigma_c^2 + \log \sigma_c^2]$.

    $\sigma_c^2 = \log(1 + e^{a_c}) + \epsilon$. Ahn et al. (2019), https://arxiv.org/abs/1904.05835, with
    the mean over the elements as in RepDistiller and mdistiller. These overflow for a > 88, and
    mdistiller leaves a out of its optimiser: it never moves there. Train `variance` with the student.

    mean: $\mu(s)$, the regressed student. teacher: t. Both of one shape `[batch, *space, channels]`, else ShapeError.
    variance: a, `[channels]`, before the softplus; `vid_variance` has the usual start. Returns `[batch]`.
    """
    mean, teacher = as_same(mean, teacher, "apply match_space, then a regressor, to the student's")
    variance = jax.nn.softplus(per_channel(variance, "variance", mean)) + jnp.asarray(epsilon, mean.dtype)
    surprise = jnp.square(mean - teacher) / _over(variance, mean) + _over(jnp.log(variance), mean)
    return _mean(surprise) / 2


def vid_variance(channels: int, *, start: float = 5.0, epsilon: float = 1e-5) -> Array:
    """The parameters of `vid` whose variances are `start`, `[channels]`: the inverse softplus of start - epsilon."""
    raw = jnp.asarray(start - epsilon)
    return jnp.broadcast_to(raw + jnp.log(-jnp.expm1(-raw)), (channels,))


def ab(student: Features, teacher: Features, *, margin: Scalar = 1.0) -> Values:
    r"""Activation boundaries: $\sum (s + m)^2 [s > -m, t \le 0] + (s - m)^2 [s \le m, t > 0]$, `[batch]`.

    Heo et al. (2019), https://arxiv.org/abs/1811.03233: of values before the ReLU. The sum over the elements,
    as in the paper; the authors' code weighs stage i of n by 2^(i - n) and all by 3/1000.

    student: connected to the teacher's shape, s. teacher: t. Both `[batch, *space, channels]`, else ShapeError.
    """
    student, teacher = as_same(
        student, teacher, "apply a connector to the student's, say match_space and a convolution"
    )
    margin = jnp.asarray(margin, student.dtype)
    active = teacher > 0
    beyond = jnp.where(active, student > margin, student <= -margin)
    return _sum(jnp.where(beyond, 0, jnp.square(student + jnp.where(active, -margin, margin))))


def ofd(student: Features, teacher: Features, margin: Features) -> Values:
    r"""Overhaul's partial L2 with a margin ReLU: $\sum (s - u)^2 [s > u \text{ or } u > 0]$, $u = \max(t, m_c)$.

    Heo et al. (2019), https://arxiv.org/abs/1904.01866: of values before the ReLU, after batch normalisation.
    Where the teacher is negative, a student that is lower still is right. The sum, as in the paper.
    The authors' code weighs all by 1e-3 / batch and stages by powers of 2.

    student: connected to the teacher's channels, s. teacher: t; the larger of its sizes is average-pooled to the
    student's. `[batch, *space, channels]`. margin: m <= 0, `[channels]`: see `ofd_margin`. Returns `[batch]`.
    """
    student, teacher = _pooled_to_student(student, teacher)
    target = jnp.maximum(teacher, _over(per_channel(margin, "margin", teacher), teacher))
    counts = (student > target) | (target > 0)
    return _sum(jnp.where(counts, jnp.square(student - target), 0))


def ofd_margin(mean: Features, deviation: Features) -> Array:
    r"""The margins of `ofd`: $E[x | x < 0]$ for $x \sim N(\mu, \sigma)$, `[channels]`.

    $\mu - \sigma \, \varphi(\mu / \sigma) / \Phi(-\mu / \sigma)$: of the batch normalisation before the ReLU, $\mu$ is
    the bias and $\sigma$ the size of the scale. The authors' code and mdistiller put -3 sigma where Phi is below 0.001.
    Where sigma is 0: the smaller of mu and 0.
    """
    mean = jnp.asarray(mean)
    mean = mean.astype(wide(mean))
    deviation = jnp.abs(jnp.asarray(deviation, mean.dtype))
    ratio = mean / jnp.where(deviation == 0, 1, deviation)
    near, far = jnp.minimum(ratio, 2), jnp.maximum(ratio, 2)
    direct = near - jnp.exp(norm.logpdf(near) - norm.logcdf(-near))
    # Far from 0 that difference cancels; the continued fraction of Mills' ratio gives it as it is.
    fraction = far
    for k in range(40, 1, -1):
        fraction = far + k / fraction
    expected = deviation * jnp.where(ratio < 2, direct, -1 / fraction)
    return jnp.where(deviation == 0, jnp.minimum(mean, 0), expected)


def simkd(student: Features, teacher: Features) -> Values:
    r"""SimKD: the mean of $(p(s) - t)^2$ over an example's elements, for a student that keeps the teacher's classifier.

    Chen et al. (2022), https://arxiv.org/abs/2203.14001. `[batch]`.

    student: the projected features $p(s)$: pool them with `match_space` before the projector. teacher: t, of the layer
    before the classifier; where it is larger it is average-pooled. `[batch, *space, channels]`, else ShapeError.
    """
    student, teacher = _pooled_to_student(student, teacher)
    return _mean(jnp.square(student - teacher))


def mgd(generated: Features, teacher: Features) -> Values:
    r"""Masked generative distillation: $\sum (g(f \cdot m) - t)^2$ of an example, a sum, as in the paper. `[batch]`.

    Yang et al. (2022), https://arxiv.org/abs/2205.01529. Usual weights: 7e-5 to classify, 2e-5 to detect.

    generated: what the learned block g, two 3x3 convolutions with a ReLU between, made of the masked student: see
    `mask_channels` and `mask_positions`. teacher: t. Both of one shape `[batch, *space, channels]`, else ShapeError.
    """
    generated, teacher = as_same(generated, teacher, "align the student's with the teacher before the mask")
    return _sum(jnp.square(generated - teacher))


def mask_channels(key: Array, features: Features, *, ratio: Scalar = 0.15) -> Array:
    """The features with each channel of each example put to 0 with probability `ratio`: `mgd`'s mask to classify."""
    features = as_features(features)
    return _masked(key, features, (features.shape[0], *(1,) * (features.ndim - 2), features.shape[-1]), ratio)


def mask_positions(key: Array, features: Features, *, ratio: Scalar = 0.65) -> Array:
    """The features with each position of each example put to 0 with probability `ratio`: `mgd`'s mask to detect."""
    features = as_features(features)
    return _masked(key, features, (*features.shape[:-1], 1), ratio)


def vkd(student: Features, teacher: Features, *, epsilon: Scalar = 1e-5) -> Values:
    r"""VkD: the mean of smooth L1 of $P s - \mathrm{LayerNorm}(t)$ over an example's elements, `[batch]`.

    Miles et al. (2024), https://arxiv.org/abs/2403.06213: P is orthogonal (`orthogonal`), and the teacher alone is
    normalised over its channels, without scale and bias. Features are first averaged over tokens or space.

    student: projected, P s. teacher: t. Both of one shape `[batch, *space, channels]`, else ShapeError.
    epsilon: added to the teacher's variance.
    """
    student, teacher = as_same(student, teacher, "average both over tokens or space, then project the student's")
    centred = teacher - jnp.mean(teacher, axis=-1, keepdims=True)
    variance = jnp.mean(jnp.square(centred), axis=-1, keepdims=True) + jnp.asarray(epsilon, teacher.dtype)
    return _mean(smooth_l1(student - centred / jnp.sqrt(jnp.where(variance == 0, 1, variance))))


def _masked(key: Array, features: Array, shape: tuple[int, ...], ratio: Scalar) -> Array:
    kept = jax.random.bernoulli(key, 1 - jnp.asarray(ratio, jnp.float32), shape)
    return jnp.where(kept, features, 0)


def _pooled_to_student(student: Features, teacher: Features) -> tuple[Array, Array]:
    """The teacher's map at the size of the student's, which is not the larger on any axis."""
    student, teacher = as_pair(student, teacher)
    if student.ndim == teacher.ndim and all(
        s <= t for s, t in zip(student.shape[1:-1], teacher.shape[1:-1], strict=True)
    ):
        teacher = average_pool(teacher, student.shape[1:-1])
    if student.shape != teacher.shape:
        raise ShapeError(f"{both(student, teacher)} differ: apply match_space, then a projector, to the student's")
    return student, teacher


def _over(channels: Array, features: Array) -> Array:
    """Numbers of channels, with the axes of `features`."""
    return channels.reshape((1,) * (features.ndim - 1) + (-1,))


def _mean(values: Array) -> Array:
    return jnp.mean(values, axis=range(1, values.ndim))


def _sum(values: Array) -> Array:
    return jnp.sum(values, axis=range(1, values.ndim))
