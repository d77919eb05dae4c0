"""States that probes read: those of `wb.capture` at the same tokens, and of a model with random weights beside."""

import importlib
import inspect
import pkgutil

import numpy as np
import pytest
import torch
from conftest import by_trait, tiny_model
from families import tiny_hf, tiny_tokenizer
from tokenizers import Regex, Tokenizer, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

import probes
import workbench as wb
from probes import Dataset, collect_states, untrained
from probes.states import BAG, EMBEDDING
from workbench.errors import BadDataset, OutOfMemory, TextTooLong, UnknownSite

EXAMPLES = {
    "The dog runs far away.": "dog",
    "A cat": "A cat",
    "Many more animals run here than there": "animals",
    "x": "x",
    "Café dogs sleep": "Café",
    "He saw it, he saw it again.": "again",
}
SITES = ["resid_pre.0", "resid_post", "mlp_out.1", "z.2"]


def dataset(texts=EXAMPLES, repeat: int = 1) -> Dataset:
    words = list(texts.items()) * repeat
    spans = [(text.index(word), text.index(word) + len(word)) for text, word in words]
    return Dataset([text for text, _ in words], np.arange(len(words)) % 2, spans, groups=np.arange(len(words)))


def tokens_of(model: wb.LanguageModel, own: Dataset, i: int) -> list[int]:
    """Places of the tokens of an example's words, from the tokenizer's own account of characters."""
    encoded = model.tokenizer(own.texts[i])
    return sorted({encoded.char_to_token(at) for at in range(*own.spans[i])} | last_byte(encoded, own.spans[i]))


def last_byte(encoded, span) -> set[int]:
    """A character of two bytes is two tokens, of which `char_to_token` names the first."""
    offsets = [encoded.token_to_chars(at) for at in range(len(encoded["input_ids"]))]
    return {at for at, own in enumerate(offsets) if own is not None and span[0] <= own.start < span[1]}


def wanted(model: wb.LanguageModel, own: Dataset, site: str, pool: str) -> torch.Tensor:
    """One text a pass, so without padding and without other texts beside."""
    found = []
    for i, text in enumerate(own.texts):
        rows = wb.capture(model, text, [site])[site][0].flatten(1).float()[tokens_of(model, own, i)]
        found.append({"last": rows[-1], "first": rows[0], "mean": rows.mean(0)}[pool])
    return torch.stack(found)


@pytest.mark.parametrize("pool", ["last", "first", "mean"])
def test_states_are_those_captured_at_the_words(llama, pool):
    own = dataset()
    found = collect_states(llama, own, SITES, pool=pool, progress=False)
    assert list(found) == ["resid_pre.0", "resid_post.0", "resid_post.1", "resid_post.2", "mlp_out.1", "z.2"]
    for site in found:
        assert found[site].shape[0] == 6
        torch.testing.assert_close(found[site].float(), wanted(llama, own, site, pool), rtol=1e-4, atol=1e-5)  # float32
    assert len(tokens_of(llama, own, 0)) == 3, "words of several tokens, or pools would be alike"
    assert len({len(llama.tokenizer(text)["input_ids"]) for text in own.texts}) == 6, "and texts of several lengths"


@by_trait
def test_states_of_every_family_are_those_captured(family):
    model = tiny_model(family, check=False)
    own = dataset(dict(list(EXAMPLES.items())[:3]))
    found = collect_states(model, own, ["resid_post.1", "mlp_out.2"], progress=False)
    for site in found:
        torch.testing.assert_close(found[site].float(), wanted(model, own, site, "last"), rtol=1e-4, atol=1e-5)  # float32


@pytest.mark.parametrize("pool", ["last", "first", "mean"])
def test_embeddings_are_the_words_own_and_the_mean_up_to_there(llama, pool):
    own = dataset()
    found = collect_states(llama, own, "resid_post.1", pool=pool, embeddings=True, progress=False)
    assert list(found) == ["resid_post.1", EMBEDDING, BAG]
    torch.testing.assert_close(found[EMBEDDING].float(), wanted(llama, own, "embed", pool), rtol=1e-5, atol=1e-6)
    for i, text in enumerate(own.texts):
        rows = wb.capture(llama, text, ["embed"])["embed"][0][: tokens_of(llama, own, i)[-1] + 1]
        torch.testing.assert_close(found[BAG][i], rows.mean(0), rtol=1e-5, atol=1e-6)
    beside = collect_states(llama, own, ["embed", "resid_post.1"], pool=pool, embeddings=True, progress=False)
    torch.testing.assert_close(beside["embed"], beside[EMBEDDING])


