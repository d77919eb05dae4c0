"""Fixtures: tiny random models of every family, and the embedded real model.

A tiny model's parameters are all random, norm gains and biases included: with a fresh model's ones and zeros a wrong
gain or a dropped bias would pass unseen.
"""

import os
from collections.abc import Iterator
from functools import cache

os.environ["HF_HUB_OFFLINE"] = "1"  # no test reaches for the network; must be set before huggingface_hub is imported

import pytest
import torch
from families import FAMILIES, REPRESENTATIVE, tiny_hf, tiny_tokenizer

import workbench as wb
from workbench.embedded import DEFAULT, EMBEDDED


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


def tiny_model(family: str, **load_options) -> wb.LanguageModel:
    """A fresh one, whose weights may be changed."""
    return wb.load(tiny_hf(family), tokenizer=tiny_tokenizer(), **load_options)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)
