"""The shortcut lens: the best linear map from each state to the last, in closed form.

Source: "Jump to Conclusions" (Yom Din et al. 2024, arXiv 2303.09435), whose maps are least squares without an intercept, on one
token a sentence. We fit ridge with an intercept, its strength inside the data, on all ordinary tokens: their states have means
so large that a map without one spends its first direction on them.
"""

from __future__ import annotations

from typing import Any

from workbench.collecting import collect_moments
from workbench.corpus.corpus import Corpus
from workbench.lenses.lens import Lens
from workbench.model import LanguageModel
from workbench.transports.fit import Kind, fit_transports


def fit_shortcut(
    model: LanguageModel,
    corpus: Corpus | Any,
    *,
    kind: Kind = "ridge",
    affine: bool = True,
    held_out: bool = True,
    batch_tokens: int | None = None,
    progress: bool = True,
) -> Lens:
    """Fit a map from every state to the last on the ordinary tokens of a corpus.

    Args:
        kind, affine, held_out: As `fit_transports`; `kind="ols", affine=False` is as published.
    Raises:
        TooFewTokens, OutOfMemory, BadCorpus, NotFinite: as `collect_moments` and `fit_transports`.
    """
    moments = collect_moments(
        model, corpus, pairs="last", detail="two", folds=2, device=model.device, batch_tokens=batch_tokens, progress=progress
    )  # fmt: skip
    return Lens.of(fit_transports(moments, kind=kind, affine=affine, held_out=held_out, progress=progress))
