"""Data sets: the same examples from every kind of source, and every faulty one named."""

import dataclasses
import json
import re

import numpy as np
import pandas as pd
import pytest

from probes import Dataset, shipped_sets
from workbench.errors import BadDataset, TooFewExamples

TEXTS = ["The dog runs.", "A cat sleeps here.", "Two dogs run.", "Many cats sleep."]
WORDS = ["dog", "cat", "dogs", "cats"]
SPANS = [[4, 7], [2, 5], [4, 8], [5, 9]]
LABELS = ["singular", "singular", "plural", "plural"]
GROUPS = ["dog", "cat", "dog", "cat"]


def table(**columns) -> pd.DataFrame:
    own = {"text": TEXTS, "label": LABELS, "target": [f"{a}:{b}" for a, b in SPANS], "group": GROUPS} | columns
    return pd.DataFrame({name: value for name, value in own.items() if value is not None})


def same(one: Dataset, other: Dataset) -> None:
    assert one.settings["dataset_hash"] == other.settings["dataset_hash"]
    assert one.texts == other.texts
    np.testing.assert_array_equal(one.spans, other.spans)
    assert one.labels.tolist() == other.labels.tolist()
    assert one.groups.tolist() == other.groups.tolist()


LISTS = Dataset(TEXTS, LABELS, SPANS, GROUPS)


def test_lists_are_taken_as_they_are():
    assert len(LISTS) == 4
    assert LISTS.texts == tuple(TEXTS)
    assert LISTS.classes.tolist() == ["plural", "singular"]
    assert LISTS.index.tolist() == [1, 1, 0, 0]
    assert LISTS.groups.tolist() == [["dog"], ["cat"], ["dog"], ["cat"]]
    assert LISTS.types.tolist() == WORDS
    assert repr(LISTS) == "Dataset('examples': 4 examples, plural 2, singular 2; 2 groups)"


@pytest.mark.parametrize("ending", [".csv", ".tsv", ".parquet", "table"])
def test_every_source_gives_the_same_examples(tmp_path, ending):
    path = tmp_path / f"animals{ending}"
    if ending == ".parquet":
        table(target=SPANS).to_parquet(path)
    elif ending != "table":
        table().to_csv(path, index=False, sep="\t" if ending == ".tsv" else ",")
    found = Dataset.load(table() if ending == "table" else path)
    same(found, LISTS)
    assert found.name == ("table" if ending == "table" else "animals")
    if ending != "table":
        same(Dataset.load(str(path)), LISTS)


@pytest.mark.parametrize("target", [SPANS, [tuple(span) for span in SPANS], [np.array(span) for span in SPANS], WORDS,
                                    [f" {a} : {b} " for a, b in SPANS]])  # fmt: skip
def test_a_target_may_be_characters_or_words(target):
    same(Dataset.load(table(target=list(target))), LISTS)


def test_columns_may_have_any_name():
    own = table().rename(columns={"text": "t", "label": "l", "target": "w", "group": "g"})
    same(Dataset.load(own, text="t", label="l", target="w", group="g"), LISTS)
    found = Dataset.load(own, text="t", label="l", target="w", group="g", type="l")
    assert found.types.tolist() == LABELS


def test_without_a_target_the_whole_text_is_asked_about_and_without_a_group_the_words_are_one():
    found = Dataset.load(table(target=None, group=None))
    assert found.spans is None
    assert found.groups[:, 0].tolist() == [text.lower() for text in TEXTS]
    assert Dataset(["A dog", "The Dog", "a cat"], [0, 0, 1], [[2, 5], [4, 7], [2, 5]]).groups[:, 0].tolist() == [
        "dog",
        "dog",
        "cat",
    ]


def test_groups_may_be_two_columns():
    found = Dataset.load(table(template=[1, 2, 1, 2]), group=["group", "template"])
    assert found.groups.tolist() == [["dog", "1"], ["cat", "2"], ["dog", "1"], ["cat", "2"]]
    assert found.settings["groups"] == [2, 2]
    assert Dataset(TEXTS, LABELS, groups=list(zip(GROUPS, "abab", strict=True))).groups.shape == (4, 2)


