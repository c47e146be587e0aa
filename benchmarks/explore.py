"""How long the page of ``scripts.explore`` takes to open on a large cohort, and how much memory its server needs.

    python -m benchmarks.explore --scans 5000 --requests 200

The scans are links to a few phantoms, with ages, sexes and sites in ``participants.tsv``; the server is the command as
users start it. Requests are those of people who look around, in equal parts: a page of the table, sorted and searched,
a thumbnail, a scan opened, coordinates decoded, each of another scan or place. Their times are the server's processor
time, which other programs on the machine change little. It prints a table as Markdown, and as the last line JSON.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

from scripts.phantoms import make_brains
from scripts.utils.command_line import run

PHANTOMS = 16


class Server:
    """The command, and what it is asked."""

    def __init__(self, dataset_dir: Path, config_file: str) -> None:
        words = ["--dataset_dir", str(dataset_dir), "--config_file", config_file, "--browser", "False"]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "scripts.explore", *words],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for line in self.process.stderr:
            if found := re.search(r"(http\S+)/\?token=(\S+)", line):
                self.address, self.token = found.groups()
                return
        raise RuntimeError("The server did not start.")

    def ask(self, path: str, content: Any = None) -> bytes:
        data = None if content is None else json.dumps(content).encode()
        request = urllib.request.Request(self.address + path, data, {"authorization": f"Bearer {self.token}"})
        with urllib.request.urlopen(request) as response:
            return response.read()

    def do(self, kind: str, **arguments: Any) -> None:
        """A job, and the files that it gives."""
        job = json.loads(self.ask("/api/jobs", {"kind": kind, "arguments": arguments}))
        while job["state"] in ("waiting", "running"):
            time.sleep(0.02)
            job = json.loads(self.ask(f"/api/jobs/{job['id']}"))
        if job["state"] != "done":
            raise RuntimeError(job["error"])
        for file in job["files"].values():
            self.ask(file)

    def memory(self) -> int:
        """Its resident memory in bytes."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(r"VmRSS:\s+(\d+) kB", status)[1]) * 1024

    def cpu(self) -> float:
        """Processor time that it has used, in seconds."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(timeout=60)


def link_cohort(folder: Path, scans: int) -> Path:
    """So many links to a few phantoms, and their ``participants.tsv``."""
    made = Path(make_brains(folder / "phantoms", PHANTOMS, seed=1, covariates=True))
    table = (made / "participants.tsv").read_text().splitlines()
    linked = folder / "scans"
    linked.mkdir()
    rows = [table[0]]
    for number in range(scans):
        (linked / f"sub-{number:05d}_FLAIR.nii.gz").symlink_to(made / f"sub-{number % PHANTOMS + 1:04d}_FLAIR.nii.gz")
        rows.append(f"sub-{number:05d}\t" + table[number % PHANTOMS + 1].partition("\t")[2])
    (linked / "participants.tsv").write_text("\n".join(rows) + "\n")
    return linked


def main(
    scans: int = 5000, requests: int = 200, config_file: str = "['configs/inference.json','configs/covariates.json']"
) -> dict[str, float]:
    """Measure.

    Args:
        scans: of the cohort.
        requests: how many.
        config_file: of the weights; they need a population prior.
    """
    with tempfile.TemporaryDirectory() as folder:
        dataset_dir = link_cohort(Path(folder), scans)
        start = time.perf_counter()
        server = Server(dataset_dir, config_file)
        found = {"start_s": time.perf_counter() - start, "start_cpu_s": server.cpu()}
        try:
            kinds = {
                "table": lambda n: server.ask(
                    f"/api/scans?sort=age&descending=true&offset={50 * n % scans}&search=sub-0{n % 5}"
                ),
                "thumbnail": lambda n: server.ask(f"/api/scans/{n * 37 % scans}/thumbnail.png"),
                "view": lambda n: server.do("view", index=n * 37 % scans),
                "decode": lambda n: server.do("decode", coordinates=[n % 80 / 10 - 4], start=[0]),
            }
            seconds: dict[str, float] = dict.fromkeys(kinds, 0.0)
            for ask in kinds.values():  # what is loaded once
                ask(0)
            found["memory_before_mb"] = server.memory() / 1e6
            for number in range(1, requests + 1):
                name = list(kinds)[number % len(kinds)]
                before = server.cpu()
                kinds[name](number)
                seconds[name] += server.cpu() - before
            found["memory_after_mb"] = server.memory() / 1e6
        finally:
            server.stop()
    found |= {f"{name}_cpu_s": used / (requests / len(kinds)) for name, used in seconds.items()}
    print(f"{scans} scans, {requests} requests\n\n| measure | value |\n|---|---|")
    for name, value in found.items():
        print(f"| {name} | {value:.3g} |")
    print(json.dumps(found))
    return found


if __name__ == "__main__":
    run("python -m benchmarks.explore", main)
