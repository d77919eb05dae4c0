"""Directions read in the vocabulary: dense float64, planted directions, and random ones that must not stand out."""

import json

import numpy as np
import pytest
import torch
from conftest import tiny_model
from families import tiny_hf, tiny_tokenizer
from safetensors.torch import save_file
from typer.testing import CliRunner

import workbench as wb
from workbench.analyses.neuron_score import Isotropic
from workbench.cli import app
from workbench.errors import BadArtifact, NotFinite, UnknownOption

K = 5


@pytest.fixture(scope="module")
def model():
    return wb.load(tiny_hf("llama"), tokenizer=tiny_tokenizer())


def decode(model, directions, **options):
    return wb.decode_directions(model, directions, k=K, progress=False, **options)


def top_ids(found, bottom=False):
    return torch.tensor((found.bottom if bottom else found.table)["token_id"].to_numpy().reshape(-1, K))


def test_tokens_are_those_of_the_dense_product(model, generator):
    rows = torch.randn(20, model.d_model, generator=generator)
    found = decode(model, rows)
    z = rows.double() @ model.weight("W_U").double()
    assert torch.equal(top_ids(found), z.sort(dim=1, descending=True, stable=True).indices[:, :K].int())
    assert torch.equal(top_ids(found, bottom=True), z.sort(dim=1, stable=True).indices[:, :K].int())
    np.testing.assert_allclose(found.table["probability"], z.softmax(1).topk(K).values.flatten().detach(), rtol=1e-5)
    assert found.table["token"].tolist() == [model.token_strings[i] for i in found.table["token_id"]]


def test_a_planted_direction_speaks_for_its_word_at_the_right_end(model):
    word = model.vocabulary.direction(17)
    found = decode(model, {"for": word, "against": -word})
    best = found.best().set_index("name")
    assert best.loc["for", "word"] == best.loc["against", "bottom_word"] == model.token_strings[17]
    assert best.loc["for", "score"] == pytest.approx(-best.loc["against", "bottom_score"], rel=1e-5)
    assert best.loc["for", "score"] > found.summary()["threshold"].iloc[0]


@pytest.mark.parametrize("decoder", ["none", "gain", "norm"])
def test_random_directions_stand_out_no_more_often_than_their_null(model, decoder):
    torch.manual_seed(5)
    found = [decode(model, torch.randn(model.d_model, model.d_model), decoder=decoder, seed=seed) for seed in range(10)]
    assert {one.settings["population"] for one in found} == {"directions without a preference"}
    # Of 640 draws at two ends 1 % is expected; 3 % or none would be five standard deviations.
    assert 0 < np.mean([one.summary()["beyond"].mean() for one in found]) < 0.03


@pytest.mark.parametrize("decoder", ["none", "gain"])
def test_closed_moments_are_those_of_many_random_directions(decoder):
    vocabulary = tiny_model("gemma2").vocabulary
    population = Isotropic(vocabulary, decoder)
    unit = population.unit(torch.randn(40_000, vocabulary.d_model, generator=torch.Generator().manual_seed(0)))
    logits = unit @ vocabulary.W_U.float()
    mean, deviation = population.token_moments
    # Where the gain is far from even, the norm of a row moves with its direction: its moments are then close, not equal.
    torch.testing.assert_close(deviation, logits.std(0), rtol=0.02 if decoder == "none" else 0.06, atol=0)
    assert (logits.mean(0) - mean).abs().max() < 0.03 * deviation.max()


@pytest.mark.parametrize("family", ["llama", "gpt2", "falcon 7b", "gemma2"])
def test_heads_are_the_rows_of_W_O(family):
    model = tiny_model(family)
    found = decode(model, wb.head_directions(model, "1:"))
    assert found.labels == ["layer", "head", "row"]
    assert found.settings["n"] == (model.n_layers - 1) * model.n_heads * model.d_head
    own = found.table[(found.table["layer"] == 2) & (found.table["head"] == 1) & (found.table["row"] == 3)]
    alone = model.vocabulary.project(model.weight("W_O", 2)[1, 3][None].detach(), k=K)
    assert own["token_id"].tolist() == alone.top_ids[0].tolist()
    shares = found.shares()
    assert len(shares) == (model.n_layers - 1) * model.n_heads
    assert shares["beyond"].between(0, 1).all()


