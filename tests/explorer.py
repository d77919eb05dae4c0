"""What tests of the explorer share: a place of its own for the app, a model folder, results on disk, and its screens."""

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from streamlit.testing.v1 import AppTest
from streamlit.util import calc_hash
from typer.testing import CliRunner

import app
from workbench.cli import app as cli

MAIN = Path(app.__file__).parent / "main.py"
sys.path.append(str(MAIN.parent))
"""As Streamlit's server does. Else every run of a page adds it and takes it away, and an import in another thread that reads
the path meanwhile misses an entry."""
PROMPT = "a dog"


def command(*words: object) -> Any:
    """A line of the command line, in this process."""
    done = CliRunner().invoke(cli, [str(word) for word in words])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done


def made(*words: object) -> None:
    """The same, which must end well."""
    done = command(*words)
    assert done.exit_code == 0, done.stderr


def write_texts(path: Path) -> Path:
    path.write_text("\n\n".join(" ".join(f"word{(i * 7 + j * j) % 97}" for j in range(12)) for i in range(30)))
    return path


def write_letters(path: Path) -> Path:
    """The last letter says the class; letters of one word are held out together."""
    random = np.random.default_rng(0)
    words = ["".join(random.choice(list("abcdefgh"), 4)) for _ in range(60)]
    rows = [
        {"text": f"{start} {word}", "label": "ad"[word[-1] > "d"] + "x", "group": word} for word in words for start in "abc"
    ]
    pd.DataFrame(rows).to_csv(path, index=False)
    return path


def make_runs(folder: Path, model: Path) -> None:
    """A result of each kind that a screen opens, as the command line makes it."""
    of = ("--model", model)
    texts = ("--corpus", write_texts(folder.with_name("texts.txt")))
    letters = ("--data", write_letters(folder.with_name("letters.csv")))
    made("map-neurons", *of, "--side", "all", "--no-plot", "--out", folder / "map")
    made("top-activations", *of, *texts, "--sites", "mlp_post.1", "--out", folder / "top")
    made("probe", *of, *letters, "--site", "resid_post.0,resid_post.1", "--no-controls", "--out", folder / "probe")
    made(
        "erase", *of, *letters, "--site", "resid_post.0", "--eraser", "leace,random", "--no-mlp", "--answers", "ax=a,dx=d",
        "--follow", "--tokens", 40, "--out", folder / "erase",
    )  # fmt: skip
    made("linearity", *of, *texts, "--no-damage", "--no-null", "--out", folder / "linearity")
    made(
        "transport", *of, *texts, "--pairs", "1>2,0>3", "--directions", "random:3", "--routes", 0, "--damage", 0,
        "--fisher-tokens", 50, "--out", folder / "transport",
    )  # fmt: skip
    made("fit-lens", *of, *texts, "--out", folder / "lens")


def screen(path: str = "home", **view: object) -> AppTest:
    """A screen as a link opens it, in a browser tab of its own."""
    opened = AppTest.from_file(str(MAIN), default_timeout=60)
    opened._page_hash = calc_hash("" if path == "home" else path)  # by name, AppTest only knows pages that are files
    for name, value in view.items():
        opened.query_params[name] = str(value)
    return opened.run()


def said(elements: Iterable[Any]) -> str:
    """All texts of some elements."""
    return "\n".join(str(one.value) for one in elements)


def lines_of(opened: AppTest) -> list[str]:
    """Command lines that stand on a screen, in its cards."""
    return [one.value for one in opened.code if one.language == "bash"]


def tables(opened: AppTest) -> list[pd.DataFrame]:
    return [one.value for one in opened.dataframe]


def with_columns(opened: AppTest, *names: str) -> list[pd.DataFrame]:
    """Tables on a screen that have these columns."""
    return [table for table in tables(opened) if set(names) <= set(table.columns)]
