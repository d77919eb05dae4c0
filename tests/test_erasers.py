"""Erasers in closed form: against algebra, scikit-learn, simulation and the concept-erasure package."""

import warnings
from functools import reduce
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from planted import blobs, close, tensor
from scipy.stats import f as f_distribution
from scipy.stats import wishart
from sklearn.base import clone
from sklearn.linear_model import LogisticRegression

from probes import LEACE, SAL, MeanProjection, OracleLEACE, RandomSubspace
from probes.erasers.concept import Concept, chance_correlation, indicators
from probes.erasers.named import eraser_named
from workbench.errors import BadDataset, NotFinite, TooFewExamples, UnknownOption
from workbench.moments.joint import Joint

with warnings.catch_warnings():  # it compiles a part of itself by torch.jit, which torch calls deprecated
    warnings.simplefilter("ignore", DeprecationWarning)
    import concept_erasure

SEEDS = st.integers(0, 10_000)


def fresh(eraser: Any) -> Any:
    """Of the same options."""
    return clone(eraser)


def one_hot(y: np.ndarray) -> np.ndarray:
    return np.eye(int(y.max()) + 1)[y]


def covariances(x: np.ndarray, z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Σ_xx and Σ_xz."""
    x, z = x - x.mean(0), z.reshape(len(z), -1) - z.reshape(len(z), -1).mean(0)
    return x.T @ x / len(x), x.T @ z / len(x)


def gap(x: np.ndarray, y: np.ndarray) -> float:
    """The largest distance of a class mean from the mean."""
    return max(float(np.linalg.norm(x[y == c].mean(0) - x.mean(0))) for c in np.unique(y))


def cost(before: np.ndarray, after: np.ndarray, metric: np.ndarray | None = None) -> float:
    moved = after - before
    return float(np.einsum("ni,ij,nj->", moved, np.eye(before.shape[1]) if metric is None else metric, moved)) / len(before)


def isotropic(n: int, d: int, classes: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Rows of covariance 1 in all, with classes whose means differ."""
    x, y = blobs(n, d, classes, seed=seed)
    values, vectors = np.linalg.eigh(np.cov(x.T, bias=True))
    return (x - x.mean(0)) @ (vectors * values**-0.5) @ vectors.T, y


def moments(x: np.ndarray, z: np.ndarray) -> Joint:
    columns = z.reshape(len(z), -1) if z.dtype.kind == "f" else one_hot(z)
    return Joint.of(tensor(x), tensor(columns))


# ---- LEACE


@settings(max_examples=25, deadline=None)
@given(seed=SEEDS, classes=st.integers(2, 5), d=st.integers(5, 12), shrink=st.booleans())
def test_leace_leaves_no_covariance_with_the_concept_and_its_mean_in_place(seed, classes, d, shrink):
    x, y = blobs(400, d, classes, seed=seed)
    own = LEACE(tolerance=0.0, shrink=shrink).fit(x, y)
    after, p = own.transform(x), own.matrix.numpy()
    _, cross = covariances(x, one_hot(y))
    assert np.abs(p.T @ cross).max() <= 1e-12 * np.abs(cross).max() * np.linalg.norm(p) ** 2
    assert gap(after, y) <= 1e-11 * gap(x, y)
    close(after.mean(0), x.mean(0), 1e-12)
    close(p @ p, p, 1e-11)
    close(own.transform(after), after, 1e-11)
    assert own.rank == np.linalg.matrix_rank(np.eye(d) - p) == classes - 1
    close(own.read_.T @ own.write_, np.eye(own.rank), 1e-11)


@settings(max_examples=20, deadline=None)
@given(seed=SEEDS, classes=st.integers(2, 4))
def test_the_spread_that_leace_takes_away_is_what_it_moves_rows_by(seed, classes):
    x, y = blobs(300, 7, classes, seed=seed)
    own = LEACE(tolerance=0.0, shrink=False).fit(x, y)
    after = own.transform(x)
    # Some seed's rows lie nearly in a plane, where the map is large and its rounding with it.
    close(after.var(0).sum(), x.var(0).sum() - cost(x, after), 1e-11 * np.linalg.norm(own.matrix.numpy()))


@settings(max_examples=20, deadline=None)
@given(seed=SEEDS, classes=st.integers(2, 4))
def test_leace_of_rows_in_other_coordinates_is_leace_in_those(seed, classes):
    x, y = blobs(300, 6, classes, seed=seed)
    turn = np.linalg.qr(np.random.default_rng(seed).normal(size=(6, 6)))[0] * np.logspace(-0.5, 0.5, 6)
    one, other = (LEACE(tolerance=0.0, shrink=False).fit(rows, y).transform(rows) for rows in (x @ turn, x))
    close(one, other @ turn, 1e-7)


@settings(max_examples=20, deadline=None)
@given(seed=SEEDS, classes=st.integers(2, 4))
def test_no_affine_guard_moves_rows_less_than_leace_in_any_inner_product(seed, classes):
    """Others: mean projection, and LEACE with any other reading of the same directions."""
    x, y = blobs(300, 6, classes, seed=seed)
    random = np.random.default_rng(seed)
    own = LEACE(tolerance=0.0, shrink=False).fit(x, y)
    write = own.write_.numpy()
    elsewhere = random.normal(size=(6, own.rank))
    read = own.read_.numpy() + elsewhere - write @ (write.T @ elsewhere)
    other = x - (x - x.mean(0)) @ read @ write.T
    assert gap(other, y) < 1e-10 * gap(x, y)
    for _ in range(3):
        root = random.normal(size=(6, 6))
        least = cost(x, own.transform(x), root @ root.T)
        assert least <= cost(x, MeanProjection(tolerance=0.0).fit(x, y).transform(x), root @ root.T) * (1 + 1e-9)
        assert least <= cost(x, other, root @ root.T) * (1 + 1e-9)
    assert cost(x, OracleLEACE().fit(x, y).transform(x, y)) <= cost(x, own.transform(x)) * (1 + 1e-9)


@pytest.mark.parametrize("classes", [2, 4])
def test_of_rows_that_vary_alike_in_all_directions_leace_sal_and_mean_projection_are_one(classes):
    x, y = isotropic(500, 8, classes)
    wanted = MeanProjection(tolerance=0.0).fit(x, y).matrix
    for shrink in (True, False):
        close(LEACE(tolerance=0.0, shrink=shrink).fit(x, y).matrix, wanted, 1e-10)
    close(SAL(tolerance=0.0).fit(x, y).matrix, wanted, 1e-12)


@pytest.mark.parametrize("eraser", [LEACE(), LEACE(shrink=False), MeanProjection(), SAL()], ids=str)
@pytest.mark.parametrize("classes", [2, 4])
def test_logistic_regression_finds_nothing_in_rows_without_the_concept(eraser, classes):
    x, y = blobs(1500, 8, classes)
    after = eraser.fit_transform(x, y)
    free = {"C": 1e6, "solver": "newton-cholesky", "tol": 1e-10, "max_iter": 1000}
    # Of logits, as a weight on a direction in which rows no longer vary is anything
    before, left = (LogisticRegression(**free).fit(rows, y).decision_function(rows).std(0).max() for rows in (x, after))
    assert before > 1
    assert left < 1e-6 * before


@pytest.mark.parametrize("eraser", [LEACE(), LEACE(shrink=False), MeanProjection(), SAL()], ids=str)
def test_what_is_planted_in_some_dimensions_is_removed_with_as_many(eraser):
    random = np.random.default_rng(0)
    y = random.integers(0, 4, 3000)
    x = random.normal(size=(3000, 12)) * np.logspace(-1, 1, 12)
    x[:, :3] += 2 * np.eye(4, 3)[y]
    assert fresh(eraser).fit(x, y).rank == 3
    x[:, :3] = random.normal(size=(3000, 3)) + np.array([0.0, 1, 2, 3])[y][:, None]  # four means on one line
    assert fresh(eraser).fit(x, y).rank == 1


def test_a_regression_finds_nothing_of_numbers_that_were_erased():
    random = np.random.default_rng(0)
    x, _ = blobs(1000, 8)
    z = (x[:, [1, 4]] / x[:, [1, 4]].std(0)) @ random.normal(size=(2, 2)) + random.normal(size=(1000, 2))
    own = LEACE().fit(x, z)
    assert own.rank == 2
    coef = np.linalg.lstsq(own.transform(x) - x.mean(0), z - z.mean(0), rcond=1e-9)[0]
    assert np.abs(coef * x.std(0)[:, None]).max() < 1e-9


# ---- beside concept-erasure


@pytest.mark.parametrize("shrink", [True, False])
@pytest.mark.parametrize("concept", ["two classes", "four classes", "a number", "two numbers"])
def test_leace_is_that_of_concept_erasure(shrink, concept):
    """Theirs multiplies columns from the left, and its matrix is ours turned over."""
    x, y = blobs(2000, 9, 4 if concept == "four classes" else 2)
    if "number" in concept:
        noise = np.random.default_rng(1).normal(size=(2000, 2))
        y = (x[:, [2, 5]] / x[:, [2, 5]].std(0) + noise)[:, : 1 if concept == "a number" else 2]
    z = tensor(y if y.dtype.kind == "f" else one_hot(y))
    theirs = concept_erasure.LeaceFitter.fit(tensor(x), z, shrinkage=shrink).eraser
    ours = LEACE(shrink=shrink).fit(x, y)
    close(ours.matrix, theirs.P.T, 1e-8)
    close(ours.transform(x), theirs(tensor(x)), 1e-9)


@pytest.mark.parametrize("classes", [2, 4])
def test_oracle_leace_is_that_of_concept_erasure_and_the_residual_of_a_regression(classes):
    x, y = blobs(500, 6, classes)
    theirs = concept_erasure.OracleFitter.fit(tensor(x), tensor(one_hot(y))).eraser
    ours = OracleLEACE().fit(x, y)
    after = ours.transform(x, y)
    close(after, theirs(tensor(x), tensor(one_hot(y))), 1e-10)
    means = np.stack([x[y == c].mean(0) for c in range(classes)])
    close(after, x - means[y] + x.mean(0), 1e-10)
    assert ours.rank == classes - 1
    numbers = x[:, 0] + np.random.default_rng(0).normal(size=500)
    theirs = concept_erasure.OracleFitter.fit(tensor(x), tensor(numbers)).eraser
    close(OracleLEACE().fit(x, numbers).transform(x, numbers), theirs(tensor(x), tensor(numbers)), 1e-10)


def test_a_class_of_one_row_in_a_thousand_is_erased_where_concept_erasure_leaves_it():
    random = np.random.default_rng(0)
    y = (np.arange(50_000) % 1000 == 0).astype(int)
    x = random.normal(size=(50_000, 10))
    x[:, 0] += 3 * y
    eraser = concept_erasure.LeaceFitter.fit(tensor(x), tensor(one_hot(y))).eraser
    assert gap(x, y) > 2.5
    assert gap(LEACE().fit_transform(x, y), y) < 1e-10
    assert gap(eraser(tensor(x)).numpy(), y) == gap(x, y)


# ---- SAL, random subspaces, and a part of an eraser


@settings(max_examples=20, deadline=None)
@given(seed=SEEDS, classes=st.integers(2, 5))
def test_all_directions_of_sal_are_mean_projection_and_its_first_covaries_most(seed, classes):
    x, y = blobs(500, 8, classes, seed=seed)
    whole = MeanProjection(tolerance=0.0).fit(x, y)
    close(SAL(tolerance=0.0).fit(x, y).matrix, whole.matrix, 1e-10)
    close(whole.matrix, whole.matrix.T, 1e-14)
    first = SAL(1, tolerance=0.0).fit(x, y)
    assert first.rank == 1
    white, _, _ = np.linalg.svd(one_hot(y) - one_hot(y).mean(0), full_matrices=False)
    u = np.linalg.svd((x - x.mean(0)).T @ white[:, : classes - 1])[0]
    assert abs(float(u[:, 0] @ first.write_[:, 0].numpy())) == pytest.approx(1, abs=1e-8)
    if classes == 2:
        close(first.matrix, whole.matrix, 1e-10)


def test_a_random_subspace_has_its_rank_and_is_its_seeds():
    x, y = blobs(50, 7)
    one, same, other = (RandomSubspace(3, seed=seed).fit(x, y) for seed in (4, 4, 5))
    close(one.write_.T @ one.write_, np.eye(3), 1e-12)
    assert one.rank == 3
    assert torch.equal(one.write_, same.write_)
    assert not torch.allclose(one.matrix, other.matrix, atol=0.1)
    close(one.fit_transform(x).mean(0), x.mean(0), 1e-12)
    assert torch.equal(RandomSubspace(3, seed=4).fit_moments(moments(x, y)).write_, one.write_)


def test_the_first_directions_of_an_orthogonal_eraser_are_an_eraser_of_those():
    x, y = blobs(1000, 8, 4)
    first = SAL().fit(x, y).first(2)
    close(first.matrix, SAL(2).fit(x, y).matrix, 1e-12)
    assert first.first(0).rank == 0
    np.testing.assert_array_equal(first.first(0).transform(x), x)
    with pytest.raises(UnknownOption, match="rank=3 is out of range: this SAL removes 2"):
        first.first(3)


def test_the_first_directions_of_leace_guard_against_what_correlates_most():
    x, y = blobs(3000, 8, 5, seed=2)
    part = Concept.of(moments(x, y), 0.0).cross[:, :2].numpy()
    own = LEACE(tolerance=0.0, shrink=False).fit(x, y).first(2)
    p = own.matrix.numpy()
    assert np.abs(p.T @ part).max() < 1e-10 * np.abs(part).max()
    close(p @ p, p, 1e-10)


# ---- What is more than chance


@pytest.mark.parametrize("d", [20, 100])
@pytest.mark.parametrize("classes", [2, 3, 8, None])
def test_a_concept_that_has_nothing_to_do_with_the_rows_is_left_alone(classes, d):
    random = np.random.default_rng(d)
    removed = []
    for _ in range(200):
        x = random.normal(size=(600, d))
        z = random.normal(size=600) if classes is None else random.choice(classes, 600, p=_shares(classes))
        removed.append(LEACE().fit_moments(moments(x, z)).rank)
    assert np.mean(np.array(removed) > 0) <= 0.05
    assert LEACE(tolerance=0.0).fit(x, z).rank == (classes or 2) - 1


def _shares(classes: int) -> np.ndarray:
    return np.arange(1, classes + 1) / np.arange(1, classes + 1).sum()


@pytest.mark.parametrize(("n", "d"), [(50, 3), (300, 20), (2000, 500)])
def test_of_one_column_chance_is_the_f_test(n, d):
    quantile = f_distribution.ppf(0.99, d, n - 1 - d)
    for one, other in ((d, 1), (1, d)):
        assert chance_correlation(n, one, other) ** 2 == pytest.approx(quantile * d / (quantile * d + n - 1 - d), rel=1e-9)


@pytest.mark.parametrize(("n", "d", "q"), [(100, 5, 2), (400, 20, 2), (400, 20, 7), (2000, 200, 7), (1000, 60, 30)])
def test_chance_is_passed_by_about_one_in_a_hundred_draws(n, d, q):
    """The first of 4000 draws' canonical correlations. Within the third order's error of Johnstone's approximation."""
    own, rest = (wishart(freedom, np.eye(q), seed=seed).rvs(4000) for seed, freedom in ((1, d), (2, n - 1 - d)))
    largest = np.linalg.eigvals(np.linalg.solve(own + rest, own)).real.max(1)
    passed = float((largest > chance_correlation(n, d, q) ** 2).mean())
    assert 0.003 < passed < 0.025


def test_where_rows_are_too_few_nothing_is_called_chance():
    assert chance_correlation(20, 30, 2) == 1
    assert chance_correlation(100, 0, 2) == 0
    x, y = blobs(20, 30)
    own = LEACE().fit(x, y)
    assert own.rank == 1
    assert gap(own.transform(x), y) < 1e-9 * gap(x, y)


def test_columns_that_say_nothing_new_change_nothing():
    x, y = blobs(500, 6, 3)
    wide = np.concatenate([x, x[:, :2] @ np.array([[1.0, 2], [3, 4]]), np.ones((500, 1))], 1)
    close(LEACE(shrink=False).fit(wide, y).transform(wide)[:, :6], LEACE(shrink=False).fit(x, y).transform(x), 1e-9)


# ---- Moments, dtypes, arrays and tensors


@settings(max_examples=20, deadline=None)
@given(seed=SEEDS, cuts=st.lists(st.integers(20, 380), max_size=4), numbers=st.booleans())
def test_rows_in_parts_give_what_all_give_at_once(seed, cuts, numbers):
    x, y = blobs(400, 6, 3, seed=seed)
    z = x[:, 2] + x[:, 3] if numbers else y
    whole, streamed = LEACE().fit(x, z), LEACE()
    columns = z[:, None] if numbers else np.eye(3)[z]
    edges, joints = [0, *sorted(set(cuts)), 400], []
    for part in map(slice, edges, edges[1:]):
        streamed.partial_fit(x[part], z[part], classes=None if numbers else [2, 0, 1])
        joints.append(moments(x[part], columns[part]))
    joint = reduce(Joint.plus, joints)
    close(streamed.settled().matrix, whole.matrix, 1e-9)
    close(streamed.center_, whole.center_, 1e-12)
    close(LEACE().fit_moments(joint).matrix, whole.matrix, 1e-9)


def test_numbers_may_come_a_row_at_a_time():
    x, _ = blobs(60, 4)
    streamed = LEACE(tolerance=0.0)
    for i in range(60):
        streamed.partial_fit(x[i : i + 1], x[i : i + 1, 1])
    close(streamed.settled().matrix, LEACE(tolerance=0.0).fit(x, x[:, 1]).matrix, 1e-9)


def test_the_oracle_takes_rows_one_at_a_time_and_moments():
    x, y = blobs(60, 4)
    own = OracleLEACE().fit(x, x[:, 1])
    close(own.transform(x[:1], x[:1, 1]), own.transform(x, x[:, 1])[:1], 1e-12)
    close(OracleLEACE().fit_moments(moments(x, y)).transform(x, one_hot(y)), OracleLEACE().fit_transform(x, y), 1e-12)


@pytest.mark.parametrize("eraser", [LEACE(), MeanProjection(), SAL(), RandomSubspace(2)], ids=str)
def test_arrays_give_arrays_and_tensors_tensors_of_their_dtype(eraser):
    x, y = blobs(600, 6, 3)
    wanted = eraser.fit(x, y).transform(x)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        found = eraser.transform(tensor(x, dtype))
        assert found.dtype == dtype
        close(found.double(), wanted, tolerance)
    states = tensor(x[:12], torch.float32).reshape(3, 4, 6)
    close(eraser.transform(states).reshape(12, 6), eraser.transform(states.reshape(12, 6)), 1e-6)
    own = eraser.fit(tensor(x, torch.float32), torch.from_numpy(y))
    close(own.matrix, fresh(eraser).fit(x, y).matrix, 1e-3)
    found = own.transform(x.astype(np.float32))
    assert isinstance(found, np.ndarray)
    assert found.dtype == np.float32
    assert own.transform(tensor(x, torch.float32)).device == torch.device("cpu")


@pytest.mark.parametrize("classes", [3, 8])
def test_many_rows_of_single_precision_have_no_more_classes_than_there_are(classes):
    """Sums in single precision leave 1e-7 of the direction in which indicators never vary."""
    random = np.random.default_rng(1)
    shares = np.arange(1, classes + 1) ** 3.0
    y = random.choice(classes, 120_000, p=shares / shares.sum())
    x = (random.normal(size=(len(y), 5 + classes)) + random.normal(size=(classes, 5 + classes))[y]).astype(np.float32)
    own = LEACE(tolerance=0.0).fit(x, y)
    assert len(own.correlations_) == own.rank == OracleLEACE().fit(x, y).rank == classes - 1
    close(own.matrix, LEACE(tolerance=0.0).fit(x.astype(float), y).matrix, 1e-4)


def test_names_and_booleans_are_classes_as_numbers_are():
    x, y = blobs(500, 6, 3)
    names = np.array(["la", "ka", "ma"])[y]
    one = LEACE().fit(x, names)
    assert one.classes_ is not None
    assert one.classes_.tolist() == ["ka", "la", "ma"]
    close(one.matrix, LEACE().fit(x, y).matrix, 1e-10)
    close(LEACE().fit(x, y == 2).matrix, LEACE().fit(x, (y == 2).astype(float)).matrix, 1e-10)
    columns, classes = indicators(["b"], 1, np.array(["c", "b", "a"]))
    assert columns.tolist() == [[0, 1, 0]]
    assert classes is not None


# ---- What is refused


@pytest.mark.parametrize("eraser", [LEACE(), MeanProjection(), SAL(), OracleLEACE()], ids=str)
def test_rows_and_labels_that_say_nothing_are_refused(eraser):
    x, y = blobs(60, 4)
    with pytest.raises(BadDataset, match="59 labels were given for 60 rows"):
        eraser.fit(x, y[:-1])
    with pytest.raises(TooFewExamples, match="All 60 labels are one class"):
        eraser.fit(x, np.zeros(60, int))
    with pytest.raises(NotFinite, match="Rows hold 1 values that are NaN"):
        eraser.fit(np.where(np.arange(240).reshape(60, 4) == 7, np.nan, x), y)
    with pytest.raises(BadDataset, match=r"Give \[examples, columns\]"):
        eraser.fit(tensor(x)[0], y)


@pytest.mark.parametrize("eraser", [LEACE(), SAL(), OracleLEACE()], ids=str)
def test_numbers_that_say_nothing_are_refused(eraser):
    x, _ = blobs(60, 4)
    with pytest.raises(TooFewExamples, match="concept is the same in all"):
        eraser.fit(x, np.full(60, 0.5))
    with pytest.raises(NotFinite, match="concept holds NaN"):
        eraser.fit(x, np.where(np.arange(60) == 3, np.inf, 0.5))


@pytest.mark.parametrize("mean", [0.0, 1.0])
def test_numbers_have_no_class_means(mean):
    x, _ = blobs(60, 4)
    z = np.random.default_rng(0).uniform(size=60)
    with pytest.raises(BadDataset, match="Numbers have no class means"):
        MeanProjection().fit(x, z - z.mean() + mean)


def test_options_out_of_range_are_refused():
    x, y = blobs(60, 4, 3)
    for given_, words in (("no", "tolerance='no' is not known"), (1.0, "one from 0 to below 1"), (-0.1, "from 0 to below 1")):
        with pytest.raises(UnknownOption, match=words):
            LEACE(tolerance=given_).fit(x, y)
    with pytest.raises(UnknownOption, match="directions=3: this concept has 1 to 2"):
        SAL(3).fit(x, y)
    with pytest.raises(UnknownOption, match="directions=5 is out of range: rows have 4"):
        RandomSubspace(5).fit(x, y)
    with pytest.raises(UnknownOption, match=r"no eraser 'lice'\. Use one of leace, inlp"):
        eraser_named("lice")
    with pytest.raises(UnknownOption, match="'leace' does not take these options"):
        eraser_named("leace", rounds=3)
    assert isinstance(eraser_named("sal", directions=1), SAL)


def test_rows_that_an_eraser_was_not_fitted_to_are_refused():
    x, y = blobs(60, 4)
    own = LEACE().fit(x, y)
    for rows in (x[:, :3], tensor(x)[:, :3]):
        with pytest.raises((BadDataset, ValueError), match=r"3 (columns|features)"):
            own.transform(rows)
    streamed = LEACE().partial_fit(x, y, classes=[0, 1])
    with pytest.raises(BadDataset, match="Label 2 is none of the classes 0, 1"):
        streamed.partial_fit(x, y + 1)


def test_the_oracle_needs_labels_and_is_no_edit():
    x, y = blobs(60, 4)
    own = OracleLEACE().fit(x, y)
    with pytest.raises(UnknownOption, match="needs each row's label: transform"):
        own.transform(x)
    with pytest.raises(UnknownOption, match="which a model's states do not carry"):
        own.as_edit("resid_post.0")
