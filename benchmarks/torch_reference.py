"""The reference notebook in PyTorch, in small pieces: what kd_jax is compared with, in value and in speed.

Two ways to run the same mathematics. As the notebook's user runs it (`NotebookBatches`, `notebook_adam`): a
`DataLoader` that converts image by image, PyTorch's default Adam, the teacher's forward pass inside every distillation
step. And tuned (`tuned_batches`, `tuned_adam`): tensors in memory, rows gathered by index, fused Adam, the teacher's
logits computed once.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Shaped, UInt8
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.data import DataLoader, Dataset

LEARNING_RATE, BATCH_SIZE, EPOCHS = 3e-4, 32, 5
ALPHA, TEMPERATURE = 0.5, 20.0
DROPOUT = 0.5

Masks = Sequence[Bool[Tensor, "batch units"]]


class Batch(NamedTuple):
    """Images in [0, 1], labels, and the teacher's logits where they are known beforehand."""

    images: Float[Tensor, "batch ..."]
    labels: Int[Tensor, " batch"]
    teacher_logits: Float[Tensor, "batch classes"] | None = None


class Teacher(nn.Module):
    """784 → 1200 → 1200 → 10; dropout, then ReLU, after each hidden layer."""

    def __init__(self, hidden: int = 1200) -> None:
        super().__init__()
        self.fc1 = nn.Linear(784, hidden)
        self.fc2 = nn.Linear(hidden, hidden)
        self.fc3 = nn.Linear(hidden, 10)

    def forward(self, images: Float[Tensor, "batch ..."], masks: Masks | None = None) -> Float[Tensor, "batch 10"]:
        """Logits. In training mode `masks` (True: kept), one for each hidden layer, stand in for random ones."""
        x = images.flatten(1)
        for i, layer in enumerate((self.fc1, self.fc2)):
            x = F.relu(self._dropout(layer(x), None if masks is None else masks[i]))
        return self.fc3(x)

    def _dropout(self, x: Tensor, mask: Tensor | None) -> Tensor:
        if mask is None or not self.training:
            return F.dropout(x, DROPOUT, self.training)
        return x * mask / (1 - DROPOUT)


