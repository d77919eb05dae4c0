"""The card of a neuron: planted rows are found, every part is what its own analysis gives, and the last layer's direct effect
is all there is."""

import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from conftest import _unchanged, by_trait, tiny_model
from families import tiny_hf, tiny_tokenizer
from typer.testing import CliRunner

import workbench as wb
from workbench.analyses.direct_effect import DirectEffect, direct_change
from workbench.analyses.neuron_score import random_rows
from workbench.cli import app
from workbench.errors import CannotWrite, LayerOutOfRange, MissingWeight, OtherJob, UnknownOption, UnknownSite
from workbench.model import Batch

TEXTS = [
    "The dog sleeps in the sun all day long", "A cat and a dog, a bird and a fish", "Paris is the capital of France.",
    "Every morning the old man walks his dog along the river", "no", "Rain falls on the roof, and the cat looks out",
]  # fmt: skip
QUICK = {"k": 4, "n_nearest": 3, "n_random": 5, "progress": False}


@pytest.fixture(scope="module")
def corpus():
    return wb.Corpus(TEXTS, length=24)


@pytest.fixture(scope="module")
def card(llama, corpus):
    return wb.neuron_card(llama, 1, 7, corpus=corpus, prompts=["a dog", "the"], **QUICK)


def only(table, **chosen):
    for column, value in chosen.items():
        table = table[table[column] == value]
    return table.reset_index(drop=True)


# Weights


def test_a_planted_row_speaks_its_word_and_negated_it_is_the_lowest():
    model = tiny_model("llama", check=False)
    token = model.token_id(" dog")
    direction = model.vocabulary.direction(token)
    with torch.no_grad():
        model.weight("W_gate", 1)[:, 5] = 2 * direction
        model.weight("W_out", 1)[5] = -2 * direction
    card = wb.neuron_card(model, 1, 5, corpus=None, **QUICK)
    assert only(card.table, side="gate", end="top")["token"][0] == " dog"
    assert only(card.table, side="down", end="bottom")["token"][0] == " dog"
    assert only(card.table, side="up", end="top")["token"][0] != " dog"
    gate = only(card.scores, side="gate", end="top").iloc[0]
    assert gate["word"] == " dog"
    assert gate["score"] > gate["null_score"] > 0
    down = only(card.scores, side="down", end="bottom").iloc[0]
    assert down["score"] < down["null_score"] < 0
    assert only(card.cosines, side="gate", other="down")["cosine"][0] < -0.5  # the gain of the norm turns what it reads
    assert only(card.cosines, side="gate", other="down")["above_fraction"][0] == 0.0


def test_a_copy_in_another_layer_is_the_nearest_and_a_negated_one_the_most_opposite():
    model = tiny_model("llama", check=False)
    with torch.no_grad():
        row = model.weight("W_in", 2)[:, 9].clone()
        model.weight("W_in", 0)[:, 40] = 3 * row
        model.weight("W_in", 1)[:, 17] = -0.5 * row
    card = wb.neuron_card(model, -1, 9, corpus=None, **QUICK)
    for end, place, cosine in (("similar", (0, 40), 1.0), ("opposite", (1, 17), -1.0)):
        first = only(card.nearest, side="up", end=end).iloc[0]
        assert (first["layer"], first["neuron"]) == place
        assert first["cosine"] == pytest.approx(cosine, abs=1e-5)
    null = only(card.sides, side="up").iloc[0]
    assert 0 < null["null_nearest_median"] < null["null_nearest"] < 0.99


