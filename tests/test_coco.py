"""Detection data and AP are COCO's: a set is read as its file says, what is wrong with it is named or counted, batches
resume exactly, and the scores are those that pycocotools gives for the file itself. A tiny model learns one image."""

import contextlib
import io
import json
import sys

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw
from pycocotools import mask as coding
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import nn

import coco
from coco import (
    CocoDetection,
    DetectionTransform,
    GroupedSampler,
    evaluate_detection,
    format_ap_table,
)
from detection import build_model

COLOURS = {"square": (200, 40, 40), "disc": (40, 60, 220), "bar": (30, 160, 60)}
CATEGORIES = [{"id": 7, "name": "disc"}, {"id": 3, "name": "square"}, {"id": 90, "name": "bar"}]  # not in id order


def draw(folder, sizes, seed=0):
    """Images of the given (width, height) with one object of each category on grey, their file in COCO's format."""
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
            shape((x, y, x + w - 1, y + h - 1), fill=COLOURS[category["name"]])
            polygon = [x, y, x + w, y, x + w, y + h, x, y + h]
            annotations.append({"id": len(annotations) + 1, "image_id": 100 + i, "category_id": category["id"],
                                "bbox": [x, y, w, h], "area": w * h, "iscrowd": 0, "segmentation": [polygon]})
        image.save(folder / "images" / f"{i}.png")
        images.append({"id": 100 + i, "file_name": f"{i}.png", "width": width, "height": height})
    return {"images": images, "annotations": annotations, "categories": CATEGORIES}


def save(folder, content, name="set.json"):
    (folder / name).write_text(json.dumps(content))
    return folder / "images", folder / name


@pytest.fixture
def content(tmp_path):
    return draw(tmp_path, [(96, 64), (64, 96), (96, 64)])


class Oracle(nn.Module):
    """Gives detections that were made beforehand, in order, scaled as a model scales them."""

    def __init__(self, detections):
        super().__init__()
        self.detections, self.calls = detections, 0

    def forward(self, images, sizes=None):
        found = self.detections[self.calls]
        self.calls += 1
        return [found]


def truth_of(dataset, keep=lambda annotation: True):
    """What a perfect model finds in a data set: boxes, and masks where the set has them."""
    detections = []
    for image in dataset.images:
        annotations = [a for a in dataset.by_image[image["id"]] if keep(a)]
        found = {
            "boxes": torch.tensor([a["box"] for a in annotations], dtype=torch.float32).reshape(-1, 4),
            "scores": torch.linspace(0.9, 0.5, len(annotations)),
            "labels": torch.tensor([a["label"] for a in annotations], dtype=torch.int64),
        }
        if dataset.masks:
            size = (image["height"], image["width"])
            masks = [coco.decode_mask(a["segmentation"], size, "") for a in annotations]
            found["masks"] = torch.from_numpy(np.stack(masks)).bool() if masks else torch.zeros(0, *size).bool()
        detections.append(found)
    return detections