def test_heads_that_write_a_word_are_found():
    """Half of the rows of one head are set to the direction of a word."""
    hf = tiny_hf("llama")
    model = wb.load(hf, tokenizer=tiny_tokenizer(), check=False)
    with torch.no_grad():
        model.weight("W_O", 1)[2, :4] = 3 * model.vocabulary.direction(40) + 0.1 * torch.randn(4, model.d_model)
    shares = decode(model, wb.head_directions(model)).shares().set_index(["layer", "head"])
    assert shares["beyond"].idxmax() == (1, 2)
    assert shares.loc[(1, 2), "word"] == model.token_strings[40]


def test_singular_vectors_are_those_of_the_matrix(model):
    for name, part in (("W_in", "reads"), ("W_out", "writes"), ("W_Q", "reads"), ("W_O", "writes")):
        found = wb.singular_directions(model, name, 1, n=4)
        vectors, matrix = found.read(0), model.weight(name, 1).detach()
        if name == "W_Q":
            matrix = torch.cat(list(matrix), 1)
        matrix = matrix.flatten(0, -2)
        assert (found.labels["part"] == part).all()
        torch.testing.assert_close(vectors @ vectors.T, torch.eye(4))
        image = vectors @ matrix if part == "reads" else matrix @ vectors.T
        lengths = image.norm(dim=1) if part == "reads" else image.norm(dim=0)
        torch.testing.assert_close(lengths, torch.tensor(found.labels["singular_value"]).float(), rtol=1e-4, atol=1e-5)
        assert (vectors.gather(1, vectors.abs().argmax(1, keepdim=True)) > 0).all()


def test_what_a_head_reads_and_writes_goes_together(model):
    """For a key-value head that two query heads share: W_V of the group, W_O of the head."""
    assert len(model.weight("W_V", 1)) < model.n_heads
    head = model.n_heads - 1
    found = wb.singular_directions(model, "OV", 1, n=3, head=head)
    reads, writes = found.read(0)[:3], found.read(0)[3:]
    product = model.weight("W_V", 1)[-1] @ model.weight("W_O", 1)[head]
    along = (reads @ product.detach() * writes).sum(1)  # positive: reading one end writes the same end
    torch.testing.assert_close(along, torch.tensor(found.labels["singular_value"][:3]).float(), rtol=1e-4, atol=1e-6)
    assert found.labels["part"].tolist() == ["reads"] * 3 + ["writes"] * 3


def test_files_of_vectors(model, tmp_path, generator):
    rows = torch.randn(3, model.d_model, generator=generator)
    np.save(tmp_path / "rows.npy", rows.numpy())
    save_file({"a": rows[0].contiguous(), "b": rows[1:].bfloat16()}, tmp_path / "rows.safetensors")
    assert torch.equal(top_ids(decode(model, rows.numpy())), top_ids(decode(model, rows)))
    whole, named = decode(model, tmp_path / "rows.npy"), decode(model, str(tmp_path / "rows.safetensors"))
    assert torch.equal(top_ids(whole), top_ids(decode(model, rows)))
    assert named.table[["name", "row"]].drop_duplicates().to_numpy().tolist() == [["a", 0], ["b", 0], ["b", 1]]
    (tmp_path / "broken.safetensors").write_bytes(b"nothing")
    (tmp_path / "empty.npy").touch()
    np.save(tmp_path / "words.npy", np.array(["a"]))
    for file in ("broken.safetensors", "missing.npy", "empty.npy", "words.npy"):
        with pytest.raises(BadArtifact, match=file):
            decode(model, tmp_path / file)


