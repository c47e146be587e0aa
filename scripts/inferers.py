"""What can be asked of a trained network, each as a MONAI inferer that takes a batch of preprocessed scans.

Scans are `[batch, channels, *spatial]` in the range of the network's output activation. Every inferer returns a
dictionary of tensors whose first axis is the batch. Noise comes from :py:func:`scripts.blocks.noise_from` where the
caller uses it, so that a scan's result does not depend on its batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from monai.inferers import Inferer
from monai.metrics import PSNRMetric, SSIMMetric
from monai.networks.layers import GaussianFilter
from torch import Tensor

from scripts.blocks import Posterior, gaussian_noise
from scripts.losses import bits_per_dim, negative_log_likelihood
from scripts.networks import OUTPUT_RANGES, VDVAE

__all__ = ["Decoding", "Encoding", "Imputation", "Interpolation", "Reconstruction", "Sampling", "Scoring"]

Temperature = float | Sequence[float]


def latents_of_levels(network: VDVAE, levels: int) -> int:
    """How many latents the coarsest levels have.

    Raises:
        ValueError: there are not so many levels.
    """
    if not 1 <= levels <= network.levels:
        raise ValueError(f"levels is {levels}: this network has 1 to {network.levels}.")
    return sum(level >= network.levels - levels for level in network.latent_levels)


class Reconstruction(Inferer):
    """
    Reconstruct scans: `recon` and `scale` (mean and standard deviation of each voxel) and `zscore`.

    Args:
        temperature: of the posterior; 0 takes its mean. One number, or one a level, coarsest first.
        levels: take the posterior of the so many coarsest levels alone, and the prior's mean below. None: of all.
            `"each"`: of all, and `recon_level1`, `recon_level2`, ... for each number of levels too.
    """

    def __init__(self, temperature: Temperature = 0.0, levels: int | str | None = None) -> None:
        self.temperature = temperature
        self.levels = levels

    def images(self, network: VDVAE) -> list[str]:
        """The names of its results."""
        each = range(1, network.levels + 1) if self.levels == "each" else ()
        return ["recon", "scale", "zscore", *(f"recon_level{n}" for n in each)]

    def __call__(self, inputs: Tensor, network: VDVAE, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        if self.levels is None:
            loc, scale, _ = network.infer(inputs, self.temperature)[0]
            return _with_zscore(inputs, loc, scale)
        latents = network.encode(inputs, self.temperature)
        counts = range(1, network.levels + 1) if self.levels == "each" else [self.levels]
        recons = [network.decode(latents[: latents_of_levels(network, n)], temperature=0.0) for n in counts]
        results = _with_zscore(inputs, *recons[-1])
        if self.levels == "each":
            results |= {f"recon_level{n}": loc for n, (loc, _) in zip(counts, recons, strict=True)}
        return results


def _with_zscore(inputs: Tensor, loc: Tensor, scale: Tensor) -> dict[str, Tensor]:
    return {"recon": loc, "scale": scale, "zscore": (inputs - loc) / scale}


class Encoding(Inferer):
    """
    Encode scans: `z00`, `mean00` and `std00` of the posterior of the coarsest latent, `z01`, ... of the next.

    Args:
        temperature: of z; 0 makes it the mean.
    """

    def __init__(self, temperature: Temperature = 0.0) -> None:
        self.temperature = temperature

    def __call__(self, inputs: Tensor, network: VDVAE, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        results = {}
        for index, q in enumerate(network.posterior(inputs, self.temperature)):
            results |= {f"z{index:02d}": q.z, f"mean{index:02d}": q.mean, f"std{index:02d}": q.std}
        return results


class Decoding(Inferer):
    """
    Decode latents: `recon` and `scale`. Latents that are left out come from the prior.

    Args:
        temperature: of the prior; 0 takes its mean.
    """

    def __init__(self, temperature: Temperature = 0.0) -> None:
        self.temperature = temperature

    def __call__(self, inputs: Sequence[Tensor], network: VDVAE, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """`inputs` are the first latents, each `[batch, latent_channels, *grid]`, top first."""
        loc, scale = network.decode(inputs, self.temperature)
        return {"recon": loc, "scale": scale}


class Sampling(Inferer):
    """
    Draw scans from the prior: `sample`, the mean of each voxel given the latents that were drawn.

    Args:
        temperature: multiplies the prior's standard deviations. One number, or one a level, coarsest first.
        voxel_noise: also draw each voxel from its own distribution, as the likelihood says.
    """

    def __init__(self, temperature: Temperature = 0.7, voxel_noise: bool = False) -> None:
        self.temperature = temperature
        self.voxel_noise = voxel_noise

    def __call__(self, inputs: int, network: VDVAE, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """`inputs` is the number of scans."""
        loc, scale = network.decode([], self.temperature, batch_size=inputs)
        return {"sample": draw_voxels(loc, scale, network) if self.voxel_noise else loc}


def draw_voxels(loc: Tensor, scale: Tensor, network: VDVAE) -> Tensor:
    """Draw each voxel from its distribution; what scans are scaled to bounds it."""
    low, high = OUTPUT_RANGES[network.output_activation]
    return (loc + scale * gaussian_noise(loc)).clamp(low, high)


class Interpolation(Inferer):
    """
    Scans between two: `step00` to `stepNN`, from the first to the second in equal steps of their latents.

    Args:
        steps: how many scans, both ends included.
        levels: numbers of the levels (0 is the coarsest) whose latents go over to the second scan; the others stay
            those of the first. None: all go over.
    """

    def __init__(self, steps: int = 7, levels: Sequence[int] | None = None) -> None:
        if steps < 2:
            raise ValueError(f"steps is {steps}: both ends are steps, so that it must be 2 or more.")
        self.steps = steps
        self.levels = levels

    def __call__(self, inputs: Tensor, network: VDVAE, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """`inputs` is `[batch, 2, channels, *spatial]`: the two scans."""
        first, second = (network.encode(inputs[:, end], temperature=0.0) for end in (0, 1))
        levels = range(network.levels) if self.levels is None else self.levels
        unknown = set(levels) - set(range(network.levels))
        if unknown:
            raise ValueError(f"levels holds {sorted(unknown)}: this network's levels are 0 to {network.levels - 1}.")
        moves = [network.levels - 1 - level in levels for level in network.latent_levels]
        results = {}
        for step, share in enumerate(torch.linspace(0, 1, self.steps).tolist()):
            latents = [torch.lerp(a, b, share) if m else a for a, b, m in zip(first, second, moves, strict=True)]
            results[f"step{step:02d}"] = network.decode(latents, temperature=0.0)[0]
        return results


class Imputation(Inferer):
    """
    Fill in what is missing, by iterated draws: latents given the scan, then the missing voxels given the latents.

    What is missing starts as the prior's mean scan. Each round draws the latents from the posterior of the scan as it
    is filled in so far, and fills the missing voxels from them; what was observed is put back each time. It is the
    Markov chain of Rezende et al. 2014 (arXiv:1401.4082, appendix F), whose limit is the model's own distribution of
    what is missing given what was observed, as far as the posterior is right. The last round's draw is returned.

    Args:
        iterations: rounds.
        draws: independent chains: `draw00`, `draw01`, ...
        temperature: of the latents.
        voxel_noise: also draw each missing voxel from its own distribution.
    """

    def __init__(
        self, iterations: int = 20, draws: int = 4, temperature: Temperature = 1.0, voxel_noise: bool = False
    ) -> None:
        for name, value in (("iterations", iterations), ("draws", draws)):
            if value < 1:
                raise ValueError(f"{name} is {value}: it must be 1 or more.")
        self.iterations, self.draws = iterations, draws
        self.temperature, self.voxel_noise = temperature, voxel_noise

    def __call__(self, inputs: Tensor, network: VDVAE, mask: Tensor, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """`mask`, shaped like the scans with one channel or as many, is true where a voxel is missing."""
        start = network.decode([], temperature=0.0, batch_size=len(inputs))[0]
        results = {}
        for draw in range(self.draws):
            filled = torch.where(mask, start, inputs)
            for _ in range(self.iterations):
                loc, scale, _ = network(filled, self.temperature)
                filled = torch.where(mask, draw_voxels(loc, scale, network) if self.voxel_noise else loc, inputs)
            results[f"draw{draw:02d}"] = filled
        return results


class Scoring(Inferer):
    """
    Say how likely scans are, and where they are not.

    `bits_per_dim`, `elbo` (nats), `nll` and `kl` (its parts), `kl_z00`, ... (of each latent), `psnr` and `ssim` of the
    reconstruction, each `[batch]`; `recon`, `scale` as :py:class:`Reconstruction` gives them; and `anomaly`, where the
    scan is brighter or darker than the model expects: the absolute z-score, smoothed.

    Args:
        importance_samples: with K = 1 the bound is the ELBO with its KL in closed form. With more it is the
            importance-weighted bound of K draws (Burda et al. 2016, arXiv:1509.00519), in the mean tighter with each.
        smoothing: standard deviation in voxels of the Gaussian that smooths the z-score before its sign is dropped.
    """

    def __init__(self, importance_samples: int = 1, smoothing: float = 0.7) -> None:
        if importance_samples < 1:
            raise ValueError(f"importance_samples is {importance_samples}: it must be 1 or more.")
        self.importance_samples = importance_samples
        self.smoothing = smoothing

    def __call__(self, inputs: Tensor, network: VDVAE, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        weights, nlls, kls = [], [], []
        for _ in range(self.importance_samples):
            output, latents = network.infer(inputs, temperature=1.0)
            nll = negative_log_likelihood(output.loc, output.scale, inputs)
            nlls.append(nll)
            kls.append(output.kl)
            weights.append(-nll - sum(log_ratio(q) for q in latents))
        nll, kl = torch.stack(nlls).mean(0), torch.stack(kls).mean(0)
        bound = -(nll + kl.sum(1))
        if self.importance_samples > 1:
            bound = torch.logsumexp(torch.stack(weights), dim=0) - math.log(self.importance_samples)
        loc, scale, _ = network.infer(inputs, temperature=0.0)[0]
        results = {"bits_per_dim": bits_per_dim(-bound, inputs), "elbo": bound, "nll": nll, "kl": kl.sum(1)}
        results |= {f"kl_z{index:02d}": kl[:, index] for index in range(kl.shape[1])}
        results |= image_quality(loc, inputs, network)
        smooth = GaussianFilter(network.spatial_dims, self.smoothing).to(inputs.device)
        return results | {"recon": loc, "scale": scale, "anomaly": smooth((inputs - loc) / scale).abs()}


def log_ratio(q: Posterior) -> Tensor:
    """log q(z) - log p(z) of a latent that was drawn, in nats: `[batch]`, in double precision."""
    z, mean, std = (t.double() for t in (q.z, q.mean, q.std))
    prior_mean = torch.zeros_like(z) if q.prior_mean is None else q.prior_mean.double()
    prior_std = torch.ones_like(z) if q.prior_std is None else q.prior_std.double()
    difference = ((z - prior_mean) / prior_std).square() - ((z - mean) / std).square()
    return (0.5 * difference + prior_std.log() - std.log()).flatten(1).sum(1)


def image_quality(recon: Tensor, scans: Tensor, network: VDVAE) -> dict[str, Tensor]:
    """PSNR (dB) and SSIM of reconstructions, `[batch]`, on the range that scans are scaled to."""
    low, high = OUTPUT_RANGES[network.output_activation]
    smallest = min(scans.shape[2:])
    window = min(11, smallest if smallest % 2 else smallest - 1)
    ssim = SSIMMetric(network.spatial_dims, data_range=high - low, win_size=window)
    psnr = PSNRMetric(max_val=high - low)
    return {"psnr": psnr(recon, scans).flatten(), "ssim": ssim(recon, scans).flatten()}
