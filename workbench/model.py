"""A language model as the workbench sees it: Hugging Face's model and tokenizer, and the row that says where things are."""

import hashlib
import inspect
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from operator import index
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, SupportsIndex

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from workbench.architectures.cuts import ByHeadWritten, Heads
from workbench.architectures.families import heads_of
from workbench.architectures.row import Architecture, Block
from workbench.architectures.taps import Tap, tap
from workbench.architectures.weights import (
    Expert,
    d_in,
    entries,
    linear_weight,
    n_experts,
    norm_gain,
    parameter,
    routed_expert,
    shared_expert,
    unmerged_adapters,
)
from workbench.errors import LayerOutOfRange, MissingWeight, TextTooLong, UnknownOption, WorkbenchError, require_one_of
from workbench.projection import no_such_id
from workbench.sites import SITES, Site
from workbench.tokens import token_id, token_strings
from workbench.vocabulary import Vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from workbench.verification import Verification

WEIGHTS = (
    "W_E", "W_U", "b_U", "ln_final.w",
    "ln1.w", "W_Q", "W_K", "W_V", "W_O", "b_Q", "b_K", "b_V", "b_O",
    "ln2.w", "W_in", "W_gate", "W_out", "b_in", "b_gate", "b_out", "W_router", "b_router",
)  # fmt: skip
"""Names that `LanguageModel.weight` knows; those of the first line take no layer."""


