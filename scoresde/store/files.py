"""Files that appear whole or not at all, and that notice when a bit of them has changed. Layer 3.

A file is written beside its place, flushed, and renamed into it, so a crash or a full disk leaves the old one whole. Tensors go
into safetensors files whose metadata holds `scoresde`, a header as JSON, and `sha256`, the digest of that text and all tensors.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import stat
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_HEADER, _DIGEST = "scoresde", "sha256"
_NO_SPACE = {
    errno.ENOSPC: "No space left on device",
    errno.EDQUOT: "Disk quota exceeded",
    errno.EFBIG: "File larger than this process may write (ulimit -f)",
}


class WriteError(OSError):
    """A file could not be written for want of space; the message names the file, what it needs and what is free.

    The file that stood in its place is as it was, and nothing of the new one is left.
    """

    def __str__(self) -> str:
        return str(self.args[0])


def as_path(path: Any, name: str = "path") -> Path:
    """`path` as a `Path`; `TypeError` for anything but text or a path, `ValueError` for empty text."""
    if not isinstance(path, (str, os.PathLike)) or isinstance(os.fspath(path), bytes):
        raise TypeError(f"{name} must be text or a pathlib.Path, got {path!r} ({type(path).__name__}).")
    if not os.fspath(path).strip():
        raise ValueError(f"{name} is empty; give the path of a file or folder ('.' is the working folder).")
    return Path(path).expanduser()


def check_regular(path: Path) -> Path:
    """`path` if a regular file stands there. `FileNotFoundError` where nothing does, `ValueError` for folders, pipes, devices.

    Nothing is opened: to open a pipe waits for its other end, and a device may never end.
    """
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError) as e:
        raise FileNotFoundError(f"there is no file {path}.") from e
    except (OSError, ValueError) as e:  # a loop of links, a name too long or with a zero byte in it
        raise ValueError(f"{str(path)!r} cannot be looked at ({e}).") from e
    if not stat.S_ISREG(mode):
        kinds = {stat.S_IFDIR: "folder", stat.S_IFIFO: "pipe", stat.S_IFSOCK: "socket"}
        raise ValueError(f"{path} is a {kinds.get(stat.S_IFMT(mode), 'device')}; only regular files are read.")
    return path


def write_atomic(path: Path, write: Callable[[Path], object], needed: int | None = None) -> None:
    """Call `write` on a temporary file in the same folder, flush it to disk, and rename it to `path`.

    needed: bytes that the file will have, where they are known, for the error. Raises `WriteError` where there is no space for
    the file; after any error the temporary file is gone.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        os.close(handle)
        try:
            write(Path(name))
            with open(name, "rb+") as f:
                os.fsync(f.fileno())
            os.chmod(name, 0o644)
            os.replace(name, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(name)
            raise
    except Exception as e:  # the library of safetensors and archives report a full disk by errors of their own
        code = _no_space(e)
        if code is None:
            raise
        raise _write_error(path, code, needed) from e


def _no_space(error: BaseException | None) -> int | None:
    """The errno of an error, or of what it arose from, if it means that there was no space."""
    for _ in range(20):
        if error is None:
            return None
        found = re.search(r"os error (\d+)", str(error))
        code = error.errno if isinstance(error, OSError) else int(found[1]) if found else None
        if code in _NO_SPACE:
            return code
        error = error.__cause__ or error.__context__
    return None


def _write_error(path: Path, code: int, needed: int | None) -> WriteError:
    parts = [] if needed is None else [f"needed {_size(needed)}"]
    with contextlib.suppress(OSError):
        parts.append(f"free {_size(shutil.disk_usage(path.parent).free)}")
    error = WriteError(
        f"cannot write {path}: {_NO_SPACE[code]} ({', '.join(parts)}). "
        f"{'The file that was there is as it was' if path.exists() else 'Nothing was left there'}; make room, or choose "
        "another place."
    )
    error.errno, error.filename = code, str(path)
    return error


def _size(count: int) -> str:
    return f"{count / 2**20:.1f} MiB" if count >= 2**20 else f"{count:,} bytes"


def check_writable(folder: Path) -> None:
    """Fail before any work is done where a folder cannot be written. Raises `PermissionError` naming it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=folder, prefix=".probe-", suffix=".tmp")
        os.close(handle)
        os.unlink(name)
    except OSError as e:
        raise PermissionError(f"cannot write to {folder} ({e.strerror or e}); choose another folder with --out.") from e


def write_json(path: Path, value: Any) -> None:
    """Atomic, indented JSON. Raises `WriteError` where there is no space for it."""
    text = json.dumps(value, indent=2) + "\n"
    write_atomic(path, lambda p: p.write_text(text), len(text))


def write_tensors(path: Path, tensors: dict[str, Tensor], header: Any = None) -> None:
    """Atomic safetensors file; `header` goes into its metadata as JSON, with the digest of it and of the tensors.

    Raises `WriteError` where there is no space for it.
    """
    from safetensors.torch import save_file

    plain = {k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}
    text = json.dumps(header)
    meta = {_HEADER: text, _DIGEST: digest(plain, text)}
    needed = len(text) + sum(v.numel() * v.element_size() + 100 for v in plain.values())
    write_atomic(path, lambda p: save_file(plain, str(p), metadata=meta), needed)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    from safetensors import SafetensorError, safe_open

    check_regular(path)
    try:
        with safe_open(str(path), framework="pt") as f:
            yield f
    except (SafetensorError, ValueError, OSError, RecursionError) as e:
        raise ValueError(
            f"{path} is not a readable safetensors file ({e}); it is truncated or damaged. Copy it again, or fall back "
            "to an earlier checkpoint."
        ) from e


def is_ours(path: Path) -> bool:
    """Whether a safetensors file was written here. `ValueError` naming it if it is none, or is damaged."""
    with _opened(path) as f:
        return _HEADER in (f.metadata() or {})


def read_tensors(path: Path, *, foreign: bool = False) -> tuple[dict[str, Tensor], Any]:
    """Tensors and header of a safetensors file. Raises `ValueError` naming the file if it is damaged.

    A file of this package has to be what its digest says; one that was written before there were digests gives a warning. The
    metadata of other programs' files are only looked at where `foreign` allows for such a file, whose header is None.
    """
    with _opened(path) as f:
        meta = dict(f.metadata() or {})
        tensors = {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118 (safe_open is no dict)
        text = meta.get(_HEADER)
        header = None if text is None else json.loads(text)
        if foreign and text is None:
            return tensors, None
        said = meta.get(_DIGEST)
        if said is not None and said != digest(tensors, text):
            raise ValueError("its contents are not those that it was written with: the digest differs")
        # a digest whose name was hit is none; files have had one since format 3, and no other names than these
        unknown = sorted(meta.keys() - {_HEADER, _DIGEST, "format"})
        if unknown or (said is None and isinstance(header, dict) and header.get("format", 0) not in (0, 1, 2)):
            raise ValueError(f"its digest is missing{': ' if unknown else ''}{', '.join(unknown)[:80]}")
    if said is None:
        warnings.warn(
            f"{path} was written before files carried a digest, so damage to it would not be noticed; save it again.",
            stacklevel=3,
        )
    return tensors, header


def digest(tensors: dict[str, Tensor], about: Any = None) -> str:
    """SHA-256, as hex digits, of the names, types, shapes and bytes of tensors, and of `about` as JSON."""
    found = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for name in sorted(tensors):
        value = tensors[name].detach().cpu().contiguous()
        found.update(f"\0{name}\0{value.dtype}\0{tuple(value.shape)}\0".encode())
        found.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()
