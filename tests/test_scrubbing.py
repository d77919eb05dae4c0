"""Erasers in a model's forward pass: against passes of Hugging Face's own model with hooks, and against fitting by hand."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from families import tiny_hf, tiny_tokenizer
from torch.nn import functional as F

import probes
import workbench as wb
from probes.erasing.answers import ConceptTexts, classes_of_answers
from probes.states import token_spans
from workbench.corpus.corpus import Corpus
from workbench.errors import BadArtifact, NotComparable, OtherJob, UnknownOption
from workbench.transports.transport import Transport

SITE, LAYER = "resid_post.1", 1
ANSWERS = {"many": "s", "one": "z"}
DOCUMENTS = [f"a {word} and two {word}s went {where}" for word in ("dog", "cat", "bird") for where in ("up", "off", "in")]
ORDINARY = Corpus(DOCUMENTS)


@pytest.fixture(scope="module")
def dataset() -> probes.Dataset:
    """Words of which some are of one class: their letters say it."""
    random = np.random.default_rng(0)
    texts, labels, groups, spans = [], [], [], []
    for i in range(70):
        word = f"{chr(97 + i % 10)}{chr(107 + i // 10)}{'s' if i % 5 < 2 else 'o'}"
        before, after = ("".join(random.choice(list("abcdefgh"), 1 + j)) for j in (i % 3, i % 4))
        for _ in range(2):
            texts.append(f"{before} {word} {after}")
            labels.append("many" if i % 5 < 2 else "one")
            groups.append(word)
            spans.append((len(before) + 1, len(before) + 1 + len(word)))
    return probes.Dataset(texts, labels, spans, groups, name="words")


@pytest.fixture(scope="module")
def states(llama, dataset) -> probes.States:
    return probes.collect_states(llama, dataset, ["resid_post"], progress=False)


@pytest.fixture(scope="module")
def leace(llama, states) -> probes.Eraser:
    return probes.fit_erasers(states, model=llama)[SITE]


def scrubbed(model: wb.LanguageModel, erasers, dataset: probes.Dataset, **options) -> probes.Scrubbing:
    return probes.scrub(model, erasers, dataset, **({"answers": ANSWERS, "corpus": ORDINARY, "progress": False} | options))


@contextmanager
def hooked(model: wb.LanguageModel, layer: int, made: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """Hugging Face's own model, whose block gives something else at every token but the first."""

    def changed(module, arguments, output):
        states = output[0] if isinstance(output, tuple) else output
        new = torch.cat([states[:, :1], made(states[:, 1:])], 1)
        return (new, *output[1:]) if isinstance(output, tuple) else new

    handle = model.hf.model.layers[layer].register_forward_hook(changed)
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def by_hugging_face(model: wb.LanguageModel, dataset: probes.Dataset) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Summed loss of each text, its tokens but the first, and the log odds of the second class's answer; a text at a time."""
    nats, n, odds = [], [], []
    many, one = (model.tokenizer(ANSWERS[name], add_special_tokens=False)["input_ids"][0] for name in ("many", "one"))
    for text in dataset.texts or ():
        ids = torch.tensor([model.tokenizer(text)["input_ids"]])
        logits = model.hf(ids).logits[0].double()
        nats.append(float(F.cross_entropy(logits[:-1], ids[0, 1:], reduction="sum")))
        n.append(ids.shape[1] - 1)
        odds.append(float(logits[-1, one] - logits[-1, many]))
    return np.array(nats), np.array(n), np.array(odds)


def by_formula(eraser: probes.Eraser) -> Callable[[torch.Tensor], torch.Tensor]:
    matrix, center = eraser.matrix.float(), eraser.center_.float()
    return lambda states: (states - center) @ matrix + center


# ---- Texts and answers


def test_loss_and_odds_are_those_of_hugging_faces_logits(llama, dataset):
    """In batches of many lengths here, a text at a time there."""
    texts = ConceptTexts(llama, dataset, ANSWERS)
    said = texts.under(nullcontext())
    nats, n, odds = by_hugging_face(llama, dataset)
    np.testing.assert_array_equal(texts.counted, n)
    np.testing.assert_allclose(said.nats, nats, rtol=1e-5)
    assert said.odds is not None
    np.testing.assert_allclose(said.odds, np.where(dataset.index == 1, odds, -odds), atol=1e-4)


