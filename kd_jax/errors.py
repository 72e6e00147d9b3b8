"""What kd_jax raises: one sentence each, that names the value, the bound and the remedy."""


class DataError(ValueError):
    """Data that cannot be used."""

    def __init__(self, sentence: str):
        # Names in files may hold anything, and a terminal obeys some of it.
        super().__init__("".join(sign if sign.isprintable() else ascii(sign)[1:-1] for sign in sentence))


class ShapeError(DataError):
    """Arrays that do not fit each other."""


class ConfigError(ValueError):
    """A setting out of its bounds."""


class MethodError(ConfigError):
    """A method that lacks what it needs: a teacher, labels, a feature."""


class RunError(RuntimeError):
    """A training that failed."""


class NotFiniteError(RunError):
    """A number of a training that is not finite."""


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written or read."""


class MismatchError(ValueError):
    """A run that is not the one to be resumed: the sentence names the difference."""
