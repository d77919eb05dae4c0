"""What the worker is asked: one function a card, from plain values to `plain.answer`. The model stays in memory between them;
another one takes its place.

Each function calls what `lines` writes down for the user: the same names with the same options.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from app.homes import HOMES
from app.memory import require_room
from app.places import written
from app.plain import answer, columns
from workbench.artifacts import read_json
from workbench.errors import BadArtifact, TextTooLong
from workbench.model import LanguageModel

if TYPE_CHECKING:
    from workbench.analyses.lens import LensView

LAB_TOKENS = 512
"""Longest prompt on screen: the command line takes as many as the model does."""

TASKS: dict[str, Callable[..., dict[str, Any]]] = {}
_MODEL: dict[str, Any] = {"spec": None, "model": None, "about": None}


def task(function: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """One that needs no model, known to the worker by its name."""
    TASKS[function.__name__] = function
    return function


def of_model(function: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """A task whose argument `model` says which: name, revision, dtype, device."""

    def run(model: dict[str, Any], **options: Any) -> dict[str, Any]:
        return function(_model(**model), **options)

    TASKS[function.__name__] = run
    return run


def held() -> dict[str, Any] | None:
    """The model in memory, in words."""
    return _MODEL["about"]


def _model(
    name: str, revision: str | None = None, dtype: str | None = None, device: str | None = None, check: bool = True
) -> LanguageModel:
    spec = (name, revision, dtype, device, check)
    if _MODEL["spec"] != spec:
        import torch

        import workbench as wb

        freed = (_MODEL["about"] or {}).get("bytes", 0)
        require_room(name, revision, dtype, device, freed)
        _MODEL.update(spec=None, model=None, about=None)
        _viewed.cache_clear()
        gc.collect()
        kind = None if dtype is None else getattr(torch, dtype)
        loaded = wb.load(name, revision=revision, dtype=kind, device=device, check=check)
        size = sum(one.numel() * one.element_size() for one in loaded.hf.parameters())
        shape = {one: getattr(loaded, one) for one in ("n_layers", "d_model", "d_mlp", "n_heads", "d_vocab")}
        _MODEL.update(spec=spec, model=loaded, about=loaded.provenance | shape | {"bytes": size, "asked": name})
    return _MODEL["model"]


def _view(model: LanguageModel, prompt: str, lens: str, k: int, target: str | None) -> LensView:
    return _viewed(model, prompt, lens, k, target, written(lens))


@lru_cache(maxsize=8)
def _viewed(model: LanguageModel, prompt: str, lens: str, k: int, target: str | None, fitted: int | None) -> LensView:
    """The last ones are kept: several cards are made of one."""
    from workbench.analyses.lens import lens as run

    _short(model, prompt)
    return run(model, prompt, _lens(model, lens), k=k, target=_token(target))


def _short(model: LanguageModel, prompt: str) -> int:
    """How many tokens a prompt has.

    Raises:
        TextTooLong: if they are more than a screen shows.
    """
    n = int(model.tokenize(prompt).mask.sum())
    if n > LAB_TOKENS:
        raise TextTooLong(
            f"The prompt has {n:,} tokens, and a screen shows {LAB_TOKENS} at most. Shorten it; workbench lens --prompt "
            "takes as many as the model does."
        )
    return n


def _tokens(model: LanguageModel, prompt: str) -> list[dict[str, Any]]:
    ids = model.tokenize(prompt).tokens[0].tolist()
    special = set(model.tokenizer.all_special_ids)
    return [{"id": one, "token": model.token_strings[one], "special": one in special} for one in ids]


# ---- the model


@of_model
def load(model: LanguageModel) -> dict[str, Any]:
    """The model's own, as the sidebar shows it, and its catalogue of sites."""
    from workbench.catalogue import site_table

    return {"settings": model.provenance, "tables": {"table": columns(site_table(model))}, "figures": {}, "about": held()}


