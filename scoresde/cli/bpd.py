"""`scoresde bpd`: bits/dim of many images, in batches that are stored as they come. Layer 5.

A job's folder holds `settings.json`, all that the numbers depend on; `chunks/`, one file for each batch of images, named by
the index of its first; and at the end `images.npz` and `result.json`. Files are the only thing that the processes share: each
computes the chunks of its part that are not there yet, and a chunk counts only if its header names this very job and its
checksum is right. Image i draws its noise from (seed, i) and a chunk is one batch, so neither the number of processes nor
interruptions change a number.
"""

from __future__ import annotations

import json
import math
import os
import re
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scoresde._version import __version__

FORMAT = 1
SETTINGS_FILE, RESULT_FILE, VALUES_FILE = "settings.json", "result.json", "images.npz"
DIFFERENCES = 4  # this many settings are named where two commands differ


def measure(net, images, *, probes: int = 8, rtol: float = 1e-4, seed: int = 0, batch_size: int = 64) -> dict:
    """Test bits/dim as plain numbers: mean, standard error, NFE, seconds and settings. Nothing is stored."""
    from scoresde import bits_per_dim

    start, cpu = time.perf_counter(), time.process_time()
    estimator = dict(probes=probes, rtol=rtol)
    result = bits_per_dim(
        net,
        images.values,
        levels=images.levels,
        **estimator_options(**estimator),
        seed=seed,
        batch_size=batch_size,
        progress=True,
    )
    return {
        **_numbers(result),
        **estimator,
        "probes": probes or "exact trace",
        "seconds": time.perf_counter() - start,
        "cpu_seconds": time.process_time() - cpu,
    }


def estimator_options(probes: int, rtol: float) -> dict[str, Any]:
    """How a log density is estimated, from the command line's plain values to arguments of `bits_per_dim`."""
    from scoresde import Exact, Hadamard, checks

    check_probes(probes)
    checks.positive(rtol, "rtol")
    divergence = Hadamard(probes, 1 if probes % 2 else 2) if probes else Exact()
    return dict(divergence=divergence, rtol=rtol, atol=rtol)


def check_probes(probes: int) -> None:
    """`ValueError` for a negative number of probes."""
    if probes < 0:
        raise ValueError(f"probes must be at least 0 (0 takes the exact trace), got {probes}.")


def bits_line(m: dict) -> str:
    """One line for people."""
    return (
        f"{m['bits_per_dim']:.3f} +- {m['stderr']:.3f} bits/dim over {m['images']} images "
        f"({m['nfe']:.0f} network evaluations each, {m['seconds']:.0f} s)"
    )


def _numbers(result) -> dict[str, Any]:
    """What a `BitsPerDim` says of all images together."""
    return {
        "bits_per_dim": result.mean,
        "stderr": result.stderr,
        "images": len(result.status),
        "nfe": result.nfe,
        "unfinished": int((result.status != 0).sum()),
    }


def share_of(shard: str | None, environ: Mapping[str, str] = os.environ) -> tuple[int, int]:
    """(k, n), the k-th of n parts with k from 0: from "2/8" (the second of eight), or from RANK and WORLD_SIZE of a launcher.

    Raises `ValueError` where it is no such part, or where both speak.
    """
    launched = environ.get("WORLD_SIZE", "1") != "1"
    if shard is None:
        if not launched:
            return 0, 1
        text = f"RANK={environ.get('RANK')}, WORLD_SIZE={environ['WORLD_SIZE']}"
        try:
            rank, size = int(environ["RANK"]), int(environ["WORLD_SIZE"])
        except (KeyError, ValueError):
            rank, size = -1, 0
        if not 0 <= rank < size:
            raise ValueError(f"the environment has {text}; a launcher sets both, RANK from 0 to WORLD_SIZE - 1.")
        return rank, size
    if launched:
        raise ValueError(
            f"shard={shard} was given, but this is one of WORLD_SIZE={environ['WORLD_SIZE']} processes of a launcher, "
            "which take their parts by themselves; use one or the other."
        )
    found = re.fullmatch(r"([0-9]+)/([0-9]+)", shard)
    if not found or not 1 <= int(found[1]) <= int(found[2]):
        raise ValueError(f"shard must be k/n with k from 1 to n, as 2/8 for the second of eight parts, got {shard!r}.")
    return int(found[1]) - 1, int(found[2])


