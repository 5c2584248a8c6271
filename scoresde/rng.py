"""Random numbers from explicit seeds; the global random state is neither read nor changed.

Layer 0. `seed` is, everywhere in the package, one of

* `None`: fresh entropy from the operating system,
* an `int`: one generator for the whole batch,
* a `torch.Generator`: used as it is, and advanced,
* a sequence of ints, one per sample: row i then depends on `seed[i]` alone, whatever batch, chunk or process draws it.
"""

from __future__ import annotations

import operator
import os
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

Seed: TypeAlias = "int | torch.Generator | Sequence[int] | None"


def derive(*numbers: int) -> int:
    """A 63-bit seed that depends on every one of `numbers`, well mixed (NumPy's SeedSequence)."""
    words = np.random.SeedSequence([int(n) & (2**64 - 1) for n in numbers]).generate_state(2, np.uint32)
    return (int(words[0]) << 31) ^ int(words[1])


def spawn(seed: int, n: int, start: int = 0) -> list[int]:
    """Seeds of samples start, ..., start + n - 1 of the stream `seed`: give them to `sample` in chunks of any size."""
    return [derive(seed, i) for i in range(start, start + n)]


class Streams:
    """Many sources of one seed, for work that returns to some rows of a batch.

    `source(rows, *key)`: the `RandomSource` of those rows (None for all) and that key. With one seed per sample it
    depends on the samples' own seeds and the key alone; without a key it is the seed's own source.
    """

    def __init__(self, seed: Seed, device: torch.device | str, batch_size: int, *, salt: int = 0):
        RandomSource(seed if not isinstance(seed, torch.Generator) else 0, device, batch_size)  # the checks of a seed
        if seed is None:
            seed = int.from_bytes(os.urandom(7), "little")
        elif isinstance(seed, torch.Generator):
            seed = int(torch.randint(2**62, (), generator=seed, device=seed.device))
        self.seed = seed if isinstance(seed, (int, np.integer)) else [int(s) for s in seed]
        self.device, self.batch_size, self.salt = device, batch_size, salt

    def source(self, rows: Tensor | None = None, *key: int, part: int = 0) -> RandomSource:
        """The random numbers of `rows` under `key`; `part` sets apart the parts of a batch that share one seed."""
        n = self.batch_size if rows is None else len(rows)
        seed = self.seed
        if isinstance(seed, list):
            seed = seed if rows is None else [seed[i] for i in rows.tolist()]
            seed = [derive(s, *key) for s in seed] if key else seed
        elif key or part:
            seed = derive(seed, len(key), *key, part)
        return RandomSource(seed, self.device, n, salt=self.salt)


class RandomSource:
    """Standard normal and uniform numbers on one device for a batch of known size.

    Arguments: `seed` as in the module's docstring; `device`; `batch_size`, needed for one seed per sample; `salt`, which
    sets apart the uses of one seed (probes must not repeat the noise that a sample was drawn from).
    Raises `TypeError` for another kind of seed, `ValueError` for a list of the wrong length or a generator
    of another device.
    """

    def __init__(self, seed: Seed, device: torch.device | str, batch_size: int, *, salt: int = 0):
        self.salt = salt
        self.device = torch.device(device)
        self.rows: list[torch.Generator] | None = None
        if isinstance(seed, torch.Generator):
            if seed.device.type != self.device.type:
                raise ValueError(
                    f"the generator lives on {seed.device}, the samples on {self.device}; "
                    f"make it with torch.Generator(device={str(self.device)!r})."
                )
            self.generator = seed
        elif seed is None or (isinstance(seed, (int, np.integer)) and not isinstance(seed, bool)):
            number = int.from_bytes(os.urandom(7), "little") if seed is None else int(seed)
            self.generator = self._make(number)
        elif isinstance(seed, (Sequence, np.ndarray, Tensor)) and not isinstance(seed, (str, bytes)):
            try:
                seeds = [operator.index(s) for s in (seed if isinstance(seed, Sequence) else seed.tolist())]
            except TypeError as e:
                raise TypeError(f"seed must be integers, one per sample, got {seed!r}.") from e
            if len(seeds) != batch_size:
                raise ValueError(
                    f"got {len(seeds)} seeds for a batch of {batch_size}; pass one int, or exactly one seed per sample."
                )
            self.rows = [self._make(s) for s in seeds]
        else:
            raise TypeError(f"seed must be None, an int, a torch.Generator or one int per sample, got {seed!r}.")

    def _make(self, number: int) -> torch.Generator:
        number = derive(number, self.salt) if self.salt else number & (2**64 - 1)
        return torch.Generator(device=self.device).manual_seed(number)

    def _draw(self, function, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        kind = dict(dtype=dtype, device=self.device)
        if self.rows is None:
            return function(tuple(shape), generator=self.generator, **kind)
        if shape[0] != len(self.rows):
            raise ValueError(f"asked for {shape[0]} rows from {len(self.rows)} seeds.")
        if not self.rows:
            return torch.empty(tuple(shape), **kind)
        return torch.stack([function(tuple(shape[1:]), generator=g, **kind) for g in self.rows])

    def normal(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Independent N(0, 1) numbers of the given shape (B, *)."""
        return self._draw(torch.randn, shape, dtype)

    def uniform(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Independent uniform numbers in [0, 1) of the given shape (B, *)."""
        return self._draw(torch.rand, shape, dtype)
