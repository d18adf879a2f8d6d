"""train.py keeps the README's promises: the released recipe's parameter groups and schedule, runs that resume bit for
bit, batches split over processes, and one-line errors."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from helpers import NAMES, error_line, make_folders, run, torchrun
from PIL import Image

import train as training
from clip_model import resize_positions
from data import IterationSampler, SegmentationDataset, TrainTransform, read_classes
from denseclip import build_model, load_checkpoint, read_checkpoint, save_checkpoint
from eval import evaluate
from train import Recipe, learning_rate, parameter_groups, train

ROOT = Path(__file__).resolve().parents[1]
SMALL = Recipe(iterations=6, batch_size=4, lr=1e-3, warmup=2, seed=3)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    (root / "classes.txt").write_text("\n".join(NAMES) + "\n")
    train, val = make_folders(root / "train", 7, seed=0), make_folders(root / "val", 2, seed=1)
    return {"train": train, "val": val, "classes": str(root / "classes.txt")}


def small_run(folders, out, recipe=SMALL, model=None, **options):
    """train() on the tiny model: six iterations of 64-pixel crops, with augmentation, shuffling and dropout."""
    torch.manual_seed(recipe.seed)
    model = model or build_model("tiny", NAMES, crop_size=64)
    train_set = SegmentationDataset(*folders["train"], len(NAMES), TrainTransform(64, (2048, 64)))
    val_set = SegmentationDataset(*folders["val"], len(NAMES))
    out.mkdir(exist_ok=True)
    options = {"workers": 0, "eval_every": 1_000, "log_every": 2, **options}

    def score(model):
        return evaluate(model, val_set, "cpu")

    return train(model, train_set, recipe, out, torch.device("cpu"), **{"evaluate_model": score, **options})


def arguments(folders, out, *more):
    data = ["--train", *folders["train"], "--val", *folders["val"], "--classes", folders["classes"]]
    size = [
        "--model",
        "tiny",
        "--set",
        "crop_size=64",
        "--iterations",
        4,
        "--batch-size",
        4,
        "--lr",
        1e-3,
        "--warmup",
        2,
    ]
    loop = ["--log-every", 2, "--eval-every", 2, "--workers", 0, "--device", "cpu", "--out", out]
    return [str(argument) for argument in (*data, *size, *loop, *more)]


def same(a, b):
    """Bit for bit, through dicts and lists."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


# ------------------------------------------------------------------------------------------------ recipe


def test_parameter_groups_are_the_released_ones():
    with torch.device("meta"):  # the released text encoder keeps 13 of CLIP's 77 positions
        model = build_model("rn50", read_classes("ade20k")[0], context_length=13)
    groups = {group["name"]: group for group in parameter_groups(model, Recipe())}
    sizes = {name: (len(g["params"]), sum(p.numel() for p in g["params"])) for name, g in groups.items()}
    assert sizes == {"backbone": (174, 38_740_832), "norm": (18, 4_608), "rest": (97, 11_502_998)}
    assert [groups[name]["base_lr"] for name in ("backbone", "norm", "rest")] == [pytest.approx(1e-5), 1e-4, 1e-4]
    assert [groups[name]["weight_decay"] for name in ("backbone", "norm", "rest")] == [1e-4, 0, 1e-4]
    frozen = [p for p in model.parameters() if not p.requires_grad]
    assert (len(frozen), sum(p.numel() for p in frozen)) == (149, 63_657_472)
    groups = parameter_groups(model, Recipe(backbone_lr_multiplier=0))
    assert {group["name"] for group in groups} == {"norm", "rest"}  # min_lr raises no rate of 0
    assert not any(parameter.requires_grad for parameter in model.encoder.backbone.parameters())


