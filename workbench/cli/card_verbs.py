"""The verb about one neuron: neuron."""

from pathlib import Path
from typing import Annotated

import typer

from workbench.cli.corpus_options import BosOption, Column, CorpusOption, Length, MaxTokens, load_corpus
from workbench.cli.options import (
    WRITTEN,
    DecoderOption,
    Device,
    DType,
    Json,
    Model,
    Neuron,
    Revision,
    layer_and_neuron,
    load_model,
)
from workbench.cli.show import emit_json, say
from workbench.embedded import DEFAULT as DEFAULT_MODEL
from workbench.manifest import note, wrote


def neuron(
    neuron: Neuron,
    text: Annotated[bool, typer.Option(help="Watch it on text, and clamp it to what it is there; a minute.")] = True,
    corpus: CorpusOption = "wikipedia",
    max_tokens: MaxTokens = 30_000,
    column: Column = "text",
    length: Length = None,
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", "-p", help="Where the clamp is tried; may be given several times.")
    ] = None,
    value: Annotated[
        float | None, typer.Option(help="What it is clamped to; its highest and lowest value on the text, if not given.")
    ] = None,
    top_k: Annotated[int, typer.Option(min=1, help="Words a side, and examples an end.")] = 10,
    nearest: Annotated[int, typer.Option(min=1, help="Nearest neurons a side and end.")] = 8,
    random: Annotated[int, typer.Option(min=1, help="Random neurons of the layer that are clamped in its place.")] = 20,
    decoder: Annotated[DecoderOption, typer.Option(help="How much of the head rows go through.")] = DecoderOption.none,
    map: Annotated[
        Path | None, typer.Option("--map", help="Folder that map-neurons wrote: its scores are among all the model's neurons.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the random neurons and directions.")] = 0,
    html: Annotated[Path | None, typer.Option(help="HTML file for the page."), WRITTEN] = None,
    model: Model = DEFAULT_MODEL,
    revision: Revision = None,
    device: Device = None,
    dtype: DType = None,
    json: Json = False,
) -> None:
    """All about one neuron: its words, the neurons like it, where it fires, what a clamp does and what it writes directly."""
    from workbench.analyses.neuron_card import PROMPTS, neuron_card
    from workbench.analyses.neuron_map import NeuronMap
    from workbench.artifacts import output_folder
    from workbench.errors import WorkbenchError

    layer, index = layer_and_neuron(neuron)
    if prompt and not text and value is None:
        raise WorkbenchError("--prompt says where a clamp is tried, but without text there is no value for it. Give --value.")
    if html is not None:
        output_folder(html.parent, "Name another place with --html")
    texts = load_corpus(corpus, column, length, False, BosOption.tokenizer, max_tokens) if text else None
    neurons = None if map is None else NeuronMap.load(map)
    note(seed=seed)
    card = neuron_card(
        load_model(model, revision, device, dtype), layer, index, corpus=texts, prompts=prompt or PROMPTS, value=value, k=top_k,
        n_nearest=nearest, n_random=random, decoder=decoder.value, neurons=neurons, seed=seed, progress=not json,
    )  # fmt: skip
    if json:
        emit_json(card.to_json())
    else:
        print(card)
    if html is not None:
        wrote(card.save(html))
        say(f"\nWritten to {html}.")


VERBS = {"neuron": neuron}
"""By the name on the command line."""
