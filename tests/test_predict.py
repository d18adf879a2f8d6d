"""predict.py draws what eval.py scores: the same labels, of photos of any kind and size. With other class names and
with CLIP alone, it draws Eq. (2) as computed by hand from open_clip's tokens. Mistakes end in one line."""

import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import NAMES, error_line, images, make_folders, readme_block, run
from PIL import Image
from test_clip_model import RESNET, VIT, Archive, open_clip_twin
from torch.nn import functional as F

import predict
from data import SegmentationDataset, default_colors, eval_transform
from denseclip import build_model, load_checkpoint, save_checkpoint
from eval import evaluate
from heads import resize
from predict import TEMPLATES, Predictor, add_legend, draw_sheet
from tokenizer import tokenize

COLORS = [(200, 50, 50), (50, 200, 50), (50, 50, 200), (200, 200, 50)]


@torch.no_grad()
def save_model(path, reduce_zero_label=True):
    """A random model whose labels differ from place to place."""
    torch.manual_seed(0)
    model = build_model("tiny", NAMES, crop_size=64).eval()
    conv = model.decode_head.conv_seg
    torch.nn.init.normal_(conv.weight)
    conv.bias -= model(images(1)).mean((0, 2, 3))
    save_checkpoint(path, model, run={"reduce_zero_label": reduce_zero_label}, data={"colors": COLORS})
    return path


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("run") / "best.pt")


