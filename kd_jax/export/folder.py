"""A folder with a student in several formats, the report of teacher against student, and a model card."""

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kd_jax.data.batch import as_batch
from kd_jax.errors import ConfigError, DataError
from kd_jax.export import litert
from kd_jax.export.described import check_beside, name_of, to_safetensors
from kd_jax.export.onnx import check_packages, to_int8, to_onnx
from kd_jax.export.reporting import Report, report
from kd_jax.export.stablehlo import to_stablehlo
from kd_jax.files import listed, reason
from kd_jax.files.written import write_whole
from kd_jax.version import __version__

PyTree = Any

FORMATS = ("safetensors", "stablehlo", "onnx", "int8", "litert")
"""What a student can be exported as; `int8` is an ONNX file with weights of 8 bits."""

USUAL = FORMATS[:-1]
"""What it is exported as where no format is named: `litert` needs packages of its own."""

_FILES = {
    "safetensors": ("{name}.safetensors", "the parameters; `{name}.json` says what they are"),
    "stablehlo": ("{name}.stablehlo", "the program for JAX, on a CPU, GPU or TPU"),
    "onnx": ("{name}.onnx", "the program for onnxruntime and others; its output is `logits`"),
    "int8": ("{name}-int8.onnx", "the same with weights of 8 bits"),
    "litert": ("{name}.tflite", "the program for LiteRT; its output is `logits`"),
}
_CARD, _EXPORTED = "README.md", "exported by kd_jax"
_REPORT = ("report.json", "report.md", "report.png")
_PREPARED = "The ONNX, LiteRT and StableHLO files do that themselves; of the safetensors file it is no part."
# What a program imports, and how it reads each of them.
_READ = {
    "safetensors": (("kd_jax",), 'student = kd_jax.export.from_safetensors("{name}.safetensors"{model})'),
    "stablehlo": (
        ("pathlib", "jax.export"),
        'program = bytearray(pathlib.Path("{name}.stablehlo").read_bytes())\n'
        "logits = jax.export.deserialize(program).call(inputs)",
    ),
    "onnx": (
        ("onnxruntime",),
        '(logits,) = onnxruntime.InferenceSession("{name}.onnx").run(["logits"], {inputs})',
    ),
    "int8": (
        ("onnxruntime",),
        '(logits,) = onnxruntime.InferenceSession("{name}-int8.onnx").run(["logits"], {inputs})',
    ),
    "litert": (
        ("ai_edge_litert.interpreter",),
        'runner = ai_edge_litert.interpreter.Interpreter("{name}.tflite").get_signature_runner()\n'
        'logits = runner(**{inputs})["logits"]',
    ),
}


def to_folder(
    model: Any, folder: str | Path, data: Any, *, formats: Sequence[str] = USUAL, name: str = "student",
    teacher: Any = None, prepare: Any = None, made: str | None = None, arguments: Mapping[str, Any] | None = None,
    settings: Mapping[str, Any] | None = None, distilled: bool | None = None, license: str | None = None,
    rounds: int = 30, overwrite: bool = False,
) -> Report | None:  # fmt: skip
    """Writes a model into a folder in several formats, with a model card, `README.md`, that says what is there.

    data: a `Batch` in memory of held-out examples: of the inputs' shapes, and of the report.
    formats: of `FORMATS`, all but `litert` where none is named. name: of the files.
    prepare: as of the training; the programs do it, too.
    teacher: with which the model is compared: `report.json`, `report.md` and `report.png` are written, and the card has
        the table; without one there is no report, and None is given back. As of `report`, whatever teaches.
    made, arguments: as of `to_safetensors`. settings: how it was trained, by name, for the card. distilled: whether a
        teacher taught it, for the card, which says nothing of it where it is None. license: of the model, as Hugging
        Face names it, "apache-2.0". rounds: as of `report`.
    overwrite: whether files of these names that are there are replaced. All are made before the first is written.

    Raises `ConfigError` and `DataError` as the formats do, and `ConfigError` where files are there.
    """
    unknown = [one for one in formats if one not in FORMATS]
    if unknown or not formats:
        given = f"{unknown[0]!r} is no format" if unknown else "no format is given"
        raise ConfigError(f"{given}: use {', '.join(FORMATS[:-1])} or {FORMATS[-1]}")
    data = as_batch(data)
    formats, folder, inputs = tuple(dict.fromkeys(formats)), Path(folder).expanduser(), data.inputs
    _check_name(name, teacher)
    for one in file_names(formats, name, reported=True):
        if not overwrite and (folder / one).exists():
            raise ConfigError(
                f"{folder} already holds {one}: choose another folder, or replace it with overwrite=True, which is "
                "--overwrite on the command line"
            )
    if "safetensors" in formats:
        check_beside(folder / f"{name}.safetensors")
    of_onnx = "onnx" in formats or "int8" in formats
    if of_onnx:
        check_packages()
    if "litert" in formats:
        litert.check_packages()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{folder} cannot be made ({reason(error)}): name a folder that you may write to") from None
    found = None
    with tempfile.TemporaryDirectory() as beside:
        paths = {one: Path(beside) / _FILES[one][0].format(name=name) for one in FORMATS}
        if "safetensors" in formats:
            path = paths["safetensors"]
            to_safetensors(model, path, made=made, arguments=arguments, inputs=inputs, prepare=prepare)
        if "stablehlo" in formats:
            to_stablehlo(model, paths["stablehlo"], inputs, prepare=prepare)
        if of_onnx:
            to_onnx(model, paths["onnx"], inputs, prepare=prepare)
        if "int8" in formats:
            to_int8(paths["onnx"], paths["int8"])
        if "litert" in formats:
            litert.to_litert(model, paths["litert"], inputs, prepare=prepare)
        if teacher is not None:
            models, int8 = {"teacher": teacher, name: model}, "int8" in formats
            found = report(models, data, prepare=prepare, onnx=of_onnx, int8=int8, rounds=rounds)
            found.save(beside)
        text = card(
            found, formats=formats, name=name, inputs=inputs, settings=settings, license=license, made=made,
            prepare=prepare, distilled=distilled,
        )  # fmt: skip
        (Path(beside) / _CARD).write_bytes(text.encode())
        if found is None:
            _remove_report(folder)
        for one in file_names(formats, name, reported=found is not None):
            write_whole(folder / one, (Path(beside) / one).read_bytes())
    return found


