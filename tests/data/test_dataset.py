import contextlib
import gzip
import hashlib
import inspect
import re
from importlib import resources
from pathlib import Path

import numpy as np
import pytest

from kd_jax.data.dataset import Dataset, make_dataset
from kd_jax.data.load import load
from kd_jax.data.sources import idx, mnist
from kd_jax.errors import DataError

# Of the four raw idx files as published, header and all.
RAW_SHA256 = {
    "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}


def raw_idx(array: np.ndarray) -> bytes:
    header = bytes([0, 0, 8, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape)
    return header + array.astype(np.uint8).tobytes()


def write_idx(folder: Path, dataset: Dataset, *, zipped: bool = False) -> None:
    arrays = {
        "train-images-idx3-ubyte": dataset.train_images[..., 0],
        "train-labels-idx1-ubyte": dataset.train_labels,
        "t10k-images-idx3-ubyte": dataset.test_images[..., 0],
        "t10k-labels-idx1-ubyte": dataset.test_labels,
    }
    for name, array in arrays.items():
        path = folder / (f"{name}.gz" if zipped else name)
        path.write_bytes(gzip.compress(raw_idx(array)) if zipped else raw_idx(array))


def write_npz(path: Path, dataset: Dataset, **changed: np.ndarray) -> str:
    arrays = {
        "x_train": dataset.train_images,
        "y_train": dataset.train_labels,
        "x_test": dataset.test_images,
        "y_test": dataset.test_labels,
    }
    np.savez(path, **{**arrays, **changed})
    return f"npz:{path}"


def assert_same(one: Dataset, other: Dataset) -> None:
    for name in ("train_images", "train_labels", "test_images", "test_labels"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name), strict=True)
    assert one.classes == other.classes


def test_packaged_mnist_is_bit_for_bit_the_original() -> None:
    dataset = load("mnist")
    arrays = [dataset.train_images[..., 0], dataset.train_labels, dataset.test_images[..., 0], dataset.test_labels]
    found = [hashlib.sha256(raw_idx(array)).hexdigest() for array in arrays]
    assert dict(zip(RAW_SHA256, found, strict=True)) == RAW_SHA256


def test_packaged_mnist_is_small_and_the_gzip_originals_are_the_same(shared_mnist: Path) -> None:
    assert resources.files("kd_jax.data.sources").joinpath("mnist.npz").stat().st_size <= 11_000_000
    assert_same(load("mnist"), load(f"idx:{shared_mnist}"))


def test_mnist_packs_without_loss() -> None:
    images = np.random.default_rng(0).integers(0, 3, (5, 28, 28)).astype(np.uint8)
    np.testing.assert_array_equal(mnist.unpack(*mnist.pack(images)).reshape(images.shape), images)


def test_digest_tells_arrays_apart(small_dataset: Dataset) -> None:
    changed = small_dataset.test_labels.copy()
    changed[0] = (changed[0] + 1) % 3
    assert small_dataset.digest() == small_dataset._replace(name="other").digest()
    assert small_dataset.digest() != small_dataset._replace(test_labels=changed).digest()


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("layout", ["", "raw", "FashionMNIST/raw"])
def test_idx_folder_reads_back(tmp_path: Path, small_dataset: Dataset, zipped: bool, layout: str) -> None:
    (tmp_path / layout).mkdir(parents=True, exist_ok=True)
    write_idx(tmp_path / layout, small_dataset, zipped=zipped)
    assert_same(load(f"idx:{tmp_path}"), small_dataset)


def test_npz_reads_back(tmp_path: Path, small_dataset: Dataset) -> None:
    assert_same(load(write_npz(tmp_path / "d.npz", small_dataset)), small_dataset)


def test_keras_shapes_and_exact_floats_are_bytes(tmp_path: Path, small_dataset: Dataset) -> None:
    source = write_npz(
        tmp_path / "d.npz",
        small_dataset,
        x_train=small_dataset.train_images[..., 0].astype(np.float32) / np.float32(255),
        y_train=small_dataset.train_labels[:, None].astype(np.int64),
        x_test=small_dataset.test_images.astype(np.float64) / 255,
    )
    assert_same(load(source), small_dataset)
    whole = {"x_train": small_dataset.train_images.astype(np.int64), "x_test": small_dataset.test_images * 1.0}
    assert_same(load(write_npz(tmp_path / "w.npz", small_dataset, **whole)), small_dataset)


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("mnits", "unknown data set 'mnits'"),
        ("mnist:3", "unknown data set 'mnist:3'"),
        ("tfds", "unknown data set 'tfds'"),
        ("idx:", "names nothing after the colon"),
        ("idx:/no/such/folder", "does not exist"),
        ("npz:/no/such/file.npz", "cannot be read"),
    ],
)
def test_unknown_sources_are_named(source: str, says: str) -> None:
    with pytest.raises(DataError, match=says):
        load(source)


