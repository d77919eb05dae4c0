"""Probes as estimators: scikit-learn's own checks and fits, closed forms, planted columns and directions."""

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from planted import blobs, by_sklearn, close, log_loss, parallel, tensor, without_mean
from sklearn.base import clone
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import LogisticRegression, Ridge, RidgeClassifier
from sklearn.model_selection import GroupKFold, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.class_weight import compute_sample_weight
from sklearn.utils.estimator_checks import check_estimator

from probes import (
    LDAProbe,
    LogisticProbe,
    MeanDifferenceProbe,
    MLPProbe,
    MLPRegressionProbe,
    ProjectAndProbe,
    RidgeProbe,
    RidgeRegressionProbe,
    SparseProbe,
    fit_probe,
)
from probes.estimators.closed_forms import joints
from probes.folds import folds_by_group, numeric_folds
from workbench.errors import BadDataset, NotFinite, TooFewExamples, UnknownOption

EXPECTED = {
    "check_do_not_raise_errors_in_init_or_set_params": "wrong types, which the tests' own type checker refuses first",
}
CHOOSES = "C is chosen by folds of rows, and a row of weight 2 lies in one fold where its two copies may lie in two"
ONE_COLUMN = "two of one column cannot be kept, and the error says so in its own words, not in scikit-learn's"


@pytest.mark.parametrize(
    ("probe", "expected"),
    [
        # The check allows 1e-7 of the logits; 45 rows of gradient 1e-10 each move them by more
        (LogisticProbe(C=1.0, tol=1e-12), {}),
        (LogisticProbe(folds=2, tol=1e-8), {"check_sample_weight_equivalence_on_dense_data": CHOOSES}),
        (LDAProbe(0.1), {}),
        (LDAProbe(folds=2), {}),
        (MeanDifferenceProbe(), {}),
        (RidgeProbe(1.0), {}),
        (RidgeRegressionProbe(1.0), {}),
        (SparseProbe(2), {"check_fit2d_1feature": ONE_COLUMN}),
        (ProjectAndProbe(2), {"check_fit2d_1feature": ONE_COLUMN}),
        (MLPProbe(), {}),
        (MLPRegressionProbe(), {}),
    ],
    ids=lambda one: "" if isinstance(one, dict) else str(one),
)
def test_scikit_learns_own_checks_pass(probe, expected):
    found = check_estimator(probe, expected_failed_checks=EXPECTED | expected, on_fail=None, on_skip=None)
    assert len(found) > 50
    assert not {one["check_name"]: one["exception"] for one in found if one["status"] == "failed"}


# ---- Logistic regression


@pytest.mark.parametrize("classes", [2, 4])
@pytest.mark.parametrize("standardize", [True, False])
@pytest.mark.parametrize("weighing", ["none", "balanced", "dict", "rows", "rows and balanced"])
def test_coefficients_are_scikit_learns(classes, standardize, weighing):
    x, y = blobs(classes=classes)
    rows = np.random.default_rng(1).uniform(0, 3, len(y)) if "rows" in weighing else None
    class_weight = {"dict": {i: 0.5 + i for i in range(classes)}}.get(weighing, "balanced" if "balanced" in weighing else None)
    # A class's weight is what its rows weigh, in the loss as in the columns' mean and spread
    own = np.ones(len(y)) if rows is None else rows
    if class_weight == "balanced":
        mass = np.bincount(y, own)
        own = own * (mass.sum() / (classes * mass))[y]
    elif class_weight is not None:
        own = own * compute_sample_weight(class_weight, y)
    probe = LogisticProbe(0.3, tol=1e-10, standardize=standardize, class_weight=class_weight).fit(x, y, rows)
    coef, intercept = by_sklearn(x, y, 0.3, standardize=standardize, weights=own)
    found = without_mean(probe.coef_, probe.intercept_)
    close(found[0], coef, 1e-6)
    close(found[1], intercept, 1e-6)


