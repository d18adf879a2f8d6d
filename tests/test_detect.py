"""detect.py trains, resumes and scores detectors on train.py's loop, by the released schedule. Predictions for photos
of any size are what evaluation computes, drawn readably and written in COCO's format."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import error_line, run, torchrun
from PIL import Image, ImageDraw
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

import coco
import detect
import train as training
from coco import CocoDetection, DetectionTransform, evaluate_detection, to_results
from denseclip import read_checkpoint, save_checkpoint
from detection import build_model, load_checkpoint
from predict import open_photo


def make_set(root, split, count, seed):
    """Discs and squares of one color each, with boxes and polygons, in COCO's format."""
    random = np.random.default_rng(seed)
    (root / "images" / split).mkdir(parents=True)
    (root / "annotations").mkdir(exist_ok=True)
    images, annotations = [], []
    for number in range(count):
        width, height = ((128, 96), (96, 128))[number % 2]
        image = Image.new("RGB", (width, height), (90, 90, 90))
        kind, x, y = number % 2, *random.integers(10, 50, 2).tolist()
        box = [x, y, x + 40, y + 40]
        ImageDraw.Draw(image).rectangle(box, fill=((220, 40, 40), (40, 220, 40))[kind])
        image.save(root / "images" / split / f"{number}.png")
        images.append({"id": number, "file_name": f"{number}.png", "width": width, "height": height})
        corners = [box[0], box[1], box[2], box[1], box[2], box[3], box[0], box[3]]
        annotations.append(
            {
                "id": number + 1,
                "image_id": number,
                "category_id": (7, 3)[kind],
                "bbox": [x, y, 40, 40],
                "area": 1600,
                "iscrowd": 0,
                "segmentation": [corners],
            }
        )
    content = {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": 3, "name": "green square"}, {"id": 7, "name": "red square"}],
    }
    (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))


ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("coco")
    make_set(root, "train", 6, 0)
    make_set(root, "val", 2, 1)
    return root


@pytest.mark.parametrize("name", ["retinanet_tiny", pytest.param("mask_rcnn_tiny", marks=pytest.mark.slow)])
def test_trains_resumes_and_is_scored_by_options(name, root, tmp_path, monkeypatch, capsys):
    options = [
        "--model",
        name,
        "--data",
        root,
        "--batch-size",
        2,
        "--short-side",
        96,
        "--lr",
        1e-3,
        "--warmup",
        2,
        "--workers",
        0,
        "--device",
        "cpu",
        "--iterations",
        4,
    ]  # saved at every iteration, a tenth of the run or more
    run(detect, monkeypatch, "train", *options, "--out", tmp_path / "whole", "--eval-every", 4)
    assert "green square" in capsys.readouterr().out
    last = read_checkpoint(tmp_path / "whole" / "last.pt")
    assert last["run"]["schedule"] == "step" and last["run"]["clip_grad"] == 0.1
    assert last["settings"]["short_side"] == 96
    assert last["data"]["val"] == [str(root / "images" / "val"), str(root / "annotations" / "instances_val.json")]

    # Other classes: the head starts anew, the rest where the checkpoint stood
    content = json.loads((root / "annotations" / "instances_train.json").read_text())
    content["categories"] = [category | {"name": f"my {category['name']}"} for category in content["categories"]]
    (tmp_path / "mine.json").write_text(json.dumps(content))
    files = [root / "images" / "train", tmp_path / "mine.json"]
    begin = ["--train", *files, "--val", *files, "--init", tmp_path / "whole" / "last.pt", "--out", tmp_path / "mine"]
    run(detect, monkeypatch, "train", *begin, "--iterations", 1, "--batch-size", 2, "--workers", 0, "--device", "cpu")
    assert "weights fit; new: none" in capsys.readouterr().out  # two classes there, two here
    mine = read_checkpoint(tmp_path / "mine" / "last.pt")
    assert mine["class_names"] == ["my green square", "my red square"] and mine["settings"] == last["settings"]

    # last.pt as it was after two iterations of the same run leads to the same weights
    halfway, original = {}, training.save_checkpoint

    def keep(path, model, **extra):
        original(path, model, **extra)
        if extra["iteration"] == 2:
            halfway["file"] = path.read_bytes()

    monkeypatch.setattr(training, "save_checkpoint", keep)
    again = [*options, "--out", tmp_path / "again", "--eval-every", 4]
    run(detect, monkeypatch, "train", *again)
    (tmp_path / "again" / "halfway.pt").write_bytes(halfway["file"])
    run(detect, monkeypatch, "train", *again, "--resume", tmp_path / "again" / "halfway.pt")
    resumed = read_checkpoint(tmp_path / "again" / "last.pt")
    assert all(torch.equal(value, resumed["model"][key]) for key, value in last["model"].items())

    file = ["--save-results", tmp_path / "results.json"]
    run(detect, monkeypatch, "eval", "--checkpoint", tmp_path / "whole" / "last.pt", "--workers", 0, *file)
    printed = capsys.readouterr().out
    assert "on 2 images" in printed and ("mask AP" in printed) == name.startswith("mask")
    assert isinstance(json.loads((tmp_path / "results.json").read_text()), list)


