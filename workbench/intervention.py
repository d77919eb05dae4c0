"""Changing what a model computes: edits at sites, for every forward pass and for every token of a generation."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from workbench.edits.edit import Edit
from workbench.edits.passing import Pass
from workbench.errors import ReadOnlySite, UnknownOption
from workbench.model import LanguageModel
from workbench.sites import Site, parse_sites
from workbench.tracer import announced, edited, replaced


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
            samples a text) with edits that tell rows apart, as rows are no longer texts then; from a part of the model that is
            called alone.
    """
    for edit in edits:
        if not isinstance(edit, Edit):
            raise UnknownOption(
                f"A {type(edit).__name__} is no edit. Pass edits one after the other: intervene(model, *edits)."
            )
    running = _Running(rows_are_texts=any(edit.tells_rows_apart for edit in edits))
    made = [_Made(edit, running) for edit in edits]
    by_site: dict[Site, list[_Made]] = {}
    for one in made:
        for site in parse_sites([one.edit.site], model.n_layers):
            _require_there(model, one.edit, site)
            by_site.setdefault(site, []).append(one)
    with ExitStack() as stack:
        stack.enter_context(announced(model, running.begin, running.end))
        stack.enter_context(_generating(model, running))
        stack.enter_context(edited(model, {site: _InTurn(str(site), several) for site, several in by_site.items()}))
        yield
    for one in made:
        one.require_met()


class _Running:
    """The forward pass that is running, if one is."""

    def __init__(self, *, rows_are_texts: bool) -> None:
        self.rows_are_texts = rows_are_texts
        self.at: Pass | None = None
        self.prompt: Tensor | None = None
        """Lengths of the prompts, while the model generates."""
        self._prompts: WeakKeyDictionary[Any, Tensor] = WeakKeyDictionary()
        """The same by cache, for passes that a caller makes one after the other."""

    def begin(self, given: dict[str, Any]) -> None:
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
        if mask.shape[1] < cached + n_tokens:
            raise UnknownOption(
                f"The attention mask has {mask.shape[1]} columns for {cached} cached tokens and {n_tokens} new ones. Give it "
                "one for each."
            )
        known = self.prompt
        if known is None and cached:
            known = self._prompts.get(cache)
        elif known is not None and len(known) != batch:
            known = known.repeat_interleave(batch // len(known))  # beams, or several samples of a text
        self.at = Pass.of(mask, n_tokens, known)
        if cache is not None and not cached:
            self._prompts[cache] = self.at.lengths

    def end(self) -> None:
        self.at = None


@contextmanager
def _generating(model: LanguageModel, running: _Running) -> Iterator[None]:
    """While open, a call of the model's `generate` says what its prompt is: passes alone do not (it may come in chunks, or in
    part from an earlier cache, and without a cache every pass holds all tokens).

    Raises:
        UnknownOption: from `generate`, for beams or several samples a text with edits that tell rows apart.
    """
    hf: Any = model.hf
    generate = hf.generate

    def told(inputs: Tensor | None = None, generation_config: Any = None, *args: Any, **kwargs: Any) -> Any:
        for name in ("num_beams", "num_return_sequences"):
            places = (kwargs, vars(generation_config) if generation_config else {}, vars(hf.generation_config))
            several = next((found for place in places if (found := place.get(name)) is not None), 1)
            if several > 1 and running.rows_are_texts:
                raise UnknownOption(
                    f"{name}={several} gives a text several rows, and an edit that tells rows apart (rows=, resample, a patch "
                    "of several texts) cannot know which is which. Generate without it, or edit all rows alike."
                )
        tokens, mask = inputs if inputs is not None else kwargs.get("input_ids"), kwargs.get("attention_mask")
        if mask is not None:
            running.prompt = mask.long().sum(1).cpu()
        elif tokens is not None:
            running.prompt = torch.full(tokens.shape[:1], tokens.shape[1])
        try:
            return generate(inputs, generation_config, *args, **kwargs)
        finally:
            running.prompt = None

    with replaced(hf, "generate", told):
        yield


class _Made:
    """An edit, and how far it came."""

    def __init__(self, edit: Edit, running: _Running) -> None:
        self.edit, self.running = edit, running
        self.met: set[tuple[str, int]] = set()
        self.seen: Pass | None = None

    def at(self, value: Tensor, site: str) -> Tensor:
        """The site's tensor after the edit."""
        at = self.running.at
        if at is None:
            raise UnknownOption(
                f"{self.edit!r}: a part of the model was called alone, so there are no positions to count. Call the whole "
                "model: model.forward, model.generate or model.hf."
            )
        if at is not self.seen:  # once a pass, not at every site
            self.seen, self.met = at, self.met | self.edit.met(at)
        return self.edit.applied(value, site, at)

    def require_met(self) -> None:
        """
        Raises:
            UnknownOption: if passes came here, but none to a position or key that was asked for.
        """
        asked = {(name, one) for name in ("positions", "keys") for one in getattr(self.edit, name) or ()}
        if self.seen is not None and (missed := sorted(asked - self.met)):
            name, one = missed[0]
            when = "" if self.edit.when == "all" else f" (when={self.edit.when!r})"
            raise UnknownOption(
                f"{self.edit!r}: no chosen token came to {name[:-1]} {one}{when}, so nothing was changed there. Positions are "
                "counted from 0 over a row's real tokens; negative ones from the prompt's end."
            )


class _InTurn(NamedTuple):
    """Several edits at one site."""

    site: str
    several: list[_Made]

    def __call__(self, value: Tensor) -> Tensor:
        for one in self.several:
            value = one.at(value, self.site)
        return value


def _require_there(model: LanguageModel, edit: Edit, site: Site) -> None:
    """
    Raises:
        UnknownSite, ReadOnlySite, UnknownOption: if the edit cannot be made at this site.
    """
    edit.require_for(str(site))
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
