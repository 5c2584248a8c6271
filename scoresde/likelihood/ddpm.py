r"""The bound of a diffusion model with finitely many steps.

Layer 3. Latents at the times $t_{max} = t_T > \dots > t_0 = t_{min}$ of a grid; the reverse step from t to s is Gaussian with the
mean of $q(x_s|x_t, x_0)$ where the denoiser D stands in for x_0. In nats (Ho et al. 2020, equation 5; Kingma et al. 2021,
equation 11),

$$-\log p(x_0) \le \underbrace{KL\left(q(x_T|x_0)\,\|\,\pi\right)}_{prior}
  + \sum_{i=1}^{T} \underbrace{E\,KL\left(q(x_{i-1}|x_i, x_0)\,\|\,p(x_{i-1}|x_i)\right)}_{diffusion}
  \underbrace{- E \log p(x_0|x_{t_0})}_{reconstruction},$$

with $SNR = \alpha^2/\sigma^2$, s = t_{i-1}, t = t_i, and, for every affine process,

$$KL = \tfrac12 (SNR_s - SNR_t)\,\|x_0 - D(x_t, t)\|^2$$

where the reverse variance is that of q, $\sigma_q^2 = \sigma_{t|s}^2\sigma_s^2/\sigma_t^2$ ("small"). With the forward variance
$\sigma_{t|s}^2 = \sigma_t^2 - (\alpha_t/\alpha_s)^2\sigma_s^2$ ("large") it is, with $\rho = \sigma_s^2/\sigma_t^2$,

$$KL = \tfrac{d}{2} (\rho - 1 - \log\rho) + \tfrac{\rho}{2} (SNR_s - SNR_t)\,\|x_0 - D(x_t, t)\|^2 .$$

"Small" is exact for a single point, "large" for a standard normal under a variance-preserving process (Ho et al. 2020, section
3.2); for densities that are smooth on the scale of the noise "large" costs less at few steps. The decoder is
$N(x_0; D(x_{t_0}, t_0), r^2 I)$ with r = sigma/alpha at t_0: its density for floating-point data; for integers the mass that it
gives the level's interval, the outermost ones reaching to infinity (Ho et al. 2020, equation 13), x_0 being the centre.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from scoresde import checks, grids
from scoresde.likelihood.dequantization import check_reach, levels_of, pair, warn_if_quantized
from scoresde.likelihood.variational import (
    controlled,
    gaussian_error,
    prior_kl,
    raise_if_not_finite,
    variance_of_mean,
    variance_of_total,
)
from scoresde.models.base import ScoreModel, check_input, require_model
from scoresde.modes import device_of, dtype_of, evaluating
from scoresde.rng import RandomSource, Seed
from scoresde.sde import SDE, sum_event

DECODER_DRAWS = 4  # at least so many: the scatter of these is the decoder's part of `stderr`
VARIANCES = ("small", "large")
LARGEST = 1e12  # ratio of two steps' SNRs in a weight, where a schedule ends in no signal at all


@dataclass
class DDPMBound:
    """The terms of the bound for a batch, in nats, float64; smaller terms are better.

    `prior`, `diffusion`, `reconstruction` (B,): L_T, the sum of the L_{t-1}, and L_0; `value` (B,), minus their sum: a lower
    bound of log p(x_0), or of log P(k) for integers; `stderr` (B,), its Monte Carlo error from each example's own draws, right
    in the mean square (with one sample per step too large where steps are so wide that the term bends between them; NaN for a
    single step); `steps` (J, B), the diffusion term by step, largest t first, or the estimate of each
    stratum where steps were subsampled; `times` (T + 1,), the grid; `nfe`, evaluations per example; `dimensions`, d.
    """

    prior: Tensor
    diffusion: Tensor
    reconstruction: Tensor
    value: Tensor
    stderr: Tensor
    steps: Tensor
    times: Tensor
    nfe: int
    dimensions: int

    @property
    def bits_per_dim(self) -> dict[str, Tensor]:
        """Every term and their "total" (B,) in bits/dim, nats / (d log 2): for integers an upper bound on the code length."""
        parts = dict(prior=self.prior, diffusion=self.diffusion, reconstruction=self.reconstruction, total=-self.value)
        return {name: v / (self.dimensions * math.log(2)) for name, v in parts.items()}


def ddpm_bound(
    model: ScoreModel,
    data: Tensor,
    *,
    steps: int = 1000,
    grid: Callable[..., Tensor] | None = None,
    levels: int | None = None,
    value_range: tuple[float, float] | None = None,
    variance: str = "small",
    samples_per_step: int = 1,
    steps_per_example: int | None = None,
    seed: Seed = None,
    cond: Any = None,
) -> DDPMBound:
    """Lower bound of log p(x_0), in nats, for the chain of `steps` Gaussian steps that the model's denoiser defines.

    Arguments: `data` (B, *), floating point in the model's scale, or integers 0..levels-1, which are scored with their levels'
    centres as x_0; `grid`, from `scoresde.grids` (equal steps of log-SNR by default; equal steps of t waste most of the bound
    between the last two times); `levels` and `value_range`, of integers, the model's unless given (256 for a model that does
    not say); `variance`, of the reverse steps, "small" or "large"; `samples_per_step`, noise draws for each step;
    `steps_per_example`, evaluate this many steps per example, one at random from each of as many strata, instead of all;
    `seed`, one int or one per example.

    Without subsampling an example takes steps * samples_per_step evaluations and a few for the decoder. Control variates, and what
    a bound depends on, are as in `elbo`: with one seed per example it is that example and its seed alone.

    Raises `TypeError` and `ValueError` for data, levels, steps or a grid that do not fit, `NonFiniteError` (naming t and the
    examples) for NaN from the network. Warns where floating-point data look quantized.
    Reference: Ho et al. 2020, equations 5 and 13; Kingma et al. 2021, equations 11 to 14.
    """
    require_model(model)
    checks.choice(variance, VARIANCES, "variance")
    checks.positive_int(steps, "steps")
    checks.positive_int(samples_per_step, "samples_per_step")
    strata = steps if steps_per_example is None else checks.positive_int(steps_per_example, "steps_per_example")
    if strata > steps:
        raise ValueError(f"steps_per_example must be at most steps, got {strata} of {steps} steps.")
    x, edges = _points(model, data, levels, value_range)
    check_input(model, x, cond, "data")
    if edges is None:
        warn_if_quantized(x, "ddpm_bound")
    if grid is not None and not callable(grid):
        raise TypeError(f"grid must be a function such as scoresde.grids.karras, or grids.given(times), got {grid!r}.")
    times = (grids.uniform_log_snr if grid is None else grid)(model.sde, steps)
    _check_times(times, steps, model.sde)
    noising = _Noising(model, x, RandomSource(seed, x.device, x.shape[0], salt=4), cond)
    decoder_draws = max(samples_per_step, DECODER_DRAWS)
    with evaluating(model):
        terms, spread = _diffusion(noising, times, variance == "large", strata, samples_per_step)
        reconstruction, decoder_spread = _reconstruction(noising, times[-1], edges, decoder_draws)
    prior, diffusion = prior_kl(model.sde, x, float(times[0])), terms.sum(0)
    return DDPMBound(
        prior,
        diffusion,
        reconstruction,
        -(prior + diffusion + reconstruction),
        (spread + decoder_spread).sqrt(),
        terms,
        times,
        strata * samples_per_step + decoder_draws,
        noising.d,
    )


def _points(
    model: ScoreModel, data: Any, levels: int | None, value_range: tuple[float, float] | None
) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    """x_0 in the model's scale; for integers also the lower and upper ends of their intervals (float64)."""
    if isinstance(data, Tensor) and data.is_floating_point():
        if levels is not None or value_range is not None:
            raise ValueError(
                "levels and value_range go with integer data, got floating point; pass the raw integers, or leave both out."
            )
        return data.to(torch.promote_types(data.dtype, torch.float32)), None
    count = levels_of(model, levels)
    k = checks.integers(data, count)
    if k.dim() < 2:
        raise ValueError(f"data must have shape (B, ...) with a batch axis first, got shape {tuple(k.shape)}.")
    check_reach(k, model, levels)
    low, high = pair(model.value_range if value_range is None else value_range)
    k = k.to(device_of(model)).double()
    width = (high - low) / count
    below = torch.where(k == 0, -torch.inf, low + width * k)
    above = torch.where(k == count - 1, torch.inf, low + width * (k + 1))
    return (low + width * (k + 0.5)).to(dtype_of(model)), (below, above)


