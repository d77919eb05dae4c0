"""What capture keeps: positions, modules, dtypes, gradients; what it prints and draws."""

import gc
import weakref

import numpy as np
import pytest
import torch
from conftest import by_trait, tiny_model
from families import tiny_hf

import workbench as wb
from workbench.attention import INSIDE
from workbench.checks.check import error
from workbench.checks.still import sites_of
from workbench.errors import NotFinite, ReadOnlySite, UnknownOption, UnknownSite
from workbench.sites import Site
from workbench.tracer import _WATCHES, edited

TEXTS = ["a dog and", "a cat"]


@pytest.mark.parametrize("side", ["left", "right"])
def test_positions(llama, side):
    batch = llama.tokenize(TEXTS, padding_side=side)
    whole = wb.capture(llama, batch, ["resid_post.1", "q.2", "pattern.0"])
    first = batch.mask.long().argmax(1)
    lengths = batch.mask.sum(1)
    for positions, columns in {
        "last": (first + lengths - 1)[:, None],
        (0, -2): torch.stack([first, first + lengths - 2], 1),
    }.items():
        kept = wb.capture(llama, batch, ["resid_post.1", "q.2", "pattern.0"], positions=positions)
        for row in range(2):
            for i, column in enumerate(columns[row].tolist()):
                assert torch.equal(kept["resid_post.1"][row, i], whole["resid_post.1"][row, column])
                assert torch.equal(kept["q.2"][row, i], whole["q.2"][row, column])
                assert torch.equal(kept["pattern.0"][row, :, i], whole["pattern.0"][row, :, column])


def test_a_mask_of_positions(llama):
    batch = llama.tokenize(["a dog", "a cat"])
    mask = torch.zeros_like(batch.mask)
    mask[0, [1, 3]] = mask[1, [0, 4]] = True
    kept = wb.capture(llama, batch, "resid_post.1", positions=mask)["resid_post.1"]
    whole = wb.capture(llama, batch, "resid_post.1")["resid_post.1"]
    assert torch.equal(kept, torch.stack([whole[0, [1, 3]], whole[1, [0, 4]]]))
    mask[0, 1] = False
    with pytest.raises(UnknownOption, match=r"equally many real tokens in each row; found \[2, 5\] with \[1, 2\] tokens a row"):
        wb.capture(llama, batch, "resid_post.1", positions=mask)


@pytest.mark.parametrize(
    ("positions", "text"),
    [
        ("first", "positions='first' is not understood. Give an index or several, .*, 'last' or 'all'"),
        ([5], r"Position 5 was asked for, but text 1 has 5 tokens: 0 to 4, or negative from its end"),
        ([-6], r"Position -6 was asked for, but text 1 has 5 tokens"),
        ([], r"positions=\[\] chooses nothing"),
    ],
)
def test_positions_that_are_not_there_are_refused(llama, positions, text):
    with pytest.raises(UnknownOption, match=text):
        wb.capture(llama, TEXTS, "resid_post.1", positions=positions)


def test_a_module_is_kept_as_it_was(monkeypatch):
    """Falcon's MLP output is added to in place afterwards."""
    falcon = tiny_model("falcon 7b")
    mlp = falcon.module("transformer.h.1.mlp")
    given = []
    handle = mlp.register_forward_hook(lambda _, args, output: given.append(output.clone()))
    acts = wb.capture(falcon, "a dog", "resid_post.2", modules=["transformer.h.1.mlp"])
    handle.remove()
    assert torch.equal(acts["transformer.h.1.mlp"], given[0])


def test_gradients_are_kept_inside_no_grad(llama):
    with torch.no_grad():
        acts = wb.capture(llama, "a dog", "resid_post.1", gradients=True)
    assert acts.gradients(acts.logits[0, -1, 3])["resid_post.1"].any()


def test_modules_by_path(llama):
    acts = wb.capture(llama, "a dog", ["resid_pre.0"], modules=["model.norm"])
    states = tiny_hf("llama").model(input_ids=acts.tokens).last_hidden_state
    torch.testing.assert_close(acts["model.norm"], states.detach())
    assert list(acts) == ["resid_pre.0", "model.norm"]
    with pytest.raises(UnknownOption, match=r"No module of .* has the path 'model.nothing'. Paths are those of"):
        wb.capture(llama, "a dog", modules=["model.nothing"])
    with pytest.raises(UnknownSite, match="Nothing was asked for"):
        wb.capture(llama, "a dog")


