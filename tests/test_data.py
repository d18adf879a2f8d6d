"""data.py: image and label stay aligned, the transforms follow the released numbers, samples are reproducible, common
image formats are read as RGB, a mistake ends in one line that names the file, and the download resumes."""

import colorsys
import hashlib
import http.server
import io
import itertools
import random
import sys
import threading
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import readme_block
from PIL import Image

import data
from clip_model import IGNORE_INDEX
from data import (
    IterationSampler,
    SegmentationDataset,
    TrainTransform,
    eval_transform,
    find_split,
    is_ade20k,
    photometric_distortion,
    random_crop_box,
    read_classes,
    read_image,
    resize_to_fit,
)

MEAN, STD = torch.tensor(data.MEAN).view(3, 1, 1), torch.tensor(data.STD).view(3, 1, 1)


def keep(image, label):
    """A transform that does nothing."""
    return image, label.long()


def save(path: Path, values: np.ndarray, mode: str | None = None, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(values)
    (image.convert(mode) if mode else image).save(path, **options)
    return path


def folders(tmp_path: Path, mask: np.ndarray, image: np.ndarray | None = None) -> tuple[Path, Path]:
    """One image and its mask; returns their folders."""
    image = np.zeros((*mask.shape[:2], 3), np.uint8) if image is None else image
    save(tmp_path / "images" / "one.png", image)
    save(tmp_path / "masks" / "one.png", mask)
    return tmp_path / "images", tmp_path / "masks"


# ------------------------------------------------------------------------------------------------ alignment


def coordinates(height: int, width: int, axis: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Image: red is 2 * column, green 2 * row, blue 255. Label: the row (axis 0) or the column (axis 1)."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    image = torch.stack([2 * columns, 2 * rows, torch.full_like(rows, 255)]).to(torch.uint8)
    return image, (rows, columns)[axis].to(torch.uint8)


@pytest.mark.parametrize("height, width, crop", [(100, 120, 64), (100, 120, 160), (120, 80, 96), (33, 127, 64)])
def test_train_transform_keeps_image_and_label_aligned(height, width, crop, monkeypatch):
    boxes = []

    def recorded(label: torch.Tensor, size: int) -> tuple[int, ...]:
        boxes.append((label.shape, random_crop_box(label, size)))
        return boxes[-1][1]

    monkeypatch.setattr(data, "random_crop_box", recorded)
    monkeypatch.setattr(data, "photometric_distortion", lambda image: image)
    transform = TrainTransform(crop_size=crop, limits=(4 * height, height))
    flips, padded = 0, 0
    for seed in range(60):
        axis = seed % 2
        torch.manual_seed(seed)
        image, label = transform(*coordinates(height, width, axis))
        assert image.shape == (3, crop, crop) and image.dtype == torch.float32
        assert label.shape == (crop, crop) and label.dtype == torch.int64

        # Where the box's pixels come from: pixel centers for the bilinear image, the pixel at or before for the label.
        (new_height, new_width), (top, left, h, w) = boxes[-1]
        y, x = (top + torch.arange(h)) * height / new_height, (left + torch.arange(w)) * width / new_width
        red = 2 * (x + 0.5 * width / new_width - 0.5).clamp(0, width - 1).expand(h, w)
        green = 2 * (y + 0.5 * height / new_height - 0.5).clamp(0, height - 1)[:, None].expand(h, w)
        expected = torch.stack([red, green, torch.full((h, w), 255.0)])
        source = (y[:, None] if axis == 0 else x).expand(h, w)

        painted = (image * STD + MEAN)[:, :h, :w] * 255
        if painted[0, 0, 0] > painted[0, 0, -1]:
            expected, source = expected.flip(2), source.flip(1)
            flips += 1
        assert (painted - expected).abs().max() < 1.01  # rounded to 8 bits
        painted = label[:h, :w]  # at whole numbers float32 may round a source to the pixel before
        assert ((painted == (source + 1e-4).floor()) | (painted == (source - 1e-4).floor())).all()

        assert not image[:, h:].any() and not image[:, :, w:].any()  # the mean color
        assert (label[h:] == IGNORE_INDEX).all() and (label[:, w:] == IGNORE_INDEX).all()
        padded += h < crop or w < crop
    assert 18 < flips < 42 and padded > 2


def test_dataset_keeps_image_and_label_aligned(tmp_path):
    image, label = coordinates(60, 90)
    dataset = SegmentationDataset(*folders(tmp_path, label.numpy(), image.permute(1, 2, 0).numpy()), 128, keep)
    loaded_image, loaded_label, path = dataset[0]
    assert torch.equal(loaded_image, image) and torch.equal(loaded_label, label.long())
    assert path == str(tmp_path / "images" / "one.png")


def test_eval_transform():
    image, label = coordinates(100, 120)
    normalized, same = eval_transform(image, label)
    assert torch.allclose(normalized, (image / 255 - MEAN) / STD, atol=1e-6) and torch.equal(same, label.long())

    resized = resize_to_fit(normalized, (300, 50))
    assert resized.shape == (3, 50, 60)
    # Halving without antialias averages 2 x 2 pixels: columns 2x and 2x + 1 have the value 2 * (2x + 0.5).
    expected = (4 * torch.arange(60) + 1.0).expand(50, 60)
    assert torch.allclose((resized * STD + MEAN)[0] * 255, expected, atol=1e-3)


# ------------------------------------------------------------------------------------------------ released numbers


@pytest.mark.parametrize(
    "height, width, limits, expected",
    [
        (512, 683, (2048, 512), (512, 683)),
        (683, 512, (2048, 512), (683, 512)),
        (360, 480, (2048, 512), (512, 683)),  # 682.67 rounds up
        (300, 3000, (2048, 512), (205, 2048)),  # the long side decides; 204.8 rounds up
        (1000, 1333, (1024, 256), (256, 341)),
        (7, 1000, (64, 32), (1, 64)),  # never below one pixel
    ],
)
def test_resize_to_fit(height, width, limits, expected):
    assert resize_to_fit(torch.zeros(3, height, width, dtype=torch.uint8), limits).shape[1:] == expected


def test_train_resize_follows_the_formula(monkeypatch):
    sizes, ratios = [], []
    monkeypatch.setattr(data, "random_crop_box", lambda label, crop: sizes.append(tuple(label.shape)) or (0, 0, 8, 8))
    draw = data.uniform
    monkeypatch.setattr(data, "uniform", lambda low, high: ratios.append(draw(low, high)) or ratios[-1])
    monkeypatch.setattr(data, "photometric_distortion", lambda image: image)
    transform = TrainTransform(crop_size=8, limits=(204, 51))
    for _ in range(200):
        transform(*coordinates(48, 90))
    for size, ratio in zip(sizes, ratios, strict=True):
        factor = min(int(204 * ratio) / 90, int(51 * ratio) / 48)
        assert size == (int(48 * factor + 0.5), int(90 * factor + 0.5))
    assert 0.5 <= min(ratios) < 0.55 and 1.9 < max(ratios) <= 2


def test_crop_avoids_one_class_above_three_quarters():
    torch.manual_seed(0)
    label = torch.zeros(64, 256, dtype=torch.uint8)
    label[:, 128:160] = 1  # a box of 64 is good if at least a quarter and at most three quarters are class 1
    boxes = [random_crop_box(label, 64) for _ in range(300)]
    shares = torch.tensor([(label[t : t + h, x : x + w] == 1).float().mean() for t, x, h, w in boxes])
    assert all((t, h, w) == (0, 64, 64) for t, _, h, w in boxes)
    assert (shares > 0.25).float().mean() > 0.97  # a third of all boxes is good, ten tries miss them rarely
    unchecked = torch.tensor([random_crop_box(label, 64, tries=0)[1] for _ in range(600)])
    assert abs(((unchecked > 80) & (unchecked < 144)).float().mean() - 63 / 193) < 0.07


def test_crop_counts_only_valid_pixels_and_draws_eleven_boxes(monkeypatch):
    draws = []
    randint = torch.randint
    monkeypatch.setattr(torch, "randint", lambda *args: draws.append(args) or randint(*args))
    label = torch.zeros(20, 20, dtype=torch.uint8)

    def boxes(label: torch.Tensor) -> int:
        draws.clear()
        random_crop_box(label, 20)
        return len(draws) // 2

    assert boxes(label) == 11  # one class: ten boxes fail, the eleventh is used without checking
    label[:, :5] = 1
    assert boxes(label) == 11  # exactly 75% is too much
    label[0, 5] = 1
    assert boxes(label) == 1
    label[:, 5:12] = IGNORE_INDEX
    assert boxes(label) == 1 and (label == 1).sum() == 100  # 100 of 260 pixels that count
    label[:, :10], label[:, 10:] = 1, IGNORE_INDEX
    assert boxes(label) == 11  # half class 1, half ignored: one class
    label[:] = IGNORE_INDEX
    assert boxes(label) == 11  # every pixel is ignored


def change_hsv(image: np.ndarray, change) -> np.ndarray:
    """change(h, s, v) -> (h, s, v), applied to each pixel of (3, H, W) in [0, 1] with the standard library."""
    pixels = [colorsys.hsv_to_rgb(*change(*colorsys.rgb_to_hsv(*rgb))) for rgb in image.reshape(3, -1).T.tolist()]
    return np.array(pixels).T.reshape(image.shape)


@pytest.mark.parametrize("contrast_first", [True, False])
@pytest.mark.parametrize("parts", list(itertools.product([False, True], repeat=4)))
def test_photometric_distortion_against_the_standard_library(parts, contrast_first, monkeypatch):
    brightness, contrast, saturation, hue = parts
    image = torch.rand(3, 9, 11, generator=torch.Generator().manual_seed(1))
    image[:, 0, 0], image[:, 0, 1], image[:, 0, 2] = 0, 1, 0.4  # black, white and gray have no saturation
    coins = iter([brightness, contrast_first, *[contrast] * contrast_first, saturation, hue, contrast])
    monkeypatch.setattr(data, "coin", lambda: next(coins))
    drawn = []
    monkeypatch.setattr(data, "uniform", lambda low, high: drawn.append((low, high)) or low + 0.9 * (high - low))
    distorted = photometric_distortion(image).numpy()

    expected = image.numpy().astype(np.float64) * 255
    if brightness:
        expected = np.clip(expected + 25.6, 0, 255)
    if contrast and contrast_first:
        expected = np.clip(expected * 1.4, 0, 255)
    if saturation:
        expected = 255 * change_hsv(expected / 255, lambda h, s, v: (h, min(1.4 * s, 1), v))
    if hue:
        expected = 255 * change_hsv(expected / 255, lambda h, s, v: ((h + 14.4 / 180) % 1, s, v))
    if contrast and not contrast_first:
        expected = np.clip(expected * 1.4, 0, 255)
    assert np.abs(distorted * 255 - expected).max() < 0.01
    ranges = [(-32, 32)] * brightness + [(0.5, 1.5)] * (contrast + saturation) + [(-18, 18)] * hue
    assert sorted(drawn) == sorted(ranges)


def test_less_saturation():
    image = torch.rand(3, 5, 5)
    expected = change_hsv(image.double().numpy(), lambda h, s, v: (h, 0.5 * s, v))
    assert np.abs(data.scale_saturation(image, 0.5).numpy() - expected).max() < 1e-5


# ------------------------------------------------------------------------------------------------ masks


def test_ade20k_labels(tmp_path):
    mask = np.array([[0, 1, 2], [149, 150, 255]], np.uint8)
    label = SegmentationDataset(*folders(tmp_path, mask), 150, keep, reduce_zero_label=True)[0][1]
    assert label.tolist() == [[255, 0, 1], [148, 149, 255]]


def test_ignore_index(tmp_path):
    mask = np.array([[0, 1, 2], [11, 11, 255]], np.uint8)
    label = SegmentationDataset(*folders(tmp_path, mask), 3, keep, ignore_index=11)[0][1]
    assert label.tolist() == [[0, 1, 2], [255, 255, 255]]
    label = SegmentationDataset(*folders(tmp_path, mask), 11, keep, ignore_index=1, reduce_zero_label=True)[0][1]
    assert label.tolist() == [[255, 255, 1], [10, 10, 255]]


@pytest.mark.parametrize("mode", ["1", "L", "P", "I;16", "I"])
def test_mask_types(mode, tmp_path):
    values = np.array([[0, 1], [1, 0]], np.uint8)
    pairs = folders(tmp_path, values)
    mask = Image.fromarray(values.astype({"1": bool, "I;16": np.uint16, "I": np.int32}.get(mode, np.uint8)))
    if mode == "P":
        mask.putpalette([9, 9, 9, 200, 30, 40])
    assert mask.mode == mode
    path = tmp_path / "masks" / "one.tif"
    (tmp_path / "masks" / "one.png").unlink()
    mask.save(path)
    assert SegmentationDataset(*pairs, 2, keep)[0][1].tolist() == values.tolist()


@pytest.mark.parametrize("reduce, values, classes", [(False, "150, 200", "0 to 149"), (True, "200", "1 to 150")])
def test_label_outside_the_list(reduce, values, classes, tmp_path):
    pairs = folders(tmp_path, np.array([[0, 150], [200, 255]], np.uint8))
    with pytest.raises(
        ValueError, match=f"one.png: value {values} is not a class; .* {classes}, .*--reduce-zero-label"
    ):
        SegmentationDataset(*pairs, 150, keep, reduce_zero_label=reduce)[0]


def test_16_bit_label_outside_the_list(tmp_path):
    dataset = SegmentationDataset(*folders(tmp_path, np.array([[0, 256 + 3]], np.uint16)), 150, keep)
    with pytest.raises(ValueError, match="value 259 is not a class"):  # and does not wrap around to 3
        dataset[0]


def test_mask_of_another_size(tmp_path):
    pairs = folders(tmp_path, np.zeros((4, 6), np.uint8), np.zeros((6, 4, 3), np.uint8))
    with pytest.raises(ValueError, match=r"masks.one.png: 6 x 4 pixels, but .*images.one.png has 4 x 6"):
        SegmentationDataset(*pairs, 2, keep)[0]


def test_color_mask(tmp_path, monkeypatch):
    gray = np.arange(24, dtype=np.uint8).reshape(4, 6) % 2
    pairs = folders(tmp_path, np.stack([gray] * 3, axis=2))
    assert np.array_equal(SegmentationDataset(*pairs, 2, keep)[0][1], gray)  # RGB without colors
    pairs = folders(tmp_path, np.zeros((4, 6, 3), np.uint8) + np.array([0, 9, 0], np.uint8))
    with pytest.raises(ValueError, match=r"one.png: a mask in colors \(RGB\), but masks hold class indices"):
        SegmentationDataset(*pairs, 2, keep)[0]

    # README's snippet converts a folder of such masks
    colors, mask = np.array([(0, 0, 0), (200, 0, 0), (9, 9, 9)], np.uint8), np.arange(24).reshape(4, 6) % 3
    Image.fromarray(colors[mask]).save(tmp_path / "masks" / "one.png")
    (tmp_path / "classes.txt").write_text("road\t0\t0\t0\nsky\t200\t0\t0\n")
    monkeypatch.chdir(tmp_path)
    exec(readme_block("Image.open(path)").replace("masks/train", "masks"), {})
    assert np.array_equal(Image.open("indices/one.png"), np.where(mask == 2, 255, mask))


def test_data_are_looked_at_before_training(tmp_path):
    """check_data: each class's share, what looks wrong, and the first mask or validation image that is broken."""

    def check(mask, names=("road", "sky", "car"), **conventions):
        pairs = folders(tmp_path, np.array(mask, np.uint8))
        train = SegmentationDataset(*pairs, len(names), keep, **conventions)
        return data.check_data(train, SegmentationDataset(*pairs, len(names), **conventions), list(names), 2)

    shares = "road 50.0, sky 25.0, car 25.0; ignored: 0.0 % of all pixels"
    assert check([[0, 0, 1, 2]]) == f"training pixels in %: {shares}"
    assert check([[0, 0, 0, 1]]).endswith("warning: no training mask has car (1 of 3 classes)")
    assert "these 1-based masks? --reduce-zero-label" in check([[1, 1, 2, 2]])
    assert "1-based" not in check([[2, 2, 0, 3]], reduce_zero_label=True)
    assert "masks of two classes hold 0 and 1" in check([[0, 0, 255]], ("road", "sky"))
    assert "ignored: 95.0 % of all pixels" in check([[255] * 19 + [1]])
    with pytest.raises(ValueError, match="masks: all pixels of the masks are ignored; check --ignore-index"):
        check([[255, 255]])
    with pytest.raises(ValueError, match="one.png: value 7 is not a class"):
        check([[0, 7]])
    images, masks = folders(tmp_path, np.array([[0, 1, 2]], np.uint8))
    dataset = SegmentationDataset(images, masks, 3)
    save(images / "one.png", np.zeros((1, 2, 3), np.uint8))
    with pytest.raises(ValueError, match="one.png: 3 x 1 pixels, but .*one.png has 2 x 1"):
        dataset.count_labels(0)
    whole = (images / "one.png").read_bytes()
    (images / "one.png").write_bytes(whole[:40])
    with pytest.raises(ValueError, match="one.png: not readable as an image"):
        data.look_at_all(dataset.__getitem__, 1, "looking", 1)


# ------------------------------------------------------------------------------------------------ images


def test_image_types_are_read_as_rgb(tmp_path):
    rng = np.random.default_rng(0)
    rgb = rng.integers(0, 256, (6, 7, 3), dtype=np.uint8)
    alpha = rng.integers(0, 256, (6, 7, 1), dtype=np.uint8)
    gray = rgb[..., 0]
    gray_rgb = gray[..., None].repeat(3, 2)

    def check(path: Path, expected: np.ndarray) -> None:
        image = read_image(path)
        assert image.dtype == torch.uint8
        assert np.array_equal(image.permute(1, 2, 0).numpy(), expected), path

    check(save(tmp_path / "rgb.png", rgb), rgb)
    check(save(tmp_path / "rgba.png", np.concatenate([rgb, alpha], 2)), rgb)
    check(save(tmp_path / "gray.png", gray), gray_rgb)
    check(save(tmp_path / "gray_alpha.png", np.concatenate([gray[..., None], alpha], 2)), gray_rgb)
    check(save(tmp_path / "1bit.png", gray > 127), (gray_rgb > 127) * np.uint8(255))
    Image.fromarray(np.array([[-300, 5]], np.int32)).save(tmp_path / "negative.tif")
    with pytest.raises(ValueError, match="negative.tif: its I values have no standard RGB form"):
        read_image(tmp_path / "negative.tif")
    for name in ("16bit.png", "16bit.tif"):
        check(save(tmp_path / name, gray.astype(np.uint16) * 257), gray_rgb)
    check(save(tmp_path / "32bit.tif", gray.astype(np.int32) * 257), gray_rgb)
    check(save(tmp_path / "cmyk.tif", rgb, "CMYK"), rgb)
    assert read_image(save(tmp_path / "cmyk.jpg", rgb, "CMYK")).shape == (3, 6, 7)

    palette = Image.fromarray(gray % 4)
    palette.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90, 100, 110, 120])
    expected = np.array([[10, 20, 30], [40, 50, 60], [70, 80, 90], [100, 110, 120]], np.uint8)[gray % 4]
    for options in ({}, {"transparency": 1}, {"transparency": b"\x00\x80\xff\x10"}):
        palette.save(tmp_path / "palette.png", **options)
        check(tmp_path / "palette.png", expected)


