"""What scans are called: by the path in a loaded image's metadata, or by that in an item of a datalist."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from scripts.utils.files import expand

# in a loaded image's metadata: all its files, of which MONAI keeps the first; in a datalist's item: the files that its
# results are named by, where they are not its image's
CHANNEL_FILES = "channel_files"
UNUSABLE = "unusable"  # in a datalist's item: why it cannot be read


def image_path(image: Any, default: Any = "") -> str:
    """The path of a loaded image, which MONAI's readers keep in its metadata; ``default`` for an image without."""
    return str(getattr(image, "meta", {}).get("filename_or_obj", default))


def image_files(image: Any) -> list[str]:
    """The paths of a loaded image's channels; one path where they come from one file."""
    return list(getattr(image, "meta", {}).get(CHANNEL_FILES) or [image_path(image)])


def image_captions(image: Any) -> list[str]:
    """The file names of a loaded image's channels up to their first dots, for figures; a dash for an image without."""
    return [printable(Path(path).name.split(".")[0]) or "-" for path in image_files(image)]


def item_path(item: Mapping[str, Any]) -> str:
    """The path of a datalist item's first (usually only) file, by which the item's results are named."""
    image = item["image"]
    return image[0] if isinstance(image, list | tuple) else image


def item_files(item: Mapping[str, Any]) -> list[str]:
    """The paths of a datalist item's channels; one path where they are one file."""
    files = item.get(CHANNEL_FILES) or item["image"]
    return list(files) if isinstance(files, list | tuple) else [files]


def expanded(paths: Any) -> list[str]:
    """One path or several as a list, with the user's home in place of ``~``."""
    return [expand(path) for path in (paths if isinstance(paths, list | tuple) else [paths])]


def printable(name: str) -> str:
    """A file's name as text that can be written as UTF-8, whatever bytes it is made of, as tables have it."""
    return name.encode(errors="backslashreplace").decode()


def _items(scans: Any) -> Sequence[Any]:
    """The items behind a data set, also a subset or several one after the other; None for what names nobody."""
    if hasattr(scans, "datasets"):
        return [item for part in scans.datasets for item in _items(part)]
    if hasattr(scans, "indices"):
        items = _items(scans.dataset)
        return [items[place] for place in scans.indices]
    for name in ("data", "dataset"):
        if hasattr(scans, name):
            return _items(getattr(scans, name))
    return scans if isinstance(scans, Sequence) else [None] * len(scans)


def people_of(scans: Any) -> list[list[int]]:
    """Places of the scans of each person, in the order of their first ones; each scan's own where nobody is named.

    Args:
        scans: items of a datalist, or a data set of such, or of another one.
    """
    people: dict[Any, list[int]] = {}
    for place, item in enumerate(_items(scans)):
        people.setdefault((isinstance(item, Mapping) and item.get("subject")) or place, []).append(place)
    return list(people.values())


def one_of_each(scans: Any) -> list[int]:
    """The place of the first scan of each person, see :func:`people_of`."""
    return [places[0] for places in people_of(scans)]
