"""The command line: parse, call, show. Every verb answers `--json` with one object on stdout; words go to stderr."""

import logging
import sys

import typer

from workbench.cli import corpus_verbs, model_verbs, neuron_verbs, prompt_verbs, run_verbs, unit_verbs
from workbench.cli.verb import verb

app = typer.Typer(
    name="workbench",
    help="A mechanistic-interpretability workbench for Hugging Face decoder language models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for _module in (model_verbs, neuron_verbs, corpus_verbs, unit_verbs, prompt_verbs, run_verbs):
    for _name, _function in _module.VERBS.items():
        app.command(_name)(verb(_name, _function, recorded=_module is not run_verbs))


def main() -> None:
    """Run and exit: 0 done, 2 bad input, 130 stopped by Ctrl-C, 1 a fault of ours."""
    logging.basicConfig(format="%(message)s", stream=sys.stderr, level=logging.WARNING)
    app()