def test_exif_orientation_is_not_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees to show
    path = save(tmp_path / "turned.jpg", np.zeros((6, 9, 3), np.uint8), exif=exif)
    assert read_image(path).shape == (3, 6, 9)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize("suffix", [".jpg", ".png", ".tif", ".webp"])
def test_truncated_and_other_files(suffix, tmp_path):
    rgb = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    path = save(tmp_path / f"image{suffix}", rgb)
    whole = path.read_bytes()
    for broken in (whole[: len(whole) // 2], b"", b"not an image at all", whole[:20]):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match=rf"image\{suffix}: not readable as an image"):
            read_image(path)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=rf"image\{suffix}"):
        read_image(path)


def test_image_without_a_reading_as_rgb(tmp_path):
    with pytest.raises(ValueError, match="float.tif: its F values have no standard RGB form"):
        read_image(save(tmp_path / "float.tif", np.zeros((4, 4), np.float32)))
    with pytest.raises(ValueError, match="deep.tif: its I values have no standard RGB form"):
        read_image(save(tmp_path / "deep.tif", np.full((4, 4), 70000, np.int32)))


# ------------------------------------------------------------------------------------------------ folders, class lists


@pytest.mark.parametrize(
    "images, masks, split",
    [
        ("images/training", "annotations/training", "train"),
        ("images/validation", "annotations/validation", "val"),
        ("images/train", "masks/train", "train"),
        ("images/val", "annotations/val", "val"),
        ("images/train", "labels/train", "train"),
    ],
)
def test_find_split(images, masks, split, tmp_path):
    (tmp_path / images).mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match=rf"no data set here; expected .*masks/{split}.*python data.py"):
        find_split(tmp_path, split)  # without masks
    (tmp_path / masks).mkdir(parents=True)
    assert find_split(tmp_path, split) == (tmp_path / images, tmp_path / masks)


