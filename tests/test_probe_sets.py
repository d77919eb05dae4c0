"""The probe sets of `data/probes/` are what `probes.json` says of them, and ask what they say they ask."""

import hashlib
import json
from collections import Counter, defaultdict
from functools import cache
from pathlib import Path

import pyarrow.parquet as pq
import pytest

PROBES = Path(__file__).parents[1] / "data" / "probes"
SAID = json.loads((PROBES / "probes.json").read_text())
CLASSES = [name for name, said in SAID.items() if said["kind"] == "classes"]
NUMBERS = {
    "mouse": "mice",
    "child": "children",
    "man": "men",
    "woman": "women",
    "foot": "feet",
    "wife": "wives",
    "wolf": "wolves",
    "crisis": "crises",
    "dog": "dogs",
    "city": "cities",
    "box": "boxes",
}
TENSES = {"go": "went", "take": "took", "walk": "walked", "buy": "bought", "stop": "stopped", "carry": "carried"}
PLACES = {
    "Paris": (48.86, 2.35),
    "Tokyo": (35.68, 139.69),
    "Nairobi": (-1.29, 36.82),
    "Buenos Aires": (-34.60, -58.38),
    "Sydney": (-33.87, 151.21),
    "Chicago": (41.88, -87.63),
    "Brazil": (-15.79, -47.88),
    "Netherlands": (52.37, 4.90),
}

every_set = pytest.mark.parametrize("name", SAID)
every_set_of_classes = pytest.mark.parametrize("name", CLASSES)


@cache
def rows(name: str) -> list[dict]:
    return pq.read_table(PROBES / f"{name}.parquet").to_pylist()


def target(row: dict) -> str:
    return row["text"][slice(*row["target"])]


def test_every_file_is_described():
    assert {path.stem for path in PROBES.glob("*.parquet")} == set(SAID)
    assert sum(path.stat().st_size for path in PROBES.rglob("*") if path.is_file()) < 1_500_000


@every_set
def test_the_file_is_the_one_described(name):
    said, found = SAID[name], rows(name)
    assert hashlib.sha256((PROBES / f"{name}.parquet").read_bytes()).hexdigest() == said["sha256"]
    assert 1_500 <= len(found) == said["rows"] <= 4_000
    assert 100 <= len({row["group"] for row in found}) == said["groups"]
    assert len({row["type"] for row in found}) == said["types"]
    assert all(list(row) == list(said["columns"]) for row in found)


@every_set
def test_licences_and_attributions_are_there(name):
    assert SAID[name]["licence"]
    for source in SAID[name]["sources"]:
        assert source["licence"]
        assert source["attribution"]
        assert all((PROBES / text).stat().st_size > 500 for text in source["licence_texts"])


def test_no_licence_is_there_for_nothing():
    named = {PROBES / text for said in SAID.values() for source in said["sources"] for text in source["licence_texts"]}
    assert named == set((PROBES / "LICENSES").iterdir())


@every_set
def test_ids_are_unique_and_in_the_order_of_their_hashes(name):
    ids = [row["id"] for row in rows(name)]
    assert len(set(ids)) == len(ids)
    assert ids == sorted(ids, key=lambda one: hashlib.sha256(one.encode()).digest())
    assert all(one.startswith(f"{name}/") for one in ids)
    assert len({row["text"] for row in rows(name)}) == len(ids)


@every_set
def test_targets_lie_in_the_text(name):
    for row in rows(name):
        start, end = row["target"]
        assert row["text"] == row["text"].strip(), row["id"]
        assert 0 <= start < end <= len(row["text"]), row["id"]
        assert target(row) == target(row).strip(), row["id"]
        # Whole words: no letter stands right before or behind.
        assert not (row["text"][:start][-1:] + row["text"][end : end + 1]).isalpha(), row["id"]


@every_set
def test_nothing_is_empty(name):
    may_be = {"template"} if not rows(name)[0]["template"] else set()
    for row in rows(name):
        assert all(value not in ("", None) for column, value in row.items() if column not in may_be), row["id"]


@every_set_of_classes
def test_classes_are_as_large_as_described(name):
    counts = Counter(row["label"] for row in rows(name))
    assert counts == SAID[name]["classes"]
    assert max(counts.values()) == min(counts.values())
    groups = defaultdict(set)
    for row in rows(name):
        groups[row["label"]].add(row["group"])
    assert all(len(found) >= 2 for found in groups.values())


@every_set_of_classes
def test_a_template_does_not_tell_the_class(name):
    counts = defaultdict(Counter)
    for row in rows(name):
        counts[row["template"]][row["label"]] += 1
    for template, found in counts.items():
        assert set(found) == set(SAID[name]["classes"]), template
        assert max(found.values()) == min(found.values()), template