def pycocotools_scores(annotation_file, results_file, kind):
    """AP, AP50 and so on from the two files, by pycocotools alone."""
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(annotation_file))
        results = [{k: v for k, v in r.items() if k != ("bbox" if kind == "segm" else "segmentation")}
                   for r in json.loads(results_file.read_text())]
        evaluation = COCOeval(truth, truth.loadRes(results), kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation.stats[:6].tolist()


# ------------------------------------------------------------------------------------------------ reading


def test_samples_have_what_the_file_says(content, tmp_path):
    dataset = CocoDetection(*save(tmp_path, content), DetectionTransform((192, 128)), masks=True, train=True)
    assert len(dataset) == 3 and dataset.class_names == ["square", "disc", "bar"] and dataset.category_ids == [3, 7, 90]
    image, target, path = dataset[0]
    assert image.shape == (3, 128, 192) and image.dtype == torch.float32 and 0 <= image.min() and image.max() <= 1
    assert target["labels"].tolist() == [1, 0, 2] and target["image_id"] == 100 and target["size"] == (64, 96)
    for box, label, mask in zip(target["boxes"], target["labels"], target["masks"], strict=True):
        x1, y1, x2, y2 = box.int().tolist()
        colour = image[:, (y1 + y2) // 2, (x1 + x2) // 2] * 255
        assert colour.round().int().tolist() == list(COLOURS[dataset.class_names[label]])
        assert mask[y1:y2, x1:x2].all() and mask.sum() == (y2 - y1) * (x2 - x1)


def test_classes_come_in_the_models_order(content, tmp_path):
    paths = save(tmp_path, content)
    dataset = CocoDetection(*paths, DetectionTransform(), ["bar", "disc", "square"])
    assert dataset.category_ids == [90, 7, 3] and dataset[0][1]["labels"].tolist() == [1, 2, 0]
    message = "3 categories are not the model's 2 classes: only in the file: 'bar', 'square'; only in the model: 'cat'"
    with pytest.raises(ValueError, match=message):
        CocoDetection(*paths, DetectionTransform(), ["disc", "cat"])


def test_a_flip_turns_image_boxes_and_masks(content, tmp_path):
    paths = save(tmp_path, content)
    image, target, _ = CocoDetection(*paths, DetectionTransform((96, 64)), masks=True, train=True)[0]
    turned, turned_target, _ = CocoDetection(*paths, DetectionTransform((96, 64), flip=1.0), masks=True, train=True)[0]
    torch.testing.assert_close(turned, image.flip(2))
    assert torch.equal(turned_target["masks"], target["masks"].flip(2))
    mirrored = (target["boxes"] - torch.tensor([96.0, 0, 96, 0])).abs()[:, [2, 1, 0, 3]]
    torch.testing.assert_close(turned_target["boxes"], mirrored)


def test_images_are_resized_as_released(content, tmp_path):
    content["images"] = content["images"][:1]
    content["annotations"] = content["annotations"][:3]
    dataset = CocoDetection(*save(tmp_path, content), DetectionTransform((1333, 800)), masks=True, train=True)
    image, target, _ = dataset[0]
    assert image.shape == (3, 800, 1200) and target["masks"].shape == (3, 800, 1200)
    torch.testing.assert_close(target["boxes"], torch.tensor([a["box"] for a in dataset.kept]) * 12.5)
    dataset.transform = DetectionTransform((1000, 800))
    assert dataset[0][0].shape == (3, 667, 1000)


def test_a_samples_seed_decides_its_flip(content, tmp_path):
    dataset = CocoDetection(*save(tmp_path, content), DetectionTransform((96, 64), flip=0.5))
    state = torch.get_rng_state()
    first, again = ([dataset[0, seed][1]["boxes"][0, 0].item() for seed in range(20)] for _ in range(2))
    assert len(set(first)) == 2 and first == again
    assert torch.equal(torch.get_rng_state(), state)


def test_polygons_and_both_kinds_of_rle_are_read(content, tmp_path):
    mask = np.zeros((64, 96), dtype=np.uint8)
    mask[10:30, 20:50] = 1
    compressed = coding.encode(np.asfortranarray(mask))
    flat = mask.flatten(order="F")
    runs = np.diff(np.flatnonzero(np.diff(flat, prepend=2, append=2)))
    counts = ([0] if flat[0] else []) + runs.tolist()
    content["annotations"] = content["annotations"][:3]
    shapes = [
        [[20, 10, 50, 10, 50, 30, 20, 30]],
        {"size": [64, 96], "counts": counts},
        {"size": [64, 96], "counts": compressed["counts"].decode()},
    ]
    for annotation, segmentation in zip(content["annotations"], shapes, strict=True):
        annotation.update(segmentation=segmentation, bbox=[20, 10, 30, 20])
    dataset = CocoDetection(*save(tmp_path, content), DetectionTransform((96, 64)), masks=True, train=True)
    for found in dataset[0][1]["masks"]:
        assert torch.equal(found, torch.from_numpy(mask))
    content["annotations"][2]["segmentation"]["size"] = [96, 64]
    with pytest.raises(ValueError, match="0.png: the image has \\(64, 96\\)"):
        CocoDetection(*save(tmp_path, content), DetectionTransform(), masks=True, train=True)[0]


def test_crowds_and_images_without_boxes_are_evaluated_but_not_trained_on(content, tmp_path):
    content["annotations"][0]["iscrowd"] = 1
    for annotation in content["annotations"][3:6]:
        annotation["iscrowd"] = 1
    paths = save(tmp_path, content)
    train = CocoDetection(*paths, DetectionTransform(), train=True)
    assert len(train) == 2 and [len(train[i][1]["boxes"]) for i in range(2)] == [2, 3]
    assert train.repairs == {"crowd regions left out of training": 4, "images without boxes left out of training": 1}
    val = CocoDetection(*paths, DetectionTransform())
    assert len(val) == 3 and not val.repairs and sum(a["iscrowd"] for a in val.kept) == 4


def test_repairs_are_counted(content, tmp_path):
    a = content["annotations"]
    a[0]["bbox"] = [10, 10, 0, 5]
    a[1]["bbox"] = [10, 10, -4, 5]
    a[2]["bbox"] = [200, 10, 20, 20]
    a[3]["bbox"] = [-10, -10, 40, 40]
    a[4]["image_id"] = 999
    a[5]["segmentation"] = [[], [1, 2, 3, 4]]
    a[6]["bbox"] = [5, 5, 0.5, 20]
    del content["images"][1]["width"]
    paths = save(tmp_path, content)
    train = CocoDetection(*paths, DetectionTransform((96, 64)), masks=True, train=True)
    assert train.repairs == {
        "image sizes missing, read from the images": 1,
        "boxes of zero or negative size left out": 2,
        "boxes outside of their image left out": 1,
        "boxes cut at their image's border": 1,
        "annotations of images that are not in the file left out": 1,
        "boxes without a mask left out of training": 1,
        "boxes of less than a pixel left out of training": 1,
        "images without boxes left out of training": 1,
    }
    assert len(train) == 2 and [len(train.by_image[image["id"]]) for image in train.images] == [1, 2]
    assert train.by_image[101][0]["box"] == [0, 0, 30, 30]
    assert "2 images, 3 boxes, 3 classes; 1 image sizes missing" in train.summary()
    val = CocoDetection(*paths, DetectionTransform(), masks=True)
    assert len(val) == 3 and len(val.kept) == 5 and [len(val.by_image[i]) for i in (100, 101, 102)] == [0, 2, 3]
    assert len(val.ground_truth().anns) == 5 and len(val.ground_truth(masks=True).anns) == 4


def broken(change):
    def apply(content, folder):
        change(content)
        return save(folder, content)

    return apply


@pytest.mark.parametrize("make, message", [
    (lambda content, folder: (folder / "images", folder / "none.json"), "none.json: no such file"),
    (lambda content, folder: (folder / "images", folder / "images" / "0.png"), "0.png: not a JSON file"),
    (broken(lambda c: c.pop("categories")), "has no list of 'categories'"),
    (broken(lambda c: c["annotations"][4].pop("bbox")), "annotations\\[4\\] needs image_id, category_id, bbox"),
    (broken(lambda c: c["images"].append(dict(c["images"][0]))), "2 images with id 100"),
    (broken(lambda c: c["categories"].append({"id": 8, "name": "disc"})), "2 categories with name 'disc'"),
    (broken(lambda c: c.update(images=[])), "no images in it"),
    (broken(lambda c: c["annotations"][0].update(category_id=5)), "annotations of category id 5"),
    (broken(lambda c: c["annotations"][0].update(bbox=[1, float("nan"), 3, 4])), "bbox \\[1, nan, 3, 4\\] of image"),
    (broken(lambda c: c["images"][2].update(file_name="9.png")), "1 of its 3 images are not in .*the first is 9.png"),
    (broken(lambda c: c.update(annotations=[])), "no image has a box to train on"),
])  # fmt: skip
def test_a_set_that_cannot_be_read_is_named(make, message, content, tmp_path):
    content = json.loads(json.dumps(content))
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        CocoDetection(*make(content, tmp_path), DetectionTransform(), train=True)


def test_an_image_of_another_size_is_named(content, tmp_path):
    content["images"][0]["width"] = 90
    dataset = CocoDetection(*save(tmp_path, content), DetectionTransform())
    with pytest.raises(ValueError, match="0.png: 96 x 64 pixels, but .*set.json says 90 x 64"):
        dataset[0]


@pytest.mark.parametrize("train", [True, False])
def test_pycocotools_is_asked_for_before_training(content, tmp_path, monkeypatch, train):
    paths = save(tmp_path, content)
    monkeypatch.setitem(sys.modules, "pycocotools", None)
    with pytest.raises(ValueError, match="pip install pycocotools"):
        CocoDetection(*paths, DetectionTransform(), train=train)


# ------------------------------------------------------------------------------------------------ batches


def test_batches_are_of_one_shape_and_resume_exactly(tmp_path):
    content = draw(tmp_path, [(96, 64)] * 7 + [(64, 96)] * 4)
    dataset = CocoDetection(*save(tmp_path, content), DetectionTransform(), train=True)
    epoch = 16  # 7 wide images fill two batches of 4, and 4 tall images one... of 4
    sampler = GroupedSampler(dataset, 4, seed=5)
    assert sampler.size == 12
    stream = [key for key, _ in zip(sampler, range(3 * epoch), strict=False)]
    for first in range(0, len(stream), 4):
        assert len({index < 7 for index, _ in stream[first : first + 4]}) == 1
    assert {index for index, _ in stream[:12]} == set(range(11))
    assert [index for index, _ in stream[:12]] != [index for index, _ in stream[12:24]]

    later = GroupedSampler(dataset, 4, seed=5, start=20)
    assert [key for key, _ in zip(later, range(12), strict=False)] == stream[20:32]
    parts = [GroupedSampler(dataset, 4, seed=5, rank=rank, world=2, start=8) for rank in (0, 1)]
    parts = [[key for key, _ in zip(part, range(8), strict=False)] for part in parts]
    assert [key for pair in zip(*parts, strict=True) for key in pair] == stream[8:24]

    sampler = GroupedSampler(dataset, 4)
    loader = torch.utils.data.DataLoader(dataset, 4, sampler=sampler, collate_fn=CocoDetection.collate)
    images, targets, paths = next(iter(loader))
    assert len(images) == len(targets) == len(paths) == 4 and len({image.shape for image in images}) == 1


# ------------------------------------------------------------------------------------------------ AP


@pytest.mark.parametrize("masks", [False, True])
def test_perfect_predictions_score_1_and_none_score_0(masks, content, tmp_path):
    dataset = CocoDetection(*save(tmp_path, content), DetectionTransform(), masks=masks)
    kinds = ("box", "mask") if masks else ("box",)
    metrics = evaluate_detection(Oracle(truth_of(dataset)), dataset, "cpu", progress=False)
    assert {key.split("_")[0] for key in metrics} == set(kinds)
    nothing = evaluate_detection(Oracle(truth_of(dataset, keep=lambda a: False)), dataset, "cpu", progress=False)
    for kind in kinds:
        assert metrics[f"{kind}_ap"] == pytest.approx(1.0) and nothing[f"{kind}_ap"] == 0.0
        assert metrics[f"{kind}_ap_per_class"].tolist() == pytest.approx([1.0] * 3)
        assert nothing[f"{kind}_ap50"] == 0.0 and metrics[f"{kind}_ap_large"] != metrics[f"{kind}_ap_large"]  # nan
    table = format_ap_table(metrics, dataset.class_names)
    assert "square" in table and "100.00" in table and len(table.splitlines()) == 12


def test_scores_are_those_of_pycocotools_with_crowds_and_empty_images(tmp_path):
    content = draw(tmp_path, [(96, 64)] * 4 + [(64, 96)] * 2)
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] != 103]  # no boxes in this image
    content["annotations"][1].update(iscrowd=1, bbox=[0, 0, 60, 60], segmentation={
        "size": [64, 96], "counts": [0] + [60, 4] * 60 + [36 * 64]})  # fmt: skip
    paths = save(tmp_path, content)
    dataset = CocoDetection(*paths, DetectionTransform((96, 64)), ["square", "bar", "disc"], masks=True)
    generator = torch.Generator().manual_seed(0)
    detections = truth_of(dataset, keep=lambda a: not a["iscrowd"])
    for found, image in zip(detections, dataset.images, strict=True):  # moved, relabelled, and some of nothing
        n = len(found["boxes"])
        found["boxes"] += torch.randn(n, 4, generator=generator) * 2
        found["masks"] = found["masks"].roll((2, 1), (1, 2))
        found["scores"] = torch.rand(n, generator=generator)
        if n:
            found["labels"][0] = 2
        extra = torch.tensor([[5.0, 5.0, 20.0, 30.0], [30.0, 10.0, 50.0, 40.0]])
        found["boxes"] = torch.cat([found["boxes"], extra])
        found["scores"] = torch.cat([found["scores"], torch.tensor([0.7, 0.2])])
        found["labels"] = torch.cat([found["labels"], torch.tensor([0, 0])])
        masks = torch.zeros(2, image["height"], image["width"], dtype=torch.bool)
        masks[:, 10:30, 10:20] = True
        found["masks"] = torch.cat([found["masks"], masks])

    metrics = evaluate_detection(Oracle(detections), dataset, "cpu", save_results=tmp_path / "r.json", progress=False)
    suffixes = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")
    for name, kind in (("box", "bbox"), ("mask", "segm")):
        expected = pycocotools_scores(paths[1], tmp_path / "r.json", kind)
        expected = [value if value > -1 else float("nan") for value in expected]
        assert [metrics[f"{name}_{suffix}"] for suffix in suffixes] == pytest.approx(expected, nan_ok=True)
        assert 0.05 < metrics[f"{name}_ap"] < 0.95
        assert metrics[f"{name}_ap_per_class"].mean().item() == pytest.approx(metrics[f"{name}_ap"])
    results = json.loads((tmp_path / "r.json").read_text())
    assert results[0].keys() == {"image_id", "category_id", "bbox", "score", "segmentation"}
    assert {result["category_id"] for result in results} <= {3, 7, 90}