@pytest.mark.parametrize(
    "folder, expected", [("annotations/training", True), ("masks/training", False), ("annotations/train", False)]
)
def test_is_ade20k(folder, expected):
    assert is_ade20k(Path("data", folder)) == expected


def test_unpaired_files_and_empty_folders(tmp_path):
    images, masks = folders(tmp_path, np.zeros((4, 4), np.uint8))
    (images / "Thumbs.db").write_text("other files are skipped")
    assert len(SegmentationDataset(images, masks, 2, keep)) == 1
    save(images / "two.jpg", np.zeros((4, 4, 3), np.uint8))
    with pytest.raises(ValueError, match=r"two.jpg: no mask of this name in .*masks"):
        SegmentationDataset(images, masks, 2, keep)
    (images / "two.jpg").unlink()
    save(masks / "three.png", np.zeros((4, 4), np.uint8))
    with pytest.raises(ValueError, match=r"three.png: no image of this name in .*images"):
        SegmentationDataset(images, masks, 2, keep)
    (masks / "three.png").unlink()
    save(images / "one.jpg", np.zeros((4, 4, 3), np.uint8))
    with pytest.raises(ValueError, match=r"one.png: same name as one.jpg"):
        SegmentationDataset(images, masks, 2, keep)
    (tmp_path / "empty").mkdir()
    for folder, what in (("empty", "no images there"), ("nowhere", "no such folder")):
        with pytest.raises(FileNotFoundError, match=f"{folder}: {what}"):
            SegmentationDataset(tmp_path / folder, masks, 2, keep)
    with pytest.raises(ValueError, match="256 classes"):
        SegmentationDataset(images, masks, 256, keep)


