"""The state before the first step of a training, made where it lies, and what a step computes, as a digest."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from kd_jax.data.batch import Batch
from kd_jax.files.digests import program_digest
from kd_jax.methods import Method
from kd_jax.models import Model
from kd_jax.teacher import Teacher
from kd_jax.train.checks import first_batch
from kd_jax.train.lookup import of_batch
from kd_jax.train.processes import of_all
from kd_jax.train.sharding import DATA, Sharding, key_off_mesh, layout_of
from kd_jax.train.sources import Memory, Stream
from kd_jax.train.step import TrainState, init, step

PyTree = Any


def first_state(source: Memory | Stream, model: Model, mesh: Mesh | None, sharding: Sharding) -> TrainState:
    """The state before the first step. On a mesh the source is told how it lies."""
    batch, taught = _first(source)
    start = None if model.variables is None else copied(model.variables)
    if mesh is None:
        state = init(source.key, source.training, source.method, batch, taught, variables=start)
        # An optimiser or a method may hand out an array of its own: a key, say.
        own = ("learned", "carried", "optimizer_state")
        return state._replace(**{name: copied(getattr(state, name)) for name in own})

    def first(key: Any, start: PyTree) -> TrainState:
        return init(key, source.training, source.method, batch, taught, variables=start)

    # Compiled for its shardings: a student may be larger than one device.
    shapes = jax.eval_shape(first, source.key, start)
    source.layout = layout_of(mesh, sharding, model.network, model.variables, shapes)
    return jax.jit(first, donate_argnums=1, out_shardings=source.layout.as_tree(shapes))(source.key, start)


def digest_of_step(source: Memory | Stream, state: TrainState, mesh: Mesh | None) -> str:
    """SHA-256 of what one update computes."""
    key = source.key if mesh is None else key_off_mesh(source.key)

    def one(state: TrainState, batch: Batch, teacher: Teacher | None, method: Method) -> TrainState:
        return step(state, batch, teacher, key, method, training=source.training)[0]

    return program_digest(one, state, *_first(source), source.method)


def _first(source: Memory | Stream) -> tuple[Batch, Teacher | None]:
    """Shapes of a batch, and the teacher of its rows."""
    if isinstance(source, Memory):
        return first_batch(source.data, source.teacher, source.batch_size)
    first = source.peek()
    return of_all(source.mesh, DATA, first), of_batch(source.teacher, first, source.mesh)


def copied(variables: PyTree) -> PyTree:
    """The memory of a training's state is used again by its steps; what is the user's stays."""
    return jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), variables)
