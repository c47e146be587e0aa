"""Mixed precision casts all weights at once, and computes what autocast computes."""

from __future__ import annotations

import pytest
import torch
from test_trainer import loader, tiny
from torch.testing import assert_close

from scripts.training.precision import LowPrecision, autocast


@pytest.mark.parametrize("arguments", [{}, {"shared": True}, {"batch_norm": True, "rezero": True}])
def test_weights_that_are_cast_at_once_compute_the_same(arguments):
    network = tiny(**arguments)
    scans = loader(2).dataset.data[0]["image"][None]
    found = []
    for low_precision in (None, LowPrecision(network)):
        network.zero_grad()
        torch.manual_seed(0)
        with autocast(torch.device("cpu"), True, torch.bfloat16):
            output = (network if low_precision is None else low_precision.cast())(scans)
        (output.loc.float().square().sum() + output.kl.sum()).backward()
        found.append((output, [p.grad for p in network.parameters()]))
    assert_close(found[1][0], found[0][0], rtol=0.0, atol=0.0)
    # where blocks share their weights, gradients of the uses are added in bfloat16
    tolerance = 0.02 if "shared" in arguments else 0.0
    assert_close(found[1][1], found[0][1], rtol=tolerance, atol=tolerance)
    assert LowPrecision(network).cast() is network  # autocast is off
