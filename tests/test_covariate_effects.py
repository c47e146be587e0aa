"""What covariates change, without what is noise."""

from __future__ import annotations

import pytest
import torch

from scripts.population.effects import Effects, shrunk_mean


def fitted(features: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    effects = Effects(features.shape[1], values.shape[1:])
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


@pytest.mark.parametrize(
    ("scans", "size", "least", "most"), [(50, 0.0, 0, 0.1), (50, 0.1, 0.2, 0.5), (50, 3.0, 0.99, 1), (2, 1.0, 0.6, 0.8)]
)
def test_the_mean_of_a_few_scans_is_shrunk_by_what_is_noise_in_it(scans, size, least, most):
    generator = torch.Generator().manual_seed(0)
    true = size * torch.randn(2000, generator=generator)
    values = true + torch.randn(scans, 2000, generator=generator)
    mean, kept = shrunk_mean(values.sum(0), values.square().sum(), scans)
    assert least <= kept <= most
    assert (mean - true).square().mean() <= (values.mean(0) - true).square().mean()


def test_the_order_of_covariates_does_not_matter_and_what_has_no_effect_gets_none():
    """Age and sex go together, as age and site do in most cohorts; sex alone has an effect."""
    generator = torch.Generator().manual_seed(0)
    sex = torch.randn(200, 1, generator=generator)
    age = 0.6 * sex + 0.8 * torch.randn(200, 1, generator=generator)
    values = sex * torch.randn(5000, generator=generator) + 3 * torch.randn(200, 5000, generator=generator)
    fits = []
    for columns in ((age, sex), (sex, age)):
        effects = Effects(2, [5000], [slice(0, 1), slice(1, 2)])
        effects.add(torch.cat(columns, dim=1), values)
        fits.append(effects.fit())
    torch.testing.assert_close(fits[0], fits[1].flip(0), rtol=1e-4, atol=1e-5)
    of_age, of_sex = fits[0].norm(dim=1)
    assert of_age < 0.05 * of_sex
