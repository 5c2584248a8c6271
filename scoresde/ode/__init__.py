"""A small adaptive Runge-Kutta engine on batches of independent problems."""

from scoresde.ode.adaptive import MAX_NFE, NOT_FINITE, OK, STATUS_TEXT, STEP_TOO_SMALL, UNRESOLVED, Solution, solve
from scoresde.ode.tableaux import TABLEAUX, Tableau

__all__ = [
    "MAX_NFE",
    "NOT_FINITE",
    "OK",
    "STATUS_TEXT",
    "STEP_TOO_SMALL",
    "TABLEAUX",
    "UNRESOLVED",
    "Solution",
    "Tableau",
    "solve",
]
