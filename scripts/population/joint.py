"""Which covariates go together in a cohort: a Gaussian copula, from which values for samples are drawn."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from scripts.data.covariates import Categorical, CovariateCoding, Value
from torch import Tensor

LEAST_EIGENVALUE = 1e-3
LEAST_SHARE = 1e-4


def correlation_of(coding: CovariateCoding, gram: Tensor, known: Tensor) -> Tensor:
    """The correlation of the normal variables behind covariates, ``[covariates, covariates]``, by the sums over the
    cohort of products of the features that they become, ``[features, features]``, and of how many scans each two of
    them are known, ``[covariates, covariates]``.

    A category stands for an interval of a normal variable (polyserial correlation, Olsson et al. 1982), so that sums
    over the cohort suffice.
    """
    rows = torch.zeros(len(coding.variables), coding.size, dtype=torch.float64)
    attenuation = torch.ones(len(rows), dtype=torch.float64)
    for row, (name, variable) in enumerate(coding.variables.items()):
        own = coding.slices()[name]
        if not isinstance(variable, Categorical):
            rows[row, own.start] = 1.0  # the value itself; the others are the bends of its spline
            continue
        scores = _interval_means(variable)
        rows[row, own] = scores[1:] - scores[0]
        shares = torch.tensor(variable.shares, dtype=torch.float64)
        attenuation[row] = (shares * scores.square()).sum().sqrt().clamp_min(1e-6)
    counts = known.double().diag()
    share = known.double() / (counts[:, None] * counts).sqrt().clamp_min(1)  # of the scans that know either
    covariance = rows @ gram.double() @ rows.T / share.clamp_min(1e-12)
    std = covariance.diag().clamp_min(1e-12).sqrt() * attenuation
    correlation = (covariance / std[:, None] / std).clamp(-1, 1).fill_diagonal_(1.0)
    values, vectors = torch.linalg.eigh(correlation)
    correlation = vectors * values.clamp_min(LEAST_EIGENVALUE) @ vectors.T
    std = correlation.diag().sqrt()
    return (correlation / std[:, None] / std).float()


def draw_values(
    coding: CovariateCoding, correlation: Tensor | None, given: Mapping[str, Value], normals: Tensor
) -> list[dict[str, Value]]:
    """Values of all covariates, those that are not given drawn as the cohort has them beside the given ones.

    Args:
        coding: of the covariates.
        correlation: see :func:`correlation_of`; None: each is independent of the others.
        given: some values by name; None: not known, and not drawn.
        normals: independent draws from N(0, 1), ``[count, covariates]``.
    """
    names = sorted(coding.variables, key=lambda name: given.get(name) is None)  # the known ones first
    places = [list(coding.variables).index(name) for name in names]
    correlation = torch.eye(len(names)) if correlation is None else correlation.cpu()
    factor = torch.linalg.cholesky(correlation[places][:, places].double())
    people = []
    for row in normals.double().cpu():
        independent, person = row.clone(), dict[str, Value]()
        for i, name in enumerate(names):
            variable, before = coding.variables[name], factor[i, :i] @ independent[:i]
            if name not in given:
                person[name] = variable.quantile(torch.special.ndtr(before + factor[i, i] * row[i]).item())
                continue
            person[name] = given[name]
            if given[name] is not None:
                low, high = variable.interval(given[name])
                share = (low + (high - low) * torch.special.ndtr(row[i])).clamp(LEAST_SHARE, 1 - LEAST_SHARE)
                independent[i] = (torch.special.ndtri(share) - before) / factor[i, i]
        people.append(person)
    return people


def _interval_means(variable: Categorical) -> Tensor:
    """The mean of a normal variable over the interval that stands for each category, 0 of one that nobody has."""
    edges = torch.tensor([variable.interval(category) for category in variable.categories], dtype=torch.float64)
    shares, density = edges.diff(dim=1)[:, 0], (-torch.special.ndtri(edges).square() / 2).exp() / math.tau**0.5
    return torch.where(shares > 0, -density.diff(dim=1)[:, 0] / shares.clamp_min(1e-12), 0.0)
