"""Every screen on a tiny model, with the real process behind it: what it shows is what Hugging Face or the library gives."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from explorer import PROMPT, command, lines_of, said, screen, tables, with_columns
from streamlit.util import calc_hash
from transformers import AutoModelForCausalLM, AutoTokenizer

import probes
import workbench as wb
from app.screens import SCREENS
from workbench.catalogue import site_table
from workbench.tokens import shown

TITLES = {one.path: one.title for one in SCREENS}


@pytest.fixture(scope="module")
def hf(tiny_folder):
    """The model by Hugging Face's own hand."""
    return AutoModelForCausalLM.from_pretrained(tiny_folder).eval(), AutoTokenizer.from_pretrained(tiny_folder)


@pytest.fixture(scope="module")
def model(tiny_folder):
    return wb.load(tiny_folder)


def states(hf, prompt):
    """Ids, logits, and the states before and after each layer (the last one before the final norm is not among them)."""
    model, tokenizer = hf
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    with torch.no_grad():
        found = model(ids, output_hidden_states=True)
    return ids[0].tolist(), found.logits[0], found.hidden_states


def continued(hf, prompt, n=20):
    model, tokenizer = hf
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    out = model.generate(ids, max_new_tokens=n, do_sample=False, eos_token_id=None, pad_token_id=0)
    return tokenizer.decode(out[0, ids.shape[1] :])


# ---- all of them


@pytest.mark.parametrize("path", TITLES)
def test_a_screen_opens_where_there_is_nothing_yet_and_says_what_to_do(explorer, path):
    opened = screen(path, prompt=PROMPT)
    assert not opened.exception
    assert [one.value for one in opened.title] == [TITLES[path]]
    assert not opened.error
    if path not in ("prompt_lab", "backward_lens"):
        assert opened.info, "an empty screen tells what would fill it"
    assert opened.query_params == {"prompt": PROMPT}


@pytest.mark.parametrize("path", TITLES)
def test_a_screen_opens_with_results_and_its_cards_say_what_they_are_of(shown_results, tiny_folder, path):
    view = {"neurons": {"q": "dog", "neuron": "1.2", "start": PROMPT}, "probes_and_erasure": {"start": PROMPT}}.get(path, {})
    opened = screen(path, prompt=PROMPT, **view)
    assert not opened.exception
    assert not opened.error
    for line in lines_of(opened):
        assert line.startswith(("workbench ", "# No verb"))
    if path not in ("home", "jobs", "report"):
        assert f"{tiny_folder} · revision local · float32 · cpu" in said(opened.caption)
        assert "raw weights" in said(opened.caption)


@pytest.mark.parametrize(
    ("path", "view"),
    [("prompt_lab", {"prompt": " "}), ("backward_lens", {"prompt": ""}), ("backward_lens", {"prompt": PROMPT, "answer": ""}),
     ("neurons", {"neuron": "1.2", "start": " "}), ("probes_and_erasure", {"run": "erase", "start": ""})],
)  # fmt: skip
def test_an_empty_text_is_asked_for_and_nothing_is_computed_of_it(shown_results, path, view):
    opened = screen(path, **view)
    assert not opened.exception
    assert not opened.error
    assert re.search("(?i)write", said(opened.info))


def test_the_sidebar_says_which_model_is_there(explorer, tiny_folder):
    opened = screen("prompt_lab", prompt=PROMPT)
    opened.run()
    assert f"{tiny_folder} · float32 on cpu" in said(opened.sidebar.caption)
    assert "3 layers × 48 neurons" in said(opened.sidebar.caption)
    assert opened.sidebar.selectbox(key="w.model").value == str(tiny_folder)


def test_another_precision_is_another_model_and_the_numbers_say_so(explorer):
    opened = screen("backward_lens", prompt=PROMPT, dtype="bfloat16")
    assert not opened.exception
    assert "· bfloat16 ·" in said(opened.caption)
    assert "--dtype=bfloat16" in lines_of(opened)[0]
    assert "dtype=torch.bfloat16" in said(opened.code)


