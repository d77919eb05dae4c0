"""Sites: the named places of a model where a tensor can be read. Pure values, spelled as in TransformerLens."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from workbench.errors import LayerOutOfRange, UnknownSite


class SiteKind(NamedTuple):
    """What a site is, in every model that has it."""

    meaning: str
    shape: str
    """Its axes."""
    transformer_lens: str | None = None
    """Its name there, inside `blocks.{layer}.` if it belongs to a layer."""
    nnterp: str | None = None
    """Its accessor there, indexed by the layer."""


_POS = "batch, pos"
_STREAM, _NEURONS, _PAIRS = f"{_POS}, d_model", f"{_POS}, d_mlp", "batch, heads, pos, key_pos"

SITES = {
    "embed": SiteKind("token embedding, as the embedding module gives it", _STREAM, "hook_embed", "token_embeddings"),
    "resid_pre": SiteKind("residual stream entering a block", _STREAM, "hook_resid_pre", "layers_input"),
    "ln1": SiteKind("output of the norm that attention reads", _STREAM, "ln1.hook_out", "attentions_input"),
    "q": SiteKind("queries as projected, before query norms and rotation", f"{_POS}, heads, d_head", "attn.hook_q"),
    "k": SiteKind("keys as projected, before key norms and rotation", f"{_POS}, kv_heads, d_head", "attn.hook_k"),
    "v": SiteKind("values", f"{_POS}, kv_heads, d_value", "attn.hook_v"),
    "q_rot": SiteKind("queries after norms and rotation", f"{_POS}, heads, d_head", "attn.hook_rot_q"),
    "k_rot": SiteKind("keys after norms and rotation", f"{_POS}, kv_heads, d_head", "attn.hook_rot_k"),
    "attn_scores": SiteKind("attention scores, scaled and masked, before the softmax", _PAIRS, "attn.hook_attn_scores"),
    "pattern": SiteKind("attention weights", _PAIRS, "attn.hook_pattern", "attention_probabilities"),
    "z": SiteKind(
        "attention-weighted values per head, the input of the output projection", f"{_POS}, heads, d_value", "attn.hook_z"
    ),
    "result": SiteKind(
        "what each head adds to the stream (before a post-norm): z W_O head by head",
        f"{_POS}, heads, d_model",
        "attn.hook_result",
    ),
    "attn_out": SiteKind(
        "what attention adds to the stream (after a post-norm or residual multiplier)",
        _STREAM, "hook_attn_out", "attentions_output",
    ),
    "resid_mid": SiteKind("residual stream between attention and MLP", _STREAM, "hook_resid_mid"),
    "ln2": SiteKind(
        "output of the norm that the MLP reads (in parallel blocks with one norm: ln1)", _STREAM, "ln2.hook_out", "mlps_input"
    ),
    "mlp_pre": SiteKind("input of the nonlinearity (the gate's output in a gated MLP)", _NEURONS, "mlp.hook_pre"),
    "mlp_up": SiteKind("output of the up projection of a gated MLP", _NEURONS, "mlp.hook_pre_linear"),
    "mlp_post": SiteKind("the neurons: input of the down projection", _NEURONS, "mlp.hook_post"),
    "router_logits": SiteKind("scores of the experts, before the router chooses", f"{_POS}, n_experts"),
    "mlp_out": SiteKind(
        "what the MLP adds to the stream (after a post-norm or residual multiplier)",
        _STREAM, "hook_mlp_out", "mlps_output",
    ),
    "resid_post": SiteKind(
        "residual stream leaving a block (the last one: before the final norm)", _STREAM, "hook_resid_post", "layers_output"
    ),
    "ln_final": SiteKind("output of the final norm", _STREAM, "ln_final.hook_out"),
}  # fmt: skip
"""Every site, in the order of the forward pass (that of sequential blocks)."""

WITHOUT_LAYER = frozenset({"embed", "ln_final"})
"""Sites of the model as a whole."""

_FROM_TRANSFORMER_LENS = {kind.transformer_lens: name for name, kind in SITES.items()}
for _norm in ("ln1", "ln2", "ln_final"):
    _FROM_TRANSFORMER_LENS[f"{_norm}.hook_normalized"] = _norm  # so in HookedTransformer; a bridge's is before the gain
_FROM_NNTERP = {kind.nnterp: name for name, kind in SITES.items()}


@dataclass(frozen=True, order=True)
class Site:
    """One place: a name of `SITES` and a block index (None for sites of the whole model)."""

    name: str
    layer: int | None = None

    def __str__(self) -> str:
        return self.name if self.layer is None else f"{self.name}.{self.layer}"

    @property
    def transformer_lens(self) -> str | None:
        """Its name in TransformerLens, where it has one: `blocks.10.hook_resid_post`. (Where norms follow attention and MLP, as
        in OLMo 2, its `ln1` and `ln2` are these, and there are no sites of that name here.)"""
        name = SITES[self.name].transformer_lens
        return name if name is None or self.layer is None else f"blocks.{self.layer}.{name}"

    @property
    def nnterp(self) -> str | None:
        """Its accessor in nnterp, where it has one: `layers_output[10]`. (nnterp reads what modules give: where a family has
        post-norms or multipliers its `attentions_output` and `mlps_output` are not what is added to the stream.)"""
        name = SITES[self.name].nnterp
        return name if name is None or self.layer is None else f"{name}[{self.layer}]"

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

    Accepts `resid_post.10`, half-open ranges `resid_post.4:8`, with a step `resid_post.0:30:5`, all layers `resid_post`,
    layers from the end `resid_post.-1`, TransformerLens names (`blocks.10.hook_resid_post`) and nnterp names
    (`layers_output[10]`).

    Raises:
        UnknownSite: for a name that is none of these.
        LayerOutOfRange: for a layer that the model does not have.
    """
    return list(dict.fromkeys(site for text in texts for site in _parse(text, n_layers)))


