"""Locks of C++ builds: ours, which the kernel releases when the process ends, and torch's, which survives a killed
build.

torch's builds acquire ``lock`` in the build directory by creating it and wait indefinitely for its removal
(torch/utils/file_baton.py). A running build keeps the file open, so a lock that no process has open is stale.
"""

import contextlib
import fcntl
import time
from pathlib import Path

REMOTE_FILE_SYSTEMS = ("nfs", "lustre", "gpfs", "beegfs", "ceph", "fuse", "cifs", "smb", "afs", "9p")
STALE_AFTER = 900  # seconds; on a shared file system the holder may run on another machine


@contextlib.contextmanager
def exclusive(directory: Path):
    """Hold the directory's build lock, which is released if the process dies. Yields False if the file system does not
    support locks.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with open(directory / "sltrain.lock", "w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
        except OSError:
            yield False
            return
        yield True


def remove_dead(directory: Path, owned: bool = False) -> bool:
    """Remove torch's lock in ``directory`` if a dead build left it, with a message; returns whether it did.

    Call it inside ``exclusive``, so that no other process replaces the lock between the check and the removal.
    ``owned``: every build there uses ``exclusive``, so an existing lock of torch's is always stale.
    """
    lock = directory / "lock"
    try:
        age = time.time() - lock.stat().st_mtime
    except FileNotFoundError:
        return False
    if not owned and (_is_open_here(lock) or (_is_remote(directory) and age < STALE_AFTER)):
        return False
    lock.unlink(missing_ok=True)
    print(f"sltrain-ds: removed the lock that a dead build left: {lock}", flush=True)
    return True


def _is_open_here(path: Path) -> bool:
    wanted = path.stat()
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        with contextlib.suppress(OSError):  # the process ended, or belongs to another user
            found = link.stat()
            if (found.st_dev, found.st_ino) == (wanted.st_dev, wanted.st_ino):
                return True
    return False


def _is_remote(path: Path) -> bool:
    mounts = [line.split()[1:3] for line in Path("/proc/mounts").read_text().splitlines()]
    resolved = f"{path.resolve()}/"
    within = [(len(at), kind) for at, kind in mounts if resolved.startswith(at.rstrip("/") + "/")]
    return bool(within) and max(within)[1].startswith(REMOTE_FILE_SYSTEMS)
