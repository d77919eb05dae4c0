"""Edits of a running model: what they change, what they leave bitwise alone, and that a cache makes no difference."""

import pytest
import torch
from conftest import by_trait

import workbench as wb
from workbench.attention import INSIDE
from workbench.checks.check import error
from workbench.checks.still import sites_of
from workbench.edits.kinds import Resample
from workbench.errors import LayerOutOfRange, LengthMismatch, ReadOnlySite, UnknownOption, UnknownSite

TEXTS = ["a dog and", "a cat"]


def writable(model):
    return [site for site in sites_of(model) if model.tap(site).passed_by is None]


@torch.no_grad()
def logits_with(model, batch, *edits):
    with wb.intervene(model, *edits):
        return model.forward(batch)


@by_trait
def test_an_edit_that_changes_nothing_changes_no_bit(tiny):
    """Scaling by 1, putting back what stands there, and patching a run with itself, at every site."""
    batch = tiny.tokenize(TEXTS, padding_side="left")
    with torch.no_grad():
        clean = tiny.forward(batch)
    sites = [site for site in writable(tiny) if site.name not in INSIDE]
    acts = wb.capture(tiny, batch, [str(site) for site in sites])
    same = [wb.scale(str(site), 1.0) for site in sites] + [wb.replace(str(site), torch.clone) for site in sites]
    assert torch.equal(logits_with(tiny, batch, *same), clean)
    assert torch.equal(logits_with(tiny, batch, *(wb.patch(str(site), acts) for site in sites)), clean)


@by_trait
def test_an_edit_that_changes_nothing_inside_attention_is_eager_attention_alone(tiny):
    batch = tiny.tokenize(TEXTS)
    sites = [str(site) for site in writable(tiny) if site.name in INSIDE]
    if not sites:
        return
    acts = wb.capture(tiny, batch, sites, logits=True)
    assert acts.logits is not None
    for edits in ([wb.scale(site, 1.0) for site in sites], *([wb.patch(site, acts)] for site in sites)):
        found = logits_with(tiny, batch, *edits)
        assert torch.equal(found[batch.mask], acts.logits[batch.mask])


def test_clamping_a_neuron_to_its_own_value_changes_nothing(llama):
    batch = llama.tokenize("a dog")
    own = wb.capture(llama, batch, "mlp_up.1")["mlp_up.1"][0]
    edits = [wb.clamp("mlp_up.1", 7, float(own[position, 7]), positions=position) for position in range(len(own))]
    with torch.no_grad():
        assert torch.equal(logits_with(llama, batch, *edits), llama.forward(batch))
    assert not torch.equal(logits_with(llama, batch, wb.clamp("mlp_up.1", 7, 3.0)), llama.forward(batch))


def test_a_clamp_in_the_last_layer_does_what_the_formula_says(llama):
    """Δ mlp_out = (c - u) · act(g) · W_out (methods: Davies 2025), through the final norm and the unembedding."""
    batch = llama.tokenize("a dog")
    last, neuron, value = llama.n_layers - 1, 5, 4.0
    acts = wb.capture(llama, batch, [f"resid_post.{last}", f"mlp_up.{last}", f"mlp_pre.{last}"])
    up, gate = acts[f"mlp_up.{last}"][0, :, neuron], acts[f"mlp_pre.{last}"][0, :, neuron]
    change = ((value - up) * torch.nn.functional.silu(gate))[:, None] * llama.weight("W_out", last)[neuron]
    expected = llama.vocabulary.logits(acts[f"resid_post.{last}"][0] + change)
    assert error(logits_with(llama, batch, wb.clamp(f"mlp_up.{last}", neuron, value))[0], expected) < 1e-5


