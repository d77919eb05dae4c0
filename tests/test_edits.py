"""Edits as values: made, printed, saved, read again; bad ones named."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import workbench as wb
from workbench.edits.files import from_json, to_json
from workbench.edits.passing import Pass
from workbench.errors import BadArtifact, NotFinite, UnknownOption, UnknownSite


def all_kinds(model):
    acts = wb.capture(model, ["a dog", "a cat"], ["resid_post.1", "pattern.0"])
    return [
        wb.clamp("mlp_up.1", 3, 8.0, rows=[0, 1], when="new"),
        wb.clamp("attn_scores.0", None, -torch.inf, keys=[0], heads=1),
        wb.scale("z.0", 0.5, heads=[1, 2]),
        wb.add("resid_post.0", torch.randn(model.d_model).bfloat16(), 2.0, positions=-1),
        wb.project_out("resid_post.0", torch.randn(2, model.d_model)),
        wb.ablate("resid_post.1", to="mean", source=acts),
        wb.ablate("resid_post.1", to="resample", source=acts, seed=3),
        wb.patch("resid_post.1", acts, positions=[1, 2], source_positions=[0, 1]),
        wb.patch("pattern.0", acts),
    ]


def test_edits_are_saved_and_do_the_same_again(llama, tmp_path):
    edits = all_kinds(llama)
    read = wb.load_edits(wb.save_edits(tmp_path / "edits.json", edits))
    assert list(map(repr, read)) == list(map(repr, edits))
    batch = llama.tokenize(["b dog", "b cat"])
    with torch.no_grad():
        clean = llama.forward(batch)
        for before, after in zip(edits, read, strict=True):
            with wb.intervene(llama, before):
                first = llama.forward(batch)
            with wb.intervene(llama, after):
                assert torch.equal(llama.forward(batch), first)
            assert torch.equal(first, clean) == (before.when == "new")  # nothing new here: the others all do something


def test_the_file_is_plain_json_without_what_has_its_default(tmp_path):
    path = wb.save_edits(tmp_path / "edits.json", [wb.clamp("mlp_up.12", 345, 8.0)])
    assert json.loads(path.read_text()) == {"edits": [{"kind": "clamp", "site": "mlp_up.12", "neurons": [345], "value": 8.0}]}


def test_they_print_what_they_are(llama):
    shown = list(map(repr, all_kinds(llama)))
    assert shown[0] == "clamp('mlp_up.1', rows=(0, 1), neurons=(3,), when='new', value=8.0)"
    assert shown[3] == "add('resid_post.0', positions=(-1,), vector=[32], factor=2.0)"
    assert "values={resid_post.1: [2 x 5 x 32]}" in shown[7]


@settings(max_examples=50, deadline=None)
@given(
    dtype=st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16]),
    shape=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    seed=st.integers(0, 1000),
)
def test_tensors_survive_json_bitwise(dtype, shape, seed):
    vector = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    read = from_json(json.loads(json.dumps(to_json(wb.add("z.0", vector)))))
    assert read.vector.dtype == dtype
    assert torch.equal(read.vector, vector)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_positions_mean_the_same_with_a_cache_and_padding_on_either_side(data):
    """Whatever the padding and however the tokens are split into a prompt and single steps: every token is given its number
    among its row's real ones, and the keys all of theirs."""
    lengths = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=3))
    new = data.draw(st.integers(0, 3))
    left = data.draw(st.booleans()) or new > 0
    width = max(lengths)
    real = [[False] * (width - n) + [True] * n if left else [True] * n + [False] * (width - n) for n in lengths]
    mask = torch.tensor(real)
    at = Pass.of(mask, width)
    for row, n in zip(at.positions.tolist(), lengths, strict=True):
        assert [one for one in row if one >= 0] == list(range(n))
        assert row.count(-1) == width - n
    assert at.lengths.tolist() == lengths
    for step in range(new):
        mask = torch.cat([mask, torch.ones(len(lengths), 1, dtype=torch.bool)], 1)
        at = Pass.of(mask, 1, torch.tensor(lengths))
        assert at.positions[:, 0].tolist() == [n + step for n in lengths]
        assert at.lengths.tolist() == lengths
        assert (at.positions >= at.lengths[:, None]).all()
        assert torch.equal(at.over_keys(1).positions, at.positions)
        whole = Pass.of(mask, mask.shape[1], torch.tensor(lengths))  # the same without a cache
        assert torch.equal(whole.positions, at.keys)


def test_indices_of_numpy_and_torch_are_indices():
    assert wb.scale("z.0", 2.0, heads=np.int64(3)).heads == (3,)
    assert wb.scale("z.0", 2.0, neurons=torch.tensor([1, 2]), positions=range(3)).positions == (0, 1, 2)


