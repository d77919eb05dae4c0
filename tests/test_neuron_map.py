"""The neuron map: planted neurons are found, the real model's map equals float64, the score tells signal from noise."""

import errno
import json
import os
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import by_trait, tiny_model
from families import LAYERS

import workbench as wb
from workbench.analyses import neuron_folder, neuron_score
from workbench.analyses.neuron_folder import PARTS, Parts
from workbench.analyses.neuron_map import NULL_QUANTILE, SIDES, neuron_rows
from workbench.errors import BadArtifact, CannotWrite, LayerOutOfRange, MissingWeight, UnknownOption, UnknownToken


def plant(model, side, layer, neuron, token, alpha, expert=None):
    """Set a neuron's row to a multiple of an unembedding column, in Hugging Face's own weight."""
    name = {"up": "W_in", "gate": "W_gate", "down": "W_out"}[side]
    row = alpha * model.vocabulary.direction(token)
    weight = model.weight(name, layer, expert=expert)
    with torch.no_grad():
        (weight[neuron] if side == "down" else weight[:, neuron]).copy_(row)
    return row


def parts_of(model):
    """Parts that can be mapped, each with its layers, sides and the expert that it means."""
    blocks = [model.row.block(layer) for layer in range(LAYERS)]
    dense = [layer for layer, block in enumerate(blocks) if block.up is not None]
    sparse = [layer for layer, block in enumerate(blocks) if block.experts is not None]
    if dense:
        yield "mlp", dense, [side for side in SIDES if side != "gate" or blocks[dense[0]].is_gated], None
    if sparse:
        yield "experts.1", sparse, list(SIDES), 1
        if blocks[sparse[0]].experts.shared is not None:
            yield "experts.shared", sparse, list(SIDES), "shared"


@by_trait
def test_a_planted_neuron_speaks_for_its_token(family):
    """Its top token is the planted one, with the closed-form probability; the opposite neuron's bottom token is."""
    model = tiny_model(family, check=False)
    lengths = model.vocabulary.W_U.norm(dim=0)
    token = int(lengths.argmax())  # the longest column: no other token can have a larger product with it
    for part, layers, sides, expert in parts_of(model):
        planted = {}
        for i, side in enumerate(sides):
            layer = layers[i % len(layers)]
            row = plant(model, side, layer, 5, token, 0.3, expert).clone()
            planted[side] = (layer, row, plant(model, side, layer, 6, token, -0.3, expert))
        neurons = wb.map_neurons(model, side="all", layers=",".join(map(str, layers)), part=part, k=3, progress=False)
        assert neurons.settings["part"] == part
        for side, (layer, row, _) in planted.items():
            of_layer = f"side == '{side}' and layer == {layer} and rank == 0"
            at = neurons.table.query(f"{of_layer} and neuron == 5").iloc[0]
            assert at["token_id"] == token
            z = row.double() @ model.vocabulary.W_U.double()
            assert at["probability"] == pytest.approx(float(z.softmax(0)[token]), rel=1e-5)
            below = neurons.bottom.query(f"{of_layer} and neuron == 6").iloc[0]
            assert below["token_id"] == token
            assert below["probability"] == pytest.approx(float((-z).softmax(0)[token]), rel=1e-5)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({}, r"part='mlp' .* in layer 1, 2 of .*: it is a mixture of 4 experts, .*: layers='0'"),
        ({"part": "experts.0"}, r"part='experts.0' .* layer 0 of .*: it is no mixture of experts. .*: layers='1,2'"),
        ({"part": "experts.4", "layers": "1"}, r"has no expert 4: they go from 0 to 3, or 'shared'"),
        ({"part": "expert"}, r"part='expert' is not known. Use 'mlp', 'experts.0'"),
    ],
)
def test_a_part_that_a_layer_lacks_is_refused(options, text):
    with pytest.raises((MissingWeight, UnknownOption), match=text):
        wb.map_neurons(tiny_model("qwen2_moe"), **options)


