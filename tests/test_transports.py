"""Linear maps: against least squares, scikit-learn and closed forms; planted signals found, shuffled ones not."""

import numpy as np
import pytest
import torch
from conftest import tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.cross_decomposition import CCA
from sklearn.linear_model import LinearRegression, Ridge
from sklearn.metrics import r2_score
from test_moments import PAIRS, WIDTHS, moments_of, rows

import workbench as wb
from workbench.errors import BadArtifact, NotComparable, OtherJob, TooFewTokens, UnknownOption
from workbench.moments.joint import Joint
from workbench.moments.layout import Layout, Pair
from workbench.transports.fit import Recipe
from workbench.transports.scoring import adjusted, explained
from workbench.transports.solving import STRENGTHS, Spectrum, chosen_strength, rotation


def drawn(n: int, *widths: int, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, width, generator=generator, dtype=torch.float64) for width in widths]


def mixed(n: int = 2000, dx: int = 12, dy: int = 9, noise: float = 1.0, seed: int = 0):
    """Rows with unequal variances and means, and a target that is half noise."""
    x, t, e = drawn(n, dx, dx, dy, seed=seed)[0], *drawn(dx, dy, seed=seed + 1), *drawn(n, dy, seed=seed + 2)
    x = x * torch.logspace(0, 1.5, dx, dtype=torch.float64) + 3
    return x, x @ t + noise * 20 * e + 5


def score(recipe: Recipe, x, y, metric="frobenius"):
    joint = Joint.of(x, y)
    fitted = recipe.fit(joint)
    return getattr(explained(joint, fitted.matrix, fitted.bias, Spectrum.of(joint.yy)), metric)


