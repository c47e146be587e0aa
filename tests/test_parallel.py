"""Work in processes of its own, which do not outlive the one that started them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import PROCESS
from joblib import cpu_count, delayed

from scripts.utils.parallel import choose_workers, run_parallel


def test_results_come_in_the_order_of_the_jobs(capfd):
    jobs = [delayed(divmod)(number, 3) for number in range(7)]
    assert list(run_parallel(jobs, 2, "dividing")) == [divmod(number, 3) for number in range(7)]
    assert "dividing: 100%" in capfd.readouterr().err
    assert sorted(run_parallel(jobs, 2, "dividing", in_order=False, quiet=True)) == sorted(
        divmod(n, 3) for n in range(7)
    )
    assert list(run_parallel([], 2, "nothing")) == []


def test_few_jobs_are_not_worth_a_process():
    assert choose_workers(10) == 1
    assert choose_workers(10_000) == cpu_count()
    assert choose_workers(10_000, workers=1) == 1


def test_a_killed_worker_ends_the_work_with_a_sentence():
    with pytest.raises(OSError, match="A worker process was killed, most likely for want of memory: lower --workers"):
        list(run_parallel([delayed(os.kill)(0, 0), delayed(os.abort)()], 2, "aborting"))


MARK = "PARALLEL_TEST"


def marked(mark: str) -> set[int]:
    """The processes that are alive and carry a mark in their environment."""
    found = set()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            ended = (folder / "stat").read_text().rpartition(")")[2].split()[0] == "Z"
            if not ended and f"{MARK}={mark}".encode() in (folder / "environ").read_bytes():
                found.add(int(folder.name))
        except OSError:  # it ended meanwhile
            continue
    return found


SLEEPERS = """
import time
from joblib import delayed
from scripts.utils.parallel import run_parallel

def sleep(path):
    open(path, "w").close()
    time.sleep(600)

list(run_parallel([delayed(sleep)(str(i)) for i in range(2)], 2, "sleeping"))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends processes with their parent")
def test_killing_a_process_ends_its_workers(tmp_path):
    mark = str(tmp_path)
    environment = os.environ | PROCESS | {MARK: mark}
    (tmp_path / "sleepers.py").write_text(SLEEPERS)
    process = subprocess.Popen([sys.executable, "sleepers.py"], cwd=tmp_path, env=environment)
    while not all((tmp_path / name).exists() for name in "01"):
        assert process.poll() is None
        time.sleep(0.1)
    assert len(marked(mark)) >= 3
    process.send_signal(signal.SIGKILL)
    process.wait()
    until = time.monotonic() + 15
    while marked(mark) and time.monotonic() < until:
        time.sleep(0.1)
    assert marked(mark) == set()