@pytest.mark.parametrize("name", ["number", "subject_number", "tense", "gender", "gender_names", "sentiment"])
def test_a_type_recurs_in_templates(name):
    templates, labels = defaultdict(set), defaultdict(set)
    for row in rows(name):
        templates[row["type"]].add(row["template"])
        labels[row["type"]].add(row["label"])
    assert min(map(len, templates.values())) >= 3
    # Each word is of one class, so the class of a name never depends on the row.
    assert all(len(found) == 1 for found in labels.values())


@pytest.mark.parametrize("name", ["number", "subject_number"])
def test_number_is_the_one_of_grammar(name):
    labels = {row["type"]: (row["label"], row["group"]) for row in rows(name)}
    for singular, plural in NUMBERS.items():
        assert labels[singular] == ("singular", singular)
        assert labels[plural] == ("plural", singular)
    assert "sheep" not in labels


def test_tense_is_the_one_of_grammar():
    labels = {row["type"]: (row["label"], row["group"]) for row in rows("tense")}
    for present, past in TENSES.items():
        assert labels[present] == ("present", present)
        assert labels[past] == ("past", present)
    assert not {"put", "cut", "read", "be"} & set(labels)


@pytest.mark.parametrize("name", ["number", "tense"])
def test_both_forms_are_of_one_group(name):
    forms = defaultdict(set)
    for row in rows(name):
        forms[row["group"]].add((row["type"], row["label"]))
        assert target(row) == row["type"]
    assert all(len(found) == len(SAID[name]["classes"]) for found in forms.values())


def test_the_last_noun_agrees_with_half_of_the_subjects():
    agrees = Counter()
    for row in rows("subject_number"):
        assert row["text"].endswith(target(row))
        assert target(row) != row["type"] or row["label"] == ("plural" if target(row).endswith("s") else "singular")
        agrees[target(row).endswith("s"), row["label"]] += 1
    assert len(set(agrees.values())) == 1
    assert len(agrees) == 4


def test_some_words_are_of_several_sense_classes():
    labels = defaultdict(set)
    for row in rows("sense_class"):
        labels[row["group"]].add(row["label"])
        assert row["type"] == row["group"]
    assert sum(len(found) > 1 for found in labels.values()) == SAID["sense_class"]["groups_of_several_classes"] >= 100


def test_the_occupation_does_not_tell_the_gender():
    counts = defaultdict(Counter)
    for row in rows("gender"):
        assert target(row) != row["type"]
        counts[target(row)][row["label"]] += 1
        article = row["text"][: row["target"][0]].split()[-1]
        assert article == ("an" if target(row)[0] in "aeiou" else "a"), row["id"]
    assert all(found["feminine"] == found["masculine"] for found in counts.values())


def test_both_sets_of_names_say_the_same_of_a_name():
    read, named = ({row["type"]: row["label"] for row in rows(name)} for name in ("gender", "gender_names"))
    assert read == named
    assert read["Mary"] == "feminine"
    assert read["Brian"] == "masculine"
    assert all(target(row) == row["type"] for row in rows("gender_names"))


@pytest.mark.parametrize("place", PLACES)
def test_places_are_where_they_are(place):
    found = [row for row in rows("coordinates") if row["place"] == place]
    assert len(found) == 2
    for row in found:
        assert target(row) == row["type"] == place
        assert abs(row["latitude"] - PLACES[place][0]) < 1
        assert abs(row["longitude"] - PLACES[place][1]) < 1


def test_places_are_all_over_the_world():
    found = rows("coordinates")
    cities = Counter(row["group"] for row in found if row["kind"] == "city" and row["template"] == found[0]["template"])
    assert max(cities.values()) <= 60
    assert all(-90 <= row["latitude"] <= 90 and -180 <= row["longitude"] <= 180 for row in found)


def test_polar_words_are_what_they_are():
    labels = {row["type"]: row["label"] for row in rows("sentiment")}
    assert labels["happy"] == labels["wonderful"] == "positive"
    assert labels["terrible"] == labels["sad"] == "negative"
    assert all(row["group"] == row["type"][:4] and target(row) == row["type"] for row in rows("sentiment"))


@pytest.mark.parametrize("name", ["prose_or_code", "position"])
def test_the_last_word_does_not_tell_the_class(name):
    counts = defaultdict(Counter)
    for row in rows(name):
        assert row["text"].endswith(target(row))
        assert target(row) == row["type"]
        counts[row["type"]][row["label"]] += 1
    for word, found in counts.items():
        assert set(found) == set(SAID[name]["classes"]), word
        assert len(set(found.values())) == 1, word


def test_windows_are_of_like_length():
    lengths = defaultdict(list)
    for row in rows("prose_or_code"):
        lengths[row["label"]].append(len(row["text"]))
    assert all(100 <= min(found) <= max(found) <= 250 for found in lengths.values())


def test_positions_are_those_of_the_words():
    for row in rows("position"):
        least, most = map(int, row["label"].split("-"))
        assert least <= len(row["text"].split()) <= most, row["id"]
