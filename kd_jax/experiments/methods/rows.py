"""The rows of the table: each method with the places of its features and the number that its trials choose."""

from collections.abc import Callable
from typing import Any, NamedTuple

from kd_jax import methods as of
from kd_jax.experiments.methods.networks import BEFORE_RELU, CLASS_MAPS, POOLED, STAGES
from kd_jax.experiments.notebook.methods import KDAsWritten
from kd_jax.methods import CrossEntropy, Method

ALONE, KD = "crossentropy", "kd"
"""The two rows that all others are compared with."""

MAP = STAGES[-1]
PLACES = {
    MAP: "the last map",
    POOLED: "its mean over the positions",
    BEFORE_RELU: "the last map before its ReLU",
    CLASS_MAPS: "the class activation maps",
    ", ".join(STAGES): "the maps of all three stages",
    f"{STAGES[0]}, {CLASS_MAPS}": "the first map and the class activation maps",
}
"""The places of features, the same in teacher and student, and what they are."""

OF_KD = (STANDARDISED, AT_1) = ("kd-standardised", "kd-at-1")
"""No methods of their own: logit standardisation, and the temperature that other divergences have by default."""


class Setting(NamedTuple):
    """What some methods are made of: the training set's size, the steps of a training, similarities of the classes."""

    examples: int
    steps: int
    similarity: Any


class Row(NamedTuple):
    """A method. number: what its trials choose, empty where there is nothing. values: one trial each, the paper's among
    them. make: the method with such a number. place: of its features, as in `PLACES`; empty for one of logits.

    student: "simkd" or "cohort" where it is not the plain student. note: what a reader of its row has to know.
    """

    number: str
    values: tuple[float, ...]
    make: Callable[[float, Setting], Method]
    place: str = ""
    student: str = ""
    note: str = ""


_ALPHAS = (0.02, 0.1, 0.3, 0.7)
_HARD = (0.0, 0.1, 0.3, 1.0)


def _soft(method: Callable[..., Method], alphas: tuple[float, ...] = _ALPHAS, note: str = "", **others: Any) -> Row:
    """alpha · cross entropy + (1 − alpha) · a soft loss."""
    return Row("alpha", alphas, lambda alpha, setting: method(alpha=alpha, **others), note=note)


def _beside(method: Callable[..., Method], usual: float = 1.0, **others: Any) -> Row:
    """Cross entropy + weight · a soft loss."""

    def make(weight: float, setting: Setting) -> Method:
        return CrossEntropy() + weight * method(hard=0.0, **others)

    return Row("weight", tuple(usual * factor for factor in (0.1, 0.3, 1.0, 3.0)), make)


def _hard(method: Callable[..., Method], note: str = "", **others: Any) -> Row:
    """A soft loss + hard · cross entropy."""
    return Row("hard", _HARD, lambda hard, setting: method(hard=hard, **others), note=note)


def _features(method: Callable[..., Method], usual: float, place: str = MAP, note: str = "", **others: Any) -> Row:
    """Cross entropy + weight · a loss of features. The papers' weights are for other networks: a wider range."""
    where: Any = tuple(place.split(", ")) if place == ", ".join(STAGES) else place

    def make(weight: float, setting: Setting) -> Method:
        return CrossEntropy() + weight * method(where, **others)

    return Row("weight", tuple(usual * factor for factor in (0.01, 0.1, 1.0, 10.0)), make, place, note=note)


def _wkd(weight: float, setting: Setting) -> Method:
    return CrossEntropy() + weight * of.WKD(setting.similarity, hard=0.0)


def _crd(weight: float, setting: Setting) -> Method:
    return CrossEntropy() + weight * of.CRD(POOLED, examples=setting.examples, width=64, negatives=256)


def _fsp(weight: float, setting: Setting) -> Method:
    return CrossEntropy() + weight * of.FSP(STAGES[0], CLASS_MAPS)


def _simkd(hard: float, setting: Setting) -> Method:
    return hard * CrossEntropy() + of.SimKD(teacher_feature=MAP)


def _standardised(weight: float, setting: Setting) -> Method:
    return CrossEntropy() + of.standardised(weight * of.KD(alpha=0.0, temperature=2.0))


_WITHOUT_T2 = (0.01, 0.1, 0.5, 0.9)

