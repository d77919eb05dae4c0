"""Documents become rows of tokens, none lost, none twice; and what is no text is said to be none."""

import copy
import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import tiny_model
from families import tiny_tokenizer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

import workbench as wb
from workbench.corpus import sources
from workbench.corpus.corpus import STRATA, strata
from workbench.errors import BadCorpus, UnknownOption

TEXTS = ["a dog and a cat", "", "dogs\n", "what a long text, longer than a row of tokens may be", "b"]
POLICIES = ("tokenizer", "document", "row", "never")
EOS = 256
"""Id of a token that a text of these tests does not hold."""


def another_tokenizer(template: str | None = None, **special_tokens):
    """The tiny one, whose template puts tokens around a text."""
    inner = copy.deepcopy(tiny_tokenizer().backend_tokenizer)
    if template is not None:
        ids = [("<s>", 0), (inner.id_to_token(EOS), EOS)]
        inner.post_processor = processors.TemplateProcessing(single=template.replace("END", ids[1][0]), special_tokens=ids)
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=inner.id_to_token(EOS), **special_tokens)


@pytest.fixture(scope="module")
def tokenizers(llama):
    """The model with tokenizers that do and do not mark beginnings and ends."""
    made = {
        "plain": another_tokenizer(bos_token="<s>"),
        "beginnings": another_tokenizer("<s> $A", bos_token="<s>"),
        "both": another_tokenizer("<s> $A END", bos_token="<s>"),
        "ends alone": another_tokenizer("$A END"),
    }
    return {name: dataclasses.replace(llama, tokenizer=tokenizer) for name, tokenizer in made.items()}


def expected(model, texts, bos):
    """Tokens of each document by the policy, straight from the tokenizer."""
    found = {}
    for i, text in enumerate(texts):
        tokens = list(model.tokenizer(text)["input_ids"]) if text else []
        first = model.tokenizer.bos_token_id
        while text and bos != "tokenizer" and first is not None and tokens[:1] == [first]:
            tokens = tokens[1:]
        found[i] = [first, *tokens] if text and bos == "document" else tokens
    return {i: tokens for i, tokens in found.items() if tokens}


def documents_of(rows):
    """Tokens of each document, the rows put together again; beginnings of rows apart."""
    found: dict[int, list[int]] = {}
    for row in rows:
        for token, document, offset in zip(row.tokens.tolist(), row.documents.tolist(), row.offsets.tolist(), strict=True):
            if offset >= 0:
                assert offset == len(found.setdefault(document, []))
                found[document].append(token)
    return found