def test_fractions_and_several_columns_are_numbers_whole_numbers_are_classes():
    assert Dataset.load(table(label=[0.5, 1.0, 2.0, 2.0])).kind == "numbers"
    whole = Dataset.load(table(label=[0, 1, 2, 2]))
    assert (whole.kind, whole.classes.tolist()) == ("classes", [0, 1, 2])
    asked = Dataset.load(table(label=[0, 1, 2, 2]), kind="numbers")
    assert (asked.labels.dtype, asked.labels.shape, asked.target_names) == (np.float64, (4, 1), ("label",))
    places = Dataset.load(table(north=[1, 2, 3, 4], east=[5, 6, 7, 8]), label=["north", "east"])
    assert (places.kind, places.target_names) == ("numbers", ("north", "east"))
    assert places.labels.tolist() == [[1, 5], [2, 6], [3, 7], [4, 8]]
    assert repr(places) == "Dataset('table': 4 examples of north, east, 2 groups)"
    assert Dataset(None, np.ones((3, 2)), kind="numbers").target_names == ("target 0", "target 1")


def test_rows_at_hand_need_no_texts():
    found = Dataset(None, [0, 1, 0])
    assert found.texts is None
    assert len(set(found.groups[:, 0])) == 3, "every row is a group of its own"


def test_truth_values_are_classes():
    assert Dataset(TEXTS, [True, False, True, False]).index.tolist() == [1, 0, 1, 0]


def test_the_head_is_the_first_examples():
    first = Dataset.load(table(), type="text").head(3)
    assert len(first) == 3
    same(first, Dataset(TEXTS[:3], LABELS[:3], SPANS[:3], GROUPS[:3], TEXTS[:3]))
    numbers = Dataset(None, np.arange(8.0).reshape(4, 2), kind="numbers", target_names=("a", "b")).head(2)
    assert numbers.labels.tolist() == [[0, 1], [2, 3]]
    assert numbers.target_names == ("a", "b")


def test_the_hash_changes_with_any_change():
    changes = {
        "texts": [*TEXTS[:3], "Many cats slept."], "labels": ["plural", *LABELS[1:]], "spans": [[4, 8], *SPANS[1:]],
        "groups": ["dog", "cat", "dog", "dog"], "types": ["a", "b", "c", "d"],
    }  # fmt: skip
    found = {"as it is": LISTS.settings["dataset_hash"]}
    found |= {part: dataclasses.replace(LISTS, **{part: other}).settings["dataset_hash"] for part, other in changes.items()}
    found["order"] = Dataset(TEXTS[::-1], LABELS[::-1], SPANS[::-1], GROUPS[::-1]).settings["dataset_hash"]
    assert len(set(found.values())) == len(changes) + 2
    assert Dataset(TEXTS, LABELS, SPANS, GROUPS).settings["dataset_hash"] == found["as it is"]
    json.dumps(LISTS.settings)


@pytest.mark.parametrize("name", sorted(shipped_sets()))
def test_every_shipped_set_loads(name):
    said, found = shipped_sets()[name], Dataset.load(name)
    assert (len(found), len(set(found.groups[:, 0]))) == (said["rows"], said["groups"])
    assert len(set(found.types)) == said["types"]
    assert found.about["licence"] == said["licence"]
    if name == "coordinates":
        assert (found.kind, found.target_names) == ("numbers", ("latitude", "longitude"))
        assert np.abs(found.labels).max(0).tolist() <= [90, 180]
    else:
        counts = dict(zip(found.classes.tolist(), np.bincount(found.index).tolist(), strict=True))
        assert counts == said["classes"]


# ---- What is faulty


@pytest.mark.parametrize("path", ["nowhere.csv", "nowhere.parquet", "no_such_set", "notes.txt"])
def test_a_missing_file_is_named_beside_the_shipped_sets(tmp_path, path):
    (tmp_path / "notes.txt").write_text("text,label\n")
    with pytest.raises(BadDataset, match=rf"{path}.*no shipped set.*sentiment"):
        Dataset.load(tmp_path / path)


