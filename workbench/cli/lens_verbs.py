"""The verbs of lenses: what each layer already predicts, and maps that say it better."""

from pathlib import Path
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
from workbench.cli.show import emit_json, say
from workbench.embedded import DEFAULT as DEFAULT_MODEL
from workbench.manifest import note, wrote


def lens(
    prompt: Annotated[str, typer.Option(help="The text.")],
    model: Model = DEFAULT_MODEL,
    lens: Annotated[Path | None, typer.Option(help="Folder of a fitted lens; the logit lens, if not given.")] = None,
    layers: Layers = None,
    top_k: Annotated[int, typer.Option(min=1, help="Likeliest tokens of each cell.")] = 5,
    target: Annotated[str | None, typer.Option(help="Token to follow; the text's next one, if not given.")] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Also write tables and the picture here.")] = None,
    revision: Revision = None,
    device: Device = None,
    dtype: DType = None,
    json: Json = False,
) -> None:
    """What does each layer already predict?"""
    from workbench.analyses.lens import lens as run
    from workbench.artifacts import output_folder, write_page
    from workbench.lenses.lens import Lens

    if out is not None:
        output_folder(out)
    loaded = load_model(model, revision, device, dtype)
    found = run(loaded, prompt, None if lens is None else Lens.load(lens, model=loaded), layers=layers, k=top_k, target=target)
    if out is not None:
        wrote(found.save(out))
        wrote(write_page(out / "lens.html", found.plot()))
    if json:
        rows = {"table": found.table.to_dict("records"), "positions": found.positions.to_dict("records")}
        emit_json({"settings": found.settings, "by_layer": found.by_layer().to_dict("records"), **rows})
        return
    print(found)
    if out is not None:
        say(f"\nWritten to {out}; the picture is lens.html.")


def fit_lens(
    corpus: CorpusOption,
    out: Out,
    model: Model = DEFAULT_MODEL,
    max_tokens: MaxTokens = None,
    column: Column = "text",
    length: Length = None,
    packed: Packed = False,
    bos: Bos = BosOption.tokenizer,
    batch_tokens: BatchTokens = None,
    revision: Revision = None,
    device: Device = None,
    dtype: DType = None,
    json: Json = False,
) -> None:
    """Fit least-squares maps from every state to the last: the shortcut lens."""
    from workbench.artifacts import output_folder
    from workbench.lenses.shortcut import fit_shortcut

    output_folder(out)
    texts = load_corpus(corpus, column, length, packed, bos, max_tokens)
    note(seed=0)
    found = fit_shortcut(load_model(model, revision, device, dtype), texts, batch_tokens=batch_tokens, progress=not json)
    wrote(found.save(out))
    scores = {number: one.scores["frobenius_held_out"] for number, one in found.maps.items()}
    if json:
        emit_json({"out": str(out), "settings": found.settings, "held_out": scores})
        return
    print("state  held-out R² of the last state")
    for number, score in scores.items():
        print(f"{number:5}  {score:.3f}")
    say(f"\nWritten to {out}. Use it: workbench lens --lens {out} --prompt TEXT")


VERBS = {"lens": lens, "fit-lens": fit_lens}
"""By the name on the command line."""
