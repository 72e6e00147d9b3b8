"""Sequences of tokens as a `Batch`: next-token labels, packed sequences, prompts that are not trained on.

Segments are whole numbers `[..., positions]` that tell the packed sequences of a row apart; 0 is padding.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Shaped

from kd_jax.data.batch import Batch, check_whole
from kd_jax.errors import DataError

Tokens = Shaped[Array | np.ndarray, "..."]


def pack(
    sequences: Sequence[Any], length: Any
) -> tuple[Int[np.ndarray, "rows {length}"], Int[np.ndarray, "rows {length}"]]:
    """Sequences side by side in rows of `length`: the tokens, and their segments 1, 2, … in each row.

    Each sequence goes whole into the first row that has room, in the order given; the rest of a row is 0. One that is
    longer than a row is refused: cut it first, where its meaning allows.
    """
    length = check_whole(length, "length")
    known = [np.asarray(sequence) for sequence in sequences]
    for number, tokens in enumerate(known):
        if tokens.ndim != 1 or tokens.dtype.kind not in "iu" or not 1 <= len(tokens) <= length:
            raise DataError(
                f"sequence {number} is {tokens.dtype} {list(tokens.shape)}: give from 1 to {length} whole numbers"
            )
        _check_narrow(tokens, f"sequence {number}")
    rows = _rows([len(tokens) for tokens in known], length)
    packed, segments = (np.zeros((len(rows), length), np.int32) for _ in range(2))
    for i, row in enumerate(rows):
        together = np.concatenate([known[number] for number in row])
        packed[i, : len(together)] = together
        segments[i, : len(together)] = np.repeat(np.arange(1, len(row) + 1), [len(known[number]) for number in row])
    return packed, segments


def pack_indices(sequences: Sequence[Any], length: Any) -> Int[np.ndarray, "rows {length} 2"]:
    """Where the tokens of `pack(sequences, length)` come from: the sequence's number, and the place in it; −1 in
    padding. As the `indices` of a `Batch` they find the answers of a teacher that was cached on the sequences.
    """
    length = check_whole(length, "length")
    lengths = [len(sequence) for sequence in sequences]
    if any(not 1 <= count <= length for count in lengths):
        wrong = next(count for count in lengths if not 1 <= count <= length)
        raise DataError(f"a sequence has {wrong} tokens: give from 1 to {length}")
    rows = _rows(lengths, length)
    indices = np.full((len(rows), length, 2), -1, np.int32)
    for i, row in enumerate(rows):
        own = [np.stack([np.full(lengths[number], number), np.arange(lengths[number])], axis=-1) for number in row]
        together = np.concatenate(own)
        indices[i, : len(together)] = together
    return indices


def _rows(lengths: Sequence[int], length: int) -> list[list[int]]:
    """The numbers of the sequences in each row."""
    rows: list[list[int]] = []
    # A tree whose leaves are the room of as many rows as there can be, and whose nodes are the most of their two: the
    # first row that has room is found in log n steps.
    size = 1 << max(0, len(lengths) - 1).bit_length()
    room = [length] * (2 * size)
    for number, count in enumerate(lengths):
        node = 1
        while node < size:
            node *= 2
            node += room[node] < count
        if node - size == len(rows):
            rows.append([])
        rows[node - size].append(number)
        room[node] -= count
        while node > 1:
            node //= 2
            room[node] = max(room[2 * node], room[2 * node + 1])
    return rows


def next_token_labels(tokens: Tokens) -> Int[Array, "..."]:
    """The token after each position, `[..., positions]`; 0 at the last, which has none and must have the weight 0."""
    tokens = _whole(tokens, "tokens")
    return jnp.concatenate([tokens[..., 1:], jnp.zeros_like(tokens[..., :1])], axis=-1)


def next_token_weights(segments: Tokens, *, prompt: Tokens | None = None) -> Float[Array, "..."]:
    """Weights of `next_token_labels`: 1 where the next token is of the same sequence and to be learned, else 0.

    prompt: whether a token is given and not learned, booleans `[..., positions]`. The first token after a prompt is
    learned: it is predicted from the prompt's last.
    """
    segments = _whole(segments, "segments")
    kept = (segments[..., 1:] == segments[..., :-1]) & (segments[..., 1:] != 0)
    if prompt is not None:
        given = jnp.asarray(prompt)
        if given.shape != segments.shape or given.dtype != bool:
            raise DataError(
                f"prompt is {given.dtype} {list(given.shape)} for segments {list(segments.shape)}: give a boolean for "
                "each position"
            )
        kept &= ~given[..., 1:]
    return jnp.concatenate([kept, jnp.zeros_like(kept, shape=(*kept.shape[:-1], 1))], axis=-1).astype(jnp.float32)


def segment_positions(segments: Tokens) -> Int[Array, "..."]:
    """The position of each token within its own sequence, from 0, `[..., positions]`."""
    segments = _whole(segments, "segments")
    places = jax.lax.broadcasted_iota(jnp.int32, segments.shape, segments.ndim - 1)
    begins = jnp.concatenate([jnp.ones_like(segments[..., :1], bool), segments[..., 1:] != segments[..., :-1]], axis=-1)
    return places - jax.lax.cummax(jnp.where(begins, places, 0), axis=segments.ndim - 1)


def segment_mask(segments: Tokens, *, causal: bool = True) -> Bool[Array, "..."]:
    """Which positions a position attends to: those of its own sequence, `[..., queries, keys]`, not later if causal.

    Padding attends to padding, so that no softmax is over nothing.
    """
    segments = _whole(segments, "segments")
    same = segments[..., :, None] == segments[..., None, :]
    return jnp.tril(same) if causal else same


def token_batch(tokens: Any, *, segments: Tokens | None = None, prompt: Tokens | None = None) -> Batch:
    """A `Batch` for next-token prediction, all `[..., positions]`.

    inputs: a dict of tokens, segments and positions. labels: the next tokens. weights: 1 where the next token is of the
    same sequence and to be learned, else 0.
    segments: whole numbers that tell the sequences of a row apart, 0 for padding; without them a row is one sequence.
    prompt: booleans, whether a token is given and not learned.

    Raises `DataError`.
    """
    if isinstance(tokens, list | tuple) and len({np.shape(row)[:1] for row in tokens}) > 1:
        raise DataError("the tokens are sequences of different lengths: make rows of them with kd.pack(tokens, length)")
    tokens = _whole(tokens, "tokens")
    known = jnp.ones_like(tokens) if segments is None else _whole(segments, "segments")
    if known.shape != tokens.shape:
        raise DataError(
            f"segments {list(known.shape)} do not fit tokens {list(tokens.shape)}: give one for each position"
        )
    inputs = {"tokens": tokens, "segments": known, "positions": segment_positions(known)}
    return Batch(inputs, next_token_labels(tokens), next_token_weights(known, prompt=prompt))


def _whole(values: Any, name: str) -> Array:
    if not isinstance(values, jax.Array):
        values = np.asarray(values)
        _check_narrow(values, name)
    values = jnp.asarray(values)
    if not jnp.issubdtype(values.dtype, jnp.integer) or values.ndim == 0 or values.shape[-1] == 0:
        raise DataError(f"{name} are {values.dtype} {list(values.shape)}: give whole numbers, [..., positions]")
    return values if values.dtype.itemsize >= 4 else values.astype(jnp.int32)


def _check_narrow(values: np.ndarray, name: str) -> None:
    """Raises `DataError` for whole numbers that int32 does not hold, which a cast would make others of."""
    if values.dtype.kind in "iu" and values.dtype.itemsize >= 4 and values.size:
        bounds = np.iinfo(np.int32)
        wrong = int(values.max()) if values.max() > bounds.max else int(values.min())
        if not bounds.min <= wrong <= bounds.max:
            raise DataError(f"{name} have the number {wrong}: give whole numbers that int32 holds, below 2³¹")
