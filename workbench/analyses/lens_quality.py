"""How near lenses come to the model's output on text that they were not fitted on, layer by layer, side by side.

Every number is of documents that no fit on this corpus used (`Corpus.held_out`), with the standard error over documents, and
beside the null: one distribution in the place of every reading, the model's mean output over documents that are not held out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from workbench.analyses.early_exit import early_exit
from workbench.analyses.held_out_loss import mean_and_error
from workbench.analyses.lens import PRECISIONS, layer_of, sites_read
from workbench.analyses.lens_reading import read_states
from workbench.artifacts import read_tables, write_tables
from workbench.corpus.corpus import ORDINARY, Corpus
from workbench.errors import TooFewTokens, UnknownOption
from workbench.lenses.divergence import Teacher
from workbench.lenses.lens import Lens
from workbench.model import LanguageModel
from workbench.results import Result, versions, wrapped
from workbench.streaming.batches import Tokens
from workbench.streaming.stream import stream
from workbench.tokens import token_bytes

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

KIND = "lens_quality"
TOKENS = 4096
AT_ONCE = 256
"""Tokens whose whole output distributions are in memory at once."""
STRATA = ("all", "ordinary")
NULL_TOKENS = 4096
"""Tokens over which the mean output is taken."""
FEW_DOCUMENTS = 10


@dataclass(frozen=True, eq=False, repr=False)
class LensQuality(Result):
    """`table` has a row a lens, site and kind of tokens (`all`, or `ordinary`: no first positions, special or massive tokens):
    lens, site, layer, tokens, n, kl_to_final_nats and kl_error, bits_per_byte (of the text's next tokens), agreement,
    precision_1, precision_5, precision_10, entropy_nats, surprisal_nats; gain_nats, gain_error: how much nearer than the
    first lens it is, in KL, of the same tokens; over_null_nats, over_null_error: how much nearer than the null. Errors are
    standard errors over documents.

    `null` has a row a kind of tokens: n, kl_to_final_nats, bits_per_byte, agreement, precision_5, precision_10 of the mean
    output in the place of every reading.

    `exits` and `saved` say what stopping early would save, of all tokens: see `workbench.analyses.early_exit`. None, if not
    all states were read.
    """

    null: pd.DataFrame
    exits: pd.DataFrame | None
    saved: pd.DataFrame | None

    def not_nearer(self, tokens: str = "ordinary") -> dict[str, list[int]]:
        """By lens, the layers where it is not nearer to the output than the first lens, by two standard errors."""
        own = self.table[(self.table["tokens"] == tokens) & (self.table["site"] != self.settings["sites"][-1])]
        first = own["lens"].iloc[0]
        worse = own[(own["lens"] != first) & ~(own["gain_nats"] > 2 * own["gain_error"])]
        return {name: worse[worse["lens"] == name]["layer"].tolist() for name in own["lens"].unique() if name != first}

    def plot(self, tokens: str = "ordinary") -> go.Figure:
        """KL, agreement and bits per byte by layer, a line a lens, the null dashed; and agreement against blocks run."""
        from workbench.plots.lens_quality import plot_lens_quality

        return plot_lens_quality(self, tokens)

    def save(self, folder: str | Path) -> Path:
        """Write lens_quality.parquet, null.parquet, exits.parquet, saved.parquet and, last, run.json.

        Raises:
            CannotWrite: if the folder cannot be written.
        """
        tables = {KIND: self.table, "null": self.null, "exits": self.exits, "saved": self.saved}
        return write_tables(folder, KIND, self.settings, tables)

    @classmethod
    def load(cls, folder: str | Path) -> LensQuality:
        """Read what `save` wrote.

        Raises:
            BadArtifact: if the folder holds no such result, or a damaged one.
        """
        table, others, settings = read_tables(folder, KIND, "workbench lens-quality", ("null", "exits", "saved"))
        null = others["null"]
        assert null is not None
        return cls(table=table, settings=settings, null=null, exits=others["exits"], saved=others["saved"])

    def __str__(self) -> str:
        own = self.settings
        lines = [f"Lenses of {own['model']} on {own['held_out_tokens']:,} held-out tokens of {own['corpus']}"]
        if own["held_out_documents"] < FEW_DOCUMENTS:
            lines.append(f"(of {own['held_out_documents']} documents: errors over so few are rough; read more tokens)")
        kl = self.table[self.table["tokens"] == "ordinary"].pivot(index="site", columns="lens", values="kl_to_final_nats")
        told = kl.loc[own["sites"], own["lenses"]].round(3).to_string(max_rows=20)
        lines += ["KL(output || lens), nats, ordinary tokens:", told]
        null = self.null.set_index("tokens")["kl_to_final_nats"]
        lines.append(f"null (the mean output in the place of every reading): {null['ordinary']:.3f}")
        for name, held_out in own["fitted_beside"].items():
            if held_out is not True:
                what = "on all documents" if held_out is False else "on text that is not known here"
                lines.append(f"{name}: fitted {what}, the held-out ones perhaps among it")
        ordinary = self.table[self.table["tokens"] == "ordinary"]
        for name, one in ordinary.groupby("lens", sort=False):
            behind = one[~(one["over_null_nats"] > 2 * one["over_null_error"])]["layer"].tolist()
            lines.append(f"{name}: no nearer than the null at {len(behind)} of {len(one)} sites")
        for name, layers in self.not_nearer().items():
            where = f"not nearer than {own['lenses'][0]} at layers {', '.join(map(str, layers))}" if layers else (
                f"nearer than {own['lenses'][0]} at every layer")  # fmt: skip
            lines.append(f"{name}: {where} (by two standard errors)")
        if self.saved is not None:
            lines += ["blocks saved at a wanted agreement (all tokens), on the half of the documents that did not choose:"]
            lines += [self.saved.round(3).to_string(index=False)]
            lines += [
                wrapped(f"One reading costs as much as {own['reading_in_blocks']:.1f} blocks, and the rule takes one a block.")
            ]
        return "\n".join([*lines, "  .table .null .exits .saved .not_nearer() .plot() .save(folder)"])


def lens_quality(
    model: LanguageModel,
    corpus: Corpus | Any,
    lenses: Sequence[Lens] | Mapping[str, Lens],
    *,
    layers: str | None = None,
    sites: str | Sequence[str] | None = None,
    max_tokens: int = TOKENS,
    batch_tokens: int | None = None,
    progress: bool = True,
) -> LensQuality:
    """Read every state of held-out text through several lenses.

    Args:
        corpus: Only every tenth document is read, which no fit of a lens on this corpus uses.
        lenses: By name, or by their kind; the first is what the others are measured against, as the logit lens.
        layers, sites: As `lens`; all states, if both are None.
        max_tokens: Of the held-out documents, whatever `max_tokens` the corpus has.
    Raises:
        UnknownOption: if there is no lens, or two of one name.
        OtherJob, NotComparable: if one is of another model, or has no map from a layer.
        TooFewTokens: if no token is ordinary.
        BadCorpus, UnknownOption, NotFinite, OutOfMemory: as `stream`.
    """
    import pandas as pd

    named = _named(lenses)
    for one in named.values():
        one.require_model(model)
    whole = layers is None and sites is None
    sites = sites_read(model, layers, sites)
    given = corpus if isinstance(corpus, Corpus) else Corpus(corpus)
    texts = given.held_out(max_tokens)
    null = _mean_outputs(model, given.training().upto(NULL_TOKENS), sites[-1], batch_tokens)
    flow = stream(model, texts, sites, batch_tokens=batch_tokens, progress=progress)
    seen: dict[str, list[dict[str, Any]]] = {name: [] for name in named}
    about: list[dict[str, Any]] = []
    with torch.no_grad():
        for batch in flow:
            following = _following(batch.tokens)
            states = [batch[site] for site in sites]
            for name, lens in named.items():
                found = read_states(model, lens, states, sites, torch.from_numpy(following), 2)
                first, second = found.top_probabilities.unbind(-1)
                seen[name].append(
                    {
                        "kl": found.kl, "entropy": found.entropy, "rank": found.final_rank, "surprisal": found.surprisal,
                        "loss": -found.target_log_probability, "agrees": found.agrees, "margin": first - second,
                        "best": found.top_ids[:, -1, 0],
                    }
                )  # fmt: skip
            ordinary = torch.from_numpy(batch.tokens.stratum == ORDINARY)
            about.append({"following": following, "ordinary": ordinary, "pos": batch.tokens.pos,
                          "null": _from_null(model, states[-1], null), "document": batch.tokens.document})  # fmt: skip
    tokens = _joined(about)
    read = {name: _joined(parts) for name, parts in seen.items()}
    if not tokens["ordinary"].any():
        raise TooFewTokens("No held-out token is ordinary. Take longer documents.")
    sizes = np.array(token_bytes(model.tokenizer, model.d_vocab))
    table = [
        row
        for strata in STRATA
        for name, own in read.items()
        for row in _rows(name, own, next(iter(read.values())), tokens, strata, sites, sizes)
    ]
    exits = saved = None
    if whole:
        curves = {name: early_exit(own["margin"][:, 1:], own["agrees"][:, 1:], tokens["pos"], tokens["document"])
                  for name, own in read.items()}  # fmt: skip
        exits, saved = (pd.concat([pair[i].assign(lens=name) for name, pair in curves.items()]) for i in (0, 1))
    best = next(iter(read.values()))["best"]
    provenance = model.provenance
    settings = provenance | texts.settings | {
        "lenses": list(named), "sites": sites, "held_out_tokens": len(tokens["pos"]),
        "held_out_documents": len(np.unique(tokens["document"])), "reading_in_blocks": _reading_in_blocks(model),
        "null_tokens": NULL_TOKENS, "fitted_beside": {name: _fitted_beside(one, given) for name, one in named.items()},
        "tokens_hash": flow.counted.count.tokens_hash, "versions": versions(),
        "lens_settings": {name: {key: value for key, value in one.settings.items() if key not in provenance}
                          for name, one in named.items()},
    }  # fmt: skip
    of_null = [_null(tokens, null[i].cpu().numpy(), i, best, sizes) for i in range(len(STRATA))]
    return LensQuality(table=pd.DataFrame(table), settings=settings, null=pd.DataFrame(of_null), exits=exits, saved=saved)


def _named(lenses: Sequence[Lens] | Mapping[str, Lens]) -> dict[str, Lens]:
    found = dict(lenses) if isinstance(lenses, Mapping) else {one.kind: one for one in lenses}
    if not found or len(found) < len(lenses):
        raise UnknownOption(
            f"{len(lenses)} lenses were given, of {len(found)} kinds. Give one or more, each by a name of its own."
        )
    return found


def _following(tokens: Tokens) -> np.ndarray:
    """The next token of each token's document in its row; -1 where there is none."""
    goes_on = (tokens.row[1:] == tokens.row[:-1]) & (tokens.document[1:] == tokens.document[:-1])
    return np.append(np.where(goes_on, tokens.token_id[1:], -1), -1).astype(np.int64)


def _fitted_beside(lens: Lens, corpus: Corpus) -> bool | None:
    """Whether its fit left the held-out documents of this corpus out; None if it is not known."""
    if lens.kind == "logit":
        return True
    same = lens.settings.get("corpus") == corpus.source.name
    return {"training": True, "all": False}.get(lens.settings.get("side", "")) if same else None


def _mean_outputs(model: LanguageModel, corpus: Corpus, last: str, batch_tokens: int | None) -> Tensor:
    """The mean of the model's distributions over all tokens, and over ordinary ones, `[strata, d_vocab]`, float64."""
    sums = torch.zeros(2, model.d_vocab, dtype=torch.float64, device=model.vocabulary.W_U.device)
    for batch in stream(model, corpus, [last], batch_tokens=batch_tokens, progress=False):
        ordinary = torch.from_numpy(batch.tokens.stratum == ORDINARY)
        for part, own in zip(batch[last].split(AT_ONCE), ordinary.split(AT_ONCE), strict=True):
            p = Teacher(model.vocabulary, part).probabilities
            sums += torch.stack([p.sum(0), p[own.to(p.device)].sum(0)])
    return (sums / sums.sum(1, keepdim=True)).clamp_min(1e-30)


def _from_null(model: LanguageModel, final: Tensor, null: Tensor) -> np.ndarray:
    """KL(output || null) of each token, for the mean of all tokens and of ordinary ones, `[token, strata]`."""
    found = []
    for part in final.split(AT_ONCE):
        teacher = Teacher(model.vocabulary, part)
        cross = -(teacher.probabilities @ null.log().T.to(teacher.probabilities.dtype)).double()
        found.append((cross - teacher.entropy[:, None]).cpu().numpy())
    return np.concatenate(found)


def _joined(parts: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    return {name: np.concatenate([np.asarray(part[name]) for part in parts]) for name in parts[0]}


def _rows(
    name: str, own: dict[str, np.ndarray], first: dict[str, np.ndarray], tokens: dict[str, np.ndarray], strata: str,
    sites: Sequence[str], sizes: np.ndarray,
) -> list[dict[str, Any]]:  # fmt: skip
    counted = tokens["ordinary"] if strata == "ordinary" else np.ones(len(tokens["pos"]), bool)
    followed = counted & (tokens["following"] >= 0)
    in_bytes = math.log(2) * sizes[tokens["following"][followed]].sum()
    rows = []
    for i, site in enumerate(sites):
        kl, kl_error = mean_and_error(own["kl"][counted, i].astype(float), tokens["document"][counted])
        over, over_error = mean_and_error(
            (tokens["null"][:, STRATA.index(strata)] - own["kl"][:, i])[counted], tokens["document"][counted]
        )
        gain, gain_error = mean_and_error((first["kl"] - own["kl"])[counted, i].astype(float), tokens["document"][counted])
        rows.append(
            {
                "lens": name, "site": site, "layer": layer_of(site), "tokens": strata, "n": int(counted.sum()),
                "kl_to_final_nats": kl, "kl_error": kl_error,
                "bits_per_byte": float(own["loss"][followed, i].sum(dtype=float) / in_bytes),
                "agreement": float(own["agrees"][counted, i].mean()),
            }
            | {f"precision_{k}": float((own["rank"][counted, i] < k).mean()) for k in PRECISIONS}
            | {
                "entropy_nats": float(own["entropy"][counted, i].mean()),
                "surprisal_nats": float(own["surprisal"][counted, i].mean()), "gain_nats": gain, "gain_error": gain_error,
                "over_null_nats": over, "over_null_error": over_error,
            }
        )  # fmt: skip
    return rows


def _null(
    tokens: dict[str, np.ndarray], p: np.ndarray, strata: int, best: np.ndarray, sizes: np.ndarray
) -> dict[str, Any]:  # fmt: skip
    counted = tokens["ordinary"] if STRATA[strata] == "ordinary" else np.ones(len(tokens["pos"]), bool)
    followed = tokens["following"][counted & (tokens["following"] >= 0)]
    rank = np.argsort(np.argsort(-p, kind="stable"), kind="stable")[best[counted]]
    kl, error = mean_and_error(tokens["null"][counted, strata], tokens["document"][counted])
    return {
        "tokens": STRATA[strata], "n": int(counted.sum()), "kl_to_final_nats": kl, "kl_error": error,
        "bits_per_byte": float(-np.log(p[followed]).sum() / (math.log(2) * sizes[followed].sum())),
        "agreement": float((rank < 1).mean()), "precision_5": float((rank < 5).mean()),
        "precision_10": float((rank < 10).mean()),
    }  # fmt: skip


def _reading_in_blocks(model: LanguageModel) -> float:
    """Weights that a reading multiplies by, over those of a block."""
    block = sum(weight.numel() for weight in model.block(0).parameters())
    return model.vocabulary.W_U.numel() / block
