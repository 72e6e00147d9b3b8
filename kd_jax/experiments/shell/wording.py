"""Errors of the library as a command says them: with the options that mend them."""

from kd_jax import errors

_IN_OPTIONS = {
    errors.START_AGAIN: "start the run again, in another folder or with --overwrite",
    errors.WAIT: "wait for it, or choose another --out",
    errors.MAKE_ROOM_AND_GO_ON: "make room or give it back, and go on with --resume from the checkpoint before",
    errors.SAME_VERSION: "go on with the version that wrote it, or start again with --overwrite",
    errors.SMALLER: "choose a smaller --batch-size or smaller networks",
}


def in_options(error: Exception) -> str:
    """The sentence of an error."""
    if isinstance(error, errors.SeedsNotFiniteError):
        return error.sentence(f"--{'teacher-' * error.of_teacher}learning-rate", "--temperature")
    if isinstance(error, errors.CheckpointError | errors.ConfigError) and error.remedy in _IN_OPTIONS:
        return f"{error.problem}: {_IN_OPTIONS[error.remedy]}"
    return str(error)
