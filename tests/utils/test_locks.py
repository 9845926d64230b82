"""One process at a time in a folder; a killed process leaves nothing behind that blocks."""

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

import cleandift_backbones
from cleandift_backbones.utils import locks
from cleandift_backbones.utils.errors import CleanDIFTError, FileError, FolderInUseError
from cleandift_backbones.utils.locks import hold

HOLDER = f"""
import errno, os, sys, time, types
package = types.ModuleType("cleandift_backbones")  # without the imports of the whole package, which take seconds
package.__path__ = {list(cleandift_backbones.__path__)}
sys.modules["cleandift_backbones"] = package
from cleandift_backbones.utils import locks
if "unsupported" in sys.argv:
    def flock(*_):
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")
    locks.fcntl.flock = flock
with locks.hold(sys.argv[1]):
    if "fork" in sys.argv and os.fork() == 0:
        print(os.getpid(), flush=True)
        time.sleep(60)
    if "fork" not in sys.argv:
        print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture(params=[None, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK], ids=str)
def flock(request, monkeypatch):
    """With flock, and on file systems that refuse it in each of the ways in which they do."""

    def refuse(*_):
        raise OSError(request.param, os.strerror(request.param))

    if request.param is not None:
        monkeypatch.setattr(locks.fcntl, "flock", refuse)
    return request.param is None


def holder(folder, *words):
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(folder), *words], stdout=subprocess.PIPE, text=True)
    return process, process.stdout.readline().strip()


def test_the_second_is_refused_and_names_the_first(tmp_path, flock, monkeypatch):
    folder = tmp_path / "a/run"
    process, _ = holder(folder, *([] if flock else ["unsupported"]))
    try:
        told = f"run is in use by process {process.pid} on .* since 20"
        with pytest.raises(FolderInUseError, match=told) as error, hold(folder):
            pass
        assert isinstance(error.value, CleanDIFTError) and isinstance(error.value, OSError)
        with hold(folder, "other"):
            pass
        monkeypatch.setattr(locks, "LOG_SECONDS", 0.1)
        waited = []
        with pytest.raises(FolderInUseError), hold(folder, wait=0.3, log=waited.append):
            pass
        assert len(waited) == 1 and waited[0].endswith("waiting for it")
    finally:
        process.kill()
        process.wait()
    assert list(folder.iterdir())  # what the killed process left blocks nobody
    clock = time.monotonic()
    with hold(folder):
        (folder / "result").write_text("mine")
    assert time.monotonic() - clock < 2
    assert [path.name for path in folder.iterdir()] == ["result"]


def test_a_killed_process_that_is_not_yet_waited_for_is_gone(tmp_path, flock):
    process, _ = holder(tmp_path, *([] if flock else ["unsupported"]))
    process.kill()
    while locks._start_of(process.pid) is not None:  # a zombie from then on
        time.sleep(0.01)
    with hold(tmp_path):
        pass
    process.wait()


def test_a_worker_that_outlives_a_killed_process_does_not_hold(tmp_path):
    process, worker = holder(tmp_path, "fork")
    process.kill()
    process.wait()
    try:
        with hold(tmp_path):
            pass
    finally:
        os.kill(int(worker), signal.SIGKILL)


def test_the_number_of_a_killed_process_may_be_used_again(tmp_path, monkeypatch):
    """A lock file without flock that names a process which started at another time."""
    monkeypatch.setattr(locks, "fcntl", None)
    (tmp_path / ".cleandift.lock").write_text(json.dumps(locks._me() | dict(started="1")))
    with hold(tmp_path):
        pass
    for written in ("", "{", "[1]"):  # killed while it was written
        monkeypatch.setattr(locks, "UNWRITTEN_SECONDS", 0.2)
        (tmp_path / ".cleandift.lock").write_text(written)
        with hold(tmp_path):
            pass
    assert not list(tmp_path.iterdir())


def test_a_process_of_another_machine_is_believed(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "fcntl", None)
    path = tmp_path / ".cleandift.lock"
    path.write_text(json.dumps(dict(pid=1, host="far", machine="far", started="1", since="2026-01-01 00:00:00")))
    with pytest.raises(FolderInUseError, match=r"process 1 on far .* delete .*cleandift.lock"), hold(tmp_path):
        pass
    assert path.exists()


def test_folders_that_were_made_for_nothing_go(tmp_path, flock):
    with pytest.raises(ValueError, match="wrong"), hold(tmp_path / "a/b"):
        raise ValueError("wrong")
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FileError, match="cannot be written to"), hold(tmp_path / "file"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_folder_that_was_made_for_the_last_holder(tmp_path):
    """It goes with that holder's lock, while another one waits."""
    folder = tmp_path / "a/b"
    entered = threading.Event()

    def wait():
        with hold(folder, wait=30, log=lambda _: waiting.set()):
            entered.set()

    waiting = threading.Event()
    with hold(folder):
        thread = threading.Thread(target=wait)
        thread.start()
        assert waiting.wait(10)
    thread.join()
    assert entered.is_set() and not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_many_at_once_exclude_each_other(tmp_path, flock):
    """Processes that take the folder in turns, a number of times each, and find nobody else in it."""
    words = [] if flock else ["unsupported"]
    code = (
        HOLDER.split("with locks")[0]
        + """
from pathlib import Path
for _ in range(30):
    with locks.hold(sys.argv[1], wait=60):
        inside = Path(sys.argv[1], "inside")
        os.close(os.open(inside, os.O_CREAT | os.O_EXCL))
        inside.unlink()
"""
    )
    processes = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path), *words]) for _ in range(3)]
    assert [process.wait(120) for process in processes] == [0, 0, 0]
    assert not list(tmp_path.iterdir())