@pytest.mark.parametrize("class_weight", ["balanced", {0: 3.0, 1: 0.5}])
def test_class_weights_mean_what_they_mean_in_scikit_learn(class_weight):
    x, y = blobs()
    own = LogisticProbe(0.3, tol=1e-10, standardize=False, class_weight=class_weight).fit(x, y)
    other = LogisticRegression(C=0.3, class_weight=class_weight, tol=1e-12, solver="newton-cholesky", max_iter=1000).fit(x, y)
    close(own.coef_, other.coef_, 1e-6)


@pytest.mark.parametrize("classes", [2, 4])
def test_float32_rows_give_nearly_the_same(classes):
    """Within what 24 bits leave of columns whose mean is up to 30 spreads away."""
    x, y = blobs(classes=classes)
    probe = LogisticProbe(0.3, tol=1e-6).fit(x.astype(np.float32), y)
    for found, wanted in zip(without_mean(probe.coef_, probe.intercept_), by_sklearn(x, y, 0.3, standardize=True), strict=True):
        close(found, wanted, 1e-3)


def test_probabilities_are_scikit_learns():
    x, y = blobs(classes=3)
    other = make_pipeline(StandardScaler(), LogisticRegression(tol=1e-12, solver="newton-cholesky")).fit(x, y)
    probe = LogisticProbe(1.0, tol=1e-10).fit(x, y)
    np.testing.assert_allclose(probe.predict_proba(x), other.predict_proba(x), atol=1e-7)
    np.testing.assert_array_equal(probe.predict(x), other.predict(x))
    assert probe.score(x, y) == other.score(x, y)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 1000), sizes=st.lists(st.floats(-4, 4), min_size=4, max_size=4), classes=st.integers(2, 3))
def test_scale_and_origin_of_columns_do_not_matter_to_a_standardised_probe(seed, sizes, classes):
    x, y = blobs(150, 4, classes, seed=seed)
    x = (x - x.mean(0)) / x.std(0)
    moved = x * 10.0 ** np.array(sizes) + 10.0 ** np.array(sizes[::-1])
    one, other = (LogisticProbe(1.0, tol=1e-9).fit(rows, y).predict_log_proba(rows) for rows in (x, moved))
    np.testing.assert_allclose(one, other, atol=1e-5)  # 1e8 spreads from 0, float64 keeps eight digits of a column


@pytest.mark.parametrize(("classes", "grouped"), [(2, True), (2, False), (3, True)])
def test_the_strength_has_the_least_mean_loss_held_out(classes, grouped):
    x, y = blobs(120, 20, classes, apart=0.3, seed=3)
    groups = np.random.default_rng(4).integers(0, 30, len(y)) if grouped else None
    Cs = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
    probe = LogisticProbe(Cs=Cs, tol=1e-8, seed=7).fit(x, y, groups=groups)
    fold = folds_by_group(y, groups, 5, 7)
    losses = []
    for C in Cs:
        held_out = []
        for i in range(5):
            own = make_pipeline(StandardScaler(), LogisticRegression(C=C, tol=1e-10, solver="newton-cholesky"))
            own.fit(x[fold != i], y[fold != i])
            held_out.append(log_loss(own.predict_log_proba(x[fold == i]), y[fold == i]).mean())
        losses.append(np.mean(held_out))
    best = int(np.argmin(losses))
    assert 0 < best < len(Cs) - 1, "else the test would not tell"
    assert Cs[best] == probe.C_
    assert probe.settled().C == probe.C_
    close(probe.coef_, LogisticProbe(probe.C_, tol=1e-8).fit(x, y).coef_, 1e-5)


def test_a_column_that_is_constant_where_it_learns_changes_nothing_held_out():
    """A column that one group alone has: rows without that group say nothing of it."""
    x, y = blobs(400, 4, seed=2)
    lone = np.zeros((400, 1))
    lone[:40] = 1
    beside = LogisticProbe(0.1, tol=1e-8).fit(x[40:], y[40:])
    probe = LogisticProbe(0.1, tol=1e-8).fit(np.hstack([x, lone])[40:], y[40:])
    assert probe.coef_[0, -1] == 0
    close(probe.coef_[:, :-1], beside.coef_, 1e-6)