def evaluate_in_process(rank, world, folder, queue):
    torch.set_num_threads(1)  # a forked process must not use its parent's threads
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    dataset = CocoDetection(folder / "images", folder / "set.json", DetectionTransform(), masks=True)
    truth = truth_of(dataset, keep=lambda a: a["label"] != 2)
    metrics = evaluate_detection(Oracle(truth[rank::world]), dataset, "cpu", save_results=folder / f"{rank}.json",
                                 progress=False)  # fmt: skip
    queue.put({key: value.tolist() if isinstance(value, torch.Tensor) else value for key, value in metrics.items()})
    dist.barrier()
    dist.destroy_process_group()


def test_two_processes_score_each_image_once(content, tmp_path):
    dataset = CocoDetection(*save(tmp_path, content), DetectionTransform(), masks=True)
    oracle = Oracle(truth_of(dataset, keep=lambda a: a["label"] != 2))
    alone = evaluate_detection(oracle, dataset, "cpu", progress=False)
    context = torch.multiprocessing.get_context("fork")
    queue = context.Queue()
    processes = [context.Process(target=evaluate_in_process, args=(rank, 2, tmp_path, queue)) for rank in range(2)]
    for process in processes:
        process.start()
    both = [queue.get(timeout=120) for _ in processes]
    for process in processes:
        process.join(60)
    for metrics in both:
        assert metrics["box_ap"] == alone["box_ap"] == pytest.approx(2 / 3)
        assert metrics["mask_ap_per_class"] == alone["mask_ap_per_class"].tolist()
    results = json.loads((tmp_path / "0.json").read_text())
    assert len(results) == 6 and not (tmp_path / "1.json").exists()


