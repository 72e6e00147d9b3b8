"""The same steps in kd_jax, as the experiment runs them."""

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Key

import kd_jax
from benchmarks.measure import Contestant
from kd_jax.data.batch import epoch_order
from kd_jax.experiments import images as of_images
from kd_jax.experiments.images import Images, Settings, Setup
from kd_jax.experiments.notebook import recipes
from kd_jax.methods import CrossEntropy, KDWithoutTSquared, Method


class Job(NamedTuple):
    """What one of the three rows trains. An untrained teacher's logits cost what a trained one's do."""

    setup: Setup
    settings: Settings
    images: Images

    @property
    def per_epoch(self) -> int:
        """Steps in an epoch."""
        return len(self.images.labels) // self.setup.batch_size


def job(row: str, data: kd_jax.Dataset, batch_size: int = 32) -> Job:
    """The row's network, loss and data, with the settings of the notebook."""
    config = kd_jax.make_config()
    teacher, student = recipes.networks(config, data)
    distilled = row == "distilled"
    method: Method = CrossEntropy()
    if distilled:
        method = KDWithoutTSquared(jnp.float32(config.alpha), jnp.float32(config.temperature))
    setup = Setup(teacher if row == "teacher" else student, batch_size=batch_size)
    taught = jnp.zeros((len(data.train_labels), data.classes)) if distilled else None
    images = Images(jnp.asarray(data.train_images), jnp.asarray(data.train_labels), taught)
    return Job(setup, Settings(jnp.float32(config.learning_rate), method), images)


class Trainer:
    """Trains one model; `state` goes on from call to call."""

    def __init__(self, job: Job) -> None:
        self.job, self.key, self.epoch = job, jax.random.key(0), 0
        self.state = of_images.init(self.key, job.settings, setup=job.setup)
        self._order = jax.jit(partial(epoch_order, examples=len(job.images.labels), batch_size=job.setup.batch_size))
        self._steps = jax.jit(partial(_steps, setup=job.setup), donate_argnums=0)
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
        self.state, loss = self._steps(self.state, self.key, job.images, rows, job.settings)
        return float(loss)


class Group:
    """Trains many students at once, each with its own parameters, batch order and key."""

    def __init__(self, job: Job, students: int) -> None:
        self.job, self.epoch = job, 0
        self.keys = jax.vmap(jax.random.key)(jnp.arange(students))
        self.states = jax.jit(jax.vmap(lambda key: of_images.init(key, job.settings, setup=job.setup)))(self.keys)
        self._go = jax.jit(partial(_group_steps, setup=job.setup), donate_argnums=0)

    def orders(self, steps: int) -> Int[Array, "students steps batch"]:
        """Rows of `steps` steps for each student, as one shuffle gives them."""
        examples, batch_size = len(self.job.images.labels), self.job.setup.batch_size
        order = partial(epoch_order, epoch=0, examples=examples, batch_size=batch_size)
        return jax.jit(lambda keys: jax.lax.map(lambda key: order(key)[:steps], keys))(self.keys)

    def train(self, rows: Int[Array, "students steps batch"]) -> float:
        """A step of every student for each of its rows. Returns their mean loss."""
        job = self.job
        self.states, loss = self._go(self.states, self.keys, job.images, rows, job.settings)
        return float(jnp.mean(loss))


def _steps(
    state: Any,
    key: Key[Array, ""],
    images: Images,
    rows: Int[Array, "steps batch"],
    settings: Settings,
    *,
    setup: Setup,
) -> tuple[Any, Array]:
    """The state after a step for each of the rows, and their mean loss; all means are taken, as the experiment does."""
    state, metrics = of_images.scan_steps(state, key, images, rows, settings, setup=setup)
    return state, jax.tree.map(lambda values: jnp.mean(values, axis=0), metrics).loss


def _group_steps(
    states: Any,
    keys: Key[Array, " students"],
    images: Images,
    rows: Int[Array, "students steps batch"],
    settings: Settings,
    *,
    setup: Setup,
) -> tuple[Any, Array]:
    def one(state: Any, key: Key[Array, ""], own: Int[Array, "steps batch"]) -> tuple[Any, Array]:
        return _steps(state, key, images, own, settings, setup=setup)

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
    network = job(row, data).setup.network
    variables = network.init(jax.random.key(0))
    images, labels = jnp.asarray(data.test_images), jnp.asarray(data.test_labels)
    count = jax.jit(lambda logits: jnp.sum(jnp.argmax(logits, axis=-1).astype(labels.dtype) == labels))
    return Contestant(lambda: int(count(of_images.predict(variables, images, network=network))))


def environment() -> dict[str, object]:
    """What JAX's figures depend on."""
    device = jax.devices()[0]
    return {
        "jax device": device.device_kind,
        "jax matmul precision": jax.config.values["jax_default_matmul_precision"] or "default",
    }
