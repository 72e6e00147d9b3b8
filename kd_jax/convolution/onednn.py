"""oneDNN inside XLA's programs on a CPU, where its library is installed: `target(geometry)` names a call of it.

oneDNN (`onednn-cpu-gomp` on PyPI: Linux, x86-64) reads channels where they lie, so that gradients need no transposes,
and its kernels are faster than those that XLA has. It is called with ctypes through XLA's interface of foreign
functions, so nothing is compiled. One convolution runs at a time, on all cores. The same number of threads gives the
same bits. `KD_JAX_ONEDNN=0` in the environment leaves all convolutions to XLA.
"""

import ctypes
import functools
import importlib.metadata
import math
import os
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax

from kd_jax.convolution import ffi

PACKAGE = "onednn-cpu-gomp"

# Of oneDNN's C interface.
_CPU, _FLOAT32, _ANY_LAYOUT, _FORWARD, _DIRECT, _USERS_SCRATCHPAD = 1, 3, 1, 64, 1, 1
_QUERY_IMPLEMENTATION, _QUERY_WEIGHTS, _QUERY_GRADIENT_OF_WEIGHTS, _QUERY_SCRATCHPAD = 8, 131, 132, 136
_SRC, _DST, _WEIGHTS, _SCRATCHPAD, _DIFF_SRC, _DIFF_DST, _DIFF_WEIGHTS = 1, 17, 33, 80, 129, 145, 161
_ALLOCATE = ctypes.c_void_p(-1)
_ALIGNMENT = 64
# OpenMP starts a thread for each core, anew for each thread that calls it: with more cores, all calls come from one.
_FEW_CORES = 8

_loading = threading.Lock()


class Geometry(NamedTuple):
    """A convolution as oneDNN sees it: of which of its three arrays is the result, their extents, and its window.

    kind: "forward" makes `outputs`, "inputs" and "kernel" the gradients of `inputs` and of `kernel`.
    inputs: [batch, *space, groups · inputs]. kernel: [*window, inputs, groups · outputs].
    outputs: [batch, *extents, groups · outputs].
    dilations: numbers left out between those of the window, 0 for none.
    """

    kind: str
    inputs: tuple[int, ...]
    kernel: tuple[int, ...]
    outputs: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    before: tuple[int, ...]
    after: tuple[int, ...]
    groups: tuple[int] = (1,)


def why_not() -> str:
    """Why oneDNN is not used; "" where it is."""
    return _library()[1]


def target(geometry: Geometry) -> str | None:
    """The name of a call that computes it, the same in every process; None where oneDNN has no fast kernel."""
    library = _library()[0]
    if library is None:
        return None
    with library.lock:
        if geometry not in library.targets:
            library.targets[geometry] = _made_target(library, geometry)
        return library.targets[geometry]


def _made_target(library: "_Library", geometry: Geometry) -> str | None:
    if not _is_described(geometry):
        return None
    try:
        run = _Primitive(library, geometry)
    except _UnsupportedError:
        return None
    shown = ".".join("x".join(map(str, part)) for part in geometry[1:])
    name = f"kd_jax.onednn.{geometry.kind}.{shown}"
    ffi.register(name, run)
    return name


def _is_described(geometry: Geometry) -> bool:
    """Whether its padding is one that oneDNN describes: not below 0."""
    return min(*geometry.before, *geometry.after) >= 0


def described() -> str:
    """Which library computes convolutions by default, with what the bits of its results depend on."""
    if jax.default_backend() != "cpu":
        return "XLA"
    library, why = _library()
    if library is None:
        return f"XLA, not oneDNN ({why})"
    return f"oneDNN {importlib.metadata.version(PACKAGE)} on {library.threads} threads"


class _UnsupportedError(Exception):
    """oneDNN refuses."""


class _Argument(ctypes.Structure):
    _fields_ = (("id", ctypes.c_int), ("memory", ctypes.c_void_p))


