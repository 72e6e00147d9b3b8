"""Section `language`: a training step of a decoder of bytes, and sampling from it, by kd_jax and PyTorch."""

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
from benchmarks import limit, networks
from benchmarks.apart import Apart
from benchmarks.measure import Contestant, Figures, Setting, Table, as_figures, take_turns, with_best
from benchmarks.networks import TORCH
from benchmarks.steps import NO_TORCH, TUNED, has_torch
from kd_jax.convolution import compiling
from kd_jax.teacher import as_teacher
from kd_jax.train import fit, step
from kd_jax.train.checks import make_training

VOCABULARY, WIDTH, HEADS, HIDDEN = 256, 128, 4, 352
BATCH, POSITIONS, EXAMPLES, PROMPT = 16, 128, 64, 16
_RATE, _DECAY, _TEMPERATURE, _ALPHA = 1e-3, 1e-2, 2.0, 0.1


class Row(NamedTuple):
    """layers: of the network. distilled: by a teacher's logits, which are computed once."""

    layers: int
    distilled: bool = False


ROWS = {"teacher": Row(4), "student": Row(2), "distilled student": Row(2, True)}
WRITERS = {"teacher": 4, "student": 2}
_QUICK = "student"
_PROBES = ("product, JAX", "product, PyTorch")


def language(setting: Setting) -> list[Table]:
    """A step of each row, and tokens a second of both networks, row by row."""
    return [_steps(setting), _sampling(setting)]