def test_dtype_and_logits(llama):
    acts = wb.capture(llama, TEXTS, "resid_post.0", dtype=torch.bfloat16, device="cpu", logits=True)
    assert acts["resid_post.0"].dtype == torch.bfloat16
    with torch.no_grad():
        assert torch.equal(acts.logits, llama.forward(acts.batch))
    assert wb.capture(llama, TEXTS, "resid_post.0").logits is None


@by_trait
def test_gradients_are_what_small_changes_do(tiny):
    """At every site that can be written: a step along the gradient changes the number by the gradient's length."""
    batch = tiny.tokenize("a dog")
    hidden = ("resid_mid", "router_logits", "result", "attn_scores")
    sites = [site for site in sites_of(tiny) if site.layer == 1 and site.name not in hidden]
    acts = wb.capture(tiny, batch, [str(site) for site in sites], gradients=True)
    assert acts.logits is not None
    found = acts.gradients(acts.logits[0, -1, :7].tanh().sum())
    for site in sites:
        gradient = found[str(site)]
        step = 1e-3 * acts[str(site)].detach().norm() * gradient / gradient.norm()
        numbers = []
        for change in (step, -step):
            with torch.no_grad(), edited(tiny, {site: lambda value, change=change: value + change}):
                numbers.append(float(tiny.forward(batch)[0, -1, :7].double().tanh().sum()))
        expected = 2 * float((gradient * step).sum())
        # Numbers of about 1 from float32 logits are good to 1e-6; central differences leave a term of third order.
        assert numbers[0] - numbers[1] == pytest.approx(expected, rel=2e-2, abs=3e-6), site


def test_gradients_of_what_does_not_depend_are_refused(llama):
    acts = wb.capture(llama, "a dog", "resid_post.1", logits=True)
    assert acts.logits is not None
    with pytest.raises(UnknownOption, match="capture with gradients=True"):
        acts.gradients(acts.logits[0, -1, 3])
    with pytest.raises(ReadOnlySite, match=r"resid_mid\.1"):
        wb.capture(llama, "a dog", "resid_mid.1", gradients=True)


def test_nan_is_named_by_its_site():
    model = tiny_model("llama")
    model.hf.model.layers[1].mlp.down_proj.weight.data[3, 4] = float("nan")
    with pytest.raises(NotFinite, match=r"mlp_out.1 holds \d+ values that are NaN or infinite, the first at \[0, 0, 3\]"):
        wb.capture(model, "a dog", ["resid_post.1", "mlp_out.1", "resid_post.0"])  # the first of the pass, not of the list
    assert wb.capture(model, "a dog", "mlp_out.1", finite=False)["mlp_out.1"].isnan().any()


def test_not_a_number_is_found_where_it_does_not_go_on():
    """The last state speaks for what goes into it; not for a gate below a ReLU, nor past an edit, nor in a narrow dtype."""
    opt = tiny_model("opt")
    with torch.no_grad():
        opt.weight("b_in", 1)[3] = -torch.inf  # relu(-inf) = 0
    with pytest.raises(NotFinite, match=r"mlp_pre\.1 holds 5 values"):
        wb.capture(opt, "a dog", ["mlp_pre", "resid_post"])
    model = tiny_model("llama")
    with torch.no_grad():
        model.weight("W_out", 0)[3, 4] = torch.nan
    repaired = wb.replace("mlp_out.0", torch.nan_to_num)
    with wb.intervene(model, wb.replace("resid_post.0", torch.nan_to_num)):
        with pytest.raises(NotFinite, match=r"mlp_out\.0 holds 5 values"):
            wb.capture(model, "a dog", ["mlp_out", "resid_post"])
        wb.capture(model, "a dog", "resid_post")
    with wb.intervene(model, repaired):
        wb.capture(model, "a dog", ["mlp_out", "resid_post"])
    loud = tiny_model("llama")
    with torch.no_grad():
        loud.weight("W_in", 0).mul_(1e7)
        loud.weight("W_out", 0).mul_(1e-7)
    wb.capture(loud, "a dog", ["mlp_post.0", "resid_post.0"])
    with pytest.raises(NotFinite, match=r"mlp_post.0 holds \d+ values"):
        wb.capture(loud, "a dog", ["mlp_post.0", "resid_post.0"], dtype=torch.float16)


def state_of(model):
    """What looking inside attention might leave behind: attention implementations and hooks."""
    configs = {id(module.config): module.config for module in model.hf.modules() if hasattr(module, "config")}
    hooks = sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.hf.modules())
    return [config._attn_implementation for config in configs.values()], hooks


