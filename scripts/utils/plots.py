"""Plots of numbers as PNG files: a run's quantities against updates, and what jobs say of covariates."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from scripts.utils.sheets import DPI, as_array, middle, plane, save

# label of a curve's y axis
UNITS = {
    "loss": "nats per scan",
    "nll": "nats per scan",
    "kl": "nats per scan",
    "bits_per_dim": "bits per voxel and channel",
    "mse": "squared intensity",
    "grad_norm": "nats per scan",
    "skipped": "updates",
    "beta": "weight of the KL",
}
TITLES = {
    "nll": "negative log-likelihood",
    "kl": "KL divergence",
    "bits_per_dim": "bits per dim",
    "mse": "mean squared error",
    "grad_norm": "gradient norm",
    "skipped": "skipped updates",
}
LINEAR = {"beta", "skipped"}
COLOURS = {"training": "tab:blue", "validation": "tab:orange"}
CENTILES = {-1.645: ":", -0.674: "--", 0.0: "-", 0.674: "--", 1.645: ":"}  # z scores of 5, 25, 50, 75, 95 %
KL_FLOOR = 1e-4  # nats per dimension; a latent below is inactive


def curves(path: str | os.PathLike, history: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]]) -> Path:
    """Plot every quantity of a training run against the number of updates, each in a panel of its own.

    A positive quantity that spans more than a factor of 20 gets a logarithmic axis. On a linear one, the first 5 % of
    the updates may lie outside of the panel: they are often orders of magnitude away from the rest.

    Args:
        path: of the PNG.
        history: quantity -> ``{"training": [(update, value), ...], "validation": [...]}``, either may be missing.
    """
    panels = {
        name: {side: np.asarray(points, float).reshape(-1, 2) for side, points in sides.items() if len(points)}
        for name, sides in history.items()
    }
    panels = {name: sides for name, sides in panels.items() if sides}
    across = min(len(panels), 3)
    down = math.ceil(len(panels) / across)
    figure = Figure((5.2 * across, 3.1 * down), dpi=DPI, layout="constrained")
    grid = figure.subplots(down, across, squeeze=False, sharex=True).ravel()
    for axes, (name, sides) in zip(grid, panels.items(), strict=False):
        _curve(axes, name, sides)
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    for axes in grid[max(0, len(panels) - across) : len(panels)]:
        axes.set_xlabel("updates")
        axes.tick_params(labelbottom=True)
    return save(path, figure)


def _curve(axes: Axes, name: str, sides: Mapping[str, np.ndarray]) -> None:
    for side, points in sides.items():
        updates, values = points[np.isfinite(points).all(1)].T
        colour = COLOURS.get(side)
        window = len(values) // 50
        if window < 3:
            marker = "o" if len(values) < 30 else None
            axes.plot(updates, values, color=colour, marker=marker, markersize=3, linewidth=1.2, label=side)
            continue
        axes.plot(updates, values, color=colour, alpha=0.3, linewidth=0.7)
        sums = np.cumsum(np.insert(values, 0, 0.0))
        smooth = (sums[window:] - sums[:-window]) / window
        axes.plot(updates[window // 2 :][: len(smooth)], smooth, color=colour, linewidth=1.4, label=side)
    points = np.concatenate(list(sides.values()))
    points = points[np.isfinite(points).all(1)]
    if len(points):
        values = points[:, 1]
        if name not in LINEAR and values.min() > 0 and values.max() > 20 * values.min():
            axes.set_yscale("log")
        elif name not in LINEAR and len(points) >= 20:
            shown = values[points[:, 0] >= 0.05 * points[:, 0].max()]
            margin = 0.06 * (np.ptp(shown) or abs(shown[0]) or 1.0)
            axes.set_ylim(shown.min() - margin, shown.max() + margin)
    axes.set_title(TITLES.get(name, name.replace("_", " ")), fontsize=11)
    axes.set_ylabel(UNITS.get(name, ""), fontsize=9)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if len(sides) > 1 or "training" not in sides:
        axes.legend(fontsize=8, framealpha=0.7)


def kl_per_latent(
    path: str | os.PathLike, updates: Sequence[float], kl: Any, dims: Sequence[int], levels: Sequence[str]
) -> Path:
    """Plot which latents are active: the KL divergence of each over the course of training.

    Args:
        path: of the PNG.
        updates: when the KL was measured, ``[time]``, rising.
        kl: ``[time, latents]`` in nats per scan, top first.
        dims: numbers in each latent (channels times grid), ``[latents]``; the colour is KL over dims.
        levels: of each latent by its grid, such as "4³", ``[latents]``; latents of one level are bracketed.
    """
    updates, kl = np.asarray(updates, float), as_array(kl)
    latents = kl.shape[1]
    density = kl / np.asarray(dims, float)
    starts = [i for i in range(latents) if i == 0 or levels[i] != levels[i - 1]]
    bounds = [*starts, latents]

    figure = Figure((11.5, max(3.2, 1.6 + 0.2 * latents)), dpi=DPI, layout="constrained")
    axes, bars = figure.subplots(1, 2, sharey=True, gridspec_kw={"width_ratios": [4, 1.5]})
    top = np.nanmax(np.where(np.isfinite(density), density, np.nan), initial=10 * KL_FLOOR)
    norm = LogNorm(KL_FLOOR, 10 ** math.ceil(math.log10(top)), clip=True)
    shown = np.ma.masked_invalid(np.maximum(density, KL_FLOOR)).T
    mesh = axes.pcolormesh(_edges(updates), np.arange(latents + 1), shown, norm=norm, cmap="magma", rasterized=True)
    colour_bar = figure.colorbar(mesh, ax=axes, location="left", pad=0.02, aspect=30, extend="min")
    colour_bar.set_label("KL, nats per dimension")
    axes.set_xlabel("updates")
    axes.set_title(f"KL divergence of each latent, coarsest on top (black: {KL_FLOOR:g} or less)", fontsize=11)

    last = np.nan_to_num(kl[-1], posinf=0.0)
    bars.barh(np.arange(latents) + 0.5, last, height=0.8, color="tab:purple")
    bars.set_xscale("symlog", linthresh=1, linscale=0.5)
    bars.set_xlim(0, max(10, 1.3 * last.max()))
    bars.set_xlabel("nats per scan")
    bars.set_title(f"at update {updates[-1]:,.0f}, sum {last.sum():,.0f}", fontsize=11)
    bars.grid(axis="x", alpha=0.3)
    bars.spines[["top", "right"]].set_visible(False)
    bars.tick_params(axis="y", left=False, labelleft=False, labelright=True, pad=2)
    for start in starts[1:]:
        axes.axhline(start, color="white", linewidth=0.8)
        bars.axhline(start, color="0.6", linewidth=0.6)
    axes.set_yticks([(a + b) / 2 for a, b in itertools.pairwise(bounds)], [levels[i] for i in starts])
    axes.tick_params(axis="y", left=False, labelsize=9)
    axes.set_ylim(latents, 0)
    return save(path, figure)


def _edges(centres: np.ndarray) -> np.ndarray:
    """Edges of the cells around rising points, none below 0."""
    if len(centres) == 1:
        edges = np.array([centres[0] - 0.5, centres[0] + 0.5])
    else:
        between = (centres[1:] + centres[:-1]) / 2
        ends = 1.5 * centres[[0, -1]] - 0.5 * centres[[1, -2]]
        edges = np.concatenate([ends[:1], between, ends[1:]])
    return np.maximum(edges, 0)


def posteriors(path: str | os.PathLike, content: Mapping[str, Mapping[str, Any]], title: str) -> Path:
    """Plot how likely each value of some covariates is, each in a panel: a curve, or bars for categories.

    Args:
        path: of the PNG.
        content: of each covariate ``values``, their ``probability`` and, where it is known, the ``own`` value.
        title: says what scan they are of.
    """
    figure = Figure((4.2 * len(content), 3.4), dpi=DPI, layout="constrained")
    for axes, (name, part) in zip(figure.subplots(1, len(content), squeeze=False)[0], content.items(), strict=True):
        values, probability, own = part["values"], np.asarray(part["probability"]), part["own"]
        if isinstance(values[0], str):
            axes.bar(values, probability, color=["tab:orange" if value == own else "tab:blue" for value in values])
            axes.set_ylabel("probability")
            axes.set_ylim(0, 1)
        else:
            density = probability / (values[1] - values[0])
            axes.plot(values, density, color="tab:blue")
            low, high = float(part["summary"][f"{name}_low"]), float(part["summary"][f"{name}_high"])
            inside = [low <= value <= high for value in values]
            axes.fill_between(values, density, where=inside, color="tab:blue", alpha=0.2, label="90 % interval")
            if own is not None:
                axes.axvline(own, color="tab:orange", label=f"known: {own:g}")
            axes.set_ylabel(f"probability density per unit of {name}")
            axes.set_ylim(0, None)
            axes.legend(fontsize="small")
        axes.set_xlabel(name)
    figure.suptitle(title, parse_math=False)
    return save(path, figure)


def centiles(
    path: str | os.PathLike,
    covariate: str,
    values: Sequence[float],
    regions: Mapping[str, tuple[np.ndarray, np.ndarray]],
    points: Sequence[Sequence[tuple[float, float]]],
    title: str = "",
) -> Path:
    """Plot regions over a covariate, each in a panel: the 5th, 25th, 50th, 75th and 95th centile, and scans as points.

    Args:
        path: of the PNG.
        covariate: its name.
        values: of it.
        regions: mean and standard deviation of each region at these values, ``[values]`` each.
        points: of each region, the covariate and the z score of each scan; those beyond 2 are marked.
        title: says which regions these are.
    """
    columns = min(4, len(regions))
    rows = math.ceil(len(regions) / columns)
    figure = Figure((3.6 * columns, 3.0 * rows), dpi=DPI, layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes, (name, (mean, std)), scans in zip(panels, regions.items(), points, strict=False):
        for z, style in CENTILES.items():
            axes.plot(values, mean + z * std, color="tab:blue", linestyle=style, linewidth=1.0)
        for far in (False, True):
            own = [(value, z) for value, z in scans if (abs(z) > 2) == far]
            middle = np.interp([v for v, _ in own], values, mean), np.interp([v for v, _ in own], values, std)
            heights = middle[0] + np.array([z for _, z in own]) * middle[1]
            axes.plot([v for v, _ in own], heights, ".", color="tab:orange" if far else "0.35", markersize=5)
        axes.set_title(name, fontsize="small", parse_math=False)
        axes.set_xlabel(covariate)
    for axes in panels[len(regions) :]:
        axes.set_axis_off()
    for axes in panels[::columns]:
        axes.set_ylabel("mean intensity, network's range")
    explained = "centiles 5, 25, 50, 75, 95, and scans by their z scores (orange: beyond 2)"
    figure.suptitle(f"{title}: {explained}".removeprefix(": "), fontsize="small", parse_math=False, wrap=True)
    return save(path, figure)


def pit(path: str | os.PathLike, histograms: Mapping[str, tuple[np.ndarray, np.ndarray | None]]) -> Path:
    """Plot histograms of the probability integral transform, each in a panel, beside what is uniform.

    Args:
        path: of the PNG.
        histograms: of each kind of value the share in each bin from 0 to 1, and how far from the uniform share it may
            be, ``[bins]`` each; None: that is not known.
    """
    figure = Figure((5.2 * len(histograms), 3.4), dpi=DPI, layout="constrained")
    panels = figure.subplots(1, len(histograms), squeeze=False)[0]
    for axes, (name, (shares, reach)) in zip(panels, histograms.items(), strict=True):
        edges, uniform = np.linspace(0, 1, len(shares) + 1), 1 / len(shares)
        axes.stairs(shares, edges, fill=True, color="tab:blue", alpha=0.6)
        if reach is not None:
            band = {"baseline": np.maximum(uniform - reach, 0), "fill": True, "color": "0.4", "alpha": 0.35}
            axes.stairs(uniform + reach, edges, label="95 % of means over so many scans", **band)
        axes.axhline(uniform, color="0.25", linestyle="--", linewidth=1, label="calibrated")
        axes.set_title(name, fontsize="small")
        axes.set_xlabel("probability integral transform (centile / 100)")
        axes.set_ylabel("share of values")
        axes.set_xlim(0, 1)
        axes.legend(fontsize="small")
    return save(path, figure)


def unfamiliar(
    path: str | os.PathLike, mean_scan: Any, scans: Sequence[tuple[str, tuple[Any, Any], Mapping[str, float]]]
) -> Path:
    """Draw scans that a network does not know, a row each: as seen, mended, the mean scan, and what explains them.

    Args:
        path: of the PNG.
        mean_scan: the mean scan of the cohort, ``[channels, *spatial]``.
        scans: a title, the scan and itself mended (or None), shaped likewise, and each reason's gain alone, bits per
            dim.
    """
    figure = Figure((11.0, 2.6 * len(scans)), dpi=DPI, layout="constrained")
    panels = figure.subplots(len(scans), 4, squeeze=False, width_ratios=(1, 1, 1, 1.4))
    mean = as_array(mean_scan)[0]
    axis, places = (0, middle(mean)) if mean.ndim == 3 else (None, (0,))
    for row, (title, images, gains) in zip(panels, scans, strict=True):
        shown = {"as it is seen": images[0], "mended": images[1], "the mean scan": mean_scan}
        for axes, (name, image) in zip(row, shown.items(), strict=False):
            axes.set_axis_off()
            axes.set_title(name if image is not None else "nothing mends it", fontsize="small")
            if image is not None:
                axes.imshow(plane(as_array(image)[0], axis, places[0]), cmap="gray", vmin=mean.min(), vmax=mean.max())
        names = sorted(gains, key=lambda reason: gains[reason])
        row[-1].barh(
            names, [gains[name] for name in names], color=["tab:blue" if gains[n] > 0 else "0.7" for n in names]
        )
        row[-1].locator_params(axis="x", nbins=4)
        if max(map(abs, gains.values()), default=0.0) > 0.05:  # below, its ticks are odd numbers
            row[-1].set_xscale("symlog", linthresh=0.01)
        row[-1].set_xlabel("gain of each alone, bits per dim", fontsize="small")
        row[-1].set_title(title, fontsize="small", parse_math=False, loc="right")
    return save(path, figure)
