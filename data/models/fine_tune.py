"""Copies of the embedded model to compare it with: one trained on for a few hundred steps, or one that never was trained.

    python data/models/fine_tune.py out/fine-tuned
    python data/models/fine_tune.py out/untrained --untrained

Either is an ordinary Hugging Face folder. The same seed, versions, machine and number of threads give the same weights.
"""

import argparse
import os
import shutil
from itertools import islice
from pathlib import Path

import torch
from tqdm.auto import trange
from transformers import AutoModelForCausalLM, PreTrainedModel

import workbench as wb

REPORTED = 20
"""Steps that the printed losses are a mean of: those of single batches differ by more than training gains."""


def trained_on(model: wb.LanguageModel, asked: argparse.Namespace) -> PreTrainedModel:
    """All weights, by AdamW without weight decay; the learning rate rises for a tenth of the steps, then falls to zero."""
    corpus = wb.Corpus(asked.corpus, length=asked.length, packed=True)
    whole = (torch.from_numpy(row.tokens).long() for row in corpus.rows(model) if len(row) == asked.length)
    rows = list(islice(whole, asked.steps * asked.batch))
    if len(rows) < asked.steps * asked.batch:
        enough = len(rows) // asked.batch
        raise SystemExit(f"{asked.corpus!r} has text for {enough} steps, not {asked.steps}. Ask for fewer or smaller ones.")
    optimiser = torch.optim.AdamW(model.hf.parameters(), lr=asked.learning_rate, weight_decay=0.0, fused=True)
    rising = max(1, asked.steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: min((step + 1) / rising, (asked.steps - step) / (asked.steps - rising + 1))
    )
    losses = []
    for step in (bar := trange(asked.steps, desc="fine-tune", unit="step")):
        tokens = torch.stack(rows[step * asked.batch : (step + 1) * asked.batch])
        loss = model.hf(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.hf.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        optimiser.zero_grad()
        losses.append(loss.item())
        bar.set_postfix(loss=f"{losses[-1]:.3f}")
    for name, some in (("first", losses[:REPORTED]), ("last", losses[-REPORTED:])):
        print(f"loss of the {name} {len(some)} steps: {sum(some) / len(some):.3f} nats a token")
    return model.hf


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder to write, which must not be there yet")
    parser.add_argument("--untrained", action="store_true", help="random weights of the same shapes, nothing trained")
    parser.add_argument("--corpus", default="wikipedia", help="a shipped corpus, or a file")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=2, help="rows a step")
    parser.add_argument("--length", type=int, default=64, help="tokens a row")
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    if asked.out.exists():
        parser.error(f"{str(asked.out)!r} is there already. Name another folder, or remove it.")
    torch.manual_seed(asked.seed)
    model = wb.load()
    hf = AutoModelForCausalLM.from_config(model.hf.config) if asked.untrained else trained_on(model, asked)
    beside = asked.out.with_name(f".{asked.out.name}.{os.getpid()}.partial")
    try:
        hf.save_pretrained(beside)
        model.tokenizer.save_pretrained(beside)
        beside.rename(asked.out)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    print(f"written to {asked.out}")


if __name__ == "__main__":
    main()
