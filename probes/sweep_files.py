"""A sweep in a folder: tables as Parquet, the probes' coefficients as safetensors, the rest as JSON."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from probes import fit
from workbench.artifacts import output_folder, read_tables, staged, write_tables
from workbench.errors import BadArtifact

if TYPE_CHECKING:
    from probes.probe_sweep import ProbeSweep

KIND, MAKER = "probe_sweep", "workbench probe or probes.sweep(...).save"


def save_sweep(result: ProbeSweep, folder: str | Path) -> Path:
    """As `ProbeSweep.save`."""
    from safetensors.numpy import save_file

    folder = Path(folder)
    linear = {site: probe for site, probe in result.probes.items() if hasattr(probe, "coef_")}
    tensors = {f"{site}.coef": np.ascontiguousarray(probe.coef_) for site, probe in linear.items()}
    tensors |= {f"{site}.intercept": np.asarray(probe.intercept_, float) for site, probe in linear.items()}
    tensors |= {f"{site}.pattern": np.ascontiguousarray(pattern) for site, pattern in result.patterns.items()}
    tensors |= {f"{site}.null_pattern": np.ascontiguousarray(pattern) for site, pattern in result.null_patterns.items()}
    tables = {
        KIND: result.table, "references": result.references, "predictions": result.predictions, "directions": result.directions
    }  # fmt: skip
    folder = output_folder(folder)
    (folder / "run.json").unlink(missing_ok=True)  # it is written last, when all is there
    with staged(folder / "probes.safetensors") as beside:
        save_file(tensors, beside)
    return write_tables(folder, KIND, result.settings, tables)


def load_sweep(cls: type[ProbeSweep], folder: str | Path) -> ProbeSweep:
    """As `ProbeSweep.load`."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    folder = Path(folder)
    table, others, settings = read_tables(folder, KIND, MAKER, ["references", "predictions", "directions"])
    try:
        tensors = load_file(folder / "probes.safetensors")
    except (OSError, SafetensorError) as error:
        raise BadArtifact(f"The probes in {str(folder)!r} are missing or damaged ({error}). Make them again.") from None
    sites = [name.removesuffix(".coef") for name in tensors if name.endswith(".coef")]
    fitted = {site: _probe(settings, tensors[f"{site}.coef"], tensors[f"{site}.intercept"]) for site in sites}
    patterns, nulls = (
        {name.removesuffix(f".{what}"): value for name, value in tensors.items() if name.endswith(f".{what}")}
        for what in ("pattern", "null_pattern")
    )
    return cls(
        table=table, settings=settings, references=others["references"], predictions=others["predictions"], probes=fitted,
        patterns=patterns, null_patterns=nulls, directions=others["directions"],
    )  # fmt: skip


def _probe(settings: dict[str, Any], coef: np.ndarray, intercept: np.ndarray) -> Any:
    """A probe of the kind, options and coefficients that were saved: it predicts and points as it did."""
    known = fit.NUMBERS if settings["labels_are"] == "numbers" else fit.CLASSES
    name = next(name for name, (_, own) in known.items() if own == settings["probe"])
    probe = fit.probe_named(name, settings["labels_are"], **settings["options"])
    probe.coef_, probe.intercept_ = coef, intercept
    probe.n_features_in_ = coef.shape[-1]
    if settings["classes"] is not None:
        probe.classes_ = np.asarray(settings["classes"])
    return probe
