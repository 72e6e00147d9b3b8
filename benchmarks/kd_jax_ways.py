"""The same steps in kd_jax, as the experiment runs them."""

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Key

import kd_jax
from benchmarks.measure import Contestant
from kd_jax import Examples, Hyperparameters, KDWeights, Output, Recipe
from kd_jax.experiments.notebook import recipes
from kd_jax.train import step as train


class Job(NamedTuple):
    """What one of the three rows trains. An untrained teacher's logits cost what a trained one's do."""

    recipe: Recipe
    hyperparameters: Hyperparameters
    examples: Examples

    @property
    def per_epoch(self) -> int:
        """Steps in an epoch."""
        return len(self.examples.labels) // self.recipe.batch_size


def job(row: str, data: kd_jax.Dataset, batch_size: int = 32) -> Job:
    """The row's network, loss and data, with the settings of the notebook."""
    config = kd_jax.make_config()
    teacher, student = recipes.networks(config, data)
    distilled = row == "distilled"
    weights = KDWeights(jnp.float32(config.alpha), jnp.float32(config.temperature)) if distilled else ()
    method = kd_jax.KD_WITHOUT_T_SQUARED if distilled else kd_jax.CROSS_ENTROPY
    recipe = Recipe(teacher if row == "teacher" else student, method, batch_size=batch_size)
    taught = Output(jnp.zeros((len(data.train_labels), data.classes))) if distilled else None
    examples = Examples(jnp.asarray(data.train_images), jnp.asarray(data.train_labels), taught)
    return Job(recipe, Hyperparameters(jnp.float32(config.learning_rate), weights), examples)


class Trainer:
    """Trains one model; `state` goes on from call to call."""

    def __init__(self, job: Job) -> None:
        self.job, self.key, self.epoch = job, jax.random.key(0), 0
        self.state = train.init(self.key, job.hyperparameters, recipe=job.recipe)
        self._order = jax.jit(
            partial(train.epoch_order, examples=len(job.examples.labels), batch_size=job.recipe.batch_size)
        )
        self._steps = jax.jit(partial(train.train_steps, recipe=job.recipe), donate_argnums=0)
        self._upcoming, self._other_thread = self.order(), ThreadPoolExecutor(1)

    def train_epoch(self) -> float:
        """Trains an epoch, and shuffles the next one meanwhile. Returns the mean loss of its steps."""
        self.epoch += 1
        upcoming = self._other_thread.submit(lambda: jax.block_until_ready(self.order()))
        loss = self.train(self._upcoming)
        self._upcoming = upcoming.result()
        return loss

    def order(self) -> Int[Array, "steps batch"]:
        """The rows of every batch of an epoch."""
        return self._order(self.key, jnp.int32(self.epoch))

    def train(self, rows: Int[Array, "steps batch"]) -> float:
        """A step for each of the rows. Returns their mean loss."""
        job = self.job
        self.state, metrics = self._steps(self.state, self.key, job.examples, rows, job.hyperparameters)
        return float(metrics.loss)


class Group:
    """Trains many students at once, each with its own parameters, batch order and key."""

    def __init__(self, job: Job, students: int) -> None:
        self.job, self.epoch = job, 0
        self.keys = jax.vmap(jax.random.key)(jnp.arange(students))
        self.states = jax.jit(jax.vmap(lambda key: train.init(key, job.hyperparameters, recipe=job.recipe)))(self.keys)
        self._go = jax.jit(partial(_group_steps, recipe=job.recipe), donate_argnums=0)

    def orders(self, steps: int) -> Int[Array, "students steps batch"]:
        """Rows of `steps` steps for each student, as one shuffle gives them."""
        recipe, examples = self.job.recipe, len(self.job.examples.labels)
        order = partial(train.epoch_order, epoch=0, examples=examples, batch_size=recipe.batch_size)
        return jax.jit(lambda keys: jax.lax.map(lambda key: order(key)[:steps], keys))(self.keys)

    def train(self, rows: Int[Array, "students steps batch"]) -> float:
        """A step of every student for each of its rows. Returns their mean loss."""
        job = self.job
        self.states, loss = self._go(self.states, self.keys, job.examples, rows, job.hyperparameters)
        return float(jnp.mean(loss))


def _group_steps(
    states: Any,
    keys: Key[Array, " students"],
    examples: Examples,
    rows: Int[Array, "students steps batch"],
    hyperparameters: Hyperparameters,
    *,
    recipe: Recipe,
) -> tuple[Any, Array]:
    def one(state: Any, key: Key[Array, ""], own: Int[Array, "steps batch"]) -> tuple[Any, Array]:
        state, metrics = train.train_steps(state, key, examples, own, hyperparameters, recipe=recipe)
        return state, metrics.loss

    if len(keys) > 1:
        return jax.vmap(one)(states, keys, rows)
    # As the experiment does it: one student alone is not batched.
    alone = jax.tree.map(lambda leaf: leaf[0], (states, keys, rows))
    return jax.tree.map(lambda leaf: leaf[None], one(*alone))


def contestant(trainer: Trainer, steps: int) -> Contestant:
    """A turn of `steps` steps; of a whole epoch, with its shuffle, where there are as many."""
    if steps >= trainer.job.per_epoch:
        return Contestant(trainer.train_epoch, trainer.job.per_epoch)
    rows = trainer.order()[:steps]
    return Contestant(lambda: trainer.train(rows), steps)


def evaluation(row: str, data: kd_jax.Dataset) -> Contestant:
    """Counting the right answers of the test set."""
    network = job(row, data).recipe.network
    params, state = network.init(jax.random.key(0))
    images, labels = jnp.asarray(data.test_images), jnp.asarray(data.test_labels)
    count = jax.jit(lambda logits: jnp.sum(jnp.argmax(logits, axis=-1).astype(labels.dtype) == labels))
    return Contestant(lambda: int(count(kd_jax.predict(params, state, images, network=network))))


def environment() -> dict[str, object]:
    """What JAX's figures depend on."""
    device = jax.devices()[0]
    return {
        "jax device": device.device_kind,
        "jax matmul precision": jax.config.values["jax_default_matmul_precision"] or "default",
    }