WHOLE_WEIGHTS = WEIGHTS[:4]
EXPERT_WEIGHTS = ("W_in", "W_gate", "W_out", "b_in", "b_gate", "b_out")


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
        return len(self._blocks)

    @cached_property
    def d_model(self) -> int:
        return self._config.hidden_size

    @cached_property
    def d_mlp(self) -> int:
        """Neurons of a block's MLP; of one expert, where every block is a mixture of experts."""
        for layer in range(self.n_layers):
            if (down := self.row.block(layer).down) is not None:
                return d_in(self.block(layer).get_submodule(down.path))
        return self.weight("W_out", 0, expert=0).shape[0]

    @cached_property
    def d_vocab(self) -> int:
        """Rows of the unembedding matrix; it may be padded beyond the tokenizer."""
        head = self.module(self.row.head)
        return int(getattr(head, "out_features", 0)) or self.weight("W_U").shape[1]

    @property
    def n_context(self) -> int | None:
        """Tokens of the longest text that the model was made for, as its config says; None where it says nothing (BLOOM)."""
        return getattr(self._config, "max_position_embeddings", None)

    @cached_property
    def n_experts(self) -> int:
        """Routed experts of a block that has any; 0 if none has."""
        return max(self._n_experts(layer) for layer in range(self.n_layers))

    @cached_property
    def heads(self) -> Heads:
        return self.row.heads or heads_of(self._config, self.d_model)

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
        """Where inputs go: of a model that is spread over several devices, the first one that computes."""
        spread = getattr(self.hf, "hf_device_map", None)
        if spread is None:
            # Weights that are not loaded (nnsight's, for a model that runs elsewhere) are on no device that takes tokens.
            return torch.device("cpu") if self.hf.device.type == "meta" else self.hf.device
        return torch.device(next((place for place in spread.values() if place not in ("cpu", "disk")), "cpu"))

    @property
    def adapters(self) -> list[str]:
        """Adapters of the peft library that are active and not merged into the weights."""
        return sorted({name for module in self.hf.modules() for name in unmerged_adapters(module)})

    @cached_property
    def is_tied(self) -> bool:
        """Whether `W_U` is the embedding matrix itself."""
        return self.weight("W_E").data_ptr() == self.weight("W_U").data_ptr()

    @cached_property
    def token_strings(self) -> list[str]:
        """The printable string of every token id."""
        return token_strings(self.tokenizer, self.d_vocab)

    def token_id(self, token: str | int) -> int:
        """The id of a token, named by its string (of which a leading space is a part) or by the id itself.

        Raises:
            UnknownToken: if it is no single token of the vocabulary.
        """
        if isinstance(token, str):
            return token_id(self.tokenizer, self.token_strings, token)
        if not 0 <= token < self.d_vocab:
            raise no_such_id(token, self.d_vocab)
        return token

    @property
    def vocabulary(self) -> Vocabulary:
        """The way from the residual stream to logits."""
        gain, bias = self.optional_weight("ln_final.w"), self.optional_weight("b_U")
        return Vocabulary(
            W_U=self.weight("W_U").detach(),
            b_U=None if bias is None else bias.detach(),
            gain=None if gain is None else gain.detach(),
            ln_final=self.module(self.row.path("ln_final")).forward,  # not the module: its hooks may edit
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
        if not isinstance(layer, SupportsIndex) or not -self.n_layers <= index(layer) < self.n_layers:
            raise LayerOutOfRange(f"Layer {layer!r} is not in {self.name!r}; layers go from 0 to {self.n_layers - 1}.")
        return self._blocks[index(layer)]

    def block_row(self, layer: int) -> Block:
        """Where that block keeps its parts; negative layers count from the end.

        Raises:
            LayerOutOfRange: if the model has no such layer.
        """
        self.block(layer)
        return self.row.block(layer % self.n_layers)

    def tap(self, site: Site) -> Tap:
        """Where a site is read from the modules.

        Raises:
            UnknownSite: if this layer does not have it.
            UnreadableWeight: if it is `result`, and `W_O` cannot be read.
        """
        found = tap(self.row, site, self.heads)
        return found if site.name != "result" else replace(found, cut=ByHeadWritten(self.weight("W_O", site.layer).detach()))

    def axes(self, site: Site) -> dict[str, int | None]:
        """The axes of the site's tensor by name, with their size; None for those of the batch.

        Raises:
            UnknownSite: if this layer does not have it.
        """
        self.tap(site)
        sizes = {
            "d_model": self.d_model, "heads": self.heads.n_heads, "kv_heads": self.heads.n_key_value_heads,
            "d_head": self.heads.d_head, "d_value": self.heads.d_value,
        }  # fmt: skip
        if site.layer is not None and (down := self.block_row(site.layer).down) is not None:
            sizes["d_mlp"] = d_in(self.block(site.layer).get_submodule(down.path))
        if site.name == "router_logits":
            assert site.layer is not None
            sizes["n_experts"] = self._n_experts(site.layer)
        return {axis: sizes.get(axis) for axis in SITES[site.name].shape.split(", ")}

    def weight(self, name: str, layer: int | None = None, *, expert: int | Literal["shared"] | None = None) -> Tensor:
        """A weight by its TransformerLens name, read left to right (`x @ W`), a view of Hugging Face's own tensor.

        Shapes: `W_E [d_vocab, d_model]`, `W_U [d_model, d_vocab]`, `W_Q W_K W_V [heads, d_model, d_head]`,
        `W_O [heads, d_head, d_model]`, `W_in W_gate [d_model, d_mlp]`, `W_out [d_mlp, d_model]`, biases like the outputs.
        `ln1.w`, `ln2.w` (the norm that feeds the MLP) and `ln_final.w` are effective gains `[d_model]`: `1 + weight` in Gemma.
        In a mixture of experts `W_router [d_model, n_experts]`, and `W_in W_gate W_out` of one `expert`, or the `shared` one.
        (Queries of several key groups in one matrix, and offloaded weights, are copies.)

        Raises:
            MissingWeight: if the family or this model has no such weight.
            UnreadableWeight: if it is quantised, not loaded, or stands under an adapter that is not merged.
            LayerOutOfRange: if the layer is not in the model.
        """
        if name not in WEIGHTS:
            raise MissingWeight(f"No weight is called {name!r}. Weights are {', '.join(WEIGHTS)}.")
        found = self.optional_weight(name, layer, expert=expert)
        if found is None:
            where = self.name if layer is None else f"layer {layer} of {self.name}"
            raise MissingWeight(f"{where} ({self.row.model_type}) has no {name}.{self._instead(name, layer)}")
        return found

    def tokenize(
        self, texts: str | Sequence[str], *, padding_side: str = "right", bos: bool | None = None, chat: bool = False
    ) -> Batch:
        """Token ids of texts, padded to one length.

        Args:
            bos: Whether a text begins with the token of beginnings: exactly one, or none; as the tokenizer has it, if None.
            chat: Each text is a user's message, put into the tokenizer's chat template, to the point where the model answers.
        Raises:
            WorkbenchError: if there is no text, or one gives no token.
            TextTooLong: if one has more tokens than the model's context.
            UnknownOption: if the tokenizer has no such token, or no chat template.
        """
        require_one_of("padding_side", padding_side, ("left", "right"))
        texts = [texts] if isinstance(texts, str) else list(texts)
        rows = self.token_ids(texts, bos=bos, chat=chat)
        for i, row in enumerate(rows):
            if not row:
                raise WorkbenchError(f"Text {i} is empty: it gives no token. Give it at least one word.")
            self._require_room(f"Text {i}", len(row))
        if not rows:
            raise WorkbenchError("No text was given. Give at least one.")
        length = max(map(len, rows))
        tokens = torch.zeros(len(rows), length, dtype=torch.long)
        mask = torch.zeros(len(rows), length, dtype=torch.bool)
        for i, row in enumerate(rows):
            real = slice(length - len(row), None) if padding_side == "left" else slice(len(row))
            tokens[i, real], mask[i, real] = torch.tensor(row), True
        return Batch(tokens.to(self.device), mask.to(self.device))

    def token_ids(self, texts: Sequence[str], *, bos: bool | None = None, chat: bool = False) -> list[list[int]]:
        """Token ids of each text as they are: of any length, not padded; none for an empty text, unless bos is True.

        Raises:
            UnknownOption: as `tokenize`.
        """
        if chat:
            if not self.tokenizer.chat_template:
                raise UnknownOption(f"The tokenizer of {self.name!r} has no chat template. Leave chat out, or write the turns.")
            turns = [[{"role": "user", "content": text}] for text in texts]
            texts = [
                str(self.tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)) for turn in turns
            ]
        if not texts:
            return []
        # A template brings its own special tokens. verbose=False: lengths are looked at here, and refused by name.
        rows: Any = self.tokenizer(list(texts), add_special_tokens=not chat, verbose=False)["input_ids"]
        if bos is None:
            return rows
        first = self.bos_id
        kept = [row[next((i for i, token in enumerate(row) if token != first), len(row)) :] for row in rows]
        return [[first, *row] for row in kept] if bos else kept

    @property
    def bos_id(self) -> int:
        """The id of the token of beginnings.

        Raises:
            UnknownOption: if the tokenizer has none.
        """
        first: Any = self.tokenizer.bos_token_id
        if first is None:
            raise UnknownOption(f"The tokenizer of {self.name!r} has no token of beginnings. Leave bos out.")
        return first

    def _require_room(self, what: str, length: int) -> None:
        """
        Raises:
            TextTooLong: if it has more tokens than the model's context.
        """
        if self.n_context is not None and length > self.n_context:
            raise TextTooLong(
                f"{what} has {length} tokens, and the context of {self.name!r} is {self.n_context}. Nothing is cut in silence: "
                "shorten it, or split it into several texts."
            )

    def forward(self, batch: Batch, columns: Int[Tensor, " kept"] | None = None) -> Float[Tensor, "batch kept d_vocab"]:
        """The model's own logits. Positions are counted over real tokens, so padding on either side changes nothing.

        Args:
            columns: Of the batch, in which logits are wanted; all, if None.
        Raises:
            TextTooLong: if the batch is wider than the model's context.
        """
        inputs = self.inputs(batch)
        if columns is None:
            return self.hf(**inputs).logits
        spread = getattr(self.hf, "hf_device_map", None) is not None  # accelerate would take columns to where inputs go
        if spread or "logits_to_keep" not in inspect.signature(self.hf.forward).parameters:
            return self.hf(**inputs).logits[:, columns.cpu()]
        return self.hf(**inputs, logits_to_keep=columns).logits

    def inputs(self, batch: Batch) -> dict[str, Any]:
        """What the Hugging Face model is given for a batch, by name.

        Raises:
            TextTooLong: if the batch is wider than the model's context.
        """
        self._require_room("The batch", batch.tokens.shape[1])
        inputs: dict[str, Any] = {"input_ids": batch.tokens, "attention_mask": batch.mask.long(), "use_cache": False}
        if "position_ids" in inspect.signature(self.hf.forward).parameters:
            inputs["position_ids"] = (batch.mask.long().cumsum(1) - 1).clamp_min(0)
        return inputs

    def generate(self, prompts: str | Sequence[str], **options: Any) -> str | list[str]:
        """Continue prompts: see `workbench.generation.generate` for the options (max_new_tokens, temperature, chat, …)."""
        from workbench.generation import generate

        return generate(self, prompts, **options)

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
            "attention": self._config._attn_implementation,
        } | ({"adapters": found} if (found := self.adapters) else {})

    @property
    def weights_hash(self) -> str:
        """SHA-256 over the name, dtype, shape and 1,024 scattered entries of every parameter.

        A fingerprint, not a proof: it reads a few megabytes of a model of any size, and any training changes it. Weights that
        are nowhere to be read (of a model that runs elsewhere) are in it by name and shape alone.
        """
        digest = hashlib.sha256()
        for name, tensor in sorted(self.hf.named_parameters()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            # Scattered by a multiplicative hash: an even stride would keep to a few columns of a matrix.
            chosen = (torch.arange(min(1024, tensor.numel())) * 2_654_435_761) % max(tensor.numel(), 1)
            path, _, own = name.rpartition(".")
            if (sample := entries(self.module(path), own, chosen)) is not None:
                digest.update(sample.contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def optional_weight(
        self, name: str, layer: int | None = None, *, expert: int | Literal["shared"] | None = None
    ) -> Tensor | None:
        """As `weight`, but None where this model has none of that name: most biases."""
        row = self.row
        if expert is not None and name not in EXPERT_WEIGHTS:
            raise MissingWeight(f"{name!r} is no weight of an expert. Experts have {', '.join(EXPERT_WEIGHTS)}.")
        if layer is not None and name in WHOLE_WEIGHTS:
            raise LayerOutOfRange(f"Weight {name!r} belongs to the whole model. Ask for weight({name!r}).")
        if name == "W_E":
            return parameter(self.module(row.path("embed")), "weight")
        if name in ("W_U", "b_U"):
            return _read(self.module(row.head), name)
        if name == "ln_final.w":
            return norm_gain(self.module(row.path("ln_final")), row)
        if layer is None:
            raise LayerOutOfRange(f"Weight {name!r} belongs to a layer. Ask for weight({name!r}, layer).")
        module, block = self.block(layer), self.block_row(layer)
        if expert is not None:
            return getattr(self.expert(layer, expert), name, None)
        if name in ("ln1.w", "ln2.w"):
            path = block.ln1 if name == "ln1.w" else block.ln2
            return None if path is None else norm_gain(module.get_submodule(path), row)
        if name in ("W_router", "b_router"):
            return None if block.experts is None else _read(module.get_submodule(block.experts.router), name)
        part = {
            "Q": block.q, "K": block.k, "V": block.v, "O": block.o, "in": block.up, "gate": block.gate, "out": block.down,
        }[name[2:]]  # fmt: skip
        if part is None or not part.reads_stream:
            return None
        found = _read(module.get_submodule(part.path), name)
        if found is None:
            return None
        if name == "W_O":
            return found.unflatten(0, (self.n_heads, self.heads.d_value))
        found = part.cut.take(found, self.heads)
        return found.movedim(-2, 0) if name in ("W_Q", "W_K", "W_V") else found

    def expert(self, layer: int, expert: int | Literal["shared"]) -> Expert:
        """All matrices and biases of one expert of a layer.

        Raises:
            MissingWeight: if the layer has no experts, or not this one.
            UnreadableWeight: as `weight`.
        """
        experts, module = self.block_row(layer).experts, self.block(layer)
        if experts is None:
            raise MissingWeight(f"Layer {layer} of {self.name} has no experts: ask for its weights without expert=.")
        if expert == "shared":
            if experts.shared is None:
                raise MissingWeight(f"Layer {layer} of {self.name} has no shared expert, only {self._n_experts(layer)} routed.")
            return shared_expert(module, experts)
        if not isinstance(expert, int) or isinstance(expert, bool) or not 0 <= expert < self._n_experts(layer):
            shared = "" if experts.shared is None else ", or 'shared'"
            raise MissingWeight(
                f"Layer {layer} of {self.name} has no expert {expert!r}: they go from 0 to "
                f"{self._n_experts(layer) - 1}{shared}."
            )
        return routed_expert(module.get_submodule(experts.path), experts, expert)

    def _n_experts(self, layer: int) -> int:
        experts = self.block_row(layer).experts
        return 0 if experts is None else n_experts(self.block(layer), experts)

    def _instead(self, name: str, layer: int | None) -> str:
        """What to ask for where a weight does not exist."""
        block = None if layer is None else self.block_row(layer)
        if block is not None and name in EXPERT_WEIGHTS and block.up is None:
            return (
                f" It is a mixture of {self._n_experts(layer or 0)} experts: ask for one of them, "
                f"weight({name!r}, {layer}, expert=0)."
            )
        if block is not None and name in ("W_Q", "W_K", "W_V", "W_O"):
            if block.attn is None:
                return " This layer has no attention."
            return " Multi-head latent attention goes through a compressed stream: no one matrix maps the stream to heads."
        if name.endswith("_gate"):
            return " Its MLP is not gated: W_in is the matrix before the nonlinearity, W_out the one after it."
        if name.startswith("ln"):
            return " No norm with a gain stands there."
        return " No bias is added there." if name.startswith("b_") else ""

    @property
    def _config(self) -> Any:
        return self.hf.config.get_text_config(decoder=True)

    @property
    def _blocks(self) -> nn.ModuleList:
        found = self.module(self.row.path("layers"))
        assert isinstance(found, nn.ModuleList)
        return found


def _read(module: nn.Module, name: str) -> Tensor | None:
    """A linear module's bias or weight, as the name's first letter says."""
    return parameter(module, "bias") if name.startswith("b_") else linear_weight(module)
