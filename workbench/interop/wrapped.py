"""The Hugging Face model and the tokenizer inside another library's model; and the libraries, if they are installed."""

from importlib import import_module
from typing import Any

from workbench.errors import MissingPackage


def unwrapped(model: Any, *, moved: bool, meant_to_run: bool) -> tuple[Any, Any]:
    """What stands inside a TransformerBridge or an nnsight model, and its tokenizer; any other object as it is, and None.

    Neither library is imported for an object of another one.

    Args:
        moved: Whether the weights are to be cast or moved.
        meant_to_run: Whether the model is to run here, so that weights that nnsight has yet to load are wanted.
    Raises:
        UnknownModel, UnknownOption: as `workbench.interop.transformer_lens.inside`.
    """
    libraries = {kind.__module__.partition(".")[0] for kind in type(model).__mro__}
    if "transformer_lens" in libraries:
        from workbench.interop import transformer_lens

        return transformer_lens.inside(model, moved=moved)
    if "nnsight" in libraries:
        from workbench.interop import nnsight

        return nnsight.inside(model, meant_to_run=meant_to_run)
    return model, None


def required(package: str, extra: str, what_for: str) -> Any:
    """The package, imported.

    Raises:
        MissingPackage: if it is not installed; the text names the extra that brings it.
    """
    try:
        return import_module(package)
    except ModuleNotFoundError as missing:
        if missing.name != package:
            raise
        raise MissingPackage(
            f"{what_for} needs the package {package}, which is not installed. Install it: pip install 'mi-workbench[{extra}]'."
        ) from None
