import numpy as np
import pytest

from kd_jax.experiments.shell import progress
from kd_jax.experiments.shell.progress import Bars, Lines, Overall, Silent, StageName, duration
from kd_jax.train.step import Metrics


def chunk(loss: list[float], accuracy: list[float]) -> Metrics:
    return Metrics(np.array(loss), np.array(loss), np.array(accuracy))


def tell(watcher: Lines) -> None:
    watcher.compiled(2.0, 100.0)
    watcher.start(StageName("student", "student alone"), epochs=2, steps=4)
    for epoch in (0, 1):
        watcher.advance(epoch=epoch, steps=3, metrics=chunk([1.0, 3.0], [0.5, 0.7]), seconds=1.0)
        watcher.advance(epoch=epoch, steps=1, metrics=chunk([4.0, 8.0], [1.0, 1.0]), seconds=1.0)
    watcher.finish()


def test_lines_are_means_over_steps_and_seeds_one_for_each_epoch(capsys: pytest.CaptureFixture[str]) -> None:
    tell(Lines())
    first, *epochs = capsys.readouterr().out.splitlines()
    assert first == "Compiled in 2.0 s; training will take about 2 min."
    assert epochs == [f"student    epoch {n}/2  loss 3.0000  training accuracy 70.00%  4 steps/s" for n in (1, 2)]


@pytest.mark.parametrize("columns", ["0", "80", "200"])
def test_bars_show_epoch_loss_and_speed_at_any_width(
    columns: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    tell(Bars())
    last = capsys.readouterr().out.rstrip().split("\r")[-1]
    assert "epoch 2/2  loss 3.0000  4 steps/s" in last
    assert last.startswith("student   |")
    assert len(last) <= 110


def test_silent_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    tell(Silent())
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("seconds", "says"), [(0.2, "about 1 s"), (63.4, "about 63 s"), (100.0, "about 2 min"), (9000.0, "about 2.5 h")]
)
def test_durations_are_as_a_person_says_them(seconds: int | float, says: str) -> None:
    assert duration(seconds) == says


def test_what_a_checkpoint_has_done_counts_and_not_for_the_speed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One stage is done, of one a half, and the rest takes 2 s by the clock; the third is to come."""
    clock = iter([10.0, 12.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    watcher = Overall(
        {"teacher-0": 1.0, "distilled-1": 3.0},
        4 * 1.0 + 2 * 4 * 3.0,
        {"teacher-0": "teacher", "distilled-1": "distilled"},
        bar=False,
    )
    watcher.start(StageName("teacher-0", "teacher", 0), epochs=1, steps=4, done=4)
    watcher.finish()
    watcher.start(StageName("distilled-1", "distilled student", 0), epochs=1, steps=4, done=2)
    watcher.advance(epoch=0, steps=2, metrics=chunk([1.0, 3.0], [0.5, 0.7]), seconds=0.1)
    watcher.finish()
    assert " ".join(capsys.readouterr().out.split()) == "distilled 57% of all, about 4 s left"


def test_many_trainings_are_told_apart_by_words(capsys: pytest.CaptureFixture[str]) -> None:
    words = {"distilled-1": "distilled 1 of 2", "test-alone-0": "test: alone"}
    watcher = Overall(dict.fromkeys(words, 1.0), 100.0, words, bar=False)
    for name in words:
        for block in (0, 1):
            watcher.start(StageName(name, "student", block), epochs=1, steps=10)
            watcher.advance(epoch=0, steps=10, metrics=chunk([1.0], [0.5]), seconds=0.1)
            watcher.finish()
    told = [line[:26].strip() for line in capsys.readouterr().out.splitlines()]
    assert told == ["distilled 1 of 2", "distilled 1 of 2", "test: alone", "test: alone"]
