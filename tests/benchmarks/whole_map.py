"""A whole neuron map, from the model to its files: seconds of each part and peak memory.

    python tests/benchmarks/whole_map.py [--device cuda --shape llama-8b --dtype bfloat16] [--stream 1 --layers 4]

With `--stream 1` the model (random weights of the shape) is first written to a folder, and its blocks stay there. Prints one
JSON object; `bare_product_seconds` is the time of the products alone, in the same run, of rows that lie on the device.
"""

import gc
import json
import tempfile
import time
from pathlib import Path

import torch
from measuring import peak_extra_bytes, resident, wait
from models import loaded, options

import workbench as wb


def main() -> None:
    given = options(layers=0, stream=0, side="all")
    device = torch.device(given.device)
    with tempfile.TemporaryDirectory() as folder:
        model = loaded(given.shape, given.device, given.dtype, given.layers or None)
        if given.stream:
            model.hf.save_pretrained(f"{folder}/model")
            model.tokenizer.save_pretrained(f"{folder}/model")
            del model
            gc.collect()  # its modules refer to each other
            started = time.perf_counter()
            model = wb.load(f"{folder}/model", device=device, stream=True, check=False)
            opened = time.perf_counter() - started
        else:
            opened = 0.0
        W_U, rows = model.vocabulary.W_U, model.weight("W_in", 0).T.to(device).contiguous()
        wb.map_neurons(model, side="up", layers="0", progress=False)  # kernels are compiled, buffers of the libraries are there
        wait()
        before, found = resident(), {}

        def run() -> None:
            started = time.perf_counter()
            neurons = wb.map_neurons(model, side=given.side, progress=False)
            wait()
            mapped = time.perf_counter()
            neurons.save(f"{folder}/map")
            found.update(mapping=mapped - started, saving=time.perf_counter() - mapped, neurons=neurons.settings["neurons"])
            found.update(engine=neurons.settings["engine"], sides=neurons.settings["sides"])

        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            run()
            peak = torch.cuda.max_memory_allocated()
        else:
            peak = peak_extra_bytes(run, device)
        rows = rows.detach()
        out = torch.empty(len(rows), model.d_vocab, device=device, dtype=rows.dtype)
        torch.mm(rows, W_U, out=out)
        wait()
        started = time.perf_counter()
        products = model.n_layers * len(found["sides"])
        for _ in range(products):
            torch.mm(rows, W_U, out=out)
        wait()
        print(
            json.dumps(
                {
                    "benchmark": "neuron map, from the model to its files",
                    "settings": vars(given) | {"torch": torch.__version__, "n_layers": model.n_layers},
                    "neurons": found["neurons"],
                    "sides": found["sides"],
                    "engine": found["engine"],
                    "opening_seconds": round(opened, 2),
                    "mapping_seconds": round(found["mapping"], 2),
                    "saving_seconds": round(found["saving"], 2),
                    "bare_product_seconds": round(time.perf_counter() - started, 2),
                    "files_mb": round(sum(file.stat().st_size for file in Path(f"{folder}/map").iterdir()) / 1e6),
                    "peak_device_gb" if device.type == "cuda" else "peak_extra_gb": round(peak / 1e9, 2),
                    "resident_before_gb": round(before / 1e9, 2),
                    "resident_after_gb": round(resident() / 1e9, 2),
                },
                indent=2,
            )
        )


if __name__ == "__main__":
    main()
