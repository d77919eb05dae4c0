"""Verbs about neurons: map-neurons, find-neurons, compare-maps."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from workbench.cli.options import (
    WRITTEN,
    DecoderOption,
    Device,
    DType,
    Json,
    Layers,
    Model,
    Out,
    ReadingOption,
    Revision,
    SideOption,
    SidesOption,
    Stream,
    load_model,
)
from workbench.cli.show import emit_json, say, table
from workbench.embedded import DEFAULT as DEFAULT_MODEL
from workbench.manifest import note, wrote
from workbench.tokens import shown

if TYPE_CHECKING:
    import pandas as pd

LAYERS_SHOWN = 16
"""Lines of the table over depth; a deeper model is shown in strides that keep its last layer."""


def map_neurons(
    out: Out,
    model: Model = DEFAULT_MODEL,
    side: Annotated[SidesOption, typer.Option(help="What a neuron reads (up, gate) or writes (down).")] = SidesOption.up,
    layers: Layers = None,
    part: Annotated[str, typer.Option(help="mlp; or experts.3, experts.shared in a mixture of experts.")] = "mlp",
    top_k: Annotated[int, typer.Option(min=1, help="Top and bottom tokens a neuron.")] = 10,
    reading: Annotated[ReadingOption, typer.Option(help="gain: scale up and gate rows by the MLP's norm.")] = ReadingOption.raw,
    decoder: Annotated[DecoderOption, typer.Option(help="How much of the head rows go through.")] = DecoderOption.none,
    show: Annotated[int, typer.Option(min=0, help="How many of the most telling neurons to print.")] = 15,
    plot: Annotated[bool, typer.Option(help="Write the picture, neurons.html (5 MB: it works offline).")] = True,
    revision: Revision = None,
    device: Device = None,
    dtype: DType = None,
    stream: Stream = False,
    check: Annotated[bool, typer.Option(help="The short self-check; a streamed model is read once for it.")] = True,
    json: Json = False,
) -> None:
    """Map MLP neurons to the words they speak for: neurons.parquet, neurons_bottom.parquet, run.json, neurons.html."""
    from workbench.analyses.neuron_folder import TABLES
    from workbench.analyses.neuron_map import map_neurons as run
    from workbench.artifacts import output_folder, write_page

    output_folder(out)
    neurons = run(
        load_model(model, revision, device, dtype, stream=stream, check=check),
        side=side.value,
        layers=layers,
        part=part,
        k=top_k,
        reading=reading.value,
        decoder=decoder.value,
        parts=out,
    )
    note(seed=neurons.settings["seed"])
    neurons.save(out)
    wrote(*(out / name for name in TABLES))
    if plot:
        wrote(write_page(out / "neurons.html", neurons.plot()))
    if json:
        emit_json(
            {
                "out": str(out),
                "settings": neurons.settings,
                "summary": neurons.summary().to_dict("records"),
                "specialised": neurons.specialised(show).to_dict("records"),
            }
        )
        return
    if show:
        _print_neurons(f"The most telling neurons of {model}", neurons.specialised(show))
        spread = neurons.specialised(len(neurons.settings["layers"]), per_layer=1).sort_values("layer", ignore_index=True)
        stride = -(-len(spread) // LAYERS_SHOWN)
        _print_neurons("The best of a layer, from the embedding upwards", spread[::-stride][::-1])
    for row in neurons.summary().itertuples():
        print(
            f"{row.side:<5}{row.above_fraction:6.1%} of {row.neurons:,} neurons stand for their word more than 99 % of "
            f"random directions do (score above {row.threshold:.1f})"
        )
    say(f"\nWritten to {out}: neurons.parquet, neurons_bottom.parquet, run.json{', neurons.html' if plot else ''}.")
    say(f"Score: standard deviations above the other neurons for that word. Next: workbench find-neurons dog --map {out}")


def find_neurons(
    text: Annotated[str, typer.Argument(help="A word, or a regular expression with --regex.")],
    map: Annotated[Path, typer.Option("--map", help="Folder that map-neurons wrote.")],
    exact: Annotated[bool, typer.Option("--exact", help="The very token, space and case included.")] = False,
    regex: Annotated[bool, typer.Option("--regex", help="Search the tokens for a regular expression.")] = False,
    side: Annotated[SideOption | None, typer.Option(help="Only this side.")] = None,
    layers: Layers = None,
    max_rank: Annotated[int | None, typer.Option(min=0, help="Only ranks up to this one; 0 is the top token.")] = None,
    bottom: Annotated[bool, typer.Option("--bottom", help="Search the lowest tokens instead.")] = False,
    limit: Annotated[int, typer.Option("-n", min=1, help="Lines to show.")] = 20,
    json: Json = False,
) -> None:
    """Find the neurons that speak for a word in a map on disk."""
    from workbench.analyses.neuron_search import Query, search_folder
    from workbench.errors import WorkbenchError

    if exact and regex:
        raise WorkbenchError("--exact and --regex exclude each other. Choose one.")
    match = "exact" if exact else "regex" if regex else "folded"
    query = Query(text, match, None if side is None else side.value, layers, max_rank)
    found = search_folder(map, query, bottom=bottom)
    rows = [dict(zip(found.columns, row, strict=True)) for row in found.fetchall()]
    if json:
        emit_json({"text": text, "match": match, "total": len(rows), "neurons": rows[:limit]})
        return
    columns = ["neuron", "side", "rank", "token", "score", "probability"]
    lines = [
        (
            f"{row['layer']}.{row['neuron']}",
            row["side"],
            row["rank"],
            shown(row["token"]),
            f"{row['score']:.1f}",
            f"{row['probability']:.2e}",
        )
        for row in rows[:limit]
    ]
    if lines:
        table("", columns, lines, left=["token"])
    else:
        say(f"No neuron of this map has {text!r} among its {'bottom' if bottom else 'top'} tokens with these limits.")


def compare_maps(
    a: Annotated[Path, typer.Argument(help="Folder that map-neurons wrote.")],
    b: Annotated[Path, typer.Argument(help="That of another model's map, of the same shape.")],
    model_a: Annotated[str | None, typer.Option(help="The first map's model: adds the null that moves rows.")] = None,
    model_b: Annotated[str | None, typer.Option(help="The second map's model.")] = None,
    side: Annotated[SideOption | None, typer.Option(help="Only this side.")] = None,
    layers: Layers = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder for the results and the picture."), WRITTEN] = None,
    limit: Annotated[int, typer.Option("-n", min=1, help="How many of the neurons that changed most to show.")] = 15,
    seed: Annotated[int, typer.Option(min=0, help="Of the nulls.")] = 0,
    device: Device = None,
    json: Json = False,
) -> None:
    """How many neurons have the same top word in two models? Share and overlap, beside nulls, and what changed most."""
    from workbench.analyses.neuron_map import NeuronMap
    from workbench.artifacts import output_folder, write_page
    from workbench.errors import WorkbenchError

    if (model_a is None) != (model_b is None):
        raise WorkbenchError("Only one of --model-a and --model-b was given. Give both, or neither.")
    if out is not None:
        output_folder(out)
    maps = NeuronMap.load(a), NeuronMap.load(b)
    models = None
    if model_a is not None and model_b is not None:
        models = tuple(_mapped(name, neurons.settings, device) for name, neurons in zip((model_a, model_b), maps, strict=True))
    note(seed=seed)
    found = maps[0].compare(
        maps[1], models=models, side=None if side is None else side.value, layers=layers, seed=seed, progress=not json
    )
    if out is not None:
        found.save(out)
        wrote(out / "comparison.parquet", write_page(out / "comparison.html", found.plot()))
    changed = found.changed(limit, words=5)
    if json:
        emit_json(
            {
                "out": None if out is None else str(out),
                "settings": found.settings,
                "summary": found.summary().to_dict("records"),
                "by_layer": found.by_layer().to_dict("records"),
                "changed": changed.to_dict("records"),
            }
        )
        return
    rows = [
        (f"{row.layer}.{row.neuron}", row.side, f"{row.rbo:.2f}", f"{row.score_a:.1f}", row.tokens_a, row.tokens_b)
        for row in changed.itertuples()
    ]
    columns = ["neuron", "side", "overlap", "score", "before", "after"]
    table("Neurons that changed most", columns, rows, left=["before", "after"])
    print(f"\n{found.headline()}")
    if out is not None:
        say(f"\nWritten to {out}: comparison.parquet, comparison.html, run.json.")


def _mapped(name: str, settings: dict, device: str | None):
    """The model of a map, in the dtype and, from a hub, of the revision that was mapped."""
    import workbench
    from workbench.embedded import EMBEDDED

    is_local = name in EMBEDDED or Path(name).is_dir()
    revision = None if is_local else settings["revision"]
    return workbench.load(name, revision=revision, device=device, dtype=settings["dtype"])


def _print_neurons(title: str, neurons: "pd.DataFrame") -> None:
    rows = [
        (f"{row.layer}.{row.neuron}", row.side, f"{row.score:.1f}", row.shared_by, shown(row.token), row.tokens)
        for row in neurons.itertuples()
    ]
    table(f"\n{title}", ["neuron", "side", "score", "shared by", "word", "top tokens"], rows, left=["word", "top tokens"])
    print()


VERBS = {"map-neurons": map_neurons, "find-neurons": find_neurons, "compare-maps": compare_maps}
