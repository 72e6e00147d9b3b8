"""Knowledge distillation in JAX that you can trust: see README.md.

The names below are the public interface for use from Python; `python -m kd_jax.run` is the one from the shell. Each is
imported when it is first asked for, so that `import kd_jax` itself takes no time.
"""

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from kd_jax.version import __version__ as __version__

if TYPE_CHECKING:
    from kd_jax import data as data
    from kd_jax import export as export
    from kd_jax import losses as losses
    from kd_jax import methods as methods
    from kd_jax import models as models
    from kd_jax import optimizers as optimizers
    from kd_jax import stats as stats
    from kd_jax import teacher as teacher
    from kd_jax import train as train
    from kd_jax.compare import compare as compare
    from kd_jax.comparison import Table as Table
    from kd_jax.comparison import plot_sizes as plot_sizes
    from kd_jax.data import augment as augment
    from kd_jax.data.batch import Batch as Batch
    from kd_jax.data.batch import batches as batches
    from kd_jax.data.dataset import Dataset as Dataset
    from kd_jax.data.dataset import make_dataset as make_dataset
    from kd_jax.data.load import load as load
    from kd_jax.data.stream import stream as stream
    from kd_jax.data.tokens import pack as pack
    from kd_jax.data.tokens import token_batch as token_batch
    from kd_jax.distill import Result as Result
    from kd_jax.distill import distill as distill
    from kd_jax.errors import CheckpointError as CheckpointError
    from kd_jax.errors import ConfigError as ConfigError
    from kd_jax.errors import DataError as DataError
    from kd_jax.errors import MethodError as MethodError
    from kd_jax.errors import MismatchError as MismatchError
    from kd_jax.errors import NotFiniteError as NotFiniteError
    from kd_jax.errors import RunError as RunError
    from kd_jax.errors import ShapeError as ShapeError
    from kd_jax.evaluate import evaluate as evaluate
    from kd_jax.evaluate import predict as predict
    from kd_jax.experiments.notebook.config import Config as Config
    from kd_jax.experiments.notebook.config import make_config as make_config
    from kd_jax.generation import Generated as Generated
    from kd_jax.generation import generate as generate
    from kd_jax.generation import seq_kd as seq_kd
    from kd_jax.likelihood import bits_per_byte as bits_per_byte
    from kd_jax.likelihood import perplexity as perplexity
    from kd_jax.methods import AB as AB
    from kd_jax.methods import AT as AT
    from kd_jax.methods import CATKD as CATKD
    from kd_jax.methods import CC as CC
    from kd_jax.methods import CRD as CRD
    from kd_jax.methods import CTKD as CTKD
    from kd_jax.methods import DIST as DIST
    from kd_jax.methods import DKD as DKD
    from kd_jax.methods import DML as DML
    from kd_jax.methods import FSP as FSP
    from kd_jax.methods import FT as FT
    from kd_jax.methods import ICKD as ICKD
    from kd_jax.methods import JSD as JSD
    from kd_jax.methods import KD as KD
    from kd_jax.methods import MGD as MGD
    from kd_jax.methods import MLKD as MLKD
    from kd_jax.methods import NKD as NKD
    from kd_jax.methods import NST as NST
    from kd_jax.methods import OFA as OFA
    from kd_jax.methods import OFD as OFD
    from kd_jax.methods import PKT as PKT
    from kd_jax.methods import PLD as PLD
    from kd_jax.methods import RKD as RKD
    from kd_jax.methods import RLD as RLD
    from kd_jax.methods import SP as SP
    from kd_jax.methods import SRD as SRD
    from kd_jax.methods import TAID as TAID
    from kd_jax.methods import TTM as TTM
    from kd_jax.methods import ULD as ULD
    from kd_jax.methods import VID as VID
    from kd_jax.methods import WKD as WKD
    from kd_jax.methods import WKDF as WKDF
    from kd_jax.methods import WTTM as WTTM
    from kd_jax.methods import AdaptiveKL as AdaptiveKL
    from kd_jax.methods import AlphaBeta as AlphaBeta
    from kd_jax.methods import AttentionMaps as AttentionMaps
    from kd_jax.methods import BinaryKD as BinaryKD
    from kd_jax.methods import Cosine as Cosine
    from kd_jax.methods import CrossEntropy as CrossEntropy
    from kd_jax.methods import FitNet as FitNet
    from kd_jax.methods import HiddenStates as HiddenStates
    from kd_jax.methods import KDWithoutTSquared as KDWithoutTSquared
    from kd_jax.methods import LabelSmoothing as LabelSmoothing
    from kd_jax.methods import LogitMSE as LogitMSE
    from kd_jax.methods import Method as Method
    from kd_jax.methods import MiniLM as MiniLM
    from kd_jax.methods import Parts as Parts
    from kd_jax.methods import ReverseKL as ReverseKL
    from kd_jax.methods import ReviewKD as ReviewKD
    from kd_jax.methods import SampledKL as SampledKL
    from kd_jax.methods import SemCKD as SemCKD
    from kd_jax.methods import SimKD as SimKD
    from kd_jax.methods import SkewKL as SkewKL
    from kd_jax.methods import SkewReverseKL as SkewReverseKL
    from kd_jax.methods import SymmetricKL as SymmetricKL
    from kd_jax.methods import TopKKL as TopKKL
    from kd_jax.methods import TotalVariation as TotalVariation
    from kd_jax.methods import VirtualTeacher as VirtualTeacher
    from kd_jax.methods import VkD as VkD
    from kd_jax.methods import averaged as averaged
    from kd_jax.methods import cohort as cohort
    from kd_jax.methods import fused_linear as fused_linear
    from kd_jax.methods import members as members
    from kd_jax.methods import on_policy as on_policy
    from kd_jax.methods import scheduled as scheduled
    from kd_jax.methods import self_taught as self_taught
    from kd_jax.methods import standardised as standardised
    from kd_jax.methods import static as static
    from kd_jax.methods import with_average as with_average
    from kd_jax.methods import with_classifier as with_classifier
    from kd_jax.methods.grid import Grid as Grid
    from kd_jax.methods.grid import grid as grid
    from kd_jax.models import MLP as MLP
    from kd_jax.models import Model as Model
    from kd_jax.models import Network as Network
    from kd_jax.models import Output as Output
    from kd_jax.models import feature_names as feature_names
    from kd_jax.models import from_function as from_function
    from kd_jax.models import from_linen as from_linen
    from kd_jax.models import from_nnx as from_nnx
    from kd_jax.models import from_onnx as from_onnx
    from kd_jax.models import from_torch as from_torch
    from kd_jax.models import mlp as mlp
    from kd_jax.models import parameters as parameters
    from kd_jax.models import restore as restore
    from kd_jax.models import save as save
    from kd_jax.models import to_module as to_module
    from kd_jax.models import torch_weights as torch_weights
    from kd_jax.schemes import assistants as assistants
    from kd_jax.schemes import generations as generations
    from kd_jax.stats import Comparison as Comparison
    from kd_jax.stats import paired_comparison as paired_comparison
    from kd_jax.stats import summarise as summarise
    from kd_jax.teacher import Teacher as Teacher
    from kd_jax.teacher import cached as cached
    from kd_jax.teacher import from_file as from_file
    from kd_jax.teacher import from_top_k as from_top_k
    from kd_jax.teacher import load_logits as load_logits
    from kd_jax.teacher import open_cache as open_cache
    from kd_jax.teacher import several as several
    from kd_jax.train import callbacks as callbacks
    from kd_jax.train.fit import fit as fit
    from kd_jax.train.sharding import Sharding as Sharding
    from kd_jax.train.step import TrainState as TrainState

