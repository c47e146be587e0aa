"""Patterns of files' names: matching paths, and the text in place of their wildcards."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from scripts.utils.errors import InputError

__all__ = ["compile_pattern", "fill_pattern"]

WILDCARD = re.compile(r"(\*|\?|\[[^\]]+\])")


def compile_pattern(pattern: str, setting: str) -> Callable[[str], tuple[str, ...] | None]:
    """Make a function that matches relative posix paths, part by part from the right as ``PurePath.match`` does.

    Returns:
        A function that gives None for a path that does not match; else the folders above the pattern's parts, then the
        text in place of each wildcard.
    """
    parts = [part for part in pattern.split("/") if part not in ("", ".")]
    while parts and parts[0] == "**":  # any depth is searched already
        parts.pop(0)
    if not parts:
        raise InputError(f"{setting} '{pattern}' names no file: set --{setting} to one such as '*.nii.gz'.")
    expressions = [_expression(part) for part in parts]
    depth = len(parts)

    def match(name: str) -> tuple[str, ...] | None:
        pieces = name.split("/")
        if len(pieces) < depth:
            return None
        found = [e.fullmatch(piece) for e, piece in zip(expressions, pieces[-depth:], strict=True)]
        texts = [text for m in found if m for text in m.groups()]
        return ("/".join(pieces[:-depth]), *texts) if all(found) else None

    return match


def fill_pattern(pattern: str, texts: Sequence[str]) -> str:
    """The path that a pattern matches with these texts, as :func:`compile_pattern` finds them."""
    folder, *texts = texts
    rest = iter(texts)
    return "/".join(filter(None, [folder, WILDCARD.sub(lambda found: next(rest, found[0]), pattern)]))


def _expression(part: str) -> re.Pattern:
    """A glob on one part of a path, as a regular expression whose groups are its wildcards."""

    def translate(text: str) -> str:
        if text[0] == "[":
            return f"([{'^' if text[1] == '!' else ''}{text[1:-1].removeprefix('!')}])"
        return {"*": "(.*)", "?": "(.)"}[text]

    # every other piece is a wildcard
    pieces = [translate(text) if i % 2 else re.escape(text) for i, text in enumerate(WILDCARD.split(part))]
    return re.compile("".join(pieces), re.DOTALL)
