"""What covariates change, without what is noise."""

from __future__ import annotations

import torch

from scripts.training.covariate_effects import Effects


def fitted(features: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    effects = Effects(features.shape[1])
    for part in range(0, len(features), 7):
        effects.add(features[part : part + 7], values[part : part + 7])
    return effects.fit()


def test_effects_without_noise_are_found_as_they_are():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(500, 3, generator=generator)
    features[:, 1] += 2 * features[:, 0]  # as a spline's bends go with its line
    true = torch.randn(3, 4, 5, generator=generator)
    found = fitted(features - features.mean(0), torch.einsum("sn,nab->sab", features, true) + 3)
    torch.testing.assert_close(found, true, rtol=0.02, atol=0.02)


def test_noise_is_no_effect():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(60, 4, generator=generator)
    features -= features.mean(0)
    true = torch.zeros(4, 1000)
    true[0] = 0.3 * torch.randn(1000, generator=generator)
    values = features @ true + torch.randn(60, 1000, generator=generator)
    found = fitted(features, values)
    plain = torch.linalg.lstsq(features, values - values.mean(0)).solution
    assert (found - true).square().mean() < 0.4 * (plain - true).square().mean()
    assert (found[1:].abs().amax(1) < 0.3).all() and (found[0] @ true[0]) / true[0].square().sum() > 0.7


def test_covariates_that_say_the_same_are_no_trouble():
    features = torch.tensor([[-1.0, -1.0], [1.0, 1.0]]).repeat(20, 1)
    found = fitted(features, 2 * features)
    assert found.isfinite().all()
    torch.testing.assert_close(features @ found, 2 * features, rtol=0.1, atol=0.1)
