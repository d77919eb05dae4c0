"""What a probe's score is worth: nothing leaks, strengths are chosen blind, controls show what is planted and nothing else."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from planted import blobs, log_loss, tensor
from sklearn.base import clone
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score, r2_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from probes import (
    Dataset,
    LDAProbe,
    LogisticProbe,
    MeanDifferenceProbe,
    MLPProbe,
    MLPRegressionProbe,
    ProjectAndProbe,
    RidgeRegressionProbe,
    SparseProbe,
)
from probes.estimators.closed_forms import joints
from probes.estimators.logistic import Scaled
from probes.evaluation import classes, numbers
from probes.evaluation.classes import Plan
from probes.evaluation.code_length import FEWEST, SHARES, blocks_of, code_length
from probes.evaluation.cross_fit import _strengths, cross_fit
from probes.evaluation.scores import Resamples, classified, entropy_bits, interval, kilometres, r_squared
from probes.evaluation.splits import Splits, cells_of, control_labels, held_out, shuffled, within_types
from probes.folds import folds_by_group, numeric_folds
from workbench.errors import NotFinite, TooFewExamples


def rows_set(labels, groups=None, types=None, kind="classes") -> Dataset:
    return Dataset(None, labels, groups=groups, types=types, kind=kind)


# ---- Folds and splits


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), n=st.integers(8, 120), groups=st.integers(4, 30), wanted=st.integers(2, 6))
def test_folds_never_split_a_group(seed, n, groups, wanted):
    random = np.random.default_rng(seed)
    index, own = random.integers(0, 2, n), random.integers(0, groups, n)
    try:
        fold = folds_by_group(index, own, wanted, 0)
    except TooFewExamples:
        assume(False)
    assert set(fold) == set(range(fold.max() + 1)), "no fold is empty"
    assert fold.max() < wanted
    assert all(len(set(fold[own == group])) == 1 for group in np.unique(own))
    for i in range(fold.max() + 1):
        assert set(index[fold != i]) == set(index), "every class can be learnt"
    fold = numeric_folds(n, own, wanted, 0)
    assert set(fold) == set(range(min(wanted, len(np.unique(own)))))
    assert all(len(set(fold[own == group])) == 1 for group in np.unique(own))


def test_folds_keep_the_shares_of_classes_and_sizes():
    random = np.random.default_rng(0)
    groups = np.arange(1200) // 4
    index = (random.random(300) < 0.3).astype(int)[groups]
    fold = folds_by_group(index, groups, 5, 0)
    for i in range(5):
        assert index[fold == i].mean() == pytest.approx(index.mean(), abs=0.02)
        assert np.mean(fold == i) == pytest.approx(0.2, abs=0.02)
    sizes = np.bincount(numeric_folds(1200, random.integers(0, 100, 1200), 5, 0))
    assert sizes.max() - sizes.min() < 20, "by groups of about twelve"
    assert (folds_by_group(index, groups, 5, 1) != fold).any()
    assert (folds_by_group(index, groups, 5, 0) == fold).all()


def test_there_are_fewer_folds_where_a_class_has_fewer_groups():
    groups = np.arange(40) // 2
    index = (groups < 3).astype(int)
    assert folds_by_group(index, groups, 5, 0).max() + 1 == 3
    assert numeric_folds(6, [0, 0, 1, 1, 1, 1], 5, 0).max() + 1 == 2


def test_a_class_in_one_group_is_refused():
    with pytest.raises(TooFewExamples, match=r"class with the fewest groups has 1\. Two of each are needed"):
        folds_by_group(np.array([0, 0, 0, 1, 1]), np.array([0, 1, 2, 3, 3]), 5, 0)
    with pytest.raises(TooFewExamples, match="two groups are needed"):
        numeric_folds(5, np.zeros(5), 5, 0)
    with pytest.raises(TooFewExamples, match="folds=1"):
        folds_by_group(np.arange(10) % 2, None, 1, 0)


@pytest.mark.parametrize("kind", ["classes", "numbers"])
def test_by_two_columns_nothing_tested_shares_either_with_what_is_learnt_from(kind):
    random = np.random.default_rng(0)
    word, template = random.integers(0, 20, 300), random.integers(0, 9, 300)
    labels = word % 2 if kind == "classes" else random.normal(size=300)
    found = held_out(rows_set(labels, np.stack([word, template], 1), kind=kind), 5, 0)
    assert found.train.shape[1] == 9
    assert (found.test.sum(1) == 1).all(), "every row is tested once"
    for train, test in zip(found.train.T, found.test.T, strict=True):
        assert test.any()
        assert train.sum() > 50
        assert not set(word[train]) & set(word[test])
        assert not set(template[train]) & set(template[test])


def test_by_two_columns_a_class_that_could_not_be_learnt_is_named():
    with pytest.raises(TooFewExamples, match="no example left to learn from"):
        held_out(rows_set([0, 0, 1, 1], [["a", 1], ["b", 2], ["a", 2], ["b", 1]]), 5, 0)


def test_types_are_seen_while_their_examples_are_held_out():
    types = np.repeat(np.arange(30), np.arange(30) % 4 + 1)
    found = within_types(rows_set(np.arange(len(types)) % 2, types=types), 5, 0)
    alone = np.bincount(types)[types] == 1
    np.testing.assert_array_equal(found.tested, ~alone)
    assert (found.test.sum(1) <= 1).all()
    assert not (found.train & found.test).any()
    for train, test in zip(found.train.T, found.test.T, strict=True):
        assert set(types[test]) <= set(types[train])
    assert within_types(rows_set(np.arange(20) % 2), 5, 0) is None, "no type recurs"


@pytest.mark.parametrize("seed", range(12))
def test_every_problem_tests_something(seed):
    """Also of few examples: an empty one would leave a probe without rows to be asked about."""
    found = within_types(rows_set(np.arange(10) % 2, types=np.arange(10) // 2), 5, seed)
    assert found.test.any(0).all()


def test_cells_are_rows_on_the_same_side_of_every_problem():
    groups = np.stack([np.arange(200) % 11, np.arange(200) % 7], 1)
    found = held_out(rows_set(np.arange(200.0), groups, kind="numbers"), 5, 0)
    cells = cells_of(found)
    assert cells.max() == 8
    for cell in range(9):
        assert len(np.unique(np.hstack([found.train, found.test])[cells == cell], axis=0)) == 1


def test_labels_of_groups_are_shuffled_as_they_repeat():
    groups = np.repeat(np.arange(40), np.arange(40) % 3 + 2)
    index = (np.arange(40) % 2)[groups]
    found = shuffled(rows_set(index, groups), np.random.default_rng(0))
    assert all(len(set(found[groups == group])) == 1 for group in range(40))
    assert found.mean() == pytest.approx(index.mean(), abs=4 / len(index)), "up to the largest group"
    assert (found != index).any()
    numbers_of = np.random.default_rng(0).normal(size=40)[groups]
    found = shuffled(rows_set(numbers_of, groups, kind="numbers"), np.random.default_rng(0))
    assert sorted({*found[:, 0]}) == sorted({*numbers_of})


def test_shuffled_labels_keep_their_shares_where_one_class_has_few_large_groups():
    """Moved from group to group, they would nearly all be of the class with many groups, and easy to guess."""
    groups = np.concatenate([np.repeat(np.arange(20), 30), 20 + np.arange(600)])
    index = (groups < 20).astype(int)
    for seed in range(5):
        found = shuffled(rows_set(index, groups), np.random.default_rng(seed))
        assert found.mean() == pytest.approx(0.5, abs=30 / 1200)
        assert 0.2 < found[:600].mean() < 0.8, "and large groups have both"


def test_labels_that_differ_within_groups_are_shuffled_one_by_one():
    index = np.arange(60) % 3
    found = shuffled(rows_set(index, np.arange(60) // 6), np.random.default_rng(0))
    assert sorted(found) == sorted(index)
    assert (found != index).any()


def test_a_control_task_gives_a_type_one_label_at_the_labels_shares():
    types = np.repeat(np.arange(2000), 2)
    index = (np.arange(4000) % 10 < 3).astype(int)
    found = control_labels(rows_set(index, types=types), np.random.default_rng(0))
    assert (found[::2] == found[1::2]).all()
    # 2,000 draws at 0.3 have a standard error of 0.01
    assert found.mean() == pytest.approx(0.3, abs=0.03)
    assert np.mean(found == index) == pytest.approx(0.58, abs=0.03)


# ---- Cross-fitting


def by_hand(probe_for, x, labels, splits) -> np.ndarray:
    found = np.full((labels.shape[1], len(x), int(labels.max()) + 1), np.nan)
    for p, (train, test) in enumerate(zip(splits.train.T, splits.test.T, strict=True)):
        for q, own in enumerate(labels.T):
            found[q, test] = probe_for(p).fit(x[train], own[train]).predict_log_proba(x[test])
    return found


def by_sklearn(C: float, class_weight=None):
    own = LogisticRegression(C=C, tol=1e-12, solver="newton-cholesky", class_weight=class_weight, max_iter=1000)
    return make_pipeline(StandardScaler(), own)


def crossed(n_classes: int, n: int = 240) -> tuple[np.ndarray, np.ndarray, np.ndarray, Splits]:
    """Rows, true and shuffled labels, groups, and splits by two columns of which some rows are not tested."""
    x, y = blobs(n, 4, n_classes, seed=1)
    random = np.random.default_rng(0)
    groups = np.stack([random.integers(0, 30, n), random.integers(0, 12, n)], 1)
    splits = held_out(rows_set(y, groups), 5, 0)
    splits = splits._replace(test=splits.test & (np.arange(n) % 7 > 0)[:, None])
    return x, np.stack([y, random.permutation(y)], 1), groups[:, 0], splits


@pytest.mark.parametrize("n_classes", [2, 3])
def test_logistic_probes_are_cross_fitted_as_in_a_loop(n_classes):
    x, labels, groups, splits = crossed(n_classes)
    found, settled = cross_fit(LogisticProbe(0.1, tol=1e-10), tensor(x), labels, n_classes, splits, groups)
    np.testing.assert_allclose(found, by_hand(lambda _: by_sklearn(0.1), x, labels, splits), atol=1e-6)
    assert np.isnan(found[:, ~splits.tested]).all()
    assert np.isfinite(found[:, splits.tested]).all()
    assert settled.get_params() == LogisticProbe(0.1, tol=1e-10).get_params()


def test_class_weights_hold_in_cross_fitting():
    x, labels, groups, splits = crossed(3)
    probe = LogisticProbe(0.1, tol=1e-10, class_weight={0: 5.0, 1: 1.0, 2: 0.2}, standardize=False)
    found, _ = cross_fit(probe, tensor(x), labels, 3, splits, groups)
    np.testing.assert_allclose(found, by_hand(lambda _: probe, x, labels, splits), atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("seed", [0, 3, 5])
def test_a_column_of_one_group_alone_says_nothing_of_it(seed, dtype):
    """Where the group is held out, the column is constant in what is learnt from, and its coefficient is 0."""
    random = np.random.default_rng(seed)
    y = (random.random(500) < 0.1).astype(int)
    x = random.normal(size=(500, 4))
    x[:, 0] += y
    x[:, 3] = np.arange(500) < 40
    groups = np.r_[np.zeros(40, int), 1 + np.arange(460) % 20]
    splits = held_out(rows_set(y, groups), 5, 0)
    found, _ = cross_fit(LogisticProbe(1.0, tol=1e-6), tensor(x, dtype), y[:, None], 2, splits, groups)
    np.testing.assert_allclose(found, by_hand(lambda _: by_sklearn(1.0), x, y[:, None], splits), atol=2e-3)  # float32


@pytest.mark.parametrize("n_classes", [2, 3])
@pytest.mark.parametrize(
    "probe", [LDAProbe(0.1), LDAProbe(0.0, priors="equal"), MeanDifferenceProbe(standardize=True)], ids=str
)
def test_probes_from_moments_are_cross_fitted_as_in_a_loop(probe, n_classes):
    x, labels, groups, splits = crossed(n_classes)
    found, _ = cross_fit(probe, tensor(x), labels, n_classes, splits, groups)
    np.testing.assert_allclose(found, by_hand(lambda _: probe, x, labels, splits), atol=1e-9)


def test_a_shrinkage_is_chosen_on_the_training_folds_and_kept_for_other_labels():
    x, y = blobs(120, 30, apart=0.3, seed=2)
    labels = np.stack([y, np.random.default_rng(0).permutation(y)], 1)
    splits = held_out(rows_set(y), 5, 0)
    fold, z = splits.test.argmax(1), torch.nn.functional.one_hot(torch.from_numpy(y)).double()
    parts, chosen = joints(tensor(x), z, fold), []
    for i in range(5):
        chosen.append(LDAProbe().fit_moments([part for j, part in enumerate(parts) if j != i]).shrinkage_)
    assert all(0 < one < 0.9 for one in chosen)
    found, settled = cross_fit(LDAProbe(), tensor(x), labels, 2, splits, np.arange(120))
    np.testing.assert_allclose(found, by_hand(lambda p: LDAProbe(chosen[p]), x, labels, splits), atol=1e-9)
    assert chosen.count(settled.shrinkage) == max(map(chosen.count, chosen))


@pytest.mark.parametrize("probe", [SparseProbe(2), ProjectAndProbe(2), MLPProbe(epochs=3)], ids=lambda one: type(one).__name__)
def test_other_probes_are_fitted_in_a_loop(probe):
    x, labels, groups, splits = crossed(3)
    found, settled = cross_fit(probe, tensor(x), labels, 3, splits, groups)
    wanted = np.full(found.shape, np.nan)
    for train, test in zip(splits.train.T, splits.test.T, strict=True):
        for q, own in enumerate(labels.T):
            wanted[q, test] = settled.fit(x[train], own[train], groups=groups[train]).predict_log_proba(x[test])
    np.testing.assert_allclose(found, wanted, atol=1e-9)


def chosen_by(index: np.ndarray, x: np.ndarray, splits: Splits, probe: LogisticProbe) -> list[float]:
    probe.classes_ = np.unique(index)
    rows = tensor(x)
    scaled = Scaled.of(rows, torch.ones(len(rows)), standardize=probe.standardize)
    return _strengths(probe, scaled, index, splits, np.arange(len(index)))


CS = (1e-3, 1e-2, 1e-1, 1.0, 10.0)


def test_strengths_are_those_of_a_loop_within_the_training_rows():
    x, y = blobs(90, 15, apart=0.2, seed=5)
    splits = held_out(rows_set(y), 3, 0)
    losses = np.zeros((3, len(CS)))
    for p in range(3):
        for q in {0, 1, 2} - {p}:
            train, tried = splits.train[:, p] & splits.train[:, q], splits.test[:, q]
            for c, C in enumerate(CS):
                losses[p, c] += log_loss(by_sklearn(C).fit(x[train], y[train]).predict_log_proba(x[tried]), y[tried]).sum()
    wanted = [CS[best] for best in losses.argmin(1)]
    assert CS[0] < min(wanted) <= max(wanted) < CS[-1], "else the test would not tell"
    probe = LogisticProbe(Cs=CS, tol=1e-9)
    assert chosen_by(y, x, splits, probe) == wanted
    found, settled = cross_fit(probe, tensor(x), y[:, None], 2, splits, np.arange(90))
    np.testing.assert_allclose(found, by_hand(lambda p: by_sklearn(wanted[p]), x, y[:, None], splits), atol=1e-6)
    assert wanted.count(settled.C) == max(map(wanted.count, wanted))


@pytest.mark.parametrize("columns", [1, 2])
def test_strengths_are_chosen_blind_to_what_is_tested(columns):
    """Other labels of the rows that a problem tests change nothing of that problem's strength, and something of others'."""
    random = np.random.default_rng(0)
    x, y = blobs(180, 25, apart=0.3, seed=7)
    groups = np.stack([random.integers(0, 40, 180), random.integers(0, 15, 180)], 1)[:, :columns]
    splits = held_out(rows_set(y, groups), 5, 0)
    probe, changed = LogisticProbe(Cs=(1e-4, *CS)), 0
    before = chosen_by(y, x, splits, probe)
    for p in range(splits.test.shape[1]):
        unseen = ~splits.train[:, p]  # by two columns also what shares one of them
        other = np.where(unseen, 1 - y, y)
        after = chosen_by(other, x, splits, probe)
        assert after[p] == before[p]
        changed += after != before
    assert changed > 0


@pytest.mark.parametrize(
    "probe", [LogisticProbe(0.1), LDAProbe(0.1), MeanDifferenceProbe(), SparseProbe(1), ProjectAndProbe(1), MLPProbe(epochs=2)],
    ids=lambda one: type(one).__name__,
)  # fmt: skip
def test_a_class_that_shuffled_labels_do_not_teach_has_a_probability_all_the_same(probe):
    """Shuffled, the only two of a class may both be held out."""
    x, y = blobs(40, 3, seed=1)
    y[:2] = 2
    splits = Splits.of(np.arange(40) % 2)
    labels = np.stack([y, y[np.roll(np.arange(40), 1)]], 1)
    labels[:, 1][labels[:, 1] == 2] = 0
    labels[[0, 2], 1] = 2
    found, _ = cross_fit(probe, tensor(x), labels, 3, splits, np.arange(40))
    assert not np.isnan(found).any()
    # Nothing speaks for the class where it was not learnt; logistic regression is solved to a gradient of 1e-4
    assert np.exp(found[1, ::2, 2]).max() < 0.01
    assert np.exp(found).sum(-1) == pytest.approx(np.ones((2, 40)), abs=1e-5)


def test_rows_that_are_no_numbers_are_refused():
    x = torch.zeros(10, 2)
    x[3, 1] = torch.nan
    with pytest.raises(NotFinite, match="wider range"):
        cross_fit(LogisticProbe(1.0), x, np.arange(10)[:, None] % 2, 2, Splits.of(np.arange(10) // 2 % 2), np.arange(10))


# ---- Leaks and controls


@pytest.mark.parametrize("probe", [LogisticProbe(), LDAProbe()], ids=lambda one: type(one).__name__)
def test_a_leak_through_groups_is_there_by_rows_and_gone_by_groups(probe):
    """Rows of a group look alike and labels are of whole groups, at random: there is nothing to learn but the groups."""
    random = np.random.default_rng(0)
    groups = np.repeat(np.arange(200), 5)
    x = tensor(random.normal(size=(200, 190))[groups] + 0.1 * random.normal(size=(1000, 190)), torch.float32)
    y = (np.arange(200) % 2)[groups]
    scores = {}
    for name, own in {"rows": np.arange(1000), "groups": groups}.items():
        found, _ = cross_fit(probe, x, y[:, None], 2, held_out(rows_set(y, own), 5, 0), own)
        scores[name] = classified(found[0], y).accuracy
    assert scores["rows"] > 0.9
    assert scores["groups"] == pytest.approx(0.5, abs=0.1)


def words(meaning: bool) -> tuple[torch.Tensor, Dataset]:
    """Types with 5 examples each; labels depend on the type's vector, or on nothing but the type."""
    random = np.random.default_rng(1)
    types = np.repeat(np.arange(300), 5)
    vectors = random.normal(size=(300, 20))
    index = (vectors[:, 0] > 0) if meaning else np.arange(300) % 2 == 0
    x = vectors[types] + 0.3 * random.normal(size=(1500, 20))
    return tensor(x, torch.float32), rows_set(index.astype(int)[types], types, types)


