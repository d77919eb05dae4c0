"""The verb that replaces sub-modules by linear maps."""

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
from workbench.cli.linearity_verbs import KindOption
from workbench.cli.options import Device, DType, Json, Layers, Model, Out, Revision, load_model
from workbench.cli.show import emit_json, say, table
from workbench.embedded import DEFAULT as DEFAULT_MODEL
from workbench.manifest import wrote


class PositionsOption(StrEnum):
    """Where sub-modules are replaced."""

    later = "later"
    all = "all"


def shortcuts(
    corpus: CorpusOption,
    out: Out,
    model: Model = DEFAULT_MODEL,
    modes: Annotated[str | None, typer.Option(help="attention,mlp,norms; those that the model has, if not given.")] = None,
    layers: Layers = None,
    stride: Annotated[int | None, typer.Option(min=1, help="In their stead every so-manieth block, and the last.")] = None,
    positions: Annotated[
        PositionsOption, typer.Option(help="later: from the fifth of a row on; all: attention sinks too.")
    ] = PositionsOption.later,
    kind: Annotated[KindOption, typer.Option(help="ridge, or ols, least squares as published.")] = KindOption.ridge,
    affine: Annotated[bool, typer.Option(help="Maps with an intercept; published are maps without.")] = True,
    nulls: Annotated[bool, typer.Option(help="Also replace by the mean, and by nothing.")] = True,
    loss_tokens: Annotated[int, typer.Option(min=2, help="Held-out tokens that the output is measured on.")] = 2048,
    max_tokens: MaxTokens = None,
    column: Column = "text",
    length: Length = None,
    packed: Packed = False,
    bos: Bos = BosOption.tokenizer,
    batch_tokens: BatchTokens = None,
    plot: Annotated[bool, typer.Option(help="Write the picture, shortcuts.html.")] = True,
    revision: Revision = None,
    device: Device = None,
    dtype: DType = None,
    json: Json = False,
) -> None:
    """Can attention, the MLPs or the norms of the last blocks be replaced by linear maps? What it costs, beside nulls."""
    from workbench.analyses.shortcuts import shortcuts as run
    from workbench.artifacts import output_folder, write_page
    from workbench.results import wrapped

    output_folder(out)
    texts = load_corpus(corpus, column, length, packed, bos, max_tokens)
    found = run(
        load_model(model, revision, device, dtype), texts,
        modes=None if modes is None else [part.strip() for part in modes.split(",")],
        layers=layers, stride=stride, positions=positions.value, kind=kind.value, affine=affine, nulls=nulls,
        loss_tokens=loss_tokens, batch_tokens=batch_tokens, progress=not json,
    )  # fmt: skip
    wrote(found.save(out))
    if plot:
        wrote(write_page(out / "shortcuts.html", found.plot()))
    if json:
        rows = {"table": found.table.to_dict("records"), "fits": found.fits.to_dict("records")}
        emit_json({"out": str(out), "settings": found.settings, "paragraph": found.paragraph(), **rows})
        return
    shown = found.overview()
    rows = [[f"{value:.{0 if name == 'layer' else 3}f}" for name, value in row.items()] for row in shown.to_dict("records")]
    table("Nats a token more, from each block on", list(shown.columns), rows)
    print(f"\n{wrapped(found.paragraph())}")
    say(f"\nWritten to {out}.")


VERBS = {"shortcuts": shortcuts}
"""By the name on the command line."""
