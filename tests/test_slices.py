"""What is computed of a latent in slices, to save memory, is what is computed of it at once."""

import pytest
import torch
from torch.testing import assert_close

from scripts.layers.gaussian import Posterior, kl_divergence, log_ratio, standard_deviation


def latent(with_prior: bool) -> Posterior:
    generator = torch.Generator().manual_seed(0)
    tensors = torch.rand(5, 2, 3, 6, 5, 4, generator=generator) + 0.1
    tensors = [t.contiguous(memory_format=torch.channels_last_3d) for t in tensors]
    return Posterior(*tensors) if with_prior else Posterior(*tensors[:3])


@pytest.mark.parametrize("with_prior", [True, False])
def test_slices_add_up(with_prior):
    q = latent(with_prior)
    whole = kl_divergence(q), log_ratio(q)
    with torch.no_grad():
        sliced = kl_divergence(q, most=50), log_ratio(q, most=50)
    assert_close(sliced, whole)


@pytest.mark.parametrize("form", ["sigmoid", "exp"])
def test_standard_deviations_are_the_same_without_gradients(form):
    s = torch.linspace(-4, 4, 9)
    expected = standard_deviation(s, (0.1, 1.0), form)
    with torch.no_grad():
        assert torch.equal(standard_deviation(s, (0.1, 1.0), form), expected)
    assert torch.equal(s, torch.linspace(-4, 4, 9))