def test_a_detectors_iterations_are_twelve_epochs(root, tmp_path, monkeypatch):
    monkeypatch.setattr(detect, "train", lambda model, train_set, recipe, *a, **k: runs.append((recipe, model)))
    monkeypatch.setattr(detect, "format_ap_table", lambda *_: "")
    runs = []
    run(detect, monkeypatch, "train", "--model", "retinanet_tiny", "--data", root, "--batch-size", 2, "--out", tmp_path)
    run(detect, monkeypatch, "train", "--model", "mask_rcnn_tiny", "--data", root, "--iterations", 5, "--out", tmp_path)
    # three wide and three tall images, in batches of two: two batches each
    assert [(r.iterations, r.batch_size, r.lr, r.warmup, m.settings.short_side) for r, m in runs] == [
        (48, 2, 1e-4, 4, 800),
        (5, 16, 2e-4, 0, 800),
    ]


def test_a_training_image_of_another_size_ends_before_training(root, tmp_path, monkeypatch, capsys):
    shutil.copytree(root, tmp_path / "coco")
    file = next((tmp_path / "coco" / "images" / "train").iterdir())
    Image.new("RGB", (8, 8)).save(file)
    options = ["train", "--model", "retinanet_tiny", "--data", tmp_path / "coco", "--out", tmp_path / "out"]
    line = error_line(detect, capsys, monkeypatch, *options, "--device", "cpu", "--iterations", 1, "--workers", 0)
    assert f"{file.name}: 8 x 8 pixels" in line and "instances_train.json says" in line
    assert not (tmp_path / "out").exists()


def test_what_is_wrong_is_said_in_one_line(root, tmp_path, monkeypatch, capsys):
    images, annotations = root / "images" / "train", root / "annotations" / "instances_train.json"
    for options, words in [
        (["train", "--model", "retinanet_tiny", "--data", root, "--set", "head=upernet"], ["head", "no effect"]),
        (["train", "--train", images, annotations], ["--val"]),
        (["train", "--data", tmp_path], [str(tmp_path), "annotations/instances_train2017.json"]),
    ]:
        end = ["--out", tmp_path / "out"] if options[0] == "train" else []
        error = error_line(detect, capsys, monkeypatch, *options, "--device", "cpu", *end)
        assert all(word in error for word in words), error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", [[], ["train"], ["eval"], ["predict"]])
def test_help(command, monkeypatch, capsys):
    with pytest.raises(SystemExit) as stop:
        run(detect, monkeypatch, *command, "--help")
    assert stop.value.code == 0 and "detect.py train" in capsys.readouterr().out


