"""The benchmarks measure what they say: the limit's arithmetic, contestants that learn, ratios, options, processes."""

import importlib
import importlib.util
import json
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import ModuleType

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import kd_jax
from benchmarks import (
    caches,
    convolution_time,
    end_to_end,
    kd_jax_ways,
    keras_networks,
    keras_ways,
    language,
    limit,
    linear_divergence,
    processes,
    report,
    seeds,
    steps,
    streaming,
    throughput,
)
from benchmarks.measure import Contestant, Setting, Table, quartiles, ratios, take_turns, with_best
from kd_jax.data.dataset import Dataset
from kd_jax.experiments import images as of_images
from kd_jax.train import memory

needs_torch = pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="PyTorch is not installed")
needs_keras = pytest.mark.skipif(importlib.util.find_spec("keras") is None, reason="Keras is not installed")
ROWS = ("teacher", "student", "distilled")


@pytest.fixture(scope="module")
def mnist() -> Dataset:
    data = kd_jax.load("mnist")
    return data._replace(
        train_images=data.train_images[:3200],
        train_labels=data.train_labels[:3200],
        test_images=data.test_images[:1000],
        test_labels=data.test_labels[:1000],
    )


@pytest.fixture(autouse=True)
def as_without_tests() -> Iterator[None]:
    """Adam of optax and Keras promote types and ranks."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.mark.parametrize(("row", "batch"), [("teacher", 32), ("student", 32), ("student", 256)])
def test_the_operations_of_the_limit_are_those_that_xla_counts(row: str, batch: int, mnist: Dataset) -> None:
    job = kd_jax_ways.job(row, mnist, batch)
    state = jax.eval_shape(partial(of_images.init, setup=job.setup), jax.random.key(0), job.settings)
    rows = jax.ShapeDtypeStruct((batch,), jnp.int32)
    step = jax.jit(partial(of_images.train_step, setup=job.setup))
    counted = step.lower(state, jax.random.key(0), job.images, rows, job.settings).cost_analysis()["flops"]
    parameters = sum(leaf.size for leaf in jax.tree.leaves(job.setup.network.split(state.variables)[0]))
    own = limit.operations(steps.SIZES[row], batch)
    # XLA counts one operation for each elementwise result as well: Adam's, the scaling of the images, dropout.
    assert own < counted < own + 30 * parameters + 30 * batch * sum(steps.SIZES[row])


def test_the_limit_is_the_slower_of_arithmetic_and_traffic() -> None:
    sizes, batch = (784, 20, 20, 10), 32
    assert limit.operations(sizes, batch) == 2 * 32 * (2 * 784 * 20 + 3 * 20 * 20 + 3 * 20 * 10)
    assert limit.traffic(sizes, batch) == 32 * 16_330 + 32 * 784
    assert limit.seconds(sizes, batch, 1.0, 0.0) == limit.operations(sizes, batch)
    assert limit.seconds(sizes, batch, 0.0, 1.0) == limit.traffic(sizes, batch)
    assert limit.seconds(sizes, batch, 1e-9, 1e-12) == 1e-9 * limit.operations(sizes, batch)


def test_the_limit_takes_the_best_probe() -> None:
    probed = {"product a": [3.0, 3.0, 1.0], "product b": [2.0, 2.0, 9.0], "copy a": [1.0, 1.0, 1.0]}
    assert limit.best(probed, "product") == "product b"


def test_ratios_are_taken_within_a_round() -> None:
    assert ratios([10.0, 40.0], [5.0, 10.0]) == [2.0, 4.0]
    assert ratios([10.0, 40.0], [5.0, 10.0], rate=True) == [0.5, 0.25]
    assert quartiles([7.0]) == (7.0, 7.0, 7.0)
    assert quartiles([4.0, 1.0, 2.0, 3.0, 5.0]) == (2.0, 3.0, 4.0)


def test_the_best_way_counts_and_is_named() -> None:
    figures = {"a": {"x": [3.0, 3.0, 3.0], "y": [2.0, 2.0, 99.0], "kd_jax": [1.0, 1.0, 1.0]}}
    chosen, best = with_best(figures, "tuned", ("x", "y", "absent"))
    assert best == {"a": "y"}
    assert chosen["a"] == {"kd_jax": [1.0, 1.0, 1.0], "tuned": [2.0, 2.0, 99.0]}
    assert with_best(figures, "tuned", ("x", "y"), rate=True)[1] == {"a": "x"}


def test_turns_are_equal_in_number_and_divided_by_the_units() -> None:
    runs = {"a": 0, "b": 0}

    def run(name: str) -> None:
        runs[name] += 1

    found = take_turns({name: Contestant(partial(run, name), 1000) for name in runs}, 4, label="")
    assert runs == {"a": 5, "b": 5}
    assert [len(values) for values in found.values()] == [4, 4]
    assert all(0 < value < 1e-3 for values in found.values() for value in values)


MADE_UP = Table(
    "steps",
    "Made up",
    "ms",
    {
        "teacher": {"kd_jax": [2.0, 4.0, 6.0], "notebook": [10.0, 8.0, 18.0], "limit": [1.0, 2.0, 3.0]},
        "student": {"kd_jax": [0.5, 0.5, 0.5]},
    },
    notes=("nothing is left out",),
)


def test_a_table_has_medians_and_ratios_with_quartiles() -> None:
    lines = report.markdown(MADE_UP).splitlines()
    assert [cell.strip() for cell in lines[2].split("|")] == ["", "ms", "notebook", "kd_jax", "limit", ""]
    cells = [cell.strip() for cell in lines[4].split("|")]
    assert cells == ["", "teacher", "10 (3.0×, 2.5 to 4.0)", "4", "2 (0.5×, 0.5 to 0.5)", ""]
    assert [cell.strip() for cell in lines[5].split("|")] == ["", "student", "–", "0.5", "–", ""]
    assert lines[-1] == "- nothing is left out"


def test_all_rounds_are_kept(tmp_path: Path) -> None:
    report.write([MADE_UP], {"cores": 2}, "a command", tmp_path / "new")
    kept = json.loads((tmp_path / "new" / "throughput.json").read_text())
    assert kept["tables"]["steps"]["figures"] == MADE_UP.figures
    assert (kept["command"], kept["environment"]) == ("a command", {"cores": 2})
    assert "cores: 2" in (tmp_path / "new" / "throughput.md").read_text()
    assert (tmp_path / "new" / "throughput.png").stat().st_size > 10_000


@pytest.mark.slow
@pytest.mark.parametrize("row", ROWS)
def test_kd_jax_learns(row: str, mnist: Dataset) -> None:
    trainer = kd_jax_ways.Trainer(kd_jax_ways.job(row, mnist))
    rows = trainer.order()[:25]
    losses = [trainer.train(rows) for _ in range(4)]
    assert losses[-1] < (0.5 if row == "teacher" else 0.95) * losses[0]
    assert int(trainer.state.step) == 100


def test_a_turn_of_a_whole_epoch_shuffles(mnist: Dataset) -> None:
    trainer = kd_jax_ways.Trainer(kd_jax_ways.job("student", mnist))
    contestant = kd_jax_ways.contestant(trainer, 1875)
    assert contestant.units == 100
    before = trainer.order()
    contestant.run()
    assert int(trainer.state.step) == 100
    assert bool(jnp.any(trainer.order() != before))


@pytest.mark.slow
@pytest.mark.parametrize("students", [1, 3])
def test_a_group_of_students_learns_each_on_its_own(students: int, mnist: Dataset) -> None:
    group = kd_jax_ways.Group(kd_jax_ways.job("distilled", mnist), students)
    rows = group.orders(50)
    assert rows.shape == (students, 50, 32)
    assert students == 1 or bool(jnp.any(rows[0] != rows[1]))
    first, last = group.train(rows), group.train(rows)
    assert last < 0.97 * first


@pytest.mark.slow
@needs_torch
@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("way", ["notebook", "eager"])
def test_pytorch_learns(row: str, way: str, mnist: Dataset) -> None:
    import torch

    from benchmarks import torch_reference, torch_ways

    torch.manual_seed(0)
    job = torch_ways.Job(row, mnist)
    images, labels = torch_reference.as_tensors(mnist.train_images[:500], mnist.train_labels[:500])
    train_some = job.notebook() if way == "notebook" else job.tuned(way)

    def loss() -> float:
        return float(torch_reference.mean_loss(job.model.eval(), torch_reference.Batch(images, labels)).detach())

    before = loss()
    contestant = torch_ways.contestant(train_some, 60)
    contestant.run()
    assert contestant.units == 60
    assert loss() < (0.5 if row == "teacher" else 0.97) * before


@needs_torch
def test_stacked_students_are_those_that_train_alone() -> None:
    import torch

    from benchmarks import torch_reference, torch_stacked

    data = kd_jax.load("mnist")
    torch.manual_seed(3)
    together = torch_stacked.Trainer(2, data)
    torch.manual_seed(3)
    alone = [torch_reference.Student() for _ in range(2)]
    rows = torch.randint(len(data.train_labels), (4, 2, 32))
    together.train(rows)
    images, labels = torch_reference.as_tensors(data.train_images, data.train_labels)
    for number, model in enumerate(alone):
        optimizer = torch_reference.tuned_adam(model)
        for own in rows[:, number]:
            batch = torch_reference.Batch(images[own], labels[own], torch.zeros(32, 10))
            torch_reference.train_step(model, optimizer, batch, soft=torch_reference.kl_without_t_squared)
        stacked = together.students.weights[0][number].T
        torch.testing.assert_close(stacked, model.fc1.weight, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@needs_torch
@pytest.mark.parametrize("way", ["notebook", "eager"])
def test_the_whole_notebook_in_pytorch_learns(way: str, mnist: Dataset, capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    from benchmarks import torch_run

    torch.manual_seed(0)
    images, labels = mnist.train_images[:960], mnist.train_labels[:960]
    correct = torch_run.whole(way, mnist._replace(train_images=images, train_labels=labels), 2)
    assert correct["teacher"] > 600
    assert min(correct["student"], correct["distilled"]) > 130
    assert capsys.readouterr().out == f"{torch_run.FIRST_STEP}\n"


@needs_torch
def test_what_runs_pytorch_alone_does_not_import_jax() -> None:
    code = "import sys, benchmarks.torch_run; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], check=False).returncode == 0


@pytest.mark.slow
@needs_keras
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("row", ROWS)
def test_keras_learns(row: str, mnist: Dataset) -> None:
    assert keras_ways.why_not() is None
    # Few steps are a matter of the initial parameters.
    importlib.import_module("keras").utils.set_random_seed(0)
    train_some = keras_ways.trainer(row, mnist, 40)
    losses = [train_some() for _ in range(3)]
    assert all(math.isfinite(loss) for loss in losses)
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.slow
@needs_keras
@pytest.mark.filterwarnings("ignore")
def test_keras_has_the_same_networks() -> None:
    keras = importlib.import_module("keras")
    for name, make in keras_networks.MADE.items():
        ours = kd_jax.models.as_model(getattr(kd_jax.models, name)(num_classes=10, in_channels=3, rngs=nnx.Rngs(0)))
        trained = sum(math.prod(weight.shape) for weight in make(keras, 10).trainable_weights)
        assert trained == kd_jax.models.count_parameters(ours), name


def test_everybody_counts_the_same_test_images(mnist: Dataset) -> None:
    for row in ("teacher", "student"):
        assert 0 <= kd_jax_ways.evaluation(row, mnist).run() <= 1000  # type: ignore[operator]


def test_students_that_do_not_fit_are_refused(mnist: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    layers = (784, 20, 20, 10)
    of_one = memory.needed(kd_jax.mlp(layers).network, layers, examples=3200, test_examples=1000).total(32)
    # A parameter, its gradient and both of Adam's means are 16 bytes; `test_memory` compares with what XLA allocates.
    parameters = 784 * 20 + 20 + 20 * 20 + 20 + 20 * 10 + 10
    assert 16 * parameters < of_one
    # As many as fit, and not one more.
    for free, fits in [(1024 * of_one, True), (1024 * of_one - 1, False), (2**21, False)]:
        monkeypatch.setattr(memory, "available", lambda free=free: free)
        refusal = seeds.why_not(1024, mnist)
        assert (refusal is None) == fits
    assert refusal is not None
    assert seeds.why_not(1, mnist) is None
    named = re.fullmatch(r"1024 students are left out: they need (\d+\.\d) GiB, and 0\.0 GiB are free", refusal)
    assert named is not None
    assert abs(float(named[1]) - 1024 * of_one / 2**30) <= 0.05 + 1e-9
    slept = {"kd_jax": Contestant(partial(time.sleep, 0.001))}
    monkeypatch.setattr(seeds, "_contestants", lambda number, data: slept)
    table = seeds.seeds(Setting(mnist, 2, 1, True))[0]
    assert list(table.figures) == ["1"]
    assert any("16 students are left out" in note for note in table.notes)
    # 5 epochs of 100 steps of at least a millisecond.
    assert 0 < table.figures["1"]["kd_jax"][0] <= 2


def test_a_process_is_timed_and_its_memory_is_its_own() -> None:
    here = bytearray(300 * 2**20)
    code = "import time; b = bytearray(100 * 2**20); print('now', flush=True); time.sleep(0.4)"
    found = processes.run(["-c", code], mark="now")
    assert found.output == ["now"]
    assert found.marked_s is not None
    assert 0 < found.marked_s < found.seconds - 0.3
    assert found.peak_bytes is None or 100 * 2**20 < found.peak_bytes < len(here)


def test_a_process_that_fails_tells_why() -> None:
    with pytest.raises(processes.ProcessError, match=r"ended with 3: the reason"):
        processes.run(["-c", "print('the reason'); raise SystemExit(3)"], mark="")


def test_a_process_starts_without_the_users_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "warm")
    code = "import os; print(os.environ.get('JAX_COMPILATION_CACHE_DIR'), os.environ['KD_JAX_CACHE'])"
    assert processes.run(["-c", code], mark="", environment={"KD_JAX_CACHE": "own"}).output == ["None own"]


def test_the_saved_data_are_those_that_kd_jax_reads(mnist: Dataset, tmp_path: Path) -> None:
    read = kd_jax.load(f"npz:{end_to_end.save(mnist, 320, tmp_path / 'data.npz')}")
    assert (read.train_images == mnist.train_images[:320]).all()
    assert (read.test_labels == mnist.test_labels).all()


def test_help_names_every_section(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        throughput.main(["--help"])
    said = capsys.readouterr().out
    assert stop.value.code == 0
    assert all(name in said for name in throughput.SECTIONS)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--rounds", "1"], "--rounds: '1' is too few rounds for a spread: give a whole number of at least 2"),
        (
            ["--whole-rounds", "none"],
            "--whole-rounds: 'none' is no number of rounds: give a whole number of at least 1",
        ),
        (["--only", "step"], "--only: invalid choice: 'step'"),
        (["--out", __file__], "is no folder: name one, such as results/throughput"),
        (["--round", "3"], "unknown option '--round': did you mean --rounds?"),
    ],
)
def test_a_bad_option_is_one_sentence(options: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        throughput.main(options)
    said = capsys.readouterr()
    assert stop.value.code == 2
    assert sentence in said.err
    assert said.err.count("\n") == 1
    assert said.out == ""


def test_the_loss_of_a_large_vocabulary_is_measured_against_equal_ones(tmp_path: Path) -> None:
    shapes = ["--tokens", "32", "--vocabulary", "256", "--widths", "8", "12"]
    linear_divergence.main([*shapes, "--rounds", "2", "--chunk", "16", "--out", str(tmp_path)])
    (table,) = json.loads((tmp_path / "linear-divergence.json").read_text())["tables"].values()
    assert list(table) == ["linear_divergence", "log-softmaxes", "kd.losses.kd"]
    for row in table.values():
        assert len(row["seconds"]) == len(row["processor seconds"]) == 2
        assert row["temporary bytes"] > 0
    assert "chunks of 16" in (tmp_path / "linear-divergence.md").read_text()
    given = linear_divergence.arrays(32, 256, [8, 12], "float32")
    values = [float(loss(*given)) for loss in linear_divergence.forms("kl", 16).values()]
    assert values == pytest.approx([values[0]] * 3, rel=1e-5)


def test_caches_are_measured_against_all_logits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is kept whole has no bias, what is left out has one, and draws vary."""
    names = ["logits, float32", "top-12, renormalised", "12 draws"]
    monkeypatch.setattr(caches, "KINDS", {name: caches.KINDS[name] for name in names})
    small = {"vocabulary": 100, "steps": 6, "tokens": 64, "caches": 3, "words": 6000}
    caches.main([*(f"--{name}={number}" for name, number in small.items()), "--out", str(tmp_path)])
    whole, top, draws = json.loads((tmp_path / "caches.json").read_text())["kinds"].values()
    assert whole["bytes a token"] == pytest.approx(4 * 100, rel=0.1)
    # A class of 7 bits and 4 bits of counts are 2 bytes, beside a byte for how many there are.
    assert top["bytes a token"] > draws["bytes a token"] > 1 + 2
    assert whole["bias"] < 1e-5 < 0.01 < top["bias"]
    assert (whole["standard deviation"], top["standard deviation"]) == (0, 0)
    assert draws["standard deviation"] > 0.01
    assert "| 12 draws" in (tmp_path / "README.md").read_text()


