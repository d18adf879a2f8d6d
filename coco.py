"""Detection data: sets in COCO's format, the released transforms, batches of like shapes, and COCO's AP.

A set is a folder of images and one JSON file with "images", "annotations" and "categories". Class k of a model is the
category of the same name; where no model says otherwise, categories come in the order of their ids. From here on images
are (3, H, W) float RGB in [0, 1] (the model normalises and pads), boxes are (x1, y1, x2, y2) in pixels, labels 0-based.

Needs pycocotools (pip install pycocotools).
"""

import contextlib
import io
import json
import math
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F
from tqdm import tqdm

from data import IterationSampler, open_image, read_image, resize_keep_ratio


def pycocotools():
    """The modules (coco, cocoeval, mask) of pycocotools, which only some of this file needs."""
    try:
        from pycocotools import coco, cocoeval, mask
    except ImportError:
        raise ValueError("detection needs pycocotools, which is not installed: pip install pycocotools") from None
    return coco, cocoeval, mask


# ------------------------------------------------------------------------------------------------ reading


def read_annotations(path: str | Path) -> dict[str, list[dict]]:
    """The JSON file's "images", "annotations" and "categories", the last in the order of their ids."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; a JSON file in COCO's format is expected")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not a JSON file, perhaps cut short ({error})") from None
    number_or_text = (int, str)
    needed = {
        "images": {"id": number_or_text, "file_name": str},
        "annotations": {"image_id": number_or_text, "category_id": int, "bbox": list},
        "categories": {"id": int, "name": str},
    }
    for name, keys in needed.items():
        if not isinstance(content, dict) or not isinstance(content.get(name), list):
            raise ValueError(f"{path}: has no list of {name!r}; COCO's format needs images, annotations and categories")
        for number, entry in enumerate(content[name]):
            if not isinstance(entry, dict) or not all(isinstance(entry.get(key), t) for key, t in keys.items()):
                raise ValueError(f"{path}: {name}[{number}] needs {', '.join(keys)}, it is {str(entry)[:80]}")
    for name, key in (("images", "id"), ("categories", "id"), ("categories", "name")):
        value, count = Counter(entry[key] for entry in content[name]).most_common(1)[0] if content[name] else (None, 0)
        if count != 1:
            raise ValueError(f"{path}: {f'{count} {name} with {key} {value!r}' if count else f'no {name} in it'}")
    categories = sorted(content["categories"], key=lambda category: category["id"])
    return {"images": content["images"], "annotations": content["annotations"], "categories": categories}


def find_coco(root: str | Path, split: str) -> tuple[Path, Path]:
    """The images' folder and the annotations of a split, "train" or "val", in COCO's layout or the generic one."""
    root, pairs = Path(root), []
    for images, annotations in ((f"{split}2017", f"instances_{split}2017.json"), (split, f"instances_{split}.json")):
        pairs += [(root / folder / images, root / "annotations" / annotations) for folder in (".", "images")]
    for images, annotations in pairs:
        if images.is_dir() and annotations.is_file():
            return images, annotations
    raise FileNotFoundError(
        f"{root}: expected {split}2017 and annotations/instances_{split}2017.json (COCO), or images/{split} and "
        f"annotations/instances_{split}.json; or give --{split} IMAGES ANNOTATIONS"
    )


class CocoDetection(torch.utils.data.Dataset):
    """Images with boxes, and masks if wanted, from a folder and a file in COCO's format.

    transform:   called with image (3, H, W) uint8 and target, for example DetectionTransform
    class_names: of the model; the file's categories have to be the same, in any order. None: the file's
    masks:       read the annotations' polygons and RLE masks, too
    train:       leave out what is not trained on: crowd regions, boxes of less than a pixel, images without boxes

    dataset[key] -> image (3, h, w) float in [0, 1]; target, a dictionary of boxes (N, 4), labels (N,), masks
    (N, h, w) uint8, image_id, size (H, W) as stored; path of the image. The key is an index, or (index, seed) as from
    GroupedSampler: then the seed alone decides the transform's randomness.

    What had to be left out or repaired is counted in `repairs`, by description; `summary()` is it as text.
    """

    def __init__(
        self,
        image_dir: str | Path,
        annotations: str | Path,
        transform: Callable[[Tensor, dict], tuple[Tensor, dict]],
        class_names: list[str] | None = None,
        *,
        masks: bool = False,
        train: bool = False,
    ):
        content = read_annotations(annotations)
        self.image_dir, self.annotations, self.transform = Path(image_dir), Path(annotations), transform
        self.masks, self.train, self.repairs = masks, train, Counter()
        self.categories = content["categories"]
        ids = {category["name"]: category["id"] for category in self.categories}
        self.class_names = list(class_names or ids)
        if set(self.class_names) != set(ids):
            extra, missing = sorted(set(ids) - set(self.class_names)), sorted(set(self.class_names) - set(ids))
            raise ValueError(
                f"{annotations}: its {len(ids)} categories are not the model's {len(self.class_names)} classes: "
                + "; ".join(f"{text} {', '.join(map(repr, names[:3]))}{', ...' if len(names) > 3 else ''}"
                            for text, names in (("only in the file:", extra), ("only in the model:", missing)) if names)
            )
        self.category_ids = [ids[name] for name in self.class_names]
        pycocotools()  # missing, it should be missed now and not at the first evaluation

        self.images = content["images"]
        self._check_images()
        self._check_annotations(content["annotations"])
        self.by_image = {image["id"]: [] for image in self.images}
        for annotation in self.kept:
            self.by_image[annotation["image_id"]].append(annotation)
        if all(annotation["iscrowd"] for annotation in self.kept):
            raise ValueError(f"{annotations}: no image has a box to train on or to score")
        if train:
            self.images = [image for image in self.images if self.by_image[image["id"]]]
            self._count("images without boxes left out of training", len(content["images"]) - len(self.images))
            if not self.images:
                raise ValueError(f"{annotations}: no image has a box to train on")

    def _count(self, what: str, number: int = 1) -> None:
        if number:
            self.repairs[what] += number

    def _check_images(self) -> None:
        absent = [image["file_name"] for image in self.images if not os.path.isfile(self.path(image))]
        if absent:
            raise FileNotFoundError(
                f"{self.annotations}: {len(absent)} of its {len(self.images)} images are not in {self.image_dir}, the "
                f"first is {absent[0]}; give the folder that belongs to it, or take them out of the file"
            )
        for image in self.images:
            if not (isinstance(image.get("width"), int) and isinstance(image.get("height"), int)):
                image["width"], image["height"] = open_image(self.path(image)).size
                self._count("image sizes missing, read from the images")

    def _check_annotations(self, annotations: list[dict]) -> None:
        """Sets self.kept: new dictionaries, with 0-based `label`, `box` inside the image, and what COCO's AP needs."""
        sizes = {image["id"]: (image["width"], image["height"]) for image in self.images}
        labels = {category_id: label for label, category_id in enumerate(self.category_ids)}
        unknown = sorted({str(a["category_id"]) for a in annotations if a["category_id"] not in labels})
        if unknown:
            raise ValueError(
                f"{self.annotations}: annotations of category id {', '.join(unknown[:5])}, which its categories do not "
                f"have; add to the categories what they are, or take the annotations out"
            )
        self.kept = []
        for annotation in annotations:
            if annotation["image_id"] not in sizes:
                self._count("annotations of images that are not in the file left out")
                continue
            bbox = annotation["bbox"]
            if len(bbox) != 4 or not all(isinstance(v, (int, float)) and math.isfinite(v) for v in bbox):
                raise ValueError(f"{self.annotations}: bbox {bbox} of image {annotation['image_id']}; [x, y, width, "
                                 f"height] in pixels are expected")
            (x, y, w, h), (width, height) = bbox, sizes[annotation["image_id"]]
            box = [min(max(x, 0), width), min(max(y, 0), height), min(max(x + w, 0), width), min(max(y + h, 0), height)]
            crowd, segmentation = int(annotation.get("iscrowd") in (1, True)), None
            if w <= 0 or h <= 0:
                self._count("boxes of zero or negative size left out")
                continue
            if box[2] <= box[0] or box[3] <= box[1]:
                self._count("boxes outside of their image left out")
                continue
            if self.masks:
                segmentation = usable_segmentation(annotation.get("segmentation"))
                if segmentation is None and not self.train:
                    self._count("boxes without a mask, which do not count in mask AP")
            if self.train:
                if crowd:
                    self._count("crowd regions left out of training")
                    continue
                if box[2] - box[0] < 1 or box[3] - box[1] < 1:
                    self._count("boxes of less than a pixel left out of training")
                    continue
                if self.masks and segmentation is None:
                    self._count("boxes without a mask left out of training")
                    continue
                if max(-x, -y, x + w - width, y + h - height) > 1:
                    self._count("boxes cut at their image's border")
            self.kept.append({
                "id": len(self.kept) + 1,  # COCO's AP takes 0 for "not matched"; ids in files are not always unique
                "image_id": annotation["image_id"],
                "category_id": annotation["category_id"],
                "label": labels[annotation["category_id"]],
                "bbox": bbox,
                "box": box,
                "area": annotation.get("area") or w * h,
                "iscrowd": crowd,
                "segmentation": segmentation,
            })

    def summary(self) -> str:
        """One line: how many images and boxes, and what was left out or repaired."""
        repairs = "; ".join(f"{number} {what}" for what, number in self.repairs.items())
        size = f"{self.annotations}: {len(self.images)} images, {len(self.kept)} boxes"
        return f"{size}, {len(self.class_names)} classes{'; ' + repairs if repairs else ''}"

    def path(self, image: dict) -> Path:
        return self.image_dir / image["file_name"]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: int | tuple[int, int]) -> tuple[Tensor, dict, str]:
        index, seed = key if isinstance(key, tuple) else (key, None)
        entry = self.images[index]
        path, size = self.path(entry), (entry["height"], entry["width"])
        image = read_image(path)
        if tuple(image.shape[1:]) != size:
            raise ValueError(
                f"{path}: {image.shape[2]} x {image.shape[1]} pixels, but {self.annotations} says {size[1]} x "
                f"{size[0]}, which its boxes belong to (an EXIF orientation is not applied)"
            )
        annotations = self.by_image[entry["id"]]
        target = {
            "boxes": torch.tensor([a["box"] for a in annotations], dtype=torch.float32).reshape(-1, 4),
            "labels": torch.tensor([a["label"] for a in annotations], dtype=torch.int64),
            "image_id": entry["id"],
            "size": size,
        }
        if self.masks and self.train:
            masks = [decode_mask(a["segmentation"], size, path) for a in annotations]
            target["masks"] = torch.from_numpy(np.stack(masks)) if masks else torch.zeros(0, *size, dtype=torch.uint8)
        with torch.random.fork_rng(devices=[], enabled=seed is not None):
            if seed is not None:
                torch.default_generator.manual_seed(seed)
            image, target = self.transform(image, target)
        return image, target, str(path)

    def sampler(self, batch_size: int, seed: int, rank: int, world: int, start: int) -> "GroupedSampler":
        """What train.py draws from; start: samples drawn before."""
        return GroupedSampler(self, batch_size, seed, rank, world, start)

    @staticmethod
    def collate(samples: list[tuple[Tensor, dict, str]]) -> tuple[list[Tensor], list[dict], list[str]]:
        """A batch as lists, since images differ in size."""
        images, targets, paths = zip(*samples, strict=True)
        return list(images), list(targets), list(paths)

    def ground_truth(self, masks: bool = False):
        """The set as pycocotools' COCO, for AP of boxes or of masks."""
        annotations = [{**a} for a in self.kept if not masks or a["segmentation"] is not None]
        return make_coco(self.images, self.categories, annotations)


