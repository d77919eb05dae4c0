"""The self-check passes on every family, and catches rows and models that lie."""

import json
from dataclasses import replace

import pytest
import torch
from conftest import by_trait, tiny_model
from families import FAMILIES, LAYERS, tiny_hf, tiny_tokenizer
from torch import nn

import workbench as wb
from workbench.architectures.cuts import ByHead, Grouped, Half, Heads, Stacked
from workbench.architectures.row import Part
from workbench.errors import CannotWrite, UnreadableWeight, VerificationFailed
from workbench.verification import THROUGH, TOLERANCE


def test_every_identity_holds_at_each_layer_that_has_it(tiny):
    found = tiny.verify()
    assert found.passed, str(found)
    assert (found.table["verdict"] == "ok").all(), str(found)
    per_layer = found.table.dropna(subset="layer").groupby("identity").size()
    blocks = [tiny.row.block(layer) for layer in range(LAYERS)]
    expected = {
        "resid_post = next resid_pre": LAYERS - 1,
        "the stream adds up when attn_out, mlp_post and mlp_out are edited": LAYERS,
        "resid_pre + attn_out + mlp_out = resid_post": sum(block.parallel for block in blocks),
        "ln1(resid_pre) = ln1": sum(block.ln1 is not None for block in blocks),
        "ln2(stream) = ln2": sum(block.ln2 is not None for block in blocks),
        "resid_mid + mlp_out = resid_post": sum(not block.parallel for block in blocks),
        "z W_O = attn_out": sum(block.attn is not None for block in blocks),
        "a query moves its own z alone, of its own head": sum(block.q is not None for block in blocks),
        "a key moves its own and later z, of its own group": sum(block.k is not None for block in blocks),
        "z is linear in the values of its own group": sum(block.v is not None for block in blocks),
        "mlp_post W_out = mlp_out": sum(block.down is not None for block in blocks),
        "act(mlp_pre) mlp_up = mlp_post": sum(block.is_gated for block in blocks),
        "ln2(stream) W_router = router_logits": sum(block.experts is not None for block in blocks),
        "W_gate, W_in and W_out of the last expert give what it gives": sum(block.experts is not None for block in blocks),
    }
    assert {identity: int(per_layer.get(identity, 0)) for identity in expected} == expected


@by_trait
def test_every_identity_holds_in_bfloat16(family):
    found = tiny_model(family, dtype=torch.bfloat16, check=False).verify()
    assert (found.table["verdict"] == "ok").all(), str(found)
    assert set(found.table["tolerance"]) == {TOLERANCE[torch.bfloat16], THROUGH[torch.bfloat16]}


def test_the_real_model_verifies(smollm):
    assert (smollm.verify().table["verdict"] == "ok").all()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_the_real_model_verifies_in_other_dtypes(smollm, dtype):
    assert wb.load(dtype=dtype).verify().passed


def test_the_result_says_what_was_checked(llama, tmp_path):
    found = llama.verify()
    assert list(found.table.columns) == ["identity", "layer", "error", "tolerance", "verdict", "why"]
    through = found.table[found.table["tolerance"] != TOLERANCE[torch.float32]]
    assert (through["tolerance"] == THROUGH[torch.float32]).all()
    assert set(through["identity"]) == {
        "looking inside attention changes no logit",
        "writing back what every site holds changes no logit",
        "a right-padded batch = its single rows",
        "a left-padded batch = its single rows",
        "a later token moves no earlier logit",
    }
    assert f"all identities hold ({len(found.table)} checks)" in str(found)
    worst = found.worst().set_index("identity").loc["z W_O = attn_out"]
    errors = found.table.query("identity == 'z W_O = attn_out'")["error"]
    assert worst["layers"] == LAYERS
    assert worst["error"] == errors.max()
    assert errors[found.table["layer"] == worst["worst_layer"]].item() == errors.max()
    saved = json.loads(found.save(tmp_path / "verify.json").read_text())
    assert saved["passed"] is True
    assert saved["settings"]["family"] == "llama"
    assert len(saved["checks"]) == len(found.table)
    assert saved["checks"][0]["layer"] is None
    with pytest.raises(CannotWrite):
        found.save(tmp_path / "no" / "such" / "folder.json")