@pytest.mark.parametrize("probe", [LogisticProbe(), LDAProbe()], ids=lambda one: type(one).__name__)
def test_labels_that_mean_nothing_have_no_selectivity(probe):
    rows, dataset = words(meaning=False)
    plan = Plan.of(dataset, folds=5, shuffles=2, seed=0)
    found = classes.probed(probe, rows, plan, controls=True)
    task = classified(found.seen, dataset.index)
    control = classified(found.controls[0], plan.controls[0])
    assert control.accuracy > 0.55, "300 types in 20 columns can partly be learnt by heart"
    # Two sets of 300 random labels: their accuracies differ by chance, 0.03 at one standard error
    assert task.accuracy - control.accuracy == pytest.approx(0, abs=0.08)
    assert classified(found.log_p, dataset.index).accuracy == pytest.approx(0.5, abs=0.1), "of types not seen"
    assert found.code.compression < 1.02


def test_labels_that_mean_something_have():
    rows, dataset = words(meaning=True)
    plan = Plan.of(dataset, folds=5, shuffles=3, seed=0)
    found = classes.probed(LogisticProbe(), rows, plan, controls=True)
    index = dataset.index
    assert classified(found.log_p, index).accuracy > 0.85
    task, control = classified(found.seen, index), classified(found.controls[0], plan.controls[0])
    assert task.accuracy - control.accuracy > 0.1
    assert [one.shape for one in found.shuffled] == [(1500, 2)] * 3
    for log_p, labels in zip(found.shuffled, plan.shuffled, strict=True):
        assert classified(log_p, labels).accuracy == pytest.approx(0.5, abs=0.1)  # of 300 types, 0.03 is one error
    assert found.code.compression > 1.5 > 1.1 > found.shuffled_code.compression
    bare = classes.probed(LogisticProbe(), rows, plan, controls=False)
    np.testing.assert_allclose(bare.log_p, found.log_p, atol=0.03)  # beside other labels, steps differ: solved to 1e-4
    assert (bare.seen, bare.controls, bare.shuffled_code) == (None, None, None)


