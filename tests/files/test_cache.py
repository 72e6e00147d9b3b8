import subprocess
import sys
from pathlib import Path

import pytest

from kd_jax.files import cache


def test_the_folder_is_the_users_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KD_JAX_CACHE", "/own")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert cache.folder("xla") == Path("/own/xla")
    monkeypatch.delenv("KD_JAX_CACHE")
    assert cache.folder("xla") == Path("/xdg/kd_jax/xla")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache.folder("xla") == Path.home() / ".cache" / "kd_jax" / "xla"


@pytest.mark.parametrize("own", [False, True])
def test_compiled_programs_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own: bool) -> None:
    monkeypatch.setenv("KD_JAX_CACHE", str(tmp_path / "default"))
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    monkeypatch.delenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS")
    if own:
        monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "own"))
        monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    code = "import jax, kd_jax.files.cache as c; c.keep_compiled_programs(); jax.jit(lambda x: x * 3 + 1)(2.0)"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert (tmp_path / "own").exists() == own
    assert (tmp_path / "default").exists() != own
    assert any((tmp_path / ("own" if own else "default/xla")).iterdir())
