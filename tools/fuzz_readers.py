"""Fuzzes one reader of files, guided by the coverage of the code that reads: `python -m tools.fuzz_readers READER …`.

What follows the reader's name goes to libFuzzer: `-max_total_time=70 FOLDER` fuzzes for 70 s and keeps in FOLDER what
found new code. `python -m tools.fuzz_readers --replay READER FOLDER` reads it all again, without atheris, for
`coverage` to measure. The readers and what is asked of them are in `tests/readers.py`.

Needs `pip install atheris`, which is no dependency of kd_jax. It fails at the first input that is neither read nor
refused in one sentence, that takes more than 10 s, or for which more than 2 GiB are asked.
"""

import resource
import sys
import tempfile
from pathlib import Path

_ROOM = 2 << 30


def replay(name: str, corpus: Path) -> None:
    """Reads every file of `corpus` once and says how many were accepted."""
    from tests.readers import READERS, refused

    inputs = [*READERS[name].examples, *(path.read_bytes() for path in sorted(corpus.iterdir()))]
    with tempfile.TemporaryDirectory() as folder:
        accepted = sum(refused(READERS[name], content, Path(folder)) is None for content in inputs)
    print(f"{name}: {accepted} of {len(inputs)} inputs accepted")


def fuzz(name: str, arguments: list[str]) -> None:
    """Fuzzes until libFuzzer's limits or a failure end the process."""
    import atheris

    include = ["kd_jax.data", "kd_jax.files", "kd_jax.models.parameters", "kd_jax.teacher"]
    with atheris.instrument_imports(include=[*include, "kd_jax.models.torch_weights", "zipfile", "pickletools"]):
        import kd_jax.data.sources.idx
        import kd_jax.data.sources.npz  # noqa: F401  `kd_jax.load` imports both later
        from tests.readers import READERS, refused

    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as seeds:
        for number, example in enumerate(READERS[name].examples):
            # JAX compiles what it needs before memory is limited.
            assert refused(READERS[name], example, Path(folder)) is None
            (Path(seeds) / f"example-{number}").write_bytes(example)
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + _ROOM,) * 2)
        options = ["-timeout=10", "-max_len=2000", "-len_control=0", *arguments, seeds]
        atheris.Setup([sys.argv[0], *options], lambda content: refused(READERS[name], content, Path(folder)))
        atheris.Fuzz()


if __name__ == "__main__":
    if len(sys.argv) == 4 and sys.argv[1] == "--replay":
        replay(sys.argv[2], Path(sys.argv[3]))
    elif len(sys.argv) > 1:
        fuzz(sys.argv[1], sys.argv[2:])
    else:
        sys.exit(__doc__)
