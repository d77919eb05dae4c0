"""Factors of gradients against autograd, for every family; and the algebra of two factors against dense matrices."""

import logging

import numpy as np
import pytest
import torch
from conftest import tiny_model
from families import tiny_hf, tiny_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.pytorch_utils import Conv1D

import workbench as wb
from workbench.errors import LengthMismatch, MissingWeight, NoGradient, NotFinite, UnknownOption, UnknownToken
from workbench.gradients.gradient import Gradient
from workbench.gradients.targets import with_targets
from workbench.model import Batch

ROUTED = {"deepseek_v3", "deepseek_v3 full queries", "gpt_oss", "granitemoe", "mixtral", "qwen2_moe", "qwen3_moe"}
"""Their experts' grouped product takes no float64."""


def texts() -> Batch:
    tokens = torch.randint(0, 300, (2, 7), generator=torch.Generator().manual_seed(1))
    mask = torch.ones(2, 7, dtype=torch.bool)
    mask[1, 5:] = False
    return Batch(tokens, mask)


def loss(logits, _):
    log_p = logits.log_softmax(-1)
    return -log_p[0, 6, 5] - log_p[1, 4, 7] - log_p[1, 3, 9]


def in_double(family: str) -> wb.LanguageModel:
    dtype = torch.float32 if family in ROUTED else torch.float64
    return wb.load(tiny_hf(family), tokenizer=tiny_tokenizer(), check=False, dtype=dtype)


def test_factors_multiply_to_autograds_gradient(family):
    model, batch = in_double(family), texts()
    allowed = 1e-5 if family in ROUTED else 1e-12
    found = wb.collect_gradients(model, batch, loss)
    loss(model.forward(batch), batch).backward()
    grads = {name: weight.grad for name, weight in model.hf.named_parameters()}
    seen = set()
    for name, one in found.matrices.items():
        module = model.module(one.path)
        dense = module.weight.grad if isinstance(module, Conv1D) else module.weight.grad.T
        if one.part is not None:
            dense = one.part.cut.take(dense, model.heads)
            dense = dense.flatten(1) if dense.dim() == 3 else dense
        own = found[name]
        assert own.dense().shape == dense.shape
        assert float((own.dense() - dense).norm()) <= allowed * float(dense.norm()), name
        if getattr(module, "bias", None) is not None and (one.part is None or own.D.shape[1] == len(module.bias)):
            assert float((own.bias() - module.bias.grad).norm()) <= allowed * float(module.bias.grad.norm()) + 1e-15, name
        seen.add(f"{one.path}.weight")
    embedding, head = found["W_E"].dense(), found["W_U"].dense().T
    of_embedding = grads[f"{model.row.path('embed')}.weight"]
    parts = {"W_E": (embedding + head, of_embedding)} if model.is_tied else {
        "W_E": (embedding, of_embedding), "W_U": (head, grads[f"{model.row.head}.weight"]),
    }  # fmt: skip
    for name, (own, dense) in parts.items():
        assert float((own - dense).norm()) <= allowed * float(dense.norm()), name
    blocks = f"{model.row.path('layers')}."
    left = {n for n, grad in grads.items() if n.startswith(blocks) and grad is not None and grad.dim() == 2} - seen
    assert all("experts" in name or "norm" in name for name in left), "every matrix of a block but its experts' has factors"
    assert all(weight.requires_grad for weight in model.hf.parameters()), "weights ask for gradients as before"


