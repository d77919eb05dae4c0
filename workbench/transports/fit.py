"""Fitting transports from moments, and scoring them on documents that they were not fitted on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm

from workbench.errors import NotComparable, TooFewTokens, UnknownOption, WorkbenchError, require_one_of
from workbench.model import LanguageModel
from workbench.moments.joint import Joint
from workbench.moments.layout import Pair
from workbench.moments.moments import Moments, Strata
from workbench.results import Result
from workbench.sites import parse_pair
from workbench.transports.scoring import Explained, adjusted, explained
from workbench.transports.solving import Spectrum, Truncation, chosen_strength, least_squares, rotation, truncated
from workbench.transports.transport import Transport

if TYPE_CHECKING:
    import pandas as pd

Kind = Literal["identity", "ols", "ridge", "procrustes"]
METRICS = ("frobenius", "uniform", "whitened")


class Fitted(NamedTuple):
    """A map, and what it cost."""

    left: Tensor
    right: Tensor | None
    bias: Tensor
    freedom: float
    """Degrees of freedom for each coordinate of the target."""
    strength: float

    @property
    def matrix(self) -> Tensor:
        return self.left if self.right is None else self.left @ self.right


@dataclass(frozen=True)
class Recipe:
    """How a map is made of moments."""

    kind: Kind = "ridge"
    rank: int | None = None
    truncation: Truncation = "rrr"
    affine: bool = True
    strength: float | None = None
    scaled: bool = False

    def __post_init__(self) -> None:
        require_one_of("kind", self.kind, ("identity", "ols", "ridge", "procrustes"))
        require_one_of("truncation", self.truncation, ("rrr", "cca", "svd"))
        if self.strength is not None and (self.kind != "ridge" or not self.strength > 0):
            raise UnknownOption(f"strength={self.strength} with kind={self.kind!r}: it is a number above 0, of ridge alone.")
        if self.rank is None and self.truncation != "rrr":
            raise UnknownOption(f"truncation={self.truncation!r} says how to lower the rank. Pass rank= with it.")
        if self.scaled and self.kind != "procrustes":
            raise UnknownOption(f"scaled=True belongs to kind='procrustes', and {self.kind!r} was asked for. Leave it out.")

    def require_tokens(self, joint: Joint) -> None:
        """
        Raises:
            TooFewTokens: if there are not enough for a map of this kind.
        """
        d = len(joint.mean_x)
        if self.kind == "ols" and joint.n < d + 2:
            raise TooFewTokens(
                f"Least squares from {d} numbers needs {d + 2} tokens or more in every fit, better 20 for each number "
                f"({20 * d:,}); there are {joint.n:,}. Take more text, or kind='ridge'."
            )
        if not joint.n:
            raise TooFewTokens("No token is left to fit a map on. Take more text, or other strata.")

    def fit(self, joint: Joint, source: Spectrum | None = None, target: Spectrum | None = None) -> Fitted:
        """
        Args:
            source: The spectrum of x, if it was worked out before (`affine` alone).
            target: That of y, likewise.
        Raises:
            TooFewTokens: if least squares has no more rows than x has coordinates.
            NotComparable: if x and y have other widths where they must be the same.
        """
        dx, dy = joint.xy.shape
        centred = joint if self.affine else joint.about_zero()
        freedom = strength = 0.0
        self.require_tokens(joint)
        if self.kind in ("ols", "ridge"):
            spectrum = Spectrum.of(centred.xx) if source is None or not self.affine else source
            if self.kind == "ridge":
                strength = chosen_strength(spectrum, centred) if self.strength is None else self.strength
            matrix, freedom = least_squares(spectrum, centred.xy, strength), spectrum.freedom(strength)
        elif dx != dy:
            raise NotComparable(f"{self.kind!r} needs sites of one width; these have {dx} and {dy}. Use ols or ridge.")
        elif self.kind == "identity":
            matrix = torch.eye(dx, dtype=torch.float64, device=joint.xx.device)
        else:
            matrix, freedom = rotation(centred, scaled=self.scaled), (dx - 1) / 2
        left, right = matrix, None
        if self.rank is not None:
            left, right = truncated(matrix, centred, self.rank, self.truncation, target if self.affine else None)
            freedom = min(freedom, self.rank * (dx + dy - self.rank) / dy)
            matrix = left @ right
        bias = joint.mean_y - joint.mean_x @ matrix if self.affine else torch.zeros_like(joint.mean_y)
        return Fitted(left, right, bias, freedom, strength)


@dataclass(frozen=True, eq=False, repr=False)
class Transports(Result, Mapping[str, Transport]):
    """Maps by pair, `maps["4>8"]`. `table` has a row a pair: source, target, n, condition (of the source's spread), freedom,
    strength, and R² by metric: in_sample, adjusted, held_out, and beside shuffled documents null_in_sample, null_held_out,
    where these were summed."""

    maps: dict[str, Transport]

    def __getitem__(self, pair: str) -> Transport:
        source, target = parse_pair(pair, self.settings["n_layers"])
        if f"{source}>{target}" not in self.maps:
            raise KeyError(f"{pair!r} was not fitted. There are {', '.join(list(self.maps)[:6])}, …")
        return self.maps[f"{source}>{target}"]

    def __contains__(self, pair: object) -> bool:
        try:
            return isinstance(pair, str) and bool(self[pair])
        except (KeyError, WorkbenchError):
            return False

    def __iter__(self) -> Iterator[str]:
        return iter(self.maps)

    def __len__(self) -> int:
        return len(self.maps)

    def __str__(self) -> str:
        shown = [name for name in ("source", "target", "frobenius_in_sample", "frobenius_adjusted", "frobenius_held_out",
                                   "frobenius_null_held_out") if name in self.table]  # fmt: skip
        head = f"{len(self)} transports of {self.settings['model']!r}, {self.settings['kind']}"
        return f"{head}\n{self.table[shown].round(4).to_string(index=False, max_rows=12)}\n  maps['4>8'] .table .save(folder)"

    def _repr_html_(self) -> str:
        head, rest = str(self).split("\n", 1)
        return f"<p>{escape(head)}</p><pre>{escape(rest)}</pre>"

    def save(self, folder: str | Path) -> Path:
        """Write transports.safetensors and, last, run.json.

        Raises:
            CannotWrite: if the folder cannot be written.
        """
        from workbench.transports.files import save_transports

        return save_transports(list(self.maps.values()), self.settings, folder)

    @classmethod
    def load(cls, folder: str | Path, *, model: LanguageModel | None = None) -> Transports:
        """Read what `save` wrote.

        Args:
            model: The model that they are to be used with.
        Raises:
            BadArtifact: if the folder holds no transports, or damaged ones.
            OtherJob: if they are of another model.
        """
        from workbench.transports.files import load_transports

        maps, settings = load_transports(folder)
        if model is not None:
            for one in maps[:1]:
                one.require_model(model)
        return cls(table=_table(maps), settings=settings, maps={one.pair: one for one in maps})


class Fitting:
    """Maps from one set of moments; spectra are worked out once for each site and set of tokens."""

    def __init__(self, moments: Moments, strata: Strata = "all") -> None:
        self.moments = moments
        self.strata: Strata = strata
        self._spectra: dict[tuple[str, tuple[int, ...]], Spectrum] = {}
        self._joints: dict[tuple[Pair, tuple[int, ...]], Joint] = {}

    @cached_property
    def folds(self) -> list[int]:
        """Folds of pairs that hold tokens."""
        n, layout = self.moments.sums.n, self.moments.layout
        return [fold for fold in range(layout.cross_folds) if int(n[:, layout.folds_of([fold])].sum())]

    def joint(self, pair: Pair, folds: Sequence[int] | None = None, *, shuffled: bool = False) -> Joint:
        key = (pair._replace(shuffled=shuffled), tuple(self.folds if folds is None else folds))
        if key not in self._joints:
            if any(known[:2] != pair[:2] for known, _ in self._joints):
                self._joints.clear()  # each pair is asked for several times, but one pair after the other
            self._joints[key] = self.moments.joint(pair, self.strata, key[1], shuffled=shuffled)
        return self._joints[key]

    def spectrum(self, site: str, folds: Sequence[int] | None = None) -> Spectrum:
        """Of a site over some folds of pairs."""
        chosen = tuple(self.folds if folds is None else folds)
        if (site, chosen) not in self._spectra:
            for known in [key for key in self._spectra if key[0] != site and key[1] != tuple(self.folds)]:
                del self._spectra[known]  # of folds only the source's are asked for, and sources come one after the other
            own = self.moments.spread(site, self.strata, self.moments.layout.folds_of(chosen))
            self._spectra[site, chosen] = Spectrum.of(own.xx, self.moments.noise(site, chosen))
        return self._spectra[site, chosen]

    def fit(self, recipe: Recipe, pair: Pair, folds: Sequence[int] | None = None, *, shuffled: bool = False) -> Fitted:
        """On some folds; on all, if None."""
        joint = self.joint(pair, folds, shuffled=shuffled)
        target = self.spectrum(pair.target, folds) if recipe.rank is not None and recipe.truncation == "cca" else None
        source = self.spectrum(pair.source, folds) if recipe.kind in ("ols", "ridge") and recipe.affine else None
        return recipe.fit(joint, source, target)

    def in_sample(self, fitted: Fitted, pair: Pair, *, shuffled: bool = False) -> Explained:
        return explained(self.joint(pair, shuffled=shuffled), fitted.matrix, fitted.bias, self.spectrum(pair.target))

    def held_out(self, recipe: Recipe, pair: Pair, *, shuffled: bool = False) -> Explained:
        """Each fold explained by the map of all others, added up."""
        found: Explained | None = None
        for fold in self.folds:
            fitted = self.fit(recipe, pair, [other for other in self.folds if other != fold], shuffled=shuffled)
            joint = self.joint(pair, [fold], shuffled=shuffled)
            part = explained(joint, fitted.matrix, fitted.bias, self.spectrum(pair.target))
            found = part if found is None else found.plus(part)
        assert found is not None
        return found


def fit_transports(
    moments: Moments,
    pairs: Sequence[str] | None = None,
    *,
    kind: Kind = "ridge",
    strata: Strata = "ordinary",
    rank: int | None = None,
    truncation: Truncation = "rrr",
    affine: bool = True,
    strength: float | None = None,
    scaled: bool = False,
    held_out: bool = True,
    progress: bool = True,
) -> Transports:
    """Fit a linear map for every pair of sites, and score it.

    The map itself is fitted on all documents. Held-out scores are of maps fitted without the fold they are scored on; ridge
    chooses its strength inside what it is fitted on, by generalised cross-validation. With shuffled pairs in the moments, the
    same is done for targets from other documents: the null.

    Args:
        moments: Of `collect_moments`, with these pairs.
        pairs: As `parse_pair` reads them; all in the moments, if None.
        kind: `identity`; `ols`, least squares; `ridge`; `procrustes`, the closest rotation.
        strata: `ordinary` tokens, `all`, or the `rest`. With sinks in, their few rows decide the fit.
        rank, truncation: Keep so many dimensions: see `workbench.transports.solving.truncated`.
        affine: With an intercept. (Yom Din et al. 2024 fit without.)
        strength: Of ridge, as scikit-learn's alpha, in place of the chosen one.
        scaled: For `procrustes`: the rotation times one factor.
        held_out: Score on other documents too; needs documents in two folds.
    Returns:
        Maps by pair, those of one source together.
    Raises:
        TooFewTokens: if least squares has too few tokens, or no document is left to hold out.
        UnknownOption, NotComparable: for options that do not go together, pairs that are not in the moments, or other widths.
    """
    recipe = Recipe(kind, rank, truncation, affine, strength, scaled)
    fitting = Fitting(moments, strata)
    if held_out and len(fitting.folds) < 2:
        raise TooFewTokens(
            "There is no document to hold out: all tokens are of one fold. Take a corpus of two documents or more (and moments "
            "with cross_folds=2), or pass held_out=False."
        )
    own = moments.settings
    wanted = moments.pairs if pairs is None else [Pair(*parse_pair(one, own["n_layers"])) for one in pairs]
    settings = {name: value for name, value in own.items() if name not in ("sites", "corpus_parts")} | {
        "kind": kind, "strata": strata, "rank": rank, "truncation": None if rank is None else truncation, "affine": affine,
        "asked_strength": strength, "scaled": scaled,
    }  # fmt: skip
    by_source = sorted(wanted, key=lambda pair: list(moments.layout.widths).index(pair.source))
    maps = [_scored(fitting, recipe, pair, settings, held_out) for pair in tqdm(by_source, desc="fit", disable=not progress)]
    return Transports(table=_table(maps), settings=settings, maps={one.pair: one for one in maps})


def _scored(fitting: Fitting, recipe: Recipe, pair: Pair, settings: dict[str, Any], held_out: bool) -> Transport:
    fitted, joint = fitting.fit(recipe, pair), fitting.joint(pair)
    scores: dict[str, float] = {}
    for shuffled in (False, True) if fitting.moments.has_null(pair) else (False,):
        prefix = "null_" if shuffled else ""
        own = fitting.fit(recipe, pair, shuffled=True) if shuffled else fitted
        inside = fitting.in_sample(own, pair, shuffled=shuffled)
        outside = fitting.held_out(recipe, pair, shuffled=shuffled) if held_out else None
        for metric in METRICS:
            r2 = getattr(inside, metric)
            scores[f"{metric}_{prefix}in_sample"] = r2
            if not shuffled:
                scores[f"{metric}_adjusted"] = adjusted(r2, joint.n, own.freedom)
            if outside is not None:
                scores[f"{metric}_{prefix}held_out"] = getattr(outside, metric)
    made = settings | {
        "n": joint.n, "condition": fitting.spectrum(pair.source).condition, "freedom": fitted.freedom,
        "strength": fitted.strength,
    }  # fmt: skip
    return Transport(pair.source, pair.target, fitted.left, fitted.right, fitted.bias, made, scores)


def _table(maps: Sequence[Transport]) -> pd.DataFrame:
    import pandas as pd

    return pd.DataFrame(
        {"source": one.source, "target": one.target}
        | {name: one.settings.get(name) for name in ("n", "condition", "freedom", "strength")}
        | one.scores
        for one in maps
    )  # fmt: skip
