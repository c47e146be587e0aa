"""The very deep VAE, in 2D or 3D.

Child, "Very Deep VAEs Generalize Autoregressive Models and Can Outperform Them on Images", ICLR 2021
(arXiv:2011.10650). How levels and latents are counted: :mod:`scripts.layers.levels`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn as nn
from monai.utils import ensure_tuple_rep
from scripts.layers.blocks import decoder_blocks, encoder_blocks
from scripts.layers.convolutions import HEAD_SCALES, Downsample, channels_last, make_conv, to_patches
from scripts.layers.gaussian import LatentSampler, Posterior
from scripts.layers.levels import Level, check_choice, check_list, check_shape, check_whole_number, make_levels
from scripts.layers.output import OUTPUT_RANGES, OutputHead, VoxelGaussian, deviation
from scripts.utils.errors import InputError
from torch import Tensor

__all__ = ["OUTPUT_RANGES", "VDVAE", "Decoder", "Encoder", "VDVAEOutput", "VDVAEReconstruction"]


# arguments of the network that concern no level
OF_THE_WHOLE = (
    "in_channels",
    "patch_size",
    "spatial_shape",
    "strided",
    "output_activation",
    "predict_scale",
    "template",
    "init",
)


class VDVAEOutput(NamedTuple):
    """What one pass of the network predicts.

    Attributes:
        loc: mean of each voxel, ``[batch, channels, *spatial]``.
        scale: standard deviation of each voxel, shaped like ``loc``.
        kl: Kullback-Leibler divergence of each latent in nats, ``[batch, latents]``, top first, fp32.
    """

    loc: Tensor
    scale: Tensor
    kl: Tensor


class Encoder(nn.Module):
    """Residual blocks on every level, halving between levels; gives the features of each level, finest first."""

    def __init__(self, levels: Sequence[Level], strided: bool) -> None:
        super().__init__()
        self.levels = nn.ModuleList(nn.ModuleList(encoder_blocks(level)) for level in levels)
        halvings = [
            make_conv(level.spatial_dims, level.channels, level.channels, 2, stride=2) if strided else Downsample()
            for level in levels[:-1]
        ]
        self.downsamples = nn.ModuleList([*halvings, nn.Identity()])

    def forward(self, x: Tensor) -> list[Tensor]:
        features: list[Tensor] = []
        for blocks, downsample in zip(self.levels, self.downsamples, strict=True):
            for block in blocks:
                x = block(x)
            features.append(x)
            x = downsample(x)
        return features


class Decoder(nn.Module):
    """The latents from the coarsest on, each followed by a residual block; doubling between levels.

    ``groups[g]`` holds the blocks of one level, coarsest level first.
    """

    def __init__(self, levels: Sequence[Level]) -> None:
        super().__init__()
        self.groups = nn.ModuleList(nn.ModuleList(decoder_blocks(level)) for level in reversed(levels))

    def forward(
        self,
        x: Tensor,
        features: list[Tensor] | None,
        latents: list[Tensor],
        temperatures: list[float],
        keep_posteriors: bool = False,
        sampler: Any = None,
    ) -> tuple[Tensor, list[Tensor], list[Posterior]]:
        """Draw or take every latent.

        Args:
            x: ``[batch, any, *coarsest grid]``, which says the shape and the device of what is drawn.
            features: the encoder's, finest first: latents come from the posterior. None: they come from the prior.
            latents: the first of them, top first, which are taken as they are.
            temperatures: what the standard deviation of a draw is multiplied by on each level, finest first.
            keep_posteriors: return z, mean and std of each latent too, which holds on to their memory.
            sampler: how the others are drawn, see :class:`scripts.layers.gaussian.LatentSampler`.

        Returns:
            the last features, the KL divergences ``[batch]`` and the posteriors of the latents drawn from one.
        """
        kls: list[Tensor] = []
        posteriors: list[Posterior] = []
        for blocks in self.groups:
            for block in blocks:
                feature = None if features is None else features[block.level]
                z = latents[block.index] if 0 <= block.index < len(latents) else None
                x, kl, q = block(x, feature, z, temperatures[block.level], sampler)
                if kl is not None:
                    kls.append(kl)
                if q is not None and keep_posteriors:
                    posteriors.append(q)
                q = None  # frees its memory for the next block
        return x, kls, posteriors


class VDVAE(VoxelGaussian):
    """Very deep variational autoencoder.

    Every list with one entry per level runs from the finest level to the coarsest; their common length is the number of
    levels K.

    Args:
        spatial_dims: 2 or 3.
        in_channels: channels of a scan, 1 or more.
        channels: width of the encoder on each level.
        num_latents: latents on each level; 0 is allowed, but not on the coarsest.
        latent_channels: channels of each level's latents, capped by ``decoder_channels``.
        kernel_sizes: 1, 2 or 3 on each level of the encoder.
        patch_size: voxels along each axis of the patches that the network sees, and predicts, as one voxel of several
            channels: all levels and latents live on a grid that is so many times coarser than the scan's.
        spatial_shape: grid of the scans. Without it any grid that patch_size 2^(K-1) divides is taken.
        hidden_channels: width inside the encoder's blocks; default ``channels``.
        decoder_channels: width of the decoder on each level; default ``channels``.
        decoder_hidden_channels: width inside the decoder's blocks; default ``decoder_channels``.
        decoder_kernel_sizes: as ``kernel_sizes``, for the decoder; default ``kernel_sizes``.
        encoder_blocks: residual blocks on each level of the encoder, one number or a list.
        plain_encoder: encoder blocks of two convolutions instead of a bottleneck of four.
        strided: halve with a convolution of kernel 2 and stride 2 instead of keeping the even indices.
        rezero: multiply what a block adds by a learnt scalar that starts at 0.
        batch_norm: batch norm in every block.
        separate_heads: mean and standard deviation of a latent from two nets instead of one.
        shared: on which levels all latents but the first share their nets; one value or a list.
        latents_off: which latents are switched off, counted from the coarsest, those that are off included; 0 cannot
            be. Elsewhere (``kl_z03``) only those that are on are counted.
        std_form: how standard deviations come from the network: ``"sigmoid"`` or ``"exp"`` (whose bounds are of the
            log-variance, as published, so that the output's is never below 1).
        kl_floor: in training the KL's denominator is at least this variance of the prior, as published 1e-5. Outside of
            training the KL is exact.
        output_activation: ``"tanh"``, ``"sigmoid"`` or ``"identity"``; scans should be scaled to its range.
        predict_scale: False: the output has unit variance.
        template: see and predict deviations from a voxel-wise mean and standard deviation (:meth:`set_voxel_gaussian`),
            which live in buffers; needs ``spatial_shape``. The published network starts from the activation of zero.
        init: ``"pytorch"``, the published start, or ``"variance_preserving"``: signals keep their size from the input
            through the latents to the output, every KL divergence but the first starts at zero, and noise from later
            latents starts small. PyTorch's default loses about half the signal at every convolution, so that the
            coarsest latents of a deep network neither see the scan nor show in the reconstruction.
            ``"informative"``: the same, but posterior means and output depend on the scan from the start.
        checkpoint_levels: recompute the activations of this many of the finest levels in the backward pass instead of
            keeping them.

    Attributes:
        arguments: what it was built with, by name.

    Raises:
        ValueError: an argument cannot be honoured; the sentence names it.
    """

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        channels: Sequence[int],
        num_latents: Sequence[int],
        latent_channels: Sequence[int],
        kernel_sizes: Sequence[int],
        spatial_shape: Sequence[int] | None = None,
        hidden_channels: Sequence[int] | None = None,
        decoder_channels: Sequence[int] | None = None,
        decoder_hidden_channels: Sequence[int] | None = None,
        decoder_kernel_sizes: Sequence[int] | None = None,
        encoder_blocks: int | Sequence[int] = 2,
        plain_encoder: bool = False,
        strided: bool = False,
        rezero: bool = False,
        batch_norm: bool = False,
        separate_heads: bool = False,
        shared: bool | Sequence[bool] = False,
        latents_off: Sequence[int] = (),
        std_form: str = "sigmoid",
        kl_floor: float = 0.0,
        output_activation: str = "tanh",
        predict_scale: bool = True,
        template: bool = False,
        init: str = "pytorch",
        checkpoint_levels: int = 0,
        patch_size: int = 1,
    ) -> None:
        arguments = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        super().__init__(template)
        self.arguments = arguments
        check_whole_number("patch_size", patch_size)
        if patch_size < 1:
            raise InputError(f"network_def: patch_size is {patch_size}: it must be 1 or more.")
        of_levels = {name: value for name, value in arguments.items() if name not in OF_THE_WHOLE}
        levels = make_levels(in_channels=in_channels * patch_size**spatial_dims, **of_levels)
        self.spatial_dims, self.in_channels, self.levels = spatial_dims, in_channels, len(levels)
        self.patch_size = patch_size
        self.output_activation = output_activation
        self.spatial_shape: tuple[int, ...] | None = None
        if spatial_shape is not None:
            check_list("spatial_shape", spatial_shape)
            self.spatial_shape = tuple(check_shape(list(spatial_shape), spatial_dims, self.levels, patch_size))

        self.encoder = Encoder(levels, strided)
        self.decoder = Decoder(levels)
        self.output = OutputHead(
            spatial_dims,
            levels[0].decoder_channels,
            in_channels,
            std_form=std_form,
            output_activation=output_activation,
            predict_scale=predict_scale,
            zero_init=template,
            patch_size=patch_size,
        )
        self.register_voxel_gaussian(in_channels, self.spatial_shape)
        if check_choice("init", init, ("pytorch", *HEAD_SCALES)) != "pytorch":
            for module in self.modules():
                if hasattr(module, "preserve_variance"):
                    module.preserve_variance(levels[0].init_scale, HEAD_SCALES[init])
        latents = [level for level in reversed(levels) for index in level.latents if index is not None]
        self.num_latents = len(latents)
        self.latent_levels = tuple(level.number for level in latents)
        self.latent_channels = tuple(level.latent_channels for level in latents)
        self.to(memory_format=torch.channels_last_3d if spatial_dims == 3 else torch.channels_last)

    def grids(self, spatial_shape: Sequence[int] | None = None) -> list[tuple[int, ...]]:
        """The grid of each level, finest first, for scans of this shape; default the network's."""
        shape = spatial_shape or self.spatial_shape
        if shape is None:
            raise InputError("network_def: a grid needs spatial_shape, here or in the constructor.")
        shape = check_shape(list(shape), self.spatial_dims, self.levels, self.patch_size)
        return [tuple(size // (self.patch_size * 2**level) for size in shape) for level in range(self.levels)]

    def latent_grids(self) -> list[tuple[int, ...]]:
        """``(channels, *grid)`` of each latent, top first; see :meth:`grids`."""
        grids = self.grids()
        return [(c, *grids[level]) for c, level in zip(self.latent_channels, self.latent_levels, strict=True)]

    def _encode(self, x: Tensor) -> list[Tensor]:
        """The encoder's features of scans, finest first, after a look at their shape."""
        if x.ndim != self.spatial_dims + 2 or x.shape[1] != self.in_channels:
            raise InputError(
                f"input of shape {list(x.shape)}: expected [batch, {self.in_channels}, ...] "
                f"with {self.spatial_dims} spatial axes."
            )
        shape = check_shape(list(x.shape[2:]), self.spatial_dims, self.levels, self.patch_size)
        gaussian = self.voxel_gaussian()
        if gaussian is not None:
            if shape != list(gaussian[0].shape[2:]):
                raise InputError(
                    f"input of shape {list(x.shape)}: this network's template has spatial_shape {self.spatial_shape}."
                )
            x = deviation(x, gaussian)
        return self.encoder(channels_last(to_patches(x, self.patch_size)))

    def forward(
        self, x: Tensor, temperature: float | Sequence[float] = 1.0, sampler: LatentSampler | None = None
    ) -> VDVAEOutput:
        """Reconstruct scans from latents drawn from the posterior.

        Args:
            x: ``[batch, in_channels, *spatial]``, in the range of ``output_activation``.
            temperature: multiplies the posterior's standard deviations; 0 gives its mean. One number, or one per level,
                finest first.
            sampler: how latents are drawn; None: by PyTorch's own generator.

        Raises:
            ValueError: an axis is not a multiple of patch_size 2^(K-1), or the shape is not the network's.
        """
        return self.infer(x, temperature, keep_posteriors=False, sampler=sampler)[0]

    def infer(
        self,
        x: Tensor,
        temperature: float | Sequence[float] = 1.0,
        keep_posteriors: bool = True,
        sampler: LatentSampler | None = None,
    ) -> tuple[VDVAEOutput, list[Posterior]]:
        """What :meth:`VDVAE.forward` gives, and the latents that it was made from, with their distributions, top first.

        Without ``keep_posteriors`` the list is empty, and their memory is free.
        """
        features = self._encode(x)
        temperatures = list(ensure_tuple_rep(temperature, self.levels))
        y, kls, posteriors = self.decoder(features[-1], features, [], temperatures, keep_posteriors, sampler)
        return VDVAEOutput(*self.output(y, self.voxel_gaussian()), torch.stack(kls, dim=1)), posteriors

    def encode(
        self, x: Tensor, temperature: float | Sequence[float] = 1.0, sampler: LatentSampler | None = None
    ) -> list[Tensor]:
        """The latents of scans, each ``[batch, latent_channels, *grid]``, top first.

        Args:
            x, temperature, sampler: as for :meth:`forward`.
        """
        return [q.z for q in self.infer(x, temperature, sampler=sampler)[1]]

    def decode(
        self,
        latents: Sequence[Tensor],
        temperature: float | Sequence[float] = 1.0,
        batch_size: int = 1,
        spatial_shape: Sequence[int] | None = None,
        sampler: LatentSampler | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Scans from their first latents, the rest drawn from the prior.

        Args:
            latents: from the coarsest on, as :meth:`encode` gives them; none gives a sample, all a reconstruction.
            temperature: multiplies the standard deviation of the latents that are drawn; 0 takes the prior's mean.
                One number, or one per level, finest first.
            batch_size, spatial_shape: of the scans, where no latent says them; the shape defaults to the network's.
            sampler: how the others are drawn; None: by PyTorch's own generator.

        Returns:
            loc and scale, ``[batch, in_channels, *spatial]``.

        Raises:
            ValueError: more latents than the network has, or no way to know the shape.
        """
        if len(latents) > self.num_latents:
            raise InputError(f"decode got {len(latents)} latents, but the network has {self.num_latents}.")
        if latents:
            start = latents[0]
        else:
            start = channels_last(self.output.weight.new_zeros(batch_size, 1, *self.grids(spatial_shape)[-1]))
        temperatures = list(ensure_tuple_rep(temperature, self.levels))
        y, _, _ = self.decoder(start, None, list(latents), temperatures, sampler=sampler)
        return self.output(y, self.voxel_gaussian())


class VDVAEReconstruction(VDVAE):
    """The same network, with the same weights, whose forward pass is the reconstruction alone.

    Programs that check, export or serve a network expect one tensor. The reconstruction is made from the posterior's
    means, so that it is the same every time. ``torch.jit.script``, ``torch.export`` and ONNX take this class.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Reconstruct scans: ``[batch, in_channels, *spatial]`` in and out, in the range of ``output_activation``.

        Raises:
            ValueError: an axis is not a multiple of patch_size 2^(K-1), or the shape is not the network's.
        """
        features = self._encode(x)
        temperatures = [0.0 for _ in range(self.levels)]
        y, _, _ = self.decoder(features[-1], features, [], temperatures)
        return self.output(y, self.voxel_gaussian())[0]
