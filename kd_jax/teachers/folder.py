"""The folder of a cache: `cache.json`, which tells what it is of, and shards of equally many examples each.

Each shard tells which cache and which examples it is of, and has its own digest, so that none needs a list of them.
"""

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from filelock import FileLock, Timeout

from kd_jax.errors import ConfigError, DataError, MismatchError, OutputError
from kd_jax.files import reason, shards
from kd_jax.teachers.keep import Arrays, Keep, begins_of

FORMAT = 1
_NAME, _LOCK, _HEAD = "cache.json", ".lock", "head.safetensors"
_KIND = "a teacher's outputs, kept by kd_jax"
_MAKE_ROOM = "make room or choose another folder, and call kd.cached as before, which goes on from what is there"
_AGAIN = "delete the file, and call kd.cached as before, which computes it again"
_WHOLE = {"teacher": "the one that it was made with", "inputs": "those that it was made of, in their order"}


class Folder:
    """A cache on disk. Two are equal where they are of the same path and have the same description."""

    def __init__(self, path: Path, description: dict[str, Any]) -> None:
        self.path, self.description = path, description
        self.identity = _digest_of(description)
        self.keep = Keep(**(description["keep"] | {"features": tuple(description["keep"]["features"])}))
        self.examples, self.rows = int(description["examples"]), int(description["rows"])
        self.places, self.classes = tuple(description["places"]), int(description["classes"])
        self.count = -(-self.examples // self.rows)
        self._open: dict[int, Arrays] = {}
        self._good: set[int] = set()
        self._most: int | None = None
        self._head: tuple[Any, Any] = (None, None)

    def __eq__(self, other: object) -> bool:
        """Of the same path and description."""
        return isinstance(other, Folder) and (self.path, self.identity) == (other.path, other.identity)

    def __hash__(self) -> int:
        """As `__eq__`."""
        return hash((self.path, self.identity))

    def examples_of(self, number: int) -> range:
        """The examples of a shard."""
        return range(number * self.rows, min((number + 1) * self.rows, self.examples))

    def missing(self) -> list[int]:
        """The shards that are not there yet. Raises `DataError` where a header or a size tells of damage."""
        return [number for number in range(self.count) if not self._is_there(number)]

    @property
    def most(self) -> int:
        """The most distinct draws of any example or position."""
        if self._most is None:
            self._most = max(self._fact(number, "most") for number in range(self.count))
        return self._most

    @property
    def nbytes(self) -> int:
        """Bytes of all shards."""
        return sum(self._file(number).stat().st_size for number in range(self.count))

    def write(self, number: int, arrays: Arrays) -> None:
        """Writes a shard. Raises `OutputError`, and leaves the others as they are."""
        about = self._about(number)
        if self.keep.kind == "samples":
            about["most"] = str(int(arrays["distinct"].max()))
        shards.write(self._file(number), arrays, about, remedy=_MAKE_ROOM)

    def write_head(self, head: Mapping[str, Any]) -> None:
        """Writes the head of hidden states. Raises `OutputError`."""
        shards.write(self.path / _HEAD, head, {"cache": self.identity}, remedy=_MAKE_ROOM)

    def head(self) -> tuple[Any, Any]:
        """The head and its bias on the device; None for what there is not. Raises `DataError`."""
        if self.keep.kind == "hidden" and self._head[0] is None:
            path = self.path / _HEAD
            arrays = shards.mapped(path, _AGAIN, check=True)
            wide = tuple(self.description["arrays"]["hidden"][1])[-1:]
            shapes = {"head": (*wide, self.classes), "bias": (self.classes,)}
            if shards.read_header(path, _AGAIN)[1].get("cache") != self.identity:
                raise DataError(f"{path} is of another cache: {_AGAIN}")
            if "head" not in arrays or any(array.shape != shapes.get(name) for name, array in arrays.items()):
                raise DataError(f"{path} is damaged (its shapes are others): {_AGAIN}")
            self._head = jnp.asarray(arrays["head"]), jnp.asarray(arrays["bias"]) if "bias" in arrays else None
        return self._head

    def has_head(self) -> bool:
        """Whether it is written."""
        return (self.path / _HEAD).exists()

    def arrays(self, number: int) -> Arrays:
        """The arrays of a shard, mapped; its digest is compared when it is first asked for. Raises `DataError`."""
        if number not in self._open:
            self._is_there(number, must=True)
            arrays = shards.mapped(self._file(number), _AGAIN, check=number not in self._good)
            self._check_shapes(number, arrays)
            self._good.add(number)
            if "distinct" in arrays:
                arrays["begins"] = begins_of(arrays["distinct"])
            while len(self._open) >= _most_open():
                self._open.pop(next(iter(self._open)))
            self._open[number] = arrays
        return self._open[number]

    def require_whole(self) -> None:
        """Raises `DataError` where a shard is missing, or the head."""
        missing = self.missing()
        if self.keep.kind == "hidden" and not self.has_head():
            raise DataError(
                f"{self.path} lacks {_HEAD}: call kd.cached with the same teacher, inputs and path, which writes it"
            )
        if missing:
            raise DataError(
                f"{self.path} lacks {len(missing)} of its {self.count} shards, {self._file(missing[0]).name} first: "
                "call kd.cached with the same teacher, inputs and path, which writes what is missing"
            )

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """For this process alone. Raises `OutputError` where another one writes."""
        with _lock(self.path):
            yield

    def _file(self, number: int) -> Path:
        return self.path / f"shard-{number:05d}.safetensors"

    def _about(self, number: int) -> dict[str, str]:
        own = self.examples_of(number)
        return {"cache": self.identity, "examples": f"{own.start} to {own.stop - 1}"}

    def _is_there(self, number: int, *, must: bool = False) -> bool:
        path = self._file(number)
        if not must and not path.exists():
            return False
        about = shards.read_header(path, _AGAIN)[1]
        wanted = self._about(number)
        if {name: about.get(name) for name in wanted} != wanted:
            raise DataError(f"{path} is of another cache, or of other examples: {_AGAIN}")
        return True

    def _fact(self, number: int, name: str) -> int:
        path = self._file(number)
        said = shards.read_header(path, _AGAIN)[1].get(name, "")
        if not (said.isascii() and said.isdigit() and 1 <= int(said) <= self.keep.draws):
            raise DataError(f"{path} is damaged (it does not tell its {name}): {_AGAIN}")
        return int(said)

    def _check_shapes(self, number: int, arrays: Arrays) -> None:
        rows = len(self.examples_of(number))
        for name, (kind, tail) in self.description["arrays"].items():
            found = arrays.get(name)
            ragged = name in ("entries", "ratios")
            shape = None if found is None else found.shape[1:] if ragged else found.shape
            if found is None or found.dtype.name != kind or shape != (*(() if ragged else (rows,)), *tail):
                raise DataError(f"{self._file(number)} is damaged (its array {name} is another): {_AGAIN}")


def begin(path: Path, description: dict[str, Any]) -> Folder:
    """The cache in a folder: the one that is there, or a new one in an empty folder.

    Raises `MismatchError` for one of another teacher, other inputs or settings, `ConfigError` for a folder of something
    else, and `OutputError` where it cannot be written.
    """
    description = json.loads(json.dumps(description))
    try:
        path.mkdir(parents=True, exist_ok=True)
        others = sorted(one.name for one in path.iterdir() if not one.name.startswith("."))
    except OSError as error:
        raise OutputError(f"{path} cannot be made ({reason(error)}): choose another folder") from None
    if (path / _NAME).exists():
        known = read(path)
        _require_same(known, description)
        return known
    if others:
        raise ConfigError(f"{path} has {others[0]} and no cache of a teacher: choose a new or an empty folder")
    with _lock(path):
        if (path / _NAME).exists():
            # Another process began one since.
            known = read(path)
            _require_same(known, description)
            return known
        text = json.dumps(description | {"sha256": _digest_of(description)}, indent=1)
        shards.write_whole(path / _NAME, [text.encode()], _MAKE_ROOM)
    return Folder(path, description)


def read(path: Path) -> Folder:
    """The cache that a folder has. Raises `DataError`, or `MismatchError` for one of another format."""
    if not (path / _NAME).is_file():
        raise DataError(f"{path} has no {_NAME}: give the folder that kd.cached(…, path=…) wrote")
    try:
        content = json.loads((path / _NAME).read_bytes())
        digest = content.pop("sha256")
        if content["kind"] != _KIND or digest != _digest_of(content):
            raise ValueError
        if content["format"] == FORMAT:
            return Folder(path, content)
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError):
        raise DataError(f"{path / _NAME} is damaged: restore it, or make the cache again in another folder") from None
    raise MismatchError(
        f"{path} has format {content['format']}, and this kd_jax reads {FORMAT}: use the kd_jax that wrote it"
    )


