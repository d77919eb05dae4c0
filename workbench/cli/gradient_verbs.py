"""The verbs of gradients: what a step would write, and editing by a forward pass."""

from pathlib import Path
from typing import Annotated

import typer

from workbench.cli.options import WRITTEN, Device, DType, Json, Layers, Model, Revision, load_model
from workbench.cli.show import emit_json, say
from workbench.embedded import DEFAULT as DEFAULT_MODEL
from workbench.errors import UnknownOption
from workbench.manifest import note, wrote

Prompt = Annotated[str, typer.Option("--prompt", "-p", help="The text.")]
TargetOption = Annotated[
    str, typer.Option(help="What should follow, a leading space included: ' Rome'; or token ids: id:8790 or id:8790,12.")
]
OptionalOut = Annotated[Path | None, typer.Option("--out", "-o", help="Also write tables and pictures here."), WRITTEN]


def backward_lens(
    prompt: Prompt,
    target: TargetOption,
    model: Model = DEFAULT_MODEL,
    layers: Layers = None,
    matrices: Annotated[str | None, typer.Option(help="Such as W_in,W_out; every linear module, if not given.")] = None,
    top_k: Annotated[int, typer.Option(min=1, help="Tokens of each end of a vector.")] = 5,
    paper: Annotated[bool, typer.Option("--paper", help="Read vectors by the whole final norm, as published.")] = False,
    step: Annotated[
        float | None, typer.Option(help="Also take a step of this size for a while: foretold and measured.")
    ] = None,
    beside: Annotated[
        list[str] | None, typer.Option(help="With --step: another text to follow the target on; several.")
    ] = None,
    out: OptionalOut = None,
    revision: Revision = None,
    device: Device = None,
    dtype: DType = None,
    json: Json = False,
) -> None:
    """What would one step of gradient descent on a target write into each weight matrix, in words?"""
    from workbench.analyses.backward_lens import backward_lens as run
    from workbench.analyses.step_forecast import forecast_step
    from workbench.artifacts import output_folder, write_page

    if beside and step is None:
        raise UnknownOption("--beside follows other texts through a step. Say with --step how large it is.")
    if out is not None:
        output_folder(out)
    loaded = load_model(model, revision, device, dtype)
    wanted = target_of(target)
    found = run(
        loaded, prompt, wanted, layers=layers, matrices=None if matrices is None else matrices.split(","), k=top_k, paper=paper
    )
    forecast = None
    if step is not None:
        assert found.gradients is not None
        texts = {"prompt": [(prompt, wanted)]} | ({"beside": [(text, wanted) for text in beside]} if beside else {})
        forecast = forecast_step(found.gradients, texts, step=step)
    if out is not None:
        wrote(found.save(out))
        pictures = {"gradient": found.plot()} | ({} if forecast is None else {"forecast": forecast.plot()})
        for name, picture in pictures.items():
            wrote(write_page(out / f"{name}.html", picture))
        if forecast is not None:
            wrote(forecast.save(out / "forecast"))
    if json:
        tables = {"table": found.table, "vectors": found.vectors, "matrices": found.matrices, "targets": found.targets}
        rows = {name: table.astype(object).where(table.notna(), None).to_dict("records") for name, table in tables.items()}
        emit_json(
            {"settings": found.settings} | rows | ({} if forecast is None else {"forecast": forecast.table.to_dict("records")})
        )
        return
    print(found)
    if forecast is not None:
        print(f"\n{forecast}")
    if out is not None:
        say(f"\nWritten to {out}; the picture: gradient.html.")