@pytest.mark.slow
def test_a_backbone_with_an_unused_map_trains_in_two_processes(root, tmp_path):
    """RetinaNet does not use the finest map, so that Swin's norm on it never gets a gradient."""
    options = ["--model", "retinanet_tiny", "--backbone", "swin_t", "--backbone-weights", "none", "--data", root]
    options += [
        "--batch-size",
        2,
        "--short-side",
        96,
        "--iterations",
        3,
        "--warmup",
        2,
        "--workers",
        0,
        "--clip",
        "none",
    ]
    torchrun("detect.py", "train", *options, "--out", tmp_path / "run")
    assert read_checkpoint(tmp_path / "run" / "last.pt")["iteration"] == 3


# ------------------------------------------------------------------------------------------------ predictions

NAMES = ["green square", "red square"]
SIZES = [(128, 96), (96, 128), (501, 37), (640, 479), (1, 1)]  # (width, height)


def confident_model(name):
    """A detector of random weights for images of 64 pixels, whose scores vary."""
    torch.manual_seed(0)
    model = build_model(name, NAMES, short_side=64).eval()
    with torch.no_grad():
        if "retina" in name:
            model.head.classification_head.cls_logits.weight *= 30_000
            model.head.classification_head.cls_logits.bias.zero_()
        else:
            model.head.roi_heads.box_predictor.cls_score.weight *= 90
            model.head.roi_heads.mask_predictor.mask_fcn_logits.weight *= 1_000
    return model


