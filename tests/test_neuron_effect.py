"""Clamped neurons: a planted one does what it must, the null does not, and every figure is what a run by hand gives."""

import pytest
import torch
from conftest import tiny_model

import workbench as wb
from workbench.errors import LayerOutOfRange, MissingWeight, NotFinite, UnknownOption, UnknownToken


class Open(torch.nn.Module):
    """A gate that is open for every token."""

    def forward(self, x):
        return x.relu() + 1


@pytest.fixture
def planted():
    """A tiny model whose neuron 1.5 writes ` dog` strongly, whatever its gate says."""
    model = tiny_model("llama")
    direction = model.vocabulary.direction(model.token_id(" dog"))
    with torch.no_grad():
        model.weight("W_out", 1)[5] = 3 * direction / direction.norm()
    model.hf.model.layers[1].mlp.act_fn = Open()
    return model


def test_a_planted_neuron_speaks_its_word_and_random_ones_do_not(planted):
    effect = wb.neuron_effect(planted, 1, 5, ["a cat", "b"], value=40.0, words=[" dog"], n_random=19, max_new_tokens=3)
    summary = effect.summary()
    assert (summary["change"] > summary["null_high"]).all()
    assert (summary["p"] == 1 / 20).all()
    assert (summary["after"] > summary["before"]).all()
    assert (summary["words_after"] > summary["words_null"]).all()
    assert effect.table["random"].sum() == 2 * 19
    opposite = wb.neuron_effect(planted, 1, 5, "a cat", value=-40.0, words=[" dog"], max_new_tokens=1).summary()
    assert (opposite["change"] < opposite["null_low"]).all()


def test_a_neuron_that_does_nothing_has_no_effect(planted):
    with torch.no_grad():
        planted.weight("W_out", 1)[7] = 0
    effect = wb.neuron_effect(planted, 1, 7, "a cat", value=40.0, words=[" dog"], max_new_tokens=2)
    row = effect.summary().iloc[0]
    assert abs(row["change"]) < 1e-4  # rows of a batch round otherwise than each other
    assert row["p"] == 1.0
    assert effect.texts("a cat")[0] == effect.texts("a cat")[1]


def test_every_figure_is_what_single_runs_give(llama):
    effect = wb.neuron_effect(llama, 2, 3, "a dog", value=5.0, side="gate", k=4, n_random=3, max_new_tokens=4, seed=1)
    row = llama.weight("W_gate", 2)[:, 3].detach()
    assert effect.settings["words"] == [llama.token_strings[i] for i in (row @ llama.weight("W_U")).topk(4).indices.tolist()]
    assert effect.settings["site"] == "mlp_pre.2"
    batch = llama.tokenize("a dog")
    with torch.no_grad():
        clean = llama.forward(batch)[0, -1].log_softmax(-1)
    assert len(effect.table) == 4 * 4
    for (neuron, random), own in effect.table.groupby(["neuron", "random"]):
        assert random == (neuron != 3)
        with torch.no_grad(), wb.intervene(llama, wb.clamp("mlp_pre.2", int(neuron), 5.0)):
            after = llama.forward(batch)[0, -1].log_softmax(-1)
            text = llama.generate("a dog", max_new_tokens=4)
        ids = own["token_id"].tolist()
        torch.testing.assert_close(torch.tensor(own["before"].tolist()), clean[ids].exp())
        torch.testing.assert_close(torch.tensor(own["change"].tolist()), (after - clean)[ids], rtol=1e-3, atol=1e-4)
        found = effect.generations[effect.generations["neuron"] == neuron]["text"].item()
        assert "a dog" + found == text
    assert effect.settings["usual"] == [float(wb.capture(llama, batch, "mlp_pre.2")["mlp_pre.2"][0, -1, 3])]


def test_the_dog_neuron_of_the_real_model(smollm):
    """Neuron 29.808 reads dogs with its gate and writes them: its up projection clamped, dogs come where a gate is open."""
    effect = wb.neuron_effect(
        smollm, 29, 808, "My favourite animal is", value=30.0, words=[" dog", " dogs"], n_random=10, max_new_tokens=8
    )
    row = effect.summary().iloc[0]
    assert row["p"] == 1 / 11
    assert row["words_after"] > row["words_null"]
    assert "dog" in effect.texts("My favourite animal is")[1]
    assert "Neuron 29.808 (up) of smollm2-135m-instruct, and the words ·dog  ·dogs" in str(effect)
    assert "its own value at the last token" in str(effect)


