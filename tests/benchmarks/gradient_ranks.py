"""How often a gradient has the rank of its tokens, on the first shipped facts: the statistic of Katz et al. 2024 (arXiv
2402.12865), who find it in over 98.5 % of cases but for the last layer's MLP, where it is 1.

    python tests/benchmarks/gradient_ranks.py [--facts 100]

Prints one JSON object: of each matrix, over layers but the last and texts, the shares of gradients with a rank of the number of
tokens and of one less, and over texts of the last layer the share of rank 1. The loss is that of the object's first token.
"""

import json

from models import options

import workbench as wb
from workbench.analyses.edited_texts import first_tokens


def main() -> None:
    chosen = options(facts=100)
    model = wb.load(device=chosen.device)
    facts = wb.shipped_facts(n=chosen.facts)
    first = first_tokens(model, [(one.prompt, one.object) for one in facts])
    ranks = wb.backward_lens(model, [one.prompt for one in facts], [[token] for token in first], k=1).matrices
    missing, last = ranks["tokens"] - ranks["rank"], ranks["layer"] == model.n_layers - 1
    ranks = ranks.assign(full=missing == 0, one_less=missing == 1, one=ranks["rank"] == 1)
    earlier, at_the_end = ranks[~last].groupby("matrix"), ranks[last].groupby("matrix")
    table = earlier[["full", "one_less"]].mean().assign(last_layer_is_1=at_the_end["one"].mean()).round(4)
    settings = vars(chosen) | {"model": model.name, "gradients": len(ranks)}
    print(json.dumps({"benchmark": "gradient ranks", "settings": settings, "table": table.to_dict("index")}, indent=2))


if __name__ == "__main__":
    main()
