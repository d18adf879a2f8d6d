"""Data: folders of images and masks, the released training and test transforms, and the ADE20K download.

A data set is a folder of images, a folder of masks with the same file stems, and a class list (`classes/*.txt`).
A mask holds one class index per pixel. From here on images are RGB, (3, H, W), float and normalised with CLIP's mean
and standard deviation; labels are (H, W), int64, in [0, K), with 255 for pixels that count neither in the loss nor in
a metric.

    python data.py --root data        # downloads ADE20K to data/ADEChallengeData2016
"""

import argparse
import colorsys
import shutil
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F
from tqdm import tqdm

from clip_model import MEAN, STD, download

IGNORE = 255  # the label of pixels that do not count
CLASSES_DIR = Path(__file__).resolve().parent / "classes"
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp"}
MASK_SUFFIXES = {".png", ".bmp", ".tif", ".tiff", ".gif"}  # lossless formats only
ADE20K_URL = "http://data.csail.mit.edu/places/ADEchallenge/ADEChallengeData2016.zip"
ADE20K_SHA1 = "219e1696abb36c8ba3a3afe7fb2f4b4606a897c7"


# ---------------------------------------------------------------------------------------------------------------------
# Class lists and folders


def read_classes(name_or_path: str | Path) -> tuple[list[str], list[tuple[int, int, int]]]:
    """Class names and colours (RGB, 0..255) from a list of this project ("ade20k") or a text file of the same form:
    one class a line, its name alone or name, R, G, B separated by tabs; the line's order is the class index."""
    shipped = CLASSES_DIR / f"{name_or_path}.txt"
    path = shipped if shipped.is_file() else Path(name_or_path)
    if not path.is_file():
        names = ", ".join(sorted(p.stem for p in CLASSES_DIR.glob("*.txt")))
        raise FileNotFoundError(f"{path}: no such class list; give a text file, one class a line, or one of {names}")
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not a text file in UTF-8 ({error.reason}); one class a line is expected") from error

    colours: dict[str, tuple[int, int, int]] = {}
    for number, line in enumerate(lines, start=1):
        name, *colour = [field.strip() for field in line.split("\t")]
        if not line.strip():
            continue
        if not name or (colour and not (len(colour) == 3 and all(c.isdecimal() and int(c) <= 255 for c in colour))):
            raise ValueError(f"{path}:{number}: {line!r} is neither a name nor name, R, G, B (0..255) between tabs")
        if name in colours:
            raise ValueError(f"{path}:{number}: class {name!r} is in the list twice; every class needs its own name")
        colours[name] = tuple(map(int, colour)) if colour else made_up_colour(len(colours))
    if not colours:
        raise ValueError(f"{path}: the class list is empty; write one class name a line")
    return list(colours), list(colours.values())


def made_up_colour(index: int) -> tuple[int, int, int]:
    """A colour for a class without one: hues a golden section apart never repeat, brightness takes turns."""
    rgb = colorsys.hsv_to_rgb(index * 0.618034 % 1, 0.75, (0.95, 0.65)[index % 2])
    return tuple(round(255 * c) for c in rgb)


def find_split(root: str | Path, split: str) -> tuple[Path, Path]:
    """The folders (images, masks) of a split, "train" or "val", in ADE20K's layout or the generic one."""
    root = Path(root)
    ade20k = {"train": "training", "val": "validation"}[split]
    layouts = [(ade20k, "annotations"), (split, "masks"), (split, "annotations"), (split, "labels")]
    pairs = [(root / "images" / folder, root / masks / folder) for folder, masks in layouts]
    for images, masks in pairs:
        if images.is_dir() and masks.is_dir():
            return images, masks
    found = list(dict.fromkeys(str(p.relative_to(root)) for pair in pairs for p in pair if p.is_dir()))
    state = "no such folder" if not root.is_dir() else f"found only {', '.join(found)}" if found else "no data set here"
    raise FileNotFoundError(
        f"{root}: {state}; expected images/{ade20k} and annotations/{ade20k} (ADE20K), or images/{split} and "
        f"masks/{split}; or give --{split} IMAGES MASKS; `python data.py --root data` downloads ADE20K"
    )


