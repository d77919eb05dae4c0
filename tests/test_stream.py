"""Batches of real tokens, with the values of single rows, whatever the corpus's length and however memory runs out."""

import json
import logging
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import tiny_model
from hypothesis import given
from hypothesis import strategies as st

import workbench as wb
from workbench.corpus.corpus import STRATA, Row
from workbench.errors import LayerOutOfRange, NotFinite, OutOfMemory, UnknownOption, UnknownSite
from workbench.model import Batch
from workbench.streaming import stream as module
from workbench.streaming.batches import batched
from workbench.streaming.plan import Plan, shown_bytes, shown_seconds

WORDS = "a dog saw two cats and went home, where nobody was; so it slept until the sun came up again".split()  # noqa: SIM905
TEXTS = [" ".join(WORDS[i : i + n]) for i, n in enumerate([3, 17, 1, 9, 2, 14, 5, 1, 7, 11, 4, 6])] + ["x", "", "yz"]
SITES = ["resid_post.1", "mlp_post.0", "resid_pre.0"]


def streamed(model, corpus=TEXTS, sites=SITES, *, batch_tokens=100, **options):
    return wb.stream(model, corpus, sites, batch_tokens=batch_tokens, progress=False, **options)


def joined(batches):
    """Tensors and tokens of all batches, in the order of rows and positions."""
    batches = list(batches)
    table = pd.concat([batch.table for batch in batches], ignore_index=True)
    order = table.sort_values(["row", "pos"], kind="stable").index.to_numpy().copy()
    tensors = {site: torch.cat([batch[site] for batch in batches])[torch.from_numpy(order)] for site in batches[0]}
    return tensors, table.loc[order].reset_index(drop=True)


def the_same(one, other):
    one, other = list(one), list(other)
    assert [batch.index for batch in one] == [batch.index for batch in other]
    for a, b in zip(one, other, strict=True):
        for site in a:
            assert torch.equal(a[site], b[site]), site
        for name in a.tokens._fields:
            assert np.array_equal(getattr(a.tokens, name), getattr(b.tokens, name)), name


class ShortOfMemory:
    """An edit that changes nothing, but has no memory for more tokens than this at once."""

    def __init__(self, tokens, error=torch.OutOfMemoryError, healthy=0):
        self.tokens, self.error, self.healthy = tokens, error, healthy
        self.passes, self.failures = 0, 0

    def __call__(self, value):
        self.passes += 1
        if self.passes > self.healthy and value.shape[0] * value.shape[1] > self.tokens:
            self.failures += 1
            raise self.error("no memory is left")
        return value

    def in_(self, model):
        return wb.intervene(model, wb.replace("resid_pre.0", self))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("family", "sites"),
    [
        ("llama", ["embed", "resid_post", "q.1", "k_rot.1", "z.2", "result.0", "mlp_post", "ln_final"]),
        ("lfm2", ["resid_post", "mlp_post.0", "z.1"]),  # its first layer mixes neighbouring tokens by a convolution
        ("qwen2_moe", ["router_logits.1", "resid_post.2", "mlp_post.0"]),
        ("bloom", ["resid_post", "v.0"]),  # positions by distance, and no context
        ("gptj", ["attn_out.1", "resid_post.2"]),
    ],
)
def test_values_are_those_of_single_rows(family, sites, packed):
    model = tiny_model(family, check=False)
    corpus = wb.Corpus(TEXTS, length=20, packed=packed)
    stream = streamed(model, corpus, sites)
    tensors, table = joined(stream)
    assert list(tensors) == [str(site) for site in stream.sites]
    done = 0
    for row in corpus.rows(model):
        tokens = torch.from_numpy(row.tokens).long()[None]
        alone = wb.capture(model, Batch(tokens, torch.ones_like(tokens, dtype=torch.bool)), sites)
        of_row = slice(done, done + len(row))
        for site, values in tensors.items():
            # The width of a batch decides in which order sums are taken; values reach some tens.
            torch.testing.assert_close(values[of_row], alone[site][0], rtol=1e-4, atol=1e-4)
            assert values.shape[1:] == stream.shape(wb.Site.parse(site, model.n_layers))
        assert table["token_id"][of_row].tolist() == row.tokens.tolist()
        assert set(table["row"][of_row]) == {row.index}
        done += len(row)
    assert done == len(table)
    assert stream.bytes_per_token * done == sum(values.nbytes for values in tensors.values())


