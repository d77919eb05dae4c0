"""Erasers in models and on disk: edits that do what transform does, files that are refused, other models and sites."""

import json
from typing import Any

import numpy as np
import pytest
import torch
from planted import blobs, close
from safetensors.torch import load_file, save_file
from sklearn.exceptions import NotFittedError

import workbench as wb
from probes import INLP, LEACE, RLACE, SAL, Eraser, MeanProjection, OracleLEACE, RandomSubspace, load_erasers, save_erasers
from workbench.edits.kinds import ProjectOut
from workbench.errors import BadArtifact, OtherJob, UnknownOption
from workbench.transports.transport import of_model

SITE = "resid_post.0"
TEXTS = ["a dog and a cat", "b dog"]


@pytest.fixture(scope="module")
def states(llama) -> torch.Tensor:
    """Of a tiny model's tokens, with a label planted in them."""
    acts = wb.capture(llama, TEXTS, SITE)
    return acts[SITE][acts.mask].double()


def eraser_of(states: torch.Tensor, eraser: Eraser, seed: int = 0) -> Eraser:
    """Fitted to rows spread about the states."""
    random = torch.Generator().manual_seed(seed)
    y = torch.randint(0, 3, (400,), generator=random)
    noise = torch.randn(400, states.shape[1], generator=random, dtype=torch.float64)
    rows = states.mean(0) + states.std() * (noise * torch.linspace(0.3, 2, states.shape[1])).add(y[:, None] * noise[0])
    return eraser.fit(rows, y)


@pytest.mark.parametrize("eraser", [LEACE(), MeanProjection(), RandomSubspace(5), RandomSubspace(0)], ids=str)
def test_as_an_edit_it_does_to_the_models_states_what_transform_does(eraser, states, llama, tmp_path):
    own = eraser_of(states, eraser)
    edit = own.as_edit(SITE, skip=0)
    assert isinstance(edit, ProjectOut)
    read = wb.load_edits(wb.save_edits(tmp_path / "edits.json", [edit]))
    clean = wb.capture(llama, TEXTS, SITE)
    found = []
    for edits in ([edit], read):
        with wb.intervene(llama, *edits):
            after = wb.capture(llama, TEXTS, SITE)
        found.append(after[SITE][after.mask])
    torch.testing.assert_close(found[0], own.transform(clean[SITE][clean.mask]), rtol=1e-5, atol=1e-6)
    assert torch.equal(*found)
    assert torch.equal(found[0], clean[SITE][clean.mask]) == (own.rank == 0)


def test_the_first_token_is_left_alone_bitwise_unless_places_are_named(states, llama):
    own = eraser_of(states, LEACE())
    clean = wb.capture(llama, TEXTS, SITE)
    first = clean.mask.int().argmax(1)
    rows = torch.arange(len(TEXTS))
    places: list[tuple[Any, bool]] = [({}, True), ({"skip": 1}, True), ({"positions": [0]}, False), ({"skip": 0}, False)]
    for where, alone in places:
        with wb.intervene(llama, own.as_edit(SITE, **where)):
            after = wb.capture(llama, TEXTS, SITE)
        assert torch.equal(after[SITE][rows, first], clean[SITE][rows, first]) == alone
        others = clean.mask.clone()
        others[rows, first] = False
        assert torch.equal(after[SITE][others], clean[SITE][others]) == ("positions" in where)
    assert repr(own.as_edit(SITE)).startswith("project_out('resid_post.0', skip=1")


def test_an_eraser_keeps_to_its_site_and_its_model(states, llama):
    own = eraser_of(states, LEACE())
    with pytest.raises(UnknownOption, match="Name the site"):
        own.as_edit()
    own.settings_ = of_model(llama) | {"site": SITE}
    assert own.as_edit(model=llama).site == own.as_edit(SITE).site == SITE
    with pytest.raises(OtherJob, match=r"fitted to 'resid_post\.0' and is to be used at 'resid_post\.1'"):
        own.as_edit("resid_post.1")
    for changed in ({"weights_hash": "0" * 64}, {"revision": "other"}):
        own.settings_ = of_model(llama) | {"site": SITE} | changed
        with pytest.raises(OtherJob, match=r"The eraser of resid_post\.0 is of"):
            own.as_edit(model=llama)
    assert own.first(1).settings_ == own.settings_