def test_neighbours_norms_and_cosines_are_those_of_all_neurons_at_once(llama, card):
    for side, name in (("up", "W_in"), ("gate", "W_gate"), ("down", "W_out")):
        rows = [llama.weight(name, layer).detach() for layer in range(3)]
        rows = [row if side == "down" else row.T for row in rows]
        stacked = torch.cat(rows)
        cosines = torch.cosine_similarity(stacked, rows[1][7][None], dim=1)
        own = 48 + 7
        assert float(cosines[own]) == pytest.approx(1.0)
        cosines[own] = 0.0
        for end, expected in (("similar", cosines.topk(3)), ("opposite", (-cosines).topk(3))):
            found = only(card.nearest, side=side, end=end)
            assert (found["layer"] * 48 + found["neuron"]).tolist() == expected.indices.tolist()
            np.testing.assert_allclose(found["cosine"].abs(), expected.values, rtol=1e-5)
        fact = only(card.sides, side=side).iloc[0]
        norms = rows[1].norm(dim=1)
        assert fact["norm"] == pytest.approx(float(norms[7]))
        assert fact["longer_fraction"] == pytest.approx(float((norms < norms[7]).sum()) / 47)
    reads = llama.weight("W_in", 1).detach().T * llama.weight("ln2.w", 1).detach()
    expected = torch.cosine_similarity(reads, llama.weight("W_out", 1).detach(), dim=1)
    found = only(card.cosines, side="up", other="down").iloc[0]
    assert found["cosine"] == pytest.approx(float(expected[7]), abs=1e-6)
    assert found["layer_median"] == pytest.approx(float(expected.quantile(0.5)), abs=1e-6)


def test_words_and_scores_are_those_of_a_map_of_the_layer(llama, card):
    neurons = wb.map_neurons(llama, side="all", layers="1", k=4, progress=False)
    for end, table in (("top", neurons.table), ("bottom", neurons.bottom)):
        for side in ("up", "gate", "down"):
            expected, found = only(table, side=side, neuron=7), only(card.table, side=side, end=end)
            assert found["token_id"].tolist() == expected["token_id"].tolist()
            np.testing.assert_allclose(found["probability"], expected["probability"], rtol=1e-4)
            extreme = expected["score"].max() if end == "top" else expected["score"].min()
            score = only(card.scores, side=side, end=end).iloc[0]
            assert score["score"] == pytest.approx(extreme, rel=1e-4)
            assert score["among"] == "layer"


def test_scores_come_from_a_map_if_there_is_one(llama):
    neurons = wb.map_neurons(llama, side=["up", "down"], k=4, progress=False)
    card = wb.neuron_card(llama, 1, 7, corpus=None, neurons=neurons, **QUICK)
    best = only(neurons.best(side="up", layers="1"), neuron=7).iloc[0]
    found = only(card.scores, side="up", end="top").iloc[0]
    assert (found["word"], found["among"]) == (best["token"], "model")
    assert found["score"] == pytest.approx(best["score"])
    assert found["null_score"] == pytest.approx(only(neurons.summary(), side="up")["threshold"][0])
    assert only(card.scores, side="gate")["among"].eq("layer").all()  # which the map does not have
    with pytest.raises(OtherJob, match=r"part, reading and decoder \('mlp', 'raw', 'none'\)"):
        wb.neuron_card(llama, 1, 7, corpus=None, neurons=neurons, decoder="gain", **QUICK)
    with pytest.raises(OtherJob, match="other weights"):
        wb.neuron_card(tiny_model("gpt2", check=False), 1, 7, corpus=None, neurons=neurons, **QUICK)


def test_random_directions_have_the_mean_and_covariance_of_the_neurons(llama):
    rows = llama.weight("W_out", 1).detach() + 1.0
    drawn = random_rows(rows, 0, 40_000)
    scale = float(rows.var(0).mean())
    torch.testing.assert_close(drawn.mean(0), rows.mean(0), rtol=0.0, atol=0.05 * scale**0.5)
    torch.testing.assert_close(drawn.T.cov(), rows.T.cov(correction=0), rtol=0.0, atol=0.05 * scale)


# Text


def test_examples_and_statistics_are_those_of_top_activations(llama, corpus, card):
    found = wb.top_activations(llama, corpus, "mlp_post.1", [7], k=4, quantiles=(0.5,), progress=False)
    own = only(card.text.examples, end="highest")
    columns = ["activation", "document_id", "row", "pos", "token_id", "token", "before", "after"]
    assert own[columns].equals(only(found.table, kind="top")[columns])
    statistics = only(card.text.statistics, side="down").iloc[0]
    for column in ("tokens", "mean", "std", "lowest", "highest", "firing_rate", "q50"):
        assert statistics[column] == found.statistics[column][0]
    assert (card.text.histogram == found.histogram[0]).all()


