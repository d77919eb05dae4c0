"""Logit attribution: sums are the model's own logits; single rows are what Hugging Face's weights and tensors give by hand."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import by_trait, tiny_model
from families import tiny_hf

import workbench as wb
from workbench.analyses.contributions import Goal
from workbench.errors import UnknownOption, UnknownSite, UnknownToken
from workbench.model import Batch

TEXT, POSITION = "a dog and a cat", -2
IOI = "When Mary and John went to the store, John gave a drink to"


def rows(attribution, part, layer):
    table = attribution.table
    return table[(table["part"] == part) & (table["layer"] == layer)]["contribution"].to_numpy()


def one(attribution, name):
    (value,) = attribution.table.loc[attribution.table["name"] == name, "contribution"]
    return value


@by_trait
@pytest.mark.parametrize("by", ["component", "head", "neuron", "source"])
def test_contributions_sum_to_hugging_faces_own_logit(tiny, family, by):
    if family == "falcon rw" and by == "source":
        with pytest.raises(UnknownSite, match=r"Site 'pattern.0' does not exist in 'falcon': .* adds its position bias twice"):
            wb.logit_attribution(tiny, TEXT, by=by)
        return
    with torch.no_grad():
        logits = tiny.hf(tiny.tokenize(TEXT).tokens).logits[0, POSITION].double()
    for options, expected in (
        ({"target": " dog"}, lambda dog, cat: logits[dog]),
        ({"target": " dog", "versus": " cat"}, lambda dog, cat: logits[dog] - logits[cat]),
        ({"target": " dog", "centred": True}, lambda dog, cat: logits[dog] - logits.mean()),
    ):
        found = wb.logit_attribution(tiny, TEXT, by=by, position=POSITION, **options)
        ids = (tiny.token_strings.index(word) for word in (" dog", " cat"))
        largest = found.table["contribution"].abs().max()
        assert abs(found.table["contribution"].sum() - float(expected(*ids))) < 1e-5 * largest
        assert found.error < 1e-5
        assert found.table["contribution"].notna().all()


def by_hand(family):
    """Hugging Face's own tensors at the last position of `TEXT`, from hooks on its modules and its own attention weights."""
    hf, seen = tiny_hf(family, attn_implementation="eager"), {}
    for path, module in hf.named_modules():
        module.register_forward_hook(lambda _, args, out, path=path: seen.__setitem__(path, (args, out)))
    with torch.no_grad():
        out = hf(tiny_model(family).tokenize(TEXT).tokens, output_attentions=True, output_hidden_states=True)

    def at(path):  # the input of a linear module
        return seen[path][0][0][0, -1]

    return SimpleNamespace(
        hf=hf, at=at, seen=lambda path: seen[path][1][0], logits=out.logits[0, -1], attentions=[a[0] for a in out.attentions]
    )


