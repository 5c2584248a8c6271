"""Digits, .npz files, image folders and augmentation: what is read, what is refused, and that labels tell the truth."""

import hashlib
import io
import os
import struct
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import scoresde
from scoresde.data import AUGMENTATION_DIM, SPLITS, Images, augmented, digits, files, load_images

# -- digits ----------------------------------------------------------------------------------------------------------


def test_digits_sizes_levels_and_shape():
    """1,300 + 200 + 297 images of 1 x 8 x 8 in 17 levels, all of which occur."""
    sizes = {s: digits(s).values.shape for s in SPLITS}
    assert sizes == {"train": (1300, 1, 8, 8), "validation": (200, 1, 8, 8), "test": (297, 1, 8, 8)}
    train = digits("train")
    assert train.levels == 17
    assert train.values.dtype == torch.int64
    assert train.values.unique().tolist() == list(range(17))
    assert train.event_shape == (1, 8, 8)
    assert len(train) == 1300
    assert train.name == "digits:train"


def test_digits_order_is_fixed():
    """The splits never change: published bits/dim are of these images."""
    sums = {s: hashlib.sha256(digits(s).values.numpy().astype(np.uint8).tobytes()).hexdigest()[:16] for s in SPLITS}
    assert sums == {"train": "9d5ef97b8ccda1f0", "validation": "1a5082f5559d9cb4", "test": "5a5cef63efc660ef"}


def test_digits_are_all_of_them_once():
    """The three splits together are the data set of scikit-learn, no image twice as far as that one has none twice."""
    from sklearn.datasets import load_digits

    whole = sorted(v.tobytes() for v in load_digits().images.astype(np.int64))
    ours = sorted(v.numpy().tobytes() for s in SPLITS for v in digits(s).values)
    assert ours == whole
    keys = [{v.numpy().tobytes() for v in digits(s).values} for s in SPLITS]
    assert len(keys[0] | keys[1] | keys[2]) == sum(map(len, keys))


def test_digits_by_name():
    """ "digits" alone is the test set; an unknown split and other levels are refused."""
    assert torch.equal(load_images("digits").values, digits("test").values)
    assert torch.equal(load_images("digits:validation", 17).values, digits("validation").values)
    with pytest.raises(ValueError, match=r"'valid'.*train, validation, test"):
        load_images("digits:valid")
    with pytest.raises(ValueError, match="17 levels, got levels=256"):
        load_images("digits:test", 256)


# -- npz -------------------------------------------------------------------------------------------------------------


def saved(path, **arrays):
    np.savez(path, **arrays)
    return str(path)


def ramp(*shape, top=4, dtype=np.uint8):
    return (np.arange(np.prod(shape)) % (top + 1)).reshape(shape).astype(dtype)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ((6, 2, 4), (6, 1, 2, 4)),
        ((6, 1, 2, 4), (6, 1, 2, 4)),
        ((6, 3, 2, 4), (6, 3, 2, 4)),
        ((6, 2, 4, 3), (6, 3, 2, 4)),
        ((6, 2, 4, 1), (6, 1, 2, 4)),
        ((6, 5, 2, 4), (6, 5, 2, 4)),
        ((6, 1, 2, 4, 2), (6, 1, 2, 4, 2)),
    ],
    ids=str,
)
def test_npz_shapes(tmp_path, given, expected):
    """Grey, channels first, channels last and volumes: each pixel lands where it belongs."""
    array = ramp(*given)
    images = load_images(saved(tmp_path / "a.npz", images=array), 5)
    assert tuple(images.values.shape) == expected
    assert images.values.dtype == torch.int64
    if len(given) == 4 and given != expected:
        assert np.array_equal(images.values.numpy(), np.transpose(array, (0, 3, 1, 2)))
    else:
        assert np.array_equal(images.values.numpy().reshape(given), array)


