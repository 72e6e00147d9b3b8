"""Trainings that are done, in the folder of a table: one file each, so that a killed run loses one at most.

A folder has `trainings/NAME.json`, what a training gave and a digest of that and of what made it, and the teacher's
parameters.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kd_jax.errors import DataError, OutputError
from kd_jax.experiments.shell.folder import write_part
from kd_jax.experiments.shell.parameters import safetensors
from kd_jax.experiments.shell.text import json_text
from kd_jax.models import Model, parameters

TEACHER = "teacher"

Found = dict[str, Any]
"""What a training gave, as JSON holds it."""


class KeptTrainings:
    """What the trainings of one table left in its folder. identity: what makes it this one."""

    def __init__(self, folder: Path, identity: Mapping[str, Any]) -> None:
        self.folder = folder / "trainings"
        self.teacher = folder / "parameters" / f"teacher-seed{identity['config']['seed']}.safetensors"
        self._run = _digest(identity)
        self._taught_by = ""

    def read(self, name: str, made_by: Mapping[str, Any]) -> Found | None:
        """What a training gave; None where it is not done, is damaged, or was made by something else."""
        try:
            content = json.loads((self.folder / f"{name}.json").read_bytes())
            return content["found"] if content["sha256"] == self._signed(name, made_by, content["found"]) else None
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return None

    def write(self, name: str, made_by: Mapping[str, Any], found: Found) -> None:
        """Keeps what a training gave. Raises `OutputError`."""
        content = {"sha256": self._signed(name, made_by, found), "found": found}
        write_part(self.folder / f"{name}.json", json_text(content, indent=None))

    def write_teacher(self, variables: Any) -> None:
        """Keeps the teacher's variables `[1, 1, ...]`. Raises `OutputError`."""
        self._taught_by = ""
        write_part(self.teacher, safetensors(variables, (0, 0), {"model": TEACHER}))

    def read_teacher(self, model: Model) -> Model:
        """The teacher. Raises `OutputError` where its file is damaged."""
        try:
            return Model(model.network, model.network.merge(*parameters.load(self.teacher, model.network)))
        except DataError as error:
            raise OutputError(f"{error}: start again with --overwrite") from None

    @property
    def kept(self) -> bool:
        """Whether anything was kept."""
        return any(self.folder.glob("*.json"))

    def discard(self) -> None:
        """Forgets all trainings and the teacher. Raises `OSError`."""
        for path in self.folder.glob("*.json"):
            path.unlink()
        self.teacher.unlink(missing_ok=True)
        self._taught_by = ""

    def _signed(self, name: str, made_by: Mapping[str, Any], found: Found) -> str:
        if not self._taught_by:
            self._taught_by = hashlib.sha256(self.teacher.read_bytes()).hexdigest()
        made = {"run": self._run, "name": name, "made_by": dict(made_by), "teacher": self._taught_by, "found": found}
        return _digest(made)


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
