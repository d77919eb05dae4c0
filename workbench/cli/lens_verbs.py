"""The verbs of lenses: what each layer already predicts, maps that say it better, and how near they come."""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

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
from workbench.cli.options import Device, DType, Json, Layers, Model, Out, Revision, load_model, token_of
from workbench.cli.show import emit_json, say
from workbench.embedded import DEFAULT as DEFAULT_MODEL
from workbench.errors import UnknownOption
from workbench.manifest import note, wrote

if TYPE_CHECKING:
    from workbench.lenses.lens import Lens
    from workbench.model import LanguageModel


class LensKind(StrEnum):
    """How a lens's maps are made."""

    logit = "logit"
    shortcut = "shortcut"
    tuned = "tuned"
    jacobian = "jacobian"
    jacobian_same_position = "jacobian_same_position"


KindOption = Annotated[
    LensKind | None, typer.Option(help="A lens that is shipped for the model, or logit: states as they are, if none is named.")
]
LensFolder = Annotated[Path | None, typer.Option(help="Folder of a fitted lens, in the place of --kind.")]


def lens(
    prompt: Annotated[str, typer.Option(help="The text.")],
    model: Model = DEFAULT_MODEL,
    kind: KindOption = None,
    lens: LensFolder = None,
    layers: Layers = None,
    site: Annotated[str | None, typer.Option(help="Other sites of the stream, as resid_mid, in the place of layers.")] = None,
    top_k: Annotated[int, typer.Option(min=1, help="Likeliest tokens of each cell.")] = 5,
    target: Annotated[
        str | None, typer.Option(help="Token to follow: ' dog', or id:250; the text's next one, if not given.")
    ] = None,
    versus: Annotated[str | None, typer.Option(help="Also draw the difference to this text, of equally many tokens.")] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Also write tables and pictures here.")] = None,
    revision: Revision = None,
    device: Device = None,
    dtype: DType = None,
    json: Json = False,
) -> None:
    """What does each layer already predict?"""
    from workbench.analyses.lens import lens as run
    from workbench.artifacts import output_folder, write_page

    if versus is not None and out is None:
        raise UnknownOption("--versus draws a picture. Say with --out where to write it.")
    if out is not None:
        output_folder(out)
    loaded = load_model(model, revision, device, dtype)
    chosen, wanted = _lens(loaded, kind, lens), None if target is None else token_of(target)
    found = run(loaded, prompt, chosen, layers=layers, sites=site, k=top_k, target=wanted)
    if out is not None:
        pictures = {"lens": found.plot(), "trajectories": found.plot_trajectories()}
        if versus is not None:
            other = run(loaded, versus, chosen, layers=layers, sites=site, k=top_k, target=wanted)
            pictures["difference"] = found.plot_difference(other)
        wrote(found.save(out))
        for name, picture in pictures.items():
            wrote(write_page(out / f"{name}.html", picture))
    if json:
        rows = {"table": found.table.to_dict("records"), "positions": found.positions.to_dict("records")}
        emit_json({"settings": found.settings, "by_layer": found.by_layer().to_dict("records"), **rows})
        return
    print(found)
    if out is not None:
        say(f"\nWritten to {out}; pictures: {', '.join(f'{name}.html' for name in pictures)}.")


