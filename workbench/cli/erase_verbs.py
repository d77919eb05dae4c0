"""The verbs of erasing concepts and directions."""

from pathlib import Path
from typing import Annotated, Any

import typer

from workbench.cli.dataset_options import Data, Examples, Group, Label, Pooled, Target, Text, Type, load_dataset
from workbench.cli.options import WRITTEN, Device, DType, Json, Model, Revision, load_model
from workbench.cli.show import emit_json, say
from workbench.embedded import DEFAULT as DEFAULT_MODEL
from workbench.errors import UnknownOption
from workbench.manifest import note, wrote


def erase(
    data: Data,
    site: Annotated[
        str | None, typer.Option("--site", "--sites", help="Sites, comma-separated; the state two thirds up, if not given.")
    ] = None,
    eraser: Annotated[
        str, typer.Option("--eraser", "--erasers", help="Of leace, mean, inlp, sal, rlace, random, shuffled; comma-separated.")
    ] = "leace,mean,inlp,rlace,random,shuffled",
    main: Annotated[
        str | None, typer.Option(help="Column of another task: what erasing costs there, and how unequally.")
    ] = None,
    mlp: Annotated[bool, typer.Option(help="Also a network, for what is left but along no direction.")] = True,
    run: Annotated[bool, typer.Option(help="Also erase while the model runs: what becomes of its loss.")] = True,
    everywhere: Annotated[
        str | None, typer.Option(help="Also LEACE at all these sites, one after another: resid_post.0:29, or ln1,ln2.")
    ] = None,
    answers: Annotated[
        str | None, typer.Option(help="What is right after a text, by class: 'plural= are,singular= is'.")
    ] = None,
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", help="To be continued under each eraser; several times.")
    ] = None,
    curve: Annotated[bool, typer.Option("--curve", help="Also INLP's loss, rank by rank.")] = False,
    follow: Annotated[bool, typer.Option("--follow", help="Also how much is linearly back at the layers above.")] = False,
    tokens: Annotated[int, typer.Option(min=2, help="Of ordinary text.")] = 2000,
    pool: Pooled = "last",
    text: Text = "text",
    label: Label = "label",
    group: Group = None,
    target: Target = None,
    type: Type = None,
    examples: Examples = None,
    seed: Annotated[int, typer.Option(min=0, help="Of halves, random subspaces, shuffles and resamples.")] = 0,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Also write tables, erasers and pictures here."), WRITTEN
    ] = None,
    model: Model = DEFAULT_MODEL,
    revision: Revision = None,
    device: Device = None,
    dtype: DType = None,
    json: Json = False,
) -> None:
    """Can a concept be removed from states, and does the model then miss it?"""
    from probes.dataset_files import column_of
    from probes.erasing.answers import classes_of_answers
    from probes.erasing.erasure import erase as erased
    from probes.erasing.following import follow as followed
    from probes.erasing.scrubbing import fit_scrubbers, scrub
    from probes.evaluation.splits import shuffled_set
    from workbench.artifacts import output_folder, write_page

    if out is not None:
        output_folder(out)
    right = None if answers is None else classes_of_answers(answers)
    dataset = load_dataset(data, text, label, group, target, type, examples)
    task = None if main is None else column_of(data, main)[: len(dataset)]
    loaded = load_model(model, revision, device, dtype)
    note(seed=seed, dataset=dataset.settings)
    found = erased(
        loaded, dataset, None if site is None else site.split(","), erasers=eraser.split(","), mlp=mlp, pool=pool,  # pyright: ignore[reportArgumentType]
        main=task, seed=seed, device=device, progress=not json,
    )  # fmt: skip
    results: dict[str, Any] = {}
    pictures: list[str] = []

    def keep(name: str, result: Any, *drawn: str) -> None:
        """Written at once: what comes later takes minutes, and may find a mistake."""
        results[name] = result
        for picture in drawn if out is not None else ():
            assert out is not None
            stem = f"{name}-{picture}" if name and picture else name or picture
            wrote(write_page(out / f"{stem}.html", result.plot(picture) if picture else result.plot()))
            pictures.append(stem)
        if out is not None:
            wrote(result.save(out / name))

    keep("", found, "leaks", "scatter", *(["curve"] if len(found.curve) else []))
    if run:
        ways: dict[str, Any] = {
            name.replace("/", ", "): one for name, one in found.erasers.items() if not name.endswith("/random")
        }
        if everywhere is not None:
            sites = everywhere.split(",")
            half = dataset.halves(seed)[0]
            ways[f"leace at all {everywhere}"] = fit_scrubbers(loaded, half, sites, device=device)
            null = shuffled_set(half, seed)
            ways["... of shuffled labels"] = fit_scrubbers(loaded, null, sites, device=device, tolerance=0.0)
        scrubbed = scrub(
            loaded, ways, dataset.halves(seed)[1], answers=right, prompts=prompt or (), tokens=tokens, curve=curve, seed=seed,
            progress=not json,
        )  # fmt: skip
        keep("scrubbing", scrubbed, "bars", *(["curve"] if len(scrubbed.curve) else []))
    if follow:
        first = next((one for name, one in found.erasers.items() if not name.endswith("/random")), None)
        if first is None:
            raise UnknownOption("There is no eraser to follow. Name one besides random and shuffled.")
        other = dataset.halves(seed)[1]
        keep("followed", followed(loaded, first, other, pool=pool, seed=seed, progress=not json), "")  # pyright: ignore[reportArgumentType]
    if json:
        tables = {name or "erasure": one.table for name, one in results.items()}
        rows = {name: one.astype(object).where(one.notna(), None).to_dict("records") for name, one in tables.items()}
        emit_json({"settings": {name or "erasure": one.settings for name, one in results.items()}} | rows)
        return
    print("\n\n".join(str(one) for one in results.values()))
    if out is not None:
        say(f"\nWritten to {out}; pictures: {', '.join(f'{name}.html' for name in pictures)}.")


