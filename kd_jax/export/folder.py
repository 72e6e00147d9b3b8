"""A folder with a student in several formats, the report of teacher against student, and a model card."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kd_jax.errors import ConfigError, DataError
from kd_jax.export.described import to_safetensors
from kd_jax.export.onnx import to_int8, to_onnx
from kd_jax.export.reporting import Report, report
from kd_jax.export.stablehlo import to_stablehlo
from kd_jax.files import reason
from kd_jax.files.written import write_whole
from kd_jax.version import __version__

PyTree = Any

FORMATS = ("safetensors", "stablehlo", "onnx", "int8")
"""What a student can be exported as; `int8` is an ONNX file with weights of 8 bits."""

_FILES = {
    "safetensors": ("{name}.safetensors", "the parameters; `{name}.json` says how they are made and what they are"),
    "stablehlo": ("{name}.stablehlo", "the program for JAX, on a CPU, GPU or TPU"),
    "onnx": ("{name}.onnx", "the program for onnxruntime and others; its output is `logits`"),
    "int8": ("{name}-int8.onnx", "the same with weights of 8 bits"),
}
_READ = {
    "safetensors": 'student = kd_jax.export.from_safetensors("{name}.safetensors", model)',
    "stablehlo": 'program = bytearray(pathlib.Path("{name}.stablehlo").read_bytes())\n'
    "logits = jax.export.deserialize(program).call(inputs)",
    "onnx": '(logits,) = onnxruntime.InferenceSession("{name}.onnx").run(["logits"], {{"{input}": inputs}})',
    "int8": '(logits,) = onnxruntime.InferenceSession("{name}-int8.onnx").run(["logits"], {{"{input}": inputs}})',
}


def to_folder(
    model: Any, folder: str | Path, data: Any, *, formats: Sequence[str] = FORMATS, name: str = "student",
    teacher: Any = None, prepare: Any = None, made: str | None = None, arguments: Mapping[str, Any] | None = None,
    settings: Mapping[str, Any] | None = None, license: str | None = None, rounds: int = 30,
) -> Report | None:  # fmt: skip
    """Writes a model into a folder in several formats, with a model card, `README.md`, that says what is there.

    data: a `Batch` in memory of held-out examples: of the inputs' shapes, and of the report.
    formats: of `FORMATS`. name: of the files. prepare: as of the training; the programs do it, too.
    teacher: with which the model is compared: `report.json`, `report.md` and `report.png` are written, and the card has
        the table; without one there is no report, and None is given back.
    made, arguments: as of `to_safetensors`. settings: how it was trained, by name, for the card. license: of the model,
        as Hugging Face names it, "apache-2.0". rounds: as of `report`.

    Raises `ConfigError` and `DataError` as the formats do.
    """
    unknown = [one for one in formats if one not in FORMATS]
    if unknown or not formats:
        given = f"{unknown[0]!r} is no format" if unknown else "no format is given"
        raise ConfigError(f"{given}: use {', '.join(FORMATS[:-1])} or {FORMATS[-1]}")
    folder, inputs = Path(folder).expanduser(), data.inputs
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{folder} cannot be made ({reason(error)}): name a folder that you may write to") from None
    paths = {one: folder / _FILES[one][0].format(name=name) for one in FORMATS}
    if "safetensors" in formats:
        to_safetensors(model, paths["safetensors"], made=made, arguments=arguments, inputs=inputs)
    if "stablehlo" in formats:
        to_stablehlo(model, paths["stablehlo"], inputs, prepare=prepare)
    if "onnx" in formats or "int8" in formats:
        to_onnx(model, paths["onnx"], inputs, prepare=prepare)
    if "int8" in formats:
        to_int8(paths["onnx"], paths["int8"])
    if "onnx" not in formats:
        paths["onnx"].unlink(missing_ok=True)
    found = None
    if teacher is not None:
        models = {"teacher": teacher, name: model}
        found = report(models, data, prepare=prepare, int8="int8" in formats, rounds=rounds)
        found.save(folder)
    text = card(found, formats=formats, name=name, inputs=inputs, settings=settings, license=license)
    write_whole(folder / "README.md", text.encode())
    return found


def card(
    found: Report | None, *, formats: Sequence[str], name: str, inputs: PyTree, settings: Mapping[str, Any] | None,
    license: str | None,
) -> str:  # fmt: skip
    """The model card, as Hugging Face reads it: a header of YAML, and Markdown with the numbers of the report."""
    from kd_jax.export.program import input_names

    lines = ["---", *([f"license: {license}"] if license else []), "library_name: kd_jax"]
    lines += ["tags:", "- knowledge-distillation", "- jax", "- flax", *(f"- {one}" for one in formats if one != "int8")]
    row = None if found is None else found.rows[name]
    if found is not None and row is not None and row.interval is not None:
        lines += [
            "metrics:", "- accuracy", "model-index:", f"- name: {name}", "  results:", "  - task:",
            "      type: classification", "    dataset:", "      name: held-out examples", "      type: custom",
            "    metrics:", "    - type: accuracy", f"      value: {row.measures['accuracy']:.6g}",
        ]  # fmt: skip
    lines += ["---", "", f"# {name}", "", f"A distilled model, exported by kd_jax {__version__}.", "", "## Files", ""]
    lines += [f"- `{_FILES[one][0].format(name=name)}`: {_FILES[one][1].format(name=name)}" for one in formats]
    first = input_names(inputs)[0]
    reading = [_READ[one].format(name=name, input=first) for one in formats]
    lines += ["", "```python", *reading, "```", ""]
    if found is not None:
        lines += ["## Beside its teacher", "", found.markdown(), "", "![accuracy against latency](report.png)", ""]
        lines += [f"- {key}: {value}" for key, value in found.environment.items()] + [""]
    if settings:
        lines += ["## How it was trained", "", *(f"- {key}: {value}" for key, value in settings.items()), ""]
    return "\n".join(lines)
