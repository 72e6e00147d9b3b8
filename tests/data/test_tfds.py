"""`tfds:NAME`: TFDS's own download, checksum, prepare and read, with a loopback server in the place of the network."""

import functools
import http.server
import importlib.util
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from kd_jax.data.load import load
from kd_jax.data.sources import mnist, tfds
from kd_jax.errors import DataError

PUBLISHED = Path(__file__).parents[3] / "shared" / "data" / "mnist"
FEW = 4000
LABELS = "t10k-labels-idx1-ubyte.gz"

needs_tensorflow = pytest.mark.skipif(
    importlib.util.find_spec("tensorflow") is None, reason="TensorFlow, which prepares data sets, is not installed"
)
needs_files = pytest.mark.skipif(not PUBLISHED.is_dir(), reason="the four published files of MNIST are not here")

WITHOUT = """
import sys
from importlib.machinery import PathFinder

source, absent = sys.argv[1:]

class Without(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] == absent else super().find_spec(name, path, target)

sys.meta_path[:] = [Without if finder is PathFinder else finder for finder in sys.meta_path]

from kd_jax import DataError, load

assert "tensorflow_datasets" not in sys.modules
try:
    print(load(source).digest(), end="")
except DataError as error:
    print(error, end="")
assert not any(name.partition(".")[0] == absent for name in sys.modules)
"""


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


def redirect(patch, port):
    """Every request goes to the loopback interface, and TFDS's addresses and checksums stay as they are."""
    import requests

    send = requests.adapters.HTTPAdapter.send

    def to_loopback(adapter, request, **options):
        request.url = f"http://127.0.0.1:{port}/{request.url.rpartition('/')[2]}"
        return send(adapter, request, **options)

    patch.setattr(requests.adapters.HTTPAdapter, "send", to_loopback)


def serve(folder):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


def places(patch, data_dir, cache):
    patch.setenv("TFDS_DATA_DIR", str(data_dir))
    patch.setenv("KD_JAX_CACHE", str(cache))


def refusal(source):
    """The message of the `DataError`, which is one line and comes without a history."""
    with pytest.raises(DataError) as caught:
        load(source)
    error = caught.value
    assert error.__cause__ is None
    assert error.__suppress_context__ or error.__context__ is None
    assert "\n" not in str(error)
    return str(error)


def without(absent, source):
    """What loading prints where a package is not installed, and that it prints nothing else."""
    run = subprocess.run([sys.executable, "-c", WITHOUT, source, absent], capture_output=True, text=True, check=True)
    assert run.stderr == ""
    return run.stdout


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """The first images of MNIST's two parts as `tfds:mnist` gives them, and the folders of TFDS and of the cache."""
    from tensorflow_datasets import public_api

    data_dir, cache = tmp_path_factory.mktemp("tfds"), tmp_path_factory.mktemp("cache")
    server = serve(PUBLISHED)
    with pytest.MonkeyPatch.context() as patch:
        places(patch, data_dir, cache)
        redirect(patch, server.server_port)
        few = functools.partial(public_api.download.DownloadConfig, max_examples_per_split=FEW)
        patch.setattr(public_api.download, "DownloadConfig", few)
        dataset = load("tfds:mnist")
    server.shutdown()
    server.server_close()
    return dataset, data_dir, cache


@pytest.fixture
def folders(monkeypatch, tmp_path):
    places(monkeypatch, tmp_path / "tfds", tmp_path / "cache")
    return tmp_path


def order(split, examples):
    """The order in which TFDS writes examples that are numbered: that of the hashes of their numbers."""
    from tensorflow_datasets.core.hashing import Hasher

    hasher = Hasher(split)
    return sorted(range(examples), key=hasher.hash_key)


@needs_tensorflow
@needs_files
class TestMnist:
    def test_equals_the_packaged_mnist_bit_for_bit_in_the_order_of_tfds(self, prepared):
        got, packaged = prepared[0], mnist.load()
        train, test = order("train", FEW), order("test", FEW)
        expected = packaged._replace(
            name="tfds:mnist",
            train_images=packaged.train_images[train],
            train_labels=packaged.train_labels[train],
            test_images=packaged.test_images[test],
            test_labels=packaged.test_labels[test],
        )
        assert (got.name, got.classes) == ("tfds:mnist", 10)
        for array, other in zip(got[1:5], expected[1:5], strict=True):
            assert array.dtype == other.dtype
            np.testing.assert_array_equal(array, other)
        assert got.digest() == expected.digest()

    def test_is_decoded_once(self, prepared, monkeypatch):
        dataset, data_dir, cache = prepared
        places(monkeypatch, data_dir, cache)
        monkeypatch.setattr(tfds, "_decode", None)
        assert load("tfds:mnist").digest() == dataset.digest()
        assert load("tfds:mnist:3.0.1").digest() == dataset.digest()

    @pytest.mark.slow
    def test_is_read_without_tensorflow(self, prepared, monkeypatch, tmp_path):
        dataset, data_dir, _ = prepared
        places(monkeypatch, data_dir, tmp_path)
        assert without("tensorflow", "tfds:mnist") == dataset.digest()

    def test_a_corrupted_download_does_not_pass_the_checksum(self, folders, monkeypatch):
        shutil.copytree(PUBLISHED, folders / "www", copy_function=shutil.copyfile)
        (folders / "www").chmod(0o755)
        content = bytearray((folders / "www" / LABELS).read_bytes())
        content[-1] ^= 1
        (folders / "www" / LABELS).write_bytes(content)
        server = serve(folders / "www")
        redirect(monkeypatch, server.server_port)
        message = refusal("tfds:mnist")
        server.shutdown()
        server.server_close()
        assert "checksum" in message
        assert LABELS in message
        assert not list((folders / "tfds").glob("mnist/3*"))