def test_what_was_captured_is_freed_with_its_last_name(llama):
    """Not at the next garbage collection: the pass that was ended early leaves no cycle (it did in Python 3.12)."""
    gc.collect()
    gc.disable()
    try:
        acts = wb.capture(llama, "a dog", "resid_post")
        tensor = weakref.ref(acts["resid_post.1"])
        del acts
        assert tensor() is None
    finally:
        gc.enable()


@by_trait
def test_looking_inside_attention_leaves_the_model_as_it_was(tiny):
    if all(site.name not in INSIDE for site in sites_of(tiny)):
        return
    batch = tiny.tokenize(TEXTS)
    before = state_of(tiny)
    with torch.no_grad():
        clean = tiny.forward(batch)
    last = next(layer for layer in reversed(range(tiny.n_layers)) if tiny.row.block(layer).attn is not None)
    acts = wb.capture(tiny, batch, [f"pattern.{last}", f"attn_scores.{last}"], logits=True)
    assert error(acts.logits[batch.mask], clean[batch.mask]) < 1e-4
    with torch.no_grad():
        assert torch.equal(tiny.forward(batch), clean)
    assert state_of(tiny) == before
    # The causal mask is there: nothing attends to what comes later.
    pattern = acts[f"pattern.{last}"].transpose(1, 2)
    later = torch.ones(pattern.shape[1], pattern.shape[-1]).triu(1).bool()[:, None].expand_as(pattern[0])
    for row, real in enumerate(batch.mask):
        assert (pattern[row, real][later[real]] == 0).all()


def test_hooks_inside_attention_go_when_the_pass_fails(llama):
    def fail(_):
        raise RuntimeError("stop")

    for name in INSIDE:
        with pytest.raises(RuntimeError, match="stop"), edited(llama, {Site(name, 1): fail}):
            llama.forward(llama.tokenize("a dog"))
    assert not _WATCHES
    assert torch.overrides._get_current_function_mode() is None
    assert llama.hf.config._attn_implementation == "sdpa"


def test_it_prints_as_a_tree(llama):
    text = repr(wb.capture(llama, TEXTS, ["resid_post", "q.1"], modules=["model.norm"]))
    assert text.splitlines()[0].startswith("Activations of LlamaForCausalLM: 2 x 9 tokens, 5 tensors, ")
    assert "├ resid_post  0:3  2 x 9 x 32     float32  7 kB" in text
    assert "└ model.norm       2 x 9 x 32" in text


def test_the_dataframe_and_norms(llama):
    acts = wb.capture(llama, TEXTS, ["resid_post.1", "q.0", "pattern.0"], positions=[0, -1])
    table = acts.to_dataframe()
    assert len(table) == 3 * 2 * 2
    at = table.query("site == 'q.0' and row == 1 and pos == 4").iloc[0]
    assert at["norm"] == pytest.approx(float(acts["q.0"][1, 1].norm()))
    assert at["token"] == llama.token_strings[int(acts.tokens[1, 4])]
    norms = acts.norms().set_index("site")
    assert norms.loc["resid_post.1", "maximum"] == table.query("site == 'resid_post.1'")["norm"].max()


def test_massive_activations_of_the_real_model_are_found(smollm):
    """SmolLM2's first token has states of length 22,000 in the middle layers, its other tokens of a few hundred."""
    table = wb.capture(smollm, "The capital of France is Paris", "resid_post.15").to_dataframe()
    assert table["massive"].tolist() == [True] + [False] * (len(table) - 1)
    assert table["norm"][0] > 10_000


def test_pictures_show_the_numbers(llama):
    acts = wb.capture(llama, TEXTS, ["resid_post", "pattern.1"])
    figure = acts.plot_norms()
    table = acts.to_dataframe().query("row == 1 and site == 'resid_post.2'")
    drawn = np.asarray(figure.data[1].z)[list(figure.data[1].y).index("resid_post.2")]
    np.testing.assert_allclose(drawn, np.log10(table["norm"]))
    pattern = acts.plot_pattern(1, row=1, heads=[2])
    np.testing.assert_array_equal(np.asarray(pattern.data[0].z), acts["pattern.1"][1, 2, :5, :5])
    for options, text in (
        ({"layer": 0}, "The pattern of layer 0 was not captured"),
        ({"layer": 1, "row": 2}, "row=2 does not exist"),
        ({"layer": 1, "heads": [9]}, "Head 9 does not exist"),
    ):
        with pytest.raises(UnknownOption, match=text):
            acts.plot_pattern(**options)
