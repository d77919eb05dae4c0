"""Which row a model has: its family's, or, for a family without one, a guessed row that passes the whole self-check."""

import logging
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from workbench.architectures import guess
from workbench.architectures.lookup import missing_modules, placed, row_of
from workbench.architectures.row import Architecture, as_source
from workbench.errors import UnknownArchitecture
from workbench.model import LanguageModel
from workbench.verification import Verification, verify, verify_briefly

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger("workbench")


def refuse_encoder_decoder(config: Any) -> None:
    """
    Raises:
        UnknownArchitecture: for a config of an encoder-decoder.
    """
    if getattr(config, "is_encoder_decoder", False):
        raise UnknownArchitecture(
            f"{config.model_type!r} is an encoder-decoder: its decoder reads an encoder's states beside its own stream. "
            "The workbench takes decoder-only language models; load one of those."
        )


def recognised(
    hf: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", name: str, revision: str, source: Any = None
) -> LanguageModel:
    """The model with its row.

    Raises:
        UnknownArchitecture: for an encoder-decoder, a wrapper without its head, or a family without a row for which no
            guess passes the self-check.
    """
    refuse_encoder_decoder(hf.config)
    config = hf.config.get_text_config(decoder=True)
    row = row_of(config)
    if row is not None:
        return LanguageModel(hf, tokenizer, placed(row, hf), name, revision, source)
    log.warning("Family %r has no row: guessing one from the module tree, and checking it.", config.model_type)
    try:
        base = guess.trunk(hf, config)
        return _guessed(LanguageModel(hf, tokenizer, base, name, revision, source), config)
    except (AttributeError, KeyError, IndexError, TypeError) as unlike:
        raise UnknownArchitecture(
            f"Family {config.model_type!r} has no row in workbench/architectures/families.py, and its modules are too unlike "
            f"those known to guess one ({unlike}). Write a row (see `workbench families` for those there are)."
        ) from unlike


@dataclass(frozen=True)
class _Trial:
    """A guessed row and what the self-check says of it."""

    row: Architecture
    found: Verification | None
    """None if the row's paths lead nowhere."""
    missing: str = ""

    @property
    def failures(self) -> float:
        """What does not hold, or cannot be tried: a guess may leave nothing unchecked."""
        return float("inf") if self.found is None else float((self.found.table["verdict"] != "ok").sum())

    @property
    def reasons(self) -> str:
        """What is wrong with it, in a line."""
        if self.found is None:
            return f"there is no {self.missing}"
        failed = self.found.worst().query("verdict != 'ok'")
        errors = [row.why.rstrip(".") or f"off by {row.error:.1e}" for row in failed.itertuples()]
        return "; ".join(f"{name!r}: {error}" for name, error in zip(failed["identity"], errors, strict=True))


def _guessed(model: LanguageModel, config: Any) -> LanguageModel:
    """The model with the first guessed row that passes everything.

    Raises:
        UnknownArchitecture: if none does; the text shows the best guess, what fails with it, and the row to mend.
    """
    best = _best(model, guess.rows(model.hf, config, model.row))
    if best.failures:
        best = _best(model, guess.offsets(best.row, config))
    if not best.failures:
        trials = [_tried(model, row, whole=True) for row in guess.fused_cuts(best.row)]
        best = min(trials, key=lambda trial: trial.failures)
        if not best.failures:
            return replace(model, row=best.row)
    raise UnknownArchitecture(
        f"Family {config.model_type!r} has no row in workbench/architectures/families.py (see `workbench families`), and no "
        f"guess passes the self-check. With the best guess: {best.reasons}. The guess, to be mended and pasted there:\n"
        f"    {config.model_type!r}: {as_source(best.row)},"
    )


def _best(model: LanguageModel, rows: Any) -> _Trial:
    trials = []
    for row in rows:
        trials.append(_tried(model, row, whole=False))
        if not trials[-1].failures:
            break
    if not trials:
        raise UnknownArchitecture(
            f"Family {model.row.model_type!r} has no row in workbench/architectures/families.py, and its blocks have an "
            "unusual number of norms, so none can be guessed. Write a row (see `workbench families` for those there are)."
        )
    return min(trials, key=lambda trial: trial.failures)


def _tried(model: LanguageModel, row: Architecture, *, whole: bool) -> _Trial:
    if missing := missing_modules(row, model.hf):
        return _Trial(row, None, ", ".join(missing))
    tried = replace(model, row=row)
    return _Trial(row, (verify if whole else verify_briefly)(tried))