@of_model
def verify(model: LanguageModel) -> dict[str, Any]:
    """Every identity that the names of sites promise, the worst layer of each."""
    found = model.verify()
    return answer(found, {"table": found.worst()}, headline=found.headline(), passed=found.passed)


# ---- one prompt


@of_model
def lens(model: LanguageModel, prompt: str, lens: str = "logit", k: int = 5, target: str | None = None) -> dict[str, Any]:
    """`lens` is a kind that is shipped for the model, or the folder of a fitted one."""
    view = _view(model, prompt, lens, k, target)
    tables = {"table": view.table, "positions": view.positions, "by_layer": view.by_layer()}
    tokens = _tokens(model, prompt)
    return answer(view, tables, {"heatmap": view.plot(stride=1)}, len(tokens), tokens=tokens)


@of_model
def lens_lines(model: LanguageModel, prompt: str, lens: str, k: int, measure: str, target: str | None = None) -> dict[str, Any]:
    """One measure of `lens`, by layer."""
    view = _view(model, prompt, lens, k, target)
    return answer(view, {"positions": view.positions}, {measure: view.plot_trajectories(measure)}, _short(model, prompt))


@of_model
def lens_difference(
    model: LanguageModel, prompt: str, lens: str, other: str, other_lens: str, measure: str, target: str | None = None
) -> dict[str, Any]:
    """A measure of one prompt through a lens, less that of another prompt, or through another lens."""
    one, two = _view(model, prompt, lens, 5, target), _view(model, other, other_lens, 5, target)
    figure = one.plot_difference(two, measure)
    return answer(one, {"first": one.positions, "second": two.positions}, {"heatmap": figure}, _short(model, prompt))


@of_model
def attention(model: LanguageModel, prompt: str, layer: int) -> dict[str, Any]:
    """Every head of a layer: which tokens look at which."""
    from workbench.analyses.prompt_states import attention_patterns

    found = attention_patterns(model, prompt, layer)
    return answer(found, None, {"heads": found.plot()}, _short(model, prompt))


@of_model
def norms(model: LanguageModel, prompt: str) -> dict[str, Any]:
    """Lengths of the states, by layer and token."""
    from workbench.analyses.prompt_states import state_norms

    n = _short(model, prompt)
    found = state_norms(model, prompt)
    return answer(found, None, {"heatmap": found.plot()}, n)


@of_model
def generate(
    model: LanguageModel, prompt: str, erasers: str | None = None, name: str | None = None, max_new_tokens: int = 20
) -> dict[str, Any]:
    """A continuation as the model is and, with an eraser of a file, as it is with the concept erased."""
    from workbench.intervention import intervene

    n = _short(model, prompt)
    before, after = model.generate(prompt, max_new_tokens=max_new_tokens), None
    if erasers is not None:
        from probes.erasers.files import load_eraser

        with intervene(model, load_eraser(erasers, name).as_edit(model=model)):
            after = model.generate(prompt, max_new_tokens=max_new_tokens)
    table = {"prompt": [prompt], "text": [before], "edited": [after]}
    return {"settings": model.provenance | {"tokens": n}, "tables": {"table": table}, "figures": {}}


# ---- neurons


@of_model
def neuron(
    model: LanguageModel, layer: int, neuron: int, decoder: str = "none", map: str | None = None, corpus: str | None = None,
    max_tokens: int = 30_000,
) -> dict[str, Any]:  # fmt: skip
    """All of a card; what needs text only with a corpus."""
    from workbench.analyses.neuron_card import neuron_card
    from workbench.analyses.neuron_map import NeuronMap
    from workbench.corpus.corpus import Corpus

    texts = None if corpus is None else Corpus(corpus, max_tokens=max_tokens)
    neurons = None if map is None else _read_run(NeuronMap, map)
    card = neuron_card(model, layer, neuron, corpus=texts, decoder=decoder, neurons=neurons)  # pyright: ignore[reportArgumentType]
    tables = {"table": card.table, "sides": card.sides, "scores": card.scores, "cosines": card.cosines, "nearest": card.nearest}
    tables |= {"logits": card.logits, "clamp": card.clamp}
    figures = {}
    if card.text is not None:
        tables |= {"examples": card.text.examples, "statistics": card.text.statistics, "words": card.text.words}
        figures = {"histogram": card.text.plot()}
    return answer(card, tables, figures)


