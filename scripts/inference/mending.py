"""Scans mended until a network knows them, as it says itself what happened to them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from scripts.inference.familiar import Examiner
from scripts.utils.errors import root_cause
from scripts.utils.formats import save_nifti
from tqdm import tqdm

__all__ = ["mend_scans"]


def mend_scans(
    scans: Mapping[Path, Path], ckpt: str | os.PathLike, config_file: str | Sequence[str] = ()
) -> tuple[dict[Path, dict[str, Any]], dict[Path, str]]:
    """Ask of each scan what happened to it, undo where it lies and what is no brain, and ask again.

    Args:
        scans: of each scan's file, where the mended one is written, ``.nii.gz``.
        ckpt: weights, with their population prior beside them.
        config_file: overlays of configs/inference.json, where the weights need them.

    Returns:
        of each scan's file ``verdict`` (``ok`` if the network knows it now, else ``check``), ``reasons`` against it,
        ``mended`` (the reason found before, if any), ``gain`` (bits per dim), and ``distance`` from what is usual over
        its limit, before and ``after``; and why others failed.
    """
    examiner = Examiner.of(ckpt, config_file)
    rows: dict[Path, dict[str, Any]] = {}
    failures: dict[Path, str] = {}
    for path, result in tqdm(scans.items(), "mending", unit="scan"):
        try:
            image = examiner.load(str(path))
            found = after = examiner.examine(image)
            mended = examiner.mended(image, found)
            if mended is not None:
                image, after = mended, examiner.examine(mended)
            result.parent.mkdir(parents=True, exist_ok=True)
            save_nifti(result, image.as_tensor(), image.affine)
        except Exception as error:  # one scan must not end the work on the others
            failures[path] = str(root_cause(error))
            continue
        row: dict[str, Any] = {"verdict": "ok", "reasons": ""}
        if not after.familiar:
            row = {"verdict": "check", "reasons": after.sentence()}
        row |= {"mended": found.reason if mended is not None else "", "gain": "" if found.gain is None else found.gain}
        rows[path] = row | {"distance": found.distance / found.limit, "after": after.distance / after.limit}
    return rows, failures
