"""Captured tensors against Hugging Face's own outputs and against what an edit does."""

import pytest
import torch
from conftest import by_trait, tiny_model
from families import LAYERS, tiny_hf, tiny_tokenizer
from torch import nn

import workbench as wb
from workbench.attention import INSIDE
from workbench.checks.check import error
from workbench.checks.still import sites_of
from workbench.errors import LayerOutOfRange, ReadOnlySite, UnknownSite
from workbench.model import Batch
from workbench.sites import Site
from workbench.tracer import edited


def test_streams_are_hugging_faces_hidden_states(tiny):
    batch = tiny.tokenize(["a dog and", "a cat"])
    acts = wb.capture(tiny, batch, ["resid_pre", "resid_post", "ln_final"])
    with torch.no_grad():
        states = tiny.hf(input_ids=batch.tokens, attention_mask=batch.mask.long(), output_hidden_states=True).hidden_states
    for layer in range(tiny.n_layers):
        torch.testing.assert_close(acts[f"resid_pre.{layer}"][batch.mask], states[layer][batch.mask])
    torch.testing.assert_close(acts["ln_final"][batch.mask], states[-1][batch.mask])  # the last one is after the norm


def test_norm_sites_are_what_the_norms_make_of_the_stream(tiny):
    """In every block; where there is no norm before attention or the MLP, there is no site, and the stream is named instead."""
    batch = tiny.tokenize(["a dog and", "a cat"])
    acts = wb.capture(tiny, batch, [str(site) for site in sites_of(tiny)])
    for layer in range(LAYERS):
        row, block = tiny.row.block(layer), tiny.block(layer)
        stream = {"ln1": "resid_pre", "ln2": "resid_pre" if row.parallel else "resid_mid"}
        for name, path in (("ln1", row.ln1), ("ln2", row.ln2)):
            if path is None:
                with pytest.raises(UnknownSite, match=f"reads the stream as it is.* Use {stream[name]}"):
                    wb.capture(tiny, batch, f"{name}.{layer}")
                continue
            with torch.no_grad():
                expected = block.get_submodule(path)(acts[f"{stream[name]}.{layer}"])
            torch.testing.assert_close(acts[f"{name}.{layer}"][batch.mask], expected[batch.mask])


class Given(nn.Module):
    """Gives the same, whatever it reads."""

    def __init__(self, value):
        super().__init__()
        self.value = value

    def forward(self, x):
        return self.value.reshape(x.shape)


@by_trait
def test_writing_a_norm_site_is_the_model_whose_norm_gives_that(family):
    """Truth: Hugging Face's own code, with a module in the norm's place."""
    model = tiny_model(family, check=False)
    batch = model.tokenize("a dog")
    for name in ("ln1", "ln2"):
        site, path = Site(name, 1), getattr(model.row.block(1), name)
        if path is None:
            continue
        clean = wb.capture(model, batch, str(site), logits=True)
        new = clean[str(site)] + torch.randn_like(clean[str(site)])
        with torch.no_grad(), edited(model, {site: lambda _, new=new: new}):
            written = model.forward(batch)
        by_hand = tiny_model(family, check=False)
        by_hand.block(1).set_submodule(path, Given(new))
        with torch.no_grad():
            assert torch.equal(written, by_hand.forward(batch)), site
        assert clean.logits is not None
        assert error(written, clean.logits) > 1e-3, site


@by_trait
def test_heads_mix_values_by_the_pattern(family):
    """z = pattern v, with the pattern that Hugging Face's own eager attention gives."""
    if family == "falcon rw":
        pytest.skip("Hugging Face's eager Falcon adds its position bias twice; the self-check moves its heads instead")
    hf = tiny_hf(family, attn_implementation="eager")
    tiny = wb.load(hf, tokenizer=tiny_tokenizer(), check=False)
    batch = tiny.tokenize(["a dog and a cat"])
    having = [layer for layer in range(LAYERS) if tiny.row.block(layer).attn is not None]
    acts = wb.capture(tiny, batch, [f"{name}.{layer}" for layer in having for name in "zv"])
    with torch.no_grad():
        patterns = hf(input_ids=batch.tokens, output_attentions=True).attentions
    for layer, pattern in zip(having, patterns, strict=True):
        v = acts[f"v.{layer}"].repeat_interleave(tiny.n_heads // tiny.heads.n_key_value_heads, dim=2)
        if family == "olmo clipped":
            v = v.clamp(-hf.config.clip_qkv, hf.config.clip_qkv)  # after the site
        torch.testing.assert_close(torch.einsum("bhqk,bkhe->bqhe", pattern, v), acts[f"z.{layer}"])


def test_the_pass_ends_after_the_last_site(llama, monkeypatch):
    called = []
    handle = llama.hf.model.layers[2].register_forward_hook(lambda *_: called.append(True))
    acts = wb.capture(llama, "a dog", ["mlp_post.1", "resid_post.0"])
    handle.remove()
    assert not called
    assert list(acts) == ["mlp_post.1", "resid_post.0"]
    assert acts["mlp_post.1"].shape == (1, 5, llama.d_mlp)
    assert "├ mlp_post    1  1 x 5 x 48" in repr(acts)


def test_hooks_go_even_when_the_pass_fails(llama):
    def fail(_):
        raise RuntimeError("stop")

    def hooks():
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in llama.hf.modules())

    before = hooks()
    with pytest.raises(RuntimeError, match="stop"), edited(llama, {Site("resid_post", 0): fail}):
        llama.forward(llama.tokenize("dog"))
    assert hooks() == before