def ablate_weights(
    erasers: Annotated[Path, typer.Argument(help="erasers.safetensors of workbench erase, or one that eraser.save wrote.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="A new folder for the model."), WRITTEN],
    name: Annotated[str | None, typer.Option(help="Which of several: resid_post.20/leace.")] = None,
    untie: Annotated[
        bool, typer.Option("--untie", help="Save embedding and unembedding apart, where they are one matrix.")
    ] = False,
    tokens: Annotated[int, typer.Option(min=2, help="Of ordinary text, on which the saved model is measured.")] = 2000,
    prompt: Annotated[list[str] | None, typer.Option("--prompt", help="To be continued by both; several times.")] = None,
    model: Model = DEFAULT_MODEL,
    revision: Revision = None,
    device: Device = None,
    dtype: DType = None,
    json: Json = False,
) -> None:
    """Write a model whose weights have nothing along an eraser's directions, and check it."""
    from probes.erasers.files import load_eraser
    from workbench.analyses.written_model import compare_models
    from workbench.direction_ablation import ablate_directions
    from workbench.loading import load
    from workbench.weight_edits import require_new_folder

    require_new_folder(out)
    chosen = load_eraser(erasers, name)
    loaded = load_model(model, revision, device, dtype)
    chosen.require_model(loaded)
    ablation = ablate_directions(loaded, chosen.write_.T, untie=untie)
    wrote(ablation.save(out))
    compared = compare_models(loaded, load(str(out), device=device, dtype=dtype), tokens=tokens, prompts=prompt or ())
    if json:
        emit_json({"ablation": repr(ablation), "weights": ablation.table.to_dict("records"), "compared": compared._asdict()})
        return
    print(f"{ablation}\n{compared}")
    say(f"\nWritten to {out}.")


VERBS = {"erase": erase, "ablate-weights": ablate_weights}
