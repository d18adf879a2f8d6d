"""Bad options and files end in one line that names them, with status 2; what a hostile file holds is not run.

BAD is a table: script, options, what the line says. Names in braces are files that `files` makes.
"""

import gc
import importlib
import os
import pickle
import resource
import shutil
import signal
import warnings
import zipfile
from unittest import mock

import numpy as np
import pytest
import torch
from helpers import NAMES, error_line, make_folders
from PIL import Image

from clip_model import CLIP, replacing
from data import run_script
from denseclip import PRESETS, build_model, read_checkpoint, save_checkpoint

CLASSES = ",".join(NAMES)
TRAIN = "--model tiny --train {images} {masks} --val {images} {masks} --classes LIST --device cpu --workers 0 "
TRAIN += "--iterations 2 --batch-size 2 --out {out}"
OTHER_VAL = TRAIN.replace("--val {images} {masks}", "--val {images}/../../VAL/images {images}/../../VAL/masks")
BAD = [
    # numbers
    ("train", "--lr nan", "lr is nan, it must be from 0"),
    ("train", "--lr inf", "lr is inf, it must be from 0"),
    ("train", "--lr -1", "lr is -1.0, it must be from 0"),
    ("train", "--weight-decay nan", "weight_decay is nan, it must be"),
    ("train", "--backbone-lr-multiplier -1", "backbone_lr_multiplier is -1.0, it must be"),
    ("train", "--text-lr-multiplier nan", "text_lr_multiplier is nan, it must be"),
    ("train", "--clip-grad -1", "clip_grad is -1.0, it must be from 0"),
    ("train", "--clip-grad nan", "clip_grad is nan, it must be from 0"),
    ("train", "--warmup -5", "warmup is -5, it must be from 0"),
    ("train", "--warmup 2", "--warmup 2 is as long as the run"),
    ("train", "--iterations 0", "iterations is 0, it must be from 1"),
    ("train", "--iterations -1", "iterations is -1, it must be from 1"),
    ("train", "--batch-size 0", "batch_size is 0, it must be from 1"),
    ("train", "--accumulate 0", "accumulate is 0, it must be from 1"),
    ("train", "--accumulate 3", "--batch-size 2 is not divisible by 1 x --accumulate 3"),
    ("train", "--eval-every 0", "eval_every is 0, it must be from 1"),
    ("train", "--workers -1", "workers is -1, it must be from 0"),
    ("train", "--seed -1", "seed is -1, it must be from 0"),
    ("train", "--seed 99999999999999999999", "seed is 99999999999999999999, it must be from 0"),
    ("train", "--short-side 0", "short_side is 0, it must be from 32"),
    ("train", "--short-side 100000", "short_side is 100000, it must be from 32 to 8192"),
    ("train", "--ignore-index 70000", "ignore_index is 70000, it must be from"),
    ("train", "--set gamma=NaN", "gamma is nan, it must be from -1000"),
    ("train", "--set gamma=x", "gamma is 'x', expected float | None"),
    ("train", "--set tau=0", "tau is 0, it must be from 0.0001"),
    ("train", "--set crop_size=1000000000", "crop_size is 1000000000, it must be from 32 to 8192"),
    ("train", "--set num_contexts=0", "num_contexts is 0, it must be from 1 to 64"),
    ("train", "--set learn_gamma=3", "learn_gamma"),
    ("train", "--set nosuch=1", "--set nosuch: expected NAME=VALUE, with a name of"),
    ("train", "--set backbone=swin_t", "--set backbone: expected NAME=VALUE, with a name of"),
    ("train", "--prompting none --set gamma=1", "gamma=1 would have no effect: it needs post-model prompting"),
    ("train", "--set drop_path=0.5", "drop_path=0.5 would have no effect"),
    ("train", "--prompting template --set templates=[]", "expected texts with one {{}} each"),
    ("train", '--prompting template --set templates=["{{}}{{x}}"]', "expected texts with one {{}} each"),
    ("train", '--prompting template --set templates=["{{}}{{"]', "expected texts with one {{}} each"),
    ("train", '--prompting template --set templates=[["{{}}"]]', "expected texts with one {{}} each"),
    ("train", "--prompting template --set templates=a", "templates is 'a', expected list | None"),
    ("eval", "--checkpoint {best} --short-side 0 --device cpu", "short_side is 0, it must be from 32"),
    ("eval", "--checkpoint {best} --workers -1 --device cpu", "workers is -1, it must be from 0"),
    ("predict", "{photo} --checkpoint {best} --short-side 7", "short_side is 7, it must be from 32"),
    ("detect", "predict {photo} --checkpoint {best} --threshold nan", "threshold is nan, it must be from 0 to 1"),
    ("detect", "predict {photo} --checkpoint {best} --short-side 0", "short_side is 0, it must be from 32"),
    # devices, folders
    ("train", "--device meta", "--device meta"),
    ("train", "--device nosuch", "--device nosuch: expected cpu"),
    ("train", "--out {text}", "text.txt is not a folder"),
    ("train", "--out {run}", "already holds a run: continue it with --resume"),
    ("train", "--out {new} --resume", "--resume: {new}/last.pt: no such file"),
    ("train", "--out {new} --resume {best}", "best.pt holds no optimizer state"),
    ("eval", "--checkpoint {best} --val {new} {masks} --device cpu", "no such folder"),
    ("eval", "--checkpoint {best} --data {new} --device cpu", "no data set here; expected images/val"),
    ("train", "--train {new} {masks}", "no such folder"),
    # classes
    ("train", "--classes {new}", "no such class list"),
    ("train", "--classes cityskapes", "cityskapes: no such class list; give names such as"),
    ("train", "--classes a,b,c", ".png: value 3 is not a class; the classes are 0 to 2"),
    ("train", "--classes {empty}", "the class list is empty"),
    ("train", "--classes sky,sky,tree,car", "'sky' occurs more than once"),
    ("train", "--classes sky,SKY,tree,car", "'SKY' is empty, a special token or the same as another name"),
    ("train", "--classes sky,&nbsp;,tree,car", "'&nbsp;' is empty, a special token or the same as another name"),
    ("train", "--classes sky,<end_of_text>,tree,car", "'<end_of_text>' is empty, a special token or the same"),
    ("train", "--classes sky,,tree,car", "each a single, non-empty line"),
    ("train", "--classes {png}", "expected UTF-8: name, or name, R, G, B"),
    ("train", "--classes {oneclass}", "1 classes; 2 to 255 are possible"),
    ("train", "--classes {formfeed}", "each a single, non-empty line"),
    ("predict", "{photo} --checkpoint {best} --classes sky,sky", "occurs more than once"),
    ("predict", "{photo} --checkpoint {best} --score-maps nosuch", "--score-maps nosuch: no such class"),
    # images and masks
    ("train", "VAL=half", "1.png: not readable as an image, remove or replace it"),
    ("train", "VAL=value77", "1.png: value 77 is not a class"),
    ("train", "VAL=ignored", "all pixels of the masks are ignored"),
    ("train", "VAL=size", "1.png: 64 x 64 pixels, but"),
    ("train", "VAL=nomask", "no mask of this name in"),
    ("train", "VAL=colors", "a mask in colors (RGB), but masks hold class indices"),
    ("train", "VAL=eps", "1.png: not readable as an image"),
    ("train", "VAL=gif", "only .gif files"),
    ("train", "VAL=jpgmasks", "only .jpg files"),
    ("train", "VAL=fifo", "no images there"),
    ("train", "VAL=twice", "same name as 1.jpg"),
    ("train", "VAL=newline", "1\\n1.png: not readable as an image"),
    ("predict", "{new} --checkpoint {best}", "no such image"),
    ("predict", "{text} --checkpoint {best}", ".txt"),
    ("predict", "{fifo} --checkpoint {best}", "fifo.jpg"),
    ("predict", "--checkpoint {best}", "no images: name files"),
    ("predict", "{photo} --checkpoint {best} --clip RN50", "expected a model, one of the two"),
    ("predict", "{photo} --clip {clip}", "CLIP alone has no classes"),
    ("predict", "{photo} --checkpoint {best} --dense z", "--dense is for CLIP alone"),
    ("predict", "--checkpoint {best} --export {new}.txt", "expected a name that ends in .pt2"),
    # checkpoints
    ("eval", "--checkpoint {new} --device cpu", "no such file"),
    ("eval", "--checkpoint {images} --device cpu", "images: a folder, expected a file"),
    ("eval", "--checkpoint {empty} --device cpu", "cut short or damaged"),
    ("eval", "--checkpoint {text} --device cpu", "damaged"),
    ("eval", "--checkpoint {png} --device cpu", "damaged"),
    ("eval", "--checkpoint {cut} --device cpu", "cut short or damaged"),
    ("eval", "--checkpoint {flipped} --device cpu", "differs from its checksum"),
    ("eval", "--checkpoint {nan} --device cpu", "decode_head.conv_seg.weight is not finite"),
    ("eval", "--checkpoint {clip} --device cpu", "expected a checkpoint that train.py or detect.py wrote"),
    ("eval", "--checkpoint {name} --device cpu", "a damaged checkpoint, its name cannot be read"),
    ("eval", "--checkpoint {names} --device cpu", "a damaged checkpoint, its class_names cannot be read"),
    ("eval", "--checkpoint {model} --device cpu", "a damaged checkpoint, its model cannot be read"),
    ("eval", "--checkpoint {settings} --device cpu", "a damaged checkpoint, its settings cannot be read"),
    ("eval", "--checkpoint {data} --device cpu", "a damaged checkpoint, its data cannot be read"),
    ("eval", "--checkpoint {colors} --device cpu", "a damaged checkpoint, its data.colors cannot be read"),
    ("eval", "--checkpoint {val} --device cpu", "a damaged checkpoint, its data.val cannot be read"),
    ("predict", "{photo} --checkpoint {zero}", "a damaged checkpoint, its run.reduce_zero_label cannot be read"),
    ("eval", "--checkpoint {ignore} --device cpu", "a damaged checkpoint, its run.ignore_index cannot be read"),
    ("eval", "--checkpoint {sparse} --device cpu", "sparse.pt: a damaged checkpoint, its model cannot be read"),
    ("eval", "--checkpoint {meta} --device cpu", "meta.pt: a damaged checkpoint, its model cannot be read"),
    ("eval", "--checkpoint {expanded} --device cpu", "expanded.pt: a damaged checkpoint, its model cannot be read"),
    ("train", "--init {expanded}", "expanded.pt: a damaged checkpoint, its model cannot be read"),
    ("eval", "--checkpoint {wild} --val {images} {masks} --device cpu --workers 0", "outputs are not finite"),
    ("eval", "--checkpoint {othername} --device cpu", "no segmentation model named 'rn5000'"),
    ("eval", "--checkpoint {onename} --device cpu", "its model cannot be built"),
    ("eval", "--checkpoint {samename} --device cpu", "'wall' occurs more than once"),
    ("eval", "--checkpoint {crop} --device cpu", "crop_size is 1000000000, it must be from 32 to 8192"),
    ("eval", "--checkpoint {gamma} --device cpu", "gamma is 'x', expected float | None"),
    ("eval", "--checkpoint {unknown} --device cpu", "its model cannot be built"),
    ("eval", "--checkpoint {detector} --device cpu", "no segmentation model named 'retinanet_tiny'"),
    ("predict", "{photo} --checkpoint {nan}", "decode_head.conv_seg.weight is not finite"),
    ("detect", "eval --checkpoint {best} --device cpu", "no detector named 'tiny'"),
    ("train", "--init {nan}", "is not finite"),
    ("train", "--init {detector}", "it holds retinanet_tiny, not tiny"),
    ("train", "--init {frozen}", "freeze_text dropped its text encoder"),
    # CLIP's weights, backbones
    ("train", "--clip {new}", "no such file; CLIP's weights are a path or one of"),
    ("train", "--clip {empty}", "cut short or damaged"),
    ("train", "--clip {nanclip}", "is not finite"),
    ("train", "--clip {otherclip}", "weights of another architecture"),
    ("train", "--clip {best}", "not CLIP's weights"),
    ("predict", "{photo} --classes a,b --clip {huge}", "expected a state dict, parameter names and tensors"),
    ("predict", "{photo} --classes a,b --clip {odd}", "the weights do not fit the model"),
    ("predict", "{photo} --classes a,b --clip {deep}", "the weights do not fit the model"),
    ("predict", "{photo} --classes a,b --clip {bare}", "expected a state dict, parameter names and tensors"),
    ("train", "--clip {bare}", "expected a state dict, parameter names and tensors"),
    ("predict", "{photo} --classes a,b --clip {flat}", "no CLIP has these sizes"),
    ("train", "--backbone resnet18 --prompting none --clip {clip}", "clip.pt would have no effect: without prompting"),
    ("train", "--backbone nosuch", "no backbone named 'nosuch'"),
    ("train", "--backbone nosuch:net", "modules are looked for here and on PYTHONPATH"),
    ("train", "--backbone-weights {best}", "would have no effect: they belong to a backbone by name"),
    ("train", "--backbone resnet18 --backbone-weights {new}", "no such file; weights of resnet18"),
    (
        "eval",
        "--checkpoint {best} --val {images} {masks} --save-masks {masks} --device cpu",
        "holds the validation set",
    ),
    ("eval", "--checkpoint {best} --val {images} {masks} --save-masks {images} --device cpu", "name another folder"),
    ("train", "--out {oldrun}", "already holds a run"),
    ("train", "--out {pipes}", "its last.pt, best.pt or log.jsonl is not a file"),
    ("train", "--out {pipes} --resume", "its last.pt, best.pt or log.jsonl is not a file"),
    ("train", "--classes {longname}", "expected UTF-8: name"),
    ("convert", "{best} {new}.pt", "expected a checkpoint of the authors' release"),
    ("convert", "{empty} {new}.pt", "cut short or damaged"),
    ("convert", "{clip} {best}", "best.pt already exists"),
]