ROWS: dict[str, Row] = {
    ALONE: Row("", (), lambda number, setting: CrossEntropy(), note="no distillation"),
    "labelsmoothing": Row(
        "smoothing", (0.03, 0.1, 0.2, 0.4), lambda smoothing, setting: of.LabelSmoothing(smoothing), note="no teacher"
    ),
    "virtualteacher": _soft(of.VirtualTeacher, note="no teacher's network"),
    KD: _soft(of.KD),
    AT_1: _soft(of.KD, note="the temperature of most other divergences", temperature=1.0),
    "kd-without-t2": _soft(of.KDWithoutTSquared, _WITHOUT_T2),
    "kd-as-written": _soft(KDAsWritten, _WITHOUT_T2, note="the reference notebook's mistake, on purpose"),
    STANDARDISED: Row("weight", (0.9, 3.0, 9.0, 27.0), _standardised, note="logit standardisation of kd, T = 2"),
    "reversekl": _soft(of.ReverseKL),
    "symmetrickl": _soft(of.SymmetricKL),
    "skewkl": _soft(of.SkewKL),
    "skewreversekl": _soft(of.SkewReverseKL),
    "jsd": _soft(of.JSD),
    "alphabeta": _hard(of.AlphaBeta),
    "adaptivekl": _soft(of.AdaptiveKL),
    "totalvariation": _soft(of.TotalVariation),
    "logitmse": _soft(of.LogitMSE),
    "ttm": _soft(of.TTM),
    "wttm": _soft(of.WTTM),
    "topkkl": _soft(of.TopKKL, k=3, note="k = 3 of the classes"),
    "sampledkl": _hard(of.SampledKL),
    "uld": _beside(of.ULD, 1.5),
    "ctkd": _soft(of.CTKD),
    "taid": Row("hard", _HARD, lambda hard, setting: of.TAID(float(setting.steps), hard=hard)),
    "dkd": _beside(of.DKD),
    "nkd": _beside(of.NKD),
    "rld": _beside(of.RLD),
    "ofa": _beside(of.OFA),
    "pld": _hard(of.PLD),
    "dist": _beside(of.DIST),
    "mlkd": _beside(of.MLKD),
    "wkd": Row("weight", (0.1, 0.3, 1.0, 3.0), _wkd, note="similarities of classes by the teacher's classifier"),
    "fitnet": _features(of.FitNet, 100.0),
    "hiddenstates": _features(of.HiddenStates, 1.0),
    "at": _features(of.AT, 1000.0),
    "nst": _features(of.NST, 50.0),
    "sp": _features(of.SP, 3000.0),
    "pkt": _features(of.PKT, 30000.0, POOLED),
    "rkd": _features(of.RKD, 1.0, POOLED),
    "cc": _features(of.CC, 0.02, POOLED),
    "vid": _features(of.VID, 1.0),
    "srd": _features(of.SRD, 1.0, POOLED),
    "vkd": _features(of.VkD, 1.0),
    "crd": Row("weight", (0.008, 0.08, 0.8, 8.0), _crd, POOLED, note="256 negatives, embeddings of 64"),
    "ab": _features(of.AB, 0.003, BEFORE_RELU, note="in one training; the paper has it before that of the labels"),
    "ofd": _features(of.OFD, 0.001, BEFORE_RELU),
    "ft": _features(of.FT, 200.0, note="the paraphraser is learned beside the student"),
    "mgd": _features(of.MGD, 7e-5),
    "ickd": _features(of.ICKD, 2.5),
    "wkdf": _features(of.WKDF, 0.02),
    "fsp": Row("weight", (0.5, 5.0, 50.0, 500.0), _fsp, f"{STAGES[0]}, {CLASS_MAPS}", note="places of equal channels"),
    "cosine": _features(of.Cosine, 1.0, CLASS_MAPS),
    "catkd": _features(of.CATKD, 400.0, CLASS_MAPS),
    "reviewkd": _features(of.ReviewKD, 1.0, ", ".join(STAGES), width=32),
    "semckd": _features(of.SemCKD, 400.0, ", ".join(STAGES)),
    "simkd": Row("hard", _HARD, _simkd, MAP, "simkd", "a larger student, with the teacher's classifier"),
    "dml": Row(
        "hard", (0.1, 0.3, 1.0, 3.0), lambda hard, setting: of.DML(hard=hard), "", "cohort",
        "two students and no teacher; the first is measured",
    ),
}  # fmt: skip
"""Every method that the table has, by the name of `python -m kd_jax.run --method list`."""

LEFT_OUT = {
    "attentionmaps": "it compares scores of attention, which a convolutional network has not",
    "minilm": "it compares queries, keys or values, which a convolutional network has not",
    "binarykd": "its outputs are labels of their own, and these are classes of which one is right",
}
"""Methods that have no row, and why."""