def test_a_device_that_is_not_there_is_told_in_words(explorer):
    device = "mps" if not torch.backends.mps.is_available() else "cuda"
    opened = screen("model_map", device=device)
    assert not opened.exception
    assert len(opened.error) == 1
    assert device in said(opened.error)
    assert "fault of the workbench" not in said(opened.error)


# ---- home


def test_home_lists_what_is_on_disk(shown_results, tiny_folder):
    opened = screen("home")
    (listed,) = with_columns(opened, "run", "kind", "made by")
    kinds = dict(zip(listed["run"], listed["kind"], strict=True))
    assert kinds == {
        "map": "neuron map", "top": "top activations", "probe": "probe_sweep", "erase": "erasure",
        "erase/scrubbing": "scrubbing", "erase/followed": "followed", "linearity": "linearity", "transport": "transport",
        "lens": "transports",
    }  # fmt: skip
    assert set(listed["model"]) == {str(tiny_folder)}
    assert set(listed["state"]) == {"whole"}
    assert dict(zip(listed["run"], listed["made by"], strict=True))["map"] == "map-neurons"
    assert f"9 runs in `{shown_results}`" in said(opened.caption)


def test_home_says_where_to_begin(shown_results):
    searched = screen("home")
    searched.button(key="to-neurons-Search the neurons for a word").click().run()
    assert [one.value for one in searched.title] == ["Neurons"]
    assert (searched.query_params["map"], searched.query_params["q"]) == ("map", "dog")


def test_home_without_a_run_offers_to_make_one(explorer):
    opened = screen("home")
    assert "0 runs in" in said(opened.caption)
    opened.button(key="to-jobs-Map all neurons").click().run()
    assert [one.value for one in opened.title] == ["Jobs"]
    assert not opened.exception


def test_home_opens_a_run_on_its_screen(shown_results):
    opened = screen("home", run="probe")
    opened.button(key="to-probes_and_erasure-Open").click().run()
    assert [one.value for one in opened.title] == ["Probes and erasure"]
    assert opened.query_params["run"] == "probe"
    assert "**probe**" in said(opened.markdown)


def test_home_tells_a_damaged_run_and_one_that_was_begun(explorer, results):
    shutil.copytree(results / "map", explorer / "cut")
    (explorer / "cut" / "run.json").write_text("{")
    (explorer / "begun" / ".neurons-parts").mkdir(parents=True)
    cut = screen("home", run="cut")
    assert "cut is damaged: " in said(cut.error)
    begun = screen("home", run="begun")
    assert "begun was begun and not finished" in said(begun.info)
    assert not cut.exception
    assert not begun.exception


def test_home_deletes_nothing_before_it_has_asked(explorer, results):
    shutil.copytree(results / "map", explorer / "own")
    opened = screen("home", run="own")
    opened.button(key="delete").click().run()
    assert (explorer / "own" / "run.json").exists()
    assert str(explorer / "own") in said(opened.code)
    assert opened.button(key="really-delete").label == "Delete"
    opened.run()
    assert (explorer / "own" / "run.json").exists()


def test_home_shows_a_run_that_has_no_screen_of_its_own(shown_results, tiny_folder, explorer, monkeypatch):
    monkeypatch.setenv("WORKBENCH_APP_RUNS", str(explorer))
    made = command("backward-lens", "--model", tiny_folder, "--prompt", PROMPT, "--target", " dog", "--out", explorer / "back")
    assert made.exit_code == 0, made.stderr
    opened = screen("home", run="back")
    assert not opened.exception
    assert "**back: backward lens**" in said(opened.markdown)
    targets = with_columns(opened, "rank", "log_probability")[0]
    assert targets["log_probability"].tolist() == wb.BackwardLens.load(explorer / "back").targets["log_probability"].tolist()


# ---- model map


def test_the_model_map_is_the_catalogue_of_sites(explorer, model):
    opened = screen("model_map")
    (table,) = with_columns(opened, "site", "shape", "writable")
    own = site_table(model)
    there = own[own["available"]]
    assert table["site"].tolist() == there["site"].tolist()
    assert table["shape"].tolist() == there["shape"].tolist()
    opened.toggle(key="only-available").set_value(False).run()
    assert with_columns(opened, "site", "shape")[0]["site"].tolist() == own["site"].tolist()
    assert {one.label: one.value for one in opened.metric} == {
        "layers": "3", "d_model": "32", "neurons a layer": "48", "heads": "4", "vocabulary": "300", "family": "llama",
    }  # fmt: skip


