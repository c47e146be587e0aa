"""The command line of every ``python -m scripts.<command>``: reading it, and ending errors with a sentence."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from functools import wraps
from typing import Any

import fire
from scripts.utils.errors import show_root_cause


def run(program: str, commands: Callable | dict[str, Callable]) -> Any:
    """Call a function with the arguments that the command line gives, and return what it returns.

    Nothing is called until every argument is understood (Fire itself calls first and reports a misspelt option
    afterwards). An error ends the program as :py:func:`scripts.utils.errors.show_root_cause` says.

    Args:
        program: how the program is called, such as ``python -m scripts.phantoms``.
        commands: the function, or several by name, of which the first argument chooses one.

    Raises:
        SystemExit: the arguments are not understood.
    """
    show_root_cause()
    logging.basicConfig(level=logging.INFO, format="%(message)s")

    def noted(function: Callable) -> Callable[..., list]:
        @wraps(function)
        def note(*args, **kwargs):
            return [function, args, kwargs]

        return note

    named = {name: noted(f) for name, f in commands.items()} if isinstance(commands, dict) else noted(commands)
    request = fire.Fire(named, name=program, serialize=lambda _: None)
    if not isinstance(request, list):
        sys.exit(f"Say which of {', '.join(commands)}; --help says more.")
    function, args, kwargs = request
    return function(*args, **kwargs)
