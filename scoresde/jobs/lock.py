"""One writer at a time in a folder. Layer 4.

The lock is a file in the folder that its holder keeps locked with `flock`, so the kernel lets go of it when the holder
ends in whatever way. What stands in the file says who holds it, and answers where the kernel's word does not reach: the
processes of another machine on a shared file system.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path

LOCK_FILE = "in-use.json"


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold `folder` (made if need be) inside; the lock file is gone afterwards.

    What a dead process of this machine left is taken over. Raises `ValueError` while another process holds the folder,
    naming it, and where the file is one of another machine, whose processes cannot be asked.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LOCK_FILE
    handle = _open(path)
    try:
        holder = _holder(handle)
        if holder and not _here(holder):
            raise ValueError(
                f"{folder} is in use by {_name(holder)}, another machine than this one ({socket.gethostname()}). If that "
                f"process no longer runs, remove {path} and start again; else choose another folder with --out."
            )
        try:
            _claim(handle, path)
            yield
        finally:
            with contextlib.suppress(OSError):  # before it is let go, so that nobody finds it free but named
                path.unlink()
    finally:
        os.close(handle)


def check_free(folder: Path) -> None:
    """`ValueError` while another process holds `folder`; nothing is changed."""
    if (folder / LOCK_FILE).exists():
        with locked(folder):
            pass


def _open(path: Path) -> int:
    """The file, open and locked. `ValueError` where another process of this machine holds it."""
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        free, holder, same = False, {}, False
        try:
            free, holder = _flock(handle), _holder(handle)
            with contextlib.suppress(FileNotFoundError):  # not where its last holder removed it between the two calls
                same = os.path.samestat(os.fstat(handle), os.stat(path))
        finally:
            if not (free and same):
                os.close(handle)
        if not free:
            raise ValueError(
                f"{path.parent} is in use by {_name(holder)}; wait for it or stop it, or choose another folder with --out."
            )
        if same:
            return handle


def _flock(handle: int) -> bool:
    """Take the kernel's lock; False where another has it. Where there is none for this file, the file itself speaks."""
    try:
        import fcntl
    except ImportError:
        return not _holder(handle)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return not (_here(_holder(handle)) and _runs(_holder(handle)))
    return True


def _claim(handle: int, path: Path) -> None:
    """Write who we are."""
    text = json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "boot": _boot(), "since": _now()})
    try:
        os.ftruncate(handle, 0)
        os.pwrite(handle, text.encode(), 0)
    except OSError as e:
        raise OSError(e.errno, f"cannot write {path}: {e.strerror}") from e


def _holder(handle: int) -> dict[str, object]:
    """What the lock file says; nothing where it is empty or damaged, as a full disk or a crash leaves it."""
    try:
        found = json.loads(os.pread(handle, 4096, 0))
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _here(holder: dict[str, object]) -> bool:
    """Whether the process was one of this machine: of this boot, in whatever container, or of this host before."""
    return holder.get("boot") == _boot() != "" or holder.get("host") == socket.gethostname()


def _runs(holder: dict[str, object]) -> bool:
    try:
        os.kill(int(str(holder.get("pid"))), 0)
    except (ValueError, ProcessLookupError):
        return False
    except OSError:
        pass
    return True


def _boot() -> str:
    """A code of this boot of this machine; containers share it. Empty where there is none."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _now() -> str:
    return datetime.datetime.now().astimezone().isoformat(timespec="seconds")


def _name(holder: dict[str, object]) -> str:
    return (
        f"process {holder.get('pid', '?')} on {holder.get('host', '?')}"
        f"{' since ' + str(holder['since']) if 'since' in holder else ''}"
    )