def described(keep: Keep, arrays: Mapping[str, Any], facts: Mapping[str, Any]) -> dict[str, Any]:
    """A description. arrays: of one example, whose types and shapes behind the first axis all have."""
    shapes = {name: [array.dtype.name, list(array.shape[1:])] for name, array in sorted(arrays.items())}
    return {"kind": _KIND, "format": FORMAT, "keep": keep.as_json(), "arrays": shapes, **facts}


def _require_same(known: Folder, asked: dict[str, Any]) -> None:
    """Raises `MismatchError`. How many rows a shard has is as it was begun; programs are alike in one version alone."""
    saved = known.description
    alike = saved["versions"] == asked["versions"]
    for name in ("examples", "inputs", "teacher", "host", "computation"):
        if name == "host" and name not in saved:
            # Of an earlier version, of whose cache the first answers tell.
            continue
        values = asked["has_variables"] or asked["host"] is not None
        if saved[name] == asked[name] or (name == "computation" and not alike and values):
            continue
        if name == "examples":
            raise MismatchError(
                f"there are {asked[name]} examples, and the cache in {known.path} has {saved[name]}: give "
                f"{_WHOLE['inputs']}, or choose another folder"
            )
        what = "inputs" if name == "inputs" else "teacher"
        raise MismatchError(
            f"the cache in {known.path} is of {'other inputs' if what == 'inputs' else 'another teacher'}: give "
            f"{_WHOLE[what]}, or choose another folder"
        )
    settings = asked["keep"] | {"key": asked["key"]}
    for name, value in (saved["keep"] | {"key": saved["key"]}).items():
        if settings[name] != value:
            name = "keep" if name == "kind" else name
            raise MismatchError(
                f"{name} is {settings.get(name, asked['keep']['kind'])!r}, and the cache in {known.path} has "
                f"{value!r}: ask for the same, or choose another folder"
            )


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    held = FileLock(path / _LOCK, blocking=False)
    try:
        held.acquire()
    except Timeout:
        raise OutputError(
            f"another process writes the cache in {path}: wait for it, or choose another folder"
        ) from None
    except (OSError, NotImplementedError) as error:
        raise OutputError(f"{path} cannot be written ({reason(error)}): {_MAKE_ROOM}") from None
    try:
        yield
    finally:
        held.release()


def _most_open() -> int:
    """Shards that stay open: each has a mapping, of which Linux gives a process 65,530, and a file's descriptor."""
    try:
        import resource
    except ImportError:
        return 100
    most, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 1000 if most == resource.RLIM_INFINITY else max(1, min(1000, most // 4))


def _digest_of(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
