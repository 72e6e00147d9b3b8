"""The README is short, and tells of the presets as they are. Its code and links: `test_docs.py`."""

import json

import pytest
from pages import ROOT

import kd_jax

MOST_LINES = 120


def test_it_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= MOST_LINES


@pytest.mark.parametrize(("folder", "preset"), [("run", "tuned"), ("without-shifts", "tuned-without-shifts")])
def test_kept_runs_are_of_the_presets_as_they_are(folder: str, preset: str) -> None:
    kept = json.loads((ROOT / "results" / "tuned" / folder / "results.json").read_text())["config"]
    config = kd_jax.make_config(preset, seeds=kept["seeds"], seed=kept["seed"])
    earlier = {"warmup": 0.0, "teacher_warmup": 0.0, "shift_share": 1.0, "teacher_shift_share": 1.0}
    assert earlier | kept | {"preset": preset} == json.loads(json.dumps(config.as_dict()))
