r"""A score network that knows its data are quantized.

Layer 2. Integer images after uniform dequantization have, given everything else, a density that is constant on each of
the `levels` intervals $I_k = [e_k, e_{k+1}]$. Given the noisy image $x = \alpha x_0 + \sigma\epsilon$, the posterior of
one pixel therefore is, exactly,

$$p(x_{0,i} \mid x) = \sum_k w_k\, N(x_{0,i};\, x_i/\alpha, r^2)|_{I_k}, \qquad
  w_k \propto \pi_k(x_{-i})\, Z_k(x_i), \quad Z_k = \int_{I_k} N(u;\, x_i/\alpha, r^2)\,du, \quad r = \sigma/\alpha,$$

where $\pi_k$ is what the *other* pixels say about this one. The network only has to give the logits of $\pi$; the
intervals, their truncated normal means and the low-noise limit are closed form:

$$\hat\epsilon_i = -\sum_k w_k g_k, \qquad g_k = \frac{\phi(l_k) - \phi(l_{k+1})}{\Phi(l_{k+1}) - \Phi(l_k)}, \qquad
  l_k = (\alpha e_k - x_i)/\sigma, \qquad D_i = (x_i + \sigma \sum_k w_k g_k)/\alpha.$$

Any parameterization can represent this denoiser; this one does not have to learn it. The loss, the samplers and the
likelihood are those of every other model. (The idea of weighing categories by their Gaussian likelihood is also in
Graves et al. 2023, "Bayesian flow networks", section 5; Kingma et al. 2021, appendix H, have it for the last step.)
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from scoresde import checks
from scoresde.models.base import ScoreModel
from scoresde.models.prepared import call_network
from scoresde.sde import SDE, expand

_ROOT = 0.5**0.5
MAX_LEVELS = 2**16
FOURIER = (0.125, 0.25, 0.5, 1.0)  # half periods per interval of the input features


class QuantizedScoreNet(ScoreModel):
    """A network `net(features, label)` or `net(features, label, cond)` that returns logits of the levels.

    For x (B, c, *) the network gets (B, `input_channels(c)`, *) and the label -log-SNR/8 (which is ln(sigma/alpha)/4)
    of shape (B,), and returns (B, levels * c, *): level k of channel j at channel k * c + j. Its input is x scaled to
    unit variance, and sines and cosines of x/alpha at periods of 2 to 16 intervals, each damped by the noise that x
    still has. The label is held within `label_range` (log-SNRs), outside of which the closed form decides alone.

    Raises `ValueError` for levels outside 2 to 65536, an empty value_range, or a network output of another shape.
    """

    levels: int
    flow_scales = (0.001, 0.05)  # the edges of the intervals are felt down to very little noise

    def __init__(
        self,
        net: nn.Module,
        sde: SDE,
        levels: int,
        *,
        value_range: tuple[float, float] = (-1.0, 1.0),
        sigma_data: float = 1.0,
        data_mean: Tensor | None = None,
        event_shape: tuple[int, ...] | None = None,
        label_range: tuple[float, float] = (-9.0, 9.5),
    ):
        super().__init__()
        if checks.level_count(levels) > MAX_LEVELS:
            raise ValueError(f"levels must be at most {MAX_LEVELS}, an output of the network each, got {levels}.")
        self.net = net
        self.sde = sde
        self.levels, self.value_range = levels, value_range
        self.sigma_data, self.event_shape, self.data_mean = sigma_data, event_shape, data_mean
        self.label_range = checks.value_range(label_range, "label_range")
        self.width = (self.value_range[1] - self.value_range[0]) / levels

    @staticmethod
    def input_channels(channels: int) -> int:
        """Channels that the network is given for data of `channels` channels."""
        return channels * (1 + 2 * len(FOURIER))

    def denoise(self, x: Tensor, t: Tensor | float, cond: Any = None) -> Tensor:
        return self.predict(x, t, cond)[0]

    def predict(self, x: Tensor, t: Tensor | float, cond: Any = None) -> tuple[Tensor, Tensor]:
        t = self.time_of(t, x)
        alpha, sigma = expand(self.sde.alpha(t), x), expand(self.sde.sigma(t), x)
        logits = self._logits(x, t, alpha, sigma, cond)
        return self._posterior(x, alpha, sigma, logits)

    def _logits(self, x: Tensor, t: Tensor, alpha: Tensor, sigma: Tensor, cond: Any) -> Tensor:
        """Logits of pi, (B, levels, c, *)."""
        label = -self.sde.log_snr(t).clamp(*self.label_range) / 8
        out = call_network(self.net, self._features(x, alpha, sigma), label, cond)
        b, c, *size = x.shape
        checks.same_shape(out, (b, self.levels * c, *size), "the network's output")
        return out.reshape(b, self.levels, c, *size)

    def _features(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        features = [x * torch.rsqrt(sigma**2 + (alpha * self.sigma_data) ** 2)]
        alpha = alpha.clamp_min(1e-4)  # below, the damping is 0 for every period
        phase = math.pi / self.width * (x / alpha - self.value_range[0])
        noise = math.pi / self.width * (sigma / alpha)
        for k in FOURIER:
            damping = torch.exp(-0.5 * (k * noise) ** 2)
            features += [torch.sin(k * phase) * damping, torch.cos(k * phase) * damping]
        return torch.cat(features, 1)

    def _posterior(self, x: Tensor, alpha: Tensor, sigma: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
        """(D, eps_hat) from the logits of pi: the formulas of the module's docstring, (B, c, *) each.

        Where the noise is wide against an interval (r > 8 widths) the interval's integral and mean are taken from
        their expansion about its centre, whose first neglected term is of relative size (width/r)^4/1000; the
        closed form would lose digits there.
        """
        low, high = self.value_range
        edges = torch.linspace(low, high, self.levels + 1, dtype=torch.float64, device=x.device).to(x.dtype)
        edges = edges.reshape(1, -1, *(1,) * (x.dim() - 1))
        x1, alpha1, sigma1 = x.unsqueeze(1), *(v if v.dim() == 0 else v.unsqueeze(1) for v in (alpha, sigma))
        limit = 8 * self.width
        wide = sigma1 > limit * alpha1

        # narrow noise: closed form (constants stand in where the other branch is taken, so that no gradient is 0 * inf)
        s = torch.where(wide, limit, sigma1).clamp_min(1e-6 * self.width)
        l = torch.where(wide, edges, (alpha1 * edges - x1)) / s  # noqa: E741
        log_z, g = _interval(l[:, :-1], l[:, 1:])

        # wide noise: expansion about the centres
        centre = 0.5 * (edges[:, :-1] + edges[:, 1:])
        s = torch.where(wide, sigma1, limit * alpha1.clamp_min(1.0))
        step = self.width * alpha1 / s  # width / r
        reach = 4 / step.clamp_min(0.1)  # beyond, the series does not converge; x is then far outside the data
        z = ((alpha1 * centre - x1) / s).clamp(-reach, reach)
        q, v = step.square(), z.square()
        log_z_wide = -0.5 * ((alpha1 * centre - x1) / s).square() + q * (v - 1) / 24 + q**2 * (2 - 4 * v - v**2) / 2880
        mean_wide = centre - self.width * step * z * (1 - q * (2 + v) / 60) / 12

        weights = torch.softmax(logits + torch.where(wide, log_z_wide, log_z), 1)
        pull = (weights * g).sum(1)
        far = wide.squeeze(1) if wide.dim() else wide
        mean = (weights * mean_wide).sum(1)
        safe = torch.where(far, torch.ones_like(alpha), alpha)
        denoised = torch.where(far, mean, (x + sigma * pull) / safe)
        noise = torch.where(far, (x - alpha * mean) / torch.where(far, sigma, torch.ones_like(sigma)), -pull)
        return denoised, noise


def _interval(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """log Z = log(Phi(b) - Phi(a)) and g = (phi(a) - phi(b)) / Z for a < b.

    Computed in the lower tail and from ratios, whose exponents do not cancel however far out the interval lies.
    """
    upper = a + b > 0
    lo, hi = torch.where(upper, -b, a), torch.where(upper, -a, b)
    edge = hi.clamp_max(1.0)  # beyond 1 the interval holds most of the mass, and erfcx would overflow
    head, tail = torch.special.erfcx(edge * -_ROOT), torch.special.erfcx(lo * -_ROOT)
    ratio = torch.exp(0.5 * (edge - lo) * (edge + lo))  # phi(lo) / phi(edge)
    rest = 1 - ratio * (tail / head)
    log_tail = torch.log(0.5 * head * rest) - 0.5 * edge.square()
    g_tail = -(1 - ratio) / rest / head * (2 / math.pi) ** 0.5
    inner = hi > 1.0
    far = hi.clamp_min(1.0)
    mass = 0.5 * (torch.special.erfc(-_ROOT * far) - torch.special.erfc(-_ROOT * lo.clamp_max(-1.0)))
    low = lo.clamp_max(-1.0)
    g_mass = (torch.exp(-0.5 * low.square()) - torch.exp(-0.5 * far.square())) / (mass * (2 * math.pi) ** 0.5)
    log_z = torch.where(inner, torch.log(mass), log_tail)
    g = torch.where(inner, g_mass, g_tail)
    g = torch.where(upper, -g, g)
    return log_z, torch.minimum(torch.maximum(g, a), b)  # a mean lies inside its interval
