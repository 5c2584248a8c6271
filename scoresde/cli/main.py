"""The command line: `scoresde demo | train | sample | tune | bpd | convert | info`. Layer 5."""

from __future__ import annotations

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
    from jsonargparse import auto_cli

    from scoresde.train import TrainingInterrupted

    logging.getLogger("accelerate").setLevel(logging.ERROR)
    warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", file=sys.stderr)
    try:
        auto_cli(
            COMMANDS,
            args=args,
            prog="scoresde",
            description="Continuous-time score-based generative models: train, sample, and measure bits/dim.",
        )
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