@pytest.fixture
def photos(tmp_path):
    """Four photos of 96 x 128 and 40 x 300 pixels."""
    random = np.random.default_rng(0)
    (tmp_path / "photos").mkdir()
    for i, size in enumerate([(96, 128), (96, 128), (40, 300), (128, 96)]):
        pixels = random.integers(0, 256, (size[0] // 4, size[1] // 4, 3)).repeat(4, 0).repeat(4, 1)
        Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / "photos" / f"{i}.png")
    return tmp_path / "photos"


def labels_of(path):
    return torch.from_numpy(np.asarray(Image.open(path)).astype(np.int64))


def colors_of(image):
    return {color for _, color in image.convert("RGB").getcolors(image.width * image.height)}


# ------------------------------------------------------------------------------------------------ pictures


def test_pictures_of_a_folder(checkpoint, photos, tmp_path, monkeypatch, capsys):
    (photos / "notes.txt").write_text("not an image")
    out = tmp_path / "out"
    options = (photos, "--checkpoint", checkpoint, "--out", out, "--sheet", "--score-maps", "sky", "traffic light")
    run(predict, monkeypatch, *options)
    endings = ["", "_labels", "_score_sky", "_score_traffic_light", "_sheet"]
    assert sorted(p.name for p in out.iterdir()) == [f"{i}{ending}.png" for i in range(4) for ending in endings]
    for i in range(4):
        size = Image.open(photos / f"{i}.png").size
        labels, overlay = Image.open(out / f"{i}_labels.png"), Image.open(out / f"{i}.png")
        assert labels.size == size and colors_of(labels) <= set(COLORS)
        assert overlay.width >= size[0] and overlay.height > size[1]  # a legend is below
        assert (
            Image.open(out / f"{i}_score_sky.png").height > size[1] and Image.open(out / f"{i}_sheet.png").width > 1000
        )
    assert capsys.readouterr().out == f"pictures of 4 photos written to {out}, 0 skipped, 0 failed\n"

    before = (out / "1_labels.png").read_bytes()
    for path in out.glob("0*.png"):
        path.unlink()
    (out / "1_labels.png").write_bytes(b"mine")
    run(predict, monkeypatch, *options)
    assert (out / "0.png").exists() and (out / "1_labels.png").read_bytes() == b"mine"
    printed = capsys.readouterr().out
    assert f"skipping 3 of 4 photos with pictures in {out}, perhaps of another model; --overwrite" in printed
    assert f"pictures of 1 photos written to {out}, 3 skipped, 0 failed" in printed
    run(predict, monkeypatch, *options, "--overwrite")
    assert (out / "1_labels.png").read_bytes() == before
    assert "pictures of 4 photos written" in capsys.readouterr().out


def test_an_interrupted_photo_leaves_what_was_there(tmp_path):
    (tmp_path / "a.png").write_bytes(b"before")
    with pytest.raises(KeyboardInterrupt), predict.replacing(tmp_path / "a.png") as part:
        Image.new("RGB", (8, 8)).save(part)
        raise KeyboardInterrupt
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"] and (tmp_path / "a.png").read_bytes() == b"before"


@pytest.mark.parametrize("error", [KeyError("late"), OSError(28, "No space left on device")])
def test_a_photo_that_fails_late_leaves_no_picture(error, checkpoint, photos, tmp_path, monkeypatch, capsys):
    def draw(*_):
        yield Image.new("RGB", (8, 8))
        yield Image.new("RGB", (8, 8))
        raise error

    monkeypatch.setattr(predict, "draw_pictures", draw)
    with pytest.raises(SystemExit):
        run(predict, monkeypatch, photos / "0.png", "--checkpoint", checkpoint, "--out", tmp_path / "out", "--sheet")
    assert not list((tmp_path / "out").iterdir())
    printed = capsys.readouterr()
    assert "0 skipped, 1 failed" in printed.out and printed.err.count("is the disk full?") == isinstance(error, OSError)


def test_a_bar_in_a_trained_name_is_part_of_the_name(photos, tmp_path, monkeypatch):
    names = ["sky|clouds", *NAMES[1:]]
    save_checkpoint(tmp_path / "best.pt", build_model("tiny", names, crop_size=64))
    options = ["--checkpoint", tmp_path / "best.pt", "--out", tmp_path / "out", "--score-maps", "all"]
    run(predict, monkeypatch, photos / "0.png", *options)
    assert len(list((tmp_path / "out").iterdir())) == 2 + len(names)


@pytest.mark.parametrize("multi_scale, reduce_zero_label", [(False, True), (True, False)])
def test_labels_are_those_of_eval(multi_scale, reduce_zero_label, tmp_path, monkeypatch):
    folders = make_folders(tmp_path, 1, height=80, width=90)
    model = load_checkpoint(save_model(tmp_path / "best.pt", reduce_zero_label))
    dataset = SegmentationDataset(*folders, len(NAMES))
    dataset.reduce_zero_label = reduce_zero_label
    dataset.read_label = lambda *_: torch.zeros(80, 90, dtype=torch.uint8)
    evaluate(model, dataset, "cpu", multi_scale=multi_scale, save_masks=tmp_path / "eval", colors=COLORS)
    options = ["--checkpoint", tmp_path / "best.pt", "--out", tmp_path / "out", *["--multi-scale"] * multi_scale]
    run(predict, monkeypatch, folders[0], *options)
    expected, found = (Image.open(tmp_path / name) for name in ("eval/0.png", "out/0_labels.png"))
    assert np.array_equal(expected, found) and expected.getpalette() == found.getpalette()
    assert len(np.unique(found)) > 1 and np.min(found) >= reduce_zero_label


def test_exif_orientation_is_applied(checkpoint, photos, tmp_path):
    upright = Image.open(photos / "0.png")
    exif = Image.Exif()
    exif[274] = 6  # to be rotated clockwise by 90 degrees
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    predictor = Predictor(checkpoint)
    assert torch.equal(predictor.labels(tmp_path / "turned.png"), predictor.labels(upright))
    assert predictor.labels(Image.open(tmp_path / "turned.png")).shape == (128, 96)  # a Pillow image is taken as it is


@pytest.mark.parametrize("backbone", ["tiny", "tiny_vit"])
def test_images_of_any_size_and_mode(backbone, tmp_path, monkeypatch):
    torch.manual_seed(0)
    save_checkpoint(tmp_path / "best.pt", build_model(backbone, NAMES, crop_size=64))
    (tmp_path / "in").mkdir()
    gray = np.linspace(0, 65535, 48 * 64).reshape(48, 64).astype(np.uint16)
    made = {"16bit": gray, "1x1": np.full((1, 1, 3), 7, np.uint8), "wide": np.full((1, 300), 9, np.uint8)}
    made |= {"tall": np.full((300, 2), 9, np.uint8), "alpha": np.full((9, 8, 4), 9, np.uint8)}
    for name, pixels in made.items():
        Image.fromarray(pixels).save(tmp_path / "in" / f"{name}.png")
    options = ["--checkpoint", tmp_path / "best.pt", "--out", tmp_path / "out", "--precision", "bf16"]
    run(predict, monkeypatch, tmp_path / "in", *options, "--score-maps", "all", "--sheet")
    for name, pixels in made.items():
        assert labels_of(tmp_path / "out" / f"{name}_labels.png").shape == pixels.shape[:2]
    assert len(list((tmp_path / "out").iterdir())) == len(made) * (3 + len(NAMES))


def test_unreadable_files_are_named_and_the_rest_is_done(checkpoint, photos, tmp_path, monkeypatch, capsys):
    Image.open(photos / "0.png").save(photos / "cut.jpg")
    (photos / "cut.jpg").write_bytes((photos / "cut.jpg").read_bytes()[:900])
    (photos / "text.jpg").write_text("not an image")
    with pytest.raises(SystemExit) as stop:
        run(predict, monkeypatch, photos, "--checkpoint", checkpoint, "--out", tmp_path / "out")
    printed = capsys.readouterr()
    assert stop.value.code == 1 and printed.out.endswith("0 skipped, 2 failed\n")
    errors = [line for line in printed.err.splitlines() if line.startswith("error: ")]
    assert [str(photos / name) in line for name, line in zip(("cut.jpg", "text.jpg"), errors, strict=True)] == [
        True
    ] * 2
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        f"{i}{e}.png" for i in range(4) for e in ("", "_labels")
    ]


