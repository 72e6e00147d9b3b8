"""Whatever the bytes: what is read is valid, or one sentence says why not; no pickle runs and nothing is waited for.

`tools/fuzz_readers.py` looks further, guided by coverage; `results/fuzz` has what came of it.
"""

import gzip
import io
import math
import os
import pickle
import signal
import struct
import tracemalloc
import zipfile
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from readers import READERS, idx_bytes, npy_bytes, refused, tensors_bytes, torch_bytes, torch_pickle, zip_bytes

from kd_jax import DataError, load, load_logits, make_dataset
from kd_jax.data.sources import idx
from kd_jax.models import parameters, torch_weights

MIB = 1 << 20
# More than any of these files of some hundred bytes justifies, and what importing and raising takes.
ALLOCATED = 8 * MIB
EVERY = pytest.mark.parametrize("name", READERS)


def fuzzing(max_examples: int) -> Any:
    """The same examples in every run; ten seconds for one example are a hang."""
    return settings(
        max_examples=max_examples,
        deadline=timedelta(seconds=10),
        derandomize=True,
        database=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )


@pytest.fixture
def within_20_seconds() -> Iterator[None]:
    """Fails a test that hangs."""

    def hangs(*_: Any) -> None:
        pytest.fail("it hangs")

    before = signal.signal(signal.SIGALRM, hangs)
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def peak(read: Any) -> int:
    """Bytes allocated at most while `read` runs."""
    tracemalloc.start()
    try:
        read()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


NUMBERS = st.sampled_from(
    [0, 1, 2, 3, 4, 6, 12, 127, 128, 255, 2**15, 2**16 - 1, 2**31 - 1, 2**32 - 1, 2**40, 2**63 - 1]
)


@st.composite
def mutated(draw: st.DrawFn, examples: tuple[bytes, ...]) -> bytes:
    """Bytes that a reader accepts, damaged in one to four places."""
    content = bytearray(draw(st.sampled_from(examples)))
    for _ in range(draw(st.integers(1, 4))):
        # Headers come first, and a zip file's directory last.
        places = st.integers(0, len(content)) | st.integers(0, min(len(content), 150))
        place = draw(places | st.integers(max(0, len(content) - 150), len(content)))
        kind = draw(st.sampled_from(["flip", "number", "cut", "insert", "delete", "repeat"]))
        if kind == "flip" and place < len(content):
            content[place] ^= 1 << draw(st.integers(0, 7))
        elif kind == "number":
            packed = struct.pack(draw(st.sampled_from(["<Q", ">Q"])), draw(NUMBERS))
            width = draw(st.sampled_from([1, 2, 4, 8]))
            content[place : place + width] = packed[:width] if draw(st.booleans()) else packed[-width:]
        elif kind == "cut":
            del content[place:]
        elif kind == "insert":
            content[place:place] = draw(st.binary(min_size=1, max_size=20))
        elif kind == "delete":
            del content[place : place + draw(st.integers(1, 40))]
        else:
            content[place:place] = content[place : place + draw(st.integers(1, 80))]
    return bytes(content)


@EVERY
def test_whole_files_are_read(name: str, tmp_path: Path) -> None:
    assert [refused(READERS[name], example, tmp_path) for example in READERS[name].examples] == [
        None for _ in READERS[name].examples
    ]


@EVERY
@fuzzing(80)
@given(data=st.data())
def test_damaged_files(name: str, data: st.DataObject, tmp_path: Path) -> None:
    refused(READERS[name], data.draw(mutated(READERS[name].examples)), tmp_path)


@EVERY
@fuzzing(25)
@given(content=st.binary(max_size=300))
def test_arbitrary_bytes(name: str, content: bytes, tmp_path: Path) -> None:
    refused(READERS[name], content, tmp_path)


@EVERY
@fuzzing(25)
@given(data=st.data())
def test_damaged_files_cost_little(name: str, data: st.DataObject, tmp_path: Path) -> None:
    content = data.draw(mutated(READERS[name].examples))
    assert peak(lambda: refused(READERS[name], content, tmp_path)) < ALLOCATED


