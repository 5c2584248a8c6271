"""Which of several processes this one is. Layer 4."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping


def launched(environ: Mapping[str, str] = os.environ) -> tuple[int, int]:
    """(rank, size): this process among those of a launcher (torchrun, accelerate launch), from RANK and WORLD_SIZE.

    (0, 1) without a launcher. Raises `ValueError` where the two do not say which process of how many this is.
    """
    if environ.get("WORLD_SIZE", "1") == "1":
        return 0, 1
    try:
        rank, size = int(environ["RANK"]), int(environ["WORLD_SIZE"])
    except (KeyError, ValueError):
        rank, size = -1, 0
    if not 0 <= rank < size:
        raise ValueError(
            f"the environment has RANK={environ.get('RANK')}, WORLD_SIZE={environ['WORLD_SIZE']}; a launcher sets both, "
            "RANK from 0 to WORLD_SIZE - 1."
        )
    return rank, size


def share_of(shard: str | None, environ: Mapping[str, str] = os.environ) -> tuple[int, int]:
    """(k, n), the k-th of n parts with k from 0: from "2/8" (the second of eight), or else from the launcher.

    Raises `ValueError` where it is no such part, or where both speak.
    """
    if shard is None:
        return launched(environ)
    if environ.get("WORLD_SIZE", "1") != "1":
        raise ValueError(
            f"shard={shard} was given, but this is one of WORLD_SIZE={environ['WORLD_SIZE']} processes of a launcher, "
            "which take their parts by themselves; use one or the other."
        )
    found = re.fullmatch(r"([0-9]+)/([0-9]+)", shard)
    if not found or not 1 <= int(found[1]) <= int(found[2]):
        raise ValueError(f"shard must be k/n with k from 1 to n, as 2/8 for the second of eight parts, got {shard!r}.")
    return int(found[1]) - 1, int(found[2])
