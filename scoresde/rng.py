"""Random numbers from explicit seeds; the global random state is neither read nor changed.

Layer 0. `seed` is, everywhere in the package, one of

* `None`: fresh entropy from the operating system,
* an `int` in 0 ... 2^64 - 1: one generator for the whole batch,
* a `torch.Generator`: used as it is, and advanced,
* a sequence of ints, one per sample: row i then depends on `seed[i]` alone, whatever batch, chunk or process draws it,
* a sequence of `torch.Generator`s, one per sample, each used as it is, and advanced.
"""

from __future__ import annotations

import operator
import os
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias, TypeGuard, cast

import numpy as np
import torch
from torch import Tensor

Seed: TypeAlias = "int | torch.Generator | Sequence[int] | Sequence[torch.Generator] | None"
_BITS = 2**64 - 1


def derive(*numbers: int) -> int:
    """A 63-bit seed that depends on every one of `numbers`, well mixed (NumPy's SeedSequence)."""
    words = np.random.SeedSequence([int(n) & _BITS for n in numbers]).generate_state(2, np.uint32)
    return (int(words[0]) << 31) ^ int(words[1])


def spawn(seed: int, n: int, start: int = 0) -> list[int]:
    """Seeds of samples start, ..., start + n - 1 of the stream `seed`: give them to `sample` in chunks of any size."""
    return [derive(_checked(seed), i) for i in range(start, start + n)]


def generators(seeds: Sequence[int], device: torch.device | str = "cpu") -> list[torch.Generator]:
    """One generator per seed, each of which all 64 bits count for, on every device.

    A CPU's (the Mersenne Twister of Matsumoto & Nishimura 1998) starts from 32 bits when torch seeds it, so that seeds which
    differ by 2^32 coincide; from 2^32 on, all 624 words of its state are filled by SplitMix64 (Steele, Lea & Flood 2014).
    Below, the numbers are those of `manual_seed`. Raises `ValueError` for a seed outside of 0 ... 2^64 - 1.
    """
    made = [torch.Generator(device).manual_seed(_checked(seed)) for seed in seeds]
    if torch.device(device).type == "cpu":
        wide = [i for i, seed in enumerate(seeds) if seed >= 2**32]
        for first in range(0, len(wide), 64):  # as many states as a cache holds
            part = wide[first : first + 64]
            numbers = np.array([seeds[i] for i in part], np.uint64)
            states = np.tile(_STATE, (len(part), 1))
            states[:, :8].view(np.uint64)[:, 0] = numbers
            # mixed before they are counted on from: near seeds must not walk along one sequence
            states[:, 24:5016].view(np.uint64)[:] = _mixed(_mixed(numbers)[:, None] + _COUNTS) >> np.uint64(32)
            for i, state in zip(part, states, strict=True):
                made[i].set_state(torch.from_numpy(state))  # a tensor each: rows of one, at an offset, crash torch 2.13
    return made


# torch's own layout: the seed, (left, seeded, next) and 624 words of 32 bits in 8 bytes each, then the second normal of a pair
_STATE = torch.Generator().manual_seed(0).get_state().numpy()
_COUNTS = np.arange(1, 625, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)


def _mixed(x: np.ndarray) -> np.ndarray:
    """SplitMix64's mixing function, a bijection of 64 bits, elementwise."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
    return x ^ (x >> np.uint64(31))


def _checked(seed: int) -> int:
    if not 0 <= seed <= _BITS:
        raise ValueError(f"a seed must lie in 0 ... 2^64 - 1, got {seed}.")
    return int(seed)


def _is_generators(seed: Seed) -> TypeGuard[Sequence[torch.Generator]]:
    return isinstance(seed, (tuple, list)) and any(isinstance(g, torch.Generator) for g in seed)


def _read(source: torch.Generator) -> int:
    return int(torch.randint(2**62, (), generator=source, device=source.device))


class Streams:
    """Many sources of one seed, for work that returns to some rows of a batch.

    `source(rows, *key)`: the `RandomSource` of those rows (None for all) and that key. With one seed per sample it
    depends on the samples' own seeds and the key alone; without a key it is the seed's own source.
    """

    def __init__(self, seed: Seed, device: torch.device | str, batch_size: int, *, salt: int = 0):
        RandomSource(seed, device, batch_size)  # the checks of a seed
        if seed is None:
            seed = int.from_bytes(os.urandom(7), "little")
        elif isinstance(seed, torch.Generator):
            seed = _read(seed)
        elif _is_generators(seed):
            seed = [_read(g) for g in seed]
        self.seed = seed if isinstance(seed, (int, np.integer)) else [int(s) for s in cast("Sequence[int]", seed)]
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
    Raises `TypeError` for another kind of seed, `ValueError` for a seed that does not fit 64 bits, a list of the wrong length
    or a generator of another device.
    """

    def __init__(self, seed: Seed, device: torch.device | str, batch_size: int, *, salt: int = 0):
        self.salt = salt
        self.device = torch.device(device)
        self.rows: list[torch.Generator] | None = None
        if isinstance(seed, torch.Generator):
            self.generator = self._here(seed)
        elif seed is None or (isinstance(seed, (int, np.integer)) and not isinstance(seed, bool)):
            number = int.from_bytes(os.urandom(7), "little") if seed is None else int(seed)
            self.generator = self._make([number])[0]
        elif isinstance(seed, (Sequence, np.ndarray, Tensor)) and not isinstance(seed, (str, bytes)):
            if len(seed) != batch_size:
                raise ValueError(
                    f"got {len(seed)} seeds for a batch of {batch_size}; pass one int, or exactly one seed per sample."
                )
            if _is_generators(seed):
                self.rows = [self._here(g) for g in seed]
                return
            try:
                given: Sequence[Any] = seed if isinstance(seed, Sequence) else seed.tolist()
                seeds = [operator.index(s) for s in given]
            except TypeError as e:
                raise TypeError(f"seed must be integers, one per sample, got {seed!r}.") from e
            self.rows = self._make(seeds)
        else:
            raise TypeError(f"seed must be None, an int, a torch.Generator, or one of either per sample, got {seed!r}.")

    def _here(self, given: Any) -> torch.Generator:
        if not isinstance(given, torch.Generator):
            raise TypeError(
                f"seed must be torch.Generators alone or integers alone, one per sample, got {given!r} too."
            )
        if given.device.type != self.device.type:
            raise ValueError(
                f"the generator lives on {given.device}, the samples on {self.device}; "
                f"make it with torch.Generator(device={str(self.device)!r})."
            )
        return given

    def _make(self, seeds: list[int]) -> list[torch.Generator]:
        return generators([derive(_checked(s), self.salt) for s in seeds] if self.salt else seeds, self.device)

    def _draw(self, function: Callable[..., Tensor], shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        kind: dict[str, Any] = dict(dtype=dtype, device=self.device)
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