SIZES = st.integers(0, 7) | NUMBERS
SHAPES = st.lists(SIZES, max_size=5)
BODIES = st.integers(0, 200).map(bytes) | st.just(bytes(72)) | st.just(bytes(288))


@st.composite
def idx_headers(draw: st.DrawFn) -> bytes:
    shape = draw(st.lists(SIZES.map(lambda n: n % 2**32), min_size=1, max_size=5))
    if draw(st.booleans()):
        return bytes([0, 0, 8, len(shape)]) + struct.pack(f">{len(shape)}I", *shape) + bytes(min(math.prod(shape), 300))
    return draw(st.binary(min_size=4, max_size=4)) + struct.pack(f">{len(shape)}I", *shape) + draw(BODIES)


def mostly(usual: st.SearchStrategy, otherwise: st.SearchStrategy) -> st.SearchStrategy:
    """Two faults in one header hide each other."""
    return st.integers(0, 7).flatmap(lambda number: usual if number else otherwise)


@st.composite
def npy_headers(draw: st.DrawFn) -> bytes:
    numbers = st.sampled_from(["<f4", ">f8", "|u1", "<i8", "f16", "?"])
    others = st.sampled_from(["|O", "<U3", "V0", "|S0", "<M8[s]", "c16", "(1000000,)f8", "O,f4"]) | st.text(max_size=5)
    fields = st.just([("a", "<f4"), ("b", "|O")])
    header = {
        "descr": draw(mostly(numbers, others | fields | st.integers())),
        "fortran_order": draw(mostly(st.booleans(), st.integers())),
        "shape": draw(mostly(SHAPES.map(tuple), st.sampled_from([(6, 3), (6, 3, 4), (-1, 3), 18]))),
    }
    deep = st.sampled_from(["[" * 5000, "-" * 5000 + "1", "9" * 5000])
    text = draw(mostly(st.just(repr(header)), st.text(max_size=60) | deep)).encode("latin1", "replace")
    version = draw(mostly(st.just((1, 0)), st.sampled_from([(2, 0), (3, 0), (9, 9)])))
    length = draw(mostly(st.just(len(text)), st.integers(0, 2**16 - 1)))
    return (
        b"\x93NUMPY" + bytes(version) + struct.pack("<H" if version == (1, 0) else "<I", length) + text + draw(BODIES)
    )


@st.composite
def tensors_headers(draw: st.DrawFn) -> bytes:
    names = st.sampled_from(["logits", "fc1.weight", "fc1.bias", "fc2.weight", "a.b", "0", "\n"]) | st.text(
        max_size=300
    )
    kinds = st.sampled_from(["F32", "F64", "F16", "BF16", "F8_E4M3", "I32", "BOOL", "C64", "F4", "nothing"])
    one = st.fixed_dictionaries({"dtype": kinds, "shape": SHAPES, "data_offsets": st.lists(SIZES, max_size=3)})
    tensors, start = {}, 0
    for name in draw(st.lists(names, max_size=4)):
        shape = draw(st.lists(st.integers(0, 4), max_size=3))
        end = start + 4 * math.prod(shape)
        tensors[name] = {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}
        start = end
    header = draw(st.just(tensors) | st.dictionaries(names, one | st.text(max_size=9) | st.none(), max_size=3))
    text = draw(st.just(header) | st.just(b"[" * 5000) | st.just(b'{"a":' * 5000) | st.binary(max_size=40))
    return tensors_bytes(text, bytes(start) if text is tensors else draw(BODIES))


