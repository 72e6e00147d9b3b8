"""Knowledge distillation in JAX that you can trust: see README.md.

The names below are the public interface for use from Python; `python -m kd_jax.run` is the one from the shell.
"""

import itertools
import signal
import sys

if signal.getsignal(signal.SIGINT) is signal.default_int_handler and any(
    before == "-m" and name.startswith("kd_jax.") for before, name in itertools.pairwise(sys.orig_argv)
):
    # Importing JAX takes seconds; Ctrl-C ends the command meanwhile, and without a traceback. `command` takes over.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from kd_jax.data.dataset import DataError, Dataset, load, make_dataset
from kd_jax.evaluate import Evaluation, evaluate, predict
from kd_jax.experiments.notebook.config import Config, ConfigError, make_config
from kd_jax.methods.logits import CROSS_ENTROPY, KD, KD_AS_WRITTEN, KD_WITHOUT_T_SQUARED, KDWeights, Method
from kd_jax.models import parameters
from kd_jax.models.network import MLP, Network, Output, from_function, from_linen, from_nnx, mlp
from kd_jax.stats import Comparison, paired_comparison, summarise
from kd_jax.teacher import load_logits
from kd_jax.train.step import Examples, Hyperparameters, Metrics, Recipe, TrainState, fit

__version__ = "0.2.0"

__all__ = [
    "CROSS_ENTROPY", "KD", "KD_AS_WRITTEN", "KD_WITHOUT_T_SQUARED", "MLP", "Comparison", "Config", "ConfigError",
    "DataError", "Dataset", "Evaluation", "Examples", "Hyperparameters", "KDWeights", "Method", "Metrics", "Network",
    "Output", "Recipe", "TrainState", "evaluate", "fit", "from_function", "from_linen", "from_nnx", "load",
    "load_logits", "make_config", "make_dataset", "mlp", "paired_comparison", "parameters", "predict", "summarise",
]  # fmt: skip
