"""Frozen norms: torch's own in closed form, linear away from the state, and refused where there is no such form."""

import pytest
import torch
from torch import nn

from workbench.errors import UnknownNorm
from workbench.frozen_norm import FrozenNorm, frozen_norm

D = 24


def random_norm(kind, generator, dtype=torch.float32):
    norm = kind(D, dtype=dtype)
    for parameter in norm.parameters():
        nn.init.normal_(parameter, 0.5, 1, generator=generator)
    return norm


@pytest.mark.parametrize("massive", [False, True])
@pytest.mark.parametrize("kind", [nn.LayerNorm, nn.RMSNorm])
def test_it_is_torchs_norm_in_closed_form(kind, massive, generator):
    norm = random_norm(kind, generator)
    x = torch.randn(D, generator=generator)
    if massive:  # as a first token's state in a trained model
        x[3] = 2e4
    found = FrozenNorm.of(norm, norm.weight, x)
    assert found.centred == (kind is nn.LayerNorm)
    eps = norm.eps or torch.finfo(torch.float32).eps
    spread = x.double().var(correction=0) if found.centred else x.double().square().mean()
    assert found.scale == pytest.approx(float((spread + eps).rsqrt()), rel=1e-5)
    torch.testing.assert_close(found.bias, norm.bias.detach() if found.centred else torch.zeros(D))
    torch.testing.assert_close(found(x), norm(x).detach(), rtol=1e-5, atol=1e-4 if massive else 1e-5)


@pytest.mark.parametrize("kind", [nn.LayerNorm, nn.RMSNorm])
def test_a_direction_is_pulled_back(kind, generator):
    """As autograd has it, with the statistics detached."""
    norm = random_norm(kind, generator)
    x, h, direction = torch.randn(3, D, generator=generator)
    found = FrozenNorm.of(norm, norm.weight, x)
    torch.testing.assert_close(h @ found.pulled_back(direction), (found(h) - found.bias) @ direction)
    inner = x.clone().requires_grad_()
    mean = inner.mean() if found.centred else 0.0
    length = ((inner - mean).square().mean()).sqrt().detach()
    (((inner - mean) / length * norm.weight) @ direction).backward()
    torch.testing.assert_close(found.pulled_back(direction), inner.grad, rtol=1e-4, atol=1e-5)


def test_a_sum_goes_through_part_by_part(generator):
    norm = random_norm(nn.LayerNorm, generator)
    parts = torch.randn(5, D, generator=generator)
    found = FrozenNorm.of(norm, norm.weight, parts.sum(0))
    through = found(parts) - found.bias
    torch.testing.assert_close(through.sum(0) + found.bias, norm(parts.sum(0)).detach(), rtol=1e-5, atol=1e-5)


def test_half_precision_and_no_gain(generator):
    norm = random_norm(nn.RMSNorm, generator, torch.bfloat16)
    x = torch.randn(D, generator=generator).bfloat16()
    found = FrozenNorm.of(norm, norm.weight, x)
    assert found.gain.dtype == torch.float32
    torch.testing.assert_close(found(x), norm(x).float().detach(), rtol=2e-2, atol=2e-2)
    plain = FrozenNorm.of(lambda h: h / h.norm().clamp_min(1e-9), None, x.float())
    assert plain.scale == pytest.approx(1 / float(x.float().norm()), rel=1e-5)
    assert not plain.centred


@pytest.mark.parametrize(
    "strange",
    [
        lambda h: h.tanh(),  # DyT
        lambda h: h / h.abs().max().clamp_min(1e-9) + 0.01 * h.square(),
        lambda h: (h.unflatten(-1, (2, -1)) / h.unflatten(-1, (2, -1)).norm(dim=-1, keepdim=True).clamp_min(1e-9)).flatten(-2),
        lambda h: h * torch.nan,
    ],
)
def test_other_norms_are_refused(strange, generator):
    with pytest.raises(
        UnknownNorm, match=r"The norm cannot be frozen: .* \(relative error .*, allowed 1e-05\)\. Parts of a sum"
    ):
        FrozenNorm.of(strange, None, torch.randn(D, generator=generator))


def test_every_family_has_norms_that_freeze(tiny, generator):
    x = torch.randn(tiny.d_model, generator=generator)
    paths = [tiny.row.path("ln_final")]
    for layer in range(tiny.n_layers):
        block = tiny.block_row(layer)
        paths += [tiny.row.path(name, layer) for name in (block.ln1, block.ln1_post, block.ln2, block.ln2_post) if name]
    for path in paths:
        torch.testing.assert_close(frozen_norm(tiny, path, x)(x), tiny.module(path)(x).detach(), rtol=1e-5, atol=1e-5)