class _Library:
    """oneDNN with its engine for the CPU and a stream. One call at a time: `lock`."""

    def __init__(self, path: str) -> None:
        # OpenMP's library is shared with PyTorch where that is loaded, and keeps the settings that it finds first:
        # threads that sleep (OMP_WAIT_POLICY) make PyTorch up to twice as slow, and nothing here faster.
        self.functions = ctypes.CDLL(path)
        self.functions.dnnl_primitive_desc_query_md.restype = ctypes.c_void_p
        self.functions.dnnl_memory_desc_get_size.restype = ctypes.c_size_t
        # Without letting go of Python's lock, which takes longer than they do.
        self.set_handle = ctypes.PyDLL(path).dnnl_memory_set_data_handle
        self.set_handle.argtypes = (ctypes.c_void_p, ctypes.c_void_p)
        self.lock = threading.Lock()
        self.threads = ctypes.CDLL("libgomp.so.1").omp_get_max_threads()
        self.targets: dict[Geometry, str | None] = {}
        self.thread = ThreadPoolExecutor(1) if (os.cpu_count() or 1) > _FEW_CORES else None
        self.engine = self.made("dnnl_engine_create", _CPU, ctypes.c_size_t(0))
        self.stream = self.made("dnnl_stream_create", self.engine, 1)
        # oneDNN's own scratchpads belong to the thread that made a primitive, and XLA calls from another.
        self.attributes = self.made("dnnl_primitive_attr_create")
        self.check("dnnl_primitive_attr_set_scratchpad_mode", self.attributes, _USERS_SCRATCHPAD)
        self._scratch: Any = b""

    def check(self, function: str, *arguments: Any) -> None:
        """Raises `_UnsupportedError` where oneDNN says anything but success."""
        status = getattr(self.functions, function)(*arguments)
        if status:
            raise _UnsupportedError(f"{function} gave {status}")

    def made(self, function: str, *arguments: Any) -> ctypes.c_void_p:
        """What a function makes, a handle."""
        handle = ctypes.c_void_p()
        self.check(function, ctypes.byref(handle), *arguments)
        return handle

    def layout_of(self, primitive: ctypes.c_void_p, which: int) -> ctypes.c_void_p:
        """The layout of one of a primitive's arrays."""
        return ctypes.c_void_p(self.functions.dnnl_primitive_desc_query_md(primitive, which, 0))

    def layout(self, sizes: Sequence[int], strides: Sequence[int] | None = None) -> ctypes.c_void_p:
        """Of an array of float32; without strides the one that oneDNN likes best."""
        shape = (ctypes.c_int64 * len(sizes))(*sizes)
        if strides is None:
            return self.made("dnnl_memory_desc_create_with_tag", len(sizes), shape, _FLOAT32, _ANY_LAYOUT)
        steps = (ctypes.c_int64 * len(sizes))(*strides)
        return self.made("dnnl_memory_desc_create_with_strides", len(sizes), shape, _FLOAT32, steps)

    def scratch(self, size: int) -> int:
        """The address of so many bytes, which all calls share."""
        if len(self._scratch) < size + _ALIGNMENT:
            self._scratch = (ctypes.c_char * (size + _ALIGNMENT))()
        address = ctypes.addressof(self._scratch)
        return address + -address % _ALIGNMENT

    def memory(self, layout: ctypes.c_void_p, own: bool = False) -> ctypes.c_void_p:
        """A place for an array, with memory of its own or with none yet."""
        return self.made("dnnl_memory_create", layout, self.engine, _ALLOCATE if own else ctypes.c_void_p())


def _library() -> tuple[_Library | None, str]:
    """oneDNN, or None and why; loaded once."""
    with _loading:
        return _loaded()


@functools.cache
def _loaded() -> tuple[_Library | None, str]:
    if os.environ.get("KD_JAX_ONEDNN", "1") == "0":
        return None, "KD_JAX_ONEDNN is 0"
    why = ffi.why_not()
    if why:
        return None, why
    try:
        files = importlib.metadata.files(PACKAGE) or []
        path = next(str(file.locate()) for file in files if file.name == "libdnnl.so.3")
        return _Library(path), ""
    except (importlib.metadata.PackageNotFoundError, StopIteration):
        return None, f"{PACKAGE} is not installed"
    except (OSError, _UnsupportedError) as error:
        return None, f"{PACKAGE} cannot be loaded ({error})"


class _Step:
    """A primitive with the places of its arrays, by their ids."""

    def __init__(self, library: _Library, chosen: ctypes.c_void_p, places: dict[int, ctypes.c_void_p]) -> None:
        self.library, self.primitive = library, library.made("dnnl_primitive_create", chosen)
        layout = library.layout_of(chosen, _QUERY_SCRATCHPAD)
        self.bytes = library.functions.dnnl_memory_desc_get_size(layout)
        self.scratch = library.memory(layout)
        places = places | {_SCRATCHPAD: self.scratch}
        self.places = (_Argument * len(places))(*[_Argument(name, place.value) for name, place in places.items()])

    def run(self) -> None:
        library = self.library
        library.set_handle(self.scratch, library.scratch(self.bytes))
        library.check("dnnl_primitive_execute", self.primitive, library.stream, len(self.places), self.places)