def usable_segmentation(segmentation: list | dict | None) -> list | dict | None:
    """Polygons of three corners or more, or an RLE; None where nothing is left."""
    if isinstance(segmentation, dict):
        return segmentation if segmentation.get("counts") and "size" in segmentation else None

    def usable(polygon: object) -> bool:
        corners = isinstance(polygon, list) and len(polygon) >= 6 and len(polygon) % 2 == 0
        return corners and all(isinstance(value, (int, float)) for value in polygon)

    return [polygon for polygon in segmentation or () if usable(polygon)] or None


def decode_mask(segmentation: list | dict | None, size: tuple[int, int], path: Path) -> np.ndarray:
    """Polygons or an RLE, compressed or not, as (H, W) uint8; none is an empty mask."""
    _, _, coding = pycocotools()
    if segmentation is None:
        return np.zeros(size, dtype=np.uint8)
    if isinstance(segmentation, list):
        rle = coding.merge(coding.frPyObjects(segmentation, *size))
    else:
        uncompressed = isinstance(segmentation["counts"], list)
        rle = coding.frPyObjects(segmentation, *size) if uncompressed else segmentation
    mask = coding.decode(rle)
    if mask.shape != size:
        raise ValueError(f"{path}: the image has {size} (height, width), but one of its RLE masks {mask.shape}")
    return mask