@pytest.mark.parametrize("option", ["text", "label", "group", "target", "type"])
def test_a_missing_column_is_named_beside_those_there(option):
    with pytest.raises(BadDataset, match=r"no column 'wrong'. It has text, label, target, group"):
        Dataset.load(table(), **{option: "wrong"})


def test_a_damaged_file_is_named(tmp_path):
    damaged = tmp_path / "damaged.parquet"
    table().to_parquet(damaged)
    damaged.write_bytes(damaged.read_bytes()[:-20])
    with pytest.raises(BadDataset, match=r"damaged.parquet.*is missing or damaged"):
        Dataset.load(damaged)
    for name, content in {
        "bytes.csv": b"text,label\n\xff\xfe\x00,a\n",
        "ragged.csv": b"a,b\n1,2\n1,2,3,4\n",
        "empty.csv": b"",
    }.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(BadDataset, match=rf"(?s){name}.*cannot be read.*UTF-8"):
            Dataset.load(tmp_path / name)


@pytest.mark.parametrize(
    ("span", "words"),
    [
        ([4, 99], r"Span 4:99 of example 1 .*18 characters: 'A cat sleeps here.'"),
        ([-1, 3], "Span -1:3 of example 1"),
        ([5, 5], "Span 5:5 of example 1"),
        ([7, 4], "Span 7:4 of example 1"),
        ([1, 2], "Span 1:2 of example 1 holds no word"),
        ([1, 2, 3], r"Span of example 1 is \[1, 2, 3\]"),
        (None, "Span of example 1 is None"),
        (["a", "b"], "Span of example 1"),
        ([0, float("nan")], "Span of example 1"),
        ([0, float("inf")], "Span of example 1"),
    ],
)  # fmt: skip
def test_a_span_without_a_word_of_its_text_is_named(span, words):
    with pytest.raises(BadDataset, match=words):
        Dataset(TEXTS, LABELS, [SPANS[0], span, *SPANS[2:]])


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("wolf", r"Target 'wolf' of example 1 stands in its text 0 times: 'A cat sleeps here.'.*12:17"),
        ("ca", "0 times"),  # no whole word
        ("", "Target .* of example 1"),
        (None, "Target of example 1 is (None|nan)"),
        (3.5, "Target of example 1 is 3.5"),
        ([1, 2, 3], r"Target of example 1 is \[1, 2, 3\]"),
        (["a", "b"], "of example 1"),
        ("3:40", "Span 3:40 of example 1"),
    ],
)
def test_a_target_that_is_none_is_named(target, words):
    targets = pd.Series([SPANS[0], target, *SPANS[2:]], dtype=object)
    with pytest.raises(BadDataset, match=words):
        Dataset.load(table(target=targets))


def test_words_that_stand_in_a_text_twice_are_named():
    with pytest.raises(BadDataset, match="'dog' of example 0 stands in its text 2 times"):
        Dataset.load(table(text=["dog eats dog", *TEXTS[1:]], target=WORDS))
    same(Dataset.load(table(target=["4:7", *WORDS[1:]])), LISTS)


@pytest.mark.parametrize("text", ["", "  \n", None, float("nan"), 5])
def test_an_empty_text_is_named(text):
    with pytest.raises(BadDataset, match=r"Text 2 of 'table' is .*a text of a word or more"):
        Dataset.load(table(text=[*TEXTS[:2], text, TEXTS[3]], target=None))


@pytest.mark.parametrize("label", [None, float("nan"), ""])
def test_a_missing_label_is_named(tmp_path, label):
    own = table(label=["a", label, label, "b"])
    with pytest.raises(BadDataset, match=r"Example 1 of 'table' has no label, and 1 more"):
        Dataset.load(own)
    own.to_csv(tmp_path / "own.csv", index=False)
    with pytest.raises(BadDataset, match=r"Example 1 of 'own' has no label, and 1 more"):
        Dataset.load(tmp_path / "own.csv")
    with pytest.raises(BadDataset, match="Example 1 of 'examples' has no label, and 1 more"):
        Dataset(TEXTS, ["a", label, label, "b"])


