"""How fast shuffled batches come from a store, beside the cache of sae-lens and memory itself, in one run.

    python tests/benchmarks/reading.py [--tokens 200000]

Prints one JSON object. The same activations (the embedding of the embedded model: 576 numbers a token, in float32, as sae-lens
caches them) in both. Ours are shuffled over the whole store. sae-lens, run where it is installed, reads its dataset in order
(rows of 128 tokens) and mixes in a buffer of 64 rows, half of it kept. Memory: the same gather from one tensor. Files are in
the page cache; each round goes through all tokens once.
"""

import argparse
import json
import logging
import statistics
import tempfile
import warnings
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import torch
from measuring import ratio, seconds

import workbench as wb

CONTEXT, SITE = 128, "embed"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, default=200_000)
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    work = Path(tempfile.mkdtemp())
    tokens = options.tokens // CONTEXT * CONTEXT
    corpus = wb.Corpus("wikipedia", length=CONTEXT, packed=True, max_tokens=tokens)
    model = wb.load()
    store = wb.capture_to_store(model, corpus, SITE, work / "store", dtype="float32", massive_at=None, progress=False)
    everything = store.read(SITE)

    def batches():
        assert sum(len(batch) for batch in store.batches(SITE, options.batch)) == tokens

    def in_order():
        assert sum(len(batch) for batch in store.batches(SITE, options.batch, shuffle=False)) == tokens

    def loader():
        whole = torch.utils.data.DataLoader(store.dataset(SITE), options.batch, shuffle=True)
        assert sum(len(batch) for batch in whole) == tokens

    def memory():
        for chosen in torch.randperm(tokens).split(options.batch):
            everything.index_select(0, chosen)

    variants = {
        "store.batches, shuffled": batches, "store.batches, in order": in_order, "DataLoader, shuffled": loader,
        "gather from memory": memory,
    }  # fmt: skip
    if find_spec("sae_lens"):
        variants["sae-lens, its cache and mixing buffer"] = sae_lens(everything, work / "sae_lens", options.batch)
    for run in variants.values():
        run()
    times = seconds(variants, options.rounds)
    size = tokens * everything.shape[1] * everything.element_size()
    table = [
        {
            "variant": name, "gb_per_second": round(size / statistics.median(found) / 1e9, 2),
            "ratio_to_memory": ratio(found, times["gather from memory"]),
        }
        for name, found in times.items()
    ]  # fmt: skip
    settings = vars(options) | {"gb": round(size / 1e9, 3), "torch": torch.__version__}
    print(json.dumps({"benchmark": "reading", "settings": settings, "table": table}, indent=2))


def sae_lens(values, folder, batch):
    from datasets import Array2D, Dataset, Features
    from sae_lens.training.activations_store import ActivationsStore

    rows = values.unflatten(0, (-1, CONTEXT)).numpy()
    features = Features({SITE: Array2D(shape=rows.shape[1:], dtype="float32")})
    Dataset.from_generator(lambda: ({SITE: row} for row in rows), features=features).save_to_disk(str(folder))

    def run():
        cache = ActivationsStore(
            model=SimpleNamespace(), dataset=None, streaming=False, hook_name=SITE, hook_head_index=None,
            context_size=CONTEXT, d_in=rows.shape[2], n_batches_in_buffer=64, total_training_tokens=len(values),
            store_batch_size_prompts=16, train_batch_size_tokens=batch, prepend_bos=False, normalize_activations="none",
            device=torch.device("cpu"), dtype="float32", cached_activations_path=str(folder),
        )  # fmt: skip
        read = 0
        while read < len(values) - batch:
            read += len(next(cache))

    return run


if __name__ == "__main__":
    main()
