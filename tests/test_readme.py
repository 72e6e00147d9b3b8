import ast
import json
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import kd_jax
from kd_jax.data.dataset import make_dataset

README = (Path(__file__).parents[1] / "README.md").read_text()


def test_the_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """As they stand, one after the other in one program, on a few images of MNIST, and as users have set JAX."""
    whole = kd_jax.load("mnist")
    few = make_dataset(
        "few", whole.train_images[:640], whole.train_labels[:640], whole.test_images[:100], whole.test_labels[:100]
    )
    monkeypatch.setattr(kd_jax, "load", lambda source: few)
    monkeypatch.chdir(tmp_path)
    taught = kd_jax.mlp([784, 30, 10]).init(0)
    kd_jax.torch_weights.save(taught.variables["params"], "teacher.safetensors", names=["hidden", "output"])
    examples = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    names: dict[str, Any] = {}
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        for example in examples:
            exec(compile(example, "README.md", "exec"), names)
    measures, counts = re.fullmatch(r"(\{.*\})\n\[(.*)\]\n", capsys.readouterr().out).groups()  # type: ignore[union-attr]
    found = ast.literal_eval(measures)
    assert found["correct"] + found["errors"] == 100
    assert found["agreement"] > 0.1
    assert all(np.isfinite(value) for value in found.values())
    assert (np.array(counts.split(), int) > 10).all()
    assert kd_jax.torch_weights.layer_sizes(kd_jax.torch_weights.from_state_dict("student.safetensors")) == (
        784, 20, 20, 10,
    )  # fmt: skip


def test_every_option_that_the_readme_names_exists() -> None:
    from benchmarks import throughput
    from kd_jax import reproduce, run, sweep

    parsers = [command._parser() for command in (run, sweep, reproduce, throughput)]
    known = {text for parser in parsers for action in parser._actions for text in action.option_strings}
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", README))
    assert named - known == set()


@pytest.mark.parametrize(("folder", "preset"), [("run", "tuned"), ("without-shifts", "tuned-without-shifts")])
def test_kept_runs_are_of_the_presets_as_they_are(folder: str, preset: str) -> None:
    kept = json.loads((Path(__file__).parents[1] / "results" / "tuned" / folder / "results.json").read_text())["config"]
    config = kd_jax.make_config(preset, seeds=kept["seeds"], seed=kept["seed"])
    earlier = {"warmup": 0.0, "teacher_warmup": 0.0, "shift_share": 1.0, "teacher_shift_share": 1.0}
    assert earlier | kept | {"preset": preset} == json.loads(json.dumps(config.as_dict()))