@pytest.mark.parametrize("family", ["llama", "gpt2", "falcon 7b", "olmo2"])
def test_padding_has_no_gradient_and_texts_add_up(family):
    model, batch = in_double(family), texts()
    both = wb.collect_gradients(model, batch, loss)
    for one in both.matrices.values():
        assert not both.derivatives[one.path][1, 5:].any()
    left = Batch(batch.tokens.roll(2, 1), batch.mask.roll(2, 1))
    left.tokens[0], left.mask[0] = batch.tokens[0], batch.mask[0]
    moved = wb.collect_gradients(model, left, lambda z, _: -z.log_softmax(-1)[1, 6, 7] - z.log_softmax(-1)[1, 5, 9])
    for one in moved.matrices.values():
        assert not moved.derivatives[one.path][1, :2].any()
        second = both[one.name].of_row(1).dense()
        assert float((moved[one.name].dense() - second).norm()) <= 1e-10 * float(second.norm())
    alone = wb.collect_gradients(model, Batch(batch.tokens[:1], batch.mask[:1]), lambda z, _: -z.log_softmax(-1)[0, 6, 5])
    for name in alone.matrices:
        stacked = alone[name].dense() + both[name].of_row(1).dense()
        assert float((both[name].dense() - stacked).norm()) <= 1e-12 * float(stacked.norm())


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "olmo2", "gptj"])
def test_derivatives_at_the_head_and_in_the_last_block(family):
    model = in_double(family)
    wanted = with_targets(model, "hello world", [17])

    def foretold(logits, _):
        return -wanted.log_probabilities(logits).sum()

    found = wb.collect_gradients(model, wanted.batch, foretold, columns=wanted.columns)
    logits = model.forward(wanted.batch)[0, -1]
    p = logits.softmax(-1)
    p[17] -= 1
    cap, scale = model.row.softcap, model.row.logit_scale
    p = p * scale * (1 - (logits / cap) ** 2 if cap else 1)  # of c tanh(z / c): 1 - tanh²
    torch.testing.assert_close(found["W_U"].D[0], p, rtol=1e-9, atol=1e-12)
    last = model.n_layers - 1
    for name in ("W_out", "W_in"):
        own = found[f"{name}.{last}"]
        assert not own.D[:-1].any(), "of the last block, only the last token is read"
        assert own.rank() == 1
    if not model.block_row(last).parallel:
        assert found[f"W_Q.{last}"].rank() == found[f"W_O.{last}"].rank() == 1
    assert found[f"W_V.{last}"].rank() > 1


def drawn(n: int, d_in: int, d_out: int, seed: int) -> Gradient:
    generator = torch.Generator().manual_seed(seed)
    X, D = (torch.randn(n, d, generator=generator, dtype=torch.float64) for d in (d_in, d_out))
    return Gradient("W_in.0", X, D, torch.zeros(n, dtype=torch.long), torch.arange(n))


@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 12), d_in=st.integers(1, 9), d_out=st.integers(1, 9), seed=st.integers(0, 99))
def test_algebra_of_factors_is_that_of_the_dense_matrix(n, d_in, d_out, seed):
    one, other = drawn(n, d_in, d_out, seed), drawn(n + 1, d_in, d_out, seed + 100)
    G = one.dense()
    values, dense = one.singular_values(), torch.linalg.svdvals(G)
    torch.testing.assert_close(values[: len(dense)], dense[: len(values)], rtol=1e-9, atol=1e-10)
    assert one.rank() == int(torch.linalg.matrix_rank(G))
    left, sizes, right = one.svd()
    torch.testing.assert_close(left @ torch.diag(sizes) @ right, G)
    assert one.norm() == pytest.approx(float(G.norm()), rel=1e-9)
    assert one.inner(other) == pytest.approx(float((G * other.dense()).sum()), rel=1e-7, abs=1e-9)
    torch.testing.assert_close(one.step_effect(0.3), one.X @ (-0.3 * G))
    x = other.X
    torch.testing.assert_close(one.step_effect(0.3, x), x @ (-0.3 * G))
    torch.testing.assert_close(one.rows(torch.tensor([0])), G[:1])
    torch.testing.assert_close(one.columns(torch.tensor([0])), G.T[:1])
    single = Gradient("W_in.0", one.X[:1], one.D[:1], one.row[:1], one.pos[:1])
    torch.testing.assert_close(single.imprint(), single.step_effect(1.0))  # of one token the paper's lemma is all there is


def test_targets_stand_where_they_are_foretold(smollm):
    wanted = with_targets(smollm, ["The capital of France is", "Two"], [" Paris, of course", [7, 8]])
    ids = smollm.token_ids(["The capital of France is Paris, of course"])[0]
    assert wanted.token.tolist() == [*ids[5:], 7, 8]
    assert wanted.batch.tokens[0][wanted.batch.mask[0]].tolist() == ids[:-1]
    assert wanted.column.tolist() == [*range(4, len(ids) - 1), 0, 1]
    logits = smollm.forward(wanted.batch)
    kept = smollm.forward(wanted.batch, wanted.columns)
    own = logits.log_softmax(-1)[wanted.row, wanted.column, wanted.token]
    torch.testing.assert_close(wanted.log_probabilities(kept), own, rtol=1e-4, atol=1e-4)
    assert wanted.first().tolist() == [0, len(ids) - 5]
    for seven in (7, torch.tensor(7), torch.tensor([7]), np.int64(7)):
        assert with_targets(smollm, "Two", seven).token.tolist() == [7]


