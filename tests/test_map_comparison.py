"""Two neuron maps: what is the same is found the same, planted changes are found, and each null is what it says."""

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import tiny_model
from families import tiny_hf, tiny_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from test_cli import command, one_line

import workbench as wb
from workbench.analyses.map_comparison import wilson
from workbench.analyses.rank_overlap import rank_biased_overlap
from workbench.artifacts import strict
from workbench.errors import BadArtifact, LayerOutOfRange, NotComparable, OtherJob

SHARES = ["same", "same_folded", "rbo", "rbo_bottom"]


def mapped(model, **options):
    return wb.map_neurons(model, **({"side": "all", "progress": False} | options))


def other_model(seed=1):
    return wb.load(tiny_hf("llama", seed=seed), tokenizer=tiny_tokenizer(), check=False)


@pytest.fixture(scope="module")
def neurons(llama):
    return mapped(llama)


@pytest.fixture(scope="module")
def others():
    return mapped(other_model())


# ---- rank-biased overlap

ranked_pairs = st.integers(1, 12).flatmap(
    lambda k: st.tuples(*[st.lists(st.integers(0, 15), min_size=k, max_size=k, unique=True)] * 2)
)


def overlap_as_defined(a, b, p, depth=600):
    """The paper's infinite sum, (1-p) Σ p^(d-1) A_d, with the agreement of the last rank taken to go on."""
    agreements = [len(set(a[:d]) & set(b[:d])) / d for d in range(1, len(a) + 1)]
    agreements += [agreements[-1]] * (depth - len(a))
    return (1 - p) * sum(p**d * agreement for d, agreement in enumerate(agreements))


@given(ranked_pairs, st.sampled_from([0.3, 0.9]))
@settings(max_examples=200, deadline=None)
def test_the_overlap_is_that_of_the_paper(pair, p):
    a, b = (np.array([one]) for one in pair)
    found = rank_biased_overlap(a, b, p)
    assert found == pytest.approx([overlap_as_defined(*pair, p)], abs=1e-9)
    assert rank_biased_overlap(b, a, p) == pytest.approx(found, abs=1e-12)
    assert rank_biased_overlap(a, a, p) == pytest.approx([1], abs=1e-12)
    assert rank_biased_overlap(a, b + 100, p) == [0]


def test_the_first_ranks_count_most():
    own = np.arange(10)[None]
    first, last = own.copy(), own.copy()
    first[0, 0], last[0, 9] = 99, 99
    assert rank_biased_overlap(own, first) < rank_biased_overlap(own, last)


# ---- shares and nulls


def test_a_map_is_the_same_as_itself(neurons):
    found = neurons.compare(neurons)
    np.testing.assert_allclose(found.table[SHARES].astype(float), 1, rtol=1e-12)
    assert list(found.summary()["neurons"]) == [144, 144, 144]
    assert (found.summary()["same_low"] > 0.97).all()
    assert (found.by_layer()["same"] == 1).all()
    assert all(np.isfinite(trace.y).all() for trace in found.plot().data)  # log-odds, of a share of 1
    assert (found.table["tokens_a"] == found.table["tokens_b"]).all()


def test_the_shuffled_null_is_what_permuted_neurons_give(neurons):
    """Dealt anew within layer and side, a map agrees with itself as little as its shuffled null says."""
    table, bottom, k = neurons.table.copy(), neurons.bottom.copy(), neurons.settings["k"]
    for at in table.groupby(["side", "layer"], observed=True, sort=False).indices.values():
        dealt = np.random.default_rng(5).permutation(at.reshape(-1, k)).ravel()
        for one in (table, bottom):
            one.loc[at, "token_id"] = one.loc[dealt, "token_id"].to_numpy()
    found = neurons.compare(replace(neurons, table=table, bottom=bottom))
    real, null = found.table["rbo"].mean(), found.table["shuffled_rbo"].mean()
    assert 0 < null < 0.1
    assert abs(real - null) < 4 * found.table["rbo"].std() / len(found.table) ** 0.5


def test_no_neuron_is_its_own_null(llama):
    """Where each neuron of a layer has tokens of its own, the shuffled share is exactly 0."""
    neurons = mapped(llama, k=3)
    table = neurons.table.copy()
    table["token_id"] = table.groupby(["side", "layer"], observed=True).cumcount()
    found = wb.compare_maps(*[replace(neurons, table=table)] * 2)
    assert found.summary()[["same", "shuffled_same", "shuffled_rbo"]].to_numpy().tolist() == [[1, 0, 0]] * 3