def test_a_plan_is_the_same_for_the_same_seed_and_another_for_another():
    _, dataset = words(meaning=True)
    one, same, other = (Plan.of(dataset, folds=5, shuffles=2, seed=seed) for seed in (0, 0, 1))
    for part in ("shuffled", "controls"):
        np.testing.assert_array_equal(getattr(one, part), getattr(same, part))
        assert (np.array(getattr(one, part)) != np.array(getattr(other, part))).any()
    np.testing.assert_array_equal(one.splits.test, same.splits.test)
    assert (one.shuffled[0] != one.shuffled[1]).any()


# ---- Code lengths


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), n=st.integers(2, 300), groups=st.integers(1, 60))
def test_blocks_end_where_groups_do(seed, n, groups):
    own = np.random.default_rng(seed).integers(0, groups, n)
    order, ends = blocks_of(own, seed)
    assert sorted(order) == list(range(n))
    assert ends == sorted(set(ends))
    assert ends[-1] == n
    assert ends[0] >= min(FEWEST, n)
    sent = own[order]
    for end in ends[:-1]:
        assert sent[end - 1] != sent[end]
    assert len(set(sent[np.flatnonzero(np.diff(sent, prepend=-1))])) == len(set(own)) == (np.diff(sent) != 0).sum() + 1
    largest = np.bincount(own).max()
    for share in SHARES:
        wanted = min(n, max(FEWEST, share * n))
        assert any(wanted <= end < wanted + largest + 1 for end in ends)


