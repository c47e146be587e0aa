"""Measures of samples, on samples of which the answer is known."""

from __future__ import annotations

import pytest
import torch

from benchmarks.sample_quality import nearest_training, precision_recall, spectrum


@pytest.fixture(scope="module")
def cohort():
    """A low-rank cohort: training, held-out, and a function that draws more."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(30, 64, generator=generator) / torch.arange(1, 31)[:, None] ** 0.5

    def draw(count: int, spread: float = 1.0) -> torch.Tensor:
        return (spread * torch.randn(count, 30, generator=generator) @ directions).reshape(count, 1, 4, 4, 4)

    return draw(400), draw(300), draw


BANDS = ((0, 5), (5, 20))


def test_the_spectrum_of_scans_is_one_and_of_half_the_spread_a_quarter(cohort):
    training, scans, draw = cohort
    assert list(spectrum(draw(300), scans, training, BANDS).values()) == pytest.approx([1, 1], abs=0.25)
    assert list(spectrum(draw(300, 0.5), scans, training, BANDS).values()) == pytest.approx([0.25, 0.25], abs=0.07)
    assert list(spectrum(draw(300), scans, training, (*BANDS, (20, 500)))) == ["1-5", "6-20"]


def test_precision_falls_with_too_much_spread_and_recall_with_too_little(cohort):
    _, scans, draw = cohort
    precision, recall = precision_recall(draw(300), scans)
    narrow, wide = precision_recall(draw(300, 0.4), scans), precision_recall(draw(300, 2.5), scans)
    assert min(precision, recall) > 0.5
    assert narrow[0] > precision and narrow[1] < 0.5 * recall
    assert wide[0] < 0.5 * precision and wide[1] > recall


def test_copies_are_seen(cohort):
    training, scans, draw = cohort
    assert nearest_training(draw(300), scans, training) == pytest.approx(1, abs=0.1)
    copies = training[:300] + 0.01 * draw(300)
    assert nearest_training(copies, scans, training) < 0.1