def draw_photos(folder, sizes=SIZES):
    """Photos of squares on noise, named 0.png, 1.png, ..."""
    folder.mkdir()
    for i, (width, height) in enumerate(sizes):
        pixels = np.random.default_rng(i).integers(0, 256, (height, width, 3)).astype(np.uint8)
        pixels[: height // 2, : width // 3] = (220, 40, 40)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return folder


@pytest.fixture(scope="module", params=["retinanet_tiny", "mask_rcnn_tiny"])
def checkpoint(request, root, tmp_path_factory):
    path = tmp_path_factory.mktemp(request.param) / "best.pt"
    val = [str(root / "images" / "val"), str(root / "annotations" / "instances_val.json")]
    save_checkpoint(path, confident_model(request.param), data={"val": val})
    return path


@pytest.fixture
def retinanet(tmp_path):
    save_checkpoint(tmp_path / "retinanet.pt", confident_model("retinanet_tiny"))
    return tmp_path / "retinanet.pt"


def predict(monkeypatch, *options):
    """detect.py predict on the CPU; return its exit status."""
    try:
        run(detect, monkeypatch, "predict", *options, "--device", "cpu")
    except SystemExit as stop:
        return stop.code
    return 0


def test_a_checkpoint_is_all_that_evaluation_needs(checkpoint, monkeypatch, capsys, root, tmp_path):
    sides = []
    monkeypatch.setattr(detect, "DetectionTransform", lambda x: sides.append(x) or DetectionTransform(x))
    run(detect, monkeypatch, "eval", "--checkpoint", checkpoint, "--workers", 0)
    output = capsys.readouterr().out
    assert f"{root / 'annotations' / 'instances_val.json'}: 2 images" in output and "on 2 images" in output
    assert sides == [64]  # the scale of training

    gone = [str(tmp_path / "images"), str(tmp_path / "val.json")]
    save_checkpoint(tmp_path / "moved.pt", load_checkpoint(checkpoint), data={"val": gone})
    error = error_line(detect, capsys, monkeypatch, "eval", "--checkpoint", tmp_path / "moved.pt")
    assert gone[0] in error and "no such validation set; give --val IMAGES JSON" in error
    Path(gone[0]).mkdir()
    error = error_line(detect, capsys, monkeypatch, "eval", "--checkpoint", tmp_path / "moved.pt")
    assert gone[1] in error and "give --val IMAGES JSON" in error


def test_predictions_are_what_evaluation_computes(checkpoint, monkeypatch, tmp_path):
    """To the digit, for images of any size: in Python, and in the JSON file of the command line."""
    photos, model = draw_photos(tmp_path / "photos"), load_checkpoint(checkpoint)
    images = [{"id": i + 5, "file_name": f"{i}.png", "width": w, "height": h} for i, (w, h) in enumerate(SIZES)]
    box = {"image_id": 5, "category_id": 3, "bbox": [1, 1, 30, 30], "segmentation": [[1, 1, 31, 1, 31, 31]]}
    content = {"images": images, "annotations": [box]}
    content["categories"] = [{"id": 3, "name": NAMES[0]}, {"id": 7, "name": NAMES[1]}]
    (tmp_path / "set.json").write_text(json.dumps(content))
    transform = DetectionTransform(model.short_side)
    dataset = CocoDetection(photos, tmp_path / "set.json", transform, load_masks="mask" in model.name)
    evaluate_detection(model, dataset, "cpu", save_results=tmp_path / "results.json")
    expected = json.loads((tmp_path / "results.json").read_text())
    assert len(expected) > 50 and ("segmentation" in expected[0]) == ("mask" in model.name)

    results = []
    for i in range(len(SIZES)):
        found = detect.predict(model, open_photo(photos / f"{i}.png"))
        results += to_results(found, i + 5, dataset.category_ids)
    assert results == expected

    assert predict(monkeypatch, photos, "--checkpoint", checkpoint, "--out", tmp_path / "all", "--threshold", 0) == 0
    ours = json.loads((tmp_path / "all" / "detections.json").read_text())
    names = {category["id"]: category["name"] for category in ours["categories"]}
    files = {image["id"]: image["file_name"] for image in ours["images"]}
    known = [
        {**a, "id": 0, "image_id": files[a["image_id"]], "category_id": names[a["category_id"]]}
        for a in ours["annotations"]
    ]
    files = {image["id"]: image["file_name"] for image in images}
    names = {3: NAMES[0], 7: NAMES[1]}
    for annotation in known:
        assert annotation.pop("area") == math.prod(annotation["bbox"][2:]) and annotation.pop("iscrowd") == 0
    assert known == [
        {**r, "id": 0, "image_id": files[r["image_id"]], "category_id": names[r["category_id"]]} for r in expected
    ]


def test_pictures_and_json_hold_what_reaches_the_threshold(checkpoint, monkeypatch, capsys, tmp_path):
    photos, out, model = draw_photos(tmp_path / "photos"), tmp_path / "out", load_checkpoint(checkpoint)
    threshold = detect.predict(model, open_photo(photos / "0.png"))["scores"][9].item()
    assert predict(monkeypatch, photos, "--checkpoint", checkpoint, "--out", out, "--threshold", threshold) == 0
    said = f"5 pictures written to {out}, 0 images failed; detections in {out / 'detections.json'}"
    assert capsys.readouterr().out.splitlines()[-1] == said
    content = COCO(str(out / "detections.json"))  # pycocotools reads it
    assert {category["name"] for category in content.cats.values()} == set(NAMES)
    for image in content.imgs.values():
        photo = open_photo(photos / image["file_name"])
        assert photo.size == (image["width"], image["height"])
        found = detect.predict(model, photo)
        annotations = content.imgToAnns[image["id"]]
        assert [a["score"] for a in annotations] == [x for x in found["scores"].tolist() if x >= threshold]
        for a, box in zip(annotations, found["boxes"].tolist(), strict=False):
            assert a["bbox"] == pytest.approx([box[0], box[1], box[2] - box[0], box[3] - box[1]], abs=1e-3)
        if "mask" in model.name:
            for a, mask in zip(annotations, found["masks"], strict=False):
                assert np.array_equal(coco_mask.decode(a["segmentation"]), mask.numpy())
        picture, plain = Image.open(out / image["file_name"]), photo
        if max(photo.size) < 512:
            plain = photo.resize(picture.size, Image.Resampling.NEAREST)
        assert picture.size == plain.size and (np.array(picture) != np.array(plain)).any() == bool(annotations)
    assert len(content.imgToAnns[1]) == 10
    assert len(content.getAnnIds(areaRng=[-1, 1e9], iscrowd=False)) == len(content.anns)


def test_a_photo_is_resized_to_the_scale_of_training(retinanet, monkeypatch, tmp_path):
    model, photo, shapes = load_checkpoint(retinanet), Image.new("RGB", (300, 200)), []
    model.register_forward_pre_hook(lambda module, args: shapes.append(tuple(args[0][0].shape)))
    detect.predict(model, photo)
    detect.predict(model, photo, short_side=100)
    detect.predict(model, Image.new("I;16", (1000, 100)))  # 16-bit gray; the long side limits
    assert shapes == [(3, 64, 96), (3, 100, 150), (3, 11, 106)]
    with pytest.raises(ValueError, match="model.eval\\(\\) for detections"):
        detect.predict(model.train(), photo)

    draw_photos(tmp_path / "photos", SIZES[:1])
    boxes = []
    for name, options in (("a", []), ("b", ["--short-side", 64]), ("c", ["--short-side", 96])):
        options = [*options, "--checkpoint", retinanet, "--out", tmp_path / name, "--threshold", 0.1]
        assert predict(monkeypatch, tmp_path / "photos", *options) == 0
        boxes.append(json.loads((tmp_path / name / "detections.json").read_text())["annotations"])
    assert boxes[0] == boxes[1] != boxes[2]


def test_what_is_there_is_kept_unless_overwritten(retinanet, monkeypatch, capsys, tmp_path):
    photos, out = draw_photos(tmp_path / "photos", SIZES[:2]), tmp_path / "out"
    options = ["--checkpoint", retinanet, "--out", out]
    assert predict(monkeypatch, photos, *options) == 0
    assert f"2 pictures written to {out}, 0 images failed" in capsys.readouterr().out
    before = (out / "detections.json").read_text()
    content = json.loads(before)
    assert [image["id"] for image in content["images"]] == [1, 2]
    assert [a["id"] for a in content["annotations"]] == list(range(1, 1 + len(content["annotations"])))
    assert {a["image_id"] for a in content["annotations"]} == {1, 2}
    error = error_line(detect, capsys, monkeypatch, "predict", photos / "0.png", *options, "--device", "cpu")
    assert "detections.json exists already: name another --out, or --overwrite" in error
    assert (out / "detections.json").read_text() == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "0.png").write_text("mine")
    options[-1] = tmp_path / "mine"
    error = error_line(detect, capsys, monkeypatch, "predict", photos / "0.png", *options, "--device", "cpu")
    assert "0.png exists already: name another --out, or --overwrite" in error
    assert (tmp_path / "mine" / "0.png").read_text() == "mine"
    options[-1] = out
    assert predict(monkeypatch, photos / "0.png", *options, "--overwrite") == 0
    assert [image["file_name"] for image in json.loads((out / "detections.json").read_text())["images"]] == ["0.png"]