class Job:
    """Bits/dim of all `images` under a model, stored chunk by chunk in a folder.

    Arguments: `net` on its device; `folder`, runs/bpd-CODE if None; `estimator`, for `estimator_options`; `dequantization`,
    those of `bits_per_dim`; `seed`; `batch_size`, which is also the size of the chunks unless the folder has begun with another.

    Raises `ValueError` for images of another shape or other levels than the model's, for impossible numbers, and where the
    folder holds results of other settings (naming them); `PermissionError` where it cannot be written.
    """

    def __init__(
        self,
        net,
        images,
        folder: str | None,
        *,
        estimator: dict[str, Any],
        dequantization: dict[str, Any],
        seed: int,
        batch_size: int,
    ):
        from scoresde import checks
        from scoresde.likelihood.bits import levels_of
        from scoresde.modes import device_of
        from scoresde.store import check_writable, describe, digest

        self.net, self.images, self.batch_size = net, images, checks.positive_int(batch_size, "batch_size")
        net.check_event(images.event_shape)
        levels_of(net, images.levels)
        for name in ("samples", "draws"):
            checks.positive_int(dequantization.get(name, 1), name)
        self.options = dict(**estimator_options(**estimator), **dequantization, seed=seed)
        self.settings = {
            "format": FORMAT,
            "version": __version__,
            "torch": str(torch.__version__),
            "device": device_of(net).type,
            "model_sha256": digest(net.state_dict(), describe(net)),
            "data_sha256": digest({"images": images.values}),
            "images": len(images),
            "levels": images.levels,
            "seed": seed,
            **estimator,
            **dequantization,
        }
        self.folder = Path(f"runs/bpd-{digest({}, self.settings)[:10]}" if folder is None else folder)
        if self.folder.suffix == ".json":
            raise ValueError(f"out is a folder now, got {folder!r}; the numbers will be in {RESULT_FILE} within it.")
        check_writable(self.folder if self.folder.exists() else self.folder.absolute().parent)
        self.chunk = self._begun_with() or self.batch_size
        self.code = digest({}, {**self.settings, "chunk": self.chunk})
        self.count = math.ceil(len(images) / self.chunk)
        self.found: dict[int, tuple[dict[str, Tensor], dict[str, Any]]] = {}

    def run(self, share: tuple[int, int] = (0, 1)) -> None:
        """Compute what is missing of the k-th of n parts: the chunks k, k + n, ... Prints what was there already."""
        from scoresde.likelihood.bits import estimate_text
        from scoresde.progress import bar

        k, n = share
        mine = range(k, self.count, n)
        self._look(mine)
        if self.found:
            print(
                f"{self.folder}: {self._images(self.found)} of {len(self.images)} images are there already.", flush=True
            )
        known = torch.cat([torch.empty(0, dtype=torch.float64), *(t["bits_per_dim"] for t, _ in self.found.values())])
        todo = [c for c in mine if c not in self.found]
        if todo and self.chunk < self.batch_size:
            print(
                f"batches have {self.chunk} images, with which this folder was begun, not {self.batch_size}.",
                flush=True,
            )
        show = k == 0 or "RANK" not in os.environ  # one bar for the processes of a launcher
        begun = self._images(set(mine) - set(todo))
        with bar(self._images(mine), "bits/dim", "image", show, initial=begun) as ticks:
            try:
                for c in todo:
                    values = self._compute(c)
                    known = torch.cat([known, values])
                    ticks.update(len(values))
                    ticks.set_postfix_str(estimate_text(known))
            except KeyboardInterrupt:
                raise KeyboardInterrupt(
                    f"{self._images(self.found)} of {len(self.images)} images are in {self.folder}; the same command goes on."
                ) from None

    def report(self, share: tuple[int, int] = (0, 1), about: dict[str, Any] | None = None) -> str:
        """Where all chunks are there, write the result (with `about` in it) and return the line that says it; if not, a line
        that says how many images are missing."""
        self._look()
        there, total = self._images(self.found), len(self.images)
        if there < total:
            return (
                f"part {share[0] + 1}/{share[1]} is done; {total - there} of {total} images are still missing in {self.folder}. "
                "Let the processes of the other parts finish, or compute what is left by the same command alone; "
                "whoever comes last writes the result."
            )
        m = self._write_result(about or {})
        return f"{self.images.name}: {bits_line(m)}; {self.folder / RESULT_FILE}"

    def _images(self, chunks) -> int:
        """How many images these chunks hold."""
        return sum(len(self._rows(c)) for c in chunks)

    def _rows(self, c: int) -> range:
        return range(c * self.chunk, min((c + 1) * self.chunk, len(self.images)))

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
        for c in range(self.count):
            if c in self.found:
                continue
            try:
                self.found[c] = self._read(c)
            except FileNotFoundError:
                continue
            except ValueError as e:
                if c in aloud:
                    warnings.warn(
                        f"the {len(self._rows(c))} images of a stored file are computed again: {e}", stacklevel=3
                    )

    def _read(self, c: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """A chunk's numbers and header. `FileNotFoundError` without one, `ValueError` if it is damaged or not of this job."""
        from scoresde.store import digest, read_tensors

        path = self._path(c)
        tensors, header = read_tensors(path)
        header = dict(header or {})
        if header.pop("checksum", None) != digest(tensors, header):
            raise ValueError(f"{path} is damaged: its checksum is wrong.")
        if header.get("job") != self.code or tensors["index"].tolist() != list(self._rows(c)):
            raise ValueError(f"{path} holds other images or comes from another command.")
        return tensors, header

    def _compute(self, c: int) -> Tensor:
        """Bits/dim of the images of chunk c (n,), which are then on disk."""
        from scoresde import bits_per_dim
        from scoresde.likelihood.bits import survey_of, surveyed
        from scoresde.store import digest, write_json, write_tensors

        if "plan" not in self.options:  # once for all chunks; it depends on the model alone
            how = {name: self.options[name] for name in ("divergence", "rtol", "atol")}
            wanted = surveyed(self.net, how["divergence"], "decoupled")
            self.options["plan"] = survey_of(self.net, **how) if wanted else None
        rows = self._rows(c)
        start, cpu = time.perf_counter(), time.process_time()
        with warnings.catch_warnings():  # of images that do not finish the report speaks, once for all
            warnings.filterwarnings("ignore", message=r"\d+ of \d+ examples did not finish")
            result = bits_per_dim(
                self.net,
                self.images.values[rows.start : rows.stop],
                levels=self.images.levels,
                batch_size=self.batch_size,
                first=rows.start,
                **self.options,
            )
        tensors = {
            "index": torch.arange(rows.start, rows.stop),
            "bits_per_dim": result.per_example,
            "per_draw": result.per_draw,
            "trace_stderr": result.trace_stderr,
            "nfe": result.nfe_per_example,
            "status": result.status,
        }
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
        return result.per_example

    def _write_result(self, about: dict[str, Any]) -> dict[str, Any]:
        """`images.npz` and `result.json` from all chunks; the numbers of the latter."""
        import numpy as np

        from scoresde.likelihood.bits import summarize
        from scoresde.store import write_atomic, write_json

        parts = [self.found[c] for c in range(self.count)]
        whole = {name: torch.cat([tensors[name] for tensors, _ in parts]) for name in parts[0][0]}
        result = summarize(*(whole[name] for name in ("per_draw", "trace_stderr", "nfe", "status")))

        def write(path: Path) -> None:
            with open(path, "wb") as f:
                np.savez_compressed(f, **{name: value.numpy() for name, value in whole.items()})

        write_atomic(self.folder / VALUES_FILE, write)
        seconds = {name: sum(header[name] for _, header in parts) for name in ("seconds", "cpu_seconds")}
        numbers = {**_numbers(result), "draw_stderr": result.draw_stderr, **seconds}
        plain = {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in numbers.items()}
        write_json(
            self.folder / RESULT_FILE,
            {**about, **plain, **self.settings, "batch_size": self.chunk},
        )
        return numbers


def _short(value: Any) -> str:
    """A setting in an error message: digests by their first digits."""
    return f"{value[:12]}..." if isinstance(value, str) and len(value) == 64 else repr(value)
