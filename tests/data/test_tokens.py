from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kd_jax as kd
from kd_jax.data import tokens as of_tokens
from kd_jax.errors import ConfigError, DataError

SEQUENCES = [[5, 6, 7], [8, 9, 10, 11], [12, 13], [14], [15, 16, 17, 18, 19]]


def test_sequences_are_packed_whole_and_can_be_told_apart() -> None:
    tokens, segments = of_tokens.pack(SEQUENCES, 6)
    np.testing.assert_array_equal(tokens, [[5, 6, 7, 12, 13, 14], [8, 9, 10, 11, 0, 0], [15, 16, 17, 18, 19, 0]])
    np.testing.assert_array_equal(segments, [[1, 1, 1, 2, 2, 3], [1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 0]])
    found = [row[of == n].tolist() for row, of in zip(tokens, segments, strict=True) for n in range(1, of.max() + 1)]
    assert sorted(found) == sorted(SEQUENCES)
    assert of_tokens.pack([], 4)[0].shape == (0, 4)


def test_a_label_is_the_next_token_of_the_same_sequence_and_counts_unless_it_is_given() -> None:
    tokens, segments = of_tokens.pack(SEQUENCES, 6)
    prompt = np.isin(tokens, [5, 6, 8, 12, 13, 15, 16, 17])
    batch = of_tokens.token_batch(tokens, segments=segments, prompt=prompt)
    pairs = []
    for row, place in np.argwhere(np.asarray(batch.weights) == 1):
        pairs.append((int(tokens[row, place]), int(batch.labels[row, place])))
    wanted = [(a, b) for sequence in SEQUENCES for a, b in pairwise(sequence) if b not in {5, 6, 8, 12, 13, 15, 16, 17}]
    assert sorted(pairs) == sorted(wanted)
    assert float(batch.weights.sum()) == len(wanted)
    assert batch.weights.dtype == jnp.float32
    whole = of_tokens.token_batch(jnp.arange(4)[None])
    np.testing.assert_array_equal(whole.weights, [[1, 1, 1, 0]])
    np.testing.assert_array_equal(whole.labels, [[1, 2, 3, 0]])


def test_positions_and_masks_are_those_of_sequences_alone() -> None:
    segments = jnp.array([[1, 1, 2, 2, 2, 0], [4, 4, 4, 4, 4, 4]])
    found = jax.jit(of_tokens.segment_positions)(segments)
    np.testing.assert_array_equal(found, [[0, 1, 0, 1, 2, 0], [0, 1, 2, 3, 4, 5]])
    mask = np.asarray(of_tokens.segment_mask(segments))
    for row, of in enumerate(np.asarray(segments)):
        for i in range(6):
            for j in range(6):
                assert mask[row, i, j] == (of[i] == of[j] and j <= i)
    np.testing.assert_array_equal(
        of_tokens.segment_mask(segments, causal=False), segments[:, :, None] == segments[:, None]
    )


def test_packed_sequences_have_the_loss_of_each_alone() -> None:
    """A model that sees only the token itself: its loss over packed rows is that of the sequences one by one."""
    tokens, segments = of_tokens.pack(SEQUENCES, 7)
    table = jnp.asarray(np.random.default_rng(0).normal(size=(20, 20)), jnp.float32)
    batch = of_tokens.token_batch(tokens, segments=segments)
    values = kd.losses.cross_entropy(table[batch.inputs["tokens"]], batch.labels)
    alone = [kd.losses.cross_entropy(table[jnp.array(s[:-1])], jnp.array(s[1:])) for s in SEQUENCES if len(s) > 1]
    np.testing.assert_allclose(jnp.sum(values * batch.weights), sum(x.sum() for x in alone), rtol=1e-6)


def test_places_of_packed_tokens_lead_to_their_sequences() -> None:
    rng = np.random.default_rng(2)
    sequences = [rng.integers(1, 90, count) for count in (4, 7, 3, 1, 8, 2)]
    packed, segments = of_tokens.pack(sequences, 8)
    indices = of_tokens.pack_indices(sequences, 8)
    assert indices.shape == (*packed.shape, 2)
    for row, place in np.ndindex(packed.shape):
        sequence, position = indices[row, place]
        if segments[row, place]:
            assert sequences[sequence][position] == packed[row, place]
        else:
            assert (sequence, position) == (-1, -1)
    with pytest.raises(DataError, match="a sequence has 9 tokens: give from 1 to 8"):
        of_tokens.pack_indices([np.arange(9)], 8)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(DataError, match=r"sequence 1 is int64 \[5\]: give from 1 to 4 whole"):
        of_tokens.pack([[1, 2], np.arange(5)], 4)
    with pytest.raises(DataError, match="whole numbers"):
        of_tokens.next_token_labels(jnp.ones((2, 3)))
    with pytest.raises(DataError, match="do not fit tokens"):
        of_tokens.token_batch(jnp.ones((2, 3), jnp.int32), segments=jnp.ones((2, 4), jnp.int32))
    for make in (kd.token_batch, lambda rows: kd.pack(rows, 4)):
        with pytest.raises(DataError, match=f"have the number {2**40 + 5}: give whole numbers that int32 holds"):
            make([[2**40 + 5, 1]])
    with pytest.raises(DataError, match=r"different lengths: make rows of them with kd\.pack"):
        kd.token_batch([np.arange(4), np.arange(6)])
    for made in (of_tokens.pack, of_tokens.pack_indices):
        with pytest.raises(ConfigError, match=r"length is 3\.0"):
            made([[1]], 3.0)
    with pytest.raises(DataError, match="a boolean for each position"):
        of_tokens.next_token_weights(jnp.ones((2, 3), jnp.int32), prompt=jnp.ones((2, 3), jnp.int32))


class Counted(int):
    """A length that counts its comparisons."""

    compared = 0

    def __gt__(self, other: int) -> bool:
        Counted.compared += 1
        return int(self) > other

    def __le__(self, other: int) -> bool:
        Counted.compared += 1
        return int(self) <= other


def test_rows_are_those_of_first_fit_in_n_log_n_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(4)
    for count, length in ((0, 3), (1, 3), (2, 3), (37, 5), (64, 9), (300, 50)):
        lengths = rng.integers(1, length + 1, count).tolist()
        rows: list[list[int]] = []
        for number, one in enumerate(lengths):
            row = next((row for row in rows if sum(lengths[i] for i in row) + one <= length), None)
            if row is None:
                rows.append(row := [])
            row.append(number)
        assert of_tokens._rows(lengths, length) == rows
    monkeypatch.setattr(Counted, "compared", 0)
    of_tokens._rows([Counted(one) for one in rng.integers(1, 9, 1024)], 10)
    assert 0 < Counted.compared <= 10 * 1024
