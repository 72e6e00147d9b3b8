"""Where the steps of an epoch come from: data in memory, as compiled loops, or an iterator of batches."""

import contextlib
import queue
import threading
from collections.abc import Callable, Generator, Iterator, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Int, Key

from kd_jax.convolution import canonical
from kd_jax.data.batch import Batch, as_batch, check_counts, check_values, check_whole, epoch_order, is_in_memory
from kd_jax.data.stream import Batches
from kd_jax.errors import ConfigError, DataError
from kd_jax.methods import Method
from kd_jax.models import programs
from kd_jax.models.vocabulary import check_tokens
from kd_jax.teacher import Teacher
from kd_jax.train import groups
from kd_jax.train.checks import check_batch, float_labels
from kd_jax.train.done import Done, Packed, Position, packed
from kd_jax.train.exchange import LEAVING, exchange, in_step
from kd_jax.train.fit import scan_steps
from kd_jax.train.groups import Group
from kd_jax.train.lookup import of_batch, of_rows
from kd_jax.train.processes import is_shared, of_all, part_of
from kd_jax.train.sharding import DATA, Layout, check_batch_size, replicated
from kd_jax.train.sizes import loop_lengths
from kd_jax.train.step import Metrics, Training, TrainState, is_finite, step

PyTree = Any

_AHEAD = 2