def test_the_code_of_a_tiny_set_is_that_by_hand():
    """Rows say nothing, so each block is coded by the shares of the classes so far, mixed with a little of the uniform."""
    sent, groups = np.array([0, 2, 1, 0, 2, 0, 1, 0, 0, 0, 1, 2, 0, 0, 1, 0]), np.arange(16)
    order, ends = blocks_of(groups, 3)
    assert ends == [4, 8, 16]
    index = np.empty(16, int)
    index[order] = sent
    blocks = [4 * math.log2(3)]
    for start, end in ((4, 8), (8, 16)):
        shares, rare = np.bincount(sent[:start], minlength=3) / start, 1 / (start + 3)
        blocks.append(-np.log2((1 - rare) * shares[sent[start:end]] + rare / 3).sum())
    found = code_length(LogisticProbe(1.0, tol=1e-10), torch.zeros(16, 2, dtype=torch.float64), index, 3, groups, 3)
    assert found.blocks == pytest.approx(blocks, abs=1e-6)
    assert found.bits == pytest.approx(sum(blocks), abs=1e-6)
    assert found.uniform == 16 * math.log2(3)
    assert found.compression == found.uniform / found.bits


@pytest.mark.parametrize("probe", [LogisticProbe(0.1), LDAProbe(0.1), SparseProbe(2)], ids=lambda one: type(one).__name__)
def test_every_block_is_coded_by_those_before_it(probe):
    x, y = blobs(300, 4, 3, seed=1)
    groups = np.arange(300) // 3
    found = code_length(probe, tensor(x), y, 3, groups, 0)
    order, ends = blocks_of(groups, 0)
    x, y = x[order], y[order]
    if isinstance(probe, LogisticProbe):  # by all states, which both sides have
        x, probe = StandardScaler().fit_transform(x), clone(probe).set_params(standardize=False)
    assert found.ends == ends
    assert found.blocks[0] == ends[0] * math.log2(3)
    for at, (start, end) in enumerate(pairwise(ends), 1):
        if set(y[:start]) == {0, 1, 2}:
            log_p = probe.fit(x[:start], y[:start]).predict_log_proba(x[start:end])
            rare = 1 / (start + 3)
            p = (1 - rare) * np.exp(log_p[np.arange(end - start), y[start:end]]) + rare / 3
            assert found.blocks[at] == pytest.approx(-np.log2(p).sum(), rel=2e-3), "solved to a gradient of 1e-4"
    assert len(ends) > 5