class Student(nn.Module):
    """784 → 20 → 20 → 10 with ReLU."""

    def __init__(self, hidden: int = 20) -> None:
        super().__init__()
        self.fc1 = nn.Linear(784, hidden)
        self.fc2 = nn.Linear(hidden, hidden)
        self.fc3 = nn.Linear(hidden, 10)

    def forward(self, images: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch 10"]:
        """Logits."""
        x = F.relu(self.fc1(images.flatten(1)))
        return self.fc3(F.relu(self.fc2(x)))


SoftLoss = Callable[[Tensor, Tensor, float], Tensor]


def kl_without_t_squared(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """The notebook's soft loss as it was meant: mean over the batch of KL(teacher ‖ student) at a temperature."""
    log_student = F.log_softmax(student_logits / temperature, dim=1)
    return nn.KLDivLoss(reduction="batchmean")(log_student, F.softmax(teacher_logits / temperature, dim=1))


def kl_with_t_squared(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """The soft loss of Hinton, Vinyals and Dean (2015)."""
    return temperature**2 * kl_without_t_squared(student_logits, teacher_logits, temperature)


def as_written(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """The notebook's soft loss with its bug: `KLDivLoss` is given probabilities where it wants their logarithms."""
    student = F.softmax(student_logits / temperature, dim=1)
    return nn.KLDivLoss(reduction="batchmean")(student, F.softmax(teacher_logits / temperature, dim=1))


def notebook_adam(model: nn.Module) -> torch.optim.Adam:
    """PyTorch's default Adam (eager, a loop over the tensors)."""
    return torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)


def tuned_adam(model: nn.Module, *, capturable: bool = False) -> torch.optim.Adam:
    """The same update in PyTorch's fastest form; `capturable` where a CUDA graph is to hold it."""
    return torch.optim.Adam(model.parameters(), lr=LEARNING_RATE, fused=True, capturable=capturable)


def mean_loss(
    model: nn.Module, batch: Batch, soft: SoftLoss | None = None, masks: Masks | None = None
) -> Float[Tensor, ""]:
    """`ALPHA` · cross entropy + (1 - `ALPHA`) · `soft`, or cross entropy alone."""
    logits = model(batch.images) if masks is None else model(batch.images, masks)
    loss = F.cross_entropy(logits, batch.labels)
    if soft is None:
        return loss
    assert batch.teacher_logits is not None, "a soft loss needs the teacher's logits"
    return ALPHA * loss + (1 - ALPHA) * soft(logits, batch.teacher_logits, TEMPERATURE)


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    *,
    soft: SoftLoss | None = None,
    masks: Masks | None = None,
    loss_of: Callable[..., Tensor] = mean_loss,
) -> Float[Tensor, ""]:
    """One update by `loss_of`, which is `mean_loss` or a compiled form of it. Returns the loss."""
    loss = loss_of(model, batch, soft, masks)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.detach()


def train_epoch(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Iterable[Batch],
    *,
    soft: SoftLoss | None = None,
    teacher: nn.Module | None = None,
    loss_of: Callable[..., Tensor] = mean_loss,
) -> None:
    """A step for each batch. Where a batch lacks the teacher's logits, `teacher` (in eval mode) gives them."""
    model.train()
    for images, labels, teacher_logits in batches:
        if teacher is not None and teacher_logits is None:
            with torch.no_grad():
                teacher_logits = teacher(images)
        train_step(model, optimizer, Batch(images, labels, teacher_logits), soft=soft, loss_of=loss_of)


class NotebookImages(Dataset):
    """Images as the notebook's data set hands them out: one by one, by way of a PIL image, converted to a tensor."""

    def __init__(self, images: UInt8[np.ndarray, "examples height width 1"], labels: Int[np.ndarray, " examples"]):
        self.images, self.labels = images[..., 0], labels

    def __len__(self) -> int:
        """Number of images."""
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Float[Tensor, "1 height width"], int]:
        """Image in [0, 1] and label. The steps, and so the cost, are those of torchvision's `MNIST` and `ToTensor`."""
        picture = Image.fromarray(self.images[index])
        pixels = torch.from_numpy(np.array(picture, np.uint8, copy=True)).view(*picture.size[::-1], 1)
        return pixels.permute(2, 0, 1).contiguous().to(torch.float32).div(255), int(self.labels[index])


class NotebookBatches:
    """The notebook's `DataLoader`: batches in a fresh random order at each pass, moved to `device` one by one."""

    def __init__(
        self,
        images: UInt8[np.ndarray, "examples height width 1"],
        labels: Int[np.ndarray, " examples"],
        *,
        device: str = "cpu",
        shuffle: bool = True,
    ):
        self.loader = DataLoader(NotebookImages(images, labels), batch_size=BATCH_SIZE, shuffle=shuffle)
        self.device = device

    def __iter__(self) -> Iterator[Batch]:
        """Batches without the teacher's logits."""
        return (Batch(images.to(self.device), labels.to(self.device)) for images, labels in self.loader)


def tuned_batches(
    images: Float[Tensor, "examples ..."],
    labels: Int[Tensor, " examples"],
    teacher_logits: Float[Tensor, "examples classes"] | None = None,
    *,
    batch_size: int = BATCH_SIZE,
) -> Iterator[Batch]:
    """An epoch of the same batches from tensors in memory, shuffled by PyTorch's generator, on their device."""
    for rows in torch.randperm(len(labels), device=labels.device).split(batch_size):
        taught = None if teacher_logits is None else teacher_logits.index_select(0, rows)
        yield Batch(images.index_select(0, rows), labels.index_select(0, rows), taught)


def as_tensors(
    images: UInt8[np.ndarray, "examples height width 1"], labels: Int[np.ndarray, " examples"], *, device: str = "cpu"
) -> tuple[Float[Tensor, "examples pixels"], Int[Tensor, " examples"]]:
    """All images in [0, 1], flattened, and their labels, on `device`."""
    pixels = torch.from_numpy(images).to(device).flatten(1).to(torch.float32).div_(255)
    return pixels, torch.from_numpy(labels).to(device).long()


def fit(
    model: nn.Module,
    images: Float[Tensor, "examples ..."],
    labels: Int[Tensor, " examples"],
    *,
    epochs: int = EPOCHS,
    soft: SoftLoss | None = None,
    teacher_logits: Float[Tensor, "examples classes"] | None = None,
) -> None:
    """A whole training in the tuned way."""
    optimizer = tuned_adam(model)
    for _ in range(epochs):
        train_epoch(model, optimizer, tuned_batches(images, labels, teacher_logits), soft=soft)


@torch.no_grad()
def predict(model: nn.Module, images: Float[Tensor, "examples ..."]) -> Float[Tensor, "examples classes"]:
    """Logits in evaluation mode."""
    model.eval()
    return torch.cat([model(part) for part in images.split(1000)])


def count_correct(model: nn.Module, images: Float[Tensor, "examples ..."], labels: Shaped[Tensor, " examples"]) -> int:
    """Number of images whose largest logit is the label's."""
    return int((predict(model, images).argmax(dim=1) == labels).sum())
