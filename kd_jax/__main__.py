"""`python -m kd_jax`: which commands there are."""

import sys

from kd_jax.experiments.shell import options as cli

_COMMANDS = """\
usage: python -m kd_jax.COMMAND [--help]

  python -m kd_jax.run          a teacher, students alone and distilled ones: what distillation gains
  python -m kd_jax.sweep        which temperature, which weights, and whether the gain is real
  python -m kd_jax.reproduce    published tables, with seeds
  python -m kd_jax.export       a run's student for use elsewhere: ONNX, StableHLO, safetensors"""


def main() -> None:
    """Names the commands; what else is asked for is an error."""
    if sys.argv[1:] in ([], ["-h"], ["--help"]):
        print(_COMMANDS)
        return
    cli.fail(
        f"{' '.join(sys.argv[1:])!r} is no command: use python -m kd_jax.run, kd_jax.sweep, kd_jax.reproduce or "
        "kd_jax.export",
        code=2,
    )


if __name__ == "__main__":
    main()
