"""Checkpoints that cannot be lost: damaged, torn, left over, on a full disk, told to stop in the middle of an epoch."""

from __future__ import annotations

import csv
import os
import pickle
import shutil
import signal
import subprocess
import time

import pytest
import torch
from conftest import ROOT, TINY, bundle_command, run_bundle
from monai.bundle import ConfigParser
from torch.utils.data import DataLoader

from scripts.networks import VDVAE
from scripts.training.checkpoint_content import REQUIRED
from scripts.training.checkpoints import (
    CheckpointError,
    CheckpointHandler,
    load_weights,
    newest_checkpoint,
    place_in_epoch,
    read_weights,
)
from scripts.training.handlers import MovingAverage
from scripts.training.losses import ELBOLoss
from scripts.training.start import starts_untrained
from scripts.training.trainer import VDVAETrainer
from scripts.utils.distributed import SignalWatch


def run(cohort, output, *words, **settings):
    """Three epochs of five batches, one process."""
    common = ("--dataset_dir", cohort, "--output_dir", output, "--batch_size", 2, "--epochs", 3)
    return run_bundle(*common, *words, **settings)


def weights(output, name="checkpoint.pt"):
    saved = torch.load(output / "checkpoints" / name, weights_only=True)
    return {part: saved[part] for part in ("network", "average")}


def assert_equal(one, other):
    for part in ("network", "average"):
        assert all(torch.equal(one[part][name], tensor) for name, tensor in other[part].items())


@pytest.fixture(scope="session")
def undisturbed(cohort, tmp_path_factory):
    """A run with a checkpoint after every second update."""
    output = tmp_path_factory.mktemp("undisturbed")
    result = run(cohort, output, "--save_updates", 2, "--keep_last", 6)
    assert result.returncode == 0, result.stderr
    return output


def test_the_last_checkpoints_are_kept(undisturbed):
    names = ["checkpoint.pt", *(f"checkpoint_{age}.pt" for age in range(1, 6))]
    saved = [torch.load(undisturbed / "checkpoints" / name, weights_only=True) for name in names]
    assert [checkpoint["updates"] for checkpoint in saved] == [15, 14, 12, 10, 9, 7]
    assert [checkpoint["epoch"] for checkpoint in saved] == [3, 2, 2, 2, 1, 1]
    assert len(list((undisturbed / "checkpoints").iterdir())) == len(names) + 2  # and model.pt, best_model.pt


@pytest.fixture
def earlier(undisturbed, tmp_path):
    """The same run, stopped after update 7 in the middle of the second epoch; update 9 and its end are there too."""
    (tmp_path / "checkpoints").mkdir()
    for age, name in ((5, "checkpoint_1.pt"), (4, "checkpoint.pt")):
        shutil.copy(undisturbed / "checkpoints" / f"checkpoint_{age}.pt", tmp_path / "checkpoints" / name)
    return tmp_path


