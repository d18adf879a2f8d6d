"""Detection with pycocotools: data in COCO's format, the released transform, batches, and COCO's AP.

A data set is a folder of images and a JSON file with "images", "annotations" and "categories". Class k of a model is
the category of the same name; without a model, categories are sorted by id. Images are (3, H, W) float RGB in [0, 1]
(the model normalizes and pads them), boxes are (x1, y1, x2, y2) in pixels, labels are int64 in [0, K)."""

import contextlib
import itertools
import json
import math
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from clip_model import replacing
from data import IterationSampler, open_image, read_image, resize_to_fit
from eval import leave_group, this_process

try:
    from pycocotools import mask as coco_mask
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval
except ImportError:  # optional: CocoDetection raises the error
    COCO = None

# COCOeval's first six numbers, in its order: name in the metrics -> title in the table
SUMMARY = {"ap": "AP", "ap50": "AP50", "ap75": "AP75", "ap_small": "APs", "ap_medium": "APm", "ap_large": "APl"}
FIELDS = {"images": {"id": (int, str), "file_name": (str,)}, "categories": {"id": (int, str), "name": (str,)}}
FIELDS["annotations"] = {"image_id": (int, str), "category_id": (int, str), "bbox": (list,)}  # what is read, its types


# ------------------------------------------------------------------------------------------------ reading
def find_coco(root: str | Path, split: str) -> tuple[Path, Path]:
    """(image folder, annotation file) of a split, "train" or "val", in COCO's layout or the generic one."""
    for name, folder in itertools.product((f"{split}2017", split), ("", "images")):
        images, annotations = Path(root, folder, name), Path(root, "annotations", f"instances_{name}.json")
        if images.is_dir() and annotations.is_file():
            return images, annotations
    generic = f"images/{split} and annotations/instances_{split}.json; or give --{split} IMAGES JSON"
    raise FileNotFoundError(f"{root}: expected {split}2017 and annotations/instances_{split}2017.json, or {generic}")


def read_annotations(path: str | Path) -> dict[str, list[dict]]:
    """The JSON file with its "images", "annotations" and "categories", checked for what FIELDS lists."""
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path}: no such file; expected annotations in COCO's format")
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not a JSON file, or cut short ({error})") from None
    for name, fields in FIELDS.items():
        entries = content.get(name) if isinstance(content, dict) else None
        if not isinstance(entries, list) or not entries:
            what = f"no {name!r}" if isinstance(content, dict) else f"a {type(content).__name__}, not a dictionary"
            raise ValueError(f"{path}: {what}; COCO's format needs images, annotations and categories")
        for i, entry in enumerate(entries):
            for key, types in fields.items():
                if not isinstance(entry, dict) or type(entry.get(key)) not in types:
                    kinds = " or ".join(kind.__name__ for kind in types)
                    raise ValueError(f"{path}: {name}[{i}] needs {key} ({kinds}), but is {entry!r:.120}")
    for name, key in (("images", "id"), ("categories", "id"), ("categories", "name")):
        value, count = Counter(entry[key] for entry in content[name]).most_common(1)[0]
        if count > 1:
            raise ValueError(f"{path}: {count} {name} with {key} {value!r:.80}; keep one of them")
    for name, key in (("images", "image_id"), ("categories", "category_id")):
        ids = list({entry["id"] for entry in content[name]} | {entry[key] for entry in content["annotations"]})
        if np.array(ids).tolist() != ids:  # as in pycocotools, where numbers become text if there is any text
            raise ValueError(f"{path}: ids of {name}, and {key} of annotations, must be all int or all str")
    return content


def make_coco(images: list[dict], categories: list[dict], annotations: list[dict]) -> "COCO":
    """pycocotools' index of a data set that is in memory."""
    coco = COCO()
    coco.dataset = {"info": {}, "images": images, "categories": categories, "annotations": annotations}
    with contextlib.redirect_stdout(None):  # it prints its progress
        coco.createIndex()
    return coco


