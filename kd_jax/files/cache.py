"""Where kd_jax keeps what it can make again: compiled programs and decoded data sets."""

import os
import tempfile
from pathlib import Path


def folder(name: str) -> Path:
    """The cache folder `name`: below `$KD_JAX_CACHE`, else `$XDG_CACHE_HOME/kd_jax`, else `~/.cache/kd_jax`."""
    own = os.environ.get("KD_JAX_CACHE")
    base = Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "kd_jax"
    try:
        return base.expanduser() / name
    except RuntimeError:
        # There is no home, in some containers.
        return Path(tempfile.gettempdir()) / "kd_jax" / name


def keep_compiled_programs() -> None:
    """Lets JAX keep compiled programs on disk, so that a second run need not compile. A user's own setting stays."""
    import jax

    if jax.config.values["jax_compilation_cache_dir"] is None:
        jax.config.update("jax_compilation_cache_dir", str(folder("xla")))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
