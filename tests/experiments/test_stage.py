import pytest

from kd_jax.experiments.stage import chunk_lengths, plan_chunks


@pytest.mark.parametrize(
    ("steps", "lengths"),
    [(1875, {75}), (1, {1}), (30, {1}), (7, {1}), (468, {18}), (1873, {75, 73}), (59, {3, 2}), (100, {4})],
)
def test_an_epoch_is_cut_into_chunks_of_at_most_two_lengths(steps: int, lengths: set[int]) -> None:
    chunks = chunk_lengths(steps)
    assert sum(chunks) == steps
    assert set(chunks) == lengths


@pytest.mark.parametrize("steps", range(1, 400))
def test_chunks_always_make_an_epoch(steps: int) -> None:
    chunks = chunk_lengths(steps)
    assert sum(chunks) == steps
    assert min(chunks) > 0
    assert len(set(chunks)) <= 2
    assert len(chunks) <= 51


@pytest.mark.parametrize(("steps", "every"), [(1875, None), (1875, 100), (30, 7), (30, 1), (5, 1000), (1, 1), (97, 50)])
def test_a_plan_is_every_step_once_and_checkpoints_come_as_asked(steps: int, every: int | None) -> None:
    chunks = plan_chunks(steps, 3, every)
    done = 0
    saved = []
    for chunk in chunks:
        assert chunk.epoch * steps + chunk.start == done
        done += chunk.length
        if chunk.place:
            saved.append(done)
    assert done == 3 * steps
    of_epoch = [*range(every or steps, steps, every or steps), steps]
    assert saved == [epoch * steps + step for epoch in range(3) for step in of_epoch]
    assert len({chunk.length for chunk in chunks}) <= 4
