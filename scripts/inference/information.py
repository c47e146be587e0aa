"""How much scans say of covariates, in bits: within one model, so that it is no less than 0 and no more than they hold.

The likelihoods of two models, of which one is told the age, differ by more than the age: by all that either gets wrong.
Here there is one, of which it is asked how much likelier a scan is under its own covariates than on average,
``log2 p(x | c) - log2 p(x)`` with ``p(x) = mean over c of p(x | c)``, c as often as these people have it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from scripts.data.covariates import Value
from scripts.inference.measures import Numbers, mean_interval
from scripts.population.fit import SHARPNESSES
from scripts.population.prior import PopulationPrior
from torch import Tensor

__all__ = ["information"]

# what the log likelihood is multiplied by, beside the prior's own sharpness; 0, so that nothing is said, is the last
# resort of a model that is wrong
TEMPERED = (0.0, *SHARPNESSES)
SHUFFLES = 200

Row = Mapping[str, Value]


def information(prior: PopulationPrior, scores: Tensor, rows: Sequence[Row], seed: int = 0) -> Numbers:
    """What scans say of each covariate while the others are not known, and of all covariates together.

    For each, ``NAME_information``, bits per scan with the interval of :func:`mean_interval`; ``_most``, the entropy of
    the covariate among these people, which no model exceeds; and ``_shuffled_95``, the 95th percentile of what is found
    when the values are dealt out among the scans at random. All together are ``covariates_information``.

    The likelihood is tempered as best for these scans, by one number for each covariate. It can be 0, so that the mean
    lies between 0 and the entropy whatever the model. But for that choice, which favours by less than a bit over the
    number of scans, the mean falls short of the mutual information of scan and covariate and does not exceed it (van
    den Oord et al. 2018, Poole et al. 2019).

    Args:
        prior: with covariates.
        scores: of the scans, ``[scans, features]``, see :meth:`PopulationPrior.effect_scores`.
        rows: their covariates; a scan counts for those that are known.
        seed: of the shuffles.
    """
    names, found = list(prior.coding.variables), {}
    for about in [[name] for name in names] + ([names] if len(names) > 1 else []):
        known = [place for place, row in enumerate(rows) if all(row[name] is not None for name in about)]
        if len(known) > 1:
            likelihoods, own = _likelihoods(prior, scores[known], [rows[place] for place in known], about)
            found |= _gains(about[0] if len(about) == 1 else "covariates", likelihoods, own, seed)
    return found


def _likelihoods(
    prior: PopulationPrior, scores: Tensor, rows: Sequence[Row], about: Sequence[str]
) -> tuple[Tensor, list[int]]:
    """The log likelihood of each scan under each value that occurs, tempered by each of ``TEMPERED``.

    Covariates that it is not about are averaged over, as these people have them.

    Returns:
        ``[sharpnesses, scans, values]``, each but for a number of the scan's own; and the place of each scan's value.
    """
    coding = prior.coding
    others = [name for name in coding.variables if name not in about]
    values, rest = (_occurring(rows, names) for names in (about, others))
    features = torch.stack(
        [coding.numbers(dict(zip((*about, *others), (*v, *r), strict=True))) for v in values for r in rest]
    )
    logs = prior.covariate_likelihoods(scores.to(prior.information), features).double().cpu()
    logs = logs.reshape(len(scores), len(values), len(rest))
    shares = torch.tensor(list(rest.values()), dtype=torch.float64).log() - np.log(len(rows))
    tempered = torch.stack([(sharpness * logs + shares).logsumexp(2) for sharpness in TEMPERED])
    places = {value: place for place, value in enumerate(values)}
    return tempered, [places[tuple(row[name] for name in about)] for row in rows]


def _occurring(rows: Sequence[Row], names: Sequence[str]) -> Counter[tuple[Value, ...]]:
    """The combinations of values that occur, and how often."""
    return Counter(tuple(row[name] for name in names) for row in rows)


def _gains(name: str, likelihoods: Tensor, own: Sequence[int], seed: int) -> Numbers:
    """How much likelier scans are under their own values than on average, by the best of the sharpnesses."""
    places = torch.tensor(own)
    shares = torch.bincount(places).double() / len(own)
    gains = (likelihoods - (likelihoods + shares.log()).logsumexp(2, keepdim=True)) / np.log(2)
    generator = torch.Generator().manual_seed(seed)

    def of(order: Tensor) -> Tensor:
        """``[sharpnesses, scans]``, with the value of another scan for each."""
        return gains.gather(2, places[order].expand(len(gains), -1)[..., None])[..., 0]

    real = of(torch.arange(len(own)))
    shuffled = [of(torch.randperm(len(own), generator=generator)).mean(1).max().item() for _ in range(SHUFFLES)]
    return mean_interval(f"{name}_information", real[real.mean(1).argmax()].numpy()) | {
        f"{name}_information_most": float(-(shares * shares.log2()).sum()),
        f"{name}_information_shuffled_95": float(np.quantile(shuffled, 0.95)),
    }
