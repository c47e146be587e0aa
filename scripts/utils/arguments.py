"""Checks of arguments that people give, whose messages name the argument."""

from __future__ import annotations

import numbers
from typing import Any

from scripts.utils.errors import InputError

__all__ = ["check_integer", "check_number"]


def check_integer(name: str, value: Any, least: int) -> None:
    """Refuse what is not a whole number.

    Args:
        name: of the argument, for the message.
        value: what was given.
        least: the smallest number that makes sense.

    Raises:
        ValueError: ``value`` is no whole number, or less than ``least``.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < least:
        raise InputError(f"{name} is {value!r}, but must be a whole number, {least} or more.")


def check_number(name: str, value: Any, least: float, most: float) -> None:
    """Refuse what is not a number within limits.

    Args:
        name: of the argument, for the message.
        value: what was given.
        least, most: the limits, both allowed.

    Raises:
        ValueError: ``value`` is no number, or outside the limits.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not least <= value <= most:
        raise InputError(f"{name} is {value!r}, but must be a number from {least} to {most}.")