def test_functions_cannot_be_saved(tmp_path):
    with pytest.raises(UnknownOption, match=r"replace\('z.0'.* is a Python function and cannot be saved"):
        wb.save_edits(tmp_path / "edits.json", [wb.replace("z.0", torch.neg)])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", r"holds no edits. It should be \{\"edits\""),
        (
            '{"edits": [{"kind": "explode", "site": "z.0"}]}',
            "An edit of the kind 'explode' is not known. Kinds are clamp, scale",
        ),
        ('{"edits": [{"kind": "replace", "site": "z.0"}]}', "An edit of the kind 'replace' is not known"),
        (
            '{"edits": [{"kind": "clamp", "site": "z.0"}]}',
            "The edit 'clamp' cannot be read: missing a required argument: 'value' It has the fields site, rows",
        ),
        ('{"edits": [{"kind": "clamp", "site": "z.0", "value": "many"}]}', "could not convert string to float: 'many'"),
        ('{"edits": [{"kind": "scale", "site": "z.0", "factor": 1, "colour": 3}]}', "unexpected keyword argument 'colour'"),
        ('{"edits": [3]}', "An edit of the kind None is not known"),
        ('{"edits": [{"kind": ["clamp"]}]}', "is not known"),
        ('{"edits": [{"kind": "clamp", "site": "z.0", "value": 1, "rows": [1.5]}]}', "cannot be read: rows="),
        ('{"edits": [{"kind": "clamp", "site": "z.0", "value": 1, "rows": [true]}]}', "cannot be read: rows="),
        ('{"edits": [{"kind": "add", "site": "z.0", "vector": [1, 2]}]}', "The edit 'add' cannot be read"),
        ('{"edits": [{"kind": "add", "site": "z.0", "vector": {"shape": [1], "base64": "AAAA"}}]}', "'dtype' is missing"),
        (
            '{"edits": [{"kind": "add", "site": "z.0", "vector": {"dtype": "float32", "shape": [7], "base64": "AAAAAA=="}}]}',
            "The edit 'add' cannot be read",
        ),
        (
            '{"edits": [{"kind": "add", "site": "z.0", "vector": {"dtype": "float32", "shape": [1], "base64": "AADAfw=="}}]}',
            "it holds NaN or infinity",
        ),
        ('{"edits": [{"kind": "mean", "site": "z.0", "values": [1]}]}', "The edit 'mean' cannot be read"),
    ],
)
def test_bad_files_are_named(tmp_path, text, message):
    (tmp_path / "edits.json").write_text(text)
    with pytest.raises(BadArtifact, match=message):
        wb.load_edits(tmp_path / "edits.json")


def test_bad_edits_are_named_when_they_are_made(llama):
    acts = wb.capture(llama, "a dog", ["resid_post.1", "pattern.1"])
    cases = [
        (lambda: wb.clamp("z.0", 0, 1.0, positions="first"), UnknownOption, "positions='first' is not understood"),
        (lambda: wb.clamp("z.0", 0, 1.0, rows=[]), UnknownOption, r"rows=\[\] chooses nothing"),
        (lambda: wb.clamp("z.0", 0, 1.0, positions=1.5), UnknownOption, "positions=1.5 is not understood"),
        (lambda: wb.add("z.0", torch.tensor([torch.nan])), NotFinite, "add: the vector holds NaN or infinity"),
        (lambda: wb.project_out("z.0", torch.zeros(8)), UnknownOption, "all directions are zero"),
        (lambda: wb.ablate("z.0", source=acts), UnknownOption, "takes no source="),
        (lambda: wb.clamp("z.0", 0, 1.0, rows=[True, False]), UnknownOption, r"rows=\[True, False\] is not understood"),
        (
            lambda: wb.patch("pattern.1", acts, positions=[1], source_positions=[2]),
            UnknownOption,
            "what a token looks at from another position are other tokens",
        ),
        (lambda: wb.ablate("z.0", to="mean"), UnknownOption, r"ablate\(to='mean'\) needs source="),
        (lambda: wb.ablate("z.0", to="mean", source=acts), UnknownOption, "The source has no 'z.0'; it has resid_post.1"),
        (lambda: wb.ablate("pattern.1", to="mean", source=acts), UnknownSite, "Ablate it to zero"),
        (lambda: wb.patch("resid_post.1", acts, positions=[1], source_positions=[1, 2]), UnknownOption, "2 source_positions"),
        (
            lambda: wb.patch("resid_post.1", wb.capture(llama, "a dog", "resid_post.1", positions="last")),
            UnknownOption,
            "the source was captured at some positions only",
        ),
    ]  # fmt: skip
    for make, raised, text in cases:
        with pytest.raises(raised, match=text):
            make()