BLOCK, MODEL = "block", "model"
QKV = "attn.c_attn"
LIES = [
    # What lies, on which family, what it says, and an identity that finds it out.
    ("wrong norm before attention", "llama", BLOCK, {"ln1": "post_attention_layernorm"}, "ln1(resid_pre) W_Q = q"),
    ("wrong norm before the MLP", "llama", BLOCK, {"ln2": "input_layernorm"}, "resid_pre + attn_out = resid_mid"),
    ("gate and up changed places", "llama", BLOCK, {"up": Part("mlp.gate_proj"), "gate": Part("mlp.up_proj")},
     "act(mlp_pre) mlp_up = mlp_post"),
    ("halves of a fused matrix changed places", "phi3", BLOCK,
     {"up": Part("mlp.gate_up_proj", Half(0)), "gate": Part("mlp.gate_up_proj", Half(1))}, "act(mlp_pre) mlp_up = mlp_post"),
    ("queries and keys changed places", "gpt2", BLOCK, {"q": Part(QKV, Stacked("k")), "k": Part(QKV, Stacked("q"))},
     "a query moves its own z alone, of its own head"),
    ("keys and values changed places", "gpt2", BLOCK, {"k": Part(QKV, Stacked("v")), "v": Part(QKV, Stacked("k"))},
     "z is linear in the values of its own group"),
    ("queries and keys of unequal number changed places", "llama", BLOCK,
     {"q": Part("self_attn.k_proj", ByHead()), "k": Part("self_attn.q_proj", ByHead())},
     "a query moves its own z alone, of its own head"),
    ("heads cut in the wrong order", "gpt2", BLOCK, {name: Part(QKV, Grouped(name)) for name in "qkv"},
     "z is linear in the values of its own group"),
    ("heads stacked that are grouped", "gpt_neox", BLOCK,
     {name: Part("attention.query_key_value", Stacked(name)) for name in "qkv"}, "z is linear in the values of its own group"),
    ("groups of the wrong number", "falcon 40b", MODEL, {"heads": Heads(4, 4, 8, 8)}, "the row fits the model's tensors"),
    ("no soft cap", "gemma2", MODEL, {"softcap": None}, "unembedding the last resid_post = logits"),
    ("wrong soft cap", "gemma2", MODEL, {"softcap": 6.0}, "unembedding the last resid_post = logits"),
    ("no logit scale", "cohere", MODEL, {"logit_scale": 1.0}, "unembedding the last resid_post = logits"),
    ("logit scale the other way round", "granite", MODEL, {"logit_scale": 4.0}, "unembedding the last resid_post = logits"),
    ("no residual multiplier", "granite", BLOCK, {"residual_multiplier": 1.0}, "resid_pre + attn_out = resid_mid"),
    ("no embedding multiplier", "gemma", MODEL, {"embed_scale": 1.0}, "W_E[token] = embed"),
    ("no post-norm after attention", "gemma2", BLOCK, {"ln1_post": None}, "resid_pre + attn_out = resid_mid"),
    ("no post-norm after the MLP", "gemma2", BLOCK, {"ln2_post": None}, "resid_mid + mlp_out = resid_post"),
    ("post-norms taken for pre-norms", "olmo2", BLOCK,
     {"ln1": "post_attention_layernorm", "ln2": "post_feedforward_layernorm", "ln1_post": None, "ln2_post": None},
     "resid_pre + attn_out = resid_mid"),
    ("pre-norms taken for post-norms", "llama", BLOCK,
     {"ln1": None, "ln2": None, "ln1_post": "input_layernorm", "ln2_post": "post_attention_layernorm"},
     "ln1(resid_pre) W_Q = q"),
    ("a gain without its offset", "gemma2", MODEL, {"norm_gain_offset": 0.0}, "ln2.w is the gain of ln2"),
    ("an offset where there is none", "llama", MODEL, {"norm_gain_offset": 1.0}, "ln_final.w is the gain of ln_final"),
    ("sequential blocks taken for parallel", "gpt_neox sequential", BLOCK, {"parallel": True}, "ln2(stream) W_in = mlp_pre"),
    ("parallel blocks taken for sequential", "gpt_neox", BLOCK, {"parallel": False}, "resid_pre + attn_out = resid_mid"),
    ("an output kept that is changed in place", "falcon 7b", BLOCK, {"mutated": frozenset()}, "mlp_post W_out = mlp_out"),
    ("projections kept that are clamped in place", "olmo clipped", BLOCK, {"mutated": frozenset()}, "ln1(resid_pre) W_Q = q"),
    ("a module that adds the stream itself", "bloom", BLOCK, {"attn": "self_attention"}, "resid_pre + attn_out = resid_mid"),
    ("wrong final norm", "gpt2", MODEL, {"ln_final": "h.0.ln_1"}, "ln_final(last resid_post) = ln_final"),
    ("wrong last matrix of attention", "gpt2", BLOCK, {"o": Part("mlp.c_proj")}, "z W_O = attn_out"),
    ("wrong nonlinearity", "llama", BLOCK, {"act_function": "gelu"}, "act(mlp_pre) mlp_up = mlp_post"),
    ("two heads taken for one", "llama", MODEL, {"heads": Heads(2, 1, 16, 16)}, "pattern v = z"),
    ("all heads taken for one", "gpt2", MODEL, {"heads": Heads(1, 1, 32, 32)}, "pattern v = z"),
    ("a module that is never called", "opt", BLOCK, {"attn": "self_attn.k_proj.nothing"}, "the row fits the model's tensors"),
]  # fmt: skip


