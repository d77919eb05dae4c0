"""Verbs about units over text: top-activations, word-activations."""

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
from workbench.cli.options import Device, DType, Json, Model, Out, Revision, load_model
from workbench.cli.show import emit_json, say, table
from workbench.embedded import DEFAULT as DEFAULT_MODEL
from workbench.manifest import note, wrote

Strata = Annotated[str, typer.Option(help="Kinds of tokens that count: ordinary,early,first,special,massive")]
Seed = Annotated[int, typer.Option(help="Of what is drawn at random.")]


def top_activations(
    corpus: CorpusOption,
    sites: Annotated[str, typer.Option(help="Sites, comma-separated: mlp_post.10,z.4:8")],
    out: Out,
    model: Model = DEFAULT_MODEL,
    index: Annotated[
        str | None, typer.Option(help="Neurons, heads or coordinates, comma-separated; all, if not given.")
    ] = None,
    top_k: Annotated[int, typer.Option(min=1, help="Examples of a unit.")] = 20,
    context: Annotated[int, typer.Option(min=0, help="Tokens shown before and after an example.")] = 16,
    strata: Strata = "ordinary",
    max_tokens: MaxTokens = None,
    column: Column = "text",
    length: Length = None,
    packed: Packed = False,
    bos: Bos = BosOption.tokenizer,
    batch_tokens: BatchTokens = None,
    seed: Seed = 0,
    revision: Revision = None,
    device: Device = None,
    dtype: DType = None,
    json: Json = False,
) -> None:
    """Find the tokens on which neurons, heads or coordinates are most active, and how often they are."""
    from workbench.analyses.top_activations import top_activations as run
    from workbench.artifacts import output_folder

    output_folder(out)
    texts = load_corpus(corpus, column, length, packed, bos, max_tokens)
    note(sites=sites.split(","), seed=seed)
    found = run(
        load_model(model, revision, device, dtype), texts, sites.split(","), _numbers(index), k=top_k, context=context,
        strata=strata.split(","), seed=seed, batch_tokens=batch_tokens, progress=not json,
    )  # fmt: skip
    wrote(found.save(out))
    if json:
        units = found.statistics.to_dict("records")
        emit_json({"out": str(out), "settings": found.settings, "units": len(units), "statistics": units[:20]})
    else:
        print(found)
        say(f"\nWritten to {out}: examples.parquet, statistics.parquet, histograms.safetensors, run.json.")


def word_activations(
    map: Annotated[Path, typer.Option("--map", help="Folder that map-neurons wrote, of the same model.")],
    corpus: CorpusOption,
    out: Out,
    model: Model = DEFAULT_MODEL,
    words: Annotated[int, typer.Option(min=1, help="How many top words of a neuron count as its own.")] = 10,
    strata: Strata = "ordinary",
    max_tokens: MaxTokens = None,
    column: Column = "text",
    length: Length = None,
    packed: Packed = False,
    bos: Bos = BosOption.tokenizer,
    batch_tokens: BatchTokens = None,
    seed: Seed = 0,
    plot: Annotated[bool, typer.Option(help="Write the picture, word_activations.html.")] = True,
    revision: Revision = None,
    device: Device = None,
    dtype: DType = None,
    json: Json = False,
) -> None:
    """Does a neuron fire on the word that it decodes to? Every neuron of a map, over text, beside a null."""
    from workbench.analyses.neuron_map import NeuronMap
    from workbench.artifacts import output_folder, write_page

    output_folder(out)
    neurons = NeuronMap.load(map)
    texts = load_corpus(corpus, column, length, packed, bos, max_tokens)
    note(seed=seed)
    found = neurons.with_activations(
        load_model(model, revision, device, dtype), texts, words=words, strata=strata.split(","), seed=seed,
        batch_tokens=batch_tokens, progress=not json,
    )  # fmt: skip
    wrote(found.save(out))
    if plot:
        wrote(write_page(out / "word_activations.html", found.plot()))
    if json:
        emit_json({"out": str(out), "settings": found.settings, "summary": found.summary().to_dict("records")})
        return
    best = found.table[found.table["current_present"] >= 10].nlargest(15, "current_auc").to_dict("records")
    rows = [
        [f"{row['layer']}.{row['neuron']}", row["side"], row["token"], row["current_present"], f"{row['current_auc']:.3f}",
         f"{row['current_null_auc']:.3f}", f"{row['current_correlation']:.2f}"]
        for row in best
    ]  # fmt: skip
    columns = ["neuron", "side", "word", "present", "AUC", "null AUC", "correlation"]
    table("Neurons that fire most surely on their words", columns, rows, left=["word"])
    print(f"\n{found}")
    say(f"\nWritten to {out}.")


def _numbers(text: str | None) -> list[int] | None:
    """
    Raises:
        UnknownOption: if it is no list of numbers.
    """
    from workbench.errors import UnknownOption

    if text is None:
        return None
    if not all(part.strip().isdecimal() for part in text.split(",")):
        raise UnknownOption(f"--index {text!r} is not understood. Write numbers: 3 or 3,17,240.")
    return [int(part) for part in text.split(",")]


VERBS = {"top-activations": top_activations, "word-activations": word_activations}
"""By the name on the command line."""