def test_a_source_that_is_no_name_is_told() -> None:
    with pytest.raises(DataError, match=r"the data set is .*: give its name as a string, such as 'npz:FILE'"):
        inspect.unwrap(load)(Path("npz:x"))


IDX_DAMAGE = {
    "lacks a file": (lambda raw: None, "does not exist"),
    "is empty": (lambda raw: b"", "magic number"),
    "has a wrong magic number": (lambda raw: b"\0\0\x0d\x03" + raw[4:], "magic number 0x00000d03"),
    "is another kind of file": (lambda raw: b"\x89PNG" + raw[4:], "magic number"),
    "ends in the header": (lambda raw: raw[:9], "truncated"),
    "is truncated": (lambda raw: raw[:-1], "announces: it is truncated"),
    "goes on": (lambda raw: raw + b"\0", "goes on after"),
    "is labels": (lambda raw: raw_idx(np.zeros(240)), "has 1 dimensions"),
    "has other counts": (lambda raw: raw_idx(np.zeros((7, 6, 6))), "7 images and 240 labels"),
    "has no images": (lambda raw: raw_idx(np.zeros((0, 6, 6))), "0 images and 240 labels"),
    "has other shapes": (lambda raw: raw_idx(np.zeros((240, 5, 6))), r"shape \(5, 6, 1\)"),
    "is a truncated gzip": (lambda raw: gzip.compress(raw)[:-20], "damaged gzip"),
    "is a corrupt gzip": (lambda raw: gzip.compress(raw)[:200] + b"\0" * 40, "damaged gzip"),
}


@pytest.mark.parametrize("damage", IDX_DAMAGE)
def test_damaged_idx_files_are_refused(tmp_path: Path, small_dataset: Dataset, damage: str) -> None:
    write_idx(tmp_path, small_dataset)
    change, says = IDX_DAMAGE[damage]
    path = tmp_path / "train-images-idx3-ubyte"
    content = change(path.read_bytes())
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=says) as caught:
        load(f"idx:{tmp_path}")
    assert "\n" not in str(caught.value)


def test_a_lying_idx_header_allocates_nothing(tmp_path: Path) -> None:
    path = tmp_path / "images"
    path.write_bytes(b"\0\0\x08\x03" + b"\xff" * 12 + b"\0" * 100)
    with pytest.raises(DataError, match="truncated"):
        idx.read(path)


NPZ_DAMAGE = {
    "objects": ({"x_train": np.array([{}, []], dtype=object)}, "never unpickled"),
    "NaN pixels": ({"x_train": np.full((240, 6, 6), np.nan, np.float32)}, "NaN or infinite pixels"),
    "infinite pixels": ({"x_test": np.full((60, 6, 6), np.inf)}, "NaN or infinite pixels"),
    "large pixels": ({"x_train": np.full((240, 6, 6), 256)}, "from 256 to 256"),
    "negative pixels": ({"x_train": np.full((240, 6, 6), -1.0)}, "from -1.0 to"),
    "pixels between bytes": ({"x_train": np.full((240, 6, 6), 0.3001)}, "fractional pixels"),
    "text for pixels": ({"x_train": np.full((240, 6, 6), "a")}, "type <U1"),
    "pixels in a row": ({"x_train": np.zeros(240)}, r"shape \(240,\)"),
    "negative labels": ({"y_train": np.full(240, -1)}, "label -1, outside"),
    "test labels outside": ({"y_test": np.full(60, 3)}, "label 3, outside the 3 classes"),
    "labels with gaps": ({"y_train": np.full(240, 10**6)}, "training label 1000000"),
    "fractional labels": ({"y_train": np.full(240, 0.5)}, "no whole numbers"),
    "NaN labels": ({"y_train": np.full(240, np.nan)}, "no whole numbers"),
    "one-hot labels": ({"y_train": np.eye(3)[np.zeros(240, int)]}, r"shape \(240, 3\)"),
    "no images": ({"x_train": np.zeros((0, 6, 6)), "y_train": np.zeros(0, int)}, "is empty"),
    "no pixels": ({"x_train": np.zeros((240, 0, 6))}, "is empty"),
    "other counts": ({"x_train": np.zeros((239, 6, 6))}, "239 images and 240 labels"),
}


