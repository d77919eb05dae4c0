"""Verbs about models: models, pull, verify, sites, families."""

import math
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from workbench.cli.options import WRITTEN, Device, DType, Json, Model, Revision, load_model
from workbench.cli.show import emit_json, say, table
from workbench.embedded import DEFAULT as DEFAULT_MODEL
from workbench.manifest import wrote


def models(json: Json = False) -> None:
    """List the models that can be named: embedded and cached ones, with size and licence."""
    from workbench.embedded import EMBEDDED
    from workbench.model_files import models as list_models

    found = list_models()
    if json:
        emit_json({"models": [asdict(model) for model in found]})
        return
    rows = [(model.name, model.kind, f"{model.bytes / 1e6:,.0f} MB", model.licence, model.state) for model in found]
    table("Models", ["name", "kind", "size", "licence", "state"], rows, left=["name", "kind", "licence", "state"])
    for model in EMBEDDED.values():
        say(f"{model.name}: {model.note}.")


def pull(name: Annotated[str, typer.Argument(help="An embedded model.")] = DEFAULT_MODEL, json: Json = False) -> None:
    """Fetch an embedded model into the cache ($WORKBENCH_HOME, or mi-workbench in the user's cache folder)."""
    from workbench.embedded import pull as fetch

    folder = fetch(name)
    if json:
        emit_json({"model": name, "folder": str(folder)})
    else:
        say(f"{name} is ready in {folder}")


def verify(
    model: Model = DEFAULT_MODEL,
    revision: Revision = None,
    device: Device = None,
    dtype: DType = None,
    every_layer: Annotated[bool, typer.Option("--every-layer", help="A line a layer, not the worst layer alone.")] = False,
    save: Annotated[Path | None, typer.Option(help="JSON file for all checks."), WRITTEN] = None,
    json: Json = False,
) -> None:
    """Check every identity that the names of sites and weights promise, at all layers. Exit code 2 if one fails."""
    found = load_model(model, revision, device, dtype, check=False).verify()
    if save is not None:
        wrote(found.save(save))
    if json:
        emit_json(found.to_json())
    else:
        settings = found.settings
        print(f"{settings['model']} ({settings['family']}, {settings['dtype']} on {settings['device']}): {found.headline()}")
        checks = found.table if every_layer else found.worst()
        depth = ["layer"] if every_layer else ["layers", "worst_layer"]
        rows = [
            (row["identity"], *(_blank(row[name]) for name in depth), _scientific(row["error"]), f"{row['tolerance']:.0e}",
             row["verdict"])
            for row in checks.to_dict("records")
        ]  # fmt: skip
        columns = ["identity", *(name.replace("_", " ") for name in depth), "error", "tolerance", "verdict"]
        table("", columns, rows, left=["identity", "verdict"])
        for why in found.table.loc[found.table["why"] != "", "why"].unique():
            print(f"unchecked: {why}")
    if save is not None:
        say(f"\nWritten to {save}.")
    found.require()


def sites(
    model: Model = DEFAULT_MODEL,
    revision: Revision = None,
    json: Json = False,
) -> None:
    """List every site of a model: what it means, its shape, where it is read, its names elsewhere, or why it is not there."""
    from workbench.catalogue import site_table

    found = site_table(load_model(model, revision, None, None, check=False))
    if json:
        emit_json({"model": model, "sites": found.to_dict("records")})
        return
    there, missing = found[found["available"]], found[~found["available"]]
    names = ["site", "layers", "shape", "module", "transformer_lens", "nnterp"]
    rows = [
        [row[name].replace("batch, pos, ", "") if name == "shape" else row[name] for name in names]
        for row in there.to_dict("records")
    ]
    table(f"Sites of {model} (shapes without batch, pos)", names, rows, left=names)
    print()
    for row in there.to_dict("records"):
        note = "" if row["writable"] else " (can be read, not written)"
        print(f"  {row['site']:<14}{row['meaning']}{note}")
    print("\nNot there:")
    for row in missing.to_dict("records"):
        print(f"  {' '.join([row['site'], row['layers']]):<20}{row['why']}")


def families(
    markdown: Annotated[bool, typer.Option("--markdown", help="As a table for a document.")] = False, json: Json = False
) -> None:
    """List the model families that have a row; others are guessed, and taken if the whole self-check passes."""
    from workbench.catalogue import family_table
    from workbench.catalogue import markdown as as_markdown

    found = family_table()
    if json:
        emit_json({"families": found.to_dict("records")})
    elif markdown:
        print(as_markdown(found), end="")
    else:
        table("Families", list(found.columns), found.to_numpy().tolist(), left=list(found.columns))


def _blank(value: object) -> str:
    import pandas as pd

    return "" if pd.isna(value) else str(value)  # pyright: ignore[reportGeneralTypeIssues]


def _scientific(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.1e}"


VERBS = {"models": models, "pull": pull, "verify": verify, "sites": sites, "families": families}
