r"""A Brownian path that stays the same however it is queried.

Layer 3. The path is Levy's construction: between two times at which W is known, W in between is a Brownian bridge,

$$W_m = W_l + \frac{m - l}{h - l}(W_h - W_l) + \sqrt{\frac{(m - l)(h - m)}{h - l}}\,z_m, \qquad z_m \sim N(0, I),$$

so an interval is split at m, then its halves, and so on down to the time asked for. The normal numbers z_m come from a
generator that is seeded by m itself: W is a function of the seed and the time alone. Solvers with N and with 2N steps,
or with steps of their own choosing, therefore see one and the same path, which is what strong convergence is about.

References: Levy 1948, "Processus stochastiques et mouvement brownien" (the construction); Gaines & Lyons 1997,
"Variable step size control in the numerical solution of stochastic differential equations"; Li et al. 2020, "Scalable
gradients for stochastic differential equations" (seeds in place of stored nodes); Steele, Lea & Flood 2014, "Fast
splittable pseudorandom number generators" (SplitMix64).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from scoresde.rng import RandomSource, Seed

UNIT = 1 << 30  # ticks in a thousandth of the interval
TICKS = 1000 * UNIT  # ticks in the whole interval
BITS = 20  # times keep this many leading bits of their distance from the nearer end
RECENT = 4  # values kept for the next query: a step starts where one of the last steps ended
SALT = 0xB40  # the path must not repeat the noise that other parts draw from the same seed

Cell = tuple[int, int, int, Tensor, Tensor, Tensor]


class BrownianPath:
    """A standard Brownian motion W on [a, b] with values of shape (B, *), W(a) = 0.

    Arguments: `shape`, (B, *); `seed` as everywhere: None, an int, a `torch.Generator` (read once, and advanced), one
    int per sample (row i then depends on `seed[i]` alone), or a `RandomSource` (read once); `a` < `b`, the ends of the
    interval, in any unit of time; `dtype` and `device` of the values.

    Whatever was asked before and in whatever order, `value(t)` has the same bits, so increments over fine steps
    add up to the increment over their union, to rounding. Queries that proceed in either direction are cheap:
    the cells around the last time are kept (at most 50 tensors of the given shape), the rest is made again
    when asked for.

    The interval is split in decimals down to thousandths and in halves below. A time of a uniform grid whose number
    of steps divides 1000 is then a node, reached with one or two draws of shape (B, *) per step; any other time takes
    about 22 - log2(N) draws in a sweep of N steps. Times are rounded to 20 bits of their distance from the nearer
    end, a relative error of at most 1e-6 (and to 1e-12 of the interval). Steps much shorter than that are
    not resolved.

    On a CUDA device nothing waits for the GPU after the constructor, which reads the seeds.

    Raises `TypeError` for an unknown kind of seed, `ValueError` unless a < b are finite, for seeds of the wrong number
    and for times outside [a, b].
    """

    def __init__(
        self,
        shape: Sequence[int],
        seed: Seed | RandomSource = None,
        a: float = 0.0,
        b: float = 1.0,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ):
        self.a, self.b = float(a), float(b)
        if not (math.isfinite(self.a) and math.isfinite(self.b) and self.a < self.b):
            raise ValueError(f"a Brownian path needs finite a < b, got a={a!r}, b={b!r}.")
        self.shape = tuple(shape)
        batch_size = self.shape[0]
        source = seed if isinstance(seed, RandomSource) else RandomSource(seed, device, batch_size, salt=SALT)
        rows = source.rows is not None
        numbers = source.uniform((batch_size if rows else 1, 1), torch.float64) * 2.0**53
        self._seeds: list[int] = numbers.long().flatten().tolist()
        self._generator = torch.Generator(device=source.device)
        self._z = torch.empty(self.shape, dtype=dtype, device=source.device)
        self._parts = self._z.unbind() if rows else (self._z,)  # one seed each
        self._tick = (self.b - self.a) / TICKS
        start = torch.zeros_like(self._z)
        end = math.sqrt(self.b - self.a) * self._normal(TICKS)
        self._cells = [self._cell(0, TICKS, start, end)]
        self._recent: dict[int, Tensor] = {}

    def value(self, t: float) -> Tensor:
        """W(t), shape (B, *), for a <= t <= b."""
        return self._value(self._index(t)).clone()

    def increment(self, t: float, s: float) -> Tensor:
        """W(s) - W(t), shape (B, *): N(0, |s - t|) entries. The two times may stand in either order."""
        first = self._value(self._index(t))
        return self._value(self._index(s)) - first

    def _index(self, t: float) -> int:
        """t in ticks from a, rounded to `BITS` leading bits of its distance from the nearer end."""
        u = (float(t) - self.a) / (self.b - self.a)
        if not -1e-9 <= u <= 1 + 1e-9:  # also catches NaN
            raise ValueError(f"the Brownian path lives on [{self.a:g}, {self.b:g}], asked for time {float(t):.9g}.")
        i = min(max(round(u * TICKS), 0), TICKS)
        drop = min(i, TICKS - i).bit_length() - BITS
        return ((i + (1 << drop - 1)) >> drop) << drop if drop > 0 else i

    def _value(self, i: int) -> Tensor:
        found = self._recent.get(i)
        if found is None:
            found = self._recent[i] = self._find(i)
            if len(self._recent) > RECENT:
                del self._recent[next(iter(self._recent))]
        return found

    def _find(self, i: int) -> Tensor:
        """Up from the last cell to one that holds tick i, then down to it."""
        cells = self._cells
        while not cells[-1][0] <= i <= cells[-1][2]:
            cells.pop()
        while True:
            low, middle, high, w_low, w_middle, w_high = cells[-1]
            if i == middle:
                return w_middle
            if i in (low, high):
                return w_low if i == low else w_high
            half = (low, middle, w_low, w_middle) if i < middle else (middle, high, w_middle, w_high)
            cells.append(self._cell(*half))

    def _cell(self, low: int, high: int, w_low: Tensor, w_high: Tensor) -> Cell:
        """The cell with its inner node and W there (the bridge of the module's docstring)."""
        width = high - low
        middle = low + _left(width)
        share = (middle - low) / width
        w = torch.lerp(w_low, w_high, share)
        w.add_(self._normal(middle), alpha=math.sqrt(share * (high - middle) * self._tick))
        return low, middle, high, w_low, w, w_high

    def _normal(self, node: int) -> Tensor:
        """The node's N(0, 1) numbers (B, *), in a buffer that the next call overwrites."""
        for part, seed in zip(self._parts, self._seeds, strict=True):
            part.normal_(generator=self._generator.manual_seed(_splitmix(seed, node)))
        return self._z


def _left(width: int) -> int:
    """Where a cell of `width` ticks is split: 10 = 5 + 5, 5 = 2 + 3, 3 = 1 + 2 powers of ten down to `UNIT`, then halves."""
    units = width // UNIT
    if units < 2:
        return width // 2
    power = 100 if units > 100 else 10 if units > 10 else 1
    return (units // power // 2) * power * UNIT


def _splitmix(seed: int, n: int) -> int:
    """The n-th output of SplitMix64 started from `seed`: 64 bits."""
    x = (seed + n * 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    return x ^ (x >> 31)


class PathNoise(RandomSource):
    """Normal numbers for a sampler's steps from one Brownian path: z = (W(t) - W(s)) / sqrt(t - s) on the step from t to s.

    However the steps are refined, they follow the same path: for `EulerMaruyama` runs with more and more steps converge
    to one endpoint per seed (strong order 1, the noise is additive), and so do the other stochastic methods to theirs. Only the
    first draw of a step is the path's; further ones (correctors) come from `source`, from which the path's seed was drawn.
    """

    def __init__(self, source: RandomSource, shape: Sequence[int], low: float, high: float, dtype: torch.dtype):
        self.source, self.salt, self.device = source, source.salt, source.device
        self.rows = source.rows
        self.path = BrownianPath(shape, source, low, high, dtype=dtype)
        self.step: tuple[float, float] | None = None

    def advance(self, t: float, s: float) -> None:
        """The next draw belongs to the step from t to s < t."""
        self.step = (t, s)

    def normal(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        if self.step is None:
            return self.source.normal(shape, dtype)
        (t, s), self.step = self.step, None
        return self.path.increment(s, t).to(dtype).mul_(1 / math.sqrt(t - s))

    def uniform(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return self.source.uniform(shape, dtype)
