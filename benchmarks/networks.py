"""Section `networks`: one training step of convolutional networks, batch 64 of 32 × 32 × 3 images, by everybody."""

import importlib
import math
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

import kd_jax as kd
from benchmarks import keras_networks, keras_ways, limit
from benchmarks.apart import Apart
from benchmarks.measure import Contestant, Figures, Setting, Table, as_figures, take_turns, with_best
from benchmarks.steps import NO_TORCH, TUNED, has_torch
from kd_jax.convolution import compiling
from kd_jax.teacher import as_teacher
from kd_jax.train import fit, step
from kd_jax.train.checks import make_training

BATCH, CLASSES, EXAMPLES = 64, 10, 512
_RATE, _MOMENTUM, _TEMPERATURE, _ALPHA = 0.01, 0.9, 4.0, 0.1


class Row(NamedTuple):
    """network, teacher: of the zoo. A teacher's logits are computed once, but for the notebook's and Keras's ways."""

    network: str
    teacher: str | None = None


ROWS = {
    "ResNet-20": Row("resnet20"),
    "ResNet-8": Row("resnet8"),
    "ResNet-8, distilled": Row("resnet8", "resnet20"),
    "WRN-16-2": Row("wrn_16_2"),
    "MobileNetV2": Row("mobilenet_v2"),
    "MobileNetV2, distilled": Row("mobilenet_v2", "resnet20"),
    "ShuffleNetV1": Row("shufflenet_v1"),
    "ShuffleNetV2": Row("shufflenet_v2"),
}
QUICK = ("ResNet-8", "ResNet-8, distilled")
TORCH = ("eager", "torch.compile")