def test_heads_neurons_and_sources_of_llama_are_those_of_its_weights():
    hand, model, dog = by_hand("llama biases"), tiny_model("llama biases"), 5
    layers, head = hand.hf.model.layers, hand.hf.lm_head.weight[dog]
    last = hand.at("model.norm")
    direction = (hand.hf.model.norm.weight * head / (last.square().mean() + hand.hf.config.rms_norm_eps).sqrt()).detach()
    found = {by: wb.logit_attribution(model, TEXT, dog, by=by) for by in ("component", "head", "neuron", "source")}
    close = {"rtol": 1e-4, "atol": 1e-5 * float(found["component"].table["contribution"].abs().max())}
    for layer in range(3):
        attention, mlp = layers[layer].self_attn, layers[layer].mlp
        z = hand.at(f"model.layers.{layer}.self_attn.o_proj").unflatten(0, (4, -1))
        W_O = attention.o_proj.weight.detach().unflatten(1, (4, -1))
        heads = torch.stack([W_O[:, h] @ z[h] for h in range(4)]) @ direction
        np.testing.assert_allclose(rows(found["head"], "head", layer), heads, **close)
        neurons = hand.at(f"model.layers.{layer}.mlp.down_proj") * (direction @ mlp.down_proj.weight.detach())
        np.testing.assert_allclose(rows(found["neuron"], "neuron", layer), neurons, **close)
        v = hand.seen(f"model.layers.{layer}.self_attn.v_proj").unflatten(1, (2, -1))
        sources = [
            float(hand.attentions[layer][h, -1, s] * (W_O[:, h] @ v[s, h // 2]) @ direction)
            for h in range(4)
            for s in range(len(v))
        ]
        np.testing.assert_allclose(rows(found["source"], "source", layer), sources, **close)
        for by, name, bias in (
            ("head", f"b_O {layer}", attention.o_proj.bias), ("source", f"b_O {layer}", attention.o_proj.bias),
            ("neuron", f"b_out {layer}", mlp.down_proj.bias),
        ):  # fmt: skip
            assert one(found[by], name) == pytest.approx(float(bias.detach() @ direction), rel=1e-4)


def test_post_norms_and_the_soft_cap_of_gemma_2():
    hand, model, dog, cat = by_hand("gemma2"), tiny_model("gemma2"), 5, 9
    norm, eps = hand.hf.model.norm, hand.hf.config.rms_norm_eps
    last, head = hand.at("model.norm"), hand.hf.lm_head.weight.detach()
    direction = (1 + norm.weight.detach()) * (head[dog] - head[cat]) / (last.square().mean() + eps).sqrt()
    heads = wb.logit_attribution(model, TEXT, dog, versus=cat, by="head")
    neurons = wb.logit_attribution(model, TEXT, dog, versus=cat, by="neuron")
    for layer, block in enumerate(hand.hf.model.layers):
        z = hand.at(f"model.layers.{layer}.self_attn.o_proj").unflatten(0, (4, -1))
        written = torch.stack([block.self_attn.o_proj.weight.detach().unflatten(1, (4, -1))[:, h] @ z[h] for h in range(4)])
        length = (written.sum(0).square().mean() + eps).sqrt()
        expected = (written / length * (1 + block.post_attention_layernorm.weight.detach())) @ direction
        np.testing.assert_allclose(rows(heads, "head", layer), expected, rtol=1e-3, atol=1e-5)
        written = hand.at(f"model.layers.{layer}.mlp.down_proj")[:, None] * block.mlp.down_proj.weight.detach().T
        length = (written.sum(0).square().mean() + eps).sqrt()
        expected = (written / length * (1 + block.post_feedforward_layernorm.weight.detach())) @ direction
        np.testing.assert_allclose(rows(neurons, "neuron", layer), expected, rtol=1e-3, atol=1e-5)
    logits = head @ ((1 + norm.weight.detach()) * last / (last.square().mean() + eps).sqrt())
    capped = 5.0 * (logits / 5.0).tanh()
    torch.testing.assert_close(capped, hand.logits, rtol=1e-5, atol=1e-5)
    expected = float((capped - logits)[dog] - (capped - logits)[cat])
    assert one(heads, "soft cap") == pytest.approx(expected, rel=1e-4)


def test_embeddings_biases_and_head_of_gpt2_and_phi():
    hand, model = by_hand("gpt2"), tiny_model("gpt2")
    norm, last = hand.hf.transformer.ln_f, hand.at("transformer.ln_f")
    read = (norm.weight * hand.hf.lm_head.weight[5]).detach() / (last.var(correction=0) + norm.eps).sqrt()
    direction = read - read.mean()  # as the norm takes the mean off
    found = wb.logit_attribution(model, TEXT, 5)
    tokens = model.tokenize(TEXT).tokens[0]
    position = hand.hf.transformer.wpe.weight[len(tokens) - 1].detach()
    assert one(found, "position embedding") == pytest.approx(float(position @ direction), rel=1e-4)
    token = hand.hf.transformer.wte.weight[tokens[-1]].detach()
    assert one(found, "token embedding") == pytest.approx(float(token @ direction), rel=1e-4)
    assert one(found, "bias of ln_final") == pytest.approx(float((norm.bias @ hand.hf.lm_head.weight[5]).detach()), rel=1e-4)
    phi = tiny_model("phi")
    b_U = phi.hf.lm_head.bias.detach()
    assert one(wb.logit_attribution(phi, TEXT, 5), "b_U") == pytest.approx(float(b_U[5]))
    versus = wb.logit_attribution(phi, TEXT, 5, versus=9)
    assert one(versus, "b_U") == pytest.approx(float(b_U[5] - b_U[9]), rel=1e-5)


def test_the_embedding_is_split_where_it_is_a_sum_of_token_and_position(tiny, family):
    """BLOOM norms it and Granite scales it: there it is one row."""
    table = wb.logit_attribution(tiny, TEXT).table
    expected = ["token embedding"]
    if family in ("gpt2", "gpt_neo", "opt"):
        expected += ["position embedding"]
    if family in ("bloom", "granite", "granitemoe"):
        expected = ["embedding"]
    assert table.loc[table["part"] == "embed", "name"].tolist() == expected


@pytest.mark.parametrize("family", ["llama biases", "gemma2", "granite", "gptj", "lfm2", "qwen3_moe", "olmo clipped"])
def test_finer_rows_sum_to_coarser_ones(family):
    model = tiny_model(family)
    by = {by: wb.logit_attribution(model, TEXT, 5, by=by) for by in ("component", "head", "neuron", "source")}
    scale = by["component"].table["contribution"].abs().max()

    def of(which, parts, layer):
        name = {"attn": f"b_O {layer}", "mlp": f"b_out {layer}"}[parts[-1]]
        table = by[which].table[by[which].table["layer"] == layer]
        return table[table["part"].isin(parts) | (table["name"] == name)]["contribution"].sum()

    for layer in range(3):
        for which, parts in (("head", ["head", "attn"]), ("source", ["source", "rest", "attn"]), ("neuron", ["neuron", "mlp"])):
            whole = of("component", parts[-1:], layer)
            assert of(which, parts, layer) == pytest.approx(whole, abs=1e-5 * scale), (which, layer)
    assert ("rest" in set(by["source"].table["part"])) == (family == "olmo clipped")
    assert ("mixer" in set(by["head"].table["part"])) == (family == "lfm2")
    experts = by["neuron"].table.query("part == 'mlp'")["layer"].tolist()
    assert experts == ([1, 2] if family == "qwen3_moe" else [])


def test_versus_is_a_difference(llama):
    first, second = (wb.logit_attribution(llama, TEXT, word, by="head") for word in (" dog", " cat"))
    both = wb.logit_attribution(llama, TEXT, " dog", versus=" cat", by="head")
    difference = first.table["contribution"] - second.table["contribution"]
    np.testing.assert_allclose(both.table["contribution"], difference, rtol=1e-4, atol=1e-6)
    assert both.logit == pytest.approx(first.logit - second.logit, rel=1e-4)
    centred = [wb.logit_attribution(llama, TEXT, word, by="head", centred=True) for word in (" dog", " cat")]
    difference = centred[0].table["contribution"] - centred[1].table["contribution"]
    np.testing.assert_allclose(both.table["contribution"], difference, rtol=1e-4, atol=1e-6)


def test_a_planted_neuron_is_found():
    model = tiny_model("llama")
    post = wb.capture(model, TEXT, "mlp_post.2")["mlp_post.2"][0, -1]
    neuron = int(post.abs().argmax())
    with torch.no_grad():
        direction = model.weight("ln_final.w") * model.vocabulary.direction(5)
        model.weight("W_out", 2)[neuron] = 20 * post[neuron].sign() * direction
    top = wb.logit_attribution(model, TEXT, 5, by="neuron").top(1).iloc[0]
    assert (top["part"], top["layer"], top["index"], top["name"]) == ("neuron", 2, neuron, f"neuron 2.{neuron}")
    assert top["contribution"] > 0


def test_targets_and_positions(llama):
    tokens = llama.tokenize(TEXT).tokens
    with torch.no_grad():
        logits = llama.hf(tokens).logits[0]
    found = wb.logit_attribution(llama, TEXT, position=3)
    assert found.settings["target_id"] == int(logits[3].argmax())
    assert found.logit == pytest.approx(float(logits[3].max()), rel=1e-5)
    assert found.tokens == [llama.token_strings[i] for i in tokens[0, :4]]
    assert (found.settings["position"], found.settings["prompt"]) == (3, "a do")
    padded = Batch(torch.cat([torch.zeros(1, 2).long(), tokens], 1), torch.arange(len(tokens[0]) + 2)[None] >= 2)
    same = wb.logit_attribution(llama, padded, position=3)
    np.testing.assert_array_equal(same.table["contribution"], found.table["contribution"])


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"target": 300}, UnknownToken, "Token id 300 is outside the vocabulary; ids go from 0 to 299"),
        ({"target": -1}, UnknownToken, "Token id -1 is outside"),
        (
            {"target": "cat"},
            UnknownToken,
            "'cat' is no single token .* made of 'c', 'a', 't'. ' cat', with a leading space, is",
        ),
        ({"versus": " mouse"}, UnknownToken, "' mouse' is no single token .* Name one token, or give its id"),
        ({"versus": ""}, UnknownToken, "'' is no single token"),
        ({"versus": 3, "centred": True}, UnknownOption, "Both versus and centred were given, but one thing is subtracted"),
        ({"position": 15}, UnknownOption, "position=15 is not in the prompt of 15 tokens: 0 to 14, or negative from its end"),
        ({"position": -16}, UnknownOption, "position=-16 is not in the prompt"),
    ],
)
def test_bad_input_is_refused(llama, options, error, text):
    with pytest.raises(error, match=text):
        wb.logit_attribution(llama, TEXT, **options)