# ---- From moments


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("shrinkage", [0.0, 0.1, 0.7, 1.0])
@pytest.mark.parametrize("standardize", [True, False])
def test_discriminant_analysis_is_scikit_learns(classes, shrinkage, standardize):
    x, y = blobs(classes=classes)
    other = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=shrinkage)
    other = make_pipeline(StandardScaler(), other) if standardize else other
    probe = LDAProbe(shrinkage, standardize=standardize).fit(x, y)
    np.testing.assert_allclose(probe.predict_proba(x), other.fit(x, y).predict_proba(x), atol=1e-9)


def test_equal_priors_move_the_logits_by_the_shares_alone():
    x, y = blobs(classes=3)
    one, other = (LDAProbe(0.1, priors=priors).fit(x, y).decision_function(x) for priors in (None, "equal"))
    moved = np.log(np.bincount(y) / len(y))
    np.testing.assert_allclose(one - other, np.broadcast_to(moved - np.log(1 / 3), one.shape), atol=1e-9)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 1000), classes=st.integers(2, 4), standardize=st.booleans())
def test_discriminant_analysis_does_not_change_under_invertible_maps(seed, classes, standardize):
    x, y = blobs(200, 5, classes, seed=seed)
    random = np.random.default_rng(seed)
    left, right = (np.linalg.qr(random.normal(size=(5, 5)))[0] for _ in range(2))
    turned = x @ (left * random.uniform(0.1, 10, 5)) @ right + random.normal(size=5)
    one, other = (LDAProbe(0.0, standardize=standardize).fit(rows, y).predict_log_proba(rows) for rows in (x, turned))
    # Two covariances of condition 1e4 are inverted on the way
    np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("probe", [LDAProbe(0.1), MeanDifferenceProbe(), RidgeProbe(2.0)], ids=lambda one: type(one).__name__)
def test_moments_added_by_fold_are_those_of_all_rows(probe, classes):
    x, y = blobs(classes=classes)
    z = torch.nn.functional.one_hot(torch.from_numpy(y)).double()
    parts = joints(tensor(x), z, np.random.default_rng(0).integers(0, 4, len(y)))
    assert len(parts) == 4
    one, other = clone(probe).fit(x, y), clone(probe).fit_moments(parts)
    close(other.coef_, one.coef_, 1e-10)
    close(other.intercept_, one.intercept_, 1e-10)


def test_the_difference_of_means_points_from_mean_to_mean():
    x, y = blobs()
    means = np.stack([x[y == i].mean(0) for i in range(2)])
    assert parallel(MeanDifferenceProbe().fit(x, y).coef_[0], means[1] - means[0]) == pytest.approx(1, abs=1e-12)
    spread = x.std(0)
    found = MeanDifferenceProbe(standardize=True).fit(x, y).coef_[0] * spread
    assert parallel(found, (means[1] - means[0]) / spread) == pytest.approx(1, abs=1e-12)
    x, y = blobs(classes=3)
    probe = MeanDifferenceProbe().fit(x, y)
    for label in range(3):
        coef = probe.coef_[label]
        assert parallel(coef, x[y == label].mean(0) - x.mean(0)) == pytest.approx(1, abs=1e-12)


def test_the_difference_of_means_is_discriminant_analysis_along_its_direction():
    """So its probabilities have the right size, however unequal the spread along other directions."""
    x, y = blobs()
    probe = MeanDifferenceProbe().fit(x, y)
    along = LDAProbe(0.0).fit(x @ probe.coef_.T, y)
    np.testing.assert_allclose(probe.predict_proba(x), along.predict_proba(x @ probe.coef_.T), atol=1e-9)