def test_the_lowest_examples_and_the_values_around_are_those_of_single_rows(llama, corpus, card):
    values = {}
    for row in corpus.rows(llama):
        tokens = torch.from_numpy(row.tokens).long().unsqueeze(0)
        acts = wb.capture(llama, Batch(tokens, torch.ones_like(tokens, dtype=torch.bool)), "mlp_post.1")
        values[row.index] = acts["mlp_post.1"][0, :, 7]
    every = torch.cat([row[4:] for row in values.values()])
    lowest = only(card.text.examples, end="lowest")
    np.testing.assert_allclose(lowest["activation"], every.sort().values[:4], rtol=1e-4, atol=1e-6)
    for example in card.text.examples.to_dict("records"):
        row, pos = values[example["row"]], example["pos"]
        around = slice(max(0, pos - 16), pos + 17)
        np.testing.assert_allclose(example["values"], row[around], rtol=1e-4, atol=1e-6)
        assert example["tokens"][example["at"]] == example["token"]
        assert "".join(example["tokens"]) == example["before"] + example["token"] + example["after"]


def test_areas_of_its_words_are_those_of_word_activations(llama, corpus, card):
    neurons = wb.map_neurons(llama, side="all", layers="1", k=4, progress=False)
    expected = only(neurons.with_activations(llama, corpus, words=4, progress=False).table, neuron=7)
    seen = 0
    for row in only(card.text.words, end="top").to_dict("records"):
        own = only(expected, side=row["side"]).iloc[0]
        assert row["present"] == own[f"{row['target']}_present"]
        np.testing.assert_equal(row["auc"], own[f"{row['target']}_auc"])
        np.testing.assert_equal(row["correlation"], own[f"{row['target']}_correlation"])
        assert np.isnan(row["p"]) or row["present"] >= 10  # an area of fewer is spread wider than the null
        seen += row["present"]
    assert seen > 0


def test_a_dead_neuron_has_a_page():
    model = tiny_model("llama", check=False)
    with torch.no_grad():
        for name in ("W_in", "W_gate"):
            model.weight(name, 1)[:, 5] = 0
        model.weight("W_out", 1)[5] = 0
    card = wb.neuron_card(model, 1, 5, corpus=None, **QUICK)
    assert (card.table["logit"] == 0).all()
    assert (card.table["token_id"] == card.table["rank"]).all()  # all equal: by lowest id
    assert "Neuron 1.5" in card._repr_html_()


@pytest.mark.parametrize(("options", "text"), [({"value": float("nan")}, "value=nan is no number"), ({"prompts": None}, None)])
def test_values_and_prompts_that_are_none(llama, options, text):
    if text is None:
        assert wb.neuron_card(llama, 1, 7, corpus=None, value=1.0, **QUICK, **options).clamp is None
        return
    with pytest.raises(UnknownOption, match=text):
        wb.neuron_card(llama, 1, 7, corpus=None, **QUICK, **options)


def test_a_neuron_that_fires_on_its_word_is_told_from_its_null():
    """A gate of layer 0 that reads the very embedding of a common token."""
    model, corpus = tiny_model("llama", check=False), wb.Corpus("handbook", max_tokens=1500)
    token = int(np.bincount(np.concatenate([row.tokens[4:] for row in corpus.rows(model)])).argmax())
    with torch.no_grad():
        model.weight("W_O", 0).zero_()  # nothing but the embedding, normalised, reaches the MLP of layer 0
        reading = model.weight("W_E")[token] / model.weight("ln2.w", 0)
        model.weight("W_gate", 0)[:, 5] = reading
        usual = model.weight("W_U").norm(dim=0).mean()
        model.weight("W_U")[:, token] = usual * reading / reading.norm()
    card = wb.neuron_card(model, 0, 5, corpus=corpus, prompts=(), **QUICK | {"k": 1})
    assert only(card.table, side="gate", end="top")["token_id"].tolist() == [token]
    gate = only(card.text.words, side="gate", end="top", target="current").iloc[0]
    assert gate["auc"] == 1.0
    assert gate["null_neurons"] > 0
    assert gate["null_high"] < 0.5
    assert card.clamp is None


# What it does


