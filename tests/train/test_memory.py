from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from kd_jax.experiments import stage as stages
from kd_jax.experiments.shell.progress import StageName
from kd_jax.experiments.stage import Role
from kd_jax.methods.logits import KD, KDWeights
from kd_jax.models.network import Output, mlp
from kd_jax.train import memory
from kd_jax.train.step import Examples, Hyperparameters, Recipe

EXAMPLES = 60_000


@pytest.mark.parametrize(
    ("hidden", "students", "batch_size"), [((20, 20), 30, 32), ((20, 20), 30, 200), ((100, 100), 5, 100)]
)
def test_what_xla_allocates_is_estimated_and_not_by_too_much(
    hidden: tuple[int, ...], students: int, batch_size: int
) -> None:
    """Buffers of the program that trains, and of the one that shuffles beside it; no image is measured here."""
    images, labels = np.zeros((EXAMPLES, 28, 28, 1), np.uint8), np.zeros(EXAMPLES, np.int32)
    examples = Examples(jnp.asarray(images), jnp.asarray(labels), Output(jnp.zeros((EXAMPLES, 10))))
    layers = (784, *hidden, 10)
    recipe = Recipe(mlp(layers), KD, batch_size=batch_size)
    each = Hyperparameters(jnp.full(students, 0.01), KDWeights(jnp.full(students, 0.5), jnp.full(students, 4.0)))
    name = StageName("distilled", "distilled student")
    prepared = stages.prepare(name, Role.STUDENT, recipe, each, tuple(range(students)), examples, epochs=1)
    programs = [max(prepared.programs.items())[1], prepared.order]
    found = [program.memory_analysis() for program in programs]  # type: ignore[attr-defined]
    shared = images.nbytes + labels.nbytes + 4 * EXAMPLES * 10
    taken = sum(f.argument_size_in_bytes + f.output_size_in_bytes + f.temp_size_in_bytes for f in found)
    taken -= sum(f.alias_size_in_bytes for f in found) + shared
    estimated = students * memory.needed(mlp(layers), layers, examples=EXAMPLES, test_examples=0).total(batch_size)
    assert taken <= 1.05 * estimated
    assert estimated <= 1.5 * taken


def test_a_container_has_what_it_does_not_use_yet(tmp_path: Path) -> None:
    assert memory.left_to_the_container(tmp_path) is None
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.left_to_the_container(tmp_path) is None
    (tmp_path / "memory.max").write_text("1000\n")
    assert memory.left_to_the_container(tmp_path) == 1000
    (tmp_path / "memory.current").write_text("700\n")
    (tmp_path / "memory.stat").write_text("anon 500\ninactive_file 150\n")
    assert memory.left_to_the_container(tmp_path) == 450
    (tmp_path / "memory.current").write_text("1200\n")
    (tmp_path / "memory.stat").write_text("inactive_file 50\n")
    assert memory.left_to_the_container(tmp_path) == 0