@pytest.mark.parametrize("bos", ["tokenizer", "row"])
@pytest.mark.parametrize("packed", [False, True])
def test_each_real_token_comes_once(llama, packed, bos):
    corpus = wb.Corpus(TEXTS, length=8, packed=packed, bos=bos)
    _, table = joined(streamed(llama, corpus, batch_tokens=30))
    rows = list(corpus.rows(llama))
    assert list(zip(table["row"], table["pos"], strict=True)) == [(row.index, i) for row in rows for i in range(len(row))]
    for name, of_row in (("token_id", "tokens"), ("document", "documents"), ("offset", "offsets")):
        assert table[name].tolist() == np.concatenate([getattr(row, of_row) for row in rows]).tolist()
    assert table["document_id"].tolist() == table["document"].astype(str).tolist()
    assert table["token"].tolist() == [llama.token_strings[i] for i in table["token_id"]]


def test_a_stream_gives_the_same_each_time(llama):
    stream = streamed(llama)
    the_same(stream, stream)
    the_same(stream, streamed(llama))


def test_batches_from_one_on_are_those_of_the_whole(llama):
    stream = streamed(llama, batch_tokens=40)
    whole = list(stream)
    assert len(whole) > 4
    for start in (1, 3, len(whole), len(whole) + 5):
        the_same(stream.batches(start), whole[start:])
    before = np.cumsum([0, *(batch.tokens.n for batch in whole)]).tolist()
    for token in (0, 1, before[1] - 1, before[1], before[3] + 1, before[-1] - 1):
        batch, inside = next(stream.after(token, before[-1]))
        assert before[batch.index] + inside == token
        assert inside < batch.tokens.n
    assert not list(stream.after(before[-1], before[-1]))


