"""The random transforms that MONAI and TorchIO lack, or that need an adapter."""

from __future__ import annotations

import copy
import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform, RandAffined, RandomizableTransform, RandTorchIOd, Resample
from monai.transforms.utils import create_grid
from scipy import ndimage
from scripts.data.reading import reaching_border
from scripts.utils.errors import InputError

TRIAL_SIZE = 16  # voxels along each axis of the image that each augmentation is tried on: all together take 0.4 s
NAMED_ALONE = ("mirror",)  # transforms that are not taken unless they are named
PUBLISHED = 128  # voxels along each axis of the grid
# Resampling leaves a faint rim around the brain. What lies so little above the lowest value, as a share of the image's
# range, still counts as background, or a haircut would remove only that rim.
RIM = 0.05


def chosen(augmentation: Mapping[str, Any], names: bool | Sequence[str] | None) -> dict[str, Any]:
    """The random transforms that a run applies.

    Args:
        augmentation: by name, in their order.
        names: of those that are wanted; True: of all but ``mirror``, which makes a cohort of few scans larger, and one
            of many less certain; False or None: of none.

    Raises:
        InputError: there is no such transform.
    """
    if names is None or isinstance(names, bool):
        return {name: transform for name, transform in augmentation.items() if names and name not in NAMED_ALONE}
    is_list = isinstance(names, list | tuple)
    unknown = [name for name in names if name not in list(augmentation)] if is_list else [names]
    if unknown:
        raise InputError(
            f"augment has {unknown[0]!r}: set it to True, False or a list of some of {', '.join(augmentation)}."
        )
    return {name: transform for name, transform in augmentation.items() if name in names}


class RandAffineScand(RandAffined):
    """MONAI's ``RandAffined``, which does nothing at all where it does not act.

    Lazily, MONAI's notes an identity then, and always one of three dimensions, which cannot be joined with a transform
    of a 2D scan before it (MONAI 1.6.1).
    """

    def push_transform(self, data: Any, *args: Any, **kwargs: Any) -> Any:
        """Note an operation, if there was one."""
        return super().push_transform(data, *args, **kwargs) if self._do_transform else data


class RandElasticd(RandomizableTransform, MapTransform):
    """Bend a scan by a smooth random displacement, in 2D or 3D.

    The displacement is that of MONAI's ``Rand3DElasticd``: white noise in [-1, 1] per axis and voxel, smoothed by a
    Gaussian and multiplied by the magnitude. MONAI's resamples every scan whatever its ``prob``, has no 2D form with
    the same arguments, and smooths by a dense convolution, which took most of its time.

    Input and output: ``[channels, *spatial]``; what comes from outside is 0. All keys are bent in the same way.

    Args:
        keys: the keys that hold scans of one shape.
        prob: probability that a scan is bent.
        sigma_range: of the Gaussian, in voxels.
        magnitude_range: of the displacement, in voxels before smoothing.
    """

    def __init__(
        self,
        keys: KeysCollection,
        prob: float = 0.1,
        sigma_range: tuple[float, float] = (1, 3),
        magnitude_range: tuple[float, float] = (3, 5),
    ) -> None:
        MapTransform.__init__(self, keys)
        RandomizableTransform.__init__(self, prob)
        self.sigma_range = sigma_range
        self.magnitude_range = magnitude_range
        # in single precision: 5e-6 of the range from double, in 0.8 of the time
        self.resample = Resample(mode="bilinear", padding_mode="zeros", dtype=torch.float32)

    def __call__(self, data: Mapping[Hashable, MetaTensor]) -> dict[Hashable, MetaTensor]:
        d = dict(data)
        self.randomize(None)
        if not self._do_transform:
            return d
        shape = d[self.first_key(d)].shape[1:]
        sigma, magnitude = (self.R.uniform(*r) for r in (self.sigma_range, self.magnitude_range))
        noise = self.R.uniform(-1, 1, (len(shape), *shape)).astype(np.float32)
        # cut off at 3 sigma, beyond which lie 0.3 % of the weight
        smooth = ndimage.gaussian_filter(noise, (0, *[sigma] * len(shape)), mode="constant", truncate=3)
        grid = torch.as_tensor(create_grid(shape, dtype=np.float32))
        grid[: len(shape)] += magnitude * torch.from_numpy(smooth)
        for key in self.key_iterator(d):
            d[key] = self.resample(d[key], grid.to(d[key].device))
        return d


