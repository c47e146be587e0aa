"""Errors as a command shows them: a sentence, and the traceback where it may be of use."""

from __future__ import annotations

import ast
import errno
import logging
import re
import sys
from types import TracebackType

# how the messages of MONAI's errors begin that wrap the one behind them
MONAI_WRAPPINGS = ("Failed to evaluate", "Failed to instantiate", "applying transform")
# where MONAI calls what a config names: an error right there is about the config, and its traceback says no more
CONFIG_MACHINERY = ("<string>", "monai/utils/module.py", "monai/bundle/")
REMEDIES = {
    errno.ENOENT: "does not exist: check the path",
    errno.EACCES: "must not be read or written by you (permission denied): name another, or change its permissions",
    errno.EPERM: "must not be changed by you (operation not permitted): name another, or change its permissions",
    errno.ENAMETOOLONG: "has a longer name than its file system allows: give it a shorter one",
    errno.EROFS: "is on a read-only file system: name another place",
    errno.EEXIST: "exists already, and is not what is needed there: name another",
    errno.EISDIR: "is a folder where a file is expected: name a file",
    errno.ENOTDIR: "is a file, or lies in one, where a folder is expected: name a folder",
}


class BundleError(Exception):
    """What the bundle refuses, in a sentence that says what to do; a traceback would add nothing."""


class InputError(BundleError, ValueError):
    """A setting, an argument or a file's content makes no sense."""


class NotFoundError(BundleError, FileNotFoundError):
    """A file or folder that was named does not exist."""


class ExistsError(BundleError, FileExistsError):
    """What is there already must not be overwritten."""


class NotAFolderError(BundleError, NotADirectoryError):
    """A file is where a folder is needed."""


class LaunchError(BundleError, RuntimeError):
    """Processes were started in a way that cannot work."""


class ResourceError(BundleError, OSError):
    """The machine lacks what is needed: disk, memory, a port, a permission."""


def show_root_cause(debug: bool = False) -> None:
    """End this program, when an error does, with the sentence of the error behind those that MONAI wraps around it.

    An error that is nobody's mistake but the program's comes with its traceback, the sentence before and after it.

    Args:
        debug: show the traceback of every error, and let MONAI log what it was given.
    """
    if debug:
        logging.getLogger("monai.bundle.scripts").setLevel(logging.INFO)  # configs/logging.conf quietens it

    def show(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if issubclass(kind, KeyboardInterrupt):
            print("\nStopped before the end; what was saved before is whole.", file=sys.stderr)
            return
        text = f"Error: {sentence(error)}"
        print(text, file=sys.stderr)
        if debug or not is_refusal(error):
            print(file=sys.stderr)
            sys.__excepthook__(kind, error, trace)
            print(f"\n{text}", file=sys.stderr)

    sys.excepthook = show


def root_cause(error: BaseException) -> BaseException:
    """The error behind those that MONAI's config parser and transforms wrap around it."""
    while _is_wrapping(error):
        error = error.__cause__
    return error


def is_refusal(error: BaseException) -> bool:
    """Whether an error is about what somebody gave the program: its sentence then says all, without a traceback.

    Such are what the bundle itself refuses, what the system says of a file, and what a config names wrongly.
    """
    root = root_cause(error)
    kind, _ = _of_worker(str(root)) or ("", "")
    if isinstance(root, BundleError) or kind.startswith("scripts."):
        return True
    return (isinstance(root, OSError) and root.errno in REMEDIES) or _raised_in(root, CONFIG_MACHINERY)


def sentence(error: BaseException) -> str:
    """What an error says, with the part of the config where it came up if it does not say it itself."""
    root = root_cause(error)
    if isinstance(root, OSError) and root.errno is not None:
        if root.filename is not None:
            return f"'{root.filename}' {REMEDIES.get(root.errno, f'cannot be used ({root.strerror})')}."
        return f"{root.strerror}."
    of_worker = _of_worker(str(root))
    if isinstance(root, BundleError) and of_worker is None:
        return str(root)
    kind, text = of_worker or (type(root).__name__, str(root))
    text = text.split("\n\nFor details about installing")[0]  # of MONAI's, on an import that failed
    if kind.startswith("scripts."):
        return text
    return f"{_context(error)}{kind.split('.')[-1]}: {text}"


def _is_wrapping(error: BaseException) -> bool:
    return error.__cause__ is not None and str(error).startswith(MONAI_WRAPPINGS)


def _raised_in(error: BaseException, places: tuple[str, ...]) -> bool:
    """Whether an error came up in one of these files."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    file = "" if trace is None else trace.tb_frame.f_code.co_filename.replace("\\", "/")
    return any(place in file for place in places)


def _of_worker(message: str) -> tuple[str, str] | None:
    """Type and message of what went wrong in another process, of which a message holds the traceback.

    PyTorch makes it the message of a loader process's error, Python that of the cause of a pool's. What the bundle
    refuses comes first, then the first error of all.
    """
    if "Original Traceback" not in message and not message.startswith('\n"""\nTraceback'):
        return None
    errors = re.findall(r"^([\w.]+): (.*)$", message, re.MULTILINE)
    errors = [(kind, text) for kind, text in errors if not text.startswith(MONAI_WRAPPINGS)]
    own = [(kind, re.sub(r"^\[Errno \d+\] ", "", text)) for kind, text in errors if kind.startswith("scripts.")]
    return next(iter(own + errors), None)


def _context(error: BaseException) -> str:
    """The innermost part of a config that failed, for the beginning of a sentence; nothing where there is none."""
    wrapping = ""
    while _is_wrapping(error):
        wrapping = wrapping if str(error).startswith("applying") else str(error)
        error = error.__cause__
    component = re.match(r"Failed to instantiate component '([^']+)'", wrapping)
    if component:
        return f"in the config, {component[1]}: "
    if wrapping:
        expression = ast.literal_eval(wrapping.split("\n", 1)[1].strip())  # as pprint writes it
        expression = re.sub(r"__local_refs\['([^']+)'\]", r"@\1", expression).replace("::", "#")
        return f"in the config, {expression}: "
    return ""