def _steps(setting: Setting) -> Table:
    rows = {name: row for name, row in ROWS.items() if not setting.quick or name == _QUICK}
    rounds, steps = (3, 2) if setting.quick else (max(5, setting.rounds // 3), 8)
    figures: Figures = {}
    best: dict[str, str] = {}
    kept: Figures = {}
    for name, row in tqdm(rows.items(), desc="language", leave=False, disable=None):
        with Apart(setting.torch_python) as apart:
            found = {(name, "kd_jax"): Contestant(kd_jax_trainer(row, steps), steps)}
            found[name, _PROBES[0]] = limit.jax_product()
            # Each process takes seconds to start.
            if has_torch(setting.torch_python) and not setting.quick:
                found[name, _PROBES[1]] = apart.contestant(limit.torch_product)
            for way in _ways(setting):
                found[name, way] = apart.contestant(_torch_steps, row, steps, way)
            seconds = take_turns(found, rounds, label=name)
        probed = [seconds.pop(key) for key in list(seconds) if key[1] in _PROBES]
        timed = as_figures(seconds, lambda _, value: 1000 * value)
        chosen, by_row = with_best(timed, TUNED, TORCH)
        rate = min(statistics.median(values) for values in probed)
        chosen[name]["limit"] = [1000 * rate * operations(row.layers)] * rounds
        figures, kept, best = figures | chosen, kept | timed, best | by_row
    notes = [
        f"{rounds} rounds of {steps} steps of AdamW, float32; compilation is left out",
        f"width {WIDTH}, {HEADS} heads, {VOCABULARY} tokens, tied embeddings; the teacher has 4 layers, the student 2; "
        "the teacher's logits are computed once",
        f"the limit: the operations of products, at the rate of the best product of {limit.SQUARE}³",
        *_about_torch(best),
    ]
    title = f"One training step of a decoder of bytes, batch {BATCH} of {POSITIONS} positions"
    return Table("language-steps", title, "ms", figures, tuple(notes), details={"all ways, ms": kept})


def _sampling(setting: Setting) -> Table:
    writers = {name: layers for name, layers in WRITERS.items() if not setting.quick or name == _QUICK}
    rounds = 3 if setting.quick else max(5, setting.rounds // 3)
    figures: Figures = {}
    best: dict[str, str] = {}
    kept: Figures = {}
    for name, layers in tqdm(writers.items(), desc="sampling", leave=False, disable=None):
        with Apart(setting.torch_python) as apart:
            found = {(name, "kd_jax"): kd_jax_writer(layers)}
            for way in _ways(setting):
                found[name, way] = apart.contestant(torch_writer, layers, way)
            seconds = take_turns(found, rounds, label=f"sampling, {name}")
        timed = as_figures(seconds, lambda _, value: 1 / value)
        chosen, by_row = with_best(timed, TUNED, TORCH, rate=True)
        figures, kept, best = figures | chosen, kept | timed, best | by_row
    notes = [
        f"{rounds} rounds: {BATCH} rows of {POSITIONS - PROMPT} tokens behind prompts of {PROMPT}, at temperature 1; "
        "compilation is left out",
        "both keep keys and values; PyTorch has a loop of Python around each step",
        *_about_torch(best),
    ]
    title = f"Tokens sampled in a second, {BATCH} rows together"
    details = {"all ways, tokens/s": kept}
    return Table("language-sampling", title, "tokens/s", figures, tuple(notes), rate=True, details=details)


def operations(layers: int) -> int:
    """Of the products of a training step, as `networks.operations`; attention's of positions behind included."""
    net = kd.from_nnx(_network(layers)).network
    variables = jax.eval_shape(net.init, jax.random.key(0))
    given = jax.ShapeDtypeStruct((BATCH, POSITIONS), jnp.int32)

    def logits(variables: Any, given: Any) -> Any:
        return net.apply(variables, given, train=False, key=jax.random.key(0))[0].logits

    return 3 * networks.operations_of(jax.make_jaxpr(logits)(variables, given).jaxpr)


def tokens() -> np.ndarray:
    """Rows that can be learned: each token is the one before and a step of its row."""
    generator = np.random.default_rng(0)
    first, steps = generator.integers(0, VOCABULARY, (2, EXAMPLES, 1))
    return ((first + steps * np.arange(POSITIONS)) % VOCABULARY).astype(np.int32)


def kd_jax_trainer(row: Row, steps: int) -> Callable[[], float]:
    """Steps of kd_jax's own compiled loop, as `distill` runs it; they go on from call to call."""
    given = jnp.asarray(tokens())
    method: kd.Method = kd.KD(alpha=_ALPHA, temperature=_TEMPERATURE) if row.distilled else kd.CrossEntropy()
    teacher = as_teacher(np.zeros((EXAMPLES, POSITIONS, VOCABULARY), np.float32)) if row.distilled else None
    data = kd.token_batch(given)
    training = make_training(kd.from_nnx(_network(row.layers)), optax.adamw(_RATE, weight_decay=_DECAY))
    key = jax.random.key(0)
    state = jax.jit(lambda: step.init(key, training, method))()
    orders = np.random.default_rng(1)
    scanned = jax.jit(partial(fit.scan_steps, training=training), donate_argnums=0)

    def order() -> jax.Array:
        return jnp.asarray(np.stack([orders.permutation(EXAMPLES)[:BATCH] for _ in range(steps)]))

    go = compiling.compiled(scanned.lower(state, key, data, teacher, order(), method))

    def train() -> float:
        nonlocal state
        state, metrics = go(state, key, data, teacher, order(), method)
        return float(metrics["loss"][-1])

    return train


def kd_jax_writer(layers: int) -> Contestant:
    """`kd.generate` with the cache of keys and values."""
    model = kd.from_nnx(_network(layers)).init(0)
    prompts, most = tokens()[:BATCH, :PROMPT], POSITIONS - PROMPT

    def write() -> None:
        kd.generate(model, prompts, steps=most).tokens.block_until_ready()

    return Contestant(write, BATCH * most)


def _torch_steps(row: Row, steps: int, way: str) -> Contestant:
    return Contestant(torch_trainer(row, steps, way), steps)


def torch_trainer(row: Row, steps: int, way: str) -> Callable[[], float]:
    """The same steps in PyTorch. way: "eager" or "torch.compile"."""
    import torch

    from benchmarks import torch_ways

    place = torch_ways.device()
    given = torch.tensor(tokens()).long().to(place)
    taught = torch.zeros(EXAMPLES, POSITIONS, VOCABULARY, device=place) if row.distilled else None
    model = torch_network(row.layers).to(place)
    optimizer = torch.optim.AdamW(model.parameters(), _RATE, weight_decay=_DECAY, fused=True)

    def loss_of(here: Any, known: Any) -> Any:
        # The last position has no label.
        logits = model(here)[:, :-1].flatten(0, 1)
        hard = torch.nn.functional.cross_entropy(logits, here[:, 1:].flatten())
        if known is None:
            return hard
        pair = logits, known[:, :-1].flatten(0, 1)
        soft, target = (torch.log_softmax(value / _TEMPERATURE, 1) for value in pair)
        kl = torch.nn.functional.kl_div(soft, target, reduction="batchmean", log_target=True)
        return _ALPHA * hard + (1 - _ALPHA) * _TEMPERATURE**2 * kl

    compute = torch.compile(loss_of) if way == "torch.compile" else loss_of

    def train() -> float:
        for _ in range(steps):
            rows = torch.randperm(EXAMPLES, device=place)[:BATCH]
            optimizer.zero_grad()
            loss = compute(given[rows], None if taught is None else taught[rows])
            loss.backward()
            optimizer.step()
        torch_ways.wait()
        return float(loss.detach())

    return train


def torch_writer(layers: int, way: str) -> Contestant:
    """The same sampling in PyTorch. way: "eager" or "torch.compile", of a step; prompts go through in one."""
    import torch

    from benchmarks import torch_ways

    place = torch_ways.device()
    model = torch_network(layers).to(place).eval()
    prompts, most = torch.tensor(tokens()[:BATCH, :PROMPT]).long().to(place), POSITIONS - PROMPT
    decode = torch.compile(model.decode) if way == "torch.compile" else model.decode

    @torch.no_grad()
    def write() -> None:
        torch_written(model, prompts, most, decode)
        torch_ways.wait()

    return Contestant(write, BATCH * most)


def torch_written(model: Any, prompts: Any, most: int, decode: Callable[..., Any]) -> Any:
    """Prompts and `most` tokens behind each."""
    import torch

    length = prompts.shape[1]
    cache, places = model.cache(len(prompts), length + most), torch.arange(length + most, device=prompts.device)
    written = [prompts]
    logits = model.decode(prompts, places[:length], cache)
    for place in range(length, length + most):
        written.append(torch.multinomial(torch.softmax(logits, -1), 1))
        logits = decode(written[-1], places[place : place + 1], cache)
    return torch.cat(written, dim=1)


def torch_network(layers: int) -> Any:
    """The zoo's transformer of these numbers in PyTorch."""
    from benchmarks.torch_language import Transformer

    return Transformer(VOCABULARY, layers, WIDTH, HEADS, HIDDEN)


def _network(layers: int) -> Callable[[Any], Any]:
    return partial(_made, layers)


def _made(layers: int, rngs: Any) -> Any:
    return kd.models.transformer(VOCABULARY, layers=layers, width=WIDTH, heads=HEADS, hidden=HIDDEN, rngs=rngs)


def _ways(setting: Setting) -> tuple[str, ...]:
    return TORCH[: 1 if setting.quick else 2] if has_torch(setting.torch_python) else ()


def _about_torch(best: dict[str, str]) -> list[str]:
    if not best:
        return [NO_TORCH]
    return [
        "PyTorch has scaled_dot_product_attention; each way of it has a process of its own, so that no threads but its "
        "own are in its way",
        f"{TUNED} is the best of its ways: {best}",
    ]
