"""MONAI's latent diffusion model, as a peer of our network: see :py:mod:`benchmarks.peers`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from monai.inferers import DiffusionInferer
from monai.networks.nets import DiffusionModelUNet
from monai.networks.schedulers import DDIMScheduler
from torch import Tensor
from torch.nn.functional import mse_loss

from benchmarks.peer_models import LatentDiffusionAutoencoder, TrainedPeer
from scripts.layers.gaussian import Draws, gaussian_noise

LATENTS_PER_BATCH = 32  # they are small, so that more of them pay
STEPS = 100  # of sampling


class LatentDiffusion(TrainedPeer):
    """A diffusion model of the latents of a trained ``AutoencoderKL``, which reconstructs and scores as that does.

    As in MONAI's tutorials, the noise is predicted, in 1,000 steps of scaled linear variances between 0.0015 and
    0.0195, and latents are divided by their standard deviation. The U-Net has one residual block per level. Samples are
    drawn in 100 steps of DDIM (Song et al. 2021, arXiv:2010.02502).

    Args:
        autoencoder: trained; it stays as it is.
        scans: of the training side, ``[scans, 1, *spatial]``, whose latents set the scale.
        channels: of the U-Net; the last two levels have attention.
    """

    likelihood = "ELBO"
    learning_rate = 1e-3  # after three minutes better than 3e-4

    def __init__(
        self, autoencoder: LatentDiffusionAutoencoder, scans: Tensor, channels: Sequence[int] = (32, 64, 128)
    ) -> None:
        super().__init__(autoencoder.spatial_shape)
        self.autoencoder = autoencoder.requires_grad_(False)
        self.network = DiffusionModelUNet(
            spatial_dims=self.spatial_dims,
            in_channels=autoencoder.latent_shape()[0],
            out_channels=autoencoder.latent_shape()[0],
            num_res_blocks=1,
            channels=channels,
            attention_levels=[False, *[True] * (len(channels) - 1)],
            num_head_channels=[0, *channels[1:]],
            norm_num_groups=16,
        )
        scheduler = DDIMScheduler(schedule="scaled_linear_beta", beta_start=0.0015, beta_end=0.0195, clip_sample=False)
        self.inferer = DiffusionInferer(scheduler)
        self.register_buffer("latent_std", self.latents(scans).std())

    @torch.no_grad()
    def latents(self, scans: Tensor, batch_size: int = 8) -> Tensor:
        """What the diffusion model is trained on: a draw of the latents of each scan, ``[scans, channels, *grid]``."""
        parts = (self.autoencoder.eval().encode(x) for x in scans.split(batch_size))
        return torch.cat([mean + std * gaussian_noise(mean) for mean, std in parts])

    def loss(self, latents: Tensor, update: int) -> Tensor:
        """The mean squared error of the noise that is predicted, of one step drawn for each of the latents."""
        noise = gaussian_noise(latents)
        steps = torch.randint(self.inferer.scheduler.num_train_timesteps, (len(latents),))
        predicted = self.inferer(latents / self.latent_std, self.network, noise, steps)
        return mse_loss(predicted.float(), noise)

    def nats(self, x: Tensor) -> Tensor:
        return self.autoencoder.nats(x)

    def reconstruct(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.autoencoder.reconstruct(x)

    def sample(self, count: int, draws: Draws | None = None) -> Tensor:
        noise = gaussian_noise(self.latent_std.new_empty(count, *self.autoencoder.latent_shape()), draws)
        self.inferer.scheduler.set_timesteps(STEPS)
        latents = self.inferer.sample(noise, self.network, verbose=False)
        return self.autoencoder.decode(latents * self.latent_std)[0].clamp(-1, 1)
