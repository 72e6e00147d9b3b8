from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from kd_jax.data.dataset import Dataset, make_dataset
from kd_jax.experiments.notebook import plots
from kd_jax.experiments.notebook.config import Config
from kd_jax.experiments.notebook.experiment import Result, TrainedModels
from kd_jax.stats import paired_comparison


def drawn(dataset: Dataset, wrong: int) -> Any:
    """Of six students, two of them wrong on the first `wrong` test images."""
    labels = dataset.test_labels
    students = np.tile(labels, (6, 1))
    students[[1, 4], :wrong] = (labels[:wrong] + 1) % dataset.classes
    return plots._digits(students, labels, dataset)


@pytest.mark.parametrize("shape", [(28, 28), (1, 784), (784, 1), (32, 128, 3), (90, 20)])
@pytest.mark.parametrize("wrong", [1, 5, 21, 30])
def test_digits_stand_upright_each_under_its_own_words(shape: tuple[int, ...], wrong: int) -> None:
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (40, *shape)).astype(np.uint8), rng.integers(0, 10, 40)
    labels[:10] = range(10)
    dataset = make_dataset("random", images, labels, images, labels)
    figure = drawn(dataset, wrong)
    FigureCanvasAgg(figure).draw()
    renderer = figure.canvas.get_renderer()
    (axis,) = figure.axes
    shown = min(wrong, plots._MOST_IMAGES)
    assert len(axis.images) == len(axis.texts) == shown
    boxes = []
    for index, image, text in zip(range(shown), axis.images, axis.texts, strict=True):
        expected = dataset.test_images[index]
        np.testing.assert_array_equal(image.get_array(), expected if shape[-1] == 3 else expected[..., 0])
        label = labels[index]
        assert text.get_text() == f"{label}, seen as {(label + 1) % 10}\nby 2 of 6"
        # The first row of pixels is at the upper edge, of an axis that points downwards.
        left, right, low, high = image.get_extent()
        assert image.origin == "upper"
        assert left < right
        assert high < low
        box, words = image.get_window_extent(renderer), text.get_window_extent(renderer)
        if 1 not in shape:
            assert box.height / box.width == pytest.approx(shape[0] / shape[1])
        assert box.x0 < (words.x0 + words.x1) / 2 < box.x1
        # Its words are next to it, above.
        assert 0 <= words.y0 - box.y1 < words.height
        boxes += [box, words]
    boxes.append(figure._suptitle.get_window_extent(renderer))
    for i, one in enumerate(boxes):
        assert figure.bbox.containsx(one.x0)
        assert figure.bbox.containsx(one.x1)
        assert figure.bbox.containsy(one.y0)
        assert figure.bbox.containsy(one.y1)
        assert not any(one.overlaps(other) for other in boxes[i + 1 :])


def test_where_no_student_is_wrong_it_is_said(small_dataset: Dataset) -> None:
    figure = drawn(small_dataset, 0)
    assert "no test image that the teacher gets right" in figure._suptitle.get_text()
    assert figure.axes == []


def test_the_legend_of_the_differences_hides_no_seed() -> None:
    alone, distilled = np.array([9385, 9352, 9338, 9304, 9292]), np.array([9366, 9363, 9360, 9301, 9277])
    figure = plots._comparison(
        np.stack([alone, distilled]), paired_comparison(alone, distilled, metric="correct"), 10_000
    )
    FigureCanvasAgg(figure).draw()
    _, right = figure.axes
    legend = right.get_legend().get_window_extent()
    (seeds, *_) = right.collections
    for spot in right.transData.transform(seeds.get_offsets()):
        assert not legend.contains(*spot)
    assert legend.x1 <= figure.bbox.x1


@pytest.mark.parametrize(
    ("config", "told"),
    [({}, True), ({"teacher": "resnet8", "student": "lenet"}, False), ({"teacher_dropout": 0.0}, False)],
)
def test_the_learning_curves_tell_of_dropout_where_there_is_some(config: dict[str, Any], told: bool) -> None:
    history = SimpleNamespace(cross_entropy=np.ones((2, 3)), accuracy=np.full((2, 3), 0.5))
    one = Mock(spec=TrainedModels, history=history, epochs=[1, 2, 3], seeds=(1, 2))
    result = Mock(spec=Result, config=Config(**config), teacher=one, student=one, distilled=one)
    figure = plots._learning_curves(result)
    assert ("the teacher trains with its dropout" in figure._suptitle.get_text()) == told
