"""Relation losses: how the examples of a batch lie to each other, in the student as in the teacher.

They couple the batch: give them the global one, whatever the devices (arrays sharded under `jit` are; under `shard_map`
gather first). Values are `[batch]` and their mean is the paper's loss. `weights` `[batch]` are relative: equal ones
give the loss of the examples that have any; an example of weight 0 is absent, with the value 0, even if it holds NaN.
Features `[batch, ...]` are taken as one vector for each example; student and teacher may have different lengths,
except where element is compared with element. A batch of one example has no relations: its value is 0, or as said.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array

from kd_jax.errors import ShapeError
from kd_jax.losses.maps import Features, Scalar, Values, as_flat, both
from kd_jax.losses.vectors import Weights, as_weights, dot, for_each, largest, power, root, scaled, smooth_l1, unit


def sp(student: Features, teacher: Features, *, weights: Features | None = None) -> Values:
    r"""Similarity preserving: $\frac{1}{B^2} \|G_s - G_t\|_F^2$, rows of $G = F F^T$ divided by their length.

    Tung & Mori (2019), https://arxiv.org/abs/1907.09682. RepDistiller, mdistiller and torchdistill are the
    same. Each value is a row's: $\frac{1}{B} \sum_j (G_s - G_t)_{ij}^2$. Couples the batch, see the module.

    student, teacher: `[batch, ...]`. weights: `[batch]`. Returns `[batch]`.
    """
    student, teacher, weighting = _present(student, teacher, weights)
    roots = root(weighting.relative)
    gap = _rows(student, roots) - _rows(teacher, roots)
    return weighting.only(jnp.sum(jnp.square(gap), axis=-1) / weighting.present_count)


def rkd_distance(student: Features, teacher: Features, *, weights: Features | None = None) -> Values:
    r"""Relational KD of distances: the mean over pairs (i, j) of $\mathrm{huber}(d_{s,ij} - d_{t,ij})$.

    d is $\|f_i - f_j\|_2$ divided by the mean of the batch's positive ones. Park et al. (2019),
    https://arxiv.org/abs/1904.05068. Public code takes the mean over all B^2 pairs, also i = j, as
    here; it computes d from inner products, which loses the small ones, and counts those of equal examples as 1e-6.
    Couples the batch, see the module. The gradient is 0 where a distance is 0.

    student, teacher: `[batch, ...]`. weights: `[batch]`. Returns `[batch]`, values by i. Usual weight: 25.
    """
    student, teacher, weighting = _present(student, teacher, weights)
    gap = _distances(student, weighting) - _distances(teacher, weighting)
    return weighting.only(weighting.mean(smooth_l1(gap)))


def rkd_angle(student: Features, teacher: Features, *, weights: Features | None = None) -> Values:
    r"""Relational KD of angles: the mean over triples of $\mathrm{huber}(\cos_s - \cos_t)$ of the angle at example i.

    $\cos = e_{ij} \cdot e_{ik}$, $e_{ij} = (f_j - f_i) / \|f_j - f_i\|_2$, 0 for equal examples. Park et al. (2019),
    https://arxiv.org/abs/1904.05068. The mean is over all B^3 triples, as in public code.
    Couples the batch, see the module. Large batches are computed in blocks of i, never B^3 numbers at once.

    student, teacher: `[batch, ...]`. weights: `[batch]`. Returns `[batch]`, values by i. Usual weight: 50.
    """
    student, teacher, weighting = _present(student, teacher, weights)

    def at_vertex(vertices: tuple[Array, Array]) -> Array:
        cosines = [_cosines(features - x[None]) for features, x in zip((student, teacher), vertices, strict=True)]
        return weighting.mean(weighting.mean(smooth_l1(cosines[0] - cosines[1])))

    elements = student.shape[0] * max(student.shape[0], student.shape[1], teacher.shape[1])
    return weighting.only(for_each(at_vertex, (student, teacher), elements=elements))


def pkt(student: Features, teacher: Features, *, epsilon: Scalar = 1e-7, weights: Features | None = None) -> Values:
    r"""Probabilistic knowledge transfer: the mean over pairs (i, j) of $q_t \log((q_t + \epsilon) / (q_s + \epsilon))$.

    $q_{ij}$ is $(1 + \cos(f_i, f_j)) / 2$ divided by its sum over j. Passalis & Tefas (2018),
    https://arxiv.org/abs/1803.10837; the mean over B^2 and the i = j are of the authors' code, RepDistiller and
    mdistiller. These add epsilon to the norms as well. A vector of zeros has the cosine 0 with all. Values by i.
    Couples the batch, see the module: also in size, as 1 / B.

    student, teacher: `[batch, ...]`. weights: `[batch]`. Returns `[batch]`. Usual weight: 30000.
    """
    student, teacher, weighting = _present(student, teacher, weights)
    s, t = _neighbours(student, weighting), _neighbours(teacher, weighting)
    epsilon = jnp.asarray(epsilon, s.dtype)
    # The ratio's logarithm from the difference keeps its digits where the two are close.
    divergence = weighting.mean(-t * jnp.log1p((s - t) / (t + epsilon)))
    return weighting.only(divergence)


def cc(student: Features, teacher: Features, *, weights: Features | None = None) -> Values:
    r"""Correlation congruence, authors' code: the mean of $\sum_d \delta_{b,d} \, \delta_{b+1,d}$, $\delta = |s - t|$.

    Over the B - 1 neighbours in the batch's order, and among the examples that are present. Peng et al. (2019),
    https://arxiv.org/abs/1904.01802; RepDistiller has this form, with its weight 0.02. The paper's own equation is
    `cc_gaussian`; torchdistill's is its root. Couples the batch, see the module. A batch of one has the value 0.

    student, teacher: embeddings of the same shape `[batch, ...]`, else ShapeError. weights: `[batch]`; a pair counts by
    the product of its two. Returns `[batch]`: the pair of an example and the next; 0 for the last.
    """
    student, teacher, weighting = _present(student, teacher, weights)
    _same_length(student, teacher)
    size = student.shape[0]
    # The next example that is present; the last one's is `size`, of weight 0.
    here = jnp.where(weighting.present, jnp.arange(size), size)
    following = jnp.append(jax.lax.cummin(here, reverse=True)[1:], size)
    gap = jnp.abs(student - teacher)
    products = jnp.sum(gap * jnp.take(gap, following, axis=0, mode="fill", fill_value=0), axis=-1)
    pairs = jnp.take(weighting.relative, following, mode="fill", fill_value=0)
    total = jnp.sum(pairs * weighting.relative)
    return weighting.only(products * pairs * weighting.present_count / jnp.where(total > 0, total, 1))


def cc_gaussian(
    student: Features,
    teacher: Features,
    *,
    gamma: Scalar = 0.4,
    order: int = 2,
    weights: Features | None = None,
) -> Values:
    r"""Correlation congruence, the paper's: $\frac{1}{B^2} \sum_{ij} (K_s - K_t)_{ij}^2$ of a Gaussian kernel's series.

    $K_{ij} = e^{-2\gamma} \sum_{p=0}^{P} \frac{(2\gamma)^p}{p!} (u_i \cdot u_j)^p$, u = f divided by its length: it is
    $e^{-\gamma \|u_i - u_j\|^2}$ to order P. Peng et al. (2019), https://arxiv.org/abs/1904.01802.
    torchdistill has its square root, divided by B^2. Couples the batch, see the module. Values by i.

    student, teacher: `[batch, ...]`. order: P. weights: `[batch]`. Returns `[batch]`.
    """
    student, teacher, weighting = _present(student, teacher, weights)
    gamma = jnp.asarray(gamma, student.dtype)
    gap = _kernel(student, gamma, order) - _kernel(teacher, gamma, order)
    return weighting.only(weighting.mean(jnp.square(gap)))


def srd(
    student: Features,
    teacher: Features,
    *,
    exponent: Scalar = 4.0,
    epsilon: Scalar = 1e-5,
    variance_epsilon: Scalar = 1e-4,
    weights: Features | None = None,
) -> Values:
    r"""SRD, the simple recipe: $\log(\epsilon + \sum_{b,d} |z_s - z_t|^\alpha)$, z batch-normalised without a scale.

    Miles & Mikolajczyk (2024), https://arxiv.org/abs/2303.11098. Couples the batch, see the module: the logarithm is of
    the whole, so each value is the same. It is log B larger for a batch B times as large, and not additive over
    shards: public code takes it on each device. epsilon is of the authors' DeiT code; without it, as in their
    ImageNet code and torchdistill, equal features give -inf and NaN gradients. Of one example, it is log epsilon.

    student: the linear projector's output. teacher. The same shape `[batch, ...]`, else ShapeError.
    variance_epsilon: added to the variances. weights: `[batch]`. Returns `[batch]`.
    """
    student, teacher, weighting = _present(student, teacher, weights)
    _same_length(student, teacher)
    constant = jnp.asarray(variance_epsilon, student.dtype)
    gap = _batch_normalised(student, weighting, constant) - _batch_normalised(teacher, weighting, constant)
    total = weighting.present_count * weighting.mean(jnp.sum(weighting.only(power(gap, exponent)), axis=-1))
    total += jnp.asarray(epsilon, student.dtype)
    # Without an epsilon, equal features have no logarithm; then the smallest number's stands for it.
    smallest = jnp.finfo(total.dtype).tiny
    value = jnp.log(jnp.where(total > smallest, total, smallest))
    return weighting.only(jnp.broadcast_to(value, student.shape[:1]))


def _present(student: Features, teacher: Features, weights: Features | None) -> tuple[Array, Array, Weights]:
    """One vector for each example; those of absent ones are 0."""
    student, teacher = as_flat(student, teacher)
    weighting = as_weights(weights, student)
    return weighting.only(student), weighting.only(teacher), weighting


def _same_length(student: Array, teacher: Array) -> None:
    if student.shape != teacher.shape:
        raise ShapeError(f"{both(student, teacher)} differ in shape: embed both in the same number of dimensions")


def _rows(features: Array, roots: Array) -> Array:
    """Similarities of the examples, each row of length 1, columns weighted by their roots."""
    features = scaled(features)
    return unit(dot(features, features) * roots[None])


def _distances(features: Array, weighting: Weights) -> Array:
    """Distances of the examples, divided by the mean of the positive ones."""
    size = largest(features)

    def to_all(x: Array) -> Array:
        # Scaled after the difference: equal examples are at the distance 0 exactly, however this is compiled.
        return jnp.sum(jnp.square((features - x[None]) / size), axis=-1)

    squared = for_each(to_all, features, elements=features.size)
    distances = root(squared)
    pairs = jnp.where(squared > 0, weighting.relative[:, None] * weighting.relative[None], 0)
    total, sum_ = jnp.sum(pairs), jnp.sum(pairs * distances)
    return jnp.where(total > 0, distances * total / jnp.where(total > 0, sum_, 1), 0)


def _cosines(differences: Array) -> Array:
    """Cosines between all pairs of differences from one example."""
    units = unit(differences)
    return dot(units, units)


def _neighbours(features: Array, weighting: Weights) -> Array:
    """Similarities in [0, 1] divided by their sums, `[batch, batch]`."""
    units = unit(features)
    similarities = (dot(units, units) + 1) / 2
    return similarities / (weighting.present_count * weighting.mean(similarities))[:, None]


def _kernel(features: Array, gamma: Array, order: int) -> Array:
    """The Gaussian kernel of unit vectors, its series to `order`."""
    units = unit(features)
    exponents = 2 * gamma * dot(units, units)
    series = jnp.ones_like(exponents)
    for p in range(order, 0, -1):
        series = 1 + exponents * series / p
    return jnp.exp(-2 * gamma) * series


def _batch_normalised(features: Array, weighting: Weights, epsilon: Array) -> Array:
    mean = weighting.mean(features.T)
    centred = features - mean[None]
    variance = weighting.mean(jnp.square(centred).T) + epsilon
    return centred / jnp.sqrt(jnp.where(variance == 0, 1, variance))[None]