def with_lie(model: wb.LanguageModel, where: str, changes: dict) -> wb.LanguageModel:
    row = model.row
    if where == MODEL:
        return replace(model, row=replace(row, **changes))
    return replace(model, row=replace(row, blocks=tuple(replace(block, **changes) for block in row.blocks)))


@pytest.mark.parametrize(("family", "where", "changes", "identity"), [lie[1:] for lie in LIES], ids=[lie[0] for lie in LIES])
def test_a_row_that_lies_is_caught(family, where, changes, identity):
    found = with_lie(tiny_model(family, check=False), where, changes).verify()
    assert identity in set(found.table.query("verdict == 'fails'")["identity"]), str(found)
    with pytest.raises(VerificationFailed, match=r"does not behave as its family .* promises: "):
        found.require()


def with_experts(model: wb.LanguageModel, **changes) -> wb.LanguageModel:
    blocks = [
        block if block.experts is None else replace(block, experts=replace(block.experts, **changes))
        for block in model.row.blocks
    ]
    return replace(model, row=replace(model.row, blocks=tuple(blocks)))


@pytest.mark.parametrize(
    ("family", "changes", "identity"),
    [
        ("gpt_oss", {"interleaved": False}, "W_gate, W_in and W_out of the first expert give what it gives"),
        ("mixtral", {"interleaved": True}, "W_gate, W_in and W_out of the first expert give what it gives"),
        ("mixtral", {"out_in": False}, "W_gate, W_in and W_out of the first expert give what it gives"),
        ("llama4_text", {"router_item": 0}, "ln2(stream) W_router = router_logits"),
        ("qwen2_moe", {"router": "mlp.shared_expert_gate"}, "router_logits have an entry an expert"),
        ("qwen2_moe", {"shared": None}, "routed and shared experts make mlp_out"),
        ("deepseek_v3", {"shared": None}, "routed and shared experts make mlp_out"),
        ("deepseek_v3", {"chosen_by_logits": True}, "the largest router_logits choose the experts"),
    ],
)
def test_experts_that_lie_are_caught(family, changes, identity):
    found = with_experts(tiny_model(family, check=False), **changes).verify()
    assert identity in set(found.table.query("verdict == 'fails'")["identity"]), str(found)


