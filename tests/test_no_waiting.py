"""Nothing of a training step, or of an inference job's network part, waits for a GPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from conftest import ROOT, inference_config
from fake_gpu import GPU, fake_gpu
from groups import run_group
from ignite.engine import Events
from monai.bundle import ConfigParser
from torch.utils.data import DataLoader

from benchmarks.memory import fake_parameters
from scripts.inference import inferers, scoring
from scripts.networks import VDVAE
from scripts.population.prior import PopulationPrior
from scripts.training import trainer as trainers
from scripts.utils.devices import on_device, to_host

TINY = [str(ROOT / "configs/train.json"), str(ROOT / "tests/tiny.json"), str(ROOT / "tests/quick_start.json")]
# two levels: PyTorch takes seconds to find the shapes of what three do
SMALLER = {"channels": [4, 6], "num_latents": [1, 2], "latent_channels": [2, 3], "kernel_sizes": [3, 3]}


class Loaded:
    """The batches of a data loader, which are read beforehand."""

    def __init__(self, loader: DataLoader) -> None:
        self.batches = list(loader)
        self.batch_size, self.persistent_workers, self.dataset = loader.batch_size, False, loader.dataset

    def __iter__(self) -> Iterator:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


def train(folder: str, dataset_dir: str, changes: dict) -> dict[str, object]:
    """Four iterations of a run; after the first nothing may wait."""
    trainers.check_graph = lambda *args, **kwargs: changes.get("cuda_graph", False)  # as on a real one
    parser = ConfigParser(ConfigParser.load_config_files(TINY))
    parser.update({"dataset_dir": dataset_dir, "output_dir": folder, "batch_size": 2, "log_interval": 3, **changes})
    parser.update({f"network_def#{key}": value for key, value in SMALLER.items()})
    arguments = parser.get_parsed_content("network_def").arguments
    with torch.device("meta"):
        network = VDVAE(**arguments)
    handler = next(h for h in parser["train#handlers"] if h["_target_"] == "ValidationHandler")
    handler.update({"exec_at_start": False, "interval": 99})
    parser.update({"device": GPU, "network": network})
    for name in ("network_def", "train#dataloader", "validate#dataloader"):  # read scans, which are real
        parser.get_parsed_content(name)
    batches = Loaded(parser.get_parsed_content("train#dataloader"))
    with fake_gpu() as watch:
        fake_parameters(network, GPU)
        trainer = parser.get_parsed_content("train#trainer")
        trainer.data_loader = batches  # not on_device: a fake tensor cannot be a MetaTensor too

        def after(engine):
            watch.strict = True  # the first iteration makes what lasts
            if engine.state.iteration == 4:
                engine.terminate()

        trainer.add_event_handler(Events.ITERATION_COMPLETED, after)
        trainer.run()
        steps = trainer.optimizer.state[next(iter(network.parameters()))]["step"]
        return {"updates": trainer.state.updates, "counter": steps.device.type, "known": trainer.state.numbers}


RUNS = {
    "default": {},
    "bfloat16": {"amp": True, "network_def#batch_norm": True},
    "float16": {"amp": True, "amp_dtype": torch.float16, "accumulation_steps": 2},
    "graph": {"cuda_graph": True},
}


@pytest.mark.parametrize("name", RUNS)
def test_a_training_step_does_not_wait(found, name):
    run = found["runs"][name]
    assert run["updates"] == 4 // RUNS[name].get("accumulation_steps", 1)
    assert run["counter"] == "gpu"
    assert run["known"] == {}


def prior_of(network: VDVAE) -> PopulationPrior:
    """A population prior of the two coarsest latents, on the GPU."""
    grids = network.latent_grids()[:2]

    def tensors(*shape: int) -> dict[int, torch.Tensor]:
        return {index: torch.rand(*shape, *grid, device=GPU) for index, grid in enumerate(grids)}

    return PopulationPrior(tensors(), tensors(), tensors(4), torch.rand(9, device=GPU), torch.rand(9, device=GPU))


JOBS = {
    "reconstruct": lambda prior: inferers.Reconstruction(),
    "reconstruct at each level": lambda prior: inferers.Reconstruction(temperature={2: 0.5}, levels="each"),
    "encode": lambda prior: inferers.Encoding(prior=prior),
    "decode": lambda prior: inferers.Decoding(),
    "decode_coordinates": lambda prior: inferers.CoordinateDecoding(prior),
    "sample": lambda prior: inferers.Sampling(voxel_noise=True),
    "sample from a population": lambda prior: inferers.Sampling(prior=prior),
    "interpolate": lambda prior: inferers.Interpolation(steps=3),
    "impute": lambda prior: inferers.Imputation(iterations=2, draws=2),
    "score": lambda prior: scoring.Scoring(),
    "score under a population": lambda prior: scoring.Scoring(importance_samples=2, prior=prior),
}


def infer(arguments: dict) -> dict[str, str]:
    """What each job says, ``done`` if it did not have to wait."""
    with torch.device("meta"):
        network = VDVAE(**arguments).eval()
    found = {}
    with fake_gpu(), torch.no_grad():
        fake_parameters(network, GPU)
        prior = prior_of(network)
        scans = torch.rand(2, 1, 8, 8, 8, device=GPU)
        inputs = {"decode": [torch.rand(2, *grid, device=GPU) for grid in network.latent_grids()[:2]]}
        inputs |= {"decode_coordinates": torch.rand(2, 4, device=GPU), "interpolate": torch.stack([scans, scans], 1)}
        inputs |= {"sample": 2, "sample from a population": 2}
        for job, make in JOBS.items():
            try:
                results = make(prior)(inputs.get(job, scans), network, mask=scans > 0.5)
                found[job] = "done" if all(value.device == GPU for value in results.values()) else "on the host"
            except Exception as error:
                found[job] = f"{type(error).__name__}: {error}"
    return found


def test_no_inference_job_waits(found):
    assert found["jobs"] == dict.fromkeys(JOBS, "done")


class Pairs(Loaded):
    """Batches made here, of a dictionary and of what stays on the host."""

    def __init__(self, count: int) -> None:
        self.batches = [({"image": torch.full((2, 1), float(i)), "name": f"sub-{i}"}, [i]) for i in range(count)]
        self.batch_size, self.taken = 2, 0

    def __iter__(self) -> Iterator:
        for batch in self.batches:
            self.taken += 1
            yield batch


def prefetch() -> list[tuple]:
    """What each batch is on the GPU, and how many the loader had given by then."""
    found = []
    with fake_gpu() as watch:
        watch.strict = True
        batches = on_device(loader := Pairs(3), GPU)
        assert (len(batches), batches.batch_size) == (3, 2)
        for _ in range(2):  # epochs
            for batch, rest in batches:
                found.append(
                    (batch["name"], str(batch["image"].device), tuple(batch["image"].shape), rest, loader.taken)
                )
    return found


def test_batches_are_copied_one_ahead_without_waiting(found):
    expected = [(f"sub-{i}", "gpu:0", (2, 1), [i]) for i in range(3)]
    taken = [2, 3, 3, 5, 6, 6]
    assert found["batches"] == [(*batch, count) for batch, count in zip(expected * 2, taken, strict=True)]


def test_on_a_cpu_a_loader_is_left_as_it_is():
    loader = Pairs(2)
    assert on_device(loader, "cpu") is loader
    values = {"a": torch.rand(3)}
    assert to_host(values)()["a"] is values["a"]


def waits() -> list[str]:
    """What the fake GPU says to code that would wait."""
    said = []
    with fake_gpu() as watch:
        values = torch.rand(3, device=GPU)
        watch.strict = True
        for wait in (
            lambda: values.sum().item(),
            lambda: values[values > 0.5],
            lambda: values.cpu(),
            lambda: torch.tensor([1.0, 2.0], device=GPU),
            lambda: values + torch.ones(3),
        ):
            try:
                said.append(f"nothing: {wait()}")
            except (RuntimeError, AssertionError) as error:
                said.append(type(error).__name__)
    return said


def test_the_fake_gpu_sees_what_would_wait(found):
    assert found["waits"][:2] == ["DataDependentOutputException", "DynamicOutputShapeException"]
    assert found["waits"][2:] == ["AssertionError", "NotImplementedError", "FakeTensorDeviceMismatchError"]


def on_a_fake_gpu(rank: int, folder: str, dataset_dir: str, arguments: dict) -> dict[str, object]:
    runs = {name: train(f"{folder}/{name}", dataset_dir, changes) for name, changes in RUNS.items()}
    return {"runs": runs, "jobs": infer(arguments), "batches": prefetch(), "waits": waits()}


@pytest.fixture(scope="module")
def found(cohort, tmp_path_factory) -> dict[str, object]:
    """What came of all of it in one process that has such a GPU."""
    arguments = inference_config().get_parsed_content("network_def").arguments
    return run_group(on_a_fake_gpu, str(tmp_path_factory.mktemp("gpu")), str(cohort), arguments, processes=1)[0]
