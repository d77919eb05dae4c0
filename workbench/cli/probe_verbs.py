"""The verbs of probes."""

from pathlib import Path
from typing import Annotated

import typer

from workbench.cli.dataset_options import Data, Examples, Group, Label, Pooled, Target, Text, Type, load_dataset
from workbench.cli.options import WRITTEN, Device, DType, Json, Model, Revision, load_model
from workbench.cli.show import emit_json, say, table
from workbench.embedded import DEFAULT as DEFAULT_MODEL
from workbench.manifest import note, wrote

STATES = "resid_pre.0,resid_post"


def probe(
    data: Data,
    site: Annotated[str, typer.Option("--site", "--sites", help="Sites, comma-separated; all states, if not given.")] = STATES,
    probe: Annotated[
        str, typer.Option(help="logistic, lda, mean, sparse, project or mlp; of numbers ridge (also as logistic) or mlp.")
    ] = "logistic",
    pool: Pooled = "last",
    text: Text = "text",
    label: Label = "label",
    group: Group = None,
    target: Target = None,
    type: Type = None,
    numbers: Annotated[bool, typer.Option("--numbers", help="Labels are numbers, for a regression.")] = False,
    examples: Examples = None,
    balanced: Annotated[
        bool, typer.Option("--balanced", help="Weigh classes alike, whatever their number of examples.")
    ] = False,
    controls: Annotated[bool, typer.Option(help="Untrained model, shuffled labels, control task.")] = True,
    folds: Annotated[int, typer.Option(min=2, help="Of groups.")] = 5,
    seed: Annotated[int, typer.Option(min=0, help="Of folds, shuffles, untrained weights and resamples.")] = 0,
    read: Annotated[bool, typer.Option("--read", help="Also read the best site's direction in words and neurons.")] = False,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Also write tables, probes and pictures here."), WRITTEN
    ] = None,
    model: Model = DEFAULT_MODEL,
    revision: Revision = None,
    device: Device = None,
    dtype: DType = None,
    json: Json = False,
) -> None:
    """Is a concept there, at which layers, and would it be there in an untrained model?"""
    from probes.fit import probe_named
    from probes.probe_sweep import sweep
    from probes.reading import read_probe
    from workbench.artifacts import output_folder, write_page

    if out is not None:
        output_folder(out)
    dataset = load_dataset(data, text, label, group, target, type, examples, "numbers" if numbers else None)
    chosen = probe_named(probe, dataset.kind, class_weight="balanced", seed=seed, device=device) if balanced else probe
    loaded = load_model(model, revision, device, dtype)
    note(seed=seed, dataset=dataset.settings)
    found = sweep(
        loaded, dataset, site.split(","), probe=chosen, pool=pool, controls=controls, folds=folds, seed=seed,  # pyright: ignore[reportArgumentType]
        device=device, progress=not json,
    )  # fmt: skip
    reading = read_probe(loaded, found) if read else None
    if out is not None:
        wrote(found.save(out))
        for name in _pictures(found):
            wrote(write_page(out / f"{name}.html", found.plot(name)))
        if reading is not None:
            wrote(reading.save(out / "reading"))
    if json:
        tables = {"table": found.table, "references": found.references}
        rows = {name: one.astype(object).where(one.notna(), None).to_dict("records") for name, one in tables.items()}
        more = (
            {}
            if reading is None
            else {"neurons": reading.table.to_dict("records"), "words": reading.words.best().to_dict("records")}
        )
        emit_json({"settings": found.settings, "best": str(found.best()["site"])} | rows | more)
        return
    print(found)
    if reading is not None:
        print(f"\n{reading}")
    if out is not None:
        say(f"\nWritten to {out}; pictures: {', '.join(f'{name}.html' for name in _pictures(found))}.")


def probe_sets(json: Json = False) -> None:
    """List the probe sets that are shipped: what each asks, its size, classes and licence."""
    from probes.shipped import shipped_sets

    found = shipped_sets()
    if json:
        emit_json({"sets": found})
        return
    rows = [
        [name, f"{about['rows']:,}", f"{about['groups']:,}", about["licence"], about["asks"]] for name, about in found.items()
    ]
    table("Probe sets", ["name", "rows", "groups", "licence", "asks"], rows, left=["name", "licence", "asks"])


def _pictures(found) -> list[str]:
    """Names of all pictures that there are of a sweep."""
    if found.settings["labels_are"] == "numbers":
        return ["layers", *(["map"] if found.settings["targets"] == ["latitude", "longitude"] else [])]
    return ["layers", "confusion", *(["directions"] if found.directions is not None else [])]


VERBS = {"probe": probe, "probe-sets": probe_sets}