@by_trait
def test_in_the_last_layer_a_clamp_does_what_is_predicted(tiny):
    """To the exact formula: the neuron's write, through the norms, and nothing else."""
    last = tiny.n_layers - 1
    batch = tiny.tokenize("the dog")
    if tiny.block_row(last).down is None:
        with pytest.raises((MissingWeight, UnknownSite)):
            direct_change(tiny, batch, last, 5, 1.0)
        return
    with torch.no_grad():
        before = tiny.forward(batch)[0, -1].log_softmax(-1)
        with wb.intervene(tiny, wb.clamp(f"mlp_post.{last}", 5, 3.0)):
            after = tiny.forward(batch)[0, -1].log_softmax(-1)
    predicted = direct_change(tiny, batch, last, 5, 3.0)
    assert float((after - before).abs().max()) > 1e-3
    torch.testing.assert_close(predicted, after - before, rtol=1e-3, atol=2e-5)


def test_before_the_last_layer_it_does_more(llama):
    batch = llama.tokenize("the dog")
    with torch.no_grad(), wb.intervene(llama, wb.clamp("mlp_post.0", 5, 3.0)):
        after = llama.forward(batch)[0, -1].log_softmax(-1)
    change = after - llama.forward(batch)[0, -1].detach().log_softmax(-1)
    assert float((direct_change(llama, batch, 0, 5, 3.0) - change).abs().max()) > 1e-2


@pytest.mark.parametrize(
    "family",
    ["llama", "gpt2", "gemma2", *(pytest.param(one, marks=pytest.mark.slow) for one in ("granite", "olmo2", "cohere"))],
)
def test_the_direct_effect_is_the_mean_of_logit_attributions(family, corpus):
    """A neuron's contribution to a centred logit, over its value, averaged over the tokens of the corpus."""
    model = _unchanged(family)
    corpus = wb.Corpus(TEXTS[:2], length=10)
    effect = DirectEffect(model, 1, 7)
    units = []
    for batch in wb.stream(model, corpus, effect.sites, progress=False):
        effect.add(batch, torch.arange(batch.tokens.n))
    for row in corpus.rows(model):
        for end in range(1, len(row) + 1):
            tokens = torch.from_numpy(row.tokens[:end]).long().unsqueeze(0)
            prompt = Batch(tokens, torch.ones_like(tokens, dtype=torch.bool))
            table = wb.logit_attribution(model, prompt, 9, centred=True, by="neuron").table
            written = only(table, part="neuron", layer=1, index=7)["contribution"][0]
            units.append(written / float(wb.capture(model, prompt, "mlp_post.1", positions="last")["mlp_post.1"][0, 0, 7]))
    table = effect.table(model.d_vocab)
    assert only(table, end="top", token_id=9)["logit"][0] == pytest.approx(np.mean(units), rel=1e-3, abs=1e-6)
    assert only(table, end="top")["logit"].mean() == pytest.approx(0.0, abs=1e-5)


def test_the_clamp_is_that_of_neuron_effect(llama, card):
    highest, lowest = card.settings["values"]
    statistics = only(card.text.statistics, side="down").iloc[0]
    assert (highest, lowest) == (statistics["highest"], statistics["lowest"])
    for value, end in ((highest, "top"), (lowest, "bottom")):
        words = only(card.table, side="down", end=end)["token_id"].tolist()
        effect = wb.neuron_effect(
            llama, 1, 7, ["a dog", "the"], value=value, side="down", words=words, n_random=5, max_new_tokens=10, progress=False
        )
        found, expected = only(card.clamp, value=value), effect.summary()
        assert found[list(expected.columns)].equals(expected)
        assert found["usual"].tolist() == effect.settings["usual"]
        assert list(zip(found["text_before"], found["text_after"], strict=True)) == [effect.texts(p) for p in ("a dog", "the")]


def test_a_value_can_be_given_and_needs_no_text(llama):
    card = wb.neuron_card(llama, 1, 7, corpus=None, value=4.0, prompts="a", **QUICK)
    assert card.clamp["value"].tolist() == [4.0]
    assert (card.text, card.logits) == (None, None)


# The card


