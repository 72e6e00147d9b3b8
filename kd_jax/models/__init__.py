"""Networks: any model as pure functions, the doors through which it comes, and the zoo."""

from kd_jax.models.calling import as_output
from kd_jax.models.doors import as_model, feature_names
from kd_jax.models.function import from_function
from kd_jax.models.linen import from_linen
from kd_jax.models.mlp import MLP, mlp
from kd_jax.models.network import Model, Network, Output, count_parameters
from kd_jax.models.nnx import from_nnx, to_module
from kd_jax.models.parameters import restore, save
from kd_jax.models.torch import from_torch

__all__ = [
    "MLP", "Model", "Network", "Output", "as_model", "as_output", "count_parameters", "feature_names", "from_function",
    "from_linen", "from_nnx", "from_torch", "mlp", "restore", "save", "to_module",
]  # fmt: skip
