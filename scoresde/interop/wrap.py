"""Other people's live networks as score models. Layer 4."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from scoresde import checks
from scoresde.interop.diffusers import data_of
from scoresde.interop.diffusers.schedules import process_of_scheduler
from scoresde.models.network import PARAMETERIZATIONS, NoiseLabel, ScoreNet
from scoresde.sde import EDMSDE, SDE, VESDE, DiscreteVPSDE


class WrappedNet(ScoreNet):
    """Any module that predicts noise, velocity or data from (x, label), as a `ScoreModel`.

    net: called as net(x, label), x (B, *), label (B,); with a condition as net(x, label, cond), or by the keyword
        `cond_name`. It may return a tensor, a tuple with it first, or an object with `.sample` (as diffusers' do).
    predicts: "noise" (eps), "denoise" (x_0), "velocity" (dx/dt of the probability flow; for rectified flow eps - x_0),
        "v_prediction", "score", "scaled_score", as in `ScoreNet`.
    sde: the process it was trained for. Or `betas`, a discrete schedule: the process is then `DiscreteVPSDE`, continuous through
        its steps, and the label the step (N - 1) t, whole numbers at the steps and between them elsewhere.
    label: a `NoiseLabel`; t itself by default, the step where `betas` are given.
    round_labels: give whole labels, as int64, to networks that look them up in a table. Their output then jumps from step to
        step, which an adaptive solver notices: prefer samplers with fixed steps.
    one_hot: give integer class labels (B,) as one-hot rows of this many numbers; the label `one_hot` is a row of zeros.
    learned_variance: the network returns 2 c channels, the second half of which is a variance that is not used.

    The others are those of `ScoreNet`. Two common kinds have their own constructors, `edm` and `diffusers`. Raises `ValueError`
    unless exactly one of `sde` and `betas` is given, and what `ScoreNet` raises.
    """

    def __init__(
        self,
        net: nn.Module,
        sde: SDE | None = None,
        predicts: str = "noise",
        *,
        betas: Sequence[float] | None = None,
        label: NoiseLabel | None = None,
        round_labels: bool = False,
        learned_variance: bool = False,
        cond_name: str | None = None,
        one_hot: int = 0,
        **options: Any,
    ):
        if sde is not None and not isinstance(sde, SDE):
            raise TypeError(f"sde must be an SDE, got {type(sde).__name__}; a discrete schedule is given as betas=.")
        if (sde is None) == (betas is None):
            raise ValueError(
                "give either sde=, the process the network was trained for, or betas= of a discrete schedule."
            )
        checks.choice(predicts, [p for p in PARAMETERIZATIONS if p != "edm"], "kind of prediction")
        if betas is not None:
            sde = discrete = DiscreteVPSDE(tuple(torch.as_tensor(betas, dtype=torch.float64).tolist()))
            label = label or NoiseLabel("time", len(discrete.betas) - 1.0)
        adapter = _Adapter(net, round_labels, learned_variance, cond_name, one_hot)
        super().__init__(adapter, cast(SDE, sde), predicts, label=label, **options)

    @classmethod
    def edm(cls, net: nn.Module, *, cond_name: str | None = "class_labels", **options: Any) -> WrappedNet:
        """A denoiser D(x, sigma), such as a network of EDM or EDM2 that you have loaded with their code.

        The process is `EDMSDE` between the network's own `sigma_min` and `sigma_max`, within 0.002 and 80, where it has
        them. x has the data's scale, to which the noise is added.
        """
        low, high = float(getattr(net, "sigma_min", 0.0)), float(getattr(net, "sigma_max", float("inf")))
        sde = EDMSDE(max(low, 0.002), min(high, 80.0))
        options.setdefault("one_hot", int(getattr(net, "label_dim", 0) or 0))
        options.setdefault("sigma_data", float(getattr(net, "sigma_data", 0.5)))
        if hasattr(net, "img_resolution") and hasattr(net, "img_channels"):
            options.setdefault("event_shape", (net.img_channels, net.img_resolution, net.img_resolution))
        return cls(net, sde, "denoise", label=NoiseLabel("sigma"), cond_name=cond_name, **options)

    @classmethod
    def diffusers(
        cls, net: nn.Module, scheduler: Any, *, cond_name: str | None = "class_labels", **options: Any
    ) -> WrappedNet:
        """A live network of diffusers, for the process of its scheduler (the object, or its options as a dict)."""
        given: Mapping[str, Any] = (
            scheduler
            if isinstance(scheduler, Mapping)
            else {**scheduler.config, "_class_name": type(scheduler).__name__}
        )
        fourier = getattr(getattr(net, "config", None), "time_embedding_type", None) == "fourier"
        sde, predicts, label = process_of_scheduler(given, fourier, "the scheduler")
        if fourier:  # called with sigma itself, and divides by it
            predicts, label = "score", NoiseLabel("sigma")
        if hasattr(net, "config"):
            options = data_of(cast(Mapping[str, Any], net.config), isinstance(sde, VESDE)) | options
        return cls(net, sde, predicts, label=label, cond_name=cond_name, **options)


class _Adapter(nn.Module):
    """net(x, label[, cond]) -> tensor, for a module with other habits."""

    def __init__(self, net: nn.Module, round_labels: bool, learned_variance: bool, cond_name: str | None, one_hot: int):
        super().__init__()
        self.one_hot = one_hot
        self.net, self.round_labels, self.learned_variance = net, round_labels, learned_variance
        self.cond_name = cond_name

    def forward(self, x: Tensor, label: Tensor, cond: Any = None) -> Tensor:
        if self.round_labels:
            label = label.round().long()
        if self.one_hot and isinstance(cond, Tensor) and not cond.is_floating_point():
            cond = torch.eye(self.one_hot + 1, self.one_hot, dtype=x.dtype, device=x.device)[cond.long()]
        if cond is None:
            out = self.net(x, label)
        elif self.cond_name is None:
            out = self.net(x, label, cond)
        else:
            out = self.net(x, label, **{self.cond_name: cond})
        out = getattr(out, "sample", out[0] if isinstance(out, tuple) else out)
        if self.learned_variance and isinstance(out, Tensor):
            if out.shape[1] != 2 * x.shape[1]:
                raise ValueError(
                    f"learned_variance=True expects {2 * x.shape[1]} channels from the network, got {out.shape[1]}."
                )
            out = out.chunk(2, 1)[0]
        return out
