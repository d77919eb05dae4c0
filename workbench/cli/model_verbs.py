"""Verbs about models: models, pull, verify."""

from dataclasses import asdict
from typing import Annotated

import typer

from workbench.cli.options import Device, DType, Json, Model, Revision, load_model
from workbench.cli.show import emit_json, say, table
from workbench.embedded import DEFAULT as DEFAULT_MODEL


def models(json: Json = False) -> None:
    """List the models that can be named: embedded and cached ones, with size and licence."""
    from workbench.embedded import EMBEDDED
    from workbench.loading import models as list_models

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
    json: Json = False,
) -> None:
    """Check every identity that the names of sites and weights promise, at all layers. Exit code 2 if one fails."""
    found = load_model(model, revision, device, dtype, check=False).verify()
    if json:
        checks = found.table.astype(object).where(found.table.notna(), None).to_dict("records")
        emit_json({"passed": found.passed, "settings": found.settings, "checks": checks})
    else:
        print(found)
    found.require()


VERBS = {"models": models, "pull": pull, "verify": verify}
