"""Lenses that come with the project, fitted to the embedded model by data/build_lenses.py."""

from __future__ import annotations

from workbench.errors import UnknownOption
from workbench.lenses.kinds import SHIPPED, Kind, shipped_kinds
from workbench.lenses.lens import Lens
from workbench.model import LanguageModel


def shipped_lens(model: LanguageModel, kind: Kind) -> Lens:
    """The lens of this kind that was fitted to this model; the logit lens needs no fitting.

    Raises:
        UnknownOption: if none is shipped for the model.
        OtherJob: if the model's weights are others than those that it was fitted to.
        BadArtifact: if it is damaged.
    """
    if kind == "logit":
        return Lens.logit(model)
    folder = SHIPPED / model.name / kind
    if not (folder / "run.json").is_file():
        there = shipped_kinds(model.name)[1:]
        found = f"There {'is' if len(there) == 1 else 'are'} {', '.join(there)}" if there else "There is none"
        raise UnknownOption(
            f"No {kind} lens is shipped for {model.name!r}. {found}. Fit one: workbench fit-lens --kind {kind} --model "
            f"{model.name} --corpus NAME --out DIR, and read through it with --lens DIR."
        )
    return Lens.load(folder, model=model)