def test_experts_that_are_called_for_others_are_caught():
    """Between router and experts the choice is changed: matrices and logits are right, and mean nothing."""
    hf = tiny_hf("mixtral")
    experts = hf.model.layers[1].mlp.experts
    experts.register_forward_pre_hook(lambda module, args: (args[0], (args[1] + 1) % 4, args[2]))
    found = wb.load(hf, tokenizer=tiny_tokenizer(), check=False).verify().table.query("verdict == 'fails'")
    assert ("the largest router_logits choose the experts", 1) in set(zip(found["identity"], found["layer"], strict=True))


class Louder(nn.Module):
    """An MLP that gives more than its matrices say."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner
        self.gate_proj, self.up_proj, self.down_proj, self.act_fn = (
            inner.gate_proj, inner.up_proj, inner.down_proj, inner.act_fn,
        )  # fmt: skip

    def forward(self, x):
        return 1.5 * self.inner(x)


class InPlace(Louder):
    """An MLP that changes the tensor that it was given."""

    def forward(self, x):
        out = self.inner(x)
        x.mul_(2)
        return out


class HiddenBias(nn.Linear):
    """A linear layer that adds what is not in its bias."""

    def forward(self, x):
        return super().forward(x) + 0.1


class EightBit(nn.Module):
    """A linear layer whose weight is kept in 8 bits."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.scale = linear.weight.abs().amax(1, keepdim=True) / 127
        self.weight = nn.Parameter((linear.weight / self.scale).round().to(torch.int8), requires_grad=False)

    def forward(self, x):
        return x @ (self.weight * self.scale).T


def hidden_bias(linear: nn.Linear) -> nn.Module:
    changed = HiddenBias(linear.in_features, linear.out_features, bias=False)
    changed.weight = linear.weight
    return changed


def test_a_model_whose_code_was_changed_is_refused():
    hf = tiny_hf("llama")
    hf.model.layers[1].mlp = Louder(hf.model.layers[1].mlp)
    with pytest.raises(VerificationFailed, match=r"'mlp_post W_out = mlp_out' is off by .* at layer 1 .*pass check=False"):
        wb.load(hf, tokenizer=tiny_tokenizer())
    assert not wb.load(hf, tokenizer=tiny_tokenizer(), check=False).verify().passed


def test_a_module_that_changes_its_input_in_place_is_caught():
    """OLMo 2 hands the stream itself to the MLP."""
    hf = tiny_hf("olmo2")
    hf.model.layers[1].mlp = InPlace(hf.model.layers[1].mlp)
    with pytest.raises(VerificationFailed, match=r"at layer 1"):
        wb.load(hf, tokenizer=tiny_tokenizer())


def test_a_bias_that_is_not_in_the_weights_is_caught():
    hf = tiny_hf("llama")
    hf.model.layers[2].self_attn.v_proj = hidden_bias(hf.model.layers[2].self_attn.v_proj)
    with pytest.raises(VerificationFailed, match=r"'ln1\(resid_pre\) W_V = v' is off by .* at layer 2"):
        wb.load(hf, tokenizer=tiny_tokenizer())


def altered_forward(monkeypatch, model, change):
    original = model.hf.forward

    def forward(input_ids, attention_mask, position_ids, use_cache):
        given = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
        return original(**change(**given), use_cache=use_cache)

    monkeypatch.setattr(model.hf, "forward", forward)


def failing(model) -> set[str]:
    return set(model.verify().table.query("verdict == 'fails'")["identity"])


def test_absolute_positions_that_count_the_padding_are_caught(monkeypatch):
    model = tiny_model("gpt2")
    altered_forward(monkeypatch, model, lambda position_ids, **kept: kept)
    assert failing(model) == {"a left-padded batch = its single rows"}


def test_padding_that_is_seen_is_caught(monkeypatch):
    model = tiny_model("llama")

    def all_real(attention_mask, **kept):
        return kept | {"attention_mask": torch.ones_like(attention_mask)}

    altered_forward(monkeypatch, model, all_real)
    assert failing(model) == {"a left-padded batch = its single rows"}


def test_attention_to_later_tokens_is_caught(monkeypatch):
    """A mask of four axes is used as it is: here, one that hides nothing."""
    model = tiny_model("llama")

    def all_seen(attention_mask, **kept):
        batch, pos = attention_mask.shape
        return kept | {"attention_mask": torch.zeros(batch, 1, pos, pos)}

    altered_forward(monkeypatch, model, all_seen)
    assert "a later token moves no earlier logit" in failing(model)
    assert "a key moves its own and later z, of its own group" in failing(model)