class RandHaircutd(RandomizableTransform, MapTransform):
    """Shave a few voxels off the edge of the brain, as a tighter skull-strip would.

    The background is what lies near the image's lowest value and reaches the border of the volume; dark voxels enclosed
    by the brain are not an edge. An image without background is returned as it is.

    Input and output: ``[channels, *spatial]``. All keys and channels lose the same number of voxels.

    Args:
        keys: the keys that hold skull-stripped scans.
        prob: probability that a scan is shaved.
        width: the fewest and the most voxels to shave off.

    Raises:
        ValueError: when ``width`` is not a pair of whole numbers, the first at least 1 and at most the second.
    """

    def __init__(self, keys: KeysCollection, prob: float = 0.1, width: tuple[int, int] = (1, 3)) -> None:
        MapTransform.__init__(self, keys)
        RandomizableTransform.__init__(self, prob)
        if len(width) != 2 or not 1 <= width[0] <= width[1]:
            raise InputError(f"width is {width}: it must be the fewest and the most voxels to shave, from 1 up.")
        self.width = (int(width[0]), int(width[1]))

    def __call__(self, data: Mapping[Hashable, MetaTensor]) -> dict[Hashable, MetaTensor]:
        d = dict(data)
        self.randomize(None)
        if not self._do_transform:
            return d
        width = int(self.R.randint(self.width[0], self.width[1] + 1))
        for key in self.key_iterator(d):
            d[key] = self._shave(d[key], width)
        return d

    def _shave(self, image: MetaTensor, width: int) -> MetaTensor:
        pixels = image.as_tensor()
        lowest = pixels.amin()
        dark = pixels <= lowest + RIM * (pixels.amax() - lowest)
        brain = ~reaching_border(dark.all(dim=0).cpu().numpy())
        # Steps to neighbours that share a face or an edge shave a ball more evenly than a cross or a cube would.
        # Nothing is known beyond the border of the volume, so a brain that is cut off there keeps that face.
        step = ndimage.generate_binary_structure(brain.ndim, min(2, brain.ndim))
        brain = ndimage.binary_erosion(brain, step, iterations=width, border_value=1)
        return torch.where(torch.from_numpy(brain).to(pixels.device), image, lowest)


class RandTorchIOScand(RandomizableTransform, MapTransform):
    """Apply a TorchIO transform through MONAI's ``RandTorchIOd``, and keep the scan's metadata.

    Some TorchIO transforms return a plain tensor; the affine and the file name would be lost, and a batch of scans of
    which some were transformed could not be collated. TorchIO gets the scan without its affine: its arguments in mm are
    voxels here. It draws from PyTorch's own generator, which ``monai.utils.set_determinism`` seeds.

    Input and output: ``[channels, x, y, z]``; a 2D scan (``[channels, x, y]``) is returned as it is.

    Args:
        keys: the keys that hold scans.
        name: the TorchIO transform, such as ``RandomMotion``.
        prob: probability that it is applied.
        kwargs: further arguments of the TorchIO transform.
    """

    def __init__(self, keys: KeysCollection, name: str, prob: float = 0.1, **kwargs: Any) -> None:
        MapTransform.__init__(self, keys)
        RandomizableTransform.__init__(self, prob)
        self.name = name
        self.torchio = RandTorchIOd(keys, name=name, p=1.0, **kwargs)

    def __call__(self, data: Mapping[Hashable, MetaTensor]) -> dict[Hashable, MetaTensor]:
        d = dict(data)
        self.randomize(None)
        images = {key: d[key] for key in self.key_iterator(d) if d[key].ndim == 4}
        if not self._do_transform or not images:
            return d
        for key, changed in self.torchio({key: image.as_tensor() for key, image in images.items()}).items():
            d[key] = MetaTensor(changed).copy_meta_from(images[key])
        return d


def try_augmentations(augmentation: Mapping[str, RandomizableTransform], channels: int, spatial_dims: int) -> None:
    """Apply each augmentation to an image once: many arguments are read only when a scan is drawn, hours later perhaps.

    Args:
        augmentation: the random transforms by name; they are left as they are.
        channels, spatial_dims: of the scans.

    Raises:
        ValueError: one cannot be applied; the sentence names it.
    """
    image = MetaTensor(torch.rand(channels, *(TRIAL_SIZE,) * spatial_dims, generator=torch.Generator().manual_seed(0)))
    with torch.random.fork_rng(devices=[]):  # TorchIO draws from PyTorch's own state
        for name, transform in augmentation.items():
            certain = copy.deepcopy(transform).set_random_state(0)
            certain.prob = 1.0
            try:
                certain({"image": image.clone()})
            except Exception as error:  # of MONAI, TorchIO or NumPy, whatever they raise
                raise InputError(f"augmentation#{name} cannot be applied ({error}): change its arguments.") from error


def each_axis(value: Any, spatial_shape: Sequence[int]) -> list[Any]:
    """The same value for each axis."""
    return [value] * len(spatial_shape)


def rotations(degrees: float, spatial_shape: Sequence[int]) -> list[float]:
    """Angles about each axis, in radians."""
    return each_axis(math.radians(degrees), spatial_shape)


def shears(degrees: float, spatial_shape: Sequence[int]) -> list[float]:
    """Shear factors, one for each ordered pair of axes."""
    axes = len(spatial_shape)
    return [math.tan(math.radians(degrees))] * (axes * (axes - 1))


def voxels(published: float, spatial_shape: Sequence[int]) -> list[float]:
    """So many voxels of the published grid, along each axis."""
    return [size * published / PUBLISHED for size in spatial_shape]


def shares(share: float, spatial_shape: Sequence[int]) -> list[float]:
    """A share of each axis, in voxels."""
    return [size * share for size in spatial_shape]


def haircut(published: int, spatial_shape: Sequence[int]) -> tuple[int, int]:
    """From 1 voxel to so many of the published grid, at least 1."""
    return 1, max(1, round(published * min(spatial_shape) / PUBLISHED))


def blur(spatial_shape: Sequence[int]) -> tuple[float, float]:
    """Standard deviations in voxels: from 0.25 to 1 of the published grid, at least 0.5."""
    return 0.25, max(0.5, min(spatial_shape) / PUBLISHED)


def spikes(amplitudes: Sequence[float], spatial_shape: Sequence[int]) -> list[float]:
    """Logarithms of spikes in k-space that make stripes of these amplitudes, shares of the intensity range."""
    return [math.log(amplitude * math.prod(spatial_shape)) for amplitude in amplitudes]
