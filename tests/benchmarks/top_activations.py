"""What top activations of all neurons of four layers cost, beside the model's body alone over the same text, in one run.

    python tests/benchmarks/top_activations.py [--tokens 200000] [--device cuda --shape llama-8b --dtype bfloat16]

Prints one JSON object. The four layers are spread over the depth, the last among them, so that both go through all of it.
"""

import json
import statistics

import torch
from measuring import ratio, seconds
from models import loaded, options, run_body

import workbench as wb


@torch.no_grad()
def main() -> None:
    chosen = options(tokens=200_000, rounds=1)
    model = loaded(chosen.shape, chosen.device, chosen.dtype)
    layers = [round((model.n_layers - 1) * part) for part in (0.25, 0.5, 0.75, 1)]
    sites = [f"mlp_post.{layer}" for layer in layers]
    flow = wb.stream(model, wb.Corpus("wikipedia", max_tokens=chosen.tokens), sites, progress=False)

    def body(corpus=flow.corpus):
        run_body(model, corpus, flow.batch_tokens)

    def streamed():
        for _ in flow:
            pass

    def top():
        wb.top_activations(model, flow.corpus, sites, progress=False)

    few = wb.Corpus("wikipedia", max_tokens=4 * flow.batch_tokens)
    body(few)  # the warm-up of both
    wb.top_activations(model, few, sites, progress=False)
    variants = {"body alone": body, "wb.stream of the same sites": streamed, "wb.top_activations": top}
    times = seconds(variants, chosen.rounds)
    table = [
        {
            "variant": name, "seconds": round(statistics.median(found), 2),
            "ratio_to_body": ratio(found, times["body alone"]),
            "ratio_of_each_round": [round(a / b, 3) for a, b in zip(found, times["body alone"], strict=True)],
        }
        for name, found in times.items()
    ]  # fmt: skip
    settings = vars(chosen) | {
        "weights": model.name, "layers": layers, "units": 4 * model.d_mlp, "batch_tokens": flow.batch_tokens,
        "torch": torch.__version__,
    }  # fmt: skip
    print(json.dumps({"benchmark": "top_activations", "settings": settings, "table": table}, indent=2))


if __name__ == "__main__":
    main()
