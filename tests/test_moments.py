"""Second moments: against direct sums, in every partition, by stratum and fold, and on disk."""

import numpy as np
import pytest
import torch
from conftest import tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st

import workbench as wb
from workbench.corpus.corpus import ORDINARY, STRATA
from workbench.errors import BadArtifact, LayerOutOfRange, NotComparable, NotFinite, OutOfMemory, UnknownOption, UnknownSite
from workbench.moments.accumulator import Accumulator
from workbench.moments.joint import Joint
from workbench.moments.layout import Layout, Pair, pairs_between
from workbench.moments.moments import Moments

WIDTHS = {"a": 3, "b": 5, "c": 2}
PAIRS = (Pair("a", "b"), Pair("a", "c"), Pair("c", "b"), Pair("a", "b", True))


def rows(n: int = 300, seed: int = 0, dtype=torch.float64):
    """Rows of every stratum, some of them massive, of twelve documents one after the other."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {site: torch.randn(n, width, generator=generator, dtype=torch.float64) + 7 for site, width in WIDTHS.items()}
    stratum = np.random.default_rng(seed).choice(len(STRATA), n, p=[0.05, 0.1, 0.03, 0.02, 0.8])
    tensors["a"][torch.from_numpy(stratum == 0)] += 900
    return {site: tensor.to(dtype) for site, tensor in tensors.items()}, stratum, np.arange(n) * 12 // n


def moments_of(layout: Layout, batches, dtype=torch.float64, *, tokens: int = 64, part: int = 0) -> Moments:
    own = Accumulator(layout, torch.device("cpu"), dtype, tokens=tokens)
    for tensors, stratum, document in batches:
        own.add(tensors, stratum, document)
    return Moments(
        layout,
        own.sums().finished(torch.device("cpu")),
        {"model": "toy", "corpus": "rows", "products": str(dtype).removeprefix("torch."), "corpus_parts": [[part, 3]]},
    )


def cut(data, at: list[int]):
    """The same rows in several batches."""
    tensors, stratum, document = data
    for start, stop in zip([0, *at], [*at, len(stratum)], strict=True):
        yield {site: tensor[start:stop] for site, tensor in tensors.items()}, stratum[start:stop], document[start:stop]


def same(a: Joint, b: Joint, tolerance: float) -> None:
    assert a.n == b.n
    for one, other in zip(a[1:], b[1:], strict=True):
        assert (one - other).norm() <= tolerance * max(float(other.norm()), 1e-300)


def test_joint_moments_of_every_group_and_fold_are_the_direct_ones():
    data = rows()
    tensors, stratum, document = data
    layout = Layout(WIDTHS, PAIRS)
    own = moments_of(layout, cut(data, [50, 51, 200]))
    for strata, chosen in (("all", stratum >= 0), ("ordinary", stratum == ORDINARY), ("rest", stratum != ORDINARY)):
        for fold, cross in ((None, None), ((0, 2, 4), [0]), ((1, 3), [1])):
            at = torch.from_numpy(chosen & np.isin(document % 5, range(5) if fold is None else fold))
            for pair in PAIRS[:3]:
                direct = Joint.of(tensors[pair.source][at], tensors[pair.target][at])
                same(own.joint(pair, strata, cross), direct, 1e-12)


def test_single_strata_and_folds_of_a_site():
    data = rows()
    tensors, stratum, document = data
    own = moments_of(Layout(WIDTHS, PAIRS), [data])
    for name in ("first", "massive", "ordinary"):
        at = torch.from_numpy((stratum == STRATA.index(name)) & np.isin(document % 5, [1, 4]))
        found, direct = own.spread("a", [name], [1, 4]), Joint.of(tensors["a"][at], tensors["a"][at])
        assert found.n == direct.n > 0
        torch.testing.assert_close(found.mean, direct.mean_x)
        # The rest is centred on one pilot: 900 away from it, float64 keeps 12 digits of the sum of squares
        torch.testing.assert_close(found.xx, direct.xx, rtol=1e-9, atol=1e-7)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 299), max_size=6, unique=True).map(sorted), st.integers(16, 200), st.permutations(range(3)))
def test_any_partition_in_any_order_gives_the_same(at, tokens, order):
    layout, data = Layout(WIDTHS, PAIRS[:3]), rows()
    whole = moments_of(layout, [data])
    parts = [moments_of(layout, list(cut(data, at))[i::3], tokens=tokens, part=i) for i in range(3)]
    merged = parts[order[0]] + parts[order[1]] + parts[order[2]]
    assert merged.settings["corpus_parts"] == [[0, 3], [1, 3], [2, 3]]
    for pair in PAIRS[:3]:
        for strata in ("all", "ordinary", "rest"):
            same(merged.joint(pair, strata), whole.joint(pair, strata), 1e-12)


def test_strata_and_folds_add_up():
    own = moments_of(Layout(WIDTHS, PAIRS), [rows()])
    for pair in PAIRS[:3]:
        whole = own.joint(pair)
        same(own.joint(pair, "ordinary").plus(own.joint(pair, "rest")), whole, 1e-12)
        same(own.joint(pair, "all", [0]).plus(own.joint(pair, "all", [1])), whole, 1e-12)
    spreads = [own.spread("b", [name]) for name in STRATA]
    assert sum(one.n for one in spreads) == own.spread("b").n == 300


def test_float32_products_do_not_lose_a_small_variance_beside_a_large_mean():
    """Without the pilot they do: E[x²] - E[x]² of a coordinate at 3,000 with a variance of 1 is off by its own size."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4000, 3, generator=generator, dtype=torch.float64)
    x[:, 0] += 3000
    layout = Layout({"a": 3}, ())
    own = moments_of(layout, [({"a": x.float()}, np.full(4000, ORDINARY), np.zeros(4000, int))], torch.float32, tokens=4096)
    direct = Joint.of(x.float(), x.float())
    assert abs(float(own.spread("a").xx[0, 0] / direct.xx[0, 0]) - 1) < 1e-5
    naive = (x.float().T @ x.float() - len(x) * torch.outer(x.float().mean(0), x.float().mean(0)))[0, 0]
    assert abs(float(naive / direct.xx[0, 0]) - 1) > 0.05


