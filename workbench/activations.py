"""What was captured: tensors by site, with the tokens they belong to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from workbench.errors import UnknownOption, WorkbenchError
from workbench.model import Batch, LanguageModel
from workbench.sites import SITES, Site, ranges
from workbench.tokens import shown

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go
    from transformer_lens import ActivationCache  # pyright: ignore[reportMissingModuleSource]

PAIRS = ("attn_scores", "pattern")
"""Sites of `[batch, heads, pos, key_pos]`: a token's row is the third axis."""

MASSIVE = 10.0
"""A state is called massive from this many times the median norm of its site on (Sun et al. 2024, arXiv 2402.17762)."""


@dataclass(frozen=True, eq=False, repr=False)
class Activations(Mapping[str, Tensor]):
    """`acts["resid_post.3"]` is a tensor whose first axes are batch and pos; sites in any spelling that `capture` takes.

    Raw modules are found by their path. With `positions` the pos axis has the chosen tokens alone.
    """

    model: LanguageModel
    tensors: dict[str, Tensor]
    """By the canonical name of the site, or the path of the module."""
    tokens: Tensor
    """Token ids `[batch, pos]`, all of them, whatever positions were kept."""
    mask: Tensor
    """Which of them are real, `[batch, pos]`."""
    positions: Tensor | None = None
    """Columns of `tokens` that were kept, `[batch, kept]`; None: all."""
    logits: Tensor | None = None
    """The model's own, `[batch, pos, d_vocab]`, if they were asked for."""

    def __getitem__(self, site: str) -> Tensor:
        """
        Raises:
            KeyError: if it was not captured; the text names what was.
        """
        name = self._name(site)
        if name not in self.tensors:
            raise KeyError(f"{site} was not captured; captured: {', '.join(self.tensors)}")
        return self.tensors[name]

    def __contains__(self, site: object) -> bool:
        return self._name(str(site)) in self.tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    def __repr__(self) -> str:
        """A tree: each site with its layers, the shape and dtype of a layer's tensor, and the bytes of all of them."""
        groups: dict[tuple[str, str, str], list[tuple[str, int]]] = {}
        for name, value in self.tensors.items():
            site, _, layer = name.rpartition(".")
            kind, layer = (site, layer) if site in SITES else (name, "")
            key = (kind, " x ".join(map(str, value.shape)), str(value.dtype).removeprefix("torch."))
            groups.setdefault(key, []).append((layer, value.nbytes))
        rows = [
            (kind, ranges([int(layer) for layer, _ in of if layer]), shape, dtype, _bytes(sum(size for _, size in of)))
            for (kind, shape, dtype), of in groups.items()
        ]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)] if rows else []
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        batch, pos = self.tokens.shape
        total = _bytes(sum(value.nbytes for value in self.tensors.values()))
        head = f"Activations of {self.model.name}: {batch} x {pos} tokens, {len(self)} tensors, {total}"
        return "\n".join([head, *(f"├ {line}" for line in lines[:-1]), *(f"└ {line}" for line in lines[-1:])])

    def to_dataframe(self) -> pd.DataFrame:
        """One row a kept real token and site: columns site, name, layer, row, pos, token_id, token, norm, and massive.

        norm is the length of all of the site's entries at the token; massive: it is over 10 times the site's median.
        """
        import pandas as pd

        real, columns = self.kept_mask, self._columns()
        rows, order = real.nonzero(as_tuple=True)
        at = columns[rows, order]
        ids = self.tokens[rows, at].tolist()
        strings = self.model.token_strings
        frames = []
        for name, value in self._by_token().items():
            norms = value.float().flatten(2).norm(dim=-1)[rows, order]
            site, _, layer = name.rpartition(".")
            has_layer = site in SITES
            frames.append(
                pd.DataFrame(
                    {
                        "site": name, "name": site if has_layer else name, "layer": int(layer) if has_layer else None,
                        "row": rows.tolist(), "pos": at.tolist(), "token_id": ids, "token": [strings[i] for i in ids],
                        "norm": norms.tolist(), "massive": (norms > MASSIVE * norms.median()).tolist(),
                    }
                ).astype({"layer": "Int64"})
            )  # fmt: skip
        return pd.concat(frames, ignore_index=True)

    def norms(self) -> pd.DataFrame:
        """Lengths by site: columns site, name, layer, tokens, median, maximum, massive (how many tokens), and at (the
        token of the maximum, as `row:pos token`)."""
        import pandas as pd

        rows = []
        for site, own in self.to_dataframe().groupby("site", sort=False):
            top = own.loc[own["norm"].idxmax()]
            rows.append(
                {
                    "site": site, "name": top["name"], "layer": top["layer"], "tokens": len(own),
                    "median": own["norm"].median(), "maximum": top["norm"], "massive": int(own["massive"].sum()),
                    "at": f"{top['row']}:{top['pos']} {shown(top['token'])}",
                }
            )  # fmt: skip
        return pd.DataFrame(rows).astype({"layer": "Int64"})

    def plot_norms(self) -> go.Figure:
        """The length of every token's tensor, layer by layer: massive activations and sink tokens stand out."""
        from workbench.plots.activations import plot_norms

        return plot_norms(self)

    def plot_pattern(self, layer: int, *, row: int = 0, heads: list[int] | None = None) -> go.Figure:
        """Attention patterns of a layer's heads for one text, a picture each.

        Raises:
            UnknownOption: if the pattern of the layer was not captured, or there is no such row or head.
        """
        from workbench.plots.activations import plot_pattern

        if f"pattern.{layer}" not in self:
            raise UnknownOption(f"The pattern of layer {layer} was not captured. Capture 'pattern.{layer}', all positions.")
        if not 0 <= row < len(self.tokens):
            raise UnknownOption(f"row={row} does not exist: {len(self.tokens)} texts were captured, counted from 0.")
        n_heads = self[f"pattern.{layer}"].shape[1]
        if wrong := [head for head in heads or [] if not 0 <= head < n_heads]:
            raise UnknownOption(f"Head {wrong[0]} does not exist: layer {layer} has {n_heads}, counted from 0.")
        return plot_pattern(self, layer, row, list(range(n_heads)) if heads is None else heads)

    def gradients(self, of: Tensor) -> Activations:
        """Derivatives of a number, computed from `logits` or from the tensors here, with respect to every site.

        Args:
            of: A scalar. The capture must have been made with `gradients=True`.
        Raises:
            UnknownOption: if the number does not depend on what was captured.
        """
        names = list(self.tensors)
        if of.dim() or not of.requires_grad:
            raise UnknownOption(
                "A gradient is taken of one number that depends on what was captured: capture with gradients=True, and "
                "compute the number from acts.logits or acts[site]."
            )
        found = torch.autograd.grad(of, [self.tensors[name] for name in names], retain_graph=True, allow_unused=True)
        filled = (torch.zeros_like(self.tensors[n]) if g is None else g for n, g in zip(names, found, strict=True))
        return Activations(
            self.model, dict(zip(names, (g.detach() for g in filled), strict=True)), self.tokens, self.mask, self.positions
        )

    def to_transformer_lens(self) -> ActivationCache:
        """A `transformer_lens.ActivationCache` of the same tensors (not copies), by TransformerLens's names.

        Left out: `router_logits`, which has no name there, and raw modules. With `positions` the pos axis has the chosen
        tokens alone. TransformerLens means other tensors by `hook_embed` in BLOOM (after a norm), and by
        `hook_attn_scores` in GPT-Neo, GPT-J and Llama 4 (the pattern).

        The cache's methods work where what they ask for was captured: `cache["resid_post", 3]`, `accumulated_resid`,
        `decompose_resid`, `stack_activation`, `stack_head_results`, `get_neuron_results`, `stack_neuron_results`. No site
        holds the scale of a norm, a position embedding or a sum of biases: so `logit_attrs`, and `apply_ln=True` of all but
        `accumulated_resid` to the end, find no `hook_scale`; `decompose_resid` lacks `pos_embed` where there is one; and
        `get_full_resid_decomposition` needs a bridge to ask, `cache.model = bridge`.

        Raises:
            MissingPackage: if TransformerLens is not installed.
        """
        from workbench.interop.transformer_lens import cache_of

        return cache_of(self)

    @property
    def batch(self) -> Batch:
        """Tokens and mask, to capture or patch the same texts again."""
        return Batch(self.tokens, self.mask)

    @property
    def kept_mask(self) -> Tensor:
        """Which of the kept tokens are real, `[batch, kept]`."""
        return self._kept(self.mask)

    def _name(self, site: str) -> str:
        if site in self.tensors:
            return site
        try:
            return str(Site.parse(site, self.model.n_layers))
        except WorkbenchError:
            return site

    def _columns(self) -> Tensor:
        """Columns of `tokens` that the pos axis stands for, `[batch, kept]`."""
        if self.positions is not None:
            return self.positions
        return torch.arange(self.tokens.shape[1], device=self.tokens.device).expand_as(self.tokens)

    def _kept(self, by_token: Tensor) -> Tensor:
        return by_token.gather(1, self._columns())

    def _by_token(self) -> dict[str, Tensor]:
        """The tensors with batch and pos in front."""
        return {name: value.transpose(1, 2) if holds_pairs(name) else value for name, value in self.tensors.items()}


def holds_pairs(site: str) -> bool:
    """Whether a site, by its canonical name, is one of `PAIRS`."""
    return site.split(".")[0] in PAIRS


def _bytes(n: int) -> str:
    for unit in ("B", "kB", "MB"):
        if n < 1000:
            return f"{n:.0f} {unit}"
        n = round(n / 1000)
    return f"{n} GB"