class Memory:
    """A `Batch` in memory: an epoch is a few compiled loops over its shuffled rows."""

    def __init__(
        self, data: Batch, teacher: Teacher | None, key: Key[Array, ""], method: Method, training: Training,
        *, batch_size: int, every: int | None, mesh: Mesh | None = None,
    ) -> None:  # fmt: skip
        self.data = jax.tree.map(jnp.asarray, data) if mesh is None else replicated(mesh, data)
        self.teacher, self.mesh = teacher, mesh
        self.layout: Layout | None = None
        self.key, self.method, self.training, self.batch_size = key, method, training, batch_size
        self.examples = check_counts(data)
        self.steps = self.examples // batch_size
        parts = 1 if teacher is None else teacher.parts
        between = [min(every or self.steps, self.steps - n) for n in range(0, self.steps, every or max(1, self.steps))]
        self.lengths = [one for steps in between for one in loop_lengths(steps, -(-parts * steps // self.steps))]

    def epoch(self, state: TrainState, number: int, start: int) -> Iterator[Done]:
        """The steps of an epoch from `start` on."""
        examples, batch_size = self.examples, self.batch_size

        def draw(key: Key[Array, ""], number: Int[Array, ""]) -> Int[Array, "steps batch"]:
            return epoch_order(key, number, examples=examples, batch_size=batch_size)

        order = programs.call(draw, self.key, jnp.int32(number), same=("order", examples, batch_size))
        done = 0
        for length in self.lengths:
            first, done = max(done, start), done + length
            if first < done:
                rows = order[first:done]
                taught = of_rows(self.teacher, rows, self.mesh)
                program = programs.compiled(
                    self._chunk, state, self.key, self.data, taught, rows, self.method,
                    same=("chunk", self.training, self.layout), donate=True,
                    shardings=None if self.layout is None else self.layout.results(state),
                )  # fmt: skip
                state, metrics, finite = program(state, self.key, self.data, taught, rows, self.method)
                yield Done(state, done - first, metrics, finite, self.batch_size)

    def _chunk(
        self, state: TrainState, key: Any, data: Batch, teacher: Teacher | None, rows: Any, method: Method
    ) -> tuple[TrainState, Metrics, Array]:
        how: dict[str, Any] = {"training": self.training, "layout": self.layout}
        state, metrics = scan_steps(state, key, data, teacher, rows, method, **how)
        return state, metrics, is_finite(state, self.training.network)


class Stream:
    """An iterable of batches: a step for each, with the next ones on their way to the device.

    steps: of an epoch; None for as many as one pass has. The iterator then begins anew in each epoch.
    """

    def __init__(
        self, data: Any, teacher: Teacher | None, key: Key[Array, ""], method: Method, training: Training,
        *, steps: int | None, labels_count: bool, every: int | None = None, mesh: Mesh | None = None,
    ) -> None:  # fmt: skip
        self.shared = is_shared(mesh)
        self.apart = self.shared and not isinstance(data, Batches)
        self.told = exchange("batches") if self.shared else None
        if isinstance(data, Batches) and teacher is not None and teacher.per_example:
            if (inputs := data.known_inputs()) is not None:
                teacher.check_inputs(inputs)
            data = data.numbered(teacher.examples)
        if mesh is not None and isinstance(data, Batches):
            data = data.part(*part_of(mesh, DATA))
        self.data, self.teacher, self.key, self.method, self.training = data, teacher, key, method, training
        self.steps, self.every = steps, every
        # A loader of the user's may say what comes next by what was learned.
        self.most = groups.Sizes(teacher) if isinstance(data, Batches) and mesh is None else lambda batch: 1
        self.classes: int | None = None
        self.vocabularies: tuple[Mapping[str, int], ...] = ()
        self.labels_count, self.mesh = labels_count, mesh
        self.layout: Layout | None = None
        self.iterator: Any = None
        self.drawn = 0  # batches that the iterator has given since it began
        self.first: Batch | None = None
        self.checked: set[Any] = set()  # shapes that are known to go through a step

    def peek(self) -> Batch:
        """The first batch, which is trained on, too. Raises `DataError` where there is none."""
        if self.first is None:
            self.iterator = iter(self.data)
            raw = next(self.iterator, None)
            if raw is None:
                raise DataError("the iterator of training batches is empty: give at least one batch")
            self.first = _with_examples(as_batch(raw))
            self.checked.add(groups.shapes_of(of_all(self.mesh, DATA, self.first)))
        return self.first

    def go_to(self, position: Position) -> None:
        """Sets the iterator where a checkpoint left it; one that cannot is drawn from until there."""
        if self.iterator is None or self.iterator is not self.data:
            self.iterator = iter(self.data)
            self.first = None
        if position.state is not None and hasattr(self.iterator, "set_state"):
            self.first = None
            self.iterator.set_state(position.state)
        else:
            for _ in range(position.drawn - (self.first is not None)):  # the first was drawn to look at it
                if next(self.iterator, None) is None:
                    break
            self.first = None
        self.drawn = position.drawn

    def epoch(self, state: TrainState, number: int, start: int) -> Iterator[Done]:
        """The steps of an epoch from `start` on."""
        done, known, program = start, None, None
        for group, taught, position in self._prefetched(start, number):
            given, most = (self.key, group.batch, taught, self.method, group.count), group.most
            of_taught = groups.shapes_of(taught) if taught is not None and taught.per_example else id(taught)
            shapes = group.shapes(), of_taught, groups.shapes_of(state), most
            # Looked for again where they are others than in the step before.
            if program is None or shapes != known:
                if shapes[0] not in self.checked and not self.shared:
                    check_batch(self.training, self.method, *group.first(taught), state.variables)
                    self.checked.add(shapes[0])
                program = programs.compiled(
                    partial(self._steps, most=most), state, *given, same=("steps", self.training, self.layout, most),
                    donate=True, shardings=None if self.layout is None else self.layout.results(state),
                )  # fmt: skip
                known = shapes
            state, metrics, _ = program(state, *given)
            done += int(group.count)
            yield Done(state, int(group.count), metrics, None, group.examples, position)
        if done == 0:
            raise DataError(
                f"the iterator of training batches is empty in epoch {number + 1}: give an iterable that begins anew "
                "each time, or steps= for one that has no end"
            )
        if self.steps is not None and done < self.steps:
            raise DataError(
                f"the iterator ended after {done} of the {self.steps} steps of epoch {number + 1}: give fewer steps, "
                "or more batches"
            )

    def is_finite(self, state: TrainState) -> bool:
        """Whether a state is; the steps look at their losses alone."""
        network = self.training.network
        return bool(programs.call(lambda state: is_finite(state, network), state, same=("finite", network)))

    def _steps(
        self, state: TrainState, key: Any, batch: Batch, teacher: Teacher | None, method: Method, count: Any, *,
        most: int,
    ) -> tuple[TrainState, Packed, tuple[()]]:  # fmt: skip
        def one(state: TrainState, batch: Batch, teacher: Teacher | None) -> tuple[TrainState, Packed]:
            state, metrics = step(state, batch, teacher, key, method, training=self.training)
            return state, packed(metrics)

        return *groups.loop(canonical(one), state, batch, teacher, count, most), ()

    def _batches(self, start: int) -> Iterator[tuple[Batch, Position]]:
        """The batches of an epoch with the iterator's position behind each."""
        if self.first is not None:
            first, self.first = self.first, None
            self.drawn = 1
            yield first, Position(self._position(), self.drawn)
            start += 1
        elif self.iterator is None or (self.steps is None and start == 0):
            self.iterator, self.drawn = iter(self.data), 0
        fresh = False
        while self.steps is None or start < self.steps:
            raw = next(self.iterator, None)
            if raw is None:
                if self.steps is None or fresh or is_iterator(self.data):
                    return
                # One pass is over before the epoch is.
                self.iterator, self.drawn, fresh = iter(self.data), 0, True
                continue
            fresh = False
            self.drawn += 1
            yield _with_examples(as_batch(raw)), Position(self._position(), self.drawn)
            start += 1

    def _position(self) -> Any:
        """What the iterator's `set_state` takes. One that gives each process other batches has a state in each."""
        get = None if self.apart else getattr(self.iterator, "get_state", None)
        return get() if callable(get) else None

    def _checked(self, start: int) -> Generator[tuple[Batch, Position]]:
        """`_batches` whose values can be trained on. On the host still: on a device looking would wait for it."""
        classes, floats = self.classes if self.labels_count else None, float_labels(self.method)
        for batch, position in self._batches(start):
            for sizes in self.vocabularies:
                check_tokens(sizes, batch.inputs, batch.weights)
            check_values(batch, classes, **floats, absent=True)
            yield batch, position

    def _prefetched(self, start: int, number: int) -> Iterator[tuple[Group, Teacher | None, Any]]:
        """`_batches` and what the teacher knows of them, drawn in a thread, already on the device."""
        ready: queue.Queue[Any] = queue.Queue(_AHEAD)
        # A thread does not inherit it.
        wide = jnp.zeros(0, float).dtype == jnp.float64
        stop = threading.Event()

        def put(item: Any) -> bool:
            while not stop.is_set():
                try:
                    ready.put(item, timeout=0.1)
                    return True
                except queue.Full:
                    continue
            return False

        mesh, batches = self.mesh, self._checked(start)
        if self.told is not None:
            batches = in_step(batches, self.told, number, stop)

        def send(together: list[tuple[Batch, Position]]) -> bool:
            group = Group.of([batch for batch, _ in together], self.most(together[0][0]))
            taught = of_batch(self.teacher, group.batch, mesh)
            return put((group.on_device(mesh), taught, together[-1][1]))

        def draw() -> None:
            # Batches before the first with a weight: where none follows, all is a mistake. Of several processes others
            # may have the weights.
            idle: list[tuple[Batch, Position]] | None = [] if start == 0 and not self.shared else None
            cuts, problem = groups.Cuts(self.most, self.every, start), None
            with jax.enable_x64(wide):
                try:
                    with contextlib.closing(batches):
                        for batch, position in batches:
                            given = [(batch, position)]
                            if idle is not None:
                                idle.append((batch, position))
                                weighs = batch.weights is None or np.any(np.asarray(batch.weights))
                                given, idle = (idle, None) if weighs else ([], idle)
                            if not all(send(group) for one in given for group in cuts.add(one)):
                                return
                    if idle:
                        check_values(idle[0][0], None)
                except BaseException as error:
                    problem = error
                try:
                    # Before the problem, as if each had been sent at once; what a teacher does not know ends its group.
                    if not all(send(group) for group in cuts.rest()):
                        return
                except BaseException as error:
                    problem = problem or error
                put(problem)

        thread = threading.Thread(target=draw, name="batches", daemon=True)
        thread.start()
        try:
            while (item := ready.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            stop.set()
            # It may wait for another process, which does not come.
            thread.join(2 * LEAVING if self.shared else None)


def make_source(
    data: Any, teacher: Teacher | None, key: Key[Array, ""], method: Method, training: Training,
    *, batch_size: Any, steps: int | None, epochs: int, every: int | None, mesh: Mesh | None = None,
) -> Memory | Stream:  # fmt: skip
    """The source of `data`. Raises `ConfigError` where it and the other arguments do not go together."""
    if is_in_memory(data):
        if steps is not None:
            raise ConfigError(f"steps is {steps}, and the data is in memory: give epochs, whose steps follow from it")
        if batch_size is None:
            raise ConfigError("batch_size is missing: data in memory needs one, such as batch_size=128")
        size = check_whole(batch_size, "batch_size")
        check_batch_size(mesh, size)
        return Memory(as_batch(data), teacher, key, method, training, batch_size=size, every=every, mesh=mesh)
    if not hasattr(data, "__iter__") or hasattr(data, "shape"):
        as_batch(data)
    if batch_size is not None:
        raise ConfigError(
            f"batch_size is {batch_size}, and the data is an iterator, whose batches have their own size: leave it out"
        )
    if isinstance(data, Batches):
        steps = data.steps if steps is None else steps
    if steps is None and is_iterator(data):
        raise ConfigError(
            f"the data is an iterator, which may have no end, and epochs is {epochs}: say with steps= how many batches "
            "an epoch has, or give an iterable that begins anew each time"
        )
    if steps is None and is_endless(data):
        raise ConfigError("the data has no end: say with steps= how many batches an epoch has")
    how: dict[str, Any] = {"steps": steps, "labels_count": bool(method.needs_labels), "every": every, "mesh": mesh}
    return Stream(data, teacher, key, method, training, **how)


def _with_examples(batch: Batch) -> Batch:
    if check_counts(batch) == 0:
        raise DataError("a batch of the iterator has 0 examples: leave it out")
    return batch


def is_iterator(data: Any) -> bool:
    """Whether `data` begins once only. Nothing is begun to find out: a loader may start processes then."""
    return hasattr(data, "__next__")


def is_endless(data: Any) -> bool:
    """Whether a `tf.data` pipeline says that it has no end."""
    cardinality: Callable[[], Any] | None = getattr(data, "cardinality", None)
    if not callable(cardinality):
        return False
    try:
        return int(cardinality()) == -1
    except (TypeError, ValueError):
        return False
