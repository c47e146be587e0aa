"""A model of several hospitals, none of which gives a scan away: rounds of training, then statistics, then one prior.

    PYTHONPATH=. python docs/examples/federated.py A B C --output_dir OUT --rounds 10 --weights models/model.pt \
        --covariates "{'age': 'continuous', 'sex': 'categorical', 'site': 'categorical'}"

Each folder is a site. Here they are on one machine, one after the other; between machines MONAI's clients exchange the
same objects by NVIDIA FLARE, and what this file calls the server is FLARE's. OUT/model.pt is the model of all,
OUT/population_prior.pt its population prior, OUT/left_out.csv what the others' prior says of each site.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from monai.bundle import create_workflow
from monai.fl.client import MonaiAlgo
from monai.fl.utils.constants import ExtraItems
from monai.fl.utils.exchange_object import ExchangeObject
from torch import Tensor

from scripts.merge_priors import merge_priors
from scripts.utils.command_line import run


def client_of(site: Path, folder: Path, configs: Sequence[str], **settings: Any) -> MonaiAlgo:
    """MONAI's client of a site, whose scans stay with it; it goes through one epoch a round."""
    given = {"bundle_root": ".", "dataset_dir": str(site), "prior_factors": 0, **settings}
    client = MonaiAlgo(
        bundle_root=".",
        local_epochs=1,
        send_weight_diff=False,
        config_train_filename=list(configs),
        config_evaluate_filename=list(configs),
        train_kwargs=given | {"output_dir": str(folder)},
        eval_kwargs=given | {"output_dir": str(folder / "evaluation")},
    )
    client.initialize(extra={ExtraItems.CLIENT_NAME: site.name})
    return client


def average(states: Sequence[Mapping[str, Tensor]], scans: Sequence[int]) -> dict[str, Tensor]:
    """The mean of the sites' tensors, each counted by its scans (FedAvg: McMahan et al., AISTATS 2017)."""
    shares = [count / sum(scans) for count in scans]
    means = {}
    for name, first in states[0].items():
        tensors = [torch.as_tensor(state[name]) for state in states]
        mean = sum(share * tensor.double() for share, tensor in zip(shares, tensors, strict=True))
        means[name] = mean.to(torch.as_tensor(first).dtype)
    return means


def main(
    *sites: str,
    output_dir: str,
    rounds: int = 2,
    weights: str | None = None,
    covariates: Mapping[str, Any] | None = None,
    configs: Sequence[str] = ("configs/train.json", "configs/lean_64.json"),
    inference_configs: Sequence[str] = ("configs/inference.json",),
    **settings: Any,
) -> None:
    """Train on all sites, and fit one population prior to them.

    Args:
        sites: their folders, two or more, with their tables of covariates.
        output_dir: for the model and each site's own run.
        rounds: in each every site goes through its scans once, then the means of its weights are sent to all.
        weights: to start from; None: the start of the first site, whose template is of its own scans.
        covariates: of the population prior.
        configs, inference_configs: of training and of inference.
        settings: further ones of the training config.
    """
    folder, names = Path(output_dir), [Path(site) for site in sites]
    start = {} if weights is None else {"weights": weights}
    clients = [client_of(site, folder / site.name, configs, epochs=rounds, **start, **settings) for site in names]
    scans = [len(client.train_workflow.train_dataset_data) for client in clients]
    state = {name: tensor.clone() for name, tensor in clients[0].get_weights().weights.items()}
    for number in range(rounds):
        states = []
        for client in clients:
            client.train(ExchangeObject(weights=state))
            states.append({name: tensor.clone() for name, tensor in client.get_weights().weights.items()})
        state = average(states, scans)
        bits = [client.evaluate(ExchangeObject(weights=state)).metrics["bits_per_dim"] for client in clients]
        found = ", ".join(f"{site.name} {value:.3f}" for site, value in zip(names, bits, strict=True))
        print(f"round {number + 1}: bits per dim of the held-out scans: {found}", flush=True)
    for client in clients:
        client.finalize()
    torch.save(state, folder / "model.pt")
    for site in names:
        workflow = create_workflow(
            config_file=list(inference_configs),
            workflow_type="infer",
            run_id="fit_prior",
            logging_file=False,
            ckpt=str(folder / "model.pt"),
            dataset_dir=str(site),
            output_dir=str(folder / site.name),
            covariates=covariates,
            statistics_only=True,
        )
        workflow.run()
        workflow.finalize()
    merge_priors(
        *(str(folder / site.name / "statistics.pt") for site in names), output=str(folder / "population_prior.pt")
    )


if __name__ == "__main__":
    run("python docs/examples/federated.py", main)