def test_moments_give_what_least_squares_gives():
    x, y = mixed()
    fitted = Recipe("ols").fit(Joint.of(x, y))
    ones = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], 1)
    direct = torch.linalg.lstsq(ones, y).solution
    torch.testing.assert_close(fitted.matrix, direct[:-1], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(fitted.bias, direct[-1], rtol=1e-10, atol=1e-10)
    without = Recipe("ols", affine=False).fit(Joint.of(x, y))
    torch.testing.assert_close(without.matrix, torch.linalg.lstsq(x, y).solution, rtol=1e-10, atol=1e-10)
    assert not without.bias.any()


@pytest.mark.parametrize("alpha", [0.5, 300.0])
def test_ridge_is_scikit_learns(alpha):
    x, y = mixed()
    fitted = Recipe("ridge", strength=alpha).fit(Joint.of(x, y))
    theirs = Ridge(alpha=alpha).fit(x.numpy(), y.numpy())
    np.testing.assert_allclose(fitted.matrix.T, theirs.coef_, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(fitted.bias, theirs.intercept_, rtol=1e-9)


def test_scores_are_scikit_learns_on_the_rows_themselves():
    x, y = mixed()
    other_x, other_y = mixed(seed=7)
    joint, outside = Joint.of(x, y), Joint.of(other_x, other_y)
    model = LinearRegression().fit(x.numpy(), y.numpy())
    fitted = Recipe("ols").fit(joint)
    for moments, a, b in ((joint, x, y), (outside, other_x, other_y)):
        found, predicted = explained(moments, fitted.matrix, fitted.bias, Spectrum.of(moments.yy)), model.predict(a.numpy())
        assert found.frobenius == pytest.approx(r2_score(b, predicted, multioutput="variance_weighted"), abs=1e-10)
        assert found.uniform == pytest.approx(r2_score(b, predicted), abs=1e-10)
        centred = b - b.mean(0)
        white = torch.linalg.inv(torch.linalg.cholesky(centred.T @ centred / len(b)))
        direct = r2_score(b @ white.T, torch.from_numpy(predicted) @ white.T)
        assert found.whitened == pytest.approx(direct, abs=1e-9)


def test_whitened_score_of_least_squares_is_the_mean_squared_canonical_correlation():
    x, y = mixed(dx=6, dy=4)
    cca = CCA(n_components=4, max_iter=5000, tol=1e-12).fit(x.numpy(), y.numpy())
    u, v = cca.transform(x.numpy(), y.numpy())
    squares = [np.corrcoef(u[:, i], v[:, i])[0, 1] ** 2 for i in range(4)]
    assert score(Recipe("ols"), x, y, "whitened") == pytest.approx(np.mean(squares), abs=1e-6)
    for rank in range(5):
        own = score(Recipe("ols", rank=rank, truncation="cca"), x, y, "whitened")
        assert own == pytest.approx(sum(squares[:rank]) / 4, abs=1e-6), "the truncation meets the ceiling at every rank"


def test_a_linear_net_scores_one_and_its_maps_compose():
    x, a, b = drawn(500, 7)[0], *drawn(7, 7, 7, seed=1)
    y, z = x @ a + 1, (x @ a + 1) @ b - 2
    for metric in ("frobenius", "uniform", "whitened"):
        assert score(Recipe("ols"), x, y, metric) == pytest.approx(1, abs=1e-12)
    first, second, both = (Recipe("ols").fit(Joint.of(*pair)) for pair in ((x, y), (y, z), (x, z)))
    torch.testing.assert_close(first.matrix @ second.matrix, both.matrix, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(Recipe("ols").fit(Joint.of(x, x)).matrix, torch.eye(7, dtype=torch.float64), atol=1e-12, rtol=0)


def test_noise_scores_the_floor_in_sample_and_nothing_held_out():
    n, d = 2000, 100
    inside, outside = [], []
    for seed in range(5):
        x, y = drawn(n, d, 8, seed=seed)
        joint, other = Joint.of(x, y), Joint.of(*drawn(n, d, 8, seed=100 + seed))
        fitted = Recipe("ols").fit(joint)
        inside.append(explained(joint, fitted.matrix, fitted.bias).frobenius)
        outside.append(explained(other, fitted.matrix, fitted.bias).frobenius)
    assert np.mean(inside) == pytest.approx(d / (n - 1), rel=0.02)
    assert max(outside) < 0
    assert abs(adjusted(sum(inside) / len(inside), n, float(d))) < 0.002


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000))
def test_the_score_does_not_depend_on_how_things_are_measured(seed):
    """Any invertible map of x, and any rotation, factor or shift of y, leave it; it is between 0 and 1."""
    x, y = mixed(200, 5, 4, seed=seed)
    a, q = drawn(5, 5, seed=seed)[0] + 3 * torch.eye(5), torch.linalg.qr(drawn(4, 4, seed=seed)[0])[0]
    if torch.linalg.cond(a) > 1e4:
        return
    own = score(Recipe("ols"), x, y)
    assert 0 <= own <= 1
    assert score(Recipe("ols"), x @ a - 4, y) == pytest.approx(own, abs=1e-9)
    assert score(Recipe("ols"), x, 7 * y @ q + 11) == pytest.approx(own, abs=1e-9)


def test_of_one_coordinate_it_is_the_squared_multiple_correlation():
    x, y = mixed(dy=1)
    r = np.corrcoef(np.concatenate([x, y], 1).T)
    squared = r[:-1, -1] @ np.linalg.solve(r[:-1, :-1], r[:-1, -1])
    assert score(Recipe("ols"), x, y) == pytest.approx(squared, abs=1e-10)


def test_a_few_sinks_make_unrelated_rows_look_linear():
    """0.8 % rows of norm 1,000 (methods: 0.016 becomes 0.996)."""
    x, y = drawn(2000, 32, 32)
    plain = score(Recipe("ols"), x, y)
    at, sink = slice(0, 16), drawn(1, 32, 32, seed=5)
    x[at], y[at] = (1000 * one / one.norm() + 0.01 * rest[at] for one, rest in zip(sink, (x, y), strict=True))
    assert plain < 0.03
    assert score(Recipe("ols"), x, y) > 0.99


def test_a_target_without_its_residual_needs_no_other_sums():
    x, y = mixed(dx=6, dy=6)
    ours, direct = Joint.of(x, y).without_residual(), Joint.of(x, y - x)
    for one, other in zip(ours[1:], direct[1:], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-7)


def test_rank_deficient_inputs_are_solved_where_they_vary():
    x, y = mixed(dx=6)
    twice = torch.cat([x, x[:, :2], torch.zeros(len(x), 1, dtype=x.dtype)], 1)
    assert score(Recipe("ols"), twice, y) == pytest.approx(score(Recipe("ols"), x, y), abs=1e-9)
    assert len(Spectrum.of(Joint.of(twice, y).xx).values) == 6


@pytest.mark.parametrize("strength", [None, 1e5, 1e6])
@pytest.mark.parametrize("rank", range(10))
def test_of_ridge_too_it_is_never_worse(rank, strength):
    """There residuals are not orthogonal to what is fitted: the principal directions of that are not the best."""
    x, y = mixed()
    ours, theirs = (score(Recipe("ridge", rank, how, strength=strength), x, y) for how in ("rrr", "svd"))
    assert ours >= theirs - 1e-12


@pytest.mark.parametrize("rank", [0, 1, 3, 6, 9])
def test_reduced_rank_regression_is_never_worse_than_truncated_singular_values(rank):
    x, y = mixed()
    ours, theirs = (score(Recipe("ols", rank=rank, truncation=how), x, y) for how in ("rrr", "svd"))
    assert ours >= theirs - 1e-12
    assert (ours > theirs + 1e-3) == (rank in (1, 3, 6))
    if rank in (0, 9):
        assert ours == pytest.approx([0, *[0] * 8, score(Recipe("ols"), x, y)][rank], abs=1e-10)


def test_reduced_rank_regression_is_the_best_map_of_its_rank():
    """A thousand steps of descent on the factors, from several starts, find none better."""
    x, y = mixed(400, 6, 5)
    joint = Joint.of(x, y)
    best = score(Recipe("ols", rank=2), x, y)
    for seed in range(3):
        left, right = (one.requires_grad_() for one in (drawn(6, 2, seed=seed)[0] * 0.1, drawn(2, 5, seed=seed + 9)[0]))
        optimiser = torch.optim.Adam([left, right], 0.05)
        xx, xy, total = joint.xx / joint.n, joint.xy / joint.n, joint.total / joint.n
        for _ in range(1000):
            matrix = left @ right
            loss = (total - 2 * (matrix * xy).sum() + (matrix * (xx @ matrix)).sum()) / total
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        found = 1 - loss.item()
        assert found <= best + 1e-9
    assert found > best - 0.01


def test_a_planted_rank_is_recovered():
    n, planted = 4000, 3
    x, noise = drawn(n, 12, 10)
    left, right = drawn(12, planted, seed=1)[0], drawn(planted, 10, seed=2)[0]
    y = x @ left @ right + 0.5 * noise
    curve = [score(Recipe("ols", rank=rank), x, y) for rank in range(7)]
    gains = np.diff(curve)
    assert gains[:planted].min() > 10 * gains[planted:].max()


def test_rotation_is_orthogonal_and_finds_a_planted_one():
    x = drawn(800, 8)[0]
    q = torch.linalg.qr(drawn(8, 8, seed=3)[0])[0]
    joint = Joint.of(x, 2.5 * x @ q + 4)
    plain, scaled = rotation(joint, scaled=False), rotation(joint, scaled=True)
    torch.testing.assert_close(plain.T @ plain, torch.eye(8, dtype=torch.float64))
    torch.testing.assert_close(plain, q)
    torch.testing.assert_close(scaled, 2.5 * q)
    assert score(Recipe("procrustes", scaled=True), x, 2.5 * x @ q + 4) == pytest.approx(1)
    assert score(Recipe("procrustes"), x, 2.5 * x @ q + 4) < 0.9


def test_the_strength_is_chosen_without_looking_outside():
    """On 60 rows of 40 numbers the chosen strength beats least squares, and is the generalised cross-validation of the rows."""
    x, y = mixed(60, 40, 9, noise=3)
    outside = Joint.of(*mixed(5000, 40, 9, noise=3))
    joint = Joint.of(x, y)
    spectrum = Spectrum.of(joint.xx)
    chosen = chosen_strength(spectrum, joint)
    unit = float(joint.xx.trace()) / 40
    by_rows = []
    for relative in STRENGTHS:
        model = Ridge(alpha=relative * unit).fit(x.numpy(), y.numpy())
        c = x - x.mean(0)
        hat = float(torch.trace(c @ torch.linalg.inv(c.T @ c + relative * unit * torch.eye(40, dtype=c.dtype)) @ c.T))
        by_rows.append(((y.numpy() - model.predict(x.numpy())) ** 2).sum() / (1 - (hat + 1) / 60) ** 2)
    assert chosen == pytest.approx(STRENGTHS[int(np.argmin(by_rows))] * unit)
    ridge, ols = (Recipe(kind).fit(joint) for kind in ("ridge", "ols"))
    better, worse = (explained(outside, one.matrix, one.bias).frobenius for one in (ridge, ols))
    assert better > worse + 0.05


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("n", [60, 90])
def test_with_fewer_rows_than_numbers_the_strength_is_still_sensible(n, seed):
    """Where ridge is advised: there every weak strength fits the rows exactly, and rounding must not choose among these."""
    x, t, e = drawn(n, 100, seed=seed)[0], drawn(100, 5, seed=99)[0], drawn(n, 5, seed=seed + 50)[0]
    outside_x, outside_e = drawn(2000, 100, seed=7)[0], drawn(2000, 5, seed=8)[0]
    outside = Joint.of(outside_x, outside_x @ t + 5 * outside_e)
    fitted = Recipe("ridge").fit(Joint.of(x, x @ t + 5 * e))
    assert explained(outside, fitted.matrix, fitted.bias).frobenius > 0.1


def test_what_float32_cannot_tell_from_zero_is_left_out():
    """Few distinct rows, as embeddings are: 39 directions, and the rest is rounding of the sums."""
    kinds = drawn(40, 64)[0]
    x = kinds[torch.randint(40, (4000,), generator=torch.Generator().manual_seed(0))]
    y = x @ drawn(64, 8, seed=1)[0] + drawn(4000, 8, seed=2)[0]
    layout = Layout({"a": 64, "b": 8}, (Pair("a", "b"),))
    for dtype in (torch.float32, torch.float64):
        batch = ({"a": x.to(dtype), "b": y.to(dtype)}, np.full(4000, 4), np.arange(4000) // 100)
        own = moments_of(layout, [batch], dtype, tokens=4096)
        spectrum = Spectrum.of(own.spread("a").xx, own.noise("a"))
        assert len(spectrum.values) == 39


def test_held_out_whitened_score_is_not_that_of_few_rows():
    """The true map, half of whose target is noise, on 60 rows of 40 numbers: whitened by these rows alone it would score near
    0."""
    x, e = drawn(4000, 40, 40)
    t = torch.linalg.qr(drawn(40, 40, seed=3)[0])[0]
    whole, few = Joint.of(x, x @ t + e), Joint.of(x[:60], x[:60] @ t + e[:60])
    none = torch.zeros(40, dtype=torch.float64)
    assert explained(few, t, none, Spectrum.of(whole.yy)).whitened == pytest.approx(0.5, abs=0.06)
    assert explained(few, t, none, Spectrum.of(few.yy)).whitened < 0.2


def toy(linear: bool = True, n: int = 1200):
    """Moments of rows in which b is a linear map of a, or has nothing to do with it; of 12 documents."""
    tensors, stratum, document = rows(n)
    stratum[:] = 4
    if linear:
        tensors["b"] = tensors["a"] @ drawn(3, 5, seed=4)[0] + 0.01 * tensors["b"]
    layout = Layout(WIDTHS, PAIRS)
    own = moments_of(layout, [(tensors, stratum, document)], tokens=4096)
    own.settings.update(n_layers=2, sites=[], weights_hash="0" * 64, revision="local", family="toy", dtype="float64")
    return own


def fitted(own, **options):
    """As fit_transports, for sites that no model has."""
    from workbench.transports.fit import Fitting, _scored

    recipe = Recipe(**options)
    return _scored(Fitting(own, "ordinary"), recipe, Pair("a", "b"), own.settings | {"kind": recipe.kind}, True)


def test_planted_maps_are_found_on_other_documents_and_shuffled_ones_are_not():
    planted, nothing = fitted(toy(), kind="ols"), fitted(toy(linear=False), kind="ols")
    assert planted.scores["frobenius_held_out"] > 0.999
    assert planted.scores["frobenius_null_held_out"] < 0.01
    assert nothing.scores["frobenius_held_out"] < 0.01
    assert nothing.scores["frobenius_in_sample"] > nothing.scores["frobenius_held_out"]


def test_held_out_scores_are_those_of_the_rows_fold_by_fold():
    own = toy()
    tensors, _, document = rows(1200)
    tensors["b"] = tensors["a"] @ drawn(3, 5, seed=4)[0] + 0.01 * tensors["b"]
    error = total = 0.0
    for first in (True, False):
        train = torch.from_numpy((document % 5 % 2 == 0) == first)
        x, y = tensors["a"], tensors["b"]
        model = LinearRegression().fit(x[train].numpy(), y[train].numpy())
        missed = y[~train].numpy() - model.predict(x[~train].numpy())
        error, total = error + (missed**2).sum(), total + float((y[~train] - y[~train].mean(0)).square().sum())
    assert fitted(own, kind="ols").scores["frobenius_held_out"] == pytest.approx(1 - error / total, abs=1e-10)


QUIET = {"progress": False}
TEXTS = [" ".join(f"word{(i * 7 + j * j) % 41}" for j in range(30)) for i in range(12)]


@pytest.fixture(scope="module")
def maps():
    model = tiny_model("llama", check=False)
    moments = wb.collect_moments(model, TEXTS, pairs=["0>2", "2>3", "0>3"], null=True, progress=False)
    return model, moments, wb.fit_transports(moments, progress=False)


def test_maps_are_read_by_any_name_and_applied(maps):
    model, _, own = maps
    assert own["0>2"] is own["resid_pre.0>resid_post.1"]
    assert list(own.table["source"]) == ["resid_pre.0", "resid_pre.0", "resid_post.1"]
    acts = wb.capture(model, TEXTS[0][:40], ["resid_pre.0", "resid_post.1"])
    one = own["0>2"]
    expected = acts["resid_pre.0"].double() @ one.matrix + one.bias
    torch.testing.assert_close(one.of(acts).double(), expected, rtol=1e-5, atol=1e-5)
    assert one.of(acts).dtype == torch.float32
    with pytest.raises(KeyError, match="was not fitted"):
        own["1>2"]
    assert "0>2" in own
    assert "1>2" not in own
    assert "nonsense" not in own


def test_maps_of_heads_are_read_and_put_with_their_axes(maps):
    model = maps[0]
    own = wb.fit_transports(wb.collect_moments(model, TEXTS, [], ["z.1>mlp_out.1", "z.0>z.1"], **QUIET), **QUIET)
    acts = wb.capture(model, "the cat sat", ["z.0", "z.1", "mlp_out.1"])
    torch.testing.assert_close(own["z.1>mlp_out.1"].of(acts), own["z.1>mlp_out.1"](acts["z.1"].flatten(2)))
    assert own["z.0>z.1"].of(acts).shape == acts["z.1"].shape
    with wb.substitute(model, own["z.0>z.1"], own["z.1>mlp_out.1"]):
        changed = wb.capture(model, "the cat sat", ["z.0", "z.1", "mlp_out.1"])
    torch.testing.assert_close(changed["z.1"], own["z.0>z.1"].of(acts))
    torch.testing.assert_close(changed["mlp_out.1"], own["z.1>mlp_out.1"].of(changed), rtol=1e-4, atol=1e-4)


def test_maps_compose(maps):
    _, moments, own = maps
    rows = torch.randn(3, 32, dtype=torch.float64)
    torch.testing.assert_close(own["0>2"].then(own["2>3"])(rows), own["2>3"](own["0>2"](rows)))
    low = wb.fit_transports(moments, rank=2, progress=False)
    both = low["0>2"].then(low["2>3"])
    assert both.right is not None
    assert both.left.shape[1] == 2
    torch.testing.assert_close(both(rows), low["2>3"](low["0>2"](rows)))
    with pytest.raises(NotComparable, match=r"ends at resid_post.1, and .* begins at resid_pre.0"):
        own["0>2"].then(own["0>3"])


def test_maps_are_saved_and_refused_for_another_model(maps, tmp_path):
    model, _, own = maps
    found = wb.Transports.load(own.save(tmp_path / "all"), model=model)
    for pair, one in own.items():
        assert torch.equal(found[pair].matrix, one.matrix)
        assert found[pair].scores == pytest.approx(one.scores, nan_ok=True)
    assert list(found.table.columns) == list(own.table.columns)
    single = wb.Transport.load(own["0>2"].save(tmp_path / "one"), model=model)
    assert torch.equal(single.bias, own["0>2"].bias)
    assert single.settings["strength"] == own["0>2"].settings["strength"]
    other = tiny_model("llama", dtype=torch.bfloat16, check=False)
    with pytest.raises(UnknownOption, match=r"reads resid_pre\.0; there are resid_post.1"):
        single.of(wb.capture(model, "word1", "resid_post.1"))
    for refused in (
        lambda: wb.Transport.load(tmp_path / "one", model=other),
        lambda: single.of(wb.capture(other, "word1", "resid_pre.0")),
        lambda: wb.substitute(other, single).__enter__(),
    ):
        with pytest.raises(OtherJob, match=r"not of the weights of 'LlamaForCausalLM'"):
            refused()
    with pytest.raises(NotComparable, match="Rows of 5 numbers were given"):
        single(torch.zeros(2, 5))
    with pytest.raises(BadArtifact, match="holds 3 transports"):
        wb.Transport.load(tmp_path / "all")
    (tmp_path / "one" / "transports.safetensors").write_bytes(b"half")
    with pytest.raises(BadArtifact, match="are damaged"):
        wb.Transport.load(tmp_path / "one")


def test_what_cannot_be_fitted_is_refused_by_name(maps):
    model, moments, _ = maps
    few = wb.collect_moments(model, TEXTS[:2], pairs=["0>2"], progress=False)
    with pytest.raises(TooFewTokens, match=r"needs 34 tokens or more .* there are \d+\. Take more text, or kind='ridge'"):
        wb.fit_transports(
            wb.collect_moments(model, ["word1 word2 word3"] * 2, pairs=["0>2"], progress=False),
            kind="ols",
            strata="all",
            progress=False,
        )
    assert np.isfinite(wb.fit_transports(few, kind="ridge", progress=False).table["frobenius_in_sample"]).all()
    single = wb.collect_moments(model, TEXTS[:1], pairs=["0>2"], progress=False)
    with pytest.raises(TooFewTokens, match="no document to hold out"):
        wb.fit_transports(single, progress=False)
    assert "frobenius_held_out" not in wb.fit_transports(single, held_out=False, progress=False).table
    for options, words in (
        ({"rank": 33}, "rank=33 is out of range: this map has 0 to 32"),
        ({"strength": -1.0}, "strength=-1.0"),
        ({"scaled": True}, "belongs to kind='procrustes'"),
        ({"pairs": ["1>2"]}, "not in these moments"),
        ({"truncation": "cca"}, "Pass rank= with it"),
    ):
        with pytest.raises(UnknownOption, match=words):
            wb.fit_transports(moments, progress=False, **options)
