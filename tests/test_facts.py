"""The facts of `data/facts/` are what `facts.json` says of them, right as far as it is known, and fit to edit a model by."""

import hashlib
import json
from collections import Counter, defaultdict
from pathlib import Path

import pytest

import workbench.facts as facts_module
from workbench.errors import BadArtifact, UnknownOption
from workbench.facts import shipped_facts

FACTS = Path(__file__).parents[1] / "data" / "facts"
SAID = json.loads((FACTS / "facts.json").read_text())
ALL = shipped_facts()
BY_ID = {fact.id: fact for fact in ALL}
KNOWN = {
    "capital/france": "Paris",
    "capital/netherlands": "Amsterdam",
    "capital/united-states": "Washington",
    "capital_of/tokyo": "Japan",
    "capital_of/n-djamena": "Chad",
    "continent/brazil": "South America",
    "continent/united-kingdom": "Europe",
    "continent/philippines": "Asia",
    "currency/japan": "yen",
    "currency/croatia": "euro",
    "currency/czechia": "koruna",
    "language/brazil": "Portuguese",
    "language/egypt": "Arabic",
    "country_of_city/munich": "Germany",
    "country_of_city/sao-paulo": "Brazil",
    "state_of_city/chicago": "Illinois",
    "state_of_city/miami": "Florida",
    "nationality/claude-monet": "French",
    "nationality/mark-twain": "American",
    "nationality/rene-descartes": "French",
}
ARTICLES = {"Bahamas", "Gambia", "Maldives", "Netherlands", "Philippines", "United Kingdom", "United States"}


def test_there_are_as_many_as_described():
    assert len(ALL) == SAID["facts"] >= 1_000
    assert Counter(fact.relation for fact in ALL) == {name: said["facts"] for name, said in SAID["relations"].items()}
    assert len(SAID["relations"]) >= 5


def test_the_file_is_the_one_described():
    file = (FACTS / "facts.parquet").read_bytes()
    assert hashlib.sha256(file).hexdigest() == SAID["sha256"]
    assert len(file) < 1_000_000


def test_licences_and_attributions_are_there():
    for source in SAID["sources"]:
        assert source["licence"]
        assert source["attribution"]
        assert all((FACTS / text).stat().st_size > 500 for text in source["licence_texts"])
    named = {FACTS / text for source in SAID["sources"] for text in source["licence_texts"]}
    assert named == set((FACTS / "LICENSES").iterdir())


@pytest.mark.parametrize("fact_id", KNOWN)
def test_what_everybody_knows_is_right(fact_id):
    assert BY_ID[fact_id].object == KNOWN[fact_id]


def test_ids_are_unique_and_in_the_order_of_their_hashes():
    ids = [fact.id for fact in ALL]
    assert len(BY_ID) == len(ids)
    assert ids == sorted(ids, key=lambda one: hashlib.sha256(one.encode()).digest())
    assert all(one.startswith(f"{fact.relation}/") for one, fact in BY_ID.items())


def test_wordings_hold_the_subject_and_not_the_answer():
    for fact in ALL:
        wordings = [fact.prompt, *fact.paraphrases]
        assert len(wordings) == len(set(wordings)) == 4, fact.id
        for text in wordings:
            assert fact.subject in text, text
            assert fact.object.casefold() not in text.casefold(), text
            assert text == " ".join(text.split()), text
            assert text[0].isupper() or text.startswith(fact.subject), text
            assert text[-1].isalpha() or text.endswith(fact.subject), text
        assert fact.object == fact.object.strip() != ""


def test_countries_have_their_article_in_every_wording():
    found = [fact for fact in ALL if fact.subject in ARTICLES]
    assert {fact.subject for fact in found} == ARTICLES
    for fact in found:
        assert all(f"the {fact.subject}" in text or text.startswith(f"The {fact.subject}") for text in wordings_of(fact)), (
            fact.id
        )
    assert not any("the France" in text for text in wordings_of(BY_ID["capital/france"]))


def test_no_prompt_is_asked_twice():
    prompts = Counter(text for fact in ALL for text in wordings_of(fact))
    assert max(prompts.values()) == 1