def _check_times(times: Any, steps: int, sde: SDE) -> None:
    if not isinstance(times, Tensor) or tuple(times.shape) != (steps + 1,) or not bool((times.diff() < 0).all()):
        raise ValueError(
            f"grid must give steps + 1 = {steps + 1} decreasing times, got "
            f"{tuple(times.shape) if isinstance(times, Tensor) else type(times).__name__}; use one of scoresde.grids."
        )
    if not float(sde.sigma(times[-1])) > 0:
        raise ValueError(
            f"the grid ends at t = {float(times[-1]):g}, where sigma = 0 and the bound is infinite; give the SDE a t_min > 0."
        )


@dataclass
class _Noising:
    """The examples x (B, *), with the noise that they are given and the model that takes it away."""

    model: ScoreModel
    x: Tensor
    source: RandomSource
    cond: Any

    def __post_init__(self) -> None:
        self.d = math.prod(self.x.shape[1:])

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """At t () or (B,): D (B, *), ||x_0 - D||^2, ||eps_hat - eps||^2 and the mean square of eps less 1, (B,); float64."""
        eps = self.source.normal(self.x.shape, self.x.dtype)
        t = t.to(self.x.device)
        denoised, noise = (v.double() for v in self.model.predict(self.model.sde.perturb(self.x, t, eps), t, self.cond))
        by_data, by_noise = sum_event((self.x - denoised).square()), sum_event((noise - eps).square())
        return denoised, by_data, by_noise, sum_event(eps.double().square()) / self.d - 1


