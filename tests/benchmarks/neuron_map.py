"""Speed and memory of the neuron map's hot path, beside what it is held against, in one run.

    python tests/benchmarks/neuron_map.py [--device cuda --shape llama-8b --dtype bfloat16]

Prints one JSON object. Every figure is the median of rounds in which the variants take turns, so that a machine whose
speed drifts slows them all; ratios are taken round by round.
"""

import argparse
import json
import statistics

import torch
from measuring import peak_extra_bytes, ratio, seconds

import workbench as wb
from workbench.embedded import DEFAULT, EMBEDDED
from workbench.projector import Projector
from workbench.vocabulary import Vocabulary

SHAPES = {"smollm2": (576, 1536, 30, 49_152), "llama-8b": (4096, 14_336, 32, 128_256)}
CHUNK = {"cpu": 512, "cuda": 1 << 14}
"""Rows a bare product: where it was fastest. On an H200 chunks of 512 rows take 1.1 times as long as whole layers."""
SOFTMAX_CHUNK = 512
K = 10


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--shape", choices=SHAPES, default="smollm2")
    parser.add_argument("--layers", type=int, help="layers to map (all of the shape, if not given)")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    d_model, d_mlp, n_layers, d_vocab = SHAPES[options.shape]
    layers = options.layers or n_layers
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    torch.manual_seed(0)
    model = wb.load(dtype=dtype, device=device) if options.shape == "smollm2" and EMBEDDED[DEFAULT].is_pulled else None
    if model is not None:
        W_U, rows = model.vocabulary.W_U, [model.weight("W_in", layer).detach().T for layer in range(layers)]
    else:
        W_U = torch.randn(d_vocab, d_model, device=device, dtype=dtype).T
        rows = [torch.randn(d_mlp, d_model, device=device, dtype=dtype) / d_model**0.5 for _ in range(layers)]
    vocabulary = Vocabulary(W_U, None, torch.ones(d_model, device=device, dtype=dtype), torch.nn.Identity())
    chunk = min(CHUNK[device.type], d_mlp)
    kept = torch.empty(chunk, d_vocab, device=device, dtype=dtype)

    def product():
        for layer in rows:
            for part in layer.split(chunk):
                part @ W_U

    def product_into_one_buffer():
        for layer in rows:
            for part in layer.split(chunk):
                torch.mm(part, W_U, out=kept[: len(part)])

    def softmax_topk():
        for layer in rows:
            for part in layer.split(SOFTMAX_CHUNK):
                (part @ W_U).float().softmax(-1).topk(K)

    def decode(**wanted):
        projector = Projector(vocabulary, **wanted)
        for layer in rows:
            _ = projector(layer).top_probabilities

    def top():
        decode(k=K)

    def top_and_bottom():
        decode(k=K, k_bottom=K)

    variants = {f.__name__: f for f in (product, product_into_one_buffer, softmax_topk, top, top_and_bottom)}
    if model is not None:  # all of it: top and bottom, scores, the null's 2,000 rows, the tables
        span = f"0:{layers}"
        variants["map_neurons"] = lambda: wb.map_neurons(model, side="up", layers=span, progress=False)
    everything = rows
    rows = everything[:1]  # a variant's peak does not depend on how many layers follow
    memory = {name: peak_extra_bytes(run, device) for name, run in variants.items()}
    rows = everything
    found = seconds(variants, options.rounds)
    flops = 2 * d_model * d_vocab * d_mlp * layers
    table = [
        {
            "variant": name,
            "seconds": round(statistics.median(times), 4),
            "ratio_to_product": ratio(times, found["product"]),
            "ratio_to_product_into_one_buffer": ratio(times, found["product_into_one_buffer"]),
            "tflops": round(flops / statistics.median(times) / 1e12, 3),
            "peak_extra_mb": round(memory[name] / 1e6, 1),
        }
        for name, times in found.items()
    ]
    settings = vars(options) | {"neurons": d_mlp * layers, "weights": "random" if model is None else DEFAULT}
    settings["torch"] = torch.__version__
    print(json.dumps({"benchmark": "neuron map, up side", "settings": settings, "table": table}, indent=2))


if __name__ == "__main__":
    main()
