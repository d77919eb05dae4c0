"""The shortcut lens: the best linear map from each state to a later one, in closed form.

Source: "Jump to Conclusions" (Yom Din et al. 2024, arXiv 2303.09435), whose maps are least squares without an intercept, on one
token a sentence. We fit ridge with an intercept, its strength inside the data, on all ordinary tokens: their states have means
so large that a map without one spends its first direction on them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from workbench.collecting import collect_moments
from workbench.corpus.corpus import Corpus
from workbench.errors import UnknownSite
from workbench.lenses.lens import STREAM, Lens
from workbench.model import LanguageModel
from workbench.moments.moments import Moments
from workbench.sites import Site, depth, named_once, parse_sites, state
from workbench.transports.fit import Kind, fit_transports


def fit_shortcut(
    model: LanguageModel,
    corpus: Corpus | Any,
    *,
    sites: str | Sequence[str] | None = None,
    to: int | None = None,
    kind: Kind = "ridge",
    affine: bool = True,
    held_out: bool = True,
    batch_tokens: int | None = None,
    progress: bool = True,
) -> Lens:
    """Fit a map from every state to the last, or to another one, on the ordinary tokens of a corpus.

    Nine documents in ten are used: see `Corpus.held_out`.

    Args:
        sites: Sites of the stream that maps begin at; all states before the target, if None. `resid_mid` lies between
            attention and MLP.
        to: The state that maps lead to (`l + 1` leaves block l); the last, if None. The model's head then reads what the lens
            makes of earlier states as it would read that one.
        kind, affine, held_out: As `fit_transports`; `kind="ols", affine=False` is as published.
    Raises:
        TooFewTokens, OutOfMemory, BadCorpus, NotFinite: as `collect_moments` and `fit_transports`.
        UnknownSite, LayerOutOfRange: if a site is none of the stream before the target.
    """
    texts = corpus if isinstance(corpus, Corpus) else Corpus(corpus)
    moments = lens_moments(model, texts, sources(model, sites, to), to, batch_tokens=batch_tokens, progress=progress)
    fitted = fit_transports(moments, kind=kind, affine=affine, held_out=held_out, progress=progress)
    return Lens.of(fitted.values(), "shortcut", fitted.settings)


def sources(model: LanguageModel, sites: str | Sequence[str] | None, to: int | None = None) -> list[str]:
    """The sites that maps of a lens begin at, each by its one name.

    Raises:
        UnknownSite, LayerOutOfRange: as `fit_shortcut`.
    """
    n = model.n_layers
    target = n if to is None else to
    end = depth(Site.parse(state(target, n), n), n)
    if sites is None:
        if target < 1:
            raise UnknownSite("No state comes before state 0. Choose a later one.")
        return [state(number, n) for number in range(target)]
    parsed = parse_sites([sites] if isinstance(sites, str) else sites, n)
    named = list(dict.fromkeys(named_once(str(site), n) for site in parsed))
    for site in named:
        if Site.parse(site, n).name not in STREAM or depth(Site.parse(site, n), n) >= end:
            raise UnknownSite(f"{site} is no site of the stream before {state(target, n)}. A lens reads {', '.join(STREAM)}.")
    return named


def lens_moments(
    model: LanguageModel, corpus: Corpus, sites: Sequence[str], to: int | None, *, batch_tokens: int | None, progress: bool
) -> Moments:
    """Moments of sites with the state that maps lead to."""
    target = state(model.n_layers if to is None else to, model.n_layers)
    return collect_moments(
        model, corpus.training(), list(sites), [f"{site}>{target}" for site in sites], detail="two", folds=2,
        device=model.device, batch_tokens=batch_tokens, progress=progress,
    )  # fmt: skip
