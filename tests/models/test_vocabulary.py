"""Tokens that a network has no embedding of are told on the host, and padding may be anything."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import kd_jax as kd
from kd_jax.errors import DataError
from kd_jax.models.vocabulary import check_tokens, vocabulary_sizes
from kd_jax.models.zoo.transformer import transformer


@pytest.fixture(scope="module")
def decoder():
    return transformer(9, layers=1, width=8, heads=2, hidden=8, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("wrong", [9, -1])
def test_a_token_outside_the_vocabulary_is_one_sentence(decoder, wrong):
    tokens = np.int32([[1, 2, 3, 4], [1, 2, wrong, 4]])
    for batch in (kd.token_batch(tokens), kd.Batch(tokens, np.roll(tokens % 9, -1, axis=1))):
        with pytest.raises(DataError, match=f"row 1 of the tokens has {wrong}, and the model's are 0 to 8") as error:
            kd.evaluate(decoder, batch)
        assert "\n" not in str(error.value)


def test_padding_may_be_outside_the_vocabulary(decoder):
    tokens, segments = np.int32([[1, 2, 3, 4], [1, 2, 0, 0]]), np.int32([[1, 1, 1, 1], [1, 1, 0, 0]])
    wanted = kd.evaluate(decoder, kd.token_batch(tokens, segments=segments))
    padded = np.where(segments == 0, 9, tokens)
    batch = kd.token_batch(padded, segments=segments)
    batch = batch._replace(labels=jnp.where(batch.weights == 0, 0, batch.labels))
    assert kd.evaluate(decoder, batch) == wanted
    assert np.isfinite(wanted["nll"])
    # Without segments nothing tells that it is padding.
    with pytest.raises(DataError, match="row 1 of the tokens has 9"):
        kd.evaluate(decoder, batch._replace(inputs=jnp.asarray(padded)))


@pytest.mark.parametrize("wrong", [9, -1])
@pytest.mark.parametrize("whose", ["student", "new student", "teacher"])
def test_a_training_is_not_begun_on_tokens_outside_the_vocabulary(decoder, whose, wrong):
    tokens = np.int32([[1, 2, 3, 4], [1, 2, wrong, 4]])
    larger = kd.from_nnx(lambda rngs: transformer(10, layers=1, width=8, heads=2, hidden=8, rngs=rngs))
    student = {"student": decoder, "new student": kd.from_nnx(_small), "teacher": larger}[whose]
    teacher = decoder if whose == "teacher" else None
    how = {"method": kd.ULD() if teacher else kd.CrossEntropy(), "optimizer": optax.sgd(0.1), "epochs": 1}
    batch = kd.token_batch(tokens)
    for data, more in ((batch, {"batch_size": 2}), ([batch, batch], {})):
        with pytest.raises(
            DataError, match=f"row 1 of the tokens has {wrong}, and the model's are 0 to [89]:"
        ) as error:
            kd.distill(student, teacher, data, **how, **more)
        assert "\n" not in str(error.value)


def test_what_prepares_the_inputs_may_make_other_tokens(decoder):
    tokens = np.int32([[11, 12, 13, 14], [11, 12, 13, 14]])
    batch = kd.Batch(tokens, np.int32([[1, 2, 3, 4], [1, 2, 3, 4]]))
    result = kd.distill(
        decoder, None, batch, method=kd.CrossEntropy(), optimizer=optax.sgd(0.1), epochs=1, batch_size=2,
        prepare=lambda key, inputs, train: inputs - 10,
    )  # fmt: skip
    assert np.isfinite(result.history["loss"][0])


def test_what_counts_nothing_may_be_any_token(decoder):
    tokens = np.int32([[1, 2, 3, 4], [-1, -1, -1, -1]])
    labels = np.int32([[2, 3, 4, 5], [0, 0, 0, 0]])
    how = {"method": kd.CrossEntropy(), "optimizer": optax.sgd(0.1), "epochs": 1}
    each = np.float32([1, 0])
    for weights in (each, np.repeat(each[:, None], 4, axis=1)):
        data = kd.Batch(tokens, labels, weights)
        result = kd.distill(decoder, None, data, batch_size=2, **how)
        assert np.isfinite(result.history["loss"][0])
        assert np.isfinite(kd.evaluate(decoder, data)["nll"])
    with pytest.raises(DataError, match="row 1 of the tokens has -1"):
        kd.distill(decoder, None, kd.Batch(tokens, labels, each[::-1].copy()), batch_size=2, **how)


def test_parts_without_names_are_not_looked_at(decoder):
    check_tokens({"tokens": 9}, (np.int32([[1, 2]]), np.int32([[1, 1]]), np.int32([[10, 11]])))


def test_only_whole_numbers_are_sizes():
    class Own(nnx.Module):
        def __init__(self):
            self.vocabularies = {"tokens": None, "words": "many", "names": 3}

        def __call__(self, tokens):
            return tokens

    known = kd.models.as_model(Own())
    assert vocabulary_sizes(known.network, known.variables) == {"names": 3}


def test_teachers_within_several_are_looked_at():
    larger = kd.from_nnx(lambda rngs: transformer(10, layers=1, width=8, heads=2, hidden=8, rngs=rngs))
    small = kd.from_nnx(_small).init(1)
    teacher = kd.several([kd.several([small, small])])
    batch = kd.Batch(np.int32([[1, 9]] * 2), np.int32([[1, 2]] * 2))
    with pytest.raises(DataError, match="row 0 of the tokens has 9, and the model's are 0 to 8"):
        kd.distill(larger, teacher, batch, method=kd.ULD(), optimizer=optax.sgd(0.1), epochs=1, batch_size=2)


def _small(rngs):
    return transformer(9, layers=1, width=8, heads=2, hidden=8, rngs=rngs)