def test_bad_answers_are_refused(llama, dataset):
    with pytest.raises(UnknownOption, match=r"no answer for 'one'\. Give one for each of many, one"):
        ConceptTexts(llama, dataset, {"many": "s"})
    with pytest.raises(UnknownOption, match="begin with the same token"):
        ConceptTexts(llama, dataset, {"many": "so", "one": "sa"})
    with pytest.raises(UnknownOption, match="'rows' has no texts"):
        ConceptTexts(llama, probes.Dataset(None, [0, 1], name="rows"), ANSWERS)
    assert classes_of_answers("plural= are,singular= is") == {"plural": " are", "singular": " is"}
    for text in ("plural", "=are", "plural=", ""):
        with pytest.raises(UnknownOption, match="is not understood"):
            classes_of_answers(text)


# ---- Scrubbing


def test_an_eraser_of_rank_0_changes_nothing_to_the_last_bit(llama, dataset, states):
    nothing = probes.fit_erasers(states, dataset, probes.RandomSubspace(0), model=llama)
    table = scrubbed(llama, {"nothing": nothing[SITE], "nothing anywhere": list(nothing.values())}, dataset).table
    assert list(table["erased"]) == ["none", "nothing", "nothing anywhere"], "no random subspace of no dimension"
    assert (table[["loss", "concept_loss", "loss_error", "concept_loss_error"]] == 0).all(axis=None)
    assert (table["agreement"] == 1).all()
    assert np.allclose(table["kl"], 0, atol=1e-7)
    assert table["task_odds"].nunique() == table["task_accuracy"].nunique() == 1


def test_edited_states_are_those_of_transform_and_the_first_token_is_left_alone(llama, dataset, leace):
    batch = llama.tokenize(list(dataset.texts[:4]))
    before = wb.capture(llama, batch, SITE)[SITE]
    with wb.intervene(llama, leace.as_edit(model=llama)):
        after = wb.capture(llama, batch, SITE)[SITE]
    real = batch.mask.clone()
    first = torch.zeros_like(real).scatter_(1, real.int().argmax(1, keepdim=True), True)
    assert torch.equal(after[first], before[first])
    torch.testing.assert_close(after[real & ~first], leace.transform(before[real & ~first]), rtol=0, atol=1e-5)
    assert float((after - before)[real & ~first].abs().max()) > 0.1


def test_figures_are_those_of_hugging_faces_model_with_a_hook(llama, dataset, leace):
    found = scrubbed(llama, {"leace": leace}, dataset).table.set_index("erased")
    nats, n, odds = by_hugging_face(llama, dataset)
    with hooked(llama, LAYER, by_formula(leace)):
        changed, _, moved = by_hugging_face(llama, dataset)
    sign = np.where(dataset.index == 1, 1, -1)
    for name, some in (("none", odds), ("leace", moved)):
        assert found.loc[name, "task_odds"] == pytest.approx((sign * some).mean(), abs=1e-4)
        assert found.loc[name, "task_accuracy"] == pytest.approx((sign * some > 0).mean(), abs=1e-9)
        assert found.loc[name, "task_accuracy_low"] <= found.loc[name, "task_accuracy"] <= found.loc[name, "task_accuracy_high"]
    assert found.loc["leace", "concept_loss"] == pytest.approx((changed - nats).sum() / n.sum(), abs=1e-5)
    assert abs(found.loc["leace", "concept_loss"]) > 1e-3