def test_the_model_map_verifies_the_model_when_asked(explorer, model):
    opened = screen("model_map")
    assert not opened.success
    opened.button(key="verify").click().run()
    assert said(opened.success) == model.verify().headline()
    assert with_columns(opened, "identity", "error", "tolerance")


# ---- prompt lab


def test_the_prompt_lab_shows_the_models_own_probabilities_at_the_last_layer(explorer, hf):
    ids, logits, _ = states(hf, PROMPT)
    opened = screen("prompt_lab", prompt=PROMPT)
    (cell,) = with_columns(opened, "rank", "token", "id", "probability", "logit")
    best = logits[-1].softmax(-1).topk(10)
    assert cell["id"].tolist() == best.indices.tolist()
    np.testing.assert_allclose(cell["probability"], best.values, rtol=1e-4)
    np.testing.assert_allclose(cell["logit"], logits[-1][best.indices], rtol=1e-4, atol=1e-5)
    assert f"Layer 2, position {len(ids) - 1}" in said(opened.markdown)
    assert "KL to output 0.000 nats" in said(opened.caption)
    assert f"· {len(ids)} tokens ·" in said(opened.caption)


@pytest.mark.parametrize(("layer", "pos"), [(0, 0), (1, 3)])
def test_the_prompt_lab_shows_the_logit_lens_at_a_chosen_cell(explorer, hf, layer, pos):
    _, logits, hidden = states(hf, PROMPT)
    with torch.no_grad():
        read = hf[0].lm_head(hf[0].model.norm(hidden[layer + 1][0, pos]))
    opened = screen("prompt_lab", prompt=PROMPT, layer=layer, pos=pos)
    (cell,) = with_columns(opened, "rank", "token", "id", "probability", "logit")
    best = read.softmax(-1).topk(10)
    assert cell["id"].tolist() == best.indices.tolist()
    np.testing.assert_allclose(cell["probability"], best.values, rtol=1e-4)
    kl = float((logits[pos].softmax(-1) * (logits[pos].log_softmax(-1) - read.log_softmax(-1))).sum())
    assert f"KL to output {kl:.3f} nats" in said(opened.caption)


def test_the_prompt_lab_shows_every_token_with_its_id_and_none_as_html(explorer, hf):
    prompt = "<b>a & b</b>"
    ids, _, _ = states(hf, prompt)
    page = next(one.value for one in screen("prompt_lab", prompt=prompt).html if 'class="token' in str(one.value))
    assert [int(one) for one in re.findall(r"id (\d+)\"", page)] == ids
    assert "<b>" not in page
    assert "&lt;" in page
    assert "&amp;" in page


def test_the_prompt_lab_follows_a_token(explorer, hf):
    _, logits, _ = states(hf, PROMPT)
    own = logits[-1].log_softmax(-1)
    for target, index in ((" cat", hf[1].convert_tokens_to_ids("Ġcat")), ("id:7", 7)):
        rank = int((own > own[index]).sum())
        opened = screen("prompt_lab", prompt=PROMPT, target=target)
        assert f"rank {rank:,} (the likeliest: 0), log p {float(own[index]):.2f}" in said(opened.caption)


def test_the_prompt_lab_compares_with_another_prompt_and_refuses_one_of_another_length(explorer):
    opened = screen("prompt_lab", prompt=PROMPT, compare="another prompt", other="a cat")
    assert not opened.exception
    assert "The first less the second: rank of the target" in said(opened.markdown)
    other = screen("prompt_lab", prompt=PROMPT, compare="another prompt", other="a longer prompt than that")
    assert "tokens" in said(other.error)
    assert "fault of the workbench" not in said(other.error)
    assert with_columns(other, "rank", "token", "id"), "the other cards are still there"


def test_prompts_that_are_turned_over_like_pages_are_compared_too(explorer, monkeypatch):
    monkeypatch.setattr("app.screens.prompt_lab.COLUMNS", 2)
    opened = screen("prompt_lab", prompt=PROMPT, compare="another prompt", other="a cat", pos=2)
    assert not opened.exception
    assert not opened.error
    assert "The first less the second" in said(opened.markdown)


