"""The effects of covariates on many quantities at once, from sums over scans, without what is noise in them."""

from __future__ import annotations

from collections.abc import Sequence

import ignite.distributed as idist
import torch
from torch import Tensor

__all__ = ["Effects", "shrunk_mean"]


class Effects:
    """A linear regression of quantities on the features that covariates become.

    A cohort tells the effect of a feature on 100,000 quantities only with noise, which a counterfactual would add to a
    scan. So each effect is shrunk as a whole, by the share of its size that is noise (James and Stein 1961, positive
    part; over the quantities). An effect that is no larger than noise is left out. Each covariate's features are shrunk
    given all others, so that it does not matter in which order covariates are named; among themselves in the basis in
    which they are uncorrelated given the others: first the straight line of age, then its bends.

    Args:
        features: how many they are.
        covariates: which features belong to each covariate; None: all to one.
    """

    def __init__(self, features: int, covariates: Sequence[slice] | None = None) -> None:
        self.covariates = [slice(0, features)] if covariates is None else list(covariates)
        self.gram = torch.zeros(features + 1, features + 1, dtype=torch.float64)
        self.moments, self.squares = torch.zeros(()), torch.zeros(())
        self.shape: tuple[int, ...] = ()

    def add(self, features: Tensor, values: Tensor) -> None:
        """Take in some scans.

        Args:
            features: ``[batch, features]``, of mean 0 over the cohort.
            values: the quantities, ``[batch, ...]``.
        """
        design = torch.cat([torch.ones(len(features), 1), features], dim=1)
        self.shape, flat = tuple(values.shape[1:]), values.flatten(1)
        self.gram += design.double().T @ design.double()
        self.moments = self.moments + design.T @ flat
        self.squares = self.squares + flat.square().sum(0)

    def fit(self) -> Tensor:
        """The effects, ``[features, ...]``, from the scans of all processes, which all have to call this."""
        gram, moments, squares = (idist.all_reduce(total) for total in (self.gram, self.moments, self.squares))
        scans = gram[0, 0].item()
        ridge = torch.ones(len(gram), dtype=gram.dtype)  # as strong as one scan, where features cannot be told apart
        ridge[0] = 0
        inverse = torch.linalg.inv(gram + ridge.diag())
        effects = inverse.float() @ moments
        noise = (squares - (effects * moments).sum(0)).clamp_min(0).sum() / max(scans - len(gram), 1.0)
        effects = effects[1:]
        for features in self.covariates:
            # what the scans say of these effects given the others; times its root they are as uncertain as each other
            information = torch.linalg.inv(inverse[1:, 1:][features, features])
            factor = torch.linalg.cholesky(information).float()
            sizes = factor.T @ effects[features]
            kept = (1 - noise / sizes.square().sum(1).clamp_min(1e-12)).clamp_min(0)
            effects[features] = torch.linalg.solve_triangular(factor.T, sizes * kept[:, None], upper=True)
        return effects.unflatten(1, self.shape)


def shrunk_mean(total: Tensor, squares: Tensor, scans: int) -> tuple[Tensor, float]:
    """The mean of quantities over a few scans, shrunk as :class:`Effects` shrinks an effect.

    Args:
        total: the sum over the scans of each quantity.
        squares: that of the squares of all quantities, ``[]``.
        scans: how many, 2 or more.

    Returns:
        the mean, shaped like ``total``, and the share of it that is kept.
    """
    mean = total / scans
    size = mean.square().sum()
    noise = (squares / scans - size).clamp_min(0) / (scans - 1)
    kept = (1 - noise / size.clamp_min(1e-12)).clamp_min(0).item()
    return kept * mean, kept