def test_npz_keys(tmp_path):
    """The only array or the one named images is taken, another by its name; otherwise the names are listed."""
    a, b = ramp(3, 2, 2), ramp(5, 2, 2)
    one = saved(tmp_path / "one.npz", whatever=a)
    assert len(load_images(one, 5)) == 3
    two = saved(tmp_path / "two.npz", images=a, others=b)
    assert len(load_images(two, 5)) == 3
    assert len(load_images(two + ":others", 5)) == 5
    assert load_images(two + ":others", 5).name == "two.npz:others"
    unclear = saved(tmp_path / "unclear.npz", x=a, y=b)
    with pytest.raises(ValueError, match=r"holds x, y; name one, as .*unclear\.npz:x"):
        load_images(unclear, 5)
    with pytest.raises(ValueError, match=r"no array 'z'; it holds x, y"):
        load_images(unclear + ":z", 5)
    with pytest.raises(ValueError, match="holds nothing"):
        load_images(saved(tmp_path / "nothing.npz"), 5)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, bool, np.complex64, "U3"])
def test_npz_must_hold_integers(tmp_path, dtype):
    """Floats and the like are refused with their dtype: they are scaled, or no images."""
    with pytest.raises(TypeError, match="must hold integers"):
        load_images(saved(tmp_path / "a.npz", images=ramp(3, 2, 2).astype(dtype)), 5)


def test_npz_levels(tmp_path):
    """Levels must be given, and hold all values: no hidden 256."""
    path = saved(tmp_path / "a.npz", images=ramp(3, 2, 2, top=5, dtype=np.int16))
    with pytest.raises(ValueError, match="pass levels"):
        load_images(path)
    with pytest.raises(ValueError, match="minimum 0 and maximum 5"):
        load_images(path, 5)
    assert load_images(path, 6).levels == 6
    with pytest.raises(ValueError, match="minimum -1"):
        load_images(saved(tmp_path / "b.npz", images=ramp(3, 2, 2).astype(np.int64) - 1), 5)


