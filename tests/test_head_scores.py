"""Head scores: planted heads are found, a head that attends to all alike scores its null, the real model has its heads."""

import numpy as np
import pytest
import torch
from conftest import by_trait, tiny_model
from families import tiny_hf, tiny_tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

import workbench as wb
import workbench.analyses.head_scores as module
from workbench.analyses.head_scores import SCORES
from workbench.errors import TextTooLong, UnknownOption, UnknownSite
from workbench.sites import Site
from workbench.tokens import ordinary_ids
from workbench.tracer import edited

TEXTS = ["a dog and a cat", "no dogs here"]
SMALL = {"n_random": 5, "length": 10}


class Planted:
    """Edits that put a pattern of our making into one head, which may depend on the tokens: they are seen as embeddings."""

    def __init__(self, model, layer, head, looks_at):
        self.head, self.looks_at, self.embed = head, looks_at, None
        self.edits = {Site("embed"): self.see, Site("pattern", layer): self.put}

    def see(self, embed):
        self.embed = embed
        return embed

    def put(self, pattern):
        assert self.embed is not None
        same = (self.embed[:, :, None] == self.embed[:, None]).all(-1).tril(-1)
        pattern = pattern.clone()
        pattern[:, self.head] = self.looks_at(same, pattern.shape[-1])
        return pattern


def previous(same, n):
    """To the token before; the first to itself."""
    return torch.eye(n)[(torch.arange(n) - 1).clamp_min(0)]


def duplicate(same, n):
    """To an earlier occurrence of the present token, else to the first token."""
    return torch.where(same.any(-1, keepdim=True), same.float(), torch.eye(n)[0])


def induction(same, n):
    after = same.roll(1, -1)
    after[..., 0] = False
    return torch.where(after.any(-1, keepdim=True), after.float(), torch.eye(n)[0])


def at_ten_less_one(same, n):
    """Always nine tokens back, whatever they are: where `length` is 10 it looks like an induction head."""
    return torch.eye(n)[(torch.arange(n) - 9).clamp_min(0)]


@pytest.mark.parametrize(
    ("looks_at", "expected"),
    [
        (previous, {"previous_token": 1, "induction": 0, "duplicate_token": 0, "first_token": 0, "entropy_nats": 0}),
        (induction, {"induction": 1, "induction_null": 0, "duplicate_token": 0, "duplicate_token_null": 0}),
        (duplicate, {"duplicate_token": 1, "duplicate_token_null": 0, "induction": 0}),
        (at_ten_less_one, {"induction": 1, "induction_null": 1, "duplicate_token": 0}),
        (lambda same, n: torch.eye(n)[torch.zeros(n).long()], {"first_token": 1, "previous_token": 0, "entropy_nats": 0}),
    ],
    ids=["previous", "induction", "duplicate", "one distance", "sink"],
)
def test_a_planted_head_is_found(llama, looks_at, expected):
    with edited(llama, Planted(llama, 1, 2, looks_at).edits):
        found = wb.head_scores(llama, TEXTS, **SMALL)
    head = found.table.query("layer == 1 and head == 2").iloc[0]
    for column, value in expected.items():
        assert head[column] == pytest.approx(value, abs=1e-6), column
    for score in ("previous_token", "induction", "duplicate_token", "first_token"):
        if expected.get(score) == 1:
            assert found.top(score, 1).iloc[0][["layer", "head"]].tolist() == [1, 2]


def test_uniform_attention_scores_its_null(llama):
    def uniform(pattern):
        seen = torch.ones(pattern.shape[-2:]).tril()
        return (seen / seen.sum(-1, keepdim=True)).expand_as(pattern)

    with edited(llama, {Site("pattern", layer): uniform for layer in range(3)}):
        found = wb.head_scores(llama, TEXTS, **SMALL)
    for score in SCORES:
        np.testing.assert_allclose(found.table[score], found.table[f"{score}_null"], rtol=1e-5)
    lengths = [llama.tokenize(text).tokens.shape[1] for text in TEXTS]
    seen = np.concatenate([np.arange(3, length + 1) for length in lengths])
    assert found.table["previous_token_null"][0] == pytest.approx((1 / seen).mean(), rel=1e-5)
    assert found.table["first_token_null"][0] == pytest.approx((1 / seen).mean(), rel=1e-5)
    assert found.table["entropy_nats_null"][0] == pytest.approx(np.log(seen).mean(), rel=1e-5)
    assert found.table["induction_null"][0] == pytest.approx((1 / np.arange(12, 21)).mean(), rel=1e-5)


def test_scores_of_texts_are_those_of_hugging_faces_own_patterns(llama):
    found = wb.head_scores(llama, TEXTS, **SMALL).table
    hf = tiny_hf("llama", attn_implementation="eager")
    with torch.no_grad():
        patterns = [hf(llama.tokenize(text).tokens, output_attentions=True).attentions for text in TEXTS]
    for layer in range(3):
        for head in range(4):
            own = [of_text[layer][0, head].double().numpy() for of_text in patterns]
            row = found[(found["layer"] == layer) & (found["head"] == head)].iloc[0]
            queries = [(p, i) for p in own for i in range(2, len(p))]
            assert row["previous_token"] == pytest.approx(np.mean([p[i, i - 1] for p, i in queries]), rel=1e-4)
            assert row["first_token"] == pytest.approx(np.mean([p[i, 0] for p, i in queries]), rel=1e-4)
            entropies = [-(p[i, : i + 1] * np.log(p[i, : i + 1])).sum() for p, i in queries]
            assert row["entropy_nats"] == pytest.approx(np.mean(entropies), rel=1e-4)


