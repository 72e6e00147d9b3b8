"""Sequences that a model writes: compiled sampling, with a cache where the model has one, and no gradient."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from kd_jax.data.batch import Batch, as_key, check_whole
from kd_jax.data.tokens import next_token_labels, next_token_weights, segment_positions
from kd_jax.errors import ConfigError, DataError
from kd_jax.files import as_numpy
from kd_jax.models import Network, as_model
from kd_jax.models.predict import highest_precision
from kd_jax.models.trying import told
from kd_jax.models.vocabulary import check_vocabulary

PyTree = Any


class Generated(NamedTuple):
    """What a model wrote. tokens: `[batch, positions]`, prompts first, and 0 behind the end of each row.

    lengths: `[batch]`, of prompt, what was written, and the sign that ends it. prompt_lengths: `[batch]`.
    """

    tokens: Int[Array, "batch positions"]
    lengths: Int[Array, " batch"]
    prompt_lengths: Int[Array, " batch"]

    def sequences(self) -> list[np.ndarray]:
        """What was written behind each prompt, of its own length."""
        parts = zip(*map(np.asarray, self), strict=True)
        return [row[begin:end] for row, end, begin in parts]


class Sampling(NamedTuple):
    """How tokens are drawn. top_k, end: None for all tokens, and for no sign that ends a sequence."""

    greedy: bool
    top_k: int | None
    end: int | None


def generate(
    model: Any,
    prompts: Any,
    *,
    steps: int,
    temperature: Any = 1.0,
    top_k: Any = None,
    end: Any = None,
    key: Any = 0,
    lengths: Any = None,
) -> Generated:
    """Lets a model go on with prompts, token by token, in one compiled program.

    A zoo's transformer keeps keys and values, and a GRU its state; so does any NNX module with `prefill(inputs,
    lengths, capacity)` and `decode(tokens, at, cache)` as those have them. Every other model of tokens is called anew
    on the whole row for each token: slow, and right where a position sees none behind it.

    model: whatever `kd.distill` takes as a student, with its values. prompts: a list of sequences of whole numbers, of
    different lengths, or `[batch, positions]`; or a dict of the model's inputs, of which `tokens` are the prompts
    and the rest (a `source`, say) is given as it is. lengths: `[batch]`, of the prompts in an array or a dict; without
    them those of the dict's `segments`, where 0 behind a prompt is padding; else all of each row.
    steps: at most so many tokens are written. temperature: 0 takes the likeliest token. top_k: draws from the
    likeliest k alone, of equal ones the first. end: the token that ends a sequence. key: a whole number or a key of
    `jax.random`.

    Raises `ConfigError` or `DataError`, also where the model's logits are NaN or infinite. There is no gradient.
    """
    known = as_model(model)
    if known.variables is None:
        raise ConfigError("this model has no variables yet: make them with model.init(key), or train it")
    steps = check_whole(steps, "steps")
    warmth = _temperature(temperature)
    how = Sampling(warmth == 0, *check_sampling(top_k, end))
    given, own = _prompts(prompts, lengths)
    inputs = {**given, "tokens": given["tokens"].astype(np.int32)}
    bare = not isinstance(prompts, Mapping)
    with told("the model", inputs):
        vocabulary = _logits.eval_shape(known.variables, inputs, network=known.network, bare=bare).shape[-1]
        if how.top_k is not None and how.top_k > vocabulary:
            raise ConfigError(f"top_k is {how.top_k}, and the model has {vocabulary} tokens: give at most as many")
        _check_tokens(given["tokens"], own, vocabulary)
        others = {name: leaf for name, leaf in inputs.items() if name != "tokens"}
        check_vocabulary(known.network, known.variables, others)
        written, broken = _generated(
            known.variables, inputs, own, as_key(key), jnp.float32(warmth), network=known.network, how=how, steps=steps,
            bare=bare,
        )  # fmt: skip
    if not isinstance(broken, jax.core.Tracer) and np.asarray(broken).any():
        raise DataError(
            f"the model's logits behind prompt {int(np.argmax(broken))} are NaN or infinite, and no token can be drawn "
            "from them: look at its parameters, and whether its inputs are as it was trained on them"
        )
    return written


def seq_kd(
    teacher: Any, prompts: Any, *, steps: int, temperature: Any = 0.0, top_k: Any = None, end: Any = None, key: Any = 0,
    lengths: Any = None, batch_size: int = 256,
) -> Batch:  # fmt: skip
    """Sequence-level distillation (SeqKD): Kim and Rush (2016), https://arxiv.org/abs/1606.07947.

    The teacher writes the targets, and the student learns them as labels: `kd.distill(student, None,
    kd.seq_kd(teacher, prompts, steps=64))`. The paper takes the best of a beam; here it is the likeliest token each
    time, or a sample at another temperature.

    All arguments but batch_size are those of `kd.generate`. batch_size: how many prompts are written on at once.
    Returns a `Batch` in the form of `kd.token_batch`, with the weight 0 on prompts and behind the end; of a dict of
    prompts, its inputs with the tokens in their place.
    """
    inputs, own = _prompts(prompts, lengths)
    parts = []
    size = check_whole(batch_size, "batch_size")
    for number, start in enumerate(range(0, len(own), size)):
        part = jax.tree.map(lambda leaf, start=start: leaf[start : start + size], inputs)
        parts.append(
            generate(
                teacher, part if isinstance(prompts, Mapping) else part["tokens"], steps=steps, temperature=temperature,
                top_k=top_k, end=end, key=jax.random.fold_in(as_key(key), number), lengths=own[start : start + size],
            )
        )  # fmt: skip
    written = Generated(*(jnp.concatenate(leaves) for leaves in zip(*parts, strict=True)))
    if not isinstance(prompts, Mapping):
        inputs = dict.fromkeys(("tokens", "segments", "positions"), inputs["tokens"])
    return written_batch(Batch(inputs), written)


def written_batch(batch: Batch, written: Generated) -> Batch:
    """The batch with these sequences in the place of its tokens; what is learned of each is behind its prompt."""
    places = jnp.arange(written.tokens.shape[1])[None]
    segments = (places < written.lengths[:, None]).astype(written.tokens.dtype)
    inputs: Any = written.tokens
    if isinstance(batch.inputs, Mapping):
        ours = {
            "tokens": written.tokens, "segments": segments, "positions": segment_positions(segments),
        }  # fmt: skip
        inputs = {name: ours.get(name, leaf) for name, leaf in batch.inputs.items()}
    weights = next_token_weights(segments, prompt=places < written.prompt_lengths[:, None])
    return batch._replace(inputs=inputs, labels=next_token_labels(written.tokens), weights=weights)


def sample(
    network: Network, variables: PyTree, inputs: PyTree, lengths: Int[Array, " batch"], key: Key[Array, ""],
    temperature: Any, *, how: Sampling, room: int, most: int | None = None, wanted: Bool[Array, " batch"] | None = None,
) -> Generated:  # fmt: skip
    """As `generate`, to be traced, in rows of `room` positions.

    inputs: the tokens, or a dict of inputs that has them. most: tokens that are written behind a prompt; None fills the
    rows up. wanted: which rows are written on; all where it is None.
    """
    return _sampled(
        network, variables, inputs, lengths, key, temperature, how=how, room=room, most=most, wanted=wanted
    )[0]


def _sampled(
    network: Network, variables: PyTree, inputs: PyTree, lengths: Int[Array, " batch"], key: Key[Array, ""],
    temperature: Any, *, how: Sampling, room: int, most: int | None, wanted: Bool[Array, " batch"] | None = None,
) -> tuple[Generated, Bool[Array, " batch"]]:  # fmt: skip
    """Also which rows had logits that no token can be drawn from."""
    given = inputs if isinstance(inputs, Mapping) else {"tokens": inputs}
    prompts = given["tokens"].astype(jnp.int32)
    batch, width = prompts.shape
    places = jnp.arange(room, dtype=jnp.int32)[None]
    begun = jnp.where(places < lengths[:, None], jnp.pad(prompts, ((0, 0), (0, room - width))), 0)
    ends = jnp.full_like(lengths, room) if most is None else jnp.minimum(lengths + most, room)
    active = lengths < ends if wanted is None else wanted & (lengths < ends)
    whole = {"segments": jnp.ones_like(begun), "positions": jnp.broadcast_to(places, begun.shape)}
    variables = jax.lax.stop_gradient(variables)
    module = network.bound(variables)
    cached = module is not None and hasattr(module, "prefill") and hasattr(module, "decode")
    rows = jnp.arange(batch)

    def called(tokens: Array, at: Array) -> Array:
        """Logits behind the first `at` tokens of each row."""
        context = {name: whole.get(name, leaf) for name, leaf in given.items()} | {"tokens": tokens}
        asked = context if isinstance(inputs, Mapping) else tokens
        logits = network.apply(variables, asked, train=False, key=jax.random.key(0))[0].logits
        return jnp.take_along_axis(logits, (at - 1)[:, None, None], axis=1)[:, 0]

    cache: Any = ()
    if cached:
        logits, cache = module.prefill({**given, "tokens": begun[:, :width]}, lengths, room)
    else:
        logits = called(begun, lengths)
    if how.end is not None and how.end >= logits.shape[-1]:
        raise ConfigError(f"end is {how.end}, and the model writes 0 to {logits.shape[-1] - 1}: give one of its tokens")

    def write(state: Any) -> Any:
        step, tokens, at, active, broken, logits, cache = state
        # The largest is NaN or infinite where one is, and where all are -inf.
        broken = broken | (active & ~jnp.isfinite(jnp.max(logits, axis=-1)))
        new = _drawn(logits, jax.random.fold_in(key, step), temperature, how).astype(tokens.dtype)
        # A row that has ended keeps what it has: its place is behind the row, and nothing is written there.
        tokens = tokens.at[rows, jnp.where(active, at, room)].set(new, mode="drop")
        at = at + active.astype(at.dtype)
        active = active & (at < ends)
        if how.end is not None:
            active = active & (new != how.end)
        if cached:
            logits, cache = module.decode(new, jnp.minimum(at, room) - 1, cache)
        else:
            logits = called(tokens, at)
        return step + 1, tokens, at, active, broken, logits, cache

    state = (jnp.int32(0), begun, lengths, active, jnp.zeros_like(active), logits, cache)
    _, tokens, at, _, broken, *_ = jax.lax.while_loop(lambda state: jnp.any(state[3]), write, state)
    return Generated(tokens, at, lengths), broken


@partial(jax.jit, static_argnames=("network", "how", "steps", "bare"))
def _generated(
    variables: PyTree, inputs: dict[str, Array], lengths: Array, key: Any, temperature: Array,
    *, network: Network, how: Sampling, steps: int, bare: bool,
) -> tuple[Generated, Bool[Array, " batch"]]:  # fmt: skip
    with highest_precision():
        room = inputs["tokens"].shape[1] + steps
        return _sampled(
            network, variables, inputs["tokens"] if bare else inputs, lengths, key, temperature, how=how, room=room,
            most=steps,
        )  # fmt: skip


@partial(jax.jit, static_argnames=("network", "bare"))
def _logits(variables: PyTree, inputs: dict[str, Array], *, network: Network, bare: bool) -> Float[Array, "..."]:
    """Of the whole rows; for its shape alone."""
    asked = inputs["tokens"] if bare else inputs
    return network.apply(variables, asked, train=False, key=jax.random.key(0))[0].logits


def _drawn(
    logits: Float[Array, "batch vocabulary"], key: Key[Array, ""], temperature: Any, how: Sampling
) -> Int[Array, " batch"]:
    likeliest = jnp.argmax(logits, axis=-1)
    if how.greedy:
        return likeliest
    wide = logits.astype(jnp.float32)
    places = None
    if how.top_k is not None and how.top_k < logits.shape[-1]:
        # The values and not a threshold: others may equal the last of them.
        wide, places = jax.lax.top_k(wide, how.top_k)
    warm = jnp.where(temperature > 0, temperature, 1.0)
    drawn = jax.random.categorical(key, wide / warm)
    if places is not None:
        drawn = jnp.take_along_axis(places, drawn[:, None], axis=-1)[:, 0].astype(likeliest.dtype)
    return jnp.where(temperature > 0, drawn, likeliest)


def check_sampling(top_k: Any, end: Any) -> tuple[int | None, int | None]:
    """Both as numbers of Python, or None. Raises `ConfigError`."""
    return (
        None if top_k is None else check_whole(top_k, "top_k"),
        None if end is None else check_whole(end, "end", least=0),
    )


def _temperature(value: Any) -> float:
    scalar = isinstance(value, int | float | np.number | np.ndarray | jax.Array) and np.ndim(value) == 0
    number = float(value) if scalar and not isinstance(value, bool) else -1.0
    if not 0 <= number < float("inf"):
        raise ConfigError(f"temperature is {value!r}: give 0 for the likeliest token, or a positive number")
    return number


def _check_tokens(tokens: Int[np.ndarray, "batch positions"], lengths: Any, vocabulary: int) -> None:
    """Raises `DataError` for a token of a prompt that the model's logits do not have."""
    known = np.arange(tokens.shape[1])[None] < np.asarray(lengths)[:, None]
    outside = known & ((tokens < 0) | (tokens >= vocabulary))
    if outside.any():
        row, place = np.argwhere(outside)[0]
        raise DataError(
            f"prompt {row} has the token {tokens[row, place]}, and the model's are 0 to {vocabulary - 1}: give tokens "
            "of its own tokenizer"
        )


def _prompts(prompts: Any, lengths: Any) -> tuple[dict[str, Any], Int[Array, " batch"]]:
    """Inputs that have `tokens`, on the host in the type they were given, and the lengths. Raises `DataError`."""
    if isinstance(prompts, str | bytes):
        raise DataError(
            f"the prompts are the text {prompts[:40]!r}: give whole numbers, as a tokenizer makes them of it"
        )
    if isinstance(prompts, Sequence) and not isinstance(prompts, Batch):
        rows = [as_numpy(row, "a prompt") for row in prompts]
        if not rows or any(row.ndim != 1 or row.dtype.kind not in "iu" or not len(row) for row in rows):
            raise DataError("a prompt is no sequence of at least one whole number: give a list of such, one a row")
        if lengths is not None:
            raise DataError("lengths are given beside a list of prompts, which have their own: leave them out")
        longest = max(map(len, rows))
        padded = np.stack([np.pad(row, (0, longest - len(row))) for row in rows])
        if padded.dtype.kind not in "iu":
            raise DataError("the prompts have numbers of several types that no whole number holds: give them as int32")
        return {"tokens": padded}, jnp.asarray([len(row) for row in rows], jnp.int32)
    if isinstance(prompts, Batch):
        raise DataError("the prompts are a whole kd.Batch: give batch.inputs")
    inputs = dict(prompts) if isinstance(prompts, Mapping) else {"tokens": prompts}
    inputs = {name: as_numpy(leaf, f"{name} of the prompts") for name, leaf in inputs.items()}
    tokens = inputs.get("tokens")
    if tokens is None or tokens.ndim != 2 or tokens.dtype.kind not in "iu" or not tokens.size:
        said = "missing" if tokens is None else f"{tokens.dtype} {list(tokens.shape)}"
        raise DataError(f"the prompts' tokens are {said}: give whole numbers [batch, positions], or a list of rows")
    batch, longest = tokens.shape
    if lengths is None and "segments" in inputs:
        given = _segment_lengths(inputs["segments"], tokens)
    else:
        given = np.full(batch, longest) if lengths is None else as_numpy(lengths, "lengths")
    if given.shape != (batch,) or given.dtype.kind not in "iu" or given.min() < 1 or given.max() > longest:
        raise DataError(f"lengths must be {batch} whole numbers from 1 to {longest}, one for each prompt")
    rest = {name: leaf if name == "tokens" else jnp.asarray(leaf) for name, leaf in inputs.items()}
    return rest, jnp.asarray(given, jnp.int32)


def _segment_lengths(segments: np.ndarray, tokens: np.ndarray) -> Int[np.ndarray, " batch"]:
    if segments.shape != tokens.shape:
        raise DataError(
            f"segments {list(segments.shape)} do not fit tokens {list(tokens.shape)}: give one for each position"
        )
    lengths = np.sum(segments != 0, axis=1)
    own = np.where(np.arange(tokens.shape[1])[None] < lengths[:, None], segments[:, :1], 0)
    wrong = (segments != own).any(axis=1) | (lengths == 0)
    if wrong.any():
        raise DataError(
            f"row {int(np.argmax(wrong))} of the prompts is padded on the left, packed from several sequences, or "
            "empty, by its segments: give one prompt a row, from its left on"
        )
    return lengths