@dataclass(eq=False)
class CocoDetection(torch.utils.data.Dataset):
    """Images with boxes, and optionally masks, from a folder and an annotation file in COCO's format.
    dataset[key] -> image (3, h, w) float in [0, 1]; target, a dictionary of boxes (N, 4), labels (N,), image_id,
    size (H, W) as stored and, in training, masks (N, h, w) uint8; path of the image. The key is an index, or
    (index, seed) as from AspectRatioSampler: then the transform's randomness depends on the seed alone.
    `coco` is pycocotools' index of what is used; `repairs` counts by description what was left out or repaired."""

    image_dir: str | Path
    annotations: str | Path
    transform: Callable[[Tensor, dict], tuple[Tensor, dict]]  # of an image (3, H, W) uint8 and its target
    class_names: list[str] | None = None  # the model's: the file's categories in any order; None: those, sorted by id
    load_masks: bool = False  # also read polygons and RLE masks: for training's targets, for evaluation's mask AP
    train: bool = False  # leave out crowd regions, boxes smaller than a pixel and images without boxes

    def __post_init__(self):
        if COCO is None:
            raise ValueError("detection needs pycocotools, which is not installed: pip install pycocotools")
        self.image_dir, self.annotations, self.repairs = Path(self.image_dir), Path(self.annotations), Counter()
        content = read_annotations(self.annotations)
        categories = sorted(content["categories"], key=lambda category: category["id"])
        ids = {category["name"]: category["id"] for category in categories}
        self.class_names = list(self.class_names or ids)
        extra, missing = sorted(set(ids) - set(self.class_names)), sorted(set(self.class_names) - set(ids))
        if extra or missing:
            raise ValueError(f"{self.annotations}: not the model's classes: missing {missing[:5]}, extra {extra[:5]}")
        self.category_ids = [ids[name] for name in self.class_names]  # of class k
        self.images = content["images"]
        names = [Path(image["file_name"]) for image in self.images]
        if absent := [n for n in names if n.is_absolute() or ".." in n.parts or not os.path.isfile(self.image_dir / n)]:
            what = f"{len(absent)} of its {len(names)} images are not in {self.image_dir}"
            how = f"the first is {str(absent[0])!r}; give the file's own folder, or remove them from the file"
            raise FileNotFoundError(f"{self.annotations}: {what}, {how}")
        for image in self.images:
            if not all(type(image.get(side)) is int and 0 < image[side] < 2**16 for side in ("width", "height")):
                image["width"], image["height"] = open_image(self.image_dir / image["file_name"]).size
                self.repairs["missing or impossible image sizes read from the images"] += 1
        boxes = self.repair(content["annotations"])
        if self.train:
            not_empty = {box["image_id"] for box in boxes}
            self.images = [image for image in self.images if image["id"] in not_empty]
            self.repairs["images without boxes left out of training"] = len(content["images"]) - len(self.images)
        self.coco = make_coco(self.images, categories, boxes)
        if all(box["iscrowd"] for box in boxes):
            no_mask = "no annotation has a mask: Mask R-CNN trains on polygons or RLE, RetinaNet needs none"
            why = no_mask if self.repairs["boxes without a mask left out of training"] else "crowd regions do not count"
            raise ValueError(f"nothing to train on or to score ({why}) in {self.summary()}")

    def repair(self, annotations: list[dict]) -> list[dict]:
        """What COCOeval reads, with the file's bbox, plus `label` in [0, K) and `box` (x1, y1, x2, y2) in the image."""
        sizes = {image["id"]: (image["height"], image["width"]) for image in self.images}
        labels = {category_id: label for label, category_id in enumerate(self.category_ids)}
        kept = []
        for i, annotation in enumerate(annotations):
            where = f"{self.annotations}: annotations[{i}]"
            bbox, category_id = annotation["bbox"], annotation["category_id"]
            if category_id not in labels:
                raise ValueError(f"{where} has category_id {category_id!r:.80}, which is not in its categories")
            if len(bbox) != 4 or not are_numbers(bbox, 1e9):
                raise ValueError(f"{where} has bbox {bbox!r:.80}; expected [x, y, width, height] in pixels")
            if (crowd := annotation.get("iscrowd") or 0) not in (0, 1):
                raise ValueError(f"{where} has iscrowd {crowd!r:.80}; expected 0 or 1")
            (x, y, w, h), (height, width) = bbox, sizes.get(annotation["image_id"], (0, 0))
            x1, y1, x2, y2 = max(x, 0), max(y, 0), min(x + w, width), min(y + h, height)
            segmentation = annotation.get("segmentation") if self.load_masks and height else None
            segmentation = read_segmentation(segmentation, [height, width], where)
            reasons = {
                "annotations of unlisted images left out": not height,
                "boxes of zero or negative size left out": w <= 0 or h <= 0,
                "boxes outside their image left out": x2 <= x1 or y2 <= y1,
                "crowd regions left out of training": self.train and crowd,
                "boxes smaller than a pixel left out of training": self.train and min(x2 - x1, y2 - y1) < 1,
                "boxes without a mask left out of training": self.train and self.load_masks and not segmentation,
            }
            if reason := next((text for text, applies in reasons.items() if applies), None):
                self.repairs[reason] += 1
                continue
            if not (are_numbers([area := annotation.get("area")], 1e10) and area > 0):
                area = w * h
                self.repairs["missing or impossible areas replaced by the boxes'"] += 1
            self.repairs["boxes clipped"] += self.train and max(-x, -y, x + w - width, y + h - height) > 1
            self.repairs["boxes without a mask not scored in mask AP"] += self.load_masks and not segmentation
            # A new id: those in files may repeat, and COCOeval takes 0 for "not matched".
            annotation.update(id=len(kept) + 1, iscrowd=int(crowd), area=area, segmentation=segmentation)
            annotation.update(label=labels[category_id], box=[x1, y1, x2, y2])
            kept.append(annotation)
        return kept

    def summary(self) -> str:
        """One line: how many images, boxes and classes, and how many of what was left out or repaired."""
        counts = [f"{what}: {count}" for what, count in self.repairs.items() if count]
        size = f"{len(self.images)} images, {len(self.coco.anns)} boxes, {len(self.class_names)} classes"
        return "; ".join([f"{self.annotations}: {size}", *counts])

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: int | tuple[int, int]) -> tuple[Tensor, dict, str]:
        index, seed = key if isinstance(key, tuple) else (key, None)
        entry = self.images[index]
        path, size = self.image_dir / entry["file_name"], (entry["height"], entry["width"])
        self.check_size(index)
        image = read_image(path)  # (3, H, W)
        annotations = self.coco.imgToAnns[entry["id"]]
        boxes = torch.tensor([a["box"] for a in annotations], dtype=torch.float32).reshape(-1, 4)  # (N, 4)
        labels = torch.tensor([a["label"] for a in annotations], dtype=torch.int64)  # (N,)
        target = {"boxes": boxes, "labels": labels, "image_id": entry["id"], "size": size}
        if self.load_masks and self.train:
            target["masks"] = torch.from_numpy(np.stack([self.coco.annToMask(a) for a in annotations]))  # (N, H, W)
        with torch.random.fork_rng(devices=[], enabled=seed is not None):
            if seed is not None:
                torch.default_generator.manual_seed(seed)  # torch.manual_seed would also reset the GPU's generator
            image, target = self.transform(image, target)
        return image, target, str(path)

    def check_size(self, index: int) -> None:
        """A ValueError if an image is not of the size that the annotations say; only its header is read."""
        entry = self.images[index]
        width, height = open_image(self.image_dir / entry["file_name"], decode=False).size
        if (width, height) != (entry["width"], entry["height"]):
            stored = f"{width} x {height} pixels, EXIF orientation not applied"
            what = f"{entry['width']} x {entry['height']}"
            raise ValueError(f"{self.image_dir / entry['file_name']}: {stored}, but {self.annotations} says {what}")

    def sampler(self, batch_size: int, seed: int, rank: int, world: int, start: int) -> "AspectRatioSampler":
        """The sampler for training; start: number of samples that were drawn before."""
        return AspectRatioSampler(self, batch_size, seed, rank, world, start)

    @staticmethod
    def collate(samples: list[tuple[Tensor, dict, str]]) -> tuple[list[Tensor], list[dict], list[str]]:
        """A batch as lists, since images differ in size."""
        return tuple(map(list, zip(*samples, strict=True)))