def flat(rows):
    return np.concatenate([row.tokens for row in rows]).tolist()


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    texts=st.lists(st.text(max_size=30), min_size=1, max_size=7),
    length=st.integers(2, 20),
    packed=st.booleans(),
    bos=st.sampled_from(POLICIES),
    kind=st.sampled_from(["plain", "beginnings", "both"]),
    max_tokens=st.none() | st.integers(1, 60),
)
def test_rows_hold_each_documents_tokens_once_and_in_order(tokenizers, texts, length, packed, bos, kind, max_tokens):
    model, texts = tokenizers[kind], [*texts, "x"]
    corpus = wb.Corpus(texts, length=length, packed=packed, bos=bos)
    rows = list(corpus.rows(model))
    wanted = expected(model, texts, bos)
    assert documents_of(rows) == wanted
    assert [row.index for row in rows] == list(range(len(rows)))
    assert all(1 <= len(row) <= length for row in rows)
    if packed:
        assert all(len(row) == length for row in rows[:-1])
    else:
        assert all(len(set(row.documents.tolist())) == 1 for row in rows)
        room = length - (bos == "row")
        assert len(rows) == sum(-(-len(tokens) // room) for tokens in wanted.values())
    for row in rows:
        assert row.ids == {i: str(i) for i in row.documents.tolist()}
        put_before = (row.offsets == -1).nonzero()[0].tolist()
        assert put_before == ([0] if bos == "row" else [])
        assert bos != "row" or row.tokens[0] == model.bos_id
        assert {array.dtype for array in (row.tokens, row.documents, row.offsets)} == {np.dtype(np.int32)}
    count = corpus.count(model)
    assert (count.documents, count.rows, count.tokens) == (len(texts), len(rows), len(flat(rows)))
    limited = list(wb.Corpus(texts, length=length, packed=packed, bos=bos, max_tokens=max_tokens).rows(model))
    assert flat(limited) == flat(rows)[:max_tokens]
    assert all(set(row.ids) == set(row.documents.tolist()) for row in limited)


@pytest.mark.parametrize("bos", ["tokenizer", "document", "never"])
def test_packed_and_unpacked_rows_hold_the_same_tokens(tokenizers, bos):
    model = tokenizers["both"]
    one, other = (list(wb.Corpus(TEXTS, length=9, packed=packed, bos=bos).rows(model)) for packed in (True, False))
    assert flat(one) == flat(other)
    assert len(one) < len(other)


def test_the_policies_of_beginnings_and_ends(tokenizers):
    texts, words = ["aa", "b"], {"a": 66, "b": 67}
    words = {word: tiny_tokenizer()(word)["input_ids"][0] for word in words}
    a, b = words["a"], words["b"]

    def rows(kind, bos, packed=True, length=8):
        return [row.tokens.tolist() for row in wb.Corpus(texts, length=length, bos=bos, packed=packed).rows(tokenizers[kind])]

    assert rows("both", "tokenizer") == [[0, a, a, EOS, 0, b, EOS]]  # beginnings and ends stand inside a packed row
    assert rows("both", "document") == [[0, a, a, EOS, 0, b, EOS]]
    assert rows("both", "row") == [[0, a, a, EOS, b, EOS]]
    assert rows("both", "never") == [[a, a, EOS, b, EOS]]
    assert rows("plain", "tokenizer") == [[a, a, b]]
    assert rows("plain", "document", packed=False) == [[0, a, a], [0, b]]
    assert rows("plain", "row", packed=False, length=2) == [[0, a], [0, a], [0, b]]
    assert rows("ends alone", "tokenizer") == rows("ends alone", "never") == [[a, a, EOS, b, EOS]]
    for bos in ("row", "document"):
        with pytest.raises(UnknownOption, match="has no token of beginnings"):
            rows("ends alone", bos)


def test_every_policy_is_recorded(llama):
    corpus = wb.Corpus(TEXTS, length=9, packed=True, bos="row", max_tokens=7)
    assert corpus.settings == {"corpus": "texts", "length": 9, "packed": True, "bos": "row", "max_tokens": 7, "side": "all"}
    assert repr(corpus) == "Corpus('texts', packed, rows of 9, bos='row', at most 7 tokens)"
    assert repr(wb.Corpus(TEXTS)) == "Corpus('texts', a document a row, bos='tokenizer')"
    assert wb.stream(llama, wb.Corpus(TEXTS), "resid_post.1").settings["row_length"] == 64


def test_rows_are_of_512_tokens_or_as_many_as_the_context_has_room_for(llama, monkeypatch):
    text = ["a" * 2000]
    assert [len(row) for row in wb.Corpus(text).rows(llama)][:2] == [64, 64]
    boundless = tiny_model("bloom", check=False)
    assert boundless.n_context is None
    assert [len(row) for row in wb.Corpus(text).rows(boundless)] == [512, 512, 512, 464]
    monkeypatch.setattr(llama.hf.config, "max_position_embeddings", 700)
    assert [len(row) for row in wb.Corpus(text, length=700).rows(llama)] == [700, 700, 600]
    with pytest.raises(UnknownOption, match=r"Rows of 701 tokens do not fit the context of .*, which is 700\. Choose"):
        next(wb.Corpus(text, length=701).rows(llama))


def test_the_hash_changes_when_a_token_does_and_only_then(llama):
    def hash_of(texts, **options):
        return wb.Corpus(texts, **({"length": 8} | options)).count(llama).tokens_hash

    one = hash_of(TEXTS)
    assert one == hash_of(list(TEXTS))
    others = [
        hash_of([*TEXTS[:-1], "c"]),
        hash_of(TEXTS, length=9),
        hash_of(TEXTS, packed=True),
        hash_of(TEXTS, bos="row"),
        hash_of(TEXTS, max_tokens=20),
        hash_of(TEXTS[::-1]),
    ]
    assert len({one, *others}) == len(others) + 1


def test_the_hash_changes_when_a_document_begins_elsewhere_or_has_another_name(llama, tmp_path):
    """The tokens of the rows are the same, and the store's table of tokens is not."""
    whole = [wb.Corpus(texts, packed=True).count(llama).tokens_hash for texts in (["ab", "c"], ["a", "bc"])]
    assert whole[0] != whole[1]
    hashes = set()
    for name in ("x", "y"):
        (tmp_path / "c.jsonl").write_text(json.dumps({"id": name, "text": "ab"}))
        hashes.add(wb.Corpus(tmp_path / "c.jsonl").count(llama).tokens_hash)
    assert len(hashes) == 2


def test_a_corpus_can_be_read_again_and_is_read_lazily(llama):
    read = []

    class Endless:
        features = None

        def __iter__(self):
            for i in range(10**9):
                read.append(i)
                yield {"text": "ab" * 50}

    corpus = wb.Corpus(Endless(), length=50, max_tokens=5_000)
    one, other = (corpus.count(llama) for _ in range(2))
    assert one == other
    assert one.tokens == 5_000
    assert len(read) < 2_000


def test_strata_are_of_the_first_kind_that_fits():
    tokens, positions = np.array([0, 9, 0, 9, 9, 0, 9]), np.array([0, 1, 2, 3, 4, 5, 6])
    found = strata(tokens, positions, special=np.array([0]))
    assert [STRATA[i] for i in found] == ["first", "early", "early", "early", "ordinary", "special", "ordinary"]


def test_texts_files_and_datasets_give_the_same_documents(tmp_path, llama):
    texts = ["a dog\nwith a tail", "ein Hündchen", "b"]
    (tmp_path / "c.txt").write_bytes("\ufeff\n\na dog\r\nwith a tail\r\n\r\n \n\nein Hündchen\n\nb".encode())
    (tmp_path / "c.jsonl").write_text("\n\n".join(json.dumps({"id": f"n{i}", "body": text}) for i, text in enumerate(texts)))
    pq.write_table(pa.table({"id": [f"n{i}" for i in range(3)], "body": texts}), tmp_path / "c.parquet", row_group_size=2)
    pq.write_table(pa.table({"body": pa.array(texts).dictionary_encode()}), tmp_path / "d.parquet")

    class Streamed:
        """As an IterableDataset is: rows, features that nobody may know, and a name somewhere inside."""

        features = None
        info = SimpleNamespace(dataset_name="streamed")

        def __iter__(self):
            return ({"id": f"n{i}", "body": text} for i, text in enumerate(texts))

    for source, name, ids in (
        (texts, "texts", ["0", "1", "2"]),
        (tuple(texts), "texts", ["0", "1", "2"]),
        (tmp_path / "c.txt", "c", ["0", "1", "2"]),
        (str(tmp_path / "c.jsonl"), "c", ["n0", "n1", "n2"]),
        (tmp_path / "c.parquet", "c", ["n0", "n1", "n2"]),
        (tmp_path / "d.parquet", "d", ["0", "1", "2"]),
        (Streamed(), "streamed", ["n0", "n1", "n2"]),
    ):
        corpus = wb.Corpus(source, column="body")
        assert list(corpus.documents()) == list(zip(ids, texts, strict=True)), source
        assert corpus.source.name == name
        assert corpus.count(llama).documents == 3


def test_nothing_is_no_text_and_no_name(tmp_path, llama):
    pq.write_table(pa.table({"text": ["a", None, "c"], "id": ["x", None, "z"]}), tmp_path / "c.parquet")
    corpus = wb.Corpus(tmp_path / "c.parquet")
    assert list(corpus.documents()) == [("x", "a"), ("1", ""), ("z", "c")]
    assert corpus.count(llama)[:3] == (3, 2, 2)


def test_a_shipped_corpus_is_known_by_its_name_alone(tmp_path, llama):
    assert wb.Corpus("handbook", column="whatever", max_tokens=5).count(llama).tokens == 5
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "mine.parquet")
    with pytest.raises(BadCorpus, match="is no file, and no shipped corpus"):
        wb.Corpus(tmp_path / "mine")
    assert set(sources.shipped()) == {"wikipedia", "wordnet", "handbook"}


def broken_parquet(path, *, keep=None, at=None):
    pq.write_table(pa.table({"text": [f"some text {i * i}" for i in range(5000)]}), path, compression="gzip")
    data = bytearray(path.read_bytes())
    if at is not None:
        data[at : at + 400] = b"\xff" * 400
    path.write_bytes(data[:keep])


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        ("missing.txt", None, r"missing\.txt' is no file, and no shipped corpus\. Shipped ones: handbook, .*Mend the path"),
        ("c.csv", b"a,b", r"c\.csv' is none of \.txt, \.jsonl, \.parquet\. Write the texts in one of these"),
        ("c.txt", b"", r"Corpus 'c' is empty: no document in it gives a token\. Give it some text"),
        ("c.txt", b"\n \n", "is empty: no document in it gives a token"),
        ("c.jsonl", b"", "is empty"),
        ("c.jsonl", b'{"text": ""}\n', "is empty"),
        ("c.txt", b"a\nb\x00c", r"c\.txt' is no text: line 2 holds a zero byte\. Give a file of UTF-8 text"),
        ("c.txt", b"ab\n" * 9000 + b"caf\xe9\n", r"is no UTF-8 text \(.* at byte 3 of line 9001\)\. Convert it"),
        ("c.txt", b"\x1f\x8b\x08\x00", "is no text: line 1 holds a zero byte"),
        ("c.jsonl", b'{"text": "a"}\n{"text": \n', r"Line 2 of .* is no JSON \(.*\)\. Mend it, or take the line out"),
        ("c.jsonl", b'["a"]\n', r"Line 1 of .* has no text in 'text'; it has list\. Name it with column="),
        ("c.jsonl", b'\n{"body": "a", "n": 1}\n', r"Line 2 of .* has no text in 'text'; it has body, n\. Name it with column="),
        ("c.jsonl", b'{"text": 7}\n', "has no text in 'text'; it has text"),
        ("c.jsonl", b'{"id": "x", "text": "a\\ud800"}\n', r"Document 0 \('x'\) is no text: character 1 is half of a surrogate"),
        ("c.parquet", b"PAR1 no", r"c\.parquet' cannot be read as Parquet \(.*\)\. Write it again"),
    ],
)
def test_what_is_no_corpus_is_said_to_be_none(name, content, text, tmp_path, llama):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(BadCorpus, match=text):
        list(wb.Corpus(tmp_path / name).rows(llama))


