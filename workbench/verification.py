"""The self-check: does this model obey the identities that the names of its sites and weights promise?

Every identity compares tensors as they were kept, so a block that changes one in place afterwards is found out too.
Errors are relative to the norm of the row (a state of SmolLM2 reaches 22,552: an absolute 1e-5 would mean nothing).
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from workbench.architectures import norm_bias
from workbench.errors import VerificationFailed
from workbench.model import Batch, LanguageModel
from workbench.results import Result
from workbench.sites import Site, parse_sites
from workbench.tracer import edited

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 4e-2}
"""Largest relative error of a row. Half-precision ones allow for a few roundings of 2^-11 and 2^-8 in a row of sums."""

LENGTHS = (7, 4)
"""Tokens in each row of the probe: unequal, so that one row is padded."""


class Check(NamedTuple):
    """One identity at one layer."""

    identity: str
    layer: int | None
    error: float


@dataclass(frozen=True, eq=False, repr=False)
class Verification(Result):
    """Each identity with its error. Columns: identity, layer (None: the whole model), error, tolerance, passed."""

    @property
    def passed(self) -> bool:
        """Whether every identity holds."""
        return bool(self.table["passed"].all())

    def __str__(self) -> str:
        worst = self.table.groupby("identity", sort=False).agg(
            layers=("layer", "size"), error=("error", "max"), tolerance=("tolerance", "max"), passed=("passed", "all")
        )
        lines = [
            f"  {'ok  ' if row.passed else 'FAIL'} {name:<58} {row.error:8.1e}  (tolerance {row.tolerance:.0e}, {row.layers}x)"
            for name, row in worst.iterrows()
        ]
        verdict = "all identities hold" if self.passed else "SOME IDENTITIES DO NOT HOLD"
        return "\n".join([f"{self.settings['model']}: {verdict}", *lines])

    def require(self) -> None:
        """
        Raises:
            VerificationFailed: if an identity does not hold; the text names the first.
        """
        import pandas as pd

        failed = self.table[~self.table["passed"]]
        if len(failed):
            first = failed.iloc[0]
            at = "" if pd.isna(first["layer"]) else f" at layer {first['layer']}"
            raise VerificationFailed(
                f"{self.settings['model']!r} does not behave as its family {self.settings['family']!r} promises: "
                f"{first['identity']!r} is off by {first['error']:.1e}{at} (tolerance {first['tolerance']:.0e}; "
                f"{len(failed)} of {len(self.table)} checks fail). Nothing read from it could be trusted. If the model's "
                "code was changed, write a row for it; to load it all the same, pass check=False."
            )


def verify(model: LanguageModel) -> Verification:
    """All identities, at all layers: the stream, the head, the neurons, the attention projections, edits and padding."""
    batch = _probe(model)
    return _result(model, [*_still(model, batch), *_edits(model, batch), *_padding(model)])


def verify_briefly(model: LanguageModel) -> Verification:
    """What one short forward pass can show; run whenever a model is loaded."""
    return _result(model, _still(model, _probe(model)))


def _probe(model: LanguageModel) -> Batch:
    """Two rows of fixed random tokens, right-padded."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, model.d_vocab, (len(LENGTHS), max(LENGTHS)), generator=generator)
    mask = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
    return Batch(tokens.to(model.device), mask.to(model.device))


