"""Detection data and AP are COCO's: a data set is read as its file says, mistakes in it are named or counted, training
resumes exactly, and AP equals what pycocotools computes from the files. A tiny model learns one image."""

import contextlib
import importlib.util
import io
import json
import sys
from collections import Counter

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import nn

import coco
from coco import SUMMARY, CocoDetection, DetectionTransform, evaluate_detection, find_coco, format_ap_table
from detection import build_model

COLORS = {"square": (200, 40, 40), "disc": (40, 60, 220), "bar": (30, 160, 60)}
CATEGORIES = [{"id": 7, "name": "disc"}, {"id": 3, "name": "square"}, {"id": 90, "name": "bar"}]  # not sorted by id


def draw(folder, sizes, seed=0):
    """Images of the given (width, height) with one object of each category on gray; returns their annotation file."""
    random = np.random.default_rng(seed)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    images, annotations = [], []
    for i, (width, height) in enumerate(sizes):
        image = Image.new("RGB", (width, height), (128, 128, 128))
        pen = ImageDraw.Draw(image)
        for j, category in enumerate(CATEGORIES):
            w = int(random.integers(width // 4, width // 3 - 3))
            h = w if category["name"] != "bar" else w // 2
            x, y = j * width // 3 + int(random.integers(0, 4)), int(random.integers(0, height - h))
            shape = pen.ellipse if category["name"] == "disc" else pen.rectangle
            shape((x, y, x + w - 1, y + h - 1), fill=COLORS[category["name"]])
            polygon = [x, y, x + w, y, x + w, y + h, x, y + h]
            entry = {"id": len(annotations) + 1, "image_id": 100 + i, "category_id": category["id"], "iscrowd": 0}
            annotations.append({**entry, "bbox": [x, y, w, h], "area": w * h, "segmentation": [polygon]})
        image.save(folder / "images" / f"{i}.png")
        images.append({"id": 100 + i, "file_name": f"{i}.png", "width": width, "height": height})
    return {"images": images, "annotations": annotations, "categories": [dict(c) for c in CATEGORIES]}


def open_set(folder, content=None, short_side=64, flip=0.0, **options):
    """The data set of folder/images and folder/set.json, which is written first if there is new content."""
    if content is not None:
        (folder / "set.json").write_text(json.dumps(content))
    return CocoDetection(folder / "images", folder / "set.json", DetectionTransform(short_side, flip), **options)


@pytest.fixture
def content(tmp_path):
    return draw(tmp_path, [(96, 64), (64, 96), (96, 64)])


class Oracle(nn.Module):
    """Returns prepared detections, one image after another."""

    def __init__(self, detections):
        super().__init__()
        self.detections = iter(detections)

    def forward(self, images, sizes=None):
        return [next(self.detections)]


def perfect_detections(dataset, keep=lambda annotation: True):
    """The ground truth that `keep` selects as a model's detections."""
    detections = []
    for image in dataset.images:
        annotations = [a for a in dataset.coco.imgToAnns[image["id"]] if keep(a)]
        boxes = torch.tensor([a["box"] for a in annotations], dtype=torch.float32).reshape(-1, 4)
        labels = torch.tensor([a["label"] for a in annotations], dtype=torch.int64)
        detections.append({"boxes": boxes, "scores": torch.linspace(0.9, 0.5, len(labels)), "labels": labels})
        if dataset.load_masks:
            masks = torch.zeros(len(labels), image["height"], image["width"], dtype=torch.bool)
            for mask, annotation in zip(masks, annotations, strict=True):
                mask[:] = torch.from_numpy(dataset.coco.annToMask(annotation))
            detections[-1]["masks"] = masks
    return detections


def score(dataset, detections, **options):
    return evaluate_detection(Oracle(detections), dataset, "cpu", **options)


# ------------------------------------------------------------------------------------------------ reading


def test_both_folder_layouts_are_found(tmp_path):
    (tmp_path / "annotations").mkdir()
    for images, annotations in (("images/val", "instances_val.json"), ("val2017", "instances_val2017.json")):
        with pytest.raises(FileNotFoundError, match="expected train2017 and .* or images/train"):
            find_coco(tmp_path, "train")
        (tmp_path / images).mkdir(parents=True)
        (tmp_path / "annotations" / annotations).touch()
        assert find_coco(tmp_path, "val") == (tmp_path / images, tmp_path / "annotations" / annotations)


def test_samples_match_the_file(content, tmp_path):
    dataset = open_set(tmp_path, content, 128, load_masks=True, train=True)
    assert len(dataset) == 3 and dataset.class_names == ["square", "disc", "bar"] and dataset.category_ids == [3, 7, 90]
    image, target, path = dataset[0]
    assert image.shape == (3, 128, 192) and image.dtype == torch.float32 and 0 <= image.min() and image.max() <= 1
    assert target["labels"].tolist() == [1, 0, 2] and target["image_id"] == 100 and target["size"] == (64, 96)
    assert path == str(tmp_path / "images" / "0.png")
    for box, label, mask in zip(target["boxes"], target["labels"], target["masks"], strict=True):
        x1, y1, x2, y2 = box.int().tolist()
        color = image[:, (y1 + y2) // 2, (x1 + x2) // 2] * 255
        assert color.round().int().tolist() == list(COLORS[dataset.class_names[label]])
        assert mask[y1:y2, x1:x2].all() and mask.sum() == (y2 - y1) * (x2 - x1)


def test_classes_have_the_models_order(content, tmp_path):
    dataset = open_set(tmp_path, content, class_names=["bar", "disc", "square"])
    assert dataset.category_ids == [90, 7, 3] and dataset[0][1]["labels"].tolist() == [1, 2, 0]
    with pytest.raises(ValueError, match=r"set.json: .* missing \['cat'\], extra \['bar', 'square'\]"):
        open_set(tmp_path, class_names=["disc", "cat"])


def test_a_flip_mirrors_image_boxes_and_masks(content, tmp_path):
    image, target, _ = open_set(tmp_path, content, load_masks=True, train=True)[0]
    mirrored, mirrored_target, _ = open_set(tmp_path, content, flip=1.0, load_masks=True, train=True)[0]
    torch.testing.assert_close(mirrored, image.flip(2))
    assert torch.equal(mirrored_target["masks"], target["masks"].flip(2))
    boxes = (target["boxes"] - torch.tensor([96.0, 0, 96, 0])).abs()[:, [2, 1, 0, 3]]
    torch.testing.assert_close(mirrored_target["boxes"], boxes)


def test_images_are_resized_as_released(content, tmp_path):
    dataset = open_set(tmp_path, content, 800, load_masks=True, train=True)
    image, target, _ = dataset[0]
    assert image.shape == (3, 800, 1200) and target["masks"].shape == (3, 800, 1200)
    boxes = torch.tensor([a["box"] for a in dataset.coco.imgToAnns[100]])
    torch.testing.assert_close(target["boxes"], boxes * 12.5)
    wide, _ = DetectionTransform()(torch.zeros(3, 100, 400, dtype=torch.uint8), {"boxes": torch.zeros(0, 4)})
    assert wide.shape == (3, 333, 1333)  # the long side limits


def test_a_samples_seed_decides_its_flip(content, tmp_path):
    dataset = open_set(tmp_path, content, flip=0.5)
    state = torch.get_rng_state()
    first, again = ([dataset[0, seed][1]["boxes"][0, 0].item() for seed in range(20)] for _ in range(2))
    assert len(set(first)) == 2 and first == again
    assert torch.equal(torch.get_rng_state(), state)


def test_polygons_and_both_kinds_of_rle_are_read(content, tmp_path):
    mask = np.zeros((64, 96), dtype=np.uint8)
    mask[10:30, 20:50] = 1
    compressed = coco_mask.encode(np.asfortranarray(mask))["counts"].decode()
    runs = np.diff(np.flatnonzero(np.diff(mask.flatten(order="F"), prepend=2, append=2))).tolist()  # starts with 0s
    polygon = [[20, 10, 50, 10, 50, 30, 20, 30]]
    shapes = [polygon, {"size": [64, 96], "counts": runs}, {"size": [64, 96], "counts": compressed}]
    for annotation, segmentation in zip(content["annotations"], shapes, strict=False):
        annotation.update(segmentation=segmentation, bbox=[20, 10, 30, 20])
    for loaded in open_set(tmp_path, content, load_masks=True, train=True)[0][1]["masks"]:
        assert torch.equal(loaded, torch.from_numpy(mask))
    shapes[2]["size"] = [96, 64]
    with pytest.raises(ValueError, match=r"annotations\[2\] has an RLE mask of size \[96, 64\], not \[64, 96\]"):
        open_set(tmp_path, content, load_masks=True)


def test_crowds_and_images_without_boxes_are_evaluated_but_not_trained_on(content, tmp_path):
    for annotation in content["annotations"][2:6]:  # one in the first image, all in the second
        annotation["iscrowd"] = 1
    train = open_set(tmp_path, content, train=True)
    assert len(train) == 2 and [len(train[i][1]["boxes"]) for i in range(2)] == [2, 3]
    counts = {"crowd regions left out of training": 4, "images without boxes left out of training": 1}
    assert train.repairs == Counter(counts)
    val = open_set(tmp_path)
    assert len(val) == 3 and not val.repairs.total() and sum(a["iscrowd"] for a in val.coco.anns.values()) == 4


def test_repairs_are_counted(content, tmp_path):
    a = content["annotations"]
    a[0]["bbox"] = [10, 10, 0, 5]
    a[1]["bbox"] = [10, 10, -4, 5]
    a[2]["bbox"] = [200, 10, 20, 20]
    a[3]["bbox"] = [-10, -10, 40, 40]
    a[4]["image_id"] = 999
    a[5]["segmentation"] = [[], [1, 2, 3, 4]]
    a[6]["bbox"] = [5, 5, 0.5, 20]
    a[7]["segmentation"] = [1, 2, 30, 2, 30, 30]  # numbers, not polygons
    a[8]["segmentation"] = [[[1, 2], [3, 4]]]
    a[8]["area"] = float("nan")
    a += [{**a[8], "segmentation": [[40, 5, 60, 5, 60, 25]], "bbox": [40, 5, 20, 20]}]  # with the id of another
    a[-1]["area"] = -5
    del content["images"][1]["width"]
    content["images"][2]["height"] = 70000
    train = open_set(tmp_path, content, load_masks=True, train=True)
    counts = {
        "missing or impossible image sizes read from the images": 2,
        "missing or impossible areas replaced by the boxes'": 1,
        "boxes of zero or negative size left out": 2,
        "boxes outside their image left out": 1,
        "boxes clipped": 1,
        "annotations of unlisted images left out": 1,
        "boxes without a mask left out of training": 3,
        "boxes smaller than a pixel left out of training": 1,
        "images without boxes left out of training": 1,
    }
    assert train.repairs == Counter(counts)
    assert "2 images, 2 boxes, 3 classes; missing or impossible image sizes read from the images: 2;" in train.summary()
    assert [a["area"] for a in train.coco.anns.values()] == [content["annotations"][3]["area"], 400]
    assert [a["box"] for a in train.coco.anns.values()] == [[0, 0, 30, 30], [40, 5, 60, 25]]

    val = open_set(tmp_path, load_masks=True)
    assert [len(val.coco.imgToAnns[i]) for i in (100, 101, 102)] == [0, 2, 4]
    assert val.repairs["boxes without a mask not scored in mask AP"] == 3 and val.repairs["boxes clipped"] == 0
    metrics = score(val, perfect_detections(val, keep=lambda a: a["segmentation"]))
    assert metrics["mask_ap"] == pytest.approx(100) and metrics["box_ap"] < 70


@pytest.mark.parametrize(
    "name, index, change, message",
    [
        ("categories", None, None, "no 'categories'"),
        ("images", None, [], "no 'images'"),
        ("annotations", None, [], "no 'annotations'"),
        ("images", 0, {"file_name": 3}, r"images\[0\] needs file_name \(str\), but is {'id': 100"),
        ("images", 1, {"id": True}, r"images\[1\] needs id \(int or str\)"),
        ("annotations", 4, {"bbox": None}, r"annotations\[4\] needs bbox \(list\)"),
        ("annotations", 0, {"category_id": [1]}, r"annotations\[0\] needs category_id \(int or str\)"),
        ("categories", 0, {"name": None}, r"categories\[0\] needs name \(str\)"),
        ("categories", 1, {"id": 3.0}, r"categories\[1\] needs id \(int or str\)"),
        ("images", 2, {"id": "102"}, "ids of images, and image_id of annotations, must be all int or all str"),
        ("annotations", 2, {"category_id": "90"}, "ids of categories, and category_id of annotations, must be all int"),
        ("images", 1, {"id": 100}, "2 images with id 100"),
        ("categories", 1, {"name": "disc"}, "2 categories with name 'disc'"),
        ("annotations", 1, {"category_id": 5}, r"annotations\[1\] has category_id 5"),
        ("annotations", 1, {"bbox": [1, float("nan"), 3, 4]}, r"annotations\[1\] has bbox \[1, nan, 3, 4\]"),
        ("annotations", 1, {"bbox": [1, 2, 3, 10**400]}, r"annotations\[1\] has bbox \[1, 2, 3, 1000"),
        ("annotations", 1, {"bbox": [1, 2, True, 4]}, r"annotations\[1\] has bbox \[1, 2, True, 4\]"),
        ("annotations", 1, {"iscrowd": "1"}, r"annotations\[1\] has iscrowd '1'; expected 0 or 1"),
        ("annotations", 1, {"iscrowd": [0]}, r"annotations\[1\] has iscrowd \[0\]; expected 0 or 1"),
        ("images", 2, {"file_name": "9.png"}, "1 of its 3 images are not in .*the first is '9.png'"),
        ("images", 2, {"file_name": "../images/2.png"}, "1 of its 3 images are not in .*the first is '../images/2"),
        ("images", 2, {"file_name": "/dev/null"}, "1 of its 3 images are not in .*the first is '/dev/null'"),
        ("images", 2, {"file_name": "2.png\0"}, r"1 of its 3 images are not in .*the first is '2.png\\x00'"),
        ("annotations", None, [{"image_id": 100, "category_id": 3, "bbox": [0, 0, 9, 9], "iscrowd": 1}], "nothing to"),
    ],
)
@pytest.mark.parametrize("train", [False, True])
def test_a_file_that_cannot_be_used_is_named(name, index, change, message, train, content, tmp_path):
    if index is None:
        content[name] = change
    else:
        content[name][index].update(change)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        open_set(tmp_path, content, train=train)


@pytest.mark.parametrize("segmentation", [None, [], "text", 5, {}, {"counts": []}, [[1, 2, 3, 4]]])
def test_training_on_masks_without_any_says_so(segmentation, content, tmp_path):
    for annotation in content["annotations"]:
        annotation["segmentation"] = segmentation
    with pytest.raises(ValueError, match="no annotation has a mask: Mask R-CNN .* RetinaNet needs none"):
        open_set(tmp_path, content, load_masks=True, train=True)
    assert len(open_set(tmp_path, train=True)) == 3
    assert open_set(tmp_path, load_masks=True).repairs["boxes without a mask not scored in mask AP"] == 9


ONES = coco_mask.encode(np.ones((64, 96), dtype=np.uint8, order="F"))["counts"].decode()


@pytest.mark.parametrize(
    "segmentation, message",
    [
        ({"size": [10, 10], "counts": [100]}, r"an RLE mask of size \[10, 10\], not \[64, 96\]"),
        ({"counts": [64 * 96]}, "an RLE mask of size None"),
        *[
            ({"size": [64, 96], "counts": counts}, "an RLE mask whose counts are not those of 64 x 96 pixels")
            for counts in (
                [64 * 96 * 4],
                [100],
                [10**12, 64 * 96 - 10**12],
                [64 * 96, 0.0],
                [[64 * 96]],
                [64 * 96, True],
                5,
                {"0": 1},
                "garbage!",
                "o" * 10**6,  # more and more bits of one number
                "é",
                ONES[:-1],
                ONES + "1",
                ONES * 4,
            )
        ],
        *[
            ([[1, 1, 9, 1, 9, value]], "a polygon with coordinates far outside its image")
            for value in (float("nan"), float("inf"), -float("inf"), True, "9", None, [9], 10**400, 1e9)
        ],
    ],
)
def test_masks_that_would_hang_or_be_misread_are_named(segmentation, message):
    with pytest.raises(ValueError, match=r"set.json: annotations\[1\] has " + message):
        coco.read_segmentation(segmentation, [64, 96], "set.json: annotations[1]")


def test_compressed_masks_are_read_as_by_pycocotools():
    random = np.random.default_rng(0)
    for i in range(300):
        height, width = (int(side) for side in random.integers(1, 200, 2))
        noise = random.random((height, width)) < random.random()
        mask = noise if i % 3 else np.kron(noise[::9, ::9], np.ones((9, 9), bool))[:height, :width]
        text = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))["counts"].decode()
        change = np.flatnonzero(np.diff(mask.flatten(order="F"), prepend=False)).tolist()  # runs begin with zeros
        assert coco.decompress(text) == np.diff([0, *change, mask.size]).tolist()
        assert coco.read_segmentation({"size": [*mask.shape], "counts": text}, [*mask.shape], "")


@pytest.mark.parametrize(
    "text, message",
    [
        (b"", "not a JSON file, or cut short"),
        (b'{"images": [', "not a JSON file, or cut short"),
        (b"[" * 200_000, "not a JSON file, or cut short .*recursion"),
        ('{"images": "\xe9"}'.encode("latin-1"), "not a JSON file, or cut short .*utf-8"),
        (b"[]", "a list, not a dictionary; COCO's format needs"),
        (b'{"images": [null]}', r"images\[0\] needs id \(int or str\), but is None"),
        (None, "no such file"),
    ],
)
def test_a_file_that_is_not_of_this_format_is_named(text, message, tmp_path):
    (tmp_path / "set.json").mkdir() if text is None else (tmp_path / "set.json").write_bytes(text)
    with pytest.raises((ValueError, FileNotFoundError), match="set.json: " + message) as error:
        CocoDetection(tmp_path, tmp_path / "set.json", DetectionTransform())
    assert "\n" not in str(error.value)


def test_an_image_of_another_size_is_named(content, tmp_path):
    content["images"][0]["width"] = 90
    with pytest.raises(ValueError, match="0.png: 96 x 64 pixels, .*set.json says 90 x 64"):
        open_set(tmp_path, content)[0]


@pytest.mark.parametrize("train", [True, False])
def test_without_pycocotools_the_file_imports_and_a_data_set_asks_for_it(content, tmp_path, monkeypatch, train):
    monkeypatch.setitem(sys.modules, "pycocotools", None)
    spec = importlib.util.spec_from_file_location("coco_alone", coco.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with pytest.raises(ValueError, match="pip install pycocotools"):
        module.CocoDetection(tmp_path / "images", tmp_path / "set.json", None, train=train)


# ------------------------------------------------------------------------------------------------ batches


def test_batches_have_one_shape_and_resume_exactly(tmp_path):
    dataset = open_set(tmp_path, draw(tmp_path, [(96, 64)] * 7 + [(64, 96)] * 4), train=True)
    sampler = dataset.sampler(4, seed=5, rank=0, world=1, start=0)
    assert sampler.size == 12  # 7 wide images fill two batches of 4, and 4 tall images fill one
    stream = [key for key, _ in zip(sampler, range(48), strict=False)]
    for first in range(0, len(stream), 4):
        assert len({index < 7 for index, _ in stream[first : first + 4]}) == 1
    assert {index for index, _ in stream[:12]} == set(range(11))
    assert [index for index, _ in stream[:12]] != [index for index, _ in stream[12:24]]

    later = dataset.sampler(4, seed=5, rank=0, world=1, start=20)
    assert [key for key, _ in zip(later, range(12), strict=False)] == stream[20:32]
    parts = [dataset.sampler(4, seed=5, rank=rank, world=2, start=8) for rank in (0, 1)]
    parts = [[key for key, _ in zip(part, range(8), strict=False)] for part in parts]
    assert [key for pair in zip(*parts, strict=True) for key in pair] == stream[8:24]

    loader = torch.utils.data.DataLoader(dataset, 4, sampler=sampler, collate_fn=dataset.collate)
    images, targets, paths = next(iter(loader))
    assert len(images) == len(targets) == len(paths) == 4 and len({image.shape for image in images}) == 1


# ------------------------------------------------------------------------------------------------ AP


@pytest.mark.parametrize("load_masks", [False, True])
def test_perfect_detections_score_100_and_none_score_0(load_masks, content, tmp_path):
    dataset = open_set(tmp_path, content, load_masks=load_masks)
    metrics = score(dataset, perfect_detections(dataset))
    nothing = score(dataset, perfect_detections(dataset, keep=lambda a: False))
    kinds = ("box", "mask") if load_masks else ("box",)
    assert {key.split("_")[0] for key in metrics} == set(kinds)
    for kind in kinds:
        assert metrics[f"{kind}_ap"] == pytest.approx(100) and nothing[f"{kind}_ap"] == nothing[f"{kind}_ap50"] == 0
        assert metrics[f"{kind}_ap_per_class"].tolist() == pytest.approx([100] * 3)
        assert np.isnan(metrics[f"{kind}_ap_large"])
    lines = format_ap_table(metrics, dataset.class_names).splitlines()
    assert len(lines) == 12 and len({len(line) for line in lines}) == 1
    assert lines[2].split() == ["square", *["100.00"] * len(kinds)]
    assert lines[-1].split() == ["APl", *["-"] * len(kinds)]


def test_ap_equals_pycocotools_with_crowds_and_empty_images(tmp_path):
    content = draw(tmp_path, [(96, 64)] * 4 + [(64, 96)] * 2)
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] != 103]  # no boxes in this image
    crowd = {"size": [64, 96], "counts": [0] + [60, 4] * 60 + [36 * 64]}
    content["annotations"][1].update(iscrowd=1, bbox=[0, 0, 60, 60], segmentation=crowd)
    dataset = open_set(tmp_path, content, class_names=["square", "bar", "disc"], load_masks=True)
    generator = torch.Generator().manual_seed(0)
    detections = perfect_detections(dataset, keep=lambda a: not a["iscrowd"])
    for each, image in zip(detections, dataset.images, strict=True):  # shift, relabel, and add two false positives
        each["labels"][:1] = 2
        boxes = each["boxes"] + torch.randn(each["boxes"].shape, generator=generator) * 2
        scores = torch.rand(len(boxes), generator=generator)
        masks = torch.zeros(2, image["height"], image["width"], dtype=torch.bool)
        masks[:, 10:30, 10:20] = True
        each["boxes"] = torch.cat([boxes, torch.tensor([[5.0, 5.0, 20.0, 30.0], [30.0, 10.0, 50.0, 40.0]])])
        each["scores"] = torch.cat([scores, torch.tensor([0.7, 0.2])])
        each["labels"] = torch.cat([each["labels"], torch.tensor([0, 0])])
        each["masks"] = torch.cat([each["masks"].roll((2, 1), (1, 2)), masks])

    metrics = score(dataset, detections, save_results=tmp_path / "results.json")
    results = json.loads((tmp_path / "results.json").read_text())
    assert results[0].keys() == {"image_id", "category_id", "bbox", "score", "segmentation"}
    assert {result["category_id"] for result in results} <= {3, 7, 90}
    for name, kind, unused in (("box", "bbox", "segmentation"), ("mask", "segm", "bbox")):
        with contextlib.redirect_stdout(io.StringIO()):
            truth = COCO(str(tmp_path / "set.json"))
            predictions = truth.loadRes([{k: v for k, v in result.items() if k != unused} for result in results])
            evaluation = COCOeval(truth, predictions, kind)
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
        expected = [100 * value if value > -1 else float("nan") for value in evaluation.stats[:6]]
        assert [metrics[f"{name}_{key}"] for key in SUMMARY] == pytest.approx(expected, nan_ok=True)
        assert 5 < metrics[f"{name}_ap"] < 95
        precision = evaluation.eval["precision"][..., 0, -1].mean((0, 1))  # (3,), categories sorted by id: 3, 7, 90
        assert metrics[f"{name}_ap_per_class"].tolist() == pytest.approx((100 * precision[[0, 2, 1]]).tolist())


