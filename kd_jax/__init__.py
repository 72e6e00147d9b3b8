"""Knowledge distillation in JAX that you can trust: see README.md."""

from kd_jax import losses
from kd_jax.data.batch import Batch, batches
from kd_jax.distill import Result, distill
from kd_jax.evaluate import evaluate, predict
from kd_jax.methods import (
    KD,
    CrossEntropy,
    FitNet,
    LabelSmoothing,
    Method,
    Parts,
)
from kd_jax.models import (
    MLP,
    Model,
    Network,
    Output,
    feature_names,
    from_function,
    from_linen,
    from_nnx,
    mlp,
)
from kd_jax.teacher import Teacher, cached, from_file, from_top_k, load_logits, several
from kd_jax.train import callbacks
from kd_jax.train.fit import fit
from kd_jax.train.step import TrainState

__version__ = "0.2.0"

__all__ = [
    "KD",
    "MLP",
    "Batch",
    "CrossEntropy",
    "FitNet",
    "LabelSmoothing",
    "Method",
    "Model",
    "Network",
    "Output",
    "Parts",
    "Result",
    "Teacher",
    "TrainState",
    "batches",
    "cached",
    "callbacks",
    "distill",
    "evaluate",
    "feature_names",
    "fit",
    "from_file",
    "from_function",
    "from_linen",
    "from_nnx",
    "from_top_k",
    "load_logits",
    "losses",
    "mlp",
    "predict",
    "several",
]