@pytest.mark.parametrize(
    "name, count, third, color",
    [
        ("ade20k", 150, "sky", (6, 230, 230)),
        ("cityscapes", 19, "building", (70, 70, 70)),
        ("voc", 21, "bicycle", (0, 128, 0)),
        ("camvid", 11, "pole", (192, 192, 128)),
    ],
)
def test_shipped_class_lists(name, count, third, color):
    names, colors = read_classes(name)
    assert len(names) == len(colors) == len(set(names)) == count
    assert (names[2], colors[2]) == (third, color)
    assert read_classes(data.CLASSES_DIR / f"{name}.txt") == (names, colors)


def test_class_list_without_colors(tmp_path):
    path = tmp_path / "list.txt"
    path.write_text("\ufefftraffic light\ncafé\t1\t2\t3\r\n\n" + "".join(f"class {i}\n" for i in range(150)), "utf-8")
    names, colors = read_classes(str(path))
    assert names[:3] == ["traffic light", "café", "class 0"] and colors[1] == (1, 2, 3)
    generated = data.default_colors(24)
    assert (
        min(sum((a - b) ** 2 for a, b in zip(c, d, strict=True)) for c in generated for d in generated if c != d)
        > 60**2
    )
    assert len(set(colors)) == len(colors) == 152 and read_classes(path) == (names, colors)
    assert all(0 <= value <= 255 for color in colors for value in color)


