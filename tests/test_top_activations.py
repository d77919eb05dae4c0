"""Examples and statistics of units over text, against `wb.capture` of every row; neurons and their words, against
scikit-learn and planted neurons."""

import json

import numpy as np
import pytest
import torch
from conftest import tiny_model
from sklearn.metrics import roc_auc_score
from typer.testing import CliRunner

import workbench as wb
from workbench.analyses.top_activations import TopActivations
from workbench.analyses.word_activations import WordActivations
from workbench.analyses.word_statistics import area
from workbench.cli import app
from workbench.corpus.corpus import STRATA
from workbench.errors import BadArtifact, LengthMismatch, OtherJob, UnknownOption, UnknownSite
from workbench.model import Batch
from workbench.unit_statistics import N_BINS, bins_of

TEXTS = [
    "The dog sleeps in the sun all day long", "A cat and a dog, a bird and a fish", "Paris is the capital of France.",
    "Every morning the old man walks his dog along the river", "no", "Rain falls on the roof, and the cat looks out",
]  # fmt: skip


@pytest.fixture(scope="module")
def corpus():
    return wb.Corpus(TEXTS, length=24)


@pytest.fixture(scope="module")
def captured(llama, corpus):
    """Each row by itself: (row, position, document, token id, stratum, neurons of layer 1, z of layer 0)."""
    rows = []
    for row in corpus.rows(llama):
        tokens = torch.from_numpy(row.tokens).long().unsqueeze(0)
        acts = wb.capture(
            llama, Batch(tokens, torch.ones_like(tokens, dtype=torch.bool)), ["mlp_post.1", "z.0", "resid_post.1"]
        )
        for pos in range(len(row)):
            rows.append((row.index, pos, int(row.tokens[pos]), *(acts[site][0, pos] for site in acts)))
    return rows


def chosen(captured, column, *, first=4):
    return torch.stack([row[3 + column] for row in captured if row[1] >= first])


@pytest.fixture(scope="module")
def found(llama, corpus):
    return wb.top_activations(llama, corpus, ["mlp_post.1"], k=5, batch_tokens=48, progress=False)


def test_the_highest_tokens_are_those_of_single_rows(found, captured):
    neurons = chosen(captured, 0)
    places = [(row, pos) for row, pos, *_ in captured if pos >= 4]
    assert found.settings["tokens"] == len(neurons)
    for unit in (0, 7, neurons.shape[1] - 1):
        own = found.examples(unit)
        top = own[own["kind"] == "top"]
        expected = neurons[:, unit].topk(5)
        np.testing.assert_allclose(top["activation"], expected.values, rtol=1e-4, atol=1e-6)
        assert list(zip(top["row"], top["pos"], strict=True)) == [places[i] for i in expected.indices.tolist()]


def test_an_example_stands_in_its_text(found, llama):
    for row in found.table.iloc[::37].to_dict("records"):
        text = TEXTS[int(row["document_id"])]
        whole = row["before"] + row["token"] + row["after"]
        assert whole.strip() in text
        assert llama.token_strings[row["token_id"]] == row["token"]