def test_labels_that_rows_tell_are_sent_in_few_bits():
    random = np.random.default_rng(0)
    y = random.permutation(np.arange(2000) % 2)
    x = random.normal(size=(2000, 10)) + 8 * y[:, None]
    for probe in (LogisticProbe(), LDAProbe(), MeanDifferenceProbe()):
        found = code_length(probe, tensor(x, torch.float32), y, 2, np.arange(2000), 0)
        assert found.compression > 20
        assert found.bits > 4, "the first block at least"


@pytest.mark.parametrize("seed", range(3))
def test_shuffled_labels_take_one_bit_each(seed):
    random = np.random.default_rng(seed)
    y = random.permutation(np.arange(2000) % 2)
    x = tensor(random.normal(size=(2000, 10)), torch.float32)
    found = code_length(LogisticProbe(), x, y, 2, np.arange(2000), seed)
    assert found.compression == pytest.approx(1, abs=0.03)


def test_a_strength_is_paid_for():
    """The shortest code of all strengths, and log₂ of their number."""
    x, y = blobs(300, 6, apart=0.4)
    rows, groups = tensor(x), np.arange(300)
    probe = LogisticProbe(Cs=(1e-3, 1e-1, 10.0, 100.0), tol=1e-9)
    alone = [code_length(one, rows, y, 2, groups, 0).bits for one in probe.variants()]
    assert code_length(probe, rows, y, 2, groups, 0).bits == pytest.approx(min(alone) + 2, rel=1e-6)


