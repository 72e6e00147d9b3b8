"""Caches of a teacher: what is kept comes back by example and position, from memory and from disk, whole or damaged."""

import importlib.metadata
import json
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
from filelock import FileLock
from scipy import special
from small import SGD, Table, X, Y, assert_close, assert_same, net, table

import kd_jax as kd
from kd_jax.data import tokens
from kd_jax.errors import ConfigError, DataError, MethodError, MismatchError, OutputError
from kd_jax.teacher import answered, as_teacher
from kd_jax.teachers import disk, writing
from kd_jax.teachers import folder as folders
from kd_jax.train import caching

EXAMPLES, LENGTH, WIDTH, VOCABULARY = 11, 5, 6, 40
RNG = np.random.default_rng(3)
TOKENS = RNG.integers(0, VOCABULARY, (EXAMPLES, LENGTH)).astype(np.int32)
EMBEDDING = (2 * RNG.normal(size=(VOCABULARY, WIDTH))).astype(np.float32)
HEAD = RNG.normal(size=(WIDTH, VOCABULARY)).astype(np.float32)
LOGITS = np.tanh(EMBEDDING.astype(np.float64))[TOKENS] @ HEAD.astype(np.float64)
P = special.softmax(LOGITS, axis=-1)


def say(params: Any, tokens: Any) -> kd.Output:
    hidden = jnp.tanh(params["embedding"][tokens])
    return kd.Output(hidden @ params["head"], {"hidden": hidden})


MODEL = kd.from_function(say, {"embedding": EMBEDDING, "head": HEAD})
KINDS: dict[str, dict[str, Any]] = {
    "logits": {},
    "features": {"features": ("hidden",)},
    "bfloat16": {"dtype": jnp.bfloat16},
    "top-k": {"keep": "top-k", "k": 3},
    "samples": {"keep": "samples", "draws": 9},
    "weighted": {"keep": "samples", "draws": 9, "power": 0.7},
    "hidden": {"keep": "hidden", "hidden": "hidden", "head": HEAD},
}
SMALL = {"batch_size": 3, "shard_size": 4}


def cached(*, inputs: Any = TOKENS, teacher: Any = MODEL, **how: Any) -> Any:
    return kd.cached(teacher, inputs, **how)


