"""Directions written out of weights: against the edits that they stand for, and against Hugging Face's own states of the model
that was saved."""

import numpy as np
import pytest
import torch
from families import tiny_hf, tiny_tokenizer
from transformers import AutoModelForCausalLM

import workbench as wb
from workbench.direction_ablation import WRITERS, DirectionAblation
from workbench.errors import CannotWrite, NotExact, UnknownOption

EXACT = (
    "cohere", "falcon 7b", "falcon rw", "gemma", "gpt2", "gpt_neo", "gpt_neox", "gpt_neox sequential", "gptj", "granite",
    "llama biases", "llama tied", "nemotron", "opt", "phi3", "stablelm parallel", "starcoder2",
)  # fmt: skip
"""Sequential and parallel blocks, Linear and Conv1D, biases, learned positions, scaled embeddings, tied and not."""


def exact_model(family: str) -> wb.LanguageModel:
    """A tiny one in float64."""
    return wb.load(tiny_hf(family).double(), tokenizer=tiny_tokenizer(), check=False)


def some_directions(model: wb.LanguageModel, n: int = 3) -> torch.Tensor:
    return torch.randn(n, model.d_model, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def tokens_of(model: wb.LanguageModel) -> torch.Tensor:
    return torch.randint(model.d_vocab, (2, 12), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("family", EXACT)
def test_the_saved_model_says_what_edits_make_the_model_say(family, tmp_path):
    """In float64: 1e-5 is over the logits' spread, of which rounding takes 1e-14 (of norms that Hugging Face computes in
    float32, up to 1e-6)."""
    model = exact_model(family)
    directions = some_directions(model)
    made = wb.ablate_directions(model, directions, untie=True)
    folder = made.save(tmp_path / "ablated")
    tokens = tokens_of(model)
    hf = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    with torch.no_grad():
        said = hf(tokens, output_hidden_states=True)
        untouched = model.hf(tokens, output_hidden_states=True)
        with wb.intervene(model, *made.edits()):
            edited = model.hf(tokens).logits
    spread = edited.std()
    assert float((said.logits - edited).abs().max() / spread) < 1e-5
    assert float((said.logits - untouched.logits).abs().max() / spread) > 0.05, "else any model would pass"
    along = torch.linalg.qr(directions.T)[0]
    for before, after in zip(untouched.hidden_states[:-1], said.hidden_states[:-1], strict=True):  # the last is normed
        assert float((after @ along).abs().max()) < 1e-5 * float(after.norm(dim=-1).max())
        assert float((before @ along).abs().max()) > 1e-2 * float(before.norm(dim=-1).max())
    assert made.apart < 1e-5


@pytest.mark.parametrize("family", ["llama", "llama tied", "gpt2"])
def test_the_copy_is_loaded_by_the_workbench_and_untied(family, tmp_path):
    model = wb.load(tiny_hf(family), tokenizer=tiny_tokenizer(), check=False)
    made = wb.ablate_directions(model, torch.ones(model.d_model), untie=True)
    assert made.untied == model.is_tied == (family != "llama")
    copy = wb.load(made.save(tmp_path / "new"), tokenizer=tiny_tokenizer())
    assert not copy.is_tied
    torch.testing.assert_close(copy.weight("W_U"), model.weight("W_U"), rtol=0, atol=0)
    assert model.hf.config.tie_word_embeddings == (family != "llama"), "the model's own config is as it was"
    batch = model.tokenize("a dog and a cat")
    with torch.no_grad(), wb.intervene(model, *made.edits()):
        expected, found = model.forward(batch), copy.forward(batch)
    assert float((found - expected).abs().max() / expected.std()) < 1e-4, "of float32"


def test_one_matrix_for_both_ends_is_refused_unless_it_is_saved_apart():
    model = exact_model("llama tied")
    with pytest.raises(NotExact, match=r"the embedding is the unembedding too.*untie=True"):
        wb.ablate_directions(model, some_directions(model))
    assert not wb.ablate_directions(exact_model("llama"), some_directions(model)).untied


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text", "olmo2", "glm4", "exaone4"])
def test_norms_after_attention_or_mlp_are_refused_with_the_reason(family):
    model = exact_model(family)
    with pytest.raises(NotExact, match="norm what attention and MLP give before it is added"):
        wb.ablate_directions(model, some_directions(model), untie=True)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_mixtures_are_refused(family):
    model = exact_model(family)
    with pytest.raises(NotExact, match=r"has routed experts.*wb\.project_out"):
        wb.ablate_directions(model, some_directions(model), untie=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_norm_after_the_embedding_is_noticed_by_running_both(dtype):
    model = wb.load(tiny_hf("bloom").to(dtype), tokenizer=tiny_tokenizer(), check=False)
    with pytest.raises(NotExact, match="something else writes to its stream"):
        wb.ablate_directions(model, some_directions(model), untie=True)


def test_blocks_of_another_kind_are_refused():
    model = exact_model("lfm2")
    with pytest.raises(NotExact, match="no attention or MLP of the usual kind"):
        wb.ablate_directions(model, some_directions(model), untie=True)


def test_directions_that_say_nothing_are_refused(llama):
    with pytest.raises(UnknownOption, match="all directions are zero"):
        wb.ablate_directions(llama, torch.zeros(2, llama.d_model))
    with pytest.raises(UnknownOption, match=r"Directions have 31 numbers, and the stream of .* 32"):
        wb.ablate_directions(llama, torch.ones(31))


def test_directions_count_by_what_they_span(llama):
    """One of any length, or twice the same, is one direction."""
    one = some_directions(llama, 1)
    once = wb.ablate_directions(llama, one)
    again = wb.ablate_directions(llama, torch.cat([100 * one, -one]))
    assert once.basis.shape == again.basis.shape == (llama.d_model, 1)
    for name, weight in once.weights.items():
        torch.testing.assert_close(again.weights[name], weight, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", ["llama biases", "gpt2"])
def test_the_shares_spent_are_of_the_squares_that_go(family):
    """By numpy, of the parameters as Hugging Face names them; a Linear holds outputs by inputs, a Conv1D the other way."""
    model = exact_model(family)
    directions = some_directions(model).numpy()
    made = wb.ablate_directions(model, torch.from_numpy(directions), untie=True)
    assert isinstance(made, DirectionAblation)
    own = dict(model.hf.named_parameters())
    onto = np.linalg.pinv(directions) @ directions
    for row in made.table.itertuples():
        weight = own[str(row.weight)].detach().numpy()
        out_first = weight.ndim == 2 and family != "gpt2" and "embed" not in str(row.weight)
        gone = onto @ weight if out_first else weight @ onto
        assert row.spent == pytest.approx((gone**2).sum() / (weight**2).sum(), rel=1e-5)
        assert row.norm**2 - row.norm_after**2 == pytest.approx(row.spent * row.norm**2, rel=1e-5)
        np.testing.assert_allclose(made.weights[str(row.weight)].numpy(), weight - gone, atol=1e-6)
    spent = (made.table["norm"] ** 2 - made.table["norm_after"] ** 2).sum() / (made.table["norm"] ** 2).sum()
    assert f"{spent:.2%} of their squares go" in repr(made)
    assert f"3 of 32 directions from {len(made.table)} weights" in repr(made)
    biases = {name for name in own if name.endswith(("o_proj.bias", "down_proj.bias", "c_proj.bias"))}
    assert len(biases) == 2 * model.n_layers
    assert biases <= set(made.table["weight"])


def test_the_model_itself_stays_as_it_is(tmp_path):
    model = exact_model("gpt2")
    before = {name: weight.clone() for name, weight in model.hf.state_dict().items()}
    tokens = tokens_of(model)
    logits = model.hf(tokens).logits
    wb.ablate_directions(model, some_directions(model), untie=True).save(tmp_path / "new")
    assert all(torch.equal(weight, before[name]) for name, weight in model.hf.state_dict().items())
    assert torch.equal(model.hf(tokens).logits, logits)
    assert model.is_tied


def test_edits_are_at_all_that_writes_to_the_stream(llama):
    made = wb.ablate_directions(llama, some_directions(llama))
    assert tuple(edit.site for edit in made.edits()) == WRITERS


def test_nothing_is_written_over_and_nothing_half_written_is_left(llama, tmp_path, monkeypatch):
    made = wb.ablate_directions(llama, some_directions(llama))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("mine")
    with pytest.raises(CannotWrite, match="is not empty"):
        made.save(tmp_path / "full")
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["mine"]

    def refuse(folder, **_):
        folder.mkdir()
        (folder / "half").write_text("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(llama.hf, "save_pretrained", refuse)
    with pytest.raises(CannotWrite, match="No space left"):
        made.save(tmp_path / "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full"]
