"""A student for use elsewhere: StableHLO, safetensors, ONNX, int8, LiteRT; and the report of teacher against student.

Each name is imported when it is first asked for, as those of `kd_jax`.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kd_jax.export.described import from_safetensors as from_safetensors
    from kd_jax.export.described import to_safetensors as to_safetensors
    from kd_jax.export.folder import FORMATS as FORMATS
    from kd_jax.export.folder import to_folder as to_folder
    from kd_jax.export.litert import to_litert as to_litert
    from kd_jax.export.onnx import to_int8 as to_int8
    from kd_jax.export.onnx import to_onnx as to_onnx
    from kd_jax.export.reporting import Report as Report
    from kd_jax.export.reporting import Row as Row
    from kd_jax.export.reporting import report as report
    from kd_jax.export.stablehlo import from_stablehlo as from_stablehlo
    from kd_jax.export.stablehlo import to_stablehlo as to_stablehlo

_NAMES = {
    ".described": "from_safetensors to_safetensors",
    ".folder": "FORMATS to_folder",
    ".litert": "to_litert",
    ".onnx": "to_int8 to_onnx",
    ".reporting": "Report Row report",
    ".stablehlo": "from_stablehlo to_stablehlo",
}
_MODULE_OF = {name: module for module, names in _NAMES.items() for name in names.split()}

__all__ = sorted(_MODULE_OF)


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULE_OF[name], __name__), name)
