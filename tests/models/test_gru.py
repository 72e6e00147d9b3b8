"""The GRU encoder and decoder: PyTorch's numbers, and the padding of the source."""

import jax
import numpy as np
import pytest
from flax import nnx

import kd_jax as kd
from kd_jax.errors import ShapeError
from kd_jax.models import load_state_dict
from kd_jax.models.zoo.gru import GRU, gru_seq2seq

pytestmark = pytest.mark.usefixtures("quick_compiling")


def test_states_are_those_of_pytorch():
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    other = torch.nn.GRU(5, 6, batch_first=True)
    layer = load_state_dict(GRU(5, 6, rngs=nnx.Rngs(0)), other.state_dict())
    rng = np.random.default_rng(0)
    x, start = rng.normal(size=(2, 4, 5)).astype(np.float32), rng.normal(size=(2, 6)).astype(np.float32)
    with torch.no_grad():
        states, last = other(torch.tensor(x), torch.tensor(start[None]))
    found, end = jax.jit(lambda x, start: layer(x, start))(x, start)
    np.testing.assert_allclose(found, states, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(end, last[0], rtol=1e-4, atol=1e-5)
    one = layer.step(x[:, 0], start)
    np.testing.assert_allclose(one, states[:, 0], rtol=1e-4, atol=1e-5)


def test_a_source_is_read_to_its_end_and_each_row_of_targets_from_its_left():
    model = gru_seq2seq(9, 7, width=6, hidden=8, rngs=nnx.Rngs(0))
    source, tokens = np.int32([[3, 4, 2]]), np.int32([[1, 5, 6, 2]])
    found = np.asarray(model(source, tokens))
    padded = np.asarray(model(np.pad(source, ((0, 0), (0, 2))), tokens))
    np.testing.assert_allclose(padded, found, rtol=1e-5, atol=1e-6)
    changed = np.asarray(model(source, np.int32([[1, 5, 6, 3]])))
    np.testing.assert_array_equal(changed[:, :3], found[:, :3])
    assert np.abs(changed[:, 3] - found[:, 3]).max() > 1e-3
    assert np.abs(np.asarray(model(np.int32([[3, 4, 1]]), tokens)) - found).max() > 1e-3
    with pytest.raises(ShapeError, match="give both as"):
        kd.from_nnx(model)({"source": source, "tokens": tokens[0]})