@pytest.mark.parametrize(
    "eraser",
    [LEACE(tolerance=0.0, shrink=False), MeanProjection(), SAL(1), INLP(rounds=2), RLACE(steps=5), RandomSubspace(2)],
    ids=str,
)
def test_a_file_gives_back_what_it_was_given(eraser, states, llama, tmp_path):
    own = eraser_of(states, eraser)
    own.settings_ = of_model(llama) | {"site": SITE}
    read = Eraser.load(own.save(tmp_path / "one.safetensors"))
    assert type(read) is type(own)
    assert read.get_params() == own.get_params()
    assert read.settings_ == own.settings_
    np.testing.assert_array_equal(getattr(read, "classes_", None), getattr(own, "classes_", None))
    assert torch.equal(read.transform(states), own.transform(states))
    assert read.as_edit(model=llama).site == SITE


def test_the_file_is_a_header_of_json_and_numbers(states, tmp_path):
    own = eraser_of(states, LEACE())
    data = own.save(tmp_path / "one.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    about = header.pop("__metadata__")
    assert json.loads(about["erasers"])["eraser"]["kind"] == "LEACE"
    assert {one["dtype"] for one in header.values()} == {"F64"}
    assert len(data) == 8 + length + 8 * sum(int(np.prod(one["shape"])) for one in header.values())


def test_several_in_a_file_are_read_together_alone(states, tmp_path):
    several = {name: eraser_of(states, LEACE(), seed) for seed, name in enumerate(("resid_post.0", "resid_post.1"))}
    path = save_erasers(several, tmp_path / "two.safetensors")
    read = load_erasers(path)
    assert list(read) == list(several)
    for name, own in several.items():
        close(read[name].matrix, own.matrix, 0)
    with pytest.raises(UnknownOption, match="holds several erasers"):
        Eraser.load(path)


def test_files_that_hold_no_eraser_are_refused(states, tmp_path):
    good = eraser_of(states, LEACE()).save(tmp_path / "good.safetensors")
    bad = tmp_path / "bad.safetensors"
    with pytest.raises(BadArtifact, match="missing or damaged"):
        Eraser.load(bad)
    for data in (b"", b"no", good.read_bytes()[:-9], good.read_bytes()[:100]):
        bad.write_bytes(data)
        with pytest.raises(BadArtifact, match="missing or damaged"):
            Eraser.load(bad)
    save_file({"weight": torch.ones(2)}, bad)
    with pytest.raises(BadArtifact, match="holds no erasers"):
        Eraser.load(bad)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"kind": "OracleLEACE"}, "kind 'OracleLEACE' is not known"),
        ({"kind": "os.system"}, r"kind 'os\.system' is not known"),
        ({"kind": ["LEACE"]}, "is not known"),
        ({"options": {"width": 3}}, "missing or damaged"),
        ({"options": []}, "missing or damaged"),
        (None, "missing or damaged"),
        ([], "missing or damaged"),
    ],
    ids=str,
)
def test_headers_that_make_no_eraser_are_refused(change, words, states, tmp_path):
    good = eraser_of(states, LEACE()).save(tmp_path / "good.safetensors")
    data = good.read_bytes()
    about = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
    said = json.loads(about["erasers"])
    said = {"eraser": said["eraser"] | change} if isinstance(change, dict) else change
    save_file(load_file(good), tmp_path / "bad.safetensors", about | {"erasers": json.dumps(said)})
    with pytest.raises(BadArtifact, match=words):
        Eraser.load(tmp_path / "bad.safetensors")


@pytest.mark.parametrize("part", ["center_", "read_", "write_"])
@pytest.mark.parametrize("how", ["gone", "NaN", "narrow", "flat"])
def test_tensors_that_make_no_eraser_are_refused(part, how, states, tmp_path):
    good = eraser_of(states, LEACE()).save(tmp_path / "good.safetensors")
    data = good.read_bytes()
    about = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
    tensors = load_file(good)
    name = f"eraser/{part}"
    if how == "gone":
        del tensors[name]
    elif how == "flat":  # all of them: each fits the others
        tensors |= {f"eraser/{one}": torch.zeros(len(tensors[name])).double() for one in ("center_", "read_", "write_")}
    else:
        tensors[name] = tensors[name] * torch.nan if how == "NaN" else tensors[name][:-1].contiguous()
    save_file(tensors, tmp_path / "bad.safetensors", about)
    with pytest.raises(BadArtifact, match="missing or damaged"):
        Eraser.load(tmp_path / "bad.safetensors")


def test_what_no_file_holds_is_refused_before_it_is_written(tmp_path):
    x, y = blobs(60, 4)
    with pytest.raises(UnknownOption, match="needs each row's label, so it is no map"):
        OracleLEACE().fit(x, y).save(tmp_path / "one.safetensors")
    with pytest.raises(NotFittedError, match="not fitted yet"):
        LEACE().save(tmp_path / "one.safetensors")
    assert not list(tmp_path.iterdir())
