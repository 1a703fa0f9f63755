"""Data sets: what `load` makes of good and of bad folders; augmentation, to the bit."""

from __future__ import annotations

import gzip
import os
import pickle
import re
import struct
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from cnnops import data
from cnnops.data import augment, folder, resize
from cnnops.data.sets import InMemory

Image = pytest.importorskip("PIL.Image", reason="Pillow is missing: pip install 'cnnops[demo]'")


def refused(path: Path | None, message: str, channels: int = 3) -> None:
    """`load` raises DataError with that in its only line."""
    with pytest.raises(data.DataError, match=re.escape(message)) as error:
        data.load(path, channels, (8, 8), 0)
    assert "\n" not in str(error.value)


# ---- scikit-learn's digits -------------------------------------------------------------------------------


def test_scikit_digits_are_split_once_and_for_all() -> None:
    digits = data.load(None, 1, (28, 28), 0)
    train, test = (part.images(torch.arange(len(part))) for part in (digits.train, digits.test))
    assert train.shape == (1438, 1, 28, 28) and len(digits.train.labels) == 1438
    assert test.shape == (359, 1, 28, 28) and len(digits.test.labels) == 359
    assert train.dtype == torch.float32 and digits.train.labels.dtype == torch.int64
    assert train.min() == 0 and train.max() == 1
    assert torch.bincount(digits.test.labels, minlength=10).tolist() == [
        35, 37, 35, 37, 36, 36, 36, 36, 35, 36
    ]  # fmt: skip

    from sklearn.datasets import load_digits

    raw = load_digits()
    first = np.argsort(raw.target, kind="stable")[4::5].min()
    # Bilinear from 8 to 28: the places that lie between four pixels' centres mix just those.
    pixels = torch.from_numpy(raw.images[first] / 16).float()
    at = [(i + 0.5) * 8 / 28 - 0.5 for i in (6, 13)]
    (top, left), (b, r) = map(int, at), (at[0] % 1, at[1] % 1)
    four = pixels[top : top + 2, left : left + 2]
    mixed = torch.tensor([1 - b, b]) @ four @ torch.tensor([1 - r, r])
    torch.testing.assert_close(test[0, 0, 6, 13], mixed)


def test_digits_come_in_any_channels_and_size(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sklearn", reason="scikit-learn is missing: pip install 'cnnops[demo]'")
    plain = data.load(None, 1, (28, 28), 0)
    assert (len(plain.train), len(plain.test), plain.classes) == (1438, 359, tuple("0123456789"))
    assert plain.train.labels.dtype == torch.int64 and len(plain.train.labels) == 1438
    some = torch.tensor([3, 1437, 0])
    small = plain.train.images(some)
    assert small.shape == (3, 1, 28, 28) and small.dtype == torch.float32
    assert small.min() == 0 and 0.9 < small.max() <= 1

    framed = data.load(None, 3, (32, 33), 0).train.images(some)
    assert framed.shape == (3, 3, 32, 33)
    for channel in framed.unbind(1):
        assert torch.equal(channel[:, 2:30, 2:30], small[:, 0]) and channel.sum() == small.sum()

    large = data.load(None, 1, (224, 56), 0).train
    scaled = F.interpolate(small, (224, 56), mode="bilinear")
    torch.testing.assert_close(large.images(some), scaled, rtol=0, atol=1e-6)
    assert torch.equal(large.images(some)[1], large.image(1437))

    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    refused(None, "the digits need sklearn: pip install 'cnnops[demo]'")
    refused(None, "data: expected a network for 1 or 3 channels, got 4", channels=4)


@pytest.mark.parametrize("size", [(28, 28), (32, 32), (61, 224), (9, 9)])
def test_an_image_does_not_depend_on_its_batch(size: tuple[int, int]) -> None:
    pixels = torch.randint(0, 256, (20, 1, 28, 28), dtype=torch.uint8)
    split = pickle.loads(pickle.dumps(InMemory(pixels, torch.zeros(20).long(), 3, size)))
    order = torch.randperm(20)
    together = split.images(order)
    for row, index in enumerate(order.tolist()):
        assert torch.equal(together[row], split.image(index))
    together.zero_()  # the set does not share memory with what it gave
    assert split.image(0).max() > 0 and torch.equal(split.pixels, pixels)


@pytest.mark.parametrize("former, size", [((5, 7), (12, 9)), ((9, 9), (4, 9)), ((1, 1), (3, 2))])
def test_scaling_is_pytorchs(former: tuple[int, int], size: tuple[int, int]) -> None:
    images = torch.rand(2, 3, *former)
    expected = F.interpolate(images, size, mode="bilinear", align_corners=False)
    got = torch.from_numpy(resize.bilinear(images.numpy(), size))
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)