@needs_torch
def test_a_study_of_counts_says_what_its_intervals_show() -> None:
    distribution = importlib.import_module("benchmarks.distribution")
    counts = {str(seed): 9300 + seed % 7 for seed in range(20)}

    def study(more: int) -> dict[str, object]:
        shifted = {seed: count + more for seed, count in counts.items()}
        own = {"torch": dict.fromkeys(distribution.ROWS, counts), "kd_jax": dict.fromkeys(distribution.ROWS, shifted)}
        return {"settings": {"teachers": 4}, "counts": own}

    assert re.fullmatch(
        r"No difference is shown: each interval has 0\. Students may differ by [+-]\d images at most, .*",
        distribution.verdict(study(0)),
    )
    said = distribution.verdict(study(-30))
    assert said.startswith("A difference is shown of: teacher, student alone, distilled, correct KL without T², ")
    assert re.search(r"differ by -3\d images at most", said)


def test_the_operations_of_a_network_are_those_that_papers_count():
    # Multiplications and additions of one image: 40.8 million for ResNet-20, with the shortcuts' convolutions 41.3.
    from benchmarks import networks

    of_image = networks.operations("resnet20") / (3 * 2 * networks.BATCH)
    assert of_image == pytest.approx(41e6, rel=0.02)
    # Depthwise convolutions count their own channels alone: 6.5 million where all channels would be many times that.
    assert networks.operations("mobilenet_v2") / (3 * 2 * networks.BATCH) < 10e6