def flip(path, place):
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("kind", ["truncated", "flipped", "empty", "not there"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(kind, earlier, undisturbed, cohort):
    newest = earlier / "checkpoints" / "checkpoint.pt"
    content = newest.read_bytes()
    if kind == "truncated":
        newest.write_bytes(content[: len(content) // 2])
    elif kind == "flipped":
        flip(newest, len(content) // 2)
    elif kind == "empty":
        newest.write_bytes(b"")
    else:
        newest.unlink()
    leftover = earlier / "checkpoints" / ".4711-0badcafe.checkpoint.pt"
    leftover.write_bytes(content[:1000])
    (earlier / "checkpoints" / "checkpoint_1_before.pt").write_bytes(content)  # a copy of somebody's
    found = newest_checkpoint(earlier / "checkpoints", resume="auto")
    assert found.name == "checkpoint_1.pt"
    assert not leftover.exists()
    assert (earlier / "checkpoints" / "damaged_checkpoint.pt").exists() == (kind != "not there")
    if kind == "flipped":  # to the end, from the middle of an epoch and with other loaders
        result = run(cohort, earlier, "--resume", "auto", "--num_workers", 2)
        assert result.returncode == 0, result.stderr
        assert "after epoch 1 and 2 batches, update 7" in result.stderr
        assert_equal(weights(earlier), weights(undisturbed))


def test_a_flipped_byte_anywhere_is_seen_or_harmless(earlier):
    path = earlier / "checkpoints" / "checkpoint.pt"
    content = path.read_bytes()
    expected = weights(earlier)
    # the one before it, which is read whenever the damage is seen, may be small
    empty = {"weight": torch.zeros(0)}
    small = {"network": empty, "average": empty, "optimizer": {"state": {}, "param_groups": []}}
    small |= dict.fromkeys(REQUIRED[3:], 0)
    torch.save(small, earlier / "checkpoints" / "checkpoint_1.pt")
    places = torch.randint(len(content), (60,), generator=torch.Generator().manual_seed(0)).tolist()
    seen = 0
    for place in [*places, 0, 10, 40, len(content) - 1, len(content) - 30]:
        path.write_bytes(content)
        flip(path, place)
        (earlier / "checkpoints" / "damaged_checkpoint.pt").unlink(missing_ok=True)
        if newest_checkpoint(earlier / "checkpoints", resume=True).name == "checkpoint.pt":
            assert_equal(weights(earlier), expected)
        else:
            seen += 1
    assert seen > 40


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda c: next(iter(c["network"].values())).fill_(float("nan")), "in its 'network' '"),
        (lambda c: c["average"].update(scan_grid=torch.zeros(2)), "in its 'average' 'scan_grid' is [2]"),
        (lambda c: c.pop("updates"), "was not written by this bundle's training"),
    ],
)
def test_a_checkpoint_with_a_wrong_field_gives_way_to_the_one_before(edit, words, earlier, caplog):
    folder = earlier / "checkpoints"
    content = torch.load(folder / "checkpoint.pt", weights_only=True)
    edit(content)
    torch.save(content, folder / "checkpoint.pt")
    assert newest_checkpoint(folder, resume=True).name == "checkpoint_1.pt"
    assert words in caplog.text and "The checkpoint before it is looked at" in caplog.text


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda c: c["optimizer"]["param_groups"][0].update(lr="fast"), "its learning rate is no number"),
        (lambda c: c["optimizer"]["param_groups"][0]["params"].pop(), "has other parameters than this network"),
        (lambda c: c["optimizer"]["state"][0]["exp_avg"].fill_(float("nan")), "'exp_avg' of its state is not finite"),
        (lambda c: c.update(optimizer={"state": {}}), "KeyError|other parameters"),
    ],
)
def test_what_a_run_cannot_take_in_is_a_sentence(edit, words, undisturbed, tmp_path):
    path = tmp_path / "checkpoint.pt"
    content = torch.load(undisturbed / "checkpoints/checkpoint.pt", weights_only=True)
    edit(content)
    torch.save(content, path)
    parser = ConfigParser(ConfigParser.load_config_files([str(ROOT / config) for config in TINY]))
    network = parser.get_parsed_content("network_def")
    optimizer = torch.optim.Adamax(network.parameters())
    average = MovingAverage(network)
    handler = CheckpointHandler(tmp_path, network, average, optimizer)
    scans = [{"image": torch.zeros(1, 8, 8, 8)} for _ in range(4)]
    engine = VDVAETrainer("cpu", 4, DataLoader(scans, 2), network, optimizer, ELBOLoss(), train_handlers=[average])
    with pytest.raises(CheckpointError, match=words) as refused:
        handler.resume(engine, path)
    assert str(path) in str(refused.value) and "--restore_optimizer False" in str(refused.value)


def test_when_all_are_damaged_nothing_starts_anew(earlier):
    for path in (earlier / "checkpoints").iterdir():
        path.write_bytes(b"torn")
    with pytest.raises(CheckpointError, match=r"All checkpoints .* are damaged"):
        newest_checkpoint(earlier / "checkpoints", resume="auto")


