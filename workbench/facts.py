"""Facts that come with the project, to edit a model by: a prompt, what follows it, other wordings, and facts next to it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from workbench.errors import BadArtifact, UnknownOption

SHIPPED = Path(__file__).parents[1] / "data" / "facts"
"""`facts.parquet` and what is to be known of it. They lie in the project's own checkout."""


@dataclass(frozen=True)
class Neighbour:
    """A fact of the same relation about another subject, which an edit should leave alone."""

    prompt: str
    object: str


@dataclass(frozen=True)
class Fact:
    """What a model may know. The object follows the prompt, and every paraphrase, after one space."""

    id: str
    """Relation and subject, as in `capital/france`."""
    relation: str
    subject: str
    """As every wording of the fact holds it."""
    object: str
    """The right answer, with no space before it."""
    false_object: str
    """An answer that is right elsewhere in the relation and wrong here, to edit a model to."""
    prompt: str
    """Ends without a space."""
    paraphrases: tuple[str, ...]
    """Three other wordings of the prompt."""
    neighbours: tuple[Neighbour, ...]
    """Five, those of the same object first, then those of the same continent."""


def shipped_facts(relations: Sequence[str] | None = None, n: int | None = None) -> list[Fact]:
    """The facts of `data/facts/`, in the order of the SHA-256 of their ids: the first are a fair sample of all.

    Args:
        relations: Only these; all where it is left out.
        n: Only the first so many of them.
    Raises:
        UnknownOption: if there is no such relation, or `n` is below 1.
        BadArtifact: if the file is missing or damaged.
    """
    import pyarrow.parquet as pq

    if n is not None and n < 1:
        raise UnknownOption(f"n={n} facts cannot be read. Use 1 or more, or leave it out for all.")
    path = SHIPPED / "facts.parquet"
    try:
        facts = [fact_of(row) for row in pq.read_table(path).to_pylist()]
    except FileNotFoundError:
        raise BadArtifact(
            f"{str(path)!r} does not exist. The facts lie in the project's own checkout: install it from there with "
            "pip install -e ."
        ) from None
    except (OSError, ValueError, TypeError, KeyError) as error:  # pyarrow's errors of a damaged file are among them
        raise BadArtifact(f"{str(path)!r} is damaged ({error}). Take it from the repository again.") from None
    there = sorted({fact.relation for fact in facts})
    wanted = there if relations is None else [relations] if isinstance(relations, str) else relations
    for relation in wanted:
        if relation not in there:
            raise UnknownOption(f"There are no facts of the relation {relation!r}. Use some of {', '.join(there)}.")
    return [fact for fact in facts if fact.relation in wanted][:n]


def fact_of(row: dict) -> Fact:
    """A fact from its row in the file."""
    neighbours = tuple(Neighbour(other["prompt"], other["object"]) for other in row["neighbours"])
    return Fact(**row | {"paraphrases": tuple(row["paraphrases"]), "neighbours": neighbours})