def test_change_on_ordinary_text_is_that_of_hugging_faces_model_with_a_hook(llama, dataset, leace):
    """On every other document, the ones held out; KL from the untouched model to the erased one."""
    found = scrubbed(llama, {"leace": leace}, dataset, tokens=10_000)
    change, kl, same = [], [], []
    for text in DOCUMENTS[1::2]:
        ids = torch.tensor([llama.tokenizer(text)["input_ids"]])
        with torch.no_grad():
            before = llama.hf(ids).logits[0, :-1].double().log_softmax(-1)
            with hooked(llama, LAYER, by_formula(leace)):
                after = llama.hf(ids).logits[0, :-1].double().log_softmax(-1)
        at = (torch.arange(len(before)), ids[0, 1:])
        change += (before[at] - after[at]).tolist()
        kl += (before.exp() * (before - after)).sum(1).tolist()
        same += (before.argmax(1) == after.argmax(1)).tolist()
    row = found.table.set_index("erased").loc["leace"]
    assert found.settings["scored_tokens"]["ordinary"] == len(change)
    assert row["loss"] == pytest.approx(np.mean(change), abs=1e-5)
    assert row["kl"] == pytest.approx(np.mean(kl), abs=1e-5)
    assert row["agreement"] == pytest.approx(np.mean(same))


def test_random_subspaces_are_of_the_same_sites_and_ranks(llama, dataset, states):
    erasers = probes.fit_erasers(states, model=llama)
    inlp = probes.fit_erasers({SITE: states[SITE]}, dataset, probes.INLP(directions=3, errors=-9.0), model=llama)[SITE]
    ways = {"one": erasers[SITE], "all": list(erasers.values()), "inlp": inlp}
    table = scrubbed(llama, ways, dataset, draws=2).table.set_index("erased")
    assert list(table.index) == [
        "none", "one", "all", "inlp", f"random, rank 1 at {SITE}", "random, rank 1 at resid_post.0 and 2 more",
        f"random, rank 3 at {SITE}",
    ]  # fmt: skip
    own, drawn = table.iloc[1:4], table.iloc[4:]
    assert list(drawn["sites"]) == list(own["sites"]) == [SITE, "resid_post.0,resid_post.1,resid_post.2", SITE]
    assert list(drawn["rank"]) == list(own["rank"]) == [1, 3, 3]
    once, again = (scrubbed(llama, {"one": ways["one"]}, dataset, draws=1, seed=seed).table["loss"].iloc[-1] for seed in (0, 1))
    assert table["loss"].iloc[4] == pytest.approx((once + again) / 2), "the mean of two draws"


@pytest.fixture(scope="module")
def erasure(llama, dataset) -> probes.Erasure:
    inlp = probes.INLP(directions=4, errors=-9.0)
    return probes.erase(llama, dataset, [SITE, "resid_post.2"], erasers=["leace", inlp, "random"], mlp=False, progress=False)


@pytest.fixture(scope="module")
def whole(llama, dataset, erasure) -> probes.Scrubbing:
    return scrubbed(llama, erasure, dataset, draws=1, prompts=["a dog", "two"], max_new_tokens=3, examples=60)


@pytest.fixture(scope="module")
def curved(llama, dataset, erasure) -> probes.Scrubbing:
    return scrubbed(llama, {"inlp": erasure.eraser("inlp")}, dataset, draws=1, curve=True, examples=60)


def test_an_erasure_is_scrubbed_whole_and_prompts_go_on(llama, whole):
    names = [f"{kind} at {site}" for site in (SITE, "resid_post.2") for kind in ("leace", "inlp")]
    assert list(whole.table["erased"][:5]) == ["none", *names]
    untouched = whole.texts[whole.texts["erased"] == "none"].set_index("prompt")["text"]
    assert list(untouched) == llama.generate(["a dog", "two"], max_new_tokens=3)
    assert set(whole.texts["erased"]) == set(whole.table["erased"])
    assert whole.settings["examples"] == 60


def test_a_curve_ends_at_the_whole_eraser_beside_as_many_random_directions(curved):
    inlp, random = (curved.curve[curved.curve["erased"] == name].set_index("rank") for name in ("inlp", "random"))
    assert list(inlp.index) == list(random.index)
    assert inlp.index.max() == 4
    last = curved.table.set_index("erased").loc["inlp"]
    for column in ("loss", "concept_loss", "task_accuracy"):
        assert inlp.loc[4, column] == pytest.approx(last[column], abs=1e-6)


