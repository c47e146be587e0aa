"""The objective, against torch's own distributions."""

import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch.distributions import Normal

from scripts.networks import VDVAEOutput
from scripts.training.losses import ELBOLoss, WeightPenalty, bits_per_dim, discretised_nll, negative_log_likelihood


def prediction(*shape, latents=3):
    generator = torch.Generator().manual_seed(0)
    loc, target = torch.randn(2, *shape, generator=generator)
    scale = torch.rand(shape, generator=generator) + 0.01
    return VDVAEOutput(loc, scale, torch.rand(shape[0], latents, generator=generator)), target


SHAPES = [(2, 1, 4, 4, 4), (1, 2, 3, 4, 5), (3, 1, 8, 8)]


@pytest.mark.parametrize("shape", SHAPES)
def test_negative_log_likelihood_is_that_of_torch(shape):
    output, target = prediction(*shape)
    expected = -Normal(output.loc, output.scale).log_prob(target).flatten(1).sum(1)
    found = negative_log_likelihood(output.loc, output.scale, target)
    assert found.shape == shape[:1]
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_negative_log_likelihood_is_computed_in_fp32(dtype):
    loc, scale, target = (torch.full((1, 1, 64, 64), v, dtype=dtype) for v in (0.0, 0.5, 1.0))
    found = negative_log_likelihood(loc, scale, target)
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(64 * 64 * (2 + math.log(0.5) + 0.5 * math.log(2 * math.pi)), rel=1e-5)


@torch.no_grad()
def test_without_gradients_nats_are_summed_in_double_precision():
    scan = torch.rand(1, 1, 128, 128, 128)
    found = negative_log_likelihood(torch.zeros(()).expand_as(scan), torch.ones(()).expand_as(scan), scan)
    exact = float((0.5 * scan.double().square()).sum()) + scan.numel() * 0.5 * math.log(2 * math.pi)
    assert float(found) == pytest.approx(exact, abs=0.1)  # fp32 has steps of a quarter there


@pytest.mark.parametrize("levels", [2, 256, 4096])
def test_the_probabilities_of_all_rounded_values_sum_to_one(levels):
    values = torch.linspace(-1, 1, levels).reshape(-1, 1, 1)
    for loc, scale in [(0.1, 0.3), (-1.5, 0.01), (1.0, 5.0), (0.003, 1e-3)]:
        nats = discretised_nll(torch.full_like(values, loc), torch.full_like(values, scale), values, (-1, 1), levels)
        assert nats.min() >= 0 and nats.isfinite().all()
        assert float(torch.exp(-nats).sum()) == pytest.approx(1, abs=1e-4)


def test_the_probability_of_a_rounded_value_is_its_bins_mass():
    x = torch.tensor([-1.0, -0.9999, -0.2, 0.002, 0.31, 0.98, 1.0])
    loc, scale = torch.tensor([0.4]), torch.tensor([0.07])
    bins = ((x.double() + 1) * 127.5).round()
    low, high = (bins - 0.5) / 127.5 - 1, (bins + 0.5) / 127.5 - 1
    low[bins == 0], high[bins == 255] = -math.inf, math.inf
    normal = stats.norm(0.4, 0.07)
    # the upper tail as the mirrored lower one, which has the digits
    mass = np.where(low > 0.4, normal.sf(low) - normal.sf(high), normal.cdf(high) - normal.cdf(low))
    found = [float(discretised_nll(loc[None, None], scale[None, None], v.reshape(1, 1, 1), (-1, 1))) for v in x]
    np.testing.assert_allclose(found, -np.log(mass), rtol=1e-4)


def test_a_constant_background_costs_next_to_nothing():
    scan = torch.full((1, 1, 8, 8, 8), -1.0)
    density = negative_log_likelihood(scan, torch.full_like(scan, 1e-3), scan)
    rounded = discretised_nll(scan, torch.full_like(scan, 1e-3), scan, (-1, 1))
    assert float(density) < -3000 and 0 <= float(rounded.sum()) < 0.1


@pytest.mark.parametrize("shape", SHAPES)
def test_bits_per_dim(shape):
    voxels = math.prod(shape[1:])
    nats = torch.full((shape[0],), voxels * math.log(2))
    torch.testing.assert_close(bits_per_dim(nats, torch.zeros(shape)), torch.ones(shape[0]))
    # a uniform guess over 256 values costs 8 bits
    assert bits_per_dim(torch.tensor(voxels * math.log(256)), torch.zeros(shape)).item() == pytest.approx(8)


def test_weight_penalty_is_the_mean_square_of_each_weight_and_of_no_bias():
    weight, matrix = torch.full((2, 3, 1, 1, 1), 2.0), torch.tensor([[1.0, 3.0]])
    bias, alpha = torch.full((7,), 100.0), torch.tensor(100.0)
    assert WeightPenalty([weight, bias, matrix, alpha], 0.5).value().item() == pytest.approx(0.5 * (4.0 + 5.0))


def test_weight_penalty_has_a_gradient():
    weight, other, bias = (torch.full(shape, 3.0, requires_grad=True) for shape in ((2, 2), (1, 3), (2,)))
    weight.sum().backward()
    WeightPenalty([weight, other, bias], 0.5).add_gradient()
    torch.testing.assert_close(weight.grad, torch.full((2, 2), 1 + 0.5 * 2 * 3.0 / 4))
    torch.testing.assert_close(other.grad, torch.full((1, 3), 0.5 * 2 * 3.0 / 3))
    assert bias.grad is None


BETAS = [(0, 0, 1.0), (0, 100, 1.0), (10, 0, 0.0), (10, 5, 0.5), (10, 10, 1.0), (10, 1000, 1.0)]


@pytest.mark.parametrize(("kl_warmup", "update", "beta"), BETAS)
def test_elbo_weighs_the_kl_by_beta(kl_warmup, update, beta):
    output, target = prediction(2, 1, 4, 4, 4)
    loss = ELBOLoss(kl_warmup)
    assert loss.beta(update) == pytest.approx(beta)
    found, nll = loss(output, target, loss.beta(update))
    torch.testing.assert_close(nll, negative_log_likelihood(output.loc, output.scale, target))
    torch.testing.assert_close(found, (nll + beta * output.kl.sum(1)).mean())
    assert found.shape == ()


def test_a_negative_warmup_is_refused():
    with pytest.raises(ValueError, match="kl_warmup is -1"):
        ELBOLoss(-1)