def damaged_sets(root, source):
    """Copies of a set of three images and masks, with one fault each."""
    for name in "half value77 ignored size nomask colors eps gif jpgmasks fifo twice newline".split():
        shutil.copytree(source, root / name)
    image, mask = "images/1.png", "masks/1.png"
    (root / "half" / image).write_bytes((source / image).read_bytes()[:500])
    Image.fromarray(np.full((96, 128), 77, np.uint8)).save(root / "value77" / mask)
    for file in (root / "ignored" / "masks").iterdir():
        Image.fromarray(np.full((96, 128), 255, np.uint8)).save(file)
    Image.fromarray(np.zeros((64, 64), np.uint8)).save(root / "size" / mask)
    (root / "nomask" / mask).unlink()
    Image.open(source / image).save(root / "eps" / image, "EPS")  # which Pillow would give to Ghostscript
    Image.open(source / image).save(root / "colors" / mask)
    for name, kind, suffix in (("gif", "images", ".gif"), ("jpgmasks", "masks", ".jpg")):
        for file in list((root / name / kind).iterdir()):
            file.rename(file.with_suffix(suffix))
    shutil.rmtree(root / "fifo" / "images")
    (root / "fifo" / "images").mkdir()
    os.mkfifo(root / "fifo" / "images" / "1.jpg")
    shutil.copy(source / image, root / "twice" / "images" / "1.jpg")
    for kind in ("images", "masks"):
        (root / "newline" / kind / "1.png").rename(root / "newline" / kind / "1\n1.png")
    (root / "newline" / "images" / "1\n1.png").write_bytes(b"no image")


