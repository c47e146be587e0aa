"""The command line of every ``python -m scripts.<command>``: reading it, checking it, ending errors with a sentence."""

from __future__ import annotations

import difflib
import inspect
import logging
import math
import numbers
import sys
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

from scripts.utils.errors import InputError, show_root_cause


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
    import fire  # a program that only imports a command need not have it

    # MONAI imports MLflow where it is installed, a quarter of the time that a command takes to start; none uses it
    sys.modules.setdefault("mlflow", None)
    show_root_cause()
    logging.basicConfig(level=logging.INFO, format="%(message)s")

    def noted(function: Callable) -> Callable[..., list]:
        @wraps(function)
        def note(*args, **kwargs):
            return [function, args, kwargs]

        annotations = {name: str(p.annotation) for name, p in inspect.signature(function).parameters.items()}
        paths = [name for name, said in annotations.items() if "Path" in said and "Sequence" not in said]
        return fire.decorators.SetParseFns(**dict.fromkeys(paths, _as_written))(note)

    check_options(commands, sys.argv[1:])
    named = {name: noted(f) for name, f in commands.items()} if isinstance(commands, dict) else noted(commands)
    request = fire.Fire(named, name=program, serialize=lambda _: None)
    if not isinstance(request, list):
        sys.exit(f"Say which of {', '.join(commands)}; --help says more.")
    function, args, kwargs = request
    signature = inspect.signature(function)
    for name, value in signature.bind(*args, **kwargs).arguments.items():
        if signature.parameters[name].annotation in (bool, "bool") and not isinstance(value, bool):
            raise InputError(f"{name} is {value!r}: it must be True or False.")  # any text would count as true
    return function(*args, **kwargs)


def _as_written(path: str) -> str | None:
    """A path, of which Fire would take ``2024_05`` for a number and cut ``run#2`` short."""
    return None if path == "None" else path


def check_options(commands: Callable | dict[str, Callable], words: Sequence[str]) -> None:
    """End the program, with exit code 2, at an option that the function lacks; Fire names it in words of its own."""
    function = commands if callable(commands) else commands.get(next(iter(words), ""))
    if function is None or "--" in words:  # what follows is Fire's own
        return
    parameters = inspect.signature(function).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return
    for word in words:
        option = word.removeprefix("--").split("=")[0].replace("-", "_")
        if not word.startswith("--") or {option, option.removeprefix("no")} & {*parameters, "help"}:
            continue
        known = difflib.get_close_matches(option, parameters, n=1) or parameters
        known = ", ".join(f"--{name}" for name in known)
        print(f"Error: there is no option {word.split('=')[0]}: did you mean {known}?", file=sys.stderr)
        sys.exit(2)


def bundle_words() -> list[str]:
    """What follows ``python -m monai.bundle``; nothing in other programs, whose command lines are their own."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return sys.argv[1:] if spec is not None and spec.name.startswith("monai.bundle.") else []


def check_integer(name: str, value: Any, least: int, most: float = math.inf) -> None:
    """Refuse what is not a whole number within limits.

    Args:
        name: of the argument, for the message.
        value: what was given.
        least, most: the limits, both allowed.

    Raises:
        ValueError: ``value`` is no whole number, or outside the limits.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or not least <= value <= most:
        limits = f", {least} or more" if most == math.inf else f" from {least} to {most}"
        raise InputError(f"{name} is {value!r}, but must be a whole number{limits}.")


def check_number(name: str, value: Any, least: float, most: float) -> None:
    """Refuse what is not a number from ``least`` to ``most``; the message calls it ``name``."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not least <= value <= most:
        limits = f"{least} or more" if most == math.inf else f"from {least} to {most}"
        raise InputError(f"{name} is {value!r}, but must be a number {limits}.")