@pytest.mark.parametrize("batch_tokens", [16, 64, 4096])
def test_examples_stay_in_order_however_they_are_batched(llama, batch_tokens):
    own = dataset(repeat=5)
    found = collect_states(llama, own, "resid_post.2", batch_tokens=batch_tokens, progress=False)["resid_post.2"]
    torch.testing.assert_close(found[:6].float(), wanted(llama, dataset(), "resid_post.2", "last"), rtol=1e-4, atol=1e-5)
    for start in range(6, 30, 6):  # the same texts again
        torch.testing.assert_close(found[start : start + 6], found[:6], rtol=1e-4, atol=1e-5)


def test_several_words_of_one_text_are_examples_of_their_own(llama):
    text = "The dog sees the cat."
    own = Dataset([text, text, text], [0, 1, 0], [[4, 7], [17, 20], [0, 3]])
    found = collect_states(llama, own, "resid_post.1", progress=False)["resid_post.1"]
    rows = wb.capture(llama, text, ["resid_post.1"])["resid_post.1"][0]
    torch.testing.assert_close(found, rows[[6, 19, 2]], rtol=1e-4, atol=1e-5)


def test_without_spans_the_whole_text_is_read(llama):
    own = Dataset(list(EXAMPLES), np.arange(6) % 2)
    last, mean = (
        collect_states(llama, own, "resid_post.1", pool=pool, progress=False)["resid_post.1"] for pool in ("last", "mean")
    )
    for i, text in enumerate(own.texts):
        rows = wb.capture(llama, text, ["resid_post.1"])["resid_post.1"][0]
        torch.testing.assert_close(last[i], rows[-1], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(mean[i], rows.mean(0), rtol=1e-4, atol=1e-5)


def with_tokenizer(change) -> wb.LanguageModel:
    tokenizer = Tokenizer.from_str(tiny_tokenizer().backend_tokenizer.to_str())
    change(tokenizer)
    own = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="<s>")
    return wb.load(tiny_hf("llama"), tokenizer=own, check=False)


def begin_with_bos(tokenizer: Tokenizer) -> None:
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])