def detection_limits(short_side: int = 800) -> tuple[int, int]:
    """(longest long side, longest short side) in pixels, in the released proportion: (1333, 800)."""
    return short_side * 5 // 3, short_side


class DetectionTransform:
    """The released pipeline: resized at its own ratio to fit, flipped with probability `flip`; image in [0, 1].

    resize: (longest long side, longest short side) in pixels; flip: 0.5 in training, 0 otherwise
    """

    def __init__(self, resize: tuple[int, int] = (1333, 800), flip: float = 0.0):
        self.resize, self.flip = resize, flip

    def __call__(self, image: Tensor, target: dict) -> tuple[Tensor, dict]:
        height, width = image.shape[1:]
        image = resize_keep_ratio(F.to_dtype(image, torch.float32, scale=True), self.resize)
        new_height, new_width = image.shape[1:]
        scale = target["boxes"].new_tensor([new_width / width, new_height / height] * 2)
        target = {**target, "boxes": target["boxes"] * scale}
        if "masks" in target:
            size = [new_height, new_width]
            target["masks"] = F.resize(target["masks"], size, interpolation=InterpolationMode.NEAREST)
        if self.flip and torch.rand(()).item() < self.flip:
            image = F.horizontal_flip(image)
            x1, y1, x2, y2 = target["boxes"].unbind(1)
            target["boxes"] = torch.stack([new_width - x2, y1, new_width - x1, y2], dim=1)
            if "masks" in target:
                target["masks"] = F.horizontal_flip(target["masks"])
        return image.contiguous(), target