def damaged_checkpoints(root, best):
    """Copies of a checkpoint with one fault each, by name."""
    good = read_checkpoint(best)
    settings, weights, head = good["settings"], good["model"], "decode_head.conv_seg.weight"
    faults = {
        "nan": {"model": weights | {head: weights[head] / 0}},
        "name": {"name": 5},
        "names": {"class_names": "wall, sky"},
        "model": {"model": {"x": [1.0]}},
        "settings": {"settings": [1]},
        "data": {"data": 5},
        "colors": {"data": {"colors": 5}},
        "val": {"data": {"val": 5}},
        "zero": {"run": {"reduce_zero_label": "no"}},
        "ignore": {"run": {"ignore_index": "x"}},
        "sparse": {"model": weights | {head: weights[head].to_sparse()}},
        "meta": {"model": weights | {head: weights[head].to("meta")}},
        "wild": {"model": weights | {head: torch.full_like(weights[head], 3e38)}},
        "expanded": {"model": weights | {head: torch.zeros(1).expand(2**20, 2**20, 1, 1)}},
        "othername": {"name": "rn5000"},
        "onename": {"class_names": [""]},
        "samename": {"class_names": ["wall"] * 4},
        "crop": {"settings": settings | {"crop_size": 10**9}},
        "gamma": {"settings": settings | {"gamma": "x"}},
        "unknown": {"settings": settings | {"clip": "RN50"}},
        "detector": {"name": "retinanet_tiny"},
        "frozen": {"settings": settings | {"stored_text": True}},
    }
    for name, fault in faults.items():
        torch.save(good | fault, root / f"{name}.pt")
    content = bytearray(best.read_bytes())
    (root / "cut.pt").write_bytes(content[: len(content) // 2])
    middle = len(content) // 2
    content[middle : middle + 4000] = bytes(255 - byte for byte in content[middle : middle + 4000])
    (root / "flipped.pt").write_bytes(content)
    return [*faults, "cut", "flipped"]


def damaged_clips(root):
    model = CLIP(PRESETS["tiny"].architecture)
    clip = {key.removeprefix("text."): value for key, value in model.state_dict().items()}
    conv = "visual.layer1.0.conv1.weight"
    clips = {
        "clip": clip,
        "nanclip": clip | {"ln_final.weight": clip["ln_final.weight"] / 0},
        "otherclip": {k: v for k, v in clip.items() if not k.startswith("transformer.resblocks.1.")},
        "huge": clip | {conv: torch.zeros(1).expand(1_000_000, 32, 1, 1)},
        "odd": clip | {"visual.layer1.10000000.conv1.weight": torch.zeros(1)},
        "deep": clip | {f"transformer.resblocks.{i}.x": torch.zeros(1) for i in range(20_000)},
        "bare": clip | {conv: clip[conv].to("meta")},
        "flat": clip | {"ln_final.weight": torch.zeros(7_777, 1), "visual.class_embedding": torch.zeros(1)},
    }
    for name, weights in clips.items():
        torch.save(weights, root / f"{name}.pt")
    return list(clips)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    root = tmp_path_factory.mktemp("files")
    images, masks = make_folders(root / "good", 3)
    damaged_sets(root, root / "good")
    save_checkpoint(root / "best.pt", build_model("tiny", NAMES), iteration=2, run={}, data={}, best=1.0)
    (root / "empty.txt").write_bytes(b"")
    (root / "text.txt").write_text("some text\n" * 30)
    (root / "oneclass.txt").write_text("sky\n")
    (root / "run").mkdir()
    shutil.copy(root / "best.pt", root / "run" / "last.pt")
    os.mkfifo(root / "fifo.jpg")
    (root / "pipes").mkdir()
    os.mkfifo(root / "pipes" / "log.jsonl")
    (root / "oldrun").mkdir()
    shutil.copy(root / "best.pt", root / "oldrun" / "best.pt")  # whose last.pt is gone
    (root / "longname.txt").write_text("sky\n" + "x" * 1_000_000)
    (root / "formfeed.txt").write_text("sky\ntree\fcar\nroad\nbike\n")
    made = {name: root / f"{name}.pt" for name in damaged_checkpoints(root, root / "best.pt") + damaged_clips(root)}
    made |= {name: root / f"{name}.txt" for name in ("empty", "text", "oneclass", "longname", "formfeed")}
    made |= {name: root / name for name in ("oldrun", "pipes")}
    made |= {"images": images, "masks": masks, "photo": f"{images}/0.png", "png": f"{images}/0.png"}
    return made | {"best": root / "best.pt", "run": root / "run", "fifo": root / "fifo.jpg", "new": root / "new"}


def fill_in(script, options, files, out):
    """The words of a row's options, after those that make them a whole command."""
    if script == "train":
        name = options.removeprefix("VAL=") if options.startswith("VAL=") else ""
        options = OTHER_VAL.replace("VAL", name) if name else f"{TRAIN} {options}"
    words = [word.format(**files, out=out) for word in options.split()]
    return [CLASSES if word == "LIST" else word for word in words]


@pytest.mark.parametrize("script, options, expected", BAD, ids=[f"{script} {options}" for script, options, _ in BAD])
def test_one_line_says_what_is_wrong(script, options, expected, files, tmp_path, monkeypatch, capsys):
    module, words = importlib.import_module(script), fill_in(script, options, files, tmp_path / "out")
    monkeypatch.chdir(tmp_path)
    line = error_line(module, capsys, monkeypatch, *words)
    assert expected.format(**files) in line and "Traceback" not in line and "weights_only" not in line
    assert "please report" not in line
    assert not list(tmp_path.rglob("*.pt"))  # nothing was written


DAMAGES = {  # what a crafted last.pt holds
    "no optimizer state": {"optimizer": {}},
    "another optimizer's state": {"optimizer": {"state": {0: {"step": torch.zeros(()), "exp_avg": torch.zeros(7)}}}},
    "no random state": {"random_states": [{}]},
    "a wrong random state": {"random_states": [{"cpu": torch.zeros(3)}]},
    "a negative iteration": {"iteration": -1},
    "an iteration beyond the end": {"iteration": 99},
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_last_checkpoint_is_named_and_kept(damage, files, tmp_path, monkeypatch, capsys):
    train = importlib.import_module("train")
    words = fill_in("train", "--clip none", files, tmp_path / "out")
    monkeypatch.setattr("sys.argv", ["train.py", *words])
    train.main()
    last = tmp_path / "out" / "last.pt"
    torch.save(read_checkpoint(last) | DAMAGES[damage], last)
    before = last.read_bytes()
    capsys.readouterr()
    line = error_line(train, capsys, monkeypatch, *words, "--resume")
    assert "last.pt: a damaged optimizer, random_states or iteration (" in line
    assert last.read_bytes() == before


def test_table_is_long_enough():
    assert len(BAD) >= 80


class Payload:
    """Pickled, it creates a file when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


class Script(torch.nn.Module):
    """TorchScript that writes a file when it is loaded."""

    path: str

    def __init__(self, path: str):
        super().__init__()
        self.path, self.w = path, torch.nn.Parameter(torch.zeros(3))

    def forward(self, x: torch.Tensor):
        return x

    @torch.jit.export
    def __getstate__(self):
        return self.path, self.w, self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[str, torch.Tensor, bool]):
        self.path, self.w, self.training = state[0], state[1], state[2]
        torch.save(state[1], state[0])


def two_of_one_name(path, payload):
    """Zip readers differ in which of two entries they take."""
    torch.jit.script(Script(str(payload.path))).save(str(path))
    content = [(name, zipfile.ZipFile(path).read(name)) for name in zipfile.ZipFile(path).namelist()]
    with zipfile.ZipFile(path, "w") as archive, warnings.catch_warnings(action="ignore"):
        for name, data in content:
            archive.writestr(name, data)
            if name.endswith(".py"):
                archive.writestr(name, b"#\n")


HOSTILE = {
    "TorchScript, some of it twice": two_of_one_name,
    "TorchScript": lambda path, payload: torch.jit.script(Script(str(payload.path))).save(str(path)),
    "a pickle": lambda path, payload: path.write_bytes(pickle.dumps(payload)),
    "torch.save": lambda path, payload: torch.save({"model": payload}, path),
    "torch.save's old format": lambda path, p: torch.save({"model": p}, path, _use_new_zipfile_serialization=False),
    "a tensor beside it": lambda path, payload: torch.save({"x": torch.zeros(2), "meta": [payload]}, path),
    "a NumPy array": lambda path, payload: np.save(open(path, "wb"), np.array([payload]), allow_pickle=True),
}


def slow_but(name, quick):
    return () if name == quick else pytest.mark.slow


READERS = [
    ("eval", "--checkpoint FILE --device cpu"),
    ("predict", "{photo} --checkpoint FILE"),
    ("predict", "{photo} --clip FILE --classes a,b"),
    ("detect", "eval --checkpoint FILE --device cpu"),
    ("detect", "predict {photo} --checkpoint FILE"),
    ("train", "--init FILE"),
    ("train", "--clip FILE"),
    ("train", "--resume FILE --out {new}"),
    ("train", "--backbone resnet18 --backbone-weights FILE"),
    ("convert", "FILE {new}.pt"),
]


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=slow_but(kind, "torch.save")) for kind in HOSTILE])
@pytest.mark.parametrize("script, options", READERS, ids=[" ".join(reader) for reader in READERS])
def test_no_code_in_a_file_is_run(script, options, kind, files, tmp_path, monkeypatch, capsys):
    HOSTILE[kind](tmp_path / "hostile.pt", Payload(tmp_path / "touched"))
    words = fill_in(script, options, files, tmp_path / "out")
    words = [str(tmp_path / "hostile.pt") if word == "FILE" else word for word in words]
    line = error_line(importlib.import_module(script), capsys, monkeypatch, *words)
    assert "hostile.pt" in line and "weights_only" not in line
    assert not (tmp_path / "touched").exists()


def test_a_full_disk_keeps_the_checkpoint(tmp_path):
    """Simulated by a limit on the size of files."""
    model, path = build_model("tiny", NAMES), tmp_path / "last.pt"
    save_checkpoint(path, model, iteration=1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, limits[1]))
    try:
        with pytest.raises(OSError, match="last.pt was left as it was: writing failed, is the disk full?") as error:
            save_checkpoint(path, model, iteration=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(error.value)
    assert os.listdir(tmp_path) == ["last.pt"] and read_checkpoint(path)["iteration"] == 1


def test_ctrl_c_while_saving_is_no_error_of_writing(tmp_path):
    def interrupt(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), mock.patch("torch.serialization._save", interrupt):
        save_checkpoint(tmp_path / "last.pt", build_model("tiny", NAMES))
    assert not os.listdir(tmp_path)


def test_a_worker_killed_while_saving_is_named_as_such(tmp_path):
    def killed(*_):
        raise RuntimeError("DataLoader worker (pid 5) is killed by signal: Killed.")

    with pytest.raises(RuntimeError, match="DataLoader worker"), mock.patch("os.fsync", killed):
        save_checkpoint(tmp_path / "last.pt", build_model("tiny", NAMES))
    error = RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 1 vs 2")
    with pytest.raises(RuntimeError, match="DataLoader worker"), replacing(tmp_path / "last.pt"):
        try:
            killed()
        except RuntimeError:
            raise error  # noqa: B904, as torch's writer does
    assert not os.listdir(tmp_path)


class DiesAtTwo(torch.utils.data.Dataset):
    def __getitem__(self, index):
        return index if index < 2 else os.kill(os.getpid(), signal.SIGKILL)

    def __len__(self):
        return 4


def load_all():
    list(torch.utils.data.DataLoader(DiesAtTwo(), num_workers=1))


def lose_connection():
    raise ConnectionResetError(104, "Connection reset by peer")  # from the pipe of a worker that was killed


def end_of_pipe():
    raise EOFError  # the same, a moment later


def fail():
    raise KeyError("an error\nof ours")


def take_too_much():
    torch.empty(2**50)


@pytest.mark.parametrize(
    "main, expected",
    [
        (load_all, "fewer --workers; --resume continues training"),
        (lose_connection, "fewer --workers; --resume continues training"),
        (end_of_pipe, "fewer --workers; --resume continues training"),
        (take_too_much, "a smaller --batch-size"),
        (fail, "error: KeyError: 'an error\\nof ours'; please report this, with what is printed if DENSECLIP_DEBUG=1"),
    ],
)
def test_any_other_error_is_one_line(main, expected, capsys):
    handler = signal.getsignal(signal.SIGCHLD)
    with pytest.raises(SystemExit) as stop:
        run_script(main)
    code, line = stop.value.code, capsys.readouterr().err
    del stop
    gc.collect()  # with the traceback ends the loader
    signal.signal(signal.SIGCHLD, handler)
    assert code == 2 and line.startswith("error: ") and expected in line and line.count("\n") == 1


def test_debugging_shows_the_traceback(monkeypatch):
    monkeypatch.setenv("DENSECLIP_DEBUG", "1")
    with pytest.raises(KeyError):
        run_script(fail)