def test_the_difference_of_means_is_as_good_as_can_be_on_isotropic_classes():
    random = np.random.default_rng(0)
    y = random.integers(0, 2, 8000)
    x = random.normal(size=(8000, 10))
    x[:, 3] += 2 * y
    probe = MeanDifferenceProbe().fit(x[:4000], y[:4000])
    # The normal distribution's share below 1; 4,000 rows leave a standard error of 0.006
    assert probe.score(x[4000:], y[4000:]) == pytest.approx(0.8413, abs=0.015)


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("standardize", [True, False])
def test_ridge_of_classes_is_scikit_learns(classes, standardize):
    x, y = blobs(classes=classes)
    other = RidgeClassifier(3.0, solver="cholesky")
    other = make_pipeline(StandardScaler(), other) if standardize else other
    probe = RidgeProbe(3.0, standardize=standardize).fit(x, y)
    np.testing.assert_allclose(probe.decision_function(x), other.fit(x, y).decision_function(x), atol=1e-9)
    np.testing.assert_array_equal(probe.predict(x), other.predict(x))


@pytest.mark.parametrize("targets", [1, 3])
@pytest.mark.parametrize("standardize", [True, False])
def test_ridge_of_numbers_is_scikit_learns(targets, standardize):
    x, _ = blobs()
    random = np.random.default_rng(5)
    y = x @ random.normal(size=(6, targets)) + random.normal(size=(300, targets)) + 10
    y = y[:, 0] if targets == 1 else y
    other = Ridge(3.0, solver="cholesky")
    other = make_pipeline(StandardScaler(), other) if standardize else other
    probe = RidgeRegressionProbe(3.0, standardize=standardize).fit(x, y)
    assert probe.predict(x).shape == y.shape
    np.testing.assert_allclose(probe.predict(x), other.fit(x, y).predict(x), atol=1e-9)


@pytest.mark.parametrize("targets", [1, 2])
def test_the_ridge_strength_has_the_least_squared_error_held_out(targets):
    x, _ = blobs(80, 25, seed=1)
    random = np.random.default_rng(5)
    y = x[:, :targets] / x[:, :targets].std(0) + random.normal(size=(80, targets))
    y = (y * [1.0, 100.0][:targets]).squeeze()  # targets weigh alike, whatever their units
    groups = random.integers(0, 20, 80)
    alphas = tuple(10.0**power for power in range(-4, 4))
    probe = RidgeRegressionProbe(alphas=alphas, seed=3).fit(x, y, groups=groups)
    fold, errors = numeric_folds(80, groups, 5, 3), []
    for alpha in alphas:
        squares = 0.0
        for i in range(5):
            own = make_pipeline(StandardScaler(), Ridge(alpha * (fold != i).sum())).fit(x[fold != i], y[fold != i])
            squares += (((own.predict(x[fold == i]) - y[fold == i]) ** 2).sum(0) / y.var(0)).sum()
        errors.append(squares)
    best = int(np.argmin(errors))
    assert 0 < best < len(alphas) - 1, "else the test would not tell"
    assert probe.alpha_ == pytest.approx(alphas[best] * 80, rel=1e-9)


def test_the_shrinkage_chosen_is_better_held_out_than_none_or_all():
    x, y = blobs(1000, 60, apart=0.15, seed=4)
    learnt, asked = slice(0, 90), slice(90, None)
    chosen = LDAProbe().fit(x[learnt], y[learnt])
    assert 0 < chosen.shrinkage_ < 0.9
    own = log_loss(chosen.predict_log_proba(x[asked]), y[asked]).mean()
    for shrinkage in (0.0001, 1.0):
        other = LDAProbe(shrinkage).fit(x[learnt], y[learnt])
        assert own < log_loss(other.predict_log_proba(x[asked]), y[asked]).mean()


# ---- Few columns, several directions, networks


