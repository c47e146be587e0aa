"""The jobs that make a population prior of a cohort, or the sums from which one can be made."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path
from typing import Any

import ignite.distributed as idist
from monai.data import Dataset
from scripts.data.covariate_tables import read_cohort
from scripts.inference.common import Common
from scripts.inference.covariates import need_covariates
from scripts.inference.tables import scans_to_fit
from scripts.networks import VDVAE
from scripts.population.effects import Adaptation
from scripts.population.fit import PopulationFit
from scripts.population.prior import fingerprint
from scripts.population.statistics import StatisticsFit
from scripts.training.checkpoints import read_archive
from scripts.utils import distributed
from scripts.utils.command_line import check_integer
from scripts.utils.errors import InputError

logger = logging.getLogger(__name__)


def fit_prior(
    common: Common,
    factors: int = 64,
    covariates: Any = None,
    memory: float | None = None,
    statistics_only: bool = False,
) -> PopulationFit:
    """A population prior fitted to the cohort, ``population_prior.pt``, for any weights.

    Args:
        factors: how many at most, 1 or more.
        covariates: their kinds by name, such as ``{"age": "continuous"}``; None: none.
        memory: GiB that the fit may take, see :class:`scripts.population.fit.PopulationFit`.
        statistics_only: write the cohort's sums instead, ``statistics.pt``, for :mod:`scripts.merge_priors`.

    Raises:
        ValueError: there would be no factor, or the file exists and was fitted to other weights.
    """
    check_integer("prior_factors", factors, 1)
    _warn_of_amp(common, "fit_prior")
    path = common.output_dir / ("statistics.pt" if statistics_only else "population_prior.pt")
    distributed.from_rank_zero(_keep_others, path, common.network)
    cohort = common.cohort
    fit = partial(StatisticsFit, kinds=covariates) if statistics_only else PopulationFit
    training, validation = distributed.from_rank_zero(scans_to_fit, cohort.folder, cohort.pattern)
    return fit(
        common.network,
        Dataset(training, common.preprocessing),
        Dataset(validation, common.preprocessing),
        path,
        factors,
        **common.loading,
        device=common.device,
        seed=common.seed,
        covariates=read_cohort(training, validation, cohort.folder, covariates, cohort.covariates_file),
        memory=memory,
    )


def _keep_others(path: Path, network: VDVAE) -> None:
    """Refuse to write over what was fitted to other weights."""
    if path.is_file() and read_archive(path).get("weights") not in (None, fingerprint(network)):
        raise InputError(
            f"'{path}' was fitted to other weights: give another --output_dir, and the file the name that belongs to "
            "these weights (population_prior_128.pt beside model_128.pt)."
        )


def adapt(common: Common, covariates: Any, epsilon: float | None = None) -> Adaptation:
    """A population prior that knows one more category, such as a new site: ``population_prior.pt``.

    Args:
        covariates: the new category of a covariate, such as ``{"site": "D"}``.
        epsilon: of differential privacy towards each person; None: none.
    """
    _warn_of_amp(common, "adapt")
    return Adaptation(
        common.network,
        need_covariates(common.prior),
        Dataset(common.cohort.items, common.preprocessing),
        covariates,
        dataset_dir=common.cohort.folder,
        covariates_file=common.cohort.covariates_file,
        path=common.output_dir / "population_prior.pt",
        **common.loading,
        device=common.device,
        epsilon=epsilon,
        seed=common.seed,
    )


def _warn_of_amp(common: Common, job: str) -> None:
    """Say that mixed precision is left out, as in the fit after a training: a prior is made of small differences
    between scans, of which eight bits keep little.
    """
    if common.precision.get("amp") and idist.get_rank() == 0:
        logger.warning("Nothing of '%s' depends on --amp, which changes nothing: it needs single precision.", job)