def kept(folder: Path, **how: Any) -> Any:
    return cached(path=folder, **(SMALL | how))


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A good one of draws, to be copied before it is changed."""
    folder = tmp_path_factory.mktemp("good") / "cache"
    kept(folder, **KINDS["samples"])
    return folder


@pytest.fixture
def copy(cache: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(cache, tmp_path / "copy"))


@pytest.mark.parametrize("kind", KINDS)
def test_a_cache_on_disk_is_that_in_memory_whatever_its_batches(kind: str, tmp_path: Path) -> None:
    how, folder = KINDS[kind], tmp_path / "cache"
    whole, found = cached(**how), kept(folder, **how)
    assert sorted(path.name for path in folder.glob("shard*")) == [f"shard-0000{i}.safetensors" for i in range(3)]
    assert not list(folder.glob("*.partial")) + list(folder.glob(".*.partial"))
    assert (found.examples, found.per_example) == (EXAMPLES, True)
    rows = np.array([7, 0, 10, 7, 4])
    # Another batch size rounds otherwise.
    compare = assert_same if whole.sparse else assert_close
    if kind == "bfloat16":
        compare = partial(assert_close, rtol=1e-2)
    for known in (found, kd.open_cache(folder), kd.from_file(folder)):
        compare(known.in_memory(), whole)
        compare(known.take(rows), whole.take(rows))
        places = np.array([[0, 4, 2], [1, 1, 3]])
        compare(known.at(rows[:2, None] + np.zeros_like(places), places), whole.at(rows[:2, None] + 0 * places, places))
    assert found.take(np.array([3])).outputs(None)[0].logits.shape == (1, LENGTH, VOCABULARY)
    assert 0 < found.nbytes < 20_000
    assert repr(found).startswith("DiskTeacher(")


def test_logits_and_hidden_states_are_the_teachers(tmp_path: Path) -> None:
    for kind in ("logits", "features", "hidden"):
        (said,) = kept(tmp_path / kind, **KINDS[kind]).take(np.arange(EXAMPLES)).outputs(None)
        np.testing.assert_allclose(said.logits, LOGITS, rtol=1e-5, atol=1e-5)
        if kind != "logits":
            np.testing.assert_allclose(said.features["hidden"], np.tanh(EMBEDDING)[TOKENS], rtol=1e-5, atol=1e-6)
    known = kd.open_cache(tmp_path / "hidden").take(np.arange(3))
    total, _, _ = kd.losses.linear_divergence(known.hidden, HEAD, known.hidden, known.head)
    assert abs(float(total)) < 1e-4


@pytest.mark.parametrize("rest", ["uniform", "renormalised", "tail"])
def test_the_most_probable_classes_and_what_is_left(rest: str) -> None:
    known = cached(rest=rest, **KINDS["top-k"])
    order = np.argsort(-P, axis=-1)
    np.testing.assert_array_equal(known.classes_of, order[..., :3])
    np.testing.assert_allclose(np.exp(known.log_probabilities), -np.sort(-P, axis=-1)[..., :3], rtol=1e-5)
    left = np.take_along_axis(P, order[..., 3:], -1).sum(-1)
    np.testing.assert_allclose(np.exp(known.log_rest), left, rtol=1e-4)
    said = np.exp(np.asarray(known.outputs(None)[0].logits, np.float64))
    top = np.take_along_axis(said, order[..., :3], -1)
    others = np.take_along_axis(said, order[..., 3:], -1)
    np.testing.assert_allclose(said.sum(-1), 1, rtol=1e-5)
    np.testing.assert_allclose(others.sum(-1), 0 if rest == "renormalised" else left, rtol=1e-4, atol=1e-9)
    np.testing.assert_allclose(top.sum(-1), 1 if rest == "renormalised" else 1 - left, rtol=1e-5)
    assert (known.sparse is not None) == (rest == "tail")


def weights_of(known: Any) -> np.ndarray:
    """Of all classes."""
    weights = np.zeros((EXAMPLES, LENGTH, VOCABULARY))
    features = known.outputs(None)[0].features
    classes, own = (np.asarray(features[f"known.{name}"]) for name in ("classes", "weights"))
    for place in np.ndindex(classes.shape):
        weights[(*place[:2], classes[place])] += own[place]
    return weights


def test_draws_are_counted() -> None:
    for systematic in (False, True):
        known = cached(systematic=systematic, **KINDS["samples"])
        counts = 9 * weights_of(known)
        np.testing.assert_allclose(counts, np.round(counts), atol=1e-5)
        np.testing.assert_allclose(counts.sum(-1), 9, rtol=1e-6)
        assert systematic == bool((np.abs(counts - 9 * P) < 1).all())
        logits = known.outputs(None)[0].logits
        np.testing.assert_allclose(np.exp(logits), counts / 9, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("power", "systematic"), [(1.0, False), (1.0, True), (0.7, False)], ids=lambda value: str(value)
)
def test_the_gradient_of_draws_is_that_of_all_logits_on_average(power: float, systematic: bool) -> None:
    """Over many caches, within its standard error; that of the most probable classes is not."""
    student = jnp.asarray(RNG.normal(size=P.shape), jnp.float32)
    q = special.softmax(np.asarray(student, np.float64), axis=-1)

    def gradient(known: Any, method: kd.Method) -> np.ndarray:
        return np.asarray(slope(student, known, method))

    @jax.jit
    def slope(z: Any, known: Any, method: Any) -> Any:
        def loss(z: Any) -> Any:
            ours, (theirs,) = kd.Output(z), known.outputs(None)
            parts = method.init(jax.random.key(0), ours, theirs)
            return jnp.sum(method.loss(parts, ours, theirs, kd.Batch(None), jnp.int32(0))["soft"])

        return jax.grad(loss)(z)

    method = kd.SampledKL(samples=4, power=power)
    caches = 120
    found = []
    for number in range(caches):
        known = cached(keep="samples", draws=4, power=power, systematic=systematic, key=number)
        # The number of distinct draws is a shape.
        pad = [(0, 0), (0, 0), (0, 4 - known.classes_of.shape[-1])]
        known = jax.tree.map(lambda leaf, pad=pad: jnp.pad(leaf, pad), known)
        found.append(gradient(known, method))
    # Of one draw: -w of the class, and q times w for all, with w = p / r.
    r = P**power / (P**power).sum(-1, keepdims=True)
    each = P**2 / r
    variance = q**2 * each.sum(-1, keepdims=True) + (1 - 2 * q) * each - (q - P) ** 2
    error = np.sqrt(variance / (4 * caches))
    z = (np.mean(found, 0) - (q - P)) / (error + 1e-5)
    # A class that is hardly ever drawn has no normal distribution.
    assert np.abs(z[4 * caches * r > 25]).max() < 4.5
    assert 0.85 < np.mean(z**2) < 1.15 or (systematic and np.mean(z**2) < 0.7)
    top = gradient(cached(rest="renormalised", keep="top-k", k=4), kd.KD(alpha=0, temperature=1.0))
    assert np.abs((top - (q - P)) / (error + 1e-5)).max() > 10


def test_a_second_call_reads_what_is_there(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing.Work, "_answers", lambda *_: pytest.fail("the teacher was asked again"))
    (cache / ".lock").chmod(0o444)
    found = kept(cache, **KINDS["samples"] | {"batch_size": 2, "shard_size": 5})
    assert found.folder.rows == 4


@pytest.mark.parametrize(
    ("how", "says"),
    [
        (
            {"teacher": kd.from_function(say, {"embedding": EMBEDDING, "head": -HEAD})},
            "is of another teacher: give the",
        ),
        ({"teacher": lambda tokens: -MODEL(tokens)}, "is of another teacher"),
        ({"prepare": lambda key, inputs, train: (inputs + 1) % 40}, "is of another teacher"),
        ({"inputs": TOKENS[::-1].copy()}, "is of other inputs: give those that it was made of, in their order"),
        ({"inputs": TOKENS[:5]}, "there are 5 examples, and the cache in .* has 11"),
        ({"draws": 8}, "draws is 8, and the cache in .* has 9: ask for the same, or choose another folder"),
        ({"key": 1}, r"key is \[0, 1\], and the cache in .* has \[0, 0\]"),
        ({"keep": "top-k", "k": 2, "draws": None}, "keep is 'top-k', and the cache in .* has 'samples'"),
    ],
)
def test_another_teacher_other_data_or_settings_are_refused(how: Any, says: str, cache: Path) -> None:
    before = sorted((path.name, path.read_bytes()) for path in cache.iterdir())
    with pytest.raises(MismatchError, match=says) as error:
        kept(cache, **KINDS["samples"] | how)
    assert len(str(error.value).splitlines()) == 1
    assert sorted((path.name, path.read_bytes()) for path in cache.iterdir()) == before


def test_logits_that_are_not_finite_have_no_draws() -> None:
    def say_nan(tokens: jax.Array) -> jax.Array:
        return jnp.where(tokens[..., None] == 41, jnp.nan, jnp.zeros((1, 1, 4)))

    inputs = TOKENS.copy()
    inputs[7, 2] = 41
    for kind in ("samples", "top-k"):
        with pytest.raises(DataError, match="answer to example 7 is NaN or infinite: look at its parameters"):
            cached(teacher=say_nan, inputs=inputs, batch_size=4, **KINDS[kind])


@pytest.mark.parametrize("how", [{}, {"dtype": jnp.bfloat16}])
def test_answers_that_are_nan_are_not_kept(how: dict[str, Any]) -> None:
    embedding = EMBEDDING.copy()
    embedding[TOKENS[4, 2]] = np.nan
    first = int((TOKENS[4, 2] == TOKENS).any(axis=1).argmax())
    wrong = kd.from_function(say, {"embedding": embedding, "head": HEAD})
    with pytest.raises(DataError, match=f"answer to example {first} is NaN or infinite"):
        cached(teacher=wrong, **how)
    # What has the weight 0 may be anything, in an example and at a position of it.
    for weights in ((TOKENS[4, 2] != TOKENS).all(axis=1), TOKENS[4, 2] != TOKENS):
        counted = weights.astype(np.float32)
        assert cached(teacher=wrong, inputs=kd.Batch(TOKENS, weights=counted), batch_size=4, **how).examples == EXAMPLES
    # A training asks by itself, of a teacher who may have the weight 0.
    assert np.isnan(answered(as_teacher(wrong), TOKENS, batch_size=4).output.logits).any()


def test_numbers_beyond_a_narrow_type_are_told_and_masks_are_not() -> None:
    def large(tokens: Any) -> Any:
        return jnp.where(tokens[..., None] == TOKENS[0, 0], 1e5, jnp.zeros((1, 1, 4)))

    with pytest.raises(DataError, match="an answer to example 0 is beyond float16: give dtype=float32"):
        cached(teacher=large, dtype=jnp.float16)
    masked = cached(teacher=lambda tokens: jnp.full((*tokens.shape, 2), jnp.finfo(jnp.float32).min), dtype=jnp.float16)
    assert np.isneginf(masked.output.logits).all()


def test_what_was_not_asked_for_is_not_kept() -> None:
    assert not cached().output.features
    assert set(cached(features=("hidden",)).output.features) == {"hidden"}


@pytest.mark.parametrize("kind", ["logits", "bfloat16", "top-k", "samples"])
def test_a_cache_in_memory_knows_its_inputs_and_its_rows(kind: str) -> None:
    known = cached(**KINDS[kind])
    known.check_inputs(TOKENS.copy())
    known.check_inputs(TOKENS[:, :3])
    for one in (known,) if known.sparse else (known, kd.several([MODEL, known])):
        with pytest.raises(MismatchError, match="of other inputs, or of these in another order"):
            one.check_inputs(TOKENS[::-1])
    for free in (known.in_memory(), known.take(np.arange(EXAMPLES)), jax.tree.map(jnp.asarray, known)):
        free.check_inputs(TOKENS[::-1])
    for wrong in (np.array([0, EXAMPLES]), np.array([-1])):
        with pytest.raises(DataError, match=f"an example is {wrong[-1]}, and the cached teacher has 0 to 10"):
            known.take(wrong)
    with pytest.raises(DataError, match="a position is 5, and the cached teacher has 0 to 4"):
        known.at(np.array([[1]]), np.array([[5]]))


def test_a_training_on_shuffled_data_is_refused_unless_the_indices_say_how() -> None:
    x, order = RNG.normal(size=(24, 6)).astype(np.float32), RNG.permutation(24)
    model = kd.mlp([6, 4]).init(1)
    known = kd.cached(model, kd.Batch(x, Y))
    how = {"method": kd.KD(alpha=0), "batch_size": 24, "optimizer": SGD}
    with pytest.raises(MismatchError, match="in another order"):
        kd.distill(net(), known, kd.Batch(x[order], Y), **how)
    numbered = kd.Batch(x[order], Y, indices=order)
    for data in (numbered, [numbered]):
        own = how if data is numbered else {name: value for name, value in how.items() if name != "batch_size"}
        found = kd.distill(net(), known, data, **own).history["loss"]
        wanted = kd.distill(net(), model, kd.Batch(x, Y), **how).history["loss"]
        np.testing.assert_allclose(found, wanted, rtol=1e-5)
    # Logits alone are of whatever they are of.
    kd.cached(np.asarray(model(x))).check_inputs(x[order])


def test_functions_are_known_by_what_they_compute(tmp_path: Path) -> None:
    def say_by(table: Any) -> Any:
        table = jnp.asarray(table)
        return lambda tokens: table[tokens]

    kept(tmp_path / "cache", teacher=say_by(EMBEDDING))
    kept(tmp_path / "cache", teacher=say_by(EMBEDDING))
    with pytest.raises(MismatchError, match="another teacher"):
        kept(tmp_path / "cache", teacher=say_by(EMBEDDING + 1))


def test_numpys_own_types_are_compared_as_jax_has_them(tmp_path: Path) -> None:
    inputs = RNG.normal(size=(EXAMPLES, 3))
    known = kept(tmp_path / "cache", teacher=jnp.sin, inputs=inputs)
    for good in (inputs, inputs.astype(np.float32), jnp.asarray(inputs)):
        known.check_inputs(good)
    with pytest.raises(MismatchError, match="is of other inputs"):
        known.check_inputs(inputs[::-1])


def test_the_head_is_that_of_the_cache(tmp_path: Path) -> None:
    folder, other = tmp_path / "cache", tmp_path / "other"
    kept(folder, **KINDS["hidden"])
    kept(other, inputs=TOKENS[:7], **KINDS["hidden"])
    head = folder / "head.safetensors"
    shutil.copy(other / head.name, head)
    with pytest.raises(DataError, match=r"head\.safetensors is of another cache: delete the file"):
        kd.open_cache(folder).take(np.arange(2))
    head.unlink()
    with pytest.raises(DataError, match=r"lacks head\.safetensors: call kd.cached with the same"):
        kd.open_cache(folder)
    kept(folder, **KINDS["hidden"])
    folders.read(folder).write_head({"head": HEAD[:, 1:]})
    with pytest.raises(DataError, match=r"head\.safetensors is damaged \(its shapes are others\)"):
        kd.open_cache(folder).take(np.arange(2))


def upgraded(monkeypatch: pytest.MonkeyPatch) -> None:
    version = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "99" if name == "flax" else version(name))


@pytest.mark.parametrize("kind", ["logits", "bfloat16", "top-k", "hidden"])
def test_after_an_upgrade_the_answers_are_compared(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    how, first = KINDS[kind], kept(tmp_path / "cache", prepare=lambda key, inputs, train: inputs, **KINDS[kind])
    upgraded(monkeypatch)
    again = kept(tmp_path / "cache", prepare=lambda key, inputs, train: inputs + 0, **how)
    assert again.folder == first.folder
    kept(tmp_path / "cache", prepare=lambda key, inputs, train: 0 * inputs + inputs, **how)
    with pytest.raises(MismatchError, match="has answers that differ from the teacher's by"):
        kept(tmp_path / "cache", prepare=lambda key, inputs, train: (inputs + 1) % VOCABULARY, **how)


def test_after_an_upgrade_draws_do_not_tell(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    upgraded(monkeypatch)
    with pytest.warns(UserWarning, match="was begun with other versions or on another backend, and whether `prepare`"):
        kept(copy, prepare=lambda key, inputs, train: (inputs + 1) % VOCABULARY, **KINDS["samples"])


def test_shards_leave_descriptors_for_others(tmp_path: Path) -> None:
    kept(tmp_path / "cache", inputs=np.tile(TOKENS, (8, 1)), teacher=two_classes, shard_size=1, batch_size=88)
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = len(list(Path("/proc/self/fd").iterdir()))
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + 30, before[1]))
    try:
        known: Any = kd.open_cache(tmp_path / "cache").in_memory()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert known.output.logits.shape == (88, LENGTH, 2)


def two_classes(tokens: jax.Array) -> jax.Array:
    return jnp.stack([tokens, -tokens], axis=-1).astype(jnp.float32)


def test_who_begins_a_cache_looks_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process begins and ends one while this one waits for the lock."""
    lock, asked = folders._lock, iter([MODEL])

    def late(path: Path) -> Any:
        if next(asked, None) is not None:
            kept(path)
        return lock(path)

    monkeypatch.setattr(folders, "_lock", late)
    with pytest.raises(MismatchError, match="is of another teacher"):
        kept(tmp_path / "cache", teacher=lambda tokens: -two_classes(tokens))
    assert kd.open_cache(tmp_path / "cache").in_memory().examples == EXAMPLES


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ({"features": ("hidden",)}, "features are given with an array of logits"),
        ({"prepare": lambda key, inputs, train: inputs}, "prepare is given with an array of logits"),
        ({"shard_size": 3}, "shard_size is 3 without a folder of shards"),
    ],
)
def test_what_an_array_of_logits_has_no_use_for_is_refused(how: Any, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        kd.cached(LOGITS.astype(np.float32), **how)
    assert kd.cached(LOGITS.astype(np.float32), dtype=jnp.bfloat16).output.logits.dtype == jnp.bfloat16


def swap(folder: Path) -> None:
    first, second = (folder / f"shard-0000{i}.safetensors" for i in (0, 1))
    first.write_bytes(second.read_bytes())


def change(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        (lambda folder: change(folder / "shard-00001.safetensors", -1), "digest is another"),
        (lambda folder: change(folder / "shard-00001.safetensors", 12), r"header cannot be read|is of another cache"),
        (lambda folder: change(folder / "shard-00001.safetensors", 6), "bytes do not hold its header"),
        (lambda folder: (folder / "shard-00001.safetensors").write_bytes(b"1234"), "do not hold its header"),
        (lambda folder: (folder / "shard-00002.safetensors").unlink(), "lacks 1 of its 3 shards, shard-00002"),
        (
            lambda folder: (folder / "shard-00002.safetensors").write_bytes(
                (folder / "shard-00002.safetensors").read_bytes()[:-3]
            ),
            r"it has \d+ bytes, and its header announces \d+",
        ),
        (swap, "is of another cache, or of other examples: delete the file, and call kd.cached as before"),
        (lambda folder: change(folder / "cache.json", 60), r"cache\.json is damaged: restore it"),
        (lambda folder: (folder / "cache.json").write_text("[1]"), r"cache\.json is damaged"),
        (lambda folder: (folder / "cache.json").unlink(), r"has no cache\.json: give the folder"),
    ],
)
def test_damage_is_one_sentence_and_mended_by_the_teacher(harm: Any, says: str, copy: Path, cache: Path) -> None:
    harm(copy)
    with pytest.raises(DataError, match=says) as error:
        kd.open_cache(copy).in_memory()
    assert len(str(error.value).splitlines()) == 1
    if "cache" in says and "json" in says:
        return
    for path in copy.glob("shard*"):
        if path.read_bytes() != (cache / path.name).read_bytes():
            path.unlink()
    assert_same(kept(copy, **KINDS["samples"]).in_memory(), kd.open_cache(cache).in_memory())