def test_learning_rates_are_the_released_ones():
    released = {0: 1e-10, 100: 6.65933e-6, 749: 4.95166e-5, 1499: 9.82634e-5, 1500: 9.83278e-5, 40_000: 5.40528e-5}
    for iteration, rate in {**released, 79_999: 1.00383e-6}.items():
        assert learning_rate(iteration, 1e-4, Recipe()) == pytest.approx(rate, rel=1e-5)
    assert learning_rate(1_500, 1e-5, Recipe()) == pytest.approx(9.84798e-6, rel=1e-5)
    assert learning_rate(79_999, 1e-5, Recipe()) == pytest.approx(1.00035e-6, rel=1e-5)
    assert learning_rate(0, 1e-4, Recipe(iterations=10, warmup=0)) == pytest.approx(1e-4)


def test_swin_recipe_is_its_authors(monkeypatch, folders, tmp_path):
    """--backbone swin_t: which tensors decay, and the learning rate at five iterations."""
    runs = []
    monkeypatch.setattr(training, "train", lambda model, train_set, recipe, *_, **__: runs.append((model, recipe)))
    monkeypatch.setattr(training, "format_table", lambda *_: "")
    data = ["--train", *folders["train"], "--val", *folders["val"], "--classes", folders["classes"], "--clip", "none"]
    options = [*data, "--device", "cpu", "--out", tmp_path, "--backbone-weights", "none"]
    with torch.device("meta"):
        run(training, monkeypatch, *options, "--backbone", "swin_t", "--prompting", "none")
    ((model, recipe),) = runs
    assert (recipe.iterations, recipe.batch_size, recipe.lr, recipe.weight_decay) == (160_000, 16, 6e-5, 0.01)
    assert model.name == "vitb16"  # the text encoder of a backbone that is not CLIP's
    save_checkpoint(tmp_path / "swin.pt", build_model("tiny", NAMES, backbone="swin_t", prompting="none"))
    options = ["--device", "cpu", "--out", tmp_path / "tuned", "--init", tmp_path / "swin.pt"]
    run(training, monkeypatch, *data[:-2], *options)
    assert replace(runs.pop()[1], init=None) == recipe  # --init brings the backbone, and so its recipe
    rates = {0: 6e-11, 750: 6e-5 * (1 - 750 / 160_000) * 0.5000005, 1500: 5.94375e-5, 80_000: 3e-5, 159_999: 3.75e-10}
    for iteration, rate in rates.items():
        assert learning_rate(iteration, 6e-5, recipe) == pytest.approx(rate, rel=1e-9)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for group in parameter_groups(model, recipe):
        assert group["base_lr"] == 6e-5
        for name in (names[id(parameter)] for parameter in group["params"]):
            is_norm = ".norm" in name or "stages.0.0.2." in name  # the latter is the patch embedding's
            exempt = is_norm or "relative_position_bias_table" in name
            assert group["weight_decay"] == (0.0 if exempt else 0.01), name


def test_sgd_is_mmsegmentations_default(monkeypatch, folders, tmp_path):
    """Section 4.1: CLIP fine-tuned with SGD."""
    options = ["--optimizer", "sgd", "--iterations", 3, "--prompting", "none", "--clip", "none"]
    run(training, monkeypatch, *arguments(folders, tmp_path / "run", *options))
    last = read_checkpoint(tmp_path / "run" / "last.pt")
    groups = last["optimizer"]["param_groups"]
    assert all(group["momentum"] == 0.9 and group["weight_decay"] == 5e-4 for group in groups)
    recipe = training.SGD
    assert (recipe.lr, recipe.power, recipe.min_lr, recipe.warmup) == (0.01, 0.9, 1e-4, 0)
    assert learning_rate(0, 0.01, recipe) == 0.01


def test_step_schedule_of_detection():
    """A tenth at epochs 8 and 11 of 12, after a warm-up of 500 iterations from a thousandth."""
    recipe = Recipe(iterations=12_000, warmup=500, schedule="step")
    rates = {0: 1e-7, 250: 5.005e-5, 500: 1e-4, 7_999: 1e-4, 8_000: 1e-5, 10_999: 1e-5, 11_000: 1e-6, 11_999: 1e-6}
    for iteration, rate in rates.items():
        assert learning_rate(iteration, 1e-4, recipe) == pytest.approx(rate, rel=1e-6)


