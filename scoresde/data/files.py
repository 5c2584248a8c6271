"""Arrays from files that may not be what they say: shapes and sizes are looked at before memory is taken. Layer 4."""

from __future__ import annotations

import math
import stat
import warnings
import zipfile
from pathlib import Path
from typing import IO, Any

import numpy as np

FORMATS = ("PNG", "JPEG", "BMP", "WEBP", "TIFF")  # the image library knows others, one of which starts a program
MAX_VALUES = 2**29  # numbers that a data set may have (4 GiB as it is held)
MAX_RATIO = (
    100  # an archive that unpacks to more than so many times its size, and to more than LARGE, is no set of images
)
LARGE = 2**26


def check_regular(path: Path) -> None:
    """`ValueError` unless `path` is an ordinary file: reading a pipe or a device may never end."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise ValueError(f"{path} is not a regular file; pipes, devices and the like are not read.")


class _Refused(ValueError):
    """What is wrong with a readable file, in words."""


class _NoIntegers(TypeError):
    """Another kind of array."""


def check_size(values: int, what: str) -> None:
    """`ValueError` for more than `MAX_VALUES` numbers."""
    if values > MAX_VALUES:
        raise _Refused(f"{what} promises {values:,} numbers; at most {MAX_VALUES:,} are read at once.")


def read_npz(path: Path, key: str) -> tuple[str, np.ndarray]:
    """(name, array) of an .npz file: the one named `key`, or else the one named images, or the only one.

    Raises `TypeError` unless it holds integers, and `ValueError` naming the file where there is no such array, where it is
    damaged, is larger than `MAX_VALUES`, or unpacks to many times what it takes on disk.
    """
    check_regular(path)
    try:
        with zipfile.ZipFile(path) as archive:
            members = {m.filename.removesuffix(".npy"): m for m in archive.infolist() if m.filename.endswith(".npy")}
            name = _choose(path, key, list(members))
            with archive.open(members[name]) as file:
                dtype, header = _announced(file, f"{path}:{name}")
            if dtype.kind not in "ui":
                raise _NoIntegers(f"{path}:{name} must hold integers, got dtype {dtype}; store the raw pixels.")
            _check_member(path, members[name], header)
            with archive.open(members[name]) as file:
                return name, np.lib.format.read_array(file, allow_pickle=False)
    except (_Refused, _NoIntegers):
        raise
    except Exception as e:  # of many kinds: the archive, its compression and the array's header are three formats
        raise ValueError(f"{path} is not a readable .npz file ({e}).") from e


def _choose(path: Path, key: str, names: list[str]) -> str:
    if not key and len(names) != 1 and "images" not in names:
        raise _Refused(
            f"{path} holds {', '.join(names) or 'nothing'}; name one, as {path}:{names[0] if names else 'KEY'}."
        )
    key = key or ("images" if "images" in names else names[0])
    if key not in names:
        raise _Refused(f"{path} has no array {key!r}; it holds {', '.join(names)}.")
    return key


def _announced(file: IO[bytes], what: str) -> tuple[np.dtype, int]:
    """The type of a member, and the bytes that its header takes and promises."""
    version = np.lib.format.read_magic(file)
    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}.get(version)
    if read is None:
        raise ValueError(f"version {version} of the .npy format")
    shape, _, dtype = read(file)
    if dtype.hasobject:
        raise ValueError("it holds pickled Python objects, which are not read")
    check_size(math.prod(shape), what)
    return dtype, file.tell() + math.prod(shape) * dtype.itemsize


def _check_member(path: Path, member: zipfile.ZipInfo, announced: int) -> None:
    if announced != member.file_size:
        raise ValueError(f"{member.filename} has {member.file_size} bytes and announces {announced}")
    if member.file_size > LARGE and member.file_size > MAX_RATIO * max(member.compress_size, 1):
        raise _Refused(
            f"{path} unpacks {member.compress_size:,} bytes to {member.file_size:,}, more than {MAX_RATIO} times as many; that is "
            "no set of images. Store it uncompressed (numpy.savez) if it is."
        )


def read_image(path: Path) -> np.ndarray:
    """An image file as (h, w) or (h, w, 3), uint8. Raises `ValueError` naming it for anything but an 8-bit grey or RGB image of
    one of `FORMATS`."""
    from PIL import Image

    check_regular(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=FORMATS) as image:
                check_size(math.prod(image.size) * len(image.getbands()), str(path))  # before a pixel is decoded
                return _pixels(image)
    except _Refused:
        raise
    except Exception as e:  # of many kinds, for the decoders check what they read in many ways
        text = str(e) or type(e).__name__
        raise ValueError(f"{path} is not a readable image ({text}); remove or replace it.") from e


def _pixels(image: Any) -> np.ndarray:
    opaque = image.mode == "RGBA" and image.getextrema()[3][0] == 255
    if image.mode not in ("1", "L", "P", "RGB") and not opaque:
        raise ValueError(f"mode {image.mode}; convert it to 8-bit grey or RGB, or store the data as .npz")
    return np.asarray(image if image.mode in ("L", "RGB") else image.convert("RGB"))