def test_selectors_choose_and_leave_the_rest_bitwise(llama):
    batch = llama.tokenize(TEXTS, padding_side="left")
    sites = ["z.1", "mlp_post.1", "resid_post.1"]
    clean = wb.capture(llama, batch, sites)
    first = batch.mask.long().argmax(1)

    def edited(edit, site):
        with wb.intervene(llama, edit):
            return wb.capture(llama, batch, site)[site]

    found = edited(wb.clamp("z.1", [1, -1], 3.0, heads=2, rows=1, positions=[0, -1]), "z.1")
    expected = clean["z.1"].clone()
    for position in (int(first[1]), -1):
        expected[1, position, 2, [1, -1]] = 3.0
    assert torch.equal(found, expected)
    found = edited(wb.scale("mlp_post.1", -2.0, neurons=range(4, 9), positions="last"), "mlp_post.1")
    expected = clean["mlp_post.1"].clone()
    expected[:, -1, 4:9] *= -2
    assert torch.equal(found, expected)
    assert torch.equal(edited(wb.ablate("resid_post.1", when="new"), "resid_post.1"), clean["resid_post.1"])
    padding = edited(wb.ablate("resid_post.1"), "resid_post.1")[~batch.mask]
    assert torch.equal(padding, clean["resid_post.1"][~batch.mask])


def test_knocking_out_attention(llama):
    """A key of weight 0 is lost; a score of minus infinity shares its weight among the others."""
    batch = llama.tokenize(TEXTS, padding_side="left")
    clean = wb.capture(llama, batch, "pattern.1")["pattern.1"]
    with wb.intervene(llama, wb.ablate("pattern.1", heads=[0, 3], keys=1, positions=-1)):
        found = wb.capture(llama, batch, "pattern.1")["pattern.1"]
    expected = clean.clone()
    for row, first in enumerate(batch.mask.long().argmax(1).tolist()):
        expected[row, [0, 3], -1, first + 1] = 0
    assert torch.equal(found, expected)
    with wb.intervene(llama, wb.clamp("attn_scores.1", None, -torch.inf, keys=0, positions=range(1, 5))):
        found = wb.capture(llama, batch, "pattern.1")["pattern.1"][1, :, -1, -5:]
    shared = clean[1, :, -1, -5:].clone()
    shared[:, 0] = 0
    torch.testing.assert_close(found, shared / shared.sum(-1, keepdim=True))


def test_steering_projecting_and_averaging(llama):
    batch = llama.tokenize(TEXTS)
    others = wb.capture(llama, ["dogs dogs", "a"], ["resid_post.0", "z.0"])
    clean = wb.capture(llama, batch, ["resid_post.0", "z.0"])
    vectors = torch.randn(2, llama.d_model)

    def edited(edit, site="resid_post.0"):
        with wb.intervene(llama, edit):
            return wb.capture(llama, batch, site)[site][batch.mask]

    real = clean["resid_post.0"][batch.mask]
    torch.testing.assert_close(edited(wb.add("resid_post.0", vectors[0], 2.0)), real + 2 * vectors[0])
    left = edited(wb.project_out("resid_post.0", vectors))
    assert (left @ vectors.T).abs().max() < 1e-4
    torch.testing.assert_close(left, real - torch.linalg.lstsq(vectors.T, real.T).solution.T @ vectors)
    again = torch.cat([vectors, vectors.sum(0, keepdim=True)])  # a third direction of the same plane takes nothing more
    torch.testing.assert_close(edited(wb.project_out("resid_post.0", again)), left)
    means = others["z.0"][others.mask].mean(0)
    found = edited(wb.ablate("z.0", to="mean", source=others, heads=1), "z.0")
    torch.testing.assert_close(found[:, 1], means[1].expand_as(found[:, 1]))
    assert torch.equal(found[:, 0], clean["z.0"][batch.mask][:, 0])
    bank = others["resid_post.0"][others.mask]
    drawn = edited(wb.ablate("resid_post.0", to="resample", source=others, seed=3))
    assert all((bank == row).all(1).any() for row in drawn)
    assert not torch.equal(drawn, edited(wb.ablate("resid_post.0", to="resample", source=others, seed=4)))


