"""What capturing costs, beside a forward pass without hooks, plain hooks, TransformerLens and nnsight, in one run.

    python tests/benchmarks/capture.py [--device cuda --shape llama-8b --dtype bfloat16 --batch 16 --length 512]

Prints one JSON object. Sites: resid_post, attn_out, mlp_out and mlp_post of all layers. Ratios are to the body alone (the model
without its head), medians of rounds in which the variants take turns. Peers are run where they are installed.
"""

import json
import statistics
from importlib.util import find_spec

import torch
from measuring import peak_extra_bytes, ratio, seconds
from models import loaded, options

import workbench as wb
from workbench import capturing
from workbench.model import Batch
from workbench.sites import parse_sites

SITES = ["resid_post", "attn_out", "mlp_out", "mlp_post"]


@torch.no_grad()
def main() -> None:
    chosen = options(batch=4, length=128, rounds=9)
    model = loaded(chosen.shape, chosen.device, chosen.dtype)
    tokens = torch.randint(0, 256, (chosen.batch, chosen.length), device=model.device)
    batch = Batch(tokens, torch.ones_like(tokens, dtype=torch.bool))
    sites = [str(site) for site in parse_sites(SITES, model.n_layers)]
    inputs = {"input_ids": tokens, "attention_mask": batch.mask.long(), "use_cache": False}

    def plain_hooks():
        kept, handles = {}, []
        for site in sites:
            tap = model.tap(wb.Site.parse(site, model.n_layers))
            module = model.module(tap.path)

            def keep(_, args, output=None, site=site):
                value = args if output is None else output
                kept[site] = value[0] if isinstance(value, tuple) else value

            handles.append(module.register_forward_pre_hook(keep) if tap.end == "input" else module.register_forward_hook(keep))
        try:
            model.hf.model(**inputs)
        finally:
            for handle in handles:
                handle.remove()
        return kept

    variants = {
        "body alone": lambda: model.hf.model(**inputs),
        "body and head": lambda: model.hf(**inputs),
        "plain hooks": plain_hooks,
        "wb.capture": lambda: wb.capture(model, batch, SITES),
        "wb.capture(finite=False)": lambda: wb.capture(model, batch, SITES, finite=False),
    }
    if chosen.shape == "smollm2" and find_spec("transformer_lens"):
        variants["TransformerLens, names_filter"] = transformer_lens(chosen, tokens, sites)
    if find_spec("nnsight"):
        variants["nnsight, saving the same"] = nnsight(model, tokens, sites)
    device = torch.device(chosen.device)
    tables, keep_pages = {}, capturing.keep_pages
    for pages in ("as malloc has them", "kept"):
        # The first wb.capture of a process keeps them for the rest of it, and so for all that runs after it.
        capturing.keep_pages = keep_pages if pages == "kept" else lambda: False
        memory = {name: peak_extra_bytes(run, device) for name, run in variants.items()}
        times = seconds(variants, chosen.rounds)
        tables[pages] = [
            {
                "variant": name,
                "seconds": round(statistics.median(found), 4),
                "ratio_to_body": ratio(found, times["body alone"]),
                "peak_extra_mb": round(memory[name] / 1e6, 1),
            }
            for name, found in times.items()
        ]
    kept = sum(value.nbytes for value in wb.capture(model, batch, SITES).values())
    settings = vars(chosen) | {"weights": model.name, "sites": len(sites), "kept_mb": round(kept / 1e6, 1)}
    settings["torch"] = torch.__version__
    print(json.dumps({"benchmark": "capture", "settings": settings, "tables, by pages of freed memory": tables}, indent=2))


def transformer_lens(chosen, tokens, sites):
    from transformer_lens.model_bridge import TransformerBridge

    model = wb.load(device=chosen.device, dtype=getattr(torch, chosen.dtype))  # a bridge rewrites the model in place
    bridge = TransformerBridge.boot_transformers(str(model.source), hf_model=model.hf, tokenizer=model.tokenizer)
    names = {wb.Site.parse(site, model.n_layers).transformer_lens for site in sites}
    return lambda: bridge.run_with_cache(tokens, names_filter=lambda name: name in names)


def nnsight(model, tokens, sites):
    from nnsight import NNsight, save

    traced, taps = NNsight(model.hf), [model.tap(wb.Site.parse(site, model.n_layers)) for site in sites]
    places = sorted({(tap.path, tap.end) for tap in taps}, key=_called)

    def run():
        kept = {}
        with traced.trace(tokens):
            for path, end in places:
                module = traced.get(path)
                kept[path] = save(module.input if end == "input" else module.output)
        return kept

    return run


def _called(place):
    """Forward order of a llama block: attention, down projection's input, MLP, block."""
    path, _ = place
    layer = int(path.split(".")[2])
    inner = path.split(".", 3)[3] if path.count(".") > 2 else "z"
    return layer, {"self_attn": 0, "mlp.down_proj": 1, "mlp": 2, "z": 3}[inner]


if __name__ == "__main__":
    main()