def test_words_that_pandas_takes_for_missing_are_labels_too(tmp_path):
    table(label=["None", "NA", "None", "nan"]).to_csv(tmp_path / "own.csv", index=False)
    assert Dataset.load(tmp_path / "own.csv").classes.tolist() == ["NA", "None", "nan"]


def test_one_class_is_too_few():
    with pytest.raises(TooFewExamples, match=r"All 4 examples of 'examples' are labelled 'a'.*two.* or more"):
        Dataset(TEXTS, ["a"] * 4)


def test_no_examples_are_named():
    with pytest.raises(BadDataset, match="'examples' has no examples"):
        Dataset([], [])


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ({"texts": TEXTS[:3]}, "4 labels and 3 texts"),
        ({"spans": SPANS[:3]}, "4 texts and 3 spans"),
        ({"groups": GROUPS[:3]}, "4 labels and 3 groups"),
        ({"types": WORDS[:3]}, "4 labels and 3 types"),
    ],
    ids=lambda one: "" if isinstance(one, str) else next(iter(one)),
)
def test_lengths_that_differ_are_named(parts, words):
    with pytest.raises(BadDataset, match=words):
        Dataset(**({"texts": TEXTS, "labels": LABELS} | parts))


def test_a_third_column_of_groups_is_not_passed_over():
    """Examples are held out by two at most: by a third, what is tested would be learnt from."""
    with pytest.raises(BadDataset, match="groups"):
        Dataset(TEXTS, LABELS, groups=[[1, 2, 3]] * 4)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_a_target_that_is_no_finite_number_is_named(wrong):
    labels = np.ones((4, 2))
    labels[2, 1] = wrong
    with pytest.raises(BadDataset, match="Target of example 2 of 'examples' is no finite number"):
        Dataset(TEXTS, labels, kind="numbers")


def test_labels_that_are_no_numbers_are_named():
    with pytest.raises(BadDataset, match=r"Labels \['label'\] of 'table' are no numbers.*kind='classes'"):
        Dataset.load(table(), kind="numbers")
    with pytest.raises(BadDataset, match="numbers"):
        Dataset(TEXTS, LABELS, kind="numbers")


def test_labels_of_several_kinds_or_columns_are_named():
    with pytest.raises(BadDataset, match=re.compile("label", re.IGNORECASE)):
        Dataset.load(table(label=pd.Series(["a", 1, "b", 2], dtype=object)))
    with pytest.raises(BadDataset, match=re.compile("label", re.IGNORECASE)):
        Dataset(TEXTS, [["a", "b"]] * 4)


def test_whole_numbers_are_classes_even_where_one_is_missing(tmp_path):
    """A missing one makes fractions of a column of 0 and 1, which no one meant to regress on."""
    table = pd.DataFrame({"text": TEXTS, "label": [0.0, 1.0, 0.0, 1.0]})
    assert Dataset.load(table).kind == "classes"
    assert Dataset.load(table.assign(label=[0.0, 1.5, 0.0, 1.0])).kind == "numbers"
    with pytest.raises(BadDataset, match="Example 1 of 'table' has no label"):
        Dataset.load(table.assign(label=[0.0, None, 0.0, 1.0]))


def test_a_missing_group_is_named_and_not_taken_for_one():
    table = pd.DataFrame({"text": TEXTS, "label": LABELS, "group": ["a", None, "b", "c"]})
    with pytest.raises(BadDataset, match="Row 1 of 'table' has no group"):
        Dataset.load(table)


def test_a_time_of_day_is_not_taken_for_characters():
    table = pd.DataFrame({"text": ["at 10:30 we met there"] * 2, "label": ["a", "b"], "target": ["10:30", "3:8"]})
    with pytest.raises(BadDataset, match="could be characters, or the words"):
        Dataset.load(table)