def test_weights_that_are_not_there_are_named_and_where_the_bundles_own_would_be(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"model.pt' do not exist: set --weights .*models/ under --bundle_root"):
        read_weights(tmp_path / "model.pt")


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ({"weight": torch.tensor([1.0, float("nan")])}, "'weight' is not finite: take those of another epoch"),
        ({"scan_grid": torch.zeros(3)}, r"'scan_grid' is \[3\]"),
        ({"weight": 1.0}, "not a state dict"),
        ([1, 2], "not a state dict"),
    ],
)
def test_weights_with_other_content_are_refused(state, words, tmp_path):
    torch.save(state, tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match=words) as refused:
        read_weights(tmp_path / "model.pt")
    assert str(tmp_path / "model.pt") in str(refused.value)


def test_what_resume_can_be(tmp_path):
    assert newest_checkpoint(tmp_path, resume=False) is None
    assert newest_checkpoint(tmp_path, resume="auto") is None
    with pytest.raises(FileNotFoundError, match="does not exist: set --ckpt_dir"):
        newest_checkpoint(tmp_path, resume=True)
    with pytest.raises(ValueError, match="resume is 'maybe': it must be True, False or auto"):
        newest_checkpoint(tmp_path, resume="maybe")


@pytest.mark.parametrize(
    ("scans", "scans_per_batch", "batches", "accumulation_steps", "expected"),
    [
        (8, 4, 5, 1, 2),  # as it was saved
        (8, 2, 10, 1, 4),  # half as many processes
        (8, 3, 6, 1, 2),  # the third batch holds scan 8, which has not been seen
        (8, 16, 1, 1, 0),
        (18, 4, 4, 1, 3),  # fewer scans: one batch is left
        (8, 2, 10, 3, 3),  # no update is begun
        (0, 4, 5, 1, 0),
    ],
)
def test_an_epoch_goes_on_with_other_batches(scans, scans_per_batch, batches, accumulation_steps, expected):
    assert place_in_epoch(scans, scans_per_batch, batches, accumulation_steps) == expected


def test_an_epoch_begun_with_one_batch_size_ends_with_another(earlier, cohort):
    result = run(cohort, earlier, "--resume", "auto", "--batch_size", 3, "--epochs", 2, "--learning_rate_decay", 1.0)
    assert result.returncode == 0, result.stderr
    assert "after epoch 1 and 2 batches, update 9" in result.stderr  # 8 of the epoch's scans were seen, 6 count
    assert "An epoch had 5 batches of 2 scans, and has 3 of 3 from now on." in result.stderr
    saved = torch.load(earlier / "checkpoints" / "checkpoint.pt", weights_only=True)
    assert (saved["epoch"], saved["updates"]) == (2, 10)
    assert saved["optimizer"]["param_groups"][0]["lr"] == 0  # after the last update


def rates(folder):
    with (folder / "history.csv").open() as file:
        return [float(row["learning_rate"]) for row in csv.DictReader(file) if row["part"] == "training"]


def test_a_run_goes_on_with_another_learning_rate(earlier, cohort):
    result = run(cohort, earlier, "--resume", "auto", "--learning_rate", 0.001, "--learning_rate_warmup", 10)
    assert result.returncode == 0, result.stderr
    assert "The learning rate was 0.002, and is 0.001 from now on." in result.stderr
    assert rates(earlier) == pytest.approx([0.002 * 6 / 20, 0.001, 0.001])


def test_a_run_goes_on_in_float16_that_began_without(earlier, cohort):
    """Its checkpoint holds no state of a loss scaler."""
    words = ("--resume", True, "--amp", True, "--amp_dtype", "$torch.float16")
    result = run(cohort, earlier, *words)
    assert result.returncode == 0, result.stderr
    saved = torch.load(earlier / "checkpoints" / "checkpoint.pt", weights_only=True)
    assert saved["scaler"]["scale"] > 0 and saved["updates"] == 15