def _still(model: LanguageModel, batch: Batch) -> Iterator[Check]:
    """Identities of one forward pass."""
    row = model.row
    names = ["resid_pre", "resid_post", "attn_out", "mlp_out", "mlp_pre", "mlp_post", "z", "q", "k", "v", "ln_final"]
    names += [] if row.parallel else ["resid_mid"]
    names += ["mlp_up"] if row.is_gated else []
    captured: dict[str, Tensor] = {}
    logits = _logits_and(model, batch, names, captured)
    acts = {name: value[batch.mask] for name, value in captured.items()}

    for layer in range(model.n_layers):
        at = {name: acts[f"{name}.{layer}"] for name in names if name != "ln_final"}
        if row.parallel:
            total = at["resid_pre"] + at["attn_out"] + at["mlp_out"]
            yield Check("resid_pre + attn_out + mlp_out = resid_post", layer, _error(total, at["resid_post"]))
        else:
            yield Check("resid_pre + attn_out = resid_mid", layer, _error(at["resid_pre"] + at["attn_out"], at["resid_mid"]))
            yield Check("resid_mid + mlp_out = resid_post", layer, _error(at["resid_mid"] + at["mlp_out"], at["resid_post"]))
        if layer:
            yield Check("resid_post = next resid_pre", layer, _error(acts[f"resid_post.{layer - 1}"], at["resid_pre"]))
        yield from _projections(model, layer, at)

    last = acts[f"resid_post.{model.n_layers - 1}"]
    yield Check("ln_final(last resid_post) = ln_final", None, _error(model.vocabulary.ln_final(last), acts["ln_final"]))
    yield Check(
        "ln_final.w is the gain of ln_final", None, _gain_error(model.module(row.ln_final), model.weight("ln_final.w"), last)
    )
    yield Check("unembedding the last resid_post = logits", None, _error(model.vocabulary.logits(last), logits[batch.mask]))


def _projections(model: LanguageModel, layer: int, at: dict[str, Tensor]) -> Iterator[Check]:
    """The weights by name give the sites by name."""
    row, block = model.row, model.block(layer)

    def weight(name: str) -> Tensor:
        return model.weight(name, layer).detach()

    def bias(name: str) -> Tensor | float:
        found = model.optional_weight(name, layer)
        return 0.0 if found is None else found.detach()

    def normed(path: str | None, x: Tensor) -> Tensor:
        return x if path is None else block.get_submodule(path)(x)

    if row.ln1 is not None:
        yield Check(
            "ln1.w is the gain of ln1", layer, _gain_error(block.get_submodule(row.ln1), weight("ln1.w"), at["resid_pre"])
        )
    x = normed(row.ln1, at["resid_pre"])
    for name in "qkv":
        projected = torch.einsum("td,hde->the", x, weight(f"W_{name.upper()}")) + bias(f"b_{name.upper()}")
        yield Check(f"ln1(resid_pre) W_{name.upper()} = {name}", layer, _error(projected.flatten(1), at[name].flatten(1)))
    written = torch.einsum("the,hed->td", at["z"], weight("W_O")) + bias("b_O")
    yield Check("z W_O = attn_out", layer, _error(normed(row.ln1_post, written), at["attn_out"]))

    stream = at["resid_pre" if row.parallel else "resid_mid"]
    if row.ln2 is not None:
        yield Check("ln2.w is the gain of ln2", layer, _gain_error(block.get_submodule(row.ln2), weight("ln2.w"), stream))
    x = normed(row.ln2, stream)
    activation = block.get_submodule(row.act)
    if row.is_gated:
        yield Check("ln2(stream) W_gate = mlp_pre", layer, _error(x @ weight("W_gate") + bias("b_gate"), at["mlp_pre"]))
        yield Check("ln2(stream) W_in = mlp_up", layer, _error(x @ weight("W_in") + bias("b_in"), at["mlp_up"]))
        yield Check("act(mlp_pre) mlp_up = mlp_post", layer, _error(activation(at["mlp_pre"]) * at["mlp_up"], at["mlp_post"]))
    else:
        yield Check("ln2(stream) W_in = mlp_pre", layer, _error(x @ weight("W_in") + bias("b_in"), at["mlp_pre"]))
        yield Check("act(mlp_pre) = mlp_post", layer, _error(activation(at["mlp_pre"]), at["mlp_post"]))
    written = at["mlp_post"] @ weight("W_out") + bias("b_out")
    yield Check("mlp_post W_out = mlp_out", layer, _error(normed(row.ln2_post, written), at["mlp_out"]))