def test_a_run_that_is_made_again_is_read_again(explorer, tiny_folder):
    for text in ("a dog", "a cat"):
        command("lens", "--model", tiny_folder, "--prompt", text, "--out", explorer / "own")
        (shown_,) = with_columns(screen("home", run="own"), "token_id", "probability")
        assert shown_["probability"].tolist() == pytest.approx(wb.LensView.load(explorer / "own").table["probability"].tolist())


def test_the_prompt_lab_reads_by_a_lens_that_was_fitted(shown_results, model):
    own = wb.lens(model, PROMPT, wb.Lens.load(shown_results / "lens", model=model), k=10).table
    own = own[(own["layer"] == 1) & (own["pos"] == 2)]
    opened = screen("prompt_lab", prompt=PROMPT, lens="lens", layer=1, pos=2)
    (cell,) = with_columns(opened, "rank", "token", "id", "probability", "logit")
    assert cell["id"].tolist() == own["token_id"].tolist()
    np.testing.assert_allclose(cell["probability"], own["probability"], rtol=1e-4)
    both = screen("prompt_lab", prompt=PROMPT, lens="lens", compare="another lens", other_lens="logit")
    assert not both.exception
    assert not both.error
    assert "The first less the second" in said(both.markdown)


def test_a_prompt_that_is_too_long_is_told_with_its_length(explorer):
    opened = screen("prompt_lab", prompt="x" * 100)
    assert not opened.exception
    assert "100" in said(opened.error) or "101" in said(opened.error)
    assert "fault of the workbench" not in said(opened.error)


# ---- neurons


def test_a_search_finds_what_the_map_finds(shown_results):
    own = wb.NeuronMap.load(shown_results / "map").find("dog", max_rank=9)
    opened = screen("neurons", q="dog")
    assert f"{len(own):,} hits for `dog`" in said(opened.markdown)
    (hits,) = with_columns(opened, "neuron", "side", "rank", "score")
    assert hits["neuron"].tolist() == [f"{row.layer}.{row.neuron}" for row in own.itertuples()]
    assert hits["token"].tolist() == [shown(one) for one in own["token"]]
    np.testing.assert_allclose(hits["score"], own["score"], rtol=1e-6)


def test_a_search_for_nothing_or_for_no_expression_is_told(shown_results):
    nothing = screen("neurons", q="zebra")
    assert not nothing.exception
    assert "zebra" in said(nothing.warning) + said(nothing.markdown)
    wrong = screen("neurons", q="(", match="regex")
    assert not wrong.exception
    assert len(wrong.warning) == 1


def test_a_neurons_words_are_those_of_its_rows_through_the_head(explorer, hf):
    layer, neuron = 1, 7
    mlp, head = hf[0].model.layers[layer].mlp, hf[0].lm_head.weight
    rows = {"up": mlp.up_proj.weight[neuron], "gate": mlp.gate_proj.weight[neuron], "down": mlp.down_proj.weight[:, neuron]}
    opened = screen("neurons", neuron=f"{layer}.{neuron}", start=PROMPT)
    assert not opened.exception
    found = with_columns(opened, "token", "logit", "probability")
    assert len(found) == 6
    own = []
    for row in rows.values():
        logits = head.detach() @ row.detach()
        own += [logits.topk(10).values.tolist(), (-(-logits).topk(10).values).tolist()]
    shown_ = {tuple(np.round(table["logit"].tolist(), 3)) for table in found}
    for logits in own:
        assert any(np.allclose(one, logits[: len(one)], atol=2e-3) for one in shown_)
    for side, row in rows.items():
        assert f"**{side}** · norm {float(row.detach().norm()):.2f}" in said(opened.markdown)