def test_without_text_there_are_the_weights_alone(llama):
    card = wb.neuron_card(llama, 1, 7, corpus=None, **QUICK)
    assert (card.text, card.logits, card.clamp) == (None, None, None)
    assert card.to_json()["text"] is None
    assert "On " not in str(card)
    assert "Examples" not in card._repr_html_()


def test_a_plain_mlp_has_no_gate(corpus):
    card = wb.neuron_card(_unchanged("gpt2"), 1, 7, corpus=corpus, prompts="a", **QUICK)
    for table in (card.table, card.sides, card.scores, card.nearest, card.text.words):
        assert list(dict.fromkeys(table["side"])) == ["up", "down"]
    assert card.cosines[["side", "other"]].to_numpy().tolist() == [["up", "down"]]
    assert "gate" not in str(card)


def test_the_dictionary_is_json_and_holds_every_table(card):
    found = json.loads(json.dumps(card.to_json(), allow_nan=False))
    assert found["settings"]["neuron"] == 7
    assert len(found["tokens"]) == 3 * 2 * 4
    assert len(found["nearest"]) == 3 * 2 * 3
    assert [row["end"] for row in found["text"]["examples"]] == ["highest"] * 4 + ["lowest"] * 4
    assert sum(found["text"]["histogram"]) == found["settings"]["text"]["tokens"]
    assert {"scores", "cosines", "sides", "logits", "clamp"} <= set(found)


def test_the_terminal_page_says_what_the_tables_do(card):
    page = str(card)
    assert page.startswith("Neuron 1.7 of ")
    assert len(page.splitlines()) < 90
    assert all(len(line) < 200 for line in page.splitlines())
    best = only(card.scores, side="up", end="top").iloc[0]
    assert f"{best['score']:+.1f} (99 % of random directions within {best['null_score']:+.1f})" in page
    row = card.clamp.iloc[0]
    assert f"{row['change']:+.2f} nats a word ({row['direct']:+.2f} directly)" in page


class Read(HTMLParser):
    """The text of a page, and the tags that are open."""

    def __init__(self, page):
        super().__init__()
        self.words, self.stack, self.tags = [], [], set()
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        if tag not in ("meta", "line", "circle", "rect"):
            self.stack.append(tag)

    def handle_endtag(self, tag):
        if tag not in ("line", "circle", "rect"):
            assert self.stack.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def test_the_page_is_whole_and_shows_tokens_letter_by_letter(tmp_path):
    """Text and words that are markup: `<b>`, `&amp;`, quotes."""
    model = tiny_model("llama", check=False)
    nasty = "<b>&amp;\"'<script>alert(1)</script>"
    for i in range(0, model.d_vocab, 2):
        model.token_strings[i] = f"{nasty}{i}"
    card = wb.neuron_card(model, 1, 7, corpus=wb.Corpus([t + nasty for t in TEXTS]), prompts=[nasty], **QUICK)
    page = card.save(tmp_path / "card.html").read_text()
    read = Read(page)
    assert read.stack == []
    assert "script" not in read.tags
    text = "".join(read.words)
    assert any(f"{nasty}{i}" in text for i in range(0, model.d_vocab, 2))
    assert nasty in text
    assert not re.search(r"""(src|href)=|@import|url\(""", page)  # everything it needs is in it
    assert card._repr_html_() in page
    assert "nan" not in re.sub(r"<style>.*?</style>|<[^>]*>[^<]*", "", page)
    assert not re.search(r'="[^"]*nan', page)
    assert card.save(tmp_path / "again.html").read_bytes() == page.encode()


