"""What top activations of all neurons of four layers cost, beside the model's body alone over the same text, in one run.

    python tests/benchmarks/top_activations.py [--tokens 200000] [--device cuda --shape llama-8b --dtype bfloat16]

Prints one JSON object. The four layers are spread over the depth, the last among them, so that both go through all of it.
"""

import argparse
import json
import logging
import statistics
import warnings

import torch
from measuring import ratio, seconds
from models import SHAPES, loaded

import workbench as wb
from workbench.streaming.batches import batch_of, batched


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--shape", choices=SHAPES, default="smollm2")
    parser.add_argument("--tokens", type=int, default=200_000)
    parser.add_argument("--rounds", type=int, default=1)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.manual_seed(0)
    model = loaded(options.shape, options.device, options.dtype)
    layers = [round((model.n_layers - 1) * part) for part in (0.25, 0.5, 0.75, 1)]
    sites = [f"mlp_post.{layer}" for layer in layers]
    flow = wb.stream(model, wb.Corpus("wikipedia", max_tokens=options.tokens), sites, progress=False)

    def body(corpus=flow.corpus):
        for rows in batched(corpus.rows(model), flow.batch_tokens):
            batch = batch_of(rows, model)
            model.hf.model(input_ids=batch.tokens, attention_mask=batch.mask.long(), use_cache=False)

    def streamed():
        for _ in flow:
            pass

    def top():
        wb.top_activations(model, flow.corpus, sites, progress=False)

    few = wb.Corpus("wikipedia", max_tokens=4 * flow.batch_tokens)
    body(few)  # the warm-up of both
    wb.top_activations(model, few, sites, progress=False)
    variants = {"body alone": body, "wb.stream of the same sites": streamed, "wb.top_activations": top}
    times = seconds(variants, options.rounds)
    table = [
        {
            "variant": name, "seconds": round(statistics.median(found), 2),
            "ratio_to_body": ratio(found, times["body alone"]),
            "ratio_of_each_round": [round(a / b, 3) for a, b in zip(found, times["body alone"], strict=True)],
        }
        for name, found in times.items()
    ]  # fmt: skip
    settings = vars(options) | {
        "weights": model.name, "layers": layers, "units": 4 * model.d_mlp, "batch_tokens": flow.batch_tokens,
        "torch": torch.__version__,
    }  # fmt: skip
    print(json.dumps({"benchmark": "top_activations", "settings": settings, "table": table}, indent=2))


if __name__ == "__main__":
    main()
