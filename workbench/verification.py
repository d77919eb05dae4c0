"""The self-check: does this model obey the identities that the names of its sites and weights promise?"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import isnan
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from workbench.artifacts import write_json
from workbench.checks.batches import batches
from workbench.checks.check import MISFITS, Check, misfitting, probe
from workbench.checks.inside import inside
from workbench.checks.moved import moved
from workbench.checks.routing import routing
from workbench.checks.still import still
from workbench.errors import UnreadableWeight, VerificationFailed
from workbench.model import LanguageModel
from workbench.results import Result

if TYPE_CHECKING:
    import pandas as pd

TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 4e-2}
"""Largest relative error of a row. Half-precision ones allow for a few roundings of 2^-11 and 2^-8 in a row of sums; in
float64 Hugging Face's norms and softmax still compute in float32."""
THROUGH = {torch.float64: 1e-5, torch.float32: 1e-4, torch.float16: 3e-2, torch.bfloat16: 1e-1}
"""The same, between two passes through all layers in batches of different shape, for which other kernels round otherwise:
random models of the shapes of Llama-3.1-8B and Gemma-2-9B differ by 1.0e-5 in float32 and 3.2e-2 in bfloat16 on an H200."""


@dataclass(frozen=True, eq=False, repr=False)
class Verification(Result):
    """Each identity with its error. Columns: identity, layer (None: the whole model), error (relative to the norm of the
    row), tolerance (by dtype), verdict (`ok`, `fails`, or `unchecked`), why (it could not be checked; else empty)."""

    @property
    def passed(self) -> bool:
        """Whether every identity that could be checked holds."""
        return not (self.table["verdict"] == "fails").any()

    def worst(self) -> "pd.DataFrame":
        """One row an identity: how many layers were checked, and the one with the largest error.

        Columns: identity, layers, worst_layer, error, tolerance, verdict, why.
        """
        import pandas as pd

        rows = []
        for identity, checks in self.table.groupby("identity", sort=False):
            tried = checks["error"].notna().any()
            one = checks.loc[checks["error"].idxmax()] if tried else checks.iloc[0]
            whole = pd.isna(one["layer"])
            rows.append(
                {
                    "identity": identity,
                    "layers": None if whole else len(checks),
                    "worst_layer": None if whole else int(one["layer"]),
                    "error": one["error"],
                    "tolerance": one["tolerance"],
                    "verdict": one["verdict"],
                    "why": one["why"],
                }
            )
        return pd.DataFrame(rows).astype({"layers": "Int64", "worst_layer": "Int64"})

    def __str__(self) -> str:
        import pandas as pd

        lines = []
        for row in self.worst().itertuples():
            layers = "" if pd.isna(row.layers) else f", {row.layers} layers, worst at {row.worst_layer}"
            of = row.why or f"tolerance {row.tolerance:.0e}{layers}"
            lines.append(f"  {row.verdict:<9} {row.identity:<66} {row.error:8.1e}  ({of})")
        return "\n".join([f"{self.settings['model']}: {self.headline()}", *lines])

    def headline(self) -> str:
        """The verdict in a line."""
        counts = self.table["verdict"].value_counts()
        unchecked = f"; {counts['unchecked']} could not be checked" if "unchecked" in counts else ""
        if not self.passed:
            return f"{counts['fails']} of {len(self.table)} checks FAIL{unchecked}"
        return f"all identities hold ({counts.get('ok', 0)} checks{unchecked})"

    def save(self, path: str | Path) -> Path:
        """Write every check to a JSON file.

        Raises:
            CannotWrite: if the file cannot be written.
        """
        write_json(Path(path), self.to_json())
        return Path(path)

    def to_json(self) -> dict[str, Any]:
        """Everything, as plain values: `passed`, `settings`, and `checks`, a list of the table's rows."""
        checks = self.table.astype(object).where(self.table.notna(), None).to_dict("records")
        return {"passed": self.passed, "settings": self.settings, "checks": checks}

    def require(self) -> None:
        """
        Raises:
            VerificationFailed: if an identity does not hold; the text names the first.
        """
        import pandas as pd

        failed = self.table[self.table["verdict"] == "fails"]
        if len(failed):
            first = failed.iloc[0]
            at = "" if pd.isna(first["layer"]) else f" at layer {first['layer']}"
            allowed = f"tolerance {first['tolerance']:.0e}"
            raise VerificationFailed(
                f"{self.settings['model']!r} does not behave as its family {self.settings['family']!r} promises: "
                f"{first['identity']!r} is off by {first['error']:.1e}{at} ({first['why'] or allowed}; "
                f"{len(failed)} of {len(self.table)} checks fail). Nothing read from it could be trusted. If the model's "
                "code was changed, write a row for it; to load it all the same, pass check=False."
            )


def verify(model: LanguageModel) -> Verification:
    """All identities, at all layers: the stream, the head, the weights by name, edits, heads, experts, padding, causality."""
    batch = probe(model)
    parts = (still, moved, inside, routing, batches)
    return _result(model, model.provenance, *(part(model, batch) for part in parts))


def verify_briefly(model: LanguageModel) -> Verification:
    """What one short forward pass can show; run whenever a model is loaded."""
    settings = {"model": model.name, "family": model.row.model_type}  # no hash of the weights: it takes as long as a layer
    return _result(model, settings, still(model, probe(model)))


def _result(model: LanguageModel, settings: dict[str, Any], *parts: Iterable[Check]) -> Verification:
    import pandas as pd

    with torch.no_grad():
        checks = [check for part in parts for check in _until_a_misfit(part)]
    table = pd.DataFrame(checks, columns=list(Check._fields))
    table["layer"] = table["layer"].astype("Int64")
    table.insert(3, "tolerance", [(THROUGH if through else TOLERANCE)[model.dtype] for through in table.pop("through")])
    pairs = zip(table["error"], table["tolerance"], strict=True)
    verdicts = ["unchecked" if isnan(error) else "ok" if error <= tolerance else "fails" for error, tolerance in pairs]
    table.insert(4, "verdict", verdicts)
    return Verification(table, settings)


def _until_a_misfit(checks: Iterable[Check]) -> Iterator[Check]:
    """The checks, and one in place of those that a row makes impossible, or a weight that cannot be read."""
    try:
        yield from checks
    except UnreadableWeight as unreadable:
        yield Check("the row fits the model's tensors", None, float("nan"), str(unreadable))
    except MISFITS as misfit:
        error, why = misfitting(misfit)
        yield Check("the row fits the model's tensors", None, error, f"{why} (checks after this one were not tried)")
