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
from scoresde.likelihood.dequantization import pair, warn_if_quantized
from scoresde.likelihood.variational import control_factor
from scoresde.models.base import ScoreModel, check_input, require_model
from scoresde.modes import device_of, dtype_of, evaluating
from scoresde.rng import RandomSource, Seed
from scoresde.sde import sum_event

DECODER_DRAWS = 4  # at least so many: the scatter of these is the decoder's part of `stderr`
VARIANCES = ("small", "large")


@dataclass
class DDPMBound:
    """The terms of the bound for a batch, in nats, float64; smaller terms are better.

    `prior`, `diffusion`, `reconstruction` (B,): L_T, the sum of the L_{t-1}, and L_0; `value` (B,), minus their sum: a lower
    bound of log p(x_0), or of log P(k) for integers; `stderr` (B,), its Monte Carlo error, NaN where nothing tells (one
    example with one sample per step); `steps` (J, B), the diffusion term by step, largest t first, or the estimate of each
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

    Without subsampling an example takes steps * samples_per_step evaluations and a few for the decoder. The norm of the noise
    serves as a control variate as in `elbo`, its factor fitted on the other half of the batch (16 examples or more).

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
    sde, n, d = model.sde, x.shape[0], math.prod(x.shape[1:])
    times = (grids.uniform_log_snr if grid is None else grid)(sde, steps)
    _check_times(times, steps, sde)
    lam = sde.log_snr(times)
    rho = (sde.sigma(times[1:]) / sde.sigma(times[:-1])).square()  # (T,), step i goes from times[i] to times[i + 1]
    source = RandomSource(seed, x.device, n, salt=4)
    shared = (model, x, source, cond)
    bounds = [j * steps // strata for j in range(strata + 1)]
    terms, scatter = [], torch.zeros(n, dtype=torch.float64, device=x.device)
    with evaluating(model):
        for first, last in pairwise(bounds):
            found = []
            for _ in range(samples_per_step):
                i = torch.full((n,), first, device=x.device)
                if last - first > 1:
                    u = source.uniform((n, 1), torch.float64).squeeze(1)
                    i = first + (u * (last - first)).long()
                i = i.cpu()
                kl = _step(*shared, times[i], lam[i], lam[i + 1], rho[i] if variance == "large" else None)
                found.append((last - first) * kl)
            found = torch.stack(found)
            terms.append(found.mean(0))
            if samples_per_step > 1:
                scatter = scatter + _variance_of_mean(found)
        draws = max(samples_per_step, DECODER_DRAWS)
        decoded = torch.stack([_decode(*shared, times[-1], edges) for _ in range(draws)])
    stacked = torch.stack(terms)
    if samples_per_step == 1:
        scatter = _neighbours(stacked)
    prior = _prior(sde, x, float(times[0]))
    diffusion, reconstruction = stacked.sum(0), decoded.mean(0)
    return DDPMBound(
        prior,
        diffusion,
        reconstruction,
        -(prior + diffusion + reconstruction),
        (scatter + _variance_of_mean(decoded)).sqrt(),
        stacked,
        times,
        strata * samples_per_step + draws,
        d,
    )


def _points(
    model: ScoreModel, data: Any, levels: int | None, value_range: Any
) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    """x_0 in the model's scale; for integers also the lower and upper ends of their intervals (float64)."""
    if isinstance(data, Tensor) and data.is_floating_point():
        if levels is not None or value_range is not None:
            raise ValueError(
                "levels and value_range go with integer data, got floating point; pass the raw integers, or leave both out."
            )
        return data.to(torch.promote_types(data.dtype, torch.float32)), None
    declared = levels if levels is not None else model.levels
    if declared is not None and model.levels is not None and declared != model.levels:
        raise ValueError(
            f"the model was made for data of {model.levels} levels, got levels={levels}; pass its own data."
        )
    count = 256 if declared is None else declared
    k = checks.integers(data, count)
    if k.dim() < 2:
        raise ValueError(f"data must have shape (B, ...) with a batch axis first, got shape {tuple(k.shape)}.")
    if declared is None and k.numel() and int(k.max()) < count // 4:
        raise ValueError(
            f"levels is not given and the model does not say; 256 is the default, but the data only reach {int(k.max())}. "
            "Pass levels= (256 if these are dark 8-bit images)."
        )
    low, high = pair(model.value_range if value_range is None else value_range)
    k = k.to(device_of(model)).double()
    width = (high - low) / count
    below = torch.where(k == 0, -torch.inf, low + width * k)
    above = torch.where(k == count - 1, torch.inf, low + width * (k + 1))
    return (low + width * (k + 0.5)).to(dtype_of(model)), (below, above)


def _check_times(times: Any, steps: int, sde: Any) -> None:
    if not isinstance(times, Tensor) or tuple(times.shape) != (steps + 1,) or not bool((times.diff() < 0).all()):
        raise ValueError(
            f"grid must give steps + 1 = {steps + 1} decreasing times, got "
            f"{tuple(times.shape) if isinstance(times, Tensor) else type(times).__name__}; use one of scoresde.grids."
        )
    if not float(sde.sigma(times[-1])) > 0:
        raise ValueError(
            f"the grid ends at t = {float(times[-1]):g}, where sigma = 0 and the bound is infinite; give the SDE a t_min > 0."
        )


