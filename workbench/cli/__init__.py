"""The command line: parse, call, show. Every verb answers `--json` with one object on stdout; words go to stderr."""

import logging
import sys

import typer

from workbench.cli import (
    app_verb,
    card_verbs,
    convert_lens_verb,
    corpus_verbs,
    direction_verbs,
    erase_verbs,
    gradient_verbs,
    lens_verbs,
    linearity_verbs,
    model_verbs,
    neuron_verbs,
    probe_verbs,
    prompt_verbs,
    run_verbs,
    shortcut_verbs,
    transport_verbs,
    unit_verbs,
)
from workbench.cli.verb import verb

app = typer.Typer(
    name="workbench",
    help="A mechanistic-interpretability workbench for Hugging Face decoder language models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
_SETTINGS = {name: {"ignore_unknown_options": True} for name in ("neuron", "clamp")}
"""Their argument may begin with a dash by mistake, as -1.3: so the verb sees it, and says what is wrong with it."""
for _module in (
    model_verbs, neuron_verbs, card_verbs, direction_verbs, corpus_verbs, unit_verbs, linearity_verbs, shortcut_verbs,
    transport_verbs, lens_verbs, convert_lens_verb, gradient_verbs, probe_verbs, erase_verbs,
    prompt_verbs, run_verbs, app_verb,
):  # fmt: skip
    for _name, _function in _module.VERBS.items():
        app.command(_name, context_settings=_SETTINGS.get(_name))(
            verb(_name, _function, recorded=_module not in (run_verbs, app_verb))
        )


def main() -> None:
    """Run and exit: 0 done, 2 bad input, 130 stopped by Ctrl-C, 1 a fault of ours."""
    logging.basicConfig(format="%(message)s", stream=sys.stderr, level=logging.WARNING)
    app()
