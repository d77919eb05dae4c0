"""What a card stands for, as a command and as a program that give its numbers again: one entry for each task of `tasks`."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from app.homes import HOMES
from workbench.artifacts import read_json

KINDS_OF_LENS = ("logit", "shortcut", "tuned", "jacobian", "jacobian_same_position")


@dataclass(frozen=True)
class Question:
    """A task and its arguments."""

    task: str
    arguments: dict[str, Any]

    def cli(self) -> str | None:
        """One line for a shell; None where the command line has no such verb."""
        made = globals()[f"_{self.task}_cli"](**{"model": None} | self.arguments)
        return None if made is None else shlex.join(["workbench", *made, *_model_options(self.arguments.get("model"))])

    def python(self) -> str:
        """A program whose `result` holds the card's tables."""
        return globals()[f"_{self.task}_python"](**{"model": None} | self.arguments)


def _option(name: str, value: Any) -> list[str]:
    """In one word, so that a value may begin with a dash."""
    return [] if value is None else [f"--{name}={value}"]


def _model_options(model: dict[str, Any] | None) -> list[str]:
    return [] if model is None else [word for key in ("name", "dtype", "device") for word in
                                     _option("model" if key == "name" else key, model.get(key))]  # fmt: skip


def _program(model: dict[str, Any] | None, *lines: str, also: str = "") -> str:
    """Its lines, after the model."""
    head = ["import workbench as wb", *([also] if also else [])]
    if model is not None:
        options = [repr(model["name"])]
        if model.get("dtype"):
            head.insert(0, "import torch")
            options.append(f"dtype=torch.{model['dtype']}")
        if model.get("device"):
            options.append(f"device={model['device']!r}")
        head += ["", f"model = wb.load({', '.join(options)})"]
    return "\n".join([*head, *lines])


def _call(name: str, *positional: Any, **options: Any) -> str:
    """A call, without the options that are None."""
    words = [*map(str, positional), *(f"{key}={value!r}" for key, value in options.items() if value is not None)]
    return f"result = {name}({', '.join(words)})"


# ---- the model


def _load_cli(model: Any) -> list[str]:
    return ["sites"]


def _load_python(model: Any) -> str:
    return _program(model, "result = site_table(model)", also="from workbench.catalogue import site_table")


def _verify_cli(model: Any) -> list[str]:
    return ["verify"]


def _verify_python(model: Any) -> str:
    return _program(model, "result = model.verify()")


# ---- one prompt


def _lens_cli(model: Any, prompt: str, lens: str = "logit", k: int = 5, target: str | None = None) -> list[str]:
    chosen = _option("kind" if lens in KINDS_OF_LENS else "lens", lens)
    return ["lens", *_option("prompt", prompt), *chosen, *_option("top-k", k), *_option("target", target or None)]


def _lens_python(model: Any, prompt: str, lens: str = "logit", k: int = 5, target: str | None = None) -> str:
    return _program(model, _call("wb.lens", "model", repr(prompt), _lens(lens), k=k, target=_token(target)), "result.plot()")


def _lens_lines_cli(model: Any, measure: str, **asked: Any) -> list[str]:
    return _lens_cli(model, **asked)


def _lens_lines_python(model: Any, measure: str, **asked: Any) -> str:
    return f"{_lens_python(model, **asked).removesuffix('result.plot()')}result.plot_trajectories({measure!r})"


def _lens_difference_cli(
    model: Any, prompt: str, lens: str, other: str, other_lens: str, measure: str, target: str | None = None
) -> list[str] | None:
    if lens != other_lens or measure != "kl_to_final_nats":
        return None  # the verb compares texts, by their KL
    chosen = _option("kind" if lens in KINDS_OF_LENS else "lens", lens)
    words = ["lens", *_option("prompt", prompt), *_option("versus", other), *chosen, *_option("target", target or None)]
    return [*words, "--out=out/difference"]


def _lens_difference_python(
    model: Any, prompt: str, lens: str, other: str, other_lens: str, measure: str, target: str | None = None
) -> str:
    one = _call("wb.lens", "model", repr(prompt), _lens(lens), target=_token(target))
    two = _call("wb.lens", "model", repr(other), _lens(other_lens), target=_token(target)).replace("result", "other", 1)
    return _program(model, one, two, f"result.plot_difference(other, {measure!r})")


def _attention_cli(model: Any, prompt: str, layer: int) -> list[str]:
    return ["attention", *_option("prompt", prompt), *_option("layer", layer)]


def _attention_python(model: Any, prompt: str, layer: int) -> str:
    return _program(model, _call("wb.attention_patterns", "model", repr(prompt), layer), "result.plot()")


def _norms_cli(model: Any, prompt: str) -> list[str]:
    return ["norms", *_option("prompt", prompt)]


def _norms_python(model: Any, prompt: str) -> str:
    return _program(model, _call("wb.state_norms", "model", repr(prompt)), "result.plot()")


def _generate_cli(
    model: Any, prompt: str, erasers: str | None = None, name: str | None = None, max_new_tokens: int = 20
) -> list[str]:
    words = [*_option("prompt", prompt), *_option("erasers", erasers), *_option("name", name)]
    return ["generate", *words, *_option("max-new-tokens", max_new_tokens)]


