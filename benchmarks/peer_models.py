"""The models that ours is compared with: a Gaussian a voxel, PCA, and two of MONAI's autoencoders.

Scans are ``[batch, 1, *spatial]`` in [-1, 1]. All but PCA start from mean and standard deviation of each voxel of the
training scans, and none believes a voxel to be known better than our network may, to within 0.01.
"""

from __future__ import annotations

import copy
import logging
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from monai.networks.nets import AutoencoderKL, VarAutoEncoder
from scipy.ndimage import gaussian_filter
from torch import Tensor, nn
from torch.distributions import LowRankMultivariateNormal

from scripts.inference.scoring import anomaly_map
from scripts.layers.gaussian import Draws, gaussian_noise, standard_deviation
from scripts.layers.output import LEAST_INPUT_STD, OUTPUT_RANGES, OUTPUT_STD_RANGE
from scripts.training.losses import negative_log_likelihood
from scripts.utils.files import write_whole

COMPONENTS = (4, 16, 64, 128, 256, 384, 512)  # of a PCA, from which to choose
SMOOTHING = 0.4  # voxels, of variances; what scripts.training.voxel_statistics says of it holds of PCA's residuals too
KL_WEIGHT = 1e-6  # of MONAI's autoencoders for latent diffusion
KL_WARMUP = 300  # updates, of the VAE
MAX_GRAD_NORM = 1.0
SKIP_GRAD_NORM = 1e6  # such an update is left out
SAVE_SECONDS = 120

logger = logging.getLogger(__name__)