def test_the_picture_shows_the_numbers(llama):
    effect = wb.neuron_effect(llama, 0, 1, ["a", "b"], n_random=4, max_new_tokens=1)
    figure = effect.plot()
    assert sorted(figure.data[1].x) == pytest.approx(sorted(effect.summary()["change"]))
    assert len(figure.data[0].x) == 8


def test_plain_mlps_and_mixtures():
    from conftest import _unchanged

    gpt2 = _unchanged("gpt2")
    effect = wb.neuron_effect(gpt2, 1, 2, "a dog", n_random=2, max_new_tokens=1)
    assert effect.settings["site"] == "mlp_pre.1"  # there is no gate: what W_in gives is the input of the nonlinearity
    assert wb.neuron_effect(gpt2, -1, 2, "a", side="down", n_random=2, max_new_tokens=1).settings["site"] == "mlp_post.2"
    with pytest.raises(MissingWeight, match="W_gate"):
        wb.neuron_effect(gpt2, 1, 2, "a dog", side="gate")
    with pytest.raises(MissingWeight, match="mixture of 4 experts"):
        wb.neuron_effect(_unchanged("mixtral"), 1, 2, "a dog")


def test_repeated_prompts_and_words_count_once(llama):
    once = wb.neuron_effect(llama, 1, 5, "a cat", words=[" dog"], n_random=3, max_new_tokens=2).summary()
    twice = wb.neuron_effect(llama, 1, 5, ["a cat", "a cat"], words=[" dog", " dog"], n_random=3, max_new_tokens=2)
    assert twice.summary().equals(once)
    assert str(twice)
    assert wb.neuron_effect(llama, 1, 5, "a cat", words=" dog", n_random=3, max_new_tokens=2).summary().equals(once)


def test_words_are_counted_up_to_the_end_of_a_text(smollm):
    effect = wb.neuron_effect(smollm, 5, 3, "My favourite animal is", words=["<|im_end|>"], n_random=2)
    assert effect.generations["words"].max() == 1  # it ends once; what follows is padding


def test_a_neuron_of_a_map_is_named_by_its_own_numbers(llama):
    row = wb.map_neurons(llama, progress=False).table.iloc[480]
    effect = wb.neuron_effect(llama, row["layer"], row["neuron"], "a", n_random=2, max_new_tokens=1)
    assert (effect.settings["layer"], effect.settings["neuron"]) == (int(row["layer"]), int(row["neuron"]))


def test_states_that_overflow_are_named():
    from conftest import _unchanged

    with pytest.raises(NotFinite, match=r"resid_post\.2 holds \d+ values that are NaN or infinite"):
        wb.neuron_effect(_unchanged("gpt2"), 1, 5, "a cat", value=1e38, n_random=2)


def test_bad_input_is_named(llama):
    for options, raised, text in (
        ({"neuron": 48}, UnknownOption, "Neuron 48 does not exist in layer 1, which has 48, counted from 0"),
        ({"neuron": 1, "n_random": 48}, UnknownOption, "n_random=48 is out of range: from 1 to 47"),
        ({"neuron": 1, "value": float("nan")}, UnknownOption, "value=nan is no number to clamp to"),
        ({"neuron": 1, "value": 1e39}, UnknownOption, r"value=1e\+39 is no number .* finite one that torch.float32 holds"),
        ({"neuron": 1, "value": 1e25}, NotFinite, r"Clamped to 1e\+25 at 'mlp_up\.1', the last state has no finite norm"),
        ({"neuron": 1, "layer": 3}, LayerOutOfRange, "Layer 3 is not in .* layers go from 0 to 2"),
        ({"neuron": 1, "layer": -4}, LayerOutOfRange, "Layer -4 is not in"),
        ({"neuron": 1, "words": []}, UnknownOption, "No prompt or no word was given"),
        ({"neuron": 1, "k": 0}, UnknownOption, "k=0 words were asked for"),
        ({"neuron": 1, "words": ["no such"]}, UnknownToken, "'no such' is no single token"),
    ):
        with pytest.raises(raised, match=text):
            wb.neuron_effect(llama, **{"layer": 1, "prompts": "a"} | options)
