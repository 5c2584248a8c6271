"""The Hugging Face hub: models of ours up and down, other people's down. Layer 4; `huggingface_hub` is imported when used."""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path, PurePosixPath

from scoresde.models.base import ScoreModel
from scoresde.store import as_path, load_model, save_model

_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[\w.-]+$")
_FOLDERS = {".", "unet", "unet_ema", "transformer", "scheduler", "model"}


def is_hub_id(name: str) -> bool:
    """Whether a name that is no path here has the form of a repository's, "owner/name"."""
    return bool(_ID.match(name))


def wanted_files(files: list[str]) -> list[str]:
    """Of a repository's files those that `load` may need: options, and weights as safetensors or else as `.bin`, in half precision
    where there are no others."""
    chosen: list[str] = []
    for folder in sorted({str(PurePosixPath(name).parent) for name in files} & _FOLDERS):
        here = [name for name in files if str(PurePosixPath(name).parent) == folder]
        weights = [
            n for n in here if re.search(r"\.(safetensors|bin)(\.index(\.fp16)?\.json)?$", n) and "non_ema" not in n
        ]
        weights = [
            n for n in weights if not n.endswith("bin") or PurePosixPath(n).name.startswith("diffusion_pytorch_model")
        ]
        kinds = [
            [n for n in weights if (".fp16" in n) == half and kind in n]
            for half in (0, 1)
            for kind in (".safe", ".bin")
        ]
        taken = set(next((k for k in kinds if k), []))
        chosen += [n for n in here if n in taken or (n.endswith(".json") and ".index." not in n)]
    return [name for name in files if name in chosen]


def download(repo_id: str, revision: str | None = None) -> Path:
    """The folder of a repository's options and weights in the local cache.

    Raises `FileNotFoundError` where it cannot be had: neither a path here nor a repository, no network, or no right to it.
    """
    import huggingface_hub

    try:
        files = wanted_files(huggingface_hub.HfApi().list_repo_files(repo_id, revision=revision))
        return Path(huggingface_hub.snapshot_download(repo_id, revision=revision, allow_patterns=files))
    except Exception as first:
        try:  # without a network what was downloaded before is still good
            return Path(huggingface_hub.snapshot_download(repo_id, revision=revision, local_files_only=True))
        except Exception:
            raise FileNotFoundError(
                f"there is no file or folder {repo_id}, and it could not be had from the hub either "
                f"({type(first).__name__}: {str(first).strip().splitlines()[0][:160]})."
            ) from first


def save_pretrained(model: ScoreModel, folder: str | os.PathLike[str]) -> Path:
    """Write a model into a folder as `model.safetensors` and `config.json`, each atomically; returns the folder.

    The configuration holds the network's options, the SDE, parameterization, noise label, data scaling, levels, and the
    version of this package. Raises `TypeError` for networks and SDEs that are not the package's own.
    """
    return save_model(model, folder)


def from_pretrained(path_or_hub_id: str | os.PathLike[str], *, revision: str | None = None) -> ScoreModel:
    """The model that `save_pretrained` wrote or `push_to_hub` uploaded, on the CPU, in evaluation mode.

    `revision` is a branch, tag or commit on the hub. Raises `FileNotFoundError` where there is none and `ValueError` for a
    damaged file, or one of a newer version of this package.
    """
    if as_path(path_or_hub_id, "path_or_hub_id").exists() or not is_hub_id(str(path_or_hub_id)):
        return load_model(path_or_hub_id)
    return load_model(download(str(path_or_hub_id), revision))


def push_to_hub(
    model: ScoreModel,
    repo_id: str,
    *,
    private: bool = False,
    token: str | None = None,
    commit_message: str = "Upload a score model",
) -> str:
    """Save the model and upload it to the repository "owner/name", which is made if need be; returns the commit's address.

    `token` as in huggingface_hub, where a stored login is used without one.
    """
    import huggingface_hub

    if not is_hub_id(repo_id):
        raise ValueError(f"repo_id must have the form 'owner/name', got {repo_id!r}.")
    api = huggingface_hub.HfApi(token=token)
    with tempfile.TemporaryDirectory() as folder:
        save_model(model, folder)  # before the repository is made: a model that cannot be saved leaves none behind
        api.create_repo(repo_id, private=private, exist_ok=True)
        info = api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=commit_message)
    return str(info.commit_url)