def are_numbers(values: list, limit: float) -> bool:
    """Whether all are numbers from -limit to limit; bools and nan do not count."""
    return set(map(type, values)) <= {int, float} and all(-limit <= value <= limit for value in values)


def read_segmentation(segmentation: object, size: list[int], where: str) -> list | dict | None:
    """An RLE, or the polygons that have three corners or more; None if nothing is left. size: [height, width] of the
    image; a ValueError that begins with `where` for what pycocotools would misread."""
    if isinstance(segmentation, dict) and (counts := segmentation.get("counts")):
        if segmentation.get("size") != size:
            raise ValueError(f"{where} has an RLE mask of size {segmentation.get('size')!r:.80}, not {size}")
        runs = decompress(counts) if isinstance(counts, str) else counts
        valid = isinstance(runs, list) and set(map(type, runs)) == {int} and min(runs) >= 0
        if not valid or sum(runs) != math.prod(size):
            raise ValueError(f"{where} has an RLE mask whose counts are not those of {size[0]} x {size[1]} pixels")
        return {"size": size, "counts": counts}
    polygons = segmentation if isinstance(segmentation, list) else []
    polygons = [p for p in polygons if isinstance(p, list) and len(p) >= 6 and len(p) % 2 == 0]
    if not all(are_numbers(p, 2 * max(size)) for p in polygons):
        raise ValueError(f"{where} has a polygon with coordinates far outside its image")
    return polygons or None