def test_the_legend_is_readable_at_any_size():
    name = "a class with quite a long name, to be read on any picture"
    for size in [(1, 1), (3000, 2), (2, 3000), (600, 400)]:
        picture = add_legend(Image.new("RGB", size, "red"), [((0, 0, 255), name), ((0, 255, 0), "sky")])
        pixels = np.asarray(picture)[size[1] :]  # the legend
        assert (pixels == 255).all(2)[:, -1].all()  # no name is cut at the right
        for color in [(0, 0, 255), (0, 255, 0), (0, 0, 0)]:
            rows = np.flatnonzero((pixels == color).all(2).any(1))
            assert len(rows) >= 10 * max(1, max(size) / 1000), (size, color)  # pixels


def test_sheet_has_all_panels():
    photo, labels = Image.new("RGB", (60, 40)), torch.zeros(40, 60, dtype=torch.int64)
    truth = torch.full_like(labels, 255)
    truth[:20] = 1
    maps = {name: torch.rand(5, 8) for name in NAMES}
    sheet = draw_sheet(photo, labels, NAMES, COLORS, maps, truth)  # 7 panels in two rows
    assert sheet.width > 4 * 384 and sheet.height > 2 * 256
    assert {COLORS[0], COLORS[1]} < colors_of(sheet) and COLORS[2] not in colors_of(sheet)  # a legend of what is there


# ------------------------------------------------------------------------------------------------ class names