def test_results_that_cannot_be_written_end_before_the_evaluation(content, tmp_path):
    with pytest.raises(ValueError, match="images already exists"):
        score(open_set(tmp_path, content), [], save_results=tmp_path / "images")


def test_ids_may_be_text(content, tmp_path):
    for key in ("image_id", "category_id"):
        for annotation in content["annotations"]:
            annotation[key] = f"{annotation[key]:03}"
    for entry in content["images"] + content["categories"]:
        entry["id"] = f"{entry['id']:03}"
    dataset = open_set(tmp_path, content, load_masks=True)
    assert dataset.category_ids == ["003", "007", "090"]
    metrics = score(dataset, perfect_detections(dataset, keep=lambda a: a["label"] != 2))
    assert metrics["box_ap_per_class"].tolist() == metrics["mask_ap_per_class"].tolist() == pytest.approx([100, 100, 0])


def evaluate_in_process(rank, world, folder, queue):
    torch.set_num_threads(1)  # a forked process must not use its parent's threads
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    dataset = open_set(folder, load_masks=True)
    detections = perfect_detections(dataset, keep=lambda a: a["label"] != 2)[rank::world]
    metrics = score(dataset, detections, save_results=folder / f"{rank}.json")
    queue.put({key: value.tolist() if isinstance(value, torch.Tensor) else value for key, value in metrics.items()})
    dist.barrier()
    dist.destroy_process_group()