def test_shuffled_pairs_hold_the_same_rows_beside_other_documents():
    tensors, stratum, document = rows(4096)
    tensors["b"] = tensors["a"] @ torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    own = moments_of(Layout(WIDTHS, PAIRS), [(tensors, stratum, document)], tokens=8192)
    plain, null = (own.joint(PAIRS[0], "ordinary", shuffled=which) for which in (False, True))
    assert null.n == plain.n
    same(null._replace(xy=plain.xy), plain, 1e-12)
    assert null.xy.norm() < 0.1 * plain.xy.norm()
    assert int(own.sums.unshuffled.sum()) < 0.02 * 4096
    unshuffled = moments_of(Layout(WIDTHS, PAIRS), [(tensors, stratum, np.zeros(4096, int))], tokens=8192)
    assert int(unshuffled.sums.unshuffled.sum()) == 4096, "one document has no other to be shuffled with, and that is counted"


def test_pairs_by_word():
    sites = ["0", "1", "2", "3"]
    assert [str(pair) for pair in pairs_between(sites, "adjacent")] == ["0>1", "1>2", "2>3"]
    assert [str(pair) for pair in pairs_between(sites, "last")] == ["0>3", "1>3", "2>3"]
    assert len(pairs_between(sites, "all")) == 6


def test_one_product_serves_targets_that_stand_side_by_side():
    layout = Layout(dict.fromkeys("abcd", 4), tuple(pairs_between("abcd", "all")))
    assert {source: len(runs) for source, runs in layout.runs.items()} == {"a": 1, "b": 1, "c": 1}
    assert Layout(WIDTHS, PAIRS).runs["a"][0].targets == slice(3, 10)


def test_saved_moments_are_the_same(tmp_path):
    own = moments_of(Layout(WIDTHS, PAIRS), [rows()])
    found = Moments.load(own.save(tmp_path))
    assert found.layout == own.layout
    assert found.settings == own.settings
    for strata in ("all", "ordinary", "rest"):
        for pair in PAIRS:
            plain = pair._replace(shuffled=False)
            same(
                found.joint(plain, strata, shuffled=pair.shuffled), own.joint(plain, strata, shuffled=pair.shuffled), 0.0
            )  # bit for bit
    (tmp_path / "moments.safetensors").write_bytes(b"half")
    with pytest.raises(BadArtifact, match="are damaged"):
        Moments.load(tmp_path)
    with pytest.raises(BadArtifact, match="does not exist"):
        Moments.load(tmp_path / "nowhere")


