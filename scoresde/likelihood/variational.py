r"""The continuous-time variational bound, and the Monte Carlo that all variational bounds share.

Layer 3. Kingma et al. 2021 (equations 15 to 17) and Song, Durkan, Murray & Ermon 2021 (theorem 1): for one example,

$$-\log p(x_0) \le \tfrac12 \int E\|\epsilon - \hat\epsilon(x_\lambda)\|^2\,d\lambda
  + E\left[-\log N(x_0; x/\alpha, r^2 I)\right]_{t_{min}} + KL\left(q(x_1|x_0)\,\|\,\pi\right),$$

the integral over log-SNR, the second term d/2 log(2 pi e r^2) with r = sigma/alpha, the last in closed form (`prior_kl`).

Two control variates, whose means are 0, take most of the noise away. For Gaussian data N(m, c^2 I) and their exact denoiser

$$\hat\epsilon - \epsilon = (1 - w)\,\tfrac{\alpha}{\sigma}(x_0 - m) - w\,\epsilon, \qquad
  w = \frac{\alpha^2 c^2}{\alpha^2 c^2 + \sigma^2} = \tfrac1d E\|\hat\epsilon - \epsilon\|^2,$$

so w^2 (||eps||^2 - d) moves with the error, and w can be read off the mean error. For every term it is, from the same example's
neighbouring terms, whose noise is independent (so the estimate stays unbiased), and from w at c = sigma_data while these are few.
In the same way the slope of the neighbours takes away what the place within a stratum adds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from scoresde import checks
from scoresde.likelihood.density import LogProb
from scoresde.likelihood.dequantization import warn_if_quantized
from scoresde.models.base import ScoreModel, check_input
from scoresde.modes import evaluating
from scoresde.rng import RandomSource, Seed
from scoresde.sde import SDE, sum_event

SURE = 64.0  # normal variables of which the neighbours' mean error must consist before it outweighs w at sigma_data
STEEP = 3  # order of the differences that show the noise of single draws


def elbo(model: ScoreModel, x: Tensor, *, draws: int = 16, seed: Seed = None, cond: Any = None) -> LogProb:
    """Evidence lower bound of log p(x) for x (B, *), in nats; the same result type as `log_prob`.

    An even number of `draws` is spread over draws/2 equal parts of the range of log-SNRs, two in each; an odd number over as many
    parts, one in each. `nfe` is `draws`. `stderr` (B,) is the Monte Carlo error, from the scatter of an example's own draws; it
    is right in the mean square over examples and seeds, and NaN for one draw. `latent` is x at t_max with fresh noise.

    With one seed per example its bound depends on that example and its seed alone, up to the rounding with which a network treats
    batches of other sizes (a small float32 U-Net on 8 x 8 images: 3e-5 nats). Raises as `log_prob` does.
    """
    check_input(model, x, cond)
    warn_if_quantized(x, "elbo")
    checks.positive_int(draws, "draws")
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    sde, n, d = model.sde, x.shape[0], math.prod(x.shape[1:])
    source = RandomSource(seed, x.device, n, salt=2)
    high, low = sde.log_snr(torch.tensor([sde.t_min, sde.t_max], dtype=torch.float64)).tolist()
    together = 2 if draws % 2 == 0 else 1
    parts = draws // together
    width = (high - low) / parts
    errors, excesses, places, times = [], [], [], []
    with evaluating(model):
        for j in range(draws):
            u = source.uniform((n, 1), torch.float64).squeeze(1)
            t = sde.time(low + width * (j // together + u)).clamp(sde.t_min, sde.t_max)
            eps = source.normal(x.shape, x.dtype)
            predicted = model.noise(sde.perturb(x, t, eps), t, cond)
            errors.append(sum_event((predicted - eps).double().square()))
            excesses.append(sum_event(eps.double().square()) - d)
            places.append(u - 0.5)
            times.append(t)
        latent = sde.perturb(x, sde.t_max, source.normal(x.shape, x.dtype))
    raise_if_not_finite(errors, times)
    ratio, excess = (torch.stack(v).reshape(parts, together, n) / d for v in (errors, excesses))
    middles = low + width * (torch.arange(parts, dtype=torch.float64, device=x.device) + 0.5)
    ratio = controlled(ratio, excess, torch.stack(places).reshape(ratio.shape), gaussian_error(model, middles), d)
    weights = torch.full((parts,), 0.5 * d * width, dtype=torch.float64, device=x.device)
    decoder = 0.5 * d * (math.log(2 * math.pi * math.e) - high)
    value = -(total(ratio, weights) + decoder + prior_kl(sde, x, sde.t_max))
    whole = torch.zeros(n, dtype=torch.int64, device=x.device)
    return LogProb(value, variance_of_total(ratio, weights).sqrt(), latent, whole + draws, whole)


def prior_kl(sde: SDE, x: Tensor, t: float) -> Tensor:
    """KL(N(alpha x, sigma^2 I) || N(0, prior_std^2 I)) at t for x (B, *), (B,) nats."""
    signal, noise = ((float(v) / sde.prior_std) ** 2 for v in (sde.alpha(t), sde.sigma(t)))
    d = math.prod(x.shape[1:])
    return 0.5 * (signal * sum_event(x.double().square()) + d * (noise - 1 - math.log(noise)))


def raise_if_not_finite(values: Sequence[Tensor], times: Sequence[Tensor]) -> None:
    """`NonFiniteError` where one of `values`, (B,) each, is NaN or infinite, naming its time, () or (B,), and the examples.

    One look after all evaluations: a GPU is stalled once.
    """
    bad = ~torch.isfinite(torch.stack(list(values)))
    if bool(bad.any()):
        draw, row = (int(v) for v in bad.nonzero()[0])
        t = times[draw].expand(bad.shape[1])[row]
        rows = bad[draw].nonzero().flatten().tolist()
        raise checks.NonFiniteError(
            f"the network returned NaN or infinity at t = {float(t):.6g}, examples {checks.rows_text(rows)}."
        )


def gaussian_error(model: ScoreModel, log_snr: Tensor) -> Tensor:
    """w, the mean squared error per entry of the noise that is predicted for Gaussian data of scale sigma_data."""
    return torch.sigmoid(log_snr + 2 * math.log(model.sigma_data))


def control_factor(near: Tensor, count: float, guess: Tensor) -> Tensor:
    """w^2, w a mean of `near`, mean errors per entry of `count` normal variables, and of `guess` as if of `SURE`."""
    return ((SURE * guess + count * near) / (SURE + count)).clamp(0, 1).square()


def controlled(ratio: Tensor, excess: Tensor, place: Tensor, guess: Tensor, d: int) -> Tensor:
    """`ratio` (J, K, B), errors per entry of K draws in each of J strata in order, without what its control variates explain.

    `excess`, the mean square of each draw's noise less 1; `place` of each draw within its stratum, from -1/2 to 1/2;
    `guess` (J,), w at the strata.
    """
    strata, draws, _ = ratio.shape
    guess = guess[:, None]
    if strata == 1:
        return ratio - guess.square()[:, None] * excess
    mean = ratio.mean(1)
    after, before = torch.cat([mean[1:], mean[-2:-1]]), torch.cat([mean[1:2], mean[:-1]])
    factor = control_factor(0.5 * (after + before), 2 * draws * d, guess)
    return ratio - factor[:, None] * excess - 0.5 * (after - before)[:, None] * place


def total(ratio: Tensor, weights: Tensor) -> Tensor:
    """sum_j weights_j mean_k ratio_jk, (J, K, B) -> (B,)."""
    return (weights[:, None] * ratio.mean(1)).sum(0)


def variance_of_total(ratio: Tensor, weights: Tensor) -> Tensor:
    """Estimated variance (B,) of `total`, from each example's own draws; NaN where there is a single one.

    From the scatter within strata where there is more than one draw in each. Otherwise from third differences along the strata
    (second or first ones of fewer than four), which are free of a mean that is quadratic there; what bends it more counts as noise.
    """
    strata, draws, n = ratio.shape
    if draws > 1:
        return (weights.square()[:, None] * variance_of_mean(ratio.transpose(0, 1))).sum(0)
    order = min(STEEP, strata - 1)
    if order < 1:
        return torch.full((n,), torch.nan, dtype=torch.float64, device=ratio.device)
    noise = ratio[:, 0].diff(order, dim=0).square() / math.comb(2 * order, order)
    local = weights.square().unfold(0, order + 1, 1).mean(1)
    return (local[:, None] * noise).sum(0) * strata / (strata - order)


def variance_of_mean(draws: Tensor) -> Tensor:
    """Estimated variance of the mean over the first axis, (K, *) -> (*), K > 1; no warning for an empty batch."""
    k = draws.shape[0]
    return (draws - draws.mean(0)).square().sum(0) / (k * (k - 1))
