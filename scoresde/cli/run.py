"""The commands of `scoresde` and how one of them is run. Layer 5."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from jsonargparse import auto_parser

from scoresde.cli import commands
from scoresde.cli.demo import demo
from scoresde.cli.train import train
from scoresde.jobs import launched

COMMANDS: dict[str, Callable[..., Any]] = {
    "demo": demo,
    "train": train,
    "sample": commands.sample,
    "tune": commands.tune,
    "bpd": commands.bpd,
    "convert": commands.convert,
    "info": commands.info,
}
SHARED = ("train", "bpd", "info")  # what several processes of a launcher may run together


def run(args: list[str] | None = None) -> None:
    """Parse `args` (by default the program's own) and run the command that they name."""
    parser = auto_parser(
        COMMANDS,
        prog="scoresde",
        description="Continuous-time score-based generative models: train, sample, and measure bits/dim.",
    )
    chosen = parser.parse_args(args)
    name = chosen.subcommand
    command, values = COMMANDS[name], chosen[name].as_dict()
    size = launched()[1]
    if size > 1 and name not in SHARED:
        raise ValueError(
            f"scoresde {name} is the work of one process, and this is one of WORLD_SIZE={size} of a launcher; start it alone."
        )
    # the parser's own --config, a file of these very arguments, is not for the command unless it has one itself
    known = inspect.signature(command).parameters
    command(**{k: v for k, v in values.items() if k in known})