@pytest.mark.parametrize(("reading", "decoder"), [("raw", "none"), ("gain", "none"), ("raw", "gain"), ("raw", "norm")])
def test_the_real_models_map_equals_float64(smollm, reading, decoder, monkeypatch):
    """200 random neurons against a dense float64 computation: the same ids, near-ties apart; probabilities to 1e-5."""
    monkeypatch.setattr(neuron_score, "NULL_ROWS", 10)  # the null is not what is compared, and half of the time
    layers = [0, 29]
    neurons = wb.map_neurons(smollm, side="up", layers="0,29", reading=reading, decoder=decoder, progress=False)
    chosen = np.random.default_rng(0).choice(len(layers) * smollm.d_mlp, 200, replace=False)
    rows = torch.cat([smollm.hf.model.layers[layer].mlp.up_proj.weight.detach().double() * (
        smollm.hf.model.layers[layer].post_attention_layernorm.weight.detach().double() if reading == "gain" else 1
    ) for layer in layers])[chosen]  # fmt: skip
    gain = smollm.hf.model.norm.weight.detach().double()
    if decoder == "norm":
        rows = rows / (rows.pow(2).mean(1, keepdim=True) + smollm.hf.config.rms_norm_eps).sqrt()
    if decoder != "none":
        rows = rows * gain
    z = rows @ smollm.hf.lm_head.weight.detach().double().T
    expected = z.topk(10)
    ids = neurons.table["token_id"].to_numpy().reshape(-1, 10)[chosen]
    probabilities = neurons.table["probability"].to_numpy().reshape(-1, 10)[chosen]
    differ = ids != expected.indices.numpy()
    found = z.gather(1, torch.from_numpy(ids).long())
    gaps = (found - expected.values).abs() / z.abs().amax(1, keepdim=True)
    assert gaps.max() < 1e-6, "a token that is no near-tie stands in the wrong place"
    assert differ.mean() < 1e-3
    # After the norm logits reach several hundred, of which float32 itself holds only 3e-5.
    rtol = 1e-4 if decoder == "norm" else 1e-5
    np.testing.assert_allclose(probabilities, z.softmax(1).gather(1, torch.from_numpy(ids).long()).numpy(), rtol=rtol)


def test_the_score_finds_planted_neurons_and_nothing_in_noise():
    model = tiny_model("llama")
    clean = wb.map_neurons(model, side="up", progress=False).summary().iloc[0]
    # Random weights: no more neurons beyond the null than chance has. 144 neurons, so 5 standard errors are 4 %.
    assert clean["above_fraction"] < 1 - NULL_QUANTILE + 0.05
    for neuron in range(12):
        plant(model, "up", 1, neuron, 40 + neuron, 1.0)
    found = wb.map_neurons(model, side="up", progress=False)
    best = found.specialised(12)
    assert set(zip(best["layer"], best["neuron"], strict=True)) == {(1, n) for n in range(12)}
    assert (best["score"] > found.summary()["threshold"].iloc[0]).all()


def test_an_attractor_token_scores_low():
    """One long column of W_U wins for nearly every neuron: by logit it is everyone's word, by score no one's."""
    model = tiny_model("llama")
    with torch.no_grad():
        for layer in range(model.n_layers):
            model.weight("W_in", layer).add_(0.5)  # neurons share a direction ...
        model.vocabulary.W_U[:, 77] = 30.0  # ... and a token lies along it
    plant(model, "up", 1, 3, 50, 1.0)
    neurons = wb.map_neurons(model, side="up", progress=False)
    shared = neurons.shared_tokens().iloc[0]
    assert shared["token_id"] == 77
    assert shared["neurons"] > 100
    best = neurons.specialised(1).iloc[0]
    assert (best["layer"], best["neuron"]) == (1, 3)
    assert best["shared_by"] <= 1


def test_the_score_is_the_standardised_logit(llama):
    neurons = wb.map_neurons(llama, side="down", k=4, progress=False)
    rows = torch.cat([neuron_rows(llama, "down", layer) for layer in range(3)]).double()
    z = rows / rows.norm(dim=1, keepdim=True) @ llama.vocabulary.W_U.double()
    scores = (z - z.mean(0)) / z.std(0, correction=0)
    ids = torch.tensor(neurons.table["token_id"].to_numpy().reshape(-1, 4)).long()
    expected = scores.gather(1, ids).numpy().ravel()
    np.testing.assert_allclose(neurons.table["score"], expected, rtol=1e-4, atol=1e-5)