def test_a_contestant_apart_does_its_units_in_another_process():
    from benchmarks import limit
    from benchmarks.apart import Apart

    with Apart() as apart:
        found = apart.contestant(limit.jax_product)
        assert found.units == limit.jax_product().units
        found.run()
        process = found.run.args[0]
        assert process.poll() is None
        assert process.pid != os.getpid()
    assert process.returncode == 0


def test_a_contestant_apart_that_fails_says_so_and_is_gone(capfd):
    from benchmarks.apart import Apart

    with Apart() as apart, pytest.raises(RuntimeError, match=r"'benchmarks\.apart'\] ended with 1 before it answered"):
        apart.contestant(divmod, 1, 0)
    assert "ZeroDivisionError" in capfd.readouterr().err
    with Apart() as apart:
        found = apart.contestant(limit.jax_product)
        found.run.args[0].kill()
        found.run.args[0].wait()
        with pytest.raises(RuntimeError, match="ended with -9"):
            found.run()


def test_what_a_contestant_apart_prints_is_no_answer(capfd):
    from benchmarks.apart import Apart

    printing = "print('loud', flush=True) or __import__('benchmarks.measure', fromlist='_').Contestant(lambda: 2.5, 3)"
    with Apart() as apart:
        found = apart.contestant(eval, printing)
        assert (found.units, found.run()) == (3, 2.5)
    assert "loud" in capfd.readouterr().err