@given(lengths=st.lists(st.integers(1, 12), min_size=1, max_size=40), budget=st.integers(1, 30), window=st.integers(1, 15))
def test_batches_keep_the_budget_and_their_window(lengths, budget, window):
    empty = np.zeros(0, np.int32)
    rows = [Row(i, np.zeros(n, np.int32), empty, empty, {}) for i, n in enumerate(lengths)]
    batches = list(batched(iter(rows), budget, window))
    assert sorted(row.index for batch in batches for row in batch) == list(range(len(rows)))
    for batch in batches:
        assert len(batch) * len(batch[0]) <= budget or len(batch) == 1
        assert len({row.index // window for row in batch}) == 1
        sizes = [len(row) for row in batch]
        assert sizes == sorted(sizes, reverse=True)
    windows = [batch[0].index // window for batch in batches]
    assert windows == sorted(windows)


def test_a_row_longer_than_the_budget_is_a_batch_by_itself(llama):
    sizes = [batch.tokens.n for batch in streamed(llama, batch_tokens=1)]
    assert sorted(sizes) == sorted(len(row) for row in wb.Corpus(TEXTS).rows(llama))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_kept_has_the_dtype_asked_for(llama, dtype):
    whole, kept = joined(streamed(llama))[0], joined(streamed(llama, dtype=dtype))[0]
    for site in kept:
        assert torch.equal(kept[site], whole[site].to(dtype))
    assert streamed(llama, dtype=dtype).bytes_per_token == (32 + 48 + 32) * dtype.itemsize


def test_a_batch_is_asked_by_any_spelling(llama):
    batch = next(iter(streamed(llama, sites=["blocks.1.hook_resid_post", "layers_output[0]", "mlp_post.-1"])))
    assert list(batch) == ["resid_post.1", "resid_post.0", "mlp_post.2"]
    assert batch["resid_post.-2"] is batch["blocks.1.hook_resid_post"] is batch["resid_post.1"]
    assert re.fullmatch(r"TokenBatch\(\d+ tokens, resid_post\.1, resid_post\.0, mlp_post\.2\)", repr(batch))
    assert len(batch) == 3


def test_the_plan_is_what_comes(llama):
    stream = streamed(llama)
    plan, batches = stream.plan(), list(stream)
    count = wb.Corpus(TEXTS).count(llama)
    assert (plan.rows, plan.tokens, plan.tokens_hash) == (count.rows, count.tokens, count.tokens_hash)
    assert plan.documents == len(TEXTS)
    assert plan.batches == len(batches)
    assert plan.tokens == sum(batch.tokens.n for batch in batches)
    assert plan.bytes == sum(values.nbytes for batch in batches for values in batch.values())
    given = sum(batch.tokens.pos.max() + 1 for batch in batches for _ in set(batch.tokens.row.tolist()))
    assert plan.padding == round(1 - plan.tokens / given, 4) > 0
    assert plan.peak_bytes is not None
    assert plan.peak_bytes > 1e8
    assert plan.seconds >= 0
    assert stream.state.median_norm is not None  # from the batches, not from the plan
    assert streamed(llama).plan()._replace(seconds=0, peak_bytes=0) == plan._replace(seconds=0, peak_bytes=0)
    assert streamed(llama, wb.Corpus(["ab" * 32] * 4)).plan().padding == 0


def test_a_plan_in_words():
    plan = Plan(3, 4, 5_000, "", 0.25, 7, 1_500_000_000, 400, 2_000_000)
    assert str(plan) == (
        "3 documents, 4 rows, 5,000 tokens in 7 batches (25.0% padding); keeps 1.5 GB; about 6.67 min (12 tokens/s); "
        "peak memory 2 MB"
    )
    assert str(plan._replace(peak_bytes=None)).endswith("peak memory unknown")
    assert [shown_bytes(n) for n in (0, 999, 1000, 2.5e12)] == ["0 B", "999 B", "1 kB", "2.5 TB"]
    assert [shown_seconds(n) for n in (0.5, 99, 600, 36_000)] == ["0.5 s", "99 s", "10 min", "10 h"]


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, MemoryError])
def test_when_memory_runs_out_the_batch_is_halved_and_so_are_those_after_it(llama, error, caplog):
    corpus = wb.Corpus(TEXTS, length=20)
    whole = streamed(llama, corpus)
    tensors, table = joined(whole)
    memory = ShortOfMemory(60, error, healthy=1)
    stream = streamed(llama, corpus)
    with memory.in_(llama), caplog.at_level(logging.WARNING):
        found, halved = list(stream), stream.state
    assert memory.failures == 1
    (limit,) = halved.limits
    assert (limit.batch, limit.row) == (1, 0)
    assert limit.tokens <= 50
    assert f"Memory ran out in batch 1: from here on {limit.tokens} tokens at once" in caplog.text
    assert Counter(batch.index for batch in found)[1] > 1
    kept, again = joined(found)
    pd.testing.assert_frame_equal(again, table)
    for site in kept:
        torch.testing.assert_close(kept[site], tensors[site], rtol=1e-4, atol=1e-4)
    assert found[0].tokens.n == next(iter(whole)).tokens.n
    # Another stream that is told repeats it exactly, and no memory runs out.
    memory = ShortOfMemory(60, error, healthy=1)
    told = module.StreamState.from_json(json.loads(json.dumps(halved.to_json())))
    assert told == halved
    with memory.in_(llama):
        the_same(streamed(llama, corpus, state=told), found)
    assert memory.failures == 0
    the_same(streamed(llama, corpus, state=told), found)
    the_same(stream, found)


def test_memory_may_run_out_several_times_in_one_batch(llama):
    memory = ShortOfMemory(20)
    stream = streamed(llama, wb.Corpus(["ab" * 5] * 9), batch_tokens=90)
    with memory.in_(llama):
        found = list(stream)
    assert memory.failures == 2
    assert stream.state.limits == [(0, 0, 45), (0, 0, 20)]
    assert [batch.tokens.n for batch in found] == [20, 20, 20, 20, 10]
    the_same(streamed(llama, wb.Corpus(["ab" * 5] * 9), batch_tokens=90, state=stream.state), found)


def test_the_cpus_own_words_for_it_are_understood(llama):
    full = "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to"
    memory, corpus = ShortOfMemory(60, lambda _: RuntimeError(full)), wb.Corpus(TEXTS, length=20)
    with memory.in_(llama):
        assert len(joined(streamed(llama, corpus))[1]) == corpus.count(llama).tokens
    assert memory.failures


def test_a_single_row_that_does_not_fit_ends_it(llama):
    message = (
        r"Memory ran out with a single row of \d+ tokens and 3 sites\. Give the corpus a shorter length, ask for fewer sites, "
        "or load the model in a smaller dtype"
    )
    with ShortOfMemory(10).in_(llama), pytest.raises(OutOfMemory, match=message):
        list(streamed(llama))
    assert not wb.tracer.is_edited(llama)


def test_another_error_is_not_taken_for_it(llama):
    stream = streamed(llama)
    with ShortOfMemory(0, RuntimeError).in_(llama), pytest.raises(RuntimeError, match="no memory is left"):
        list(stream)
    assert stream.state.limits == []


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf")])
def test_what_is_no_number_is_named(llama, wrong):
    def spoil(value):
        value = value.clone()
        value[-1, 0, 3] = wrong
        return value

    with wb.intervene(llama, wb.replace("mlp_out.1", spoil)):
        list(streamed(llama, sites=["resid_post.0", "mlp_post.1"], massive_at=None))
        with pytest.raises(NotFinite, match=r"^resid_post\.1 holds \d+ values that are NaN or infinite, in torch\.float32"):
            list(streamed(llama, sites=["resid_post.0", "resid_post.1", "resid_post.2"]))


def test_what_a_dtype_cannot_hold_is_named_and_a_sum_that_it_cannot_is_not(llama):
    def large(value):
        return torch.full_like(value, 60_000.0)

    def larger(value):
        return torch.full_like(value, 70_000.0)

    with wb.intervene(llama, wb.replace("resid_post.1", large)):
        assert joined(streamed(llama, sites="resid_post.1", dtype=torch.float16))[0]["resid_post.1"].isfinite().all()
    with (
        wb.intervene(llama, wb.replace("resid_post.1", larger)),
        pytest.raises(
            NotFinite,
            match=r"in torch\.float16, the first at position 0 of row 1, in document 1\. Keep it in a dtype of wider range",
        ),
    ):
        list(streamed(llama, sites="resid_post.1", dtype=torch.float16))


def test_a_norm_that_is_no_number_tells_no_massive_tokens(llama):
    with wb.intervene(llama, wb.replace("resid_post.1", lambda value: value * float("nan"))):
        with pytest.raises(NotFinite, match=r"^resid_post\.1 holds NaN or infinity, .*Name another site with massive_at"):
            list(streamed(llama, sites=["resid_post.0"]))
        assert len(list(streamed(llama, sites=["resid_post.0"], massive_at="resid_post.0")))


def test_padding_is_never_looked_at(llama):
    """Rows beside a longer one: what stands in the padding may be anything."""

    def spoil(value):
        value = value.clone()
        value[1:, 5:] = float("nan")
        return value

    with wb.intervene(llama, wb.replace("resid_post.2", spoil)):
        tensors, _ = joined(streamed(llama, ["ab" * 10, "abcde", "ab"], "resid_post.2"))
    assert tensors["resid_post.2"].isfinite().all()


def test_massive_tokens_are_those_of_ten_times_the_median_norm(smollm):
    """The first token of a text is a sink of norm 20,000 among 160; here a later one is given its state."""
    texts = [" ".join(WORDS), "the first token is where attention rests, and so on"]

    def another_sink(value):
        value = value.clone()
        value[0, 9] = value[0, 0]
        return value

    with wb.intervene(smollm, wb.replace("resid_post.12", another_sink)):
        stream = streamed(smollm, texts, ["resid_post.15"])
        tensors, table = joined(stream)
        later = joined(streamed(smollm, texts, ["resid_post.3"], massive_at="resid_post.3"))[1]
        none = joined(streamed(smollm, texts, ["resid_post.15"], massive_at=None))[1]
    norms = tensors["resid_post.15"].norm(dim=1).numpy()
    median = np.median(norms[table["pos"] >= 4])
    assert stream.state.median_norm == pytest.approx(median)
    assert norms[table["pos"] == 0].min() > 50 * median
    massive = table["stratum"] == "massive"
    assert list(zip(table["row"][massive], table["pos"][massive], strict=True)) == [(0, 9)]
    assert ((norms > 10 * median) == (massive | (table["pos"] == 0))).all()
    assert set(table["stratum"][table["pos"] == 0]) == {"first"}
    assert set(table["stratum"][table["pos"].between(1, 3)]) == {"early"}
    for other in (later, none):
        assert "massive" not in set(other["stratum"])
    assert list(table["stratum"].cat.categories) == list(STRATA)


def test_the_site_of_the_norm_need_not_be_asked_for(llama):
    one, other = (joined(streamed(llama, sites=sites))[1] for sites in (["resid_post.0"], ["resid_post.1", "resid_post.0"]))
    pd.testing.assert_frame_equal(one, other)
    batch = next(iter(streamed(llama, sites=["resid_post.0"])))
    assert list(batch) == ["resid_post.0"]


@pytest.mark.parametrize(
    ("sites", "options", "error", "text"),
    [
        ([], {}, UnknownSite, r"No site was asked for\. Name some, such as 'resid_post\.3'"),
        ("pattern.1", {}, UnknownSite, r"Site 'pattern\.1' holds pairs of tokens, of another width in every batch"),
        ("resid_post.0", {"massive_at": "attn_scores.1"}, UnknownSite, "holds pairs of tokens"),
        ("resid_post.0", {"massive_at": "resid_post"}, UnknownSite, "names 3 sites where one is wanted"),
        ("resid_post.0", {"massive_at": "router_logits.1"}, UnknownSite, "router_logits"),
        ("resid_post.7", {}, LayerOutOfRange, "do not lie in this model of 3 layers"),
        ("nowhere.1", {}, UnknownSite, r"Site 'nowhere\.1' does not exist"),
    ],
)  # fmt: skip
def test_sites_are_looked_at_before_anything_runs(llama, sites, options, error, text):
    with pytest.raises(error, match=text):
        wb.stream(llama, TEXTS, sites, **options)


def test_a_budget_below_one_token_is_refused(llama):
    with pytest.raises(UnknownOption, match=r"batch_tokens=0, window=1024: both must be 1 or more"):
        list(streamed(llama, batch_tokens=0))


def test_progress_is_counted_in_tokens(llama, capsys):
    stream = wb.stream(llama, TEXTS, "resid_post.0", batch_tokens=100)
    total = wb.Corpus(TEXTS).count(llama).tokens
    list(stream)
    shown = capsys.readouterr().err
    assert "stream: 100%" in shown
    assert f"{total}/{total}" in shown
    list(streamed(llama))
    assert capsys.readouterr().err == ""


def test_settings_are_all_that_decides_what_comes(llama):
    found = streamed(llama, dtype=torch.bfloat16).settings
    assert found == wb.Corpus(TEXTS).settings | {
        "row_length": 64, "sites": SITES, "batch_tokens": 100, "window": 1024, "kept_dtype": "bfloat16",
        "massive_at": "resid_post.1",
    }  # fmt: skip
    assert json.loads(json.dumps(found)) == found


@pytest.mark.slow
def test_memory_does_not_depend_on_the_corpuss_length():
    """Peaks of processes of their own; one that keeps what it is given shows that more would be seen."""
    script = Path(__file__).with_name("peak_memory.py")
    done = subprocess.run([sys.executable, script, "--tokens", "30000"], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    print(found)
    once, ten_times, kept = (found[name] for name in ("once_bytes", "ten_times_bytes", "ten_times_kept_bytes"))
    assert ten_times - once < 20e6  # what the allocator keeps differs by some megabytes from run to run
    assert kept - once > 200e6
