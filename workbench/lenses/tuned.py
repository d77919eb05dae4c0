"""The tuned lens: affine maps trained so that what they say of the output is as near to it as can be.

Source: Belrose et al. 2023 (arXiv 2303.08112): y = h + h A + b, trained on KL(output || lens), all tokens counting alike. As
there, A and b begin at zero; but they are added to the shortcut lens, not to the state as it is, and act on coordinates of the
state that were brought to a mean of 0 and a spread of 1. That changes the way to the optimum, not the lenses that can be
reached: on SmolLM2-135M, 200,000 tokens come to a mean KL of 2.0 nats so, to 2.2 from the shortcut with the state's own
coordinates, and to 5.8 from the state as it is (each at the best of the learning rates tried). Adam takes the place of
momentum.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from tqdm.auto import tqdm

from workbench.corpus.corpus import Corpus
from workbench.errors import NotFinite, UnknownOption
from workbench.lenses.divergence import Teacher, divergence
from workbench.lenses.lens import Lens
from workbench.lenses.shortcut import lens_moments, sources
from workbench.lenses.unfinished import Unfinished
from workbench.model import LanguageModel
from workbench.moments.moments import Moments
from workbench.results import versions
from workbench.sites import state
from workbench.streaming.stream import stream
from workbench.streaming.token_batch import TokenBatch
from workbench.transports.fit import fit_transports
from workbench.transports.transport import Transport, of_model
from workbench.vocabulary import Vocabulary

TOKENS_AT_ONCE = {"cpu": 256, "cuda": 2048}
"""Tokens whose logits, of one site, are in memory at once."""
STEP_TOKENS = 2048
START_TOKENS = 65_536
WARM_UP = 10
"""Steps until the learning rate is whole."""
KEEP_EVERY = 50
"""Steps from one file to go on from to the next."""


class Translators(nn.Module):
    """Affine maps, one a site: `y = h start + bias + ((h - mean) / spread) A + b`, float32."""

    def __init__(self, start: Tensor, bias: Tensor, mean: Tensor, spread: Tensor) -> None:
        """
        Args:
            start: `[site, d_model, d_model]`
            bias, mean, spread: `[site, d_model]`
        """
        super().__init__()
        self.start, self.bias, self.mean, self.spread = start.float(), bias.float(), mean.float(), spread.float()
        self.A, self.b = nn.Parameter(torch.zeros_like(self.start)), nn.Parameter(torch.zeros_like(self.bias))

    def forward(self, states: Float[Tensor, "site token d_model"]) -> Float[Tensor, "site token d_model"]:
        states = states.float()
        standard = (states - self.mean[:, None]) / self.spread[:, None]
        return torch.baddbmm(self.bias[:, None], states, self.start) + torch.baddbmm(self.b[:, None], standard, self.A)

    @torch.no_grad()
    def merged(self) -> tuple[Float[Tensor, "site d_model d_model"], Float[Tensor, "site d_model"]]:
        """The maps as matrix and bias, float64."""
        scaled = self.A.double() / self.spread.double()[..., None]
        bias = self.bias.double() + self.b.double() - (self.mean.double()[:, None] @ scaled)[:, 0]
        return self.start.double() + scaled, bias


def fit_tuned(
    model: LanguageModel,
    corpus: Corpus | Any,
    *,
    sites: str | Sequence[str] | None = None,
    epochs: int = 1,
    steps: int | None = None,
    learning_rate: float = 0.03,
    step_tokens: int = STEP_TOKENS,
    start_tokens: int = START_TOKENS,
    folder: str | Path | None = None,
    progress: bool = True,
) -> Lens:
    """Train an affine map from every state to the last on the model's own distribution over a corpus.

    Nine documents in ten are used (see `Corpus.held_out`), all tokens of them. All layers are trained in the same forward pass;
    logits are in memory for one layer and some tokens at a time. The learning rate rises for 10 steps and then falls to zero.

    Args:
        sites: Sites of the stream that maps begin at; all states before the last, if None.
        epochs: How often the corpus is gone through.
        steps: Stop after so many; 0 gives the start.
        learning_rate: Of Adam, in standardised coordinates.
        step_tokens: Tokens of a step, padding included. A larger step is another training, not only more memory.
        start_tokens: Tokens of the corpus from whose moments the shortcut lens is made that training begins with. 0: begin with
            the logit lens, in the state's own coordinates; a learning rate of 0.001 then suits.
        folder: Where an unfinished training is kept every 50 steps, and taken up again.
    Raises:
        UnknownOption: for numbers out of range.
        NotFinite: if the divergence is no longer a number; nothing after the last kept step is used.
        OtherJob: if the folder holds an unfinished training with other settings.
        UnknownSite, LayerOutOfRange, TooFewTokens, OutOfMemory, BadCorpus, CannotWrite: as `fit_shortcut`.
    """
    if epochs < 1 or step_tokens < 1 or start_tokens < 0 or not learning_rate > 0 or (steps is not None and steps < 0):
        raise UnknownOption(
            f"epochs={epochs}, steps={steps}, learning_rate={learning_rate}, step_tokens={step_tokens}, start_tokens="
            f"{start_tokens}: epochs and step_tokens are 1 or more, learning_rate is above 0, and the others 0 or more."
        )
    texts = corpus if isinstance(corpus, Corpus) else Corpus(corpus)
    named, last = sources(model, sites), state(model.n_layers, model.n_layers)
    flow = stream(model, texts.training(), [*named, last], batch_tokens=step_tokens, massive_at=None, progress=False)
    wanted = epochs * flow.counted.batches
    wanted = wanted if steps is None else min(wanted, steps)
    settings = of_model(model) | flow.settings | {
        "kind": "tuned", "affine": True, "tokens_hash": flow.counted.count.tokens_hash, "epochs": epochs, "steps": wanted,
        "learning_rate": learning_rate, "start_tokens": start_tokens, "versions": versions(),
    }  # fmt: skip
    unfinished = Unfinished(folder, settings)
    translators, tensors, done = _begun(model, texts, named, start_tokens, unfinished, progress)
    tenth = max(1, wanted // 10)
    optimiser = torch.optim.Adam(translators.parameters(), betas=(0.9, 0.99))
    kept = _restored(translators, optimiser, tensors)
    with tqdm(total=wanted, initial=done, desc="tuned lens", unit="step", disable=not progress) as bar:
        while done < wanted:
            steps_of = groupby(flow.batches(done % flow.counted.batches), key=lambda batch: batch.index)
            for _, parts in islice(steps_of, wanted - done):  # several, where memory ran out and a batch was halved
                optimiser.param_groups[0]["lr"] = learning_rate * min((done + 1) / WARM_UP, 1 - done / wanted)
                optimiser.zero_grad()
                tokens, kl = 0, torch.zeros(len(named), dtype=torch.float64, device=model.vocabulary.W_U.device)
                for part in parts:
                    kl += backward(model.vocabulary, translators, part, named, last)
                    tokens += part.tokens.n
                for parameter in translators.parameters():
                    assert parameter.grad is not None
                    parameter.grad /= tokens
                kl /= tokens
                _require_finite(kl, named, done)
                optimiser.step()
                for i, counts in enumerate((done < tenth, done >= wanted - tenth)):
                    kept["kl"][i] += kl.cpu() / tenth * counts
                done += 1
                bar.update()
                bar.set_postfix(kl=f"{float(kl.mean()):.3f}")
                if done % KEEP_EVERY == 0 and done < wanted:
                    unfinished.keep(kept | _state(translators, optimiser), done)
    matrices, biases = translators.merged()
    scores = [{"kl_first_tenth": float(a), "kl_last_tenth": float(b)} if wanted else {} for a, b in kept["kl"].T]
    maps = [
        Transport(site, last, matrix.cpu(), None, bias.cpu(), settings, own)
        for site, matrix, bias, own in zip(named, matrices, biases, scores, strict=True)
    ]
    return Lens.of(maps, "tuned", settings)


def backward(
    vocabulary: Vocabulary, translators: Translators, batch: TokenBatch, sites: Sequence[str], last: str
) -> Float[Tensor, " site"]:
    """Add the gradient of the divergence, summed over tokens and sites, to the parameters'.

    Returns:
        KL(output || lens) of each site, summed over tokens, nats, float64.
    """
    final = batch[last]
    n, at_once = len(final), TOKENS_AT_ONCE.get(final.device.type, TOKENS_AT_ONCE["cpu"])
    kl = torch.zeros(len(sites), dtype=torch.float64, device=vocabulary.W_U.device)
    space: Tensor | None = None
    for start in range(0, n, at_once):
        part = slice(start, start + at_once)
        teacher = Teacher(vocabulary, final[part])
        space = torch.empty_like(teacher.probabilities) if space is None else space
        mapped = translators(torch.stack([batch[site][part] for site in sites]))
        rows = vocabulary.decoded(mapped.to(final.dtype), "norm")
        gradients = torch.empty_like(rows)
        for i, own in enumerate(rows.detach()):
            found = divergence(vocabulary, own, teacher, space[: len(own)])
            kl[i] += found.kl.sum()
            gradients[i] = found.gradient
        parameters = list(translators.parameters())  # alone: the norm's own weights are the model's
        for parameter, own in zip(parameters, torch.autograd.grad(rows, parameters, gradients), strict=True):
            parameter.grad = own if parameter.grad is None else parameter.grad + own
    return kl


def _begun(
    model: LanguageModel, corpus: Corpus, sites: Sequence[str], start_tokens: int, unfinished: Unfinished, progress: bool
) -> tuple[Translators, dict[str, Tensor], int]:
    """Translators as they begin, with what an earlier training kept of them, and how many steps that had done."""
    if found := unfinished.found():
        tensors, done = found
        begin = {name: tensors.pop(name).to(model.device) for name in ("start", "bias", "mean", "spread")}
        return Translators(**begin), tensors, done
    d, device = model.d_model, model.device
    one, zero = torch.eye(d, device=device).repeat(len(sites), 1, 1), torch.zeros(len(sites), d, device=device)
    if not start_tokens:
        return Translators(one, zero, zero, torch.ones_like(zero)), {}, 0
    moments = lens_moments(model, corpus.upto(start_tokens), sites, None, batch_tokens=None, progress=progress)
    maps = fit_transports(moments, kind="ridge", held_out=False, progress=progress)
    start = torch.stack([one.matrix for one in maps.values()]).to(device)
    bias = torch.stack([one.bias for one in maps.values()]).to(device)
    mean, spread = _standard(moments, sites)
    return Translators(start, bias, mean.to(device), spread.to(device)), {}, 0


def _standard(moments: Moments, sites: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each coordinate over ordinary tokens, `[site, d_model]`; a coordinate that never moves is
    not blown up."""
    means, spreads = [], []
    for site in sites:
        own = moments.spread(site, "ordinary")
        deviation = (own.xx.diagonal() / own.n).sqrt()
        means.append(own.mean)
        spreads.append(deviation.clamp_min(1e-3 * float(deviation.mean())))
    return torch.stack(means), torch.stack(spreads)


