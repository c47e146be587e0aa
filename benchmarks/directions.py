"""What the leading directions of the population prior look like.

    python -m benchmarks.directions --output docs/figures/directions.png

decodes the cohort's mean, and the mean moved by up to three standard deviations along each of the leading factors.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from monai.bundle import ConfigParser
from monai.utils import ensure_tuple

from scripts.inference.inferers import CoordinateDecoding
from scripts.networks import OUTPUT_RANGES
from scripts.utils import figures
from scripts.utils.command_line import run

STEPS = (-3.0, 0.0, 3.0)  # standard deviations of a factor


@torch.no_grad()
def main(
    output: str,
    ckpt: str = "models/model.pt",
    config_file: str | Sequence[str] = "configs/inference.json",
    factors: int = 5,
) -> None:
    """Draw.

    Args:
        output: path of the PNG.
        ckpt: weights, with the population prior beside them.
        config_file: of the network, one or a list.
        factors: how many.
    """
    parser = ConfigParser()
    parser.read_config(list(ensure_tuple(config_file)))
    parser.update({"ckpt": ckpt})
    network, prior = parser.get_parsed_content("network").eval(), parser.get_parsed_content("population_prior")
    if prior is None:
        raise SystemExit(f"Error: there is no population prior beside '{ckpt}': fit one by the run fit_prior.")
    rows = [(factor, step) for factor in range(min(factors, prior.factors)) for step in STEPS]
    coordinates = torch.zeros(len(rows), prior.factors)
    for row, (factor, step) in enumerate(rows):
        coordinates[row, factor] = step
    scans = CoordinateDecoding(prior)(coordinates, network)["sample"]
    titles = [f"c{factor:03d} at {step:+g}" for factor, step in rows]
    print(figures.batch(output, list(scans), titles, value_range=OUTPUT_RANGES[network.output_activation]))


if __name__ == "__main__":
    run("python -m benchmarks.directions", main)
