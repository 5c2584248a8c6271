"""The processes behind the schedulers of other libraries: from discrete steps to continuous time. Layer 4."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from scoresde.interop.files import step_count
from scoresde.models.network import NoiseLabel
from scoresde.sde import SDE, VESDE, DiscreteVPSDE, RectifiedFlow

# those whose betas are the process; what else a name may do to them is refused below
DISCRETE = """
    DDPM DDPMParallel DDIM DDIMParallel DDIMInverse PNDM UniPCMultistep DEISMultistep DPMSolverMultistep
    DPMSolverMultistepInverse DPMSolverSinglestep DPMSolverSDE EulerDiscrete EulerAncestralDiscrete HeunDiscrete
    KDPM2Discrete KDPM2AncestralDiscrete LMSDiscrete SASolver
"""
FLOWS = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler")
OPTIONS = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type")
PREDICTIONS = {"epsilon": "noise", "v_prediction": "v_prediction", "sample": "denoise"}


def betas_of(options: Mapping[str, Any]) -> np.ndarray:
    """The betas of a schedule as diffusers describes it, float64: `beta_schedule` and what belongs to it.

    Raises `ValueError` for a schedule that is not known, or one that ends without any signal.
    """
    if options.get("rescale_betas_zero_snr"):
        raise ValueError(
            "rescale_betas_zero_snr=True ends without signal, where the noise prediction says nothing of the data."
        )
    if options.get("trained_betas") is not None:
        return np.asarray(options["trained_betas"], dtype=np.float64)
    n = step_count(options.get("num_train_timesteps", 1000), "num_train_timesteps")
    first, last = float(options.get("beta_start", 1e-4)), float(options.get("beta_end", 0.02))
    kind = options.get("beta_schedule", "linear")
    if kind == "linear":
        return np.linspace(first, last, n)
    if kind == "scaled_linear":
        return np.linspace(first**0.5, last**0.5, n) ** 2
    if kind == "squaredcos_cap_v2":  # Nichol & Dhariwal 2021, equation 17
        bar = np.cos((np.arange(n + 1) / n + 0.008) / 1.008 * np.pi / 2) ** 2
        return np.minimum(1 - bar[1:] / bar[:-1], 0.999)
    if kind == "sigmoid":
        return first + (last - first) / (1 + np.exp(-np.linspace(-6, 6, n)))
    raise ValueError(f"beta_schedule {kind!r} is not known; give trained_betas, one number for each step.")


def process_of_scheduler(options: Mapping[str, Any] | None, fourier: bool, source: str) -> tuple[SDE, str, NoiseLabel]:
    """(SDE, parameterization, label) of a network trained for a scheduler of diffusers with these options.

    A network with Fourier features is one of the variance exploding kind, whatever the scheduler. Raises `ValueError` where
    there are no options, or ones that are not known.
    """
    if options is None:
        raise ValueError(
            f"{source} has no scheduler_config.json; give config=, for example dict(beta_start=0.0001, beta_end=0.02, "
            "beta_schedule='linear', num_train_timesteps=1000), or dict(sigma_min=0.01, sigma_max=348) for NCSN++."
        )
    name = str(options.get("_class_name", ""))
    if name == "SamplerScheduler":  # one of ours, around the options of the original
        return process_of_scheduler(options["options"], fourier, source)
    if fourier or name == "ScoreSdeVeScheduler":
        try:
            sde = VESDE(float(options["sigma_min"]), float(options["sigma_max"]))
        except KeyError as e:
            raise ValueError(f"the scheduler of {source} lacks {e}, which a variance exploding process needs.") from e
        return sde, "scaled_score", NoiseLabel("log_sigma")
    if name in FLOWS:
        count = step_count(options.get("num_train_timesteps", 1000), "num_train_timesteps")
        return RectifiedFlow(), "velocity", NoiseLabel("time", float(count))
    _refuse_schedule(options, name, source)
    prediction = options.get("prediction_type", "epsilon")
    if prediction not in PREDICTIONS:
        raise ValueError(f"prediction_type {prediction!r} is not known; known are {', '.join(PREDICTIONS)}.")
    discrete = DiscreteVPSDE(tuple(betas_of(options).tolist()))
    return discrete, PREDICTIONS[prediction], NoiseLabel("time", len(discrete.betas) - 1.0)


def _refuse_schedule(options: Mapping[str, Any], name: str, source: str) -> None:
    """`ValueError` for options under which the betas are not the whole truth, or that say nothing about them."""
    if name and name.removesuffix("Scheduler") not in DISCRETE.split():
        raise ValueError(
            f"the schedule of {name} is not known; wrap the network by WrappedNet with the SDE it was trained for, or "
            "give config= with the betas."
        )
    for key, plain in (("timestep_type", "discrete"), ("snr_shift_scale", 1.0), ("use_flow_sigmas", False)):
        if options.get(key) not in (None, plain):
            raise ValueError(f"{name} with {key}={options[key]!r} is not supported; only {plain!r} is.")
    if not name:
        unknown = [k for k in options if k not in OPTIONS and not k.startswith("_")]
        if unknown or not any(k in options for k in OPTIONS):
            raise ValueError(
                f"config= for {source} must hold options of its scheduler ({', '.join(OPTIONS)}; sigma_min and sigma_max for "
                f"NCSN++), got {', '.join(map(str, unknown)) or 'none'}."
            )