@pytest.mark.parametrize(
    ("weights", "checkpoint", "restore_optimizer", "expected"),
    [
        (None, None, True, True),
        ("w.pt", None, True, False),
        (None, "c.pt", True, True),
        (None, "c.pt", False, False),
        ("w.pt", "c.pt", True, False),
    ],
)
def test_a_start_from_trained_weights_has_no_kl_warmup(weights, checkpoint, restore_optimizer, expected):
    assert starts_untrained(weights, checkpoint, restore_optimizer) == expected
    parser = ConfigParser(ConfigParser.load_config_files([str(ROOT / config) for config in TINY]))
    parser.update({"weights": weights, "last_checkpoint": checkpoint, "restore_optimizer": restore_optimizer})
    assert parser.get_parsed_content("loss").kl_warmup == (150 if expected else 0)


def test_while_updates_are_skipped_nothing_is_saved(cohort, tmp_path):
    words = ("--skip_grad_norm", 1e-6, "--skip_warmup", 3, "--max_skips", 9, "--save_updates", 1, "--keep_last", 9)
    result = run(cohort, tmp_path, *words)
    assert result.returncode == 1
    assert "Error: 9 updates in a row (max_skips) were skipped" in result.stderr
    saved = [torch.load(path, weights_only=True) for path in (tmp_path / "checkpoints").glob("checkpoint*.pt")]
    assert sorted(checkpoint["updates"] for checkpoint in saved) == [1, 2, 3, 4, 5, 6, 7]


@pytest.mark.parametrize(
    ("key", "value"), [("save_interval", 0), ("save_updates", 0), ("save_minutes", -1), ("keep_last", 2.5)]
)
def test_numbers_that_make_no_sense_are_refused(key, value, tmp_path):
    with pytest.raises(ValueError, match=f"{key} is {value!r}, but must be a"):
        CheckpointHandler(tmp_path, torch.nn.Identity(), None, None, **{key: value})


def test_what_was_trained_on_is_not_validated_on(earlier, cohort):
    result = run(cohort, earlier, "--resume", "auto", "--train_fraction", 0.5)
    assert result.returncode == 1
    last = result.stderr.splitlines()[-1]
    assert "has trained on 5 subject(s) that would be validated on now, such as 'sub-00" in last
    assert "--dataset_dir with the datalist.json of its output_dir" in last


class Harmful:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("archive", [True, False])
def test_a_pickle_that_would_run_code_is_refused(archive, tmp_path):
    weights, made = tmp_path / "model.pt", tmp_path / "made"
    if archive:
        torch.save({"weight": Harmful(made)}, weights)
    else:
        weights.write_bytes(pickle.dumps(Harmful(made)))
    network = VDVAE(2, 1, [4, 6], [1, 1], [2, 3], [3, 2])
    with pytest.raises(CheckpointError, match="refused" if archive else "cannot be read"):
        load_weights(network, weights)
    assert not made.exists()


def test_weights_of_another_size_name_the_overlay_that_they_need(tmp_path):
    files = [str(ROOT / "configs" / name) for name in ("train.json", "medium_32.json")]
    other, network = (
        ConfigParser(ConfigParser.load_config_files(files[:count])).get_parsed_content("network_def")
        for count in (1, 2)
    )
    torch.save(network.state_dict(), tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match=r"its network is that of configs/medium_32\.json: name that too"):
        load_weights(other, tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match=r"another architecture .*use the config that it was trained with"):
        load_weights(VDVAE(2, 1, [4, 6], [1, 1], [2, 3], [3, 2]), tmp_path / "model.pt")