def test_own_names_are_scored_by_eq_2(checkpoint, photos, tmp_path, monkeypatch, capsys):
    names = ["my old dog", "sky", "a very long name of a thing, in many words"]
    (tmp_path / "names.txt").write_text("\n".join(f"{name}\t{k}\t7\t9" for k, name in enumerate(names)))
    options = ["--checkpoint", checkpoint, "--out", tmp_path / "out", "--classes", tmp_path / "names.txt"]
    run(predict, monkeypatch, photos / "0.png", *options)
    assert "these labels come from the score maps" in capsys.readouterr().out

    model, photo = load_checkpoint(checkpoint), Image.open(photos / "0.png")
    model.encoder.set_class_names(names, any_number=True)
    image = eval_transform(torch.from_numpy(np.array(photo)).permute(2, 0, 1), torch.zeros(1))[0][None]
    image = F.interpolate(image, (64, 85), mode="bilinear")  # to the short side of 64
    expected = torch.zeros(1, 3, 64, 85)
    for left, width in ((0, 64), (21, 64)):  # two windows
        with torch.no_grad():
            expected[..., left : left + width] += resize(model.encoder(image[..., left : left + width])[1], (64, width))
    expected[..., 21:64] /= 2
    predictor = Predictor(checkpoint, names)
    assert (predictor.score_maps(photo, small=True) - expected[0]).abs().max() < 1e-5
    probabilities = (resize(expected, (96, 128)) / model.tau).softmax(1)[0]
    assert (predictor.probabilities(photo) - probabilities).abs().max() < 1e-4
    assert predictor.colors == default_colors(3) and predictor.class_names == names
    assert torch.equal(predictor.labels(photo), predictor.probabilities(photo).argmax(0))
    found = Image.open(tmp_path / "out" / "0_labels.png")
    assert torch.equal(
        labels_of(tmp_path / "out" / "0_labels.png"), predictor.labels(photo)
    )  # from 0, whatever the run's
    assert colors_of(found) <= {(k, 7, 9) for k in range(3)}


def test_a_class_of_several_names_has_the_largest_score(checkpoint, photos):
    photo = Image.open(photos / "0.png")
    flat = Predictor(checkpoint, ["sky", "clouds", "dog", "grass"])
    grouped = Predictor(checkpoint, ["sky | clouds", "dog", "grass"])
    one, many = (p.score_maps(photo, small=True) for p in (grouped, flat))
    assert grouped.class_names == ["sky", "dog", "grass"] and one.shape[0] == 3
    _, cosines, _ = flat.scores.encoder(images(1))
    both = grouped.scores(images(1)) * grouped.scores.tau
    expected = torch.cat([cosines[:, :2].amax(1, keepdim=True), cosines[:, 2:]], dim=1)
    assert torch.allclose(both, resize(expected, (64, 64)), atol=1e-6)
    assert torch.allclose(one[1:], many[2:], atol=1e-6)


def test_the_checkpoints_own_names_use_its_head(checkpoint, photos, tmp_path, monkeypatch, capsys):
    photo = Image.open(photos / "0.png")
    for names in (None, NAMES):
        predictor = Predictor(checkpoint, names)
        assert predictor.colors == COLORS and predictor.reduce_zero_label and predictor.class_names == NAMES
        assert predictor.model is not predictor.scores
        assert torch.equal(predictor.probabilities(photo), Predictor(checkpoint).probabilities(photo))
    run(
        predict,
        monkeypatch,
        photos / "0.png",
        "--checkpoint",
        checkpoint,
        "--classes",
        ", ".join(NAMES),
        "--out",
        tmp_path,
    )
    assert "score maps" not in capsys.readouterr().out and labels_of(tmp_path / "0_labels.png").min() >= 1
    maps = predictor.score_maps(photo)
    assert maps.shape == (4, 96, 128) and maps.abs().max() <= 1


@pytest.mark.parametrize(
    "settings, freeze, message",
    [
        ({"prompting": "none"}, False, "trained without language, so all it can do is predict its own 4 classes"),
        ({}, True, "freeze_text dropped its text encoder, so all it can do is predict its own 4 classes"),
    ],
)
def test_models_without_text_encoder_predict_their_own_classes(
    settings, freeze, message, photos, tmp_path, monkeypatch, capsys
):
    model = build_model("tiny", NAMES, crop_size=64, **settings).eval()
    path = tmp_path / "best.pt"
    save_checkpoint(path, model.freeze_text() if freeze else model)
    given = (photos / "0.png", "--checkpoint", path, "--out", tmp_path / "out")
    line = error_line(predict, capsys, monkeypatch, *given, "--classes", "dog, grass")
    assert str(path) in line and message in line
    run(predict, monkeypatch, *given, "--sheet")
    assert (tmp_path / "out" / "0_sheet.png").exists()
    if not freeze:
        line = error_line(predict, capsys, monkeypatch, *given, "--score-maps", "all")
        assert "without language, so it has no score maps" in line
        with pytest.raises(ValueError, match="it has no score maps"):
            Predictor(path).score_maps(photos / "0.png")