def decompress(text: str) -> list[int]:
    """The runs of an RLE that pycocotools compressed; of other text, none or wrong ones.
    A character from "0" on holds 5 bits of a number, lowest first, and 32 if more follow; the last bit is the sign.
    From the fourth on, a number is the difference from the run two before it."""
    codes = np.frombuffer(text.encode("utf-8", "surrogatepass"), np.uint8).astype(np.int64) - 48  # (characters,)
    ends = np.flatnonzero(codes < 32)  # (runs,)
    lengths = np.diff(ends, prepend=-1)  # (runs,), characters of each number
    if codes.min() < 0 or codes.max() >= 64 or codes[-1] >= 32 or lengths.max() > 7:
        return []
    starts = ends + 1 - lengths  # (runs,)
    bits = 5 * (np.arange(len(codes)) - starts.repeat(lengths))  # (characters,)
    runs = np.add.reduceat((codes & 31) << bits, starts) - ((codes[ends] & 16) << 5 * lengths - 4)  # (runs,)
    runs[1::2], runs[2::2] = runs[1::2].cumsum(), runs[2::2].cumsum()
    return runs.tolist()


# ------------------------------------------------------------------------------------------------ transform and batches
@dataclass
class DetectionTransform:
    """The released pipeline: resize to the largest size of the same aspect ratio within the limits, flip at random."""

    short_side: int = 800  # limit of the short side in pixels; that of the long side is 5/3 of it: 1333
    flip: float = 0.0  # probability, 0.5 in training

    def __call__(self, image: Tensor, target: dict) -> tuple[Tensor, dict]:
        """image (3, H, W) uint8 -> (3, h, w) float in [0, 1]; target with boxes and masks to match."""
        height, width = image.shape[1:]
        image = resize_to_fit(image / 255, (self.short_side * 5 // 3, self.short_side))  # (3, h, w)
        new_height, new_width = image.shape[1:]
        boxes, masks = target["boxes"] * torch.tensor([new_width / width, new_height / height] * 2), {}  # (N, 4)
        if "masks" in target:
            masks["masks"] = F.interpolate(target["masks"][None], image.shape[1:])[0]  # (N, h, w), nearest
        if self.flip and torch.rand(()).item() < self.flip:
            x1, y1, x2, y2 = boxes.unbind(1)  # (N,)
            boxes = torch.stack([new_width - x2, y1, new_width - x1, y2], dim=1)  # (N, 4)
            image, masks = image.flip(-1), {name: each.flip(-1) for name, each in masks.items()}
        return image.contiguous(), {**target, "boxes": boxes, **masks}


class AspectRatioSampler(IterationSampler):
    """An IterationSampler whose batches are either all wide or all tall images, so that little is padded. An epoch is
    every image once; each group's last batch is filled up from the beginning of the group.
    batch_size: per iteration, over all processes and accumulation steps; `start` must be a multiple of it"""

    def __init__(self, dataset: CocoDetection, batch_size: int, seed: int, rank: int, world: int, start: int):
        wide = torch.tensor([image["width"] > image["height"] for image in dataset.images])
        self.groups, self.batch_size = [wide.nonzero()[:, 0], (~wide).nonzero()[:, 0]], batch_size
        super().__init__(len(self.permutation(torch.Generator())), seed, rank, world, start)

    def permutation(self, generator: torch.Generator) -> list[int]:
        """The order of one epoch."""
        batches = []  # of indices (batch_size,)
        for group in filter(len, self.groups):
            order = group[torch.randperm(len(group), generator=generator)]
            length = math.ceil(len(order) / self.batch_size) * self.batch_size
            batches.extend(order[torch.arange(length) % len(order)].split(self.batch_size))
        return torch.cat([batches[i] for i in torch.randperm(len(batches), generator=generator)]).tolist()


# ------------------------------------------------------------------------------------------------ evaluation
def evaluate_detection(
    model: nn.Module, dataset: CocoDetection, device: torch.device | str, *, save_results: Path | None = None, workers=0
) -> dict[str, float | Tensor]:
    """COCO's average precision of `model` on `dataset` as pycocotools computes it, in per cent; nan: no such objects.
    save_results: a JSON file for the detections, in COCO's results format
    return: box_ap (mean over IoU 0.5 to 0.95), box_ap50, box_ap75, box_ap_small, box_ap_medium, box_ap_large and
        box_ap_per_class (K,); the same with mask_ if the data set loads masks and the model predicts them
    Several processes share the images and return the same scores. The model's mode is restored."""
    rank, world = this_process()
    if save_results is not None and rank == 0:
        if os.path.lexists(save_results):  # perhaps the annotations, or a device
            raise ValueError(f"{save_results} already exists: name another file")
        save_results.parent.mkdir(parents=True, exist_ok=True)
        with replacing(save_results) as part:
            part.write_text("[]")  # if it cannot be written, then an error now, not after hours
        save_results.unlink()
    results, was_training = [], model.training
    model.eval()
    # A generator of its own: iterating must not change the random state that training resumes with.
    options = {"sampler": range(rank, len(dataset), world), "num_workers": workers, "generator": torch.Generator()}
    loader = torch.utils.data.DataLoader(dataset, batch_size=None, worker_init_fn=leave_group, **options)
    with torch.no_grad():
        for image, target, _ in tqdm(loader, "evaluating", leave=False, disable=rank > 0 or None):  # None: in terminals
            detections = model([image.to(device)], sizes=[target["size"]])[0]
            results += to_results(detections, target["image_id"], dataset.category_ids)
    model.train(was_training)
    if world > 1:
        parts = [None] * world
        dist.all_gather_object(parts, results)
        results = list(itertools.chain(*parts))
    if save_results is not None and rank == 0:
        with replacing(save_results) as part:
            part.write_text(json.dumps(results), encoding="utf-8")
    return average_precision(dataset, results)


def to_results(detections: dict[str, Tensor], image_id: int | str, category_ids: list[int]) -> list[dict]:
    """One image's detections in COCO's results format: bbox [x, y, width, height]; with pycocotools, masks as RLE."""
    boxes, scores, labels = (detections[name].cpu() for name in ("boxes", "scores", "labels"))
    boxes = torch.cat([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], dim=1).tolist()
    results = [
        {"image_id": image_id, "category_id": category_ids[label], "bbox": [round(v, 3) for v in box], "score": score}
        for box, score, label in zip(boxes, scores.tolist(), labels.tolist(), strict=True)
    ]
    if "masks" in detections and COCO is not None:
        for result, mask in zip(results, detections["masks"].cpu().numpy(), strict=True):  # (H, W)
            rle = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
            result["segmentation"] = {"size": rle["size"], "counts": rle["counts"].decode("ascii")}
    return results


def average_precision(dataset: CocoDetection, results: list[dict]) -> dict[str, float | Tensor]:
    """COCO's AP, in per cent, of detections in COCO's results format; see `evaluate_detection`."""
    data, metrics = dataset.coco.dataset, {}
    with_masks = dataset.load_masks and all("segmentation" in result for result in results)
    for name, kind in (("box", "bbox"), ("mask", "segm"))[: 1 + with_masks]:
        # Copies, because pycocotools writes into both. Without its bbox, a detection's area is that of its mask.
        truth = [dict(a) for a in data["annotations"] if kind == "bbox" or a["segmentation"]]
        detections = [{k: v for k, v in result.items() if kind == "bbox" or k != "bbox"} for result in results]
        truth = make_coco(data["images"], data["categories"], truth)
        with contextlib.redirect_stdout(None):
            evaluation = COCOeval(truth, truth.loadRes(detections) if detections else COCO(), kind)
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
        # (IoUs, recalls, categories, areas, limits) -> (categories,): all areas, at most 100 detections per image
        per_category = evaluation.eval["precision"][:, :, :, 0, -1].mean(axis=(0, 1))
        order = [evaluation.params.catIds.index(category_id) for category_id in dataset.category_ids]
        values = np.concatenate([evaluation.stats[:6], per_category[order]])
        values = np.where(values < 0, np.nan, 100 * values)  # pycocotools' -1: no such objects
        metrics |= {f"{name}_{key}": value for key, value in zip(SUMMARY, values[:6].tolist(), strict=True)}
        metrics[f"{name}_ap_per_class"] = torch.from_numpy(values[6:])  # (K,)
    return metrics


def format_ap_table(metrics: dict, class_names: list[str]) -> str:
    """AP in per cent as text: one line per class, then the means ("-": no such objects)."""
    kinds, titles = [kind for kind in ("box", "mask") if f"{kind}_ap" in metrics], [*class_names, *SUMMARY.values()]
    width = max(map(len, ["class", *titles]))
    lines = [f"{'class':<{width}}" + "".join(f"{f'{kind} AP':>10}" for kind in kinds)]
    columns = [[*metrics[f"{k}_ap_per_class"].tolist(), *(metrics[f"{k}_{name}"] for name in SUMMARY)] for k in kinds]
    for title, *values in zip(titles, *columns, strict=True):
        lines.append(f"{title:<{width}}" + "".join(f"{'-' if math.isnan(v) else f'{v:.2f}':>10}" for v in values))
    for i in (1, len(class_names) + 2):
        lines.insert(i, "-" * len(lines[0]))
    return "\n".join(lines)
