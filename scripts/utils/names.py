"""What scans are called: by the path in a loaded image's metadata, or by that in an item of a datalist."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["image_caption", "image_path", "item_path", "printable"]


def image_path(image: Any, default: Any = "") -> str:
    """The path of a loaded image, which MONAI's readers keep in its metadata; ``default`` for an image without."""
    return str(getattr(image, "meta", {}).get("filename_or_obj", default))


def image_caption(image: Any) -> str:
    """The file name of a loaded image up to its first dot, for figures; a dash for an image without."""
    return Path(image_path(image)).name.split(".")[0] or "-"


def item_path(item: Mapping[str, Any]) -> str:
    """The path of a datalist item's first (usually only) file, by which the item's results are named."""
    image = item["image"]
    return image[0] if isinstance(image, list | tuple) else image


def printable(name: str) -> str:
    """A file's name as text that can be written as UTF-8, whatever bytes it is made of."""
    return os.fsencode(name).decode("utf-8", "replace")
