"""Checkpoints of transformers give its logits here, and ours give the same logits there."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

import kd_jax as kd
from kd_jax.errors import ConfigError, DataError
from kd_jax.models import from_hugging_face, to_hugging_face
from kd_jax.models.zoo.transformer import RopeScaling, transformer

pytestmark = pytest.mark.usefixtures("quick_compiling")
TOKENS = np.random.default_rng(1).integers(0, 61, (2, 9)).astype(np.int32)
SIZES = {
    "vocab_size": 61, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 40, "max_position_embeddings": 64,
}  # fmt: skip
LONG = {
    "rope_type": "llama3", "rope_theta": 50_000.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
MODELS = {
    "llama": ("Llama", {"tie_word_embeddings": True}),
    "llama with biases": ("Llama", {"attention_bias": True, "rope_parameters": LONG, "head_dim": 8}),
    "qwen2": ("Qwen2", {"rms_norm_eps": 1e-5}),
    "qwen3": ("Qwen3", {"head_dim": 8, "tie_word_embeddings": True}),
}


def of_transformers(name):
    """A tiny model with weights of a size that every path shows in the logits."""
    torch, there = pytest.importorskip("torch"), pytest.importorskip("transformers")
    kind, more = MODELS[name]
    torch.manual_seed(0)
    config = getattr(there, f"{kind}Config")(**{**SIZES, **more})
    model = getattr(there, f"{kind}ForCausalLM")(config).eval()
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.2)
    return model


def logits_of(model):
    torch = pytest.importorskip("torch")
    with torch.no_grad():
        return model(torch.tensor(TOKENS, dtype=torch.long)).logits.float().numpy()


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_transformers_and_go_back(name, tmp_path):
    model = of_transformers(name)
    # Two shards and an index, but for the first.
    model.save_pretrained(tmp_path / "theirs", max_shard_size="5GB" if name == "llama" else "8KB")
    assert (tmp_path / "theirs" / "model.safetensors.index.json").exists() == (name != "llama")
    found = from_hugging_face(tmp_path / "theirs")
    wanted = logits_of(model)
    assert np.abs(wanted).max() > 1
    np.testing.assert_allclose(jax.jit(lambda tokens: found(tokens))(TOKENS), wanted, rtol=1e-4, atol=1e-4)
    to_hugging_face(found, tmp_path / "ours", max_positions=64)
    again = type(model).from_pretrained(tmp_path / "ours")
    np.testing.assert_allclose(logits_of(again), wanted, rtol=1e-5, atol=1e-5)
    for key, value in model.state_dict().items():
        np.testing.assert_array_equal(again.state_dict()[key], value, err_msg=key)


def written(folder, **numbers):
    made = transformer(61, layers=2, width=16, heads=4, kv_heads=2, rngs=nnx.Rngs(0), **numbers)
    to_hugging_face(made, folder)
    return made


@pytest.mark.parametrize(
    "numbers",
    [
        {"tied": False, "qkv_bias": True},
        {"qk_norm": True, "head_width": 6},
        {"qkv_bias": True, "output_bias": True, "rope_base": 1e6},
        {"rope_scaling": RopeScaling(8.0, 1.0, 4.0, 32)},
    ],
)
def test_what_is_written_is_read_the_same(numbers, tmp_path):
    made = written(tmp_path, **numbers)
    found = from_hugging_face(tmp_path)
    assert nnx.graphdef(found) == nnx.graphdef(made.eval() or made)
    for one, other in zip(jax.tree.leaves(nnx.state(found)), jax.tree.leaves(nnx.state(made)), strict=True):
        np.testing.assert_array_equal(one, other)


def test_an_old_index_never_hides_what_was_written(tmp_path):
    made = written(tmp_path)
    old = transformer(61, layers=2, width=16, heads=4, kv_heads=2, rngs=nnx.Rngs(1))
    to_hugging_face(old, tmp_path / "old")
    arrays = safetensors.numpy.load_file(tmp_path / "old" / "model.safetensors")
    safetensors.numpy.save_file(arrays, tmp_path / "model-00001-of-00001.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(arrays, "model-00001-of-00001.safetensors")}))
    # Both forms in one folder: what transformers reads.
    np.testing.assert_array_equal(from_hugging_face(tmp_path).embed_tokens.embedding, made.embed_tokens.embedding)
    (tmp_path / "model.safetensors").unlink()
    np.testing.assert_array_equal(from_hugging_face(tmp_path).embed_tokens.embedding, old.embed_tokens.embedding)
    with pytest.raises(DataError, match=r"holds a checkpoint of several files .*: name another folder"):
        written(tmp_path)
    assert not (tmp_path / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("numbers", "said"),
    [
        ({"output_bias": True}, "output_bias is True and qkv_bias is False"),
        ({"qk_norm": True, "output_bias": True}, "all of them or none"),
        ({"qk_norm": True, "qkv_bias": True}, "all of them or none"),
    ],
)
def test_biases_that_no_configuration_has_are_refused(numbers, said, tmp_path):
    with pytest.raises(ConfigError, match=said):
        written(tmp_path / "new", **numbers)
    assert not (tmp_path / "new").exists()


def test_a_model_is_written_in_half_precision(tmp_path):
    model = kd.from_nnx(lambda rngs: transformer(61, layers=1, width=8, heads=2, rngs=rngs)).init(0)
    to_hugging_face(model, tmp_path, dtype=jnp.bfloat16)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    half = from_hugging_face(tmp_path, param_dtype=jnp.bfloat16)
    assert half.norm.scale.dtype == jnp.bfloat16
    wide = from_hugging_face(tmp_path).embed_tokens.embedding[...]
    np.testing.assert_allclose(wide, model.variables["params"]["embed_tokens"]["embedding"], rtol=1e-2)


def changed(folder, **settings):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"model_type": "gpt2"}, "of the type gpt2: give one of llama, qwen2, qwen3"),
        ({"hidden_act": "gelu"}, "the activation gelu"),
        ({"use_sliding_window": True}, "a sliding window"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "by the rule yarn"),
        ({"num_hidden_layers": 3}, r"lacks model.layers.2.input_layernorm.weight, .* and 1 more"),
        ({"num_hidden_layers": 1}, "has model.layers.1.input_layernorm.weight"),
        ({"intermediate_size": 33}, r"mlp.down_proj.weight of .* has the shape \(16, 64\): it must have \(16, 33\)"),
        ({"hidden_size": "wide"}, "is no configuration of a language model"),
        ({"num_key_value_heads": 3}, "multiple of kv_heads"),
    ],
)
def test_what_does_not_fit_is_one_sentence(settings, said, tmp_path):
    written(tmp_path)
    changed(tmp_path, **settings)
    with pytest.raises((DataError, ConfigError), match=said) as error:
        from_hugging_face(tmp_path)
    assert "\n" not in str(error.value)


def test_a_folder_that_lacks_files_or_has_foreign_ones_is_refused(tmp_path):
    with pytest.raises(DataError, match="cannot be read"):
        from_hugging_face(tmp_path)
    written(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../outside.safetensors"}}))
    with pytest.raises(DataError, match="names no files beside it"):
        from_hugging_face(tmp_path)
    index.unlink()
    with pytest.raises(DataError, match=r"has no \*.safetensors"):
        from_hugging_face(tmp_path)
    safetensors.numpy.save_file({"x": np.full(3, np.nan, np.float32)}, tmp_path / "part.safetensors")
    with pytest.raises(DataError, match="has x too many"):
        from_hugging_face(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(DataError, match="holds a list and no settings"):
        from_hugging_face(tmp_path)
    with pytest.raises(ConfigError, match="a MLP has no form at Hugging Face"):
        to_hugging_face(kd.mlp([3, 2]).init(0), tmp_path)


def test_files_are_whole_or_as_they_were(tmp_path, monkeypatch):
    written(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    original = type(tmp_path).write_bytes

    def full(self, content):
        original(self, content[:5])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(tmp_path), "write_bytes", full)
    with pytest.raises(DataError, match="No space left on device"):
        written(tmp_path, tied=False)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_types_that_are_no_floats_and_folders_that_are_none_are_refused(tmp_path):
    model = transformer(8, layers=1, width=8, heads=2, hidden=8, rngs=nnx.Rngs(0))
    with pytest.raises(ConfigError, match=r"dtype is .*int32.*: give a type of floats"):
        to_hugging_face(model, tmp_path, dtype=jnp.int32)
    assert not list(tmp_path.iterdir())
    with pytest.raises(ConfigError, match="the folder is None: give the path"):
        from_hugging_face(None)
    with pytest.raises(ConfigError, match="param_dtype is 'foo'"):
        from_hugging_face(tmp_path, param_dtype="foo")
