"""Files are written whole or not at all; what killed processes leave is removed; errors name what people know."""

from __future__ import annotations

import errno
import os
import signal
import stat
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest
from conftest import PROCESS, ROOT
from monai.transforms import Compose

from scripts.utils import files
from scripts.utils.errors import ResourceError, is_refusal, sentence
from scripts.utils.files import write_tensors, write_text, write_whole

HOLD = """
import sys, time
from pathlib import Path
from scripts.utils.files import write_whole
def hold(path):
    Path(path).write_text("half"); print(flush=True); time.sleep(60)
write_whole(sys.argv[1], hold)
"""


@pytest.fixture(autouse=True)
def started_anew(monkeypatch):
    monkeypatch.setattr(files, "_cleared", set())


def writer(path: Path) -> subprocess.Popen:
    """A process in the middle of writing a file."""
    command = [sys.executable, "-c", HOLD, str(path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, env=os.environ | PROCESS, cwd=ROOT)
    process.stdout.readline()
    return process


@pytest.mark.parametrize("name", [".4711-0badcafe-01234567.score.json", ".4711-01234567.score.json"])
def test_what_a_killed_process_left_is_gone_a_day_later(tmp_path, name):
    process = writer(tmp_path / "score.json")
    (writing,) = tmp_path.iterdir()
    left = tmp_path / name
    left.write_text("half")
    os.utime(left, (time.time() - 90000,) * 2)
    files._cleared.clear()
    write_text(tmp_path / "a.txt", "")
    assert writing.exists() and not left.exists()
    process.send_signal(signal.SIGKILL)
    process.wait()
    files.remove_leftovers(tmp_path, alone=True)
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_other_hidden_files_stay(tmp_path):
    others = [tmp_path / name for name in (".2024-notes.txt", ".1-sub.nii", "._a.nii", ".12345678.json")]
    for path in others:
        path.write_text("mine")
        os.utime(path, (0, 0))
    write_text(tmp_path / "a.txt", "")
    files.remove_leftovers(tmp_path, alone=True)
    assert all(path.exists() for path in others)


@pytest.mark.parametrize(
    ("error", "named"),
    [
        (errno.EACCES, "folder"),
        (errno.EROFS, "folder"),
        (errno.ENOENT, "folder"),
        (errno.ENAMETOOLONG, "file"),
        (errno.EISDIR, "file"),
    ],
)
@pytest.mark.parametrize("as_bytes", [False, True])
def test_an_error_names_what_its_reader_knows(tmp_path, error, named, as_bytes):
    path = tmp_path / "scores.csv"

    def write(temporary):
        raise OSError(error, os.strerror(error), os.fsencode(temporary) if as_bytes else temporary)

    with pytest.raises(OSError) as raised:
        write_whole(path, write)
    assert raised.value.errno == error
    assert raised.value.filename == str(tmp_path if named == "folder" else path)
    assert sentence(raised.value).startswith(f"'{tmp_path if named == 'folder' else path}' ")


def test_a_folder_that_cannot_be_flushed_is_no_error(tmp_path, monkeypatch):
    whole = os.fsync

    def fsync(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        whole(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    assert write_text(tmp_path / "a.txt", "a").read_text(encoding="utf-8") == "a"


def test_libraries_of_other_errors_name_it_too(tmp_path):
    with pytest.raises(
        FileNotFoundError
    ) as raised:  # of PyTorch's own it would be a RuntimeError, of the temporary file
        write_tensors(tmp_path / "none" / "model.pt", {})
    assert raised.value.filename == str(tmp_path / "none")


def test_a_folder_in_the_place_of_a_file_and_one_that_is_not_there(tmp_path):
    (tmp_path / "a.txt").mkdir()
    (tmp_path / "a.txt/x").touch()
    with pytest.raises(OSError, match=r"a\.txt") as raised:
        write_text(tmp_path / "a.txt", "")
    assert raised.value.filename == str(tmp_path / "a.txt")
    with pytest.raises(FileNotFoundError) as raised:
        write_text(tmp_path / "nowhere/b.txt", "")
    assert raised.value.filename == str(tmp_path / "nowhere")
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def full(path: str) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)


class Save:
    def __call__(self, data):
        write_whole(data, full)


def write_in_a_worker(path: str) -> None:
    Compose([Save()])(path)  # which wraps the error in its own


def test_a_full_disk_in_a_worker_is_a_sentence(tmp_path):
    with ProcessPoolExecutor(1, get_context("fork")) as pool, pytest.raises(RuntimeError) as raised:
        pool.submit(write_in_a_worker, str(tmp_path / "a.nii")).result()
    said = sentence(raised.value)
    assert said.startswith(f"'{tmp_path / 'a.nii'}' could not be written because the disk is full: free some space")
    assert "_RemoteTraceback" not in said and "Errno" not in said
    assert is_refusal(raised.value)


def test_a_full_disk_here_is_the_same_sentence(tmp_path):
    with pytest.raises(ResourceError, match="disk is full"):
        write_whole(tmp_path / "a.nii", full)
    assert list(tmp_path.iterdir()) == []