def test_resampling_draws_every_token_as_often():
    """Chi-squared over a bank of 16 against its 0.1 % point (37.7 of 15 degrees of freedom)."""
    from workbench.edits.passing import Pass

    at = Pass.of(torch.ones(8, 500, dtype=torch.bool), 500)
    edit = Resample(site="resid_post.0", values={"resid_post.0": torch.arange(16.0)[:, None]}, seed=5)
    drawn = edit.applied(torch.full((8, 500, 1), -1.0), "resid_post.0", at).long().flatten()
    counts = torch.bincount(drawn, minlength=16).double()
    assert ((counts - 250) ** 2 / 250).sum() < 37.7
    rows = drawn.reshape(8, 500)
    assert max((rows[0] == rows[i]).double().mean() for i in range(1, 8)) < 0.15  # a 16th is expected


@by_trait
def test_patching_everything_restores_the_clean_logits_bitwise(tiny):
    """Equal lengths, and the last state of another text: nothing passes it by."""
    clean, corrupted = tiny.tokenize(["a dog", "a cat"]), tiny.tokenize(["b dog", "b tac"])
    last = f"resid_post.{tiny.n_layers - 1}"
    acts = wb.capture(tiny, clean, ["resid_pre.0", last])
    with torch.no_grad():
        logits = tiny.forward(clean)
    assert torch.equal(logits_with(tiny, corrupted, wb.patch(last, acts)), logits)
    assert torch.equal(logits_with(tiny, corrupted, wb.patch("resid_pre.0", acts)), logits)
    assert not torch.equal(logits_with(tiny, corrupted, wb.patch(last, acts, positions=[0, 1])), logits)


def test_patches_are_aligned_over_real_tokens(llama):
    source = wb.capture(llama, ["a dog and", "a cat"], "resid_post.0")  # padded on the right
    target = llama.tokenize(["b dog and", "b cat"], padding_side="left")
    with wb.intervene(llama, wb.patch("resid_post.0", source, positions=[0, -2])):
        found = wb.capture(llama, target, "resid_post.0")["resid_post.0"]
    clean = wb.capture(llama, target, "resid_post.0")["resid_post.0"]
    for row, length in enumerate((9, 5)):
        own, theirs = found[row, -length:], source["resid_post.0"][row, :length]
        assert torch.equal(own[[0, -2]], theirs[[0, -2]])
        assert torch.equal(own[1:-2], clean[row, -length:][1:-2])
    one = wb.capture(llama, "a cat", "resid_post.0")  # one text for all rows, other positions
    with wb.intervene(llama, wb.patch("resid_post.0", one, positions=[3, -1], source_positions=[0, 2])):
        found = wb.capture(llama, target, "resid_post.0", positions=[3, -1])["resid_post.0"]
    assert torch.equal(found, one["resid_post.0"][:, [0, 2]].expand_as(found))


def test_edits_come_in_order_and_nest(llama):
    batch = llama.tokenize("a dog")
    clean = wb.capture(llama, batch, "resid_post.0")["resid_post.0"]

    def now():
        return wb.capture(llama, batch, "resid_post.0")["resid_post.0"]

    one = torch.ones(llama.d_model)
    with wb.intervene(llama, wb.scale("resid_post.0", 2.0), wb.add("resid_post.0", one)):
        assert torch.equal(now(), 2 * clean + 1)
        with wb.intervene(llama, wb.scale("resid_post.0", 3.0)):
            assert torch.equal(now(), 3 * (2 * clean + 1))
        assert torch.equal(now(), 2 * clean + 1)
    assert torch.equal(now(), clean)


@torch.no_grad()
def generated(model, batch, *edits, n=4):
    """Tokens of a greedy generation with its cache, `[batch, pos + n]`, and the logits they were chosen by, `[batch, n, …]`."""
    with wb.intervene(model, *edits):
        found = model.hf.generate(
            input_ids=batch.tokens, attention_mask=batch.mask.long(), max_new_tokens=n, min_new_tokens=n, do_sample=False,
            output_logits=True, return_dict_in_generate=True, pad_token_id=0, eos_token_id=None,
        )  # fmt: skip
    return found.sequences, torch.stack(found.logits, 1)


