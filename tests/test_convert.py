"""convert.py turns the authors' checkpoints into ours: every tensor arrives under its name here, class names come with
it, and arbitrary objects are unpickled only on request. (That the numbers agree is test_golden's.)"""

from pathlib import Path

import pytest
import torch
from helpers import error_line, run

import convert
import denseclip
import detection
from convert import rename

GOLDEN = Path(__file__).parent / "golden"
NAMES = ["cat", "dog", "traffic light"]
TASKS = {
    "segmentation": (denseclip, "tiny_vit", "denseclip_vitb"),
    "retinanet": (detection, "retinanet_tiny", "retinanet_denseclip_r50"),
    "mask_rcnn": (detection, "mask_rcnn_tiny", "mask_rcnn_denseclip_r50"),
}


class Unknown:
    """An object that only an unsafe load restores."""


def authors_file(path, task, prompting="post", meta=None):
    """A small model of ours in the authors' format, its text encoder cut to 13 positions; return the model."""
    module, name, golden = TASKS[task]
    torch.manual_seed(0)
    settings = {"context_length": 13} if prompting == "post" else {}
    model = module.build_model(name, NAMES, prompting=prompting, **settings)
    keys = torch.load(GOLDEN / f"{golden}.pt", weights_only=True)["keys"]
    theirs = {rename(key, task): key for key in keys}
    weights = {theirs.get(key, key.removeprefix("encoder.")): value for key, value in model.state_dict().items()}
    assert not any(key.startswith(("head.", "encoder.")) for key in weights)
    torch.save({"state_dict": weights, "meta": {"CLASSES": tuple(NAMES)} if meta is None else meta}, path)
    return model


@pytest.mark.parametrize("prompting", ["post", "none"])
@pytest.mark.parametrize("task", TASKS)
def test_every_tensor_arrives(task, prompting, tmp_path):
    model = authors_file(tmp_path / "authors.pth", task, prompting)
    with pytest.raises(ValueError, match="python convert.py .*authors.pth OURS.pt"):
        TASKS[task][0].load_checkpoint(tmp_path / "authors.pth")
    converted = convert.convert(tmp_path / "authors.pth", tmp_path / "ours.pt")
    loaded = TASKS[task][0].load_checkpoint(tmp_path / "ours.pt")
    for result in (converted, loaded):
        assert (result.name, result.class_names) == (model.name, NAMES) and not result.training
        assert result.settings.prompting == prompting
        state = result.state_dict()
        assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_names_and_objects(tmp_path, monkeypatch, capsys):
    source, target = tmp_path / "authors.pth", tmp_path / "ours.pt"
    authors_file(source, "segmentation", meta={})
    assert "a model of 3 classes, but 0 names" in error_line(convert, capsys, monkeypatch, source, target)
    (tmp_path / "list.txt").write_text("\n".join(NAMES))
    run(convert, monkeypatch, source, target, "--classes", tmp_path / "list.txt")
    assert denseclip.read_checkpoint(target)["run"]["reduce_zero_label"]
    assert "already exists" in error_line(convert, capsys, monkeypatch, source, target)
    with pytest.raises(ValueError, match="room for 5"):  # the authors kept 13 positions
        denseclip.load_checkpoint(target).encoder.set_class_names(["cat", "dog", "a name longer than the others"])
    target.unlink()

    palette = [[1, 2, 3], [4, 5, 6], [7, 8, 9]]
    authors_file(source, "segmentation", meta={"CLASSES": NAMES, "PALETTE": palette, "env": Unknown()})
    assert "--unsafe" in error_line(convert, capsys, monkeypatch, source, target) and not target.exists()
    run(convert, monkeypatch, source, target, "--unsafe")
    assert denseclip.load_checkpoint(target).class_names == NAMES
    assert denseclip.read_checkpoint(target)["data"]["colors"] == [tuple(color) for color in palette]