def test_defaults_are_the_papers_run(monkeypatch, tmp_path):
    """train.py without options, up to the loop."""
    recipes, names = [], read_classes("ade20k")[0]
    for split in ("training", "validation"):
        make_folders(tmp_path / split, 1)
        for kind, folder in (("images", "images"), ("annotations", "masks")):
            target = tmp_path / "data/ADEChallengeData2016" / kind
            target.mkdir(parents=True, exist_ok=True)
            (tmp_path / split / folder).rename(target / split)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(training, "train", lambda model, train_set, recipe, *_, **__: recipes.append((model, recipe)))
    monkeypatch.setattr(training, "format_table", lambda *_: "")
    run(training, monkeypatch, "--clip", "none", "--device", "cpu")
    ((model, recipe),) = recipes
    assert recipe == Recipe(reduce_zero_label=True)
    assert (recipe.iterations, recipe.batch_size, recipe.optimizer, recipe.lr) == (80_000, 32, "adamw", 1e-4)
    assert (recipe.weight_decay, recipe.backbone_lr_multiplier, recipe.text_lr_multiplier) == (1e-4, 0.1, 0.0)
    assert (recipe.warmup, recipe.clip_grad, recipe.precision) == (1_500, 0.0, "fp32")
    assert (model.name, model.class_names, model.crop_size, model.short_side) == ("rn50", names, 512, 512)


# ------------------------------------------------------------------------------------------------ loop


def test_a_run_writes_log_and_checkpoints(folders, tmp_path):
    metrics = small_run(folders, tmp_path, eval_every=3)
    records = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    logged = [record for record in records if "lr" in record]
    assert [record["iteration"] for record in logged] == [2, 4, 6]
    assert list(logged[0]) == ["iteration", "total", "loss", "aux_loss", "lr", "images_per_second", "eta_seconds"]
    assert logged[0]["total"] == pytest.approx(logged[0]["loss"] + logged[0]["aux_loss"])
    assert logged[1]["lr"] == pytest.approx(learning_rate(3, 1e-3, SMALL))
    assert [record["iteration"] for record in records if "miou" in record] == [3, 6]

    last, best = read_checkpoint(tmp_path / "last.pt"), read_checkpoint(tmp_path / "best.pt")
    assert last["iteration"] == 6 and last["class_names"] == NAMES and last["name"] == "tiny"
    assert round(best["best"], 4) == max(record["miou"] for record in records if "miou" in record)
    assert "optimizer" in last and "optimizer" not in best
    assert round(metrics["miou"], 4) == records[-1]["miou"]
    assert load_checkpoint(tmp_path / "best.pt").crop_size == 64
    assert not list(tmp_path.glob("*part*"))


def test_frozen_text_encoder_stays_and_the_rest_moves(folders, tmp_path):
    torch.manual_seed(SMALL.seed)
    before = {name: value.clone() for name, value in build_model("tiny", NAMES, crop_size=64).named_parameters()}
    small_run(folders, tmp_path)
    after = dict(load_checkpoint(tmp_path / "last.pt").named_parameters())
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name in before if ".text_encoder." not in name}


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_resume_is_exact(folders, tmp_path, workers):
    """Six iterations are three, a stop, and three more: weights, optimizer and random states bit for bit."""
    small_run(folders, tmp_path / "whole", workers=workers)

    class Stop(Exception):
        pass

    torch.manual_seed(SMALL.seed)
    model, calls = build_model("tiny", NAMES, crop_size=64), []

    def stop(module, inputs):
        if module.training:
            calls.append(1)
            if len(calls) == 4:
                raise Stop

    model.register_forward_pre_hook(stop)
    with pytest.raises(Stop):
        small_run(folders, tmp_path / "parts", model=model, workers=workers, save_every=3)
    assert read_checkpoint(tmp_path / "parts" / "last.pt")["iteration"] == 3
    torch.manual_seed(99)  # whatever the new process has drawn before
    small_run(folders, tmp_path / "parts", workers=2 - workers, resume=tmp_path / "parts" / "last.pt")

    whole, parts = (read_checkpoint(tmp_path / name / "last.pt") for name in ("whole", "parts"))
    assert whole["iteration"] == parts["iteration"] == 6
    assert whole.keys() == parts.keys()
    assert all(same(whole[key], parts[key]) for key in whole)


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_terminated_run_is_saved_and_resumes_exactly(folders, tmp_path, workers):
    """SIGTERM during the fourth of six iterations, which is finished and saved; the whole process group gets it."""
    small_run(folders, tmp_path / "whole")
    torch.manual_seed(SMALL.seed)
    model, calls = build_model("tiny", NAMES, crop_size=64), []

    def terminate(module, inputs):
        calls.append(1)
        if len(calls) == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    model.register_forward_pre_hook(terminate)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt, match="saved at iteration 4; .*parts/last.pt with --resume"):
        small_run(folders, tmp_path / "parts", model=model, workers=workers)
    assert signal.getsignal(signal.SIGTERM) is before
    small_run(folders, tmp_path / "parts", resume=tmp_path / "parts" / "last.pt")
    whole, parts = (read_checkpoint(tmp_path / name / "last.pt") for name in ("whole", "parts"))
    assert all(same(whole[key], parts[key]) for key in whole)


