"""Errors as a run shows them."""

from __future__ import annotations

import sys
from types import TracebackType

__all__ = ["show_root_cause"]

# how the messages of MONAI's errors begin that wrap one of ours
MONAI_WRAPPINGS = ("Failed to evaluate", "Failed to instantiate", "applying transform")


def show_root_cause() -> None:
    """End tracebacks with the sentence of the first error, which MONAI's config parser wraps in errors of its own."""

    def show(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if issubclass(kind, KeyboardInterrupt):
            print("\nStopped before the end; what was saved before is whole.", file=sys.stderr)
            return
        sys.__excepthook__(kind, error, trace)
        root = error
        while root.__cause__ is not None and str(root).startswith(MONAI_WRAPPINGS):
            root = root.__cause__
        print(f"\nError: {root}", file=sys.stderr)

    sys.excepthook = show
