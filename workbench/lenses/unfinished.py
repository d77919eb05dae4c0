"""What a long fit has found so far, in one file: written beside and renamed, taken up by the next try with the same
settings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from workbench.artifacts import output_folder, staged, strict
from workbench.errors import BadArtifact, OtherJob

FILE = "unfinished.safetensors"


class Unfinished:
    """The state of one fit in the folder where its result will be; nowhere, if there is no folder."""

    def __init__(self, folder: str | Path | None, settings: dict[str, Any]) -> None:
        """
        Args:
            settings: All that decides the result.
        Raises:
            CannotWrite: if the folder cannot be written.
        """
        self.path = None if folder is None else output_folder(Path(folder)) / FILE
        self.settings = json.loads(json.dumps(strict(settings)))

    def found(self) -> tuple[dict[str, Tensor], int] | None:
        """The tensors that were kept, and how many steps had been done.

        Raises:
            OtherJob: if they are of a fit with other settings.
            BadArtifact: if the file is damaged.
        """
        if self.path is None or not self.path.exists():
            return None
        try:
            with safe_open(self.path, "pt") as file:
                said = json.loads(file.metadata()["settings"])
                done = int(said.pop("steps_done"))
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, KeyError, TypeError, ValueError, SafetensorError) as error:
            raise BadArtifact(f"{str(self.path)!r} is damaged ({error}). Delete it, and begin anew.") from None
        if other := [name for name in sorted({*said, *self.settings}) if said.get(name) != self.settings.get(name)]:
            what = "; ".join(f"{name}: there {said.get(name)!r}, here {self.settings.get(name)!r}" for name in other[:3])
            raise OtherJob(
                f"{str(self.path.parent)!r} holds an unfinished fit with other settings ({what}). Ask for the same ones to go "
                f"on with it, name another folder, or delete {FILE} there."
            )
        return tensors, done

    def keep(self, tensors: dict[str, Tensor], done: int) -> None:
        """
        Args:
            done: Steps that these tensors are after.
        Raises:
            CannotWrite: if the disk refuses.
        """
        if self.path is not None:
            with staged(self.path) as beside:
                own = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
                save_file(own, beside, {"settings": json.dumps(self.settings | {"steps_done": done})})


def forget(folder: Path) -> None:
    """The result is written: what was kept of it is no longer needed."""
    (folder / FILE).unlink(missing_ok=True)
