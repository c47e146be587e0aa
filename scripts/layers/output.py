"""The two ends of the network: how it sees a scan, and the distribution that it predicts for each voxel.

Both can be counted from a Gaussian for each voxel, the mean and standard deviation of the training scans: an untrained
network then already predicts these, and what is left to learn is how a scan deviates.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn as nn
from scripts.layers.convolutions import from_patches, gelu_conv, make_conv, preserve_variance
from scripts.layers.gaussian import standard_deviation
from scripts.layers.levels import check_choice
from scripts.utils.errors import InputError
from torch import Tensor

OUTPUT_STD_RANGE = (1e-2, 1.0)
# least standard deviation that deviations are divided by, in an input range of 2, as tanh has it: where scans hardly
# vary, noise is not blown up
LEAST_INPUT_STD = 0.05
# what scans are scaled to for each output activation
OUTPUT_RANGES = {"tanh": (-1.0, 1.0), "sigmoid": (0.0, 1.0), "identity": (-1.0, 1.0)}
FOREGROUND = 0.05  # of the range that scans are scaled to: background is below


def foreground(scans: Tensor, network: Any) -> Tensor:
    """Where scans exceed 5 % of the range of ``network.output_activation``, shaped like them."""
    low, high = OUTPUT_RANGES[network.output_activation]
    return scans > low + FOREGROUND * (high - low)


def foreground_percentile(values: Tensor, scans: Tensor, network: Any, percentile: float) -> Tensor:
    """That of each scan's values in its foreground, ``[batch]``; of all values, if it has none."""
    inside = foreground(scans, network).flatten(1)
    return quantile(values.flatten(1), inside | ~inside.any(1, keepdim=True), percentile / 100)


def quantile(values: Tensor, inside: Tensor, q: float) -> Tensor:
    """Of each row the quantile of the values inside, ``[rows]``.

    As ``torch.quantile``, which refuses more than 16 million values. How many are inside stays on the device.

    Args:
        values, inside: ``[rows, values]``, the second bool.
    """
    ordered = torch.where(inside, values, torch.inf).sort(dim=1).values  # those outside last
    place = q * (inside.sum(1, keepdim=True).double() - 1)
    below, above = (ordered.gather(1, index.long()) for index in (place.floor(), place.ceil()))
    return torch.lerp(below, above, (place - place.floor()).to(below.dtype)).squeeze(1)


def deviation(x: Tensor, voxel_gaussian: tuple[Tensor, Tensor], least_std: float = LEAST_INPUT_STD) -> Tensor:
    """What the encoder sees of scans: by how many standard deviations each voxel differs from its mean, at most 5.

    Args:
        x: ``[batch, channels, *spatial]``.
        voxel_gaussian: mean and standard deviation of each voxel, ``[1, channels, *spatial]``.
        least_std: a smaller standard deviation counts as this one.
    """
    mean, std = voxel_gaussian
    return ((x - mean) / std.clamp_min(least_std)).clamp(-5, 5)


class VoxelGaussian(nn.Module):
    """A network that counts scans from a Gaussian for each voxel, which lives in its buffers.

    It is the base class of the network, so that the buffers have the names ``template_mean``, ``template_std`` and
    ``template_affine`` in its state dict. Every network has ``scan_grid`` besides, which says how its scans were fitted
    to its grid (:class:`scripts.data.scan_grid.ScanGrid`); weights of earlier versions lack it, and load.

    Args:
        template: whether there is such a Gaussian.
    """

    # for TorchScript: compile only the branch that a network takes; leave out what no exported network needs
    __constants__ = ("template",)
    __jit_unused_properties__ = ("scan_affine",)

    def __init__(self, template: bool) -> None:
        super().__init__()
        self.template = template
        self.register_buffer("scan_grid", torch.zeros(5, 3, dtype=torch.float64))

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        state_dict.setdefault(f"{prefix}scan_grid", torch.zeros_like(self.scan_grid))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def register_voxel_gaussian(self, in_channels: int, spatial_shape: Sequence[int] | None) -> None:
        """Add the buffers, if there is a Gaussian: mean 0 and deviation 1 until it is set.

        Raises:
            ValueError: there is no ``spatial_shape``.
        """
        if not self.template:
            return
        if spatial_shape is None:
            raise InputError("network_def: template needs spatial_shape, the grid of the mean scan.")
        self.register_buffer("template_mean", torch.zeros(1, in_channels, *spatial_shape))
        self.register_buffer("template_std", torch.ones(1, in_channels, *spatial_shape))
        self.register_buffer("template_affine", torch.eye(4, dtype=torch.float64))

    def voxel_gaussian(self) -> tuple[Tensor, Tensor] | None:
        """Mean and standard deviation of each voxel, ``[1, in_channels, *spatial_shape]``."""
        return (self.template_mean, self.template_std) if self.template else None

    @torch.no_grad()
    def set_voxel_gaussian(self, mean: Tensor, std: Tensor, affine: Tensor | None = None) -> None:
        """Let the network see and predict deviations from this Gaussian, which is its first prediction.

        Args:
            mean, std: of the training scans, ``[in_channels, *spatial_shape]``, in the units of the network's input.
            affine: of their grid, ``[4, 4]``, voxel indices to world millimetres.

        Raises:
            ValueError: the network was built without ``template``.
        """
        if not self.template:
            raise InputError("network_def: set_voxel_gaussian needs template: true.")
        self.template_mean.copy_(mean)
        self.template_std.copy_(std).clamp_(*OUTPUT_STD_RANGE)
        if affine is not None:
            self.template_affine.copy_(affine)

    @property
    def scan_affine(self) -> Tensor:
        """Of the grid of the scans, ``[4, 4]``: the training scans', or voxels of 1 mm without a Gaussian."""
        return self.template_affine.cpu() if self.template else torch.eye(4, dtype=torch.float64)


