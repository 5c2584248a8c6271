"""Models on disk: safetensors for the numbers, JSON for the rest, in one atomic file that carries a digest of itself.

Layer 3. `registry` turns objects into descriptions and back, `files` writes and reads files, `models` puts both together: a
model is a folder with `model.safetensors`, whose header carries the description, and `config.json`, the same for people.
"""

from scoresde.store.files import (
    WriteError,
    as_path,
    check_regular,
    check_writable,
    digest,
    is_ours,
    read_tensors,
    write_atomic,
    write_json,
    write_tensors,
)
from scoresde.store.models import (
    CONFIG_FILE,
    FORMAT,
    MODEL_FILE,
    load_model,
    load_samplers,
    load_weights,
    model_digest,
    model_folder,
    save_model,
    save_sampler,
)
from scoresde.store.registry import build, describe, register
from scoresde.store.sketch import on_meta, real_like, untouched_random

__all__ = [
    "CONFIG_FILE",
    "FORMAT",
    "MODEL_FILE",
    "WriteError",
    "as_path",
    "build",
    "check_regular",
    "check_writable",
    "describe",
    "digest",
    "is_ours",
    "load_model",
    "load_samplers",
    "load_weights",
    "model_digest",
    "model_folder",
    "on_meta",
    "read_tensors",
    "real_like",
    "register",
    "save_model",
    "save_sampler",
    "untouched_random",
    "write_atomic",
    "write_json",
    "write_tensors",
]
