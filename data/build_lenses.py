"""Fit the lenses of the embedded model that are shipped in `lenses/`, and say how near they come to its output.

On one H200 this takes five minutes; on two CPU cores it would take days. Products of float32 matrices are made in
TensorFloat-32 there. Another GPU, or another release of its libraries, rounds otherwise and ends nearby.
"""

import argparse
import time
from pathlib import Path

import torch

import workbench as wb

FOLDER = Path(__file__).parent / "lenses" / "smollm2-135m-instruct"
JACOBIAN_TOKENS = 32_768


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["tuned", "jacobian"], help="one of the two")
    parser.add_argument("--out", type=Path, default=FOLDER)
    chosen = parser.parse_args()
    torch.set_float32_matmul_precision("high")
    model = wb.load("smollm2-135m-instruct", device="cuda" if torch.cuda.is_available() else "cpu")
    corpus = wb.Corpus("wikipedia")
    for name in [chosen.only] if chosen.only else ["tuned", "jacobian"]:
        started, folder = time.perf_counter(), chosen.out / name
        if name == "tuned":
            lens = wb.fit_tuned(model, corpus, epochs=3, folder=folder)
        else:
            lens = wb.fit_jacobian(model, corpus.upto(JACOBIAN_TOKENS), folder=folder)
        lens.rounded(torch.bfloat16).save(folder)
        print(f"{lens}: {time.perf_counter() - started:.0f} s, written to {folder}")


if __name__ == "__main__":
    main()
