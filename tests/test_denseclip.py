"""The model is the paper's: sizes, the equations, what is frozen, what is cached, what a checkpoint says of itself, and
what may be copied or left out of the project."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import check_round_trip, readme_block
from torch import nn

from clip_model import CLIP
from denseclip import (
    PRESETS,
    build_encoder,
    build_model,
    load_checkpoint,
    pixel_cross_entropy,
    pixel_text_scores,
    read_checkpoint,
    save_checkpoint,
)

ROOT = Path(__file__).parents[1]
NAMES = ["sky", "road", "traffic light"]


def size_without_text(model):
    return sum(p.numel() for name, p in model.named_parameters() if "text_encoder" not in name) / 1e6


@pytest.mark.parametrize(
    "name, prompting, millions",
    [
        ("rn50", "post", 50.2484),
        ("rn101", "post", 67.7952),
        ("vitb16", "post", 105.2735),
        ("rn50", "none", 31.0425),
        ("rn101", "none", 50.0347),
        ("vitb16", "none", 101.2827),
    ],
)
def test_parameters_are_the_papers(name, prompting, millions):
    """Table 1, without the text encoder, whose output is stored after training; in millions."""
    with torch.device("meta"):
        model = build_model(name, [str(i) for i in range(150)], prompting=prompting)
    assert abs(size_without_text(model) - millions) < 6e-5


@pytest.fixture(scope="module", params=["tiny", "tiny_vit"])
def model(request):
    torch.manual_seed(0)
    return build_model(request.param, NAMES)


def test_shapes_at_odd_sizes(model):
    images = torch.randn(2, 3, 75, 101)
    pyramid, score_map, text = model.eval().encoder(images)
    assert model(images).shape == (2, 3, 75, 101)
    assert text.shape == (2, 3, 128) and score_map.shape[:2] == (2, 3)
    assert score_map.shape[2:] == pyramid[model.encoder.backbone.score_level].shape[2:]
    assert score_map.abs().max() <= 1
    assert [x.shape[1] for x in pyramid] == model.encoder.channels


def test_score_map_is_the_cosine():
    """Eq. (2), pixel by pixel."""
    z, t = torch.randn(2, 8, 3, 5), torch.randn(2, 4, 8)
    s = pixel_text_scores(z, t)
    for b, k, y, x in [(0, 0, 0, 0), (1, 3, 2, 4), (0, 2, 1, 3)]:
        assert torch.allclose(s[b, k, y, x], torch.cosine_similarity(z[b, :, y, x], t[b, k], dim=0), atol=1e-6)


def test_ignored_pixels_count_as_zero_in_the_mean():
    logits, labels = torch.randn(2, 3, 4, 4), torch.randint(3, (2, 4, 4))
    whole = nn.functional.cross_entropy(logits, labels, reduction="none")
    assert torch.allclose(pixel_cross_entropy(logits, labels), whole.mean())
    labels[:, :2] = 255
    assert torch.allclose(pixel_cross_entropy(logits, labels), whole[:, 2:].sum() / 32)
    assert pixel_cross_entropy(logits, torch.full_like(labels, 255)) == 0


def test_text_encoder_is_frozen_and_passes_gradients_to_the_contexts(model):
    model.train()
    losses = model(torch.randn(2, 3, 64, 64), torch.randint(3, (2, 64, 64)))
    assert set(losses) == {"loss", "aux_loss"} and all(loss.ndim == 0 for loss in losses.values())
    sum(losses.values()).backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == name.startswith("encoder.text_encoder."), name
    assert model.encoder.contexts.grad.abs().sum() > 0


def calls_of(module, run):
    calls = []
    handle = module.register_forward_hook(lambda *_: calls.append(1))
    run()
    handle.remove()
    return len(calls)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_text_is_encoded_once_for_a_class_list(mode):
    model, images = build_model("tiny", NAMES).eval(), torch.randn(1, 3, 32, 32)
    with mode():
        assert calls_of(model.encoder.text_encoder.transformer, lambda: [model(images) for _ in range(3)]) == 1
    # what one mode computed serves every other: autograd runs through it
    model(images).sum().backward()
    assert model.encoder.gamma.grad is not None


@torch.enable_grad()
def fine_tune(model, **options):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1.0, **options)
    model.train()
    sum(model(torch.randn(2, 3, 64, 64), torch.randint(3, (2, 64, 64))).values()).backward()
    optimizer.step()
    model.eval()


@pytest.mark.parametrize(
    "change",
    [
        fine_tune,
        lambda m: fine_tune(m.requires_grad_(), fused=True),
        lambda m: m.load_state_dict(build_model("tiny", NAMES).state_dict()),
        lambda m: m.load_state_dict(build_model("tiny", NAMES).state_dict(), assign=True),
        lambda m: m.encoder.set_class_names(["cat", "dog", "horse"]),
        lambda m: m.double(),
    ],
    ids=["training", "fused training", "loading", "assignment", "class names", "double"],
)
def test_cached_text_is_never_stale(change):
    torch.manual_seed(0)
    model = build_model("tiny", NAMES).eval()
    memory = torch.zeros(1, 1, 128)
    with torch.no_grad():
        before = model.encoder.embed_class_names(memory)
        change(model)
        after = model.encoder.embed_class_names(memory)
        fresh = model.encoder.encode_text()
    assert torch.allclose(after, fresh, atol=1e-6) and (after.dtype != before.dtype or not torch.equal(after, before))


def test_cached_text_is_full_precision_under_autocast():
    model = build_model("tiny", NAMES).eval()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        text = model.encoder.embed_class_names(torch.zeros(1, 1, 128))
    assert torch.equal(text, model.encoder.encode_text()) and text.dtype == torch.float32


@pytest.mark.parametrize("name", ["tiny", "tiny_vit"])
def test_bfloat16_autocast_trains(name):
    model = build_model(name, NAMES).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = model(torch.randn(2, 3, 64, 64), torch.randint(3, (2, 64, 64)))
    sum(losses.values()).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


def test_long_class_names_lengthen_the_text():
    names = ["cat", "a very long name of a thing, with many words that no other class has"]
    model = build_model("tiny", names)
    assert model.encoder.tokens.shape == (2, 18)
    short = build_model("tiny", ["cat", "dog"])
    assert short.encoder.tokens.shape == (2, 5)  # released code: always 5
    with pytest.raises(ValueError, match="class name .* tokens, but the text encoder has room for 69"):
        build_model("tiny", ["word " * 80])


@pytest.mark.parametrize("names", [[], ["cat", "cat"], ["cat", ""], "cat"])
def test_bad_class_names(names):
    with pytest.raises(ValueError, match="class names"):
        build_model("tiny", names)


def test_a_wrong_setting_raises():
    with pytest.raises(ValueError, match="no segmentation model named 'rn51' .* choose one of rn50, "):
        build_model("rn51", NAMES)
    with pytest.raises(TypeError, match="gama"):
        build_model("tiny", NAMES, gama=1.0)
    for setting in ({"decoder_layers": 0}, {"num_contexts": -1}, {"crop_size": 16}):
        with pytest.raises(ValueError, match="it must be from"):
            build_model("tiny", NAMES, **setting)


def test_class_names_are_the_encoders():
    """Names may change, their number only for score maps alone."""
    model = build_model("tiny", NAMES).eval()
    model.encoder.set_class_names(["cat", "dog", "horse"])
    assert model.class_names == ["cat", "dog", "horse"]
    with pytest.raises(
        ValueError, match="2 class names for a model trained with 3, whose head needs 3; predict.py --cla"
    ):
        model.encoder.set_class_names(["cat", "dog"])
    images = torch.randn(1, 3, 64, 64)
    pyramid, score_map, _ = model.encoder(images)
    model.encoder.set_class_names(["dog", "a bird", "cat", "horse"], any_number=True)
    new_pyramid, new_score_map, _ = model.encoder(images)
    assert new_score_map.shape[1] == 4 and torch.equal(new_pyramid[3], pyramid[3][:, :-3])


@pytest.mark.parametrize("name", ["tiny", "tiny_vit"])
@pytest.mark.parametrize("prompting", ["post", "learned", "template", "template+post", "none"])
@torch.no_grad()
def test_text_can_be_frozen(name, prompting, tmp_path):
    torch.manual_seed(0)
    model, images = build_model(name, NAMES, prompting=prompting).eval(), torch.randn(2, 3, 75, 101)
    expected = model(images)
    save_checkpoint(tmp_path / "full.pt", model)
    assert torch.equal(model.freeze_text().freeze_text()(images), expected)
    check_round_trip(model, tmp_path / "frozen.pt")
    assert torch.equal(load_checkpoint(tmp_path / "frozen.pt")(images), expected)
    if prompting != "none":
        assert (tmp_path / "full.pt").stat().st_size - (tmp_path / "frozen.pt").stat().st_size > 12e6
        assert not any("text_encoder.transformer" in key or "contexts" in key for key in model.state_dict())
        with pytest.raises(ValueError, match="text encoder was dropped by freeze_text"):
            model.encoder.set_class_names(["cat", "dog", "horse"])


def test_readme_lines_that_freeze(tmp_path, monkeypatch):
    save_checkpoint(tmp_path / "runs/mine/best.pt", model := build_model("tiny", NAMES).eval())
    monkeypatch.chdir(tmp_path)
    exec(readme_block("freeze_text"), {})
    images = torch.zeros(1, 3, 64, 64)
    assert torch.equal(load_checkpoint("frozen.pt")(images), model(images))


def test_contexts_from_the_image_cannot_be_frozen():
    with pytest.raises(ValueError, match=r"pre-model prompting needs the text encoder: .* Eq. \(4\)"):
        build_model("tiny", NAMES, prompting="pre").freeze_text()


@pytest.mark.slow
def test_frozen_text_needs_no_tokenizer(tmp_path):
    """Neither tokenizer.py nor its vocabulary nor ftfy and regex."""
    model, images = build_model("tiny", NAMES).eval().freeze_text(), torch.zeros(1, 3, 64, 64)
    save_checkpoint(tmp_path / "frozen.pt", model)
    for file in ("clip_model.py", "heads.py", "denseclip.py"):
        shutil.copy(ROOT / file, tmp_path)
    code = "import sys; sys.modules |= {'ftfy': None, 'regex': None, 'tokenizer': None}; import torch, denseclip; "
    code += "print(denseclip.load_checkpoint('frozen.pt')(torch.zeros(1, 3, 64, 64)).double().sum().item())"
    command = [sys.executable, "-c", code]
    printed = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=True).stdout
    assert float(printed) == pytest.approx(model(images).double().sum().item(), rel=1e-6)


def test_encoder_stands_alone():
    """Other heads can be put on the language-guided encoder."""
    encoder, settings = build_encoder(PRESETS["tiny"], NAMES)
    pyramid, score_map, text = encoder.eval()(torch.randn(1, 3, 64, 64))
    assert torch.equal(pyramid[3][:, -3:], score_map) and text.shape == (1, 3, 128)
    assert (settings.gamma, settings.tau, settings.drop_path) == (1e-4, 0.07, None)


# ------------------------------------------------------------------------------------------------ files


def clip_file(path, name, **changes):
    weights = CLIP(PRESETS[name].architecture).state_dict()
    torch.save({key.removeprefix("text."): value for key, value in weights.items()} | changes, path)
    return {key.removeprefix("text."): value for key, value in weights.items()}


@pytest.mark.parametrize(
    "name, positions", [("tiny", "attnpool.positional_embedding"), ("tiny_vit", "positional_embedding")]
)
@pytest.mark.parametrize("prompting", ["post", "none"])
def test_clip_weights_go_into_the_model(name, positions, prompting, tmp_path):
    weights = clip_file(tmp_path / "clip.pt", name)
    model = build_model(name, NAMES, clip=str(tmp_path / "clip.pt"), prompting=prompting, crop_size=192)
    loaded = model.encoder.backbone.state_dict()
    for key in loaded.keys() - {positions}:
        if not key.startswith("fpn"):
            assert torch.equal(loaded[key], weights[f"visual.{key}"]), key
    if prompting == "post":
        assert torch.equal(model.encoder.text_encoder.positional_embedding, weights["positional_embedding"])
    if positions in loaded:
        grid = 192 // (PRESETS[name].architecture.patch_size or 32)
        assert len(loaded[positions]) == 1 + grid * grid
        assert torch.equal(loaded[positions][0], weights[f"visual.{positions}"][0])


def test_weights_of_another_architecture_are_refused(tmp_path):
    clip_file(tmp_path / "clip.pt", "tiny_vit")
    with pytest.raises(ValueError, match="clip.pt: weights of another architecture: layers is 4, the model expects"):
        build_model("tiny", NAMES, clip=str(tmp_path / "clip.pt"))


@pytest.mark.parametrize("name", ["tiny", "tiny_vit"])
@pytest.mark.parametrize("settings", [{}, {"prompting": "none"}, {"tau": 0.1, "crop_size": 96, "quick_gelu": False}])
def test_checkpoints_say_what_they_are(name, settings, tmp_path):
    check_round_trip(build_model(name, NAMES, **settings), tmp_path / "last.pt")
    save_checkpoint(tmp_path / "last.pt", build_model(name, NAMES, **settings), iteration=7)
    assert [path.name for path in tmp_path.iterdir()] == ["last.pt"]
    assert read_checkpoint(tmp_path / "last.pt")["iteration"] == 7
    loaded = load_checkpoint(tmp_path / "last.pt")
    assert not loaded.training and all(getattr(loaded.settings, key) == value for key, value in settings.items())


def test_a_failed_save_leaves_the_file_before_it(tmp_path):
    model = build_model("tiny", NAMES)
    save_checkpoint(tmp_path / "last.pt", model)
    before = (tmp_path / "last.pt").read_bytes()
    with pytest.raises(Exception):  # noqa: B017 (whatever pickle says of a lambda)
        save_checkpoint(tmp_path / "last.pt", model, wrong=lambda: 0)
    assert (tmp_path / "last.pt").read_bytes() == before
    model.encoder.gamma.data[0] = torch.nan
    with pytest.raises(ValueError, match="last.pt was left as it was: encoder.gamma is not finite"):
        save_checkpoint(tmp_path / "last.pt", model)
    assert (tmp_path / "last.pt").read_bytes() == before


def test_unreadable_checkpoints_are_named(tmp_path):
    save_checkpoint(tmp_path / "whole.pt", build_model("tiny", NAMES))
    (tmp_path / "half.pt").write_bytes((tmp_path / "whole.pt").read_bytes()[:50_000])
    (tmp_path / "text.pt").write_text("not a checkpoint")
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save({"model": {}}, tmp_path / "other.pt")
    save_checkpoint(tmp_path / "newer.pt", model := build_model("tiny", NAMES))
    checkpoint = read_checkpoint(tmp_path / "newer.pt")
    torch.save({**checkpoint, "settings": {"setting_of_next_year": 1}}, tmp_path / "newer.pt")
    torch.save({"state_dict": model.state_dict()}, tmp_path / "authors.pt")
    for name in ("half.pt", "text.pt", "list.pt", "none.pt", "other.pt", "newer.pt", "authors.pt"):
        with pytest.raises((ValueError, FileNotFoundError), match=name) as error:
            load_checkpoint(tmp_path / name)
        assert "\n" not in str(error.value)


# ------------------------------------------------------------------------------------------------ the promises


@pytest.mark.parametrize(
    "files, code",
    [
        pytest.param(["clip_model.py"], "import clip_model", marks=pytest.mark.slow),
        pytest.param(["heads.py"], "import heads", marks=pytest.mark.slow),
        pytest.param(
            ["tokenizer.py"],
            "import tokenizer; assert tokenizer.tokenize('a cat').shape == (1, 77)",
            marks=pytest.mark.slow,
        ),
        (
            ["denseclip.py", "clip_model.py", "tokenizer.py", "heads.py"],
            "import denseclip; denseclip.build_model('tiny', ['cat', 'dog'])",
        ),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_files_can_be_copied(files, code, tmp_path):
    """Each works in an otherwise empty folder, with the files that its first lines name."""
    for file in [*files, "bpe_simple_vocab_16e6.txt.gz"]:
        shutil.copy(ROOT / file, tmp_path)
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, env={"PATH": ""})


def copy_without_detection(folder):
    """The project without detection and conversion, and the tests of what is left."""
    shutil.copytree(
        ROOT, folder, ignore=shutil.ignore_patterns(".git", "runs", "data", "*_cache", "__pycache__", "golden")
    )
    for name in ("detection", "coco", "detect", "convert"):
        (folder / f"{name}.py").unlink()
        for test in folder.glob(f"tests/test_{name}.py"):
            test.unlink()
    # these convert checkpoints, run detect.py, count detectors, or read COCO's masks
    for name in ("golden", "reproduction", "tables", "properties"):
        (folder / "tests" / f"test_{name}.py").unlink()
    return folder


@pytest.mark.slow
def test_all_the_rest_works_without_detection(tmp_path):
    """Without detection.py, coco.py, detect.py and convert.py, every other script imports, and its tests pass."""
    folder = copy_without_detection(tmp_path / "copy")
    modules = {path.stem for path in folder.glob("*.py")}
    assert modules >= {"clip_model", "tokenizer", "heads", "denseclip", "backbones", "data", "eval", "train", "demo"}
    subprocess.run([sys.executable, "-c", f"import {', '.join(modules)}"], cwd=folder, check=True)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    command += ["-k", "not detect and not convert and not equations_of_the_readme"]  # rows of tables, by script
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]


def test_the_readmes_example_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(readme_block("score_map, text"), scope := {})
    assert scope["logits"].shape == (2, 3, 512, 512) and scope["score_map"].shape[:2] == (2, 3)
    assert scope["model"].class_names == ["sky", "road", "traffic light"]


def test_forward_fits_on_one_screen():
    """The method and the segmentation model's forward, docstrings included."""
    source = (ROOT / "denseclip.py").read_text()
    for name in ("LanguageGuidedEncoder", "DenseCLIP"):
        body = re.search(rf"class {name}\(.*?    def forward\(.*?(?=\n    def |\n\n\n)", source, re.S)[0]
        assert body.split("    def forward(")[1].count("\n") < 40


def test_equations_of_the_readme_stand_in_the_code():
    """Each row of the README's table of equations names the place where the code says that equation's number."""
    readme = (ROOT / "README.md").read_text()
    rows = re.findall(r"^\| \((\d)\) .*\| `(\w+\.py)`: `([\w.]+)` *\|$", readme, re.M)
    assert {number for number, _, _ in rows} >= set("12345678")
    for number, file, place in rows:
        source = (ROOT / file).read_text()
        *outer, last = place.split(".")
        for name in outer:
            source = re.search(rf"^class {name}\b.*?(?=^\S|\Z)", source, re.S | re.M)[0]
        block = re.search(rf"^( *)(?:def|class) {last}\b.*?(?=^\1\S|\Z)", source, re.S | re.M)
        assert block and re.search(rf"Eqs?\. [^.]*\({number}\)", block[0]), f"Eq. ({number}) in {file}: {place}"