def files_by_stem(folder: str | Path, suffixes: set[str]) -> dict[str, Path]:
    """The images of a folder, sorted; files of other types are passed over."""
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder; expected image files ({' '.join(sorted(suffixes))})")
    files: dict[str, Path] = {}
    for path in sorted(p for p in folder.iterdir() if p.suffix.lower() in suffixes and not p.name.startswith(".")):
        if path.stem in files:
            raise ValueError(f"{path}: same name as {files[path.stem].name}; images and masks are paired by name")
        files[path.stem] = path
    if not files:
        raise FileNotFoundError(f"{folder}: no image files in this folder; expected {' '.join(sorted(suffixes))}")
    return files


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def open_image(path: str | Path) -> Image.Image:
    """A decoded Pillow image; anything that cannot be decoded to its end is an error that names the file."""
    try:
        with Image.open(path) as image:
            image.load()
            return image
    except FileNotFoundError:
        raise
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, struct.error, zlib.error and others
        raise ValueError(f"{path}: not readable as an image, remove or replace it ({error})") from error


def read_image(path: str | Path) -> Tensor:
    """Any image file as RGB, (3, H, W) uint8: grey, palette, CMYK and 1-bit are converted, alpha is dropped, 16-bit
    grey is scaled to 8. An EXIF orientation is not applied: masks and boxes are drawn on the stored pixels."""
    image = open_image(path)
    if image.mode.startswith("I"):  # 16 bits, which Pillow's own conversion would clip at 255
        grey = np.asarray(image).astype(np.int64)
        if grey.min() < 0 or grey.max() > 65535:
            raise ValueError(f"{path}: values up to {grey.max()} do not fit into 16 bits; save it with 8 or 16")
        pixels = np.repeat(((grey + 128) // 257).astype(np.uint8)[..., None], 3, axis=2)
    elif image.mode in ("F", "LAB"):
        raise ValueError(f"{path}: an image of type {image.mode} has no plain reading as RGB; save it as RGB or grey")
    else:
        via = image.convert("RGBA") if "transparency" in image.info else image  # or Pillow warns about palettes
        pixels = np.array(via.convert("RGB"))
    return torch.from_numpy(pixels).permute(2, 0, 1)  # channels last in memory, the fast case for resizing


def read_mask(path: str | Path) -> np.ndarray:
    """A mask's values as stored, (H, W) int64: 1, 8 or 16 bits, or the indices of a palette image."""
    mask = open_image(path)
    if mask.mode not in ("1", "L", "P") and not mask.mode.startswith("I"):
        raise ValueError(
            f"{path}: a mask of type {mask.mode}, but a mask is one channel of class indices; convert the colours to "
            f"indices first, with NumPy for class k: indices[(rgb == colours[k]).all(axis=-1)] = k"
        )
    return np.asarray(mask).astype(np.int64)


class SegmentationDataset(torch.utils.data.Dataset):
    """Images and masks paired by file stem.

    transform:    called with image (3, H, W) uint8 and label (H, W) uint8, for example TrainTransform or EvalTransform
    ignore_index: the mask value of pixels that do not count; 255 never counts, whatever this is
    zero_ignored: mask value 0 does not count and values 1..K are the classes 0..K-1, as in ADE20K

    dataset[key] -> (image (3, h, w) float, label (h, w) int64, path of the image). The key is an index, or (index,
    seed) as from IterationSampler: then the seed alone decides the transform's randomness, so that a sample depends
    neither on the number of workers nor on where training was resumed, and the caller's random state stays as it was.
    """

    def __init__(
        self,
        image_dir: str | Path,
        mask_dir: str | Path,
        num_classes: int,
        transform: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
        ignore_index: int = IGNORE,
        zero_ignored: bool = False,
    ):
        if not 1 <= num_classes <= 255:
            raise ValueError(f"{num_classes} classes; 1 to 255 are possible, because label 255 means ignored")
        images, masks = files_by_stem(image_dir, IMAGE_SUFFIXES), files_by_stem(mask_dir, MASK_SUFFIXES)
        for files, others, here, there in ((images, masks, "image", "mask"), (masks, images, "mask", "image")):
            if alone := [path for stem, path in files.items() if stem not in others]:
                raise ValueError(
                    f"{alone[0].parent}: {len(alone)} of {len(files)} {here}s have no {there} of the same name in "
                    f"{mask_dir if there == 'mask' else image_dir}, the first is {alone[0].name}; add or remove them"
                )
        self.pairs = [(path, masks[stem]) for stem, path in images.items()]
        self.num_classes, self.transform = num_classes, transform
        self.ignore_index, self.zero_ignored = ignore_index, zero_ignored

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, key: int | tuple[int, int]) -> tuple[Tensor, Tensor, str]:
        index, seed = key if isinstance(key, tuple) else (key, None)
        image_path, mask_path = self.pairs[index]
        image = read_image(image_path)
        label = self.read_label(mask_path)
        if image.shape[1:] != label.shape:
            (height, width), (mask_height, mask_width) = image.shape[1:], label.shape
            raise ValueError(
                f"{mask_path}: {mask_width} x {mask_height} pixels, but {image_path} has {width} x {height}; a mask "
                f"needs the size of its image as stored (an EXIF orientation is not applied)"
            )
        if seed is None:
            image, label = self.transform(image, label)
        else:
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(seed)  # torch.manual_seed would reset the GPU's generator, too
                image, label = self.transform(image, label)
        return image, label, str(image_path)

    def sampler(self, batch_size: int, seed: int, rank: int, world: int, start: int) -> "IterationSampler":
        """What train.py draws from; start: samples drawn before."""
        return IterationSampler(len(self), seed, rank, world, start)

    collate = staticmethod(torch.utils.data.default_collate)  # images (B, 3, H, W), labels (B, H, W), paths

    def read_label(self, path: Path) -> Tensor:
        """Mask values to labels, (H, W) uint8 in [0, K) or 255."""
        mask = read_mask(path)
        ignored = (mask == IGNORE) | (mask == self.ignore_index)
        if self.zero_ignored:
            ignored |= mask == 0
        label = np.where(ignored, IGNORE, mask - self.zero_ignored)
        wrong = ~ignored & ((label < 0) | (label >= self.num_classes))
        if wrong.any():
            values = np.unique(mask[wrong])
            first, last = int(self.zero_ignored), self.num_classes - 1 + self.zero_ignored
            raise ValueError(
                f"{path}: value {', '.join(map(str, values[:8]))}{', ...' if len(values) > 8 else ''} is no class; the "
                f"{self.num_classes} classes of the list are {first} to {last}, and 255 is ignored (--ignore-index V "
                f"ignores another value, --zero-ignored ignores 0 and makes 1 the first class)"
            )
        return torch.from_numpy(label.astype(np.uint8))


# ---------------------------------------------------------------------------------------------------------------------
# Transforms, as released, in the released order. Resizing, flip, hue, normalisation and padding are torchvision's.
# What differs from the released code, none of it beyond rounding:
# - it rounds to 8 bits after every photometric step, and hue to 2 degrees; here they stay float, in [0, 1]
# - its bilinear resizing (OpenCV) weights with 11 bits and rounds once; torchvision's for uint8 rounds after each axis.
#   Neither smooths before shrinking: antialias=False, because the released weights were trained and tested without.
# - for evaluation the float image is resized, where the released code rounds to 8 bits before normalisation
# torchvision's own brightness, contrast and saturation are other functions (they scale, blend with the mean grey and
# blend with the pixel's grey), hence `photometric_distortion`.


def keep_ratio_size(height: int, width: int, limits: tuple[int, int]) -> tuple[int, int]:
    """The (height, width) that fits limits (longest long side, longest short side) at the image's own ratio."""
    long, short = limits
    factor = min(long / max(height, width), short / min(height, width))
    return max(int(height * factor + 0.5), 1), max(int(width * factor + 0.5), 1)


def resize_keep_ratio(image: Tensor, limits: tuple[int, int]) -> Tensor:
    """(..., H, W) to the largest size that fits limits (long, short); bilinear, align_corners False, no antialias."""
    return F.resize(image, list(keep_ratio_size(*image.shape[-2:], limits)), antialias=False)


def normalise(image: Tensor) -> Tensor:
    """(3, H, W), RGB in [0, 1], to CLIP's normalisation."""
    return F.normalize(image, MEAN, STD)


def uniform(low: float, high: float) -> float:
    return low + (high - low) * torch.rand(()).item()


def coin() -> bool:
    return torch.rand(()).item() < 0.5


class EvalTransform:
    """Normalised image, resized to fit (long side, short side) unless `resize` is None; the label keeps its size."""

    def __init__(self, resize: tuple[int, int] | None = (2048, 512)):
        self.resize = resize

    def __call__(self, image: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        image = F.to_dtype(image, torch.float32, scale=True)
        if self.resize is not None:
            image = resize_keep_ratio(image, self.resize)
        return normalise(image).contiguous(), label.long()


class TrainTransform:
    """The released training pipeline: random resize, crop, flip, photometric distortion, normalisation, padding.

    crop_size: side of the square that comes out
    resize:    (long side, short side) in pixels that the image fits at scale 1
    scale:     range of the random factor on `resize`
    """

    def __init__(
        self, crop_size: int = 512, resize: tuple[int, int] = (2048, 512), scale: tuple[float, float] = (0.5, 2.0)
    ):
        self.crop_size, self.resize, self.scale = crop_size, resize, scale

    def __call__(self, image: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        """image (3, H, W) uint8, label (H, W) uint8 -> (3, crop, crop) float, (crop, crop) int64"""
        ratio = uniform(*self.scale)
        image = resize_keep_ratio(image, (int(self.resize[0] * ratio), int(self.resize[1] * ratio)))
        label = F.resize(label[None], list(image.shape[1:]), interpolation=InterpolationMode.NEAREST)[0]

        top, left, height, width = random_crop_box(label, self.crop_size)
        image = image[:, top : top + height, left : left + width].contiguous()
        label = label[top : top + height, left : left + width]

        if coin():
            image, label = F.horizontal_flip(image), F.horizontal_flip(label)
        image = normalise(photometric_distortion(F.to_dtype(image, torch.float32, scale=True)))

        padding = [0, 0, self.crop_size - width, self.crop_size - height]  # left, top, right, bottom
        image = F.pad(image, padding, fill=0)  # the mean colour, since it comes after normalisation
        return image, F.pad(label[None], padding, fill=IGNORE)[0].long()


def random_crop_box(label: Tensor, crop_size: int, max_share: float = 0.75, tries: int = 10) -> tuple[int, ...]:
    """(top, left, height, width) of a random crop inside `label` (H, W), smaller than crop_size where the label is.

    Up to `tries` boxes are drawn for one that holds more than one class, the largest on less than `max_share` of the
    pixels that count; after that the next box is taken unseen.
    """
    height, width = min(crop_size, label.shape[0]), min(crop_size, label.shape[1])
    for attempt in range(tries + 1):
        top = int(torch.randint(label.shape[0] - height + 1, ()))
        left = int(torch.randint(label.shape[1] - width + 1, ()))
        if attempt == tries:
            break
        pixels = torch.bincount(label[top : top + height, left : left + width].flatten(), minlength=256)[:IGNORE]
        if (pixels > 0).sum() > 1 and pixels.max() / pixels.sum() < max_share:
            break
    return top, left, height, width


def photometric_distortion(image: Tensor) -> Tensor:
    """Random brightness, contrast, saturation and hue, each with probability 0.5, on (3, H, W) RGB in [0, 1]."""
    if coin():
        image = (image + uniform(-32, 32) / 255).clamp(0, 1)
    contrast_first = coin()
    if contrast_first and coin():
        image = (image * uniform(0.5, 1.5)).clamp(0, 1)
    if coin():
        image = scale_saturation(image, uniform(0.5, 1.5))
    if coin():
        image = F.adjust_hue(image, uniform(-18, 18) / 180)  # OpenCV counts half degrees: 180 is the full circle
    if not contrast_first and coin():
        image = (image * uniform(0.5, 1.5)).clamp(0, 1)
    return image


def scale_saturation(image: Tensor, factor: float) -> Tensor:
    """HSV saturation times factor, at most 1. With V = max and S = (V - min) / V, hue and V stay as they are if every
    channel's distance from V is multiplied by the same number, the ratio of the new S to the old."""
    value = image.amax(0)                                               # (H, W)
    ratio = (value / (value - image.amin(0)).clamp_min(1e-6)).clamp_max(factor)
    return value - (value - image) * ratio                              # (3, H, W)


class IterationSampler(torch.utils.data.Sampler):
    """An endless stream of (index, seed) for SegmentationDataset, the same for every number of processes.

    The stream is one random permutation of the data set after another, with a seed for each sample; sample n depends
    on `seed` and n alone. Process `rank` of `world` takes samples start + rank, start + rank + world, and so on;
    `start` is the number of samples that all processes together have drawn before, so a resumed run goes on exactly.
    The released loader drops an epoch's last, incomplete batch; here it is filled up from the next epoch.
    """

    def __init__(self, size: int, seed: int = 0, rank: int = 0, world: int = 1, start: int = 0):
        if size < 1 or not 0 <= rank < world or start < 0:
            raise ValueError(f"no sampler of size {size}, rank {rank} of {world}, start {start}")
        self.size, self.seed, self.rank, self.world, self.start = size, seed, rank, world, start

    def permutation(self, generator: torch.Generator) -> list[int]:
        """The order of one epoch."""
        return torch.randperm(self.size, generator=generator).tolist()

    def __iter__(self) -> Iterator[tuple[int, int]]:
        epoch, position = divmod(self.start + self.rank, self.size)
        while True:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            order = self.permutation(generator)
            seeds = torch.randint(2**32, (self.size,), generator=generator).tolist()
            while position < self.size:
                yield order[position], seeds[position]
                position += self.world
            skipped, position = divmod(position, self.size)  # more than one epoch where world > size
            epoch += skipped


# ---------------------------------------------------------------------------------------------------------------------
# Download


def download_ade20k(root: str | Path, url: str = ADE20K_URL, sha1: str = ADE20K_SHA1) -> Path:
    """Downloads, checks and unpacks ADE20K (0.9 GB); returns its folder, root/ADEChallengeData2016.

    An interrupted download goes on where it stopped. Nothing has its final name before it is complete.
    """
    root, name = Path(root), Path(url).stem
    folder, archive, unpacked = root / name, root / f"{name}.zip", root / f"{name}.unpacking"
    if folder.is_dir():
        return folder
    download(url, archive, sha1, "sha1")
    shutil.rmtree(unpacked, ignore_errors=True)  # what an interrupted run left
    with zipfile.ZipFile(archive) as zipped:
        for member in tqdm(zipped.infolist(), desc=f"unpacking {name}", unit="file"):
            if not (unpacked / member.filename).resolve().is_relative_to(unpacked.resolve()):
                raise ValueError(f"{archive}: {member.filename} points out of the archive; nothing was kept")
            zipped.extract(member, unpacked)
    (unpacked / name).rename(folder)
    shutil.rmtree(unpacked)
    archive.unlink()
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description="Download ADE20K (ADEChallengeData2016, 0.9 GB): resumable, checked.")
    parser.add_argument("--root", default="data", help="folder to put ADEChallengeData2016 in (default: data)")
    args = parser.parse_args()
    try:
        print(f"ADE20K is in {download_ade20k(args.root)}")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
