"""Identities of one forward pass: the stream, the head, and what every weight by name makes of the sites by name."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from workbench.architectures.row import Block
from workbench.architectures.taps import why_not
from workbench.architectures.weights import Expert, norm_bias
from workbench.attention import INSIDE
from workbench.capturing import keeping
from workbench.checks.check import Check, check, error, real
from workbench.model import Batch, LanguageModel
from workbench.sites import SITES, WITHOUT_LAYER, Site

APART = {*INSIDE, "result"}
"""Sites that another attention function is switched on for, or that are a product: see `workbench.checks.inside`."""


def sites_of(model: LanguageModel) -> list[Site]:
    """Every site of every layer that the model has."""
    inner = [name for name in SITES if name not in WITHOUT_LAYER]
    layers = range(model.n_layers)
    of_blocks = [Site(name, layer) for layer in layers for name in inner if why_not(model.row.block(layer), name) is None]
    return [Site("embed"), *of_blocks, Site("ln_final")]


def still(model: LanguageModel, batch: Batch) -> Iterator[Check]:
    """Identities of one forward pass."""
    sites = [site for site in sites_of(model) if site.name not in APART]
    with keeping(model, sites, to_the_end=True) as kept:
        logits = real(model.forward(batch), batch)
    if missing := [site for site in sites if site not in kept]:
        for site in missing:
            path = model.tap(site).path
            yield Check(f"{site.name} is read where the row says", site.layer, float("inf"), f"{path} is never called")
        return
    acts = {str(site): real(value, batch) for site, value in kept.items()}

    row = model.row
    tokens = batch.tokens[batch.mask]
    yield check("W_E[token] = embed", None, lambda: _embedding_error(model, tokens, acts["embed"]))
    for layer in range(model.n_layers):
        device = acts[f"resid_post.{layer}"].device  # a block's input may still lie on the device of the one before
        at = {site.name: acts[str(site)].to(device) for site in kept if site.layer == layer}
        yield from _stream(row.block(layer), layer, at)
        if layer:
            yield check(
                "resid_post = next resid_pre",
                layer,
                lambda layer=layer, at=at: error(acts[f"resid_post.{layer - 1}"], at["resid_pre"]),
            )
        yield from _Weights(model, layer, at).checks()
    last = acts[f"resid_post.{model.n_layers - 1}"]
    ln_final = model.module(row.path("ln_final"))
    yield check("ln_final(last resid_post) = ln_final", None, lambda: error(ln_final(last), acts["ln_final"]))
    if model.optional_weight("ln_final.w") is not None:
        yield check("ln_final.w is the gain of ln_final", None, lambda: _gain_error(ln_final, model.weight("ln_final.w"), last))
    yield check("unembedding the last resid_post = logits", None, lambda: error(model.vocabulary.logits(last), logits))


def _embedding_error(model: LanguageModel, tokens: Tensor, embed: Tensor) -> float:
    W_E = model.weight("W_E")
    return error(model.row.embed_scale * W_E[tokens.to(W_E.device)], embed)


def _stream(block: Block, layer: int, at: dict[str, Tensor]) -> Iterator[Check]:
    if block.parallel:
        total = at["resid_pre"] + at["attn_out"] + at["mlp_out"]
        yield check("resid_pre + attn_out + mlp_out = resid_post", layer, lambda: error(total, at["resid_post"]))
        return
    if block.attn is not None:
        yield check("resid_pre + attn_out = resid_mid", layer, lambda: error(at["resid_pre"] + at["attn_out"], at["resid_mid"]))
    yield check("resid_mid + mlp_out = resid_post", layer, lambda: error(at["resid_mid"] + at["mlp_out"], at["resid_post"]))


class _Weights:
    """The weights by name give the sites by name, at one layer."""

    def __init__(self, model: LanguageModel, layer: int, at: dict[str, Tensor]):
        self.model, self.layer, self.at = model, layer, at
        self.row, self.block = model.row.block(layer), model.block(layer)

    def checks(self) -> Iterator[Check]:
        for name, path, x in (
            ("ln1", self.row.ln1, self.at["resid_pre"]),
            ("ln2", self.row.ln2, self.mlp_stream),
        ):
            if path is not None:
                yield self.check(
                    f"{name}({'resid_pre' if name == 'ln1' else 'stream'}) = {name}",
                    lambda name=name, path=path, x=x: error(self.normed(path, x), self.at[name]),
                )
            if path is not None and self.model.optional_weight(f"{name}.w", self.layer) is not None:
                yield self.check(
                    f"{name}.w is the gain of {name}",
                    lambda name=name, path=path, x=x: _gain_error(self.block.get_submodule(path), self.weight(f"{name}.w"), x),
                )
        if self.row.attn is not None:
            yield from self.attention()
        if self.row.experts is not None:
            yield from self.experts()
        else:
            yield from self.mlp()

    @property
    def mlp_stream(self) -> Tensor:
        return self.at["resid_pre" if self.row.parallel else "resid_mid"]

    def attention(self) -> Iterator[Check]:
        x = self.normed(self.row.ln1, self.at["resid_pre"])
        for name, part in (("q", self.row.q), ("k", self.row.k), ("v", self.row.v)):
            if part is None or not part.reads_stream:
                continue
            W, b = f"W_{name.upper()}", f"b_{name.upper()}"
            yield self.check(
                f"ln1(resid_pre) {W} = {name}",
                lambda name=name, W=W, b=b: error(
                    (torch.einsum("td,hde->the", x, self.weight(W)) + self.bias(b)).flatten(1), self.at[name].flatten(1)
                ),
            )
        yield self.check(
            "z W_O = attn_out",
            lambda: error(
                self.written(
                    self.row.ln1_post, torch.einsum("the,hed->td", self.at["z"], self.weight("W_O")) + self.bias("b_O")
                ),
                self.at["attn_out"],
            ),
        )

    def mlp(self) -> Iterator[Check]:
        x, at, act = self.normed(self.row.ln2, self.mlp_stream), self.at, self.activation()

        def by(W: str, b: str) -> Tensor:
            return x @ self.weight(W) + self.bias(b)

        if self.row.is_gated:
            yield self.check("ln2(stream) W_gate = mlp_pre", lambda: error(by("W_gate", "b_gate"), at["mlp_pre"]))
            yield self.check("ln2(stream) W_in = mlp_up", lambda: error(by("W_in", "b_in"), at["mlp_up"]))
            yield self.check("act(mlp_pre) mlp_up = mlp_post", lambda: error(act(at["mlp_pre"]) * at["mlp_up"], at["mlp_post"]))
        else:
            yield self.check("ln2(stream) W_in = mlp_pre", lambda: error(by("W_in", "b_in"), at["mlp_pre"]))
            yield self.check("act(mlp_pre) = mlp_post", lambda: error(act(at["mlp_pre"]), at["mlp_post"]))
        yield self.check(
            "mlp_post W_out = mlp_out",
            lambda: error(
                self.written(self.row.ln2_post, at["mlp_post"] @ self.weight("W_out") + self.bias("b_out")), at["mlp_out"]
            ),
        )

    def experts(self) -> Iterator[Check]:
        experts = self.row.experts
        assert experts is not None
        x = self.normed(self.row.ln2, self.mlp_stream)
        # Over all tokens at once: the logits of one token may nearly cancel.
        yield self.check(
            "ln2(stream) W_router = router_logits",
            lambda: error((x @ self.weight("W_router") + self.bias("b_router")).flatten(), self.at["router_logits"].flatten()),
        )
        module = self.block.get_submodule(experts.path)
        for which, index in (("first", 0), ("last", self.model.n_experts - 1)):
            yield self.check(
                f"W_gate, W_in and W_out of the {which} expert give what it gives",
                lambda index=index: error(
                    _through(x, self.model.expert(self.layer, index), experts.combine(module)), experts.call(module, x, index)
                ),
            )
        if experts.shared is not None:
            shared = self.block.get_submodule(experts.shared)
            yield self.check(
                "W_gate, W_in and W_out of the shared expert give what it gives",
                lambda: error(
                    _through(x, self.model.expert(self.layer, "shared"), experts.combine(module)), shared(x[None])[0]
                ),
            )

    def check(self, identity: str, compute: Callable[[], float]) -> Check:
        return check(identity, self.layer, compute)

    def weight(self, name: str) -> Tensor:
        return self.model.weight(name, self.layer)

    def bias(self, name: str) -> Tensor | float:
        found = self.model.optional_weight(name, self.layer)
        return 0.0 if found is None else found

    def normed(self, path: str | None, x: Tensor) -> Tensor:
        return x if path is None else self.block.get_submodule(path)(x)

    def written(self, post_norm: str | None, x: Tensor) -> Tensor:
        """What is added to the stream, of what attention's or the MLP's last matrix gives."""
        return self.normed(post_norm, x) * self.row.residual_multiplier

    def activation(self) -> Callable[[Tensor], Tensor]:
        return ACT2FN[self.row.act_function] if self.row.act_function else self.block.get_submodule(self.row.act)


def _through(x: Tensor, expert: Expert, combine: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    def plus(product: Tensor, bias: Tensor | None) -> Tensor:
        return product if bias is None else product + bias

    gate, up = plus(x @ expert.W_gate, expert.b_gate), plus(x @ expert.W_in, expert.b_in)
    return plus(combine(gate, up) @ expert.W_out, expert.b_out)


def _gain_error(norm: nn.Module, gain: Tensor, x: Tensor) -> float:
    """How far `norm(x) - bias` is from `gain ⊙ x` (or, for a norm that centres, from `gain ⊙ (x - mean)`), lengths apart."""
    bias, found = norm_bias(norm), norm(x).double()
    if bias is not None:
        found = found - bias.to(found)
    x, gain = x.to(found), gain.to(found)
    directions = [gain * one for one in (x, x - x.mean(1, keepdim=True))]
    lengths = [(found * one).sum(1, keepdim=True) / one.pow(2).sum(1, keepdim=True) for one in directions]
    return min(error(length * one, found) for length, one in zip(lengths, directions, strict=True))
