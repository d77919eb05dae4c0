"""Sites: the named places of a model where a tensor can be read. Pure values, spelled as in TransformerLens."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from workbench.errors import LayerOutOfRange, UnknownSite

MEANINGS = {
    "embed": "token embedding, as the embedding module gives it",
    "resid_pre": "residual stream entering a block",
    "resid_mid": "residual stream between attention and MLP",
    "resid_post": "residual stream leaving a block (the last one: before the final norm)",
    "attn_out": "what attention adds to the stream (after a post-norm or residual multiplier)",
    "mlp_out": "what the MLP adds to the stream (after a post-norm or residual multiplier)",
    "q": "queries as projected, before query norms and rotation",
    "k": "keys as projected, before key norms and rotation",
    "v": "values",
    "z": "attention-weighted values per head, the input of the output projection",
    "mlp_pre": "input of the nonlinearity (the gate's output in a gated MLP)",
    "mlp_up": "output of the up projection of a gated MLP",
    "mlp_post": "the neurons: input of the down projection",
    "ln_final": "output of the final norm",
}
"""Every site and what it is."""

WITHOUT_LAYER = frozenset({"embed", "ln_final"})
"""Sites of the model as a whole."""

_TRANSFORMER_LENS = {
    "attn.hook_q": "q", "attn.hook_k": "k", "attn.hook_v": "v", "attn.hook_z": "z",
    "mlp.hook_pre": "mlp_pre", "mlp.hook_pre_linear": "mlp_up", "mlp.hook_post": "mlp_post",
    "hook_resid_pre": "resid_pre", "hook_resid_mid": "resid_mid", "hook_resid_post": "resid_post",
    "hook_attn_out": "attn_out", "hook_mlp_out": "mlp_out",
}  # fmt: skip
_TRANSFORMER_LENS_WHOLE = {"hook_embed": "embed", "ln_final.hook_normalized": "ln_final"}
_NNTERP = {
    "layers_input": "resid_pre",
    "layers_output": "resid_post",
    "attentions_output": "attn_out",
    "mlps_output": "mlp_out",
}


@dataclass(frozen=True, order=True)
class Site:
    """One place: a name of `MEANINGS` and a block index (None for sites of the whole model)."""

    name: str
    layer: int | None = None

    def __str__(self) -> str:
        return self.name if self.layer is None else f"{self.name}.{self.layer}"

    @classmethod
    def parse(cls, text: str, n_layers: int) -> "Site":
        """The one site that `text` names.

        Raises:
            UnknownSite, LayerOutOfRange: as `parse_sites`, or if it names several.
        """
        sites = parse_sites([text], n_layers)
        if len(sites) != 1:
            raise UnknownSite(f"Site {text!r} names {len(sites)} sites where one is wanted. Add a layer: '{text}.0'.")
        return sites[0]


def parse_sites(texts: Iterable[str], n_layers: int) -> list[Site]:
    """All sites that the strings name, in the order given, each once.

    Accepts `resid_post.10`, half-open ranges `resid_post.4:8`, all layers `resid_post`, layers from the end
    `resid_post.-1`, TransformerLens names (`blocks.10.hook_resid_post`) and nnterp names (`layers_output[10]`).

    Raises:
        UnknownSite: for a name that is none of these.
        LayerOutOfRange: for a layer that the model does not have.
    """
    return list(dict.fromkeys(site for text in texts for site in _parse(text, n_layers)))


def parse_layers(text: str | None, n_layers: int) -> list[int]:
    """Block indices named by `7`, `-1`, `4:8`, `:3` or a comma-separated list of these; all, if None.

    Raises:
        LayerOutOfRange: if one is not in the model, or the range is empty.
    """
    if text is None:
        return list(range(n_layers))
    layers: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(-?\d+)?(:)?(-?\d+)?\s*", part)
        if not match or not part.strip() or (match[3] and not match[2]):
            raise LayerOutOfRange(f"Layers {text!r} are not understood. Write 7, -1, 4:8 (half-open) or 0,5,10:12.")
        if match[2]:
            bounds = (int(g) if g else default for g, default in ((match[1], 0), (match[3], n_layers)))
            start, stop = (bound + n_layers if bound < 0 else bound for bound in bounds)
        else:
            start = int(match[1]) + n_layers * (int(match[1]) < 0)
            stop = start + 1
        if not 0 <= start < stop <= n_layers:
            raise LayerOutOfRange(
                f"Layers {part.strip()!r} do not lie in this model of {n_layers} layers; "
                f"they go from 0 to {n_layers - 1}, or from -{n_layers} to -1 counted from the end."
            )
        layers += range(start, stop)
    return sorted(set(layers))


def _parse(text: str, n_layers: int) -> list[Site]:
    name, layers = _split(text.strip())
    if name not in MEANINGS:
        raise UnknownSite(f"Site {text!r} does not exist. Sites are {', '.join(MEANINGS)}; write e.g. 'resid_post.10'.")
    if name in WITHOUT_LAYER:
        if layers is not None:
            raise UnknownSite(f"Site {text!r} does not exist: {name!r} belongs to the whole model. Write {name!r}.")
        return [Site(name)]
    return [Site(name, layer) for layer in parse_layers(layers, n_layers)]


def _split(text: str) -> tuple[str, str | None]:
    """Name and layers of a site in any of the three spellings."""
    if text in _TRANSFORMER_LENS_WHOLE:
        return _TRANSFORMER_LENS_WHOLE[text], None
    if match := re.fullmatch(r"blocks\.(\d+)\.(.+)", text):
        return _TRANSFORMER_LENS.get(match[2], text), match[1]
    if match := re.fullmatch(r"(\w+)\[(-?\d+)\]", text):
        return _NNTERP.get(match[1], text), match[2]
    name, dot, layers = text.partition(".")
    return name, layers if dot else None