def test_the_table_is_as_documented(llama):
    neurons = wb.map_neurons(llama, side=["down", "up"], layers="1:3", k=4, progress=False)
    assert list(neurons.table.columns) == [
        "layer", "neuron", "side", "rank", "token_id", "token", "logit", "probability", "score",
    ]  # fmt: skip
    assert len(neurons.table) == len(neurons.bottom) == 2 * 2 * 48 * 4
    assert list(neurons.table["side"].unique()) == ["up", "down"]
    assert sorted(neurons.table["layer"].unique()) == [1, 2]
    assert (neurons.table.groupby(["side", "layer", "neuron"], observed=True)["logit"].diff().dropna() <= 0).all()
    assert (neurons.bottom.groupby(["side", "layer", "neuron"], observed=True)["logit"].diff().dropna() >= 0).all()
    assert neurons.settings["weights_hash"] == llama.weights_hash
    assert neurons.settings["versions"].keys() == {"python", "mi-workbench", "torch", "transformers"}


def test_find(llama):
    neurons = wb.map_neurons(llama, side="all", progress=False)
    dog = [i for i, t in enumerate(neurons.tokens) if t.strip().lower() == "dog"]
    assert len(dog) == 3
    found = neurons.find("Dog")
    expected = neurons.table[neurons.table["token_id"].isin(dog)]
    assert len(found) == len(expected) > 0
    assert (found["rank"].diff().dropna() >= 0).all()
    assert set(neurons.find(" dog", match="exact")["token"]) == {" dog"}
    assert set(neurons.find("^ ?dog", match="regex")["token"]) <= {" dog", "dog", " dogs"}
    assert set(neurons.find("dog", layers="1")["layer"]) <= {1}
    assert set(neurons.find("dog", side="down")["side"]) <= {"down"}
    assert (neurons.find("dog", max_rank=2)["rank"] <= 2).all()
    lowest = neurons.bottom[neurons.bottom["token_id"].isin(dog)]
    assert len(neurons.find("dog", bottom=True)) == len(lowest)
    with pytest.raises(
        UnknownToken, match=r"'doge' \(folded\) is no single token .* begin like it: .*Ask for one of its pieces"
    ):
        neurons.find("doge")
    with pytest.raises(LayerOutOfRange, match="do not lie in this model of 3 layers"):
        neurons.find("dog", layers="3")


def test_specialised_names_each_word_once(llama):
    best = wb.map_neurons(llama, side="all", progress=False).specialised(50)
    words = best.assign(word=best["token"].str.strip().str.casefold())
    assert not words.duplicated(["side", "word"]).any()
    assert (best["score"].diff().dropna() <= 0).all()


def test_specialised_may_be_spread_over_the_layers(llama):
    neurons = wb.map_neurons(llama, side="all", progress=False)
    spread = neurons.specialised(50, per_layer=2)
    assert spread["layer"].value_counts().to_dict() == {0: 2, 1: 2, 2: 2}
    for layer in range(3):
        best = neurons.specialised(1, layers=str(layer))
        assert best["score"].iloc[0] == spread.loc[spread["layer"] == layer, "score"].max()


def test_saving_and_loading_changes_nothing(llama, tmp_path):
    neurons = wb.map_neurons(llama, side="all", k=3, progress=False)
    neurons.save(tmp_path / "map")
    again = wb.NeuronMap.load(tmp_path / "map")
    pd.testing.assert_frame_equal(again.table, neurons.table)
    pd.testing.assert_frame_equal(again.bottom, neurons.bottom)
    pd.testing.assert_frame_equal(again.null, neurons.null)
    assert again.tokens == neurons.tokens
    assert again.settings == json.loads(json.dumps(neurons.settings))
    assert str(again) == str(neurons)
    assert sorted(path.name for path in (tmp_path / "map").iterdir()) == [
        "neurons.parquet", "neurons_bottom.parquet", "null.parquet", "run.json", "tokens.parquet",
    ]  # fmt: skip


