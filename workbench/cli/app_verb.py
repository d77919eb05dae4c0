"""The verb that opens the explorer: app."""

from pathlib import Path
from typing import Annotated

import typer

from workbench.cli.options import Model
from workbench.embedded import DEFAULT as DEFAULT_MODEL


def app(
    model: Model = DEFAULT_MODEL,
    map: Annotated[list[Path] | None, typer.Option("--map", help="A map of neurons outside of --runs; several.")] = None,
    runs: Annotated[Path, typer.Option(help="The folder of results: what is there is shown, and jobs write there.")] = Path(
        "out"
    ),
    port: Annotated[int, typer.Option(min=1, max=65535, help="On 127.0.0.1.")] = 8501,
    browser: Annotated[bool, typer.Option(help="Open a browser.")] = True,
) -> None:
    """Open the explorer in a browser: all of the workbench without writing code. Ctrl-C ends it."""
    from app.launch import serve
    from workbench.artifacts import output_folder

    output_folder(runs, "Name another with --runs")
    serve(model, map or [], runs, port, browser=browser)


VERBS = {"app": app}
"""By the name on the command line."""