def test_a_clamped_neuron_is_the_librarys(explorer, model, hf):
    own = wb.neuron_effect(model, 1, 7, PROMPT, value=-3.5, side="gate", progress=False)
    opened = screen("neurons", neuron="1.7", start=PROMPT, value=-3.5, clamp_side="gate")
    assert "Neuron 1.7 clamped to -3.5" in said(opened.markdown)
    assert f"**{own.summary()['change'].iloc[0]:+.2f} nats**" in said(opened.markdown)
    texts = [one.value for one in opened.code]
    clamped = own.generations[~own.generations["random"] & own.generations["neuron"].notna()]["text"].iloc[0]
    assert f"{PROMPT}{continued(hf, PROMPT)}" in texts
    assert f"{PROMPT}{clamped}" in texts


def test_a_neuron_is_shown_on_the_text_of_a_run(shown_results):
    own = wb.TopActivations.load(shown_results / "top").examples(7, site="mlp_post.1")
    opened = screen("neurons", neuron="1.7", start=PROMPT)
    assert "Neuron 1.7 in top" in said(opened.markdown)
    highest = f"`{own['activation'].max():.2f}`"
    assert highest in [one.value for one in opened.markdown]
    assert any("<mark>" in str(one.value) for one in opened.html)
    none = screen("neurons", neuron="2.7", start=PROMPT)
    assert "No run of top-activations has `mlp_post.2`" in said(none.caption)


@pytest.mark.parametrize("neuron", ["7", "1.7.2", "-1.7", "1,7", "x"])
def test_what_is_no_neuron_is_told(explorer, neuron):
    opened = screen("neurons", neuron=neuron)
    assert f"Neuron {neuron!r} is not understood" in said(opened.error)


# ---- backward lens


def test_the_backward_lens_says_how_likely_the_target_is_now(explorer, hf):
    _, logits, _ = states(hf, "a dog")
    index = hf[1].convert_tokens_to_ids("Ġcat")
    own = logits[-1].log_softmax(-1)
    opened = screen("backward_lens", prompt="a dog", answer=f"id:{index}")
    assert f"rank {int((own > own[index]).sum()):,}, log p {float(own[index]):.2f}" in said(opened.caption)


def test_the_backward_lens_has_the_gradients_own_lengths(explorer, hf):
    model, tokenizer = hf
    ids = tokenizer("a dog", return_tensors="pt").input_ids
    model.zero_grad()
    (-model(ids).logits[0, -1].log_softmax(-1)[250]).backward()
    opened = screen("backward_lens", prompt="a dog", answer="id:250")
    (table,) = with_columns(opened, "layer", "matrix", "norm", "rank")
    lengths = table.set_index(["layer", "matrix"])["norm"]
    for layer in range(3):
        own = model.model.layers[layer]
        np.testing.assert_allclose(lengths[layer, "W_out"], float(own.mlp.down_proj.weight.grad.norm()), rtol=1e-3)
        np.testing.assert_allclose(lengths[layer, "W_Q"], float(own.self_attn.q_proj.weight.grad.norm()), rtol=1e-3)
    model.zero_grad()


def test_the_backward_lens_forecasts_a_step(explorer, model):
    opened = screen("backward_lens", prompt="a dog", answer=" cat", step=0.01)
    assert "A step of 0.01: foretold and measured" in said(opened.markdown)
    own = wb.forecast_step(wb.backward_lens(model, "a dog", " cat").gradients, [("a dog", " cat")], step=0.01).table
    table = with_columns(opened, *own.columns)[0]
    for name in own.select_dtypes("float"):
        np.testing.assert_allclose(table[name], own[name], rtol=1e-3, atol=1e-5)


# ---- results


def test_a_sweep_is_the_table_on_disk(shown_results):
    opened = screen("probes_and_erasure", run="probe")
    own = probes.ProbeSweep.load(shown_results / "probe")
    table = with_columns(opened, *own.table.columns)[0]
    assert table["site"].tolist() == own.table["site"].tolist() == ["resid_post.0", "resid_post.1"]
    for name in own.table.select_dtypes("float"):
        np.testing.assert_allclose(table[name].astype(float), own.table[name], rtol=1e-6)
    *text, names = str(own).split("\n")
    assert names.startswith("  .table")  # for Python alone
    assert "\n".join(text).strip() in said(opened.code)