class OutputHead(nn.Module):
    """A GELU and a convolution of kernel 1 that give mean and standard deviation of each voxel.

    Args:
        spatial_dims: 2 or 3.
        width: channels of the decoder's last features.
        in_channels: channels of a scan.
        std_form, output_activation, predict_scale: see :class:`scripts.networks.VDVAE`.
        zero_init: start from weights of zero.
        patch_size: voxels along each axis that are predicted from one voxel of the features.

    Raises:
        ValueError: there is no such activation.
    """

    # TorchScript compiles only the branch that a network takes
    __constants__ = ("output_activation",)

    def __init__(
        self,
        spatial_dims: int,
        width: int,
        in_channels: int,
        *,
        std_form: str,
        output_activation: str,
        predict_scale: bool,
        zero_init: bool,
        patch_size: int = 1,
    ) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.std_form, self.std_range = std_form, OUTPUT_STD_RANGE
        self.output_activation = check_choice("output_activation", output_activation, tuple(OUTPUT_RANGES))
        self.predict_scale, self.patch_size = predict_scale, patch_size
        conv = make_conv(spatial_dims, width, in_channels * (2 if predict_scale else 1) * patch_size**spatial_dims)
        self.weight, self.bias = conv.weight, conv.bias
        if zero_init:
            nn.init.zeros_(self.weight)

    def preserve_variance(self, scale: float, head_scale: float) -> None:
        """Start from outputs of size ``head_scale``, in the units of the voxel-wise Gaussian where there is one."""
        if head_scale:
            preserve_variance(self, scale=head_scale)

    def forward(self, features: Tensor, voxel_gaussian: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
        """Predict in fp32, also under autocast.

        Args:
            features: the decoder's last, ``[batch, width, *spatial]``.
            voxel_gaussian: what an output of zero stands for, see :func:`deviation`; None: the activation of zero.

        Returns:
            loc and scale, ``[batch, in_channels, *spatial]``.
        """
        out = from_patches(gelu_conv(features, self.weight, self.bias).float(), self.patch_size)
        loc = out[:, : self.in_channels]
        if voxel_gaussian is not None:
            offset, gain = self._counted_from(voxel_gaussian)
            loc = offset + gain * loc
        if self.output_activation == "tanh":
            loc = torch.tanh(loc)
        elif self.output_activation == "sigmoid":
            loc = torch.sigmoid(loc)
        if not self.predict_scale:
            return loc, torch.ones_like(loc)
        s = out[:, self.in_channels :]
        if voxel_gaussian is not None:
            s = self._scale_counted_from(voxel_gaussian[1]) + s
        return loc, standard_deviation(s, self.std_range, self.std_form)

    def _counted_from(self, voxel_gaussian: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """What the convolution's zero stands for before the activation, and its unit: about a standard deviation.

        So voxels that vary much and voxels that vary little pull equally hard on the weights.
        """
        mean, std = voxel_gaussian
        if self.output_activation == "tanh":
            mean = mean.clamp(-0.999, 0.999)
            offset, slope = torch.atanh(mean), 1 - mean.square()
        elif self.output_activation == "sigmoid":
            mean = mean.clamp(0.0005, 0.9995)
            offset, slope = torch.logit(mean), mean * (1 - mean)
        else:
            offset, slope = mean, torch.ones_like(mean)
        # where the activation is nearly flat (background) a full gain would make it blow up on the first step
        return offset, (std / slope).clamp_max(1.0)

    def _scale_counted_from(self, std: Tensor) -> Tensor:
        """What the convolution's zero stands for, of the unbounded standard deviation."""
        lo, hi = self.std_range
        if self.std_form == "sigmoid":
            # nearer to the bound the sigmoid hardly has a gradient left, and a voxel could never learn to vary more
            return torch.logit(((std - lo) / (hi - lo)).clamp(3e-4, 1 - 3e-4))
        return (2 * std.log()).clamp(lo, hi)
