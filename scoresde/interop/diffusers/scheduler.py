"""Our samplers as a scheduler of diffusers, for its pipelines. Layer 4; importing this module needs diffusers.

from scoresde.grids import karras, takes_spread
from scoresde.interop.diffusers.scheduler import SamplerScheduler

pipeline.scheduler = SamplerScheduler.of(pipeline.scheduler, method="dpm++2m")
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import ConfigMixin, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from scoresde.grids import karras, takes_spread
from scoresde.interop.diffusers.schedules import process_of_scheduler
from scoresde.models.network import NoiseLabel, ScoreNet
from scoresde.rng import RandomSource
from scoresde.samplers import Sampler, time_grid
from scoresde.samplers.base import State
from scoresde.samplers.registry import sampler_for


class _Said(nn.Module):
    """A network whose answer is already there, once; a second question in the same step finds none."""

    answer: Tensor | None = None

    def forward(self, x: Tensor, label: Tensor, cond: Any = None) -> Tensor:
        answer, self.answer = self.answer, None
        if answer is None:
            raise RuntimeError("this sampler evaluates its network more than once per step, which a scheduler cannot.")
        return answer


OWN = ("options", "method", "sigma_data", "event_shape")


def _kind(options: Mapping[str, Any]) -> str:
    """The name of a scheduler whose process these options describe, for those that come without one."""
    if "beta_start" in options:
        return "DDPMScheduler"
    if {"snr", "sigma_max"} <= options.keys():
        return "ScoreSdeVeScheduler"
    if "shift" in options:
        return "FlowMatchEulerDiscreteScheduler"
    raise ValueError(
        f"no schedule is known with the options {', '.join(options) or 'none'}; use SamplerScheduler.of(pipeline.scheduler)."
    )


class SamplerScheduler(SchedulerMixin, ConfigMixin):
    """`set_timesteps`, then one `step` per timestep with the network's output there, as diffusers' pipelines call them.

    options: the configuration of the scheduler that the network was trained for (`pipeline.scheduler.config`), with its class
        under "_class_name".
    method: a name of `scoresde.METHODS` whose sampler evaluates the network once per step: "ddim", "dpm++2m", "dpm++3m",
        "unipc2", "deis", "ipndm", "euler", "ancestral" and others.
    sigma_data: rough standard deviation of the data, a scale for the methods on the angle path and for grids.
    event_shape: of one example, such as (3, 32, 32), on which the default grids of most methods depend; without it those methods
        run on the grid of Karras et al. 2022.

    Its configuration repeats the original's options, so other schedulers can be made of it, and it of theirs, by `from_config`,
    with the schedule that the network was trained for. Timesteps are real numbers, on the method's own grid; networks with
    sinusoidal embeddings take them. Raises `ValueError` for methods with more evaluations per step, and for schedules that are
    not known.
    """

    order = 1

    @register_to_config
    def __init__(
        self,
        options: Mapping[str, Any],
        method: str = "dpm++2m",
        sigma_data: float = 0.5,
        event_shape: Sequence[int] | None = None,
    ):
        self.sampler: Sampler = sampler_for(method)
        if self.sampler.nfe_per_step != 1 or self.sampler.saved_at_zero or hasattr(self.sampler, "scheme"):
            raise ValueError(
                f"{method!r} does not evaluate its network once at the start of each step, which a scheduler needs; use "
                "'ddim', 'dpm++2m', 'dpm++3m', 'unipc2', 'deis', 'ipndm', 'euler' or 'ancestral'."
            )
        fourier = str(options.get("_class_name", "")) == "ScoreSdeVeScheduler"
        sde, kind, label = process_of_scheduler(options, fourier, "the scheduler")
        if fourier:  # such networks divide by sigma themselves, and take it
            kind, label = "score", NoiseLabel("sigma")
        self.model = ScoreNet(_Said(), sde, kind, label=label, sigma_data=sigma_data)
        self.init_noise_sigma = sde.prior_std
        self.timesteps = torch.zeros(0)
        unset = [*self.config.get("_use_default_values", []), *options.get("_use_default_values", [])]
        theirs = {k: v for k, v in options.items() if not k.startswith("_") and k not in OWN}
        self.register_to_config(**theirs, _use_default_values=unset)

    @classmethod
    def of(
        cls,
        scheduler: Any,
        method: str = "dpm++2m",
        sigma_data: float = 0.5,
        event_shape: Sequence[int] | None = None,
    ) -> SamplerScheduler:
        """One for the process of another scheduler of diffusers."""
        return cls({**scheduler.config, "_class_name": type(scheduler).__name__}, method, sigma_data, event_shape)

    @classmethod
    def from_config(  # type: ignore[override]  # theirs has a default for config, with which it raises
        cls, config: Mapping[str, Any], return_unused_kwargs: bool = False, **changes: Any
    ) -> Any:
        """One for the process of another scheduler's configuration, or of its own; `changes` replace entries of it.

        Raises `ValueError` for configurations of a kind that is not known.
        """
        changed = {**config, **changes}
        inner = dict(changed.get("options") or {})
        theirs = {k: v for k, v in changed.items() if k not in OWN and not k.startswith("_")}
        name = changed.get("_class_name")
        if name in (None, cls.__name__):  # the original's name, if it came through one of ours
            name = inner.get("_class_name") or _kind(theirs)
        if "_use_default_values" in config:
            theirs["_use_default_values"] = config["_use_default_values"]
        own = {k: changed[k] for k in ("method", "sigma_data", "event_shape") if k in changed}
        made = cls({**inner, **theirs, "_class_name": name}, **own)
        return (made, {}) if return_unused_kwargs else made

    def set_timesteps(self, num_inference_steps: int, device: Any = None) -> None:
        """Lay out the grid of so many steps, and one more evaluation where the method ends with the denoiser."""
        shape = self.config["event_shape"]
        grid = karras if shape is None and takes_spread(self.sampler.grid) else None
        self._times = time_grid(self.sampler, self.model, num_inference_steps, grid, event_shape=shape)
        asked = self._times if self.sampler.denoise_final else self._times[:-1]
        self.timesteps = self.model.label(self.model.sde, asked).to(device=device, dtype=torch.float32)
        self._asked = self.timesteps.tolist()
        self._place = 0
        self._state: State[Any] | None = None
        self._prepared: Any = None  # the model as the sampler sees it, once a step has been asked for

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """The sample itself."""
        return sample

    def step(
        self,
        model_output: Tensor,
        timestep: Any,
        sample: Tensor,
        generator: torch.Generator | None = None,
        return_dict: bool = True,
        **unused: Any,
    ) -> Any:
        """The sample at the next time, as `.prev_sample` or in a tuple; to be called in the order of `timesteps`."""
        if not len(self.timesteps):
            raise ValueError("call set_timesteps before step.")
        i, times = self._index(float(timestep)), self._times.tolist()
        if self._prepared is None or self._state is None:
            self._prepared = self.model.prepare(sample, self._times)
            # from here on: what a multistep method would know of the steps before is not there
            self._state = self.sampler.start(self._prepared, self._times[min(i, len(times) - 2) :])
        self.model.net.answer = model_output
        if i == len(times) - 1:
            out = self._prepared.denoise(sample, times[i])
        else:
            noise = RandomSource(generator, sample.device, sample.shape[0])
            out = self.sampler.step(self._prepared, sample, times[i], times[i + 1], self._state, noise, None)
        self._place = i + 1
        return SimpleNamespace(prev_sample=out) if return_dict else (out,)

    def _index(self, timestep: float) -> int:
        """Where in `timesteps` this one is: the next, or another one to start from, as image-to-image pipelines do."""
        near = lambda i: abs(self._asked[i] - timestep) <= 1e-4 * max(1.0, abs(timestep))  # noqa: E731
        i = self._place
        if i < len(self._asked) and near(i):
            return i
        found = [k for k in range(len(self._asked)) if near(k)]
        if not found or (i and self._prepared is not None and found[0] < i):
            raise ValueError(
                f"timestep {timestep:g} is not one of those to come, or all are done; call set_timesteps to start again."
            )
        self._prepared = None  # what a multistep method remembers ends here
        return found[0]

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """x_t for data x_0, unit noise and timesteps (B,) as in `timesteps`."""
        label = self.model.label
        if label.quantity != "time":
            raise ValueError("add_noise is for processes whose timesteps are steps, not noise levels.")
        return self.model.sde.perturb(original_samples, (timesteps.double() - label.shift) / label.scale, noise)

    def __len__(self) -> int:
        return int(self.config["options"].get("num_train_timesteps", 1000))