@torch.no_grad()
def _edits(model: LanguageModel, batch: Batch) -> Iterator[Check]:
    """An edit that returns what it got changes no bit; one that negates a block's neurons moves the logits (doubling them
    need not: a post-norm takes a power of two out again). The error of the second is 0 if they moved and 1 if not."""
    clean = model.forward(batch)[batch.mask]
    sites = [Site(name, layer) for layer in range(model.n_layers) for name in ("attn_out", "mlp_post", "resid_post")]
    with edited(model, {site: lambda value: value for site in sites}):
        same = model.forward(batch)[batch.mask]
    yield Check("an edit that changes nothing changes no logit", None, float(not torch.equal(same, clean)))
    for layer in range(model.n_layers):
        with edited(model, {Site("mlp_post", layer): torch.neg}):
            moved = model.forward(batch)[batch.mask]
        yield Check("negating mlp_post moves the logits", layer, float(torch.equal(moved, clean)))


@torch.no_grad()
def _padding(model: LanguageModel) -> Iterator[Check]:
    """A padded batch gives each row the logits that it has alone."""
    batch = _probe(model)
    single = [model.forward(Batch(batch.tokens[i : i + 1, :n], batch.mask[i : i + 1, :n]))[0] for i, n in enumerate(LENGTHS)]
    for side in ("right", "left"):
        tokens, mask = batch.tokens, batch.mask
        if side == "left":
            shift = [int(n) - max(LENGTHS) for n in LENGTHS]
            tokens = torch.stack([row.roll(-by) for row, by in zip(tokens, shift, strict=True)])
            mask = mask.flip(1)
        logits = model.forward(Batch(tokens, mask))
        errors = [_error(logits[i][mask[i]], alone) for i, alone in enumerate(single)]
        yield Check(f"a {side}-padded batch = its single rows", None, max(errors))


@torch.no_grad()
def _logits_and(model: LanguageModel, batch: Batch, names: list[str], captured: dict[str, Tensor]) -> Tensor:
    """One pass that keeps the named sites and goes on to the logits."""

    def keep(site: Site):
        def edit(value: Tensor) -> Tensor:
            captured[str(site)] = value
            return value

        return edit

    with edited(model, {site: keep(site) for site in parse_sites(names, model.n_layers)}):
        return model.forward(batch)


@torch.no_grad()
def _gain_error(norm: nn.Module, gain: Tensor, x: Tensor) -> float:
    """How far `norm(x) - bias` is from `gain ⊙ x` (or, for a norm that centres, from `gain ⊙ (x - mean)`), lengths apart."""
    bias = norm_bias(norm)
    found = norm(x).double() - (0.0 if bias is None else bias.double())
    x = x.double()
    directions = [gain.double() * one for one in (x, x - x.mean(1, keepdim=True))]
    lengths = [(found * one).sum(1, keepdim=True) / one.pow(2).sum(1, keepdim=True) for one in directions]
    return min(_error(length * one, found) for length, one in zip(lengths, directions, strict=True))


def _error(found: Tensor, expected: Tensor) -> float:
    """Largest distance of a row from the expected one, relative to the expected row's norm. NaN counts as infinite."""
    found, expected = found.detach().double(), expected.detach().double()
    errors = (found - expected).norm(dim=-1) / expected.norm(dim=-1).clamp_min(1e-30)
    return float(errors.nan_to_num(nan=torch.inf).max())


def _result(model: LanguageModel, checks: Iterable[Check]) -> Verification:
    import pandas as pd

    table = pd.DataFrame(list(checks))
    table["layer"] = table["layer"].astype("Int64")
    table["tolerance"] = TOLERANCE[model.dtype]
    table["passed"] = table["error"] <= table["tolerance"]
    return Verification(table, model.provenance)
