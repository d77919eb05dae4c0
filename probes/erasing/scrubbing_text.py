"""A scrubbing in words."""

from __future__ import annotations

from typing import TYPE_CHECKING

from workbench.results import wrapped

if TYPE_CHECKING:
    from probes.erasing.scrubbing import Scrubbing

SHOWN = {
    "erased": "erased", "rank": "rank", "loss": "loss", "loss_error": "±", "kl": "KL", "agreement": "same token",
    "concept_loss": "on its texts", "concept_loss_error": "± ", "task_accuracy": "task", "task_odds": "odds",
}  # fmt: skip


def scrubbing_text(result: Scrubbing) -> str:
    """The table, and what the model says."""
    own = result.settings
    answers = "" if own["answers"] is None else "; task: " + ", ".join(f"{a!r} after {z}" for z, a in own["answers"].items())
    lines = [
        wrapped(
            f"{own['dataset']} erased while {own['model']} runs. Change of the loss, nats a token, on ordinary text "
            f"({own['corpus']}, {own['scored_tokens']['ordinary']:,} tokens, loss {own['loss']:.3f}) and on the set's own "
            f"texts ({own['scored_tokens']['concept']:,}, loss {own['concept_loss']:.3f}){answers}"
        )
    ]
    shown = result.table[[column for column in SHOWN if column in result.table]].rename(columns=SHOWN)
    lines.append(shown.to_string(index=False, float_format=lambda x: f"{x:.4f}"))
    for prompt, some in result.texts.groupby("prompt", sort=False):
        lines.append(f"{prompt!r} goes on:")
        lines += [f"  {row.erased:<20} {row.text[len(str(prompt)) :]!r}" for row in some.itertuples()]
    return "\n".join([*lines, "  .table .curve .texts .plot() .save(folder)"])