def test_a_second_signal_ends_at_once(folders, tmp_path):
    model = build_model("tiny", NAMES, crop_size=64)
    model.register_forward_pre_hook(lambda *_: [os.kill(os.getpid(), signal.SIGINT) for _ in range(2)])
    with pytest.raises(KeyboardInterrupt):
        small_run(folders, tmp_path, model=model)
    assert not (tmp_path / "last.pt").exists()


@pytest.mark.slow
def test_a_run_that_saved_nothing_leaves_no_log_to_the_next(folders, tmp_path):
    (tmp_path / "log.jsonl").write_text("{}\n{}\n")
    small_run(folders, tmp_path, save_every=4)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert "command" in lines[0] and [line.get("iteration") for line in lines[1:]] == [2, 4, 6, 6]


@pytest.mark.slow
def test_a_short_run_is_saved_ten_times(folders, tmp_path, monkeypatch):
    saved = []
    monkeypatch.setattr(training, "save_checkpoint", lambda path, *_, iteration, **__: saved.append(iteration))
    small_run(folders, tmp_path, Recipe(iterations=20, batch_size=1, warmup=0))
    assert saved == [*range(2, 21, 2), 20]  # last.pt, and best.pt at the end


@pytest.mark.slow
def test_resume_can_lengthen_a_run_and_repeats_the_last_evaluation(folders, tmp_path, monkeypatch, capsys):
    run(training, monkeypatch, *arguments(folders, tmp_path))
    capsys.readouterr()
    run(training, monkeypatch, *arguments(folders, tmp_path, "--resume"))
    assert "pixel accuracy" in capsys.readouterr().out
    run(training, monkeypatch, *arguments(folders, tmp_path, "--resume", "--iterations", 6))
    assert "a run of 4 iterations becomes one of 6" in capsys.readouterr().out
    records = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    rates = [record["lr"] for record in records if record.get("iteration") == 6 and "lr" in record]
    assert rates == [pytest.approx(learning_rate(5, 1e-3, Recipe(iterations=6, warmup=2)))]
    assert read_checkpoint(tmp_path / "last.pt")["iteration"] == 6


# ------------------------------------------------------------------------------------------------ other class lists


