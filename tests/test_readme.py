import ast
import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest

import kd_jax
from kd_jax.data.dataset import make_dataset
from kd_jax.models import torch_weights

README = (Path(__file__).parents[1] / "README.md").read_text()


def test_the_examples_run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """As they stand, one after the other, on a few images of MNIST."""
    whole = kd_jax.load("mnist")
    few = make_dataset(
        "few", whole.train_images[:2560], whole.train_labels[:2560], whole.test_images[:100], whole.test_labels[:100]
    )
    monkeypatch.setattr(kd_jax, "load", lambda source: few)
    monkeypatch.chdir(tmp_path)
    known = kd_jax.mlp([784, 30, 10]).init(0).variables["params"]
    torch_weights.save(known, "teacher.safetensors", names=["fc1", "fc2"])
    distilled, seeds, from_torch = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    names: dict[str, object] = {}
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        exec(compile(distilled, "README.md", "exec"), names)
        measures = ast.literal_eval(capsys.readouterr().out)
        assert {"accuracy", "errors", "nll", "ece", "agreement", "kl_to_teacher"} <= set(measures)
        exec(compile(seeds, "README.md", "exec"), names)
        correct = np.array(re.findall(r"\d+", capsys.readouterr().out), int)
        assert correct.shape == (3,)
        assert (correct > 10).all()
        exec(compile(from_torch, "README.md", "exec"), names)
    found = torch_weights.from_state_dict("student.safetensors")
    assert torch_weights.layer_sizes(found) == (784, 20, 20, 10)


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


def test_every_file_that_the_readme_names_is_there() -> None:
    root = Path(__file__).parents[1]
    named = set(re.findall(r"`((?:tests|kd_jax|benchmarks)/[\w/]+\.py)`", README))
    named |= {link for link in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in link}
    assert len(named) > 15
    assert [name for name in sorted(named) if not (root / name).exists()] == []
