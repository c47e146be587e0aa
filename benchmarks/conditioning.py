"""Should the network itself be told the covariates? Two forms of that, trained from the same weights, beside none.

    python -m scripts.phantoms people --output_dir people --count 1024 --covariates True
    python -m benchmarks.conditioning --weights models/covariates.pt --dataset_dir people --output_dir OUT --form film

trains by the keys of ``configs/train.json``, on one thread, the network and what conditions it: an embedding of the
covariates, which changes what every block of encoder and decoder gives, and so every posterior, every prior but the
first, and the output. Covariates are hidden for a fifth of the scans, so that the same weights do without. It appends
a row to ``conditioning.csv`` and prints it: of people of another seed, bits per dim with covariates and without, and
the error of counterfactuals by 20 years. What the population prior reaches is ``benchmarks.covariates``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.bundle import ConfigParser
from monai.utils import ensure_tuple
from torch import Tensor, nn

from benchmarks.covariates import KINDS, People, year_shifts
from benchmarks.peers import stack
from benchmarks.trials import append, endless_order
from scripts.data.covariate_tables import Covariates
from scripts.data.covariates import CovariateCoding
from scripts.inference.scoring import foreground
from scripts.networks import VDVAE
from scripts.phantoms.people import Cohort
from scripts.population.prior import drawing_innovations, innovation
from scripts.training.checkpoints import load_weights
from scripts.training.losses import WeightPenalty, bits_per_dim, negative_log_likelihood
from scripts.training.precision import autocast
from scripts.utils.command_line import run

HIDDEN = 0.2  # share of the scans of a batch whose covariates are not told
WIDTH = 32  # of the embedding
COLUMNS = ("form", "seed", "updates", "bits_per_dim", "without", "counterfactual", "own_person")


class Conditioning(nn.Module):
    """Lets covariates change what each block of a network gives; nothing at the start.

    Args:
        network: to condition; it is left as it is outside :meth:`given`.
        size: how many numbers the covariates become.
        form: ``film``: each channel is scaled and shifted; ``shift``: it is shifted, which is what a convolution of 1³
            makes of constant maps that are concatenated to its input; ``none``.

    Raises:
        ValueError: there is no such form.
    """

    def __init__(self, network: VDVAE, size: int, form: str) -> None:
        super().__init__()
        if form not in ("film", "shift", "none"):
            raise ValueError(f"form is '{form}': choose film, shift or none.")
        self.form, self.now = form, None
        self.unknown = nn.Parameter(torch.zeros(WIDTH))
        self.embedding = nn.Sequential(nn.Linear(size, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH))
        blocks = [block for level in network.encoder.levels for block in level]
        blocks += [block for group in network.decoder.groups for block in group]
        self.heads = nn.ModuleList()
        for block in blocks if form != "none" else []:
            channels = (
                block.z_projection.out_channels if hasattr(block, "z_projection") else block.convs[-1].out_channels
            )
            head = nn.Linear(WIDTH, channels * (2 if form == "film" else 1))
            nn.init.zeros_(head.weight)
            nn.init.zeros_(head.bias)
            self.heads.append(head)
            block.register_forward_hook(partial(self._change, head))

    @contextmanager
    def given(self, features: Tensor, known: Tensor | None = None) -> Iterator[None]:
        """Condition what the network does meanwhile.

        Args:
            features: what the covariates become, ``[batch, size]``.
            known: for which scans they are told, bool ``[batch]``; None: for all.
        """
        embedded = self.embedding(features)
        if known is not None:
            embedded = torch.where(known[:, None], embedded, self.unknown)
        self.now = embedded
        try:
            yield
        finally:
            self.now = None

    def _change(self, head: nn.Linear, block: nn.Module, inputs: tuple, output: Any) -> Any:
        if self.now is None:
            return output
        x = output[0] if isinstance(output, tuple) else output
        numbers = head(self.now)[:, :, None, None, None].to(x.dtype)
        if self.form == "film":
            scale, shift = numbers.chunk(2, 1)
            x = x * (1 + scale) + shift
        else:
            x = x + numbers
        return (x, *output[1:]) if isinstance(output, tuple) else x


@torch.no_grad()
def counterfactual(network: VDVAE, conditioning: Conditioning, scans: Tensor, own: Tensor, other: Tensor) -> Tensor:
    """Scans under other covariates: their innovations and residuals are kept; shaped like the scans."""
    with conditioning.given(own):
        output, posteriors = network.infer(scans, temperature=0.0)
    kept = dict(enumerate(innovation(q) for q in posteriors))
    with conditioning.given(other), drawing_innovations(kept):
        loc, scale = network.decode([], temperature=0.0, batch_size=len(scans))
    changed = (loc + scale * (scans - output.loc) / output.scale).clamp(-1, 1)
    return torch.where(foreground(scans, network) | foreground(loc, network), changed, scans)


def main(
    weights: str,
    dataset_dir: str,
    output_dir: str,
    form: str = "film",
    config_file: str | Sequence[str] = "configs/train.json",
    updates: int = 600,
    seed: int = 0,
    people: int = 64,
    people_seed: int = 9,
    spacing: float = 2.0,
    **changes: Any,
) -> None:
    """Train and measure.

    Args:
        weights: to start from.
        dataset_dir: phantoms with covariates, to train on.
        output_dir: for ``conditioning.csv``, the cache and the people that are measured on.
        form: film, shift or none.
        config_file: one or a list.
        updates: of the training.
        seed: of its noise and order.
        people, people_seed, spacing: of the phantoms that are measured on, mm.
        changes: other values of keys of the config, such as ``--learning_rate 0.005``.
    """
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    folder = Path(output_dir)
    parser = ConfigParser()
    parser.read_config(list(ensure_tuple(config_file)))
    parser.update({"last_checkpoint": None, "weights": weights, "updates": updates, "dataset_dir": dataset_dir})
    parser.update({"cache_dir": str(folder / "cache"), "augment": False, "num_workers": 0, **changes})
    training = stack(parser.get_parsed_content("train#dataset"))
    rows = Covariates(parser.get_parsed_content("datalist")["training"], dataset_dir).rows
    coding = CovariateCoding.learn(KINDS, rows)
    features = torch.stack([coding.numbers(coding.parse(row)) for row in rows])
    network = load_weights(parser.get_parsed_content("network_def"), weights)
    conditioning = Conditioning(network, coding.size, form)
    parser.update({"network": nn.ModuleList([network, conditioning])})
    optimizer, scheduler, loss_function = (parser.get_parsed_content(k) for k in ("optimizer", "lr_scheduler", "loss"))
    parameters = list(parser.get_parsed_content("network").parameters())
    penalty = WeightPenalty(list(network.parameters()), parser["weight_penalty"])
    order = endless_order(len(training), parser["batch_size"])
    for update in range(updates):
        indices = next(order)
        scans = training[indices]
        optimizer.zero_grad()
        known = torch.rand(len(indices)) >= HIDDEN
        with (
            autocast(torch.device("cpu"), parser["amp"], parser["amp_dtype"]),
            conditioning.given(features[indices], known),
        ):
            output = network.train()(scans)
        loss_function(output, scans, loss_function.beta(update))[0].backward()
        penalty.add_gradient()
        torch.nn.utils.clip_grad_norm_(parameters, parser["max_grad_norm"])
        optimizer.step()
        scheduler.step()
        if update % 50 == 49:
            print(update + 1, round(loss_function(output, scans, 1.0)[0].item(), 1), flush=True)
    row = {"form": form, "seed": seed, "updates": updates}
    preprocess = ConfigParser(ConfigParser.load_config_files("configs/inference.json"))
    preprocess["grid"] = parser.get_parsed_content("grid")
    cohort = People(folder / "people", preprocess.get_parsed_content("preprocessing"), people_seed, spacing)
    row |= measure(network.eval(), conditioning, coding, cohort, people)
    append(folder / "conditioning.csv", row, COLUMNS)
    print(row)


@torch.no_grad()
def measure(
    network: VDVAE, conditioning: Conditioning, coding: CovariateCoding, cohort: People, count: int
) -> dict[str, float]:
    """Bits per dim of people with their covariates and without, and how true their counterfactuals are."""
    people = [cohort.person(index) for index in range(1, count + 1)]
    ages = np.array([person.age for person in people])
    shifts = year_shifts(people)
    scans = cohort.scans([(i + 1, Cohort()) for i in range(count)], "people")
    others = cohort.scans([(i + 1, Cohort(age=float(ages[i] + shifts[i]))) for i in range(count)], "at another age")
    own, other = (
        torch.stack(
            [coding.numbers({"age": p.age + s, "sex": p.sex, "site": p.site}) for p, s in zip(people, add, strict=True)]
        )
        for add in (0 * shifts, shifts)
    )
    found: dict[str, list[Tensor]] = {"bits_per_dim": [], "without": []}
    for told, values in found.items():
        with torch.random.fork_rng():
            torch.manual_seed(0)
            for x, numbers in zip(scans.split(8), own.split(8), strict=True):
                with conditioning.given(numbers, torch.full((len(x),), told == "bits_per_dim")):
                    output = network(x)
                nats = negative_log_likelihood(output.loc, output.scale, x) + output.kl.sum(1)
                values.append(bits_per_dim(nats, x))
    changed = torch.cat(
        [
            counterfactual(network, conditioning, *part)
            for part in zip(scans.split(8), own.split(8), other.split(8), strict=True)
        ]
    )
    brain = (scans > -0.9).float().mean(0)[0] > 0.5

    def error(x: Tensor) -> float:
        return (x - others).abs()[:, 0][:, brain].mean().item()

    nearest = torch.cdist(changed.flatten(1), others.flatten(1)).argmin(1)
    row = {name: round(torch.cat(values).mean().item(), 4) for name, values in found.items()}
    row["counterfactual"] = round(error(changed) / error(scans), 3)
    return row | {"own_person": round((nearest == torch.arange(count)).float().mean().item(), 3)}


if __name__ == "__main__":
    run("python -m benchmarks.conditioning", main)