def _generate_python(
    model: Any, prompt: str, erasers: str | None = None, name: str | None = None, max_new_tokens: int = 20
) -> str:
    said = f"model.generate({prompt!r}, max_new_tokens={max_new_tokens})"
    if erasers is None:
        return _program(model, f"result = {said}")
    lines = [
        f"eraser = load_eraser({erasers!r}, {name!r})",
        f"before = {said}",
        "with wb.intervene(model, eraser.as_edit(model=model)):",
        f"    result = {said}",
    ]
    return _program(model, *lines, also="from probes.erasers.files import load_eraser")


# ---- neurons


def _find_cli(
    map: str, text: str, match: str = "folded", side: str | None = None, layers: str | None = None, max_rank: int | None = None,
    bottom: bool = False, model: Any = None,
) -> list[str]:  # fmt: skip
    flags = [f"--{match}"] if match != "folded" else []
    words = [*_option("map", map), *flags, *_option("side", side), *_option("layers", layers), *_option("max-rank", max_rank)]
    return ["find-neurons", *words, *(["--bottom"] if bottom else []), "-n", "200", "--", text]


def _find_python(
    map: str, text: str, match: str = "folded", side: str | None = None, layers: str | None = None, max_rank: int | None = None,
    bottom: bool = False, model: Any = None,
) -> str:  # fmt: skip
    own = {"side": side, "layers": layers, "max_rank": max_rank, "bottom": bottom or None}
    found = _call("neurons.find", repr(text), match=match if match != "folded" else None, **own)
    return _program(None, f"neurons = wb.NeuronMap.load({map!r})", found)


def _neuron_cli(
    model: Any, layer: int, neuron: int, decoder: str = "none", map: str | None = None, corpus: str | None = None,
    max_tokens: int = 30_000,
) -> list[str]:  # fmt: skip
    text = [*_option("corpus", corpus), *_option("max-tokens", max_tokens)] if corpus else ["--no-text"]
    return ["neuron", f"{layer}.{neuron}", *text, *_option("decoder", decoder), *_option("map", map)]


def _neuron_python(
    model: Any, layer: int, neuron: int, decoder: str = "none", map: str | None = None, corpus: str | None = None,
    max_tokens: int = 30_000,
) -> str:  # fmt: skip
    words = ["model", layer, neuron, f"decoder={decoder!r}"]
    words += [f"corpus=wb.Corpus({corpus!r}, max_tokens={max_tokens})"] if corpus else []
    words += [f"neurons=wb.NeuronMap.load({map!r})"] if map else []
    return _program(model, _call("wb.neuron_card", *words))


def _clamp_cli(
    model: Any, layer: int, neuron: int, prompt: str, value: float = 8.0, side: str = "up", n_random: int = 20,
    max_new_tokens: int = 20, seed: int = 0,
) -> list[str]:  # fmt: skip
    words = [*_option("prompt", prompt), *_option("value", value), *_option("side", side), *_option("random", n_random)]
    return ["clamp", f"{layer}.{neuron}", *words, *_option("max-new-tokens", max_new_tokens), *_option("seed", seed)]


def _clamp_python(
    model: Any, layer: int, neuron: int, prompt: str, value: float = 8.0, side: str = "up", n_random: int = 20,
    max_new_tokens: int = 20, seed: int = 0,
) -> str:  # fmt: skip
    own = {"value": value, "side": side, "n_random": n_random, "max_new_tokens": max_new_tokens, "seed": seed}
    return _program(model, _call("wb.neuron_effect", "model", layer, neuron, repr(prompt), **own), "result.plot()")


def _examples_cli(folder: str, site: str, index: int, model: Any = None) -> list[str]:
    return _recorded(folder)


def _examples_python(folder: str, site: str, index: int, model: Any = None) -> str:
    return _program(None, f"found = wb.TopActivations.load({folder!r})", f"result = found.examples({index}, site={site!r})")


# ---- gradients


def _backward_cli(model: Any, prompt: str, target: str, step: float | None = None, k: int = 5) -> list[str]:
    words = [*_option("prompt", prompt), *_option("target", target), *_option("top-k", k)]
    return ["backward-lens", *words, *_option("step", step or None)]


def _backward_python(model: Any, prompt: str, target: str, step: float | None = None, k: int = 5) -> str:
    wanted = repr([int(one) for one in target[3:].split(",")] if target.startswith("id:") else target)
    lines = [_call("wb.backward_lens", "model", repr(prompt), wanted, k=k), "result.plot('W_out')"]
    if step:
        lines.append(f"forecast = wb.forecast_step(result.gradients, {{'prompt': [({prompt!r}, {wanted})]}}, step={step})")
    return _program(model, *lines)


# ---- results on disk


def _open_run_cli(folder: str, model: Any = None) -> list[str]:
    return _recorded(folder)


def _open_run_python(folder: str, model: Any = None) -> str:
    module, name = HOMES[read_json(Path(folder) / "run.json")["kind"]]
    return _program(None, f"result = {name}.load({folder!r})", also=f"from {module} import {name}")


def _recorded(folder: str) -> list[str]:
    """The run made again beside itself: its record has the arguments."""
    return ["replay", str(Path(folder))]


def _lens(name: str) -> str:
    if name in KINDS_OF_LENS:
        return f"wb.shipped_lens(model, {name!r})"
    return f"wb.Lens.load({name!r}, model=model)"


def _token(text: str | None) -> str | int | None:
    return int(text[3:]) if text and text.startswith("id:") and text[3:].isdecimal() else text or None
