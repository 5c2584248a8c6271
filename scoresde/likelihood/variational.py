r"""The continuous-time variational bound.

Layer 3. Kingma et al. 2021 (equations 15 to 17) and Song, Durkan, Murray & Ermon 2021 (theorem 1): for one example,

$$-\log p(x_0) \le \tfrac12 \int E\|\epsilon - \hat\epsilon(x_\lambda)\|^2\,d\lambda
  + E\left[-\log N(x_0; x/\alpha, r^2 I)\right]_{t_{min}} + KL\left(q(x_1|x_0)\,\|\,\pi\right),$$

the integral over log-SNR, the second term d/2 log(2 pi e r^2) with r = sigma/alpha, the last in closed form.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from scoresde import checks
from scoresde.likelihood.density import LogProb
from scoresde.likelihood.dequantization import warn_if_quantized
from scoresde.models.base import ScoreModel, check_input
from scoresde.modes import evaluating
from scoresde.rng import RandomSource, Seed
from scoresde.sde import sum_event


def elbo(model: ScoreModel, x: Tensor, *, draws: int = 16, seed: Seed = None, cond: Any = None) -> LogProb:
    """Evidence lower bound of log p(x) for x (B, *), in nats; the same result type as `log_prob`.

    The range of log-SNRs is cut into `draws` equal parts and each example gets one evaluation in each, so `nfe` is
    `draws`. `stderr` (B,) is the Monte Carlo error, from the scatter of the errors about their neighbours; `latent` is
    x at t_max with fresh noise. The noise's own norm serves as a control variate, its factor fitted on the other half
    of the batch, which keeps the estimate unbiased. Raises as `log_prob` does.
    """
    check_input(model, x, cond)
    warn_if_quantized(x, "elbo")
    checks.positive_int(draws, "draws")
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    sde, n, d = model.sde, x.shape[0], math.prod(x.shape[1:])
    source = RandomSource(seed, x.device, n, salt=2)
    high, low = sde.log_snr(torch.tensor([sde.t_min, sde.t_max], dtype=torch.float64)).tolist()
    terms, times, width = [], [], (high - low) / draws
    with evaluating(model):
        for j in range(draws):
            u = source.uniform((n, 1), torch.float64).squeeze(1)
            t = sde.time(low + width * (j + u)).clamp(sde.t_min, sde.t_max)
            times.append(t)
            eps = source.normal(x.shape, x.dtype)
            error = sum_event((model.noise(sde.perturb(x, t, eps), t, cond) - eps).double().square())
            excess = sum_event(eps.double().square()) - d
            terms.append(0.5 * width * (error - control_factor(error, excess) * excess))
        eps = source.normal(x.shape, x.dtype)
        latent = sde.perturb(x, sde.t_max, eps)
    stacked = torch.stack(terms) if n else torch.zeros(draws, 0, dtype=torch.float64)
    bad = ~torch.isfinite(stacked)
    if bool(bad.any()):
        draw, row = (int(v) for v in bad.nonzero()[0])
        rows = bad.any(0).nonzero().flatten().tolist()
        raise checks.NonFiniteError(
            f"the network returned NaN or infinity at t = {float(times[draw][row]):.6g} (draw {draw}), examples "
            f"{checks.rows_text(rows)}."
        )
    decoder = 0.5 * d * (math.log(2 * math.pi * math.e) - high)
    ratio = (float(sde.alpha(sde.t_max)) / sde.prior_std) ** 2, (float(sde.sigma(sde.t_max)) / sde.prior_std) ** 2
    prior = 0.5 * (ratio[0] * sum_event(x.double().square()) + d * (ratio[1] - 1 - math.log(ratio[1])))
    if draws > 1 and n > 1:  # neighbours in log-SNR differ by noise and by the slope across half a stratum
        noise = (stacked[1:] - stacked[:-1]) - (stacked[1:] - stacked[:-1]).mean(1, keepdim=True)
        stderr = (0.5 * noise.square().sum(0) * draws / (draws - 1) * n / (n - 1)).sqrt()
    else:
        stderr = torch.full((n,), torch.nan, dtype=torch.float64, device=x.device)
    whole = torch.zeros(n, dtype=torch.int64, device=x.device)
    return LogProb(-(stacked.sum(0) + decoder + prior), stderr, latent, whole + draws, whole)


def control_factor(error: Tensor, excess: Tensor) -> Tensor:
    """Regression of error on excess, fitted on the odd examples for the even ones and the other way round."""
    factor = torch.zeros_like(error)
    if error.shape[0] < 16:
        return factor
    for use, fit in ((0, 1), (1, 0)):
        e, z = error[fit::2], excess[fit::2]
        factor[use::2] = ((e - e.mean()) * (z - z.mean())).mean() / (z - z.mean()).square().mean()
    return factor
