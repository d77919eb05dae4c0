"""From a name, a folder or a live model to a `LanguageModel` that was checked."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Union

import torch

from workbench.architectures.lookup import placed, row_of
from workbench.artifacts import read_json
from workbench.embedded import DEFAULT
from workbench.errors import BrokenModel, UnknownArchitecture, UnknownModel, UnknownOption
from workbench.model import LanguageModel
from workbench.model_files import check_weights, find, revision_of, weight_bytes
from workbench.recognition import recognised, refuse_encoder_decoder
from workbench.verification import TOLERANCE, verify_briefly

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger("workbench")

QUIET_BELOW = 4 << 30
"""Bytes of weights under which a loading bar would only flicker."""


def load(
    model: Union[str, Path, "PreTrainedModel"] = DEFAULT,
    *,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    dtype: torch.dtype | str | None = None,
    device: str | torch.device | None = None,
    device_map: str | dict[str, Any] | None = None,
    revision: str | None = None,
    stream: bool = False,
    check: bool = True,
) -> LanguageModel:
    """Load a model and check that it is what its names say.

    A vision-language model is taken through its text decoder. A live model may carry adapters of the peft library: they
    are captured as they are, and their weights can be read once they are merged. A family without a row is guessed from
    the module tree, and taken only if the whole self-check passes.

    Of a TransformerLens TransformerBridge and of an nnsight model the Hugging Face model inside is taken, with their
    tokenizer. A bridge is left as it is: the workbench runs Hugging Face's own modules with the bridge's weights, so the
    bridge's hooks do not fire, and logits are Hugging Face's, from which a bridge's may differ. (`weights_hash` is not that
    of the model loaded without a bridge: bridges give a head without a bias one of zeros.) An nnsight model whose weights are
    not loaded yet is loaded, or left so with `check=False`, for `wb.capture(…, backend="nnsight", remote=True)`.

    Args:
        model: The embedded model's name (pulled on first use), a local folder, a Hugging Face id (from its cache, else
            downloaded), or a live model: Hugging Face's, which needs its tokenizer, a TransformerBridge, or nnsight's.
        dtype: Of the weights, torch's or its name; as stored, if not given. A live model's own weights are changed.
        device: Where to put the weights; as they are (the CPU), if not given.
        device_map: How accelerate spreads the weights over devices, as `from_pretrained` takes it; instead of `device`.
        revision: Branch, tag or commit of a hub model.
        stream: Leave the blocks' weights in their safetensors files, from where each is read whenever it is asked for or
            computed with; embedding, final norm and head go to `device`. So a model of any size can be mapped with room for
            its head and one matrix.
        check: Run the short self-check (one small forward pass).
    Raises:
        UnknownModel, BrokenModel: if there is no such model, its files cannot be used, or a bridge's weights were processed.
        UnknownArchitecture: for an encoder-decoder, or a family without a row for which no guess holds.
        VerificationFailed: if the self-check fails.
    """
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype, dtype)
    if dtype is not None and dtype not in TOLERANCE:
        known = ", ".join(str(one).removeprefix("torch.") for one in TOLERANCE)
        raise UnknownOption(f"dtype={dtype!r} is not known. Use one of torch's {known}.")
    if device is not None and device_map is not None:
        raise UnknownOption("device= and device_map= exclude each other: the map says where everything goes.")
    if stream and (device_map is not None or not isinstance(model, (str, Path))):
        raise UnknownOption("stream=True is for a model that is loaded from files, without device_map=.")
    if isinstance(model, (str, Path)):
        folder = find(str(model), revision)
        place, device = (str(device or "cpu"), None) if stream else (None, device)
        hf, tokenizer = _from_folder(folder, tokenizer, dtype, device_map, place)
        name, revision, source = str(model), revision_of(folder), folder
    else:
        moved = dtype is not None or device is not None
        hf, tokenizer = _live(model, tokenizer, moved=moved, meant_to_run=check)
        if device_map is not None or revision is not None:
            raise UnknownOption("device_map= and revision= are for models that are loaded from files; this one is live.")
        name, revision, source = getattr(hf.config, "_name_or_path", "") or type(hf).__name__, "local", None
        if dtype is not None:
            for parameter in hf.parameters():  # not hf.to: tables that from_pretrained keeps in float32 stay so
                parameter.data = parameter.data.to(dtype)
    assert tokenizer is not None
    if device is not None:
        _move(hf, device)
    hf.eval()
    loaded = recognised(hf, tokenizer, name, revision, source)
    if loaded.adapters:
        log.warning(
            "%s carries adapters that are not merged (%s): what is captured includes them, weights under them cannot be read.",
            name, ", ".join(loaded.adapters),
        )  # fmt: skip
    if check:
        verify_briefly(loaded).require()
    return loaded


def _live(model: Any, tokenizer: Any, *, moved: bool, meant_to_run: bool) -> tuple[Any, Any]:
    """The Hugging Face model that was given and its tokenizer; inside a PeftModel, the one whose linear layers carry the
    adapters; inside a TransformerBridge or an nnsight model, as `workbench.interop.wrapped` finds it.

    Raises:
        UnknownModel: if it is no such model, or its tokenizer is missing.
        UnknownArchitecture: for adapters that are no part of the layers (prompt tuning and its kin).
    """
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from workbench.interop.wrapped import unwrapped

    model, its_tokenizer = unwrapped(model, moved=moved, meant_to_run=meant_to_run)
    tokenizer = its_tokenizer if tokenizer is None else tokenizer
    if not isinstance(model, PreTrainedModel) and not hasattr(model, "get_base_model"):
        raise UnknownModel(
            f"A {type(model).__name__} was given where a model is wanted: a name, a folder, or a live Hugging Face model "
            "(the one inside, if it is wrapped)."
        )
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        found = "without its tokenizer" if tokenizer is None else f"with a {type(tokenizer).__name__} for a tokenizer"
        raise UnknownModel(f"A live model was given {found}. Pass tokenizer=, as AutoTokenizer.from_pretrained gives it.")
    if not hasattr(model, "get_base_model"):
        return model, tokenizer
    if getattr(model.active_peft_config, "is_prompt_learning", False):
        raise UnknownArchitecture(
            f"The adapter {model.active_adapter!r} adds virtual tokens before every text, so positions would not be those of "
            "the text. Load the base model, or an adapter of the weights (LoRA and its kin)."
        )
    return model.get_base_model(), tokenizer  # pyright: ignore[reportCallIssue]


def _from_folder(
    folder: Path,
    tokenizer: "PreTrainedTokenizerBase | None",
    dtype: torch.dtype | None,
    device_map: str | dict[str, Any] | None,
    streamed_to: str | None,
) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """
    Args:
        streamed_to: Where all but the blocks goes, whose weights stay in their files.
    """
    from transformers import CONFIG_MAPPING, AutoConfig, AutoTokenizer, __version__

    check_weights(folder)
    if (family := read_json(folder / "config.json").get("model_type")) not in CONFIG_MAPPING:
        raise UnknownArchitecture(
            f"Transformers {__version__} does not know the family {family!r} of {str(folder)!r}. Update transformers; or, if "
            "the model brings code of its own, load it yourself (trust_remote_code=True) and pass the live model."
        )
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        refuse_encoder_decoder(config)
        if streamed_to is not None:
            device_map = _blocks_in_files(config, streamed_to)
        with _loading_bar(weight_bytes(folder) > QUIET_BELOW):
            hf = _auto_class(config).from_pretrained(
                folder, dtype=dtype or "auto", device_map=device_map, use_safetensors=True, trust_remote_code=False
            )
        tokenizer = tokenizer or AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except UnknownArchitecture:
        raise
    except (OSError, ValueError, RuntimeError, KeyError, AssertionError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        if "`offload_folder`" in reason:
            raise UnknownOption(
                f"Weights of {str(folder)!r} are stored in another form than {family!r} computes with (those of most mixtures "
                "of experts are), so they cannot be read from their files as they are. Load the model whole."
            ) from None
        other = "device_map" if streamed_to is None else "device"
        raise BrokenModel(
            f"{str(folder)!r} could not be loaded: {reason} Fetch it again, mend the file named, or choose another {other}."
        ) from None
    assert tokenizer is not None
    return hf, tokenizer


def _blocks_in_files(config: Any, device: str) -> dict[str, Any]:
    """The `device_map` of a streamed model.

    Raises:
        UnknownArchitecture: for a family without a row, whose blocks are not known before it is loaded.
    """
    with torch.device("meta"):
        skeleton = _auto_class(config).from_config(config)
    row = row_of(config.get_text_config(decoder=True))
    if row is None:
        raise UnknownArchitecture(
            f"Family {config.model_type!r} has no row, so its blocks are not known before it is loaded. Load it whole, or give "
            "device_map= by the names of its modules ('disk' leaves them in their files)."
        )
    blocks, places = placed(row, skeleton).path("layers"), {}

    def place(module: torch.nn.Module, path: str) -> None:
        for name, child in module.named_children():
            own = f"{path}{name}"
            if blocks.startswith(f"{own}."):
                place(child, f"{own}.")
            else:
                places[own] = "disk" if own == blocks else device

    place(skeleton, "")
    return places


def _auto_class(config: Any) -> Any:
    """The class that loads this config with a language model's head: a vision-language model may have its own."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    if type(config) in AutoModelForCausalLM._model_mapping or type(config) not in AutoModelForImageTextToText._model_mapping:
        return AutoModelForCausalLM
    return AutoModelForImageTextToText


def _move(hf: "PreTrainedModel", device: str | torch.device) -> None:
    try:
        hf.to(device)  # pyright: ignore[reportArgumentType]
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UnknownOption(
            f"device={str(device)!r} cannot be used here: {reason} Use cpu, or a device that torch sees."
        ) from None


@contextmanager
def _loading_bar(shown: bool) -> Iterator[None]:
    """Transformers' own progress bar, only where there is something to wait for."""
    from transformers.utils import logging as hf_logging

    was = hf_logging.is_progress_bar_enabled()
    if not shown:
        hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        if was:
            hf_logging.enable_progress_bar()
