"""Which activations carry the difference between two prompts: each is put from one run into the other, one at a time.

Source: Meng et al. 2022 (causal tracing, arXiv 2202.05262) and Wang et al. 2023 (arXiv 2211.00593), whose logit difference is
the metric: unlike a probability it is linear in what the parts write, and it cannot be moved by what both answers share. We
use another prompt in place of noise, which would take the model where no text takes it (Zhang & Nanda 2024, arXiv 2309.16042).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from workbench.activations import PAIRS
from workbench.architectures.taps import READ_ONLY, why_not
from workbench.capturing import capture, keeping
from workbench.errors import LengthMismatch, UnknownOption, UnknownSite
from workbench.model import Batch, LanguageModel
from workbench.results import Result, versions
from workbench.sites import Site, parse_layers, parse_sites
from workbench.tokens import shown
from workbench.tracer import edited, is_hooked, starting_at

if TYPE_CHECKING:
    import plotly.graph_objects as go

BY_HEAD = ("z", "q", "k", "v")
"""Kinds of sites that are patched head by head, at all positions or those asked for; the others position by position."""


@dataclass(frozen=True, eq=False, repr=False)
class Patching(Result):
    """One row a patch. Columns: site (its kind), layer, pos and token (of the corrupted
    prompt; missing and empty where heads are patched), head
    (missing: all of it), logit_difference (of the corrupted run with this patch), restored (0: as corrupted, 1: as clean)."""

    def top(self, n: int = 10) -> Any:
        """The patches that restore most."""
        return self.table.nlargest(n, "restored").reset_index(drop=True)

    def plot(self) -> go.Figure:
        """What is restored, layers x positions (or heads), a picture for each kind of site."""
        from workbench.plots.activation_patching import plot_patching

        return plot_patching(self)

    def __str__(self) -> str:
        own = self.settings
        lines = [
            f"Patching of {own['model']}: {own['clean']!r} into {own['corrupted']!r}",
            f"  logit({shown(own['target'])}) - logit({shown(own['versus'])}): clean {own['clean_difference']:+.2f}, corrupted "
            f"{own['corrupted_difference']:+.2f}",
            "  site             position or head  restored",
        ]
        best = [self.table[self.table["site"] == kind].nlargest(4, "restored") for kind in own["sites"]]
        for row in (row for kind in best for row in kind.to_dict("records")):
            place = f"{row['pos']} {shown(row['token'])}" if row["token"] else f"head {row['head']}"
            lines.append(f"  {row['site'] + '.' + str(row['layer']):<17}{place:<18}{row['restored']:8.2f}")
        return "\n".join([*lines, "  .table .top(20) .plot()"])


@torch.no_grad()
def activation_patching(
    model: LanguageModel,
    clean: str,
    corrupted: str,
    target: int | str | None = None,
    versus: int | str | None = None,
    *,
    sites: str | Sequence[str] = ("resid_pre", "attn_out", "mlp_out"),
    layers: str | None = None,
    positions: Sequence[int] | None = None,
    rows: int = 16,
    progress: bool = True,
) -> Patching:
    """Put each activation of the clean run into the corrupted one, and see how much of the logit difference comes back.

    Exchange the prompts to see what is lost instead (noising): the two need not agree where parts stand in for each other.

    Args:
        clean, corrupted: Prompts of equally many tokens.
        target, versus: The two answers, token ids or strings that are one token; the first prompt's likeliest next token
            and the second's, if not given.
        sites: Kinds of sites. `resid_pre attn_out mlp_out mlp_post …` are patched position by position, `z q k v` head by
            head at all positions. Layers that lack one are left out.
        layers: `7`, `4:8`, `0,5,10:12`; all, if None.
        positions: Which, negative from the end; all, if None. Heads are patched at all of them together.
        rows: Patches that run side by side in one batch.
    Raises:
        LengthMismatch: if the prompts differ in their number of tokens.
        UnknownOption: if the prompts give the same logit difference, or a position does not exist.
        UnknownSite: if no layer has a site, or its kind cannot be patched so.
    """
    import pandas as pd

    if rows < 1:
        raise UnknownOption(f"rows={rows} is out of range: at least 1.")
    batches = [model.tokenize(text) for text in (clean, corrupted)]
    n_clean, n_pos = (batch.tokens.shape[1] for batch in batches)
    if n_clean != n_pos:
        raise LengthMismatch(
            f"The clean prompt has {n_clean} tokens and the corrupted one {n_pos}, so their positions do not correspond. Use "
            "prompts of equal length (exchange single-token words), or wb.patch with positions of your own."
        )
    at = _positions(positions, n_pos)
    clean_tokens, tokens = ([model.token_strings[i] for i in batch.tokens[0].tolist()] for batch in batches)
    wanted = _sites(model, [sites] if isinstance(sites, str) else sites, layers)
    source = capture(model, batches[0], [str(site) for site in wanted])
    states = torch.cat([capture(model, batch, "resid_post.-1", positions="last")["resid_post.-1"][:, 0] for batch in batches])
    answers = _answers(model, target, versus, model.vocabulary.logits(states).argmax(1).tolist())
    ends = _differences(model, states, answers).tolist()
    if abs(ends[0] - ends[1]) <= 1e-3 * max(map(abs, ends)):
        raise UnknownOption(
            f"Both prompts give the same logit difference, {ends[0]:+.3f}: there is nothing to restore. Choose answers, or a "
            "corrupted prompt, that differ."
        )
    streams = _streams(model, batches[1], wanted)
    found = []
    for site in tqdm(wanted, desc="patch", unit="site", disable=not progress):
        value = source[str(site)][0]
        by_head = site.name in BY_HEAD
        units = list(range(value.shape[1])) if by_head else at
        for start in range(0, len(units), rows):
            some = units[start : start + rows]
            heads = torch.tensor(some) if by_head else None
            differences = _patched(model, batches[1], streams, site, value, at if by_head else some, heads, answers)
            for unit, difference in zip(some, differences.tolist(), strict=True):
                pos, token, head = (None, "", unit) if by_head else (unit, tokens[unit], None)
                found.append((site.name, site.layer, pos, token, head, difference))
    columns = ["site", "layer", "pos", "token", "head", "logit_difference"]
    table = pd.DataFrame(found, columns=columns).astype({"pos": "Int64", "head": "Int64"})
    table["restored"] = (table["logit_difference"] - ends[1]) / (ends[0] - ends[1])
    settings = model.provenance | {
        "clean": clean, "corrupted": corrupted, "target": model.token_strings[answers[0]],
        "versus": model.token_strings[answers[1]], "answer_ids": list(answers), "positions": at,
        "clean_difference": ends[0], "corrupted_difference": ends[1],
        "sites": list(dict.fromkeys(table["site"])), "tokens": tokens, "clean_tokens": clean_tokens, "versions": versions(),
    }  # fmt: skip
    return Patching(table, settings)


def _patched(
    model: LanguageModel,
    corrupted: Batch,
    streams: dict[int, Tensor],
    site: Site,
    clean: Tensor,
    positions: list[int],
    heads: Tensor | None,
    answers: tuple[int, int],
) -> Tensor:
    """Logit differences of the corrupted prompt, a row for each position (or each head, at all the positions) that is taken
    from the clean run."""
    n_rows = len(positions) if heads is None else len(heads)
    rows = torch.arange(n_rows)

    def put(value: Tensor) -> Tensor:
        value = value.clone()
        if heads is None:
            value[rows, positions] = clean[positions].to(value)
        else:
            value[rows[:, None], torch.tensor(positions), heads[:, None]] = clean[positions][:, heads].transpose(0, 1).to(value)
        return value

    last = Site("resid_post", model.n_layers - 1)
    batch = Batch(*(part.expand(n_rows, -1).contiguous() for part in corrupted))
    stream = streams.get(site.layer or 0)
    begun = nullcontext() if stream is None else starting_at(model, site.layer or 0, stream.expand(n_rows, -1, -1))
    with begun, edited(model, {site: put}), keeping(model, [last]) as kept:
        model.forward(batch)
    return _differences(model, kept[last][:, -1], answers)


def _streams(model: LanguageModel, corrupted: Batch, sites: Sequence[Site]) -> dict[int, Tensor]:
    """What enters the blocks that are patched: nothing is patched before these. None where the model is edited already: those
    edits may be before them."""
    if is_hooked(model):
        return {}
    acts = capture(model, corrupted, [f"resid_pre.{layer}" for layer in sorted({site.layer or 0 for site in sites})])
    return {int(name.rpartition(".")[2]): acts[name] for name in acts}


def _differences(model: LanguageModel, states: Tensor, answers: tuple[int, int]) -> Tensor:
    logits = model.vocabulary.logits(states)
    return logits[:, answers[0]] - logits[:, answers[1]]


def _answers(model: LanguageModel, target: int | str | None, versus: int | str | None, likeliest: list[int]) -> tuple[int, int]:
    """
    Raises:
        UnknownToken: if one is no token.
        UnknownOption: if they are the same one.
    """
    first, second = (
        default if given is None else model.token_id(given) for given, default in zip((target, versus), likeliest, strict=True)
    )
    if first == second:
        raise UnknownOption(
            f"The two answers are the same token, {model.token_strings[first]!r} (not given, each prompt's likeliest next "
            "token is taken). Name target and versus."
        )
    return first, second


def _sites(model: LanguageModel, kinds: Sequence[str], layers: str | None) -> list[Site]:
    """
    Raises:
        UnknownSite: if no layer has one of the kinds, or it is not a site of tokens in a layer.
    """
    found: list[Site] = []
    for kind in kinds:
        named = parse_sites([kind], model.n_layers)
        if named[0].layer is None or named[0].name in PAIRS:
            raise UnknownSite(f"Site {kind!r} is not patched layer by layer and position by position here. Use wb.patch.")
        if named[0].name in READ_ONLY:
            raise UnknownSite(f"Site {kind!r} cannot be patched: {READ_ONLY[named[0].name]}.")
        there = [site for site in named if why_not(model.block_row(site.layer or 0), site.name) is None]
        if not there:
            model.tap(named[0])  # says why
        found += there
    chosen = parse_layers(layers, model.n_layers)
    found = [site for site in dict.fromkeys(found) if site.layer in chosen]
    if not found:
        raise UnknownSite(f"No site is left of {', '.join(kinds) or 'none'} in layers {layers!r}. Name at least one.")
    return found


def _positions(asked: Sequence[int] | None, n_pos: int) -> list[int]:
    """
    Raises:
        UnknownOption: if the prompts have no such position.
    """
    if asked is None:
        return list(range(n_pos))
    if not asked:
        raise UnknownOption("An empty list of positions was given. Name at least one, or leave it out for all.")
    for position in asked:
        if not -n_pos <= position < n_pos:
            raise UnknownOption(
                f"Position {position} does not exist: the prompts have {n_pos} tokens, 0 to {n_pos - 1}, or negative from "
                "the end."
            )
    return sorted({position % n_pos for position in asked})