def test_npz_damaged(tmp_path):
    """Truncated, not a zip, or an array inside it cut off: each is a ValueError that names the file."""
    path = tmp_path / "a.npz"
    saved(path, images=ramp(50, 8, 8))
    whole = path.read_bytes()
    for name, content in [("cut.npz", whole[: len(whole) // 2]), ("text.npz", b"no zip at all"), ("none.npz", b"")]:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=name):
            load_images(str(tmp_path / name), 5)
    with zipfile.ZipFile(path) as archive:
        array = archive.read("images.npy")
    inner = tmp_path / "inner.npz"
    with zipfile.ZipFile(inner, "w") as archive:
        archive.writestr("images.npy", array[: len(array) // 2])
    with pytest.raises(ValueError, match=r"inner\.npz"):
        load_images(str(inner), 5)


@pytest.mark.parametrize("writer", [np.savez, np.savez_compressed], ids=["stored", "compressed"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.75])
def test_npz_with_a_flipped_byte(tmp_path, writer, share):
    """Damage in the pixels is found by the archive's check sum and reported with the file, not read as pixels."""
    path = tmp_path / "a.npz"
    writer(path, images=pixels(50, 8, 8))
    whole = path.read_bytes()
    at = 200 + int(share * (len(whole) - 500))
    path.write_bytes(whole[:at] + bytes([whole[at] ^ 255]) + whole[at + 1 :])
    with pytest.raises(ValueError, match=r"a\.npz"):
        load_images(str(path), 256)


def test_npz_with_pickled_objects_is_refused(tmp_path):
    """Arrays of objects are pickles; they are not opened."""
    path = tmp_path / "a.npz"
    np.savez(path, images=np.array([{"a": 1}, None], dtype=object))
    with pytest.raises(ValueError, match=r"a\.npz"):
        load_images(str(path), 5)


def test_npz_of_a_wrong_rank_or_empty(tmp_path):
    """Vectors and single images are refused with their shape, as is an empty set."""
    for shape in [(6,), (4, 4)]:
        with pytest.raises(ValueError, match="must have shape"):
            load_images(saved(tmp_path / "a.npz", images=ramp(*shape)), 5)
    with pytest.raises(ValueError, match="at least one image"):
        load_images(saved(tmp_path / "b.npz", images=np.zeros((0, 4, 4), np.uint8)), 5)


def test_sources_that_are_not_there(tmp_path):
    """A missing path says what can be given; a file of another kind is named."""
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_images(str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match="absent"):
        load_images(str(tmp_path / "absent.npz:images"), 5)
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(ValueError, match=r"notes\.txt is neither"):
        load_images(str(tmp_path / "notes.txt"))


# -- folders ---------------------------------------------------------------------------------------------------------


def pixels(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


@pytest.mark.parametrize("shape", [(5, 7), (5, 7, 3)], ids=["grey", "RGB"])
def test_a_folder_of_images(tmp_path, shape):
    """PNG files, also in subfolders, in the order of their paths, pixel for pixel, with 256 levels."""
    arrays = [pixels(*shape, seed=s) for s in range(3)]
    (tmp_path / "c").mkdir()
    for name, array in zip(("b.png", "a.PNG", "c/d.png"), arrays, strict=True):
        Image.fromarray(array).save(tmp_path / name, format="PNG")
    (tmp_path / "readme.txt").write_text("not an image")
    images = load_images(str(tmp_path))
    assert images.levels == 256
    expected = np.stack([arrays[i] for i in (1, 0, 2)])
    expected = expected[:, None] if len(shape) == 2 else np.moveaxis(expected, -1, 1)
    assert np.array_equal(images.values.numpy(), expected)


def test_palettes_and_transparency_become_rgb(tmp_path):
    """Modes other than grey and RGB are converted, so that colours and not indices are learned."""
    colour = Image.fromarray(pixels(4, 4, 3))
    colour.convert("P").save(tmp_path / "a.png")
    colour.convert("RGBA").save(tmp_path / "b.png")
    images = load_images(str(tmp_path))
    assert tuple(images.values.shape) == (2, 3, 4, 4)
    assert np.array_equal(images.values[1].numpy(), np.moveaxis(np.asarray(colour), -1, 0))


def test_a_corrupt_image_is_named(tmp_path):
    """Cut in the middle, or no image at all: the message holds the file, and none is skipped."""
    Image.fromarray(pixels(16, 16)).save(tmp_path / "a.png")
    whole = (tmp_path / "a.png").read_bytes()
    for name, content in [("cut.png", whole[: len(whole) // 2]), ("text.jpg", b"hello"), ("empty.png", b"")]:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name} is not a readable image"):
            load_images(str(tmp_path))
        (tmp_path / name).unlink()


def test_mixed_sizes_are_named(tmp_path):
    """The first file of another size, or number of channels, is named with both shapes."""
    Image.fromarray(pixels(4, 4)).save(tmp_path / "a.png")
    Image.fromarray(pixels(4, 6)).save(tmp_path / "b.png")
    with pytest.raises(ValueError, match=r"b\.png has shape \(1, 4, 6\), the first image \(1, 4, 4\)"):
        load_images(str(tmp_path))
    Image.fromarray(pixels(4, 4, 3)).save(tmp_path / "b.png")
    with pytest.raises(ValueError, match=r"b\.png has shape \(3, 4, 4\)"):
        load_images(str(tmp_path))


def test_an_empty_folder(tmp_path):
    """Says what it looked for."""
    with pytest.raises(ValueError, match=r"holds no image files \(\.png"):
        load_images(str(tmp_path))


def test_fewer_levels_than_the_files_hold(tmp_path):
    """levels= is checked against the pixels."""
    Image.fromarray(np.full((4, 4), 200, np.uint8)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match="maximum 200"):
        load_images(str(tmp_path), 16)


# -- Images ----------------------------------------------------------------------------------------------------------


def test_images_are_checked():
    """Floats, values outside the levels, no image at all and images without a spatial axis are refused by name."""
    with pytest.raises(TypeError, match="mine must hold integers"):
        Images(torch.zeros(2, 1, 4, 4), 5, "mine")
    with pytest.raises(ValueError, match=r"mine must lie in 0\.\.4"):
        Images(torch.full((2, 1, 4, 4), 5), 5, "mine")
    for shape in [(0, 1, 4, 4), (3, 4)]:
        with pytest.raises(ValueError, match="mine must hold at least one image"):
            Images(torch.zeros(shape, dtype=torch.int64), 5, "mine")
    assert Images(torch.zeros(2, 1, 4, dtype=torch.uint8), 5, "mine").event_shape == (1, 4)


# -- augmentation ----------------------------------------------------------------------------------------------------


def blob(n=4, channels=1, size=8, seed=0):
    """Random integer images whose border is empty."""
    g = torch.Generator().manual_seed(seed)
    k = torch.zeros(n, channels, size, size, dtype=torch.int64)
    k[..., 2:-2, 2:-2] = torch.randint(1, 17, (n, channels, size - 4, size - 4), generator=g)
    return k


@settings(max_examples=15, deadline=None)
@given(
    n=st.integers(1, 4),
    channels=st.sampled_from([1, 3]),
    levels=st.sampled_from([2, 17, 256]),
    copies=st.integers(0, 3),
    seed=st.integers(0, 2**40),
)
def test_augmented_shapes_and_range(n, channels, levels, copies, seed):
    """N (4 + copies) images within the levels; every label is that of a changed image, never all zeros."""
    g = torch.Generator().manual_seed(1)
    k = torch.randint(0, levels, (n, channels, 6, 8), generator=g)
    values, labels = augmented(k, levels, copies=copies, seed=seed)
    assert tuple(values.shape) == (n * (4 + copies), channels, 6, 8)
    assert tuple(labels.shape) == (n * (4 + copies), AUGMENTATION_DIM)
    assert values.dtype == torch.int64
    assert labels.dtype == torch.float32
    assert int(values.min()) >= 0
    assert int(values.max()) < levels
    assert bool((labels[:, 0] == 1).all())


def test_augmentation_is_seeded():
    """The same seed gives the same images, another one others; the global states stay as they were."""
    k = blob()
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    first, again, other = (augmented(k, 17, seed=s) for s in (3, 3, 4))
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[0], other[0])
    assert torch.equal(before[0], torch.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1])
    assert torch.equal(k, blob())


def test_shift_labels_are_true():
    """Where the label says a shift by (dy, dx), the image is the one that NumPy shifts by as much."""
    k = blob(5)
    values, labels = augmented(k, 17, copies=2)
    whole = labels[:, 7] == 1
    assert int(whole.sum()) == 4 * 5
    assert not bool(labels[~whole, 7].any())
    seen = set()
    for j in whole.nonzero().flatten().tolist():
        dy, dx = (int(v) for v in labels[j, 1:3])
        seen.add((dy, dx))
        assert not bool(labels[j, 3:7].any())
        expected = np.roll(k[j % 5].numpy(), (dy, dx), axis=(1, 2))  # the border is empty
        assert np.array_equal(values[j].numpy(), expected)
    assert seen == {(0, -1), (0, 1), (-1, 0), (1, 0)}


def test_a_shift_brings_in_background():
    """A full image that moves leaves zeros behind, it does not wrap around."""
    values, labels = augmented(torch.full((1, 1, 4, 4), 3), 5, copies=0)
    for k, label in zip(values, labels, strict=True):
        dy, dx = label[1:3].tolist()
        edge = k[0, 0 if dy > 0 else -1] if dy else k[0, :, 0 if dx > 0 else -1]
        assert not bool(edge.any())
        assert int((k == 3).sum()) == 12


def test_affine_labels_are_true():
    """The centre of mass moves as the label's shift says, and the spread grows as its log-scales say."""
    size = 24
    p = torch.arange(size) - (size - 1) / 2
    disc = 250 * torch.exp(-0.5 * (p[:, None] ** 2 + p**2) / 3.0**2)
    k = disc.round().long()[None, None]
    values, labels = augmented(k, 256, copies=24, seed=1)
    rows = labels[:, 7] == 0
    weight = values[rows, 0].double()
    mass = weight.sum((1, 2))
    y, x = (weight.sum(2) * p).sum(1) / mass, (weight.sum(1) * p).sum(1) / mass
    label = labels[rows].double()
    moved = torch.stack([y, x], 1)
    # the map goes from output to input, so the picture moves against the offset; scales of 8 % act on the shift
    assert float((moved + label[:, 1:3]).abs().max()) < 0.15
    assert float(label[:, 1:3].abs().max()) <= 0.5
    spread = ((weight.sum(2) * p**2).sum(1) / mass - y**2).sqrt(), ((weight.sum(1) * p**2).sum(1) / mass - x**2).sqrt()
    correlations = [
        np.corrcoef(s.log().numpy(), label[:, c].numpy())[0, 1] for s, c in zip(spread, (6, 5), strict=True)
    ]
    assert max(correlations) < -0.8
    assert float(label[:, 3:7].std()) == pytest.approx(1.0, abs=0.25)


def test_written_npz_reads_back(tmp_path):
    """What `sample` writes, a compressed archive of uint8 named images, is read back as it was."""
    k = blob(3)
    buffer = io.BytesIO()
    np.savez_compressed(buffer, images=k.numpy().astype(np.uint8))
    (tmp_path / "samples.npz").write_bytes(buffer.getvalue())
    assert torch.equal(load_images(str(tmp_path / "samples.npz"), 17).values, k)


# -- files that are not what they say --------------------------------------------------------------------------------


def memory_of(code, limit=2 * 2**30):
    """Exit code and last line of standard error of Python code in a process that may take `limit` bytes beside torch's."""
    guard = (
        f"import resource, scoresde.data as d, numpy\nresource.setrlimit(resource.RLIMIT_DATA, ({limit}, {limit}))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", guard + code],
        env={**os.environ, "PYTHONPATH": str(Path(scoresde.__file__).parents[1]), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=100,
    )
    return done.returncode, (done.stderr.strip().splitlines() or [""])[-1]


def npy(shape, dtype="|u1", content=b""):
    """A member of an archive whose header promises `shape`."""
    header = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}".encode()
    header += b" " * (-(len(header) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + content


def archive(path, compression=zipfile.ZIP_STORED, **members):
    with zipfile.ZipFile(path, "w", compression) as file:
        for name, content in members.items():
            file.writestr(name, content)
    return str(path)


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_another_format_behind_an_ending(tmp_path, monkeypatch, suffix):
    """PostScript named .png does not reach the program that draws it; no format but the five is opened."""
    from PIL import EpsImagePlugin

    started = []
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *a, **k: started.append(a))
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", "gs")
    page = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n"
    (tmp_path / f"a.{suffix}").write_bytes(page)
    with Image.open(tmp_path / f"a.{suffix}") as image:
        assert image.format == "EPS"  # the image library alone would take it
    with pytest.raises(ValueError, match=rf"a\.{suffix} is not a readable image"):
        load_images(str(tmp_path))
    assert started == []
    (tmp_path / f"a.{suffix}").unlink()
    Image.fromarray(pixels(4, 4)).save(tmp_path / f"b.{suffix}", format="GIF")
    with pytest.raises(ValueError, match=rf"b\.{suffix} is not a readable image"):
        load_images(str(tmp_path))


def test_pipes_and_devices(tmp_path):
    """They are not opened: a pipe would wait for ever for someone to write."""
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "a.npz", tmp_path / "folder" / "a.png"):
        os.mkfifo(path)
        with pytest.raises(ValueError, match=rf"{path.name} is not a regular file"):
            load_images(str(path if path.suffix == ".npz" else path.parent), 256)
    (tmp_path / "zero.npz").symlink_to("/dev/zero")
    with pytest.raises(ValueError, match=r"zero\.npz is not a regular file"):
        load_images(str(tmp_path / "zero.npz"), 256)


def test_an_archive_that_unpacks_to_gigabytes(tmp_path):
    """Headers of 4 GB, 200 MB in 0.2 MB, and headers that promise more than is there: refused before memory is taken."""
    huge = archive(tmp_path / "huge.npz", **{"images.npy": npy((70_000, 240, 240), content=bytes(100))})
    code, line = memory_of(f"d.load_images({huge!r}, 256)")
    assert code == 1
    assert "promises 4,032,000,000 numbers; at most 536,870,912" in line
    small = tmp_path / "small.npz"
    np.savez_compressed(small, images=np.zeros((200, 1000, 1000), np.uint8))
    with pytest.raises(ValueError, match=r"unpacks 19\d,\d{3} bytes to 200,000,128, more than 100 times"):
        load_images(str(small), 256)
    promise = archive(tmp_path / "promise.npz", **{"images.npy": npy((500_000, 32, 32), content=b"1234")})
    with pytest.raises(
        ValueError, match=r"promise\.npz is not a readable .npz file \(images\.npy has 132 bytes and announces"
    ):
        load_images(promise, 256)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"images.npy": npy((2,), "|O")}, "pickled Python objects"),
        ({"images.npy": b"no array"}, "not a readable"),
        ({"images.npy": b""}, "not a readable"),
        ({"images.npy": b"\x93NUMPY\x09\x00" + bytes(200)}, "version"),
        ({"images.npy": npy("(2, 'a', 3)")}, "not a readable"),
        ({"images.npy": npy((-2, 4, 4))}, "not a readable"),
        ({"images.npy": npy("__import__('os').getpid()")}, "not a readable"),
        ({"images/": b"", "x.npy/": b""}, "holds nothing"),
        ({"images": b"raw"}, "holds nothing"),
        ({"images.npy": npy((2, 4, 4), "|V1", bytes(32))}, "must hold integers"),
        ({"images.npy": npy("(2, 4, 4)", "nonsense", bytes(32))}, "not a readable"),
    ],
    ids=str,
)
def test_odd_members(tmp_path, members, message):
    """Objects, folders, foreign members and broken headers: one line that names the file."""
    with pytest.raises((ValueError, TypeError), match=message) as error:
        load_images(archive(tmp_path / "odd.npz", **members), 5)
    assert "odd.npz" in str(error.value)
    assert "\n" not in str(error.value)


def test_an_encrypted_or_unknown_archive(tmp_path):
    """A member with a password, or packed in a way that is not known."""
    path = tmp_path / "a.npz"
    saved(path, images=ramp(3, 2, 2))
    for offset, value in ((6, 1), (8, 99)):  # flags, method of compression
        whole = bytearray(path.read_bytes())
        for mark, shift in ((b"PK\x03\x04", 0), (b"PK\x01\x02", 2)):
            whole[whole.index(mark) + offset + shift] = value
        (tmp_path / "odd.npz").write_bytes(whole)
        with pytest.raises(ValueError, match=r"odd\.npz is not a readable"):
            load_images(str(tmp_path / "odd.npz"), 5)


def test_images_that_promise_gigabytes(tmp_path):
    """PNG and TIFF headers of 100,000 x 100,000 and of 20,000 x 20,000 pixels: refused with a process' memory of 2 GiB."""
    for side in (100_000, 20_000):
        head = b"IHDR" + side.to_bytes(4, "big") * 2 + bytes([8, 2, 0, 0, 0])
        content = b"\x89PNG\r\n\x1a\n" + (13).to_bytes(4, "big") + head + zlib.crc32(head).to_bytes(4, "big")
        data = b"IDAT" + zlib.compress(bytes(100))
        content += (len(data) - 4).to_bytes(4, "big") + data + zlib.crc32(data).to_bytes(4, "big")
        tags = [
            (256, 4, side),
            (257, 4, side),
            (258, 3, 8),
            (259, 3, 1),
            (262, 3, 1),
            (273, 4, 8),
            (278, 4, side),
            (279, 4, side**2 % 2**32),
        ]
        tiff = b"II*\0" + (8).to_bytes(4, "little") + len(tags).to_bytes(2, "little")
        tiff += b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in tags) + bytes(4)
        for name, whole in (("a.png", content), ("a.tif", tiff)):
            (tmp_path / name).write_bytes(whole)
            code, line = memory_of(f"d.load_images({str(tmp_path)!r})")
            (tmp_path / name).unlink()
            assert code == 1
            assert line.startswith("ValueError: ")
            assert name in line


def test_many_large_images_are_too_many(tmp_path, monkeypatch):
    """The size of the first times their number is looked at before the second is read."""
    monkeypatch.setattr(files, "MAX_VALUES", 200)
    for i in range(13):
        Image.fromarray(pixels(4, 4)).save(tmp_path / f"{i:02d}.png")
    with pytest.raises(ValueError, match=r"13 images of .* promises 208 numbers; at most 200"):
        load_images(str(tmp_path))
    (tmp_path / "12.png").unlink()
    assert len(load_images(str(tmp_path))) == 12