@by_trait
def test_an_edit_inside_generate_is_the_edit_of_the_whole_text(tiny):
    """With a cache, token by token, and without one, at once: for prompt, new tokens and both."""
    from workbench.model import Batch

    batch = tiny.tokenize(TEXTS, padding_side="left")
    lengths = batch.mask.sum(1).tolist()
    others = wb.capture(tiny, "dogs", "resid_post.1")
    vector = 3 * torch.randn(tiny.d_model, generator=torch.Generator().manual_seed(1))
    attention = next(site for site in writable(tiny) if site.name == "z")

    def edits(when, positions):
        return [
            wb.add("resid_post.1", vector, when=when, positions=positions),
            wb.ablate("resid_post.1", range(5), to="resample", source=others, when=when, positions=positions),
            wb.scale(str(attention), -1.0, heads=1, rows=0, when=when, positions=None if when != "all" else positions),
            wb.ablate("mlp_out.2", positions=[2, 11]),  # a token of both prompts, and one that the first row generates
        ]

    for when, positions in (("all", None), ("prompt", range(5)), ("new", None)):
        sequences, logits = generated(tiny, batch, *edits(when, positions))
        width, n = batch.tokens.shape[1], logits.shape[1]
        mask = torch.cat([batch.mask, torch.ones(2, n, dtype=torch.bool)], 1)
        # Without a cache all tokens are a prompt: the same ones are named by position.
        for row, length in enumerate(lengths):
            named = {"all": None, "prompt": range(min(5, length)), "new": range(length, length + n)}[when]
            whole = [
                wb.add("resid_post.1", vector, positions=named),
                wb.ablate("resid_post.1", range(5), to="resample", source=others, positions=named),
                wb.scale(
                    str(attention), -1.0, heads=1, rows=0,
                    positions=None if when == "all" else range(length) if when == "prompt" else named,
                ),
                wb.ablate("mlp_out.2", positions=[2, 11] if row == 0 else [2]),
            ]  # fmt: skip
            expected = logits_with(tiny, Batch(sequences, mask), *whole)[row, width - 1 : -1]
            assert error(logits[row], expected) < 1e-4, (when, row)
        clean, _ = generated(tiny, batch)
        assert not torch.equal(clean, sequences)


def test_attention_is_edited_with_a_cache_too(llama):
    from workbench.model import Batch

    batch = llama.tokenize(TEXTS, padding_side="left")
    edit = wb.ablate("pattern.1", heads=[0, 2], keys=1)
    sequences, logits = generated(llama, batch, edit)
    mask = torch.cat([batch.mask, torch.ones(2, 4, dtype=torch.bool)], 1)
    expected = logits_with(llama, Batch(sequences, mask), edit)[:, batch.tokens.shape[1] - 1 : -1]
    assert error(logits, expected) < 1e-5
    assert not torch.equal(generated(llama, batch, wb.scale("pattern.1", 1.0))[1], logits)


@pytest.mark.parametrize("site", ["q_rot.1", "k_rot.1", "attn_scores.1", "pattern.1", "k.1", "v.1"])
@pytest.mark.parametrize("when", ["all", "prompt", "new"])
def test_attention_sites_in_every_pass(llama, site, when):
    """Keys of the prompt are edited in every step, as the cache holds them unedited; the causal mask stays."""
    from workbench.model import Batch

    batch = llama.tokenize(TEXTS, padding_side="left")
    sequences, logits = generated(llama, batch, wb.scale(site, -0.5, when=when))
    mask = torch.cat([batch.mask, torch.ones(2, 4, dtype=torch.bool)], 1)
    for row, length in enumerate(batch.mask.sum(1).tolist()):
        named = {"all": None, "prompt": range(length), "new": range(length, length + 4)}[when]
        whole = logits_with(llama, Batch(sequences[row : row + 1], mask[row : row + 1]), wb.scale(site, -0.5, positions=named))
        assert error(logits[row], whole[0, batch.tokens.shape[1] - 1 : -1]) < 1e-5
    assert not torch.equal(generated(llama, batch)[1], logits)