def test_an_attractor_makes_unrelated_models_agree_and_the_null_tells():
    """Rows of two models have nothing in common but a direction, along which a token lies that is long in both."""
    maps = []
    for seed in (1, 2):
        model = other_model(seed)
        with torch.no_grad():
            model.vocabulary.W_U[:, 77] = 2.0
            for layer in range(model.n_layers):
                model.weight("W_in", layer).add_(0.1)
        maps.append(mapped(model, side="up"))
    row = maps[0].compare(maps[1]).summary().iloc[0]
    assert row["same"] > 0.3
    assert row["shuffled_same_low"] < row["same"] < row["shuffled_same_high"]


def test_an_untrained_copy_agrees_no_more_than_shuffled_neurons(neurons, others):
    found = neurons.compare(others)
    for row in found.summary().itertuples():
        assert row.same_low <= row.shuffled_same_high
        assert row.shuffled_same_low <= row.same_high
        assert abs(row.rbo - row.shuffled_rbo) < 0.02


def test_a_folded_word_counts_where_the_id_is_another(neurons):
    table = neurons.table.copy()
    ids = [i for i, token in enumerate(neurons.tokens) if token.strip().lower() == "dog"]
    one, other = table.copy(), table.copy()
    first = table["rank"] == 0
    one.loc[first, "token_id"], other.loc[first, "token_id"] = ids[0], ids[1]
    row = replace(neurons, table=one).compare(replace(neurons, table=other)).summary().iloc[0]
    assert (row["same"], row["same_folded"], row["shuffled_same_folded"]) == (0, 1, 1)


def test_folded_is_never_less_than_exact(neurons, others):
    table = neurons.compare(others).table
    assert (table["same_folded"] >= table["same"]).all()
    assert (table["shuffled_same_folded"] >= table["shuffled_same"]).all()


def test_planted_changes_are_found_with_their_words_before_and_after():
    model, planted = tiny_model("llama"), {(1, 3), (0, 40), (2, 7)}
    before = mapped(model)
    with torch.no_grad():
        for layer, neuron in planted:
            model.weight("W_in", layer)[:, neuron] *= -1  # its bottom tokens become the top ones
    found = before.compare(mapped(model))
    changed = found.changed(3)
    assert set(zip(changed["layer"], changed["neuron"], strict=True)) == planted
    assert (changed["side"] == "up").all()
    assert (changed["score_a"].diff().dropna() <= 0).all()  # all have nothing left: the most telling first
    for row in changed.itertuples():
        own = f"side == 'up' and layer == {row.layer} and neuron == {row.neuron}"
        rows = before.table.query(own)
        assert row.tokens_a == before.top_tokens_of(rows)[0]
        assert row.tokens_b != row.tokens_a
    assert found.changed(1, layers="0", words=2)[["layer", "neuron"]].to_numpy().tolist() == [[0, 40]]
    assert len(found.changed(1, words=2)["tokens_a"][0].split("  ")) == 2
    assert (found.changed(5, side="down")["rbo"] == 1).all()
    assert found.summary().set_index("side")["same"].to_dict() == {"up": 141 / 144, "gate": 1, "down": 1}


def test_wilsons_interval_is_that_of_the_textbook():
    low, high = wilson(np.array([0.0, 0.5, 1.0]), np.array([10, 100, 10]))
    # statsmodels: proportion_confint(count, nobs, method="wilson")
    np.testing.assert_allclose(low, [0, 0.40383, 0.72247], atol=1e-5)
    np.testing.assert_allclose(high, [0.27753, 0.59617, 1], atol=1e-5)


# ---- with both models


def test_rows_that_do_not_differ_are_not_moved(llama, neurons):
    found = neurons.compare(neurons, models=(llama, llama), progress=False)
    for prefix in ("rows_", "perturbed_"):
        np.testing.assert_allclose(found.table[[f"{prefix}{name}" for name in SHARES]].astype(float), 1, rtol=1e-12)
    assert np.allclose(found.table["cosine"], 1)
    assert (found.table["change"] == 0).all()


