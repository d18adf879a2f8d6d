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
