"""Training over several processes and nodes, for real, on this machine's loopback with Gloo."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import ignite.distributed as idist
import pytest
import torch
import torch.distributed as dist
from conftest import PROCESS, ROOT, TINY, bundle_command, inference_config, run_bundle
from groups import free_port, run_bundle_group, run_group
from monai.data import DataLoader, Dataset, MetaTensor
from monai.transforms import Compose, RandScaleIntensityd

from scripts.data.cache import ScanCache, read_cohort
from scripts.layers.gaussian import LatentSampler
from scripts.networks import VDVAE
from scripts.training.losses import ELBOLoss
from scripts.training.seeding import SeededDataset
from scripts.training.trainer import VDVAETrainer
from scripts.training.voxel_statistics import voxel_statistics
from scripts.utils.distributed import batch_share, from_rank_zero, own_store, parallel_network, start, stop

TRAIN = [*TINY, "configs/multi_gpu_train.json"]
NETWORK = {
    "spatial_dims": 3,
    "in_channels": 1,
    "spatial_shape": [8, 8, 8],
    "channels": [4, 6, 8],
    "num_latents": [1, 2, 2],
    "latent_channels": [2, 3, 8],
    "kernel_sizes": [3, 3, 2],
    "template": True,
}


def gradients(network, scans, seeds):
    """Of the mean loss, each scan with noise of its own."""
    sampler = LatentSampler([torch.Generator().manual_seed(seed) for seed in seeds])
    loss, _ = ELBOLoss()(network(scans, sampler=sampler), scans)
    loss.backward()
    return [parameter.grad.clone() for parameter in network.parameters()]


def in_a_group(rank, store, target):
    """One of two processes that know each other."""
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    result = target(rank)
    dist.destroy_process_group()
    return result


def both(target, folder):
    return run_group(in_a_group, str(folder / "store"), target)


def scans():
    return torch.rand(4, 1, 8, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1


def half_of_the_gradients(rank):
    torch.manual_seed(rank)  # the second process would start from other weights, if it were not given the first's
    network = parallel_network(lambda network: network, VDVAE(**NETWORK))
    mine = slice(2 * rank, 2 * rank + 2)
    return gradients(network, scans()[mine], range(4)[mine])


def test_two_processes_give_the_gradients_of_one_with_twice_the_batch(tmp_path):
    first, second = both(half_of_the_gradients, tmp_path)
    torch.manual_seed(0)
    alone = gradients(VDVAE(**NETWORK), scans(), range(4))
    for one, other, expected in zip(first, second, alone, strict=True):
        assert torch.equal(one, other)
        torch.testing.assert_close(one, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()) + 1e-7)


def the_template(rank):
    def from_scans(network):  # what other processes find does not count
        if rank > 0:
            return network
        network.set_voxel_gaussian(torch.full((1, 8, 8, 8), 0.5), torch.full((1, 8, 8, 8), 0.25))
        return network

    network = parallel_network(from_scans, VDVAE(**NETWORK)).module
    return torch.stack([network.template_mean.mean(), network.template_std.mean()])


def test_both_processes_start_from_the_template(tmp_path):
    assert [found.tolist() for found in both(the_template, tmp_path)] == [[0.5, 0.25]] * 2


def the_statistics(rank):
    items = [{"image": scan} for scan in scans()]
    data = SeededDataset(items, Compose([RandScaleIntensityd("image", factors=0.5, prob=1.0)]), seed=1)
    return [voxel_statistics(data, draws, draws > 1) for draws in (20, 1)]


def test_processes_share_the_template_and_find_what_one_finds(tmp_path):
    alone = the_statistics(0)
    for found in both(the_statistics, tmp_path):
        for one, other in zip(sum(alone, ()), sum(found, ()), strict=True):
            assert torch.equal(one, other)


def training_with_a_nan_in_one(rank):
    """Three updates, the second with a NaN in a scan of the second process."""
    torch.manual_seed(0)
    network = parallel_network(lambda network: network, VDVAE(**NETWORK))
    start = torch.cat([p.detach().flatten().clone() for p in network.parameters()])
    items = [{"image": MetaTensor(scan, meta={"filename_or_obj": f"sub-{rank}{i}"})} for i, scan in enumerate(scans())]
    if rank == 1:
        items[1]["image"][0, 0, 0, 0] = float("nan")
    optimizer = torch.optim.Adamax(network.parameters(), lr=1e-2)
    engine = VDVAETrainer("cpu", 1, DataLoader(Dataset(items[:3]), batch_size=1), network, optimizer, ELBOLoss())
    with pytest.MonkeyPatch.context() as patch:
        said = []
        patch.setattr("scripts.training.update.logger.warning", lambda text, *values: said.append(text % values))
        engine.run()
    weights = torch.cat([p.detach().flatten() for p in network.parameters()])
    return {"weights": weights, "start": start, "skipped": engine.state.skipped, "said": said}


def test_a_nan_in_one_process_is_skipped_by_both(tmp_path):
    first, second = both(training_with_a_nan_in_one, tmp_path)
    assert first["skipped"] == second["skipped"] == 1
    assert torch.equal(first["weights"], second["weights"])
    assert first["weights"].isfinite().all()
    assert not torch.equal(first["weights"], first["start"])
    expected = (
        "Update 2 skipped: the gradients' norm is nan (1 skipped so far). The likelihood is not finite of sub-11."
    )
    assert first["said"] == [expected]
    assert second["said"] == []  # one tells for all


def starting_again(rank):
    """Three starts with one store; one process comes late to the second, the other to the third."""
    store, prefixes = dist.FileStore(os.environ["SHARED_STORE"], 2), []
    for attempt, late in enumerate((None, 1, 0)):
        if rank == late:
            time.sleep(1)
        own = own_store(store, rank, 2)
        own.set(f"address {rank}", f"start {attempt}")
        prefixes.append(own.get(f"address {1 - rank}").decode())
        dist.barrier()
    return prefixes


def test_a_process_that_starts_again_does_not_find_old_addresses(tmp_path, monkeypatch):
    monkeypatch.setenv("SHARED_STORE", str(tmp_path / "shared"))
    assert both(starting_again, tmp_path) == [["start 0", "start 1", "start 2"]] * 2


def what_they_tell(rank):
    return {
        "from zero": from_rank_zero(lambda: f"rank {dist.get_rank()}"),
        "as JSON": from_rank_zero(lambda: [Path("a/b"), (1, None), {"subject": "é"}]),
        "share": list(batch_share(7, batch_size=2)),
        "empty": list(batch_share(1, batch_size=2)),
    }


def test_what_processes_tell_each_other(tmp_path):
    first, second = both(what_they_tell, tmp_path)
    assert first["from zero"] == second["from zero"] == "rank 0"
    # nothing that others could put into the rendezvous' store is unpickled
    assert first["as JSON"] == second["as JSON"] == ["a/b", [1, None], {"subject": "é"}]
    assert first["share"] + second["share"] == list(range(7))
    assert sorted([*first["empty"], *second["empty"]]) == [0]


def reading_together(rank):
    """Both processes read a cohort. Returns what each read itself, and what it is told of all."""
    folder = Path(os.environ["COHORT"])
    items = [{"image": str(path), "subject": path.name} for path in sorted(folder.glob("*.nii.gz"))]
    read = []
    with pytest.MonkeyPatch.context() as patch:
        compute = ScanCache._compute
        patch.setattr(ScanCache, "_compute", lambda self, i: read.append(self.data[i]["image"]) or compute(self, i))
        steps = inference_config().get_parsed_content("preprocessing")
        listed = {"training": items[:10], "validation": items[10:]}
        kept = read_cohort(listed, steps, Path(os.environ["COHORT"]).parent / "shared_cache")
    assert kept == listed
    return read


def test_two_processes_share_the_reading_of_a_cohort(cohort, tmp_path, monkeypatch):
    shutil.copytree(cohort, tmp_path / "brains")
    monkeypatch.setenv("COHORT", str(tmp_path / "brains"))
    first, second = both(reading_together, tmp_path)
    assert len(first) == len(second) == 6
    assert sorted(first + second) == sorted(map(str, (tmp_path / "brains").glob("*.nii.gz")))


def batch_norm_on_cpus(rank):
    with pytest.raises(ValueError, match="batch_norm over several processes needs GPUs"):
        parallel_network(lambda network: network, VDVAE(**NETWORK, batch_norm=True))
    return True


def test_batch_norm_needs_gpus(tmp_path):
    assert both(batch_norm_on_cpus, tmp_path) == [True, True]


def check_run(output, epochs=2):
    with (output / "history.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["bits_per_dim"]]
    assert [row["part"] for row in rows] == ["validation", *["training", "validation"] * epochs]
    assert (output / "checkpoints" / "model.pt").is_file()
    assert len(list((output / "tensorboard" / "training").iterdir())) == 1  # one process wrote


def test_two_processes_train_and_go_on(cohort, tmp_path):
    words = ["--dataset_dir", cohort, "--output_dir", tmp_path, "--batch_size", 2, "--figure_interval", 2]
    runs = run_bundle_group(*words, configs=TRAIN)
    log = "".join(run.stderr for run in runs)
    assert [run.returncode for run in runs] == [0, 0], log
    check_run(tmp_path)
    assert log.count("Epoch 1 training: bits per dim") == 1
    checkpoint = torch.load(tmp_path / "checkpoints" / "checkpoint.pt", weights_only=True)
    assert checkpoint["updates"] == 2 * (11 // 4)  # as many as one process with twice the batch makes
    words += ["--figure_interval", 0, "--resume", True, "--epochs", 3]
    result = run_bundle(*words)  # one process goes on where two have stopped
    assert result.returncode == 0, result.stderr
    assert "after epoch 2, update 4" in result.stderr
    assert "An epoch had 2 batches of 4 scans, and has 5 of 2 from now on." in result.stderr
    assert json.loads((tmp_path / "config.json").read_text())["epochs"] == 3


def test_two_nodes_train(cohort, tmp_path):
    """That meet at a master's address. Those of a SLURM job, below, meet at a rendezvous."""
    words = ["--dataset_dir", cohort, "--output_dir", tmp_path, "--batch_size", 2]
    command, environment = bundle_command(*words, configs=TRAIN)
    meeting = ["--nnodes=2", "--nproc_per_node=1", "--master_addr=127.0.0.1", f"--master_port={free_port()}"]
    launcher = [sys.executable, "-m", "torch.distributed.run", *meeting]
    logs = [tmp_path / f"log-{node}" for node in (0, 1)]
    nodes = []
    for node, path in enumerate(logs):
        with path.open("wb") as log:
            whole = [*launcher, f"--node_rank={node}", *command[1:]]
            nodes.append(subprocess.Popen(whole, cwd=ROOT, env=environment, stdout=log, stderr=log))
    said = "\n".join(path.read_text(encoding="utf-8") for path in logs)
    assert [node.wait(timeout=400) for node in nodes] == [0, 0], said
    check_run(tmp_path)


