"""The verb that asks what is carried linearly from one state to another."""

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
from workbench.cli.options import Device, DType, Json, Model, Out, Revision, load_model
from workbench.cli.show import emit_json, say, table
from workbench.embedded import DEFAULT as DEFAULT_MODEL
from workbench.manifest import note, wrote


class KindOption(StrEnum):
    """How maps are fitted."""

    ols = "ols"
    ridge = "ridge"


def transport(
    corpus: CorpusOption,
    out: Out,
    model: Model = DEFAULT_MODEL,
    pairs: Annotated[str, typer.Option(help="all, adjacent, last, or a list: 4>8,8>12 or resid_mid.3>mlp_out.3.")] = "all",
    kind: Annotated[KindOption, typer.Option(help="ridge, its strength chosen inside the fold, or ols.")] = KindOption.ridge,
    strata: Annotated[str, typer.Option(help="ordinary, all, rest, or several of them.")] = "ordinary",
    null: Annotated[bool, typer.Option(help="Also score targets of other documents.")] = True,
    weigh: Annotated[
        str, typer.Option(help="Also weigh R² by these: fisher, readers, readers@20; or none.")
    ] = "fisher,readers",
    closely: Annotated[
        bool | None, typer.Option(help="Also curves, directions and intervals. [default: of 16 pairs or fewer]")
    ] = None,
    directions: Annotated[
        list[str] | None,
        typer.Option(
            help="principal:32, unembedding:32 or 'unembedding: Paris', neurons:32, neurons@12:32, random:32, a file."
        ),
    ] = None,
    routes: Annotated[int, typer.Option(min=0, help="Also follow other tokens as sources, on so many tokens.")] = 0,
    sources: Annotated[int, typer.Option(min=1, help="For --routes: tokens that each route gives.")] = 1,
    damage: Annotated[int, typer.Option(min=0, help="Also replace the target, and measure the loss on so many tokens.")] = 0,
    one_in: Annotated[int, typer.Option(min=1, help="For --damage: replace one position in so many.")] = 1,
    any_order: Annotated[bool, typer.Option("--any-order", help="Allow pairs from later to earlier sites.")] = False,
    fisher_tokens: Annotated[int, typer.Option(min=1, help="Tokens whose gradients weigh directions.")] = 2048,
    max_tokens: MaxTokens = None,
    column: Column = "text",
    length: Length = None,
    packed: Packed = False,
    bos: Bos = BosOption.tokenizer,
    batch_tokens: BatchTokens = None,
    seed: Annotated[int, typer.Option(min=0, help="Of all that is drawn.")] = 0,
    plot: Annotated[bool, typer.Option(help="Write the pictures.")] = True,
    revision: Revision = None,
    device: Device = None,
    dtype: DType = None,
    json: Json = False,
) -> None:
    """Was it carried here linearly, or computed on the way? Scores of pairs of states, with their nulls."""
    from workbench.analyses.transport import transport as run
    from workbench.analyses.transport_scores import PICTURES
    from workbench.artifacts import output_folder, write_page
    from workbench.results import wrapped

    output_folder(out)
    texts = load_corpus(corpus, column, length, packed, bos, max_tokens)
    note(seed=seed)
    found = run(
        load_model(model, revision, device, dtype), texts,
        _parts(pairs),
        kind=kind.value, strata=_parts(strata), null=null,  # pyright: ignore[reportArgumentType]
        weigh=[] if weigh == "none" else _parts(weigh),
        closely=closely, directions=directions or None, routes=routes, sources=sources, damage=damage, one_in=one_in,
        any_order=any_order, fisher_tokens=fisher_tokens, batch_tokens=batch_tokens, seed=seed, progress=not json,
    )  # fmt: skip
    wrote(found.save(out))
    for name in PICTURES:
        (out / f"{name}.html").unlink(missing_ok=True)  # of a run before this one
    for name, figure in found.figures().items() if plot else ():
        wrote(write_page(out / f"{name}.html", figure))
    if json:
        rows = {name: None if one is None else one.to_dict("records") for name, one in found.tables().items()}
        emit_json({"out": str(out), "settings": found.settings, "paragraph": found.paragraph(), **rows})
        return
    shown = found.overview()
    shown = shown if len(shown) <= SHOWN else shown.nlargest(SHOWN, "held_out")
    rows = [[value if isinstance(value, str) else f"{value:.3f}" for value in row.values()] for row in shown.to_dict("records")]
    table(
        "Pairs" if len(found.table) <= SHOWN else f"{SHOWN} of {len(found.table)} pairs, best first", list(shown.columns), rows
    )
    print(f"\n{wrapped(found.paragraph())}")
    say(f"\nWritten to {out}.")


SHOWN = 16


def _parts(text: str) -> list[str]:
    return [part.strip() for part in text.split(",")]


VERBS = {"transport": transport}
"""By the name on the command line."""