@pytest.mark.parametrize("probe", [LogisticProbe(), LDAProbe(), ProjectAndProbe(2)], ids=lambda one: type(one).__name__)
def test_blocks_before_a_second_class_are_coded_uniformly(probe):
    order, ends = blocks_of(np.arange(100), 0)
    index = np.zeros(100, int)
    index[order[60:70]] = 1
    x = tensor(np.random.default_rng(0).normal(size=(100, 5)) + 3 * index[:, None])
    found = code_length(probe, x, index, 2, np.arange(100), 0)
    for block, end in zip(found.blocks, ends, strict=True):
        if end <= 50:
            assert block == pytest.approx(end - ends[ends.index(end) - 1] if end != ends[0] else end, abs=1e-9)
    assert math.isfinite(found.bits)


@pytest.mark.parametrize(
    "probe", [LDAProbe(), LDAProbe(0.1), ProjectAndProbe(2), MeanDifferenceProbe(), SparseProbe(2)], ids=str
)
def test_a_first_block_of_one_example_a_class_is_no_failure(probe):
    """Four examples of eight classes do not spread about their means."""
    order, _ = blocks_of(np.arange(400), 0)
    index = np.empty(400, int)
    index[order] = np.arange(400) % 8
    x = tensor(np.random.default_rng(0).normal(size=(400, 5)) + 4 * np.eye(8)[index][:, :5])
    found = code_length(probe, x, index, 8, np.arange(400), 0)
    assert 0 < found.bits < math.inf


# ---- Scores


def test_intervals_of_independent_rows_are_those_of_the_normal_distribution():
    random = np.random.default_rng(0)
    hits = (random.random(1000) < 0.7).astype(float)
    own = Resamples(np.arange(1000), 0)
    low, high = interval(own.means(hits))
    error = math.sqrt(hits.mean() * (1 - hits.mean()) / 1000)
    # A percentile of 1,000 draws is itself off by about 5 % of a standard error, twice over
    assert (low - hits.mean()) / error == pytest.approx(-1.96, abs=0.2)
    assert (high - hits.mean()) / error == pytest.approx(1.96, abs=0.2)


def test_copies_within_a_group_do_not_narrow_an_interval():
    random = np.random.default_rng(0)
    hits = (random.random(100) < 0.7).astype(float)
    one = Resamples(np.arange(100), 0).means(hits)
    other = Resamples(np.repeat(np.arange(100), 20), 0).means(np.repeat(hits, 20))
    np.testing.assert_allclose(one, other, atol=1e-12)
    apart = Resamples(np.arange(2000), 0).means(np.repeat(hits, 20))
    assert np.std(apart) < 0.3 * np.std(one)


def test_resampled_means_weigh_groups_by_their_rows():
    groups, values = np.array(["a", "b", "b", "b"]), np.array([[1.0, 0.0], [0.0, 2.0], [0.0, 2.0], [0.0, 2.0]])
    own = Resamples(groups, 0)
    assert set(np.round(own.means(values)[:, 0], 12)) == {0.0, 0.25, 1.0}
    np.testing.assert_allclose(own.means(values)[:, 1], 2 * (1 - own.means(values)[:, 0]), atol=1e-12)
    weighed = own.means(values[:, 0], np.array([3.0, 1.0, 1.0, 1.0]))
    assert set(np.round(weighed, 12)) == {0.0, 0.5, 1.0}


def test_differences_of_scores_have_intervals_of_their_own():
    """Of two probes that fail on the same rows, the difference is known better than either."""
    random = np.random.default_rng(0)
    hits = (random.random(500) < 0.6).astype(float)
    better = np.maximum(hits, random.random(500) < 0.05)
    own = Resamples(np.arange(500), 0)
    low, _ = interval(own.means(better) - own.means(hits))
    assert low > 0
    assert interval(own.means(better))[0] < hits.mean() < better.mean()


