"""How a training lies on the devices of a mesh: JAX partitions the same programs by the shardings of their arguments.

A batch lies along the mesh's axis `data`; parameters as their module says, or a rule; an optimiser's state as the
parameters that it is of. The program is that of one device, so that means over a batch, losses that couple its
examples, batch statistics and random numbers are of the whole batch, wherever its examples lie.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from kd_jax.data.batch import Batch, check_counts
from kd_jax.errors import ConfigError, DataError
from kd_jax.files.names import path_name
from kd_jax.models import Network
from kd_jax.models.partitioning import partitioning
from kd_jax.teacher import LiveTeacher, SeveralTeachers, Teacher
from kd_jax.train.processes import is_shared, part_of, put, put_part
from kd_jax.train.step import TrainState, as_optimized

PyTree = Any
Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

Rule = Callable[[str, tuple[int, ...]], PartitionSpec | None]

DATA, SEED = "data", "seed"


@dataclass(frozen=True)
class Sharding:
    """How what is trained lies on a mesh, where its modules do not say it, or say something else.

    student, teacher: rules `(path, shape) -> PartitionSpec`, for each array of the model by its path
        (`hidden.0.kernel`); None from a rule leaves the array to the module's metadata (`with_partitioning`), and what
        has none lies as it is given, or whole on every device.
    zero: whether the optimiser's state is also divided over the axis `data` (Rajbhandari et al., 2020, stage 1,
        https://arxiv.org/abs/1910.02054), along the first axis of each array that divides. The numbers stay the same.
    """

    student: Rule | None = None
    teacher: Rule | None = None
    zero: bool = False


@dataclass(frozen=True)
class Layout:
    """Where the arrays of one training lie. state: of each leaf of its `TrainState`."""

    mesh: Mesh
    state: tuple[NamedSharding, ...]

    def as_tree(self, state: TrainState) -> TrainState:
        """The shardings in the places of a state's arrays."""
        return jax.tree.unflatten(jax.tree.structure(state), self.state)

    def constrain(self, state: TrainState) -> TrainState:
        """A traced state that lies as it should."""
        return jax.lax.with_sharding_constraint(state, self.as_tree(state))

    def results(self, state: TrainState) -> tuple[Any, ...]:
        """Of what steps give: the state, and numbers that every device has."""
        return self.as_tree(state), whole(self.mesh), whole(self.mesh)


@dataclass(frozen=True)
class Spread:
    """A `prepare` that first divides the examples of a batch over the axis `data`, where they can be."""

    mesh: Mesh
    prepare: Any = None

    def __call__(self, key: Any, inputs: PyTree, train: bool) -> PyTree:
        """As `prepare` is called."""
        if all(leaf.shape[0] % self.mesh.shape[DATA] == 0 for leaf in jax.tree.leaves(inputs)):
            inputs = along_data(self.mesh, inputs)
        return inputs if self.prepare is None else self.prepare(key, inputs, train)