@pytest.mark.parametrize(
    "options",
    [{"use_cache": False}, {"prefill_chunk_size": 2}, {"num_return_sequences": 2, "do_sample": True, "top_k": 1}],
)
@pytest.mark.parametrize("chosen", [{"when": "prompt"}, {"when": "new"}, {"positions": -1}, {"positions": 10}])
def test_however_it_generates(llama, options, chosen):
    """Without a cache, with a prompt in pieces, with several samples: the same tokens are edited."""
    batch = llama.tokenize("a dog and")
    vector = 3 * torch.randn(llama.d_model, generator=torch.Generator().manual_seed(1))
    edit = wb.add("resid_post.1", vector, **chosen)
    common = {"max_new_tokens": 4, "pad_token_id": 0, "eos_token_id": None, "attention_mask": batch.mask.long()}
    with torch.no_grad(), wb.intervene(llama, edit):
        plain = llama.hf.generate(batch.tokens, **common)
        other = llama.hf.generate(batch.tokens, **common, **options)
    assert torch.equal(other, plain.expand(len(other), -1))


@torch.no_grad()
def test_passes_by_hand_with_a_cache(llama):
    """Two caches in one block: each has its own prompt."""
    from transformers import DynamicCache

    vector = 3 * torch.randn(llama.d_model, generator=torch.Generator().manual_seed(1))
    tokens = {"a": llama.tokenize("a dog and").tokens, "b": llama.tokenize("cat").tokens}

    def step(cache, ids):
        return llama.hf(input_ids=ids, past_key_values=cache, use_cache=True).logits[:, -1]

    for chosen in ({"when": "prompt"}, {"when": "new"}, {"positions": -1}):
        found = {}
        with wb.intervene(llama, wb.add("resid_post.1", vector, **chosen)):
            caches = {name: DynamicCache() for name in tokens}
            for name, ids in tokens.items():
                step(caches[name], ids)
            for name in tokens:
                found[name] = step(caches[name], torch.tensor([[7]]))
        for name, ids in tokens.items():
            n = ids.shape[1]
            named = {"prompt": range(n), "new": [n]}.get(chosen.get("when"), [n - 1])
            whole = torch.cat([ids, torch.tensor([[7]])], 1)
            with wb.intervene(llama, wb.add("resid_post.1", vector, positions=named)):
                assert error(found[name], llama.hf(input_ids=whole).logits[:, -1]) < 1e-5


def test_a_part_called_alone_has_no_positions(llama):
    with wb.intervene(llama, wb.scale("z.1", 2.0, positions=0)):
        llama.forward(llama.tokenize("a"))
        with pytest.raises(UnknownOption, match="a part of the model was called alone"):
            llama.hf.model(llama.tokenize("a dog").tokens)
        with pytest.raises(UnknownOption, match="The attention mask has 2 columns for 0 cached tokens and 3 new ones"):
            llama.hf(torch.ones(1, 3).long(), torch.ones(1, 2).long())


@pytest.mark.parametrize("site", ["attn_scores.1", "pattern.1"])
def test_no_edit_looks_ahead_or_at_padding(site):
    """Zero, a number, a patch from a shorter text: what the mask hides stays hidden, windows included."""
    from conftest import _unchanged

    for family in ("llama", "gemma2"):
        model = _unchanged(family)
        batch = model.tokenize(TEXTS, padding_side="left")
        clean = wb.capture(model, batch, "pattern.1")["pattern.1"]
        short = wb.capture(model, "a cat", site)
        for edit in (wb.ablate(site), wb.clamp(site, None, 0.1), wb.patch(site, short, positions=[1, 4]), wb.scale(site, -3.0)):
            with wb.intervene(model, edit):
                found = wb.capture(model, batch, "pattern.1")["pattern.1"]
            assert not found[(clean == 0) & batch.mask[:, None, :, None]].any(), (family, edit)
            if site.startswith("attn_scores"):
                rows = batch.mask[:, None].expand(found.shape[:3])
                torch.testing.assert_close(found.sum(-1)[rows], torch.ones_like(found.sum(-1)[rows]))