def test_an_erasure_is_the_table_on_disk_and_its_eraser_changes_the_continuation(shown_results, model, hf):
    opened = screen("probes_and_erasure", run="erase", start=PROMPT)
    own = probes.Erasure.load(shown_results / "erase")
    table = with_columns(opened, "eraser", "linear", "edit")[0]
    assert table["eraser"].tolist() == own.table["eraser"].tolist()
    np.testing.assert_allclose(table["linear"].astype(float), own.table["linear"], rtol=1e-6)
    name = opened.selectbox(key="w.eraser").value
    with wb.intervene(model, probes.load_erasers(shown_results / "erase" / "erasers.safetensors")[name].as_edit(model=model)):
        edited = model.generate(PROMPT, max_new_tokens=20)
    texts = [one.value for one in opened.code]
    assert PROMPT + continued(hf, PROMPT) in texts
    assert edited in texts
    assert edited != PROMPT + continued(hf, PROMPT)


@pytest.mark.parametrize("run", ["erase/scrubbing", "erase/followed"])
def test_what_an_erasure_cost_is_opened_too(shown_results, run):
    opened = screen("probes_and_erasure", run=run)
    assert not opened.error
    kind = probes.Scrubbing if run.endswith("scrubbing") else probes.Followed
    own = kind.load(shown_results / run).table
    assert len(with_columns(opened, *own.columns)[0]) == len(own)


def test_a_pair_of_a_transport_has_its_scores(shown_results):
    own = wb.TransportScores.load(shown_results / "transport").table
    row = own[(own["from"] == 1) & (own["to"] == 2)].iloc[0]
    opened = screen("transport", run="transport", pair="1>2")
    assert "**From state 1 to 2**" in said(opened.markdown)
    scores = with_columns(opened, "score", "value")[0].set_index("score")["value"]
    for name in ("held out", "null", "in sample"):
        np.testing.assert_allclose(scores[name], row[name.replace(" ", "_")], rtol=1e-6)
    none = screen("transport", run="transport", pair="0>1")
    assert "was not measured" in said(none.info)


def test_a_linearity_without_its_damage_is_opened(shown_results):
    opened = screen("transport", run="linearity")
    own = wb.Linearity.load(shown_results / "linearity")
    assert own.damage is None
    table = with_columns(opened, "layer", "published", "held_out")[0]
    np.testing.assert_allclose(table["published"], own.overview()["published"], rtol=1e-6)
    assert own.paragraph() in said(opened.markdown)


# ---- report


def test_a_card_is_put_into_the_report_and_moved_and_taken_out(explorer):
    opened = screen("prompt_lab", prompt="<script>alert(1)</script>")
    opened.button(key="report-lens").click().run()
    opened.button(key="report-lens").click().run()
    opened.button(key="report-cell").click().run()
    cards = opened.query_params["cards"].split(".")
    assert len(cards) == 2
    kept = [json.loads((explorer.parent / "home/app/cards" / f"{one}.json").read_text()) for one in cards]
    assert [one["task"] for one in kept] == ["lens", "lens"]
    report = screen("report", cards=".".join(cards))
    assert [one["title"] in said(report.markdown) for one in kept] == [True, True]
    assert "wb.lens(model" in said(report.code)
    report.button(key=f"down-{cards[0]}").click().run()
    assert report.query_params["cards"] == ".".join(reversed(cards))
    report.button(key=f"gone-{cards[0]}").click().run()
    assert report.query_params["cards"] == cards[1]


def test_a_report_outlives_its_runs_and_a_look_at_another_screen(explorer, tiny_folder):
    command("lens", "--model", tiny_folder, "--prompt", PROMPT, "--out", explorer / "own")
    opened = screen("home", run="own")
    next(one for one in opened.button if (one.key or "").startswith("report-")).click().run()
    shutil.rmtree(explorer / "own")
    report = screen("report", cards=opened.query_params["cards"])
    assert not report.exception
    assert not report.error
    assert "LensView.load" in said(report.code)
    (note,) = report.text_area
    note.set_value("It says so.").run()
    for path in ("jobs", "report"):
        report._page_hash = calc_hash(path)
        report.run()
    assert [one.value for one in report.text_area] == ["It says so."]


def test_a_card_that_is_not_on_this_machine_is_told(explorer):
    opened = screen("report", cards="0123456789ab")
    assert "1 card" in said(opened.warning)
    assert not tables(opened)