def _restored(translators: Translators, optimiser: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """What was kept put back; what stays as it is while training goes on, to be kept with the rest."""
    device = translators.A.device
    for name, parameter in translators.named_parameters():
        if tensors:
            parameter.data.copy_(tensors[name])
            own = {key: tensors[f"{name}/{key}"].to(device) for key in ("exp_avg", "exp_avg_sq")}
            optimiser.state[parameter] = {"step": tensors[f"{name}/step"], **own}
    kl = tensors["kl"] if tensors else torch.zeros(2, len(translators.b), dtype=torch.float64)
    return {"kl": kl, "start": translators.start, "bias": translators.bias, "mean": translators.mean,
            "spread": translators.spread}  # fmt: skip


def _state(translators: Translators, optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    state = {}
    for name, parameter in translators.named_parameters():
        state[name] = parameter
        state |= {f"{name}/{key}": optimiser.state[parameter][key] for key in ("step", "exp_avg", "exp_avg_sq")}
    return state


def _require_finite(kl: Tensor, sites: Sequence[str], step: int) -> None:
    """
    Raises:
        NotFinite: naming the first site whose divergence is not a number.
    """
    wrong = (~kl.isfinite()).nonzero()
    if len(wrong):
        raise NotFinite(
            f"The tuned lens of {sites[int(wrong[0])]} went astray at step {step}: its divergence is not finite. Lower "
            "learning_rate; an unfinished training in the folder goes on from the last kept step only with the same settings."
        )