@st.composite
def pickles(draw: st.DrawFn) -> bytes:
    """Opcodes in any order, with arguments of the kinds that they take."""
    names = [b"collections\nOrderedDict\n", b"torch._utils\n_rebuild_tensor_v2\n", b"torch\nFloatStorage\n"]
    names += [b"torch._utils\n_rebuild_parameter\n", b"builtins\nbytearray\n", b"os\nsystem\n", b"builtins\neval\n"]
    plain = st.sampled_from([bytes([code]) for code in b"N\x88\x89)]}(tlsue0a\x85\x86\x87RbQ2\x81o"])
    number = st.integers(0, 255).map(lambda n: bytes([n]))
    argued = st.one_of(
        st.sampled_from(names).map(lambda name: b"c" + name),
        st.tuples(st.sampled_from([b"K", b"q", b"h", b"\x82"]), number).map(b"".join),
        SIZES.map(lambda n: b"\x8a\x09" + n.to_bytes(9, "little")),
        SIZES.map(lambda n: b"r" + (n % 2**32).to_bytes(4, "little")),
        st.sampled_from([b"storage", b"0", b"fc1.weight"]).map(lambda s: b"X" + struct.pack("<I", len(s)) + s),
        st.sampled_from([b"X", b"T", b"B"]).map(lambda code: code + b"\xff\xff\xff\x7f"),
        st.just(b"\x8e" + b"\xff" * 7 + b"\x7f"),
    )
    return b"\x80\x02" + b"".join(draw(st.lists(plain | argued, max_size=25))) + b"."


HEADERS = {
    "idx": idx_headers(),
    "idx-inflated": idx_headers(),
    "npz-member": npy_headers(),
    "logits-npy": npy_headers(),
    "logits-safetensors": tensors_headers(),
    "weights-safetensors": tensors_headers(),
    "parameters": tensors_headers(),
    "weights-pickle": pickles(),
}


@pytest.mark.parametrize("name", HEADERS)
@fuzzing(100)
@given(data=st.data())
def test_headers_that_may_lie(name: str, data: st.DataObject, tmp_path: Path) -> None:
    content = data.draw(HEADERS[name])
    assert peak(lambda: refused(READERS[name], content, tmp_path)) < ALLOCATED


@fuzzing(100)
@given(data=st.data())
def test_any_arrays_make_a_dataset_or_one_sentence(data: st.DataObject) -> None:
    kinds = st.one_of(
        arrays.boolean_dtypes(), arrays.integer_dtypes(), arrays.unsigned_integer_dtypes(), arrays.floating_dtypes(),
        arrays.complex_number_dtypes(), arrays.unicode_string_dtypes(), arrays.datetime64_dtypes(),
    )  # fmt: skip
    shapes = arrays.array_shapes(min_dims=0, max_dims=5, min_side=0, max_side=6)
    images = arrays.arrays(np.uint8, st.tuples(st.just(4), st.integers(1, 3)))
    labels = arrays.arrays(np.int64, 4, elements=st.integers(0, 3))
    whatever = arrays.arrays(kinds, shapes)
    given_arrays = [data.draw(usual | whatever) for usual in (images, labels, images, labels)]
    try:
        made = make_dataset("x", *given_arrays)
    except DataError as error:
        sentence = str(error)
        assert sentence.isprintable()
        return
    assert made.train_images.dtype == made.test_images.dtype == np.uint8
    assert made.train_labels.max() < made.classes


VALUES = st.recursive(
    st.none() | st.floats() | st.integers() | st.text(max_size=3) | st.binary(max_size=3) | st.just(object()),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=2), inner, max_size=2),
    max_leaves=6,
) | arrays.arrays(
    st.one_of(arrays.floating_dtypes(), arrays.integer_dtypes(), arrays.complex_number_dtypes(), st.just(object)),
    arrays.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=3),
)


@fuzzing(200)
@given(
    mapping=st.dictionaries(
        st.sampled_from(["fc1.weight", "fc1.bias", "fc2.weight"]) | st.text(max_size=250),
        VALUES | arrays.arrays(np.float32, (2, 2), elements=st.floats(-1, 1, width=32)),
        max_size=4,
    ),
    names=st.none() | st.lists(st.sampled_from(["fc1", "fc2", ""]), max_size=3),
)
def test_any_mapping_is_a_state_dict_or_one_sentence(mapping: dict[Any, Any], names: list[str] | None) -> None:
    try:
        params = torch_weights.from_state_dict(mapping, names)
    except DataError as error:
        sentence = str(error)
        assert sentence.isprintable()
        return
    assert all(np.isfinite(leaf).all() for leaf in params["output"].values())


BOMB = 64 * MIB


