"""The overview of a prompt, against Hugging Face's own logits and the analyses that it is made of."""

import pytest
import torch
from conftest import by_trait

import workbench as wb
from workbench.errors import UnknownToken


@by_trait
def test_it_says_what_the_model_says(tiny):
    found = wb.scan(tiny, "a dog", k=4)
    with torch.no_grad():
        logits = tiny.hf(**tiny.tokenizer("a dog", return_tensors="pt")).logits[0, -1]
    assert found.table["token_id"].tolist() == logits.topk(4).indices.tolist()
    assert found.table["probability"].tolist() == pytest.approx(logits.softmax(-1).topk(4).values.tolist(), rel=1e-4)
    last = found.forms.iloc[-1]
    assert last["rank"] == 0
    assert last["probability"] == pytest.approx(float(logits.softmax(-1).max()), rel=1e-4)
    assert len(found.forms) == tiny.n_layers + 1
    target = int(logits.argmax())
    assert found.parts["contribution"].sum() == pytest.approx(float(logits[target] - logits.mean()), rel=1e-3, abs=1e-4)
    by_head = wb.logit_attribution(tiny, "a dog", target, centred=True, by="head").table
    heads = found.parts[found.parts["part"] == "head"].set_index("name")["contribution"]
    for row in by_head[by_head["part"] == "head"].to_dict("records"):
        assert heads[row["name"]] == pytest.approx(row["contribution"], rel=1e-3, abs=1e-4)


def test_a_token_may_be_followed(smollm):
    found = wb.scan(smollm, "The capital of France is", " London")
    assert found.settings["target"] == " London"
    assert found.forms["rank"].iloc[-1] > 0
    assert found.formed is None
    assert "is not the likeliest at the end" in str(found)
    paris = wb.scan(smollm, "The capital of France is")
    assert paris.table["token"].iloc[0] == " Paris"
    assert paris.formed is not None
    lens = paris.forms[(paris.forms["layer"] >= paris.formed)]
    assert (lens["rank"] == 0).all()
    assert paris.sources.set_index("source_token").loc[" France", "contribution"] > 1
    lines = str(paris).splitlines()
    assert max(map(len, lines)) <= 100
    assert len(lines) <= 45


def test_a_long_prompt_still_fits_a_screen(smollm):
    found = wb.scan(smollm, "The dog's tail " * 130)
    assert found.sources is None
    assert max(map(len, str(found).splitlines())) <= 100
    assert found.parts["contribution"].sum() == pytest.approx(found.settings["logit"], rel=1e-4)
    assert found._repr_html_().startswith("<pre>smollm2")


def test_bad_input_is_named(llama):
    with pytest.raises(UnknownToken, match="is no single token"):
        wb.scan(llama, "a dog", "no such")
