"""A language model as the workbench sees it: Hugging Face's model and tokenizer, and the row that says where things are."""

import hashlib
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from workbench.architectures import Architecture, Heads, Tap, linear_weight, norm_gain, tap
from workbench.errors import LayerOutOfRange, MissingWeight, WorkbenchError, require_one_of
from workbench.sites import Site
from workbench.tokens import token_strings
from workbench.vocabulary import Vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from workbench.verification import Verification

WEIGHTS = (
    "W_E", "W_U", "b_U", "ln_final.w",
    "ln1.w", "W_Q", "W_K", "W_V", "W_O", "b_Q", "b_K", "b_V", "b_O",
    "ln2.w", "W_in", "W_gate", "W_out", "b_in", "b_gate", "b_out",
)  # fmt: skip
"""Names that `LanguageModel.weight` knows; those of the first line take no layer."""


class Batch(NamedTuple):
    """Token ids and which of them are real."""

    tokens: Int[Tensor, "batch pos"]
    mask: Bool[Tensor, "batch pos"]


@dataclass(frozen=True, eq=False)
class LanguageModel:
    """A causal language model with named weights and sites. Weights are Hugging Face's own: nothing is folded or centred."""

    hf: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase"
    row: Architecture
    name: str
    revision: str
    """Commit of a hub model, hash of the embedded one, `local` for a folder or a live model."""
    source: Path | None = None
    """The folder it was read from, if any."""

    def __repr__(self) -> str:
        return (
            f"LanguageModel({self.name!r}, {self.row.model_type}, {self.n_layers} layers, d_model {self.d_model}, "
            f"d_mlp {self.d_mlp}, {self.n_heads} heads, vocabulary {self.d_vocab}, "
            f"{str(self.dtype).removeprefix('torch.')} on {self.device})"
        )

    @cached_property
    def n_layers(self) -> int:
        return len(self._sequence(self.row.layers))

    @cached_property
    def d_model(self) -> int:
        return self.weight("W_U").shape[0]

    @cached_property
    def d_mlp(self) -> int:
        return self.weight("W_out", 0).shape[0]

    @cached_property
    def d_vocab(self) -> int:
        """Rows of the unembedding matrix; it may be padded beyond the tokenizer."""
        return self.weight("W_U").shape[1]

    @cached_property
    def heads(self) -> Heads:
        config: Any = self.hf.config.get_text_config(decoder=True)
        n_heads = config.num_attention_heads
        d_head = getattr(config, "head_dim", None) or self.d_model // n_heads
        return Heads(n_heads, getattr(config, "num_key_value_heads", None) or n_heads, d_head)

    @property
    def n_heads(self) -> int:
        return self.heads.n_heads

    @property
    def d_head(self) -> int:
        return self.heads.d_head

    @property
    def dtype(self) -> torch.dtype:
        return self.hf.dtype

    @property
    def device(self) -> torch.device:
        return self.hf.device

    @cached_property
    def is_tied(self) -> bool:
        """Whether `W_U` is the embedding matrix itself."""
        return self.weight("W_E").data_ptr() == self.weight("W_U").data_ptr()

    @cached_property
    def token_strings(self) -> list[str]:
        """The printable string of every token id."""
        return token_strings(self.tokenizer, self.d_vocab)

    @property
    def vocabulary(self) -> Vocabulary:
        """The way from the residual stream to logits."""
        gain = self.weight("ln_final.w")
        return Vocabulary(
            W_U=self.weight("W_U").detach(),
            b_U=None if (bias := self.optional_weight("b_U")) is None else bias.detach(),
            gain=gain.detach(),
            ln_final=self.module(self.row.ln_final),
            logit_scale=self.row.logit_scale,
            softcap=self.row.softcap,
        )

    def module(self, path: str) -> nn.Module:
        """A submodule of the Hugging Face model by its path."""
        return self.hf.get_submodule(path)

    def block(self, layer: int) -> nn.Module:
        """A transformer block.

        Raises:
            LayerOutOfRange: if the model has no such layer.
        """
        if not -self.n_layers <= layer < self.n_layers:
            raise LayerOutOfRange(f"Layer {layer} is not in {self.name!r}; layers go from 0 to {self.n_layers - 1}.")
        return self._sequence(self.row.layers)[layer]

    def tap(self, site: Site) -> Tap:
        """Where a site is read from the modules."""
        return tap(self.row, site, self.heads)

    def weight(self, name: str, layer: int | None = None) -> Tensor:
        """A weight by its TransformerLens name, read left to right (`x @ W`), a view of Hugging Face's own tensor.

        Shapes: `W_E [d_vocab, d_model]`, `W_U [d_model, d_vocab]`, `W_Q W_K W_V [heads, d_model, d_head]`,
        `W_O [heads, d_head, d_model]`, `W_in W_gate [d_model, d_mlp]`, `W_out [d_mlp, d_model]`, biases like the outputs.
        `ln1.w`, `ln2.w` (the norm that feeds the MLP) and `ln_final.w` are effective gains `[d_model]`: `1 + weight` in Gemma.

        Raises:
            MissingWeight: if the family or this model has no such weight, or it cannot be read.
            LayerOutOfRange: if the layer is not in the model.
        """
        if name not in WEIGHTS:
            raise MissingWeight(f"No weight is called {name!r}. Weights are {', '.join(WEIGHTS)}.")
        found = self.optional_weight(name, layer)
        if found is None:
            where = self.name if layer is None else f"layer {layer} of {self.name}"
            raise MissingWeight(f"{where} ({self.row.model_type}) has no {name}.{self._instead(name)}")
        return found

    def tokenize(self, texts: str | Sequence[str], *, padding_side: str = "right") -> Batch:
        """Token ids of texts, padded to one length; special tokens as the tokenizer adds them.

        Raises:
            WorkbenchError: if there is no text, or one gives no token.
        """
        require_one_of("padding_side", padding_side, ("left", "right"))
        texts = [texts] if isinstance(texts, str) else list(texts)
        rows = [self.tokenizer(text)["input_ids"] for text in texts]
        for i, row in enumerate(rows):
            if not row:
                raise WorkbenchError(f"Text {i} is empty: it gives no token. Give it at least one word.")
        if not rows:
            raise WorkbenchError("No text was given. Give at least one.")
        length = max(map(len, rows))
        tokens = torch.zeros(len(rows), length, dtype=torch.long)
        mask = torch.zeros(len(rows), length, dtype=torch.bool)
        for i, row in enumerate(rows):
            real = slice(length - len(row), None) if padding_side == "left" else slice(len(row))
            tokens[i, real], mask[i, real] = torch.tensor(row), True
        return Batch(tokens.to(self.device), mask.to(self.device))

    def forward(self, batch: Batch) -> Float[Tensor, "batch pos d_vocab"]:
        """The model's own logits. Positions are counted over real tokens, so padding on either side changes nothing."""
        inputs: dict[str, Any] = {"input_ids": batch.tokens, "attention_mask": batch.mask.long(), "use_cache": False}
        if "position_ids" in inspect.signature(self.hf.forward).parameters:
            inputs["position_ids"] = (batch.mask.long().cumsum(1) - 1).clamp_min(0)
        return self.hf(**inputs).logits

    def verify(self) -> "Verification":
        """Check every identity that the names promise: see `workbench.verification`."""
        from workbench.verification import verify

        return verify(self)

    @property
    def provenance(self) -> dict[str, Any]:
        """What a result must say of the model it was made with."""
        return {
            "model": self.name,
            "revision": self.revision,
            "weights_hash": self.weights_hash,
            "family": self.row.model_type,
            "dtype": str(self.dtype).removeprefix("torch."),
            "device": self.device.type,
        }

    @property
    def weights_hash(self) -> str:
        """SHA-256 over the name, dtype, shape and 1,024 scattered entries of every parameter.

        A fingerprint, not a proof: it reads a few megabytes of a model of any size, and any training changes it.
        """
        digest = hashlib.sha256()
        for name, parameter in sorted(self.hf.named_parameters()):
            digest.update(f"{name} {parameter.dtype} {tuple(parameter.shape)}".encode())
            if not parameter.is_meta:
                flat = parameter.detach().flatten()
                # Scattered by a multiplicative hash: an even stride would keep to a few columns of a matrix.
                chosen = (torch.arange(min(1024, flat.numel())) * 2_654_435_761) % flat.numel()
                sample = flat[chosen.to(flat.device)].cpu()
                digest.update(sample.contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def optional_weight(self, name: str, layer: int | None = None) -> Tensor | None:
        """As `weight`, but None where this model has none of that name: most biases."""
        row = self.row
        if name == "W_E":
            return self.module(row.embed).get_parameter("weight")
        if name in ("W_U", "b_U"):
            return _read(self.module(row.head), name)
        if name == "ln_final.w":
            return norm_gain(self.module(row.ln_final), row)
        if layer is None:
            raise LayerOutOfRange(f"Weight {name!r} belongs to a layer. Ask for weight({name!r}, layer).")
        block = self.block(layer)
        if name in ("ln1.w", "ln2.w"):
            path = row.ln1 if name == "ln1.w" else row.ln2
            return None if path is None else norm_gain(block.get_submodule(path), row)
        part = {
            "Q": row.q, "K": row.k, "V": row.v, "O": row.o, "in": row.up, "gate": row.gate, "out": row.down,
        }[name[2:]]  # fmt: skip
        if part is None:
            return None
        found = _read(block.get_submodule(part.path), name)
        if found is None:
            return None
        if name == "W_O":
            return found.unflatten(0, (self.n_heads, self.d_head))
        if part.take is not None:
            found = part.take(found, self.heads)
        return found.movedim(-2, 0) if name in ("W_Q", "W_K", "W_V") else found

    def _instead(self, name: str) -> str:
        if name.endswith("_gate"):
            return " Its MLP is not gated: W_in is the matrix before the nonlinearity, W_out the one after it."
        return " No bias is added there." if name.startswith("b_") else ""

    def _sequence(self, path: str) -> nn.ModuleList:
        found = self.module(path)
        assert isinstance(found, nn.ModuleList)
        return found


def _read(module: nn.Module, name: str) -> Tensor | None:
    """A linear module's bias or weight, as the name's first letter says."""
    return getattr(module, "bias", None) if name.startswith("b_") else linear_weight(module)
