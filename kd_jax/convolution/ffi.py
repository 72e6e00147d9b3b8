"""Functions of Python as calls inside XLA's programs on a CPU, by its C interface: `register(name, function)`.

What `jax.pure_callback` does, without its copies and its conversions: the function is told where arguments and results
lie in memory. XLA may call it from any of its threads.
"""

import ctypes
import re
import threading
from collections.abc import Callable
from pathlib import Path

import jax
from jaxlib import __file__ as _jaxlib

# Later versions of the interface may lay out their structures otherwise.
_KNOWN_MINORS = (3, 4, 5)
_EXECUTE = 3
_METADATA = 1
_INTERNAL_ERROR = 13

Function = Callable[[list[int], list[int]], None]


class _Extension(ctypes.Structure):
    pass


_Extension._fields_ = [
    ("size", ctypes.c_size_t),
    ("type", ctypes.c_int),
    ("next", ctypes.POINTER(_Extension)),
]


class _Version(ctypes.Structure):
    _fields_ = (
        ("size", ctypes.c_size_t),
        ("extension", ctypes.c_void_p),
        ("major", ctypes.c_int),
        ("minor", ctypes.c_int),
    )


class _Metadata(ctypes.Structure):
    _fields_ = (("size", ctypes.c_size_t), ("version", _Version), ("traits", ctypes.c_uint32))


class _MetadataExtension(ctypes.Structure):
    _fields_ = (("base", _Extension), ("metadata", ctypes.POINTER(_Metadata)))


class _Buffer(ctypes.Structure):
    _fields_ = (
        ("size", ctypes.c_size_t),
        ("extension", ctypes.c_void_p),
        ("dtype", ctypes.c_int),
        ("data", ctypes.c_size_t),
    )


class _Buffers(ctypes.Structure):
    _fields_ = (
        ("size", ctypes.c_size_t),
        ("extension", ctypes.c_void_p),
        ("count", ctypes.c_int64),
        ("types", ctypes.c_void_p),
        ("each", ctypes.POINTER(ctypes.POINTER(_Buffer))),
    )


class _ErrorArguments(ctypes.Structure):
    _fields_ = (
        ("size", ctypes.c_size_t),
        ("extension", ctypes.c_void_p),
        ("message", ctypes.c_char_p),
        ("code", ctypes.c_int),
    )


_MakeError = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.POINTER(_ErrorArguments))


class _Api(ctypes.Structure):
    _fields_ = (
        ("size", ctypes.c_size_t),
        ("extension", ctypes.c_void_p),
        ("version", _Version),
        ("internal", ctypes.c_void_p),
        ("make_error", _MakeError),
    )


class _Frame(ctypes.Structure):
    _fields_ = (
        ("size", ctypes.c_size_t),
        ("extension", ctypes.POINTER(_Extension)),
        ("api", ctypes.POINTER(_Api)),
        ("context", ctypes.c_void_p),
        ("stage", ctypes.c_int),
        ("arguments", _Buffers),
        ("results", _Buffers),
    )


_Handler = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.POINTER(_Frame))
_handlers: dict[str, object] = {}
_lock = threading.Lock()


def why_not() -> str:
    """Why functions cannot be called on this installation; "" where they can."""
    version = _version()
    if version is None:
        return "jaxlib's header of its foreign functions is missing"
    if version[0] != 0 or version[1] not in _KNOWN_MINORS:
        return f"jaxlib's interface of foreign functions is {version[0]}.{version[1]}, which kd_jax does not know"
    return ""


def register(name: str, function: Function) -> None:
    """Lets programs call `function(arguments, results)`, addresses in memory, as `jax.ffi.ffi_call(name, …)`.

    A name that was registered before keeps its function. What `function` raises ends the program with an error.
    """
    version = _version()
    assert version is not None, why_not()

    def handle(pointer: "ctypes._Pointer[_Frame]") -> int | None:
        frame = pointer.contents
        if frame.extension and frame.extension.contents.type == _METADATA:
            own = ctypes.cast(frame.extension, ctypes.POINTER(_MetadataExtension)).contents.metadata.contents
            own.version.major, own.version.minor = version
            own.traits = 0
            return None
        if frame.stage != _EXECUTE:
            return None
        try:
            given, made = frame.arguments, frame.results
            function(
                [given.each[place].contents.data for place in range(given.count)],
                [made.each[place].contents.data for place in range(made.count)],
            )
        # ctypes would go on after an interrupt, with what is no error of XLA's.
        except BaseException as error:
            message = f"{type(error).__name__}: {error}".encode()
            arguments = _ErrorArguments(ctypes.sizeof(_ErrorArguments), None, message, _INTERNAL_ERROR)
            made_error: int | None = frame.api.contents.make_error(ctypes.byref(arguments))
            return made_error
        return None

    with _lock:
        if name not in _handlers:
            handler = _Handler(handle)
            jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(handler), platform="cpu", api_version=1)
            _handlers[name] = handler


def _version() -> tuple[int, int] | None:
    header = Path(_jaxlib).parent / "include" / "xla" / "ffi" / "api" / "c_api.h"
    try:
        text = header.read_text()
    except OSError:
        return None
    found = [re.search(rf"#define XLA_FFI_API_{part} (\d+)", text) for part in ("MAJOR", "MINOR")]
    return (int(found[0][1]), int(found[1][1])) if found[0] and found[1] else None