def _diffusion(noising: _Noising, times: Tensor, large: bool, strata: int, samples: int) -> tuple[Tensor, Tensor]:
    r"""The diffusion term by stratum (J, B), and the estimated variance (B,) of its sum.

    Step i costs $c_i + a_i e$ with e the squared error per entry of the predicted noise, since $SNR_t \|x_0 - D\|^2 = d\,e$.
    """
    sde, device, steps, n = noising.model.sde, noising.x.device, len(times) - 1, noising.x.shape[0]
    lam, d = sde.log_snr(times), noising.d
    rho = (sde.sigma(times[1:]) / sde.sigma(times[:-1])).square() if large else torch.ones(steps, dtype=torch.float64)
    constants = (0.5 * d * (rho - 1 - rho.log())).to(device)
    slopes = (0.5 * d * rho * torch.expm1(lam.diff()).clamp_max(LARGEST)).to(device)
    snr_gaps = (0.5 * rho * lam.exp().diff()).to(device)
    at, clean = times.to(device), (lam > 0).to(device)
    bounds = [j * steps // strata for j in range(strata + 1)]
    weights = torch.stack([slopes[i:j].sum() for i, j in pairwise(bounds)])
    ratios, excesses, places, costs, visited = [], [], [], [], []
    for (first, last), weight in zip(pairwise(bounds), weights, strict=True):
        for _ in range(samples):
            i = torch.full((n,), first, device=device)
            if last - first > 1:
                i = i + (noising.source.uniform((n, 1), torch.float64).squeeze(1) * (last - first)).long()
            visited.append(at[i])
            _, by_data, by_noise, excess = noising(visited[-1])
            # the left side of the equation keeps its digits where there is little signal, the right elsewhere
            error = torch.where(clean[i], slopes[i] * by_noise / d, snr_gaps[i] * by_data)
            share = (last - first) / weight
            costs.append((last - first) * constants[i])
            ratios.append(share * error)
            excesses.append(share * slopes[i] * excess)
            places.append((i.double() - 0.5 * (first + last - 1)) / (last - first))
    raise_if_not_finite(ratios, visited)
    ratio, excess, place, cost = (torch.stack(v).reshape(strata, samples, n) for v in (ratios, excesses, places, costs))
    middles = torch.stack([lam[i:j].mean() for i, j in pairwise(bounds)]).to(device)
    ratio = controlled(ratio, excess, place, gaussian_error(noising.model, middles), d)
    whole = torch.stack([constants[i:j].sum() for i, j in pairwise(bounds)])[:, None]
    ratio = ratio + (cost - whole[:, None]) / weights[:, None, None]  # 0 unless steps are drawn
    return whole + weights[:, None] * ratio.mean(1), variance_of_total(ratio, weights)


def _reconstruction(
    noising: _Noising, t: Tensor, edges: tuple[Tensor, Tensor] | None, draws: int
) -> tuple[Tensor, Tensor]:
    """-log p(x_0|x_t) (B,), the mean of `draws`, and the estimated variance of it."""
    log_snr, d = noising.model.sde.log_snr(t), noising.d
    r = float(torch.exp(-0.5 * log_snr))
    found = []
    for _ in range(draws):
        denoised, _, error, excess = noising(t)
        if edges is not None:
            found.append(-sum_event(_log_interval((edges[0] - denoised) / r, (edges[1] - denoised) / r)))
        else:
            found.append(0.5 * (error - d * gaussian_error(noising.model, log_snr).square() * excess))
    raise_if_not_finite(found, [t] * draws)
    values = torch.stack(found)
    if edges is None:
        values = values + d * (0.5 * math.log(2 * math.pi) + math.log(r))
    return values.mean(0), variance_of_mean(values)


def _log_interval(a: Tensor, b: Tensor) -> Tensor:
    """log(Phi(b) - Phi(a)) for a < b, either of which may be infinite, taken in the lower tail."""
    flip = a + b > 0
    low, high = torch.where(flip, -b, a), torch.where(flip, -a, b)
    top = torch.special.log_ndtr(high)
    return top + torch.log(-torch.expm1(torch.special.log_ndtr(low) - top))
