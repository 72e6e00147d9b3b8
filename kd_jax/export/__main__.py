"""Exports the student of a run: as ONNX, StableHLO, safetensors or LiteRT, with a report and a model card."""

from kd_jax.experiments.shell import signals

if __name__ == "__main__":
    signals.end_at_once()

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kd_jax.errors import ConfigError, DataError
from kd_jax.experiments.shell import command
from kd_jax.experiments.shell import options as cli

_PROG = "python -m kd_jax.export"
_FORMATS = ("onnx", "int8", "stablehlo", "safetensors", "litert")
_USUAL = _FORMATS[:-1]
_MODELS = ("distilled", "student", "teacher")
_EXAMPLES = """\
  python -m kd_jax.export runs/mine                        the formats but litert, beside the run, in runs/mine/export
  python -m kd_jax.export runs/mine --format onnx          an ONNX file alone, checked against the model
  python -m kd_jax.export runs/mine --format onnx int8 --model student --seed 43 --out deployed
  python -m kd_jax.export student.safetensors --format onnx   a file of kd.export.to_safetensors, without a report
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Options in, table out."""
    command.run_command(_parser(), arguments, _body)


def _parser() -> cli.Parser:
    parser = command.parser(_PROG, __doc__, _EXAMPLES)
    parser.stray = "name one run, and give an option's name before its values"
    parser.add_argument(
        "run", metavar="RUN",
        help="a folder of python -m kd_jax.run, or a file of kd.export.to_safetensors with its JSON file beside it; "
        "the code of a run's own networks (module:name or file.py:name) is run, so give only runs that you trust",
    )  # fmt: skip
    what = parser.add_argument_group("what is exported")
    what.add_argument(
        "--format", nargs="+", metavar="FORMAT", default=list(_USUAL),
        help=f"some of {', '.join(_FORMATS)} (default: all but litert); int8 is ONNX with weights of 8 bits",
    )  # fmt: skip
    what.add_argument("--model", metavar="NAME", help=f"of a run: {', '.join(_MODELS)} (default: {_MODELS[0]})")
    what.add_argument("--seed", type=cli.whole, metavar="N", help="of a run: which seed's student (default: the first)")
    output = parser.add_argument_group("output")
    output.add_argument("--out", metavar="DIR", help="folder for the files (default: export in the folder of RUN)")
    output.add_argument("--overwrite", action="store_true", help="replace files of these names that DIR already holds")
    output.add_argument("--no-report", action="store_true", help="do not measure size, latency and accuracy")
    output.add_argument(
        "--rounds", type=cli.whole, metavar="N", default=30, help="timings of each model in the report (default: 30)"
    )
    output.add_argument(
        "--license", metavar="NAME", help='of the model, for its card, as Hugging Face names it: "apache-2.0"'
    )
    return parser


def _body(options: argparse.Namespace, interrupt: signals.Interrupt) -> None:
    for one in options.format:
        if one not in _FORMATS:
            raise ConfigError(f"unknown --format {one!r}: use some of {', '.join(_FORMATS)}")
    if options.rounds < 1:
        raise ConfigError(f"--rounds is {options.rounds}: it must be at least 1")
    if options.model is not None and options.model not in _MODELS:
        raise ConfigError(f"unknown --model {options.model!r}: use {', '.join(_MODELS[:-1])} or {_MODELS[-1]}")
    run = Path(options.run).expanduser()
    if not run.exists():
        raise DataError(f"{run} does not exist: name the folder of a run, or a safetensors file")
    formats = [one for one in ("safetensors", "stablehlo", "onnx", "int8", "litert") if one in options.format]
    command.prepare_jax()
    _of_run(run, options, formats) if run.is_dir() else _of_file(run, options, formats)


def _of_run(run: Path, options: argparse.Namespace, formats: list[str]) -> None:
    from kd_jax.data.batch import Batch
    from kd_jax.experiments import images
    from kd_jax.experiments.notebook import saved
    from kd_jax.export.folder import to_folder

    if not saved.is_run(run):
        raise DataError(
            f"{run} has no results.json: name the folder of a run of python -m kd_jax.run that is finished, or export "
            "a model from Python, kd.export.to_folder(model, folder, test)"
        )
    found = saved.read(run, options.seed)
    name = options.model or _MODELS[0]
    test = Batch(found.dataset.test_images, found.dataset.test_labels)
    folder = Path(options.out) if options.out else run / "export"
    measured = to_folder(
        found.models[name], folder, test, formats=formats, name=name, prepare=images.prepare,
        teacher=None if options.no_report or name == "teacher" else found.models["teacher"],
        settings={"run": run.resolve().name, **found.settings(name)}, distilled=name == "distilled",
        license=options.license, rounds=options.rounds, overwrite=options.overwrite, **found.how_made(name),
    )  # fmt: skip
    _told(folder, formats, name, measured)


def _of_file(path: Path, options: argparse.Namespace, formats: list[str]) -> None:
    from kd_jax.data.batch import Batch
    from kd_jax.experiments import images
    from kd_jax.export.described import example_shapes, from_safetensors, how_made, name_of, prepared_by
    from kd_jax.export.folder import to_folder
    from kd_jax.files import shown

    for name in ("model", "seed"):
        if getattr(options, name) is not None:
            raise ConfigError(f"--{name} is of a run, and {path} is a file: leave it out")
    prepared = prepared_by(path)
    if prepared not in (None, name_of(images.prepare)):
        raise ConfigError(
            f"{path} is of a model whose inputs {shown(prepared)} prepares, which the file does not hold: export the "
            "model itself, kd.export.to_folder(model, folder, data, prepare=…)"
        )
    folder = Path(options.out) if options.out else path.parent / "export"
    model, inputs = from_safetensors(path), example_shapes(path)
    to_folder(
        model, folder, Batch(inputs), formats=formats, name=path.stem, prepare=prepared and images.prepare,
        license=options.license, overwrite=options.overwrite, **how_made(path),
    )  # fmt: skip
    _told(folder, formats, path.stem, None)


def _told(folder: Path, formats: list[str], name: str, measured: Any) -> None:
    from kd_jax.export.folder import file_names

    written = sorted(file_names(formats, name, reported=measured is not None))
    text = "" if measured is None else f"{measured}\n\n"
    print(f"{text}{folder}/ has {', '.join(written)}.", flush=True)


if __name__ == "__main__":
    command.as_program(main)