@pytest.mark.parametrize("columns", [[17], [5, 21, 40]])
@pytest.mark.parametrize("classes", [2, 3])
def test_planted_columns_are_found(columns, classes):
    random = np.random.default_rng(len(columns))
    y = random.integers(0, classes, 500)
    x = random.normal(size=(500, 60)) * np.logspace(-2, 2, 60)[random.permutation(60)]
    x[:, columns] += 1.5 * x[:, columns].std(0) * random.permuted(np.arange(classes) + np.zeros((len(columns), 1)), axis=1).T[y]
    probe = SparseProbe(len(columns)).fit(x, y)
    assert probe.support_.tolist() == columns
    assert not np.delete(probe.coef_, columns, 1).any()
    assert (probe.coef_[:, columns] != 0).all()
    alone = LogisticProbe(1.0).fit(x[:, columns], y)
    np.testing.assert_allclose(probe.predict_log_proba(x), alone.predict_log_proba(x[:, columns]), atol=1e-9)


@pytest.mark.parametrize("classes", [2, 4])
def test_directions_are_orthonormal_and_more_of_them_begin_with_the_same(classes):
    x, y = blobs(400, 8, classes)
    found = {r: ProjectAndProbe(r).fit(x, y).components_ for r in (1, 2, 5, 8)}
    for r, components in found.items():
        np.testing.assert_allclose(components @ components.T, np.eye(r), atol=1e-10)
        np.testing.assert_allclose(components, found[8][:r], atol=1e-9)


def test_the_first_direction_is_discriminant_analysis():
    x, y = blobs()
    own = ProjectAndProbe(1, shrinkage=0.03).fit(x, y)
    lda = LDAProbe(0.03).fit(x, y).coef_[0] * x.std(0)
    assert abs(parallel(own.components_[0], lda)) == pytest.approx(1, abs=1e-10)


def test_later_directions_are_discriminant_analysis_of_what_is_left():
    x, y = blobs()
    basis = ProjectAndProbe(2, shrinkage=0.03, standardize=False).fit(x, y).components_
    # Coordinates of the plane at right angles to the first; the isotropic share is that of all columns, so it is given here
    rest = np.linalg.svd(basis[:1])[2][1:]
    within = sum(np.cov(x[y == i].T, bias=True) * (y == i).mean() for i in range(2))
    shrunk = 0.97 * within + 0.03 * np.trace(within) / 6 * np.eye(6)
    apart = x[y == 1].mean(0) - x[y == 0].mean(0)
    wanted = rest.T @ np.linalg.solve(rest @ shrunk @ rest.T, rest @ apart)
    assert abs(parallel(basis[1], wanted)) == pytest.approx(1, abs=1e-9)


def test_directions_turn_with_the_rows():
    x, y = blobs(400, 6, 3)
    turn = np.linalg.qr(np.random.default_rng(0).normal(size=(6, 6)))[0]
    one, other = (ProjectAndProbe(3, standardize=False).fit(rows, y) for rows in (x, x @ turn))
    cosines = np.abs(np.sum((one.components_ @ turn) * other.components_, 1))
    np.testing.assert_allclose(cosines, 1, atol=1e-9)
    # The logistic probe on top is solved to a gradient of 1e-4
    np.testing.assert_allclose(one.predict_log_proba(x), other.predict_log_proba(x @ turn), atol=1e-2)


def test_directions_of_one_set_serve_another_with_few_labels():
    x, y = blobs(600, 10, apart=2.0)
    probe = ProjectAndProbe(2).fit(x, y)
    assert probe.transform(x).shape == (600, 2)
    few = LogisticProbe(1.0).fit(probe.transform(x[:20]), y[:20])
    assert few.score(probe.transform(x[20:]), y[20:]) > 0.9


def test_a_network_finds_what_lies_along_no_direction():
    random = np.random.default_rng(0)
    x = random.normal(size=(3000, 6))
    x[:, :2] = np.sign(x[:, :2]) * (0.5 + np.abs(x[:, :2]))
    y = (x[:, 0] * x[:, 1] > 0).astype(int)
    network, line = MLPProbe(learning_rate=3e-3).fit(x[:2000], y[:2000]), LogisticProbe().fit(x[:2000], y[:2000])
    assert network.score(x[2000:], y[2000:]) > 0.95
    assert line.score(x[2000:], y[2000:]) == pytest.approx(0.5, abs=0.06)
    close(network.predict_proba(x).sum(1), np.ones(3000), 1e-6)


