"""One process at a time in a folder: a lock that ends with the process that holds it, however that ends.

`flock` is used where the file system has it: the kernel releases it when the process is gone. Elsewhere the lock file
itself is the lock, and the process that it names is looked up. The file is removed on release; one that a killed
process leaves behind blocks nobody.
"""

from __future__ import annotations

import errno
import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .errors import FileError, FolderInUseError

try:
    import fcntl
except ImportError:  # Windows: the lock file is the lock
    fcntl = None

NO_FLOCK = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK}
HELD = {errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES}
POLL_SECONDS = 0.1
LOG_SECONDS = 2.0  # of waiting before it is logged: most locks are held for moments
UNWRITTEN_SECONDS = 2.0  # a lock file without flock is empty for less than that, unless its process was killed

_descriptors: set[int] = set()  # of the locks that this process holds


@contextmanager
def hold(
    folder: str | os.PathLike, name: str = "", wait: float = 0.0, log: Callable[[str], None] | None = None
) -> Iterator[None]:
    """Holds a folder for this process until the block ends. Folders that are missing are made, and removed if empty.

    Args:
        folder: what is held. Its lock file is `.cleandift.lock`, or `.cleandift-NAME.lock`.
        name: holds only a part of the folder: locks of different names do not exclude each other.
        wait: seconds to wait for another holder.
        log: called with one message when the waiting takes longer than a moment.

    Raises:
        FolderInUseError: another process holds it; names the process.
        FileError: the folder cannot be made or written to.
    """
    folder = Path(folder)
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    path = folder / f".cleandift{f'-{name}' if name else ''}.lock"
    owner, start = os.getpid(), time.monotonic()
    try:
        try:
            while isinstance(found := _acquire(path), dict):
                if time.monotonic() >= start + wait:
                    raise FolderInUseError(f"{_describe(folder, path, found)}; wait for it, or give another folder")
                if log is not None and time.monotonic() >= start + LOG_SECONDS:
                    log(f"{_describe(folder, path, found)}; waiting for it")
                    log = None
                time.sleep(POLL_SECONDS)
        except OSError as error:
            if isinstance(error, FileError):
                raise
            raise FileError(f"{folder} cannot be written to ({error}); give another folder") from error
        try:
            yield
        finally:
            if os.getpid() == owner:  # not in a forked process that leaves the block as well
                _release(path, found)
    finally:
        if os.getpid() == owner:
            for one in made:
                with suppress(OSError):  # holds something now
                    one.rmdir()


def tidy(folder: str | os.PathLike) -> None:
    """Removes the lock files that killed processes left in a folder."""
    for path in Path(folder).glob(".cleandift-*.lock"):
        name = path.name.removeprefix(".cleandift-").removesuffix(".lock")
        with suppress(FileError), hold(folder, name):
            pass


def _acquire(path: Path) -> int | dict:
    """The descriptor of the lock, or what is known about its holder ({} if nothing)."""
    while True:
        new = True
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        except FileNotFoundError:  # the folder was made for the last holder, and removed with its lock
            continue
        except FileExistsError:
            new = False
            try:
                descriptor = _open(path)
            except FileNotFoundError:  # released meanwhile
                continue
        keep = False
        try:
            if new:
                os.write(descriptor, json.dumps(_me()).encode())
            try:
                if fcntl is None:
                    raise OSError(errno.ENOSYS, "no flock")
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno in HELD:
                    return _read(descriptor)
                if error.errno not in NO_FLOCK:
                    raise
                if not new:
                    holder = _read_written(descriptor)
                    if _is_alive(holder):
                        return holder
            if new and _is_at(descriptor, path):
                keep = True
                _descriptors.add(descriptor)
                return descriptor
            if not new and _is_at(descriptor, path):
                _take_away(path, descriptor)  # of a process that is gone
        finally:
            if not keep:
                os.close(descriptor)


def _open(path: Path) -> int:
    try:
        return os.open(path, os.O_RDWR)
    except PermissionError:  # another user's; NFS alone wants it to be writable
        return os.open(path, os.O_RDONLY)


def _release(path: Path, descriptor: int) -> None:
    with suppress(OSError):
        mine = _is_at(descriptor, path)
        if fcntl is None:  # Windows removes no open file
            os.close(descriptor)
        if mine:
            path.unlink()
    _descriptors.discard(descriptor)
    if fcntl is not None:
        os.close(descriptor)


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _take_away(path: Path, descriptor: int) -> None:
    """Removes the file that was opened, not one that another process has put there since.

    With flock nobody else can: it is held. Without, the file is looked at again once it is aside.
    """
    aside = path.with_name(f"{path.name}.{os.getpid()}")
    with suppress(FileNotFoundError):
        os.rename(path, aside)
        if not _is_at(descriptor, aside):
            with suppress(FileExistsError):
                os.link(aside, path)
        aside.unlink()


# --- holders ---


def _me() -> dict:
    pid = os.getpid()
    return dict(
        pid=pid, host=socket.gethostname(), machine=_machine(), started=_start_of(pid),
        since=time.strftime("%Y-%m-%d %H:%M:%S"),
    )  # fmt: skip


def _read(descriptor: int) -> dict:
    try:
        os.lseek(descriptor, 0, os.SEEK_SET)
        found = json.loads(os.read(descriptor, 4096))
        return found if isinstance(found, dict) else {}
    except (OSError, ValueError):
        return {}


def _read_written(descriptor: int) -> dict:
    """What is in the file, once something is: it is created and then written."""
    end = time.monotonic() + UNWRITTEN_SECONDS
    while not (found := _read(descriptor)) and time.monotonic() < end:
        time.sleep(POLL_SECONDS)
    return found


def _machine() -> str:
    """Tells machines, boots and containers apart: process numbers mean something only within one of them."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()} {boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def _start_of(pid: int) -> str | None:
    """When a process of this machine started, in the kernel's clock; None if it is gone, "" if that is not known."""
    if not Path("/proc/self/stat").exists():
        try:
            if os.name == "posix":
                os.kill(pid, 0)
        except ProcessLookupError:
            return None
        except OSError:
            pass
        return ""
    try:
        state, *rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if state in "ZX" else rest[18]


def _is_alive(holder: dict) -> bool:
    """Whether the process of a lock file runs. On other machines that is not known: it counts as running."""
    if not isinstance(pid := holder.get("pid"), int):
        return False
    return holder.get("machine") != _machine() or _start_of(pid) == holder.get("started")


def _describe(folder: Path, path: Path, holder: dict) -> str:
    if not holder:
        return f"{folder} is in use by another process"
    text = f"{folder} is in use by process {holder.get('pid')} on {holder.get('host')} since {holder.get('since')}"
    unsure = holder.get("machine") != _machine() or not holder.get("started")
    return text + (f" (if that process is gone, delete {path})" if unsure else "")


def _close_in_child() -> None:
    """A forked process, such as a data loader's worker, must not keep a lock alive."""
    while _descriptors:
        with suppress(OSError):
            os.close(_descriptors.pop())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_in_child)