def file_names(formats: Sequence[str], name: str, *, reported: bool) -> list[str]:
    """Of what `to_folder` writes."""
    files = [_FILES[one][0].format(name=name) for one in formats]
    return [*files, *([f"{name}.json"] if "safetensors" in formats else []), *(_REPORT if reported else ()), _CARD]


def _check_name(name: str, teacher: Any) -> None:
    taken = (*(["teacher"] if teacher is not None else []), Path(_CARD).stem, "report")
    if name in taken or not name or Path(name).name != name:
        raise ConfigError(f"name is {name!r}: give a file's name other than {listed(taken)}, without a folder")


def _remove_report(folder: Path) -> None:
    """That of another model, which an earlier export wrote here and `overwrite` gives up."""
    before = folder / _CARD
    if before.is_file() and _EXPORTED.encode() in before.read_bytes():
        for one in _REPORT:
            (folder / one).unlink(missing_ok=True)


def card(
    found: Report | None, *, formats: Sequence[str], name: str, inputs: PyTree, settings: Mapping[str, Any] | None,
    license: str | None, made: str | None, prepare: Any, distilled: bool | None,
) -> str:  # fmt: skip
    """The model card, as Hugging Face reads it: a header of YAML, and Markdown with the numbers of the report."""
    from kd_jax.export.program import named_inputs

    lines = ["---", *([f"license: {license}"] if license else []), "library_name: kd_jax"]
    lines += [
        "tags:",
        *(["- knowledge-distillation"] if distilled else []),
        "- jax",
        "- flax",
        *(f"- {one}" for one in formats if one != "int8"),
    ]
    row = None if found is None else found.rows[name]
    if found is not None and row is not None and "accuracy" in row.measures:
        of = (settings or {}).get("dataset", "held-out examples")
        lines += [
            "metrics:", "- accuracy", "model-index:", f"- name: {name}", "  results:", "  - task:",
            "      type: classification", "    dataset:", f"      name: {of}", "      type: custom",
            "    metrics:", "    - type: accuracy", f"      value: {row.measures['accuracy']:.6g}",
        ]  # fmt: skip
    what = {True: "A distilled model", False: "A model that no teacher taught", None: "A model"}[distilled]
    lines += ["---", "", f"# {name}", "", f"{what}, {_EXPORTED} {__version__}.", "", "## Files", ""]
    lines += [f"- `{_FILES[one][0].format(name=name)}`: {_FILES[one][1].format(name=name)}" for one in formats]
    if "safetensors" in formats and made is not None:
        lines += [f"- `{name}.json` says, too, that {made} makes the model."]
    if prepare is not None:
        lines += ["", f"Inputs are prepared by `{name_of(prepare)}`. " + _PREPARED]
    own = {"name": name, "inputs": named_inputs(inputs), "model": "" if made is not None else ", model"}
    imports = sorted({f"import {package}" for one in formats for package in _READ[one][0]})
    lines += ["", "```python", *imports, "", *(_READ[one][1].format(**own) for one in formats), "```", ""]
    if "safetensors" in formats and made is None:
        lines += ["`model` is the module or `kd.Model` whose parameters these are, with any values.", ""]
    if found is not None:
        lines += ["## Beside the teacher", "", found.markdown(), "", "![quality against latency](report.png)", ""]
        lines += [f"- {key}: {value}" for key, value in found.environment.items()] + [""]
    if settings:
        lines += ["## How it was trained", "", *(f"- {key}: {value}" for key, value in settings.items()), ""]
    return "\n".join(lines)