def parse_layers(text: str | None, n_layers: int) -> list[int]:
    """Block indices named by `7`, `-1`, `4:8`, `:3`, `0:30:5` (every fifth) or a comma-separated list of these; all, if None.

    Raises:
        LayerOutOfRange: if one is not in the model, or the range is empty.
    """
    if text is None:
        return list(range(n_layers))
    layers: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(-?\d+)?(?:(:)(-?\d+)?(?::(0*[1-9]\d*)?)?)?\s*", part)
        if not match or not part.strip():
            raise LayerOutOfRange(
                f"Layers {text!r} are not understood. Write 7, -1, 4:8 (half-open), 0:30:5 (every fifth) or 0,5,10:12."
            )
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
        layers += range(start, stop, int(match[4] or 1))
    return sorted(set(layers))


def depth(site: Site, n_layers: int) -> tuple[int, int]:
    """Where a site stands in the forward pass, to sort by."""
    layer = (-1 if site.name == "embed" else n_layers) if site.layer is None else site.layer
    return layer, list(SITES).index(site.name)


def state(number: int, n_layers: int) -> str:
    """The site of a state of the residual stream: 0 enters the first block, l + 1 leaves block l.

    Raises:
        LayerOutOfRange: if the model has no such state.
    """
    if not 0 <= number <= n_layers:
        raise LayerOutOfRange(f"State {number} is not in this model: they go from 0 (before the first block) to {n_layers}.")
    return "resid_pre.0" if number == 0 else f"resid_post.{number - 1}"


def state_number(site: str, n_layers: int) -> int | None:
    """Which state of the residual stream a site is; None if it is none of them."""
    return next((number for number in range(n_layers + 1) if state(number, n_layers) == site), None)


def parse_pair(text: str, n_layers: int) -> tuple[str, str]:
    """Source and target, written `4>8` (states of the stream) or `resid_mid.3>mlp_out.3` (sites). What enters a block is named
    by the block that it leaves.

    Raises:
        UnknownSite, LayerOutOfRange: if it is spelled otherwise, or there is no such state or site.
    """
    source, arrow, target = (part.strip() for part in text.partition(">"))
    if not (source and arrow and target):
        raise UnknownSite(f"Pair {text!r} is not understood. Write states, as 4>8, or sites, as resid_mid.3>mlp_out.3.")
    return named_once(source, n_layers), named_once(target, n_layers)


def named_once(text: str, n_layers: int) -> str:
    """The one name of a site or of a numbered state: what enters a block has that of what leaves the block before.

    Raises:
        UnknownSite, LayerOutOfRange: as `parse_pair`.
    """
    if text.isdecimal():
        return state(int(text), n_layers)
    site = Site.parse(text, n_layers)
    return state(site.layer or 0, n_layers) if site.name == "resid_pre" else str(site)


def ranges(layers: list[int]) -> str:
    """Layers as `parse_layers` reads them, in half-open ranges: `0:4,6`."""
    starts = [layer for layer in layers if layer - 1 not in layers]
    stops = [layer + 1 for layer in layers if layer + 1 not in layers]
    return ",".join(f"{a}:{b}" if b > a + 1 else str(a) for a, b in zip(starts, stops, strict=True))


def _parse(text: str, n_layers: int) -> list[Site]:
    name, layers = _split(text.strip())
    if name not in SITES:
        raise UnknownSite(f"Site {text!r} does not exist. Sites are {', '.join(SITES)}; write e.g. 'resid_post.10'.")
    if name in WITHOUT_LAYER:
        if layers is not None:
            raise UnknownSite(f"Site {text!r} does not exist: {name!r} belongs to the whole model. Write {name!r}.")
        return [Site(name)]
    return [Site(name, layer) for layer in parse_layers(layers, n_layers)]


def _split(text: str) -> tuple[str, str | None]:
    """Name and layers of a site in any of the three spellings."""
    for names in (_FROM_TRANSFORMER_LENS, _FROM_NNTERP):
        if names.get(text) in WITHOUT_LAYER:
            return names[text], None
    if match := re.fullmatch(r"blocks\.(\d+)\.(.+)", text):
        return _FROM_TRANSFORMER_LENS.get(match[2], text), match[1]
    if match := re.fullmatch(r"(\w+)\[(-?\d+)\]", text):
        return _FROM_NNTERP.get(match[1], text), match[2]
    name, dot, layers = text.partition(".")
    return name, layers if dot else None