class Functional(Louder):
    """An MLP that multiplies by its down projection's weight without calling it."""

    def forward(self, x):
        return (self.act_fn(self.gate_proj(x)) * self.up_proj(x)) @ self.down_proj.weight.T


def test_a_module_that_is_never_called_is_named():
    hf = tiny_hf("llama")
    hf.model.layers[1].mlp = Functional(hf.model.layers[1].mlp)
    with pytest.raises(
        VerificationFailed, match=r"'mlp_post is read where the row says' is off by inf at layer 1 .*down_proj is never called"
    ):
        wb.load(hf, tokenizer=tiny_tokenizer())
    found = wb.load(hf, tokenizer=tiny_tokenizer(), check=False).verify()
    assert "model.layers.1.mlp.down_proj is never called" in set(found.table["why"])


def test_heads_that_are_gated_after_the_pattern_are_caught():
    hf = tiny_hf("llama")
    projection = hf.model.layers[1].self_attn.o_proj
    projection.register_forward_pre_hook(lambda module, args: (args[0] * 0.5,))
    found = wb.load(hf, tokenizer=tiny_tokenizer(), check=False).verify().table.query("verdict == 'fails'")
    assert ("pattern v = z", 1) in set(zip(found["identity"], found["layer"], strict=True))


@pytest.mark.parametrize("family", ["mistral", "gpt_neo"])
def test_a_window_of_one_token_leaves_keys_unchecked_but_fails_nothing(family):
    name, config = FAMILIES[family]
    window = {"mistral": "sliding_window", "gpt_neo": "window_size"}[family]
    FAMILIES["narrow"] = (name, config | {window: 1})
    try:
        found = tiny_model("narrow").verify()
    finally:
        del FAMILIES["narrow"]
    assert found.passed, str(found)
    unchecked = found.table.query("verdict == 'unchecked'")
    assert {"a key moves its own and later z, of its own group", "a query moves its own z alone, of its own head"} == set(
        unchecked["identity"]
    )
    assert unchecked["why"].str.startswith("nothing moved").all()


def test_logits_that_no_neuron_moves_are_caught(monkeypatch):
    model = tiny_model("llama")
    original = model.hf.forward

    def deaf(**inputs):
        output = original(**inputs)
        output.logits = torch.ones_like(output.logits)
        return output

    monkeypatch.setattr(model.hf, "forward", deaf)
    assert "negating the neurons moves the logits" in failing(model)


def test_dead_neurons_are_unchecked():
    hf = tiny_hf("llama")
    for layer in hf.model.layers:
        layer.mlp.up_proj.weight.data.zero_()
    found = wb.load(hf, tokenizer=tiny_tokenizer()).verify()
    assert found.passed, str(found)
    assert found.table.set_index("identity").loc["negating the neurons moves the logits", "verdict"] == "unchecked"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_other_dtypes(dtype):
    for family in ("llama", "gpt_neox", "olmo2"):
        found = tiny_model(family, dtype=dtype).verify()
        assert (found.table["verdict"] == "ok").all(), str(found)


def test_weights_that_cannot_be_read_are_said_to_be_unchecked():
    model = tiny_model("llama")
    mlp = model.hf.model.layers[1].mlp
    mlp.up_proj = EightBit(mlp.up_proj)
    found = model.verify()
    unchecked = found.table.query("verdict == 'unchecked'")
    assert set(unchecked["identity"]) == {"ln2(stream) W_in = mlp_up"}
    assert unchecked["why"].str.contains("is the model quantised").all()
    assert found.passed
    assert "1 could not be checked" in str(found)
    with pytest.raises(UnreadableWeight, match="no plain floating-point weight"):
        model.weight("W_in", 1)


def test_verifying_leaves_no_hook_behind(llama):
    def hooks():
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in llama.hf.modules())

    before = hooks()
    llama.verify()
    assert hooks() == before
