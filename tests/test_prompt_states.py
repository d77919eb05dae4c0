"""What one prompt does inside: lengths of states and attention weights, against Hugging Face's own; `norms`, `attention`, and
`generate` with an eraser."""

import json

import numpy as np
import pytest
import torch
from conftest import tiny_model
from explorer import command
from families import tiny_hf, tiny_tokenizer

import probes
import workbench as wb
from workbench.analyses.prompt_states import PATTERN_TOKENS, attention_patterns, state_norms
from workbench.errors import LayerOutOfRange, TextTooLong, UnknownOption, UnknownSite

PROMPT = "a dog"


def hf_run(family="llama", **asked):
    model = tiny_hf(family, attn_implementation="eager")
    ids = tiny_tokenizer()(PROMPT, return_tensors="pt").input_ids
    with torch.no_grad():
        return ids[0].tolist(), model(ids, **asked)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_norms_are_the_lengths_of_hugging_faces_states(family):
    ids, own = hf_run(family, output_hidden_states=True)
    found = state_norms(tiny_model(family, check=False), PROMPT)
    lengths = found.table.pivot_table(index="site", columns="pos", values="norm", observed=True)
    assert len(found.table) == len(ids) * 4
    places = ["resid_pre.0", "resid_post.0", "resid_post.1"]  # HF's last state is after the final norm
    for site, state in zip(places, own.hidden_states, strict=False):
        np.testing.assert_allclose(lengths.loc[site], state[0].norm(dim=-1), rtol=1e-5)
    assert set(lengths.index) == {*places, "resid_post.2"}
    assert found.settings["prompt"] == PROMPT
    assert "Lengths of the states" in str(found)
    assert len(found.plot().data[0].z) == 4


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize("layer", [0, -1])
def test_attention_weights_are_hugging_faces_and_sum_to_one(family, layer):
    ids, own = hf_run(family, output_attentions=True)
    found = attention_patterns(tiny_model(family, check=False), PROMPT, layer)
    weights = own.attentions[layer][0]
    n_heads, n = weights.shape[0], len(ids)
    assert found.settings["layer"] == layer % 3
    assert len(found.table) == n_heads * n * (n + 1) // 2
    for row in found.table.itertuples():
        assert row.weight == pytest.approx(float(weights[row.head, row.query, row.key]), abs=1e-6)
    sums = found.table.groupby(["head", "query"])["weight"].sum()
    assert len(sums) == n_heads * n
    np.testing.assert_allclose(sums, 1, rtol=1e-5)
    strings = tiny_tokenizer().convert_ids_to_tokens(ids)
    assert found.table[found.table["head"] == 0].drop_duplicates("query").sort_values("query")["query_token"].tolist() == [
        one.replace("Ġ", " ") for one in strings
    ]
    assert len(found.plot().data) == n_heads


def test_a_prompt_of_more_tokens_than_pairs_are_listed_of_is_refused(monkeypatch, llama):
    assert PATTERN_TOKENS == 256
    long = wb.load(tiny_hf("bloom"), tokenizer=tiny_tokenizer(), check=False)  # its positions have no end
    with pytest.raises(UnknownOption, match="has 257 tokens; pairs of up to 256 are listed"):
        attention_patterns(long, "x" * 257, 0)
    monkeypatch.setattr("workbench.analyses.prompt_states.PATTERN_TOKENS", 20)
    assert len(attention_patterns(long, "x" * 20, 0).table) == 4 * 20 * 21 // 2
    with pytest.raises(UnknownOption, match="has 21 tokens; pairs of up to 20"):
        attention_patterns(long, "x" * 21, 0)
    assert len(state_norms(long, "x" * 257).table) == 4 * 257
    with pytest.raises(TextTooLong):
        attention_patterns(llama, "x" * 100, 0)


def test_a_layer_that_is_not_there_or_has_no_heads_is_refused(llama):
    with pytest.raises(LayerOutOfRange):
        attention_patterns(llama, PROMPT, 3)
    with pytest.raises(UnknownSite, match=r"attention|pattern|layer"):
        attention_patterns(tiny_model("lfm2", check=False), PROMPT, 0)


def test_the_verbs_give_the_same_numbers(tiny_folder):
    model = wb.load(tiny_folder)
    told = json.loads(command("norms", "--model", tiny_folder, "--prompt", PROMPT, "--json").stdout)
    own = state_norms(model, PROMPT)
    assert [one["norm"] for one in told["table"]] == pytest.approx(own.table["norm"].tolist())
    assert told["settings"]["prompt"] == PROMPT
    told = json.loads(command("attention", "--model", tiny_folder, "--prompt", PROMPT, "--layer=-1", "--json").stdout)
    own = attention_patterns(model, PROMPT, 2)
    assert [one["weight"] for one in told["table"]] == pytest.approx(own.table["weight"].tolist())
    assert str(own) in command("attention", "--model", tiny_folder, "--prompt", PROMPT, "--layer", 2).stdout
    assert str(state_norms(model, PROMPT)) in command("norms", "--model", tiny_folder, "--prompt", PROMPT).stdout


def test_mistakes_of_the_verbs_are_one_line(tiny_folder):
    for words in (["attention", "--layer", 3], ["attention", "--layer", 0, "--prompt", "x" * 300], ["norms", "--prompt", ""]):
        done = command(*words, "--model", tiny_folder, *([] if "--prompt" in words else ["--prompt", PROMPT]))
        assert done.exit_code == 2
        assert done.stderr.splitlines()[-1].startswith("workbench: ")


def test_generate_goes_on_with_a_concept_erased(tiny_folder, results):
    file = results / "erase" / "erasers.safetensors"
    done = command(
        "generate", "--model", tiny_folder, "--prompt", PROMPT, "--erasers", file, "--name", "resid_post.0/leace", "--json"
    )
    told = json.loads(done.stdout)
    model, eraser = wb.load(tiny_folder), probes.load_erasers(file)["resid_post.0/leace"]
    assert told["text"] == model.generate(PROMPT)
    with wb.intervene(model, eraser.as_edit(model=model)):
        assert told["edited"] == model.generate(PROMPT)
    assert told["edited"] != told["text"]
    shown = command("generate", "--model", tiny_folder, "--prompt", PROMPT, "--erasers", file, "--name", "resid_post.0/leace")
    assert f"as it is:  {told['text']}\nedited:    {told['edited']}" in shown.stdout


def test_generate_asks_which_of_several_erasers(tiny_folder, results):
    file = results / "erase" / "erasers.safetensors"
    done = command("generate", "--model", tiny_folder, "--prompt", PROMPT, "--erasers", file)
    assert done.exit_code == 2
    assert "resid_post.0/leace" in done.stderr