def test_two_processes_score_each_image_once(content, tmp_path):
    dataset = open_set(tmp_path, content, load_masks=True)
    alone = score(dataset, perfect_detections(dataset, keep=lambda a: a["label"] != 2))
    context = torch.multiprocessing.get_context("fork")
    queue = context.Queue()
    processes = [context.Process(target=evaluate_in_process, args=(rank, 2, tmp_path, queue)) for rank in range(2)]
    for process in processes:
        process.start()
    both = [queue.get(timeout=120) for _ in processes]
    for process in processes:
        process.join(60)
    for metrics in both:
        assert metrics["box_ap"] == alone["box_ap"] == pytest.approx(200 / 3)
        assert metrics["mask_ap_per_class"] == alone["mask_ap_per_class"].tolist()
    assert len(json.loads((tmp_path / "0.json").read_text())) == 6 and not (tmp_path / "1.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name, iterations", [("retinanet_tiny", 120), ("mask_rcnn_tiny", 100)])
def test_one_image_can_be_learned(name, iterations, tmp_path):
    torch.manual_seed(0)
    dataset = open_set(tmp_path, draw(tmp_path, [(128, 96)]), 96, load_masks="mask" in name, train=True)
    model = build_model(name, dataset.class_names)
    assert evaluate_detection(model, dataset, "cpu")["box_ap"] < 10
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    images, targets, _ = dataset.collate([dataset[0]])
    model.train()
    for iteration in range(iterations):
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min(1, (iteration + 1) / 10, 2 - 2 * iteration / iterations)
        optimizer.zero_grad()
        sum(model(images, targets).values()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    metrics = evaluate_detection(model, dataset, "cpu")
    assert model.training and metrics["box_ap"] > 90
    if "mask" in name:
        assert metrics["mask_ap"] > 90