def shift(
    prompt: Prompt,
    target: TargetOption,
    layer: Annotated[int, typer.Option(help="Whose W_out is edited.")],
    strength: Annotated[
        float, typer.Option(help="Length of what is written at the prompt's last token, relative to the stream there.")
    ] = 1.0,
    beside: Annotated[list[str] | None, typer.Option(help="Another text to continue before and after; several.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate.")] = 12,
    save: Annotated[Path | None, typer.Option(help="Write the edited model here, as a model folder."), WRITTEN] = None,
    seed: Annotated[int, typer.Option(help="Of the random direction beside it.")] = 0,
    model: Model = DEFAULT_MODEL,
    revision: Revision = None,
    device: Device = None,
    dtype: DType = None,
    json: Json = False,
) -> None:
    """Edit a fact by a forward pass: continuations before, after, and with a random direction as long."""
    from workbench.analyses.forward_shift import forward_shift, random_like
    from workbench.weight_edits import edit_weights, require_new_folder, save_edited

    if save is not None:
        require_new_folder(save)
    loaded = load_model(model, revision, device, dtype)
    note(seed=seed)
    edit = forward_shift(loaded, prompt, target_of(target), layer, strength=strength)
    texts = [prompt, *(beside or [])]
    said = {"before": loaded.generate(texts, max_new_tokens=max_new_tokens)}
    for name, one in (("edited", edit), ("random", random_like(edit, seed))):
        with edit_weights(loaded, one):
            said[name] = loaded.generate(texts, max_new_tokens=max_new_tokens)
    if save is not None:
        wrote(save_edited(loaded, save, edit))
    if json:
        emit_json(
            {"edit": edit.name, "norm": edit.norm(), "strength": strength, "saved": None if save is None else str(save)} | said
        )
        return
    say(f"{edit!r}: what it writes at the prompt's last token is {strength:g} times as long as the stream there")
    for i in range(len(texts)):
        for name, lines in said.items():
            print(f"{name:7} {lines[i]!r}")
    if save is not None:
        say(f"The edited model is in {save}.")


def edit_facts(
    model: Model = DEFAULT_MODEL,
    layers: Annotated[str | None, typer.Option(help="Layers whose W_out is edited; every fifth, if not given.")] = None,
    strengths: Annotated[str, typer.Option(help="Lengths of what is written, relative to the stream.")] = "0.3,1,3",
    relation: Annotated[list[str] | None, typer.Option(help="Relations of the shipped facts; may be repeated. All.")] = None,
    facts: Annotated[int, typer.Option(min=2, help="Of the shipped facts, the first so many are asked of the model.")] = 500,
    n: Annotated[int | None, typer.Option("-n", min=2, help="Of those it knows, edit the first so many.")] = 30,
    seed: Annotated[int, typer.Option(help="Of the random directions.")] = 0,
    out: OptionalOut = None,
    revision: Revision = None,
    device: Device = None,
    dtype: DType = None,
    json: Json = False,
) -> None:
    """Edit facts that the model knows: forward-pass shift, gradient step and a random direction, by layer and strength."""
    from workbench.analyses.fact_edits import edit_facts as run
    from workbench.artifacts import output_folder, write_page
    from workbench.facts import shipped_facts

    if out is not None:
        output_folder(out)
    try:
        sizes = [float(one) for one in strengths.split(",")]
    except ValueError:
        raise UnknownOption(f"--strengths {strengths!r} are no numbers. Write them as 0.3,1,3.") from None
    loaded = load_model(model, revision, device, dtype)
    note(seed=seed)
    found = run(loaded, shipped_facts(relation, facts), layers=layers, strengths=sizes, n=n, seed=seed, progress=not json)
    if out is not None:
        wrote(found.save(out))
        wrote(write_page(out / "fact_edits.html", found.plot()))
    if json:
        settings = found.by_setting().to_dict("records")
        emit_json({"settings": found.settings, "by_setting": settings, "best": found.best().to_dict("records")})
        return
    print(found)
    if out is not None:
        say(f"\nWritten to {out}; the picture: fact_edits.html.")


def target_of(text: str) -> str | list[int]:
    """A target as the command line names it: its text, or `id:8790,12`.

    Raises:
        UnknownOption: if ids are no numbers.
    """
    if not text.startswith("id:"):
        return text
    try:
        return [int(one) for one in text[3:].split(",")]
    except ValueError:
        raise UnknownOption(f"--target {text!r} holds no token ids. Write id:8790, or id:8790,12.") from None


VERBS = {"backward-lens": backward_lens, "shift": shift, "edit-facts": edit_facts}
