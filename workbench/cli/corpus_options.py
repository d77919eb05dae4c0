"""Options of the verbs that read a corpus, each said once."""

from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from workbench.manifest import note

if TYPE_CHECKING:
    from workbench.corpus.corpus import Corpus


class BosOption(StrEnum):
    """Where the token of beginnings stands."""

    tokenizer = "tokenizer"
    document = "document"
    row = "row"
    never = "never"


CorpusOption = Annotated[str, typer.Option("--corpus", "-c", help="A .txt, .jsonl or .parquet file, or a shipped corpus.")]
Column = Annotated[str, typer.Option(help="Field of the text, in .jsonl and .parquet.")]
Length = Annotated[int | None, typer.Option(min=2, help="Tokens of a row; 512, or the model's context, if not given.")]
Packed = Annotated[bool, typer.Option("--packed", help="Fill rows with one document after the other.")]
Bos = Annotated[BosOption, typer.Option(help="Where the token of beginnings stands.")]
MaxTokens = Annotated[int | None, typer.Option(min=1, help="The corpus ends after so many.")]
BatchTokens = Annotated[int | None, typer.Option(min=1, help="Tokens of a batch: 2,048 on a CPU, 8,192 on a GPU.")]


def load_corpus(corpus: str, column: str, length: int | None, packed: bool, bos: BosOption, max_tokens: int | None) -> "Corpus":
    """The corpus that the options name; the record of the run says which it was.

    Raises:
        BadCorpus, UnknownOption: as `Corpus`.
    """
    from workbench.corpus.corpus import Corpus

    texts = Corpus(corpus, column=column, length=length, packed=packed, bos=bos.value, max_tokens=max_tokens)
    note(corpus=texts.settings)
    return texts