def test_a_scrubbing_is_saved_and_read_whole(whole, curved, tmp_path):
    for i, one in enumerate((whole, curved)):
        one.save(tmp_path / str(i))
        again = probes.Scrubbing.load(tmp_path / str(i))
        assert str(again) == str(one)
        for part in ("table", "curve", "texts"):
            pd.testing.assert_frame_equal(getattr(again, part), getattr(one, part), check_dtype=False, check_column_type=False)
    with pytest.raises(BadArtifact, match=r"run\.json"):
        probes.Scrubbing.load(tmp_path)


def test_pictures_hold_the_numbers_of_the_table(whole, curved):
    bars = whole.plot().data[0]
    np.testing.assert_allclose(bars.x[::-1], whole.table["loss"])
    np.testing.assert_allclose(bars.error_x.array[::-1], 1.96 * whole.table["loss_error"])
    leace = whole.table[whole.table["erased"].str.startswith("leace")]
    profile = [trace for trace in whole.plot("profile").data if trace.name == "leace"]
    for trace, column in zip(profile, ("loss", "concept_loss", "task_accuracy"), strict=True):
        assert list(trace.x) == list(leace["sites"])
        np.testing.assert_allclose(trace.y, leace[column])
    assert "random, as large as leace" in {trace.name for trace in whole.plot("profile").data}
    curve = next(trace for trace in curved.plot("curve").data if trace.name == "INLP's first directions")
    np.testing.assert_allclose(curve.y, curved.curve.loc[curved.curve["erased"] == "inlp", "loss"])


def test_pictures_that_there_are_not_are_named_with_those_there_are(whole, curved):
    with pytest.raises(UnknownOption, match=r"no picture 'curve' of this scrubbing: it was made without.*'bars', 'profile'"):
        whole.plot("curve")
    with pytest.raises(UnknownOption, match=r"no picture 'profile' of this scrubbing: no eraser.*'bars', 'curve'"):
        curved.plot("profile")
    with pytest.raises(UnknownOption, match=r"no picture 'map' of this scrubbing\. Use one of 'bars', 'curve'"):
        curved.plot("map")


@pytest.mark.parametrize(
    ("names", "kind"),
    [
        ((SITE, "resid_post.2"), "erased"),
        ((f"leace at {SITE}", "leace at resid_post.2"), "leace"),
        (("mean 1", "mean 2"), "mean"),
        (("sal, layer 1", "sal, layer 2"), "sal, layer"),
    ],
)
def test_what_names_have_in_common_is_the_line_of_a_profile(whole, names, kind):
    rows = [whole.table.iloc[0], *(whole.table.iloc[i] for i in (1, 3))]
    table = pd.DataFrame(rows).assign(erased=["none", *names])
    alone = probes.Scrubbing(table=table, settings=whole.settings, curve=whole.curve, texts=whole.texts)
    assert kind in {trace.name for trace in alone.plot("profile").data}


def test_without_answers_there_is_no_task(llama, dataset, leace):
    table = scrubbed(llama, {"leace": leace}, dataset, answers=None, draws=1).table
    assert not {"task_accuracy", "task_odds"} & set(table)


def test_fitting_in_one_pass_is_fitting_one_after_another(llama, dataset):
    """By hand: states are collected anew for each site, from a model in which all before it are erased."""
    found = probes.fit_scrubbers(llama, dataset, ["resid_post.2", "attn_out.1", "resid_post.0"])
    assert [one.settings_["site"] for one in found] == ["resid_post.0", "attn_out.1", "resid_post.2"]
    own: list[probes.Eraser] = []
    for site in ("resid_post.0", "attn_out.1", "resid_post.2"):
        with wb.intervene(llama, *(one.as_edit(model=llama) for one in own)):
            rows = probes.collect_states(llama, dataset, [site], progress=False)
        own.append(probes.fit_erasers(rows, model=llama)[site])
    alone = probes.fit_erasers(probes.collect_states(llama, dataset, ["resid_post.2"], progress=False), model=llama)
    for one, other in zip(found, own, strict=True):
        assert one.rank == other.rank
        torch.testing.assert_close(one.matrix, other.matrix, rtol=0, atol=1e-4)
        torch.testing.assert_close(one.center_, other.center_, rtol=0, atol=1e-4)
    assert float((found[2].matrix - alone["resid_post.2"].matrix).abs().max()) > 1e-2, "else any order would do"


