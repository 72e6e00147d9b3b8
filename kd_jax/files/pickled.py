"""What the pickle in a PyTorch file says, without unpickling it.

Its opcodes are interpreted one by one. Of all that a pickle may import and call, only what makes a `state_dict` of
tensors is known, and what would be called is never more than written down.
"""

import pickletools
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from kd_jax.errors import DataError
from kd_jax.files import shown

_DTYPES: dict[str, np.dtype[Any]] = {
    "torch DoubleStorage": np.dtype("<f8"),
    "torch FloatStorage": np.dtype("<f4"),
    "torch HalfStorage": np.dtype("<f2"),
    "torch BFloat16Storage": np.dtype(jnp.bfloat16),
    "torch LongStorage": np.dtype("<i8"),
    "torch IntStorage": np.dtype("<i4"),
    "torch ShortStorage": np.dtype("<i2"),
    "torch CharStorage": np.dtype("i1"),
    "torch ByteStorage": np.dtype("u1"),
    "torch BoolStorage": np.dtype("?"),
}
_DICT, _PARAMETER = "collections OrderedDict", "torch._utils _rebuild_parameter"
_TENSORS = ("torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_tensor")
_KNOWN = {_DICT, _PARAMETER, *_TENSORS, *_DTYPES}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_ARGUMENTS = {"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "BINUNICODE8", "SHORT_BINUNICODE"}
_TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_MOST_AXES, _MOST_NUMBERS = 64, 2**48
# Some hundred bytes describe a tensor, and an opcode of one byte can cost hundred.
_MOST_BYTES = 1 << 22


class Storage(NamedTuple):
    """Numbers that tensors are parts of: `length` of them, in the member `data/key`."""

    dtype: np.dtype
    key: str
    length: int


class Tensor(NamedTuple):
    """A part of a storage; `offset` and `strides` count numbers, not bytes."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Global(NamedTuple):
    name: str


class _Mark:
    """Where the elements of a tuple, list or dictionary start on the stack."""


def interpret(pickled: bytes, what: str) -> Any:
    """What `pickled` describes, made of dictionaries, lists, tuples, numbers, texts and `Tensor`s.

    Raises `DataError` where it would need more, and any other error where it is damaged.
    """
    if len(pickled) > _MOST_BYTES:
        raise DataError(f"{what} describes its tensors in {len(pickled)} bytes: only up to {_MOST_BYTES} are read")
    machine = _Machine(what)
    for opcode, argument, _ in pickletools.genops(pickled):
        machine.step(opcode.name, argument)
    (result,) = machine.stack
    return result


class _Machine:
    """The stack and the memo of a pickle."""

    def __init__(self, what: str):
        self.what = what
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def step(self, opcode: str, argument: Any) -> None:
        """Does what one opcode says."""
        if opcode in _ARGUMENTS:
            self.stack.append(argument)
        elif opcode in _CONSTANTS:
            self.stack.append(_CONSTANTS[opcode])
        elif opcode in _TUPLES:
            self.stack.append(tuple(self._pop(_TUPLES[opcode])))
        elif opcode in ("BINPUT", "LONG_BINPUT"):
            self.memo[argument] = self.stack[-1]
        elif opcode == "MEMOIZE":
            self.memo[len(self.memo)] = self.stack[-1]
        elif opcode in ("BINGET", "LONG_BINGET"):
            self.stack.append(self.memo[argument])
        elif opcode not in ("PROTO", "FRAME", "STOP"):
            self._build(opcode, argument)

    def _build(self, opcode: str, argument: Any) -> None:
        if opcode == "MARK":
            self.stack.append(_Mark())
        elif opcode == "TUPLE":
            self.stack.append(tuple(self._pop_to_mark()))
        elif opcode == "EMPTY_LIST":
            self.stack.append([])
        elif opcode == "EMPTY_DICT":
            self.stack.append({})
        elif opcode in ("APPEND", "APPENDS"):
            items = self._pop_to_mark() if opcode == "APPENDS" else self._pop(1)
            self._top(list).extend(items)
        elif opcode in ("SETITEM", "SETITEMS"):
            items = self._pop_to_mark() if opcode == "SETITEMS" else self._pop(2)
            self._set(self._top(dict), items)
        elif opcode == "GLOBAL":
            self.stack.append(self._known(argument))
        elif opcode == "STACK_GLOBAL":
            module, name = self._pop(2)
            if not (isinstance(module, str) and isinstance(name, str)):
                raise ValueError("its pickle names a thing by something else than texts")
            self.stack.append(self._known(f"{module} {name}"))
        elif opcode == "BINPERSID":
            self.stack.append(_storage(*self._pop(1)))
        elif opcode == "REDUCE":
            self.stack.append(self._called(*self._pop(2)))
        elif opcode == "BUILD":
            # The `_metadata` of a state_dict, which says nothing of its tensors.
            self._pop(1)
            self._top(dict)
        else:
            raise self._more(f"the opcode {opcode}")

    def _pop(self, count: int) -> list[Any]:
        if count > len(self.stack):
            raise ValueError("its pickle takes more than it gave")
        start = len(self.stack) - count
        popped = self.stack[start:]
        del self.stack[start:]
        return popped

    def _pop_to_mark(self) -> list[Any]:
        count = next(n for n, item in enumerate(reversed(self.stack)) if isinstance(item, _Mark))
        _, *popped = self._pop(count + 1)
        return popped

    def _top(self, kind: type) -> Any:
        if type(self.stack[-1]) is not kind:
            raise self._more(f"what changes a {type(self.stack[-1]).__name__}")
        return self.stack[-1]

    def _set(self, mapping: dict[Any, Any], items: list[Any]) -> None:
        for key, value in zip(items[::2], items[1::2], strict=True):
            # Hashing tuples in tuples could take for ever.
            if not isinstance(key, str | int | None):
                raise self._more(f"a key that is a {type(key).__name__}")
            mapping[key] = value

    def _known(self, name: str) -> _Global:
        if name not in _KNOWN:
            raise self._more(shown(name.replace(" ", ".")))
        return _Global(name)

    def _called(self, function: Any, arguments: Any) -> Any:
        match function, arguments:
            case _Global(name=name), () if name == _DICT:
                return {}
            case _Global(name=name), (Tensor() as tensor, *_) if name == _PARAMETER:
                return tensor
            case _Global(name=name), (Storage() as storage, offset, shape, strides, *_) if name in _TENSORS:
                return _tensor(storage, offset, shape, strides)
        raise self._more("a call that makes no tensor")

    def _more(self, something: str) -> DataError:
        return DataError(
            f"{self.what} holds more than tensors ({something}): save it with torch.save(model.state_dict(), path)"
        )


def _storage(persistent: Any) -> Storage:
    kind, storage, key, _, length = persistent
    if kind != "storage" or not isinstance(storage, _Global) or not isinstance(key, str):
        raise ValueError("its pickle names no storage")
    return Storage(_DTYPES[storage.name], key, _whole(length))


def _tensor(storage: Storage, offset: Any, shape: Any, strides: Any) -> Tensor:
    """A tensor, if it is a part of its storage."""
    if type(shape) is not tuple or type(strides) is not tuple or not len(shape) == len(strides) <= _MOST_AXES:
        raise ValueError("a tensor has no shape")
    tensor = Tensor(storage, _whole(offset), tuple(map(_whole, shape)), tuple(map(_whole, strides)))
    last = tensor.offset + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.strides, strict=True))
    if 0 not in shape and last >= storage.length:
        raise ValueError("a tensor reaches beyond its storage")
    return tensor


def _whole(number: Any) -> int:
    if type(number) is not int or not 0 <= number < _MOST_NUMBERS:
        raise ValueError("a tensor has a length that is no length")
    return number