@pytest.mark.parametrize("sizes", [(9, 2), (BOMB // 2, 2), (10**6, 10**6)])
def test_a_gzip_bomb_is_inflated_no_further_than_its_header_justifies(sizes: tuple[int, int], tmp_path: Path) -> None:
    """Zeros that go on behind what the header claims; what it claims at the end is more than the file can hold."""
    path = _written(tmp_path / "images", gzip.compress(b"\0\0\x08\x02" + struct.pack(">II", *sizes) + bytes(BOMB + 1)))

    def read() -> None:
        with pytest.raises(DataError, match=r"goes on after|at most"):
            idx.read(path)

    assert peak(read) < math.prod(sizes) % 10**12 + 4 * MIB


@pytest.mark.parametrize("shape", ["(6, 3)", f"({BOMB // 4 - 32},)", "(1000000, 1000000)"])
def test_a_zip_bomb_is_inflated_no_further_than_is_asked_for(shape: str, tmp_path: Path) -> None:
    text = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    path = tmp_path / "logits.npz"
    bomb = b"\x93NUMPY\1\0\x76\0" + text.encode() + bytes(BOMB - 128)
    path.write_bytes(zip_bytes({"logits.npy": bomb}, zipfile.ZIP_DEFLATED))

    def read() -> None:
        with pytest.raises(DataError, match=r"its header announces|has the shape"):
            load_logits(path, examples=6, classes=3)

    assert peak(read) < 4 * MIB


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_member_cannot_claim_more_than_its_bytes_can_hold(method: int, tmp_path: Path) -> None:
    """Three gigabytes, by the header of the array and by the zip file's directory alike."""
    count = 3 * 10**9
    text = f"{{'descr': '|u1', 'fortran_order': False, 'shape': ({count}, 1), }}".ljust(117) + "\n"
    members = {"y_train.npy": b"", "x_test.npy": b"", "y_test.npy": b""}
    members["x_train.npy"] = b"\x93NUMPY\1\0\x76\0" + text.encode()
    content = bytearray(zip_bytes(members, method))
    entry = content.rindex(b"PK\1\2")
    content[entry + 24 : entry + 28] = struct.pack("<I", count + 128)
    path = _written(tmp_path / "d.npz", content)

    def read() -> None:
        with pytest.raises(DataError, match="claims 3000000128 bytes, more than the"):
            load(f"npz:{path}")

    assert peak(read) < MIB


def test_members_of_a_zip_that_overlap_are_refused(tmp_path: Path) -> None:
    """Every member would be the same bytes; each alone is justified, all together are not."""
    content = READERS["weights-pt"].examples[0]
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        largest = max(archive.infolist(), key=lambda info: info.file_size)
        stream = io.BytesIO(content)
        with zipfile.ZipFile(stream, "a") as overlapping:
            overlapping.filelist.extend([largest] * 50)
            overlapping._didModify = True  # type: ignore[attr-defined]
    with pytest.raises(DataError, match="its members claim"):
        torch_weights.from_state_dict(_written(tmp_path / "w.pt", stream.getvalue()))


def _written(path: Path, content: bytes | bytearray) -> Path:
    path.write_bytes(content)
    return path


class Trap:
    """An object whose unpickling leaves a mark."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (self.mark,)


def test_no_pickle_is_ever_run(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    dumped = [pickle.dumps({"fc1.weight": Trap(mark)}, protocol) for protocol in range(6)]
    touch = f"S'{mark}'\n".encode()
    by_hand = [
        b"(" + touch + b"ios\nmkdir\n.",  # INST
        b"(cos\nmkdir\n" + touch + b"o.",  # OBJ
        b"cos\nmkdir\n(" + touch + b"tR.",  # REDUCE
        b"X\x02\0\0\0osX\x05\0\0\0mkdir\x93(" + touch + b"tR.",  # STACK_GLOBAL
    ]
    for protocol, trap in enumerate(dumped):
        pickle.loads(trap)
        assert mark.exists(), protocol
        mark.unlink()
    for trap in by_hand:
        pickle.loads(trap)
        mark.rmdir()
    objects = npy_bytes_of_objects(Trap(mark))
    for number, trap in enumerate([*dumped, *by_hand]):
        for content in (torch_bytes(trap), trap):
            with pytest.raises(DataError):
                torch_weights.from_state_dict(_written(tmp_path / f"{number}.pt", content))
        for content in (trap, objects):
            with pytest.raises(DataError):
                load_logits(_written(tmp_path / "l.npy", content), examples=1, classes=1)
            with pytest.raises(DataError):
                load_logits(_written(tmp_path / "l.npz", zip_bytes({"logits.npy": content})), examples=1, classes=1)
            with pytest.raises(DataError):
                load(f"npz:{_written(tmp_path / 'l.npz', READERS['npz-member'].wrap(content))}")
            with pytest.raises(DataError):
                load_logits(_written(tmp_path / "l.safetensors", content), examples=1, classes=1)
    assert not mark.exists()


def npy_bytes_of_objects(thing: object) -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array(stream, np.array([[thing]], object), allow_pickle=True)
    return stream.getvalue()


def test_a_pickle_that_asks_for_memory_gets_none(tmp_path: Path) -> None:
    """`torch.load(weights_only=True)` allocates these three gigabytes."""
    bomb = b"\x80\x02cbuiltins\nbytearray\n(\x8a\x05" + (3 * 10**9).to_bytes(5, "little") + b"tR."
    path = _written(tmp_path / "w.pt", torch_bytes(bomb))

    def read() -> None:
        with pytest.raises(DataError, match=r"holds more than tensors \(builtins\.bytearray\)"):
            torch_weights.from_state_dict(path)

    assert peak(read) < MIB


@pytest.mark.parametrize("name", ["npz", "logits-npz", "weights-pt"])
def test_a_zip_file_on_several_disks_is_refused(name: str, tmp_path: Path) -> None:
    """Found by `tools/fuzz_readers.py`: even `zipfile.is_zipfile` raises for some bytes."""
    content = READERS[name].examples[0]
    end = content.rindex(b"PK\5\6")
    on_two_disks = struct.pack("<4sLQL", b"PK\6\7", 0, end, 2)
    sentence = refused(READERS[name], content[:end] + on_two_disks + content[end:], tmp_path)
    assert sentence is not None
    assert "multiple disks" in sentence


def test_a_pickle_of_many_small_things_is_refused(tmp_path: Path) -> None:
    path = _written(tmp_path / "w.pt", torch_bytes(b"\x80\x02" + b"}" * (5 * MIB) + b"."))

    def read() -> None:
        with pytest.raises(DataError, match="only up to 4194304 are read"):
            torch_weights.from_state_dict(path)

    assert peak(read) < 16 * MIB


@pytest.mark.parametrize(
    "numbers",
    [(1, (6, 3), (3, 1)), (0, (6, 3), (4, 1)), (0, (18, 1), (2, 1)), (0, (6, 3), (2**62, 1)), (-1, (2, 2), (2, 1))],
)
def test_a_tensor_outside_of_its_numbers_is_refused(numbers: tuple[Any, ...], tmp_path: Path) -> None:
    """Offset, shape and strides: they would read what else is in memory."""
    path = _written(tmp_path / "w.pt", torch_bytes(torch_pickle({"fc1.weight": np.zeros((6, 3), "f4")}, *numbers)))
    with pytest.raises(DataError, match="damaged"):
        torch_weights.from_state_dict(path)


def test_a_storage_shorter_than_it_claims_is_refused(tmp_path: Path) -> None:
    pickled = torch_pickle({"fc1.weight": np.zeros((6, 3), "f4")})
    path = _written(tmp_path / "w.pt", torch_bytes(pickled, {"fc1.weight": np.zeros((6, 2), "f4")}))
    with pytest.raises(DataError, match="has 48 bytes, and 18 numbers of type float32 need 72"):
        torch_weights.from_state_dict(path)


def test_a_header_is_not_read_further_than_headers_go(tmp_path: Path) -> None:
    path = tmp_path / "l.npy"
    path.write_bytes(b"\x93NUMPY\2\0" + struct.pack("<I", BOMB))
    with open(path, "ab") as file:
        file.truncate(2 * BOMB)

    def read() -> None:
        with pytest.raises(DataError, match="has a header of 67108864 bytes"):
            load_logits(path, examples=6, classes=3)

    assert peak(read) < 4 * MIB


@pytest.mark.usefixtures("within_20_seconds")
def test_a_key_that_takes_for_ever_to_hash_is_refused(tmp_path: Path) -> None:
    """28 tuples, each of the one before it twice."""
    tuples = b")q\0" + b"".join(b"h" + bytes([n]) + b"h" + bytes([n]) + b"\x86q" + bytes([n + 1]) for n in range(28))
    path = _written(tmp_path / "w.pt", torch_bytes(b"\x80\x02" + tuples + b"}h\x1cNs."))
    with pytest.raises(DataError, match="a key that is a tuple"):
        torch_weights.from_state_dict(path)


def test_what_does_not_fit_into_memory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise MemoryError

    path = _written(tmp_path / "l.npy", READERS["logits-npy"].examples[0])
    monkeypatch.setattr(np, "empty", full)
    with pytest.raises(DataError, match="does not fit into memory"):
        load_logits(path, examples=6, classes=3)


LOADERS = {
    "idx": lambda path: idx.read(path),
    "npz": lambda path: load(f"npz:{path}"),
    "npy": lambda path: load_logits(path, examples=6, classes=3),
    "safetensors": lambda path: load_logits(path, examples=6, classes=3),
    "pt": torch_weights.from_state_dict,
    "parameters": parameters.load,
}


@pytest.mark.usefixtures("within_20_seconds")
@pytest.mark.parametrize("kind", LOADERS)
@pytest.mark.parametrize("what", ["fifo", "folder", "empty", "loop", "dangling", "device", "forbidden", "sparse"])
def test_paths_that_are_no_files(kind: str, what: str, tmp_path: Path) -> None:
    path = tmp_path / f"x.{kind}"
    if what == "fifo":
        os.mkfifo(path)
    elif what == "folder":
        path.mkdir()
    elif what == "forbidden":
        if os.geteuid() == 0:
            pytest.skip("root may read everything")
        path.touch(mode=0)
    elif what == "sparse":
        with open(path, "wb") as file:
            file.truncate(1 << 40)
    elif what == "empty":
        path.touch()
    else:
        path.symlink_to({"loop": path, "dangling": tmp_path / "none", "device": Path("/dev/zero")}[what])

    def read() -> None:
        with pytest.raises(DataError) as error:
            LOADERS[kind](path)
        assert str(error.value).isprintable()

    assert peak(read) < 4 * MIB


@pytest.mark.usefixtures("within_20_seconds")
def test_a_symbolic_link_to_a_file_is_followed(tmp_path: Path) -> None:
    (tmp_path / "link.npy").symlink_to(_written(tmp_path / "l.npy", READERS["logits-npy"].examples[0]))
    assert load_logits(tmp_path / "link.npy", examples=6, classes=3).shape == (6, 3)


def test_names_within_a_file_cannot_break_the_line(tmp_path: Path) -> None:
    escape = "\x1b[2J\r\n" + "x" * 10**6
    array = npy_bytes(np.zeros(2))
    many = {f"{escape[:7]}{number}.npy": array for number in range(300)}
    with pytest.raises(DataError, match=r"lacks the array logits .it has .* and 292 more") as error:
        load_logits(_written(tmp_path / "l.npz", zip_bytes(many)), examples=6, classes=3)
    assert str(error.value).isprintable()
    tensor = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    path = _written(tmp_path / "w.safetensors", tensors_bytes({escape: tensor}, bytes(4)))
    for read in (torch_weights.from_state_dict, parameters.load):
        with pytest.raises(DataError) as error:
            read(path)
        assert str(error.value).isprintable()
        assert len(str(error.value)) < 400


def test_an_idx_file_may_say_it_has_nothing(tmp_path: Path) -> None:
    assert idx.read(_written(tmp_path / "x", idx_bytes(np.zeros((0, 5, 5))))).shape == (0, 5, 5)