# The same names as above, by their module; those of `_MODULES` are modules themselves.
_ROOMS = ("data", "export", "losses", "methods", "models", "optimizers", "stats", "teacher", "train")
_MODULES = {name: f".{name}" for name in _ROOMS} | {
    "augment": ".data.augment",
    "callbacks": ".train.callbacks",
    "parameters": ".models.parameters",
    "torch_weights": ".models.torch_weights",
}
_NAMES = {
    ".compare": "compare",
    ".comparison": "Table plot_sizes",
    ".data.batch": "Batch batches",
    ".data.dataset": "Dataset make_dataset",
    ".data.load": "load",
    ".data.stream": "stream",
    ".data.tokens": "pack token_batch",
    ".distill": "Result distill",
    ".errors": "CheckpointError ConfigError DataError MethodError MismatchError NotFiniteError RunError ShapeError",
    ".evaluate": "evaluate predict",
    ".experiments.notebook.config": "Config make_config",
    ".generation": "Generated generate seq_kd",
    ".likelihood": "bits_per_byte perplexity",
    ".methods.grid": "Grid grid",
    ".methods": (
        "AB AT CATKD CC CRD CTKD DIST DKD DML FSP FT ICKD JSD KD MGD MLKD NKD NST OFA OFD PKT PLD RKD RLD SP SRD "
        "TAID TTM ULD VID WKD WKDF WTTM AdaptiveKL AlphaBeta AttentionMaps BinaryKD Cosine CrossEntropy FitNet "
        "HiddenStates KDWithoutTSquared LabelSmoothing LogitMSE Method MiniLM Parts ReverseKL ReviewKD SampledKL "
        "SemCKD SimKD SkewKL SkewReverseKL SymmetricKL TopKKL TotalVariation VirtualTeacher VkD averaged cohort "
        "fused_linear members on_policy scheduled self_taught standardised static with_average with_classifier"
    ),
    ".models": (
        "MLP Model Network Output feature_names from_function from_linen from_nnx from_onnx from_torch mlp restore "
        "save to_module"
    ),
    ".schemes": "assistants generations",
    ".stats": "Comparison paired_comparison summarise",
    ".teacher": "Teacher cached from_file from_top_k load_logits open_cache several",
    ".train.fit": "fit",
    ".train.sharding": "Sharding",
    ".train.step": "TrainState",
}
_MODULE_OF = {name: module for module, names in _NAMES.items() for name in names.split()}

__all__ = sorted({*_MODULES, *_MODULE_OF})


class _Package(ModuleType):
    """A package that imports its names when they are asked for."""

    def __getattr__(self, name: str) -> Any:
        if name in _MODULES:
            value: Any = importlib.import_module(_MODULES[name], self.__name__)
        elif name in _MODULE_OF:
            value = getattr(importlib.import_module(_MODULE_OF[name], self.__name__), name)
        else:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        self.__dict__[name] = value
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        # `kd_jax.evaluate` is the function, and not the module of that name, which Python would put there.
        if not (isinstance(value, ModuleType) and _MODULE_OF.get(name) == f".{name}"):
            super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return sorted({*self.__dict__, *__all__})


sys.modules[__name__].__class__ = _Package
