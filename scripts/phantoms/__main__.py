"""The command ``python -m scripts.phantoms``; see :mod:`scripts.phantoms.cohort`."""

from scripts.phantoms.cohort import make_brains, make_ellipsoids
from scripts.utils.command_line import run

if __name__ == "__main__":
    print(run("python -m scripts.phantoms", {"brains": make_brains, "ellipsoids": make_ellipsoids}))
