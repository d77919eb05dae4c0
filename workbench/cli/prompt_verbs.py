"""Verbs about prompts: scan, norms, attention, generate, clamp."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from workbench.cli.options import (
    WRITTEN,
    Device,
    DType,
    Json,
    Model,
    Neuron,
    Revision,
    SideOption,
    layer_and_neuron,
    load_model,
    token_of,
)
from workbench.cli.show import emit_json, say
from workbench.embedded import DEFAULT as DEFAULT_MODEL
from workbench.manifest import file_hash, note, wrote

if TYPE_CHECKING:
    from workbench.results import Result

Prompt = Annotated[str, typer.Option("--prompt", "-p", help="The text that the model goes on from.")]
Edits = Annotated[Path | None, typer.Option(help="JSON file of edits, as wb.save_edits writes it.")]
NewTokens = Annotated[int, typer.Option(min=1, help="Tokens of each continuation.")]


def scan(
    prompt: Prompt,
    model: Model = DEFAULT_MODEL,
    target: Annotated[str | None, typer.Option(help="Token to follow: ' dog', or id:250.")] = None,
    edits: Edits = None,
    revision: Revision = None,
    device: Device = None,
    dtype: DType = None,
    json: Json = False,
) -> None:
    """One prompt at a glance: the prediction, where it forms, which parts write it, which tokens are read."""
    from workbench.analyses.scan import scan as run
    from workbench.intervention import intervene

    chosen = _edits(edits)
    loaded = load_model(model, revision, device, dtype)
    with intervene(loaded, *chosen):
        found = run(loaded, prompt, None if target is None else token_of(target))
    if json:
        emit_json(found.to_json() | {"edits": list(map(repr, chosen))})
        return
    for edit in chosen:
        say(f"with {edit!r}")
    print(found)


def norms(
    prompt: Prompt, model: Model = DEFAULT_MODEL, revision: Revision = None, device: Device = None, dtype: DType = None,
    json: Json = False,
) -> None:  # fmt: skip
    """How long a prompt's states are, layer by layer: massive activations stand out."""
    from workbench.analyses.prompt_states import state_norms

    _show(state_norms(load_model(model, revision, device, dtype), prompt), json)


def attention(
    prompt: Prompt,
    layer: Annotated[int, typer.Option(help="Of the heads; negative ones count from the end.")],
    model: Model = DEFAULT_MODEL,
    revision: Revision = None,
    device: Device = None,
    dtype: DType = None,
    json: Json = False,
) -> None:
    """Which tokens each head of a layer looks at."""
    from workbench.analyses.prompt_states import attention_patterns

    _show(attention_patterns(load_model(model, revision, device, dtype), prompt, layer), json)


def generate(
    prompt: Prompt,
    model: Model = DEFAULT_MODEL,
    edits: Edits = None,
    erasers: Annotated[Path | None, typer.Option(help="erasers.safetensors of workbench erase: with a concept erased.")] = None,
    name: Annotated[str | None, typer.Option(help="Which of several erasers: resid_post.20/leace.")] = None,
    max_new_tokens: NewTokens = 20,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: the likeliest token each time.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of what is drawn.")] = 0,
    chat: Annotated[bool, typer.Option("--chat", help="The prompt is a user's message in the chat template.")] = False,
    revision: Revision = None,
    device: Device = None,
    dtype: DType = None,
    json: Json = False,
) -> None:
    """Continue a prompt; with --edits as the model is, and as it is with the edits."""
    from workbench.intervention import intervene

    chosen = _edits(edits)
    loaded = load_model(model, revision, device, dtype)
    if erasers is not None:
        from probes.erasers.files import load_eraser

        chosen.append(load_eraser(erasers, name).as_edit(model=loaded))
        note(erasers=file_hash(erasers))
    note(seed=seed)
    options = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed, "chat": chat}
    before = loaded.generate(prompt, **options)
    with intervene(loaded, *chosen):
        after = loaded.generate(prompt, **options) if chosen else None
    if json:
        emit_json({"prompt": prompt, "text": before, "edited": after, "edits": list(map(repr, chosen)), **options})
        return
    if after is None:
        print(before)
        return
    for edit in chosen:
        say(repr(edit))
    print(f"as it is:  {before}\nedited:    {after}")


def clamp(
    neuron: Neuron,
    prompt: Annotated[list[str], typer.Option("--prompt", "-p", help="The text to go on from; may be given several times.")],
    value: Annotated[float, typer.Option(help="What the neuron's number becomes.")] = 8.0,
    side: Annotated[SideOption, typer.Option(help="Which of its numbers: before (up, gate) or after (down) the product.")] = (
        SideOption.up
    ),
    word: Annotated[list[str] | None, typer.Option(help="Token to watch: ' dog', or id:250; may be repeated.")] = None,
    random: Annotated[int, typer.Option(min=1, help="Random neurons of the layer that are clamped in its place.")] = 20,
    max_new_tokens: NewTokens = 20,
    chat: Annotated[bool, typer.Option("--chat", help="Prompts are a user's messages in the chat template.")] = False,
    seed: Annotated[int, typer.Option(help="Which random neurons.")] = 0,
    plot: Annotated[Path | None, typer.Option(help="HTML file for the picture."), WRITTEN] = None,
    model: Model = DEFAULT_MODEL,
    revision: Revision = None,
    device: Device = None,
    dtype: DType = None,
    json: Json = False,
) -> None:
    """Clamp a neuron: its words' probabilities and the continuation before and after, next to the same clamp on random ones."""
    from workbench.analyses.neuron_effect import neuron_effect
    from workbench.artifacts import output_folder, write_page

    if plot is not None:
        output_folder(plot.parent, "Name another place with --plot")
    layer, index = layer_and_neuron(neuron)
    note(seed=seed)
    loaded = load_model(model, revision, device, dtype)
    found = neuron_effect(
        loaded, layer, index, prompt, value=value, side=side.value, words=[token_of(one) for one in word] if word else None,
        n_random=random, max_new_tokens=max_new_tokens, chat=chat, seed=seed, progress=len(prompt) > 1 and not json,
    )  # fmt: skip
    if json:
        texts = found.generations.astype({"neuron": object}).to_dict("records")
        tables = {"summary": found.summary().to_dict("records"), "words": found.table.to_dict("records"), "generations": texts}
        emit_json({"settings": found.settings} | tables)
    else:
        print(str(found).rpartition("\n")[0])
    if plot is not None:
        wrote(write_page(plot, found.plot()))
        say(f"\nWritten to {plot}.")


def _edits(path: Path | None) -> list:
    from workbench.edits.files import load_edits

    if path is None:
        return []
    edits = load_edits(path)
    note(edits=file_hash(path))
    return edits


def _show(result: "Result", json: bool) -> None:
    if json:
        table = result.table
        emit_json({"settings": result.settings, "table": table.astype(object).where(table.notna(), None).to_dict("records")})
        return
    print(result)


VERBS = {"scan": scan, "norms": norms, "attention": attention, "generate": generate, "clamp": clamp}
