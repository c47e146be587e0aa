"""Training under the population prior: the KL divergence is taken to a running estimate of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ignite.distributed as idist
import torch
from scripts.layers.gaussian import Posterior
from scripts.networks import VDVAE
from scripts.population.fit import prior_from_sketch, shifts_and_ratios
from scripts.population.prior import PopulationPrior, innovation
from scripts.population.sketch import FactorSketch
from torch import Tensor


class RunningPopulationPrior:
    """A population prior of the last scans that were trained on, which follows the network as it changes.

    Against N(0, I) a step of size v in one direction of the latents costs v² / 2 nats, against a prior that knows the
    direction ½ log(1 + v²): the network learns to take fewer and larger steps, which a prior can draw.

    Args:
        network: in training.
        factors: of the prior.
        window: of about how many scans it is.
        shrinkage: see :meth:`scripts.population.sketch.FactorSketch.factors`.
    """

    def __init__(self, network: VDVAE, factors: int = 32, window: int = 1024, shrinkage: float = 0.5) -> None:
        self.network, self.factors, self.shrinkage = network, factors, shrinkage
        self.sketch = FactorSketch(factors + 16, forgetting=1 - 1 / window)
        self._waiting: list[tuple[Tensor, Tensor]] = []

    def observe(self, posteriors: Sequence[Posterior]) -> None:
        """Keep what a batch says until :meth:`update`."""
        detached = [Posterior(*(part if part is None else part.detach() for part in q)) for q in posteriors]
        self._waiting.append(shifts_and_ratios(detached))

    @torch.no_grad()
    def update(self, take: bool = True) -> None:
        """Take in the batches of an update, those of all processes, or drop those of one that was skipped."""
        for shifts, ratios in self._waiting if take else ():
            self.sketch.add(idist.all_gather(shifts), idist.all_gather(ratios))
        self._waiting = []

    def log_ratio(self, posteriors: Sequence[Posterior]) -> Tensor | None:
        """How much less the KL to this prior is than that to the network's own, ``[batch]``; None at first."""
        if self.sketch.count < 2 * self.factors:
            return None
        with torch.no_grad():
            prior: PopulationPrior = prior_from_sketch(self.sketch, self.factors, self.shrinkage, self.network)
        return prior.log_ratio([innovation(q) for q in posteriors])

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds."""
        return self.sketch.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        device = next(self.network.parameters()).device
        self.sketch.load_state_dict({k: v.to(device) if isinstance(v, Tensor) else v for k, v in state.items()})