def fit_lens(
    corpus: CorpusOption,
    out: Out,
    kind: Annotated[LensKind, typer.Option(help="How its maps are made.")] = LensKind.shortcut,
    model: Model = DEFAULT_MODEL,
    site: Annotated[str | None, typer.Option(help="Sites that maps begin at, as resid_mid; all states, if not given.")] = None,
    epochs: Annotated[
        int | None, typer.Option(min=1, help="Of a tuned lens: how often the corpus is gone through; once.")
    ] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Of a tuned lens: 0.03, if not given.")] = None,
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
    """Fit maps from every state to the last: a shortcut lens in closed form, a tuned one by training, or a Jacobian one."""
    from workbench.artifacts import output_folder
    from workbench.lenses.jacobian import fit_jacobian
    from workbench.lenses.shortcut import fit_shortcut
    from workbench.lenses.tuned import STEP_TOKENS, fit_tuned

    if kind == LensKind.logit:
        raise UnknownOption("The logit lens takes states as they are: nothing is fitted. Ask for shortcut, tuned or jacobian.")
    training = {name: value for name, value in {"epochs": epochs, "learning_rate": learning_rate}.items() if value is not None}
    if training and kind != LensKind.tuned:
        raise UnknownOption(f"--{next(iter(training)).replace('_', '-')} belongs to a tuned lens, and {kind} was asked for.")
    output_folder(out)
    texts = load_corpus(corpus, column, length, packed, bos, max_tokens)
    note(seed=0)
    loaded, progress = load_model(model, revision, device, dtype), not json
    if kind == LensKind.shortcut:
        found = fit_shortcut(loaded, texts, sites=site, batch_tokens=batch_tokens, progress=progress)
    elif kind == LensKind.tuned:
        tokens = batch_tokens or STEP_TOKENS
        found = fit_tuned(loaded, texts, sites=site, step_tokens=tokens, folder=out, progress=progress, **training)
    else:
        same = kind == LensKind.jacobian_same_position
        found = fit_jacobian(
            loaded, texts, sites=site, same_position=same, batch_tokens=batch_tokens, folder=out, progress=progress
        )
    wrote(found.save(out))
    scores = {one: transport.scores for one, transport in found.maps.items()}
    if json:
        emit_json({"out": str(out), "kind": found.kind, "settings": found.settings, "scores": scores})
        return
    shown = {"shortcut": ("frobenius_held_out", "held-out R² of the last state"),
             "tuned": ("kl_last_tenth", "KL to the output in the last tenth of training, nats")}  # fmt: skip
    if found.kind in shown:
        column_, title = shown[found.kind]
        print(f"{'site':14}  {title}")
        for one, own in scores.items():
            print(f"{one:14}  {own[column_]:.3f}")
    else:
        print(found)
    say(f"\nWritten to {out}. Use it: workbench lens --lens {out} --prompt TEXT")


def lens_quality(
    corpus: CorpusOption,
    model: Model = DEFAULT_MODEL,
    kind: Annotated[list[LensKind] | None, typer.Option(help="Lenses that are shipped for the model, beside logit.")] = None,
    lens: Annotated[list[Path] | None, typer.Option(help="Folders of fitted lenses.")] = None,
    layers: Layers = None,
    site: Annotated[str | None, typer.Option(help="Other sites of the stream, as resid_mid, in the place of layers.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Of the held-out documents, every tenth.")] = 4096,
    column: Column = "text",
    length: Length = None,
    packed: Packed = False,
    bos: Bos = BosOption.tokenizer,
    batch_tokens: BatchTokens = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Also write tables and the picture here.")] = None,
    revision: Revision = None,
    device: Device = None,
    dtype: DType = None,
    json: Json = False,
) -> None:
    """How near do lenses come to the output, on held-out text, and what would stopping early save?"""
    from workbench.analyses.lens_quality import lens_quality as run
    from workbench.artifacts import output_folder, write_page
    from workbench.lenses.lens import Lens

    if out is not None:
        output_folder(out)
    texts = load_corpus(corpus, column, length, packed, bos, None)
    loaded = load_model(model, revision, device, dtype)
    lenses = {"logit": Lens.logit(loaded)}
    lenses |= {one.value: _lens(loaded, one, None) for one in kind or ()}
    for folder in lens or ():
        own = Lens.load(folder, model=loaded)
        name = own.kind if own.kind not in lenses else str(folder)
        if name in lenses:
            raise UnknownOption(f"--lens {folder} was given twice. Name each lens once.")
        lenses[name] = own
    found = run(
        loaded, texts, lenses, layers=layers, sites=site, max_tokens=max_tokens, batch_tokens=batch_tokens, progress=not json
    )
    if out is not None:
        wrote(found.save(out))
        wrote(write_page(out / "lens_quality.html", found.plot()))
    if json:
        tables = {"table": found.table, "null": found.null, "saved": found.saved}
        rows = {name: None if table is None else table.to_dict("records") for name, table in tables.items()}
        emit_json({"settings": found.settings, "not_nearer": found.not_nearer(), **rows})
        return
    print(found)
    if out is not None:
        say(f"\nWritten to {out}; the picture is lens_quality.html.")


def _lens(model: "LanguageModel", kind: LensKind | None, folder: Path | None) -> "Lens":
    from workbench.lenses.lens import Lens
    from workbench.lenses.shipped import shipped_lens

    if kind is not None and folder is not None:
        raise UnknownOption(f"--kind {kind} and --lens {folder} name two lenses. Give one of the two.")
    return shipped_lens(model, kind.value if kind else "logit") if folder is None else Lens.load(folder, model=model)


VERBS = {"lens": lens, "fit-lens": fit_lens, "lens-quality": lens_quality}
"""By the name on the command line."""
