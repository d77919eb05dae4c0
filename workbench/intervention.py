"""Changing what a model computes: edits at sites, for every forward pass and for every token of a generation."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from workbench.edits.edit import Edit
from workbench.edits.passing import Pass
from workbench.errors import ReadOnlySite, UnknownOption
from workbench.model import LanguageModel
from workbench.sites import Site, parse_sites
from workbench.tracer import announced, edited


@contextmanager
def intervene(model: LanguageModel, *edits: Edit) -> Iterator[None]:
    """While open, every forward pass of the model goes on with the edited tensors: of `wb.capture`, of `model.generate`, of a
    call of `model.hf`.

    Edits at one site are made in the order given; blocks may be nested, the outer edits first. What is captured inside
    shows the edited tensors. Positions are counted over real tokens from the attention mask, once a pass, so that they
    mean the same with padding on either side and with a key-value cache. What no edit chooses stays bitwise as it was
    (at sites inside attention: as Hugging Face's eager attention has it, which rounds otherwise than the fused one).

    Raises:
        UnknownSite, LayerOutOfRange, ReadOnlySite: if a site does not exist, or cannot be written.
        UnknownOption: for a head or neuron that the site does not have; from the forward pass, for a row or position that
            the texts do not have; at the end of the block, for a position that no pass came to; from beam search (or several
            samples a text) with edits of single rows, as rows are no longer texts then.
    """
    sites = [(edit, parse_sites([edit.site], model.n_layers)) for edit in edits]
    for edit, at in sites:
        for site in at:
            _require_there(model, edit, site)
    running = _Running(model)
    by_site: dict[Site, list[_Applied]] = {}
    for edit, at in sites:
        met: set[int] = set()
        for site in at:
            by_site.setdefault(site, []).append(_Applied(edit, str(site), running, met))
    with ExitStack() as stack:
        stack.enter_context(announced(model, running.note))
        if any(edit.rows is not None for edit in edits):
            stack.enter_context(_one_row_a_text(model))
        stack.enter_context(edited(model, {site: _InTurn(several) for site, several in by_site.items()}))
        yield
    for several in by_site.values():
        for one in several:
            one.require_met()


@contextmanager
def _one_row_a_text(model: LanguageModel) -> Iterator[None]:
    """While open, the model refuses to generate with several rows a text: edits of single rows would meet others' beams.

    Raises:
        UnknownOption: from `generate`, for beams or several samples a text.
    """
    hf: Any = model.hf
    generate = hf.generate

    def refusing(*args: Any, **kwargs: Any) -> Any:
        config = kwargs.get("generation_config") or hf.generation_config
        for name in ("num_beams", "num_return_sequences"):
            several = kwargs.get(name, getattr(config, name, None)) or 1
            if several > 1:
                raise UnknownOption(
                    f"{name}={several} gives a text several rows, and an edit of single rows (rows=) cannot tell them apart. "
                    "Generate without it, or edit all rows."
                )
        return generate(*args, **kwargs)

    hf.generate = refusing
    try:
        yield
    finally:
        del hf.generate


class _Running:
    """The forward pass that is running."""

    def __init__(self, model: LanguageModel) -> None:
        self.model = model
        self.at: Pass | None = None

    def note(self, given: dict[str, Any]) -> None:
        tokens = given.get("input_ids")
        batch, n_tokens = (tokens if tokens is not None else given["inputs_embeds"]).shape[:2]
        cache, mask = given.get("past_key_values"), given.get("attention_mask")
        cached = 0 if cache is None else int(cache.get_seq_length())
        if mask is None:
            mask = torch.ones(batch, cached + n_tokens, dtype=torch.bool)
        if not isinstance(mask, Tensor) or mask.dim() != 2:
            raise UnknownOption(
                "Edits count positions from an attention mask [batch, pos], and this pass was given another kind (a static "
                "cache prepares one). Call the model with tokens and their mask, or generate with the default cache."
            )
        self.at = Pass.of(mask, n_tokens, self.at if cached else None)


class _InTurn:
    """Several edits at one site."""

    def __init__(self, several: "list[_Applied]") -> None:
        self.several = several

    def __call__(self, value: Tensor) -> Tensor:
        for one in self.several:
            value = one(value)
        return value


class _Applied:
    """An edit at one site, in the passes that are running."""

    def __init__(self, edit: Edit, site: str, running: _Running, met: set[int]) -> None:
        self.edit, self.site, self.running, self.met = edit, site, running, met
        self.reached = False

    def __call__(self, value: Tensor) -> Tensor:
        at = self.running.at
        assert at is not None, "a block was called without its model"
        self.reached = True
        self.met |= self.edit.positions_in(at)
        return self.edit.applied(value, self.site, at)

    def require_met(self) -> None:
        """
        Raises:
            UnknownOption: if passes came here, but none to a position that was asked for.
        """
        missed = sorted(set(self.edit.positions or ()) - self.met)
        if self.reached and missed:
            raise UnknownOption(
                f"{self.edit!r}: no text and no generation came to position {missed[0]}, so nothing was changed there. "
                "Positions are counted from 0 over a row's real tokens; negative ones from the prompt's end."
            )


def _require_there(model: LanguageModel, edit: Edit, site: Site) -> None:
    """
    Raises:
        UnknownSite, ReadOnlySite, UnknownOption: if the edit cannot be made at this site.
    """
    if (why := model.tap(site).passed_by) is not None:
        raise ReadOnlySite(f"Site '{site}' can be read, but not written: {why}.")
    names, sizes = zip(*model.axes(site).items(), strict=True)
    pairs = "key_pos" in names
    n_heads = next((size for name, size in zip(names, sizes, strict=True) if name in ("heads", "kv_heads")), None)
    _require_in(edit, "heads", n_heads, site)
    _require_in(edit, "neurons", sizes[-1], site)
    if edit.keys is not None and not pairs:
        raise UnknownOption(f"{edit!r}: keys= chooses the tokens looked at, at 'pattern' and 'attn_scores'. Use positions=.")


def _require_in(edit: Edit, name: str, size: int | None, site: Site) -> None:
    chosen = getattr(edit, name)
    if chosen is None:
        return
    if size is None:
        raise UnknownOption(f"{edit!r}: '{site}' has no {name} to choose from. Leave {name}= out.")
    for index in chosen:
        if not -size <= index < size:
            raise UnknownOption(f"{edit!r}: {name[:-1]} {index} does not exist at '{site}'; it has {size}, counted from 0.")