def test_a_signal_ends_a_run_after_the_running_update(undisturbed, cohort, tmp_path, monkeypatch):
    batch = VDVAETrainer.batch

    def interrupted(trainer, *args, **kwargs):
        if trainer.state.updates == 6:
            signal.raise_signal(signal.SIGTERM)
        return batch(trainer, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(VDVAETrainer, "batch", interrupted)
        result = run(cohort, tmp_path, "--resume", "auto")
    assert result.returncode == 0, result.stderr
    assert "Stopped by SIGTERM after update 7; the checkpoint is saved" in result.stderr
    result = run(cohort, tmp_path, "--resume", "auto")
    assert result.returncode == 0, result.stderr
    assert "after epoch 1 and 2 batches, update 7" in result.stderr
    assert_equal(weights(tmp_path), weights(undisturbed))


def test_ctrl_c_ends_a_run_in_good_order(undisturbed, cohort, tmp_path):
    """Sent to every process of the run, as terminals do; the loaders' workers have to outlive it."""
    words = ("--dataset_dir", cohort, "--output_dir", tmp_path, "--batch_size", 2, "--epochs", 3, "--num_workers", 2)
    command, environment = bundle_command(*words, "--resume", "auto")
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored where tests run in the background
    )
    log = ""
    while "Epoch [1/3]" not in log:
        log += process.stderr.read(1)
    os.killpg(process.pid, signal.SIGINT)
    log += process.communicate(timeout=120)[1]
    assert process.returncode == 0, log
    assert "Stopped by SIGINT after update " in log
    assert torch.load(tmp_path / "checkpoints" / "checkpoint.pt", weights_only=True)["updates"] < 15
    result = run(cohort, tmp_path, "--resume", "auto")
    assert result.returncode == 0, result.stderr
    assert "Resuming from" in result.stderr
    assert_equal(weights(tmp_path), weights(undisturbed))


@pytest.fixture
def default_handlers():
    """Ctrl-C is ignored where tests run in the background."""
    before = {number: signal.signal(number, signal.SIG_DFL) for number in (signal.SIGINT, signal.SIGUSR1)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_ctrl_c_once_more_a_second_later_ends_at_once(default_handlers, monkeypatch, capfd):
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now)
    with SignalWatch() as watch:
        signal.raise_signal(signal.SIGUSR1)
        assert watch.received == signal.SIGUSR1
    with SignalWatch() as watch:
        for _ in range(2):  # torchrun and the terminal send one each
            signal.raise_signal(signal.SIGINT)
        assert watch.received == signal.SIGINT
        now += 1.1
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert "press Ctrl-C again to end without a checkpoint" in capfd.readouterr().err


def test_minutes_save_too(cohort, tmp_path):
    assert run(cohort, tmp_path, "--save_minutes", 0, "--keep_last", 2).returncode == 0
    saved = torch.load(tmp_path / "checkpoints" / "checkpoint_1.pt", weights_only=True)
    assert (saved["epoch"], saved["updates"]) == (2, 14)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 6 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", folder], capture_output=True, text=True)
    if mount.returncode:
        pytest.skip(f"mounting a tmpfs takes more rights than these: {mount.stderr.strip()}")
    yield folder
    for _ in range(20):
        if subprocess.run(["umount", folder], check=False, capture_output=True).returncode == 0:
            break
        time.sleep(0.5)


def test_a_full_disk_ends_the_run_and_keeps_what_was_there(small_disk, undisturbed, cohort, tmp_path):
    words = ("--ckpt_dir", small_disk / "checkpoints", "--save_updates", 2, "--resume", "auto")
    (small_disk / "checkpoints").mkdir()
    for age, name in ((5, "checkpoint_1.pt"), (4, "checkpoint.pt")):
        shutil.copy(undisturbed / "checkpoints" / f"checkpoint_{age}.pt", small_disk / "checkpoints" / name)
    before = {path.name: path.read_bytes() for path in (small_disk / "checkpoints").iterdir()}
    filler = small_disk / "filler"
    free = shutil.disk_usage(small_disk).free
    filler.write_bytes(bytes(free - 200_000))
    result = run(cohort, tmp_path, *words)
    assert result.returncode == 1
    assert "could not be written because the disk is full: free some space" in result.stderr.splitlines()[-1]
    assert {path.name: path.read_bytes() for path in (small_disk / "checkpoints").iterdir()} == before
    filler.unlink()
    result = run(cohort, tmp_path, *words)
    assert result.returncode == 0, result.stderr
    saved = torch.load(small_disk / "checkpoints" / "checkpoint.pt", weights_only=True)
    assert_equal(saved, weights(undisturbed))