def test_a_page_that_cannot_be_written_is_named(card, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(CannotWrite, match="Name another place"):
        card.save(tmp_path / "file" / "card.html")


def test_bad_input_is_named(llama):
    for options, raised, text in (
        ({"neuron": 48}, UnknownOption, "Neuron 48 does not exist in layer 1, which has 48"),
        ({"layer": 3}, LayerOutOfRange, "Layer 3 is not in"),
        ({"n_random": 48}, UnknownOption, "n_random=48 is out of range: from 1 to 47"),
        ({"k": 0}, UnknownOption, "k=0, n_nearest=3: ask for one or more of each"),
        ({"n_nearest": 0}, UnknownOption, "n_nearest=0"),
        ({"corpus": ["a"]}, UnknownOption, "tokens of the corpus is ordinary. Take more text"),
    ):
        with pytest.raises(raised, match=text):
            wb.neuron_card(llama, **{"layer": 1, "neuron": 7, "corpus": None} | QUICK | options)


def test_a_mixture_of_experts_is_refused():
    with pytest.raises(MissingWeight, match="mixture of 4 experts"):
        wb.neuron_card(_unchanged("mixtral"), 1, 2)


def test_a_layer_beside_mixtures_has_its_neighbours_there():
    card = wb.neuron_card(_unchanged("qwen2_moe"), 0, 2, corpus=None, **QUICK)
    assert set(card.nearest["layer"]) == {0}
    assert not card.nearest["neuron"].eq(2).any()


@pytest.mark.slow
def test_the_which_neuron_of_the_real_model(smollm):
    """Neuron 29.1181 fires before `which` and writes against it: both ends of all sides must be looked at to see it."""
    corpus = wb.Corpus("wikipedia", max_tokens=1500, length=128)
    card = wb.neuron_card(smollm, 29, 1181, corpus=corpus, prompts="I know a house", n_random=4, progress=False)
    scores = card.scores.set_index(["side", "end"])
    assert scores.loc[("gate", "top"), "word"] == scores.loc[("down", "bottom"), "word"] == " which"
    assert scores.loc[("down", "bottom"), "score"] < 2 * scores.loc[("down", "bottom"), "null_score"]
    assert only(card.logits, end="bottom")["token"][0] == " which"
    lowest = card.clamp.iloc[-1]
    assert lowest["value"] < 0 < lowest["null_high"] < lowest["change"]
    assert lowest["direct"] == pytest.approx(lowest["change"], abs=1e-3)  # nothing comes after the last layer


# The verb


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("model")
    tiny_hf("llama").save_pretrained(made)
    tiny_tokenizer().save_pretrained(made)
    (made / "text.txt").write_text("\n\n".join(TEXTS))
    return made


def command(*arguments):
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done


def test_the_verb_shows_and_writes_the_card(folder, tmp_path):
    page = tmp_path / "new" / "card.html"
    own = ("--model", folder, "--corpus", folder / "text.txt", "--random", 5, "--prompt", "a dog")
    done = command("neuron", "1.7", *own, "--html", page)
    assert done.exit_code == 0, done.stderr
    assert done.stdout.startswith("Neuron 1.7 of")
    assert "Written to" in done.stderr
    assert "<h1>Neuron 1.7</h1>" in page.read_text()
    answer = json.loads(command("neuron", "1.7", *own, "--json").stdout)
    assert answer["settings"]["prompts"] == ["a dog"]
    assert answer["text"]["statistics"][0]["tokens"] > 0
    record = wb.neuron_card(wb.load(folder), 1, 7, corpus=wb.Corpus(folder / "text.txt"), prompts="a dog", n_random=5)
    assert answer["clamp"] == record.to_json()["clamp"]


def test_the_verb_without_text(folder):
    answer = json.loads(command("neuron", "1.7", "--model", folder, "--no-text", "--json").stdout)
    assert (answer["text"], answer["clamp"], answer["logits"]) == (None, None, None)


@pytest.mark.parametrize(
    ("neuron", "text"),
    [
        ("12", "Neuron '12' is not understood. Write its layer and number: 12.345"),
        ("a.b", "Neuron 'a.b' is not understood"),
        ("1.2.3", "Neuron '1.2.3' is not understood"),
        ("-1.3", "Neuron '-1.3' is not understood"),
        ("99.0", "Layer 99 is not in"),
        ("1.480", "Neuron 480 does not exist in layer 1, which has 48"),
    ],
)
def test_a_neuron_that_is_not_there_is_one_line_and_exit_code_2(folder, neuron, text):
    done = command("neuron", neuron, "--model", folder, "--no-text")
    assert (done.exit_code, done.stdout) == (2, "")
    assert text in done.stderr
    assert len([line for line in done.stderr.splitlines() if line.startswith("workbench: ")]) == 1