def test_a_folder_without_a_map_is_refused(llama, tmp_path):
    with pytest.raises(BadArtifact, match=r"run.json' does not exist"):
        wb.NeuronMap.load(tmp_path)
    (tmp_path / "run.json").write_text('{"kind": "lens"}')
    with pytest.raises(BadArtifact, match="holds another kind of result, no neuron map"):
        wb.NeuronMap.load(tmp_path)
    wb.map_neurons(llama, progress=False).save(tmp_path)
    (tmp_path / "neurons.parquet").write_bytes(b"PAR1")
    with pytest.raises(BadArtifact, match=r"is damaged .* Make it again"):
        wb.NeuronMap.load(tmp_path)


def test_a_stopped_job_goes_on_where_it_was(llama, tmp_path, monkeypatch):
    whole = wb.map_neurons(llama, side="all", progress=False)
    put, made = Parts.put, []

    def stop_at_the_fifth(self, side, layer, found):
        if len(made) == 4:
            raise KeyboardInterrupt
        made.append((side, layer))
        put(self, side, layer, found)

    monkeypatch.setattr(Parts, "put", stop_at_the_fifth)
    with pytest.raises(KeyboardInterrupt):
        wb.map_neurons(llama, side="all", parts=tmp_path / "parts", progress=False)
    made.clear()
    monkeypatch.setattr(
        Parts, "put", lambda self, side, layer, found: (made.append((side, layer)), put(self, side, layer, found))
    )
    resumed = wb.map_neurons(llama, side="all", parts=tmp_path / "parts", progress=False)
    assert made == [("gate", 1), ("gate", 2), ("down", 0), ("down", 1), ("down", 2)]
    pd.testing.assert_frame_equal(resumed.table, whole.table)
    resumed.save(tmp_path / "parts")
    assert not (tmp_path / "parts" / PARTS).exists()


def test_parts_of_another_job_are_discarded(llama, tmp_path):
    parts = Parts(tmp_path / "parts", {"k": 3})
    parts.put("up", 0, llama.vocabulary.project(neuron_rows(llama, "up", 0)))
    assert Parts(tmp_path / "parts", {"k": 3}).get("up", 0) is not None
    assert Parts(tmp_path / "parts", {"k": 4}).get("up", 0) is None


def test_a_damaged_part_is_made_again(llama, tmp_path):
    parts = Parts(tmp_path, {"k": 3})
    parts.put("up", 0, llama.vocabulary.project(neuron_rows(llama, "up", 0)))
    next((tmp_path / PARTS).iterdir()).write_bytes(b"half")
    assert parts.get("up", 0) is None


