"""Seconds of experiments at every layer, run from their layer on, beside the same runs of the whole model.

    python tests/benchmarks/rerun.py [--tokens 300]

Prints one JSON object. Bound: the share of blocks (and of the unembedding, for losses) that lie behind the layers.
"""

import argparse
import json
import statistics
from unittest import mock

from measuring import ratio, seconds

import workbench as wb
from workbench.analyses import activation_patching
from workbench.analyses.held_out_loss import held_out_rows, losses
from workbench.analyses.rerun import Rerun

ROUNDS = 5


def _blocks_run(model: wb.LanguageModel, layer: int) -> int:
    """The first one runs whatever the layer."""
    return model.n_layers - layer + (layer > 0)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, default=300)
    options = parser.parse_args()
    model = wb.load()
    rows = held_out_rows(wb.Corpus("wikipedia", length=128), model, options.tokens)
    layers = range(0, model.n_layers, 3)

    def ablated(*, begun: bool) -> None:
        texts = Rerun(model, rows, None)
        for layer in layers:
            losses(texts, wb.intervene(model, wb.ablate(f"mlp_out.{layer}")), since=layer if begun else 0)

    def patched() -> None:
        prompts = "The capital of France is", "The capital of Italy is"
        wb.activation_patching(model, *prompts, sites=["resid_pre", "attn_out", "mlp_out"], progress=False)

    def patched_whole() -> None:
        with mock.patch.object(activation_patching, "_streams", return_value={}):
            patched()

    works = {
        "losses without one MLP, whole runs": lambda: ablated(begun=False),
        "losses without one MLP": lambda: ablated(begun=True),
        "activation patching, whole runs": patched_whole,
        "activation patching": patched,
    }
    for work in works.values():
        work()
    times = seconds(works, ROUNDS)
    head, block = model.d_vocab * model.d_model, sum(p.numel() for p in model.block(0).parameters())
    whole = len(layers) * (model.n_layers * block + head)
    bounds = {
        "losses without one MLP": sum(_blocks_run(model, layer) * block + head for layer in layers) / whole,
        "activation patching": sum(_blocks_run(model, layer) for layer in range(model.n_layers)) / model.n_layers**2,
    }
    table = [
        {
            "work": name,
            "seconds": round(statistics.median(times[f"{name}, whole runs"]), 2),
            "seconds_from_layer_on": round(statistics.median(times[name]), 2),
            "ratio": ratio(times[name], times[f"{name}, whole runs"]),
            "bound": round(bound, 3),
        }
        for name, bound in bounds.items()
    ]
    print(json.dumps({"model": model.name, "tokens": options.tokens, "layers": len(layers), "table": table}, indent=1))


if __name__ == "__main__":
    main()
