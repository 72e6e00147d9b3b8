"""What a model writes: token by token as without a cache, draws as its softmax says, ends, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import kd_jax as kd
from kd_jax.errors import ConfigError, DataError
from kd_jax.models.zoo.gru import gru_seq2seq
from kd_jax.models.zoo.transformer import transformer

pytestmark = pytest.mark.usefixtures("quick_compiling")
PROMPTS = [[5, 3, 7], [1], [2, 6, 4, 8, 9]]


class Slow(nnx.Module):
    """The same model without a cache."""

    def __init__(self, inner):
        self.inner = inner

    def __call__(self, tokens):
        return self.inner(tokens)


def loud(module, size=8.0):
    """With weights of a size that one token is much likelier than the others."""
    nnx.update(module, jax.tree.map(lambda leaf: leaf * size if leaf.ndim > 1 else leaf, nnx.state(module, nnx.Param)))
    return module


@pytest.fixture(scope="module")
def decoder():
    return loud(transformer(11, layers=2, width=16, heads=4, kv_heads=2, qk_norm=True, tied=False, rngs=nnx.Rngs(3)))


def by_hand(logits_of, prompt, steps, end=None):
    """The likeliest token each time, from the logits of the whole sequence alone."""
    tokens = list(prompt)
    for _ in range(steps):
        tokens.append(int(np.argmax(np.asarray(logits_of(np.asarray([tokens], np.int32)))[0, -1])))
        if tokens[-1] == end:
            break
    return tokens


@pytest.mark.parametrize("cached", [True, False])
def test_every_token_is_that_of_the_model_without_a_cache(decoder, cached):
    found = kd.generate(decoder if cached else Slow(decoder), PROMPTS, steps=6, temperature=0)
    padded = jax.jit(lambda tokens: decoder(tokens))

    def logits_of(tokens):
        length = tokens.shape[1]
        return padded(np.pad(tokens, ((0, 0), (0, 12 - length))))[:, :length]

    for row, length, begin, prompt in zip(*map(np.asarray, found), PROMPTS, strict=True):
        assert (begin, length) == (len(prompt), len(prompt) + 6)
        wanted = by_hand(logits_of, prompt, 6)
        np.testing.assert_array_equal(row[:length], wanted)
        assert (row[length:] == 0).all()
    assert len({tuple(one) for one in map(np.ndarray.tolist, found.sequences())}) > 1


def test_a_sequence_ends_with_its_sign(decoder):
    free = kd.generate(decoder, PROMPTS, steps=6, temperature=0)
    end = int(free.sequences()[0][2])
    found = kd.generate(decoder, PROMPTS, steps=6, temperature=0, end=end)
    for one, other in zip(found.sequences(), free.sequences(), strict=True):
        stop = list(other).index(end) + 1 if end in other else len(other)
        np.testing.assert_array_equal(one, other[:stop])
    assert len(found.sequences()[0]) <= 3


@pytest.mark.parametrize("cached", [True, False])
def test_draws_have_the_probabilities_of_the_model(decoder, cached):
    mild = loud(nnx.clone(decoder), 0.5)
    prompts = np.tile(np.int32([[4, 2]]), (1000, 1))
    model = mild if cached else Slow(mild)
    found = kd.generate(model, prompts, steps=1, temperature=2.0, key=1)
    shares = np.bincount(np.asarray(found.tokens[:, 2]), minlength=11) / 1000
    wanted = np.asarray(jax.nn.softmax(jax.jit(lambda tokens: mild(tokens))(prompts[:1])[0, -1] / 2.0))
    assert np.abs(shares - wanted).max() < 4 * np.sqrt(0.25 / 1000)
    few = kd.generate(model, prompts, steps=1, temperature=2.0, key=1, top_k=3)
    kept = np.argsort(wanted)[-3:]
    assert set(np.asarray(few.tokens[:, 2]).tolist()) == set(kept.tolist())
    again = kd.generate(model, prompts, steps=1, temperature=2.0, key=1)
    np.testing.assert_array_equal(again.tokens, found.tokens)
    assert (kd.generate(model, prompts, steps=1, temperature=2.0, key=2).tokens != found.tokens).any()


@pytest.fixture(scope="module")
def translator():
    return loud(gru_seq2seq(9, 7, width=6, hidden=8, rngs=nnx.Rngs(0)), 4.0)


def test_a_translator_writes_from_its_source(translator):
    source = np.int32([[3, 4, 2, 0, 0], [8, 7, 6, 5, 2], [1, 2, 0, 0, 0]])
    begin = np.full((3, 1), 1, np.int32)
    found = kd.generate(translator, {"source": source, "tokens": begin}, steps=5, temperature=0, end=6)
    for number, row in enumerate(found.sequences()):
        alone = source[number : number + 1, : int((source[number] != 0).sum())]
        wanted = by_hand(lambda tokens, alone=alone: translator(alone, tokens), [1], 5, end=6)
        np.testing.assert_array_equal(row, wanted[1:])
    batch = kd.seq_kd(translator, {"source": source, "tokens": begin}, steps=5, end=6, batch_size=2)
    np.testing.assert_array_equal(batch.inputs["source"], source)
    np.testing.assert_array_equal(batch.inputs["tokens"], found.tokens)
    np.testing.assert_array_equal(batch.weights.sum(axis=1), found.lengths - 1)
    logits = translator(batch.inputs["source"], batch.inputs["tokens"])
    counted = np.asarray(batch.weights) == 1
    np.testing.assert_array_equal(np.argmax(logits, axis=-1)[counted], np.asarray(batch.labels)[counted])


def test_a_batch_that_the_teacher_wrote_has_weights_behind_the_prompts(decoder):
    batch = kd.seq_kd(decoder, PROMPTS, steps=4)
    written = kd.generate(decoder, PROMPTS, steps=4, temperature=0)
    wanted = kd.token_batch(
        written.tokens, segments=(np.arange(9) < np.asarray(written.lengths)[:, None]).astype(np.int32),
        prompt=np.arange(9) < np.asarray(written.prompt_lengths)[:, None],
    )  # fmt: skip
    for one, other in zip(jax.tree.leaves(batch), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.slow
def test_there_is_no_gradient(decoder):
    from kd_jax.generation import Sampling, sample

    model = kd.from_nnx(decoder)

    def loss(variables):
        written = sample(
            model.network, variables, jnp.asarray([[1, 2]]), jnp.int32([2]), jax.random.key(0), 1.0,
            how=Sampling(False, None, None), room=4,
        )  # fmt: skip
        return jnp.sum(written.tokens.astype(jnp.float32))

    gradient = jax.grad(lambda params: loss({"params": params, "state": {}}))(model.variables["params"])
    assert all(not np.asarray(leaf).any() for leaf in jax.tree.leaves(gradient))


@pytest.mark.slow
def test_a_token_batch_is_written_on_behind_its_sequences(decoder):
    tokens = np.int32([[5, 3, 7, 0, 0], [1, 0, 0, 0, 0], [2, 6, 4, 8, 9]])
    data = kd.token_batch(tokens, segments=(np.arange(5) < np.array([[3], [1], [5]])).astype(np.int32))
    wanted = kd.generate(decoder, PROMPTS, steps=4, temperature=0)
    for model in (decoder, kd.from_nnx(decoder, call=lambda module, inputs, train: module(**inputs))):
        found = kd.generate(model, data.inputs, steps=4, temperature=0)
        for one, other in zip(found, wanted, strict=True):
            np.testing.assert_array_equal(one, other)
    # What lies behind a prompt is no token, and given lengths count more than segments.
    padded = np.where(tokens == 0, -100, tokens)
    bare = kd.generate(decoder, padded, lengths=[3, 1, 5], steps=4, temperature=0)
    np.testing.assert_array_equal(bare.tokens, wanted.tokens)
    short = kd.generate(decoder, data.inputs, lengths=[2, 1, 1], steps=1)
    np.testing.assert_array_equal(short.prompt_lengths, [2, 1, 1])
    batch = kd.seq_kd(decoder, data.inputs, steps=4, batch_size=2)
    np.testing.assert_array_equal(batch.inputs["tokens"], wanted.tokens)


def test_the_likeliest_k_are_k_where_some_are_equal():
    table = kd.from_function(lambda params, tokens: params[tokens], jnp.zeros((5, 5)))
    prompts = np.ones((64, 1), np.int32)
    for k in (1, 2):
        found = kd.generate(table, prompts, steps=3, temperature=1.0, top_k=k, key=1)
        assert set(np.asarray(found.tokens[:, 1:]).ravel().tolist()) == set(range(k))


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_no_token_is_written_from_logits_that_are_not_finite(temperature):
    table = np.zeros((5, 5), np.float32)
    table[0], table[1, 2], table[2, 3] = -np.inf, np.nan, np.inf
    model = kd.from_function(lambda params, tokens: params[tokens], jnp.asarray(table))
    how = {"steps": 1, "temperature": temperature}
    for wrong in (0, 1, 2):
        with pytest.raises(DataError, match="logits behind prompt 1 are NaN or infinite") as error:
            kd.generate(model, [[3], [wrong]], **how)
        assert "\n" not in str(error.value)
        with pytest.raises(DataError, match="logits behind prompt 1"):
            kd.seq_kd(model, [[3], [wrong]], **how)
    assert np.asarray(kd.generate(model, [[3], [4]], **how).tokens).shape == (2, 2)


@pytest.mark.parametrize("wrong", [9, -1])
def test_a_source_outside_its_vocabulary_is_refused(translator, wrong):
    inputs = {"source": np.int32([[3, 4], [2, wrong]]), "tokens": np.ones((2, 1), np.int32)}
    with pytest.raises(DataError, match=f"row 1 of the source has {wrong}, and the model's are 0 to 8"):
        kd.generate(translator, inputs, steps=1)


@pytest.mark.parametrize(
    ("prompts", "more", "said"),
    [
        ([], {}, "no sequence of at least one whole number"),
        ([[1], []], {}, "no sequence of at least one whole number"),
        ([[1]], {"lengths": [1]}, "have their own"),
        (np.ones((2, 3), np.float32), {}, "float32"),
        ({"source": np.ones((2, 3), np.int32)}, {}, "missing"),
        (np.ones((2, 3), np.int32), {"lengths": [0, 3]}, "from 1 to 3"),
        (np.ones((2, 3), np.int32), {"lengths": [[1], [2, 3]]}, "lengths cannot be read as an array"),
        ("ab", {}, "the prompts are the text 'ab'"),
        (kd.Batch(np.ones((2, 3), np.int32)), {}, r"give batch\.inputs"),
        (["ab"], {}, "no sequence of at least one whole number"),
        ([[[1], [2, 3]]], {}, "a prompt cannot be read as an array"),
        ({"tokens": [[1], [2, 3]]}, {}, "tokens of the prompts cannot be read as an array"),
        ([[1, 11]], {}, "prompt 0 has the token 11, and the model's are 0 to 10"),
        ([[1], [2, -1]], {}, "prompt 1 has the token -1"),
        ([[2**32 + 3]], {}, f"prompt 0 has the token {2**32 + 3}"),
        (np.array([[2**32 + 3, 1]]), {}, f"prompt 0 has the token {2**32 + 3}"),
        ({"tokens": np.ones((2, 3), np.int32), "segments": np.int32([[1, 1, 0], [0, 1, 1]])}, {}, "row 1 .* the left"),
        ({"tokens": np.ones((2, 3), np.int32), "segments": np.int32([[1, 1, 2], [1, 1, 1]])}, {}, "row 0 .* packed"),
        ({"tokens": np.ones((2, 3), np.int32), "segments": np.ones((2, 2), np.int32)}, {}, "do not fit tokens"),
    ],
)
def test_prompts_that_are_none_are_refused(decoder, prompts, more, said):
    with pytest.raises(DataError, match=said) as error:
        kd.generate(decoder, prompts, steps=1, **more)
    assert "\n" not in str(error.value)


def test_numbers_out_of_their_bounds_are_refused(decoder):
    with pytest.raises(ConfigError, match="temperature is -1"):
        kd.generate(decoder, PROMPTS, steps=1, temperature=-1)
    with pytest.raises(ConfigError, match="steps is 0"):
        kd.generate(decoder, PROMPTS, steps=0)
    for wrong in (np.nan, np.inf, "0.7", None, True, np.ones(2)):
        with pytest.raises(ConfigError, match=r"temperature is .*: give 0 for the likeliest"):
            kd.generate(decoder, PROMPTS, steps=1, temperature=wrong)
    for wrong in ("</s>", jnp.int32(3), -1, 2.0):
        with pytest.raises(ConfigError, match=r"end is .*: it must be a whole number"):
            kd.generate(decoder, PROMPTS, steps=1, end=wrong)
    with pytest.raises(ConfigError, match="end is 11, and the model writes 0 to 10"):
        kd.generate(decoder, PROMPTS, steps=1, end=11)
    with pytest.raises(ConfigError, match="top_k is 0"):
        kd.generate(decoder, PROMPTS, steps=1, top_k=0)
    with pytest.raises(ConfigError, match="top_k is 100, and the model has 11 tokens"):
        kd.generate(decoder, PROMPTS, steps=1, top_k=100)
    with pytest.raises(ConfigError, match="no variables yet"):
        kd.generate(lambda rngs: transformer(rngs=rngs), PROMPTS, steps=1)