@by_trait
def test_every_family(tiny, family):
    if family == "falcon rw":
        with pytest.raises(UnknownSite, match=r"Site 'pattern.0' does not exist in 'falcon': .* adds its position bias twice"):
            wb.head_scores(tiny, TEXTS, **SMALL)
        return
    found = wb.head_scores(tiny, TEXTS, **SMALL)
    assert found.settings["left_out"] == ([0] if family == "lfm2" else [])
    layers = range(1, 3) if family == "lfm2" else range(3)
    assert list(zip(found.table["layer"], found.table["head"], strict=True)) == [(i, j) for i in layers for j in range(4)]
    for score in SCORES:
        highest = np.log(15) if score == "entropy_nats" else 1
        for column in (score, f"{score}_null"):
            assert found.table[column].between(0, highest + 1e-5).all(), column
    assert (found.table["entropy_nats"] <= found.table["entropy_nats_null"] + 1e-5).all()


def test_random_tokens_are_ordinary_and_do_not_repeat(llama):
    once, same, other = (module._random_batches(llama, 20, 30, seed) for seed in (0, 0, 1))
    ordinary = set(ordinary_ids(llama.tokenizer, llama.d_vocab))
    assert not ordinary & {0, *range(262, 300)}
    twice, unrepeated = (torch.cat([batch.tokens for batch in batches]) for batches in once)
    assert [len(batch.tokens) for batch in once[0]] == [16, 4]
    assert torch.equal(twice[:, :30], twice[:, 30:])
    assert torch.equal(twice[:, :30], unrepeated[:, :30])
    for row in unrepeated.tolist():
        assert len(set(row)) == 60
        assert set(row) <= ordinary
    assert torch.equal(same[1][0].tokens, once[1][0].tokens)
    assert not torch.equal(other[1][0].tokens, once[1][0].tokens)


def test_a_token_of_beginnings_is_set_where_the_tokenizer_sets_one(llama):
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizer()._tokenizer, bos_token="<s>", eos_token="<s>")
    tokenizer._tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    model = wb.load(tiny_hf("llama"), tokenizer=tokenizer)
    for batches in module._random_batches(model, 2, 10, 0):
        assert batches[0].tokens.shape == (2, 21)
        assert (batches[0].tokens[:, 0] == 0).all()
    with edited(model, Planted(model, 1, 2, induction).edits):
        assert wb.head_scores(model, TEXTS, **SMALL).top("induction", 1)["induction"][0] == pytest.approx(1)


def test_batches_change_nothing(llama, monkeypatch):
    whole = wb.head_scores(llama, TEXTS, **SMALL).table
    monkeypatch.setattr(module, "ROWS", 2)
    np.testing.assert_allclose(wb.head_scores(llama, TEXTS, **SMALL).table, whole, rtol=1e-4, atol=1e-7)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in llama.hf.modules())


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"texts": []}, UnknownOption, "An empty list of texts was given. Give at least one"),
        ({"texts": [TEXTS[0], "ab"]}, UnknownOption, "Text 1 has 2 tokens; heads are scored from the third on. Give longer"),
        ({"n_random": 0}, UnknownOption, "n_random=0 sequences of length=10 were asked for"),
        ({"length": 1}, UnknownOption, "of length 2 to 130: 'LlamaForCausalLM' has 261 ordinary tokens"),
        ({"length": 131}, UnknownOption, "length=131 were asked for, without repetition twice as long"),
        ({"length": 40}, TextTooLong, "80 tokens"),
        ({"texts": "a" * 70}, TextTooLong, "Text 0 has 70 tokens"),
    ],
)
def test_bad_input_is_refused(llama, options, error, text):
    with pytest.raises(error, match=text):
        wb.head_scores(llama, **{"texts": TEXTS, **SMALL, **options})


def test_the_real_model_has_induction_heads(smollm):
    """Without a word of ours: SmolLM2 was trained, and heads 17.3 to 17.5 and 18.6 formed."""
    found = wb.head_scores(smollm, n_random=8)
    best = found.top("induction", 4)
    assert {(18, 6), (17, 3), (17, 4), (17, 5)} == set(zip(best["layer"], best["head"], strict=True))
    assert (best["induction"] > 0.5).all()
    assert (best["induction_null"] < 0.05).all()
    assert found.top("previous_token", 1)["previous_token"][0] > 0.5 > 5 * found.table["previous_token_null"][0]
    assert found.table["first_token"].median() > 0.3  # most heads rest on the first token
    assert found.settings["texts"] == list(module.TEXTS)


def test_it_prints_and_draws():
    found = wb.head_scores(tiny_model("lfm2"), TEXTS, **SMALL)
    text = str(found)
    assert "8 heads (layers without a pattern: [0])" in text
    best = found.top("induction", 1).iloc[0]
    assert f"  induction       {best['layer']:.0f}.{best['head']:.0f} {best['induction']:.2f} (" in text
    figure = found.plot()
    for trace, score in zip(figure.data, SCORES, strict=True):
        assert list(trace.y) == [1, 2]
        np.testing.assert_allclose(np.asarray(trace.z).ravel(), found.table[score])
        np.testing.assert_allclose(np.asarray(trace.customdata).ravel(), found.table[f"{score}_null"])