@needs_tensorflow
def test_no_network_is_one_sentence_and_soon(folders, monkeypatch):
    from tensorflow_datasets.core.download import downloader

    server = http.server.HTTPServer(("127.0.0.1", 0), Quiet)
    redirect(monkeypatch, server.server_port)
    server.server_close()
    retries, start = downloader.MAX_RETRIES, time.monotonic()
    message = refusal("tfds:mnist")
    assert "tfds:mnist cannot be prepared (ConnectionError" in message
    assert "check the network" in message
    assert time.monotonic() - start < 60
    assert retries == downloader.MAX_RETRIES


@pytest.mark.slow
def test_no_tensorflow_is_one_sentence_and_nothing_is_downloaded(folders):
    message = without("tensorflow", "tfds:mnist")
    assert message.startswith("tfds:mnist needs tensorflow, which cannot be imported")
    assert message.endswith("pip install 'kd-jax[tfds]'")
    assert not (folders / "tfds").exists()


@pytest.mark.slow
@pytest.mark.parametrize("absent", ["tensorflow_datasets", "immutabledict"])
def test_no_tensorflow_datasets_is_one_sentence(absent):
    message = without(absent, "tfds:mnist")
    assert message.startswith("tfds:mnist needs tensorflow_datasets, which cannot be imported")
    assert f"'{absent}'" in message
    assert message.endswith("pip install 'kd-jax[tfds]'")


@pytest.mark.slow
@needs_tensorflow
def test_what_tfds_forgets_to_declare_is_one_sentence(folders):
    message = without("importlib_resources", "tfds:mnist")
    assert message.startswith("tfds:mnist cannot be prepared (ModuleNotFoundError")
    assert "'importlib_resources'" in message
    assert message.endswith("pip install 'kd-jax[tfds]'")


@pytest.mark.parametrize(
    ("source", "parts"),
    [
        ("tfds:minst", ("TFDS has no data set 'minst'", "did you mean mnist")),
        ("tfds:no_such_thing_at_all", ("'no_such_thing_at_all'", "catalog")),
        ("tfds:mnist:9.9.9", ("9.9.9", "only: 3.0.1", "catalog")),
        ("tfds:emnist/nosuch", ("nosuch not found", "catalog")),
        ("tfds:../x", ("../x", "catalog")),
        ("tfds:imdb_reviews", ("tfds:imdb_reviews is no image classification data set", "text, label")),
        ("tfds:div2k", ("tfds:div2k is no image classification data set", "lr, hr")),
    ],
)
def test_names_that_cannot_be_used(source, parts, folders):
    message = refusal(source)
    assert all(part in message for part in parts)


IMAGES = [np.full((4, 5, 1), value, np.uint8) for value in (0, 7, 255)]
VARYING = [np.zeros((4, 5, 1), np.uint8), np.zeros((4, 6, 1), np.uint8)]


@functools.cache
def register(name, *, images="same", splits=("train", "test"), keys=("image", "label"), dtype=np.uint8, manual=None):
    """A real, small data set, which TFDS prepares from memory. Returns its name in TFDS."""
    from tensorflow_datasets import public_api

    def info(self):
        image = public_api.features.Image(shape=(4, None, 1), dtype=dtype, encoding_format="png")
        features = {keys[0]: image, keys[1]: public_api.features.ClassLabel(num_classes=4)}
        return public_api.core.DatasetInfo(
            builder=self, features=public_api.features.FeaturesDict(features), supervised_keys=keys
        )

    def generate(self):
        for index, pixels in enumerate({"same": IMAGES, "varying": VARYING}[images]):
            yield index, {keys[0]: pixels, keys[1]: index}

    def generators(self, downloads):
        if manual:
            assert downloads.manual_dir
        return {split: generate(self) for split in splits}

    parts = {
        "__module__": __name__,
        "VERSION": public_api.core.Version("1.0.0"),
        "MANUAL_DOWNLOAD_INSTRUCTIONS": manual,
        "_info": info,
        "_split_generators": generators,
        "_generate_examples": generate,
    }
    return type(name, (public_api.core.GeneratorBasedBuilder,), parts).name