def test_a_description_of_a_later_format_is_refused(copy: Path) -> None:
    from kd_jax.teachers import folder

    content = json.loads((copy / "cache.json").read_text()) | {"format": 2}
    content.pop("sha256")
    (copy / "cache.json").write_text(json.dumps(content | {"sha256": folder._digest_of(content)}))
    with pytest.raises(MismatchError, match="has format 2, and this kd_jax reads 1: use the kd_jax that wrote it"):
        kd.open_cache(copy)


def test_a_folder_of_something_else_stays_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"has thesis\.txt and no cache of a teacher: choose a new or"):
        kept(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
    with pytest.raises(OutputError, match="cannot be made"):
        kept(tmp_path / "thesis.txt")


def test_two_processes_do_not_write_at_once(copy: Path) -> None:
    (copy / "shard-00001.safetensors").unlink()
    (copy / ".lock").chmod(0o644)
    with FileLock(copy / ".lock"), pytest.raises(OutputError, match="another process writes the cache in"):
        kept(copy, **KINDS["samples"])


def test_a_full_disk_loses_nothing(tmp_path: Path) -> None:
    folder, how = tmp_path / "cache", {"shard_size": 8}
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    # The description is shorter, and so is the last shard.
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, before[1]))
    try:
        with pytest.raises(OutputError, match=r"shard-00000\.safetensors cannot be written .* make room or") as error:
            kept(folder, **how)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert len(str(error.value).splitlines()) == 1
    assert sorted(path.name for path in folder.iterdir()) == [".lock", "cache.json"]
    assert_close(kept(folder, **how).in_memory().output.logits, cached().output.logits)


