"""The three steps in PyTorch: as the notebook's user runs them, and tuned in each of the ways that PyTorch offers."""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from benchmarks import torch_reference as reference
from benchmarks.measure import Contestant

if TYPE_CHECKING:
    # What runs PyTorch alone, as a process, must not import JAX.
    import kd_jax

TUNED = {
    "eager": "eager mode, fused Adam",
    "torch.compile": "compiled forward and backward pass, fused Adam",
    "CUDA graphs": "the eager step, fused Adam and the gathering of its batch replayed as a CUDA graph",
    "CUDA graphs, compiled": "the same with a compiled forward and backward pass",
}
"""Ways to train, all with tensors in the device's memory and the teacher's logits computed once."""

# Steps in one graph: a divisor of the notebook's 1,875 an epoch.
_GRAPH_STEPS = 25


def device() -> str:
    """Where PyTorch computes."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def ways() -> tuple[str, ...]:
    """The tuned ways that this machine has."""
    return tuple(TUNED) if device() == "cuda" else ("eager", "torch.compile")


def fewest_steps(way: str, per_epoch: int) -> int:
    """Steps that can be done at once: those of a graph, which divide an epoch, or one."""
    if not way.startswith("CUDA graphs"):
        return 1
    return max(n for n in range(1, _GRAPH_STEPS + 1) if per_epoch % n == 0)


def wait() -> None:
    """Returns when the device has done what it was told."""
    if device() == "cuda":
        torch.cuda.synchronize()


class Job:
    """A model to train, in one of the three rows, with all that its steps need, on the device.

    An untrained teacher costs what a trained one does.
    """

    def __init__(self, row: str, data: "kd_jax.Dataset", teacher: nn.Module | None = None) -> None:
        self.data, self.place = data, device()
        self.model = (reference.Teacher() if row == "teacher" else reference.Student()).to(self.place)
        distilled = row == "distilled"
        self.teacher = (teacher or reference.Teacher()).to(self.place).eval() if distilled else None
        self.soft = reference.kl_without_t_squared if distilled else None

    def notebook(self) -> Callable[[int], None]:
        """`train(steps)` as the notebook's user runs it; batches go on from call to call."""
        loader = reference.NotebookBatches(self.data.train_images, self.data.train_labels, device=self.place)
        optimizer, batches = reference.notebook_adam(self.model), _forever(lambda: iter(loader))
        return lambda steps: reference.train_epoch(
            self.model, optimizer, islice(batches, steps), soft=self.soft, teacher=self.teacher
        )

    def tuned(self, way: str, batch_size: int = reference.BATCH_SIZE) -> Callable[[int], None]:
        """`train(steps)` in one of the tuned ways."""
        tensors = self._tensors()
        loss_of = torch.compile(reference.mean_loss) if "compile" in way else reference.mean_loss
        if way.startswith("CUDA graphs"):
            return _Graph(self.model, self.soft, tensors, batch_size, loss_of).train
        optimizer = reference.tuned_adam(self.model)
        batches = _forever(partial(_whole_batches, tensors, batch_size))
        return lambda steps: reference.train_epoch(
            self.model, optimizer, islice(batches, steps), soft=self.soft, loss_of=loss_of
        )

    def _tensors(self) -> reference.Batch:
        images, labels = reference.as_tensors(self.data.train_images, self.data.train_labels, device=self.place)
        return reference.Batch(
            images, labels, None if self.teacher is None else reference.predict(self.teacher, images)
        )


class _Graph:
    """Steps that one CUDA graph holds, with their batches looked up on the device."""

    def __init__(
        self,
        model: nn.Module,
        soft: reference.SoftLoss | None,
        tensors: reference.Batch,
        batch_size: int,
        loss_of: Callable[..., Tensor],
    ) -> None:
        self.model, self.soft, self.tensors, self.loss_of = model.train(), soft, tensors, loss_of
        self.per_epoch = len(tensors.labels) // batch_size
        self.steps = fewest_steps("CUDA graphs", self.per_epoch)
        self.order = torch.zeros(self.per_epoch, batch_size, dtype=torch.long, device=tensors.labels.device)
        self.position = torch.zeros(1, dtype=torch.long, device=tensors.labels.device)
        self.optimizer = reference.tuned_adam(model, capturable=True)
        self.done = 0
        self.graph = self._capture()

    def train(self, steps: int) -> None:
        """`steps` steps, a multiple of the steps in the graph; an epoch's end shuffles."""
        for _ in range(steps // self.steps):
            if self.done % self.per_epoch == 0:
                self._shuffle()
            self.graph.replay()
            self.done += self.steps

    def _shuffle(self) -> None:
        rows = torch.randperm(len(self.tensors.labels), device=self.order.device)
        self.order.copy_(rows[: self.order.numel()].view_as(self.order))
        self.position.zero_()

    def _step(self) -> None:
        rows = self.order.index_select(0, self.position).squeeze(0)
        images, labels, logits = self.tensors
        taught = None if logits is None else logits.index_select(0, rows)
        batch = reference.Batch(images.index_select(0, rows), labels.index_select(0, rows), taught)
        reference.train_step(self.model, self.optimizer, batch, soft=self.soft, loss_of=self.loss_of)
        self.position.add_(1)

    def _capture(self) -> torch.cuda.CUDAGraph:
        # PyTorch asks for some steps on a stream of their own before a capture.
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            self._shuffle()
            for _ in range(min(3, self.per_epoch)):
                self._step()
        torch.cuda.current_stream().wait_stream(aside)
        self.optimizer.zero_grad(set_to_none=True)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(self.steps):
                self._step()
        return graph


def contestant(train: Callable[[int], None], steps: int) -> Contestant:
    """A turn of `steps` steps."""

    def run() -> None:
        train(steps)
        wait()

    return Contestant(run, steps)


def evaluation(model: nn.Module, data: "kd_jax.Dataset", *, tuned: bool) -> Contestant:
    """Counting the right answers of the test set: by the notebook's loader, or from tensors on the device."""
    place = device()
    model = model.to(place).eval()
    images, labels = reference.as_tensors(data.test_images, data.test_labels, device=place)
    loader = reference.NotebookBatches(data.test_images, data.test_labels, device=place, shuffle=False)

    @torch.no_grad()
    def as_notebook() -> int:
        return sum(int((model(batch.images).argmax(dim=1) == batch.labels).sum()) for batch in loader)

    return Contestant(partial(reference.count_correct, model, images, labels) if tuned else as_notebook)


def environment() -> dict[str, object]:
    """What PyTorch's figures depend on."""
    return {
        "torch": torch.__version__,
        "torch threads": torch.get_num_threads(),
        "torch device": torch.cuda.get_device_name() if device() == "cuda" else "cpu",
        "torch float32 matmul precision": torch.get_float32_matmul_precision(),
    }


def _whole_batches(tensors: reference.Batch, batch_size: int) -> Iterator[reference.Batch]:
    steps = len(tensors.labels) // batch_size
    return islice(reference.tuned_batches(*tensors, batch_size=batch_size), steps)


def _forever(epoch: Callable[[], Iterator[reference.Batch]]) -> Iterator[reference.Batch]:
    while True:
        yield from epoch()
