"""NDIF: whether it runs a model for this user now, and the nnsight model whose traces run there."""

from collections.abc import Callable
from copy import deepcopy
from typing import Any

from torch import Tensor

from workbench.errors import RemoteUnavailable
from workbench.model import LanguageModel


def remotely(nnsight: Any, model: LanguageModel, run: Callable[[Any], dict[str, Tensor]]) -> dict[str, Tensor]:
    """What a trace gives that NDIF runs, on the model's device; asked for only after NDIF said that it runs the model.

    NDIF has weights of its own: those of the model's name on the Hugging Face hub.

    Raises:
        RemoteUnavailable: if there is no key, NDIF cannot be reached, does not run the model, or fails.
    """
    if model.adapters:
        raise RemoteUnavailable(
            f"{model.name!r} carries the adapters {', '.join(model.adapters)}, and NDIF would run it without. Capture it here."
        )
    if not nnsight.CONFIG.API.APIKEY:
        raise RemoteUnavailable(
            "remote=True needs a key of NDIF, and none is set. Get one at https://ndif.us, and set NDIF_API_KEY or call "
            "nnsight.login()."
        )
    deployment = _deployment(model.name, nnsight.status(raw=True))
    try:
        wrapper = nnsight.TransformersModel(
            deployment["repo_id"],
            revision=deployment.get("revision"),
            task=deployment.get("task"),
            tokenizer=deepcopy(model.tokenizer),  # nnsight sets its padding
        )
        found = run(wrapper)
    except Exception as failure:  # of the network, of the hub, of NDIF's machines, each with classes of its own
        reason = (str(failure).strip().splitlines() or [type(failure).__name__])[-1]
        raise RemoteUnavailable(
            f"NDIF was asked to run {model.name!r}, and failed: {reason} Try again, or capture here."
        ) from failure
    return {name: value.to(model.device) for name, value in found.items()}


def _deployment(name: str, status: dict[str, Any]) -> dict[str, Any]:
    """The running deployment of a model, as NDIF's status has it.

    Raises:
        RemoteUnavailable: if there is none.
    """
    if not status:
        raise RemoteUnavailable(
            f"NDIF could not be reached to ask whether it runs {name!r}. Check the network and NDIF_HOST, or capture here "
            "(remote=False)."
        )
    running = [one for one in status.get("deployments", {}).values() if one.get("application_state") == "RUNNING"]
    for one in running:
        if one.get("repo_id", "").lower() == name.lower():
            return one
    there = ", ".join(sorted({one.get("repo_id", "") for one in running})) or "none"
    raise RemoteUnavailable(f"NDIF does not run {name!r} now. Capture here (remote=False), or load one that it runs: {there}.")