# ------------------------------------------------------------------------------------------------ CLIP alone


def image_tokens_of_open_clip(model, image, dense):
    """By hand: [z_bar, z] of Eq. (1) without z_bar, or each position's value projection; (HW, C)."""
    visual = model.visual
    if hasattr(visual, "attnpool"):
        pool, x = visual.attnpool, visual.layer4(visual.layer3(visual.layer2(visual.layer1(visual.stem(image)))))
        x = x.flatten(2)[0].T  # (HW, D)
        if dense == "value":
            return pool.c_proj(pool.v_proj(x))
        x = torch.cat([x.mean(0, keepdim=True), x]) + pool.positional_embedding
        q, k, v = (y.unflatten(1, (pool.num_heads, -1)) for y in (pool.q_proj(x), pool.k_proj(x), pool.v_proj(x)))
        weights = torch.einsum("nhd,mhd->hnm", q, k).div(q.shape[2] ** 0.5).softmax(2)
        return pool.c_proj(torch.einsum("hnm,mhd->nhd", weights, v).flatten(1))[1:]
    if dense == "z":
        visual.output_tokens = True
        return visual(image)[1][0] @ visual.proj
    block, inputs = visual.transformer.resblocks[-1], []
    handle = block.register_forward_pre_hook(lambda _, args, kwargs: inputs.append(args[0]), with_kwargs=True)
    visual(image)
    handle.remove()
    x, width = inputs[0], len(block.attn.out_proj.weight)
    values = F.linear(block.ln_1(x), block.attn.in_proj_weight[2 * width :], block.attn.in_proj_bias[2 * width :])
    x = x + block.attn.out_proj(values)
    x = x + block.mlp(block.ln_2(x))
    return (visual.ln_post(x) @ visual.proj)[0, 1:]


@pytest.mark.parametrize("dense", ["z", "value"])
@pytest.mark.parametrize("kind", ["state dict", "TorchScript"])
@pytest.mark.parametrize("architecture", [RESNET, VIT], ids=["resnet", "vit"])
@torch.no_grad()
def test_zero_shot_equals_open_clip_by_hand(architecture, kind, dense, tmp_path):
    theirs, path, names = open_clip_twin(architecture), str(tmp_path / "clip.pt"), ["dog", "traffic light", "sky"]
    if kind == "TorchScript":
        torch.jit.script(Archive(theirs.state_dict())).save(path)
    else:
        torch.save(theirs.state_dict(), path)
    side = architecture.input_resolution
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (side, side, 3)).astype(np.uint8))
    image = eval_transform(torch.from_numpy(np.array(photo)).permute(2, 0, 1), torch.zeros(1))[0][None]
    tokens = F.normalize(image_tokens_of_open_clip(theirs, image, dense), dim=1)  # (HW, C)
    texts = [theirs.encode_text(tokenize([template.format(name) for name in names])) for template in TEMPLATES]
    text = F.normalize(torch.stack([F.normalize(t, dim=1) for t in texts]).mean(0), dim=1)  # (K, C)
    grid = int(len(tokens) ** 0.5)
    expected = (tokens @ text.T).T.view(1, 3, grid, grid)
    if dense == "value":
        expected = expected - expected.mean((2, 3), keepdim=True)
    predictor = Predictor(clip=path, class_names=names, dense=dense, short_side=side)
    expected = resize(expected, (side, side))
    assert (predictor.score_maps(photo) - expected[0]).abs().max() < 1e-5
    assert (predictor.probabilities(photo) - (expected / 0.01).softmax(1)[0]).abs().max() < 1e-3
    assert Predictor(clip=path, class_names=names).short_side == 2 * side


