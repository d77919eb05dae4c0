"""Erasers that look again and again: INLP and R-LACE, against linear algebra, the published formula and scikit-learn."""

from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from planted import blobs, close, tensor
from sklearn.linear_model import LogisticRegression, Perceptron, SGDClassifier
from sklearn.naive_bayes import GaussianNB
from sklearn.svm import LinearSVC

from probes import INLP, LEACE, RLACE, SAL, MeanProjection
from probes.erasers import rlace
from probes.erasers.inlp import independent
from probes.erasers.rlace import Game, hull_projection, leading
from workbench.errors import BadDataset, NotFinite, TooFewExamples, UnknownOption
from workbench.moments.joint import Joint

SEEDS = st.integers(0, 10_000)
SVC: Any = LinearSVC(C=0.1, tol=1e-6).set_params(dual=False)
LOGISTIC = LogisticRegression(C=0.1, solver="newton-cholesky")


def several(n: int = 2000, d: int = 10, *, apart: float = 1.0, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Rows of unlike spread whose classes differ in mean, so that a linear classifier is not done in one round."""
    random = np.random.default_rng(seed)
    y = random.integers(0, 3, n)
    x = random.normal(size=(n, d)) * np.logspace(-0.5, 0.5, d) + apart * random.normal(size=(3, d))[y]
    return x @ (np.eye(d) + 0.3 * random.normal(size=(d, d))) + 5, y


def published(weights: list[np.ndarray], d: int) -> np.ndarray:
    """1 - Π of the rows of Σ Pᵢ (Ben-Israel 2015; Ravfogel et al. 2020)."""
    total = np.zeros((d, d))
    for one in weights:
        basis = scipy.linalg.orth(one.T)
        total += basis @ basis.T
    basis = scipy.linalg.orth(total)
    return np.eye(d) - basis @ basis.T


def accuracy(x: np.ndarray, y: np.ndarray) -> float:
    half = len(x) // 2
    return float(LogisticRegression().fit(x[:half], y[:half]).score(x[half:], y[half:]))


# ---- INLP


@pytest.mark.parametrize("classifier", ["logistic", SVC, LOGISTIC], ids=str)
def test_inlp_is_the_projection_onto_what_no_classifier_reads(classifier):
    x, y = several()
    own = INLP(classifier, rounds=3, errors=-1e9).fit(x, y)
    p = own.matrix.numpy()
    assert np.abs(p - p.T).max() < 1e-12
    assert np.abs(p @ p - p).max() < 1e-12
    assert len(own.classifiers_) == len(own.rounds_) == 3
    for weight in own.classifiers_:
        assert weight.shape == (3, 10)
        assert np.abs(weight @ p).max() < 1e-11 * np.abs(weight).max()
    new = np.diff([*(one.rank for one in own.rounds_), own.rank])
    assert new.sum() == own.rank == np.linalg.matrix_rank(np.eye(10) - p)
    assert (new > 0).all()
    # Weights of a softmax add up to 0 but for rounding, of which the published formula makes a direction
    apart = own.classifiers_ if classifier is SVC else [one[:2] for one in own.classifiers_]
    close(p, published(apart, 10), 1e-6)
    after = own.transform(x)
    close(after, (x - x.mean(0)) @ p + x.mean(0), 1e-12)
    close(own.transform(after), after, 1e-12)


@settings(max_examples=40, deadline=None)
@given(seed=SEEDS, k=st.lists(st.integers(1, 3), min_size=1, max_size=5), data=st.data())
def test_the_order_of_classifiers_that_are_given_does_not_matter(seed, k, data):
    random = np.random.default_rng(seed)
    weights = [random.normal(size=(one, 9)) * 10.0 ** random.uniform(-9, 3) for one in k]
    found = []
    for order in (range(len(k)), data.draw(st.permutations(range(len(k))))):
        basis = torch.zeros(9, 0, dtype=torch.float64)
        for i in order:
            basis = torch.cat([basis, independent(tensor(weights[i]), basis)], 1)
        close(basis.T @ basis, np.eye(basis.shape[1]), 1e-13)
        assert basis.shape[1] == min(sum(k), 9)
        found.append(np.eye(9) - (basis @ basis.T).numpy())
    close(found[0] + np.eye(9), found[1] + np.eye(9), 1e-6)
    close(found[0] + np.eye(9), published(weights, 9) + np.eye(9), 1e-6)


@pytest.mark.parametrize(("apart", "rank"), [(1e-7, 1), (1e-5, 2)])
def test_two_directions_that_differ_by_rounding_are_one(apart, rank):
    random = np.random.default_rng(0)
    one, aside = random.normal(size=(2, 50))
    aside -= one * (one @ aside) / (one @ one)
    other = one + apart * aside / np.linalg.norm(aside) * np.linalg.norm(one)
    basis = independent(tensor(one[None]), torch.zeros(50, 0, dtype=torch.float64))
    assert basis.shape[1] + independent(tensor(other[None]), basis).shape[1] == rank
    together = independent(tensor(np.stack([one, other])), torch.zeros(50, 0, dtype=torch.float64))
    assert together.shape[1] == rank


def test_small_weights_count_and_zeros_do_not():
    x, y = several()
    large = INLP(SVC, rounds=2, errors=-1e9).fit(x * 1e9, y)
    assert np.abs(large.classifiers_[0]).max() < 1e-8
    assert large.rank >= 4
    nothing = independent(torch.zeros(2, 5, dtype=torch.float64), torch.zeros(5, 0, dtype=torch.float64))
    assert nothing.shape == (5, 0)


@pytest.mark.parametrize(
    "classifier",
    [SVC, LOGISTIC, SGDClassifier(random_state=0), Perceptron(random_state=0)],
    ids=lambda one: type(one).__name__,
)
def test_scikit_learns_linear_classifiers_are_removed_until_they_find_nothing(classifier):
    random = np.random.default_rng(0)
    y = random.integers(0, 2, 3000)
    x = random.normal(size=(3000, 12))
    x[:, 0] += 3 * y
    own = INLP(classifier).fit(x, y)
    assert own.rounds_[0].accuracy > 0.8
    assert not own.rounds_[-1].found(1.0)
    assert accuracy(x, y) > 0.9
    # Of one row at a time, the last two learn a direction that is a little off, and see no more in what it leaves
    assert accuracy(own.transform(x), y) < (0.55 if classifier in (SVC, LOGISTIC) else 0.65)


def test_what_is_planted_in_some_dimensions_of_like_spread_is_removed_with_one_round_more_at_most():
    random = np.random.default_rng(1)
    y = random.integers(0, 4, 4000)
    x = random.normal(size=(4000, 15))
    x[:, :3] += 3 * np.eye(4, 3)[y]
    for own in (INLP(errors=2.0).fit(x, y), INLP(LOGISTIC, errors=2.0).fit(x, y)):
        assert own.rank in (3, 6)
        assert float(own.matrix[:3, :3].norm()) < 0.1  # of three dimensions, whose norm was √3


@pytest.mark.parametrize("classes", [2, 3])
def test_labels_drawn_at_random_have_nothing_to_be_removed(classes):
    ranks = []
    for seed in range(20):
        random = np.random.default_rng(seed)
        ranks.append(INLP(LOGISTIC, errors=2.0).fit(random.normal(size=(500, 8)), random.integers(0, classes, 500)).rank)
    assert np.mean(np.array(ranks) > 0) <= 0.15
    assert np.mean(ranks) < 0.5


def test_it_ends_after_so_many_rounds_that_find_nothing_and_removes_none_of_those():
    random = np.random.default_rng(0)
    x, y = random.normal(size=(600, 8)), random.integers(0, 2, 600)
    x[:, 2] += 4 * y
    one, three = (INLP(SVC, errors=4.0, patience=patience).fit(x, y) for patience in (1, 3))
    assert len(three.rounds_) == len(one.rounds_) + 2
    assert one.rank == three.rank == len(one.classifiers_) == len(three.classifiers_)
    assert [round_.found(4.0) for round_ in three.rounds_][-3:] == [False] * 3
    assert INLP(SVC, errors=1e9).fit(x, y).rank == 0
    np.testing.assert_array_equal(INLP(SVC, errors=1e9).fit(x, y).transform(x), x)


def test_a_budget_is_kept_to():
    x, y = several(apart=2.0)
    for directions in (1, 2, 5, 10):
        own = INLP(SVC, directions=directions, errors=-1e9).fit(x, y)
        assert own.rank == directions
        close(own.write_.T @ own.write_, np.eye(directions), 1e-12)
        assert INLP(directions=directions).fit_moments(joint(x, y)).rank <= directions
    close(INLP(SVC, errors=-1e9).fit(x, y).transform(x), np.tile(x.mean(0), (len(x), 1)), 1e-9)


def test_groups_are_held_out_whole():
    """Twins of a row tell its label to whoever has seen one of them; labels are the group's own and mean nothing else."""
    random = np.random.default_rng(0)
    x, y = np.repeat(random.normal(size=(60, 80)), 10, 0), np.repeat(random.integers(0, 2, 60), 10)
    groups = np.repeat(np.arange(60), 10)
    assert INLP(SVC, rounds=1).fit(x, y).rounds_[0].accuracy == 1
    assert INLP(SVC, rounds=1).fit(x, y, groups=groups).rounds_[0].accuracy < 0.8


def joint(x: np.ndarray, y: np.ndarray) -> Joint:
    return Joint.of(tensor(x), tensor(np.eye(int(y.max()) + 1)[y]))


def test_by_moments_the_first_round_is_discriminant_analysis_and_what_is_left_is_chance():
    x, y = several(apart=0.5)
    own = INLP().fit_moments(joint(x, y))
    p = own.matrix.numpy()
    within = np.linalg.solve(np.cov(x.T), np.stack([x[y == c].mean(0) - x.mean(0) for c in range(3)]).T)
    assert np.abs(within.T @ p).max() < 1e-9 * np.abs(within).max()
    for weight in own.classifiers_:
        assert np.abs(weight @ p).max() < 1e-10 * np.abs(weight).max()
    assert np.abs(p @ p - p).max() < 1e-12
    assert LEACE().fit(own.transform(x)[:, :], y).rank == 0
    assert own.rank >= 2
    random = np.random.default_rng(0)
    assert INLP().fit_moments(joint(random.normal(size=(500, 8)), random.integers(0, 3, 500))).rank == 0


def test_inlp_takes_more_dimensions_than_leace_where_columns_go_together():
    x, y = several(apart=0.5)
    assert INLP().fit_moments(joint(x, y)).rank > LEACE().fit(x, y).rank == 2


def within_classes(n: int = 6000) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A concept whose commonest value is another in each class of the main task."""
    random = np.random.default_rng(0)
    main = random.integers(0, 2, n)
    y = (random.random(n) < np.where(main == 1, 0.9, 0.25)).astype(int)
    x = random.normal(size=(n, 15))
    x[:, 0] += 3 * y
    x[:, 1] += 3 * main
    return x, y, main


def test_within_classes_of_a_main_task_the_concept_goes_and_the_task_stays():
    x, y, main = within_classes()
    own = INLP(LOGISTIC, rounds=20).fit(x, y, main=np.array(["doctor", "nurse"])[main])
    assert {one.main_class for one in own.rounds_} == {"doctor", "nurse"}
    after = own.transform(x)
    for part in (main == 0, main == 1):
        assert accuracy(after[part], y[part]) < max(y[part].mean(), 1 - y[part].mean()) + 0.01
    assert accuracy(after, main) > 0.9


@pytest.mark.parametrize("seed", range(4))
def test_a_class_of_the_main_task_is_compared_with_its_own_commonest_value(seed):
    x, y, main = within_classes()
    own = INLP(LOGISTIC, seed=seed).fit(x, y, main=main)
    for one in own.rounds_:
        assert one.chance == pytest.approx([0.75, 0.9][int(one.main_class)], abs=0.03)
    assert own.rank <= 4


def test_inlp_says_what_it_cannot_do():
    x, y = blobs(80, 4)
    for eraser, words in (
        (INLP(directions=5), "directions=5 is out of range: rows have 4"),
        (INLP("svm"), "classifier='svm' is not known"),
        (INLP(GaussianNB()), "A GaussianNB has no coef_"),
        (INLP(rounds=0), "rounds=0 must be above 0"),
        (INLP(patience=0), "patience=0 must be above 0"),
    ):
        with pytest.raises(UnknownOption, match=words):
            eraser.fit(x, y)
    with pytest.raises(BadDataset, match="79 labels were given for 80 rows"):
        INLP().fit(x, y[:-1])
    with pytest.raises(BadDataset, match="79 groups were given for 80 rows"):
        INLP().fit(x, y, groups=y[:-1])
    with pytest.raises(BadDataset, match="79 labels of the main task"):
        INLP().fit(x, y, main=y[:-1])
    with pytest.raises(BadDataset, match="No class of the main task has rows of two classes"):
        INLP().fit(x, y, main=y)
    for eraser in (INLP(), RLACE()):
        with pytest.raises(TooFewExamples, match="labels are one class"):
            eraser.fit(x, 0 * y)
        with pytest.raises(NotFinite, match="Rows hold"):
            eraser.fit(np.where(x > 1, np.nan, x), y)


# ---- R-LACE


@pytest.mark.parametrize("classes", [2, 3])
def test_rlace_with_all_directions_of_the_concept_finds_mean_projection_from_a_random_start(classes):
    """No linear classifier does better than chance just where class means are equal (Belrose et al. 2023, theorem 3.1)."""
    x, y = blobs(1500, 8, classes, seed=3)
    x = x / x.std(0)
    wanted = MeanProjection(tolerance=0.0).fit(x, y)
    own = RLACE(classes - 1, start="random", seed=1).fit(x, y)
    assert own.losses_[0] < 0.9 * own.chance_
    assert max(own.losses_) > 0.98 * own.chance_
    sines = np.linalg.svd((wanted.matrix @ own.write_).numpy(), compute_uv=False)
    assert sines.max() < 0.25
    close(RLACE(classes - 1).fit(x, y).matrix, wanted.matrix, 1e-6)
    p = own.matrix.numpy()
    assert np.abs(p @ p - p).max() < 1e-12
    assert own.rank == classes - 1


def test_rlace_with_fewer_directions_leaves_a_larger_loss_than_sal():
    random = np.random.default_rng(0)
    y = random.integers(0, 3, 3000)
    x = random.normal(size=(3000, 6)) * np.array([4.0, 1, 0.3, 1, 1, 1])
    x[:, :3] += np.array([[3.0, 0, 0], [-3, 0.5, 0.4], [0, -0.5, 0.6]])[y]
    own = RLACE(1).fit(x, y)
    left = [
        log_loss(LogisticRegression(C=1e4, max_iter=1000).fit(rows, y).predict_log_proba(rows), y)
        for rows in (own.transform(x), SAL(1).fit_transform(x, y))
    ]
    assert left[0] > left[1] + 0.01
    assert own.rank == 1
    assert max(own.losses_) <= own.chance_ * (1 + 1e-6)


def log_loss(log_p: np.ndarray, y: np.ndarray) -> float:
    return -float(log_p[np.arange(len(y)), y].mean())


@settings(max_examples=50, deadline=None)
@given(seed=SEEDS, d=st.integers(2, 12), scale=st.floats(0.01, 100), data=st.data())
def test_the_nearest_matrix_of_the_hull_is_the_nearest(seed, d, scale, data):
    """Whatever lies in a convex set lies at an obtuse angle, seen from the point nearest to one outside. The farthest on the
    outside's side is a projection on leading eigenvectors (Fan 1949)."""
    rank = data.draw(st.integers(1, d))
    root = np.random.default_rng(seed).normal(size=(d, d)) * scale
    matrix = tensor(root + root.T)
    found = hull_projection(matrix, rank)
    values = torch.linalg.eigvalsh(found)
    assert float(values[0]) > -1e-9
    assert float(values[-1]) < 1 + 1e-9
    assert float(found.trace()) == pytest.approx(rank, abs=1e-9)
    off = matrix - found
    farthest = float(torch.linalg.eigvalsh(off)[-rank:].sum())
    assert farthest <= float((off * found).sum()) + 1e-8 * scale
    basis = leading(matrix, rank)
    close(hull_projection(basis @ basis.T, rank), basis @ basis.T, 1e-9)


@pytest.mark.parametrize("classes", [2, 3])
def test_the_slope_is_that_of_the_best_loss_with_its_penalty(classes, monkeypatch):
    """The classifier's least loss is the penalised one, so its answer's own change counts for nothing there alone."""
    monkeypatch.setattr(rlace, "TOLERANCE", 1e-12)
    monkeypatch.setattr(rlace, "STEPS", 1000)
    x, y = blobs(300, 5, classes)
    penalty = 0.05
    game = Game(tensor((x - x.mean(0)) / x.std(0)), torch.from_numpy(y), penalty)
    random = np.random.default_rng(0)
    basis = np.linalg.qr(random.normal(size=(5, 2)))[0]
    at, by = tensor(0.7 * basis @ basis.T + 0.1 * np.eye(5)), random.normal(size=(5, 5))
    by = tensor(by + by.T)

    def best(projection: torch.Tensor, penalty: float) -> float:
        loss = game.loss(projection)
        assert game.last is not None
        return loss + penalty / 2 * float(game.last.weight.square().sum())

    slope = float((game.slope(at) * by).sum())
    with_it, without = ((best(at + 1e-5 * by, own) - best(at - 1e-5 * by, own)) / 2e-5 for own in (penalty, 0.0))
    assert slope == pytest.approx(with_it, rel=1e-5)
    assert abs(slope - without) > 0.05 * abs(slope)


def test_rlace_takes_single_precision_and_tells_what_it_cannot_do():
    x, y = blobs(500, 6, 3)
    close(RLACE(2).fit(x.astype(np.float32), y).matrix, RLACE(2).fit(x, y).matrix, 1e-3)
    same = [RLACE(1, start="random", steps=20, seed=3).fit(x, y).matrix for _ in range(2)]
    assert torch.equal(*same)
    for eraser, words in (
        (RLACE(7), "directions=7 is out of range: rows have 6"),
        (RLACE(start="zero"), "start"),
        (RLACE(penalty=0.0), "penalty=0.0 must be above 0"),
    ):
        with pytest.raises(UnknownOption, match=words):
            eraser.fit(x, y)
    with pytest.raises(BadDataset, match="499 labels were given"):
        RLACE().fit(x, y[:-1])
