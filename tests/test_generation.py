"""Continuing texts, and how texts become tokens: Hugging Face's own generate and templates are the truth."""

import pytest
import torch
from conftest import tiny_model
from families import tiny_hf

import workbench as wb
from workbench.errors import TextTooLong, UnknownOption
from workbench.generation import generate_tokens
from workbench.model import Batch


def test_generation_is_hugging_faces(smollm):
    prompts = ["My favourite animal is", "The capital of France is"]
    together = smollm.generate(prompts, max_new_tokens=8)
    for prompt, found in zip(prompts, together, strict=True):
        ids = smollm.tokenizer(prompt, return_tensors="pt")
        own = smollm.hf.generate(**ids, max_new_tokens=8, do_sample=False)[0]
        assert found == smollm.tokenizer.decode(own, skip_special_tokens=True)  # padded beside a longer one, or alone
        assert smollm.generate(prompt, max_new_tokens=8) == found
    assert "Paris" in together[1]


def test_chat_goes_through_the_template(smollm):
    text = "What is the capital of France?"
    message = [{"role": "user", "content": text}]
    expected = smollm.tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=True)["input_ids"]
    batch = smollm.tokenize([text, "Hi"], chat=True, padding_side="left")
    assert batch.tokens[0].tolist() == expected
    answer = smollm.generate(text, chat=True, max_new_tokens=12)
    assert "Paris" in answer
    assert "capital of France?" not in answer
    acts = wb.capture(smollm, batch, "resid_post.3")
    alone = wb.capture(smollm, smollm.tokenize("Hi", chat=True), "resid_post.3")["resid_post.3"][0]
    torch.testing.assert_close(acts["resid_post.3"][1, -len(alone) :], alone, rtol=1e-4, atol=1e-2)


def test_one_token_of_beginnings_or_none(smollm, llama):
    bos = smollm.tokenizer.bos_token_id
    plain = smollm.tokenize("a dog").tokens[0].tolist()
    assert smollm.tokenize("a dog", bos=True).tokens[0].tolist() == [bos, *plain]
    assert smollm.tokenize(smollm.tokenizer.bos_token + "a dog", bos=True).tokens[0].tolist() == [bos, *plain]
    assert smollm.tokenize(smollm.tokenizer.bos_token + "a dog", bos=False).tokens[0].tolist() == plain
    chat = smollm.tokenize("a dog", chat=True).tokens[0].tolist()
    assert smollm.tokenize("a dog", chat=True, bos=True).tokens[0].tolist() == chat  # the template begins with it


def test_drawing_is_repeated_by_its_seed_and_leaves_the_callers_alone(llama):
    state = torch.random.get_rng_state()
    first = llama.generate("a dog", temperature=1.0, seed=1)
    assert llama.generate("a dog", temperature=1.0, seed=1) == first
    assert llama.generate("a dog", temperature=1.0, seed=2) != first
    assert torch.equal(torch.random.get_rng_state(), state)


def test_the_models_own_settings_do_not_leak_in():
    """What is drawn is drawn from all tokens, and the likeliest is the likeliest, whatever the model's files prefer."""
    model = tiny_model("llama")
    plain, drawn = model.generate("a dog"), model.generate("a dog", temperature=1.0, seed=1)
    own = model.hf.generation_config
    own.repetition_penalty, own.top_k, own.suppress_tokens = 5.0, 1, [1, 2, 3]
    assert model.generate("a dog") == plain
    assert model.generate("a dog", temperature=1.0, seed=1) == drawn
    assert model.hf.generation_config is own
    assert len(set(model.generate("a", temperature=1000.0, max_new_tokens=60))) > 20
    batch = model.tokenize(["a"] * 500, padding_side="left")
    assert len(generate_tokens(model, batch, temperature=1000.0, max_new_tokens=1).unique()) > 150


def test_words_keep_their_space_where_a_decoder_strips_it():
    """As Llama 2's: a first word alone is decoded without its space."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<s>": 0, "▁": 1} | {f"▁w{i}": i for i in range(2, 300)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    model = wb.load(tiny_hf("llama"), tokenizer=PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>"))
    ids = model.hf.generate(**model.tokenizer("w5 w6", return_tensors="pt", return_token_type_ids=False), max_new_tokens=4)
    assert model.generate("w5 w6", max_new_tokens=4) == model.tokenizer.decode(ids[0], skip_special_tokens=True)


def test_texts_longer_than_the_context_are_refused(llama):
    assert llama.n_context == 64
    for call in (
        lambda: llama.tokenize("a" * 65),
        lambda: wb.capture(llama, ["a", "a" * 65], "resid_post.0"),
    ):
        with pytest.raises(
            TextTooLong, match=r"Text \d has 65 tokens, and the context of 'LlamaForCausalLM' is 64. Nothing is cut"
        ):
            call()
    wide = Batch(torch.ones(1, 65).long(), torch.ones(1, 65).bool())
    with pytest.raises(TextTooLong, match="The batch has 65 tokens"):
        wb.capture(llama, wide, "resid_post.0")
    with pytest.raises(TextTooLong, match="A prompt of 50 tokens and 20 new ones do not fit the context of 64"):
        llama.generate("a" * 50)
    assert wb.capture(llama, "a" * 64, "resid_post.0")["resid_post.0"].shape[1] == 64
    assert tiny_model("bloom").n_context is None  # no positions are learnt: its config names no limit


def test_bad_options_are_named(llama):
    for call, text in (
        (lambda: llama.generate("a", max_new_tokens=0), "max_new_tokens=0 is out of range: at least 1"),
        (lambda: llama.generate("a", temperature=-1.0), "temperature=-1.0 is out of range: at least 0"),
        (lambda: llama.generate("a", chat=True), "has no chat template. Leave chat out, or write the turns"),
    ):
        with pytest.raises(UnknownOption, match=text):
            call()
    with pytest.raises(UnknownOption, match="A row of the batch ends in padding"):
        generate_tokens(llama, llama.tokenize(["a dog", "a"]))
