"""Many regressions at once: each as it is alone, at a point where the loss is flat by autograd."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from planted import blobs, close, log_loss, tensor

from probes import LogisticProbe
from probes.estimators.solver import Logistic, solve_logistic

N, D = 200, 5


def problems(classes: int, count: int = 3, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows, label sets, and weights of which a third are 0."""
    random = np.random.default_rng(seed)
    x, y = blobs(N, D, classes, seed=seed)
    x = (x - x.mean(0)) / x.std(0)
    labels = np.stack([y if q == 0 else random.permutation(y) for q in range(count)], 1)
    weights = random.uniform(0.2, 3, (N, count)) * (np.arange(N)[:, None] % 3 != np.arange(count) % 3)
    return tensor(x), torch.from_numpy(labels), tensor(weights)


def solve(x, labels, weights, penalties, classes, tol: float = 1e-11) -> Logistic:
    return solve_logistic(x, labels, weights, penalties, classes, tol=tol, max_steps=500)


def logits_of(found: Logistic, x: torch.Tensor) -> torch.Tensor:
    """`[strength, problem, row, logit]`, less their mean over classes where there are several."""
    logits = torch.einsum("nd,spkd->spnk", x, found.weight) + found.bias[:, :, None]
    return logits if logits.shape[-1] == 1 else logits - logits.mean(-1, keepdim=True)


@pytest.mark.parametrize("classes", [2, 4])
def test_all_at_once_is_each_alone(classes):
    x, labels, weights = problems(classes)
    strengths = torch.tensor([0.1, 1.0, 30.0], dtype=torch.float64)
    penalties = strengths[:, None, None] * torch.linspace(0.5, 2, 3 * D, dtype=torch.float64).reshape(1, 3, D)
    together = logits_of(solve(x, labels, weights, penalties, classes), x)
    assert together.shape[:2] == (3, 3)
    for s in range(3):
        for p in range(3):
            some = slice(p, p + 1)
            alone = solve(x, labels[:, some], weights[:, some], penalties[s : s + 1, some], classes)
            torch.testing.assert_close(together[s, p], logits_of(alone, x)[0, 0], rtol=0, atol=1e-7)


@pytest.mark.parametrize("classes", [2, 4])
def test_the_gradient_of_what_is_stated_is_zero_by_autograd(classes):
    x, labels, weights = problems(classes)
    penalties = torch.tensor([0.3, 5.0], dtype=torch.float64)[:, None, None] * torch.ones(2, 3, D, dtype=torch.float64)
    found = solve(x, labels, weights, penalties, classes)
    weight, bias = found.weight.requires_grad_(), found.bias.requires_grad_()
    logits = torch.einsum("nd,spkd->nspk", x, weight) + bias
    logits = torch.cat([torch.zeros_like(logits), logits], -1) if classes == 2 else logits
    own = labels[:, None, :, None].expand(*logits.shape[:3], 1)
    losses = -logits.log_softmax(-1).gather(-1, own)[..., 0] * weights[:, None]
    loss = losses.sum() + (penalties[:, :, None] * weight.square()).sum() / 2
    slopes = torch.autograd.grad(loss, [weight, bias])
    mean = torch.maximum(slopes[0].abs().amax((2, 3)), slopes[1].abs().amax(2)) / weights.sum(0)
    assert float(mean.max()) < 1e-10
    assert float(found.gradient.max()) <= 1e-11, "and it says so itself"
    assert found.steps < 100


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 1000), classes=st.integers(2, 3))
def test_rows_of_weight_0_are_not_there(seed, classes):
    """Whatever their labels and numbers are."""
    x, labels, weights = problems(classes, 1, seed)
    kept = weights[:, 0] > 0
    penalties = torch.ones(1, 1, D, dtype=torch.float64)
    without = logits_of(solve(x[kept], labels[kept], weights[kept], penalties, classes), x[kept])
    wild, other = x.clone(), labels.clone()
    wild[~kept] *= 50
    other[~kept] = (other[~kept] + 1) % classes
    found = logits_of(solve(wild, other, weights, penalties, classes), x[kept])
    torch.testing.assert_close(found, without, rtol=0, atol=1e-7)


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("decades", [1, 2])
def test_rows_of_any_scale_have_the_same_solution(classes, decades):
    """A column 10 times as large with a penalty 100 times as large is the same problem."""
    x, labels, weights = problems(classes)
    penalties = torch.full((2, 3, D), 2.0, dtype=torch.float64)
    scale = torch.logspace(-decades, decades, D, dtype=torch.float64)
    one = logits_of(solve(x, labels, weights, penalties, classes), x)
    found = solve(x * scale, labels, weights, penalties * scale.square(), classes, tol=1e-10)
    assert found.steps < 500
    # The gradient by a column a hundredth as large is a hundredth of what the tolerance is meant for
    torch.testing.assert_close(logits_of(found, x * scale), one, rtol=0, atol=1e-6 * 10.0**decades)


