"""Asking a teacher about all examples, batch by batch, and keeping its answers in memory or in a folder."""

import importlib.metadata
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Key

from kd_jax.convolution import canonical
from kd_jax.data.batch import as_key
from kd_jax.errors import ConfigError, DataError, MismatchError
from kd_jax.files.digests import calls_back, digest, program_text, text_digest
from kd_jax.models import Output
from kd_jax.models.compiled import call
from kd_jax.models.predict import highest_precision
from kd_jax.models.trying import PREPARE, told
from kd_jax.teachers import folder as folders
from kd_jax.teachers.base import PyTree, Teacher
from kd_jax.teachers.keep import FAULTS, Arrays, Keep, begins_of, joined, looked_up, of_examples, reduced, stored
from kd_jax.teachers.kept import KeptTeacher, form_of, kept_teacher, logits_of

_SHARD = 1 << 25
# So many examples tell whether other versions answer alike, by what no draws or ties change, to the digits of bfloat16.
_FIRST, _GAP = 4, 2e-2
_COMPARED = ("logits", "log_probabilities", "hidden")


class Work:
    """A teacher, and the inputs that it is asked about."""

    def __init__(
        self, teacher: Teacher, inputs: PyTree, keep: Keep, *, key: Any, head: Any, batch_size: int, prepare: Any,
        weights: Any = None, is_strict: bool = True,
    ) -> None:  # fmt: skip
        """Raises `ConfigError` or `DataError` where they do not go together; nothing is computed.

        weights: what has the weight 0 may have any answer. is_strict: whether one that is not finite is an error.
        """
        self.weights, self.is_strict = weights, is_strict
        self.teacher, self.inputs, self.keep, self.prepare = teacher, inputs, keep, prepare
        self.key, self.head = as_key(key), _as_head(head)
        self.examples = int(jax.tree.leaves(inputs)[0].shape[0])
        if self.examples == 0:
            raise DataError("there are no examples to ask the teacher about: give at least one")
        self.batch_size = min(batch_size, self.examples)
        batch, self.one = (
            jax.tree.map(lambda leaf, n=n: jax.ShapeDtypeStruct((n, *leaf.shape[1:]), leaf.dtype), inputs)
            for n in (self.batch_size, 1)
        )
        said = jax.eval_shape(partial(_output, keep=keep, prepare=prepare), teacher, batch)
        self.places, self.classes = said.logits.shape[1:-1], said.logits.shape[-1]
        if keep.kind == "hidden":
            self._check_head(said)

    def in_memory(self, rest: str) -> KeptTeacher:
        """All answers, in memory."""
        arrays = joined(list(self._answers(range(self.examples))))
        most = 0
        if self.keep.kind == "samples":
            most, arrays["begins"] = int(arrays["distinct"].max()), begins_of(arrays["distinct"])
        found = looked_up(self.keep, arrays, np.arange(self.examples), None, most)
        if self.keep.kind == "samples":
            found = {name: array.reshape(-1, *self.places, array.shape[-1]) for name, array in found.items()}
        head = tuple(None if part is None else jnp.asarray(part) for part in self.head)
        return kept_teacher(
            self.keep, found, classes=self.classes, rest=rest, head=head, lead=(self.examples,)  # type: ignore[arg-type]
        )  # fmt: skip

    def on_disk(self, path: Path, shard_size: int | None) -> folders.Folder:
        """The folder with all answers; those that are there are not asked for again."""
        described, calls = self._described(shard_size)
        found = folders.begin(path, described)
        # No batch is asked for more than a shard keeps: examples of a language model may be larger than a shard.
        self.batch_size = min(self.batch_size, found.rows)
        if found.description["computation"] != described["computation"]:
            self._check_answers(found, "was begun with other versions or on another backend")
        elif calls and found.description.get("host") is None and len(found.missing()) < found.count:
            self._check_answers(found, "is of a teacher that calls functions of Python")
        if not found.missing() and (self.keep.kind != "hidden" or found.has_head()):
            return found
        with found.locked():
            if self.keep.kind == "hidden" and not found.has_head():
                head, bias = self.head
                found.write_head({"head": head} if bias is None else {"head": head, "bias": bias})
            # Another process may have written some since.
            for number in found.missing():
                found.write(number, joined(list(self._answers(found.examples_of(number)))))
        return found

    def _check_answers(self, found: folders.Folder, why: str) -> None:
        """Where its program does not tell whether it is the same: whether the teacher still says what is there.

        why: in words. Raises `MismatchError`, and warns where nothing is there that tells.
        """
        missing = found.missing()
        number = next((one for one in range(found.count) if one not in missing), None)
        names = [name for name in _COMPARED if name in found.description["arrays"]]
        if number is None or not names:
            warnings.warn(
                f"the cache in {found.path} {why}, and whether `prepare` and the model's code are the same cannot be "
                "told from it: make it anew where they are not",
                stacklevel=5,
            )
            return
        own = found.examples_of(number)
        said = joined(list(self._answers(own[:_FIRST])))
        for name in names:
            kept, made = (np.asarray(one[name][:_FIRST], np.float32) for one in (found.arrays(number), said))
            # An answer of weight 0 may be NaN, in both.
            differ = (kept != made) & ~(np.isnan(kept) & np.isnan(made))
            gap = np.abs(kept[differ] - made[differ]).max(initial=0)
            if not gap <= _GAP * max(1.0, float(np.abs(made).max(initial=0, where=np.isfinite(made)))):
                raise MismatchError(
                    f"the cache in {found.path} has answers that differ from the teacher's by {gap:.2g}: give the "
                    "model's code and the prepare that it was made with, or choose another folder"
                )

    def _answers(self, examples: range) -> Iterator[Arrays]:
        """What is kept of the answers, a batch at a time."""
        for start in range(examples.start, examples.stop, self.batch_size):
            count = min(self.batch_size, examples.stop - start)
            rows = np.arange(start, start + count)
            # One program for all batches: a short one is filled up with its own first example.
            rows = np.concatenate([rows, np.full(self.batch_size - count, start)])
            part = jax.tree.map(
                lambda leaf, start=start, count=count: _filled(leaf[start : start + count], self.batch_size),
                self.inputs,
            )
            found = call(
                _asked, self.teacher, part, jnp.asarray(rows, jnp.int32), self.key, keep=self.keep, prepare=self.prepare
            )
            found = {name: np.asarray(array)[:count] for name, array in found.items()}
            own = None if self.weights is None else self.weights[start : start + count]
            wrong, beyond = (of_examples(found.get(name, np.zeros((count, 1), bool)), own) for name in FAULTS)
            if self.is_strict and wrong.any():
                raise wrong_answer(int(rows[wrong.argmax()]))
            if beyond.any():
                raise DataError(
                    f"an answer to example {rows[beyond.argmax()]} is beyond {self.keep.dtype}: give dtype=float32, or "
                    "bfloat16"
                )
            yield stored(self.keep, found, self.classes)

    def _described(self, shard_size: int | None) -> tuple[dict[str, Any], bool]:
        """What the cache is of, and whether the teacher calls functions of Python, which its program does not tell."""
        example = jax.eval_shape(
            partial(_asked, keep=self.keep, prepare=self.prepare),
            self.teacher, self.one, jax.ShapeDtypeStruct((1,), jnp.int32), self.key,
        )  # fmt: skip
        arrays = stored(
            self.keep, {name: np.zeros(one.shape, one.dtype) for name, one in example.items()}, self.classes
        )
        bytes_each = sum(array.nbytes for array in arrays.values())
        if self.keep.kind == "samples":
            # About a quarter of the draws are of another class than those before.
            bytes_each *= max(1, self.keep.draws // 4)
        rows = max(1, _SHARD // bytes_each)
        rows -= rows % self.batch_size if rows > self.batch_size else 0
        program = program_text(partial(_output, keep=self.keep, prepare=self.prepare), self.teacher, self.one)
        facts = {
            "key": np.asarray(jax.random.key_data(self.key)).tolist(),
            "examples": self.examples, "places": list(self.places), "classes": self.classes,
            "rows": shard_size or min(self.examples, rows),
            "inputs": digest(self.inputs, as_jax=True), "form": form_of(self.inputs),
            "teacher": digest((self.teacher, self.head)), "has_variables": bool(jax.tree.leaves(self.teacher)),
            "host": self.teacher.host, "computation": text_digest(program),
            "versions": {name: importlib.metadata.version(name) for name in ("jax", "flax")}
            | {"backend": jax.default_backend()},
        }  # fmt: skip
        return folders.described(self.keep, arrays, facts), calls_back(program)

    def _check_head(self, said: Output) -> None:
        """Raises `ConfigError` for a head that does not make the logits of the hidden states, on the first example
        that has a weight.
        """
        head, bias = self.head
        width, path = said.features[self.keep.hidden].shape[-1], self.keep.hidden
        if head.shape != (width, self.classes) or (bias is not None and bias.shape != (self.classes,)):
            raise ConfigError(
                f"the head has the shape {head.shape}{'' if bias is None else f' and its bias {bias.shape}'}: for "
                f"{path!r} it must have {(width, self.classes)}{'' if bias is None else f' and {(self.classes,)}'}"
            )
        weights = None if self.weights is None else np.asarray(self.weights) != 0
        at = 0 if weights is None else int(weights.reshape(len(weights), -1).any(axis=1).argmax())
        first = jax.tree.map(lambda leaf: jnp.asarray(leaf[at : at + 1]), self.inputs)
        found = jax.jit(partial(_output, keep=self.keep, prepare=self.prepare))(self.teacher, first)
        with highest_precision():
            made = np.asarray(logits_of(found.features[path], head, bias), np.float32)
        wanted = np.asarray(found.logits, np.float32)
        if weights is not None and weights.shape == (self.examples, *self.places):
            made, wanted = made[:, weights[at]], wanted[:, weights[at]]
        # A bias may be -inf; an answer that is NaN is told when it is kept.
        finite, ruled_out = np.isfinite(wanted), np.isneginf(wanted)
        gap = np.abs(made[finite] - wanted[finite]).max(initial=0) if (made[ruled_out] == -np.inf).all() else np.inf
        size = np.abs(wanted[finite]).max(initial=1)
        if not gap <= 1e-2 * size:
            raise ConfigError(
                f"the head makes logits of {path!r} that differ from the teacher's by {gap:.2g}: give the feature that "
                "the last layer is applied to, and the kernel and bias of that layer"
            )


def wrong_answer(example: int) -> DataError:
    """The error for an answer that is not finite."""
    return DataError(
        f"the teacher's answer to example {example} is NaN or infinite: look at its parameters, and whether it gets "
        "its inputs as it was trained on them"
    )


def _output(teacher: Teacher, inputs: PyTree, *, keep: Keep, prepare: Any) -> Output:
    if prepare is not None:
        with told("prepare", inputs, PREPARE):
            inputs = prepare(jax.random.key(0), inputs, False)
    inputs = jax.tree.map(jnp.asarray, inputs)
    with told("the teacher", inputs), highest_precision():
        said = canonical(lambda teacher, inputs: teacher.outputs(inputs, features=keep.asked))(teacher, inputs)
    if len(said) > 1:
        raise ConfigError('the mean of losses cannot be cached: cache each teacher, or use mean="probabilities"')
    return said[0]


def _asked(
    teacher: Teacher, inputs: PyTree, rows: Int[Array, " batch"], key: Key[Array, ""], *, keep: Keep, prepare: Any
) -> dict[str, Any]:
    return reduced(keep, _output(teacher, inputs, keep=keep, prepare=prepare), rows, key)


def _filled(leaf: Any, count: int) -> Any:
    short = count - leaf.shape[0]
    return jnp.concatenate([jnp.asarray(leaf), jnp.repeat(jnp.asarray(leaf[:1]), short, axis=0)]) if short else leaf


def _as_head(head: Any) -> tuple[Any, Any]:
    """The kernel and the bias, or None for it."""
    if head is None:
        return None, None
    kernel, bias = head if isinstance(head, tuple | list) and len(head) == 2 else (head, None)
    pair = np.asarray(kernel), None if bias is None else np.asarray(bias)
    if pair[0].ndim != 2 or any(part is not None and part.dtype.kind not in "fV" for part in pair):
        raise ConfigError(
            f"the head is {pair[0].dtype} of the shape {pair[0].shape}: give floats [width, classes], or a pair with "
            "the bias [classes]"
        )
    return pair
