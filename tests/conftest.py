"""Fixtures: tiny random models of every family, and the embedded real model.

A tiny model's parameters are all random, norm gains and biases included: with a fresh model's ones and zeros a wrong
gain or a dropped bias would pass unseen.
"""

import os
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # no test reaches for the network; must be set before huggingface_hub is imported

import pytest
import torch
from families import FAMILIES, REPRESENTATIVE, tiny_hf, tiny_tokenizer
from filelock import FileLock

import workbench as wb
from workbench.embedded import DEFAULT, EMBEDDED

collect_ignore = ["browser"]
"""Needs a browser and playwright: asked for by name, `pytest tests/browser -p no:xdist`."""


@pytest.fixture(scope="session", autouse=True)
def own_run_log(tmp_path_factory) -> Iterator[None]:
    """Verbs that tests call are never seen in the user's own log of runs."""
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("WORKBENCH_RUNS", str(tmp_path_factory.mktemp("runs")))
        yield


@pytest.fixture(params=sorted(FAMILIES))
def family(request) -> str:
    """Name of a tiny model: every row of `architectures`, with the variants that its config allows."""
    return request.param


by_trait = pytest.mark.parametrize(
    "family",
    [name if name in REPRESENTATIVE else pytest.param(name, marks=pytest.mark.slow) for name in sorted(FAMILIES)],
)
"""For tests that run the same lines for families of the same traits: only `make test-all` tries those that repeat others."""


@pytest.fixture
def tiny(family: str) -> wb.LanguageModel:
    """A tiny random model of the family, the same for all tests. Do not change its weights."""
    return _unchanged(family)


@cache
def _unchanged(family: str) -> wb.LanguageModel:
    return tiny_model(family, check=False)  # test_verification checks every one


@pytest.fixture(scope="session")
def llama() -> wb.LanguageModel:
    """One tiny model, for tests that the family does not matter to. Do not change its weights."""
    return _unchanged("llama")


@pytest.fixture(scope="session")
def smollm() -> wb.LanguageModel:
    """The embedded real model. Its download is part of the set-up: a missing one is a failure, never a skip."""
    if not EMBEDDED[DEFAULT].is_pulled:
        pytest.fail("The embedded model is not here. Run `workbench pull` first (`make test` does).", pytrace=False)
    return wb.load()


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory) -> Path:
    """A tiny model, as a model folder. Do not change it."""
    return _made_once(tmp_path_factory, "model", _save_tiny)


@pytest.fixture(scope="session")
def results(tiny_folder, tmp_path_factory) -> Path:
    """Results of the tiny model, one of each kind that the explorer's screens open. Do not change them."""
    from explorer import make_runs

    return _made_once(tmp_path_factory, "results", lambda folder: make_runs(folder, tiny_folder))


def _made_once(tmp_path_factory, name: str, make: Callable[[Path], Any]) -> Path:
    """A folder for all processes of pytest: the first that asks makes it."""
    own = tmp_path_factory.getbasetemp()
    folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / name
    with FileLock(f"{folder}.lock"):
        if not (whole := folder.with_name(f"{name}.whole")).exists():
            make(folder)
            whole.touch()
    return folder


def _save_tiny(folder: Path) -> None:
    tiny_hf("llama").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)


@pytest.fixture
def explorer(tiny_folder, tmp_path, monkeypatch) -> Path:
    """The explorer's own folders, for one test: it opens with the tiny model, and there are no results yet."""
    runs = tmp_path / "runs"
    runs.mkdir()
    monkeypatch.setenv("WORKBENCH_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("WORKBENCH_APP_MODEL", str(tiny_folder))
    monkeypatch.setenv("WORKBENCH_APP_RUNS", str(runs))
    monkeypatch.delenv("WORKBENCH_APP_MAPS", raising=False)
    return runs


@pytest.fixture
def shown_results(explorer, results, monkeypatch) -> Path:
    """The same, with results on disk."""
    monkeypatch.setenv("WORKBENCH_APP_RUNS", str(results))
    return results


def tiny_model(family: str, **load_options) -> wb.LanguageModel:
    """A fresh one, whose weights may be changed."""
    return wb.load(tiny_hf(family), tokenizer=tiny_tokenizer(), **load_options)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)