@pytest.mark.parametrize("reading", ["raw", "gain"])
def test_the_null_moves_each_row_as_far_as_it_was_moved(llama, reading, monkeypatch):
    """What is projected has the norm of the real difference, row by row, and a direction of its own."""
    from workbench.analyses import map_rows

    other, seen = tiny_model("llama"), []
    with torch.no_grad():
        for layer in range(3):
            other.weight("W_in", layer).add_(0.05 * torch.randn(32, 48))
    before, after = (mapped(model, side="up", reading=reading) for model in (llama, other))
    project = map_rows.Projector.__call__
    monkeypatch.setattr(map_rows.Projector, "__call__", lambda self, rows: (seen.append(rows), project(self, rows))[1])
    found = before.compare(after, models=(llama, other), progress=False)
    for layer in range(3):
        gains = [1 if reading == "raw" else model.weight("ln2.w", layer) for model in (llama, other)]
        own, moved = (model.weight("W_in", layer).T * gain for model, gain in zip((llama, other), gains, strict=True))
        rows, perturbed = seen[2 * layer : 2 * layer + 2]
        torch.testing.assert_close(rows, moved)
        torch.testing.assert_close((perturbed - own).norm(dim=1), (moved - own).norm(dim=1), rtol=1e-4, atol=0)
        cosines = torch.cosine_similarity(perturbed - own, moved - own)
        assert cosines.abs().mean() < 0.25
        table = found.table[found.table["layer"] == layer]
        expected = ((moved - own).norm(dim=1) / own.norm(dim=1)).detach().numpy()
        np.testing.assert_allclose(table["change"], expected, rtol=1e-4)
        np.testing.assert_allclose(table["cosine"], torch.cosine_similarity(own, moved).detach(), rtol=1e-5)


def test_the_vocabularys_part_is_told_from_the_rows(llama, neurons):
    """Only the unembedding changed: the maps differ, the rows do not."""
    other = tiny_model("llama")
    with torch.no_grad():
        other.weight("W_U").copy_(other.weight("W_U").roll(1, 1))
    found = neurons.compare(mapped(other), models=(llama, other), progress=False).summary()
    assert (found["same"] < 0.1).all()
    assert (found["rows_same"] == 1).all()
    assert (found["change_median"] == 0).all()


def test_rows_scaled_keep_their_words_where_a_random_move_as_long_does_not(llama, neurons):
    other = tiny_model("llama")
    with torch.no_grad():
        for layer in range(3):
            other.weight("W_out", layer).mul_(2.5)
    found = neurons.compare(mapped(other), models=(llama, other), side="down", progress=False).summary().iloc[0]
    assert found["same"] == found["rows_same"] == 1
    assert found["perturbed_same_high"] < 0.8
    assert found["cosine_low"] == pytest.approx(1)
    assert found["change_median"] == pytest.approx(1.5)


def test_an_expert_can_be_compared():
    model = tiny_model("qwen2_moe")
    one = mapped(model, layers="1,2", part="experts.1")
    assert one.compare(one, models=(model, model), progress=False).summary()["perturbed_same"].eq(1).all()


# ---- what cannot be compared, and what is left out


def test_common_sides_layers_and_tokens_are_compared(llama, neurons):
    some = mapped(llama, side=["up", "down"], layers="1:3", k=4)
    found = neurons.compare(some, layers="1:3")
    assert found.settings["sides"] == ["up", "down"]
    assert (found.settings["layers"], found.settings["k"]) == ([1, 2], 4)
    assert (found.table["same"]).all()
    assert "their 4 top tokens, the fewer of 10 and 4" in str(found)
    one = neurons.compare(neurons, side="gate", layers="2").table
    all_of_them = neurons.compare(neurons).table.query("side == 'gate' and layer == 2")
    pd.testing.assert_frame_equal(one, all_of_them.reset_index(drop=True))  # nulls too


def test_maps_that_cannot_be_compared_are_refused(llama, neurons):
    def refused(text, other, error=NotComparable, **options):
        with pytest.raises(error, match=text):
            neurons.compare(other, **options)

    up = mapped(llama, side="up", layers="1")
    refused(r"decoder='none' and decoder='gain'.* Map both models with the same decoder", mapped(llama, decoder="gain"))
    refused(r"layers 0:3, the second 1\. Ask for some of those that both have: layers='1'", up)
    refused(r"the second 1, and '0:2' was asked for\. Ask .* layers='1'", up, layers="0:2")
    refused(r"Layers '7' do not lie in this model of 3 layers", up, LayerOutOfRange, layers="7")
    refused(r"Side 'gate' is not in both maps: the first has up, gate, down, the second up\.", up, side="gate", layers="1")
    with pytest.raises(NotComparable, match=r"No side is in both maps: the first has up, the second down"):
        up.compare(mapped(llama, side="down", layers="1"))
    shifted = replace(neurons, tokens=[*neurons.tokens[1:], "x"])
    refused(r"100\.0% of the token ids stand for other tokens .* with the same tokenizer", shifted)
    refused(
        r"have 3 and 5 layers: .* Compare copies of one model", replace(neurons, settings=neurons.settings | {"n_layers": 5})
    )
    fewer = neurons.table["neuron"] < 40
    small = replace(neurons, table=neurons.table[fewer], bottom=neurons.bottom[fewer])
    refused(r"maps are of 432 and 360 neurons, which are not the same", small)


