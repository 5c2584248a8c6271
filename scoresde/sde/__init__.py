"""Forward processes: alpha(t) and sigma(t), and all that follows from them."""

from scoresde.sde.base import SDE, check_monotone, expand, sum_event
from scoresde.sde.beta import DiscreteVPSDE
from scoresde.sde.processes import EDMSDE, VESDE, VPSDE, CosineSDE, RectifiedFlow, SubVPSDE

SDES: dict[str, type[SDE]] = {
    c.__name__: c for c in (VPSDE, SubVPSDE, VESDE, CosineSDE, EDMSDE, RectifiedFlow, DiscreteVPSDE)
}

__all__ = [
    "EDMSDE",
    "SDE",
    "SDES",
    "VESDE",
    "VPSDE",
    "CosineSDE",
    "DiscreteVPSDE",
    "RectifiedFlow",
    "SubVPSDE",
    "check_monotone",
    "expand",
    "sum_event",
]
