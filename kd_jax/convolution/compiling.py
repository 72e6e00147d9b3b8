"""How programs with convolutions are compiled for a CPU where XLA computes them."""

import functools
from typing import Any

import jax

from kd_jax.convolution import onednn

# XLA's library YNN makes the gradient of a kernel up to twice as slow.
_WITHOUT_YNN = ("xla_cpu_experimental_ynn_fusion_type", "")


def compiled(
    lowered: jax.stages.Lowered, written: str | None = None, option: tuple[str, str] | None = None
) -> jax.stages.Compiled:
    """`lowered.compile()`, without YNN where that makes convolutions slow. written: the program's text, if known.

    option: of XLA, its name and value, for a program without convolutions.
    """
    if option is not None:
        return lowered.compile(compiler_options=dict([option]))
    if jax.default_backend() == "cpu" and onednn.why_not() and takes(*_WITHOUT_YNN):
        text = lowered.as_text() if written is None else written
        if "stablehlo.convolution" in text:
            return lowered.compile(compiler_options=dict([_WITHOUT_YNN]))
    return lowered.compile()


@functools.cache
def takes(option: str, value: str) -> bool:
    """Whether XLA knows an option."""
    nothing: Any = jax.jit(lambda: 0).lower()
    try:
        nothing.compile(compiler_options={option: value})
    except jax.errors.JaxRuntimeError:
        return False
    return True