def networks(setting: Setting) -> list[Table]:
    """A step of each network, row by row, so that few programs are in memory at once."""
    rows = {name: row for name, row in ROWS.items() if not setting.quick or name in QUICK}
    rounds = 3 if setting.quick else max(5, setting.rounds // 3)
    figures: Figures = {}
    best: dict[str, str] = {}
    kept: Figures = {}
    for name, row in tqdm(rows.items(), desc="networks", leave=False, disable=None):
        with Apart(setting.torch_python) as apart:
            seconds = take_turns(_contestants(name, row, setting.quick, apart), rounds, label=name)
        probed = {key: seconds.pop(key) for key in list(seconds) if key[1] in _PROBES}
        found = as_figures(seconds, lambda _, value: 1000 * value)
        chosen, way = with_best(found, TUNED, TORCH)
        rate = min(statistics.median(values) for values in probed.values())
        chosen[name]["limit"] = [1000 * rate * operations(row.network)] * rounds
        figures |= chosen
        kept |= found
        best |= way
    notes = [
        f"{rounds} rounds of {_steps(setting.quick)} steps of SGD with momentum, float32; compilation is left out",
        f"the limit: the operations of convolutions and products, at the rate of the best product of {limit.SQUARE}³",
        "the notebook's way is PyTorch with its usual order of axes, a DataLoader, and the teacher in every step",
        "each way of PyTorch has a process of its own, so that no threads but its own are in its way",
    ]
    notes.append(f"{TUNED} has channels last; it is the best of its ways: {best}" if best else NO_TORCH)
    title = f"One training step of convolutional networks, batch {BATCH} of 32 × 32 × 3"
    return [Table("networks", title, "ms", figures, tuple(notes), details={"all ways, ms": kept})]


def operations(network: str) -> int:
    """Of the convolutions and products of a training step: three times those of a forward pass.

    Additions and multiplications count one each. The inputs' gradient of the first layer is counted, too.
    """
    net = _network(network).network
    variables = jax.eval_shape(net.init, jax.random.key(0))
    images = jax.ShapeDtypeStruct((BATCH, 32, 32, 3), jnp.float32)

    def logits(variables: Any, images: Any) -> Any:
        return net.apply(variables, images, train=False, key=jax.random.key(0))[0].logits

    jaxpr = jax.make_jaxpr(logits)(variables, images)
    return 3 * operations_of(jaxpr.jaxpr)


def operations_of(jaxpr: Any) -> int:
    """Additions and multiplications of the convolutions and products of a program, and of those within it."""
    total = 0
    for equation in jaxpr.eqns:
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            total += operations_of(inner) if hasattr(inner, "eqns") else 0
        shapes = [atom.aval.shape for atom in equation.invars if hasattr(atom.aval, "shape")]
        out = equation.outvars[0].aval
        if equation.primitive.name == "conv_general_dilated":
            numbers = equation.params["dimension_numbers"].rhs_spec
            total += 2 * math.prod(out.shape) * math.prod(shapes[1][axis] for axis in numbers[1:])
        elif equation.primitive.name == "dot_general":
            contracted = equation.params["dimension_numbers"][0][0]
            total += 2 * math.prod(out.shape) * math.prod(shapes[0][axis] for axis in contracted)
    return total


def _network(name: str) -> kd.Model:
    return kd.from_nnx(lambda rngs: getattr(kd.models, name)(num_classes=CLASSES, in_channels=3, rngs=rngs))


_PROBES = ("product, JAX", "product, PyTorch")


def _steps(quick: bool) -> int:
    return 2 if quick else 8  # as few as a loop of a training has


def images() -> tuple[np.ndarray, np.ndarray]:
    """Images of noise, and labels."""
    generator = np.random.default_rng(0)
    return (
        generator.normal(size=(EXAMPLES, 32, 32, 3)).astype(np.float32),
        generator.integers(0, CLASSES, EXAMPLES).astype(np.int32),
    )


def _contestants(name: str, row: Row, quick: bool, apart: Apart) -> dict[tuple[str, str], Contestant]:
    steps = _steps(quick)
    found = {
        (name, "kd_jax"): Contestant(kd_jax_trainer(row, steps), steps),
        (name, _PROBES[0]): limit.jax_product(),
    }
    if has_torch(apart.python):
        found[name, _PROBES[1]] = apart.contestant(limit.torch_product)
        for way in ("notebook", *TORCH[: 1 if quick else 2]):
            found[name, way] = apart.contestant(_torch, row, steps, way)
    if keras_ways.why_not() is None and row.network in keras_networks.MADE:
        found[name, "Keras 3"] = Contestant(keras_trainer(row, steps), steps)
    return found


def _torch(row: Row, steps: int, way: str) -> Contestant:
    return Contestant(torch_trainer(row, steps, way), steps)


def kd_jax_trainer(row: Row, steps: int) -> Callable[[], float]:
    """Steps of kd_jax's own compiled loop, as `distill` runs it; they go on from call to call."""
    x, y = images()
    data = kd.Batch(jnp.asarray(x), jnp.asarray(y))
    method: kd.Method = kd.KD(alpha=_ALPHA, temperature=_TEMPERATURE) if row.teacher else kd.CrossEntropy()
    teacher = as_teacher(np.zeros((EXAMPLES, CLASSES), np.float32)) if row.teacher else None
    training = make_training(_network(row.network), optax.sgd(_RATE, momentum=_MOMENTUM))
    key = jax.random.key(0)
    state = jax.jit(lambda: step.init(key, training, method))()
    order = jnp.asarray(np.random.default_rng(1).permutation(EXAMPLES)[: steps * BATCH].reshape(steps, BATCH))
    scanned = jax.jit(partial(fit.scan_steps, training=training), donate_argnums=0)
    go = compiling.compiled(scanned.lower(state, key, data, teacher, order, method))

    def train() -> float:
        nonlocal state
        state, metrics = go(state, key, data, teacher, order, method)
        return float(metrics["loss"][-1])

    return train


def torch_trainer(row: Row, steps: int, way: str) -> Callable[[], float]:
    """Steps in PyTorch. way: "notebook", "eager" or "torch.compile"."""
    import torch

    from benchmarks import torch_ways

    x, y = images()
    place, notebook = torch_ways.device(), way == "notebook"
    layout = torch.contiguous_format if notebook else torch.channels_last
    tensors = torch.tensor(x).permute(0, 3, 1, 2).contiguous(memory_format=layout), torch.tensor(y).long()
    model = _torch_network(row.network).to(place, memory_format=layout).train()
    teacher = _torch_network(row.teacher).to(place).eval() if row.teacher and notebook else None
    cached = torch.zeros(EXAMPLES, CLASSES, device=place) if row.teacher and not notebook else None
    optimizer = torch.optim.SGD(model.parameters(), _RATE, momentum=_MOMENTUM)

    def loss_of(inputs: Any, labels: Any, taught: Any) -> Any:
        logits = model(inputs)
        hard = torch.nn.functional.cross_entropy(logits, labels)
        if taught is None:
            return hard
        soft, target = (torch.log_softmax(value / _TEMPERATURE, 1) for value in (logits, taught))
        kl = torch.nn.functional.kl_div(soft, target, reduction="batchmean", log_target=True)
        return _ALPHA * hard + (1 - _ALPHA) * _TEMPERATURE**2 * kl

    compute = torch.compile(loss_of) if way == "torch.compile" else loss_of
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*tensors), batch_size=BATCH, shuffle=True)
    here = [tensor.to(place) for tensor in tensors]

    def batches() -> Any:
        if notebook:
            for inputs, labels in loader:
                inputs, labels = inputs.to(place), labels.to(place)
                with torch.no_grad():
                    taught = teacher(inputs) if teacher else None
                yield inputs, labels, taught
            return
        for rows in torch.randperm(EXAMPLES, device=place).split(BATCH):
            yield here[0][rows], here[1][rows], None if cached is None else cached[rows]

    def train() -> float:
        for _, batch in zip(range(steps), batches(), strict=False):
            optimizer.zero_grad()
            loss = compute(*batch)
            loss.backward()
            optimizer.step()
        torch_ways.wait()
        return float(loss.detach())

    return train