def test_saving_and_loading_changes_nothing(model, tmp_path):
    found = decode(model, wb.head_directions(model))
    loaded = wb.DecodedDirections.load(found.save(tmp_path / "heads"))
    for name in ("table", "bottom", "null"):
        assert getattr(loaded, name).equals(getattr(found, name))
    assert loaded.settings == json.loads(json.dumps(found.settings))
    assert str(loaded) == str(found)
    with pytest.raises(BadArtifact):
        wb.DecodedDirections.load(tmp_path)


@pytest.mark.parametrize("kind", ["heads", "vectors"])
def test_pictures_hold_the_words(model, kind):
    found = decode(model, wb.head_directions(model) if kind == "heads" else wb.singular_directions(model, "W_out", 0))
    trace = found.plot().data[0]
    if kind == "heads":
        assert trace.z.shape == (model.n_layers, model.n_heads)
        assert trace.z.max() == found.shares()["beyond"].max()
    else:
        assert sorted(trace.x) == sorted(found.best()["bottom_score"])


@pytest.mark.parametrize(
    ("directions", "text"),
    [
        (torch.zeros(2, 7), r"shape \[2, 7\] \(float32\). Directions of .* rows of 32 numbers"),
        (torch.zeros(2, 32, dtype=torch.long), "int64"),
        ({}, "No direction was given"),
    ],
)
def test_vectors_of_another_width_are_refused(model, directions, text):
    with pytest.raises(UnknownOption, match=text):
        decode(model, directions)


def test_what_is_not_there_is_refused(model):
    with pytest.raises(NotFinite, match="Row 1"):
        decode(model, torch.tensor([[1.0], [float("nan")]]).expand(2, model.d_model))
    for options, text in (
        ({"name": "W_X", "layer": 0}, "Matrix 'W_X' is not known"),
        ({"name": "OV", "layer": 0}, "OV is a head's own"),
        ({"name": "W_in", "layer": 0, "head": 1}, "W_in belongs to no head"),
        ({"name": "W_K", "layer": 0, "head": 2}, "Head 2 is not in W_K: it has heads 0 to 1"),
    ):
        with pytest.raises(UnknownOption, match=text):
            wb.singular_directions(model, **options)
    with pytest.raises(UnknownOption, match="Shares are of heads"):
        decode(model, torch.ones(1, model.d_model)).shares()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    tiny_hf("llama").save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


def test_the_verb(folder, tmp_path):
    asked = [
        "decode",
        "OV",
        "-m",
        str(folder),
        "--layers",
        "-1",
        "--head",
        "0",
        "--vectors",
        "2",
        "--json",
        "-o",
        str(tmp_path / "ov"),
    ]
    answer = CliRunner().invoke(app, asked)
    assert answer.exit_code == 0, answer.output
    found = json.loads(answer.stdout)
    assert [row["part"] for row in found["specialised"]].count("reads") == 2
    assert (tmp_path / "ov" / "directions.html").exists()
    assert wb.DecodedDirections.load(tmp_path / "ov").settings["n"] == 4


@pytest.mark.parametrize(
    ("what", "text"),
    [
        (["nonsense"], "'nonsense' is not understood. Give heads, a matrix"),
        (["W_out"], "are one layer's. Name it: --layers 10"),
        (["heads", "--layers", "9"], "Layer"),
        (["heads", "--head", "1", "--vectors", "3"], "--head and --vectors mean nothing for 'heads'"),
        (["vectors.npy", "--layers", "1"], "--layers mean nothing for 'vectors.npy'"),
        (["missing.npy"], "missing.npy"),
    ],
)
def test_bad_input_of_the_verb(folder, what, text):
    answer = CliRunner().invoke(app, ["decode", *what, "-m", str(folder)])
    assert answer.exit_code == 2
    assert text in answer.output