def test_a_network_of_numbers_finds_a_product():
    random = np.random.default_rng(0)
    x = random.uniform(-1, 1, size=(3000, 3))
    y = np.stack([100 + 50 * x[:, 0] * x[:, 1], x[:, 2]], 1)
    found = MLPRegressionProbe(learning_rate=1e-2, weight_decay=0.0).fit(x[:2000], y[:2000])
    assert found.score(x[2000:], y[2000:]) > 0.95
    assert RidgeRegressionProbe().fit(x[:2000], y[:2000, 0]).score(x[2000:], y[2000:, 0]) < 0.05


# ---- All of them

EVERY = [
    LogisticProbe(), LDAProbe(), MeanDifferenceProbe(), RidgeProbe(), SparseProbe(3), ProjectAndProbe(2),
    MLPProbe(learning_rate=1e-2),
]  # fmt: skip
each = pytest.mark.parametrize("probe", EVERY, ids=lambda one: type(one).__name__)


@each
def test_separable_classes_are_told_apart_on_rows_held_out(probe):
    random = np.random.default_rng(0)
    y = random.integers(0, 2, 400)
    x = random.normal(size=(400, 8))
    x[:, 2] = 10 * (2 * y - 1) + x[:, 2].clip(-2, 2)
    assert clone(probe).fit(x[:200], y[:200]).score(x[200:], y[200:]) == 1.0


@each
def test_tensors_give_what_arrays_give(probe):
    x, y = blobs(classes=3)
    one, other = clone(probe).fit(x, y), clone(probe).fit(tensor(x), torch.from_numpy(y))
    np.testing.assert_array_equal(one.predict(x), other.predict(tensor(x)))
    if hasattr(one, "coef_"):
        np.testing.assert_array_equal(one.coef_, other.coef_)
    if hasattr(one, "predict_proba"):
        np.testing.assert_array_equal(one.predict_proba(x), other.predict_proba(tensor(x)))


@each
def test_labels_may_be_words(probe):
    x, y = blobs(classes=3)
    words = np.array(["cat", "ant", "dog"])[y]
    one, other = clone(probe).fit(x, y), clone(probe).fit(x, words)
    assert other.classes_.tolist() == ["ant", "cat", "dog"]
    if not isinstance(probe, MLPProbe):  # whose outputs begin at random, in the order of the classes
        assert np.mean(np.array(["cat", "ant", "dog"])[one.predict(x)] == other.predict(x)) > 0.99


@pytest.mark.parametrize("probe", [LogisticProbe(), LDAProbe(), RidgeProbe(), MLPProbe(epochs=3)], ids=lambda one: str(one))
def test_probes_go_into_scikit_learns_tools(probe):
    x, y = blobs(200)
    groups = np.arange(200) // 4
    copy = clone(probe.set_params(seed=3))
    assert copy.get_params() == probe.get_params()
    scores = cross_val_score(make_pipeline(StandardScaler(), probe), x, y, groups=groups, cv=GroupKFold(3))
    assert scores.shape == (3,)
    by_hand = []
    for train, test in GroupKFold(3).split(x, y, groups):
        scaler = StandardScaler().fit(x[train])
        by_hand.append(clone(probe).fit(scaler.transform(x[train]), y[train]).score(scaler.transform(x[test]), y[test]))
    assert scores.tolist() == by_hand