def test_zero_shot_command(photos, tmp_path, monkeypatch, capsys):
    torch.save(open_clip_twin(VIT).state_dict(), tmp_path / "clip.pt")
    options = [photos, "--clip", tmp_path / "clip.pt", "--classes", "dog|puppy, grass, sky", "--out", tmp_path / "out"]
    run(predict, monkeypatch, *options, "--score-maps", "all")
    assert len(list((tmp_path / "out").glob("*_score_dog.png"))) == 4
    assert "these labels come from the score maps" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------ Python, mistakes


def test_the_documented_lines_run(checkpoint, photos, tmp_path, monkeypatch):
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    (tmp_path / "runs" / "mine" / "best.pt").write_bytes(Path(checkpoint).read_bytes())
    Image.open(photos / "0.png").save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    exec(readme_block("Predictor"), names := {})
    assert names["labels"].shape == (96, 128) and names["labels"].dtype == torch.int64
    assert names["probabilities"].shape == names["score_maps"].shape == (4, 96, 128)
    assert torch.allclose(names["probabilities"].sum(0), torch.ones(96, 128))
    assert isinstance(names["predictor"].overlay("photo.jpg"), Image.Image)


@pytest.mark.parametrize(
    "options, message",
    [
        (["--checkpoint", "PATH", "--clip", "RN50"], "one of the two: --checkpoint FILE or --clip NAME"),
        ([], "one of the two: --checkpoint FILE or --clip NAME"),
        (["--checkpoint", "PATH", "--dense", "z"], "--dense is for CLIP alone"),
        (["--clip", "RN50", "--backbone", "my:net", "--classes", "a,b"], "--backbone for a checkpoint"),
        (["--clip", "RN50"], "CLIP alone has no classes"),
        (["--checkpoint", "PATH", "--score-maps", "dog"], "--score-maps dog: no such class; the classes are wall, sky"),
        (["--checkpoint", "PATH", "--classes", "dog"], "dog: no such class list; give names such as"),
        (["--checkpoint", "PATH", "--classes", "dog, cat|dog"], "'dog' occurs more than once"),
        (["--checkpoint", "PATH", "--classes", "dog, cat||puppy"], "each a single, non-empty line"),
        (["--checkpoint", "PATH", "--classes", "sky, , grass"], "each a single, non-empty line"),
        (["--checkpoint", "PATH", "--classes", "|,sky"], "each a single, non-empty line"),
        (["--checkpoint", "PATH", "--classes", "sky||grass"], "sky||grass.*: no such class list"),
        (["--checkpoint", "PATH", "--classes", "|"], "no such class list"),
        (
            ["--checkpoint", "PATH", "--classes", ",".join(f"x{i}" for i in range(256))],
            "256 classes, but .* room for 255",
        ),
        (["--checkpoint", "PATH", "--classes", "dog, " + "long " * 80], "82 tokens, but the text encoder has room"),
        (["--checkpoint", "PATH", "--short-side", "-5"], "short_side is -5, it must be from 32 to 8192"),
        (["--checkpoint", "PHOTOS/0.png"], "0.png: .* or is damaged"),
        (["--checkpoint", "PATH", "PHOTOS/sub/0.png"], "out/0.png would be written twice"),
        (["--checkpoint", "PATH", "--out", "PHOTOS"], "photos/0.png would be written twice, or over an image"),
        (["--checkpoint", "PATH", "nothing/*.jpg"], "nothing/.*no such image"),
        (["--checkpoint", "PATH", "--out", "PHOTOS/0.png"], "0.png: not a folder that can be written"),
        (["--checkpoint", "PATH", "--out", "PHOTOS/0.png/out"], "out: not a folder that can be written"),
        (["--checkpoint", "PATH", "--export", "PHOTOS/0.png/a.onnx"], "0.png: not a folder that can be written"),
        (["--checkpoint", "PATH", "--export", "PHOTOS"], "photos already exists"),
    ],
)
def test_mistakes_end_in_one_line(options, message, checkpoint, photos, tmp_path, monkeypatch, capsys):
    (photos / "sub").mkdir()
    Image.open(photos / "0.png").save(photos / "sub" / "0.png")
    options = [str(option).replace("PATH", str(checkpoint)).replace("PHOTOS", str(photos)) for option in options]
    paths = [option for option in options if option.endswith(("sub/0.png", "*.jpg"))]
    options = [option for option in options if option not in paths]
    line = error_line(predict, capsys, monkeypatch, photos, *paths, "--out", tmp_path / "out", *options)
    assert re.search(message, line), line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "name, message",
    [
        ("photo.gif", "photo.gif: no image, only .gif; expected files of type .bmp .jpeg .jpg"),
        ("only", "only: no image, only .txt notes sub; expected"),
        ("only/*", r"only/\*: no image, only .txt notes sub; expected"),
        ("pipe.jpg", "pipe.jpg: no image, only pipe.jpg; expected"),
        ("empty", "empty: no such image, or a folder without any; expected files of type"),
        ("none.jpg", "none.jpg: no such image"),
    ],
)
def test_what_is_not_an_image_is_named(name, message, tmp_path):
    for folder in ("empty", "only", "only/sub"):
        (tmp_path / folder).mkdir()
    for file in ("photo.gif", "only/a.txt", "only/notes", "only/.hidden.jpg"):
        (tmp_path / file).write_bytes(b"")
    os.mkfifo(tmp_path / "pipe.jpg")
    with pytest.raises(FileNotFoundError, match=message):
        predict.find_images([tmp_path / name])