@by_trait
def test_an_edit_lands_at_its_site_and_nowhere_before(tiny):
    batch = tiny.tokenize("a dog")

    def captured(site):
        return wb.capture(tiny, batch, str(site))[str(site)]

    before, after = Site("resid_post", 0), Site("resid_post", 1)
    clean = {site: captured(site) for site in (before, after)}
    for site in (site for site in sites_of(tiny) if site.layer == 1):
        new = torch.randn_like(captured(site))
        if site.name in ("resid_mid", "router_logits", "result"):
            refused = pytest.raises(ReadOnlySite, match=rf"Site '{site}' can be read, but not written: the .* Write ")
            with refused, edited(tiny, {site: lambda _, new=new: new}):
                tiny.forward(batch)
            continue
        with edited(tiny, {site: lambda _, new=new: new}):
            assert error(captured(site), new) < 1e-6, site
            # Sites inside attention switch to another attention function, which rounds otherwise.
            off = error(captured(before), clean[before])
            assert off < 1e-5 if site.name in INSIDE else off == 0, site
            assert error(captured(after), clean[after]) > 1e-4, site
    assert torch.equal(captured(after), clean[after])


@by_trait
def test_replacing_the_stream_replaces_what_follows(tiny):
    """Writing the last state of one text into another gives the other's logits: nothing passes the site by."""
    a, b = tiny.tokenize("a dog"), tiny.tokenize("b cat")
    last = f"resid_post.{tiny.n_layers - 1}"
    state = wb.capture(tiny, a, [last])[last]
    with torch.no_grad(), edited(tiny, {Site.parse(last, tiny.n_layers): lambda _: state}):
        patched = tiny.forward(b)
    with torch.no_grad():
        torch.testing.assert_close(patched, tiny.forward(a))


@by_trait
def test_capturing_is_the_same_in_a_batch_and_alone(tiny):
    both = tiny.tokenize(["a dog and", "a cat"], padding_side="left")
    alone = Batch(both.tokens[1:, -int(both.mask[1].sum()) :], both.mask[1:, -int(both.mask[1].sum()) :])
    # Scores hold the mask's own large numbers, which need not be the same.
    sites = [str(site) for site in sites_of(tiny) if site.name != "attn_scores"]
    together, single = wb.capture(tiny, both, sites), wb.capture(tiny, alone, sites)
    real = both.mask[1]
    for site in sites:
        row = together[site][1]
        if site.startswith("pattern"):
            row, expected = row[:, real][:, :, real], single[site][0]
            assert together[site].shape[2:] == (real.numel(), real.numel())
        else:
            row, expected = row[real], single[site][0]
            assert together[site].shape[:2] == both.mask.shape
        assert error(row.flatten(1), expected.flatten(1)) < 1e-5, site


def test_a_site_is_found_by_every_spelling(llama):
    acts = wb.capture(llama, "a dog", ["resid_post.-1", "blocks.0.hook_resid_pre"])
    assert acts["resid_post.-1"] is acts["resid_post.2"] is acts["layers_output[-1]"]
    assert acts["blocks.0.hook_resid_pre"] is acts["resid_pre.0"]
    assert "layers_output[2]" in acts
    assert "resid_post.1" not in acts
    assert "nonsense" not in acts
    assert acts.get("resid_post.99") is None
    with pytest.raises(KeyError, match=r"resid_post.1 was not captured; captured: resid_post.2, resid_pre.0"):
        acts["resid_post.1"]


def test_sites_that_are_not_there_are_refused(llama):
    with pytest.raises(LayerOutOfRange, match="do not lie in this model of 3 layers"):
        wb.capture(llama, "dog", ["resid_post.3"])
    with pytest.raises(UnknownSite, match="Site 'resid' does not exist"):
        wb.capture(llama, "dog", ["resid"])
