"""Integer images from scikit-learn's digits, .npz files and image folders. Layer 4."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from scoresde import checks
from scoresde.data.files import check_size, read_image, read_npz

SPLITS = ("train", "validation", "test")
DIGITS_SIZES = (1300, 200, 297)
DIGITS_LEVELS = 17
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff")


@dataclass(frozen=True)
class Images:
    """Integer images: `values` (N, c, *size) int64 in 0..levels-1, and what to call them."""

    values: Tensor
    levels: int
    name: str

    def __post_init__(self) -> None:
        checks.integers(self.values, self.levels, self.name)
        if self.values.dim() < 3 or not self.values.shape[0]:
            raise ValueError(
                f"{self.name} must hold at least one image of shape (c, *size), got {tuple(self.values.shape)}."
            )

    def __len__(self) -> int:
        return self.values.shape[0]

    @property
    def event_shape(self) -> tuple[int, ...]:
        return tuple(self.values.shape[1:])


def digits(split: str) -> Images:
    """Scikit-learn's handwritten digits (UCI, 8x8, 17 grey levels): 1,300 train, 200 validation, 297 test, fixed.

    `split` is one of "train", "validation", "test". The order is a permutation by NumPy's generator of seed 0.
    """
    from sklearn.datasets import load_digits

    checks.choice(split, SPLITS, "split of the digits")
    values = load_digits().images.astype(np.int64)
    order = np.random.default_rng(0).permutation(len(values))
    bounds = np.cumsum((0, *DIGITS_SIZES))
    i = SPLITS.index(split)
    chosen = values[order[bounds[i] : bounds[i + 1]]]
    return Images(torch.from_numpy(chosen)[:, None], DIGITS_LEVELS, f"digits:{split}")


def load_images(source: str, levels: int | None = None) -> Images:
    """Images by name: "digits:test", "file.npz", "file.npz:key", or a folder of image files.

    `levels` is 256 for image files and must be given for .npz files. An .npz array is (N, h, w), (N, c, h, w) or
    (N, h, w, 3), of integers. Raises `FileNotFoundError`, `TypeError` for floats, and `ValueError` naming the file
    that is empty, damaged, no regular file, of another size than the first, or too large (2**29 numbers in all; an archive that
    unpacks to 100 times its size): headers are looked at before memory is taken.
    """
    head, _, tail = source.partition(":")
    if head == "digits":
        if levels not in (None, DIGITS_LEVELS):
            raise ValueError(f"the digits have {DIGITS_LEVELS} levels, got levels={levels}.")
        return digits(tail or "test")
    archive, _, key = source.partition(".npz:")
    path = Path(archive + ".npz" if key else source)
    if path.is_dir():
        return _folder(path, 256 if levels is None else levels)
    if not path.exists():
        raise FileNotFoundError(
            f"there is no data at {source!r}; give digits:test, an .npz file or a folder of images."
        )
    if path.suffix != ".npz":
        raise ValueError(f"{path} is neither an .npz file nor a folder of images.")
    if levels is None:
        raise ValueError("an .npz file does not say how many levels its data have; pass levels (256 for 8-bit images).")
    return _npz(path, key, levels)


def _npz(path: Path, key: str, levels: int) -> Images:
    key, array = read_npz(path, key)
    if array.ndim == 3:
        array = array[:, None]
    elif array.ndim == 4 and array.shape[-1] in (1, 3) and array.shape[1] not in (1, 3):
        array = np.moveaxis(array, -1, 1)
    if array.ndim < 4:
        raise ValueError(f"{path}:{key} must have shape (N, h, w), (N, c, h, w) or (N, h, w, c), got {array.shape}.")
    return Images(torch.from_numpy(array.astype(np.int64)), levels, f"{path.name}:{key}")


def _folder(path: Path, levels: int) -> Images:
    files = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES)
    if not files:
        raise ValueError(f"{path} holds no image files ({', '.join(SUFFIXES)}).")
    arrays: list[np.ndarray] = []
    for file in files:
        array = read_image(file)
        array = array[None] if array.ndim == 2 else np.moveaxis(array, -1, 0)
        if arrays and array.shape != arrays[0].shape:
            raise ValueError(
                f"{file} has shape {array.shape}, the first image {arrays[0].shape}; all must be of one size."
            )
        if not arrays:
            check_size(len(files) * array.size, f"{path} with {len(files)} images of {array.shape}")
        arrays.append(array)
    return Images(torch.from_numpy(np.stack(arrays).astype(np.int64)), levels, path.name)
