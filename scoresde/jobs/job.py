"""A computation over many items, stored as it goes. Layer 4.

A job's folder holds `settings.json`, all that the numbers depend on; `chunks/`, one file for each batch of items, named by
the index of its first; and at the end `images.npz` and `result.json`. Files are the only thing that the processes share: each
computes the chunks of its part that are not there yet, and a chunk counts only if its header names this very job and its
checksum is right. A chunk is one batch, and item i draws its noise from (seed, i), so neither the number of processes nor
interruptions change a number.
"""

from __future__ import annotations

import json
import math
import os
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from scoresde import checks
from scoresde.progress import bar
from scoresde.store import check_writable, digest, read_tensors, write_atomic, write_json, write_tensors

SETTINGS_FILE, RESULT_FILE = "settings.json", "result.json"
DIFFERENCES = 4  # this many settings are named where two commands differ

Chunk = tuple[dict[str, Tensor], dict[str, Any]]


class Job(ABC):
    """Numbers for each of `count` items, which a subclass computes batch by batch (`compute`) and sums up (`summary`).

    Arguments: `folder`, runs/KIND-CODE if None, with a code of the settings; `settings`, plain values on which the numbers
    depend; `count`; `batch_size`, which is also the size of the chunks unless the folder has begun with another.

    Raises `ValueError` where the folder holds results of other settings (naming them); `PermissionError` where it cannot
    be written.
    """

    kind = "job"  # in the name of the default folder
    task, item = "computing", "item"  # beside the bar
    values_file = "items.npz"

    def __init__(self, folder: str | os.PathLike[str] | None, settings: dict[str, Any], count: int, batch_size: int):
        self.settings, self.count = settings, count
        self.batch_size = checks.positive_int(batch_size, "batch_size")
        self.folder = Path(f"runs/{self.kind}-{digest({}, settings)[:10]}" if folder is None else folder)
        if self.folder.suffix == ".json":
            raise ValueError(
                f"out is a folder now, got {str(folder)!r}; the numbers will be in {RESULT_FILE} within it."
            )
        check_writable(self.folder if self.folder.exists() else self.folder.absolute().parent)
        self.chunk = self._begun_with() or self.batch_size
        self.code = digest({}, {**settings, "chunk": self.chunk})
        self.chunks = math.ceil(count / self.chunk)
        self.found: dict[int, Chunk] = {}

    @abstractmethod
    def compute(self, rows: range) -> dict[str, Tensor]:
        """The numbers of these items: named tensors on the CPU whose first axis are the items."""

    @abstractmethod
    def summary(self, whole: dict[str, Tensor]) -> dict[str, Any]:
        """What `result.json` says of all items together, from the numbers of all (NaN becomes null there)."""

    def estimate(self, known: list[dict[str, Tensor]]) -> str:
        """What to show beside the bar, from the numbers so far."""
        return ""

    def run(self, share: tuple[int, int] = (0, 1)) -> None:
        """Compute what is missing of the k-th of n parts: the chunks k, k + n, ... Prints what was there already."""
        k, n = share
        mine = range(k, self.chunks, n)
        self._look(mine)
        if self.found:
            print(f"{self.folder}: {self._have()} are there already.", flush=True)
        todo = [c for c in mine if c not in self.found]
        if todo and self.chunk < self.batch_size:
            print(
                f"batches have {self.chunk} {self.item}s, with which this folder was begun, not {self.batch_size}.",
                flush=True,
            )
        show = k == 0 or "RANK" not in os.environ  # one bar for the processes of a launcher
        begun = self._items(set(mine) - set(todo))
        with bar(self._items(mine), self.task, self.item, show, initial=begun) as ticks:
            try:
                for c in todo:
                    self._store(c)
                    ticks.update(len(self._rows(c)))
                    ticks.set_postfix_str(self.estimate([tensors for tensors, _ in self.found.values()]))
            except KeyboardInterrupt:
                raise KeyboardInterrupt(f"{self._have()} are in {self.folder}; the same command goes on.") from None

    def result(self, about: dict[str, Any] | None = None) -> dict[str, Any] | None:
        """Where all chunks are there, write the files of the result (with `about` in it) and return its numbers; else None."""
        self._look()
        if len(self.found) < self.chunks:
            return None
        parts = [self.found[c] for c in range(self.chunks)]
        whole = {name: torch.cat([tensors[name] for tensors, _ in parts]) for name in parts[0][0]}

        def write(path: Path) -> None:
            arrays: dict[str, Any] = {name: value.numpy() for name, value in whole.items()}
            with open(path, "wb") as f:
                np.savez_compressed(f, **arrays)

        seconds = {name: sum(header[name] for _, header in parts) for name in ("seconds", "cpu_seconds")}
        numbers = {**self.summary(whole), **seconds}
        plain = {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in numbers.items()}
        write_atomic(self.folder / self.values_file, write)
        write_json(self.folder / RESULT_FILE, {**(about or {}), **plain, **self.settings, "batch_size": self.chunk})
        return numbers

    def missing(self, share: tuple[int, int]) -> str:
        """What a process says whose part is done while others' are not."""
        there = self._items(self.found)
        return (
            f"part {share[0] + 1}/{share[1]} is done; {self.count - there} of {self.count} {self.item}s are still missing in "
            f"{self.folder}. Let the processes of the other parts finish, or compute what is left by the same command alone; "
            "whoever comes last writes the result."
        )

    def _items(self, chunks: Iterable[int]) -> int:
        """How many items these chunks hold."""
        return sum(len(self._rows(c)) for c in chunks)

    def _have(self) -> str:
        return f"{self._items(self.found)} of {self.count} {self.item}s"

    def _rows(self, c: int) -> range:
        return range(c * self.chunk, min((c + 1) * self.chunk, self.count))

    def _path(self, c: int) -> Path:
        return self.folder / "chunks" / f"{self._rows(c).start:08d}.safetensors"

    def _begun_with(self) -> int | None:
        """The chunk size of the folder, None where it has not begun. `ValueError` where its settings are not ours."""
        path = self.folder / SETTINGS_FILE
        try:
            there = json.loads(path.read_text())
            size = int(there.pop("chunk"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
            raise ValueError(f"{path} is damaged ({e}); remove the folder or choose another with --out.") from e
        names = [k for k in {**there, **self.settings} if there.get(k) != self.settings.get(k)]
        if names:
            shown = [
                f"{k}: {_short(there.get(k))} there, {_short(self.settings.get(k))} now" for k in names[:DIFFERENCES]
            ]
            raise ValueError(
                f"{self.folder} holds results of another command ({'; '.join(shown)}"
                f"{'; ...' if len(names) > DIFFERENCES else ''}). Give its settings to go on with it, or choose another --out."
            )
        return size

    def _look(self, aloud: range = range(0)) -> None:
        """Read the chunks that are there and not known yet; a damaged one among `aloud` gives a warning."""
        for c in range(self.chunks):
            if c in self.found:
                continue
            try:
                self.found[c] = self._read(c)
            except FileNotFoundError:
                continue
            except ValueError as e:
                if c in aloud:
                    what = f"the {len(self._rows(c))} {self.item}s of a stored file are computed again: {e}"
                    warnings.warn(what, stacklevel=3)

    def _read(self, c: int) -> Chunk:
        """A chunk's numbers and header. `FileNotFoundError` without one, `ValueError` if it is damaged or not of this job."""
        path = self._path(c)
        tensors, header = read_tensors(path)
        header = dict(header or {})
        if header.pop("checksum", None) != digest(tensors, header):
            raise ValueError(f"{path} is damaged: its checksum is wrong.")
        if header.get("job") != self.code or tensors["index"].tolist() != list(self._rows(c)):
            raise ValueError(f"{path} holds other {self.item}s or comes from another command.")
        return tensors, header

    def _store(self, c: int) -> None:
        """Compute chunk c and write it."""
        rows = self._rows(c)
        start, cpu = time.perf_counter(), time.process_time()
        tensors = {"index": torch.arange(rows.start, rows.stop), **self.compute(rows)}
        header = {
            "job": self.code,
            "seconds": time.perf_counter() - start,
            "cpu_seconds": time.process_time() - cpu,
        }
        size = self._begun_with()
        if size not in (None, self.chunk):
            raise ValueError(
                f"{self.folder} was begun with batch_size {size} by another process; start this one again."
            )
        if size is None:
            write_json(self.folder / SETTINGS_FILE, {**self.settings, "chunk": self.chunk})
        write_tensors(self._path(c), tensors, {**header, "checksum": digest(tensors, header)})
        self.found[c] = tensors, header


def _short(value: Any) -> str:
    """A setting in an error message: digests by their first digits."""
    return f"{value[:12]}..." if isinstance(value, str) and len(value) == 64 else repr(value)
