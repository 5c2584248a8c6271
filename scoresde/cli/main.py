"""The command line: `scoresde demo | train | sample | tune | bpd | convert | info`. Layer 5.

This module imports nothing heavy, so that `main` is there to answer a Ctrl-C while torch is imported.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from typing import Any

INTERRUPTED = 130


def main(args: list[str] | None = None) -> int:
    """Run one command; 0 if it worked, 2 for bad input, 130 after an interrupt. Errors are one line, no traceback."""
    with _interrupts(whole_program=args is None) as asked:
        try:
            import logging
            import warnings

            from scoresde.cli.run import run
            from scoresde.train import TrainingInterrupted

            logging.getLogger("accelerate").setLevel(logging.ERROR)
            warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", file=sys.stderr)
            asked.starting = False
            try:
                run(args)
            except TrainingInterrupted as e:
                return asked.said(f"stopped: {e}")
        except KeyboardInterrupt as e:
            return asked.said(f"stopped by Ctrl-C. {e}")
        except (ValueError, TypeError, OSError, RuntimeError, ImportError, MemoryError) as e:
            if asked.times:  # a library made an error of its own of the interrupt
                return asked.said("stopped by Ctrl-C.")
            print(f"error: {' '.join(str(e).split()) or type(e).__name__}", file=sys.stderr)
            return 2
    return 0


class _Interrupts:
    """What Ctrl-C does: it raises `KeyboardInterrupt`, after which a command puts its files in order. While the program starts,
    and when it comes again, it ends the process: an exception in the middle of an import leaves a traceback, or is lost."""

    def __init__(self) -> None:
        self.starting, self.times = True, 0

    def __call__(self, number: int, frame: Any) -> None:
        self.times += 1
        if self.starting or self.times > 1:
            self.leave()
        raise KeyboardInterrupt

    def said(self, text: str) -> int:
        """Write the line that a stopped run ends with, after which it is not interrupted any more."""
        with contextlib.suppress(ValueError):  # not the main thread
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        print(f"\n{text.rstrip()}", file=sys.stderr)
        return INTERRUPTED

    def leave(self) -> None:
        """End the process as it is."""
        with contextlib.suppress(OSError):
            os.write(2, b"\nstopped by Ctrl-C.\n")
        os._exit(INTERRUPTED)

    def unraisable(self, what: Any) -> None:
        """Python drops an exception where none can be raised, as in a finaliser; an interrupt is not to be dropped."""
        if issubclass(what.exc_type, KeyboardInterrupt):
            self.leave()
        sys.__unraisablehook__(what)


@contextlib.contextmanager
def _interrupts(whole_program: bool) -> Iterator[_Interrupts]:
    """`_Interrupts` as the answer to Ctrl-C inside; as before outside, except that nothing interrupts a program's end."""
    asked = _Interrupts()
    before, hook = signal.getsignal(signal.SIGINT), sys.unraisablehook
    try:
        if before is signal.default_int_handler:  # not where someone has decided otherwise, as nohup does
            signal.signal(signal.SIGINT, asked)
    except ValueError:  # not the main thread, which alone hears signals
        before = None
    sys.unraisablehook = asked.unraisable
    try:
        yield asked
    finally:
        sys.unraisablehook = hook
        if before is not None:
            signal.signal(signal.SIGINT, signal.SIG_IGN if whole_program else before)


if __name__ == "__main__":
    sys.exit(main())