@pytest.mark.parametrize(
    "line", [b"dog\t1\t2", b"dog\t1\t2\t256", b"dog\tred\tred\tred", b"\t1\t2\t3", b"caf\xe9", b"cat"]
)
def test_bad_line_in_a_class_list(line, tmp_path):
    (tmp_path / "list.txt").write_bytes(b"cat\n" + line)
    with pytest.raises(ValueError, match=r"list.txt:2: .*(twice|expected UTF-8)"):
        read_classes(tmp_path / "list.txt")


def test_empty_class_list(tmp_path):
    (tmp_path / "list.txt").write_text("\n \n")
    with pytest.raises(ValueError, match="list.txt: the class list is empty"):
        read_classes(tmp_path / "list.txt")


def test_missing_class_list():
    with pytest.raises(FileNotFoundError, match="ade21k: no such class list; .* ade20k, camvid, cityscapes"):
        read_classes("ade21k")


# ------------------------------------------------------------------------------------------------ reproducible samples


def test_index_and_seed_decide_the_sample(tmp_path):
    image, label = coordinates(60, 90)
    pairs = folders(tmp_path, label.numpy(), image.permute(1, 2, 0).numpy())
    dataset = SegmentationDataset(*pairs, 128, TrainTransform(32, (200, 50)))
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = dataset[0, 7]
    assert torch.equal(torch.get_rng_state(), before)  # the caller's random state is unchanged
    torch.rand(5), random.random(), np.random.rand()
    again, other = dataset[0, 7], dataset[0, 8]
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    assert not torch.equal(first[0], other[0])