@pytest.mark.parametrize("moment", [1, 3])
def test_a_killed_process_loses_one_shard_at_most(moment: int, tmp_path: Path) -> None:
    """It dies in the flush of a file: of the description, or of the second shard."""
    program = f"""
    import os, signal
    import test_caches as own
    flush, left = os.fsync, [{moment}]
    def dying(descriptor):
        left[0] -= os.path.isfile(f"/proc/self/fd/{{descriptor}}")
        if left[0] == 0:
            os.truncate(descriptor, 30)
            os.kill(os.getpid(), signal.SIGKILL)
        flush(descriptor)
    os.fsync = dying
    own.kept({str(tmp_path / "cache")!r}, **own.KINDS["weighted"])
    """
    path = [str(Path(__file__).parent), str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]
    code = f"import sys\nsys.path[:0] = {path!r}\n" + textwrap.dedent(program)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    there = sorted(path.name for path in (tmp_path / "cache").iterdir() if path.name != ".lock")
    later = [".shard-00001.safetensors.partial", "cache.json", "shard-00000.safetensors"]
    assert there == (later if moment > 1 else [".cache.json.partial"])
    if moment > 1:
        with pytest.raises(DataError, match="lacks 2 of its 3 shards"):
            kd.open_cache(tmp_path / "cache")
    first = tmp_path / "cache" / "shard-00000.safetensors"
    written = first.stat().st_mtime_ns if first.exists() else None
    assert_same(kept(tmp_path / "cache", **KINDS["weighted"]).in_memory(), cached(**KINDS["weighted"]))
    assert written is None or first.stat().st_mtime_ns == written
    assert not list((tmp_path / "cache").glob(".*.partial"))