def test_a_multi_gpu_config_without_torchrun(cohort, tmp_path):
    run = run_bundle("--dataset_dir", cohort, "--output_dir", tmp_path, configs=TRAIN)
    assert run.returncode != 0
    assert "A multi_gpu config needs torchrun" in run.stderr


def start_under_slurm(rank, port):
    task = {"SLURM_JOB_ID": "7", "SLURM_LOCALID": "0"}  # torchrun's, the same for all that it starts
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    os.environ.update({**task, **meeting, "RANK": str(rank), "LOCAL_RANK": str(rank)})
    start()
    ranks = [idist.get_rank(), idist.get_local_rank(), int(os.environ["LOCAL_RANK"])]
    stop()
    return ranks


def test_under_slurm_each_process_keeps_its_own_device():
    assert run_group(start_under_slurm, free_port()) == [[0, 0, 0], [1, 1, 1]]


SLURM = {
    "srun": f"""shift
for node in $(seq "$SLURM_JOB_NUM_NODES"); do
    {sys.executable} -m torch.distributed.run "$@" &
    echo $! >> "$SLURM_FOLDER/nodes"
done
wait""",
    "scancel": 'echo "$@" >> "$SLURM_FOLDER/said"; kill -TERM $(cat "$SLURM_FOLDER/nodes")',
    "scontrol": 'echo "$@" >> "$SLURM_FOLDER/said"; echo localhost',
}