# ------------------------------------------------------------------------------------------------ batches


class GroupedSampler(IterationSampler):
    """An IterationSampler whose batches hold wide images alone or tall images alone, so that little is padded.

    batch_size: of an iteration, over all processes and accumulation steps
    An epoch is every image once, and of each group as many again from its beginning as its last batch lacks.
    `start` has to be a multiple of batch_size.
    """

    def __init__(
        self, dataset: CocoDetection, batch_size: int, seed: int = 0, rank: int = 0, world: int = 1, start: int = 0
    ):
        wide = torch.tensor([image["width"] > image["height"] for image in dataset.images])
        self.groups = [group for group in (wide.nonzero()[:, 0], (~wide).nonzero()[:, 0]) if len(group)]
        self.batch_size = batch_size
        batches = sum(-(-len(group) // batch_size) for group in self.groups)
        super().__init__(batches * batch_size, seed, rank, world, start)

    def permutation(self, generator: torch.Generator) -> list[int]:
        """The order of one epoch."""
        batches = []
        for group in self.groups:
            order = group[torch.randperm(len(group), generator=generator)]
            length = -(-len(order) // self.batch_size) * self.batch_size
            batches.append(order[torch.arange(length) % len(order)].view(-1, self.batch_size))
        batches = torch.cat(batches)
        return batches[torch.randperm(len(batches), generator=generator)].flatten().tolist()


# ------------------------------------------------------------------------------------------------ evaluation


def evaluate_detection(
    model: nn.Module,
    dataset: CocoDetection,
    device: torch.device | str,
    *,
    save_results: str | Path | None = None,
    workers: int = 0,
    progress: bool = True,
) -> dict[str, float | Tensor]:
    """COCO's average precision of `model` on `dataset`, as pycocotools computes it, in [0, 1] (nan: no such objects).

    return: box_ap (mean over IoU 0.5 to 0.95), box_ap50, box_ap75, box_ap_small, box_ap_medium, box_ap_large and
        box_ap_per_class (K,); with a data set with masks and a model that gives them the same for mask_
    save_results: a JSON file for the detections in COCO's results format
    Several processes take the images in turn, none twice, and return the same scores. The model's mode is restored.
    """
    pycocotools()
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    was_training = model.training
    model.eval()
    results, with_masks = [], dataset.masks
    # Its own generator: iterating must not draw from the random state that training goes on with.
    loader = DataLoader(dataset, batch_size=None, sampler=range(rank, len(dataset), world), num_workers=workers,
                        generator=torch.Generator())
    with torch.no_grad():
        hidden = None if progress and rank == 0 else True
        for image, target, _ in tqdm(loader, "evaluating", leave=False, disable=hidden):
            found = model([image.to(device)], sizes=[target["size"]])[0]
            with_masks = with_masks and "masks" in found
            results += to_results(found, target["image_id"], dataset.category_ids)
    model.train(was_training)

    if world > 1:
        parts = [None] * world if rank == 0 else None  # the others would only hold them in memory
        dist.gather_object((results, with_masks), parts)
    metrics = [None]
    if rank == 0:
        if world > 1:
            results = [result for part, _ in parts for result in part]
            with_masks = all(has for _, has in parts)
        if save_results is not None:
            Path(save_results).parent.mkdir(parents=True, exist_ok=True)
            Path(save_results).write_text(json.dumps(results), encoding="utf-8")
        metrics = [average_precision(dataset, results, with_masks)]
    if world > 1:
        dist.broadcast_object_list(metrics, 0)
    return metrics[0]


def to_results(detections: dict[str, Tensor], image_id: int | str, category_ids: list[int]) -> list[dict]:
    """The detections of an image in COCO's results format: bbox [x, y, width, height], masks as RLE."""
    boxes, scores, labels = (detections[name].cpu() for name in ("boxes", "scores", "labels"))
    boxes = torch.cat([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], dim=1).tolist()
    results = [
        {"image_id": image_id, "category_id": category_ids[label], "bbox": [round(v, 3) for v in box], "score": score}
        for box, score, label in zip(boxes, scores.tolist(), labels.tolist(), strict=True)
    ]
    if "masks" in detections and results:
        _, _, coding = pycocotools()
        masks = np.asfortranarray(detections["masks"].cpu().numpy().transpose(1, 2, 0).astype(np.uint8))
        for result, rle in zip(results, coding.encode(masks), strict=True):
            result["segmentation"] = {"size": rle["size"], "counts": rle["counts"].decode("ascii")}
    return results


def average_precision(dataset: CocoDetection, results: list[dict], masks: bool) -> dict[str, float | Tensor]:
    """COCO's AP of results in COCO's format, see `evaluate_detection`."""
    _, cocoeval, _ = pycocotools()
    metrics = {}
    for name, kind in (("box", "bbox"), ("mask", "segm"))[: 1 + masks]:
        # Without its box, a detection's size is its mask's; with the mask, boxes would be read as the mask's.
        drop = "segmentation" if kind == "bbox" else "bbox"
        own = [{key: value for key, value in result.items() if key != drop} for result in results]
        with contextlib.redirect_stdout(io.StringIO()):  # it prints its progress
            truth = dataset.ground_truth(masks=kind == "segm")
            found = truth.loadRes(own) if own else make_coco(dataset.images, dataset.categories, [])
            evaluation = cocoeval.COCOeval(truth, found, kind)
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
        scores = [value if value > -1 else math.nan for value in evaluation.stats[:6].tolist()]
        suffixes = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")
        metrics.update({f"{name}_{suffix}": score for suffix, score in zip(suffixes, scores, strict=True)})
        # (IoUs, recalls, categories, areas, limits): all areas, 100 detections
        precision = torch.from_numpy(evaluation.eval["precision"])[:, :, :, 0, -1].mean(dim=(0, 1))
        per_class = dict(zip(evaluation.params.catIds, precision.tolist(), strict=True))
        values = [per_class[category_id] for category_id in dataset.category_ids]
        metrics[f"{name}_ap_per_class"] = torch.tensor([value if value > -1 else math.nan for value in values])
    return metrics


def make_coco(images: list[dict], categories: list[dict], annotations: list[dict]):
    """pycocotools' COCO from lists, without a file."""
    coco, _, _ = pycocotools()
    truth = coco.COCO()
    truth.dataset = {"images": images, "categories": categories, "annotations": annotations, "info": {}}
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
    return truth


def format_ap_table(metrics: dict, class_names: list[str]) -> str:
    """The scores as text, in per cent as papers give them: a line per class, then the means ("-": nothing to find)."""
    kinds = [kind for kind in ("box", "mask") if f"{kind}_ap" in metrics]
    width = max(len(name) for name in [*class_names, "medium objects"])
    cells = lambda values: "".join(f"{'-' if v != v else format(100 * v, '.2f'):>10}" for v in values)  # noqa: E731
    rule = "-" * (width + 10 * len(kinds))
    lines = [f"{'class':<{width}}" + "".join(f"{f'{kind} AP':>10}" for kind in kinds), rule]
    for i, name in enumerate(class_names):
        lines.append(f"{name:<{width}}" + cells(float(metrics[f"{kind}_ap_per_class"][i]) for kind in kinds))
    lines.append(rule)
    means = {"all, AP": "ap", "AP50": "ap50", "AP75": "ap75", "small objects": "ap_small",
             "medium objects": "ap_medium", "large objects": "ap_large"}
    for title, suffix in means.items():
        lines.append(f"{title:<{width}}" + cells(metrics[f"{kind}_{suffix}"] for kind in kinds))
    return "\n".join(lines)