def test_moments_that_do_not_belong_together_are_refused():
    layout = Layout(WIDTHS, PAIRS)
    own, other = (moments_of(layout, [rows()], part=i) for i in range(2))
    with pytest.raises(NotComparable, match=r"model is 'toy' here and 'another' there"):
        own + Moments(layout, other.sums, other.settings | {"model": "another"})
    with pytest.raises(NotComparable, match=r"corpus is 'rows' here"):
        own + Moments(layout, other.sums, other.settings | {"corpus": "else"})
    with pytest.raises(NotComparable, match="Part 0 of 3 and part 0 of 3 share tokens"):
        own + own
    with pytest.raises(NotComparable, match="other sites, pairs or cells"):
        own + moments_of(Layout(WIDTHS, PAIRS[:1]), [rows()], part=1)


def test_parts_that_share_tokens_are_refused():
    layout = Layout(WIDTHS, PAIRS)
    own, other = (moments_of(layout, [rows()], part=i) for i in range(2))
    whole = Moments(layout, other.sums, other.settings | {"corpus_parts": [[0, 1]]})
    sixth = Moments(layout, other.sums, other.settings | {"corpus_parts": [[3, 6]]})
    for one in (whole, sixth):
        with pytest.raises(NotComparable, match=r"Part 0 of 3 and part \d of \d share tokens"):
            own + one
    assert int((own + other).sums.n.sum()) == 600


def test_tokens_are_shuffled_within_their_stratum():
    """A sink beside an ordinary token would be another null than a sink beside a sink."""
    tensors, stratum, document = rows(2048)
    tensors["b"][:, 0] = torch.from_numpy(1000.0 * (stratum == 0))
    tensors["a"][:, 0] = torch.from_numpy(1000.0 * (stratum == 0))
    own = moments_of(Layout(WIDTHS, PAIRS), [(tensors, stratum, document)], tokens=4096)
    plain, null = (own.joint(PAIRS[0], "rest", shuffled=which) for which in (False, True))
    torch.testing.assert_close(null.xy[0, 0], plain.xy[0, 0])


def test_what_was_not_summed_is_refused():
    own = moments_of(Layout(WIDTHS, PAIRS, detail="two"), [rows()])
    with pytest.raises(UnknownOption, match=r"b>a is not in these moments. They have a>b, a>c, c>b, a>b shuffled"):
        own.joint(Pair("b", "a"))
    with pytest.raises(UnknownOption, match="Site 'd' is not in these moments"):
        own.spread("d")
    with pytest.raises(UnknownOption, match="strata='first': pairs are summed for all, ordinary, rest alone"):
        moments_of(Layout(WIDTHS, PAIRS), [rows()]).joint(PAIRS[0], "first")
    same(own.joint(PAIRS[0], "all", [0, 0]), own.joint(PAIRS[0], "all", [0]), 0.0)
    with pytest.raises(UnknownOption, match="strata='first' is not known"):
        own.spread("a", ["first"])
    with pytest.raises(UnknownOption, match="no more cross folds than folds"):
        Layout(WIDTHS, PAIRS, folds=1, cross_folds=2)


TEXTS = [
    f"Document {i} tells of {what}, and of nothing else at all."
    for i, what in enumerate(["cats", "dogs", "rain", "snow", "wind"])
]


def direct(model, sites, texts=TEXTS):
    found = {site: [] for site in sites}
    for batch in wb.stream(model, texts, sites, progress=False, massive_at=None):
        for site in sites:
            found[site].append(batch[site].flatten(1).double())
    return {site: torch.cat(some) for site, some in found.items()}


@pytest.mark.parametrize("family", ["llama", "gpt2", "gptj"])
def test_a_models_moments_are_the_direct_ones(family):
    model = tiny_model(family, dtype=torch.float64, check=False)
    own = wb.collect_moments(
        model, TEXTS, ["resid_pre.0", "resid_post", "z.1"], ["0>1", "z.1>mlp_out.1"], massive_at=None, progress=False
    )
    names = ["resid_pre.0", "resid_post.0", "z.1", "mlp_out.1"]
    values = direct(model, names)
    same(own.joint(Pair("resid_pre.0", "resid_post.0")), Joint.of(values[names[0]], values[names[1]]), 1e-11)
    same(own.joint(Pair("z.1", "mlp_out.1")), Joint.of(values["z.1"], values["mlp_out.1"]), 1e-11)
    assert own.settings["weights_hash"] == model.weights_hash
    assert own.settings["products"] == "float64"