def test_another_python_without_pytorch_is_refused(capsys, tmp_path):
    from benchmarks import throughput

    with pytest.raises(SystemExit):
        throughput.main(["--torch-python", str(tmp_path / "python")])
    assert "is no Python that has PyTorch" in capsys.readouterr().err


@pytest.mark.slow
def test_the_steps_of_networks_train_alone_and_distilled():
    from benchmarks import networks

    for row in (networks.Row("lenet"), networks.Row("lenet", "resnet8")):
        train = networks.kd_jax_trainer(row, 4)
        first, *_, last = [train() for _ in range(30)]
        assert last < first


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The section of language models in small."""
    sizes = {"VOCABULARY": 32, "WIDTH": 16, "HEADS": 2, "HIDDEN": 32, "POSITIONS": 16, "PROMPT": 4, "EXAMPLES": 32}
    for name, value in sizes.items():
        monkeypatch.setattr(language, name, value)
    return language


def test_the_operations_of_a_decoder_are_those_of_its_products(tiny: ModuleType) -> None:
    tokens, width, hidden, positions = 16 * 16, 16, 32, 16
    layer = 4 * width * width + 3 * width * hidden + 2 * positions * width
    # RoPE's cosines and sines go through a product with the unit matrix of half of a head's width, 4.
    rotation = 2 * positions * 4 * 4
    assert tiny.operations(2) == 3 * 2 * (tokens * (2 * layer + width * 32) + rotation)


@pytest.mark.slow
def test_a_decoder_trains_alone_and_distilled(tiny: ModuleType) -> None:
    for row in (tiny.Row(1), tiny.Row(1, True)):
        train = tiny.kd_jax_trainer(row, 4)
        first, *_, last = [train() for _ in range(10)]
        assert last < 0.98 * first


@needs_torch
def test_a_decoder_in_pytorch_is_the_same_and_trains(tiny: ModuleType) -> None:
    import torch

    torch.manual_seed(0)
    for row in (tiny.Row(1), tiny.Row(1, True)):
        train = tiny.torch_trainer(row, 4, "eager")
        first, *_, last = [train() for _ in range(10)]
        assert last < 0.98 * first
    theirs, tokens = tiny.torch_network(2), tiny.tokens()[:3]
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.mul_(4)
        wanted = theirs(torch.tensor(tokens).long())
        # A sequence in two goes through the cache, and the second in steps.
        cache, places = theirs.cache(3, 16), torch.arange(16)
        stepwise = [theirs.decode(torch.tensor(tokens[:, :4]).long(), places[:4], cache)]
        for at in range(4, 16):
            stepwise.append(theirs.decode(torch.tensor(tokens[:, at : at + 1]).long(), places[at : at + 1], cache))
        torch.testing.assert_close(torch.stack(stepwise, 1), wanted[:, 3:], rtol=1e-4, atol=1e-4)
        written = tiny.torch_written(theirs, torch.tensor(tokens[:, :4]).long(), 5, theirs.decode)
    assert written.shape == (3, 9)
    ours = kd_jax.models.load_state_dict(tiny._made(2, nnx.Rngs(0)), theirs.state_dict())
    assert float(wanted.abs().max()) > 1
    assert jnp.allclose(ours(jnp.asarray(tokens)), wanted.numpy(), rtol=1e-4, atol=1e-4)


def test_the_section_of_language_models_has_steps_and_sampling(
    tiny: ModuleType, mnist: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiny, "has_torch", lambda python: False)
    monkeypatch.setattr(tiny.limit, "SQUARE", 64)
    steps_table, sampling = tiny.language(Setting(mnist, 3, 1, True))
    assert set(steps_table.figures["student"]) == {"kd_jax", "limit"}
    assert sampling.rate
    assert len(sampling.figures["student"]["kd_jax"]) == 3
    assert min(sampling.figures["student"]["kd_jax"]) > 0
    assert "PyTorch is not installed" in sampling.notes[-1]


def test_the_calls_of_onednn_are_summed_by_their_kinds() -> None:
    line = "onednn_verbose,v1,primitive,exec,cpu,{kind},brg,{what},src:f32,,,mb64,{ms}"
    calls = [("convolution", "forward_training", 30), ("reorder", "undef", 2), ("convolution", "forward_training", 10)]
    told = "\n".join(
        [line.format(kind="convolution", what="forward_training", ms=1000), "the calls begin"]
        + [line.format(kind=kind, what=what, ms=ms) for kind, what, ms in calls]
        + ["onednn_verbose,v1,info,cpu", "milliseconds a step: 5.5"]
    )
    found = convolution_time.times(told)
    assert found == pytest.approx({"convolution, forward training": 2, "reorder": 0.1, "all else": 3.4, "a step": 5.5})


def test_streaming_tells_memory_s_seconds_over_those_of_the_disk() -> None:
    """Of the same round; the seconds are of three epochs."""
    line = streaming.row("dense", "stream", [3.0, 6.0, 9.0], [6.0, 6.0, 10.0], 3)
    assert line == "| dense | stream | 2.000 | 0.90 | 0.50 to 1.00 |"
