"""Many students at once in PyTorch: their parameters stacked, their layers as batched matrix products."""

from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from benchmarks import torch_reference as reference
from benchmarks import torch_ways

if TYPE_CHECKING:
    import kd_jax


class Students(nn.Module):
    """`count` students 784 → 20 → 20 → 10, each started as PyTorch starts one."""

    def __init__(self, count: int) -> None:
        super().__init__()
        ones = [reference.Student() for _ in range(count)]
        layers = [[(one.fc1, one.fc2, one.fc3)[i] for one in ones] for i in range(3)]
        self.weights = nn.ParameterList(
            nn.Parameter(torch.stack([layer.weight.detach().T for layer in own])) for own in layers
        )
        self.biases = nn.ParameterList(
            nn.Parameter(torch.stack([layer.bias.detach() for layer in own])[:, None]) for own in layers
        )

    def forward(self, images: Float[Tensor, "students batch pixels"]) -> Float[Tensor, "students batch 10"]:
        """Logits of every student for its own images."""
        x = images
        for number, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            x = torch.baddbmm(bias, x if number == 0 else F.relu(x), weight)
        return x


class Trainer:
    """Distils all of them: the sum of their losses, so that none has a share in another's gradient."""

    def __init__(self, count: int, data: "kd_jax.Dataset") -> None:
        place = torch_ways.device()
        self.students = Students(count).to(place)
        self.optimizer = reference.tuned_adam(self.students)
        self.images, self.labels = reference.as_tensors(data.train_images, data.train_labels, device=place)
        self.teacher_logits = torch.zeros(len(self.labels), 10, device=place)

    def train(self, rows: Int[Tensor, "steps students batch"]) -> Float[Tensor, " students"]:
        """A step of every student for each of its rows. Returns their losses before the last."""
        for own in rows:
            each = self.losses(own)
            self.optimizer.zero_grad()
            each.sum().backward()
            self.optimizer.step()
        return each.detach()

    def losses(self, rows: Int[Tensor, "students batch"]) -> Float[Tensor, " students"]:
        """The notebook's loss, with the correct KL, of each student on its own images."""
        logits, taught = self.students(self.images[rows]), self.teacher_logits[rows]
        hard = F.cross_entropy(logits.flatten(0, 1), self.labels[rows].flatten(), reduction="none")
        log_student = F.log_softmax(logits / reference.TEMPERATURE, dim=-1)
        target = F.softmax(taught / reference.TEMPERATURE, dim=-1)
        soft = F.kl_div(log_student, target, reduction="none").sum(dim=-1)
        mixed = reference.ALPHA * hard.view_as(soft) + (1 - reference.ALPHA) * soft
        return mixed.mean(dim=1)
