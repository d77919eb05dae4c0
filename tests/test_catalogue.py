"""The tables of sites and families agree with what capturing does, and the README's with the rows."""

from pathlib import Path

import pytest
import torch
from conftest import tiny_model
from families import FAMILIES, LAYERS

import workbench as wb
from workbench.architectures.families import ROWS
from workbench.catalogue import family_table, markdown, site_table
from workbench.checks.still import sites_of
from workbench.errors import UnknownSite
from workbench.sites import SITES, parse_layers


def test_every_site_is_as_the_table_says(tiny):
    table = site_table(tiny)
    assert set(table["site"]) == set(SITES)
    batch = tiny.tokenize("a dog")
    acts = wb.capture(tiny, batch, [str(site) for site in sites_of(tiny)])
    covered = []
    for row in table.to_dict("records"):
        for layer in parse_layers(row["layers"], LAYERS) if row["layers"] else [None]:
            site = row["site"] if layer is None else f"{row['site']}.{layer}"
            covered.append(site)
            if not row["available"]:
                with pytest.raises(UnknownSite) as refused:
                    wb.capture(tiny, batch, site)
                assert str(refused.value).endswith(row["why"])
                assert " Use " in row["why"]
                continue
            found = acts[site]
            known = {"batch": 1, "pos": 5, "key_pos": 5}
            axes = row["shape"].strip("[]").split(", ")
            assert list(found.shape) == [known.get(axis) or int(axis.split()[1]) for axis in axes], site
            path = row["module"].split(" of ")[1].split(" ")[0].replace("{l}", str(layer))
            tiny.module(path)
    assert len(covered) == len(set(covered)) == 2 + LAYERS * (len(SITES) - 2)


def test_what_differs_by_layer_has_a_row_each():
    table = site_table(tiny_model("qwen2_moe"))
    rows = table[table["site"] == "mlp_post"].set_index("layers")
    assert rows["available"].to_dict() == {"0": True, "1:3": False}
    assert "mixture of experts" in rows.loc["1:3", "why"]
    assert table.set_index("site").loc["router_logits", "writable"].tolist() == [False, False]


def test_every_row_has_a_tiny_model():
    assert {model_type for model_type, _ in FAMILIES.values()} == set(ROWS)


def test_the_readme_lists_the_families_as_they_are():
    readme = (Path(wb.__file__).parent.parent / "README.md").read_text()
    listed = readme.split("<!-- families -->\n")[1].split("<!-- /families -->")[0]
    assert listed == markdown(family_table())


@pytest.mark.parametrize(
    ("family", "site", "text"),
    [
        ("gptj", "resid_mid.1", "attention and MLP run in parallel, so there is no stream between them. Use resid_pre"),
        ("olmo2", "ln1.1", "attention reads the stream as it is, and what it gives is normed. Use resid_pre"),
        ("exaone4", "ln2.1", "the MLP reads the stream as it is, and what it gives is normed. Use resid_mid"),
        ("gpt2", "mlp_up.0", "its MLP has no gate. Use mlp_pre"),
        ("mixtral", "mlp_post.0", "this layer is a mixture of experts: each token has the neurons of its own experts"),
        ("llama", "router_logits.0", "this layer has no experts to choose from"),
        ("lfm2", "q.0", "this layer mixes positions without attention"),
        ("lfm2", "pattern.0", "this layer mixes positions without attention"),
        ("deepseek_v3", "k.0", "keys are put together of a part a head and a part that all heads share"),
        ("falcon rw", "pattern.0", "Hugging Face's eager Falcon adds its position bias twice. Use q, k and v"),
    ],
)
def test_a_site_that_a_family_lacks_is_refused_with_the_reason(family, site, text):
    with pytest.raises(UnknownSite, match=f"Site '{site}' does not exist in '{FAMILIES[family][0]}': {text}"):
        wb.capture(tiny_model(family), "dog", site)


def test_router_logits_choose_the_experts(monkeypatch):
    """The largest two of Mixtral's router logits are the experts that Hugging Face's own module runs."""
    model = tiny_model("mixtral")
    seen = []
    experts = model.module("model.layers.1.mlp.experts")
    handle = experts.register_forward_pre_hook(lambda module, args: seen.append(args[1]))
    batch = model.tokenize("a dog")
    with torch.no_grad():
        model.forward(batch)
    handle.remove()
    logits = wb.capture(model, batch, "router_logits.1")["router_logits.1"]
    assert logits.shape == (1, 5, 4)
    assert torch.equal(logits[0].topk(2).indices.sort().values, seen[0].sort().values)
