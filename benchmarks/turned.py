"""What transposed kernels and a shuffle beside the training bring: `python -m benchmarks.turned`.

Ratios of times, above 1 is faster, medians and quartiles of rounds in which both take turns: an epoch (of many
students some steps) with kernels as they are over the same with kernels transposed, and an epoch that shuffles first
over one that shuffles the next meanwhile.
"""

import statistics
from collections.abc import Callable
from unittest import mock

import jax

import kd_jax
from benchmarks.kd_jax_ways import Group, Job, Trainer, job
from benchmarks.measure import Contestant, quartiles, ratios, take_turns
from kd_jax.train import transpose

ROUNDS, STEPS = 9, 300
NETWORKS = ([784, 10], [784, 5, 5, 10], [784, 50, 50, 10], [784, 90, 90, 10])


def compared(name: str, before: Callable[[], object], after: Callable[[], object]) -> None:
    """Prints how much faster the second is."""
    seconds = take_turns({"before": Contestant(before), "after": Contestant(after)}, ROUNDS, label=name)
    low, middle, high = quartiles(ratios(seconds["before"], seconds["after"]))
    print(f"{name}: {middle:.2f} ({low:.2f} to {high:.2f})", flush=True)


def transposed(name: str, make: Callable[[], Callable[[], object]]) -> None:
    """Kernels as they are against transposed ones. make: gives what is run, and compiled when it first runs."""
    plain = make()
    with mock.patch.object(transpose, "elementwise", return_value=False):
        plain()
    compared(name, plain, make())


def many(own: Job, students: int) -> Callable[[], object]:
    """Some steps of many students."""
    group = Group(own, students)
    rows = group.orders(STEPS)
    return lambda: group.train(rows)


def first_shuffled(trainer: Trainer) -> object:
    """An epoch as it was: its rows are shuffled, then it trains."""
    rows = trainer.order()
    trainer.epoch += 1
    return trainer.train(rows)


def main() -> None:
    """Measures and prints."""
    jax.config.update("jax_default_matmul_precision", "highest")
    data = kd_jax.load("mnist")
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, {ROUNDS} rounds; kernels transposed:")
    for row in ("student", "distilled"):
        for batch_size in (32, 128, 1024):
            own = job(row, data, batch_size)
            transposed(f"{row}, batch {batch_size}", lambda own=own: Trainer(own).train_epoch)  # type: ignore[misc]
        for students in (2, 10, 32):
            transposed(f"{row}, {students} students", lambda n=students, r=row: many(job(r, data), n))  # type: ignore[misc]
    print("other networks, every tall kernel transposed (784-90 is near the bound of 8 inputs for an output):")
    for sizes in NETWORKS:
        own = job("student", data)
        other = own._replace(setup=own.setup._replace(network=kd_jax.mlp(sizes).network))
        transposed("-".join(map(str, sizes)), lambda other=other: Trainer(other).train_epoch)  # type: ignore[misc]
    print("the next epoch shuffled meanwhile:")
    for row in ("student", "distilled"):
        before, after = Trainer(job(row, data)), Trainer(job(row, data))
        compared(row, lambda before=before: first_shuffled(before), after.train_epoch)  # type: ignore[misc]
    order = jax.jit(lambda key: jax.random.permutation(key, len(data.train_labels)))
    alone = Contestant(lambda: order(jax.random.key(0)).block_until_ready())
    took = statistics.median(take_turns({"shuffle": alone}, ROUNDS, label="shuffle")["shuffle"])
    print(f"a shuffle of {len(data.train_labels):,} alone: {1000 * took:.1f} ms")


if __name__ == "__main__":
    main()