@pytest.mark.parametrize(
    "name, iterations", [("retinanet_tiny", 120), pytest.param("mask_rcnn_tiny", 100, marks=pytest.mark.slow)]
)
def test_one_image_can_be_learnt(name, iterations, tmp_path):
    torch.manual_seed(0)
    paths = save(tmp_path, draw(tmp_path, [(128, 96)]))
    dataset = CocoDetection(*paths, DetectionTransform((128, 96)), masks="mask" in name, train=True)
    model = build_model(name, dataset.class_names)
    assert evaluate_detection(model, dataset, "cpu", progress=False)["box_ap"] < 0.1
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    images, targets, _ = CocoDetection.collate([dataset[0]])
    model.train()
    for iteration in range(iterations):
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min(1, (iteration + 1) / 10, 2 - 2 * iteration / iterations)
        optimizer.zero_grad()
        sum(model(images, targets).values()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    metrics = evaluate_detection(model, dataset, "cpu", progress=False)
    assert model.training and metrics["box_ap"] > 0.9
    if "mask" in name:
        assert metrics["mask_ap"] > 0.9


@pytest.mark.parametrize(
    "kind, change, message",
    [
        ("images", {"file_name": 3}, r"images\[0\] needs id, file_name"),
        ("annotations", {"bbox": None}, r"annotations\[0\] needs image_id, category_id, bbox"),
        ("annotations", {"category_id": [1]}, r"annotations\[0\] needs"),
        ("categories", {"name": None}, r"categories\[0\] needs id, name"),
    ],
)
def test_entries_of_wrong_types_are_named(content, tmp_path, kind, change, message):
    content[kind] = [{**content[kind][0], **change}, *content[kind][1:]]  # the list is shared between tests
    with pytest.raises(ValueError, match=message):
        CocoDetection(*save(tmp_path, content), DetectionTransform())


def test_polygons_that_are_none_leave_their_box_without_a_mask(content, tmp_path):
    for annotation, polygon in zip(content["annotations"], ([1, 2, 30, 2, 30, 30], [[[1, 2], [3, 4]]]), strict=False):
        annotation["segmentation"] = polygon
    dataset = CocoDetection(*save(tmp_path, content), DetectionTransform(), masks=True, train=True)
    assert dataset.repairs["boxes without a mask left out of training"] >= 2


def test_a_set_without_boxes_cannot_be_scored(content, tmp_path):
    content["annotations"] = []
    with pytest.raises(ValueError, match="no image has a box"):
        CocoDetection(*save(tmp_path, content), DetectionTransform())