def test_images_are_found_once_and_pipes_are_skipped(tmp_path):
    folder = tmp_path / "with [brackets]"
    folder.mkdir()
    for file in ("b.PNG", "a[1].jpg", "notes.txt", ".hidden.png"):
        (folder / file).write_bytes(b"")
    os.mkfifo(folder / "pipe.jpg")
    found = [folder / "a[1].jpg", folder / "b.PNG"]
    assert predict.find_images([folder]) == found
    assert predict.find_images([folder / "a[1].jpg", folder, folder / "b.PNG"]) == found
    assert predict.find_images([f"{tmp_path}/with*/*"]) == found
    assert predict.find_images([folder / ".hidden.png"]) == [folder / ".hidden.png"]


ERRORS = [
    (ValueError("two\nlines"), "a\\nb.png: two\\nlines"),
    (OSError(28, "No space left on device"), "a\\nb.png: [Errno 28] No space left on device"),
    (MemoryError(), "a\\nb.png: MemoryError"),
    (torch.OutOfMemoryError("CUDA out of memory.\nMore"), "a\\nb.png: OutOfMemoryError: CUDA out of memory.;"),
    (ZeroDivisionError("x"), "a\\nb.png: ZeroDivisionError: x;"),
]


@pytest.mark.parametrize("error, line", ERRORS, ids=[type(error).__name__ for error, _ in ERRORS])
def test_whatever_one_image_raises_the_others_are_done(error, line, capsys):
    done = []

    def work(path):
        if path.name != "good.png":
            raise error
        done.append(path)

    assert predict.for_each_image([Path("a\nb.png"), Path("good.png")], work) == 1 and done == [Path("good.png")]
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and lines[0].startswith(f"error: {line}")


def test_an_interruption_ends_the_run():
    def work(path):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        predict.for_each_image([Path("a.png"), Path("b.png")], work)


def test_a_full_disk_leaves_what_was_there(tmp_path):
    (tmp_path / "a.png").write_bytes(b"before")
    message = "a.png was left as it was: writing failed, is the disk full.*No space"
    with pytest.raises(OSError, match=message), predict.replacing(tmp_path / "a.png") as part:
        part.write_bytes(b"half")
        raise OSError(28, "No space left on device")
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"] and (tmp_path / "a.png").read_bytes() == b"before"


@pytest.mark.parametrize("short_side", [0, -5, 9000, float("nan")])
def test_short_side_has_a_range(short_side, checkpoint):
    with pytest.raises(ValueError, match="short_side is .*, it must be from 32 to 8192"):
        Predictor(checkpoint, short_side=short_side)


def test_an_exported_graph_knows_the_short_side_that_was_given(checkpoint):
    assert Predictor(checkpoint, short_side=96).model.short_side == 96  # which `export` writes beside the graph