def test_what_else_lies_in_the_folder_is_left_alone(llama, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    wb.map_neurons(llama, layers="0", parts=tmp_path, progress=False).save(tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_a_failed_save_keeps_the_older_map_and_the_parts(llama, tmp_path, monkeypatch):
    wb.map_neurons(llama, layers="0", progress=False).save(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    neurons = wb.map_neurons(llama, layers="1", parts=tmp_path, progress=False)

    def full_disk(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(neuron_folder, "token_table", full_disk)
    with pytest.raises(CannotWrite, match="No space left on device"):
        neurons.save(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before
    assert list((tmp_path / PARTS).iterdir())


def test_top_tokens_belong_to_the_rows_that_were_given(llama):
    neurons = wb.map_neurons(llama, side="all", progress=False)
    found = neurons.find("dog")
    assert all("dog" in tokens.lower() for tokens in neurons.top_tokens_of(found))


def test_a_search_beyond_the_map_is_refused(llama):
    neurons = wb.map_neurons(llama, side="up", layers="1", progress=False)
    with pytest.raises(MissingWeight, match=r"This map holds sides up, not 'gate'. Map that side too"):
        neurons.find("dog", side="gate")
    with pytest.raises(LayerOutOfRange, match=r"This map does not hold layers 0; it holds 1"):
        neurons.find("dog", layers="0")


def test_the_null_goes_through_the_same_decoder():
    """A head whose norm adds a large bias drives every direction to the same words: the null must see that too."""
    model = tiny_model("gpt2")
    with torch.no_grad():
        model.hf.transformer.ln_f.bias += 5 * torch.randn(model.d_model)
    summary = wb.map_neurons(model, side="up", decoder="norm", progress=False).summary().iloc[0]
    assert abs(summary["median_score"] - summary["null_median_score"]) < 0.5


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"layers": "3"}, LayerOutOfRange, "Layers '3' do not lie in this model of 3 layers"),
        (
            {"side": "gate"},
            MissingWeight,
            r"Side 'gate' cannot be mapped in .*: its MLP is not gated. Sides here: up, down, all",
        ),
        ({"side": []}, UnknownOption, "No side was asked for. Sides here: up, down, all"),
        ({"k": 0}, UnknownOption, "k=0 tokens a neuron were asked for"),
        ({"side": "down", "reading": "gain"}, MissingWeight, "scales what a neuron reads, but side 'down' is what it writes"),
    ],
)
def test_bad_input_is_refused(options, error, text):
    with pytest.raises(error, match=text):
        wb.map_neurons(tiny_model("gpt2"), **options)


def test_it_reads_well(llama):
    neurons = wb.map_neurons(llama, side="all", progress=False)
    assert "sides up, gate, down" in repr(neurons)
    assert "random directions: 1%" in repr(neurons)
    assert "<table" in neurons._repr_html_()


def test_the_picture_shows_the_numbers_of_the_map(llama):
    neurons = wb.map_neurons(llama, side="all", progress=False)
    figure = neurons.plot()
    points = {trace.name: trace for trace in figure.data if trace.mode == "markers+text"}
    assert set(points) == {"up", "gate", "down"}
    np.testing.assert_allclose(sorted(points["gate"].y), sorted(neurons.best(side="gate")["score"]))
    # `<unused 299>` would be taken for a tag and vanish.
    hovers = [hover for trace in points.values() for *_, hover in trace.customdata]
    assert any("&lt;unused" in hover for hover in hovers)
    assert not any("<" in text for text in [*hovers, *(word for trace in points.values() for word in trace.text)])
    shares = {trace.name: trace for trace in figure.data if trace.mode == "lines+markers"}
    expected = neurons.summary().set_index("side")["above_fraction"]
    assert np.mean(shares["down"].y) == pytest.approx(expected["down"])  # layers are of one size


def test_bfloat16_weights_give_exact_rankings(generator):
    model = tiny_model("llama", dtype=torch.bfloat16)
    neurons = wb.map_neurons(model, side="up", k=5, progress=False)
    z = torch.cat([neuron_rows(model, "up", layer) for layer in range(3)]).double() @ model.vocabulary.W_U.double()
    ids = neurons.table["token_id"].to_numpy().reshape(-1, 5)
    assert np.array_equal(ids, z.sort(dim=1, descending=True, stable=True).indices[:, :5].numpy())


def test_an_unknown_decoder_is_refused_at_run_time_too():
    """Users run without type checks: a misspelt option must not pass for another."""
    code = (
        "import torch, workbench as wb; from workbench.vocabulary import Vocabulary\n"
        "v = Vocabulary(torch.eye(4), None, torch.ones(4), torch.nn.Identity())\n"
        "try: v.project(torch.eye(4), decoder='gian')\n"
        "except wb.WorkbenchError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "decoder='gian' is not known. Use one of 'none', 'gain', 'norm'."


@pytest.mark.parametrize(("family", "reading", "decoder"), [("llama", "gain", "none"), ("gemma2", "gain", "gain")])
def test_gains_in_bfloat16_do_not_reorder_tokens(family, reading, decoder):
    model = tiny_model(family, dtype=torch.bfloat16)
    neurons = wb.map_neurons(model, side="up", k=5, reading=reading, decoder=decoder, progress=False)
    offset = model.row.norm_gain_offset
    blocks = model.hf.model.layers
    norms = [getattr(block, model.row.block(0).ln2).weight.double() + offset for block in blocks]
    rows = torch.cat([block.mlp.up_proj.weight.double() * norm for block, norm in zip(blocks, norms, strict=True)])
    if decoder == "gain":
        rows = rows * (model.hf.model.norm.weight.double() + offset)
    z = rows @ model.vocabulary.W_U.double()
    ids = torch.tensor(neurons.table["token_id"].to_numpy().reshape(-1, 5)).long()
    gaps = (z.gather(1, ids) - z.topk(5).values).abs().amax(1) / z.abs().amax(1)
    assert gaps.max() < 1e-5