def test_weights_are_counts():
    x, labels, _ = problems(2, 1)
    counts = torch.from_numpy(np.random.default_rng(0).integers(0, 4, N))
    penalties = torch.ones(1, 1, D, dtype=torch.float64)
    one = logits_of(solve(x, labels, counts[:, None].double(), penalties, 2), x)
    rows = torch.repeat_interleave(torch.arange(N), counts)
    other = solve(x[rows], labels[rows], torch.ones(len(rows), 1, dtype=torch.float64), penalties, 2)
    torch.testing.assert_close(one, logits_of(other, x), rtol=0, atol=1e-7)


@pytest.mark.parametrize("strength", [1e-6, 1e6])
def test_strengths_at_the_far_ends_are_solved(strength):
    x, labels, weights = problems(3, 1)
    found = solve(x, labels, weights, torch.full((1, 1, D), strength, dtype=torch.float64), 3, tol=1e-8)
    assert found.steps < 500
    if strength > 1:  # all that is left are the shares of the classes
        shares = torch.stack([weights[labels == i].sum() for i in range(3)]) / weights.sum()
        torch.testing.assert_close(logits_of(found, x)[0, 0].softmax(-1), shares.expand(N, 3), rtol=0, atol=1e-4)


@pytest.mark.parametrize("standardize", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_massive_column_does_not_spoil_the_others(standardize, dtype):
    """As the states of a language model have them: one column ten thousand times as large, far from zero."""
    x, y = blobs(400, 8, seed=3)
    x = (x - x.mean(0)) / x.std(0)
    massive = x.copy()
    massive[:, 2] = 1e4 * (x[:, 2] + 3)
    probe = LogisticProbe(0.1, tol=1e-5, standardize=standardize).fit(tensor(massive, dtype), y)
    assert int(probe.n_iter_[0]) < 300
    if standardize:
        wanted = LogisticProbe(0.1, tol=1e-10).fit(x, y).predict_log_proba(x)
    else:  # a column so large is as good as not penalised, and its coefficient as small
        wanted = LogisticProbe(0.1, tol=1e-10, standardize=False).fit(massive, y).predict_log_proba(massive)
    # Losses of some thousandths of a nat: of raw rows, a gradient of 1e-5 leaves that much open along small columns
    found = probe.predict_log_proba(tensor(massive, dtype))
    np.testing.assert_allclose(found, wanted, atol=3e-3)
    assert log_loss(found, y).mean() == pytest.approx(log_loss(wanted, y).mean(), abs=1e-5)


def test_problems_too_many_for_memory_are_solved_one_after_another(monkeypatch):
    x, y = blobs(120, 4, 3)
    whole = LogisticProbe(tol=1e-9).fit(x, y)
    monkeypatch.setattr("probes.estimators.logistic.AT_ONCE", 1)
    parts = LogisticProbe(tol=1e-9).fit(x, y)
    assert parts.C_ == whole.C_
    close(parts.coef_, whole.coef_, 1e-9)


def test_it_stops_where_it_is_told_and_says_how_far_it_came():
    x, labels, weights = problems(2)
    penalties = torch.full((1, 3, D), 1e-3, dtype=torch.float64)
    few = solve_logistic(x, labels, weights, penalties, 2, tol=1e-12, max_steps=2)
    assert few.steps == 2
    assert float(few.gradient.min()) > 1e-12
    assert int(LogisticProbe(1.0, tol=1e-9).fit(x, labels[:, 0]).n_iter_[0]) < 60