def test_statistics_are_those_of_all_tokens(found, captured):
    neurons = chosen(captured, 0).double()
    own = found.statistics
    np.testing.assert_allclose(own["mean"], neurons.mean(0), rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(own["std"], neurons.std(0, correction=0), rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(own["highest"], neurons.amax(0), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(own["lowest"], neurons.amin(0), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(own["firing_rate"], (neurons > 0).double().mean(0), atol=1.5 / len(neurons))
    assert (found.histogram.sum(1) == len(neurons)).all()


def test_examples_at_quantiles_lie_there(found, captured):
    """There are fewer tokens than the sample holds, so that it is all of them."""
    neurons = chosen(captured, 0)
    for unit in (0, 7):
        own = found.examples(unit)
        for row in own[own["kind"] == "quantile"].to_dict("records"):
            below = (neurons[:, unit] < row["activation"] - 1e-6).double().mean()
            assert abs(float(below) - row["quantile"]) <= 2 / len(neurons)  # a place is rounded to a token


def test_strata_decide_which_tokens_count(llama, corpus, captured):
    both = wb.top_activations(llama, corpus, "mlp_post.1", [3], strata=["first", "early"], k=3, progress=False)
    assert both.settings["tokens"] == sum(pos < 4 for _, pos, *_ in captured)
    assert both.table["pos"].max() < 4
    assert set(both.table["index"]) == {3}
    with pytest.raises(UnknownOption, match=r"None of the .* tokens is of the strata special"):
        wb.top_activations(llama, corpus, "mlp_post.1", strata="special", progress=False)


def test_heads_are_lengths_and_directions_are_products(llama, corpus, captured, generator):
    heads = wb.top_activations(llama, corpus, "z.0", k=1, progress=False)
    expected = chosen(captured, 1).norm(dim=-1).amax(0)
    assert heads.settings["units"] == "head"
    np.testing.assert_allclose(heads.statistics["highest"], expected, rtol=1e-4)
    directions = torch.randn(4, llama.d_model, generator=generator)
    along = wb.top_activations(llama, corpus, "resid_post.1", directions=directions, k=1, progress=False)
    np.testing.assert_allclose(along.statistics["highest"], (chosen(captured, 2) @ directions.T).amax(0), rtol=1e-4, atol=1e-4)
    assert along.settings["units"] == "direction"


def test_saved_and_read_again(found, tmp_path):
    found.save(tmp_path)
    again = TopActivations.load(tmp_path)
    assert again.table.equals(found.table)
    assert again.statistics.equals(found.statistics)
    assert np.array_equal(again.histogram, found.histogram)
    assert again.settings == found.settings
    (tmp_path / "examples.parquet").write_bytes(b"no")
    with pytest.raises(BadArtifact, match="are damaged"):
        TopActivations.load(tmp_path)
    (tmp_path / "run.json").write_text(json.dumps({"kind": "neuron map"}))
    with pytest.raises(BadArtifact, match="another kind of result"):
        TopActivations.load(tmp_path)


def test_the_picture_has_the_examples(found):
    figure = found.plot(7)
    bars, quantiles, top = figure.data
    assert sum(row[0] for row in bars.customdata) == found.settings["tokens"]
    assert len(top.x) == 5
    assert len(quantiles.x) == 4
    assert float(max(top.x)) == pytest.approx(found.statistics.loc[7, "highest"])


@pytest.mark.parametrize(
    ("site", "options", "error", "text"),
    [
        ("mlp_post.1", {"index": 99_999}, UnknownOption, "has 48 units .coordinates., 0 to 47; asked for 99999"),
        ("mlp_post.1", {"index": []}, UnknownOption, "asked for none"),
        ("mlp_post.1", {"k": 0}, UnknownOption, "k=0"),
        ("mlp_post.1", {"quantiles": [2.0]}, UnknownOption, "quantiles"),
        ("mlp_post.1", {"strata": "nice"}, UnknownOption, "strata='nice' is not known"),
        ("resid_post.1", {"directions": torch.ones(2, 3)}, LengthMismatch, r"Directions are \[2, 3\]"),
        ("z.1", {"directions": torch.ones(2, 8)}, LengthMismatch, "one axis"),
        ("pattern.1", {}, UnknownSite, "pairs of tokens"),
    ],
)
def test_bad_input_is_named(llama, corpus, site, options, error, text):
    with pytest.raises(error, match=text):
        wb.top_activations(llama, corpus, site, progress=False, **options)


def test_a_unit_that_was_not_looked_at_is_named(found):
    with pytest.raises(UnknownOption, match=r"Unit 4711 of 'mlp_post\.1' was not looked at"):
        found.examples(4711)


# Neurons and their words


def test_the_area_is_scikit_learns(generator):
    scores = torch.randn(3, 400, generator=generator)
    labels = torch.rand(400, generator=generator) < 0.2
    scores[1, labels] += 1.0
    bins = bins_of(scores).long()
    held = torch.zeros(3, N_BINS, dtype=torch.int64)
    rest = held.clone()
    held.scatter_add_(1, bins[:, labels], torch.ones_like(bins[:, labels]))
    rest.scatter_add_(1, bins[:, ~labels], torch.ones_like(bins[:, ~labels]))
    found = area(held, rest)
    for unit in range(3):
        assert found[unit] == pytest.approx(roc_auc_score(labels, bins[unit]), abs=1e-12)  # of the bins, to the bit
        # Ties within bins of a quarter of an octave: half of the few pairs in one bin.
        assert found[unit] == pytest.approx(roc_auc_score(labels, scores[unit]), abs=0.01)


@pytest.fixture(scope="module")
def mapped(llama):
    return wb.map_neurons(llama, side="all", k=4, progress=False)


@pytest.fixture(scope="module")
def watched(llama, mapped, corpus):
    return mapped.with_activations(llama, corpus, words=3, batch_tokens=48, progress=False)


def test_areas_and_correlations_are_those_of_all_tokens(llama, mapped, watched, corpus):
    """Every neuron of one layer, from single rows, by scikit-learn and NumPy."""
    ids, following, values = [], [], []
    for row in corpus.rows(llama):
        tokens = torch.from_numpy(row.tokens).long().unsqueeze(0)
        acts = wb.capture(llama, Batch(tokens, torch.ones_like(tokens, dtype=torch.bool)), "mlp_pre.1")
        ids += row.tokens[4:].tolist()
        following += [*row.tokens[5:].tolist(), -1] if len(row) > 4 else []
        values += acts["mlp_pre.1"][0, 4:].tolist()
    values = np.array(values)
    own = watched.table.query("side == 'gate' and layer == 1").set_index("neuron")
    words = mapped.table.query("side == 'gate' and layer == 1 and rank < 3").groupby("neuron")["token_id"].agg(list)
    tried = 0
    for neuron in words.index:
        for target, tokens in (("current", ids), ("next", following)):
            present = np.isin(tokens, words[neuron])
            assert own.loc[neuron, f"{target}_present"] == present.sum()
            if 0 < present.sum() < len(present):
                exact = roc_auc_score(present, values[:, neuron])
                # Values in one bin count as ties: of so few tokens a pair is worth up to 1 / (positives x negatives).
                assert own.loc[neuron, f"{target}_auc"] == pytest.approx(exact, abs=0.1)
                correlation = np.corrcoef(present, values[:, neuron])[0, 1]
                assert own.loc[neuron, f"{target}_correlation"] == pytest.approx(correlation, abs=1e-4)
                tried += 1
            else:
                assert np.isnan(own.loc[neuron, f"{target}_auc"])
    assert tried > 10


def test_a_planted_neuron_fires_on_its_word_and_others_do_not(corpus):
    """A gate of layer 0 that reads the very embedding of a token; its null is another neuron's words."""
    model = tiny_model("llama", check=False)
    token = int(np.bincount(np.concatenate([row.tokens[4:] for row in corpus.rows(model)])).argmax())
    with torch.no_grad():
        model.weight("W_O", 0).zero_()  # nothing but the embedding, normalised, reaches the MLP of layer 0
        reading = model.weight("W_E")[token] / model.weight("ln2.w", 0)
        model.weight("W_gate", 0)[:, 5] = reading
        model.weight("W_U")[:, token] = 50 * reading
    neurons = wb.map_neurons(model, side="gate", layers="0", k=1, progress=False)
    assert neurons.table.loc[5, "token_id"] == token
    found = neurons.with_activations(model, corpus, words=1, progress=False)
    planted = found.table.loc[5]
    assert planted["current_auc"] == 1.0
    assert planted["current_correlation"] > 0.5
    assert found.table["current_auc"].drop(5).median() < 0.9


def test_random_neurons_do_not_differ_from_their_null(llama, mapped):
    """Of an untrained model with an untied head no neuron knows its word: areas scatter around one half, as the null's do."""
    own = mapped.with_activations(llama, wb.Corpus("handbook", max_tokens=2000), words=4, progress=False).table
    enough = own[(own["current_present"] >= 10) & (own["current_null_present"] >= 10)]
    assert len(enough) > 30
    assert abs(enough["current_auc"].mean() - 0.5) < 0.1
    assert abs(enough["current_auc"].mean() - enough["current_null_auc"].mean()) < 0.1


def test_words_and_null_are_counted_each_by_itself(watched):
    """A neuron whose null's words are too rare keeps its own area."""
    table = watched.table.copy()
    table["current_present"] = np.where(table["neuron"] % 2 == 0, 10, 9)
    table["current_null_present"] = np.where(table["neuron"] % 3 == 0, 10, 0)
    found = WordActivations(table, watched.settings)
    row = found.summary().query("target == 'current' and side == 'gate'").iloc[0]
    own = table[table["side"] == "gate"]
    counted, null = own[own["neuron"] % 2 == 0], own[own["neuron"] % 3 == 0]
    areas, others = counted["current_auc"].dropna(), null["current_null_auc"].dropna()
    assert row["neurons"] == len(areas)
    assert len(areas.index.difference(others.index))  # neurons that a common filter would leave out
    assert row["median_auc"] == areas.median()
    assert row["null_median_auc"] == others.median()
    assert row["threshold"] == others.quantile(0.99)
    assert row["above_fraction"] == (areas > others.quantile(0.99)).mean()
    bands = found.by_layer(starts=[1])
    assert bands["layer"].unique().tolist() == ["0", f"1 to {table['layer'].max()}"]
    assert bands.query("side == 'gate'")["neurons"].sum() == row["neurons"]


def test_no_neuron_is_its_own_null(llama, corpus):
    """Each neuron has one word, no two the same: none is held against its own."""
    neurons = wb.map_neurons(llama, side="up", layers="0", k=1, progress=False)
    neurons.table["token_id"] = np.arange(len(neurons.table))
    found = neurons.with_activations(llama, corpus, words=1, progress=False).table
    ids = np.concatenate([row.tokens for row in corpus.rows(llama)])
    seen = np.bincount(ids, minlength=len(found))[: len(found)]
    assert found["current_null_present"].sum() == found["current_present"].sum() > 0
    lonely = np.flatnonzero(seen == seen.max())
    assert len(lonely) == 1
    assert found.loc[lonely[0], "current_null_present"] < found.loc[lonely[0], "current_present"]


def test_words_saved_and_read_again(watched, tmp_path):
    watched.save(tmp_path)
    again = WordActivations.load(tmp_path)
    assert again.table.equals(watched.table)
    assert again.settings == watched.settings
    assert "AUC" in str(again)


def test_a_map_of_other_weights_is_refused(mapped, corpus):
    with pytest.raises(OtherJob, match="of other weights"):
        mapped.with_activations(tiny_model("gpt2", check=False), corpus, progress=False)


def test_more_words_than_the_map_has_are_refused(llama, mapped, corpus):
    with pytest.raises(UnknownOption, match="the map has 4 top words"):
        mapped.with_activations(llama, corpus, words=5, progress=False)


@pytest.mark.slow
def test_layer_0_of_the_real_model_fires_on_its_words_and_the_middle_does_not(smollm):
    """The gates of layer 0 read the embedding, which is tied to the unembedding; those of layer 15 do not."""
    neurons = wb.map_neurons(smollm, side="gate", layers="0,15", k=10, progress=False)
    found = neurons.with_activations(smollm, wb.Corpus("wikipedia", max_tokens=3000, length=128), progress=False)
    by_layer = found.by_layer().set_index("layer")
    assert by_layer.loc[0, "median_auc"] > 0.95
    assert by_layer.loc[15, "median_auc"] < 0.75
    # The null of so few words scatters, but it is no more than chance on average.
    assert found.table["current_null_auc"].mean() == pytest.approx(0.5, abs=0.05)


def test_the_verbs(tmp_path):
    from families import tiny_hf, tiny_tokenizer

    folder, text = tmp_path / "model", tmp_path / "text.txt"
    tiny_hf("llama").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    text.write_text("\n\n".join(TEXTS))

    def command(*arguments):
        done = CliRunner().invoke(app, [str(argument) for argument in arguments])
        assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
        return done

    own = ("--model", folder, "--corpus", text)
    done = command("top-activations", *own, "--sites", "mlp_post.0,z.1", "--out", tmp_path / "top", "--json")
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["units"] == len(TopActivations.load(tmp_path / "top").statistics)
    assert command("map-neurons", "--model", folder, "--out", tmp_path / "map", "--no-plot").exit_code == 0
    done = command("word-activations", *own, "--map", tmp_path / "map", "--out", tmp_path / "words")
    assert done.exit_code == 0, done.stderr
    assert "does a neuron fire on one of its top 10 words?" in done.stdout
    assert (tmp_path / "words" / "word_activations.html").stat().st_size > 1e6
    run = json.loads((tmp_path / "words" / "run.json").read_text())["run"]
    assert run["corpus"]["corpus"] == "text"
    done = command("top-activations", *own, "--sites", "mlp_post.0", "--index", "a", "--out", tmp_path / "top")
    assert done.exit_code == 2
    assert "--index 'a' is not understood" in done.stderr
    done = command("top-activations", *own, "--sites", "mlp_post.0", "--strata", "x", "--out", tmp_path / "top")
    assert (done.exit_code, done.stdout) == (2, "")
    assert all(kind in done.stderr for kind in STRATA)
