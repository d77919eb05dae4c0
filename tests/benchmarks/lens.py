"""What a logit lens of many tokens costs, beside its own matrix products and the plain way, in one run.

    python tests/benchmarks/lens.py [--tokens 1024 --rounds 3]

Prints one JSON object. Random rows and weights of the shape of SmolLM2-135M: 31 states a token. Of each: the 10 likeliest
tokens, entropy, KL to the last state of its token, rank and log-probability of two targets.

- `products`: the matrix products alone, in the blocks that the workbench makes, into one kept buffer.
- `workbench`: `Vocabulary.project`; `workbench without numba`: the same where numba is not installed.
- `plain`: one state of all tokens at a time, its logits and log-softmax in memory, and the log-softmax of the last.

- `TransformerLens`: as `plain`, with the norm and the head of its bridge, where it is installed. It gives a lens's logits whole
  (`JacobianLens.readout` too); what is made of them is left to its user.

Ratios are medians of rounds in which the variants take turns. `peak_extra_mb` is of one run in a process of its own, beyond the
rows and weights; what is found is in it (38 MB for 4,096 tokens).
"""

import argparse
import json
import statistics
import subprocess
import sys
from importlib.util import find_spec

import torch
from measuring import Work, peak_extra_bytes, ratio, seconds

import workbench as wb
from workbench import tiles
from workbench.vocabulary import Vocabulary

D_MODEL, D_VOCAB, STATES, K = 576, 49_152, 31, 10
HEIGHT = 744
"""Rows a block: whole tokens of them, at most `tiles.HEIGHT`."""


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default="")
    options = parser.parse_args()
    torch.manual_seed(0)
    W_U = (torch.randn(D_VOCAB, D_MODEL) / D_MODEL**0.5 * 3).T
    vocabulary = Vocabulary(W_U, None, torch.ones(D_MODEL), torch.nn.RMSNorm(D_MODEL))
    # States come closer to their last one, as a model's do.
    away = torch.linspace(1.5, 0, STATES)[:, None]
    rows = torch.randn(options.tokens, 1, D_MODEL) + torch.randn(options.tokens, STATES, D_MODEL) * away
    targets = torch.randint(0, D_VOCAB, (options.tokens, 2))

    def products():
        kept = torch.empty(HEIGHT, D_VOCAB)
        for part in rows.flatten(0, 1).split(HEIGHT):
            normed = vocabulary.ln_final(part)
            for a, b in tiles.spans(D_VOCAB, tiles.TILE):
                torch.mm(normed, W_U[:, a:b], out=kept[: len(part), a:b])

    def workbench():
        return vocabulary.project(
            rows.flatten(0, 1), decoder="norm", k=K, entropy=True, targets=targets.repeat_interleave(STATES, 0), last_of=STATES
        )

    def workbench_without_numba():
        installed = tiles.has_numba
        tiles.has_numba = lambda: False
        try:
            return workbench()
        finally:
            tiles.has_numba = installed

    def plain(logits_of=lambda state: vocabulary.ln_final(state) @ W_U):
        found = []
        last = logits_of(rows[:, -1]).log_softmax(1)
        p = last.exp()
        for state in range(STATES):
            logits = logits_of(rows[:, state])
            log_q = logits.log_softmax(1)
            own = logits.gather(1, targets)
            ranks = torch.stack([(logits > own[:, i, None]).sum(1) for i in range(2)], 1)
            kl, entropy = (p * (last - log_q)).sum(1), -(log_q.exp() * log_q).sum(1)
            found.append((log_q.topk(K), kl, entropy, ranks, log_q.gather(1, targets)))
        return found

    variants: dict[str, Work] = {
        "products": products, "workbench": workbench, "workbench without numba": workbench_without_numba, "plain": plain,
    }  # fmt: skip
    if find_spec("transformer_lens"):
        bridge = transformer_lens()
        variants["TransformerLens"] = lambda: plain(lambda state: bridge.unembed(bridge.ln_final(state[None]))[0])
    if options.only:
        print(peak_extra_bytes(variants[options.only], rows.device))
        return
    memory = {name: _peak(name) for name in variants}
    times = seconds(variants, options.rounds)
    table = [
        {
            "variant": name, "seconds": round(statistics.median(found), 2),
            "ratio_to_products": ratio(found, times["products"]),
            "peak_extra_mb": round(memory[name] / 1e6, 1),
        }
        for name, found in times.items()
    ]  # fmt: skip
    settings = vars(options) | {"torch": torch.__version__, "threads": torch.get_num_threads()}
    print(json.dumps({"benchmark": "lens", "settings": settings, "table": table}, indent=2))


def transformer_lens():
    from transformer_lens.model_bridge import TransformerBridge

    model = wb.load()
    return TransformerBridge.boot_transformers(str(model.source), hf_model=model.hf, tokenizer=model.tokenizer)


def _peak(name: str) -> int:
    """The most memory that a variant takes in a process of its own."""
    done = subprocess.run([sys.executable, *sys.argv, "--only", name], capture_output=True, text=True, check=True)
    return int(done.stdout)


if __name__ == "__main__":
    main()
