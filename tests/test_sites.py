import pytest
from hypothesis import given
from hypothesis import strategies as st

from workbench.errors import LayerOutOfRange, UnknownSite
from workbench.sites import SITES, WITHOUT_LAYER, Site, parse_layers, parse_sites


@given(name=st.sampled_from(sorted(SITES)), layer=st.integers(0, 29))
def test_a_printed_site_parses_to_itself(name, layer):
    site = Site(name) if name in WITHOUT_LAYER else Site(name, layer)
    assert Site.parse(str(site), 30) == site
    for elsewhere in (site.transformer_lens, site.nnterp):
        assert elsewhere is None or Site.parse(elsewhere, 30) == site


@pytest.mark.parametrize(
    ("text", "sites"),
    [
        ("resid_post.4:6", [Site("resid_post", 4), Site("resid_post", 5)]),
        ("resid_post.-1", [Site("resid_post", 7)]),
        ("mlp_post", [Site("mlp_post", i) for i in range(8)]),
        ("blocks.3.hook_resid_post", [Site("resid_post", 3)]),
        ("blocks.3.attn.hook_z", [Site("z", 3)]),
        ("blocks.3.mlp.hook_pre_linear", [Site("mlp_up", 3)]),
        ("hook_embed", [Site("embed")]),
        ("ln_final.hook_normalized", [Site("ln_final")]),
        ("blocks.3.ln1.hook_out", [Site("ln1", 3)]),
        ("blocks.3.ln2.hook_normalized", [Site("ln2", 3)]),
        ("mlps_input[3]", [Site("ln2", 3)]),
        ("layers_output[-2]", [Site("resid_post", 6)]),
        ("layers_input[0]", [Site("resid_pre", 0)]),
        ("token_embeddings", [Site("embed")]),
        ("blocks.3.attn.hook_rot_k", [Site("k_rot", 3)]),
        ("attention_probabilities[1]", [Site("pattern", 1)]),
    ],
)
def test_spellings(text, sites):
    assert parse_sites([text], 8) == sites


def test_each_site_is_given_once():
    assert parse_sites(["q.1", "q.0:2", "blocks.1.attn.hook_q"], 8) == [Site("q", 1), Site("q", 0)]


@pytest.mark.parametrize(
    ("text", "layers"),
    [
        (None, [0, 1, 2, 3]),
        ("2", [2]),
        ("-1", [3]),
        ("1:3", [1, 2]),
        (":2", [0, 1]),
        ("-2:", [2, 3]),
        ("0,2:4,0", [0, 2, 3]),
        ("0:4:3", [0, 3]),
        ("::2,-1", [0, 2, 3]),
    ],
)
def test_layers(text, layers):
    assert parse_layers(text, 4) == layers


@pytest.mark.parametrize("text", ["4", "-5", "2:9", "3:3", "3:1", "-6:2", ":-5", "-9:9"])
def test_a_layer_outside_the_model_is_refused(text):
    with pytest.raises(LayerOutOfRange, match=f"Layers '{text}' do not lie in this model of 4 layers; they go from 0 to 3"):
        parse_layers(text, 4)


@pytest.mark.parametrize("text", ["", "a", "1-2", "1:2:0", "1:2:-1", "0:1:2:3", "1,,2"])
def test_layers_that_are_no_layers_are_refused(text):
    with pytest.raises(LayerOutOfRange, match=r"are not understood. Write 7, -1, 4:8"):
        parse_layers(text, 4)


def test_an_unknown_site_lists_the_known_ones():
    with pytest.raises(UnknownSite, match=r"Site 'resid_last.3' does not exist. Sites are embed, .*resid_post"):
        parse_sites(["resid_last.3"], 8)


def test_a_site_of_the_whole_model_has_no_layer():
    with pytest.raises(UnknownSite, match="'embed' belongs to the whole model"):
        parse_sites(["embed.3"], 8)


def test_one_site_is_not_eight():
    with pytest.raises(UnknownSite, match=r"Site 'q' names 8 sites where one is wanted. Add a layer: 'q.0'"):
        Site.parse("q", 8)
