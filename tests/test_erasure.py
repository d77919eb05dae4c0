"""What is left of a concept after erasers: on rows in which it was planted, against scikit-learn and numpy."""

from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier

import probes
from probes.evaluation.leaks import Half
from workbench.errors import BadArtifact, BadDataset, TooFewExamples, UnknownOption


def planted(
    n: int = 400, d: int = 12, shares: tuple[float, ...] = (0.6, 0.4), *, apart: float = 2.0, wider: float = 1.0, seed: int = 0
) -> tuple[dict[str, torch.Tensor], probes.Dataset]:
    """Correlated rows, two a group, whose classes differ in their means along a column each but the first, the last class so
    many times as wide. Shares are exact where they and n are multiples of a twentieth and 40."""
    random = np.random.default_rng(seed)
    y = np.repeat(np.searchsorted(np.cumsum(shares), (random.permutation(n // 2) % 20 + 0.5) / 20), 2)
    noise = random.normal(size=(n, d)) * np.where(y == len(shares) - 1, wider, 1.0)[:, None]
    rows = (noise + apart * np.eye(len(shares), d)[y] * (y > 0)[:, None]) @ (np.eye(d) + 0.3 * random.normal(size=(d, d)))
    names = np.array(["a", "b", "c", "d"])[y]
    groups = [f"g{i // 2}" for i in range(n)]
    return {"resid_post.1": torch.from_numpy(rows)}, probes.Dataset(None, names, groups=groups, name="planted")


def erased(rows: dict[str, torch.Tensor], dataset: probes.Dataset, *erasers: Any, **options: Any) -> probes.Erasure:
    chosen: dict[str, Any] = {"mlp": False, "progress": False} | options
    return probes.erase(rows, dataset, erasers=erasers, **chosen)


@pytest.fixture(scope="module")
def both() -> probes.Erasure:
    """Two sites, of which the second has more to say."""
    rows, dataset = planted()
    more, _ = planted(apart=4.0)
    return erased(
        rows | {"resid_post.2": more["resid_post.1"]},
        dataset,
        "leace",
        "mean",
        probes.INLP(directions=5, patience=1),
        "random",
        "shuffled",
    )


@pytest.fixture(scope="module")
def halves() -> tuple[probes.Dataset, list[Half]]:
    rows, dataset = planted()
    return dataset, Half.two(rows["resid_post.1"], dataset.index, dataset.groups[:, 0], 0)


def at(result: probes.Erasure, eraser: str, site: str = "resid_post.1") -> pd.Series:
    return result.table.set_index(["site", "eraser"]).loc[(site, eraser)]


def test_half_of_the_groups_is_seen_and_the_other_is_fresh(halves):
    dataset, (one, two) = halves
    assert sorted([*one.at, *two.at]) == list(range(len(dataset)))
    assert not set(one.groups_seen) & set(one.groups_fresh)
    np.testing.assert_array_equal(two.groups_seen, one.groups_fresh)
    assert torch.equal(two.seen, one.fresh)


def test_after_a_guard_a_linear_probe_of_the_rows_it_was_fitted_to_does_as_well_as_the_commonest_class(both, halves):
    """Exactly: there is nothing to learn, so that it always answers the same. scikit-learn agrees."""
    dataset, (half, _) = halves
    chance = np.bincount(dataset.index).max() / len(dataset)
    assert both.settings["chance"] == chance
    for site in ("resid_post.1", "resid_post.2"):
        assert at(both, "none", site)["linear"] > chance + 0.1
        for eraser in ("leace", "mean"):
            assert at(both, eraser, site)["linear"] == pytest.approx(chance, abs=1e-12)
            assert at(both, eraser, site)["gap_seen"] < 1e-12
        assert at(both, "random", site)["linear"] > chance + 0.1
        assert at(both, "shuffled", site)["linear"] > chance + 0.1, "LEACE of labels that are not there"
    left = probes.LEACE().fit(half.seen, half.index_seen).transform(half.seen)
    found = LogisticRegression(C=1e6, tol=1e-12, solver="newton-cholesky").fit(left, half.index_seen)
    assert np.abs(found.coef_).max() < 1e-8


@pytest.mark.parametrize("classes", [2, 4])
def test_a_concept_of_known_rank_takes_as_many_dimensions(classes):
    rows, dataset = planted(400, 10, (1 / classes,) * classes, apart=4.0)
    found = erased(rows, dataset, "leace", "mean", "sal", "random")
    assert list(found.table["eraser"]) == ["none", "leace", "mean", "sal", "random"]
    assert list(found.table["rank"]) == [0] + 4 * [classes - 1]
    assert at(found, "leace")["edit"] < at(found, "mean")["edit"], "LEACE moves rows least"
    assert at(found, "none")["edit"] == 0
    assert at(found, "none")["gap_seen"] == at(found, "none")["gap_fresh"] == 1
    assert at(found, "leace")["gap_fresh"] < 0.2
    assert "Class means are equal in the rows of the fit after leace, mean, sal" in str(found)
    assert len(found.settings["concept"]["resid_post.1"]["correlations"]) == classes - 1


def test_neighbours_are_those_of_scikit_learn(both, halves):
    """Of other groups: here those of one row's own group are taken away by hand."""
    dataset, two = halves
    fresh, seen = np.empty(len(dataset)), np.empty(len(dataset))
    for half, other in zip(two, two[::-1], strict=True):
        knn = KNeighborsClassifier(5).fit(half.seen.float(), half.index_seen)
        fresh[half.at] = knn.predict(half.fresh.float()) == half.index_fresh
        _, near = knn.kneighbors(half.seen.float(), 7)
        for row, around in enumerate(near):
            others = [one for one in around if half.groups_seen[one] != half.groups_seen[row]][:5]
            seen[other.at[row]] = (half.index_seen[others].mean() > 0.5) == half.index_seen[row]
    assert at(both, "none")["neighbours"] == pytest.approx(fresh.mean())
    assert at(both, "none")["neighbours_seen"] == pytest.approx(seen.mean())


def test_what_is_paid_is_the_share_of_the_variance_that_changed(both, halves):
    _, two = halves
    shares, gaps = [], []
    for half in two:
        seen, fresh = half.seen.numpy(), half.fresh.numpy()
        towards = seen[half.index_seen == 1].mean(0) - seen[half.index_seen == 0].mean(0)
        towards /= np.linalg.norm(towards)
        moved = ((fresh - seen.mean(0)) @ towards) ** 2
        shares.append(moved.sum() / ((fresh - seen.mean(0)) ** 2).sum())
        apart = fresh[half.index_fresh == 1].mean(0) - fresh[half.index_fresh == 0].mean(0)
        gaps.append(np.linalg.norm(apart - apart @ towards * towards) / np.linalg.norm(apart))
    assert at(both, "mean")["edit"] == pytest.approx(np.mean(shares), rel=1e-9)
    assert at(both, "mean")["gap_fresh"] == pytest.approx(np.mean(gaps), rel=1e-9)


def test_intervals_hold_their_scores(both):
    for column in ("linear", "linear_fresh", "neighbours", "neighbours_seen"):
        assert (both.table[f"{column}_low"] <= both.table[column]).all()
        assert (both.table[column] <= both.table[f"{column}_high"]).all()
    assert not {"mlp", "main_accuracy"} & set(both.table)


def test_of_labels_that_say_nothing_nothing_is_found_and_nothing_removed():
    rows, dataset = planted()
    dealt = probes.Dataset(
        None, np.random.default_rng(5).permutation(dataset.labels), groups=dataset.groups[:, 0], name="dealt"
    )
    found = erased(rows, dealt, "leace", "mean", "random")
    for column in ("linear", "linear_fresh"):
        assert (found.table[f"{column}_low"] <= found.settings["chance"] + 1e-9).all()
    assert found.erasers["resid_post.1/leace"].rank == 0
    assert "1 of the concept's 1 independent parts correlate with the states no more than chance" in str(found)


def test_a_rare_class_that_is_not_significant_is_said_to_be_left_alone():
    """A third class of twelve rows in 400, which stand where the first class's do."""
    random = np.random.default_rng(0)
    y = np.arange(400) % 2
    x = random.normal(size=(400, 8)) + 3 * y[:, None] * np.eye(1, 8)
    y[10:130:10] = 2
    dataset = probes.Dataset(None, np.array(["a", "b", "rare"])[y], name="rare")
    found = erased({"x": torch.from_numpy(x)}, dataset, "leace", "random")
    assert at(found, "leace", "x")["rank"] == 1
    assert found.eraser("leace").rank == 1
    concept = found.settings["concept"]["x"]
    assert [c > least for c, least in zip(concept["correlations"], concept["chance"], strict=True)] == [True, False]
    assert "1 of the concept's 2 independent parts correlate with the states no more than" in " ".join(str(found).split())
    everything = erased({"x": torch.from_numpy(x)}, dataset, probes.LEACE(tolerance=0.0))
    assert at(everything, "leace", "x")["rank"] == 2


def test_more_columns_than_rows_are_guarded_and_said_to_be_untested():
    rows, dataset = planted(80, 100)
    found = erased(rows, dataset, "leace", "mean", "random")
    assert at(found, "leace")["linear"] == at(found, "mean")["linear"] == pytest.approx(found.settings["chance"])
    assert at(found, "leace")["rank"] == 1
    assert np.isfinite(found.table.select_dtypes("number")).all(axis=None)
    assert "There are too few rows to tell the concept from chance, so all that correlates was erased." in str(found)


def test_rows_that_avoid_their_own_class_are_seen_to_do_so():
    """In many columns, rows whose class means were made equal lie nearer to the other class: each balances the rest of its own
    (arXiv 2403.16142). Fresh rows do not."""
    random = np.random.default_rng(0)
    y = np.arange(80) % 2
    x = torch.from_numpy(random.normal(size=(80, 400)))
    found = erased({"x": x}, probes.Dataset(None, y), probes.LEACE(tolerance=0.0), probes.MeanProjection(tolerance=0.0))
    assert at(found, "mean", "x")["neighbours_seen_high"] < 0.4 < at(found, "none", "x")["neighbours_seen_high"]
    assert at(found, "mean", "x")["neighbours_high"] > 0.45
    assert "(anti-clustering)" in str(found)
    assert "anti-clustering" not in str(erased(*planted(), "leace"))


def test_a_network_finds_what_no_linear_probe_does():
    """One class is five times as wide: its mean can be moved, its spread stays. (With as many of each class, a probe that has
    nothing to go by would answer by rounding.)"""
    rows, dataset = planted(400, 4, (0.6, 0.4), apart=2.0, wider=5.0)
    found = erased(rows, dataset, probes.LEACE(tolerance=0.0), mlp=True)
    row = at(found, "leace")
    assert row["linear"] == pytest.approx(0.6)
    assert min(row["mlp"], row["mlp_fresh"]) > 0.75
    assert "A network with one hidden layer still finds it after leace" in str(found)


def test_what_a_main_task_pays_and_whom_it_treats_more_alike():
    """A task whose classes go mostly together with the concept's, and are seen by a column of their own. A probe of it leans on
    the concept as long as that is there: by scikit-learn as well."""
    random = np.random.default_rng(0)
    z = np.arange(800) % 2
    main = np.where(random.random(800) < 0.85, z, 1 - z)
    x = random.normal(size=(800, 6))
    x[:, 0] += 3 * z
    x[:, 1] += 1.5 * main
    rows, dataset = {"x": torch.from_numpy(x)}, probes.Dataset(None, z, name="gender")
    found = erased(rows, dataset, "leace", "random", main=np.array(["nurse", "surgeon"])[main])
    before, after = at(found, "none", "x"), at(found, "leace", "x")
    assert before["tpr_gap"] > after["tpr_gap"] + 0.05
    assert before["main_accuracy"] > after["main_accuracy"] > 0.5
    accuracy, gaps = [], []
    for half, other in zip(*(two := Half.two(rows["x"], z, dataset.groups[:, 0], 0), two[::-1]), strict=True):
        right = LogisticRegression().fit(half.seen, main[other.at]).predict(half.fresh) == main[half.at]
        accuracy.append(right.mean())
        own = [[right[(main[half.at] == c) & (z[half.at] == i)].mean() for i in (0, 1)] for c in (0, 1)]
        gaps.append(np.sqrt(np.mean([(a - b) ** 2 for a, b in own])))
    assert before["main_accuracy"] == pytest.approx(np.mean(accuracy), abs=0.02)
    assert before["tpr_gap"] == pytest.approx(np.mean(gaps), abs=0.03)
    with pytest.raises(BadDataset, match="3 labels of the main task were given for 800 examples"):
        erased(rows, dataset, "leace", main=[1, 2, 3])


def test_accuracy_by_rank_begins_untouched_and_falls_with_inlp_alone(both):
    curve = both.curve[both.curve["site"] == "resid_post.2"]
    inlp, random = (curve[curve["eraser"] == name].set_index("rank")["linear"] for name in ("inlp", "random"))
    assert inlp[0] == random[0] == pytest.approx(at(both, "none", "resid_post.2")["linear"], abs=5e-3)
    assert list(inlp.index) == list(random.index)
    assert inlp.index.max() >= at(both, "inlp", "resid_post.2")["rank"] > 1
    assert inlp.iloc[-1] < inlp[0] - 0.1
    assert random.iloc[-1] > inlp.iloc[-1] + 0.1


def test_random_subspaces_are_as_large_as_the_first_eraser():
    rows, dataset = planted(shares=(0.4, 0.3, 0.3))
    found = erased(rows, dataset, "random", "mean")
    assert at(found, "random")["rank"] == at(found, "mean")["rank"] == 2


def test_rows_before_and_after_lie_in_one_plane(both):
    points = both.points
    assert list(points["eraser"].unique()) == ["none", "leace", "mean", "inlp", "random"]
    by_kind = points.groupby(["eraser", "label"])["first"].mean().unstack()
    apart = by_kind["b"] - by_kind["a"]
    assert apart["none"] > 1
    assert abs(apart["leace"]) < 0.3 * apart["none"], "rows that it was not fitted to"
    assert np.ptp(points.loc[points["eraser"] == "mean", "first"]) < 1e-5, "all that lay along the difference is gone"


def test_it_is_saved_and_read_whole(both, tmp_path):
    both.save(tmp_path / "found")
    again = probes.Erasure.load(tmp_path / "found")
    assert str(again) == str(both)
    for name in ("table", "curve", "points"):
        pd.testing.assert_frame_equal(getattr(again, name), getattr(both, name), check_dtype=False)
    rows = torch.randn(5, 12, dtype=torch.float64)
    assert set(again.erasers) == {f"resid_post.{i}/{name}" for i in (1, 2) for name in ("leace", "mean", "inlp", "random")}
    for name, eraser in both.erasers.items():
        for part in ("center_", "read_", "write_"):
            assert torch.equal(getattr(again.erasers[name], part), getattr(eraser, part))
        torch.testing.assert_close(again.erasers[name].transform(rows), eraser.transform(rows))
        assert again.erasers[name].settings_["site"] == name.partition("/")[0]
    with pytest.raises(BadArtifact, match=r"run\.json"):
        probes.Erasure.load(tmp_path)
    (tmp_path / "found" / "erasers.safetensors").unlink()
    with pytest.raises(BadArtifact, match="missing or damaged"):
        probes.Erasure.load(tmp_path / "found")


def test_without_curve_and_points_it_is_read_as_well(tmp_path):
    found = erased(*planted(), "sal")
    found.save(tmp_path)
    again = probes.Erasure.load(tmp_path)
    assert str(again) == str(found)
    assert not len(again.curve)
    with pytest.raises(
        UnknownOption, match=r"no picture 'curve' of this erasure: inlp was not among the erasers.*'leaks', 'scatter'"
    ):
        again.plot("curve")


def test_pictures_hold_the_numbers_of_the_table(both):
    leaks = both.plot()
    first = next(trace for trace in leaks.data if trace.name == "linear probe")
    np.testing.assert_allclose(first.y, both.table.loc[both.table["site"] == "resid_post.1", "linear"])
    assert any("rank 1" in text for text in leaks.layout.xaxis.ticktext)
    curve = {trace.name for trace in both.plot("curve").data}
    assert curve == {"random subspace", "INLP's first directions"}
    clouds = [trace for trace in both.plot("scatter").data if trace.type == "scattergl"]
    assert sum(len(trace.x) for trace in clouds) == len(both.points)
    with pytest.raises(UnknownOption, match=r"no picture 'map' of this erasure\. Use one of 'leaks', 'curve', 'scatter'"):
        both.plot("map")


def test_erasers_are_of_the_first_half_and_found_by_name(both):
    rows, dataset = planted()
    first, second = dataset.halves(0)
    assert not set(first.groups[:, 0]) & set(second.groups[:, 0])
    own = np.isin(dataset.groups[:, 0], first.groups[:, 0])
    alone = probes.LEACE().fit(rows["resid_post.1"][torch.from_numpy(own)], first.labels)
    torch.testing.assert_close(both.eraser("leace").matrix, alone.matrix, rtol=1e-9, atol=1e-12)
    with pytest.raises(UnknownOption, match=r"no eraser 'resid_post.1/rlace' here. There are resid_post.1/leace"):
        both.eraser("rlace")


def test_two_runs_are_the_same_to_the_last_digit():
    one, two = (erased(*planted(80), "leace", "random", "shuffled", mlp=True) for _ in range(2))
    pd.testing.assert_frame_equal(one.table, two.table, check_exact=True)
    pd.testing.assert_frame_equal(one.points, two.points, check_exact=True)


def test_what_cannot_be_erased_is_named():
    rows, dataset = planted(40)
    numbers = probes.Dataset(None, np.random.default_rng(0).normal(size=40), kind="numbers", name="heights")
    with pytest.raises(BadDataset, match="'heights' has numbers for labels"):
        erased(rows, numbers, "leace")
    with pytest.raises(UnknownOption, match=r"'leace' is asked for twice\. Compare options in two calls"):
        erased(rows, dataset, "leace", probes.LEACE(shrink=False))
    with pytest.raises(UnknownOption, match=r"no eraser 'amnesia'\. Use one of leace"):
        erased(rows, dataset, "amnesia")
    with pytest.raises(UnknownOption, match="A OracleLEACE is no eraser of rows alone"):
        erased(rows, dataset, probes.OracleLEACE())
    with pytest.raises(BadDataset, match=r"Rows of 'x' are 39, 'planted' has 40 examples"):
        erased({"x": torch.zeros(39, 3)}, dataset, "leace")
    lonely = probes.Dataset(None, np.arange(40) % 2, groups=np.where(np.arange(40) % 2, "one", "two"))
    with pytest.raises(TooFewExamples, match="fewest groups has 1"):
        erased(rows, lonely, "leace")


def test_a_models_states_are_erased_at_the_sites_named(llama):
    texts = [f"{'abc'[i % 3] * (2 + i % 5)} {'dog' if i % 2 else 'cat'}" for i in range(60)]
    dataset = probes.Dataset(texts, ["dog", "cat"] * 30, groups=[str(i) for i in range(60)], name="pets")
    found = probes.erase(
        llama, dataset, ["resid_post.0", "resid_post.2"], erasers=["leace", "random"], mlp=False, progress=False
    )
    assert list(dict.fromkeys(found.table["site"])) == ["resid_post.0", "resid_post.2"]
    assert at(found, "none", "resid_post.2")["linear"] > 0.9
    assert at(found, "leace", "resid_post.2")["linear"] < 0.6
    eraser = found.eraser("leace", "resid_post.2")
    eraser.require_model(llama)
    assert eraser.settings_["weights_hash"] == llama.provenance["weights_hash"]
    default = probes.erase(llama, dataset, erasers=["random"], mlp=False, progress=False)
    assert set(default.table["site"]) == {"resid_post.2"}, "two thirds up"
