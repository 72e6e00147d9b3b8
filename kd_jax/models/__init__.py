"""Networks: any model as pure functions, the doors through which it comes, and the zoo."""

from kd_jax.models.calling import as_output
from kd_jax.models.doors import as_model, count_parameters, feature_names
from kd_jax.models.function import from_function
from kd_jax.models.hugging_face import from_hugging_face, to_hugging_face
from kd_jax.models.linen import from_linen
from kd_jax.models.mlp import MLP, mlp
from kd_jax.models.network import Model, Network, Output
from kd_jax.models.nnx import from_nnx, to_module
from kd_jax.models.onnx import from_onnx
from kd_jax.models.parameters import restore, save
from kd_jax.models.torch import from_torch
from kd_jax.models.torch_modules import load_state_dict, to_state_dict
from kd_jax.models.zoo import (
    lenet,
    mobilenet_v1,
    mobilenet_v2,
    resnet8,
    resnet8x4,
    resnet14,
    resnet18,
    resnet20,
    resnet32,
    resnet32x4,
    resnet34,
    resnet44,
    resnet50,
    resnet56,
    resnet110,
    shufflenet_v1,
    shufflenet_v2,
    vgg8,
    vgg11,
    vgg13,
    vgg16,
    vgg19,
    wrn_16_1,
    wrn_16_2,
    wrn_40_1,
    wrn_40_2,
)
from kd_jax.models.zoo.gru import GRUSeq2Seq, gru_seq2seq
from kd_jax.models.zoo.transformer import RopeScaling, Transformer, transformer

__all__ = [
    "MLP", "GRUSeq2Seq", "Model", "Network", "Output", "RopeScaling", "Transformer", "as_model", "as_output",
    "count_parameters", "feature_names", "from_function", "from_hugging_face", "from_linen", "from_nnx", "from_onnx",
    "from_torch", "gru_seq2seq", "lenet", "load_state_dict", "mlp", "mobilenet_v1", "mobilenet_v2", "resnet8",
    "resnet8x4", "resnet14", "resnet18", "resnet20", "resnet32", "resnet32x4", "resnet34", "resnet44", "resnet50",
    "resnet56", "resnet110", "restore", "save", "shufflenet_v1", "shufflenet_v2", "to_hugging_face", "to_module",
    "to_state_dict", "transformer", "vgg8", "vgg11", "vgg13", "vgg16", "vgg19", "wrn_16_1", "wrn_16_2", "wrn_40_1",
    "wrn_40_2",
]  # fmt: skip