def test_parts_of_a_corpus_add_up_to_the_whole(llama):
    model = tiny_model("llama", dtype=torch.float64, check=False)
    whole, *parts = (
        wb.collect_moments(model, TEXTS, pairs="all", part=part, batch_tokens=32, progress=False)
        for part in ((0, 1), (0, 3), (1, 3), (2, 3))
    )
    merged = parts[2] + parts[0] + parts[1]
    for pair in whole.pairs:
        for strata in ("ordinary", "rest"):
            same(merged.joint(pair, strata), whole.joint(pair, strata), 1e-12)
    with pytest.raises(NotComparable, match="weights_hash"):
        parts[0] + wb.collect_moments(
            tiny_model("llama", dtype=torch.float32, check=False),
            TEXTS,
            pairs="all",
            part=(1, 3),
            batch_tokens=32,
            progress=False,
        )
    with pytest.raises(NotComparable, match="tokens_hash"):
        parts[0] + wb.collect_moments(model, TEXTS[:4], pairs="all", part=(1, 3), batch_tokens=32, progress=False)
    with pytest.raises(UnknownOption, match=r"part=\(3, 3\) is out of range"):
        wb.collect_moments(llama, TEXTS, part=(3, 3), progress=False)


def test_what_enters_a_block_is_the_state_before_it(llama):
    own = wb.collect_moments(llama, TEXTS, [], ["resid_pre.1>resid_post.1", "1>2"], progress=False)
    assert [str(pair) for pair in own.pairs] == ["resid_post.0>resid_post.1"]
    with pytest.raises(UnknownSite, match="Pair '4-8' is not understood"):
        wb.collect_moments(llama, TEXTS, pairs=["4-8"], progress=False)
    with pytest.raises(UnknownSite, match="holds pairs of tokens, not features"):
        wb.collect_moments(llama, TEXTS, ["pattern.0"], None, progress=False)
    with pytest.raises(UnknownOption, match=r"products=torch.bfloat16 is for such models on a GPU"):
        wb.collect_moments(llama, TEXTS, products=torch.bfloat16, progress=False)
    by_block = wb.collect_moments(llama, TEXTS, "resid_pre", null=["z.0>mlp_out.0"], progress=False)
    assert [str(pair) for pair in by_block.pairs] == ["resid_pre.0>resid_post.0", "resid_post.0>resid_post.1"]
    with wb.intervene(llama, wb.scale("resid_post.0", 2.0)):
        edited = wb.collect_moments(llama, TEXTS, "resid_pre", null=["z.0>mlp_out.0"], part=(1, 2), progress=False)
    with pytest.raises(NotComparable, match="edited"):
        wb.collect_moments(llama, TEXTS, "resid_pre", null=["z.0>mlp_out.0"], part=(0, 2), progress=False) + edited
    with pytest.raises(LayerOutOfRange, match="State 99 is not in this model"):
        wb.collect_moments(llama, TEXTS, pairs=["0>99"], progress=False)


def test_the_plan_says_the_bytes_and_what_does_not_fit_is_refused(llama, monkeypatch):
    plan = wb.plan_moments(llama, pairs="all")
    states, d = llama.n_layers + 1, llama.d_model
    n_pairs = states * (states - 1) // 2
    assert (plan.sites, plan.pairs) == (states, n_pairs)
    assert plan.sums_bytes == 8 * d * d * (25 * states + 4 * n_pairs)
    assert plan.operations == 2 * d * d * (states + n_pairs)
    own = wb.collect_moments(llama, TEXTS, pairs="all", progress=False)
    held = sum(array.numel() for arrays in (own.sums.own, own.sums.cross) for array in arrays.values())
    assert 8 * held == plan.sums_bytes
    monkeypatch.setattr("workbench.collecting.free_bytes", lambda device: plan.sums_bytes)
    with pytest.raises(OutOfMemory, match=r"do not fit on cpu: 4 sites, 6 pairs: sums .* Take fewer sites or pairs"):
        wb.collect_moments(llama, TEXTS, pairs="all", progress=False)


def test_nan_is_named_by_document_and_position():
    model = tiny_model("llama", check=False)
    texts = ["the cat sat", "a dog ran far away", "the bird"]
    tokens = model.tokenize(texts[1]).tokens[0].tolist()
    others = {token for text in (texts[0], texts[2]) for token in model.tokenize(text).tokens[0].tolist()}
    position = next(i for i, token in enumerate(tokens) if token not in others and tokens.index(token) == i)
    with torch.no_grad():
        model.weight("W_E")[tokens[position]] = torch.nan
    with pytest.raises(NotFinite, match=rf"resid_pre.0 holds \d+ values .* at position {position} of row 1, in document 1\."):
        wb.collect_moments(model, texts, progress=False, massive_at=None)