def test_half_precision_is_scaled_and_said_so(caplog):
    whole, half = tiny_model("llama", check=False), tiny_model("llama", check=False, dtype=torch.float16)

    def tiny_loss(logits, _):
        return loss(logits.float(), _) * 1e-6  # derivatives of 1e-8, which float16 does not hold

    right = wb.collect_gradients(whole, texts(), tiny_loss)
    with caplog.at_level(logging.WARNING, logger="workbench"):
        found = wb.collect_gradients(half, texts(), tiny_loss)
    assert "float16 holds no derivative below 6e-8" in caplog.text
    for name in ("W_out.0", "W_Q.1"):
        dense = right[name].dense()
        assert found[name].D.dtype == torch.float32
        assert float((found[name].dense() - dense).norm()) < 0.05 * float(dense.norm())


def test_bad_losses_targets_and_matrices_are_named(llama):
    batch = texts()
    with pytest.raises(NoGradient, match="no single number that depends on the texts"):
        wb.collect_gradients(llama, batch, lambda logits, _: logits.detach().sum())
    with pytest.raises(NoGradient, match=r"shape \[2, 7\]"):
        wb.collect_gradients(llama, batch, lambda logits, _: logits.sum(-1))
    with pytest.raises(NotFinite, match="The loss is inf"):
        wb.collect_gradients(llama, batch, lambda logits, _: logits.sum() / 0)
    with pytest.raises(NoGradient, match=r"0\.5"):
        wb.collect_gradients(llama, batch, lambda logits, _: 0.5)
    free = torch.ones((), requires_grad=True)
    with pytest.raises(NoGradient, match="made of the logits"):
        wb.collect_gradients(llama, batch, lambda logits, _: free * 2)
    with pytest.raises(NoGradient, match="columns that are padding"):
        wb.collect_gradients(llama, batch, lambda logits, _: logits[:, -1, 7].sum())
    with pytest.raises(UnknownOption, match="has no tokens"):
        with_targets(llama, "hello", "")
    with pytest.raises(UnknownOption, match="has no tokens"):
        with_targets(llama, ["hello"], [[]])
    with pytest.raises(UnknownToken, match="outside the vocabulary"):
        with_targets(llama, "hello", 300)
    with pytest.raises(LengthMismatch, match="2 prompts and 1 targets"):
        with_targets(llama, ["a", "b"], ["c"])
    with pytest.raises(MissingWeight, match="No matrix is called 'W_X'"):
        wb.collect_gradients(llama, batch, loss, matrices=["W_X"])
    with pytest.raises(MissingWeight, match="not gated"):
        wb.collect_gradients(tiny_model("gpt2", check=False), batch, loss, matrices=["W_gate"])
    with pytest.raises(MissingWeight, match="It is a mixture of 4 experts: ask for one of them"):
        wb.collect_gradients(tiny_model("mixtral", check=False), batch, loss, matrices=["W_out"])
    with pytest.raises(MissingWeight, match="It is a mixture of 4 experts"):  # layer 0 alone is dense
        wb.collect_gradients(tiny_model("qwen2_moe", check=False), batch, loss, matrices=["W_out"])
    found = wb.collect_gradients(llama, batch, loss, layers="1", matrices=["W_out"])
    assert list(found) == ["W_out.1", "W_E", "W_U"]
    with pytest.raises(KeyError, match=r"W_out\.0 has no gradient here"):
        found["W_out.0"]


def test_half_precision_keeps_the_rank_of_its_tokens():
    model = tiny_model("llama", check=False, dtype=torch.bfloat16)
    found = wb.collect_gradients(model, texts(), lambda logits, _: loss(logits.float(), _))
    assert found["W_out.0"].of_row(0).rank() == 7


def test_weights_of_inference_mode_are_named():
    model = tiny_model("llama", check=False)
    with torch.inference_mode():
        for module in model.hf.modules():
            for name, weight in module._parameters.items():
                if weight is not None:
                    module._parameters[name] = torch.nn.Parameter(weight.clone(), requires_grad=False)
    with pytest.raises(NoGradient, match="was loaded, or is run, in torch"):
        wb.collect_gradients(model, texts(), loss)


def test_a_model_that_cannot_leave_columns_out_has_the_same_gradients(llama, monkeypatch):
    batch, columns = texts(), torch.tensor([3, 4])
    log_p = lambda logits, _: -logits[0, 0].log_softmax(-1)[5] - logits[1, 1].log_softmax(-1)[7]  # noqa: E731
    right = wb.collect_gradients(llama, batch, log_p, columns=columns)
    monkeypatch.setattr(llama.hf, "hf_device_map", {"": "cpu"}, raising=False)  # as if it were spread over devices
    found = wb.collect_gradients(llama, batch, log_p, columns=columns)
    for name in ("W_U", "W_out.0"):
        torch.testing.assert_close(found[name].dense(), right[name].dense())
        assert found[name].pos.tolist() == right[name].pos.tolist()
