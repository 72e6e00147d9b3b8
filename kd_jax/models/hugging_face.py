"""Checkpoints of Hugging Face's transformers, in the form of Llama and Qwen, as the zoo's transformer; and back."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from jaxtyping import Shaped

from kd_jax.errors import ConfigError, DataError
from kd_jax.files import check_shape, floats, listed, open_regular, reason, refusing, tensors
from kd_jax.files.written import write_whole
from kd_jax.models.doors import as_model
from kd_jax.models.network import Model
from kd_jax.models.nnx import NNXNetwork, from_nnx, to_module
from kd_jax.models.parameters import named_leaves
from kd_jax.models.zoo.layers import check_float
from kd_jax.models.zoo.transformer import RopeScaling, Transformer, transformer

Arrays = dict[str, Shaped[np.ndarray, "..."]]

_INDEX, _WEIGHTS = "model.safetensors.index.json", "model.safetensors"
_CLASSES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
_WEIGHT = {"kernel": "weight", "scale": "weight", "embedding": "weight"}
# Earlier checkpoints have RoPE's frequencies as arrays, which follow from the configuration.
_LEFT_OUT = ".rotary_emb.inv_freq"


def from_hugging_face(folder: Any, *, param_dtype: Any = jnp.float32, remat: bool = False) -> Transformer:
    """The language model of a folder with `config.json` and `*.safetensors`, also of several shards.

    Models of the type llama, qwen2 and qwen3: nothing is downloaded and no code of the folder runs. Logits are those of
    `transformers` to rounding. param_dtype: of the parameters, `jnp.bfloat16` say; they are read as float32.
    remat: as of `kd.models.transformer`.

    Raises `ConfigError` for a type that is none of floats, and `DataError` for a folder that lacks something, another
    type of model, what is not computed here (sliding windows, other activations, other scalings of RoPE than Llama
    3.1's), and an array of another shape.
    """
    if not isinstance(folder, str | Path):
        raise ConfigError(f"the folder is {folder!r}: give the path of one that holds config.json")
    check_float(param_dtype, "param_dtype")
    folder = Path(folder).expanduser()
    config = _json(folder / "config.json")
    with refusing(
        f"{folder / 'config.json'} is no configuration of a language model", "give the one of the checkpoint"
    ):
        numbers = _numbers(config, folder)
    made = from_nnx(lambda rngs: transformer(**numbers, param_dtype=param_dtype, remat=remat, rngs=rngs))
    network = made.network
    assert isinstance(network, NNXNetwork)
    arrays = {name: array for name, array in _arrays(folder).items() if not name.endswith(_LEFT_OUT)}
    if numbers["tied"]:
        arrays.pop("lm_head.weight", None)
    leaves = named_leaves(network.split(network.shapes))
    names = [_name(path) for path, _ in leaves]
    missing, more = (sorted(one) for one in (set(names) - arrays.keys(), arrays.keys() - set(names)))
    if missing or more:
        said = [f"lacks {listed(missing)}"] if missing else []
        said += [f"has {listed(more)} too many"] if more else []
        lacks = " and ".join(said)
        raise DataError(f"{folder} {lacks}: its arrays must be those of its config.json, so fetch it again")
    found = []
    for name, (path, leaf) in zip(names, leaves, strict=True):
        kernel = path.endswith("kernel")
        what = f"{name} of {folder}"
        check_shape(arrays[name].shape, leaf.shape[::-1] if kernel else leaf.shape, what)
        values = floats(arrays.pop(name), what)
        found.append(jnp.asarray(values.T if kernel else values, leaf.dtype))
    variables = jax.tree.unflatten(jax.tree.structure(network.split(network.shapes)), found)
    module = to_module(Model(network, network.merge(*variables)))
    assert isinstance(module, Transformer)
    return module


def to_hugging_face(model: Any, folder: str | Path, *, max_positions: int = 4096, dtype: Any = None) -> None:
    """Writes a `Transformer` as a folder with `config.json` and `model.safetensors`, which transformers reads.

    model: the module, a `Model` of it, or what `kd.distill` gave back. A tokenizer is not written: copy the teacher's.
    Its type is qwen3 with q/k norms, qwen2 with biases of queries, keys and values alone, and else llama.
    max_positions: what the configuration says of the longest sequence. dtype: of the file, `jnp.bfloat16` say; None
    for that of the parameters. Raises `ConfigError` for another model or type, and `DataError` where nothing can
    be written, or where the folder holds a checkpoint of several files.
    """
    if dtype is not None:
        check_float(dtype, "dtype")
    known = as_model(model)
    if known.variables is None:
        raise ConfigError("this model has no variables yet: make them with model.init(key), or train it")
    module = to_module(known)
    if not isinstance(module, Transformer):
        raise ConfigError(f"a {type(module).__name__} has no form at Hugging Face: give a kd.models.transformer")
    arrays = {}
    for path, leaf in named_leaves(known.network.split(known.variables)):
        array = np.asarray(leaf if dtype is None else leaf.astype(dtype))
        arrays[_name(path)] = np.ascontiguousarray(array.T if path.endswith("kernel") else array)
    config = _config(module) | {"max_position_embeddings": max_positions}
    config["dtype"] = str(next(iter(arrays.values())).dtype)
    folder = Path(folder).expanduser()
    if (folder / _INDEX).exists():
        raise DataError(f"{folder} holds a checkpoint of several files ({_INDEX}): name another folder, or empty it")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{folder} cannot be written ({reason(error)}): name a folder with room for it") from None
    # Transformers reads no file without this.
    write_whole(folder / _WEIGHTS, safetensors.numpy.save(arrays, metadata={"format": "pt"}))
    write_whole(folder / "config.json", f"{json.dumps(config, indent=2)}\n".encode())


def _numbers(config: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """What `transformer` takes, of a configuration. Raises `DataError` for what it does not compute."""
    kind = config.get("model_type")
    if kind not in _CLASSES:
        raise DataError(f"{folder} has a model of the type {kind}: give one of {', '.join(_CLASSES)}")
    activation = config.get("hidden_act", "silu")
    others = {
        f"the activation {activation}": activation != "silu",
        "a sliding window": config.get("use_sliding_window", False),
        "biases of its feed-forward layers": config.get("mlp_bias", False),
        "a quantised checkpoint": config.get("quantization_config") is not None,
    }
    for what, is_there in others.items():
        if is_there:
            raise DataError(f"{folder} has {what}, which kd_jax does not compute: give another checkpoint")
    bias = bool(config.get("attention_bias", False))
    heads = int(config["num_attention_heads"])
    rope = config.get("rope_parameters") or {}
    head_width = config.get("head_dim")
    return {
        "vocabulary": int(config["vocab_size"]), "layers": int(config["num_hidden_layers"]),
        "width": int(config["hidden_size"]), "heads": heads,
        "kv_heads": int(config.get("num_key_value_heads") or heads),
        "head_width": None if head_width is None else int(head_width), "hidden": int(config["intermediate_size"]),
        "tied": bool(config.get("tie_word_embeddings", False)), "qkv_bias": bias or kind == "qwen2",
        "output_bias": bias and kind != "qwen2", "qk_norm": kind == "qwen3",
        "rope_base": float(rope.get("rope_theta") or config.get("rope_theta") or 10_000.0),
        "rope_scaling": _scaling(rope or config.get("rope_scaling") or {}, folder),
        "epsilon": float(config.get("rms_norm_eps", 1e-6)),
    }  # fmt: skip


def _scaling(rope: Mapping[str, Any], folder: Path) -> RopeScaling | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind != "llama3":
        raise DataError(f"{folder} scales RoPE by the rule {kind}: kd_jax has default and llama3 alone")
    factor, low, high = (float(rope[name]) for name in ("factor", "low_freq_factor", "high_freq_factor"))
    return RopeScaling(factor, low, high, int(rope["original_max_position_embeddings"]))


def _config(module: Transformer) -> dict[str, Any]:
    kind = "qwen3" if module.qk_norm else "qwen2" if module.qkv_bias and not module.output_bias else "llama"
    if kind == "qwen3" and module.qkv_bias != module.output_bias:
        raise ConfigError("a model with q/k norms and biases of its attention has all of them or none at Hugging Face")
    if module.output_bias and not module.qkv_bias:
        raise ConfigError(
            "output_bias is True and qkv_bias is False, which no type of model has at Hugging Face: give both, or none"
        )
    vocabulary, width = module.embed_tokens.embedding.shape
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": module.rope_base}
    scaling = module.rope_scaling
    if scaling is not None:
        rope |= {
            "rope_type": "llama3", "factor": scaling.factor, "low_freq_factor": scaling.low,
            "high_freq_factor": scaling.high, "original_max_position_embeddings": scaling.original_positions,
        }  # fmt: skip
    return {
        "architectures": [_CLASSES[kind]], "model_type": kind, "vocab_size": vocabulary, "hidden_size": width,
        "num_hidden_layers": len(module.layers), "num_attention_heads": module.heads,
        "num_key_value_heads": module.kv_heads, "head_dim": module.head_width, "intermediate_size": module.hidden,
        "tie_word_embeddings": module.lm_head is None, "attention_bias": module.output_bias, "hidden_act": "silu",
        "rms_norm_eps": module.epsilon, "rope_theta": module.rope_base, "rope_parameters": rope,
        "rope_scaling": None if scaling is None else rope,
    }  # fmt: skip


def _name(path: str) -> str:
    """What transformers calls the array at a path."""
    layer, _, kind = path.rpartition(".")
    return f"{'' if layer == 'lm_head' else 'model.'}{layer}.{_WEIGHT.get(kind, kind)}"


def _arrays(folder: Path) -> Arrays:
    files = [_WEIGHTS]
    # The one file counts before an index, as in transformers.
    if not (folder / _WEIGHTS).exists() and (folder / _INDEX).exists():
        index = _json(folder / _INDEX).get("weight_map")
        files = sorted(set(index.values())) if isinstance(index, dict) else []
        if not files or any(not isinstance(name, str) or Path(name).name != name for name in files):
            raise DataError(f"{folder / _INDEX} names no files beside it: fetch the checkpoint again")
    elif not (folder / _WEIGHTS).exists():
        files = sorted(path.name for path in folder.glob("*.safetensors"))
        if not files:
            raise DataError(f"{folder} has no *.safetensors: give a folder with the weights in that form")
    return {name: array for file in files for name, array in tensors.read(folder / file).items()}


def _json(path: Path) -> dict[str, Any]:
    with refusing(f"{path} is no JSON", "fetch the checkpoint again"), open_regular(path) as file:
        content = json.loads(file.read())
    if not isinstance(content, dict):
        raise DataError(f"{path} holds a {type(content).__name__} and no settings by name: fetch the checkpoint again")
    return content