# ---- MNIST's files ---------------------------------------------------------------------------------------


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">4B{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


@pytest.fixture
def arrays() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    found = {}
    for part, n in (("train", 40), ("t10k", 8)):
        found[f"{part}-images-idx3-ubyte"] = rng.integers(0, 256, (n, 28, 28), dtype=np.uint8)
        found[f"{part}-labels-idx1-ubyte"] = rng.integers(0, 10, n, dtype=np.uint8)
    return found


@pytest.mark.parametrize("packed", [False, True])
def test_mnist_is_loaded(tmp_path: Path, arrays: dict[str, np.ndarray], packed: bool) -> None:
    for name, array in arrays.items():
        content = gzip.compress(idx(array)) if packed else idx(array)
        (tmp_path / (name + ".gz" * packed)).write_bytes(content)
    found = data.load(tmp_path, 3, (32, 32), 0)
    assert found.source == f"MNIST from {tmp_path}" and len(found.classes) == 10
    assert found.train.labels.tolist() == arrays["train-labels-idx1-ubyte"].tolist()
    for part, name in ((found.train, "train"), (found.test, "t10k")):
        raw = torch.from_numpy(arrays[f"{name}-images-idx3-ubyte"])
        got = part.images(torch.arange(len(part)))
        assert torch.equal(got[:, 1, 2:30, 2:30], raw.float() / 255)


CUTS = {
    0: "idx file of bytes with rank 3, got  at its start",
    3: "idx file of bytes with rank 3, got 000008 at its start",
    4: "expected a header of 16 bytes, got 4 bytes in all",
    15: "expected a header of 16 bytes, got 15 bytes in all",
    16: "expected 6272 bytes for (8, 28, 28), got 0",
    3000: "expected 6272 bytes for (8, 28, 28), got 2984",
}