def test_zero_is_zero_under_a_multiplier():
    from conftest import _unchanged

    granite = _unchanged("granite")
    batch = granite.tokenize("a dog")
    before = wb.capture(granite, batch, "resid_pre.1")["resid_pre.1"]
    with wb.intervene(granite, wb.ablate("attn_out.1")):
        assert torch.equal(wb.capture(granite, batch, "resid_mid.1")["resid_mid.1"], before)


def test_beams_with_edits_of_single_rows_are_refused(llama):
    with wb.intervene(llama, wb.clamp("mlp_up.0", 1, 2.0, rows=0)):
        with pytest.raises(UnknownOption, match=r"num_beams=2 gives a text several rows, and an edit that tells rows apart"):
            llama.generate(TEXTS, num_beams=2)
        with pytest.raises(UnknownOption, match="num_return_sequences=3"):
            llama.hf.generate(torch.tensor([[1, 2]]), num_return_sequences=3, do_sample=True, max_new_tokens=1)
        llama.generate(TEXTS, max_new_tokens=1)
        from transformers import GenerationConfig

        with pytest.raises(UnknownOption, match="num_beams=2"):
            llama.hf.generate(torch.tensor([[1, 2]]), GenerationConfig(num_beams=2, max_new_tokens=1))
        with wb.intervene(llama, wb.clamp("mlp_up.0", 1, 2.0, rows=1)):
            pass
        with pytest.raises(UnknownOption, match="num_beams=2"):  # the inner block has left the outer one's guard
            llama.generate(TEXTS, num_beams=2)
    assert "generate" not in vars(llama.hf)
    sources = wb.capture(llama, ["a", "b"], "resid_post.0")
    with wb.intervene(llama, wb.patch("resid_post.0", sources)), pytest.raises(UnknownOption, match="tells rows apart"):
        llama.generate(["a", "b"], num_beams=2)
    with wb.intervene(llama, wb.clamp("mlp_up.0", 1, 2.0)):
        llama.generate(TEXTS, num_beams=2, max_new_tokens=2)


def test_hooks_go_and_errors_pass(llama):
    def hooks():
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in llama.hf.modules())

    def fail(_):
        raise RuntimeError("stop")

    before = hooks()
    with pytest.raises(RuntimeError, match="stop"), wb.intervene(llama, wb.replace("z.1", fail, rows=0)):
        llama.forward(llama.tokenize("a"))
    assert hooks() == before
    assert "generate" not in vars(llama.hf)


