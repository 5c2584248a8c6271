r"""Training objectives: denoising score matching, with explicit and sliced score matching as references.

Layer 2. All denoising losses are one error, weighted. With $x_t = \alpha x_0 + \sigma\epsilon$ and log-SNR $\lambda$,

$$\sigma^2\|s - \nabla\log p(x_t|x_0)\|^2 = \|\hat\epsilon - \epsilon\|^2 = e^{\lambda}\|D - x_0\|^2,$$

so a weighting is a factor $w(t)$ on the noise error, and a time sampling says where it is evaluated:

| weighting | w(t) on the noise error | source |
|---|---|---|
| sigma2 | 1 | Song et al. 2021, section 3.3 (lambda = sigma^2); Ho et al. 2020, "simple" |
| likelihood | g^2/sigma^2 = -d lambda/dt | Song, Durkan, Murray & Ermon 2021, equation 7 |
| edm | (s^2 + sigma_data^2)/sigma_data^2, s = sigma/alpha | Karras et al. 2022, table 1 |
| min-snr | min(1, gamma/SNR), gamma = 5 | Hang et al. 2023, equation 8 |

| time sampling | density of t |
|---|---|
| uniform | uniform on [t_min, t_max] |
| low-discrepancy | the same, one t in each of B equal parts (Kingma et al. 2021, appendix I.1) |
| log-normal | log(sigma/alpha) ~ N(-1.2, 1.2^2), cut at the ends of the schedule (Karras et al. 2022) |
| importance | proportional to g^2/sigma^2, which is uniform in log-SNR; stratified |

`importance` divides the weight by its density, so any weighting keeps the expectation that it has under `uniform`
(Song, Durkan, Murray & Ermon 2021, appendix B). `log-normal` does not: there the density of t is part of the objective.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from scoresde import checks
from scoresde.models.base import ScoreModel
from scoresde.rng import RandomSource, Seed
from scoresde.sde import SDE, check_monotone, sum_event

WEIGHTINGS = ("sigma2", "likelihood", "edm", "min-snr")
TIME_SAMPLING = ("uniform", "low-discrepancy", "log-normal", "importance")
MIN_SNR_GAMMA = 5.0
LOG_NORMAL = (-1.2, 1.2)


def weight(sde: SDE, t: Tensor, weighting: str, sigma_data: float = 1.0) -> Tensor:
    """w(t) on the squared noise error, same shape as t. Raises `ValueError` for an unknown weighting."""
    checks.choice(weighting, WEIGHTINGS, "weighting")
    if weighting == "sigma2":
        return torch.ones_like(t)
    if weighting == "likelihood":
        return (sde.diffusion(t) / sde.sigma(t)) ** 2
    snr = sde.log_snr(t).exp()
    if weighting == "edm":
        return 1 + 1 / (snr * checks.positive(sigma_data, "sigma_data") ** 2)
    return (MIN_SNR_GAMMA / snr).clamp_max(1.0)


def draw_times(
    sde: SDE, n: int, time_sampling: str, source: RandomSource, log_snr_range: tuple[float, float] | None = None
) -> tuple[Tensor, Tensor]:
    """n times in [t_min, t_max] and, per time, the uniform density over its own: (n,), (n,), float64.

    The second factor makes a mean over `importance` times unbiased for the mean over uniform times; it is 1 for the
    others. `log_snr_range` narrows the range of log-SNRs that are drawn (not needed: all of the schedule).
    """
    checks.choice(time_sampling, TIME_SAMPLING, "time sampling")
    u = source.uniform((n, 1), torch.float64).squeeze(1)
    if time_sampling in ("low-discrepancy", "importance") and n:
        # one point in each n-th of the interval, shifted together: uniform each, evenly spread jointly
        u = (u[0] + torch.arange(n, dtype=torch.float64, device=u.device) / n) % 1.0
    ends = torch.tensor([sde.t_min, sde.t_max], dtype=torch.float64)
    check_monotone(sde, ends)
    high, low = sde.log_snr(ends).tolist()
    if log_snr_range is not None:
        if len(log_snr_range) != 2 or not log_snr_range[0] < log_snr_range[1]:  # NaN too
            raise ValueError(f"log_snr_range must be (low, high) with low < high, got {log_snr_range}.")
        low, high = max(low, log_snr_range[0]), min(high, log_snr_range[1])
        if not low < high:
            raise ValueError(f"log_snr_range {log_snr_range} does not meet the schedule's log-SNRs.")
    first, last = (
        (sde.t_min, sde.t_max)
        if log_snr_range is None
        else sde.time(torch.tensor([high, low], dtype=torch.float64)).tolist()
    )
    if time_sampling in ("uniform", "low-discrepancy"):
        t = first + (last - first) * u
        return t, torch.ones_like(t)
    if time_sampling == "importance":
        t = sde.time(low + (high - low) * u).clamp(first, last)
        speed = (sde.diffusion(t) / sde.sigma(t)) ** 2  # |d lambda / dt|
        return t, (high - low) / (speed * (last - first))
    mean, std = LOG_NORMAL
    cut = torch.special.ndtr((torch.tensor([-0.5 * high, -0.5 * low], dtype=torch.float64) - mean) / std).to(u.device)
    log_s = mean + std * torch.special.ndtri(cut[0] + (cut[1] - cut[0]) * u)
    t = sde.time(-2 * log_s).clamp(first, last)
    return t, torch.ones_like(t)


def mean_weight(
    sde: SDE,
    weighting: str,
    time_sampling: str,
    sigma_data: float = 1.0,
    log_snr_range: tuple[float, float] | None = None,
) -> float:
    """The mean factor that `denoising_loss` puts on the noise error; dividing by it makes losses comparable."""
    t, ratio = draw_times(sde, 4096, time_sampling, RandomSource(0, "cpu", 4096), log_snr_range)
    return float((weight(sde, t, weighting, sigma_data) * ratio).mean())


def denoising_loss(
    model: ScoreModel,
    x0: Tensor,
    *,
    weighting: str = "sigma2",
    time_sampling: str = "low-discrepancy",
    seed: Seed = None,
    cond: Any = None,
    log_snr_range: tuple[float, float] | None = None,
) -> Tensor:
    """Denoising score matching: w(t) ||noise(x_t, t) - eps||^2, summed over each example; shape (B,).

    `weighting` and `time_sampling` as in the module's docstring; x0 (B, *). With the likelihood weighting, half the mean times
    (t_max - t_min) is the part of the negative ELBO, in nats, that depends on the model. The noise is added, and the loss
    computed, in float32 at least, whatever the dtype of x0; the network is given x_t in its own. Raises `ValueError` for an
    unknown weighting or time sampling, and (looked for on a CPU only) for NaN in x0 or in a weight; `TypeError` for integers.
    """
    checks.batch(x0, "x0")
    if x0.shape[0] == 0:
        raise ValueError("x0 is an empty batch; a loss needs at least one example.")
    if x0.device.type == "cpu":  # elsewhere a look at the values would stall the device at every step
        checks.finite(x0, "x0")
    x0 = x0.to(torch.promote_types(x0.dtype, torch.float32))  # in half precision little noise would be rounded away
    source = RandomSource(seed, x0.device, x0.shape[0])
    t, ratio = draw_times(model.sde, x0.shape[0], time_sampling, source, log_snr_range)
    eps = source.normal(x0.shape, x0.dtype)
    x = model.sde.perturb(x0, t, eps)
    error = sum_event((model.noise(x, t, cond) - eps).square())
    factor = weight(model.sde, t, weighting, model.sigma_data) * ratio
    if x0.device.type == "cpu" and not bool(torch.isfinite(factor).all()):
        at = float(t[~torch.isfinite(factor)][0])
        raise ValueError(
            f"the weighting {weighting!r} is not finite for {type(model.sde).__name__} at t = {at:g}; raise its t_min."
        )
    return factor.to(error.dtype) * error


def explicit_loss(model: ScoreModel, x: Tensor, t: Tensor | float, true_score: Tensor, cond: Any = None) -> Tensor:
    """Explicit score matching, ||score(x, t) - true_score||^2 / 2 per example of x ~ p_t; shape (B,).

    Hyvarinen 2005, equation 2. Needs the true score: a reference for tests and teaching.
    """
    checks.same_shape(true_score, x.shape, "true_score")
    return 0.5 * sum_event((model.score(x, t, cond) - true_score) ** 2)


def sliced_loss(model: ScoreModel, x: Tensor, t: Tensor | float, *, seed: Seed = None, cond: Any = None) -> Tensor:
    """Sliced score matching, v^T (d score/dx) v + (v^T score)^2 / 2 with one v ~ N(0, I) per example; shape (B,).

    Song, Garg, Shi & Ermon 2020, equation 8. Its expectation over x ~ p_t differs from `explicit_loss` by a constant,
    so both have the same minimum; it needs no true score, and a second derivative in training.
    """
    x = checks.batch(x).detach().requires_grad_(True)
    v = RandomSource(seed, x.device, x.shape[0]).normal(x.shape, x.dtype)
    with torch.enable_grad():
        projected = sum_event(model.score(x, t, cond) * v)
        (gradient,) = torch.autograd.grad(projected.sum(), x, create_graph=True)
    return sum_event(gradient * v) + 0.5 * projected**2