def test_tables_name_their_columns():
    x, y = blobs()
    table = pd.DataFrame(x, columns=list("abcdef"))
    probe = LogisticProbe(1.0).fit(table, y)
    assert probe.feature_names_in_.tolist() == list("abcdef")
    with pytest.raises(ValueError, match="feature names should match"):
        probe.predict(table[list("fedcba")])


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize(
    "probe", [LogisticProbe(1.0), LDAProbe(0.1), MeanDifferenceProbe(), RidgeProbe(1.0), ProjectAndProbe(2)]
)
def test_along_its_direction_a_class_becomes_likelier(probe, classes):
    x, y = blobs(classes=classes)
    fitted = clone(probe).fit(x, np.array(["a", "b", "c"])[y])
    for i, label in enumerate(["a", "b", "c"][:classes]):
        step = fitted.direction(label)
        step = step / np.linalg.norm(step)
        scores = [fitted.decision_function(rows) for rows in (x, x + step)]
        if classes == 2:
            assert ((scores[1] - scores[0]) * (1 if i else -1) > 0).all()
        else:
            own = [score[:, i] - score.mean(1) for score in scores]
            assert (own[1] > own[0]).all()
    if classes == 2:
        np.testing.assert_array_equal(fitted.direction(), fitted.direction("b"))
        np.testing.assert_array_equal(fitted.direction("a"), -fitted.direction("b"))
    else:
        with pytest.raises(UnknownOption, match=r"label=None.*'a', 'b', 'c'"):
            fitted.direction()
    with pytest.raises(UnknownOption, match="'z' names no class"):
        fitted.direction("z")


def test_fitting_leaves_the_global_random_state_alone():
    x, y = blobs(100)
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()
    MLPProbe(epochs=2).fit(x, y)
    LogisticProbe().fit(x, y)
    assert torch.equal(torch.get_rng_state(), before)
    assert (np.random.get_state()[1] == numpy_before).all()


# ---- What is asked for wrongly


@each
def test_one_class_is_too_few(probe):
    x, _ = blobs(50)
    with pytest.raises(TooFewExamples, match=r"one class, .*'dog'.*two classes or more"):
        clone(probe).fit(x, ["dog"] * 50)


@each
@pytest.mark.parametrize("kind", [np.asarray, tensor])
def test_a_row_that_is_no_number_is_named(probe, kind):
    x, y = blobs(50)
    x[31, 2], x[40, 1] = np.nan, np.inf
    with pytest.raises(NotFinite, match=r"2 values .* first in row 31"):
        clone(probe).fit(kind(x), y)
    fitted = clone(probe).fit(kind(blobs(50)[0]), y)
    with pytest.raises(NotFinite, match="row 31"):
        fitted.predict(kind(x))


@each
def test_lengths_must_agree(probe):
    x, y = blobs(50)
    with pytest.raises(BadDataset, match="49 labels were given for 50 rows"):
        clone(probe).fit(x, y[:-1])
    with pytest.raises(BadDataset, match="49 groups were given for 50 rows"):
        clone(probe).fit(x, y, groups=np.arange(49))


@each
def test_rows_of_another_width_are_refused(probe):
    x, y = blobs(60)
    fitted = clone(probe).fit(x, y)
    with pytest.raises(ValueError, match=r"5 features.*6 features"):
        fitted.predict(x[:, :5])
    with pytest.raises(BadDataset, match=r"5 columns.*fitted on 6"):
        fitted.predict(tensor(x[:, :5]))
    with pytest.raises(BadDataset, match=r"\[60\]"):
        fitted.predict(tensor(x[:, 0]))


@pytest.mark.parametrize("C", [0.0, -1.0, float("nan")])
def test_a_strength_must_be_above_0(C):
    with pytest.raises(UnknownOption, match=f"C={C} must be above 0"):
        LogisticProbe(C).fit(*blobs(50))


