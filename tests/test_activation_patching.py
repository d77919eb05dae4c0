"""Activation patching: what each patch restores, against patches made by hand; a planted path that must be found."""

import numpy as np
import pytest
import torch
from conftest import by_trait

import workbench as wb
from workbench.errors import LengthMismatch, UnknownOption, UnknownSite, UnknownToken


@by_trait
def test_each_patch_is_the_one_made_by_hand(tiny):
    layers = [layer for layer in range(tiny.n_layers) if tiny.row.block(layer).attn is not None]
    sites = ("resid_pre", "attn_out", "mlp_out", "z")
    found = wb.activation_patching(tiny, "a dog", "bcats", 5, 9, sites=sites, rows=3, progress=False)
    clean, corrupted = tiny.tokenize("a dog"), tiny.tokenize("bcats")
    acts = wb.capture(tiny, clean, [f"{site}.{layer}" for site in sites for layer in layers], logits=True)
    own = found.settings

    def difference(logits):
        return float(logits[0, -1, 5] - logits[0, -1, 9])

    ends = [difference(tiny.forward(batch).detach()) for batch in (clean, corrupted)]
    assert [own["clean_difference"], own["corrupted_difference"]] == pytest.approx(ends, rel=1e-4)
    for row in found.table.sample(12, random_state=0).to_dict("records"):
        if row["layer"] not in layers:
            continue
        site = f"{row['site']}.{row['layer']}"
        edit = wb.patch(site, acts, heads=row["head"]) if row["site"] == "z" else wb.patch(site, acts, positions=row["pos"])
        with torch.no_grad(), wb.intervene(tiny, edit):
            by_hand = difference(tiny.forward(corrupted))
        assert row["logit_difference"] == pytest.approx(by_hand, rel=1e-3, abs=1e-3 * max(map(abs, ends))), site
        assert row["restored"] == pytest.approx((by_hand - ends[1]) / (ends[0] - ends[1]), rel=1e-2, abs=1e-2)


def test_what_differs_restores_everything_and_what_does_not_nothing(llama):
    """The first state of the one differing token is all that the prompts differ by; the others' are the same in both."""
    found = wb.activation_patching(llama, "a dog", "a cog", 5, 9, sites=["resid_pre"], progress=False).table
    first = found[found["layer"] == 0].set_index("pos")["restored"]
    assert first[2] == pytest.approx(1, abs=1e-4)
    assert first.drop(2).to_numpy() == pytest.approx(np.zeros(4), abs=1e-4)
    last = found[found["layer"] == llama.n_layers - 1].set_index("pos")["restored"]
    assert set(found["token"]) == {"a", " ", "c", "o", "g"}
    assert last.drop([2, 3, 4]).to_numpy() == pytest.approx(np.zeros(2), abs=1e-4)  # earlier than the difference


def test_heads_are_patched_at_the_positions_asked_for(llama):
    """The prompts are the same up to their third token, so there is nothing to bring over before it."""
    common = {"sites": "z", "progress": False}
    none = wb.activation_patching(llama, "a dog", "a cog", 5, 9, positions=[0, 1], **common).table
    assert none["restored"].to_numpy() == pytest.approx(np.zeros(len(none)), abs=1e-4)
    every = wb.activation_patching(llama, "a dog", "a cog", 5, 9, **common).table
    later = wb.activation_patching(llama, "a dog", "a cog", 5, 9, positions=[2, 3, 4], **common).table
    assert later["restored"].to_numpy() == pytest.approx(every["restored"].to_numpy(), abs=1e-4)
    assert every["restored"].abs().max() > 0.05


def test_exchanging_the_prompts_exchanges_the_ends(llama):
    one = wb.activation_patching(llama, "a dog", "a cog", 5, 9, sites=["mlp_out"], layers="1", progress=False)
    other = wb.activation_patching(llama, "a cog", "a dog", 5, 9, sites=["mlp_out"], layers="1", progress=False)
    assert one.settings["clean_difference"] == pytest.approx(other.settings["corrupted_difference"])
    assert set(one.table["layer"]) == {1}


def test_the_subject_and_the_layer_that_moves_it(smollm):
    """France's state carries the answer up to the layer whose attention takes it to the last token."""
    found = wb.activation_patching(
        smollm, "The capital of France is", "The capital of Italy is", sites=["resid_pre"], positions=[3, -1], progress=False
    )
    assert (found.settings["target"], found.settings["versus"]) == (" Paris", " Rome")
    grid = found.table.pivot_table(index="layer", columns="pos", values="restored")
    assert grid.loc[0, 3] == pytest.approx(1, abs=1e-3)
    assert (grid.loc[:20, 3] > 0.9).all()
    assert (grid.loc[:20, 4] < 0.2).all()
    assert grid.loc[29, 3] < 0.1
    assert grid.loc[29, 4] > 0.9
    assert "resid_pre.0" in str(found) or "resid_pre.1" in str(found)


def test_the_picture_shows_the_numbers(llama):
    found = wb.activation_patching(llama, "a dog", "a cog", 5, 9, sites=["attn_out", "z"], progress=False)
    figure = found.plot()
    drawn = np.asarray(figure.data[1].z)
    table = found.table[found.table["site"] == "z"]
    assert drawn.shape == (llama.n_layers, llama.n_heads)
    assert drawn[2, 1] == pytest.approx(table[(table["layer"] == 2) & (table["head"] == 1)]["restored"].item())
    assert "c (d)" in figure.data[0].x[2]


def test_bad_input_is_named(llama):
    def patched(clean="a dog", corrupted="a cog", target=5, versus=9, **options):
        wb.activation_patching(llama, clean, corrupted, target, versus, progress=False, **options)

    for options, raised, text in (
        ({"corrupted": "a"}, LengthMismatch, "The clean prompt has 5 tokens and the corrupted one 1"),
        ({"versus": 5}, UnknownOption, "The two answers are the same token"),
        ({"corrupted": "a dog"}, UnknownOption, "Both prompts give the same logit difference"),
        ({"positions": [5]}, UnknownOption, "Position 5 does not exist: the prompts have 5 tokens"),
        ({"positions": []}, UnknownOption, "An empty list of positions"),
        ({"rows": 0}, UnknownOption, "rows=0 is out of range"),
        ({"sites": []}, UnknownSite, "No site is left of none"),
        ({"sites": ["attn_out.2"], "layers": "1"}, UnknownSite, "No site is left of attn_out.2 in layers '1'"),
        ({"sites": ["pattern"]}, UnknownSite, "'pattern' is not patched layer by layer"),
        ({"sites": ["ln_final"]}, UnknownSite, "'ln_final' is not patched layer by layer"),
        ({"sites": ["resid_mid"]}, UnknownSite, "cannot be patched: the stream itself passes this place by"),
        ({"sites": ["router_logits"]}, UnknownSite, "cannot be patched|has no experts"),
        ({"target": "no such"}, UnknownToken, "'no such' is no single token"),
        ({"target": 10_000}, UnknownToken, "10000"),
    ):
        with pytest.raises(raised, match=text):
            patched(**options)
