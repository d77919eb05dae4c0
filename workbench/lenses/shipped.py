"""Lenses that come with the project, fitted to the embedded model by data/build_lenses.py."""

from __future__ import annotations

from pathlib import Path

from workbench.errors import UnknownOption
from workbench.lenses.lens import KINDS, Kind, Lens
from workbench.model import LanguageModel

SHIPPED = Path(__file__).parents[2] / "data" / "lenses"
"""A folder a model, and in it one a kind. Empty where they are not installed: they lie in the project's own checkout."""


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
        there = [one for one in KINDS if (SHIPPED / model.name / one / "run.json").is_file()]
        found = f"There {'is' if len(there) == 1 else 'are'} {', '.join(there)}" if there else "There is none"
        raise UnknownOption(
            f"No {kind} lens is shipped for {model.name!r}. {found}. Fit one: workbench fit-lens --kind {kind} --model "
            f"{model.name} --corpus NAME --out DIR, and read through it with --lens DIR."
        )
    return Lens.load(folder, model=model)
