"""Smooth random fields over the field of view of the ICBM152 templates, and maps of it read at any points."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F

# The field of view: first voxel centre in world mm (RAS), and mm from the first to the last one.
ORIGIN = np.array([-98.0, -134.0, -72.0])
EXTENT = np.array([196.0, 232.0, 188.0])
# Everything smooth (warps, bias, tissue variation) is drawn on this grid. It fits EXTENT exactly, and because it does
# not depend on the spacing asked for, a scan has the same anatomy at every spacing.
CONTROL_SPACING = 4.0  # mm
CONTROL_SHAPE = tuple(int(n) for n in EXTENT / CONTROL_SPACING + 1)  # 50, 59, 48


def smooth_fields(rng: np.random.Generator, channels: int, scales: tuple[tuple[float, float], ...]) -> torch.Tensor:
    """Gaussian random fields, float32 ``[1, channels, *CONTROL_SHAPE]``.

    Each is a sum of parts: ``scales`` has the length scale (sigma of a Gaussian, mm) and standard deviation of each.
    """
    noise = torch.from_numpy(rng.standard_normal((channels, *CONTROL_SHAPE), dtype=np.float32))
    spectrum = torch.fft.rfftn(noise, dim=(1, 2, 3)) * _spectrum(scales)
    return torch.fft.irfftn(spectrum, s=CONTROL_SHAPE, dim=(1, 2, 3))[None]


@lru_cache
def _spectrum(scales: tuple[tuple[float, float], ...]) -> torch.Tensor:
    """The filter that turns white noise into such a field, over the half spectrum of a real transform."""
    frequencies = np.meshgrid(*[np.fft.fftfreq(n, CONTROL_SPACING) for n in CONTROL_SHAPE], indexing="ij")
    squared = sum(f**2 for f in frequencies)
    gaussians = [(np.exp(-((2 * np.pi * scale) ** 2) * squared), deviation) for scale, deviation in scales]
    power = sum(deviation**2 * gaussian / gaussian.mean() for gaussian, deviation in gaussians)
    return torch.from_numpy(np.sqrt(power[..., : CONTROL_SHAPE[2] // 2 + 1])).float()


def grid_points(voxels: np.ndarray, spacing: float) -> torch.Tensor:
    """Where voxels ``[N, 3]`` of a grid from ``ORIGIN`` on lie in the field of view: -1 to 1 along each axis."""
    return torch.from_numpy((voxels * (2 * spacing / EXTENT) - 1).astype(np.float32))


def sample_maps(maps: torch.Tensor, points: torch.Tensor) -> np.ndarray:
    """Read maps ``[1, channels, x, y, z]`` at points ``[N, 3]`` by trilinear interpolation: ``[channels, N]``."""
    grid = points.flip(-1)[None, None, None]
    # Border padding: the template ends within the brain stem.
    return F.grid_sample(maps, grid, padding_mode="border", align_corners=True)[0, :, 0, 0].numpy()