def test_several_prompts_are_refused(llama):
    with pytest.raises(UnknownOption, match="One prompt is taken apart at a time; 2 were given"):
        wb.logit_attribution(llama, llama.tokenize(["a dog", "a cat"]))
    with pytest.raises(UnknownOption, match=r"by='head' does not tell sources apart\. Make it with by='source'"):
        wb.logit_attribution(llama, TEXT, by="head").by_source()


def test_a_soft_cap_of_centred_logits():
    model = tiny_model("gemma3_text softcap")
    found = wb.logit_attribution(model, TEXT, 5, centred=True)
    with torch.no_grad():
        logits = model.hf(model.tokenize(TEXT).tokens).logits[0, -1]
    assert found.logit == pytest.approx(float(logits[5] - logits.mean()), rel=1e-5)
    assert Goal(5, centred=True).of(logits) == pytest.approx(found.logit, rel=1e-5)


def test_the_real_model_copies_the_name(smollm):
    """Indirect objects: attention of the late layers writes ` Mary`, and reads it where it stood."""
    for by in ("component", "head", "neuron", "source"):
        found = wb.logit_attribution(smollm, IOI, " Mary", versus=" John", by=by)
        assert found.error < 1e-5
    assert found.by_source().sort_values("contribution").iloc[-1]["source_token"] == " Mary"
    assert len(found.by_source()) == len(found.tokens)
    heads = wb.logit_attribution(smollm, IOI, " Mary", versus=" John", by="head")
    assert heads.top(1).iloc[0]["name"] == "head 23.3"
    first = wb.logit_attribution(smollm, IOI, position=0, by="neuron")  # a state of massive activations
    assert first.error < 1e-5


