"""A model around a model: what it does not change is the other's. Layer 2."""

from __future__ import annotations

from typing import Any

from scoresde.models.base import ScoreModel, require_model

# What is computed from the denoiser, which the wrapper changes, or with the model as a whole: never taken from inside.
_COMPUTED = frozenset(
    {"denoise", "noise", "predict", "score", "velocity", "output", "affine", "prepare", "time_of"}
    | {"save_pretrained", "push_to_hub", "from_pretrained"}
)


class WrappedModel(ScoreModel):
    """Base of models that change another's denoiser and nothing else: guidance, thresholds, mixtures of experts.

    A subclass gives `denoise`, which may ask `self.model`. Everything that a `ScoreModel` says of its process and of its data
    (`sde`, `sigma_data`, `event_shape`, `levels`, the hints to solvers, `flow_end`, `terminal_log_prob`, ...) is that of the model
    inside, as long as the subclass neither defines nor sets it; so is what `ScoreModel` learns to say later.

    Raises `TypeError` for a model that is no `ScoreModel`.
    """

    def __init__(self, model: ScoreModel):
        super().__init__()
        self.model = require_model(model)

    def __getattribute__(self, name: str) -> Any:
        # ScoreModel's defaults would hide the model inside from __getattr__, which is asked only for what is missing
        if name[0] != "_" and (name in _SAID or name in _DECLARED) and name not in _COMPUTED:
            return _delegated(self, name)
        return super().__getattribute__(name)


_SAID = vars(ScoreModel)  # which follows what is added to the class
_DECLARED = frozenset(ScoreModel.__annotations__)


def _delegated(wrapper: WrappedModel, name: str) -> Any:
    """The wrapper's own attribute where it has one, else the one of the model inside."""
    own = object.__getattribute__(wrapper, "__dict__")
    lookup = super(WrappedModel, wrapper).__getattribute__
    kinds = type(wrapper).__mro__
    if any(name in vars(kind) for kind in kinds[: kinds.index(ScoreModel)]):
        return lookup(name)
    if name in own or any(name in own.get(kept, ()) for kept in ("_buffers", "_modules", "_parameters")):
        return lookup(name)
    value = getattr(own["_modules"]["model"], name)
    function = getattr(value, "__func__", None)
    # a method that no model inside redefines works on what the wrapper says, which may be its own
    return value if function is None or function is not _SAID.get(name) else lookup(name)
