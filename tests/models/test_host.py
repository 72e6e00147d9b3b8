"""Models of other libraries are called back, and never wait for themselves."""

import jax
import numpy as np
import pytest
from small import Table

import kd_jax as kd
from kd_jax.models import host


@pytest.mark.parametrize(("allowed", "known", "refused"), [(1, "", True), (1, "2", False), (2, "", False)])
def test_one_that_would_wait_for_itself_is_refused(
    monkeypatch: pytest.MonkeyPatch, allowed: int, known: str, refused: bool
) -> None:
    # On one thread a copy of more than 100 KiB may never end: without this, the program hangs in silence.
    monkeypatch.setattr(host.os, "sched_getaffinity", lambda process: set(range(allowed)))
    monkeypatch.setattr(host.jax, "local_device_count", lambda backend: 1)
    monkeypatch.setenv("NPROC", known)
    teacher = kd.Model(Table(np.ones((6, 4))).network, {})

    def shape(rows: int) -> tuple[int, ...]:
        inputs = jax.ShapeDtypeStruct((rows, 6), np.float32)
        return jax.eval_shape(lambda x: teacher.network.apply({}, x)[0], inputs).logits.shape

    assert shape(4266) == (4266, 4)
    if not refused:
        assert shape(4267) == (4267, 4)
        return
    with pytest.raises(kd.ConfigError, match=r"the table .* its inputs of 102,408 bytes, forever: set NPROC=2"):
        shape(4267)
