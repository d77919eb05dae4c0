"""TransformerLens's bridge and nnsight beside Hugging Face and the workbench, on the tiny models of every family.

Hugging Face's own modules are the truth. A witness counts where its logits agree with them; then its tensors must agree with
the workbench's, site by site. `python tests/witnesses.py` prints the table that `tests/WITNESSES.md` holds.
"""

import logging
import tempfile
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from families import FAMILIES, tiny_hf, tiny_tokenizer

import workbench as wb
from workbench.checks.check import error
from workbench.checks.still import APART, sites_of

AGREES = 1e-5
TEXT = "a dog and a cat"


class Testimony(NamedTuple):
    """What a witness says of one family."""

    family: str
    witness: str
    logits: float | None
    """Largest relative error of a row of logits against Hugging Face's; None if it could not run the model."""
    compared: tuple[str, ...]
    differing: dict[str, float]
    """Sites where it has another tensor than the workbench, with the error of the worst layer."""
    fault: str = ""


def testimonies(families: list[str]) -> Iterator[Testimony]:
    """Both witnesses on each family."""
    from transformers import AutoTokenizer

    folder = tempfile.TemporaryDirectory()  # the bridge reads the tokenizer's files again
    tiny_tokenizer().save_pretrained(folder.name)
    tokenizer = AutoTokenizer.from_pretrained(folder.name)
    for family in families:
        model = wb.load(tiny_hf(family), tokenizer=tiny_tokenizer())
        batch = model.tokenize(TEXT)
        sites = sites_of(model)
        ours = wb.capture(model, batch, [str(site) for site in sites])
        with torch.no_grad():
            logits = model.forward(batch)
        for witness, ask in (("transformer_lens", _transformer_lens), ("nnsight", _nnsight)):
            try:
                theirs_logits, theirs = ask(family, model, tokenizer, batch, sites)
            except Exception as fault:  # whatever a witness stumbles over is part of its testimony
                yield Testimony(family, witness, None, (), {}, f"{type(fault).__name__}: {str(fault).splitlines()[0][:90]}")
                continue
            off = error(theirs_logits, logits)
            differing: dict[str, float] = {}
            for site, tensor in theirs.items():
                mine = ours[site]
                if site.startswith("attn_scores"):  # what stands where the mask hides a token is anybody's choice
                    tensor, mine = tensor.softmax(-1), mine.softmax(-1)
                same_size = tensor.numel() == mine.numel()
                one = error(tensor.reshape(-1), mine.reshape(-1)) if same_size else float("inf")
                if one > AGREES:
                    name = site.split(".")[0]
                    differing[name] = max(one, differing.get(name, 0.0))
            yield Testimony(family, witness, off, tuple(dict.fromkeys(name.split(".")[0] for name in theirs)), differing)


def _transformer_lens(family: str, model: Any, tokenizer: Any, batch: Any, sites: list[Any]):
    from transformer_lens.model_bridge import TransformerBridge

    hf = tiny_hf(family)
    hf.config.architectures = [type(hf).__name__]
    bridge = TransformerBridge.boot_transformers("tiny", hf_model=hf, tokenizer=tokenizer)
    with torch.no_grad():
        logits, cache = bridge.run_with_cache(batch.tokens)
    names = {str(site): site.transformer_lens for site in sites}
    return logits, {site: cache[name] for site, name in names.items() if name is not None and name in cache}


def _nnsight(family: str, model: Any, tokenizer: Any, batch: Any, sites: list[Any]):
    from nnsight import NNsight

    hf = tiny_hf(family)
    traced = NNsight(hf)
    outside = [site for site in sites if site.name not in APART]  # nnsight reads modules, as hooks do
    saved, logits = _traced(traced, batch.tokens, [(str(site), model.tap(site)) for site in outside])
    axes = tuple(batch.tokens.shape)
    found = {}
    for site, value in saved.items():
        tap = model.tap(wb.Site.parse(site, model.n_layers))
        found[site] = tap.read(value[tap.item] if isinstance(value, tuple) else value, axes)
    return logits, found


def _traced(traced: Any, tokens: torch.Tensor, taps: list[Any]):
    """Inputs and outputs of the modules. Each is asked for by itself: in one block nnsight wants them in the order of the
    forward pass, and in parallel blocks that of the norms is not that of the sites."""
    from nnsight import save

    with torch.no_grad(), traced.trace() as tracer:
        values = save({})
        with tracer.invoke(tokens):
            values["logits"] = traced.output.logits
        for site, tap in taps:
            with tracer.invoke():
                module = traced.get(tap.path)
                values[site] = module.input if tap.end == "input" else module.output
    return values, values.pop("logits")


def table(found: list[Testimony]) -> str:
    """The testimonies as a document."""
    lines = [
        "| family | witness | logits against Hugging Face's | sites that differ from the workbench's (worst layer) |",
        "| --- | --- | --- | --- |",
    ]
    for one in found:
        if one.logits is None:
            lines.append(f"| {one.family} | {one.witness} | cannot run it | {one.fault.replace('|', '/')} |")
        elif one.logits > AGREES or one.differing:
            differing = ", ".join(f"{site} {off:.0e}" for site, off in one.differing.items()) or "none"
            lines.append(f"| {one.family} | {one.witness} | {one.logits:.0e} | {differing} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    found = list(testimonies(sorted(FAMILIES)))
    print(table(found))
    for witness in ("transformer_lens", "nnsight"):
        mine = [one for one in found if one.witness == witness]
        agree = [one for one in mine if one.logits is not None and one.logits <= AGREES]
        clean = len([one for one in agree if not one.differing])
        print(f"{witness}: {len(agree)} of {len(mine)} have Hugging Face's logits, {clean} of these every site as here.")


if __name__ == "__main__":
    main()