@pytest.mark.parametrize("damage", NPZ_DAMAGE)
def test_unusable_npz_arrays_are_refused(tmp_path: Path, small_dataset: Dataset, damage: str) -> None:
    changed, says = NPZ_DAMAGE[damage]
    source = write_npz(tmp_path / "d.npz", small_dataset, **changed)
    with pytest.raises(DataError, match=says):
        load(source)


def test_an_npz_without_an_array_says_which(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", x_train=np.zeros((2, 2)), images=np.zeros(2))
    with pytest.raises(DataError, match=r"lacks the array y_train \(it has x_train, images\)"):
        load(f"npz:{tmp_path / 'd.npz'}")


@pytest.mark.parametrize("keep", [0, 10, 300, -30])
def test_a_truncated_npz_is_refused(tmp_path: Path, small_dataset: Dataset, keep: int) -> None:
    source = write_npz(tmp_path / "d.npz", small_dataset)
    path = tmp_path / "d.npz"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(DataError, match="npz"):
        load(source)


def test_a_flipped_byte_in_an_npz_is_refused(tmp_path: Path, small_dataset: Dataset) -> None:
    source = write_npz(tmp_path / "d.npz", small_dataset)
    content = bytearray((tmp_path / "d.npz").read_bytes())
    content[4000] ^= 1
    (tmp_path / "d.npz").write_bytes(content)
    with pytest.raises(DataError, match="damaged"):
        load(source)


def test_declared_classes_bound_the_labels() -> None:
    images = np.zeros((4, 2, 2), np.uint8)
    with pytest.raises(DataError, match="label 5, outside the 5 classes"):
        make_dataset("x", images, np.array([0, 1, 2, 5]), images, np.zeros(4, int), classes=5)


def test_both_parts_are_scaled_alike(small_dataset: Dataset) -> None:
    """A test part of black and almost black is no part in [0, 1] where the training part is in [0, 255]."""
    d = small_dataset
    dark = np.minimum(d.test_images, 1).astype(np.float64)
    made = make_dataset("x", d.train_images.astype(np.float64), d.train_labels, dark, d.test_labels)
    np.testing.assert_array_equal(made.test_images, np.minimum(d.test_images, 1))
    unit = [(part.astype(np.float32) / np.float32(255)).astype(np.float64) for part in (d.train_images, d.test_images)]
    assert_same(make_dataset("x", unit[0], d.train_labels, unit[1], d.test_labels), d._replace(name="x"))


@pytest.mark.parametrize("name", ["x" * 300, "~nobody-of-that-name/x", "a\0b", "a\nb"])
@pytest.mark.parametrize("kind", ["idx", "npz"])
def test_impossible_names_are_refused(kind: str, name: str) -> None:
    with pytest.raises(DataError):
        load(f"{kind}:{name}")


@pytest.mark.parametrize("shape", [(4, 1, 28, 28), (4, 3, 32, 32), (4, 3, 5, 7)])
def test_channels_first_are_refused_with_the_remedy(shape: tuple[int, ...]) -> None:
    images, labels = np.zeros(shape, np.uint8), np.zeros(4, int)
    with pytest.raises(DataError, match=r"channels first.*numpy.moveaxis\(images, 1, -1\)"):
        make_dataset("x", images, labels, images, labels)
    moved = np.moveaxis(images, 1, -1)
    assert make_dataset("x", moved, labels, moved, labels).image_shape == (*shape[2:], shape[1])
    for kept in (images[..., :4], images[:, :, 0]):
        assert make_dataset("x", kept, labels, kept, labels).train_images.size == kept.size


def test_idx_files_of_many_dimensions_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "images"
    path.write_bytes(b"\0\0\x08\xc8" + b"\0\0\0\1" * 200 + b"\0")
    with pytest.raises(DataError, match="magic number"):
        idx.read(path)


@pytest.mark.parametrize("position", range(0, 400, 7))
def test_npz_files_with_a_wrong_byte_are_read_or_refused(tmp_path: Path, small_dataset: Dataset, position: int) -> None:
    source = write_npz(tmp_path / "d.npz", small_dataset)
    content = bytearray((tmp_path / "d.npz").read_bytes())
    for place in (position, len(content) - 1 - position):
        changed = bytearray(content)
        changed[place] ^= 0x41
        (tmp_path / "d.npz").write_bytes(changed)
        with contextlib.suppress(DataError):
            assert_same(load(source), small_dataset)


@pytest.mark.parametrize(
    "name",
    [
        "{}-idx{}-ubyte", "{}.idx{}-ubyte", "{}-idx{}-ubyte.gz", "{}.idx{}-ubyte.gz", "{}.idx{}", "{}-idx{}.ubyte",
        "{0}-idx{1}-ubyte/{0}-idx{1}-ubyte", "{0}.idx{1}-ubyte/{0}.idx{1}-ubyte",
    ],
)  # fmt: skip
@pytest.mark.parametrize("test", ["t10k", "test"])
def test_idx_files_have_their_names_in_many_archives(
    name: str, test: str, tmp_path: Path, small_dataset: Dataset
) -> None:
    d = small_dataset
    parts = {"train-images": d.train_images[..., 0], "train-labels": d.train_labels}
    parts |= {f"{test}-images": d.test_images[..., 0], f"{test}-labels": d.test_labels}
    for part, array in parts.items():
        path = tmp_path / name.format(part, array.ndim)
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(raw_idx(array))
    assert_same(load(f"idx:{tmp_path}"), d)


def test_a_folder_beside_an_idx_file_is_no_candidate(tmp_path: Path, small_dataset: Dataset) -> None:
    """A much used archive has both: the files, and folders of another spelling that hold them once more."""
    d = small_dataset
    parts = {"train-images": d.train_images[..., 0], "train-labels": d.train_labels}
    parts |= {"t10k-images": d.test_images[..., 0], "t10k-labels": d.test_labels}
    for part, array in parts.items():
        (tmp_path / f"{part}.idx{array.ndim}-ubyte").write_bytes(raw_idx(array))
        (tmp_path / f"{part}-idx{array.ndim}-ubyte").mkdir()
    assert_same(load(f"idx:{tmp_path}"), d)
    (tmp_path / "train-labels.idx1-ubyte").unlink()
    with pytest.raises(DataError, match=r"train-labels-idx1-ubyte.*name an existing file"):
        load(f"idx:{tmp_path}")


@pytest.mark.parametrize("kind", [bool, np.float32, np.float64, np.uint8, np.int64, np.uint16])
def test_black_and_white_is_the_same_in_every_type(kind: type) -> None:
    images = np.random.default_rng(0).integers(0, 2, (20, 8, 8))
    made = make_dataset("x", images.astype(kind), np.arange(20) % 4, images.astype(kind), np.arange(20) % 4)
    np.testing.assert_array_equal(made.train_images[..., 0], 255 * images)


@pytest.mark.parametrize("kind", [np.float64, np.uint8, np.int64])
@pytest.mark.parametrize("brightest", [2, 16, 31])
def test_digits_of_a_few_bits_are_refused_with_the_remedy(kind: type, brightest: int) -> None:
    images, labels = np.tile(np.arange(brightest + 1), (4, 1)).astype(kind), np.arange(4)
    with pytest.raises(DataError, match=rf"at most {brightest}(\.0)?, which is all but black.*numpy\.round") as error:
        make_dataset("x", images, labels, images, labels)
    remedy = re.search(r"numpy\.round.*uint8\)", str(error.value))[0]
    made = make_dataset("x", *2 * (eval(remedy, {"numpy": np, "images": images}), labels))
    assert made.train_images.max() == 255
    brighter = np.tile(np.arange(33), (4, 1)).astype(kind)
    assert make_dataset("x", brighter, labels, brighter, labels).train_images.max() == 32


def test_lists_tensors_and_files_are_read_as_arrays(tmp_path: Path, small_dataset: Dataset) -> None:
    d = small_dataset

    class Array:
        def __init__(self, values):
            self.values = values

        def __array__(self, dtype=None, copy=None):
            return np.array(self.values, dtype)

    class OnlyDLPack:
        def __init__(self, values):
            self.values = np.ascontiguousarray(values)

        def __dlpack__(self, **named):
            return self.values.__dlpack__(**named)

        def __dlpack_device__(self):
            return self.values.__dlpack_device__()

    ways = [lambda values: values.tolist(), Array, lambda values: OnlyDLPack(np.array(values))]
    with contextlib.suppress(ImportError):
        import torch

        ways.append(lambda values: torch.tensor(values))
    with contextlib.suppress(ImportError):
        import h5py

        file = h5py.File(tmp_path / "d.h5", "w")
        ways.append(lambda values: file.create_dataset(str(len(file)), data=values))
    for way in ways:
        parts = map(way, (d.train_images, d.train_labels, d.test_images, d.test_labels))
        assert_same(make_dataset(d.name, *parts), d)
    with pytest.raises(DataError, match="the labels of the train part cannot be read as an array"):
        make_dataset("x", d.train_images, [[1], [1, 2]], d.test_images, d.test_labels)