class Peer(nn.Module, ABC):
    """
    What every model can be asked for.

    Attributes:
        likelihood: what :py:meth:`nats` is, `"exact"` or `"ELBO"`.
        spatial_shape, spatial_dims, output_activation: as :py:class:`scripts.networks.VDVAE` has them.
    """

    likelihood = "exact"
    output_activation = "tanh"

    def __init__(self, spatial_shape: Sequence[int]) -> None:
        super().__init__()
        self.spatial_shape = tuple(spatial_shape)
        self.spatial_dims = len(self.spatial_shape)

    @abstractmethod
    def nats(self, x: Tensor) -> Tensor:
        """Negative log-likelihood of scans, or an upper bound of it, in nats: `[batch]`."""

    @abstractmethod
    def reconstruct(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of each voxel, both shaped like the scans."""

    @abstractmethod
    def sample(self, count: int, draws: Draws | None = None) -> Tensor:
        """New scans, by noise of :py:func:`scripts.layers.gaussian.gaussian_noise`."""

    def anomaly(self, x: Tensor) -> Tensor:
        """How far each voxel lies above what was expected, in standard deviations, as of our network.

        Args:
            x: not clipped.
        """
        return anomaly_map(x, *self.reconstruct(x.clamp(*OUTPUT_RANGES[self.output_activation])), self)

    def size(self) -> int:
        """How many numbers were learnt."""
        return sum(parameter.numel() for parameter in self.parameters())


def smooth_std(variance: Tensor) -> Tensor:
    """From the variance of each voxel, `[1, *spatial]`: smoothed, and within the bounds of our network's output."""
    sigma = (0, *[SMOOTHING] * (variance.ndim - 1))
    smoothed = torch.as_tensor(gaussian_filter(variance.double().clamp_min(0).numpy(), sigma)).float()
    return smoothed.sqrt().clamp(*OUTPUT_STD_RANGE)


class VoxelGaussian(Peer):
    """Each voxel by itself: the reconstruction is the mean scan, and a sample is noise about it."""

    def __init__(self, scans: Tensor) -> None:
        super().__init__(scans.shape[2:])
        self.register_buffer("mean", scans.mean(0))
        self.register_buffer("std", smooth_std(scans.var(0)))

    def nats(self, x: Tensor) -> Tensor:
        return negative_log_likelihood(*self.reconstruct(x), x)

    def reconstruct(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.mean.expand_as(x), self.std.expand_as(x)

    def sample(self, count: int, draws: Draws | None = None) -> Tensor:
        mean = self.mean.expand(count, *self.mean.shape)
        return (mean + self.std * gaussian_noise(mean, draws)).clamp(-1, 1)

    def size(self) -> int:
        return self.mean.numel() + self.std.numel()


class PCA(Peer):
    """
    The scans' principal components, and independent noise in each voxel: a Gaussian of covariance `W Wᵀ + diag(std²)`.

    The reconstruction is the projection on the components; a sample is the mean of the voxels given a draw of these.

    Args:
        scans: `[scans, 1, *spatial]`.
        components: how many; fewer than there are scans less one.
    """

    def __init__(self, scans: Tensor, components: int) -> None:
        super().__init__(scans.shape[2:])
        count, x = len(scans), scans.flatten(1)
        if not 1 <= components < count - 1:
            raise ValueError(f"components is {components}: of {count} scans there can be 1 to {count - 2}.")
        mean = x.mean(0)
        x = x - mean
        # as the scans are fewer than the voxels, their dot products hold all there is
        values, vectors = torch.linalg.eigh((x @ x.T).double())
        values, vectors = values[-components:], vectors[:, -components:]
        axes = x.T @ (vectors / values.sqrt()).float()
        residual = x.square().sum(0) - (axes.square() * values.float()).sum(1)
        # each component takes a degree of freedom from what is left
        variance = residual / (count - 1 - components)
        self.register_buffer("mean", mean)
        self.register_buffer("axes", axes)
        self.register_buffer("factor", axes * (values / (count - 1)).sqrt().float())
        self.register_buffer("std", smooth_std(variance.view(scans.shape[1:])))

    def nats(self, x: Tensor) -> Tensor:
        covariance = {"cov_factor": self.factor, "cov_diag": self.std.flatten().square()}
        return -LowRankMultivariateNormal(self.mean, **covariance).log_prob(x.flatten(1))

    def reconstruct(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scores = (x.flatten(1) - self.mean) @ self.axes
        return (self.mean + scores @ self.axes.T).view_as(x), self.std.expand_as(x)

    def sample(self, count: int, draws: Draws | None = None) -> Tensor:
        scores = gaussian_noise(self.mean.new_empty(count, self.factor.shape[1]), draws)
        return (self.mean + scores @ self.factor.T).view(count, 1, *self.spatial_shape).clamp(-1, 1)

    def size(self) -> int:
        return self.mean.numel() + self.factor.numel() + self.std.numel()


def fit_pca(scans: Tensor, validation: Tensor) -> PCA:
    """A PCA of the scans, with the number of components that makes the validation scans likeliest."""
    fitted = [PCA(scans, count) for count in COMPONENTS if count < len(scans) - 1]
    return min(fitted, key=lambda pca: pca.nats(validation).mean().item())


class TrainedPeer(Peer):
    """What :py:func:`train` trains, by a loss that is to be minimised."""

    learning_rate = 1e-3

    @abstractmethod
    def loss(self, x: Tensor, update: int) -> Tensor:
        """Of a batch, at update number `update`, from 0."""

    def finish(self, scans: Tensor, batch_size: int) -> None:
        """What is left to do after training."""


class Autoencoder(TrainedPeer):
    """
    What MONAI's two autoencoders share: they see, and predict, deviations from the mean of the training scans.

    Args:
        gaussian: of the training scans.
        network: the autoencoder.
    """

    likelihood = "ELBO"
    learning_rate = 1e-3  # for the VAE after a minute better than 3e-3

    def __init__(self, gaussian: VoxelGaussian, network: nn.Module) -> None:
        super().__init__(gaussian.spatial_shape)
        self.register_buffer("mean", gaussian.mean)
        self.register_buffer("std", gaussian.std)
        self.network = network

    @abstractmethod
    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the latents, fp32."""

    @abstractmethod
    def decode(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the voxels, fp32."""

    @abstractmethod
    def latent_shape(self) -> tuple[int, ...]:
        """Of a scan's latents."""

    def deviation(self, x: Tensor) -> Tensor:
        """What the encoder sees; just what our network's encoder does."""
        return ((x - self.mean) / self.std.clamp_min(LEAST_INPUT_STD)).clamp(-5, 5)

    def draw(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean and standard deviation of the voxels given latents drawn from the posterior, and the KL, `[batch]`."""
        mean, std = self.encode(x)
        kl = 0.5 * (mean.square() + std.square() - 1) - std.log()
        return *self.decode(mean + std * gaussian_noise(mean)), kl.flatten(1).sum(1)

    def nats(self, x: Tensor) -> Tensor:
        loc, scale, kl = self.draw(x)
        return negative_log_likelihood(loc, scale, x) + kl

    def reconstruct(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.decode(self.encode(x)[0])

    def sample(self, count: int, draws: Draws | None = None) -> Tensor:
        return self.decode(gaussian_noise(self.mean.new_empty(count, *self.latent_shape()), draws))[0].clamp(-1, 1)


class VAE(Autoencoder):
    """
    MONAI's `VarAutoEncoder`: one vector of latents, trained by the ELBO, whose output is the distribution of ours.

    Args:
        gaussian: of the training scans.
        latents: length of the vector.
        norm: of the network, as MONAI names it.
    """

    def __init__(self, gaussian: VoxelGaussian, latents: int = 128, norm: str = "batch") -> None:
        halvings = min(4, int(math.log2(min(gaussian.spatial_shape))) - 1)
        channels = (16, 32, 64, 128, 256)[: halvings + 1]
        network = VarAutoEncoder(
            spatial_dims=len(gaussian.spatial_shape),
            in_shape=(1, *gaussian.spatial_shape),
            out_channels=2,
            latent_size=latents,
            channels=channels,
            strides=(1, *[2] * halvings),
            norm=norm,
        )
        super().__init__(gaussian, network)

    def latent_shape(self) -> tuple[int, ...]:
        return (self.network.latent_size,)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_variance = self.network.encode_forward(self.deviation(x))
        return mean.float(), (0.5 * log_variance.float()).exp()

    def decode(self, z: Tensor) -> tuple[Tensor, Tensor]:
        loc, s = self.network.decode_forward(z, use_sigmoid=False).float().chunk(2, dim=1)
        low, high = OUTPUT_STD_RANGE
        start = torch.logit(((self.std - low) / (high - low)).clamp(3e-4, 1 - 3e-4))
        return self.mean + self.std * loc, standard_deviation(start + s, OUTPUT_STD_RANGE, "sigmoid")

    def loss(self, x: Tensor, update: int) -> Tensor:
        loc, scale, kl = self.draw(x)
        return (negative_log_likelihood(loc, scale, x) + min(1.0, update / KL_WARMUP) * kl).mean() / x[0].numel()


class LatentDiffusionAutoencoder(Autoencoder):
    """
    MONAI's `AutoencoderKL`, the first stage of its latent diffusion models.

    It is as in MONAI's tutorial for 3D, but for half the channels where scans are large, which suits scans of 32 voxels
    and makes it take three times as many updates in the same time. It is trained as there, by the absolute error and
    very little KL, but without the adversarial and the perceptual part. The standard deviation of each voxel is that of
    its residuals in the training scans.
    """

    learning_rate = 3e-4  # after a minute better than 1e-3

    def __init__(self, gaussian: VoxelGaussian, channels: Sequence[int] = (16, 32, 64), latents: int = 3) -> None:
        network = AutoencoderKL(
            spatial_dims=len(gaussian.spatial_shape),
            channels=channels,
            latent_channels=latents,
            num_res_blocks=1,
            norm_num_groups=16,
            attention_levels=[False] * (len(channels) - 1) + [True],
        )
        super().__init__(gaussian, network)
        self.register_buffer("residual_std", gaussian.std.clone())
        self.reduction = 2 ** (len(channels) - 1)

    def latent_shape(self) -> tuple[int, ...]:
        return (self.network.latent_channels, *(size // self.reduction for size in self.spatial_shape))

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mean, std = self.network.encode(self.deviation(x))
        return mean.float(), std.float()

    def decode(self, z: Tensor) -> tuple[Tensor, Tensor]:
        loc = self.mean + self.std * self.network.decode(z).float()
        return loc, self.residual_std.expand_as(loc)

    def loss(self, x: Tensor, update: int) -> Tensor:
        loc, _, kl = self.draw(x)
        return (loc - x).abs().mean() + KL_WEIGHT * kl.mean()

    @torch.no_grad()
    def finish(self, scans: Tensor, batch_size: int) -> None:
        squares = sum((self.draw(x)[0] - x).square().sum(0) for x in scans.split(batch_size))
        self.residual_std.copy_(smooth_std(squares / len(scans)))


def train(
    peer: TrainedPeer,
    scans: Tensor,
    validation: Tensor,
    path: Path,
    minutes: float,
    batch_size: int = 8,
    amp: bool = False,
    seed: int = 0,
) -> float:
    """
    Train with Adam at a learning rate that falls to 0 over the second half, and go on with what `path` holds of it.

    In the end the peer has those of its weights, looked at every two minutes, whose loss on the validation scans was
    lowest.

    Args:
        peer: in whatever state.
        scans, validation: `[scans, 1, *spatial]`.
        path: of a checkpoint, written every two minutes and at the end.
        minutes: of the processor, in all.
        amp: use bfloat16 where autocast does.
        seed: of the noise and the order of the scans.

    Returns:
        the minutes that it was trained.
    """
    optimizer = torch.optim.Adam(peer.parameters(), lr=peer.learning_rate)
    state: dict[str, Any] = {"seconds": 0.0, "updates": 0, "lowest": math.inf, "best": peer.state_dict()}
    if path.is_file():
        state = torch.load(path, weights_only=True)
        peer.load_state_dict(state["network"])
        optimizer.load_state_dict(state["optimizer"])
    torch.manual_seed(seed + state["updates"])
    saved, start = state["seconds"], time.process_time() - state["seconds"]
    while state["seconds"] < 60 * minutes:
        for group in optimizer.param_groups:
            group["lr"] = peer.learning_rate * min(1.0, 2 - 2 * state["seconds"] / (60 * minutes))
        x = scans[torch.randint(len(scans), (batch_size,))]
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            loss = peer.train().loss(x, state["updates"])
        optimizer.zero_grad()
        loss.backward()
        # oneDNN's bfloat16 convolutions on tiny grids now and then give gradients of 1e34
        if nn.utils.clip_grad_norm_(peer.parameters(), MAX_GRAD_NORM) < SKIP_GRAD_NORM:
            optimizer.step()
        state |= {"updates": state["updates"] + 1, "seconds": time.process_time() - start}
        if state["seconds"] > min(saved + SAVE_SECONDS, 60 * minutes):
            saved = state["seconds"]
            validated = validation_loss(peer, validation, batch_size)
            if validated < state["lowest"]:
                state |= {"lowest": validated, "best": copy.deepcopy(peer.state_dict())}
            state |= {"network": peer.state_dict(), "optimizer": optimizer.state_dict()}
            write_whole(path, partial(torch.save, state))
            logger.info("%s: %.1f minutes, %d updates, loss %.4f", path.stem, saved / 60, state["updates"], validated)
    peer.load_state_dict(state["best"])
    peer.eval().finish(scans, batch_size)
    return state["seconds"] / 60


@torch.no_grad()
def validation_loss(peer: TrainedPeer, validation: Tensor, batch_size: int) -> float:
    """The mean loss, with the KL in full, and the same noise each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        losses = [peer.eval().loss(x, KL_WARMUP) * len(x) for x in validation.split(batch_size)]
    return sum(losses).item() / len(validation)
