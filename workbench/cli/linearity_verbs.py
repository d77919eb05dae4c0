"""The verb that scores how linear layers are."""

from enum import StrEnum
from typing import Annotated

import typer

from workbench.cli.corpus_options import (
    BatchTokens,
    Bos,
    BosOption,
    Column,
    CorpusOption,
    Length,
    MaxTokens,
    Packed,
    load_corpus,
)
from workbench.cli.options import Device, DType, Json, Layers, Model, Out, Revision, load_model
from workbench.cli.show import emit_json, say, table
from workbench.embedded import DEFAULT as DEFAULT_MODEL
from workbench.manifest import note, wrote


class KindOption(StrEnum):
    """How maps are fitted."""

    ols = "ols"
    ridge = "ridge"


def linearity(
    corpus: CorpusOption,
    out: Out,
    model: Model = DEFAULT_MODEL,
    layers: Layers = None,
    kind: Annotated[KindOption, typer.Option(help="ols, least squares as published; ridge, for few tokens.")] = KindOption.ols,
    null: Annotated[bool, typer.Option(help="Also score targets from other documents.")] = True,
    damage: Annotated[bool, typer.Option(help="Also remove and replace each block, and measure the loss.")] = True,
    loss_tokens: Annotated[int, typer.Option(min=2, help="Held-out tokens that the loss is measured on.")] = 2048,
    together: Annotated[int, typer.Option(min=0, help="Also remove and replace so many blocks at once.")] = 0,
    on_policy: Annotated[bool, typer.Option("--on-policy", help="Of these, also fit each on what those below give.")] = False,
    max_tokens: MaxTokens = None,
    column: Column = "text",
    length: Length = None,
    packed: Packed = False,
    bos: Bos = BosOption.tokenizer,
    batch_tokens: BatchTokens = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the shuffling of documents.")] = 0,
    plot: Annotated[bool, typer.Option(help="Write the picture, linearity.html.")] = True,
    revision: Revision = None,
    device: Device = None,
    dtype: DType = None,
    json: Json = False,
) -> None:
    """How linear is each block, attention and MLP, really? The published score, and what is left of it."""
    from workbench.analyses.linearity import linearity as run
    from workbench.artifacts import output_folder, write_page
    from workbench.results import wrapped

    output_folder(out)
    texts = load_corpus(corpus, column, length, packed, bos, max_tokens)
    note(seed=seed)
    found = run(
        load_model(model, revision, device, dtype), texts, layers=layers, kind=kind.value, null=null, damage=damage,
        loss_tokens=loss_tokens, together=together, on_policy=on_policy, batch_tokens=batch_tokens, seed=seed, progress=not
    json, )  # fmt: skip
    wrote(found.save(out))
    if plot:
        wrote(write_page(out / "linearity.html", found.plot()))
    if json:
        tables = {"table": found.table, "damage": found.damage, "together": found.together}
        rows = {name: None if one is None else one.to_dict("records") for name, one in tables.items()}
        emit_json({"out": str(out), "settings": found.settings, "paragraph": found.paragraph(), **rows})
        return
    shown = found.overview()
    rows = [[f"{value:.{0 if name == 'layer' else 3}f}" for name, value in row.items()] for row in shown.to_dict("records")]
    table("Blocks", list(shown.columns), rows)
    print(f"\n{wrapped(found.paragraph())}")
    say(f"\nWritten to {out}.")


VERBS = {"linearity": linearity}
"""By the name on the command line."""