@of_model
def clamp(
    model: LanguageModel, layer: int, neuron: int, prompt: str, value: float = 8.0, side: str = "up", n_random: int = 20,
    max_new_tokens: int = 20, seed: int = 0,
) -> dict[str, Any]:  # fmt: skip
    """What a neuron's words and the continuation become while it is clamped, beside random neurons of its layer."""
    from workbench.analyses.neuron_effect import neuron_effect

    n = _short(model, prompt)
    found = neuron_effect(
        model, layer, neuron, prompt, value=value, side=side,  # pyright: ignore[reportArgumentType]
        n_random=n_random, max_new_tokens=max_new_tokens, seed=seed, progress=False,
    )  # fmt: skip
    tables = {"table": found.table, "summary": found.summary(), "generations": found.generations}
    return answer(found, tables, {"change": found.plot()}, n)


@task
def examples(folder: str, site: str, index: int) -> dict[str, Any]:
    """Of a unit, from a run of `workbench top-activations`."""
    from workbench.analyses.top_activations import TopActivations

    found = _read_run(TopActivations, folder)
    return answer(found, {"table": found.examples(index, site=site)}, {"histogram": found.plot(index, site=site)})


# ---- gradients


@of_model
def backward(model: LanguageModel, prompt: str, target: str, step: float | None = None, k: int = 5) -> dict[str, Any]:
    """What a gradient step on a target would write, by matrix, and what it does, if a step is given."""
    from workbench.analyses.backward_lens import backward_lens
    from workbench.analyses.step_forecast import forecast_step

    n = _short(model, prompt)
    found = backward_lens(model, prompt, _target(target), k=k)
    there = [str(one) for one in found.vectors["matrix"].unique()]
    figures = {one: found.plot(one) for one in there}
    tables = {"table": found.table, "vectors": found.vectors, "matrices": found.matrices, "targets": found.targets}
    if step:
        assert found.gradients is not None
        forecast = forecast_step(found.gradients, {"prompt": [(prompt, _target(target))]}, step=step)
        tables["forecast"], figures["forecast"] = forecast.table, forecast.plot()
    return answer(found, tables, figures, n, matrices=there)


# ---- results on disk


@task
def open_run(folder: str) -> dict[str, Any]:
    """Any result that the app has a picture of: its tables and pictures."""
    from app.kinds import SHOWN

    kind = read_json(Path(folder) / "run.json").get("kind")
    if kind not in HOMES:
        raise BadArtifact(f"{folder!r} holds {kind!r}, which has no screen. Read it in Python, or look at its files.")
    module, name = HOMES[kind]
    return SHOWN[kind](_read_run(getattr(import_module(module), name), folder))


def _read_run(kind: Any, folder: str) -> Any:
    return _loaded(kind, folder, written(folder))


@lru_cache(maxsize=8)
def _loaded(kind: Any, folder: str, made: int | None) -> Any:
    return kind.load(folder)


def _lens(model: LanguageModel, name: str) -> Any:
    """None is the logit lens."""
    from workbench.lenses.kinds import KINDS
    from workbench.lenses.lens import Lens
    from workbench.lenses.shipped import shipped_lens

    if name == "logit":
        return None
    return shipped_lens(model, name) if name in KINDS else Lens.load(name, model=model)  # pyright: ignore[reportArgumentType]


def _token(text: str | None) -> str | int | None:
    """A token as the command line names it: its string, or `id:250`."""
    return int(text[3:]) if text and text.startswith("id:") and text[3:].isdecimal() else text or None


def _target(text: str) -> str | list[int]:
    from workbench.cli.gradient_verbs import target_of

    return target_of(text)
