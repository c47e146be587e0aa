"""What a GPU alone can show. ``python -m benchmarks.gpu`` runs it by unittest, since pytest may be missing there."""

from __future__ import annotations

import copy
import unittest
from pathlib import Path
from typing import Any

import torch
from ignite.engine import Events
from torch import Tensor
from torch.testing import assert_close

from benchmarks.common import TrainingStep, network_def
from benchmarks.gpu_process import Batches
from benchmarks.memory import estimate_step
from scripts.inference.engine import scan_generator
from scripts.inference.inferers import Imputation, Reconstruction, Sampling
from scripts.inference.scoring import Scoring
from scripts.layers.gaussian import LatentSampler, gaussian_noise
from scripts.networks import VDVAE
from scripts.population.files import find_population_prior
from scripts.training.checkpoints import load_weights
from scripts.training.losses import ELBOLoss
from scripts.training.trainer import VDVAETrainer

GPU = torch.device("cuda")
WEIGHTS = Path(__file__).parents[2] / "models/model.pt"
UPDATES = 12


class Mean(VDVAE):
    """A network that takes the posteriors' means, so that two ways to compute it draw nothing."""

    def forward(self, x: Tensor, temperature: float = 0.0):
        return super().forward(x, 0.0)


class Scan:
    """A scan as a cache gives it."""

    def __init__(self, scan: Tensor) -> None:
        self.scan = scan

    def as_tensor(self) -> Tensor:
        return self.scan


def scans(count: int = 8, size: int = 8) -> Tensor:
    return torch.rand(count, 1, size, size, size, generator=torch.Generator().manual_seed(1)) * 2 - 1


def tiny(kind: type[VDVAE] = Mean, size: int | str = 8) -> VDVAE:
    torch.manual_seed(0)
    return kind(**network_def(size)).to(GPU)


def train(network: VDVAE, check: Any = None, **arguments: Any) -> VDVAETrainer:
    """Some updates, and what ``check`` does after each."""
    torch.manual_seed(0)
    batches = Batches([{"image": Scan(scan)} for scan in scans()], 4, UPDATES, pin=True)
    optimizer = torch.optim.Adamax(network.parameters(), lr=0.002, foreach=True)
    engine = VDVAETrainer(GPU, 1, batches, network, optimizer, ELBOLoss(kl_warmup=3), **arguments)
    if check is not None:
        engine.add_event_handler(Events.ITERATION_COMPLETED, check)
    engine.run()
    torch.cuda.synchronize()
    return engine


def weights(network: VDVAE) -> Tensor:
    return torch.cat([p.detach().flatten().cpu() for p in network.parameters()])


@unittest.skipUnless(torch.cuda.is_available(), "needs a GPU")
class TestGPU(unittest.TestCase):
    def setUp(self) -> None:
        # as exact as the CPU, to compare with it
        before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        self.addCleanup(setattr, torch.backends.cuda.matmul, "allow_tf32", before[0])
        self.addCleanup(setattr, torch.backends.cudnn, "allow_tf32", before[1])

    def test_a_step_is_what_it_is_on_the_cpu(self) -> None:
        network = tiny()
        losses, gradients = [], []
        for one in (network, copy.deepcopy(network).cpu()):
            step = TrainingStep(one, scans().to(next(one.parameters()).device))
            losses.append(step.loss())
            losses[-1].backward()
            gradients.append(torch.cat([p.grad.flatten().cpu() for p in one.parameters()]))
        assert_close(losses[0].cpu(), losses[1], rtol=1e-4, atol=0.0)
        self.assertLess((gradients[0] - gradients[1]).norm() / gradients[1].norm(), 1e-3)

    def test_no_update_waits_for_the_gpu(self) -> None:
        def strict(engine: VDVAETrainer) -> None:
            # the first make what lasts, and the last reads the numbers
            within = 3 <= engine.state.iteration < UPDATES - 1
            torch.cuda.set_sync_debug_mode("error" if within else "default")

        self.addCleanup(torch.cuda.set_sync_debug_mode, "default")
        for amp in (False, True):
            self.assertEqual(train(tiny(VDVAE), strict, amp=amp).state.updates, UPDATES)

    def test_a_graph_repeats_the_update(self) -> None:
        start = tiny()
        plain, graphed = (train(copy.deepcopy(start), cuda_graph=graph) for graph in (False, True))
        self.assertIsNotNone(graphed.graphed.graph)
        moved = (weights(plain.network) - weights(start)).norm()
        self.assertLess((weights(plain.network) - weights(graphed.network)).norm(), 0.02 * moved)

    def test_a_graph_draws_new_noise_each_time(self) -> None:
        losses = []
        train(tiny(VDVAE), lambda engine: losses.append(engine.state.output["kl"].clone()), cuda_graph=True)
        losses = torch.stack(losses[4:]).sum(1)
        self.assertEqual(len(losses.unique()), len(losses))

    def test_fewer_bits_train(self) -> None:
        for dtype in (torch.bfloat16, torch.float16):
            if dtype == torch.bfloat16 and not torch.cuda.is_bf16_supported(including_emulation=False):
                continue
            engine = train(tiny(VDVAE), amp=True, amp_dtype=dtype)
            self.assertTrue(weights(engine.network).isfinite().all())
            self.assertLess(engine.state.skipped, UPDATES // 2)

    def test_noise_of_a_scan_is_its_own_in_any_batch(self) -> None:
        def noise(*names: str) -> Tensor:
            sampler = LatentSampler([scan_generator(0, name, GPU) for name in names])
            return gaussian_noise(torch.empty(len(names), 3, 4, device=GPU), sampler)

        assert_close(noise("a", "b", "c")[1:2], noise("b"), rtol=0.0, atol=0.0)

    def test_memory_is_about_what_was_estimated(self) -> None:
        step = TrainingStep(tiny(VDVAE, "default").train(), scans(8, 32).to(GPU))
        step()
        torch.cuda.reset_peak_memory_stats()
        step()
        ratio = torch.cuda.max_memory_allocated() / estimate_step("default", 8, "fp32", None)["peak"]
        self.assertGreater(ratio, 0.6)
        self.assertLess(ratio, 1.6)

    @torch.no_grad()
    def test_jobs_say_what_they_say_on_the_cpu(self) -> None:
        x, found = scans(2, 32) * 0.2 - 0.5, []
        for device in (GPU, torch.device("cpu")):
            network = load_weights(VDVAE(**network_def("default")), WEIGHTS).eval().to(device)
            found.append(Reconstruction()(x.to(device), network))
            prior = find_population_prior("population", WEIGHTS, network)
            for job in (Sampling(prior=prior), Imputation(iterations=2, draws=2), Scoring(prior=prior)):
                inputs = 2 if isinstance(job, Sampling) else x.to(device)
                results = job(inputs, network, mask=x.to(device) > 0)
                self.assertTrue(all(value.isfinite().all() for value in results.values()))
        for name, value in found[1].items():
            assert_close(found[0][name].cpu(), value, rtol=2e-3, atol=2e-3)


if __name__ == "__main__":
    unittest.main()