def test_samples_do_not_depend_on_workers(tmp_path):
    image, label = coordinates(40, 60)
    for i in range(5):
        save(tmp_path / "images" / f"{i}.png", image.roll(i, 2).permute(1, 2, 0).numpy())
        save(tmp_path / "masks" / f"{i}.png", label.numpy())
    dataset = SegmentationDataset(tmp_path / "images", tmp_path / "masks", 128, TrainTransform(32, (200, 50)))

    def batches(workers: int, start: int = 0) -> list:
        loader = torch.utils.data.DataLoader(dataset, 2, sampler=IterationSampler(5, start=start), num_workers=workers)
        return list(itertools.islice(loader, 6))

    alone, shared = batches(0), batches(2)
    for (images, labels, paths), (images2, labels2, paths2) in zip(alone, shared, strict=True):
        assert images.shape == (2, 3, 32, 32) and labels.shape == (2, 32, 32) and len(paths) == 2
        assert torch.equal(images, images2) and torch.equal(labels, labels2) and list(paths) == list(paths2)
    assert torch.equal(batches(0, start=6)[0][0], alone[3][0])  # resumed after three batches of two


@pytest.mark.parametrize("size", [1, 3, 10, 37])
def test_sampler(size):
    stream = list(itertools.islice(IterationSampler(size, seed=3), 5 * size))
    epochs = [[index for index, _ in stream[i : i + size]] for i in range(0, 5 * size, size)]
    assert all(sorted(epoch) == list(range(size)) for epoch in epochs)
    if size > 3:
        assert len(set(map(tuple, epochs))) == 5
    assert len({seed for _, seed in stream}) == 5 * size
    assert stream != list(itertools.islice(IterationSampler(size, seed=4), 5 * size))
    for world in (2, 4, 7):
        parts = [IterationSampler(size, 3, rank, world) for rank in range(world)]
        rounds = itertools.islice(zip(*parts, strict=True), 5 * size // world)
        dealt = [sample for samples in rounds for sample in samples]
        assert dealt == stream[: len(dealt)]  # together the processes draw one stream, no sample twice
        for start in (1, size, 2 * world, 3 * size + 1):
            resumed = itertools.islice(IterationSampler(size, 3, 1, world, start), 5)
            whole = itertools.islice(IterationSampler(size, 3), start + 1, start + 1 + 5 * world, world)
            assert list(resumed) == list(whole)


# ------------------------------------------------------------------------------------------------ download


@pytest.fixture
def server(tmp_path):
    """A local server of one zip file. ranges: can resume; cut: bytes until it hangs up; requests: their ranges."""
    files = {f"ADEChallengeData2016/images/training/{i}.jpg": random.Random(i).randbytes(40_000) for i in range(4)}
    with zipfile.ZipFile(archive := io.BytesIO(), "w") as zipped:
        for name, content in files.items():
            zipped.writestr(name, content)

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            content, start = self.server.content, 0
            requested = self.headers.get("Range")
            self.server.requests.append(requested)
            if requested and self.server.ranges:
                start = int(requested.removeprefix("bytes=").removesuffix("-"))
            self.send_response(416 if start >= len(content) else 206 if start else 200)
            self.send_header("Content-Length", str(max(len(content) - start, 0)))
            self.end_headers()
            self.wfile.write(content[start : self.server.cut])

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.files, server.content = files, archive.getvalue()
        server.ranges, server.cut, server.requests = True, None, []
        server.url = f"http://127.0.0.1:{server.server_port}/ADEChallengeData2016.zip"
        server.sha1 = hashlib.sha1(server.content).hexdigest()
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield server
        server.shutdown()


def assert_complete(root: Path, server) -> None:
    assert [p.name for p in root.iterdir()] == ["ADEChallengeData2016"]  # nothing temporary is left
    assert {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*.jpg")} == server.files


def test_download(server, tmp_path):
    folder = data.download_ade20k(tmp_path / "new" / "data", server.url, server.sha1)
    assert folder == tmp_path / "new" / "data" / "ADEChallengeData2016" and server.requests == [None]
    assert_complete(tmp_path / "new" / "data", server)
    assert data.download_ade20k(tmp_path / "new" / "data", server.url, server.sha1) == folder  # nothing to do
    assert len(server.requests) == 1


@pytest.mark.parametrize("ranges", [True, False])
def test_interrupted_download_resumes(server, ranges, tmp_path):
    server.ranges, server.cut = ranges, 70_000
    with pytest.raises(OSError, match="run again to resume"):
        data.download_ade20k(tmp_path, server.url, server.sha1)
    part = tmp_path / "ADEChallengeData2016.zip.part"
    assert part.read_bytes() == server.content[:70_000] and [p.name for p in tmp_path.iterdir()] == [part.name]
    (tmp_path / "ADEChallengeData2016.unpacking" / "left").mkdir(parents=True)  # by an interrupted run
    server.cut = None
    data.download_ade20k(tmp_path, server.url, server.sha1)
    assert server.requests == [None, "bytes=70000-"]
    assert_complete(tmp_path, server)


def test_download_of_a_complete_part(server, tmp_path):
    (tmp_path / "ADEChallengeData2016.zip.part").write_bytes(server.content)
    data.download_ade20k(tmp_path, server.url, server.sha1)
    assert_complete(tmp_path, server)


def test_wrong_checksum_removes_the_file(server, tmp_path):
    with pytest.raises(ValueError, match=f"sha1 {server.sha1}, expected 0000; the file was removed"):
        data.download_ade20k(tmp_path, server.url, "0000")
    assert not list(tmp_path.iterdir())


def test_unreachable_server(tmp_path):
    with pytest.raises(OSError, match="http://127.0.0.1:9/x.zip: .*refused.*; run again to resume"):
        data.download_ade20k(tmp_path, "http://127.0.0.1:9/x.zip", "")


def test_help_and_error_status(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["data.py", "--help"])
    with pytest.raises(SystemExit) as stop:
        data.main()
    assert stop.value.code == 0 and "--root" in capsys.readouterr().out
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(sys, "argv", ["data.py", "--root", str(tmp_path / "file")])
    with pytest.raises(SystemExit) as stop:
        data.run_script(data.main)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1