def test_other_files_are_named(tmp_path, capsys, monkeypatch):
    torch.save({"model": {}}, tmp_path / "other.pth")
    torch.save({"state_dict": {"fc.weight": torch.zeros(1)}}, tmp_path / "resnet.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    for name in ("none.pth", "other.pth", "resnet.pth", "list.pth"):
        assert name in error_line(convert, capsys, monkeypatch, tmp_path / name, tmp_path / "ours.pt")
        assert not (tmp_path / "ours.pt").exists()


DAMAGE = {  # of the authors' file: what becomes of it
    "state_dict is a list": (lambda c: c | {"state_dict": [1]}, "authors' release"),
    "state_dict is a tensor": (lambda c: c | {"state_dict": torch.zeros(3)}, "authors' release"),
    "values that are no tensors": (lambda c: c | {"state_dict": c["state_dict"] | {"x": "y"}}, "authors' release"),
    "keys that are no strings": (
        lambda c: c | {"state_dict": c["state_dict"] | {5: torch.zeros(1)}},
        "names and plain tensors",
    ),
    "sparse": (lambda c: with_weight(c, torch.eye(3).to_sparse()), "plain tensors"),
    "meta": (lambda c: with_weight(c, torch.zeros(3, 256, 1, 1, device="meta")), "plain tensors"),
    "a scalar classifier": (lambda c: with_weight(c, torch.tensor(1.0)), "a model of 1 classes, but 3 names"),
    "no classes": (lambda c: with_weight(c, torch.zeros(0, 64, 1, 1)) | {"meta": {}}, "expected a list of class names"),
    "other shapes": (lambda c: with_weight(c, torch.zeros(3, 7, 1, 1)), r"conv_seg.weight is \(3, 7, 1, 1\), expected"),
    "nan": (lambda c: with_weight(c, torch.full((3, 256, 1, 1), float("nan"))), "conv_seg.weight is not finite"),
    "meta is a list": (lambda c: c | {"meta": [1]}, "authors' release"),
    "meta is a tensor": (lambda c: c | {"meta": torch.zeros(3)}, "authors' release"),
    "CLASSES is a string": (lambda c: c | {"meta": {"CLASSES": "cat"}}, "CLASSES are not names"),
    "CLASSES is a number": (lambda c: c | {"meta": {"CLASSES": 3}}, "CLASSES are not names"),
    "CLASSES are numbers": (lambda c: c | {"meta": {"CLASSES": [1, 2, 3]}}, "CLASSES are not names"),
    "CLASSES are equal": (lambda c: c | {"meta": {"CLASSES": ["cat"] * 3}}, "'cat' occurs more than once"),
    "CLASSES are missing": (lambda c: c | {"meta": None}, "a model of 3 classes, but 0 names; give --classes"),
    "PALETTE is a number": (lambda c: c | {"meta": c["meta"] | {"PALETTE": 3}}, "authors' release"),
    "PALETTE of pairs": (lambda c: c | {"meta": c["meta"] | {"PALETTE": [[1, 2]] * 3}}, "authors' release"),
    "PALETTE beyond 255": (lambda c: c | {"meta": c["meta"] | {"PALETTE": [[1, 2, 300]] * 3}}, "authors' release"),
}


def with_weight(checkpoint, value):
    return checkpoint | {"state_dict": checkpoint["state_dict"] | {"decode_head.conv_seg.weight": value}}


@pytest.fixture(scope="module")
def authors(tmp_path_factory):
    path = tmp_path_factory.mktemp("authors") / "authors.pth"
    authors_file(path, "segmentation")
    return torch.load(path, weights_only=True)


@pytest.mark.parametrize("unsafe", [False, True], ids=["", "unsafe"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_files_end_in_one_line(damage, unsafe, authors, tmp_path):
    change, message = DAMAGE[damage]
    torch.save(change(authors), tmp_path / "authors.pth")
    with pytest.raises(ValueError, match=message) as error:
        convert.convert(tmp_path / "authors.pth", tmp_path / "ours.pt", unsafe=unsafe)
    assert "authors.pth: " in str(error.value) and "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["authors.pth"]


@pytest.mark.parametrize("content", [b"", b"text", b"PK\x03\x04 half", b"\x80\x02cnosuch\nname\n."])
@pytest.mark.parametrize("options", [[], ["--unsafe"]], ids=["", "unsafe"])
def test_other_bytes_end_in_one_line(content, options, tmp_path, monkeypatch, capsys):
    (tmp_path / "authors.pth").write_bytes(content)
    line = error_line(convert, capsys, monkeypatch, tmp_path / "authors.pth", tmp_path / "ours.pt", *options)
    assert "authors.pth: " in line and "weights_only" not in line and "please report" not in line


def test_the_target_is_made_or_refused(tmp_path, monkeypatch, capsys):
    source = tmp_path / "authors.pth"
    authors_file(source, "segmentation")
    run(convert, monkeypatch, source, tmp_path / "new" / "folder" / "ours.pt")
    assert denseclip.load_checkpoint(tmp_path / "new" / "folder" / "ours.pt").class_names == NAMES
    assert "authors.pth" in error_line(convert, capsys, monkeypatch, source, source / "ours.pt")
    assert f"{tmp_path / 'new'} already exists" in error_line(convert, capsys, monkeypatch, source, tmp_path / "new")
