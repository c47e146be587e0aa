"""Phantoms: synthetic scans to train on, to test with and to learn from, without any scans of people.

Brains are FLAIR-like, skull-stripped and affine-aligned to ICBM152; ellipsoids are the simplest learnable stand-in.
"""

from scripts.phantoms.cohort import ensure_cohort, make_brains, make_ellipsoids
from scripts.phantoms.images import Phantom, brain_phantom, ellipsoid_phantom

__all__ = ["Phantom", "brain_phantom", "ellipsoid_phantom", "ensure_cohort", "make_brains", "make_ellipsoids"]
