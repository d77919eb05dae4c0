"""Options of labelled examples, and the dataset that they name."""

from typing import Annotated

import typer

from workbench.cli.show import say

Data = Annotated[str, typer.Option("--data", help="A .csv, .tsv or .parquet file, or a shipped set: see probe-sets.")]
Pooled = Annotated[str, typer.Option("--pool", help="Of the words' tokens: last, first or mean.")]
Text = Annotated[str, typer.Option("--text", help="Column of the text.")]
Label = Annotated[
    str, typer.Option("--label", help="Column of the label; several, comma-separated, are targets of a regression.")
]
Group = Annotated[
    str | None, typer.Option("--group", help="Column of what is held out together, or two; group, if there is one.")
]
Target = Annotated[str | None, typer.Option("--target", help="Column of the words asked about (12:17, or the words); target.")]
Type = Annotated[str | None, typer.Option("--type", help="Column of what a control task labels at random; type.")]
Examples = Annotated[int | None, typer.Option("--examples", min=2, help="The first so many; all, if not given.")]


def load_dataset(
    data: str, text: str, label: str, group: str | None, target: str | None, type: str | None, examples: int | None, kind=None
):
    """The dataset that the options name, said on stderr.

    Raises:
        BadDataset: as `Dataset.load`.
    """
    from probes.dataset import Dataset

    columns = label.split(",")
    found = Dataset.load(
        data, text=text, label=columns if len(columns) > 1 else label, group=None if group is None else group.split(","),
        target=target, type=type, kind=kind,
    )  # fmt: skip
    found = found if examples is None else found.head(examples)
    say(f"{found}")
    return found
