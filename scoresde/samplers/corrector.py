r"""Langevin correctors and the predictor-corrector sampler (Song et al. 2021, appendix G, algorithms 2 to 5). Layer 3."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from scoresde import checks
from scoresde.grids import uniform_log_snr
from scoresde.models.base import ScoreModel
from scoresde.rng import RandomSource
from scoresde.samplers.base import Sampler, State, affine_at
from scoresde.samplers.linear import Hold, ReverseDiffusion
from scoresde.sde import SDE, expand


class Langevin:
    r"""Langevin steps at one noise level: $x \leftarrow x + e\,\nabla\log p_t(x) + \sqrt{2e}\,z$.

    The step size e follows from a signal-to-noise ratio r, by one of two rules:

    * `rule="sigma"` (default): $e = 2 r^2 \sigma^2$, annealed Langevin dynamics (Song & Ermon 2019, algorithm 1; the "ALD"
      corrector of Song et al. 2021): the rule below with $\|z\|/\|score\|$ at its typical value sigma. It is the same for
      every sample, so no sample depends on its batch-mates.
    * `rule="norm"`: $e = 2 a^2 (r\,\overline{\|z\|}/\overline{\|score\|})^2$ with means over the batch, as published
      (a^2 = alpha_t^2/alpha_{t+h}^2, their 1 - beta, is taken as 1): a sample then depends on its batch.

    A discrete Langevin chain is biased: on a Gaussian of variance close to sigma^2 its stationary variance is
    1 / (1 - r^2) times too large, 2.6 % at r = 0.16.
    """

    def __init__(self, snr: float = 0.16, steps: int = 1, rule: str = "sigma"):
        self.snr = checks.positive(snr, "snr")
        if self.snr >= 1 and rule == "sigma":
            raise ValueError(f"snr must be below 1, got {snr}: the Langevin chain diverges from there on.")
        self.steps = checks.positive_int(steps, "corrector steps")
        self.rule = checks.choice(rule, ("sigma", "norm"), "Langevin rule")

    def correct(
        self, model: ScoreModel, x: Tensor, t: float, alpha: float, sigma: float, noise: RandomSource, cond: Any = None
    ) -> Tensor:
        """x (B, *) at time t, with alpha and sigma at t, after `steps` Langevin steps."""
        for _ in range(self.steps):
            p, q, _, _ = affine_at(model, t)
            # sigma^2 times the score, alpha D - x
            pull = torch.mul(x, alpha * p - 1.0).add_(model.output(x, t, cond), alpha=alpha * q)
            z = noise.normal(x.shape, x.dtype)
            if self.rule == "sigma":
                x = pull.mul_(2 * self.snr**2).add_(x).add_(z, alpha=2 * self.snr * sigma)
            else:
                z_norm, score_norm = _mean_norm(z), _mean_norm(pull) / sigma**2
                # a score that is zero but for rounding says nothing of the step; sigma is its typical value
                floor = 8 * torch.finfo(x.dtype).eps * _mean_norm(x) / sigma**2 + torch.finfo(torch.float64).tiny
                ratio = torch.where(score_norm > floor, z_norm / score_norm.clamp_min(floor), sigma)
                e = 2 * (self.snr * ratio) ** 2
                x = x + expand(e / sigma**2, x) * pull + expand((2 * e).sqrt(), x) * z
        return x


def _mean_norm(x: Tensor) -> Tensor:
    return x.flatten(1).double().norm(dim=1).mean()


class MarginalRow(NamedTuple):
    """alpha and sigma at a step's end, where the corrector works."""

    alpha: float
    sigma: float


class PredictorCorrector(Sampler[MarginalRow]):
    r"""A predictor's step from t to s, then `steps` Langevin steps at s:

    $$x \leftarrow \mathrm{predict}(x_t, t, s), \qquad x \leftarrow x + e\,\nabla\log p_s(x) + \sqrt{2e}\,z .$$

    Arguments: `predictor`, any `Sampler` (default `ReverseDiffusion`); `corrector`, a `Langevin` (default snr 0.16,
    one step), or None for the predictor alone.
    """

    row_type = MarginalRow
    default_steps = 500

    def __init__(self, predictor: Sampler | None = None, corrector: Langevin | None = Langevin()):  # noqa: B008
        self.predictor = ReverseDiffusion() if predictor is None else predictor
        if not isinstance(self.predictor, Sampler):
            raise TypeError(f"predictor must be a Sampler object, such as Ancestral(), got {predictor!r}.")
        self.corrector = corrector
        self.stochastic = corrector is not None or self.predictor.stochastic
        self.adaptive = self.predictor.adaptive
        each = self.predictor.nfe_per_step
        self.nfe_per_step = None if each is None else each + (corrector.steps if corrector else 0)
        self.saved_at_zero = self.predictor.saved_at_zero + (corrector.steps if corrector else 0)

    def times(
        self,
        model: ScoreModel,
        steps: int,
        t_max: float | None = None,
        event_shape: Sequence[int] | None = None,
    ) -> Tensor:
        return self.predictor.times(model, steps, t_max, event_shape)

    def on_given_grid(self) -> Sampler:
        other = copy.copy(self)
        other.predictor = self.predictor.on_given_grid()
        return other

    def start(self, model: ScoreModel, times: Tensor) -> State[MarginalRow]:
        return State(times.tolist(), self.rows(model, times), self.predictor.start(model, times))

    def alone(self, model: ScoreModel, t: float, s: float) -> State[MarginalRow]:
        state = State([t, s], self.rows(model, torch.tensor([t, s], dtype=torch.float64)))
        state.memory = self.predictor.alone(model, t, s)
        return state

    def coefficients(self, sde: SDE, t: Tensor, s: Tensor) -> tuple[Tensor, ...]:
        return sde.alpha(s), sde.sigma(s)

    def step(
        self, model: ScoreModel, x: Tensor, t: float, s: float, state: State, noise: RandomSource, cond: Any = None
    ) -> Tensor:
        alpha, sigma = self.row(model, state, t, s)
        x = self.predictor.step(model, x, t, s, state.memory, noise, cond)
        if self.corrector is None or sigma == 0:  # without noise there is nothing to correct
            return x
        return self.corrector.correct(model, x, s, alpha, sigma, noise, cond)


class AnnealedLangevin(PredictorCorrector):
    """Annealed Langevin dynamics (NCSN; Song & Ermon 2019, algorithm 1): Langevin steps alone, level after level.

    The levels are equally spaced in log-SNR: for VE a geometric sequence of sigmas. Nothing carries x from one level to
    the next but the Langevin steps themselves, so few levels need many `steps` each. Arguments as for `Langevin`.
    """

    default_steps = 200

    def __init__(self, steps: int = 5, snr: float = 0.16, rule: str = "sigma"):
        super().__init__(Hold(uniform_log_snr), Langevin(snr, steps, rule))
