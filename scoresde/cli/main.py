"""The command line: `scoresde demo | train | sample | tune | bpd | convert | info`. Layer 5."""

from __future__ import annotations

import inspect
import logging
import sys
import warnings

from scoresde.cli import commands
from scoresde.cli.demo import demo

COMMANDS = {
    "demo": demo,
    "train": commands.train,
    "sample": commands.sample,
    "tune": commands.tune,
    "bpd": commands.bpd,
    "convert": commands.convert,
    "info": commands.info,
}


def main(args: list[str] | None = None) -> int:
    """Run one command; 0 if it worked, 2 for bad input, 130 after an interrupt. Errors are one line, no traceback."""
    from jsonargparse import auto_parser

    from scoresde.train import TrainingInterrupted

    logging.getLogger("accelerate").setLevel(logging.ERROR)
    warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", file=sys.stderr)
    try:
        parser = auto_parser(
            COMMANDS,
            prog="scoresde",
            description="Continuous-time score-based generative models: train, sample, and measure bits/dim.",
        )
        chosen = parser.parse_args(args)
        command, values = COMMANDS[chosen.subcommand], chosen[chosen.subcommand].as_dict()
        # the parser's own --config, a file of these very arguments, is not for the command unless it has one itself
        known = inspect.signature(command).parameters
        command(**{k: v for k, v in values.items() if k in known})
    except TrainingInterrupted as e:
        print(f"\nstopped: {e}", file=sys.stderr)
        return 130
    except KeyboardInterrupt as e:
        print(f"\nstopped by Ctrl-C. {e}".rstrip(), file=sys.stderr)
        return 130
    except (ValueError, TypeError, OSError, RuntimeError, ImportError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