def _noisy(model: ScoreModel, x: Tensor, source: RandomSource, cond: Any, t: Tensor) -> tuple[Tensor, ...]:
    """(D, eps_hat, eps) of x noised to t () or (B,), after a look for NaN."""
    eps = source.normal(x.shape, x.dtype)
    denoised, noise = model.predict(model.sde.perturb(x, t.to(x.device), eps), t.to(x.device), cond)
    bad = ~(torch.isfinite(denoised) & torch.isfinite(noise)).flatten(1).all(1)
    if bool(bad.any()):
        rows = bad.nonzero().flatten().tolist()
        raise checks.NonFiniteError(
            f"the network returned NaN or infinity at t = {float(t.expand(len(bad))[rows[0]]):.6g}, examples "
            f"{checks.rows_text(rows)}."
        )
    return denoised.double(), noise.double(), eps.double()


def _step(
    model: ScoreModel,
    x: Tensor,
    source: RandomSource,
    cond: Any,
    t: Tensor,
    lam_t: Tensor,
    lam_s: Tensor,
    rho: Tensor | None,
) -> Tensor:
    """One draw of the KL of the step from t to s (B,), with the control variate."""
    denoised, noise, eps = _noisy(model, x, source, cond, t)
    lam_t, lam_s = lam_t.to(x.device), lam_s.to(x.device)
    # SNR_t |x_0 - D|^2 = |eps_hat - eps|^2: the left side keeps its digits where there is little signal, the right elsewhere
    by_noise = torch.expm1(lam_s - lam_t) * sum_event((noise - eps).square())
    by_data = (lam_s.exp() - lam_t.exp()) * sum_event((x.double() - denoised).square())
    kl = 0.5 * torch.where(lam_t > 0, by_noise, by_data)
    d = math.prod(x.shape[1:])
    if rho is not None:
        rho = rho.to(x.device)
        kl = rho * kl + 0.5 * d * (rho - 1 - rho.log())
    excess = sum_event(eps.square()) - d
    return kl - control_factor(kl, excess) * excess


def _decode(
    model: ScoreModel,
    x: Tensor,
    source: RandomSource,
    cond: Any,
    t: Tensor,
    edges: tuple[Tensor, Tensor] | None,
) -> Tensor:
    """One draw of -log p(x_0|x_t) (B,)."""
    denoised, noise, eps = _noisy(model, x, source, cond, t)
    ratio = float(torch.exp(-0.5 * model.sde.log_snr(t)))
    if edges is not None:
        return -sum_event(_log_interval((edges[0] - denoised) / ratio, (edges[1] - denoised) / ratio))
    d = math.prod(x.shape[1:])
    error, excess = sum_event((noise - eps).square()), sum_event(eps.square()) - d
    factor = control_factor(error, excess) if x.shape[0] >= 16 else 1.0
    return 0.5 * (error - factor * excess) + d * (0.5 * math.log(2 * math.pi) + math.log(ratio))


def _log_interval(a: Tensor, b: Tensor) -> Tensor:
    """log(Phi(b) - Phi(a)) for a < b, either of which may be infinite, taken in the lower tail."""
    flip = a + b > 0
    low, high = torch.where(flip, -b, a), torch.where(flip, -a, b)
    top = torch.special.log_ndtr(high)
    return top + torch.log(-torch.expm1(torch.special.log_ndtr(low) - top))


def _prior(sde: Any, x: Tensor, t: float) -> Tensor:
    """KL(N(alpha x_0, sigma^2 I) || N(0, prior_std^2 I)) at t, (B,)."""
    ratio = (float(sde.alpha(t)) / sde.prior_std) ** 2, (float(sde.sigma(t)) / sde.prior_std) ** 2
    d = math.prod(x.shape[1:])
    return 0.5 * (ratio[0] * sum_event(x.double().square()) + d * (ratio[1] - 1 - math.log(ratio[1])))


def _variance_of_mean(draws: Tensor) -> Tensor:
    """Estimated variance of the mean over the first axis, (K, B) -> (B,)."""
    return (draws - draws.mean(0)).square().sum(0) / (draws.shape[0] * (draws.shape[0] - 1))


def _neighbours(terms: Tensor) -> Tensor:
    """Variance of the sum over the first axis of independent terms (J, B): neighbours differ by noise and by a slope that
    the examples share. NaN for one term or one example."""
    count, n = terms.shape
    if count < 2 or n < 2:
        return torch.full((n,), torch.nan, dtype=torch.float64, device=terms.device)
    noise = terms.diff(dim=0)
    noise = noise - noise.mean(1, keepdim=True)
    return 0.5 * noise.square().sum(0) * count / (count - 1) * n / (n - 1)