def test_init_starts_from_what_fits(folders, tmp_path, monkeypatch, capsys):
    """--init: another class list, the checkpoint's model and settings; the head and the score map's part are new."""
    saved = build_model("tiny", ["a", "b"], crop_size=64, num_contexts=3, short_side=96)
    save_checkpoint(tmp_path / "best.pt", saved)
    begun = {}

    def capture(model, *_, **__):
        begun.update(model=model)
        return {"miou": 0}

    monkeypatch.setattr(training, "train", capture)
    monkeypatch.setattr(training, "format_table", lambda *_: "")
    data = ["--train", *folders["train"], "--val", *folders["val"], "--classes", folders["classes"], "--device", "cpu"]
    run(training, monkeypatch, *data, "--out", tmp_path / "run", "--init", tmp_path / "best.pt", "--no-check")
    model, line = begun["model"], next(line for line in capsys.readouterr().out.splitlines() if "weights fit" in line)
    assert model.class_names == NAMES and (model.settings.num_contexts, model.crop_size, model.short_side) == (
        3,
        64,
        96,
    )
    new, old = model.state_dict(), saved.state_dict()
    differ = {name for name in new if new[name].shape != old[name].shape or not torch.equal(new[name], old[name])}
    lateral = "neck.lateral_convs.3.conv.weight"
    assert differ == {"decode_head.conv_seg.weight", "decode_head.conv_seg.bias", lateral}
    assert all(name in line for name in differ) and f"{len(new) - 3} of {len(new)}" in line
    image = model.encoder.backbone.channels[3]
    assert torch.equal(new[lateral][:, :image], old[lateral][:, :image])

    def refuse(path, *options):
        return error_line(training, capsys, monkeypatch, *data, "--out", tmp_path / "no", "--init", path, *options)

    # Settings without effect beside the options are left out; another crop size resizes the positions
    new = ["--prompting", "none", "--set", "crop_size=128"]
    run(training, monkeypatch, *data, "--out", tmp_path / "run", "--init", tmp_path / "best.pt", "--no-check", *new)
    assert begun["model"].settings.prompting == "none" and begun["model"].settings.num_contexts is None
    new[1] = "post"
    run(training, monkeypatch, *data, "--out", tmp_path / "run", "--init", tmp_path / "best.pt", "--no-check", *new)
    positions = begun["model"].encoder.backbone.attnpool.positional_embedding
    assert torch.equal(positions, resize_positions(saved.encoder.backbone.attnpool.positional_embedding, (4, 4)))

    assert "leave out --clip" in refuse(tmp_path / "best.pt", "--clip", "none")
    assert "and gamma" in refuse(tmp_path / "best.pt", "--set", "gamma=1")
    assert "it holds tiny" in refuse(tmp_path / "best.pt", "--model", "tiny_vit")
    save_checkpoint(tmp_path / "frozen.pt", saved.freeze_text())
    assert "freeze_text dropped its text encoder" in refuse(tmp_path / "frozen.pt")
    assert "no such file" in refuse(tmp_path / "none.pt")
    code = {"name": "tiny", "settings": {"backbone": "evil:boom"}, "class_names": ["a", "b"], "model": {}}
    torch.save(code, tmp_path / "evil.pt")
    damaged = read_checkpoint(tmp_path / "best.pt")
    damaged["model"]["neck.lateral_convs.0.conv.weight"][0] = torch.nan
    torch.save(damaged, tmp_path / "nan.pt")
    assert "neck.lateral_convs.0.conv.weight is not finite" in refuse(tmp_path / "nan.pt")
    assert "--backbone evil:boom imports it" in refuse(tmp_path / "evil.pt")  # nothing is imported without the option
    torch.save(code | {"name": "retinanet_tiny"}, tmp_path / "detector.pt")
    assert "it holds retinanet_tiny, not rn50" in refuse(tmp_path / "detector.pt")


def test_a_resumed_run_keeps_its_best_model_and_repeats_a_missed_evaluation(folders, tmp_path, monkeypatch):
    """best.pt is compared wherever the run is resumed from; last.pt is there before an evaluation that fails."""
    out, scores = tmp_path / "run", iter([50.0, 40.0, 30.0])

    def score(model):
        if (value := next(scores)) == 40.0:
            raise ValueError("a broken validation image")
        return {"miou": value}

    train_set = SegmentationDataset(*folders["train"], len(NAMES), TrainTransform(64, (2048, 64)))
    out.mkdir()

    def go(**options):
        torch.manual_seed(SMALL.seed)
        model = build_model("tiny", NAMES, crop_size=64)
        options = {"evaluate_model": score, "workers": 0, "eval_every": 3, "log_every": 2, **options}
        return train(model, train_set, SMALL, out, torch.device("cpu"), **options)

    with pytest.raises(ValueError, match="broken validation image"):
        go()
    assert read_checkpoint(out / "last.pt")["iteration"] == 6 and read_checkpoint(out / "best.pt")["iteration"] == 3
    monkeypatch.chdir(tmp_path)
    assert go(resume=Path("run/../run/last.pt")) == {"miou": 30.0}  # the evaluation that failed, without training
    assert read_checkpoint(out / "best.pt")["best"] == 50.0