def test_truncated_mnist_is_refused(tmp_path: Path, arrays: dict[str, np.ndarray]) -> None:
    for name, array in arrays.items():
        (tmp_path / name).write_bytes(idx(array))
    file = tmp_path / "t10k-images-idx3-ubyte"
    whole = file.read_bytes()
    for length, message in CUTS.items():
        file.write_bytes(whole[:length])
        refused(tmp_path, f"{file}: expected" if "header" in message else message)
        refused(tmp_path, message)
    file.unlink()
    packed = gzip.compress(whole)
    for length in (0, 1, 9, len(packed) // 2, len(packed) - 1):
        file.with_name(f"{file.name}.gz").write_bytes(packed[:length])
        refused(tmp_path, f"{file}.gz: expected ")
    file.with_name(f"{file.name}.gz").unlink()
    refused(tmp_path, "expected t10k-images-idx3-ubyte or t10k-images-idx3-ubyte.gz in")


@pytest.mark.parametrize("place", ["raw", "MNIST/raw"])
def test_mnist_is_found_as_others_pack_it(
    tmp_path: Path, arrays: dict[str, np.ndarray], place: str
) -> None:
    (tmp_path / place).mkdir(parents=True)
    for name, array in arrays.items():
        (tmp_path / place / name.replace("-idx", ".idx")).write_bytes(idx(array))
    found = data.load(tmp_path, 1, (28, 28), 0)
    raw = torch.from_numpy(arrays["t10k-images-idx3-ubyte"])
    assert torch.equal(found.test.images(torch.arange(8))[:, 0], raw.float() / 255)


DAMAGE = {
    "magic": (
        "train-images-idx3-ubyte",
        lambda b: b"\0\0\x0d" + b[3:],
        "idx file of bytes with rank 3",
    ),
    "empty": ("train-images-idx3-ubyte", lambda b: b"", "idx file of bytes with rank 3, got  at"),
    "cut": (
        "t10k-images-idx3-ubyte",
        lambda b: b[:-1],
        "expected 6272 bytes for (8, 28, 28), got 6271",
    ),
    "longer": ("t10k-labels-idx1-ubyte", lambda b: b + b"\0", "expected 8 bytes for (8,), got 9"),
    "side": (
        "train-images-idx3-ubyte",
        lambda b: idx(np.zeros((40, 27, 28), np.uint8)),
        "train images: expected 28x28, got 27x28",
    ),
    "fewer labels": (
        "train-labels-idx1-ubyte",
        lambda b: idx(np.zeros(39, np.uint8)),
        "got 40 images and 39 labels",
    ),
    "label": ("t10k-labels-idx1-ubyte", lambda b: b[:-1] + b"\x0a", "expected 0 to 9, got 10"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_mnist_is_refused(tmp_path: Path, arrays: dict[str, np.ndarray], case: str) -> None:
    for name, array in arrays.items():
        (tmp_path / name).write_bytes(idx(array))
    name, damage, message = DAMAGE[case]
    (tmp_path / name).write_bytes(damage((tmp_path / name).read_bytes()))
    refused(tmp_path, message)


@pytest.mark.parametrize(
    "content",
    [b"not gzip", gzip.compress(idx(np.zeros(40, np.uint8)))[:-9]],
    ids=["not_gzip", "cut_short"],
)
def test_damaged_gzip_is_refused(
    tmp_path: Path, arrays: dict[str, np.ndarray], content: bytes
) -> None:
    for name, array in arrays.items():
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(idx(array)))
    (tmp_path / "train-labels-idx1-ubyte.gz").write_bytes(content)
    refused(tmp_path, f"{tmp_path / 'train-labels-idx1-ubyte.gz'}: expected a readable file, got")


# ---- folders of images -----------------------------------------------------------------------------------


def paint(path: Path, colour: object = (255, 0, 0), mode: str = "RGB", size: int = 6) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, (size, size), colour).save(path)
    return path


@pytest.fixture
def split_folder(tmp_path: Path) -> Path:
    """Two classes, red and blue, with three images each in train/, and two and one in val/."""
    for name, colour, tested in (("red", (255, 0, 0), 2), ("blue", (0, 0, 255), 1)):
        for part, n in (("train", 3), ("val", tested)):
            for i in range(n):
                paint(tmp_path / part / name / f"{i}.png", colour)
    return tmp_path


def test_train_and_val(split_folder: Path) -> None:
    (split_folder / "test").mkdir()  # where there is val/, it is not looked at
    found = data.load(split_folder, 3, (4, 5), 0)
    assert found.classes == ("blue", "red") and found.source == f"images from {split_folder}"
    assert found.train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert found.test.labels.tolist() == [0, 1, 1]
    got = found.train.images(torch.tensor([5, 0]))
    assert got.shape == (2, 3, 4, 5) and got.dtype == torch.float32
    red, blue = torch.tensor([1.0, 0, 0]), torch.tensor([0, 0, 1.0])
    assert torch.equal(got, torch.stack([red, blue]).view(2, 3, 1, 1).expand(2, 3, 4, 5))

    grey = data.load(split_folder, 1, (4, 5), 0).train.image(5)
    assert torch.equal(grey, torch.full((1, 4, 5), round(0.299 * 255) / 255))
    (split_folder / "test").rmdir()
    (split_folder / "val").rename(split_folder / "test")
    assert data.load(split_folder, 3, (4, 5), 0).test.labels.tolist() == [0, 1, 1]


def test_a_fifth_of_every_class_is_tested_on(tmp_path: Path) -> None:
    files = {name: n for name, n in (("a", 10), ("b", 2), ("train", 5))}  # with no val/: a class
    for name, n in files.items():
        for i in range(n):
            paint(tmp_path / name / f"{i}.png")

    def chosen(seed: int) -> tuple[set[str], set[str]]:
        found = data.load(tmp_path, 3, (6, 6), seed)
        assert found.classes == ("a", "b", "train")
        assert found.train.labels.tolist() == 8 * [0] + [1] + 4 * [2]
        assert found.test.labels.tolist() == [0, 0, 1, 2]
        for part in (found.train, found.test):
            for path, label in zip(part.paths, part.labels.tolist(), strict=True):
                assert Path(path).parent.name == found.classes[label]
        return set(found.train.paths), set(found.test.paths)

    train, test = chosen(0)
    assert not train & test and len(train | test) == 17
    assert chosen(0) == (train, test)
    assert len({frozenset(chosen(seed)[1]) for seed in range(5)}) > 1


def test_what_is_no_image_is_passed_over(split_folder: Path) -> None:
    blue = split_folder / "train" / "blue"
    (blue / "notes.txt").write_text("no image")
    (blue / "._0.png").write_bytes(b"macOS")
    (split_folder / "train" / ".cache").mkdir()
    (split_folder / "README.md").write_text("no folder")
    paint(blue / "below" / "deeper" / "4.JPG")
    elsewhere = paint(split_folder / "elsewhere" / "5.png")
    (blue / "linked.png").symlink_to(elsewhere)
    (blue / "circle").symlink_to(blue)
    (split_folder / "val" / "red").rename(split_folder / "elsewhere" / "red")
    (split_folder / "val" / "red").symlink_to(split_folder / "elsewhere" / "red")
    found = data.load(split_folder, 3, (4, 4), 0)
    names = [os.path.relpath(path, blue) for path in found.train.paths[:-3]]
    assert names == ["0.png", "1.png", "2.png", "below/deeper/4.JPG", "linked.png"]
    assert found.test.labels.tolist() == [0, 1, 1]
    assert found.train.images(torch.arange(8)).shape == (8, 3, 4, 4)


def test_bad_folders_are_refused(split_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    top, train, val = split_folder, split_folder / "train", split_folder / "val"
    refused(top / "nowhere", "expected a folder with MNIST's files or images, got")
    refused(train / "red" / "0.png", "expected a folder with MNIST's files or images, got")
    refused(train / "red", "or a folder a class, got no folder")  # it has images, but no class
    (top / "empty").mkdir()
    refused(top / "empty", "or a folder a class, got no folder")

    paint(val / "green" / "0.png")
    refused(top, "expected the same classes in train/ and val/, got green only in val/")
    for name in ("lime", "moss"):
        paint(train / name / "0.png")
    refused(top, "got green and 2 more only in val/")
    refused(train, f"{train / 'lime'}: expected at least 2 images (.png, ")
    for path in (val / "green", train / "lime", train / "moss"):
        (path / "0.png").rename(path / "0.PNG.part")
        refused(path.parents[1], f"{path}: expected at least 1 image (.png, ")
        (path / "0.PNG.part").unlink()
        path.rmdir()

    (train / "red" / "gone.png").symlink_to(top / "gone.png")
    refused(top, f"{train / 'red' / 'gone.png'}: expected a file, got")
    (train / "red" / "gone.png").unlink()
    (val / "red").rename(top / "red")
    refused(top, f"{val}: expected a folder for each of two or more classes, got blue")
    (top / "red").rename(val / "red")
    (top / "empty").rmdir()
    val.rename(top / ".val")
    refused(top, "or a folder a class, got train/")
    monkeypatch.setattr(folder.importlib.util, "find_spec", lambda name: None)
    refused(train, "images need Pillow: pip install 'cnnops[demo]'")

    def locked(path: str) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(folder.os, "scandir", locked)
    refused(train, f"{train}: expected a folder that can be read, got [Errno 13] Permission denied")


class Decoded(Dataset[torch.Tensor]):
    def __init__(self, split: data.Split) -> None:
        self.split = split

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.split.image(index)


def test_unreadable_images_are_named(split_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = split_folder / "train" / "red" / "2.png"  # the last of the six
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    Image.fromarray(noise).save(file)
    png = file.read_bytes()
    Image.fromarray(noise).save(file, format="jpeg")
    jpeg = file.read_bytes()
    split = data.load(split_folder, 3, (4, 4), 0).train
    damaged = [b"", b"no image", png[:20], png[:-500], jpeg[:100], jpeg[:-700]]
    for content in [*damaged, png[:60] + b"\0" * 40 + png[100:]]:
        file.write_bytes(content)
        with pytest.raises(data.DataError) as error:
            split.image(5)
        assert error.value.line == str(error.value)
        assert error.value.line.startswith(f"{file}: expected an image that can be decoded, got ")
        assert error.value.line.count("\n") == 0
    Image.fromarray(np.ones((4, 4), np.float32)).save(file, format="tiff")
    with pytest.raises(data.DataError, match="8 or 16 bits a channel, got Pillow's mode 'F'"):
        split.image(5)
    for raised, got in ((ValueError("two\nlines"), "two lines"), (EOFError(), "EOFError")):
        with monkeypatch.context() as patch, pytest.raises(data.DataError, match=f"got {got}$"):
            patch.setattr(Image, "open", mock.Mock(side_effect=raised))
            split.image(5)
    file.unlink()
    with pytest.raises(data.DataError, match="got .*No such file"):
        split.image(5)
    with pytest.raises(data.DataError, match="DataLoader worker") as error:
        list(DataLoader(Decoded(split), batch_size=2, num_workers=1))
    assert (
        error.value.line.startswith(f"{file}: expected an image") and "\n" not in error.value.line
    )


def decoded(path: Path, channels: int = 3, size: tuple[int, int] = (2, 3)) -> torch.Tensor:
    image = folder.read(str(path), channels, size)
    assert image.dtype == torch.float32 and image.is_contiguous()
    return image


def test_every_mode_of_png(tmp_path: Path) -> None:
    """A 2 x 3 image of each mode, whose values are known, in three channels and in one."""
    file = tmp_path / "a.png"
    rgb = torch.tensor([[[9, 80, 200], [0, 255, 0], [1, 2, 3]], [[90] * 3, [255] * 3, [7, 0, 70]]])
    array = rgb.numpy().astype(np.uint8)
    expected = rgb.permute(2, 0, 1) / 255
    luminance = (expected * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(0, keepdim=True)

    def check(colours: torch.Tensor, grey: torch.Tensor, tolerance: float = 0.6 / 255) -> None:
        torch.testing.assert_close(decoded(file), colours.expand(3, 2, 3), rtol=0, atol=1e-6)
        torch.testing.assert_close(decoded(file, 1), grey, rtol=0, atol=tolerance)

    Image.fromarray(array).save(file)
    check(expected, luminance)
    Image.fromarray(array).quantize(6).save(file)
    assert Image.open(file).mode == "P"
    check(expected, luminance)

    # Transparent places are paper: white.
    alpha = np.array([[255, 0, 255], [255, 255, 0]], np.uint8)
    on_paper = expected.where(torch.from_numpy(alpha) == 255, 1.0)
    paper_grey = luminance.where(torch.from_numpy(alpha) == 255, 1.0)
    Image.fromarray(np.dstack([array, alpha])).save(file)
    check(on_paper, paper_grey)
    grey = array[..., 0]
    Image.fromarray(np.dstack([grey, alpha])).save(file)
    assert Image.open(file).mode == "LA"
    shown = (torch.from_numpy(grey) / 255).where(torch.from_numpy(alpha) == 255, 1.0)[None]
    check(shown, shown)
    palette = Image.fromarray(array).quantize(6)
    hidden = palette.getpixel((2, 1))
    palette.save(file, transparency=hidden)
    check(*(t.index_put((torch.arange(len(t)), torch.tensor(1), torch.tensor(2)), torch.tensor(1.0))
            for t in (expected, luminance)))  # fmt: skip

    Image.fromarray(grey).save(file)
    check(*2 * [torch.from_numpy(grey)[None] / 255])
    Image.fromarray(grey > 50).save(file)
    assert Image.open(file).mode == "1"
    check(*2 * [torch.from_numpy(grey > 50)[None].float()])
    deep = np.array([[0, 1, 300], [65535, 32768, 255]], np.uint16)
    for suffix in ("png", "tiff"):
        file = tmp_path / f"deep.{suffix}"
        Image.fromarray(deep).save(file)
        check(*2 * [torch.from_numpy(deep.astype(np.float32) / 65535)[None]], tolerance=1e-6)


def test_images_are_turned_upright(tmp_path: Path) -> None:
    """Orientation 6 is what a camera writes that was held upright: the first row is the right side."""
    array = np.arange(6, dtype=np.uint8).reshape(2, 3) * 40
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(array).save(tmp_path / "a.png", exif=exif)
    expected = torch.from_numpy(np.rot90(array, -1).copy())[None].float() / 255
    assert torch.equal(decoded(tmp_path / "a.png", 1, (3, 2)), expected)
    # And of a JPEG, whose smaller forms are asked for before it is known which side is up.
    large = np.zeros((64, 640), np.uint8)
    large[:, :320] = 255
    Image.fromarray(large).save(tmp_path / "a.jpg", exif=exif)
    got = decoded(tmp_path / "a.jpg", 1, (40, 4))[0]
    assert got[:18].min() > 0.95 and got[22:].max() < 0.05


def test_images_fill_the_size_and_lose_their_ends(tmp_path: Path) -> None:
    array = np.random.default_rng(0).integers(0, 256, (6, 14), dtype=np.uint8)
    Image.fromarray(array).save(tmp_path / "a.png")
    half = Image.fromarray(array).resize((7, 3), Image.Resampling.BILINEAR)
    got = decoded(tmp_path / "a.png", 1, (3, 3))
    assert torch.equal(got[0], torch.from_numpy(np.array(half)[:, 2:5]) / 255)
    for shape in ((1, 300), (300, 1), (1, 1)):
        Image.fromarray(np.full(shape, 255, np.uint8)).save(tmp_path / "c.png")
        assert torch.equal(decoded(tmp_path / "c.png", 1, (7, 5)), torch.ones(1, 7, 5))


# ---- augmentation ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text", ["none", "shift=2", "crop=4", "flip", "shift=2,crop=4,noise=0.05,flip"]
)
def test_augmentation_is_read_as_it_is_written(text: str) -> None:
    assert str(augment.parse(text)) == text
    assert augment.parse(", ".join(reversed(text.split(",")))) == augment.parse(text)


@pytest.mark.parametrize(
    "text, got",
    [
        ("", "''"), ("flop", "'flop'"), ("flip=1", "'flip=1'"), ("flip,none", "'none'"),
        ("shift", ""), ("shift=two", "'two'"), ("shift=1.5", "'1.5'"), ("crop=-1", "'crop=-1'"),
        ("noise=nan", "'noise=nan'"), ("noise=inf", "'noise=inf'"), ("flip,flip", "flip twice"),
        ("shift=1,shift=1", "shift twice"), ("flip,", "''"),
    ],
)  # fmt: skip
def test_bad_augmentation_is_refused(text: str, got: str) -> None:
    with pytest.raises(ValueError, match=f"^augmentation: expected shift=PIXELS.*got .*{got}.*$"):
        augment.parse(text)


def test_augmentation_larger_than_images_is_refused() -> None:
    for text in ("shift=28", "crop=28"):
        chosen = augment.parse(text)
        chosen.check((29, 30))
        with pytest.raises(ValueError, match=f"{text[:-3]} less than the 28 x 30 of.*, got 28"):
            chosen.check((28, 30))
        with pytest.raises(ValueError, match="augmentation: expected"):
            chosen(torch.zeros(1, 1, 28, 30), 0, 0, torch.tensor([0]))


@pytest.mark.parametrize(
    "text", ["shift=3", "crop=4", "flip", "noise=0.1", "shift=3,crop=4,flip,noise=0.1"]
)
def test_draws_depend_on_seed_epoch_and_index_alone(text: str) -> None:
    chosen, images = augment.parse(text), torch.rand(24, 3, 17, 13)
    before = images.clone()
    indices = torch.arange(24) * 2**40 + 2**61
    states = torch.get_rng_state(), np.random.get_state()[1].copy()
    whole = chosen(images, 7, 3, indices)
    assert torch.equal(images, before) and whole.is_contiguous() and whole.dtype == torch.float32
    order = torch.randperm(24, generator=torch.Generator().manual_seed(0))
    other = chosen(images.to(memory_format=torch.channels_last)[order], 7, 3, indices[order])
    assert torch.equal(other, whole[order])
    for size in (1, 5, 7):
        parts = zip(images.split(size), indices.split(size), strict=True)
        assert torch.equal(torch.cat([chosen(x, 7, 3, i) for x, i in parts]), whole)
    for seed, epoch, i in ((8, 3, indices), (7, 4, indices), (3, 7, indices), (7, 3, indices + 1)):
        assert not torch.equal(chosen(images, seed, epoch, i), whole)
    chosen(images, 2**63 - 1, 2**63 - 1, torch.full((24,), 2**63 - 1))
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (np.random.get_state()[1] == states[1]).all()


def test_draws_stay_the_same_between_versions() -> None:
    """Runs are resumed after updates, too."""
    images = torch.arange(2 * 7 * 6).view(2, 1, 7, 6).float()
    got = augment.parse("shift=2,flip")(images, 1, 2, torch.tensor([3, 4]))
    assert got[0, 0, 0].tolist() == [0, 17, 16, 15, 14, 13]
    assert got[1, 0, 1].tolist() == [0, 42, 43, 44, 45, 46]


def many(text: str, image: torch.Tensor, n: int = 4000) -> torch.Tensor:
    return augment.parse(text)(image.expand(n, *image.shape), 0, 0, torch.arange(n))


def test_shifts_are_all_there_and_as_likely() -> None:
    image = torch.rand(2, 6, 5) + 0.1
    padded = np.pad(image.numpy(), ((0, 0), (2, 2), (2, 2)))
    windows = [padded[:, y : y + 6, x : x + 5] for y in range(5) for x in range(5)]
    counts = np.zeros(25)
    for got in many("shift=2", image).numpy():
        counts += [np.array_equal(got, window) for window in windows]
    assert counts.sum() == 4000
    assert ((counts - 160) ** 2 / 160).sum() < 52  # chi squared with 24 degrees: 1 in 1000


def test_flips_mirror_every_other_image() -> None:
    image = torch.rand(3, 4, 5)
    mirrored = torch.from_numpy(np.ascontiguousarray(image.numpy()[:, :, ::-1]))
    got = many("flip", image)
    flipped = [torch.equal(one, mirrored) for one in got]
    assert all(torch.equal(one, image) for one, did in zip(got, flipped, strict=True) if not did)
    assert 1900 < sum(flipped) < 2100


def test_crops_are_windows_scaled_to_the_full_size() -> None:
    image = torch.rand(2, 7, 6)
    windows = {
        (less, y, x): F.interpolate(
            image[None, :, y : y + 7 - less, x : x + 6 - less], (7, 6), mode="bilinear"
        )[0]
        for less in range(3)
        for y in range(less + 1)
        for x in range(less + 1)
    }
    counts = dict.fromkeys(windows, 0)
    for got in many("crop=2", image, 1500):
        near = [key for key, window in windows.items() if torch.allclose(got, window, atol=1e-6)]
        assert len(near) == 1
        counts[near[0]] += 1
    # A third each for 0, 1 and 2 less, and in each third all windows as likely.
    expected = {key: 500 / (key[0] + 1) ** 2 for key in windows}
    assert sum((counts[k] - n) ** 2 / n for k, n in expected.items()) < 35  # 13 degrees: 1 in 1000


def test_noise_is_normal_and_of_its_size() -> None:
    added = many("noise=0.25", torch.full((1, 20, 20), 0.5), 500).double() - 0.5
    assert abs(added.mean()) < 4 * 0.25 / 200000**0.5
    assert abs(added.std() / 0.25 - 1) < 4 / 400000**0.5
    assert abs(((added.abs() < 0.25).double().mean()) - 0.6827) < 0.005
    flat = added.flatten(1)
    neighbours = torch.corrcoef(torch.stack([flat[:-1].flatten(), flat[1:].flatten()]))[0, 1]
    assert abs(neighbours) < 0.01, "images with neighbouring indices share nothing"
    assert many("noise=0.5", torch.ones(1, 2, 2)).max() > 1, "values may leave 0 to 1"
