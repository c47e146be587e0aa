"""The Gaussians of the latents: their standard deviations, their noise, and the posterior's distance from the prior.

Without postponed annotations, since TorchScript reads those of a named tuple as they are.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from scripts.utils.errors import InputError
from torch import Tensor

LATENT_STD_RANGE = (1e-3, 1.0)
# values of a scan's latent that are worked on at a time where no gradients are wanted: a latent of 256³ has 336 million
SLICE = 1 << 24


class Posterior(NamedTuple):
    """One latent of a batch, ``z ~ N(mean, std^2)``; each tensor is ``[batch, latent_channels, *grid]``.

    ``prior_mean`` and ``prior_std`` are those of the prior given the latents above; None for the first: N(0, I).
    """

    z: Tensor
    mean: Tensor
    std: Tensor
    prior_mean: Tensor | None = None
    prior_std: Tensor | None = None


def standard_deviation(s: Tensor, bounds: tuple[float, float], form: str) -> Tensor:
    """Map a network's unbounded ``s`` to a standard deviation, in fp32.

    Args:
        s: any shape.
        bounds: ``(lo, hi)``.
        form: ``"sigmoid"``: between lo and hi; ``"exp"``: ``s`` clipped to [lo, hi] is the log-variance.
    """
    lo, hi = bounds
    s = s.float()
    if form != "sigmoid":
        return torch.exp(0.5 * s.clamp(lo, hi))
    # in place where no gradient needs what is overwritten: less memory
    share = torch.sigmoid(s)
    return lo + (hi - lo) * share if torch.is_grad_enabled() else share.mul_(hi - lo).add_(lo)


def draw(mean: Tensor, std: Tensor, temperature: float, sampler: Any = None) -> Tensor:
    """A draw from ``N(mean, (temperature * std)^2)`` by a :class:`LatentSampler`; temperature 0 gives the mean."""
    if temperature == 0:
        return mean
    noise = gaussian_noise(mean, sampler)
    scaled = temperature * std
    return mean + scaled * noise if torch.is_grad_enabled() else scaled.mul_(noise).add_(mean)


def _kl_per_dimension(q: Posterior, floor: float = 0.0) -> Tensor:
    """KL(q || p) of each dimension of a latent in nats, shaped like its mean.

    Args:
        floor: least variance of the prior in the denominator. With one above the square of the least standard
            deviation, as published (1e-5), the result is no KL divergence where the prior is that narrow: it may be
            negative, and the ELBO that it is part of is no bound.
    """
    variance = q.std.square()
    p_mean, p_std = q.prior_mean, q.prior_std
    if p_mean is None or p_std is None:
        return 0.5 * (variance + q.mean.square() - 1) - q.std.log()
    distance = variance + (q.mean - p_mean).square()
    return 0.5 * (distance / p_std.square().clamp_min(floor) - 1) + p_std.log() - q.std.log()


def kl_divergence(q: Posterior, floor: float = 0.0, most: int = SLICE) -> Tensor:
    """KL(q || p) in nats, summed over the latent: ``[batch]``; ``floor`` as in :func:`_kl_per_dimension`.

    Without gradients it is computed of so many values of each scan at a time, ``most``, and summed in double precision.
    """
    # on views in the order of their memory: else the gradients, which begin as one value expanded, are not
    # channels-last, and every operation on them and the convolutions behind copy
    p_mean, p_std = q.prior_mean, q.prior_std
    if p_mean is not None and p_std is not None:
        p_mean, p_std = _memory_order(p_mean), _memory_order(p_std)
    in_order = Posterior(q.z, _memory_order(q.mean), _memory_order(q.std), p_mean, p_std)
    if torch.is_grad_enabled():
        return _kl_per_dimension(in_order, floor).sum(1)
    kl = torch.zeros(q.mean.shape[0], dtype=torch.float64, device=q.mean.device)
    for start in range(0, in_order.mean.shape[1], most):
        kl = kl + _kl_per_dimension(part(in_order, start, start + most), floor).sum(1, dtype=torch.float64)
    return kl.float()


def log_ratio(q: Posterior, most: int = SLICE) -> Tensor:
    """log q(z) - log p(z) of a latent that was drawn, in nats: ``[batch]``, in double precision; of so many values of
    each scan at a time.
    """
    total = q.mean.new_zeros(len(q.mean), dtype=torch.float64)
    values = [None if tensor is None else _memory_order(tensor) for tensor in q]
    for start in range(0, values[0].shape[1], most):
        here = (None if tensor is None else tensor[:, start : start + most].double() for tensor in values)
        z, mean, std, p_mean, p_std = here
        p_mean = torch.zeros_like(z) if p_mean is None else p_mean
        p_std = torch.ones_like(z) if p_std is None else p_std
        difference = ((z - p_mean) / p_std).square() - ((z - mean) / std).square()
        total += (0.5 * difference + p_std.log() - std.log()).sum(1)
    return total


def part(q: Posterior, start: int, end: int) -> Posterior:
    """Some of the values of a latent whose mean and standard deviation are ``[batch, values]``; z is left as it is."""
    p_mean, p_std = q.prior_mean, q.prior_std
    if p_mean is not None and p_std is not None:
        p_mean, p_std = p_mean[:, start:end], p_std[:, start:end]
    return Posterior(q.z, q.mean[:, start:end], q.std[:, start:end], p_mean, p_std)


def _memory_order(x: Tensor) -> Tensor:
    """``[batch, values]`` of a channels-last tensor, in the order of its memory."""
    return x.movedim(1, -1).flatten(1)


@dataclass(frozen=True)
class LatentSampler:
    """How what is random in a pass of the network is drawn; handed on from the network to each of its blocks.

    Where the network's code says ``Any``, it is this or None: TorchScript cannot compile it, and never needs it.

    Args:
        generators: one for each scan of the batch, which draws its noise, on the generator's device. What a scan draws
            then does not depend on which others are in its batch. None: PyTorch's own generator draws all.
        rule: ``rule(index, distribution)`` gives z of each latent, instead of the draw that the distribution holds. It
            is called inside the decoder's pass with the latent's index, coarsest first, and with the posterior of a
            latent that is inferred from a scan, else with the prior (which has no ``prior_mean``). Both are conditioned
            on what the rule chose above.
    """

    generators: Sequence[torch.Generator] | None = None
    rule: Callable[[int, Posterior], Tensor] | None = None


def seeded_sampler(
    seeds: Iterable[int], device: torch.device | str, rule: Callable[[int, Posterior], Tensor] | None = None
) -> LatentSampler:
    """A sampler whose generators, one for each scan, begin at these seeds."""
    return LatentSampler([torch.Generator(device).manual_seed(seed) for seed in seeds], rule)


def with_rule(sampler: LatentSampler | None, rule: Callable[[int, Posterior], Tensor]) -> LatentSampler:
    """A sampler whose generators are those of another one, if there is one."""
    return LatentSampler(None if sampler is None else sampler.generators, rule)


def choose(q: Posterior, index: int, sampler: LatentSampler | None) -> Posterior:
    """The distribution of a latent with the z that the rule of ``sampler`` chooses, if there is one."""
    return q if sampler is None or sampler.rule is None else q._replace(z=sampler.rule(index, q))


@torch.jit.unused
def gaussian_noise(like: Tensor, sampler: Any = None) -> Tensor:
    """Standard normal noise shaped like a channels-last tensor, from the generators of :class:`LatentSampler`.

    Drawn with the channels as the last axis in memory: on a CPU eight times faster than ``randn_like`` of such a one.

    Raises:
        ValueError: there are not as many generators as scans.
    """
    shape = (*like.shape[2:], like.shape[1])
    generators = None if sampler is None else sampler.generators
    if generators is None:
        return torch.randn((like.shape[0], *shape), device=like.device, dtype=torch.float32).movedim(-1, 1)
    if len(generators) != like.shape[0]:
        raise InputError(f"{len(generators)} generators for a batch of {like.shape[0]}: give one for each scan.")
    noise = torch.stack([torch.randn(shape, generator=g, device=g.device) for g in generators])
    return noise.to(like.device, non_blocking=True).movedim(-1, 1)