@pytest.mark.parametrize(
    ("probe", "words"),
    [
        (LogisticProbe("x"), r"C='x'.*'cv'"),
        (LogisticProbe(1.0, tol=0.0), "tol=0.0 must be above 0"),
        (LDAProbe(2.0), r"shrinkage=2.0 is no share.*0 to 1"),
        (LDAProbe(-0.1), "no share"),
        (LDAProbe("auto"), r"shrinkage='auto'.*'cv'"),
        (RidgeProbe(-1.0), r"alpha=-1.0.*0 or above"),
        (RidgeProbe("x"), "alpha='x'"),
        (SparseProbe(0), "k=0 columns of n_features=6"),
        (SparseProbe(7), "k=7 columns of n_features=6"),
        (ProjectAndProbe(7), "r=7 directions of n_features=6"),
        (ProjectAndProbe(2, shrinkage=0.0), "shrinkage=0.0"),
        (MLPProbe(0), "hidden=0 must be above 0"),
    ],
    ids=str,
)
def test_options_out_of_range_are_named(probe, words):
    with pytest.raises(UnknownOption, match=words):
        probe.fit(*blobs(50))


@pytest.mark.parametrize("probe", [LDAProbe(0.1, priors="uniform"), LDAProbe(shrinkages=(0.5, 1.0))], ids=str)
def test_options_that_mean_nothing_are_not_passed_over(probe):
    """`equal` or nothing; and a shrinkage of 1 has no ridge strength that it could be tried at."""
    with pytest.raises(UnknownOption):
        probe.fit(*blobs(50))


def test_more_columns_than_rows_must_be_shrunk():
    x, y = blobs(30, 50)
    with pytest.raises(TooFewExamples, match=r"30 rows of 50 columns .*Shrink it"):
        LDAProbe(0.0).fit(x, y)
    with pytest.raises(TooFewExamples, match="Shrink it"):
        RidgeRegressionProbe(0.0).fit(x, y)
    assert LDAProbe().fit(x, y).coef_.shape == (1, 50)
    assert RidgeRegressionProbe().fit(x, y).coef_.shape == (50,)


def test_a_class_in_one_group_cannot_choose_a_strength():
    x, y = blobs(50)
    for probe in (LogisticProbe(), LDAProbe(), RidgeProbe()):
        with pytest.raises(TooFewExamples, match="class with the fewest groups has 1"):
            clone(probe).fit(x, y, groups=y)
    assert LogisticProbe(1.0).fit(x, y, groups=y).C_ == 1.0, "where nothing is chosen, nothing is held out"


def test_moments_of_no_indicators_are_refused():
    x, _ = blobs(50)
    (joint,) = joints(tensor(x), tensor(x[:, :2]), np.zeros(50, int))
    with pytest.raises(BadDataset, match="no indicators"):
        LDAProbe(0.1).fit_moments(joint)
    z = torch.nn.functional.one_hot(torch.arange(50) % 2).double()
    with pytest.raises(TooFewExamples, match="two or more folds"):
        LDAProbe().fit_moments(joints(tensor(x), z, np.zeros(50, int)))


def test_probes_are_fitted_by_name():
    x, y = blobs()
    for name in ("logistic", "lda", "mean", "ridge", "sparse", "project", "mlp"):
        assert fit_probe(x, y, name).score(x, y) > 0.6
    assert fit_probe(x, y, C=0.01).C_ == 0.01
    assert isinstance(fit_probe(x, x[:, 0], "ridge", kind="numbers"), RidgeRegressionProbe)
    groups = np.arange(300) // 3
    chosen = LogisticProbe().fit(x, y, groups=groups)
    np.testing.assert_array_equal(fit_probe(x, y, groups=groups).coef_, chosen.coef_)


def test_an_unknown_probe_or_option_is_named():
    x, y = blobs(50)
    with pytest.raises(UnknownOption, match=r"no probe 'svm' of classes.*logistic, lda"):
        fit_probe(x, y, "svm")
    with pytest.raises(UnknownOption, match=r"no probe 'lda' of numbers.*ridge, mlp"):
        fit_probe(x, y, "lda", kind="numbers")
    with pytest.raises(UnknownOption, match=r"'lda' does not take .*'C'"):
        fit_probe(x, y, "lda", C=1.0)
    with pytest.raises(UnknownOption, match="number"):
        fit_probe(x, y, kind="number")