def drop_tildes(tokenizer: Tokenizer) -> None:
    parts = [pre_tokenizers.Split(Regex("~+"), "removed"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(parts)


@pytest.mark.parametrize("pool", ["last", "first", "mean"])
def test_a_token_before_the_text_is_no_part_of_the_words(pool):
    model = with_tokenizer(begin_with_bos)
    own = dataset()
    assert model.tokenizer("x")["input_ids"][0] == model.tokenizer.bos_token_id
    found = collect_states(model, own, "resid_post.1", pool=pool, embeddings=True, progress=False)
    torch.testing.assert_close(found["resid_post.1"], wanted(model, own, "resid_post.1", pool), rtol=1e-4, atol=1e-5)
    assert found.settings["at_first_token"] == 0
    rows = wb.capture(model, own.texts[0], ["embed"])["embed"][0][: tokens_of(model, own, 0)[-1] + 1]
    torch.testing.assert_close(found[BAG][0], rows.mean(0), rtol=1e-5, atol=1e-6)


def test_the_share_read_at_a_first_token_is_said(llama):
    for pool, share in (("last", 1 / 6), ("first", 0.5), ("mean", 0.5)):
        found = collect_states(llama, dataset(), "resid_post.1", pool=pool, progress=False)
        assert found.settings["at_first_token"] == pytest.approx(share), "x; and with it 'A cat' and 'Café'"


def test_settings_name_model_examples_and_pool(llama):
    own = dataset()
    found = collect_states(llama, own, "resid_post", progress=False)
    assert found.settings["dataset_hash"] == own.settings["dataset_hash"]
    assert found.settings["pool"] == "last"
    assert found.settings["model"] == llama.provenance["model"]
    assert len(found) == 3
    assert "3 sites for 6 examples" in repr(found)


def test_half_precision_stays_and_means_are_float32():
    model = wb.load(tiny_hf("llama").to(torch.bfloat16), tokenizer=tiny_tokenizer(), check=False)
    found = {pool: collect_states(model, dataset(), "resid_post.1", pool=pool, progress=False) for pool in ("last", "mean")}
    assert found["last"]["resid_post.1"].dtype == torch.bfloat16
    assert found["mean"]["resid_post.1"].dtype == torch.float32


def test_too_long_a_text_is_named(llama):
    fitting = Dataset(["short", "y" * llama.n_context], [0, 1])
    assert collect_states(llama, fitting, "resid_post.1", progress=False)["resid_post.1"].shape == (2, 32)
    with pytest.raises(TextTooLong, match=r"Text 1 of 'examples' has 65 tokens, and the context of .* is 64"):
        collect_states(llama, Dataset(["short", "y" * 65], [0, 1]), "resid_post.1", progress=False)


def test_a_span_without_a_token_is_named():
    own = Dataset(["a dog", "a ~~ dog"], [0, 1], [[2, 5], [2, 4]])
    with pytest.raises(BadDataset, match=r"No token of text 1 of 'examples' lies in its span 2:4"):
        collect_states(with_tokenizer(drop_tildes), own, "resid_post.1", progress=False)


def test_what_cannot_be_collected_is_named(llama, monkeypatch):
    with pytest.raises(UnknownSite):
        collect_states(llama, dataset(), "no_such_site", progress=False)
    with pytest.raises(BadDataset, match="has no texts to run a model on"):
        collect_states(llama, Dataset(None, [0, 1]), "resid_post.1", progress=False)
    monkeypatch.setattr("probes.states.free_bytes", lambda device: 1000)
    with pytest.raises(OutOfMemory, match="fewer sites or examples"):
        collect_states(llama, dataset(), "resid_post", progress=False)


# ---- Without training


@by_trait
def test_an_untrained_model_has_the_same_shape_and_other_weights(family):
    model = tiny_model(family, check=False)
    before = {name: value.clone() for name, value in model.hf.state_dict().items()}
    state = torch.get_rng_state()
    fresh = untrained(model, 0)
    assert torch.equal(torch.get_rng_state(), state), "the global random state is left alone"
    assert all(torch.equal(value, before[name]) for name, value in model.hf.state_dict().items())
    shapes = {name: value.shape for name, value in fresh.hf.state_dict().items()}
    assert shapes == {name: value.shape for name, value in before.items()}
    matrices = [name for name, value in before.items() if value.dim() >= 2 and value.is_floating_point()]
    assert matrices
    assert not any(torch.equal(fresh.hf.state_dict()[name], before[name]) for name in matrices)
    assert (fresh.n_layers, fresh.d_model, fresh.dtype, fresh.device) == (
        model.n_layers,
        model.d_model,
        model.dtype,
        model.device,
    )
    assert fresh.tokenizer is model.tokenizer
    assert "untrained" in fresh.name


def test_the_trained_model_keeps_its_config_and_name():
    model = tiny_model("llama", check=False)
    config, name = model.hf.config.to_dict(), model.name
    fresh = untrained(model)
    assert model.hf.config.to_dict() == config
    assert model.name == name
    assert {**fresh.hf.config.to_dict(), "_name_or_path": ""} == {**config, "_name_or_path": ""}


def test_random_weights_depend_on_the_seed_alone(llama):
    torch.manual_seed(1)
    one = untrained(llama, 0)
    torch.manual_seed(2)
    same, other = untrained(llama, 0), untrained(llama, 1)
    for name, value in one.hf.state_dict().items():
        assert torch.equal(value, same.hf.state_dict()[name])
    name = "model.layers.1.mlp.up_proj.weight"
    assert not torch.equal(one.hf.state_dict()[name], other.hf.state_dict()[name])
    spread = one.hf.state_dict()[name].std()
    assert float(spread) == pytest.approx(llama.hf.config.initializer_range, rel=0.1)  # of 1,536 draws


def test_untrained_states_are_collected_alike(llama):
    own = dataset()
    fresh = untrained(llama, 0)
    found = collect_states(fresh, own, "resid_post", progress=False)
    torch.testing.assert_close(found["resid_post.2"], wanted(fresh, own, "resid_post.2", "last"), rtol=1e-4, atol=1e-6)
    trained = collect_states(llama, own, "resid_post", progress=False)
    assert float((found["resid_post.2"] - trained["resid_post.2"]).norm() / trained["resid_post.2"].norm()) > 0.1


def test_half_precision_is_kept_without_training():
    model = wb.load(tiny_hf("llama").to(torch.bfloat16), tokenizer=tiny_tokenizer(), check=False)
    fresh = untrained(model)
    assert fresh.dtype == torch.bfloat16
    assert {parameter.dtype for parameter in fresh.hf.parameters()} == {torch.bfloat16}


def test_no_public_name_is_a_modules():
    """It would turn into the module once that is imported."""
    for module in pkgutil.walk_packages(probes.__path__, "probes."):
        importlib.import_module(module.name)
    assert not [name for name in probes.__all__ if inspect.ismodule(getattr(probes, name))]