class _Primitive:
    """One convolution, ready to run: called with the addresses of its operands and of its result."""

    def __init__(self, library: _Library, geometry: Geometry) -> None:
        self.library = library
        inputs, outputs = _images(library, geometry.inputs), _images(library, geometry.outputs)
        kernel, sizes = _kernel(library, geometry)
        free = library.layout(sizes)
        window = [
            (ctypes.c_int64 * len(part))(*part)
            for part in (geometry.strides, geometry.dilations, geometry.before, geometry.after)
        ]
        engine, attributes = library.engine, library.attributes
        forward = library.made(
            "dnnl_convolution_forward_primitive_desc_create",
            *(engine, _FORWARD, _DIRECT, inputs, free, None, outputs, *window, attributes),
        )
        chosen, query = forward, _QUERY_WEIGHTS
        if geometry.kind == "inputs":
            chosen = library.made(
                "dnnl_convolution_backward_data_primitive_desc_create",
                *(engine, _DIRECT, inputs, free, outputs, *window, forward, attributes),
            )
        elif geometry.kind == "kernel":
            query = _QUERY_GRADIENT_OF_WEIGHTS
            chosen = library.made(
                "dnnl_convolution_backward_weights_primitive_desc_create",
                *(engine, _DIRECT, inputs, free, None, outputs, *window, forward, attributes),
            )
        name = ctypes.c_char_p()
        library.check("dnnl_primitive_desc_query", chosen, _QUERY_IMPLEMENTATION, 0, ctypes.byref(name))
        self.implementation = (name.value or b"").decode()
        if self.implementation.startswith(("ref", "gemm:ref")):
            raise _UnsupportedError(self.implementation)
        best = library.layout_of(chosen, query)
        self.best = library.memory(best, own=True)
        of_kernel = geometry.kind == "kernel"
        pair = (best, kernel) if of_kernel else (kernel, best)
        order = library.made("dnnl_reorder_primitive_desc_create", pair[0], engine, pair[1], engine, attributes)
        layouts, ids = {
            "forward": ((inputs, kernel, outputs), (_SRC, _WEIGHTS, _DST)),
            "inputs": ((outputs, kernel, inputs), (_DIFF_DST, _WEIGHTS, _DIFF_SRC)),
            "kernel": ((inputs, outputs, kernel), (_SRC, _DIFF_DST, _DIFF_WEIGHTS)),
        }[geometry.kind]
        self.places = [library.memory(layout) for layout in layouts]
        at = 2 if of_kernel else 1
        convolved = [*self.places[:at], self.best, *self.places[at + 1 :]]
        ends = (self.best, self.places[2]) if of_kernel else (self.places[1], self.best)
        steps = [
            _Step(library, chosen, dict(zip(ids, convolved, strict=True))),
            _Step(library, order, dict(zip((_SRC, _DST), ends, strict=True))),
        ]
        self.steps = steps if of_kernel else steps[::-1]

    def __call__(self, arguments: list[int], results: list[int]) -> None:
        if self.library.thread is None:
            self.run(arguments, results)
        else:
            self.library.thread.submit(self.run, arguments, results).result()

    def run(self, arguments: list[int], results: list[int]) -> None:
        library = self.library
        with library.lock:
            for place, address in zip(self.places, (*arguments, *results), strict=True):
                library.set_handle(place, address)
            for step in self.steps:
                step.run()
            library.check("dnnl_stream_wait", library.stream)


def _images(library: _Library, shape: tuple[int, ...]) -> ctypes.c_void_p:
    """[batch, *space, features], which oneDNN names batch, features, space."""
    batch, *space, features = shape
    inner = [math.prod(space[axis + 1 :]) * features for axis in range(len(space))]
    return library.layout((batch, features, *space), (math.prod(space) * features, 1, *inner))


def _kernel(library: _Library, geometry: Geometry) -> tuple[ctypes.c_void_p, tuple[int, ...]]:
    """[*window, inputs, groups · outputs], and the sizes of oneDNN: groups, if any, outputs, inputs, window."""
    *window, inputs, features = geometry.kernel
    (groups,) = geometry.groups
    outputs = features // groups
    inner = [math.prod(window[axis + 1 :]) * inputs * features for axis in range(len(window))]
    sizes, strides = (outputs, inputs, *window), (1, features, *inner)
    if groups > 1:
        sizes, strides = (groups, *sizes), (outputs, *strides)
    return library.layout(sizes, strides), sizes
