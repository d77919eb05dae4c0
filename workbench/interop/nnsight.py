"""nnsight: the Hugging Face model inside its wrappers, and captures that run through its traces, here or on NDIF's machines."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from workbench.architectures.taps import Tap
from workbench.errors import UnknownOption, UnknownSite
from workbench.interop.ndif import remotely
from workbench.interop.wrapped import required
from workbench.model import Batch, LanguageModel
from workbench.tracer import Place, is_edited, is_output_edited, taps_of


def inside(wrapper: Any, *, meant_to_run: bool) -> tuple[Any, Any]:
    """The module that an nnsight model wraps, and its tokenizer, if it has one.

    nnsight loads the weights when a model first runs; they are loaded here, if it is `meant_to_run`.
    """
    if meant_to_run and not getattr(wrapper, "dispatched", True):
        wrapper.dispatch()
    return wrapper._module, getattr(wrapper, "tokenizer", None)


def read_through(
    model: LanguageModel, batch: Batch, places: Sequence[Place], *, gradients: bool, remote: bool
) -> tuple[dict[Place, Tensor], Tensor]:
    """Tensors at the places, in the order of the forward pass, and the logits, read by nnsight.

    nnsight leaves its instruments on the modules, where they idle until the next trace.

    Raises:
        UnknownSite: for a site inside the attention function.
        UnknownOption: for gradients, or if an open edit would not be seen.
        MissingPackage: if nnsight is not installed.
        RemoteUnavailable: as `workbench.interop.ndif.remotely`.
    """
    taps = taps_of(model, places)
    _require_unedited(model, taps, remote=remote)
    for place, tap in taps.items():
        if tap.end == "inside":
            raise UnknownSite(
                f"Site '{place}' lies inside the attention function, and nnsight reads what goes into modules and what comes "
                "out. Capture it with the default backend, 'hooks'."
            )
    if gradients:
        raise UnknownOption("gradients=True needs a pass that the workbench makes. Use the default backend, 'hooks'.")
    nnsight = required("nnsight", "nnsight", "backend='nnsight'")
    reads = [(str(place), tap.path, tap.end, tap.item, tap.mutated) for place, tap in taps.items()]
    inputs = model.inputs(batch)
    if remote:
        values = remotely(nnsight, model, lambda deployed: _traced(nnsight, deployed, inputs, reads, remote=True))
    else:
        values = _traced(nnsight, nnsight.NNsight(model.hf), inputs, reads)
    logits = values.pop("")
    by_name = {str(place): place for place in taps}
    rows, columns = batch.tokens.shape
    kept = {}
    for name, value in values.items():
        tap = taps[by_name[name]]
        kept[by_name[name]] = tap.read(value, None if tap.block is None else (rows, columns))
    return kept, logits


def _require_unedited(model: LanguageModel, taps: Mapping[Place, Tap], *, remote: bool) -> None:
    """nnsight sees a module's output before the hooks of an open block do, and another machine's modules have none.

    Raises:
        UnknownOption: if an open edit changes one of the outputs, or anything on another machine.
    """
    if remote and is_edited(model):
        raise UnknownOption("The edits of an open block are not made on another machine. Capture here, or outside the block.")
    for place, tap in taps.items():
        if tap.end == "output" and is_output_edited(model.module(tap.path)):
            raise UnknownOption(
                f"'{place}' is edited in an open block, and nnsight would read it as it was before. Capture it with the "
                "default backend, 'hooks', or outside the block."
            )


def _traced(
    nnsight: Any, wrapper: Any, inputs: dict[str, Any], reads: list[tuple[str, str, str, int, bool]], **options: Any
) -> dict[str, Tensor]:
    """What is read in one trace, by name, as it comes, and the logits, under no name; without modules that are not called.

    Args:
        reads: Name, module path, end, which item of a tuple, and whether the model changes the tensor later.
        options: Of the trace.
    """
    save, never_called = nnsight.save, nnsight.intervention.interleaver.OutOfOrderError
    # Each in a block of its own: within one they would have to be named in the order of the forward pass. And nothing in
    # them but plain values: the blocks' source is what is sent to another machine, where there is no workbench.
    with torch.no_grad(), wrapper.trace(**options) as tracer:
        found = save({})
        with tracer.invoke(**inputs):
            found[""] = wrapper.output.logits.detach()
        for name, path, end, item, mutated in reads:
            with tracer.invoke():  # noqa: SIM117 - nnsight runs what is inside alone, so nothing else may be opened here
                with suppress(never_called):
                    module = wrapper.get(path)
                    value = module.input if end == "input" else module.output
                    value = (value[item] if isinstance(value, tuple) else value).detach()
                    found[name] = value.clone() if mutated else value
    return found
