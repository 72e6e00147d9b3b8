"""Methods with learned blocks: each is its loss of what the blocks make, in any arithmetic, alone and in a grid."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kd_jax as kd
from kd_jax import losses
from kd_jax.errors import MethodError, ShapeError
from kd_jax.methods import blocks
from kd_jax.methods.base import as_parts, terms_of

pytestmark = pytest.mark.usefixtures("quick_compiling")
RNG = np.random.default_rng(7)
KEY, STEP = jax.random.key(3), jnp.int32(2)
SIZE = 4


def arrays(**shapes: tuple[int, ...]) -> kd.Output:
    features = {name: jnp.asarray(RNG.normal(size=(SIZE, *shape)), jnp.float32) for name, shape in shapes.items()}
    return kd.Output(jnp.zeros((SIZE, 3)), features)


STUDENT = arrays(a=(4, 4, 5), b=(2, 2, 3), flat=(6,), scores=(2, 3, 3), tokens=(3, 8), keys=(3, 8), cam=(4, 4, 3))
TEACHER = arrays(a=(4, 4, 6), b=(2, 2, 4), flat=(7,), scores=(2, 3, 3), tokens=(3, 4), keys=(3, 4), cam=(4, 4, 3))
SAME = arrays(a=(4, 4, 5), b=(2, 2, 3))
S, T = STUDENT.features, TEACHER.features
BATCH = kd.Batch(jnp.zeros((SIZE, 1)), jnp.zeros(SIZE, jnp.int32), None, jnp.arange(1, SIZE + 1))


def connected(learned: Any) -> Any:
    return blocks.connect(learned, S["a"])


def fused(learned: Any) -> Any:
    last = blocks.connect(learned[1]["before"], S["b"])
    first, upper = blocks.connect(learned[0]["before"], S["a"]), losses.resize_nearest(last, (4, 4))
    gates = jax.nn.sigmoid(blocks.convolve(learned[0]["gates"], jnp.concatenate([first, upper], -1)))
    first = losses.reviewkd_fuse(first, upper, gates)
    outs = [blocks.connect(own["after"], maps) for own, maps in zip(learned, (first, last), strict=True)]
    return losses.reviewkd(outs[0], T["a"]) + losses.reviewkd(outs[1], T["b"])


def calibrated(learned: Any) -> Any:
    def embedded(own: Any, features: Any) -> Any:
        rows = blocks.project(own[0], losses.semckd_similarities(features))
        found = blocks.project(own[1], jax.nn.relu(rows))
        length = jnp.linalg.norm(found, axis=-1, keepdims=True)
        return found / jnp.where(length == 0, 1, length)

    queries = jnp.stack([embedded(own, S[n]) for own, n in zip(learned["queries"], "b", strict=True)], 1)
    keys = jnp.stack([embedded(own, T[n]) for own, n in zip(learned["keys"], "ab", strict=True)], 1)
    attention = losses.semckd_attention(queries, keys)
    total = jnp.zeros(SIZE)
    for j, t in enumerate("ab"):
        own = learned["projectors"][0][j]
        ours, theirs = losses.match_space(S["b"], T[t])
        found = blocks.convolve(own["last"], blocks.through(own["inner"], ours))
        total += attention[:, 0, j] * losses.fitnet(found, theirs)
    return total


def factors(learned: Any) -> Any:
    def leaky(maps: Any) -> Any:
        return jnp.where(maps > 0, maps, 0.1 * maps)

    ours, theirs = (
        blocks.through(learned[who], maps, activation=leaky)
        for who, maps in (("translator", S["a"]), ("paraphraser", T["a"]))
    )
    return losses.ft(ours, theirs)


def generated(learned: Any, carried: Any) -> Any:
    aligned = blocks.convolve(learned["align"], S["a"])
    seen = losses.mask_channels(blocks.step_key(carried, STEP), aligned, ratio=0.15)
    return losses.mgd(blocks.convolve(learned["second"], jax.nn.relu(blocks.convolve(learned["first"], seen))), T["a"])


def contrasted(learned: Any, carried: Any) -> Any:
    rows = jnp.arange(1, SIZE + 1)
    negatives = losses.crd_negatives(blocks.step_key(carried["key"], STEP), rows, examples=9, negatives=5)
    ours, theirs = (blocks.project(learned[who], f["flat"]) for who, f in (("student", S), ("teacher", T)))
    return losses.crd(ours, theirs, carried["bank"], rows, negatives)[0]


def negative_means() -> Any:
    maps = np.float64(T["a"]).reshape(-1, 6)
    return jnp.asarray([column[column < 0].mean() for column in maps.T], jnp.float32)


# By the term's name: the method, the teacher, and what its value must be, of what it learns and carries.
CASES: dict[str, tuple[kd.Method, kd.Output, Callable[..., Any]]] = {
    "ab": (kd.AB("a"), TEACHER, lambda learned, _: losses.ab(connected(learned), T["a"])),
    "ickd": (kd.ICKD("a"), TEACHER, lambda learned, _: losses.ickd(connected(learned), T["a"])),
    "wkdf": (kd.WKDF("a", ratio=3.0), TEACHER, lambda one, _: losses.wkd_f(connected(one), T["a"], ratio=3.0)),
    "ofd": (kd.OFD("a"), TEACHER, lambda learned, _: losses.ofd(connected(learned), T["a"], negative_means())),
    "fsp": (
        kd.FSP("a", "b"), SAME,
        lambda learned, _: losses.fsp(S["a"], S["b"], SAME.features["a"], SAME.features["b"]),
    ),
    "ft": (kd.FT("a"), TEACHER, lambda learned, _: factors(learned)),
    "mgd": (kd.MGD("a"), TEACHER, generated),
    "vkd": (
        kd.VkD("a"), TEACHER,
        lambda p, _: losses.vkd(S["a"].mean((1, 2)) @ losses.orthogonal_exponential(p), T["a"].mean((1, 2))),
    ),
    "catkd": (kd.CATKD("cam"), TEACHER, lambda learned, _: losses.cat_kd(S["cam"], T["cam"])),
    "reviewkd": (kd.ReviewKD(("a", "b"), width=2), TEACHER, lambda learned, _: fused(learned)),
    "semckd": (kd.SemCKD("b", ("a", "b"), width=3), TEACHER, lambda learned, _: calibrated(learned)),
    "attentionmaps": (
        kd.AttentionMaps("scores"), TEACHER, lambda learned, _: losses.attention_maps(S["scores"], T["scores"])
    ),
    "minilm": (
        kd.MiniLM("tokens", heads=2, keys="keys"), TEACHER,
        lambda learned, _: losses.minilm_relations(
            S["tokens"], T["tokens"], heads=2, student_keys=S["keys"], teacher_keys=T["keys"]
        ),
    ),
    "crd": (kd.CRD("flat", examples=9, width=4, negatives=5), TEACHER, contrasted),
}  # fmt: skip


def values(method: kd.Method, learned: Any, carried: Any, student: kd.Output, teacher: Any, batch: Any = BATCH) -> Any:
    return terms_of(method, kd.Parts(learned, carried), student, teacher, batch, STEP)[0]


def parts_of(method: kd.Method, student: kd.Output = STUDENT, teacher: kd.Output = TEACHER) -> kd.Parts:
    """From shapes alone."""
    shapes = jax.eval_shape(lambda: (student, teacher))
    return jax.jit(lambda key: as_parts(method.init(key, *shapes), method))(KEY)


@pytest.mark.parametrize("name", CASES)
def test_the_term_is_the_loss_of_what_is_learned(name: str) -> None:
    """With a gradient, in a grid of its numbers, in bfloat16, and where an example is absent."""
    method, teacher, wanted = CASES[name]
    learned, carried = parts_of(method, teacher=teacher)
    leaves, structure = jax.tree.flatten(method)
    absent = BATCH._replace(weights=jnp.asarray([1, 1, 0, 1], jnp.float32))

    @jax.jit
    def everything(learned: Any, carried: Any, student: kd.Output, numbers: Any) -> Any:
        def total(learned: Any, features: Any, numbers: Any) -> Any:
            own = jax.tree.unflatten(structure, numbers)
            found = values(own, learned, carried, kd.Output(student.logits, features), teacher)
            return sum(jnp.mean(one) for one in found.values()), found

        (_, found), gradients = jax.value_and_grad(total, argnums=(0, 1), has_aux=True)(
            learned, student.features, [jnp.asarray(one) for one in leaves]
        )
        grid = jax.vmap(lambda own: total(learned, student.features, own)[1][name])(numbers) if leaves else None
        narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16), (student.features, teacher.features))
        low = values(
            method, learned, carried, kd.Output(student.logits, narrow[0]), teacher._replace(features=narrow[1])
        )
        other = jax.tree.map(lambda x: x.at[2].set(9.0), student)
        without = [values(method, learned, carried, one, teacher, absent)[name] for one in (student, other)]
        return found, gradients, grid, low, without, wanted(learned, carried)

    numbers = [jnp.stack([jnp.asarray(one), jnp.asarray(2 * one)]) for one in leaves]
    found, (by_learned, by_features), grid, low, without, expected = everything(learned, carried, STUDENT, numbers)
    np.testing.assert_allclose(found[name], expected, rtol=2e-5, atol=1e-6)
    assert set(found) == ({name, "reconstruction"} if name == "ft" else {name})
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((by_learned, by_features)))
    for leaf in jax.tree.leaves(by_learned):
        # A bias before a normalisation moves nothing.
        assert leaf.ndim < 2 or (np.asarray(leaf) != 0).any()
    for path in method.student_features:
        assert (np.asarray(by_features[path]) != 0).any()
    if leaves:
        np.testing.assert_allclose(grid[0], found[name], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(np.mean(low[name]), np.mean(found[name]), rtol=0.1, atol=0.02)
    kept = np.array([0, 1, 3])
    np.testing.assert_allclose(without[0][kept], without[1][kept], rtol=1e-5, atol=1e-6)
    if not method.couples_batch:
        np.testing.assert_allclose(without[0][kept], found[name][kept], rtol=1e-5, atol=1e-6)


ALONE: dict[str, tuple[kd.Method, kd.Output]] = {
    "ab": (kd.AB("flat"), TEACHER),
    "ofd": (kd.OFD("flat"), TEACHER),
    "fsp": (kd.FSP("a", "b"), SAME),
    "vkd": (kd.VkD("flat", parametrisation="cayley"), TEACHER),
    "minilm": (kd.MiniLM("tokens", heads=2), TEACHER),
    "crd": (kd.CRD("flat", examples=9, width=4, negatives=5), TEACHER),
}


@pytest.mark.parametrize("name", ALONE)
def test_a_batch_of_one_is_finite(name: str) -> None:
    """Of one position, where nothing varies."""
    method, teacher = ALONE[name]
    one, other = (jax.tree.map(lambda x: x[:1], given) for given in (STUDENT, teacher))
    learned, carried = parts_of(method, one, other)
    batch = kd.Batch(jnp.zeros((1, 1)), None, None, jnp.zeros(1, jnp.int32))

    def total(learned: Any, features: Any) -> Any:
        found = values(method, learned, carried, kd.Output(one.logits, features), other, batch)
        return sum(jnp.mean(value) for value in found.values())

    for leaf in jax.tree.leaves(jax.jit(jax.value_and_grad(total, argnums=(0, 1)))(learned, one.features)):
        assert np.isfinite(leaf).all()


@pytest.mark.parametrize("name", CASES)
def test_without_a_teacher_it_says_so(name: str) -> None:
    method, teacher, _ = CASES[name]
    parts = jax.eval_shape(lambda: parts_of(method, teacher=teacher))
    with pytest.raises(MethodError, match="needs a teacher"):
        jax.eval_shape(lambda parts: values(method, *parts, STUDENT, None), parts)
    assert not method.compares_logits
    assert not method.needs_labels


@pytest.mark.parametrize(
    ("method", "match"),
    [
        (kd.FSP("a", "b", pool="min"), 'pool is \'min\': use "max" or "average"'),
        (kd.MGD("a", masked="rows"), 'masked is \'rows\': use "channels" or "positions"'),
        (kd.VkD("a", parametrisation="qr"), 'parametrisation is \'qr\': use "exponential" or "cayley"'),
        (kd.ReviewKD(("a", "b"), ("a",)), "ReviewKD has 2 features and 1 guides"),
        (kd.CRD("flat"), "CRD has a memory of 0 examples"),
        (kd.FSP("a", "b"), "differ in channels, and FSP has no projector"),
        (kd.WKDF("a", grid=4), "leaves cells of 1 positions"),
    ],
)
def test_what_does_not_fit_is_told(method: kd.Method, match: str) -> None:
    with pytest.raises((MethodError, ShapeError), match=match):
        jax.eval_shape(lambda: values(method, *as_parts(method.init(KEY, STUDENT, TEACHER), method), STUDENT, TEACHER))


def test_semckd_needs_one_size_of_the_batch() -> None:
    method = kd.SemCKD("a")
    learned = jax.eval_shape(lambda: parts_of(method)).learned
    one, other = (jax.eval_shape(lambda given: jax.tree.map(lambda x: x[:2], given), o) for o in (STUDENT, TEACHER))
    with pytest.raises(MethodError, match="began with batches of 4 examples, and this one has 2"):
        jax.eval_shape(lambda *given: values(method, *given, kd.Batch(jnp.zeros((2, 1)))), learned, (), one, other)


def test_factor_transfer_warms_up_and_keeps_its_paraphraser_to_itself() -> None:
    learned = parts_of(kd.FT("a")).learned

    @jax.jit
    def both(learned: Any) -> Any:
        def mean(own: Any) -> Any:
            return jnp.mean(values(kd.FT("a"), own, (), STUDENT, TEACHER)["ft"])

        return values(kd.FT("a", warmup=3), learned, (), STUDENT, TEACHER)["ft"], jax.grad(mean)(learned)

    early, by = both(learned)
    assert not np.asarray(early).any()
    assert not any(np.asarray(leaf).any() for name in ("paraphraser", "decoder") for leaf in jax.tree.leaves(by[name]))


def test_crd_moves_its_own_rows_and_takes_negatives_of_other_classes() -> None:
    labels = np.array([0, 0, 1, 1, 2, 2, 0, 1, 2])
    method = kd.CRD("flat", examples=9, width=4, negatives=5, labels=labels)
    learned, carried = parts_of(method)
    step = jax.jit(lambda parts: terms_of(method, parts, STUDENT, TEACHER, BATCH, STEP)[1])
    after = step(kd.Parts(learned, carried))
    moved = (np.asarray(after["bank"].student) != np.asarray(carried["bank"].student)).any(-1)
    np.testing.assert_array_equal(moved, [False, True, True, True, True, False, False, False, False])
    assert after["bank"].student_normaliser > 0
    np.testing.assert_array_equal(carried["order"].members, 3)
    with pytest.raises(MethodError, match="CRD needs the rows of the examples"):
        values(method, learned, carried, STUDENT, TEACHER, kd.Batch(jnp.zeros((SIZE, 1))))


def test_relations_stay_within_packed_sequences() -> None:
    segments = jnp.asarray([[1, 1, 2], [1, 2, 2], [1, 1, 1], [1, 2, 3]])
    batch = BATCH._replace(inputs={"tokens": jnp.zeros((SIZE, 3), jnp.int32), "segments": segments})
    for method, plain in (
        (
            kd.MiniLM("tokens", heads=2),
            lambda: losses.minilm_relations(S["tokens"], T["tokens"], heads=2, segments=segments),
        ),
        (kd.AttentionMaps("scores"), lambda: losses.attention_maps(S["scores"], T["scores"], segments=segments)),
    ):
        found = values(method, (), (), STUDENT, TEACHER, batch)
        np.testing.assert_allclose(next(iter(found.values())), plain(), rtol=1e-6)
        assert not np.allclose(
            next(iter(found.values())), next(iter(values(method, (), (), STUDENT, TEACHER).values()))
        )


def test_segments_of_a_text_leave_other_features_alone() -> None:
    inputs = {"tokens": jnp.zeros((SIZE, 5), jnp.int32), "segments": jnp.ones((SIZE, 5), jnp.int32)}
    batch = BATCH._replace(inputs=inputs)
    for method in (kd.MiniLM("tokens", heads=2), kd.AttentionMaps("scores")):
        for one, other in zip(
            values(method, (), (), STUDENT, TEACHER, batch).values(),
            values(method, (), (), STUDENT, TEACHER).values(),
            strict=True,
        ):
            np.testing.assert_array_equal(one, other)