def test_half_precision_is_as_good_as_the_stream_is(smollm):
    model = wb.load(dtype=torch.bfloat16)
    found = wb.logit_attribution(model, IOI, " Mary", by="head")
    assert found.error < 2e-2
    expected = wb.logit_attribution(smollm, IOI, " Mary", by="head").table["contribution"]
    assert (found.table["contribution"] - expected).abs().max() < 0.1 * expected.abs().max()


def test_it_prints_sums_by_layer_and_draws(llama):
    found = wb.logit_attribution(llama, TEXT, " dog", versus=" cat", by="source")
    text = str(found).splitlines()
    assert "logit of ' dog' - ' cat' after …'og and a cat', by source" in text[0]
    assert "= sum of 184 contributions" in text[1]
    assert found.top(1).iloc[0]["name"] in text[2]
    sums = found.by_layer()
    assert sums["contribution"].sum() == pytest.approx(found.table["contribution"].sum())
    figure = found.plot()
    bars, grid, tokens = figure.data
    np.testing.assert_allclose(np.asarray(bars.x)[::-1], found.top(20)["contribution"])
    table = found.table
    at = table[(table["layer"] == 1) & (table["index"] == 2)]["contribution"].sum()
    assert np.asarray(grid.z)[list(grid.y).index(1), list(grid.x).index("2")] == pytest.approx(at)
    np.testing.assert_allclose(tokens.y, found.by_source()["contribution"])
    assert list(tokens.x)[:3] == ["0 a", "1 ·", "2 d"]
    assert len(wb.logit_attribution(llama, TEXT).plot(5).data[0].x) == 5


@by_trait
@pytest.mark.parametrize("by", ["source", "neuron"])
def test_what_edits_put_into_the_stream_has_rows_of_its_own(tiny, by):
    """Inside a block of edits the rows sum to the edited model's logit, and the edits' rows are what no part gave."""
    attention = [layer for layer in range(tiny.n_layers) if tiny.row.block(layer).attn is not None]
    if by == "source" and any(tiny.row.block(layer).no_pattern for layer in attention):
        return
    vector = torch.randn(tiny.d_model, generator=torch.Generator().manual_seed(3))
    edits = [
        wb.add("resid_post.1", vector), wb.scale(f"attn_out.{attention[-1]}", 2.0), wb.scale(f"z.{attention[0]}", -1.0),
        wb.scale("ln_final", 1.5), wb.add("resid_pre.0", vector),
    ]  # fmt: skip
    with wb.intervene(tiny, *edits):
        found = wb.logit_attribution(tiny, "a dog", 7, by=by)
        with torch.no_grad():
            assert found.logit == pytest.approx(float(tiny.forward(tiny.tokenize("a dog"))[0, -1, 7]), rel=1e-4, abs=1e-4)
    assert found.error < 1e-4
    rows = found.table[found.table["part"] == "edit"].set_index("layer")["contribution"]
    assert len(rows) == tiny.n_layers + 1
    assert abs(rows.loc[1]) > 1e-3
    assert "edit" not in set(wb.logit_attribution(tiny, "a dog", 7, by=by).table["part"])


def test_pictures_spell_quotes(llama):
    figure = wb.logit_attribution(llama, "a 'dog'", by="source").plot()
    assert "&quot;" not in figure.to_json()
    assert "&#x27;" not in figure.to_json()
