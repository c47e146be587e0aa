"""Arrays and RAS affines as SimpleITK images, whose world is LPS (x to the left, y to the back), and back."""

from __future__ import annotations

import numpy as np
import SimpleITK

__all__ = ["FLIP", "array_and_affine", "like", "to_sitk"]

FLIP = np.diag([-1.0, -1.0, 1.0, 1.0])  # between RAS (nibabel, NIfTI) and LPS (ITK)


def to_sitk(array: np.ndarray, affine: np.ndarray) -> SimpleITK.Image:
    """An array as a SimpleITK image, float32.

    Args:
        array: ``[x, y, z]``.
        affine: ``[4, 4]``, voxel indices to world mm, RAS.
    """
    affine = FLIP @ affine
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    image = SimpleITK.GetImageFromArray(np.ascontiguousarray(array.T, dtype=np.float32))
    image.SetSpacing(spacing.tolist())
    image.SetDirection((affine[:3, :3] / spacing).ravel().tolist())
    image.SetOrigin(affine[:3, 3].tolist())
    return image


def array_and_affine(image: SimpleITK.Image) -> tuple[np.ndarray, np.ndarray]:
    """A SimpleITK image's voxels, a view ``[x, y, z]``, and its affine ``[4, 4]``, RAS."""
    affine = np.eye(4)
    affine[:3, :3] = np.array(image.GetDirection()).reshape(3, 3) * image.GetSpacing()
    affine[:3, 3] = image.GetOrigin()
    return SimpleITK.GetArrayViewFromImage(image).T, FLIP @ affine


def like(voxels: np.ndarray, image: SimpleITK.Image) -> SimpleITK.Image:
    """An image of these voxels ``[z, y, x]`` on the grid of another."""
    result = SimpleITK.GetImageFromArray(voxels)
    result.CopyInformation(image)
    return result
