"""Verbs about text at length: corpora, capture."""

from enum import StrEnum
from typing import Annotated

import typer

from workbench.cli.corpus_options import (
    BatchTokens,
    Bos,
    BosOption,
    Column,
    CorpusOption,
    Length,
    MaxTokens,
    Packed,
    load_corpus,
)
from workbench.cli.options import Device, DType, Json, Model, Out, Revision, load_model
from workbench.cli.show import emit_json, say, table
from workbench.embedded import DEFAULT as DEFAULT_MODEL
from workbench.manifest import note, wrote


class StoreDType(StrEnum):
    """What a store can hold."""

    bfloat16 = "bfloat16"
    float16 = "float16"
    float32 = "float32"


def corpora(json: Json = False) -> None:
    """List the corpora that are shipped, with their size, licence, and how close they are to web text."""
    from workbench.corpus.sources import shipped

    found = shipped()
    if json:
        emit_json({"corpora": found})
        return
    columns = ["name", "documents", "tokens", "licence", "title"]
    rows = [[name, *(_counted(about[column]) for column in columns[1:])] for name, about in found.items()]
    table("Corpora", columns, rows, left=["name", "licence", "title"])
    for name, about in found.items():
        say(f"{name}: {about['closeness']}")


def capture(
    corpus: CorpusOption,
    sites: Annotated[str, typer.Option(help="Sites, comma-separated: resid_post,mlp_post.4:8")],
    out: Out,
    model: Model = DEFAULT_MODEL,
    store_dtype: Annotated[StoreDType, typer.Option(help="What is written.")] = StoreDType.bfloat16,
    max_tokens: MaxTokens = None,
    column: Column = "text",
    length: Length = None,
    packed: Packed = False,
    bos: Bos = BosOption.tokenizer,
    batch_tokens: BatchTokens = None,
    shard_tokens: Annotated[int | None, typer.Option(min=1, help="Tokens of a file; as many as make 512 MB.")] = None,
    massive_at: Annotated[str, typer.Option(help="Site whose norms tell massive tokens; none for no such site.")] = "middle",
    max_bytes: Annotated[float | None, typer.Option(help="Refuse to write more than this: 1e9.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what it will take, and write nothing.")] = False,
    revision: Revision = None,
    device: Device = None,
    dtype: DType = None,
    json: Json = False,
) -> None:
    """Write a corpus's activations to a folder of safetensors shards; the same command goes on where it was stopped."""
    from workbench.store.files import INDEX, TOKENS
    from workbench.store.write import StoreJob

    texts = load_corpus(corpus, column, length, packed, bos, max_tokens)
    job = StoreJob(
        load_model(model, revision, device, dtype), texts, sites.split(","), out, dtype=store_dtype.value,
        batch_tokens=batch_tokens, shard_tokens=shard_tokens, massive_at=None if massive_at == "none" else massive_at,
        max_bytes=max_bytes, progress=not json,
    )  # fmt: skip
    note(sites=[str(site) for site in job.stream.sites])
    plan = job.stream.plan()
    if dry_run:
        if json:
            emit_json({"plan": plan._asdict(), "settings": job.settings})
        else:
            print(plan)
        return
    say(str(plan))
    store = job.run()
    note(corpus=texts.settings | {"tokens_hash": store.settings["tokens_hash"]})
    wrote(out / INDEX, out / TOKENS)  # the index has the hashes of the shards
    if json:
        emit_json({"out": str(out), "tokens": len(store), "plan": plan._asdict(), "settings": store.settings})
    else:
        print(store)
        say(f"\nRead it:  store = wb.ActivationStore({str(out)!r}); store.read({store.sites[0]!r})")


def _counted(value: int | str) -> str:
    return f"{value:,}" if isinstance(value, int) else value


VERBS = {"corpora": corpora, "capture": capture}