def test_the_false_object_is_an_answer_of_the_relation_and_wrong():
    answers, right = defaultdict(set), defaultdict(set)
    for fact in ALL:
        answers[fact.relation].add(fact.object)
        right[fact.relation, fact.subject].add(fact.object)
    for fact in ALL:
        assert fact.false_object in answers[fact.relation], fact.id
        assert fact.false_object not in right[fact.relation, fact.subject], fact.id
        assert fact.false_object.split()[0] != fact.object.split()[0], fact.id


def test_false_objects_are_spread_over_the_relation():
    for relation, said in SAID["relations"].items():
        drawn = Counter(fact.false_object for fact in shipped_facts([relation]))
        assert len(drawn) >= said["objects"] / 3, relation
        assert max(drawn.values()) <= said["facts"] / 3, relation


def test_neighbours_are_facts_of_the_relation_about_others():
    prompts = {(fact.prompt, fact.object): fact for fact in ALL}
    for fact in ALL:
        near = [prompts[neighbour.prompt, neighbour.object] for neighbour in fact.neighbours]
        assert len({other.id for other in near}) == 5, fact.id
        assert {other.relation for other in near} == {fact.relation}, fact.id
        assert fact.subject not in {other.subject for other in near}, fact.id
        assert fact.false_object not in {other.object for other in near}, fact.id


def test_the_nearest_neighbours_have_the_same_object():
    shared = Counter((fact.relation, fact.object) for fact in ALL)
    for fact in ALL:
        same = [neighbour.object == fact.object for neighbour in fact.neighbours]
        assert sum(same) == min(5, shared[fact.relation, fact.object] - 1), fact.id
        assert same == sorted(same, reverse=True), fact.id


def test_capitals_are_next_to_those_of_their_continent():
    continent = {fact.subject: fact.object for fact in shipped_facts(["continent"])}
    fact = BY_ID["capital/france"]
    near = [other for other in shipped_facts(["capital"]) if other.prompt in {one.prompt for one in fact.neighbours}]
    assert {continent[other.subject] for other in near if other.subject in continent} == {"Europe"}


def test_capital_and_country_turn_each_other_round():
    capitals = {(fact.subject, fact.object) for fact in shipped_facts(["capital"])}
    turned = {(fact.object, fact.subject) for fact in shipped_facts(["capital_of"])}
    assert turned < capitals


def test_relations_and_number_are_chosen():
    some = shipped_facts(["capital", "currency"], n=20)
    assert some == [fact for fact in ALL if fact.relation in ("capital", "currency")][:20]
    assert shipped_facts("capital", n=1)[0].relation == "capital"
    assert shipped_facts(n=3) == ALL[:3]


def test_an_unknown_relation_is_named_with_those_that_there_are():
    with pytest.raises(UnknownOption, match=r"relation 'mayor'\. Use some of capital, capital_of, continent, "):
        shipped_facts(["capital", "mayor"])


@pytest.mark.parametrize("n", [0, -1])
def test_less_than_one_fact_is_refused(n):
    with pytest.raises(UnknownOption, match=f"n={n} facts cannot be read"):
        shipped_facts(n=n)


def test_a_missing_file_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(facts_module, "SHIPPED", tmp_path)
    with pytest.raises(BadArtifact, match=r"facts\.parquet' does not exist\. The facts lie in the project's own checkout"):
        shipped_facts()


def test_a_damaged_file_is_named(tmp_path, monkeypatch):
    (tmp_path / "facts.parquet").write_bytes((FACTS / "facts.parquet").read_bytes()[:-1000])
    monkeypatch.setattr(facts_module, "SHIPPED", tmp_path)
    with pytest.raises(BadArtifact, match=r"facts\.parquet' is damaged"):
        shipped_facts()


def test_a_file_of_other_columns_is_named(tmp_path, monkeypatch):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"id": ["capital/france"]}), tmp_path / "facts.parquet")
    monkeypatch.setattr(facts_module, "SHIPPED", tmp_path)
    with pytest.raises(BadArtifact, match=r"facts\.parquet' is damaged"):
        shipped_facts()


def wordings_of(fact: facts_module.Fact) -> list[str]:
    return [fact.prompt, *fact.paraphrases]