def test_erasers_of_other_models_and_sites_are_refused(llama, dataset, states, leace):
    other = wb.load(tiny_hf("llama", seed=1), tokenizer=tiny_tokenizer(), check=False)
    with pytest.raises(OtherJob, match=f"eraser of {SITE}"):
        scrubbed(other, {"leace": leace}, dataset)
    with pytest.raises(OtherJob, match=f"eraser of {SITE}"):
        probes.follow(other, leace, dataset, progress=False)
    with pytest.raises(OtherJob, match=r"fitted to 'resid_post\.1' and is to be used at 'resid_post\.2'"):
        leace.as_edit("resid_post.2", model=llama)
    with pytest.raises(UnknownOption, match="of no site that it knows"):
        scrubbed(llama, {"rows": probes.LEACE().fit(states[SITE], dataset.labels)}, dataset)
    with pytest.raises(UnknownOption, match="'mine' is a str, no eraser"):
        scrubbed(llama, {"mine": ["leace"]}, dataset)


# ---- Following


@pytest.fixture(scope="module")
def followed(llama, dataset, leace) -> probes.Followed:
    return probes.follow(llama, leace, dataset, progress=False)


def test_at_the_source_what_is_erased_is_at_chance_and_foretold(followed, dataset):
    assert list(followed.table["site"]) == ["resid_post.1", "resid_post.2"]
    row = followed.table.iloc[0]
    assert followed.settings["chance"] == np.bincount(dataset.index).max() / len(dataset) == 0.6
    assert row["untouched"] > 0.9
    assert row["erased"] == pytest.approx(0.6, abs=0.02)
    assert row["predicted"] == pytest.approx(row["erased"], abs=0.01)
    assert row["change_r2"] == pytest.approx(1, abs=1e-3)
    assert row["random"] > 0.9


def test_change_above_the_source_is_that_of_hugging_faces_states(llama, dataset, leace, followed):
    def last_states() -> torch.Tensor:
        places = token_spans(llama, dataset)[:, 1] - 1
        found = []
        for text, at in zip(dataset.texts or (), places, strict=True):
            ids = torch.tensor([llama.tokenizer(text)["input_ids"]])
            kept = []
            handle = llama.hf.model.layers[2].register_forward_hook(lambda *a, kept=kept: kept.append(a[2]))
            with torch.no_grad():
                llama.hf(ids)
            handle.remove()
            states = kept[0][0] if isinstance(kept[0], tuple) else kept[0]
            found.append(states.reshape(-1, llama.d_model)[at])
        return torch.stack(found)

    before = last_states()
    with hooked(llama, LAYER, by_formula(leace)):
        after = last_states()
    size = (before - after).norm() / (before - before.mean(0)).norm()
    assert followed.table.iloc[1]["change_size"] == pytest.approx(float(size), rel=1e-4)


def test_a_given_map_is_taken_instead_of_a_fitted_one(llama, dataset, leace):
    """One that carries nothing foretells that nothing changes."""
    none = replace(Transport.identity(llama, SITE, "resid_post.2"), left=torch.zeros(llama.d_model, llama.d_model).double())
    found = probes.follow(llama, leace, dataset, ["resid_post.2"], transports=[none], progress=False)
    row = found.table.iloc[0]
    assert row["predicted"] == row["untouched"]
    assert row["change_r2"] == pytest.approx(0, abs=1e-12)
    other = wb.load(tiny_hf("llama", seed=1), tokenizer=tiny_tokenizer(), check=False)
    with pytest.raises(OtherJob, match="not of the weights of"):
        probes.follow(llama, leace, dataset, transports=[Transport.identity(other, SITE, "resid_post.2")], progress=False)


def test_below_the_source_nothing_can_change(llama, dataset, leace):
    with pytest.raises(NotComparable, match=r"resid_post\.0 is computed before resid_post\.1"):
        probes.follow(llama, leace, dataset, ["resid_post.0", "resid_post.2"], progress=False)