def test_a_file_that_cannot_be_read_is_named_and_the_others_are_done(retinanet, monkeypatch, capsys, tmp_path):
    photos, out = draw_photos(tmp_path / "photos", SIZES[:2]), tmp_path / "out"
    (photos / "cut.png").write_bytes((photos / "0.png").read_bytes()[:900])
    (photos / "text.jpg").write_text("not an image")
    (photos / "notes.txt").write_text("not looked at")
    deep = np.random.default_rng(0).integers(0, 2**16, (40, 60)).astype(np.uint16)
    Image.fromarray(deep).save(photos / "16bit.png")
    assert predict(monkeypatch, photos, "--checkpoint", retinanet, "--out", out) == 1
    output = capsys.readouterr()
    assert f"3 pictures written to {out}, 2 images failed" in output.out.splitlines()[-1]
    lines = [line for line in output.err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 2 and "cut.png: not readable" in lines[0] and "text.jpg: not readable" in lines[1]
    assert sorted(path.name for path in out.iterdir()) == ["0.png", "1.png", "16bit.png", "detections.json"]
    content = json.loads((out / "detections.json").read_text())
    assert [image["file_name"] for image in content["images"]] == ["0.png", "1.png", "16bit.png"]


def test_what_was_found_before_an_interruption_is_kept(retinanet, monkeypatch, tmp_path):
    photos, original = draw_photos(tmp_path / "photos", SIZES[:2]), detect.open_photo

    def open_or_stop(path):
        if path.name == "1.png":
            raise KeyboardInterrupt
        return original(path)

    monkeypatch.setattr(detect, "open_photo", open_or_stop)
    with pytest.raises(KeyboardInterrupt):
        predict(monkeypatch, photos, "--checkpoint", retinanet, "--out", tmp_path / "out")
    content = json.loads((tmp_path / "out" / "detections.json").read_text())
    assert [image["file_name"] for image in content["images"]] == ["0.png"] and content["annotations"]


def test_a_full_disk_leaves_no_half_of_the_json(retinanet, monkeypatch, capsys, tmp_path):
    photos, original = draw_photos(tmp_path / "photos", SIZES[:1]), Path.write_text

    def half(path, content, **options):
        original(path, content[:40], **options)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", half)
    options = ["predict", photos, "--checkpoint", retinanet, "--out", tmp_path / "out", "--device", "cpu"]
    line = error_line(detect, capsys, monkeypatch, *options)
    assert "detections.json was left as it was: writing failed, is the disk full" in line
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["0.png"]


def test_an_image_that_fails_late_is_not_in_the_json(retinanet, monkeypatch, tmp_path):
    photos, original = draw_photos(tmp_path / "photos", SIZES[:2]), detect.draw_detections

    def draw_or_fail(photo, *rest):
        if photo.size == SIZES[0]:
            raise MemoryError
        return original(photo, *rest)

    monkeypatch.setattr(detect, "draw_detections", draw_or_fail)
    assert predict(monkeypatch, photos, "--checkpoint", retinanet, "--out", tmp_path / "out") == 1
    content = json.loads((tmp_path / "out" / "detections.json").read_text())
    assert [(image["id"], image["file_name"]) for image in content["images"]] == [(1, "1.png")]
    assert {annotation["image_id"] for annotation in content["annotations"]} == {1}


def test_exif_orientation_is_applied_to_photos(retinanet, monkeypatch, tmp_path):
    upright = open_photo(draw_photos(tmp_path / "upright", SIZES[3:4]) / "0.png")
    (tmp_path / "turned").mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6  # to be rotated clockwise by 90 degrees
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned" / "0.png", exif=exif)
    contents = []
    for name in ("upright", "turned"):
        assert predict(monkeypatch, tmp_path / name, "--checkpoint", retinanet, "--out", tmp_path / f"{name} out") == 0
        contents.append((tmp_path / f"{name} out" / "detections.json").read_text())
    assert contents[0] == contents[1]
    pictures = [np.array(Image.open(tmp_path / f"{name} out" / "0.png")) for name in ("upright", "turned")]
    assert np.array_equal(*pictures)


def test_bf16_finds_nearly_the_same(checkpoint, monkeypatch, tmp_path):
    photos, contents = draw_photos(tmp_path / "photos", SIZES[:1]), []
    for precision in ("fp32", "bf16"):
        options = ["--checkpoint", checkpoint, "--out", tmp_path / precision, "--precision", precision]
        assert predict(monkeypatch, photos, *options, "--threshold", 0.1) == 0
        contents.append(json.loads((tmp_path / precision / "detections.json").read_text())["annotations"])
    best = [max(annotation["score"] for annotation in content) for content in contents]
    assert contents[0] != contents[1] and best[0] == pytest.approx(best[1], abs=0.1)


def test_predicting_needs_no_pycocotools(checkpoint, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(coco, "COCO", None)  # as after a failed import
    monkeypatch.delattr(coco, "coco_mask")
    photos, out = draw_photos(tmp_path / "photos", SIZES[:2]), tmp_path / "out"
    assert predict(monkeypatch, photos, "--checkpoint", checkpoint, "--out", out, "--threshold", 0.1) == 0
    annotations = json.loads((out / "detections.json").read_text())["annotations"]
    assert annotations and not any("segmentation" in annotation for annotation in annotations)
    assert ("pip install pycocotools" in capsys.readouterr().out) == ("mask" in checkpoint.parent.name)


def test_wrong_paths_and_options_of_predict_are_named(retinanet, monkeypatch, capsys, tmp_path):
    photos = draw_photos(tmp_path / "photos", SIZES[:2])
    other = draw_photos(tmp_path / "other", SIZES[:1])
    (tmp_path / "empty").mkdir()
    end = ["--checkpoint", retinanet, "--device", "cpu", "--out", tmp_path / "out"]
    for options, words in [
        ([tmp_path / "none.jpg", *end], ["none.jpg: no such image"]),
        ([tmp_path / "empty", *end], ["empty: no such image"]),
        ([photos, other, *end], ["out/0.png would be written twice"]),
        ([photos, *end[:-1], photos], [f"{photos / '0.png'} would be written twice, or over an image"]),
        ([photos, *end, "--threshold", 50], ["threshold is 50.0", "from 0 to 1"]),
        ([photos, *end[:-1], photos / "0.png"], ["0.png: not a folder that can be written"]),
        ([photos, *end, "--checkpoint", tmp_path / "none.pt"], ["none.pt"]),
    ]:
        error = error_line(detect, capsys, monkeypatch, "predict", *options)
        assert all(word in error for word in words), error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("size", [(1, 1), (60, 40), (640, 480), (4000, 30), (3000, 2000)])
def test_lines_and_names_grow_with_the_photo_and_stay_inside(size):
    boxes = torch.tensor([[0.0, 0, 0.4, 0.4], [0.6, 0.6, 1, 1], [0.3, 0.3, 0.3, 0.3]]) * torch.tensor(size * 2)
    found = {"boxes": boxes, "labels": torch.tensor([0, 1, 1]), "scores": torch.tensor([0.9, 0.6, 0.5])}
    photo = Image.new("RGB", size, "gray")
    picture = np.array(detect.draw_detections(photo, found, NAMES)).astype(int)
    assert set(np.array(photo).flat) == {128}  # unchanged
    height, width, _ = picture.shape
    assert (width, height) == {(1, 1): (512, 512), (60, 40): (540, 360)}.get(size, size)
    changed = (picture != 128).any(2)
    assert changed[-1, -1] and changed[0, 0]  # edges at the photo's border are seen
    if height > 300:
        line = round(max(width, height) / 400)
        row = changed[int(height * 0.8)]  # the left edge of the second box; its right one is at the border
        assert row[: width - line].sum() == row[width - line :].sum() == line
        tag = (picture == detect.default_colors(2)[0]).all(2)[: height // 4, line : width // 10]  # of the first box
        assert width / 100 < tag.any(1).sum() < width / 25


def test_masks_are_translucent():
    pixels = np.random.default_rng(0).integers(0, 256, (480, 640, 3)).astype(np.uint8)
    found = {
        "boxes": torch.tensor([[150.0, 100, 400, 400]]),
        "labels": torch.tensor([1]),
        "scores": torch.tensor([0.8]),
    }
    inside = np.zeros((480, 640), dtype=bool)
    inside[200:300, 180:380] = True
    masks = torch.from_numpy(inside)[None]
    plain = np.array(detect.draw_detections(Image.fromarray(pixels), found, NAMES))
    drawn = np.array(detect.draw_detections(Image.fromarray(pixels), {**found, "masks": masks}, NAMES))
    assert np.array_equal(plain[~inside], drawn[~inside])
    blended = (plain[inside].astype(int) + detect.default_colors(2)[1]) / 2
    assert np.abs(drawn[inside] - blended).max() <= 1
