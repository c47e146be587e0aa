"""What is left of a run when its processes are killed: its result, and its processes.

    python -m benchmarks.survival kills --count 20   # kill, go on, compare the weights with an undisturbed run's
    python -m benchmarks.survival ends               # end a run in every way, and look for processes that survive it
    python -m benchmarks.survival nodes              # take one of two nodes from a run, and give it another

Runs of two processes by torchrun (Gloo), a loader's worker each, a tiny network and twelve phantoms; where the first
reading of the scans is ended, two workers each and 64 phantoms. Linux alone.
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from ignite.engine import Engine, Events

from scripts.phantoms import make_brains
from scripts.utils.command_line import run
from scripts.utils.files import write_text

ROOT = Path(__file__).parent.parent
CONFIGS = ["configs/train.json", "tests/tiny.json", "tests/quick_start.json", "configs/multi_gpu_train.json"]
MARK = "SURVIVAL_RUN"
# a training process, a worker of its loader, torchrun itself, and the process that writes a checkpoint
VICTIMS = ("training", "loader", "torchrun", "while saving")
STANDALONE = ("--standalone", "--nnodes=1", "--nproc_per_node=2")
RANK_ZERO_TIMEOUT = 15  # seconds that processes have to end
LIMIT = 600  # seconds that a run may take


class FailOnOne:
    """A handler that raises on the second process after four batches."""

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.ITERATION_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        if engine.state.rank == 1 and engine.state.iteration == 4:
            raise RuntimeError("something in one process")


def marked(mark: str) -> dict[int, int]:
    """The processes that are alive and carry a mark in their environment, each with its parent."""
    parents = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if f"{MARK}={mark}".encode() in (folder / "environ").read_bytes():
                state, parent = (folder / "stat").read_text().rpartition(")")[2].split()[:2]
                parents |= {} if state == "Z" else {int(folder.name): int(parent)}
        except OSError:  # it ended meanwhile
            continue
    return parents


class Run:
    """A training run by torchrun and its processes, which carry a mark of their own in their environment."""

    def __init__(
        self,
        folder: Path,
        configs: list[str],
        *words: object,
        restarts: int = 0,
        meeting: Sequence[str] = STANDALONE,
        **environment: str,
    ) -> None:
        self.mark = uuid.uuid4().hex
        self.log = folder / f"{self.mark}.log"
        self.start = time.monotonic()
        launcher = ["-m", "torch.distributed.run", *meeting]
        launcher += [f"--max-restarts={restarts}", "--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"]
        command = [sys.executable, *launcher, "-m", "monai.bundle", "run", "training"]
        command += ["--config_file", str(configs), *map(str, words)]
        environment = os.environ | {MARK: self.mark, "OMP_NUM_THREADS": "1"} | environment
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True
            )

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.start

    @property
    def text(self) -> str:
        """What the run has printed so far."""
        return self.log.read_text(encoding="utf-8", errors="replace").replace("\r", "\n")

    @property
    def checkpoints(self) -> int:
        return self.text.count("Saved '")

    def processes(self) -> dict[int, str]:
        """Those that are alive: ``torchrun``, its ``training`` processes, what these started as ``loader``, orphans."""
        parents, places = marked(self.mark), {}
        for pid, parent in sorted(parents.items()):
            grandparent = parents.get(parent)
            if pid == self.process.pid:
                places[pid] = "torchrun"
            elif parent == self.process.pid:
                places[pid] = "training"
            else:
                places[pid] = "loader" if grandparent == self.process.pid else "orphan"
        return places

    def of(self, place: str) -> list[int]:
        return [pid for pid, own in self.processes().items() if own == place]

    def wait_for(self, happened: Callable[[], object], interval: float = 0.05) -> None:
        """Until something is true or the run ends."""
        while not happened() and self.process.poll() is None:
            if self.seconds > LIMIT:
                raise TimeoutError(f"the run of '{self.log}' hangs: {self.processes()}")
            time.sleep(interval)

    def seconds_to_silence(self) -> float:
        """Until no process is alive; at most so many as they have."""
        start = time.monotonic()
        while self.processes() and time.monotonic() - start < RANK_ZERO_TIMEOUT:
            self.process.poll()
            time.sleep(0.1)
        return time.monotonic() - start


def final_weights(output: Path) -> dict[str, torch.Tensor]:
    """Of the network and of its average, at the end of a run."""
    saved = torch.load(output / "checkpoints" / "checkpoint.pt", weights_only=True)
    return saved["network"] | {f"average.{name}": tensor for name, tensor in saved["average"].items()}


def settings(work: Path, epochs: int) -> tuple[object, ...]:
    """Words of the command of a short run, its output folder to come; they make its scans."""
    scans = make_brains(work / "brains", 12, spacing=8.0, workers=1)
    words = ("--dataset_dir", scans, "--cache_dir", work / "cache", "--batch_size", 2, "--epochs", epochs)
    return (*words, "--num_workers", 1, "--save_updates", 1, "--resume", "auto", "--output_dir")


def kill_one(run: Run, what: str, output: Path, chance: random.Random) -> int | None:
    """SIGKILL one process of a kind. Returns its number, or None where the run had ended."""
    if what == "while saving":
        run.wait_for(lambda: list((output / "checkpoints").glob(".*.checkpoint.pt")), interval=0)
        victims = run.of("training")[:1]
    else:
        run.wait_for(lambda: run.of(what))
        victims = run.of(what)
    if not victims:
        return None
    victim = chance.choice(victims)
    os.kill(victim, signal.SIGKILL)
    return victim


def kills(count: int = 20, seed: int = 0, epochs: int = 4, first: str = "training") -> None:
    """Kill one process of a run at a random moment, let it go on, compare; so many times.

    Args:
        count: of runs, each with one kill.
        seed: of the moments.
        epochs: of each run, of two updates with a checkpoint after each.
        first: whom to kill first, one of ``VICTIMS``; the others follow in turn.
    """
    chance = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        words = settings(work, epochs)
        whole = Run(work, CONFIGS, *words, work / "undisturbed")
        whole.wait_for(lambda: whole.checkpoints)
        earliest = whole.seconds
        whole.process.wait(LIMIT)
        expected = final_weights(work / "undisturbed")
        print(f"Undisturbed: first checkpoint after {earliest:.0f} s, the end after {whole.seconds:.0f} s.\n")
        print("| kill | of | pid | after | checkpoints by then | went on by | weights at the end |")
        print("|---|---|---|---|---|---|---|", flush=True)
        same = kill = 0
        while kill < count:
            output = Path(tempfile.mkdtemp(dir=work))
            what = VICTIMS[(VICTIMS.index(first) + kill) % len(VICTIMS)]
            run = Run(work, CONFIGS, *words, output, restarts=3)
            # by its progress, not by the clock, since other programs may slow it down
            saves, seconds = chance.randrange(2 * epochs - 1), chance.uniform(0, earliest)
            run.wait_for(lambda run=run, saves=saves: run.checkpoints >= saves)
            run.wait_for(
                lambda run=run, until=run.seconds + (seconds if saves == 0 else seconds / 20): run.seconds > until
            )
            victim = kill_one(run, what, output, chance)
            if victim is None:  # too late: again
                continue
            kill += 1
            row = f"{victim} | {run.seconds:.1f} s | {run.checkpoints}"
            went_on = "torchrun's restart"
            if run.process.wait(LIMIT) != 0:
                went_on = f"a new start, when the last process had ended ({run.seconds_to_silence():.1f} s)"
                Run(work, CONFIGS, *words, output).process.wait(LIMIT)
            ended = final_weights(output)
            identical = all(torch.equal(tensor, ended[name]) for name, tensor in expected.items())
            same += identical
            print(f"| {kill} | {what} | {row} | {went_on} | {'identical' if identical else 'DIFFER'} |", flush=True)
    print(f"\n{same} of {count} ended with the weights of the undisturbed run, bit for bit.")
    sys.exit(0 if same == count else 1)


def ends(epochs: int = 100) -> None:
    """End a run in each way, and print its processes before and after.

    Args:
        epochs: of each run; more than it gets to.
    """
    survivors = 0
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        words = settings(work, epochs)
        failing = work / "failing.json"
        write_text(failing, json.dumps({"+train#handlers": [{"_target_": "benchmarks.survival.FailOnOne"}]}))
        reading = ("--dataset_dir", make_brains(work / "more", 64, spacing=8.0), "--num_workers", 2)
        ways: dict[str, Callable[[Run], object]] = {
            "normal": lambda run: None,
            "exception on one process": lambda run: None,
            "Ctrl-C": lambda run: os.killpg(run.process.pid, signal.SIGINT),
            "SIGTERM to torchrun": lambda run: run.process.terminate(),
            "SIGUSR1 to all": lambda run: [os.kill(pid, signal.SIGUSR1) for pid in run.processes()],
            "SIGKILL of a training process": lambda run: os.kill(run.of("training")[-1], signal.SIGKILL),
            "SIGKILL of a loader's worker": lambda run: os.kill(run.of("loader")[0], signal.SIGKILL),
            "SIGKILL of torchrun": lambda run: run.process.kill(),
            "SIGTERM to torchrun, reading": lambda run: run.process.terminate(),
            "SIGKILL of a training process, reading": lambda run: os.kill(run.of("training")[0], signal.SIGKILL),
            "SIGKILL of torchrun, reading": lambda run: run.process.kill(),
        }
        print("| end | alive before | exit code | all had ended after | alive then | its last log line |")
        print("|---|---|---|---|---|---|", flush=True)
        for number, (way, end) in enumerate(ways.items()):
            configs = [*CONFIGS, str(failing)] if way.startswith("exception") else CONFIGS
            last = ("--epochs", 2) if way == "normal" else ()
            reads = way.endswith("reading")
            if reads:
                last = (*reading, "--cache_dir", work / f"cache_{number}")
            run = Run(work, configs, *words, work / str(number), *last)
            run.wait_for(lambda run=run, reads=reads: (run.checkpoints or reads) and len(run.of("loader")) > 1)
            before = table(run.processes())
            end(run)
            code = run.process.wait(LIMIT)
            seconds = run.seconds_to_silence()
            after = run.processes()
            survivors += len(after)
            print(f"| {way} | {before} | {code} | {seconds:.1f} s | {table(after)} | {last_words(run)} |", flush=True)
            for pid in after:
                os.kill(pid, signal.SIGKILL)
    sys.exit(1 if survivors else 0)


def nodes(epochs: int = 150, port: int = 29619) -> None:
    """Kill one of two nodes of a run, start another in its place, and print how the run goes on.

    Args:
        epochs: of the run, long enough for all that.
        port: of this machine, where the nodes meet.
    """
    meeting = ["--nnodes=1:2", "--nproc_per_node=1", "--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{port}"]
    meeting += ["--rdzv_id=nodes", "--rdzv_conf=last_call_timeout=5"]
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        words = (*settings(work, epochs), work / "output")

        def start() -> Run:
            # PyTorch's own store of the first meeting cannot be found by a node that comes later
            return Run(work, CONFIGS, *words, restarts=3, meeting=meeting, TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")

        def changes() -> list[str]:
            """Each place where the run went on, as rank 0, which may be on any node, tells it."""
            lines = (line for run in runs for line in run.text.splitlines())
            told = [line for line in lines if "Resuming from" in line or "An epoch had" in line]
            return [re.sub(r"^\S+ |from '.*?' ", "", line) for line in sorted(told, key=lambda line: line[:8])]

        def is_host() -> bool:
            with socket.socket() as asking:
                return asking.connect_ex(("127.0.0.1", port)) == 0

        runs = [start()]
        runs[0].wait_for(is_host)  # that one has to stay
        runs.append(start())
        runs[0].wait_for(lambda: any(run.checkpoints > 1 for run in runs))
        for pid in runs[1].processes():
            os.kill(pid, signal.SIGKILL)
        print("One of two nodes is killed:", flush=True)
        runs[0].wait_for(lambda: any("of 2 from now on" in line for line in changes()))
        runs[0].wait_for(lambda before=runs[0].checkpoints: runs[0].checkpoints > before)
        print("\n".join(changes()), "Another node comes:", sep="\n", flush=True)
        known = len(changes())
        runs.append(start())
        codes = [run.process.wait(LIMIT) for run in (runs[0], runs[2])]
        print("\n".join(changes()[known:]))
        updates = torch.load(work / "output" / "checkpoints" / "checkpoint.pt", weights_only=True)["updates"]
        print(f"Both end with code {codes}, after {updates} updates.")
    sys.exit(max(codes))


def last_words(run: Run) -> str:
    """What the bundle itself said last of checkpoints."""
    told = [line for line in run.text.splitlines() if "Saved '" in line or "Stopped by" in line]
    return re.sub(r".*?(Saved|Stopped)( '.*')?", r"\1", told[-1]) if told else "-"


def table(processes: dict[int, str]) -> str:
    """The processes of a run in one cell."""
    places = list(processes.values())
    return ", ".join(f"{places.count(place)} {place}" for place in dict.fromkeys(places)) or "none"


if __name__ == "__main__":
    run("python -m benchmarks.survival", {"kills": kills, "ends": ends, "nodes": nodes})