@pytest.mark.parametrize(("script", "nodes"), [("one_node.sh", "1"), ("nodes.sh", "2")])
def test_a_slurm_job_saves_and_queues_again_before_its_time_is_up(script, nodes, cohort, tmp_path):
    """With commands of the same names as SLURM's, of which the first runs what it is given, once for each node."""
    for name, does in SLURM.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{does}\n")
        (tmp_path / name).chmod(0o755)
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "here", "SLURM_JOB_NUM_NODES": nodes, "PROCESSES": "1"}
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | PROCESS | job | {"SLURM_FOLDER": str(tmp_path), "PATH": path}
    output = tmp_path / "out"
    words = ["--config_file", str(TRAIN), "--batch_size", "2", "--epochs", "1000"]
    with (tmp_path / "log").open("wb") as log:
        command = ["bash", f"docs/slurm/{script}", str(cohort), str(output), *words]
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)
    while not (output / "checkpoints" / "checkpoint.pt").exists():
        assert process.poll() is None, (tmp_path / "log").read_text(encoding="utf-8")
        time.sleep(0.1)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(timeout=60) == 0
    assert "Stopped by SIGTERM after update " in (tmp_path / "log").read_text(encoding="utf-8")
    assert "--signal=TERM 7.0\nrequeue 7\n" in (tmp_path / "said").read_text()