@pytest.mark.parametrize("damage", [{"keep": -200}, {"keep": 3000}, {"at": 3000}])
def test_a_broken_parquet_file_is_named(damage, tmp_path, llama):
    broken_parquet(tmp_path / "c.parquet", **damage)
    with pytest.raises(BadCorpus, match=r"c\.parquet' cannot be read as Parquet \(.*\)\. Write it again"):
        list(wb.Corpus(tmp_path / "c.parquet").rows(llama))


def test_a_column_that_is_not_there_or_holds_no_text(tmp_path, llama):
    pq.write_table(pa.table({"body": ["a"], "n": [1]}), tmp_path / "c.parquet")
    with pytest.raises(BadCorpus, match=r"has no column 'text'; it has body, n\. Name it with column="):
        list(wb.Corpus(tmp_path / "c.parquet").rows(llama))
    with pytest.raises(BadCorpus, match=r"Column 'n' of .* holds int64, no text\. Name another with column="):
        list(wb.Corpus(tmp_path / "c.parquet", column="n").rows(llama))
    dataset = type("Rows", (), {"features": None, "__iter__": lambda self: iter([{"body": "a", "n": 1}])})()
    with pytest.raises(BadCorpus, match=r"The dataset has no column 'text'; it has body, n\. Name the column with column="):
        list(wb.Corpus(dataset).rows(llama))
    with pytest.raises(BadCorpus, match=r"Column 'n' of the dataset holds a int, no text, in row 0"):
        list(wb.Corpus(dataset, column="n").rows(llama))