def test_accumulation_divides_the_batch(folders, tmp_path):
    """Two steps of two images give the gradient of four, where no layer looks across images (BatchNorm does)."""
    momenta = []
    for accumulate in (1, 2, 4):
        torch.manual_seed(0)
        model, seen = build_model("tiny", NAMES, crop_size=64), []
        model.train = lambda mode=True, model=model: torch.nn.Module.train(model, False)  # fixed statistics, no dropout
        model.neck.register_forward_pre_hook(lambda module, inputs, seen=seen: seen.append(len(inputs[0][0])))
        recipe = Recipe(iterations=2, batch_size=4, warmup=0, seed=1)
        small_run(folders, tmp_path / str(accumulate), recipe, model, accumulate=accumulate)
        assert seen[: 2 * accumulate] == [4 // accumulate] * (2 * accumulate)
        state = read_checkpoint(tmp_path / str(accumulate) / "last.pt")["optimizer"]["state"]
        momenta.append(torch.cat([state[i]["exp_avg"].flatten() for i in sorted(state)]))
    assert momenta[0].norm() > 0
    for other in momenta[1:]:
        assert (other - momenta[0]).norm() < 1e-3 * momenta[0].norm()


@pytest.mark.slow
def test_two_processes_see_the_batch_of_one(folders, tmp_path):
    """torchrun on two CPU processes: halves of the same batches, one log, one checkpoint."""
    torchrun("train.py", *arguments(folders, tmp_path / "run"))
    records = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert records[0]["processes"] == 2 and [r["iteration"] for r in records[1:] if "lr" in r] == [2, 4]
    last = read_checkpoint(tmp_path / "run" / "last.pt")
    assert last["iteration"] == 4 and len(last["random_states"]) == 2
    assert not same(*last["random_states"])  # different dropout in each

    sampler = IterationSampler
    whole = iter(sampler(7, seed=0))
    ranks = [iter(sampler(7, seed=0, rank=rank, world=2)) for rank in range(2)]
    for _ in range(10):
        assert {next(whole) for _ in range(4)} == {next(rank) for rank in ranks for _ in range(2)}


def log_in_process(rank, folder, folders):
    """Train with learning rate 0 in one of two processes, keeping this process's losses."""
    torch.set_num_threads(1)  # a forked process must not use its parent's threads
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    torch.manual_seed(0)
    model, losses = build_model("tiny", NAMES, crop_size=64), []
    model.register_forward_hook(lambda _, __, output: losses.append(sum(output.values()).item()))
    recipe = Recipe(iterations=2, batch_size=4, lr=0.0)
    small_run(folders, folder / "out", recipe, model, evaluate_model=lambda model: {"miou": 0.0})
    (folder / f"{rank}.json").write_text(json.dumps(losses))
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.slow
def test_logged_losses_are_means_over_processes(folders, tmp_path):
    context = torch.multiprocessing.get_context("fork")
    processes = [context.Process(target=log_in_process, args=(rank, tmp_path, folders)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    record = json.loads((tmp_path / "out" / "log.jsonl").read_text().splitlines()[1])
    assert first != second and record["total"] == pytest.approx(sum(first + second) / 4, rel=1e-5)


def test_wrong_data_is_found_before_weights_are_fetched(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(training, "build_model", lambda *_, **__: pytest.fail("built"))
    options = ["--data", tmp_path, "--out", tmp_path / "other"]
    assert "no data set here" in error_line(training, capsys, monkeypatch, *options)


def test_bf16_trains(folders, tmp_path):
    small_run(folders, tmp_path, Recipe(iterations=2, batch_size=2, warmup=0, precision="bf16"))
    assert all(p.dtype == torch.float32 for p in load_checkpoint(tmp_path / "last.pt").parameters())


@pytest.mark.slow
def test_a_small_set_is_learned(folders, tmp_path):
    recipe = Recipe(iterations=60, batch_size=4, lr=2e-3, backbone_lr_multiplier=1.0, warmup=5)
    assert small_run(folders, tmp_path, recipe)["miou"] > 60


# ------------------------------------------------------------------------------------------------ bad input


def test_non_finite_loss_stops_and_names_the_files(folders, tmp_path, capsys, monkeypatch):
    small_run(folders, tmp_path, SMALL)
    before = (tmp_path / "last.pt").read_bytes()
    torch.manual_seed(0)
    model = build_model("tiny", NAMES, crop_size=64)
    model.decode_head.conv_seg.weight.data.fill_(torch.inf)
    with pytest.raises(ValueError, match=r"loss is (nan|inf) at iteration 0.*\d\.png"):
        small_run(folders, tmp_path, model=model)
    assert (tmp_path / "last.pt").read_bytes() == before

    monkeypatch.setattr(training, "build_model", lambda *a, **k: model)
    assert "iteration 0" in error_line(training, capsys, monkeypatch, *arguments(folders, tmp_path / "cli"))
    assert not (tmp_path / "cli" / "last.pt").exists()


@pytest.mark.slow
def test_resume_refuses_another_run(folders, tmp_path, capsys, monkeypatch):
    out = tmp_path / "run"
    run(training, monkeypatch, *arguments(folders, out))
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    (tmp_path / "other.txt").write_text("wall\nsky\nbush\ntraffic light\n")
    for options, words in [
        (["--iterations", "3"], ["iterations 4 there, 3 here"]),
        (["--lr", "1e-2", "--batch-size", "2"], ["lr 0.001 there, 0.01 here", "batch_size 4 there, 2 here"]),
        (["--model", "tiny_vit"], ["model 'tiny' there, 'tiny_vit' here"]),
        (["--set", "crop_size=96"], ["crop_size 64 there, 96 here"]),
        (["--classes", str(tmp_path / "other.txt")], ["class_names", "'tree'", "'bush'"]),
        (["--train", *folders["val"]], ["images 7 there, 2 here"]),
    ]:
        error = error_line(training, capsys, monkeypatch, *arguments(folders, out, "--resume", *options))
        assert "last.pt" in error and all(word in error for word in words), error
    assert "optimizer" in error_line(
        training, capsys, monkeypatch, *arguments(folders, out, "--resume", str(out / "best.pt"))
    )
    assert "already holds a run" in error_line(training, capsys, monkeypatch, *arguments(folders, out))
    assert "last.pt" in error_line(training, capsys, monkeypatch, *arguments(folders, tmp_path / "new", "--resume"))
    assert before == {path.name: path.read_bytes() for path in out.iterdir()} and not (tmp_path / "new").exists()


def test_mistakes_end_in_one_line_and_status_2(folders, tmp_path, capsys, monkeypatch):
    """More of them are in test_bad_inputs.py."""
    images, masks = folders["train"]
    (tmp_path / "resized").mkdir()
    for path in Path(masks).iterdir():
        Image.open(path).resize((40, 40), Image.Resampling.NEAREST).save(tmp_path / "resized" / path.name)
    options = [
        "--train",
        images,
        tmp_path / "resized",
        "--no-check",
        "--workers",
        1,
    ]  # found while training, in a loader's worker
    assert "40 x 40" in error_line(training, capsys, monkeypatch, *arguments(folders, tmp_path / "run", *options))
    data = ["--train", *folders["train"], "--val", *folders["val"], "--out", tmp_path / "out"]
    assert "--classes, a list of names" in error_line(training, capsys, monkeypatch, *data)
    monkeypatch.setattr("clip_model.SERVER", "http://127.0.0.1:9/nothing")
    monkeypatch.setenv("HOME", str(tmp_path))
    data += ["--classes", folders["classes"], "--model", "tiny", "--clip", "RN50"]
    assert "or --clip none for random weights" in error_line(training, capsys, monkeypatch, *data)
    monkeypatch.chdir(tmp_path)
    options = ["--device", "cpu", "--clip", "none", "--model", "tiny"]
    assert "python data.py" in error_line(training, capsys, monkeypatch, *options)


def test_options_of_wrong_types_are_named(monkeypatch, capsys):
    for options in (["--batch-size", "many"], ["--seed", "1.5"], ["--model", "rn51"]):
        with pytest.raises(SystemExit) as stop:
            run(training, monkeypatch, *options)
        error = capsys.readouterr().err
        assert stop.value.code == 2 and options[0] in error and error.count("\n") == 2, error


def test_numbers_out_of_range_are_refused_in_python(folders, tmp_path):
    for options, what in (({"log_every": 0}, "log_every is 0"), ({"recipe": Recipe(clip_grad=-1)}, "clip_grad is -1")):
        with pytest.raises(ValueError, match=what):
            small_run(folders, tmp_path, **options)
    assert not list(tmp_path.iterdir())


def test_two_trainings_in_one_folder_are_refused(folders, tmp_path, monkeypatch, capsys):
    """Also with --resume; a process that ended, however it did, does not count."""
    out, ready = tmp_path / "run", tmp_path / "ready"
    out.mkdir()
    hold = "import fcntl, pathlib, sys, time; file = open(sys.argv[1], 'w'); fcntl.lockf(file, fcntl.LOCK_EX);"
    hold += "pathlib.Path(sys.argv[2]).touch(); time.sleep(60)"
    other = subprocess.Popen([sys.executable, "-c", hold, str(out / ".lock"), str(ready)])
    while not ready.exists() and other.poll() is None:
        time.sleep(0.02)
    log = out / "log.jsonl"
    log.write_text("theirs\n")
    try:
        error = error_line(training, capsys, monkeypatch, *arguments(folders, out, "--no-check"))
        assert f"{out}: another training writes there; name another --out" in error
        assert log.read_text() == "theirs\n" and not (out / "last.pt").exists()
    finally:
        other.kill()
        other.wait()
    training.start_log(out, {}, torch.device("cpu"), 1, new=True)
    assert "command" in json.loads(log.read_text())


def test_out_may_not_be_a_file(folders, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("mine")
    for more in ([], ["--resume"]):
        error = error_line(training, capsys, monkeypatch, *arguments(folders, tmp_path / "file", *more))
        assert str(tmp_path / "file") in error and (tmp_path / "file").read_text() == "mine"


def test_an_exploded_loss_is_not_saved(folders, tmp_path):
    torch.manual_seed(SMALL.seed)
    model, calls = build_model("tiny", NAMES, crop_size=64), []
    model.register_forward_hook(lambda _, __, losses: calls.append(1) or {"loss": losses["loss"] * 1e5 ** len(calls)})
    with pytest.raises(ValueError, match="loss is .* at iteration 1; the checkpoints are unchanged"):
        small_run(folders, tmp_path, model=model, save_every=1, log_every=50)
    assert read_checkpoint(tmp_path / "last.pt")["iteration"] == 1


@pytest.mark.slow
def test_an_interrupted_run_can_be_resumed(folders, tmp_path):
    command = [sys.executable, str(ROOT / "train.py"), *arguments(folders, tmp_path / "run", "--iterations", "100000")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.time() + 120
    while not (tmp_path / "run" / "last.pt").exists() and time.time() < deadline:
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    output, error = process.communicate(timeout=60)
    assert process.returncode == 130 and "--resume" in output and "Traceback" not in error, error
    assert f"saved at iteration {read_checkpoint(tmp_path / 'run' / 'last.pt')['iteration']}" in error


@pytest.mark.parametrize(
    "script", [["train.py"], *(pytest.param([s], marks=pytest.mark.slow) for s in ("eval.py", "demo.py"))]
)
def test_help_works_anywhere(script, tmp_path):
    nowhere = {"HOME": str(tmp_path), "http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}
    command = [sys.executable, str(ROOT / script[0]), *script[1:], "--help"]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, env={**os.environ, **nowhere}, timeout=60
    )
    assert done.returncode == 0 and "default" in done.stdout and not list(tmp_path.iterdir())
