"""Moments on disk: moments.safetensors and run.json. Sums of sites with themselves as triangles, of cells with tokens alone."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from workbench.artifacts import output_folder, settings_of, staged, write_json
from workbench.errors import BadArtifact
from workbench.moments.layout import Layout, Pair
from workbench.moments.moments import Moments, Sums

KIND, FILE = "moments", "moments.safetensors"


def save_moments(moments: Moments, folder: str | Path) -> Path:
    """
    Raises:
        CannotWrite: if the folder cannot be written, or the disk has no room.
    """
    folder = output_folder(Path(folder))
    layout, sums = moments.layout, moments.sums
    (folder / "run.json").unlink(missing_ok=True)
    filled = sums.n > 0
    arrays = {"pilot": sums.pilot, "has_pilot": sums.has_pilot, "n": sums.n, "unshuffled": sums.unshuffled}
    arrays |= {f"total/{site}": total for site, total in sums.total.items()}
    arrays |= {f"own/{site}": own[filled][:, *_triangle(own)] for site, own in sums.own.items()}
    arrays |= {f"cross/{source}": cross for source, cross in sums.cross.items()}
    with staged(folder / FILE) as beside:
        save_file({name: array.cpu().contiguous() for name, array in arrays.items()}, beside)
    shape = {
        "widths": layout.widths, "pairs": [list(pair) for pair in layout.pairs], "detail": layout.detail,
        "folds": layout.folds, "cross_folds": layout.cross_folds,
    }  # fmt: skip
    write_json(folder / "run.json", {"kind": KIND, "layout": shape} | moments.settings)
    return folder


def load_moments(folder: str | Path) -> Moments:
    """
    Raises:
        BadArtifact: if the folder holds no moments, or damaged ones.
    """
    folder = Path(folder)
    settings = settings_of(folder, KIND, "wb.collect_moments")
    try:
        shape = settings.pop("layout")
        layout = Layout(
            shape["widths"],
            tuple(Pair(*pair) for pair in shape["pairs"]),
            shape["detail"],
            shape["folds"],
            shape["cross_folds"],
        )
        arrays = load_file(folder / FILE)
        sums = Sums.zeros(layout)
        sums.pilot, sums.has_pilot, sums.n, sums.unshuffled = (
            arrays[name] for name in ("pilot", "has_pilot", "n", "unshuffled")
        )  # fmt: skip
        filled = sums.n > 0
        for site, own in sums.own.items():
            sums.total[site] = arrays[f"total/{site}"]
            rows, columns = _triangle(own)
            square = own.new_zeros(int(filled.sum()), *own.shape[2:])
            square[:, rows, columns] = square[:, columns, rows] = arrays[f"own/{site}"]
            own[filled] = square
        for source in sums.cross:
            sums.cross[source] = arrays[f"cross/{source}"]
    except (OSError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise BadArtifact(f"The moments in {str(folder)!r} are damaged ({error}). Collect them again.") from None
    return Moments(layout, sums, settings)


def _triangle(square: Tensor) -> tuple[Tensor, Tensor]:
    rows, columns = torch.triu_indices(square.shape[-1], square.shape[-1])
    return rows, columns