def test_a_token_with_another_name_is_counted_not_refused(neurons):
    found = neurons.compare(replace(neurons, tokens=["<pad>", *neurons.tokens[1:]]))
    assert found.settings["other_tokens"] == 1
    assert (found.summary()["same_folded"] == 1).all()
    assert "1 token ids stand for other strings" in found.headline()


def test_models_that_were_not_mapped_are_refused(llama, neurons):
    other = other_model()
    with pytest.raises(OtherJob, match=r"The second map is of .* has other weights\. Give the models that were mapped"):
        neurons.compare(neurons, models=(llama, other))
    small = other_model()
    wide = replace(neurons, settings=neurons.settings | {"weights_hash": small.weights_hash})
    object.__setattr__(small, "d_model", 16)
    with pytest.raises(NotComparable, match=r"32 numbers in the first model and 16 in the second.* Leave the models out"):
        neurons.compare(wide, models=(llama, small))


# ---- the result


def test_the_result_is_as_documented_and_survives_its_folder(llama, neurons, others, tmp_path):
    found = neurons.compare(others, models=(llama, other_model()), progress=False)
    assert list(found.table.columns[:11]) == [
        "layer", "neuron", "side",
        "token_id_a", "token_a", "score_a", "tokens_a", "token_id_b", "token_b", "score_b", "tokens_b",
    ]  # fmt: skip
    again = wb.MapComparison.load(found.save(tmp_path / "c"))
    pd.testing.assert_frame_equal(again.table, found.table)
    assert again.settings == json.loads(json.dumps(found.settings))
    assert str(again) == str(found)
    assert len(str(found).splitlines()) < 40
    assert "random rows as far away" in found._repr_html_()
    drawn = found.plot().data
    assert [trace.name for trace in drawn[:4]] == list(found.compared().values())
    own = found.by_layer().query("side == 'gate'")
    np.testing.assert_allclose(drawn[4 + 2].customdata[:, 0], own["perturbed_same"])
    again = neurons.compare(others, models=(llama, other_model()), progress=False)
    pd.testing.assert_frame_equal(again.table, found.table)
    with pytest.raises(BadArtifact, match="holds another kind of result, no map comparison"):
        wb.MapComparison.load(neurons.save(tmp_path / "m"))
    (tmp_path / "c/comparison.parquet").write_bytes(b"PAR1")
    with pytest.raises(BadArtifact, match="is damaged"):
        wb.MapComparison.load(tmp_path / "c")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A model and its map, and those of another."""
    root = tmp_path_factory.mktemp("two")
    for seed, name in ((0, "a"), (1, "b")):
        tiny_hf("llama", seed=seed).save_pretrained(root / name)
        tiny_tokenizer().save_pretrained(root / name)
        mapped(wb.load(root / name)).save(root / f"map-{name}")
    return root


def test_compare_maps(folders, tmp_path):
    arguments = ("compare-maps", folders / "map-a", folders / "map-b", "--side", "up", "-n", 3)
    done = command(*arguments)
    assert done.returncode == 0, done.stderr
    assert "Neurons that changed most" in done.stdout
    assert "another neuron" in done.stdout
    models = ("--model-a", folders / "a", "--model-b", folders / "b", "--out", tmp_path)
    answer = json.loads(command(*arguments, *models, "--json").stdout)
    loaded = wb.load(folders / "a"), wb.load(folders / "b")
    maps = [wb.NeuronMap.load(folders / name) for name in ("map-a", "map-b")]
    found = maps[0].compare(maps[1], models=loaded, side="up", progress=False)
    assert answer["summary"] == strict(found.summary().to_dict("records"))
    assert [row["neuron"] for row in answer["changed"]] == found.changed(3)["neuron"].tolist()
    assert len(answer["by_layer"]) == 3
    pd.testing.assert_frame_equal(wb.MapComparison.load(tmp_path).table, found.table)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["comparison.html", "comparison.parquet", "run.json"]


def test_mistakes_of_comparisons_are_one_line(folders):
    maps = (folders / "map-a", folders / "map-b")
    one_line(command("compare-maps", maps[0], "nowhere"), 2, "'nowhere/run.json' does not exist")
    one_line(command("compare-maps", *maps, "--model-a", folders / "a"), 2, "Only one of --model-a and --model-b was given")
    swapped = ("--model-a", folders / "b", "--model-b", folders / "a")
    one_line(command("compare-maps", *maps, *swapped), 2, "Give the models that were mapped, in that order")
