"""What is measured of covariates is what it is called."""

from __future__ import annotations

import pytest
import torch

from benchmarks import covariates


def test_a_change_spills_where_a_person_does_not_change():
    scans = torch.zeros(2, 1, 4, 4, 4)
    others, changed = scans.clone(), scans.clone()
    others[:, :, 0] = 0.5
    changed[:, :, 0], changed[:, :, 1:] = 0.4, 0.1
    brain = torch.ones(4, 4, 4, dtype=torch.bool)
    assert covariates.spill(scans, others, changed, brain) == pytest.approx((0.1, 0.4))
    assert covariates.spill(scans, others, others, brain) == pytest.approx((0.0, 0.5))


def test_parts_that_can_be_measured_exist():
    assert all(callable(getattr(covariates.Measurement, part)) for part in covariates.PARTS)