@needs_tensorflow
class TestSmall:
    def test_other_keys_than_image_and_label(self, folders):
        dataset = load("tfds:" + register("KdJaxKeys", keys=("picture", "kind")))
        assert (dataset.name, dataset.image_shape, dataset.classes) == ("tfds:kd_jax_keys", (4, 5, 1), 4)
        assert sorted(dataset.train_labels) == [0, 1, 2]
        np.testing.assert_array_equal(dataset.train_images, np.stack(IMAGES)[dataset.train_labels])

    def test_a_damaged_or_forbidden_cache_is_no_error(self, folders, monkeypatch):
        source = "tfds:" + register("KdJaxSame")
        first = load(source)
        (kept,) = (folders / "cache" / "tfds").iterdir()
        content = bytearray(kept.read_bytes())
        for damage in (b"", b"no npz file", content[:-40], content.replace(b"\7" * 20, b"\6" * 20)):
            assert damage != content
            kept.write_bytes(damage)
            assert load(source).digest() == first.digest()
            assert kept.read_bytes()[-40:] == content[-40:]
        (folders / "file").touch()
        monkeypatch.setenv("KD_JAX_CACHE", str(folders / "file"))
        assert load(source).digest() == first.digest()

    def test_data_prepared_anew_or_elsewhere_are_decoded_anew(self, folders, monkeypatch):
        source = "tfds:" + register("KdJaxSame")
        load(source)
        (info,) = (folders / "tfds").glob("kd_jax_same/*/dataset_info.json")
        (shard,) = (folders / "tfds").glob("kd_jax_same/*/*-train.array_record*")
        kept = folders / "cache" / "tfds"
        written = info.stat().st_mtime
        info.write_text(info.read_text().replace("  ", " \t", 1))
        os.utime(info, (written, written))
        load(source)
        assert len(list(kept.glob("kd_jax_same-1.0.0-*.npz"))) == 2
        os.utime(shard, (0, 0))
        load(source)
        assert len(list(kept.glob("kd_jax_same-1.0.0-*.npz"))) == 3
        (folders / "tfds").rename(folders / "moved")
        monkeypatch.setenv("TFDS_DATA_DIR", str(folders / "moved"))
        load(source)
        assert len(list(kept.glob("kd_jax_same-1.0.0-*.npz"))) == 4

    def test_damaged_data(self, folders):
        source = "tfds:" + register("KdJaxSame")
        load(source)
        shutil.rmtree(folders / "cache")
        (shard,) = (folders / "tfds").glob("kd_jax_same/*/*-train.array_record*")
        shard.write_bytes(b"no array_record")
        message = refusal(source)
        assert "tfds:kd_jax_same is damaged" in message
        assert "delete that folder" in message

    def test_data_prepared_as_tfrecord(self, folders):
        from tensorflow_datasets import public_api

        name = register("KdJaxSame")
        with tfds._quiet():
            public_api.builder(name, data_dir=folders / "tfds").download_and_prepare()
        message = refusal("tfds:" + name)
        assert "as tfrecord, and only array_record can be read" in message
        assert "TFDS_DATA_DIR" in message

    @pytest.mark.parametrize(
        ("name", "options", "parts"),
        [
            ("KdJaxVarying", {"images": "varying"}, ("images of shape", "(4, 5, 1)", "(4, 6, 1)", "one shape")),
            ("KdJaxWide", {"dtype": np.uint16}, ("pixels of type uint16", "must be uint8")),
            ("KdJaxSplits", {"splits": ("train", "validation")}, ("the splits train, validation", "train and test")),
            ("KdJaxManual", {"manual": "Ask for it."}, ("downloaded by hand into", "manual", "catalog/kd_jax_manual")),
        ],
    )
    def test_what_cannot_be_used(self, name, options, parts, folders):
        message = refusal("tfds:" + register(name, **options))
        assert all(part in message for part in parts)


@pytest.mark.slow
def test_importing_kd_jax_imports_no_tensorflow_datasets():
    code = "import sys, kd_jax.data.sources.tfds; assert 'tensorflow_datasets' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.slow
@needs_tensorflow
@needs_files
def test_streamed_images_are_the_same_and_never_all_in_memory(prepared, monkeypatch):
    dataset, data_dir, cache = prepared
    places(monkeypatch, data_dir, cache)
    empty = np.empty

    def small(shape, *more, **named):
        assert np.prod(shape) < FEW * 28 * 28
        return empty(shape, *more, **named)

    monkeypatch.setattr(np, "empty", small)
    found = load("tfds:mnist", stream=True)
    assert found.digest() == dataset.digest()
    assert isinstance(found.train_images, np.memmap)
    monkeypatch.setattr(tfds, "_decode", None)
    assert load("tfds:mnist", stream=True).digest() == dataset.digest()