def test_what_was_followed_is_saved_read_and_drawn(followed, tmp_path):
    followed.save(tmp_path / "found")
    again = probes.Followed.load(tmp_path / "found")
    assert str(again) == str(followed)
    pd.testing.assert_frame_equal(again.table, followed.table, check_dtype=False)
    drawn = {trace.name: trace for trace in again.plot().data if trace.name}
    for column, name in (("erased", "erased"), ("predicted", "foretold by a linear map"), ("untouched", "untouched")):
        np.testing.assert_allclose(drawn[name].y, followed.table[column])
    with pytest.raises(BadArtifact, match=r"run\.json"):
        probes.Followed.load(tmp_path)


# ---- Steering


@pytest.fixture(scope="module")
def steered(llama, dataset, states) -> probes.Steering:
    sweep = probes.sweep(states, dataset, controls=False, progress=False)
    options: dict[str, Any] = {"factors": (-1.0, 0.0, 2.0), "answers": ANSWERS, "corpus": ORDINARY, "progress": False}
    return probes.steer(llama, sweep, dataset, SITE, prompts=["a dog"], max_new_tokens=3, **options)


def test_a_factor_of_0_changes_nothing(llama, dataset, steered):
    still = steered.table[steered.table["factor"] == 0]
    assert list(still["direction"]) == ["probe", "random"]
    assert (still[["loss", "loss_error"]] == 0).all(axis=None)
    _, _, odds = by_hugging_face(llama, dataset)
    assert np.allclose(still["odds"], odds.mean(), atol=1e-4)
    assert np.allclose(still["answers"], (odds > 0).mean())
    assert steered.texts.set_index("factor").loc[0.0, "text"] == llama.generate(["a dog"], max_new_tokens=3)[0]


def test_odds_are_those_of_hugging_faces_model_with_the_vector_added(llama, dataset, states, steered):
    """The sweep's pattern is the difference of the class means, the second class's less the first's."""
    rows = states[SITE].double()
    vector = rows[dataset.index == 1].mean(0) - rows[dataset.index == 0].mean(0)
    assert steered.settings["length"] == pytest.approx(float(vector.norm()), rel=1e-4)
    table = steered.table.set_index(["direction", "factor"])
    for factor in (-1.0, 2.0):
        with hooked(llama, LAYER, lambda found, factor=factor: found + factor * vector.float()):
            _, _, odds = by_hugging_face(llama, dataset)
        assert table.loc[("probe", factor), "odds"] == pytest.approx(odds.mean(), abs=1e-3)
        assert table.loc[("probe", factor), "answers"] == pytest.approx((odds > 0).mean(), abs=0.01)
        assert abs(table.loc[("random", factor), "odds"] - table.loc[("probe", factor), "odds"]) > 1e-3


def test_a_vector_of_ones_own_is_steered_along_where_it_is_from(llama, dataset):
    options: dict[str, Any] = {"answers": ANSWERS, "corpus": ORDINARY, "progress": False, "factors": (1.0,), "draws": 1}
    found = probes.steer(llama, torch.ones(1, llama.d_model), dataset, SITE, **options)
    assert found.settings["length"] == pytest.approx(llama.d_model**0.5)
    with pytest.raises(UnknownOption, match="Name the site"):
        probes.steer(llama, torch.ones(llama.d_model), dataset, **options)
    options["answers"] = None
    with pytest.raises(UnknownOption, match="Steering is seen by two answers"):
        probes.steer(llama, torch.ones(llama.d_model), dataset, SITE, **options)


def test_what_was_steered_is_saved_read_and_drawn(steered, tmp_path):
    steered.save(tmp_path / "found")
    again = probes.Steering.load(tmp_path / "found")
    assert str(again) == str(steered)
    pd.testing.assert_frame_equal(again.table, steered.table, check_dtype=False)
    pd.testing.assert_frame_equal(again.texts, steered.texts, check_dtype=False)
    own = steered.table[steered.table["direction"] == "probe"]
    drawn = [trace for trace in again.plot().data if trace.name == "the probe's pattern"]
    np.testing.assert_allclose(drawn[0].y, own["odds"])
    np.testing.assert_allclose(drawn[1].y, own["loss"])
    with pytest.raises(BadArtifact, match=r"run\.json"):
        probes.Steering.load(tmp_path)
