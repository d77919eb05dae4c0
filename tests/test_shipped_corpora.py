"""The corpora of `data/corpora/` are what `corpora.json` says of them, and plain text."""

import hashlib
import json
import re
import unicodedata
from functools import cache
from pathlib import Path

import pyarrow.parquet as pq
import pytest

CORPORA = Path(__file__).parents[1] / "data" / "corpora"
SAID = json.loads((CORPORA / "corpora.json").read_text())
LEAST_TOKENS = 200_000
# Tags, character entities, braces of wiki and TeX, footnote marks, fences, and characters that nobody sees.
MARKUP = re.compile(
    r"<[a-z]+[ >]|</[a-z]+>|&(amp|lt|gt|quot|nbsp|#\d+);|\{\{|\\[a-z]+\{|[.,]\[\d+\]|```|[\u200b-\u200f\u2060\ufeff\xa0]"
)

every_corpus = pytest.mark.parametrize("name", SAID)


@cache
def rows(name: str) -> list[dict]:
    return pq.read_table(CORPORA / f"{name}.parquet").to_pylist()


def test_every_file_is_described():
    assert {path.stem for path in CORPORA.glob("*.parquet")} == set(SAID)


@every_corpus
def test_the_file_is_the_one_described(name):
    assert hashlib.sha256((CORPORA / f"{name}.parquet").read_bytes()).hexdigest() == SAID[name]["sha256"]
    texts = [row["text"] for row in rows(name)]
    assert len(texts) == SAID[name]["documents"]
    assert sum(map(len, texts)) == SAID[name]["characters"]
    assert sum(len(text.split()) for text in texts) == SAID[name]["words"]


@every_corpus
def test_every_document_is_one_of_its_kind(name):
    ids = [row["id"] for row in rows(name)]
    assert len(set(ids)) == len(ids)
    assert all(ids)
    texts = [row["text"] for row in rows(name)]
    assert len(set(texts)) == len(texts)


@every_corpus
def test_documents_are_plain_text(name):
    for row in rows(name):
        text = row["text"]
        assert text
        assert text == unicodedata.normalize("NFC", text)
        assert not MARKUP.search(text), f"{row['id']}: {MARKUP.search(text)}"
        # Paragraphs stand between blank lines, with single spaces in them and none around them.
        assert all(paragraph == " ".join(paragraph.split()) != "" for paragraph in text.split("\n\n")), row["id"]


@every_corpus
def test_the_licence_and_its_attribution_are_there(name):
    assert (CORPORA / SAID[name]["licence_text"]).stat().st_size > 500
    assert SAID[name]["attribution"]


@every_corpus
def test_there_is_enough_of_it(name, smollm):
    """As many documents as hold 200,000 tokens and a few, each by itself: no token spans two."""
    counted = 0
    for batch in batches([row["text"] for row in rows(name)], size=256):
        counted += sum(map(len, smollm.tokenizer(batch, add_special_tokens=False)["input_ids"]))
        if counted >= LEAST_TOKENS:
            break
    assert counted >= LEAST_TOKENS
    assert SAID[name]["tokens"] >= counted


def batches(texts: list[str], *, size: int) -> list[list[str]]:
    return [texts[start : start + size] for start in range(0, len(texts), size)]
