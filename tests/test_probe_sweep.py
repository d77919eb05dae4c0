"""Probes over the layers of a model: found where they were planted, beside controls, saved, drawn, read and called from a
shell."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import tiny_model
from typer.testing import CliRunner

import probes
import workbench as wb
from probes.estimators.logistic import LogisticProbe
from probes.reading import ProbeReading
from workbench.cli import app
from workbench.errors import BadArtifact, BadDataset, TooFewExamples, UnknownOption, UnknownSite, WorkbenchError

SITES = ("resid_pre.0", "resid_post")
WORDS = [f"w{i}" for i in range(30)]


def two_classes(n_words: int = 30, each: int = 4) -> probes.Dataset:
    """Random words, of which half are of one class: their embeddings say nothing of it."""
    random = np.random.default_rng(0)
    texts, labels, groups, spans = [], [], [], []
    for i in range(n_words):
        word = chr(97 + i % 26) + chr(97 + i // 26)
        for j in range(each):
            before = "".join(random.choice(list("abcdefgh"), 3 + j))
            texts.append(f"{before} {word}")
            labels.append("odd" if i % 2 else "even")
            groups.append(word)
            spans.append((len(before) + 1, len(before) + 1 + len(word)))
    return probes.Dataset(texts, labels, spans, groups, name="planted")


@pytest.fixture(scope="module")
def swept() -> probes.ProbeSweep:
    """Rows in which a concept begins at the second of three layers, with half of them said by chance before."""
    random = np.random.default_rng(0)
    y = np.repeat(np.arange(60) % 2, 5)
    groups = np.repeat([f"word {i}" for i in range(60)], 5)
    apart = np.where(y, 3.0, -3.0)[:, None] * np.eye(1, 16)
    noise = [random.normal(size=(300, 16)) + random.normal(size=(60, 16))[np.repeat(np.arange(60), 5)] for _ in range(3)]
    rows = {"resid_post.0": noise[0], "resid_post.1": noise[1] + apart, "resid_post.2": noise[2] + apart}
    labels = np.array(["no", "yes"])[y]
    return probes.sweep(rows, probes.Dataset(None, labels, groups=groups, types=groups, name="planted"), progress=False)


def test_a_planted_concept_is_found_at_the_layer_where_it_begins(swept):
    table = swept.table.set_index("site")
    assert table.loc["resid_post.0", "accuracy"] < 0.65
    assert (table.loc[["resid_post.1", "resid_post.2"], "accuracy"] > 0.95).all()
    assert (table["shuffled_accuracy"] < 0.65).all()
    assert (table["shuffled_compression"] < 1.1).all()
    assert table.loc["resid_post.0", "compression"] < 1.1 < 1.6 < table.loc["resid_post.1", "compression"]
    assert swept.best()["site"] in ("resid_post.1", "resid_post.2")
    for column in ("accuracy", "selectivity"):
        assert (table[f"{column}_low"] <= table[column]).all()
        assert (table[column] <= table[f"{column}_high"]).all()


def test_every_example_is_predicted_by_a_probe_that_did_not_see_its_group(swept):
    own = swept.at("resid_post.1")
    assert sorted(own["example"]) == list(range(300))
    assert (own["predicted"] == own["label"]).mean() == pytest.approx(
        swept.table.set_index("site").loc["resid_post.1", "accuracy"]
    )
    assert np.allclose(swept.confusion("resid_post.1").sum(axis=1), 1)


def test_patterns_point_along_what_was_planted_and_those_of_shuffled_labels_do_not(swept):
    pattern = swept.patterns["resid_post.1"][0]
    assert pattern[0] / np.linalg.norm(pattern) > 0.95
    null = swept.null_patterns["resid_post.1"]
    assert null.shape == (5, 16)
    assert np.abs(null[:, 0]).max() < np.abs(pattern[0]) / 2
    probe = swept.probes["resid_post.1"]
    assert probe.direction("yes")[0] > 0 > probe.direction("no")[0]
    first = swept.directions.groupby("label")["first"].mean()
    assert abs(first["yes"] - first["no"]) > 1


def test_a_sweep_is_saved_and_read_whole(swept, tmp_path):
    swept.save(tmp_path / "found")
    again = probes.ProbeSweep.load(tmp_path / "found")
    assert str(again) == str(swept)
    for name in ("table", "references", "predictions", "directions"):
        pd.testing.assert_frame_equal(getattr(again, name), getattr(swept, name), check_dtype=False)
    rows = np.random.default_rng(1).normal(size=(5, 16))
    for site, probe in swept.probes.items():
        np.testing.assert_array_equal(again.probes[site].predict(rows), probe.predict(rows))
        np.testing.assert_array_equal(again.patterns[site], swept.patterns[site])
        np.testing.assert_array_equal(again.null_patterns[site], swept.null_patterns[site])
    (tmp_path / "found" / "probes.safetensors").write_bytes(b"no tensors")
    with pytest.raises(BadArtifact, match="missing or damaged"):
        probes.ProbeSweep.load(tmp_path / "found")
    with pytest.raises(BadArtifact, match=r"run\.json"):
        probes.ProbeSweep.load(tmp_path)


def test_pictures_hold_the_numbers_of_the_table(swept):
    layers = swept.plot()
    drawn = {trace.name: trace for trace in layers.data if trace.name}
    np.testing.assert_allclose(drawn["the model"].y, swept.table["compression"])
    accuracy = [trace for trace in layers.data if trace.name == "the model" and trace.showlegend is not False]
    np.testing.assert_allclose(accuracy[0].y, swept.table["accuracy"])
    np.testing.assert_allclose(drawn["shuffled labels"].y, swept.table["shuffled_accuracy"])
    np.testing.assert_allclose(swept.plot("confusion", "resid_post.0").data[0].z, 100 * swept.confusion("resid_post.0"))
    assert sum(len(trace.x) for trace in swept.plot("directions").data) == len(swept.directions)
    with pytest.raises(UnknownOption, match=r"no picture 'map'.*'layers', 'confusion', 'directions'"):
        swept.plot("map")
    with pytest.raises(UnknownOption, match=r"'resid_post.9' was not swept. Swept were resid_post.0"):
        swept.plot("confusion", "resid_post.9")


def test_places_are_drawn_and_scored_in_kilometres():
    random = np.random.default_rng(0)
    where = random.uniform((-60, -170), (70, 170), (200, 2))
    rows = {"a": where @ random.normal(size=(2, 8)) + random.normal(size=(200, 8))}
    groups = [f"country {i % 40}" for i in range(200)]
    dataset = probes.Dataset(None, where, groups=groups, kind="numbers", target_names=("latitude", "longitude"))
    found = probes.sweep(rows, dataset, progress=False)
    assert found.table["r2"][0] > 0.95 > 0.3 > found.table["shuffled_r2"][0]
    assert found.table["median_km"][0] < 500
    assert found.table["bits_saved"][0] > 1
    figure = found.plot("map")
    own = found.at("a")
    np.testing.assert_allclose(figure.data[1].x, own["longitude_predicted"])
    with pytest.raises(UnknownOption, match="Numbers have no confusion"):
        found.confusion()


def test_a_model_is_swept_beside_its_untrained_twin_and_its_embeddings(llama):
    found = probes.sweep(llama, two_classes(), SITES, progress=False, shuffles=2)
    assert list(found.table["site"]) == ["resid_pre.0", "resid_post.0", "resid_post.1", "resid_post.2"]
    assert list(found.table["layer"]) == [-1, 0, 1, 2]
    assert list(found.references["site"]) == ["commonest class", "token embeddings", "bag of embeddings"]
    assert found.references["accuracy"][0] <= 0.55
    # The first state of the stream is the embedding of the token itself: the same rows, the same probe.
    assert found.table["accuracy"][0] == pytest.approx(found.references["accuracy"][1])
    for column in ("untrained_accuracy", "over_untrained", "over_embeddings", "selectivity"):
        assert found.table[[column, f"{column}_low", f"{column}_high"]].notna().all(axis=None), column
    assert np.allclose(found.table["over_untrained"], found.table["accuracy"] - found.table["untrained_accuracy"])
    assert found.settings["classes"] == ["even", "odd"]
    assert "Against the untrained model" in str(found)
    bare = probes.sweep(llama, two_classes(), ["resid_post.1"], controls=False, progress=False)
    assert bare.table["accuracy"][0] == found.table["accuracy"][2]
    assert not {"untrained_accuracy", "shuffled_accuracy", "control_accuracy"} & set(bare.table)


def test_any_probe_can_be_swept(swept):
    random = np.random.default_rng(0)
    y = np.repeat(np.arange(40) % 2, 3)
    rows = {"a": (random.normal(size=(120, 6)) + 4 * y[:, None]).astype(np.float32)}
    dataset = probes.Dataset(None, y, groups=np.repeat(np.arange(40), 3))
    for probe in ("lda", "mean", "sparse", "project", LogisticProbe(1.0, class_weight={0: 1.0, 1: 2.0}), "mlp"):
        found = probes.sweep(rows, dataset, probe=probe, shuffles=1, progress=False)
        assert found.table["accuracy"][0] > 0.95, probe
        assert found.table["shuffled_accuracy"][0] < 0.8, probe
    with pytest.raises(UnknownOption, match=r"RidgeProbe cannot be swept: it has no predict_log_proba"):
        probes.sweep(rows, dataset, probe="ridge", progress=False)
    with pytest.raises(UnknownOption, match="no probe 'svm'"):
        probes.sweep(rows, dataset, probe="svm", progress=False)
    with pytest.raises(UnknownOption, match="class_weight of=2"):
        probes.sweep(rows, dataset, probe=LogisticProbe(1.0, class_weight={2: 1.0}), progress=False)


def test_by_two_columns_nothing_is_tested_whose_word_or_template_was_learnt_from():
    """A label that only the template tells is found when templates are shared, and not when they are held out too."""
    random = np.random.default_rng(0)
    words, templates = (one.ravel() for one in np.meshgrid(np.arange(24), np.arange(12)))
    y = templates % 2
    rows = {"a": np.eye(12)[templates] * 5 + random.normal(size=(288, 12))}
    by_word = probes.sweep(rows, probes.Dataset(None, y, groups=words), progress=False, controls=False)
    by_both = probes.sweep(
        rows, probes.Dataset(None, y, groups=np.stack([words, templates], 1)), progress=False, controls=False
    )
    assert by_word.table["accuracy"][0] > 0.85
    assert by_both.table["accuracy"][0] < 0.7
    assert "held out by two columns" in str(by_both)


def test_more_columns_than_examples_are_said():
    random = np.random.default_rng(0)
    rows = {"a": random.normal(size=(40, 60))}
    found = probes.sweep(rows, probes.Dataset(None, np.arange(40) % 2), progress=False, shuffles=1)
    assert found.settings["more_columns_than_rows"] == ["a"]
    assert "more columns than examples" in str(found)


def test_what_cannot_be_swept_is_named(llama):
    dataset = probes.Dataset(None, np.arange(40) % 2)
    with pytest.raises(BadDataset, match=r"Rows 'a' are \[39, 4\], the dataset has 40 examples"):
        probes.sweep({"a": np.zeros((39, 4))}, dataset, progress=False)
    with pytest.raises(TooFewExamples, match="folds=1"):
        probes.sweep({"a": np.zeros((40, 4))}, dataset, folds=1, progress=False)
    with pytest.raises(BadDataset, match="has no texts to run a model on"):
        probes.sweep(llama, dataset, progress=False)
    lonely = probes.Dataset(None, np.arange(40) % 2, groups=np.where(np.arange(40) % 2, "one", "two"))
    with pytest.raises(TooFewExamples, match="fewest groups has 1"):
        probes.sweep({"a": np.zeros((40, 4))}, lonely, progress=False)


def test_a_direction_is_read_by_words_and_by_the_neurons_that_write_and_read_it():
    model = tiny_model("llama")
    row = model.weight("W_out", 0)[7].detach() * 3
    found = probes.read_probe(model, {"mine": row}, "resid_post.1", k=3, neurons=4)
    writes = found.table[found.table["role"] == "writes"].iloc[0]
    assert (writes["layer"], writes["neuron"], writes["side"]) == (0, 7, "down")
    assert writes["cosine"] == pytest.approx(1, abs=1e-5)
    assert writes["null"] < 0.9
    assert set(found.table.loc[found.table["role"] == "writes", "layer"]) <= {0, 1}
    assert set(found.table.loc[found.table["role"] == "reads", "layer"]) == {2}
    logits = row / row.norm() @ model.weight("W_U")
    assert found.words.table["token_id"][0] == int(logits.argmax())
    assert "neurons that write it: 0.7 down +1.00" in str(found)
    with pytest.raises(UnknownSite, match="Probe a state"):
        probes.read_probe(model, {"mine": torch.ones(48)}, "mlp_post.1")
    with pytest.raises(UnknownOption, match="Name the site"):
        probes.read_probe(model, torch.ones(1, 32))


def test_a_sweep_is_read_at_its_best_site_beside_shuffled_labels(llama, tmp_path):
    found = probes.sweep(llama, two_classes(), ["resid_post.1"], progress=False, shuffles=2)
    reading = probes.read_probe(llama, found, k=2, neurons=2)
    assert reading.settings["null"] == "shuffled labels"
    assert set(reading.table["direction"]) == {"odd - even"}
    weights = probes.read_probe(llama, found, what="weights", k=2, neurons=2)
    assert weights.settings["null"] == "random directions"
    reading.save(tmp_path)
    assert (tmp_path / "words" / "run.json").is_file()
    assert isinstance(reading, ProbeReading)
    with pytest.raises(UnknownOption, match=r"no pattern of site .resid_post\.0."):
        probes.read_probe(llama, found, "resid_post.0")


# ---- The command line


def invoke(*arguments: str):
    return CliRunner().invoke(app, list(arguments))


@pytest.fixture
def tiny_folder(tmp_path, llama) -> str:
    llama.hf.save_pretrained(tmp_path / "model")
    llama.tokenizer.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def test_a_csv_is_probed_from_the_shell(tiny_folder, tmp_path):
    own = two_classes()
    table = pd.DataFrame({"text": own.texts, "label": own.labels, "group": own.groups[:, 0]})
    table["target"] = [f"{a}:{b}" for a, b in own.spans]
    table.to_csv(tmp_path / "set.csv", index=False)
    said = invoke(
        "probe", "--model", tiny_folder, "--data", str(tmp_path / "set.csv"), "--site", "resid_post.1,resid_post.2", "--read",
        "--out", str(tmp_path / "out"), "--json",
    )  # fmt: skip
    assert said.exit_code == 0, said.output
    found = json.loads(said.stdout)
    assert [row["site"] for row in found["table"]] == ["resid_post.1", "resid_post.2"]
    assert found["settings"]["examples"] == 120
    assert min(len(found["neurons"]), len(found["words"])) > 0
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"run.json", "probe_sweep.parquet", "layers.html", "confusion.html", "directions.html", "reading"} <= names
    assert probes.ProbeSweep.load(tmp_path / "out").table["site"].tolist() == ["resid_post.1", "resid_post.2"]


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"label": "one"}, "one class"),
        ({"label": None}, "has no label"),
        ({"target": "3:99"}, "holds no word"),
        ({"group": "same"}, "fewest groups has 1"),
    ],
)
def test_bad_input_from_the_shell_is_one_line_and_exit_code_2(tiny_folder, tmp_path, changed, words):
    own = two_classes()
    table = pd.DataFrame({"text": own.texts, "label": own.labels, "group": own.groups[:, 0], "target": own.texts})
    table["target"] = [f"{a}:{b}" for a, b in own.spans]
    table.assign(**changed).to_csv(tmp_path / "set.csv", index=False)
    said = invoke("probe", "--model", tiny_folder, "--data", str(tmp_path / "set.csv"), "--site", "resid_post.1")
    assert said.exit_code == 2
    assert words in said.stderr.splitlines()[-1]


def test_classes_are_weighed_alike_where_that_is_asked_for(tiny_folder, tmp_path):
    """One example in ten is of the rare class: without weights no probe of nothing would ever guess it."""
    random = np.random.default_rng(0)
    texts = ["".join(random.choice(list("abcdefgh"), 5)) for _ in range(120)]
    pd.DataFrame({"text": texts, "label": np.arange(120) % 10 == 0}).to_csv(tmp_path / "set.csv", index=False)
    arguments = ["probe", "--model", tiny_folder, "--data", str(tmp_path / "set.csv"), "--site", "resid_post.1"]
    guessed = []
    for more in ([], ["--balanced"]):
        assert invoke(*arguments, "--no-controls", "--out", str(tmp_path / "out"), *more).exit_code == 0
        guessed.append(probes.ProbeSweep.load(tmp_path / "out").predictions["predicted"].mean())
    assert guessed[0] < 0.1 < guessed[1]
    said = invoke(*arguments, "--probe", "lda", "--balanced")
    assert said.exit_code == 2
    assert "class_weight" in said.stderr


def test_an_unknown_column_names_those_there(tiny_folder, tmp_path):
    pd.DataFrame({"text": ["a b"], "kind": ["x"]}).to_csv(tmp_path / "set.csv", index=False)
    said = invoke("probe", "--model", tiny_folder, "--data", str(tmp_path / "set.csv"))
    assert said.exit_code == 2
    assert "has no column 'label'. It has text, kind." in said.stderr


def test_shipped_sets_are_listed():
    found = json.loads(invoke("probe-sets", "--json").stdout)["sets"]
    assert {"number", "tense", "sense_class", "gender", "coordinates", "sentiment", "prose_or_code", "position"} <= set(found)
    assert "Where on the globe" in invoke("probe-sets").stdout or "latitude" in invoke("probe-sets").stdout


# ---- The real model


def test_grammatical_number_is_in_the_real_model_and_not_in_an_untrained_one(smollm):
    """Read at a later word, which is the same in singular and plural: its embedding cannot say it."""
    dataset = probes.Dataset.load("subject_number").head(400)
    found = probes.sweep(smollm, dataset, ["resid_pre.0", "resid_post.27"], progress=False, shuffles=2)
    table = found.table.set_index("site")
    assert table.loc["resid_post.27", "accuracy_low"] > 0.9
    assert table.loc["resid_post.27", "untrained_accuracy_high"] < 0.7
    assert table.loc["resid_pre.0", "accuracy_low"] < 0.5 < 0.65 > table.loc["resid_pre.0", "accuracy_high"]
    assert (table["shuffled_accuracy"] < 0.6).all()


def test_two_runs_are_the_same_to_the_last_digit(llama):
    one, two = (probes.sweep(llama, two_classes(), ["resid_post.1"], progress=False, shuffles=2) for _ in range(2))
    pd.testing.assert_frame_equal(one.table, two.table, check_exact=True)
    assert isinstance(llama, wb.LanguageModel)


def test_the_best_of_many_sites_stands_beside_the_best_of_shuffled_labels():
    """Rows of noise at 20 sites: the best looks better than chance, and luck does as well."""
    random = np.random.default_rng(0)
    rows = {f"site {i}": random.normal(size=(120, 6)) for i in range(20)}
    dataset = probes.Dataset(None, np.repeat(np.arange(40) % 2, 3), groups=np.repeat(np.arange(40), 3))
    found = probes.sweep(rows, dataset, progress=False)
    chosen = found.settings["best_beside"]
    assert chosen["sites"] == 20
    assert found.best()["accuracy"] > 0.5
    assert found.best()["accuracy"] < chosen["shuffled_most"] + 0.05
    assert chosen["shuffled"] > found.table["shuffled_accuracy"].mean() + 0.03
    assert "the best of these on shuffled labels" in str(found)


def test_states_are_not_probed_for_other_texts(llama):
    own, other = two_classes(), two_classes(20, 6)
    states = probes.collect_states(llama, own, ["resid_post.1"], progress=False)
    with pytest.raises(BadDataset, match="not of 'other'"):
        probes.sweep(states, probes.Dataset(other.texts, other.labels, other.spans, other.groups, name="other"), progress=False)
    relabelled = probes.Dataset(own.texts, own.labels[::-1], own.spans, own.groups, name="relabelled")
    assert probes.sweep(states, relabelled, progress=False, shuffles=1).settings["dataset"] == "relabelled"


def test_rows_that_cannot_be_probed_are_named():
    y = np.arange(40) % 2
    rows = np.zeros((40, 3))
    rows[7, 1] = np.nan
    with pytest.raises(WorkbenchError, match="Rows 'a' hold NaN or infinity, the first in row 7"):
        probes.sweep({"a": rows}, probes.Dataset(None, y), progress=False)
    with pytest.raises(BadDataset, match="No rows were given"):
        probes.sweep({}, probes.Dataset(None, y), progress=False)
    same = probes.Dataset(None, np.ones((40, 1)), kind="numbers")
    with pytest.raises(BadDataset, match="the same in all examples"):
        probes.sweep({"a": np.ones((40, 3))}, same, progress=False)


def test_a_probe_with_options_is_read_as_it_was(tmp_path):
    random = np.random.default_rng(0)
    y = np.repeat(np.arange(40) % 2, 3)
    rows = {"a": random.normal(size=(120, 6)) + 2 * y[:, None]}
    found = probes.sweep(rows, probes.Dataset(None, y), probe=probes.SparseProbe(2), shuffles=1, progress=False)
    found.save(tmp_path)
    again = probes.ProbeSweep.load(tmp_path).probes["a"]
    assert again.k == 2
    np.testing.assert_array_equal(again.coef_, found.probes["a"].coef_)
