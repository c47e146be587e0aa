"""Masks of lesions, or of what is missing, beside scans: found by their names, read on the scans' grids."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from monai.data import MetaTensor
from monai.data.utils import affine_to_spacing, to_affine_nd
from monai.utils import ensure_tuple
from scripts.data.find import compile_pattern, fill_pattern, find_by_wildcards
from scripts.data.tables import read_table
from scripts.data.transforms import LoadScand, ScanError
from scripts.utils.errors import InputError, NotAFolderError, NotFoundError
from scripts.utils.files import expand
from scripts.utils.formats import without_image_suffix
from scripts.utils.names import image_path, item_path
from torch import Tensor

logger = logging.getLogger(__name__)

KINDS_FILE = "kinds.csv"  # in the folder of the masks
NO_KIND = "none"  # of a scan whose cell says so, or is empty


def pair_masks(
    scans: Sequence[Mapping[str, Any]],
    root: str | os.PathLike,
    scan_pattern: str | Sequence[str],
    mask_dir: str | os.PathLike | None,
    mask_pattern: str | None = None,
    masked_only: bool = False,
) -> list[dict[str, Any]]:
    """Give each scan the mask for which the same text stands in place of the patterns' wildcards.

    Args:
        scans: items of a data set.
        root: the folder that their names are relative to.
        scan_pattern: see :func:`scripts.data.find.find_scans`; of several patterns (channels) the first names the
            scan.
        mask_dir: the folder that holds the masks.
        mask_pattern: of the masks; None: that of the scans.
        masked_only: leave out scans without a mask, and log how many.

    Returns:
        The items with ``mask``, a path, or None where there is none.

    Raises:
        ValueError: when ``mask_dir`` is None.
        FileNotFoundError, NotADirectoryError: when the folder does not exist, nothing matches, or no scan has a mask.
    """
    if mask_dir is None:
        raise InputError("mask_dir is not set: set --mask_dir to the folder of the masks, and --mask_pattern.")
    masks_root = Path(expand(mask_dir))
    if not masks_root.is_dir():
        raise NotAFolderError(f"mask_dir '{masks_root}' is not a folder: set --mask_dir to that of the masks.")
    scan_pattern = ensure_tuple(scan_pattern)[0]
    mask_pattern = mask_pattern or scan_pattern
    masks = find_by_wildcards(masks_root, mask_pattern, "mask_dir", "mask_pattern")
    texts_of, items, texts = compile_pattern(scan_pattern, "scan_pattern"), [], None
    for scan in scans:
        found = texts_of(Path(os.path.relpath(expand(item_path(scan)), root)).as_posix())
        texts = texts or found
        items.append({**scan, "mask": str(masks_root / masks[found]) if found in masks else None})
    unmasked = [item for item in items if item["mask"] is None]
    if len(unmasked) == len(items):
        sought = f", such as '{masks_root / fill_pattern(mask_pattern, texts)}'" if texts else ""
        raise NotFoundError(
            f"No scan has a mask: scan_pattern '{scan_pattern}' and mask_pattern '{mask_pattern}' match "
            f"'{item_path(items[0])}' and '{masks_root / next(iter(masks.values()))}', but a mask must have its scan's "
            f"text in place of the wildcards{sought}: set both patterns so that they differ from each other as the "
            "names do."
        )
    if masked_only and unmasked:
        logger.warning(
            "%d of %d scan(s) have no mask, such as '%s': they are left out.",
            *(len(unmasked), len(items), item_path(unmasked[0])),
        )
        return [item for item in items if item["mask"] is not None]
    return items


def read_kinds(mask_dir: str | os.PathLike, scans: Sequence[str]) -> dict[str, str]:
    """Of what kind each scan's lesions are, by ``kinds.csv`` beside the masks; an empty text where nothing is said of
    it.

    Its column ``scan`` has the names of the scans' files, with their suffixes or without, or what they begin with
    before a ``_``; ``kind`` the kind.
    """
    path = Path(expand(mask_dir)) / KINDS_FILE
    if not path.is_file():
        return dict.fromkeys(scans, "")
    columns, rows = read_table(path)
    lacking = [name for name in ("scan", "kind") if name not in columns]
    if lacking:
        raise InputError(f"'{path}' has no column '{lacking[0]}': its first line must name the columns scan and kind.")
    known = {without_image_suffix(row["scan"]): row["kind"] or NO_KIND for row in rows}
    kinds, used = {}, set()
    for scan in scans:
        parts = without_image_suffix(Path(scan).name).split("_")
        names = [name for count in range(len(parts), 0, -1) if (name := "_".join(parts[:count])) in known]
        kinds[scan] = known[names[0]] if names else ""
        used.update(names)
    unused = [name for name in known if name not in used]
    if unused:
        logger.warning("'%s': %d of %d rows are of no scan, such as '%s'.", path, len(unused), len(known), unused[0])
    return kinds


def read_mask(path: str, scan: MetaTensor) -> Tensor:
    """A scan's mask, bool ``[1, *spatial]``: true where the file, on the grid of the scan as loaded, is above 0."""
    mask = LoadScand("mask")({"mask": path})["mask"]
    rank = scan.ndim - 1
    affines = [to_affine_nd(rank, image.affine.numpy().astype(float)) for image in (scan, mask)]
    apart = 1e-2 * affine_to_spacing(affines[0], r=rank).min()
    if mask.shape[1:] != scan.shape[1:] or not np.allclose(*affines, rtol=0, atol=apart):
        raise ScanError(
            f"The mask '{path}' (shape {tuple(mask.shape[1:])}) lies on another grid than "
            f"'{image_path(scan)}' (shape {tuple(scan.shape[1:])}), or its affine differs: resample it to the scan's "
            "grid, nearest neighbour."
        )
    if len(mask) != 1:
        raise ScanError(f"The mask '{path}' has {len(mask)} channels: give one, which counts for all the scan's.")
    return mask.as_tensor() > 0