def _torch_network(name: str) -> Any:
    from benchmarks import torch_networks as there

    widths = (16, 32, 64)
    made: dict[str, Callable[[], Any]] = {
        "resnet8": partial(there.ResNet, (1, 1, 1), widths, 16, CLASSES),
        "resnet20": partial(there.ResNet, (3, 3, 3), widths, 16, CLASSES),
        "wrn_16_2": partial(there.WideResNet, 16, 2, CLASSES),
        "mobilenet_v2": partial(there.MobileNetV2, CLASSES),
        "shufflenet_v1": partial(there.ShuffleNet, 1, CLASSES),
        "shufflenet_v2": partial(there.ShuffleNet, 2, CLASSES),
    }
    return made[name]()


def keras_trainer(row: Row, steps: int) -> Callable[[], float]:
    """Steps of `fit` in Keras 3 on JAX, with images in memory; `Distiller` runs the teacher in every step."""
    keras = importlib.import_module("keras")
    x, y = images()
    model = keras_networks.MADE[row.network](keras, CLASSES)
    if row.teacher:
        model = keras.distillation.Distiller(
            teacher=keras_networks.MADE[row.teacher](keras, CLASSES),
            student=model,
            distillation_losses=keras.distillation.LogitsDistillation(
                temperature=_TEMPERATURE, loss=keras.losses.KLDivergence()
            ),
            student_loss_weight=_ALPHA,
        )
    model.compile(
        optimizer=keras.optimizers.SGD(_RATE, momentum=_MOMENTUM),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        steps_per_execution=steps,
    )
    count = steps * BATCH

    def train() -> float:
        history = model.fit(x[:count], y[:count], batch_size=BATCH, epochs=1, verbose=0)
        return float(history.history["loss"][-1])

    return train