def test_a_file_that_cannot_be_opened_is_named(tmp_path, llama, monkeypatch):
    (tmp_path / "c.txt").write_text("a")
    corpus = wb.Corpus(tmp_path / "c.txt")
    (tmp_path / "c.txt").unlink()
    with pytest.raises(BadCorpus, match=r"c\.txt' cannot be read \(No such file or directory\)"):
        list(corpus.rows(llama))


@pytest.mark.parametrize(
    ("source", "text"),
    [
        (7, r"A corpus cannot be made of a int\. Give a list of texts"),
        ({"train": 1}, "cannot be made of a dict"),
        (b"bytes", "cannot be made of a bytes"),
        (["a", None], r"Text 1 is a NoneType, not a string\. Give a list of strings"),
        (
            "a whole text " * 500,
            "…' is no file, and no shipped corpus.*texts themselves are given as a list",
        ),
    ],
)
def test_what_no_corpus_can_be_made_of(source, text):
    with pytest.raises(BadCorpus, match=text):
        wb.Corpus(source)


def test_an_empty_corpus_is_refused(llama):
    for texts in ([], [""], ["", ""]):
        with pytest.raises(BadCorpus, match=r"Corpus 'texts' is empty: no document in it gives a token\. Give it some text"):
            wb.Corpus(texts).count(llama)


def test_numbers_out_of_range_are_refused():
    for options in ({"length": 1}, {"max_tokens": 0}):
        with pytest.raises(UnknownOption, match="rows need 2 tokens or more, and the corpus 1 or more"):
            wb.Corpus(["a"], **options)


def test_a_corpus_that_may_be_endless_is_told():
    class Streaming:
        features = ("text",)

        def __iter__(self):
            while True:
                yield {"text": "on and on"}

    assert not wb.Corpus(Streaming()).is_finite
    assert wb.Corpus(Streaming(), max_tokens=9).is_finite
    assert wb.Corpus(["a text"]).is_finite