def test_scores_of_classes_are_scikit_learns():
    x, y = blobs(classes=3)
    log_p = by_sklearn(1.0).fit(x, y).predict_log_proba(x)
    found = classified(log_p, y)
    assert found.accuracy == np.mean(log_p.argmax(1) == y)
    assert found.balanced_accuracy == pytest.approx(balanced_accuracy_score(y, log_p.argmax(1)), abs=1e-12)
    assert found.bits == pytest.approx(log_loss(log_p, y).mean() / math.log(2), abs=1e-12)


def test_entropy_is_in_bits():
    assert entropy_bits(np.array([0, 1, 2, 3])) == pytest.approx(2, abs=1e-12)
    assert entropy_bits(np.array([0, 0, 0, 1])) == pytest.approx(0.8112781244591328, abs=1e-12)
    assert entropy_bits(np.array([5, 5])) == 0


def test_r_squared_is_scikit_learns_where_means_agree():
    random = np.random.default_rng(0)
    target = random.normal(size=(50, 3)) * [1, 10, 100] + 5
    predicted = target + random.normal(size=(50, 3)) * [0.5, 9, 10]
    mean = np.broadcast_to(target.mean(0), target.shape)
    value, each = r_squared(target, predicted, mean)
    assert value == pytest.approx(r2_score(target, predicted), abs=1e-12)
    np.testing.assert_allclose(each, r2_score(target, predicted, multioutput="raw_values"), atol=1e-12)
    assert r_squared(target, mean, mean)[0] == 0


@pytest.mark.parametrize(
    ("one", "other", "wanted"),
    [
        ((48.8566, 2.3522), (51.5074, -0.1278), 343.6),  # Paris, London
        ((40.7128, -74.0060), (35.6762, 139.6503), 10_849),  # New York, Tokyo, over the date line
        ((10.0, 20.0), (-10.0, -160.0), math.pi * 6371),
        ((0.0, 179.5), (0.0, -179.5), math.pi * 6371 / 180),
        ((90.0, 0.0), (95.0, 77.0), 0.0),
        ((5.0, 6.0), (5.0, 6.0), 0.0),
    ],
)  # fmt: skip
def test_kilometres_are_along_great_circles(one, other, wanted):
    found = kilometres(np.array([one]), np.array([other]))
    assert found.shape == (1,)
    assert found[0] == pytest.approx(wanted, rel=1e-3, abs=1e-6)


# ---- Numbers


def places(planted: bool) -> tuple[torch.Tensor, Dataset]:
    random = np.random.default_rng(3)
    groups = np.repeat(np.arange(200), 3)
    x = random.normal(size=(600, 12))
    y = x @ random.normal(size=(12, 2)) * [1, 50] + random.normal(size=(600, 2)) * [0.3, 15] + [10, -100]
    return tensor(x, torch.float32), rows_set(y if planted else random.permutation(y), groups, groups, kind="numbers")


@pytest.mark.parametrize(
    "probe", [RidgeRegressionProbe(), MLPRegressionProbe(learning_rate=1e-2)], ids=lambda one: type(one).__name__
)
def test_planted_numbers_are_found_and_shuffled_ones_are_not(probe):
    for planted in (True, False):
        rows, dataset = places(planted)
        plan = Plan.of(dataset, folds=5, shuffles=2, seed=0)
        found = numbers.probed(probe, rows, plan, controls=planted and isinstance(probe, RidgeRegressionProbe))
        value, each = r_squared(dataset.labels, found.predicted, found.mean)
        if planted:
            assert min(each) > 0.9
            assert value > 0.95 or isinstance(probe, MLPRegressionProbe)
            assert found.bits_saved > 1
            for own, other in zip(found.shuffled, plan.shuffled, strict=False):
                assert r_squared(other, own, found.mean)[0] <= 0.05
        else:
            assert value <= 0.05
            assert found.bits_saved <= 0.05


def test_numbers_are_cross_fitted_as_in_a_loop():
    rows, dataset = places(planted=True)
    plan = Plan.of(dataset, folds=5, shuffles=1, seed=0)
    found = numbers.probed(RidgeRegressionProbe(5.0), rows.double(), plan, controls=True)
    y, x = dataset.labels, rows.double().numpy()
    for train, test in zip(plan.splits.train.T, plan.splits.test.T, strict=True):
        probe = RidgeRegressionProbe(5.0)
        np.testing.assert_allclose(found.predicted[test], probe.fit(x[train], y[train]).predict(x[test]), atol=1e-8)
        own = plan.shuffled[0]
        np.testing.assert_allclose(found.shuffled[0][test], probe.fit(x[train], own[train]).predict(x[test]), atol=1e-8)
        np.testing.assert_allclose(found.mean[test], np.broadcast_to(y[train].mean(0), (test.sum(), 2)), atol=1e-9)
    assert found.settled.alpha == 5.0
    assert found.seen.shape == found.controls[0].shape == y.shape
    seen = r_squared(y, found.seen, np.broadcast_to(y.mean(0), y.shape))[0]
    own = plan.controls[0]
    assert seen > 0.95 > 0.3 > r_squared(own, found.controls[0], np.broadcast_to(own.mean(0), y.shape))[0]