@pytest.mark.parametrize(
    ("edit", "raised", "text"),
    [
        (
            lambda: wb.clamp("mlp_up.1", 48, 1.0),
            UnknownOption,
            "neuron 48 does not exist at 'mlp_up.1'; it has 48, counted from",
        ),
        (lambda: wb.scale("z.1", 2.0, heads=-5), UnknownOption, "head -5 does not exist at 'z.1'; it has 4, counted from 0"),
        (lambda: wb.scale("k.1", 2.0, heads=2), UnknownOption, "head 2 does not exist at 'k.1'; it has 2"),
        (
            lambda: wb.scale("mlp_out.1", 2.0, heads=0),
            UnknownOption,
            "'mlp_out.1' has no heads to choose from. Leave heads= out",
        ),
        (lambda: wb.scale("pattern.1", 2.0, neurons=0), UnknownOption, "'pattern.1' has no neurons to choose from"),
        (lambda: wb.scale("z.1", 2.0, keys=0), UnknownOption, "keys= chooses the tokens looked at, at 'pattern'"),
        (lambda: wb.scale("mlp_up.9", 2.0), LayerOutOfRange, "Layers '9' do not lie in this model of 3 layers"),
        (lambda: wb.scale("nowhere", 2.0), UnknownSite, "Site 'nowhere' does not exist"),
        (lambda: wb.scale("result.1", 2.0), ReadOnlySite, "Site 'result.1' can be read, but not written"),
        (lambda: wb.scale("z.1", 2.0, rows=2), UnknownOption, "row 2 does not exist; the batch has 2, counted from 0"),
        (
            lambda: wb.scale("z.1", 2.0, positions=7, when="prompt"),
            UnknownOption,
            "position 7 was asked for, but text 1 has 5 tokens: 0 to 4, or negative from its end",
        ),
        (lambda: wb.scale("z.1", 2.0, positions=-6), UnknownOption, "position -6 was asked for, but text 1 has 5 tokens"),
        (
            lambda: wb.scale("z.1", 2.0, positions=12),
            UnknownOption,
            "no chosen token came to position 12, so nothing was changed",
        ),
        (lambda: wb.scale("pattern.1", 2.0, keys=20), UnknownOption, "no chosen token came to key 20"),
        (lambda: wb.scale("z.1", 2.0, positions=-1, when="new"), UnknownOption, r"came to position -1 \(when='new'\)"),
        (lambda: wb.add("resid_post.1", torch.ones(1)), UnknownOption, r"a tensor of \[1\] does not fit the site's"),
        (lambda: wb.add("resid_post.1", torch.ones(9, 32)), UnknownOption, r"a tensor of \[9, 32\] does not fit the site's"),
        (lambda: wb.add("z.1", torch.ones(9)), UnknownOption, r"a tensor of \[9\] does not fit the site's \[2, 9, 4, 8\]"),
        (lambda: wb.project_out("z.1", torch.ones(9)), UnknownOption, r"a tensor of \[9\] does not fit the site's"),
        (lambda: wb.replace("z.1", lambda x: x[0]), UnknownOption, r"the function gave \[9, 4, 8\] for \[2, 9, 4, 8\]"),
        (lambda: wb.replace("z.1", lambda _: 3), UnknownOption, r"the function gave int for"),
    ],
)
def test_bad_edits_are_named(llama, edit, raised, text):
    with pytest.raises(raised, match=text), torch.no_grad(), wb.intervene(llama, edit()):
        llama.forward(llama.tokenize(TEXTS))


def test_prompts_that_do_not_correspond_are_not_patched(llama):
    source = wb.capture(llama, "a dog and", ["resid_post.0", "z.0"])
    two = wb.capture(llama, ["a", "b"], "resid_post.0")
    batch = llama.tokenize(["a dog", "a", "b"])

    def patched(edit):
        with torch.no_grad(), wb.intervene(llama, edit):
            llama.forward(batch)

    with pytest.raises(LengthMismatch, match=r"text 0 has 5 tokens and the text patched from 9, so their positions do not"):
        patched(wb.patch("resid_post.0", source))
    with pytest.raises(LengthMismatch, match=r"position 0 of text 0 would come from position 9 of a text of 9 tokens"):
        patched(wb.patch("resid_post.0", source, positions=0, source_positions=9))
    with pytest.raises(LengthMismatch, match="the other run has 2 texts and this one 3"):
        patched(wb.patch("resid_post.0", two))
    patched(wb.patch("resid_post.0", two, rows=[1, 2]))


def test_an_expert_or_attention_that_is_not_there_is_refused():
    from conftest import _unchanged

    with (
        pytest.raises(UnknownSite, match="this layer is a mixture of experts"),
        wb.intervene(_unchanged("mixtral"), wb.clamp("mlp_post.0", 1, 2.0)),
    ):
        pass