def on_mesh(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Calls a function that takes `mesh=` and `sharding=` with the mesh as JAX's own, its axes partitioned by XLA.

    Raises `ConfigError` for what is no mesh, and for one of other axes than are known here.
    """

    @functools.wraps(function)
    def called(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        mesh, sharding = kwargs.get("mesh"), kwargs.get("sharding")
        if mesh is None and sharding is None:
            return function(*args, **kwargs)
        if mesh is None:
            raise ConfigError('sharding is given without a mesh: give mesh=jax.make_mesh((8,), ("data",)), too')
        if sharding is not None and not isinstance(sharding, Sharding):
            raise ConfigError(f"sharding is {sharding!r}: give kd.Sharding(student=rule, teacher=rule, zero=True)")
        kwargs["mesh"] = known = as_mesh(mesh)
        if is_shared(known) and function.__name__ != "distill":
            raise ConfigError(
                f"{function.__name__} has a mesh of several processes, which kd.distill alone takes: give a mesh of "
                "jax.local_devices(), and to each process seeds of its own"
            )
        context: contextlib.AbstractContextManager[Any]
        try:
            # Along seeds each device has a training of its own.
            context = contextlib.nullcontext() if SEED in known.axis_names else jax.set_mesh(known)
        except ValueError:
            raise ConfigError(
                f"{function.__name__} has a mesh and is called inside of jit, vmap or another transformation: call it "
                "outside, where it compiles for the mesh itself"
            ) from None
        # What a module says of its arrays is read, and not done while it is made: a rule may say something else.
        with context, nnx.use_eager_sharding(False):
            return function(*args, **kwargs)

    return called


def where_it_lies(function: Callable[[Any], Result], given: Any, mesh: Mesh | None) -> Result:
    """`function(given)`, of a model or teacher whose arrays may lie on other devices than those of the mesh."""
    if mesh is None:
        return function(given)
    with jax.set_mesh(None):
        return function(given)


def as_mesh(mesh: Any) -> Mesh:
    """`mesh` with axes that XLA partitions (`AxisType.Auto`), whatever types they have. Raises `ConfigError`."""
    if not isinstance(mesh, Mesh):
        raise ConfigError(f'mesh is {mesh!r}: give a jax.sharding.Mesh such as jax.make_mesh((8,), ("data",))')
    names = tuple(map(str, mesh.axis_names))
    if not {DATA, SEED} & set(names):
        raise ConfigError(
            f"the mesh has {_axes(mesh)}, and batches lie along an axis data: name it so, "
            f'jax.make_mesh({tuple(mesh.devices.shape)}, ("data", …))'
        )
    own = {device.process_index for device in mesh.devices.flat}
    if 1 < len(own) < jax.process_count():
        raise ConfigError(
            f"the mesh has devices of {len(own)} of {jax.process_count()} processes: give a mesh of jax.devices(), or "
            "of jax.local_devices() for a training of each process alone"
        )
    if jax.process_index() not in own:
        raise ConfigError(
            f"the mesh has no device of process {jax.process_index()}: give a mesh of jax.devices(), or of "
            "jax.local_devices() for a training of this process alone"
        )
    return Mesh(mesh.devices, names, axis_types=(AxisType.Auto,) * len(names))


def check_of_one(mesh: Mesh) -> None:
    """Raises `ConfigError` for a mesh whose devices would each train a seed."""
    if SEED in mesh.axis_names:
        raise ConfigError(f"the mesh has {_axes(mesh)}, and this is one training: leave out seed, which kd.compare has")


def check_of_seeds(mesh: Mesh, sharding: Sharding | None) -> None:
    """Raises `ConfigError` for a mesh that has more than seeds."""
    if mesh.devices.size != mesh.shape[SEED] or sharding is not None:
        also = _axes(mesh) if sharding is None else f"{_axes(mesh)}, and sharding is given"
        raise ConfigError(
            f"the mesh has {also}: along seed each device has a training of its own, whole, so give the axis seed "
            "alone, or a mesh with data and without seed"
        )


def off_mesh(mesh: Mesh | None, function: Callable[[], Result]) -> Result:
    """`function()` as without a mesh, so that what is computed is written down alike, whatever the mesh."""
    if mesh is None:
        return function()
    try:
        with jax.set_mesh(None):
            return function()
    except RuntimeError:
        # A module that names axes itself (`with_sharding_constraint`) needs them: one device has them, too.
        first = mesh.devices[(slice(1),) * mesh.devices.ndim]
        with jax.set_mesh(Mesh(first, mesh.axis_names, axis_types=mesh.axis_types)):
            return function()


def key_off_mesh(key: Any) -> Any:
    """A key of the devices of a mesh, as a new one."""
    return jax.random.wrap_key_data(jnp.asarray(np.asarray(jax.random.key_data(key))), impl=jax.random.key_impl(key))


def check_batch_size(mesh: Mesh | None, batch_size: Any) -> None:
    """Raises `ConfigError` for a batch that does not divide over the axis `data`."""
    count = 1 if mesh is None else mesh.shape[DATA]
    if isinstance(batch_size, int) and batch_size % count:
        raise ConfigError(
            f"batch_size is {batch_size}, and the mesh has {count} devices along data: give a multiple of {count}"
        )


def whole(mesh: Mesh) -> NamedSharding:
    """What every device has all of."""
    return NamedSharding(mesh, PartitionSpec())


def along_data(mesh: Mesh, tree: PyTree) -> PyTree:
    """Traced arrays whose first axis counts examples, divided over the axis `data`."""
    return jax.lax.with_sharding_constraint(tree, NamedSharding(mesh, PartitionSpec(DATA)))


def replicated(mesh: Mesh, tree: PyTree) -> PyTree:
    """The arrays of a tree on every device; numbers of Python stay what they are."""
    return jax.tree.map(lambda leaf: put(leaf, whole(mesh)) if _is_array(leaf) else leaf, tree)


def put_batch(mesh: Mesh, batch: Batch) -> Batch:
    """A batch of an iterator, divided over the axis `data`, of which each process has its part.

    Raises `DataError` where it cannot be.
    """
    count, devices = check_counts(batch) * part_of(mesh, DATA)[1], mesh.shape[DATA]
    if count % devices:
        raise DataError(
            f"a batch of the iterator has {count} examples, and the mesh has {devices} devices along data: give "
            f"batches of a multiple of {devices}, and leave out a last one that is incomplete"
        )
    return jax.tree.map(lambda leaf: put_part(leaf, NamedSharding(mesh, PartitionSpec(DATA)), count), batch)


def put_variables(mesh: Mesh, network: Network, variables: PyTree, rule: Rule | None, who: str) -> PyTree:
    """A copy of a model's variables where they belong. Raises `ConfigError`."""
    shardings = variable_shardings(mesh, network, variables, rule, who)
    return jax.tree.map(lambda leaf, sharding: put(leaf, sharding), variables, shardings)


def put_teacher(mesh: Mesh, teacher: Teacher | None, rule: Rule | None) -> Teacher | None:
    """A teacher whose network lies as it says, or the rule; what it knows of examples is on every device."""
    if isinstance(teacher, SeveralTeachers):
        several = [put_teacher(mesh, one, rule) for one in teacher.teachers]
        return dataclasses.replace(teacher, teachers=tuple(one for one in several if one is not None))
    if isinstance(teacher, LiveTeacher):
        variables = put_variables(mesh, teacher.network, teacher.variables, rule, "teacher")
        return dataclasses.replace(teacher, variables=variables)
    return replicated(mesh, teacher)


def layout_of(mesh: Mesh, sharding: Sharding | None, network: Network, variables: PyTree, state: TrainState) -> Layout:
    """How a state lies, of which the shapes are enough. variables: given ones keep their places, where nothing says
    others; or None. Raises `ConfigError`.
    """
    sharding = sharding or Sharding()
    known = state.variables if variables is None else variables
    of_variables = variable_shardings(mesh, network, known, sharding.student, "student")
    other = jax.tree.map(lambda _: whole(mesh), state._replace(variables=None))
    params = network.split(state.variables)[0], network.split(of_variables)[0]
    trained, lying = (as_optimized(one, two) for one, two in zip(params, (state.learned, other.learned), strict=True))
    moments = _like_parameters(mesh, state.optimizer_state, trained, lying)
    if sharding.zero:
        moments = jax.tree.map(functools.partial(_divided, mesh), state.optimizer_state, moments)
    return Layout(mesh, tuple(jax.tree.leaves(other._replace(variables=of_variables, optimizer_state=moments))))


def variable_shardings(mesh: Mesh, network: Network, variables: PyTree, rule: Rule | None, who: str) -> PyTree:
    """Of a model's variables: by the rule, else by their module, else as they lie. Raises `ConfigError`."""
    parts = network.split(variables)
    said = network.split(partitioning(network, variables))

    def one(path: Any, leaf: Any, by_module: PartitionSpec) -> NamedSharding:
        # As in the files of a model: without what part it is of.
        name, shape = path_name(path[1:]), tuple(np.shape(leaf))
        spec = None if rule is None else rule(name, shape)
        if spec is not None and not isinstance(spec, PartitionSpec):
            raise ConfigError(f"the rule of the {who} gives {spec!r} for {name}: give a PartitionSpec, or None")
        if spec is None:
            spec = by_module if by_module != PartitionSpec() else _as_it_lies(mesh, leaf)
        _check_spec(mesh, spec, shape, f"{name} of the {who}")
        return NamedSharding(mesh, spec)

    return network.merge(*jax.tree_util.tree_map_with_path(one, parts, said))


def _as_it_lies(mesh: Mesh, leaf: Any) -> PartitionSpec:
    """Of an array that lies on such a mesh already; else on every device."""
    sharding = getattr(leaf, "sharding", None)
    if isinstance(sharding, NamedSharding) and dict(sharding.mesh.shape) == dict(mesh.shape):
        return sharding.spec
    return PartitionSpec()


def _check_spec(mesh: Mesh, spec: PartitionSpec, shape: tuple[int, ...], what: str) -> None:
    if len(spec) > len(shape):
        raise ConfigError(f"{what} has the shape {shape}, and is to lie as {spec}: give at most one name for each axis")
    given = [name for names in spec for name in (names if isinstance(names, tuple) else (names,)) if name is not None]
    twice = next((name for name in given if given.count(name) > 1), None)
    if twice is not None:
        raise ConfigError(f"{what} is to lie along {twice!r} twice ({spec}): give each name once")
    for size, names in zip(shape, spec, strict=False):
        names = () if names is None else names if isinstance(names, tuple) else (names,)
        for name in names:
            if name not in mesh.axis_names:
                raise ConfigError(
                    f"{what} is to lie along {name!r}, and the mesh has {_axes(mesh)}: give a mesh with it, of 1 "
                    "device if need be, or a rule, kd.Sharding(student=…, teacher=…)"
                )
        count = int(np.prod([mesh.shape[name] for name in names]))
        if size % count:
            raise ConfigError(
                f"{what} has the shape {shape}, of which {size} is to lie along {' and '.join(map(str, names))} on "
                f"{count} devices: sizes must be multiples, so give another mesh, or a rule that leaves it whole"
            )


def _like_parameters(mesh: Mesh, state: PyTree, params: PyTree, shardings: PyTree) -> PyTree:
    """Of an optimiser's state: what has the path and the shape of a parameter lies as this does, all else is whole."""
    known = [
        (tuple(map(str, path)), np.shape(leaf), sharding)
        for (path, leaf), sharding in zip(jax.tree.leaves_with_path(params), jax.tree.leaves(shardings), strict=True)
    ]
    # The longest path that fits is the parameter's own.
    known.sort(key=lambda one: len(one[0]), reverse=True)

    def one(path: Any, leaf: Any) -> NamedSharding:
        names = tuple(map(str, path))
        for end, shape, sharding in known:
            if np.shape(leaf) == shape and names[len(names) - len(end) :] == end:
                return sharding
        return whole(mesh)

    return jax.tree_util.tree_map_with_path(one, state)


def _divided(mesh: Mesh, leaf: Any, sharding: NamedSharding) -> NamedSharding:
    """Also over the axis `data`, along the first axis that divides and has no other name."""
    spec = (*sharding.spec, *(None,) * (np.ndim(leaf) - len(sharding.spec)))
    taken = {name for names in spec if names for name in (names if isinstance(names, tuple) else (names,))}
    if DATA in taken:
        return sharding
    for place, size in enumerate(np.shape(leaf)):
        if spec[place] is None and size % mesh.shape[DATA] == 0:
            return NamedSharding(mesh, PartitionSpec(*spec[:place], DATA, *spec[place + 1 :]))
    return sharding


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array | np.ndarray)


def _axes(mesh: Mesh) -> str:
    return f"the {'axis' if len(mesh.axis_names) == 1 else 'axes'} {', '.join(map(str, mesh.axis_names))}"
