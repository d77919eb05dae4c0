"""What a backward lens costs, beside the bare passes, its own products and the plain way, in one run.

    python tests/benchmarks/backward_lens.py [--device cuda --shape llama-8b --dtype bfloat16 --batch 1 --length 64]

Prints one JSON object. The loss is that of the last token of each row.

Capturing, relative to `passes`:
- `passes`: forward and backward with derivatives of activations alone, the head at the last token, nothing kept;
- `factors`: `wb.collect_gradients`, both factors of every matrix;
- `.grad`: forward and backward with gradients of all weights, and all logits, as most would write it.

Reading all vectors that are as wide as the stream, relative to `products`:
- `products`: their matrix product with the head, in the blocks that the workbench makes, into one kept buffer;
- `words`: `Vocabulary.project` with 5 tokens of both ends;
- `dense`: all logits, and `topk` twice.

Singular values of every matrix's gradient: from the factors; and of the dense gradients of two layers, by
`torch.linalg.svdvals`, scaled up to all.

Ratios are medians of rounds in which the variants of a group take turns. Peak memory, on a GPU, is of one run, beyond what was
held; `factors_mb` and `dense_gradients_mb` are what is kept of all matrices in either way.
"""

import json
import statistics

import torch
from measuring import Work, peak_extra_bytes, ratio, seconds
from models import loaded, options

import workbench as wb
from workbench import tiles
from workbench.analyses.backward_lens_tables import stream_vectors, unit
from workbench.capturing import keeping
from workbench.gradients.collect import frozen
from workbench.model import Batch
from workbench.sites import Site

DENSE_LAYERS = 2
HEIGHT = 768
"""Rows a block on a CPU."""
K = 5


def main() -> None:
    chosen = options(batch=1, length=64, rounds=7)
    model = loaded(chosen.shape, chosen.device, chosen.dtype)
    tokens = torch.randint(0, 256, (chosen.batch, chosen.length), device=model.device)
    batch = Batch(tokens, torch.ones_like(tokens, dtype=torch.bool))
    last = torch.tensor([chosen.length - 1], device=model.device)
    embed = Site("embed")

    def loss(logits, _=None):
        return -logits[:, -1].float().log_softmax(-1)[:, 7].sum()

    def passes():
        with frozen(model), keeping(model, [embed], to_the_end=True, gradients=True) as kept:
            number = loss(model.forward(batch, last))
            return torch.autograd.grad(number, kept[embed])

    def factors():
        return wb.collect_gradients(model, batch, loss, columns=last)

    def plain():
        loss(model.forward(batch)).backward()
        model.hf.zero_grad(set_to_none=True)

    device = torch.device(chosen.device)
    tables = {"capturing": measured({"passes": passes, "factors": factors, ".grad": plain}, chosen.rounds, device)}

    gradients = factors()
    rows = unit(torch.cat([one.rows for one in stream_vectors(gradients)]))
    rows = rows[rows.isfinite().all(1)]
    vocabulary = model.vocabulary
    W_U = vocabulary.W_U

    def products():
        normed = vocabulary.decoded(rows, "gain")
        height = min(HEIGHT, len(rows)) if device.type == "cpu" else len(rows)
        width = tiles.TILE if device.type == "cpu" else 8192
        kept = torch.empty(height, model.d_vocab if device.type == "cpu" else width, device=device)
        for part in normed.split(height):
            for a, b in tiles.spans(model.d_vocab, width):
                out = kept[: len(part), a:b] if device.type == "cpu" else kept[: len(part), : b - a]
                torch.mm(part, W_U[:, a:b].to(part.dtype), out=out)

    def words():
        return vocabulary.project(rows, decoder="gain", k=K, k_bottom=K)

    def dense():
        logits = vocabulary.decoded(rows, "gain") @ W_U.to(rows.dtype)
        return logits.topk(K), logits.topk(K, largest=False), logits.logsumexp(-1)

    with torch.no_grad():
        tables["words"] = measured({"products": products, "words": words, "dense": dense}, chosen.rounds, device)

    names = list(gradients.matrices)
    some = [name for name in names if gradients.matrices[name].layer < DENSE_LAYERS]

    def values():
        return [gradients[name].singular_values() for name in names]

    def dense_values():
        return [torch.linalg.svdvals(gradients[name].dense()) for name in some]

    found = seconds({"factors' values": values, "dense values": dense_values}, 1)
    scaled = found["dense values"][0] * len(names) / len(some)
    tables["singular values"] = [
        {"variant": "factors' values", "seconds": round(found["factors' values"][0], 3)},
        {"variant": "dense values, of all matrices by those of 2 layers", "seconds": round(scaled, 1)},
    ]
    bytes_kept = sum(value.nbytes for value in (*gradients.inputs.values(), *gradients.derivatives.values()))
    weights = sum(sum(w.nbytes for w in model.module(one.path).parameters()) for one in gradients.matrices.values())
    settings = vars(chosen) | {
        "weights": model.name, "vectors": len(rows), "factors_mb": round(bytes_kept / 1e6, 1),
        "dense_gradients_mb": round(weights / 1e6, 1), "torch": torch.__version__, "threads": torch.get_num_threads(),
    }  # fmt: skip
    print(json.dumps({"benchmark": "backward lens", "settings": settings, "tables": tables}, indent=2))


def measured(variants: dict[str, Work], rounds: int, device: torch.device) -> list[dict[str, object]]:
    """Seconds, ratio to the first and peak memory of each variant."""
    memory = {name: peak_extra_bytes(run, device) / 1e6 for name, run in variants.items()}  # also the warm-up
    times = seconds(variants, rounds)
    base = times[next(iter(variants))]
    return [
        {
            "variant": name, "seconds": round(statistics.median(found), 4), "ratio": ratio(found, base),
            "peak_extra_mb": round(memory[name], 1) if device.type == "cuda" else None,
        }
        for name, found in times.items()
    ]  # fmt: skip


if __name__ == "__main__":
    main()