def test_numbers_of_a_leaking_group_are_at_chance_by_groups():
    random = np.random.default_rng(0)
    groups = np.repeat(np.arange(100), 6)
    x = tensor(random.normal(size=(100, 90))[groups] + 0.1 * random.normal(size=(600, 90)))
    y = random.normal(size=100)[groups]
    scores = []
    for own in (np.arange(600), groups):
        found = numbers.probed(
            RidgeRegressionProbe(), x, Plan.of(rows_set(y, own, kind="numbers"), folds=5, shuffles=1, seed=0), controls=False
        )
        scores.append(r_squared(y[:, None], found.predicted, found.mean)[0])
    assert scores[0] > 0.8
    assert scores[1] < 0.1


@pytest.mark.parametrize("seed", range(4))
def test_classes_that_the_first_blocks_lack_do_not_break_the_code(seed):
    """The bias of a class without rows runs off to where the loss is straight; steps along it must not."""
    random = np.random.default_rng(seed)
    y = random.integers(0, 8, 800)
    x = random.normal(size=(800, 64)) + random.normal(size=(8, 64))[y] / 2
    found = code_length(LogisticProbe(), tensor(x, torch.float32), y, 8, np.arange(800) // 3, seed)
    assert np.isfinite(found.blocks).all()
    assert found.compression > 3


# ---- Nulls that are as fair as what stands beside them


def test_noise_is_no_better_than_shuffled_labels_where_groups_are_few():
    """Folds that are even for the true labels alone would leave shuffled ones with a majority that misleads."""
    gaps = []
    for seed in range(12):
        random = np.random.default_rng(seed)
        groups = np.repeat(np.arange(24), 10)
        dataset = rows_set((np.arange(24) % 2)[groups], groups, groups)
        plan = Plan.of(dataset, folds=5, shuffles=3, seed=seed)
        rows = tensor(random.normal(size=(240, 8)), torch.float32)
        found = classes.probed(LogisticProbe(0.01), rows, plan, controls=True)
        null = [classified(log_p, labels).accuracy for log_p, labels in zip(found.shuffled, plan.shuffled, strict=True)]
        gaps.append(classified(found.log_p, dataset.index).accuracy - np.mean(null))
    assert abs(np.mean(gaps)) < 3 * np.std(gaps) / np.sqrt(len(gaps)) + 0.01


def test_noise_has_no_selectivity_where_types_are_few():
    found = []
    for seed in range(12):
        random = np.random.default_rng(seed)
        types = np.repeat(np.arange(24), 10)
        dataset = rows_set((np.arange(24) % 2)[types], types, types)
        plan = Plan.of(dataset, folds=5, shuffles=1, seed=seed)
        assert all(labels.mean() == pytest.approx(0.5, abs=0.05) for labels in plan.controls), "classes keep their shares"
        one = classes.probed(LogisticProbe(0.01), tensor(random.normal(size=(240, 8)), torch.float32), plan, controls=True)
        control = np.mean([classified(p, y).accuracy for p, y in zip(one.controls, plan.controls, strict=True)])
        found.append(classified(one.seen, dataset.index).accuracy - control)
    assert abs(np.mean(found)) < 3 * np.std(found) / np.sqrt(len(found)) + 0.01


def test_one_example_of_another_label_does_not_make_labels_those_of_examples():
    groups = np.repeat(np.arange(40), 25)
    index = (np.arange(40) % 2)[groups]
    index[0] = 1 - index[0]
    found = shuffled(rows_set(index, groups), np.random.default_rng(0))
    assert all(len(set(found[groups == group])) == 1 for group in range(40))


@pytest.mark.parametrize("seed", range(20))
def test_every_class_is_dealt_to_some_unit(seed):
    index = np.repeat([0, 1, 2], [90, 5, 5])
    found = shuffled(rows_set(index, np.repeat(np.arange(10), 10)), np.random.default_rng(seed))
    assert set(found) <= {0, 1, 2}
    units = np.repeat(np.arange(4), 25)
    assert len(set(control_labels(rows_set(index, types=units), np.random.default_rng(seed)))) == 3


def test_targets_with_heavy_tails_save_no_bits_where_rows_say_nothing():
    for seed in range(3):
        random = np.random.default_rng(seed)
        y = random.standard_t(2, size=(600, 1))
        dataset = rows_set(y, np.arange(600), kind="numbers")
        plan = Plan.of(dataset, folds=5, shuffles=1, seed=seed)
        found = numbers.probed(
            RidgeRegressionProbe(), tensor(random.normal(size=(600, 10)), torch.float32), plan, controls=True
        )
        assert max(found.bits_saved, found.shuffled_bits_saved) < 0.01


@pytest.mark.parametrize("probe", [LogisticProbe(), LDAProbe()], ids=lambda one: type(one).__name__)
def test_with_two_folds_a_strength_is_still_chosen_on_training_rows(probe):
    random = np.random.default_rng(0)
    y = np.arange(200) % 2
    rows = tensor(random.normal(size=(200, 30)) + 0.4 * y[:, None], torch.float32)
    plan = Plan.of(rows_set(y, np.arange(200) // 4 * 2 + y), folds=2, shuffles=1, seed=0)
    found = classes.probed(probe, rows, plan, controls=False)
    assert classified(found.log_p, y).accuracy > 0.7