def test_shards_are_safetensors(cache: Path) -> None:
    with safetensors.safe_open(cache / "shard-00000.safetensors", framework="numpy") as file:
        assert sorted(file.keys()) == ["distinct", "entries"]
        assert file.get_tensor("distinct").shape == (4, LENGTH)
        # 40 classes and 9 draws are 10 bits.
        assert file.get_tensor("entries").shape[-1] == 2


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ({"keep": "best"}, "keep is 'best': use logits, top-k, samples or hidden"),
        ({"keep": "top-k"}, "keep is 'top-k' without k: give k=, too"),
        ({"k": 3}, "k is 3 and keep is 'logits': give keep='top-k', or leave k out"),
        ({"keep": "top-k", "k": 41}, "k is 41: it must be at most 40"),
        ({"keep": "top-k", "k": 0}, "k is 0: it must be a whole number of at least 1"),
        ({"keep": "top-k", "k": 3, "rest": "zero"}, "rest is 'zero': use uniform, renormalised or tail"),
        ({"draws": 3}, "draws, power and systematic are of samples"),
        ({"keep": "samples", "draws": 2**16}, "draws is 65536: it must be below 65536"),
        ({"keep": "samples", "power": 0}, "power is 0: it must be a number above 0"),
        ({"keep": "samples", "features": ("hidden",)}, "features are kept beside logits alone"),
        ({"keep": "hidden", "hidden": "hidden"}, "keep is 'hidden' without a head"),
        ({"keep": "hidden", "hidden": "hidden", "head": HEAD[:, :3]}, r"head has the shape \(6, 3\): .* \(6, 40\)"),
        ({"keep": "hidden", "hidden": "hidden", "head": 2 * HEAD}, "differ from the teacher's by"),
        ({"dtype": "foo"}, "dtype is 'foo': use float32"),
        ({"dtype": np.int32}, "dtype is int32: use float32, bfloat16 or float16"),
        ({"shard_size": 0, "path": "nowhere"}, "shard_size is 0"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(how: Any, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        cached(**how)


# What is trained: a table of logits by token.
def student() -> kd.Model:
    return kd.from_function(
        lambda params, inputs: params[inputs["tokens"] if isinstance(inputs, dict) else inputs],
        np.zeros((VOCABULARY, VOCABULARY), np.float32),
    )


HOW: dict[str, Any] = {"optimizer": SGD, "epochs": 2}
METHODS: dict[str, kd.Method] = {
    "logits": kd.ReverseKL(alpha=0),
    "top-k": kd.TopKKL(alpha=0, k=3),
    "weighted": kd.SampledKL(samples=9, power=0.7),
}


@pytest.mark.usefixtures("quick_compiling")
@pytest.mark.parametrize("kind", METHODS)
def test_training_from_disk_is_that_from_memory(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In parts of the examples, and by an iterator that tells their numbers."""
    method, data = METHODS[kind], kd.Batch(TOKENS, indices=np.arange(EXAMPLES))
    found = kept(tmp_path / "cache", **KINDS[kind])
    wanted = kd.distill(student(), found.in_memory(), data, method=method, batch_size=2, **HOW)
    assert np.abs(wanted.model.variables).max() > 0.005
    monkeypatch.setattr(caching, "_SHARE", 0)
    monkeypatch.setattr(disk, "_PART", found.memory // 3)
    assert found.parts > 2
    trained = kd.distill(student(), found, data, method=method, batch_size=2, **HOW)
    assert_same(trained.model.variables, wanted.model.variables)
    batches = list(kd.batches(data, key=0, batch_size=2, epochs=2))
    for known in (found, found.in_memory()):
        streamed = kd.distill(student(), known, batches, method=method, steps=len(batches) // 2, **HOW)
        assert_close(streamed.model.variables, wanted.model.variables)


@pytest.mark.slow
@pytest.mark.usefixtures("quick_compiling")
def test_packed_sequences_find_their_answers(tmp_path: Path) -> None:
    """A cache of sequences, each alone; a training on rows of several."""
    lengths = RNG.integers(1, LENGTH + 1, EXAMPLES)
    sequences = [row[:count] for row, count in zip(TOKENS, lengths, strict=True)]
    packed, segments = tokens.pack(sequences, 8)
    indices = tokens.pack_indices(sequences, 8)
    there = segments > 0
    np.testing.assert_array_equal(indices[~there], -1)
    np.testing.assert_array_equal(TOKENS[indices[there][:, 0], indices[there][:, 1]], packed[there])
    for kind in ("top-k", "weighted"):
        known, method = kept(tmp_path / kind, **KINDS[kind]), METHODS[kind]
        weights = there.astype(np.float32)
        batch = kd.Batch({"tokens": packed}, None, weights, indices)
        taught = known.at(np.maximum(indices[..., 0], 0), np.maximum(indices[..., 1], 0))
        assert taught.examples == len(packed)
        unnumbered = batch._replace(indices=None)
        whole = kd.distill(student(), taught, unnumbered, method=method, batch_size=len(packed), **HOW)
        found = kd.distill(student(), known, batch, method=method, batch_size=len(packed), **HOW)
        assert_same(found.model.variables, whole.model.variables)
        streamed = kd.distill(student(), known, [batch] * 2, method=method, steps=1, **HOW)
        # By sequences, each of which has the mean of its own positions as they are weighted.
        alone = (np.arange(LENGTH) < lengths[:, None]).astype(np.float32)
        plain = kd.distill(student(), known, kd.Batch(TOKENS, None, alone), method=method, batch_size=EXAMPLES, **HOW)
        for one in (streamed, plain):
            assert_close(one.model.variables, whole.model.variables, rtol=1e-4)


@pytest.mark.parametrize(
    ("batch", "says"),
    [
        (kd.Batch(TOKENS), "is looked up by rows, which the batches of the iterator do not tell: give them indices"),
        (kd.Batch(TOKENS, indices=np.arange(1, EXAMPLES + 1)), "a batch has the index 11, and the teacher knows 11"),
        (kd.Batch(TOKENS, indices=np.arange(EXAMPLES) - 1), "has the index -1"),
        (
            kd.Batch(TOKENS, indices=np.zeros((EXAMPLES, LENGTH), np.int32)),
            r"the indices are int32 \[11, 5\]: give",
        ),
        (kd.Batch(TOKENS, indices=np.zeros((EXAMPLES, LENGTH, 2), np.int32) + 7), "a position is 7"),
    ],
)
def test_batches_that_do_not_tell_their_rows_are_refused(batch: kd.Batch, says: str, cache: Path) -> None:
    with pytest.raises((ConfigError, DataError), match=says):
        kd.distill(student(), kd.open_cache(cache), [batch], method=kd.SampledKL(samples=9), **HOW)


def test_inputs_in_another_order_are_refused(cache: Path) -> None:
    known = kd.open_cache(cache)
    with pytest.raises(MismatchError, match="is of other inputs, or of these in another order"):
        kd.distill(student(), known, kd.Batch(TOKENS[::-1].copy()), method=kd.SampledKL(samples=9), batch_size=2, **HOW)
    # Types of 64 bits are those that JAX makes of them.
    known.check_inputs(TOKENS.astype(np.int64))
    with pytest.raises(MismatchError, match="is of other inputs, or of these in another order"):
        known.check_inputs(TOKENS[::-1].astype(np.int64))
    with pytest.raises(MismatchError, match=r"the inputs are int16, and the cache in .* is of int32: give the inputs"):
        known.check_inputs(TOKENS.astype(np.int16))
    # A student whose inputs are others cannot be told.
    known.check_inputs({"tokens": TOKENS[::-1]})


@pytest.mark.parametrize(
    ("kind", "method", "says"),
    [
        (
            "samples",
            kd.KD(),
            "KD needs the logits of all classes, and the teacher knows 9 draws .*SampledKL",
        ),
        ("samples", kd.CrossEntropy() + 2 * kd.ReverseKL(), "ReverseKL needs the logits of all"),
        ("samples", lambda ours, theirs: jnp.sum(ours * theirs, -1), "LossFunction needs the logits of all classes"),
        ("samples", kd.ULD(hard=0), "ULD needs the logits of all"),
        ("samples", kd.SampledKL(), "samples of SampledKL is 50, and the teacher knows 9 draws"),
        (
            "samples",
            kd.SampledKL(samples=9, power=0.5),
            "the power of SampledKL is 0.5, and the teacher's draws",
        ),
        ("samples", kd.SampledKL(samples=9, temperature=2.0), "the temperature of SampledKL is 2"),
        ("samples", kd.TopKKL(k=2), "TopKKL needs the logits of all"),
        ("top-k", kd.TopKKL(), "k of TopKKL is 64, and the teacher knows the 3 most probable classes"),
        ("top-k", kd.TopKKL(k=3, temperature=2.0), "the temperature of TopKKL is 2"),
        ("top-k", kd.KD(), r'KD needs .* take kd\.TopKKL, or keep them with rest="uniform"'),
        ("top-k", kd.SampledKL(), "SampledKL needs the logits of all"),
    ],
)
def test_methods_that_need_all_logits_say_so(kind: str, method: Any, says: str) -> None:
    known = cached(**KINDS[kind])
    with pytest.raises(MethodError, match=says):
        kd.distill(student(), known, kd.Batch(TOKENS, TOKENS), method=method, batch_size=2, **HOW)


def test_a_part_of_the_classes_has_no_mean_and_no_measures(cache: Path) -> None:
    known = kd.open_cache(cache)
    with pytest.raises(ConfigError, match=r"a teacher in the list knows 9 draws of classes .*: only teachers of all"):
        kd.several([known, MODEL])
    with pytest.raises(ConfigError, match="measures need its logits, so give the teacher itself"):
        kd.evaluate(student(), kd.Batch(TOKENS, TOKENS), teacher=known)
    with pytest.raises(ConfigError, match=r"asked for inside a compiled program: give teacher.in_memory"):
        jax.jit(lambda rows: known.take(rows))(jnp.arange(2))
    with pytest.raises(ConfigError, match="is looked up by rows"):
        known.outputs(TOKENS)
    with pytest.raises(DataError, match=r"an example is 11, and the cache in .* has 0 to 10"):
        known.take([11])
    with pytest.raises(ConfigError, match="without the feature 'hidden': keep logits and features"):
        known.take([1]).outputs(None, features=("hidden",))


@pytest.mark.usefixtures("quick_compiling")
def test_pure_trainings_and_several_teachers_read_from_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = RNG.normal(size=(24, 6)).astype(np.float32)
    model = net().init(1)
    found = kd.cached(model, inputs, path=tmp_path / "cache", batch_size=5, shard_size=10)
    how = {"method": kd.KD(), "optimizer": SGD, "epochs": 1, "batch_size": 6}
    state, _ = kd.fit(0, kd.Batch(inputs, Y), net(), teacher=found, **how)
    wanted, _ = kd.fit(0, kd.Batch(inputs, Y), net(), teacher=found.in_memory(), **how)
    assert_same(state.variables, wanted.variables)
    monkeypatch.setattr(caching, "_SHARE", 0)
    both = kd.distill(net(), kd.several([found, model]), kd.Batch(inputs, Y), **how)
    assert_close(both.model.variables, kd.distill(net(), model, kd.Batch(inputs, Y), **how).model.variables, rtol=1e-4)


def calling(by: float) -> Any:
    """A teacher that calls a function of Python, of which its program says nothing."""
    shape = jax.ShapeDtypeStruct
    return lambda x: jax.pure_callback(lambda x: np.float32(by) * x[:, :4], shape((len(x), 4), np.float32), x)


@pytest.mark.parametrize("kind", ["told", "not told", "a function"])
def test_another_model_of_another_library_is_refused(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its digest; in a folder of an earlier version, and of what a function calls back, by the first answers."""
    make = calling if kind == "a function" else table
    with monkeypatch.context() as patched:
        if kind == "not told":
            described = folders.described
            patched.setattr(
                folders, "described",
                lambda keep, arrays, facts: described(keep, arrays, {n: f for n, f in facts.items() if n != "host"}),
            )  # fmt: skip
        known = kd.cached(make(1), X, path=tmp_path)
    assert_same(kd.cached(make(1), X, path=tmp_path).in_memory(), known.in_memory())
    says = "is of another teacher" if kind == "told" else "has answers that differ from the teacher's"
    with pytest.raises(MismatchError, match=says):
        kd.cached(make(2), X, path=tmp_path)


def test_a_host_goes_on_with_another_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its program is another then, and its digest tells that it is the same."""
    teacher = kd.Model(Table(np.ones((6, 4))).network, {})
    known = kd.cached(teacher, X, path=tmp_path)
    monkeypatch.setattr(writing, "program_text", lambda *given: "another callback")
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.0")
    assert_same(kd.cached(teacher, X, path=tmp_path).in_memory(), known.in_memory())
