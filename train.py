"""Train DenseCLIP for segmentation. By default the paper's run: CLIP RN50, Semantic FPN, ADE20K, 80,000 iterations.

    python train.py --data data/ADEChallengeData2016 --out runs/rn50      # one GPU (--accumulate 4 if memory is short)
    torchrun --standalone --nproc_per_node 8 train.py --out runs/rn50     # eight GPUs, the same global batch
    python train.py --model tiny --train IMAGES MASKS --val IMAGES MASKS --classes LIST --out runs/mine
    ... --init runs/rn50/best.pt                                          # start from a trained model, other classes
    ... --resume                                                          # continue from last.pt, exactly

Writes to --out: last.pt (to resume from, also saved after Ctrl-C or SIGTERM), best.pt (highest validation mIoU; all
that eval.py needs) and log.jsonl (one JSON object per line; the first has the command, versions and recipe)."""

import argparse
import contextlib
import json
import os
import shlex
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path

if __name__ == "__main__":  # before torch
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # waiting threads that spin slow down this job and others
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # large pages: less time to map memory for tensors

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_map_only  # private, but stable
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

import denseclip
from clip_model import ARCHITECTURES, IGNORE_INDEX, Bottleneck, ResidualAttentionBlock, load_weights, resize_positions
from data import SegmentationDataset, TrainTransform, check_data, find_split, is_ade20k, read_classes, run_script
from denseclip import PRESETS, PROMPTING, Settings, build_model, check_ranges, read_checkpoint, save_checkpoint
from eval import evaluate, format_table, leave_group, start_process, this_process, to_json


@dataclass
class Recipe:
    """Everything that determines the trained weights; the defaults are the paper's. --resume insists on it."""

    init: str | None = None  # checkpoint with the initial weights
    clip: str | None = None  # CLIP's initial weights, see `clip_model.load_clip`; None: random
    backbone_weights: str | None = None  # of a backbone that is not CLIP's
    iterations: int = 80_000
    batch_size: int = 32  # images per iteration, over all processes and accumulation steps
    optimizer: str = "adamw"  # or "sgd", with momentum 0.9
    lr: float = 1e-4
    weight_decay: float = 1e-4
    decay_norms: bool = True  # False: no weight decay of LayerNorms and positions
    backbone_lr_multiplier: float = 0.1  # 0: frozen, but for the running statistics of batch norms
    text_lr_multiplier: float = 0.0  # 0: frozen
    warmup: int = 1_500  # iterations
    schedule: str = "poly"  # or "step", see `learning_rate`
    power: float = 0.9  # of "poly"
    min_lr: float = 1e-6  # of "poly"
    clip_grad: float = 0.0  # largest gradient norm; 0: no clipping
    precision: str = "fp32"  # or "bf16"
    seed: int = 0
    ignore_index: int = IGNORE_INDEX  # value in masks, see SegmentationDataset
    reduce_zero_label: bool = False


SWIN = Recipe(iterations=160_000, batch_size=16, lr=6e-5, weight_decay=0.01, backbone_lr_multiplier=1.0)
SWIN = replace(SWIN, decay_norms=False, power=1.0, min_lr=0.0)  # its authors', for --backbone swin_t, swin_s (Table 5)
SGD = Recipe(optimizer="sgd", lr=0.01, weight_decay=5e-4, backbone_lr_multiplier=1.0, warmup=0, min_lr=1e-4)  # sec. 4.1


def parameter_groups(model: nn.Module, recipe: Recipe) -> list[dict]:
    """The optimizer's parameter groups: a smaller rate for the image encoder, no decay of the context decoder's norms.
    Also freezes what has a multiplier of 0; frozen parameters are in no group.
    Released code: the longest matching key decides; a norm inside the backbone counts as "backbone" and does decay."""
    rates = {"backbone": recipe.backbone_lr_multiplier, "text_encoder": recipe.text_lr_multiplier, "norm": 1, "rest": 1}
    groups = {}
    norms = {id(p) for module in model.modules() if isinstance(module, nn.LayerNorm) for p in module.parameters()}
    for name, parameter in model.named_parameters():
        key = next((key for key in rates if key in name), "rest")
        if key == "text_encoder" or not rates[key]:  # min_lr would raise a rate of 0
            parameter.requires_grad_(rates[key] > 0)
        undecayed = key == "norm" or not recipe.decay_norms and (id(parameter) in norms or "position" in name)
        if parameter.requires_grad:
            decay = 0.0 if undecayed else recipe.weight_decay
            group = {"name": key, "base_lr": recipe.lr * rates[key], "weight_decay": decay, "params": []}
            groups.setdefault((key, undecayed), group)["params"].append(parameter)
    return list(groups.values())


def build_optimizer(model: nn.Module, recipe: Recipe) -> Optimizer:
    groups = parameter_groups(model, recipe)
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=recipe.lr, momentum=0.9)
    return torch.optim.AdamW(groups, lr=recipe.lr, betas=(0.9, 0.999), fused=True)


def learning_rate(iteration: int, base: float, recipe: Recipe) -> float:
    """The learning rate at an iteration, counted from 0, of a group whose peak rate is `base`. "poly": decays with
    recipe.power to recipe.min_lr; "step": a tenth after 8/12 and again after 11/12 of the run. Linear warm-up from 1e-6
    ("poly") or 1e-3 ("step") of the scheduled rate."""
    progress = iteration / recipe.iterations
    if recipe.schedule == "poly":
        rate, first = (base - recipe.min_lr) * (1 - progress) ** recipe.power + recipe.min_lr, 1e-6
    else:
        rate, first = base * 0.1 ** ((progress >= 8 / 12) + (progress >= 11 / 12)), 1e-3
    if iteration < recipe.warmup:
        rate *= 1 - (1 - iteration / recipe.warmup) * (1 - first)
    return rate


def train(
    model: nn.Module,
    train_set: Dataset,
    recipe: Recipe,
    out: Path,
    device: torch.device,
    *,
    evaluate_model: Callable[[nn.Module], dict],
    score: str = "miou",
    accumulate: int = 1,
    recompute: bool = False,
    workers: int = 4,
    eval_every: int = 8_000,
    save_every: int | None = None,
    log_every: int = 50,
    resume: Path | None = None,
    data: dict | None = None,
) -> dict:
    """Train `model` by `recipe`, writing checkpoints and the log to `out`; return the last evaluation's scores.
    model(images, labels) in train mode must return a dict of losses, whose sum is minimized. `train_set` brings its own
    sampler and collate function. evaluate_model(model) returns scores, of which `score` decides what best.pt is.
    save_every: 1,000 iterations by default, but at most a tenth of the run. `data` is kept in the checkpoints.
    Ctrl-C and SIGTERM save and raise KeyboardInterrupt. Processes of torchrun all call this; they split each batch."""
    (rank, world), end = this_process(), recipe.iterations
    check_ranges(asdict(recipe) | locals())
    if recipe.batch_size % (world * accumulate):
        raise ValueError(f"--batch-size {recipe.batch_size} is not divisible by {world} x --accumulate {accumulate}")

    # model and optimizer
    network, optimizer = prepare(model, recipe, device, recompute)  # network: what is called
    torch.manual_seed(recipe.seed + rank)
    run = {"model": model.name, "class_names": model.class_names, "images": len(train_set)}
    run |= asdict(model.settings) | asdict(recipe)
    start, best = restore_run(resume, out, model, optimizer, run) if resume else (0, -1.0)
    start_log(out, run, device, accumulate, new=resume is None)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=recipe.precision == "bf16")

    # samples: order and augmentation depend on the seed and the number drawn before, so a resumed run sees the rest
    sampler = train_set.sampler(recipe.batch_size, recipe.seed, rank, world, start * recipe.batch_size)
    micro_batch, pinned, own = recipe.batch_size // (world * accumulate), device.type == "cuda", torch.Generator()
    options = {"num_workers": workers, "collate_fn": train_set.collate, "pin_memory": pinned, "generator": own}
    batches = iter(DataLoader(train_set, micro_batch, sampler=sampler, worker_init_fn=leave_group, **options))

    save_every = save_every or min(1_000, -(-end // 10))
    steps, first, metrics, clock = [], None, {}, time.perf_counter()  # steps since the last log line, see `backward`
    bar = tqdm(desc="training", total=end, initial=start, disable=rank > 0 or None)
    for iteration, stopping in until_stopped(start, end):  # the last round only saves and evaluates
        evaluating = iteration > 0 and (iteration % eval_every == 0 or iteration == end)

        # once in a while: save
        paused = time.perf_counter()
        if iteration > start and (evaluating or stopping or iteration % save_every == 0):
            if steps:
                mean_losses(steps, first)  # waits for the GPU, and raises where nothing good would be saved
            states = {"optimizer": optimizer.state_dict(), "random_states": random_states(device), "best": best}
            if rank == 0:
                save_checkpoint(out / "last.pt", model, iteration=iteration, run=run, data=data or {}, **states)
        if stopping:
            if world > 1:
                dist.barrier()  # torchrun ends the others when one leaves, perhaps before the file is written
            how = f"train.py and detect.py continue from {out / 'last.pt'} with --resume"
            raise KeyboardInterrupt(f"saved at iteration {iteration}; {how}" if iteration > start else "")

        # once in a while: evaluate and keep the best model (after saving, as this may fail; a resumed run repeats it)
        if evaluating:
            for buffer in model.buffers() if world > 1 else ():
                dist.broadcast(buffer, 0)  # batch norm statistics differ between processes: use those that were saved
            metrics = evaluate_model(model)
            write_log(out, {"iteration": iteration, **to_json(metrics)})
            if rank == 0 and metrics[score] > best:
                best = metrics[score]
                save_checkpoint(out / "best.pt", model, iteration=iteration, run=run, data=data or {}, best=best)
        clock += time.perf_counter() - paused
        if iteration == end:
            break

        # learning rate
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(iteration, group["base_lr"], recipe)

        # draw, forward, backward, step
        steps += [(iteration, *step) for step in backward(network, batches, accumulate, autocast, device)]
        first = steps[0][1]["total"] if first is None else first
        if recipe.clip_grad:
            nn.utils.clip_grad_norm_(model.parameters(), recipe.clip_grad)
        optimizer.step()
        optimizer.zero_grad()
        bar.update()

        # once in a while: log; only here are the losses read, since that waits for the GPU
        if (done := iteration + 1) % log_every == 0 or done == end:
            entry = {"iteration": done, **mean_losses(steps, first), "lr": max(g["lr"] for g in optimizer.param_groups)}
            seconds = (time.perf_counter() - clock) / len(steps) * accumulate  # per iteration, without the pauses
            entry |= {"images_per_second": recipe.batch_size / seconds, "eta_seconds": seconds * (end - done)}
            entry |= {"memory_mb": torch.cuda.max_memory_allocated(device) >> 20} if device.type == "cuda" else {}
            write_log(out, entry)
            steps, clock = [], time.perf_counter()
    return metrics


def prepare(model: nn.Module, recipe: Recipe, device: torch.device, recompute: bool) -> tuple[nn.Module, Optimizer]:
    """Put the model on the device, to be trained; return what is called there, and the optimizer."""
    torch.set_float32_matmul_precision("high")  # TF32 on GPUs that have it
    world = this_process()[1]
    if world > 1 and device.type == "cuda":  # SyncBatchNorm has no CPU version: there, each process has its own
        nn.SyncBatchNorm.convert_sync_batchnorm(model)
    model.to(device).train()
    if recompute:
        recompute_blocks(model)
    optimizer = build_optimizer(model, recipe)
    if world == 1:
        return model, optimizer
    warnings.filterwarnings("ignore", "Grad strides do not match|`broadcast_buffers` is deprecated")  # both harmless
    other = model.settings.backbone is not None  # not CLIP's: it may have parameters without a gradient
    return nn.parallel.DistributedDataParallel(model, broadcast_buffers=False, find_unused_parameters=other), optimizer


def backward(network, batches, accumulate: int, autocast, device: torch.device) -> list[tuple[dict, list[str]]]:
    """Add up the gradient of one iteration in `accumulate` steps; return the losses and files of each."""
    done = []
    for step in range(accumulate):
        images, labels, paths = tree_map_only(Tensor, lambda x: x.to(device, non_blocking=True), next(batches))
        alone = step < accumulate - 1 and isinstance(network, nn.parallel.DistributedDataParallel)
        with network.no_sync() if alone else contextlib.nullcontext():  # gradients are averaged in the last step
            with autocast:
                losses = network(images, labels)
            losses = {"total": sum(losses.values()), **losses}
            (losses["total"] / accumulate).backward()
        done.append(({name: loss.detach() for name, loss in losses.items()}, paths))
    return done


def recompute_blocks(model: nn.Module) -> None:
    """Keep only the inputs of CLIP's residual blocks for the gradient, and compute what is inside again when needed:
    the same numbers, since dropout draws the same values again, and batch norm counts each batch once."""
    blocks = [module for module in model.modules() if isinstance(module, Bottleneck | ResidualAttentionBlock)]
    if set(blocks).isdisjoint(model.encoder.backbone.modules()):
        raise ValueError("--recompute would have no effect: it is for CLIP's image encoders")
    for block in blocks:
        managers = partial(lambda block: (contextlib.nullcontext(), unchanged_buffers(block)), block)
        block.forward = partial(checkpoint, block.forward, use_reentrant=False, context_fn=managers)


@contextlib.contextmanager
def unchanged_buffers(module: nn.Module) -> Iterator[None]:
    before = [buffer.clone() for buffer in module.buffers()]
    try:
        yield
    finally:  # also when autograd stops the recomputation early, by an exception
        for buffer, value in zip(module.buffers(), before, strict=True):
            buffer.data.copy_(value)  # .data: autograd, which may have saved the buffer, does not count it as a change


def until_stopped(start: int, end: int) -> Iterator[tuple[int, bool]]:
    """start, ..., end, each with whether to stop: after Ctrl-C or SIGTERM in any process. A second Ctrl-C raises."""
    asked = torch.zeros(1)

    def note(*_) -> None:
        asked.fill_(1)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    handlers = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    group = dist.new_group(backend="gloo") if dist.is_initialized() else None  # does not wait for the GPU
    try:
        for iteration in range(start, end + 1):
            stopping = asked.clone()
            if group is not None:
                dist.all_reduce(stopping, dist.ReduceOp.MAX, group=group)
            yield iteration, bool(stopping)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def mean_losses(steps: list[tuple[int, dict[str, Tensor], list[str]]], first: Tensor) -> dict[str, float]:
    """Mean of each loss over steps and processes; a ValueError if the total is not finite, or 1,000 times the first."""
    values = torch.stack([torch.stack(list(losses.values())) for _, losses, _ in steps])  # (steps, losses)
    totals, means = values[:, 0].nan_to_num(torch.inf, torch.inf, torch.inf), values.mean(0)  # (steps,), (losses,)
    if not totals.mean() < 1000 * first.clamp(min=1):
        iteration, losses, paths = steps[totals.argmax()]  # the first that is not finite
        how = f"a lower --lr or --clip-grad, in another --out, may help; the batch's files are {' '.join(paths)}"
        raise ValueError(f"loss is {losses['total']} at iteration {iteration}; the checkpoints are unchanged; {how}")
    if dist.is_initialized():
        dist.all_reduce(means)
        means /= dist.get_world_size()
    return dict(zip(steps[0][1], means.tolist(), strict=True))


def restore_run(path: Path, out: Path, model: nn.Module, optimizer: Optimizer, run: dict) -> tuple[int, float]:
    """Load weights, optimizer and random states from last.pt of the same run; return its iteration and best score."""
    checkpoint, (rank, world) = read_checkpoint(path), this_process()
    if not {"optimizer", "random_states", "run", "iteration"} <= checkpoint.keys():
        raise ValueError(f"{path} holds no optimizer state; --resume needs the last.pt that training wrote")
    there, done, end = checkpoint["run"], checkpoint["iteration"], run["iterations"]
    longer = there.get("iterations", end) < end
    if differences := [k for k in run if there.get(k) != run[k] and not (longer and k in ("iterations", "warmup"))]:
        what = "; ".join(f"{k} {there.get(k)!r:.300} there, {run[k]!r:.300} here" for k in differences)
        raise ValueError(f"{path} belongs to another run: {what}; repeat its options, or name another --out")
    if rank == 0 and longer:
        print(f"a run of {there['iterations']} iterations becomes one of {end}, with the longer run's learning rates")
    load_weights(model, checkpoint["model"], str(path))
    states, device = checkpoint["random_states"], next(model.parameters()).device
    try:
        optimizer.load_state_dict(optimizer.state_dict() | {"state": checkpoint["optimizer"]["state"]})
        [x.view(p.shape) for p, state in optimizer.state.items() for k, x in state.items() if k != "step"]  # its sizes
        range(end + 1).index(done)  # a ValueError if the iteration is not in it
        if len(states) == world:
            torch.set_rng_state(states[rank]["cpu"])
            if device.type == "cuda" and "cuda" in states[rank]:
                torch.cuda.set_rng_state(states[rank]["cuda"], device)
    except Exception as error:  # whatever a file may hold
        raise ValueError(f"{path}: a damaged optimizer, random_states or iteration ({error!r:.200})") from error
    return done, checkpoint.get("best", -1.0) if (out / "best.pt").is_file() else -1.0


def random_states(device: torch.device) -> list[dict[str, Tensor]]:
    """Each process's random state, which dropout draws from. (Samples have seeds of their own, from the sampler.)"""
    state = {"cpu": torch.get_rng_state()}
    state |= {"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {}
    states = [state] * this_process()[1]
    if dist.is_initialized():
        dist.all_gather_object(states, state)
    return states


def start_log(out: Path, run: dict, device: torch.device, accumulate: int, new: bool) -> None:
    """Take the folder for this process, and log what is needed to repeat the run; a new run's log begins empty."""
    if this_process()[0] > 0:
        return
    out.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(AttributeError, OSError):  # Windows and some file systems have no such locks
        try:  # until this process ends; loader workers, which may outlive it, do not inherit this kind of lock
            os.lockf(os.open(out / ".lock", os.O_RDWR | os.O_CREAT, 0o644), os.F_TLOCK, 0)
        except BlockingIOError:
            raise ValueError(f"{out}: another training writes there; name another --out") from None
    record = {"command": shlex.join(sys.argv), "python": sys.version.split()[0], "torch": torch.__version__}
    record |= {"device": str(device), "processes": this_process()[1], "accumulate": accumulate, "run": run}
    write_log(out, record, "w" if new else "a")


def write_log(out: Path, record: dict, mode: str = "a") -> None:
    """In the first process: a line of the log, whose single numbers are also printed."""
    if this_process()[0] == 0:
        with open(out / "log.jsonl", mode, encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        numbers = {k: v for k, v in record.items() if isinstance(v, int | float) and "iteration" in record}
        with contextlib.suppress(BrokenPipeError):  # as after `| head`: training continues without the printout
            tqdm.write(" | ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in numbers.items()))


LOOP = ("resume", "accumulate", "recompute", "workers", "eval_every", "log_every")  # options of `train`
OWN = ("prompting", "backbone", "short_side")  # settings that are options; what `freeze_text` sets is none
SETTABLE = [field.name for field in fields(Settings) if field.name not in (*OWN, "stored_text")]  # by --set


def add_options(parser: argparse.ArgumentParser, first: Callable, models: dict, recipe: Recipe, out: str) -> None:
    """Options of model, recipe (its defaults) and run; first: add_argument of the group that --help begins with."""
    d = "(default: %(default)s)"
    default = "rn50; with --backbone: vitb16, for its text encoder" if "vitb16" in models else "the first"
    first("--model", choices=models, metavar="NAME", help=f"{', '.join(models)} (default: {default})")
    first("--out", type=Path, default=Path(out), metavar="DIR", help=d)
    option = parser.add_argument_group("model").add_argument
    option("--init", metavar="PATH", help="start from this checkpoint: its model, settings and all weights that fit")
    option("--clip", metavar="NAME", help="CLIP's weights: RN50 and the like, a file, or none (default: the model's)")
    option("--prompting", choices=PROMPTING, help="where the text comes from; none: baseline (default: post)")
    option("--backbone", metavar="NAME", help="instead of CLIP's: resnet50, swin_t, ..., or package.module:function")
    option("--backbone-weights", metavar="NAME", help="of --backbone: name, file or none (default: IMAGENET1K_V1)")
    option("--set", nargs="+", action="extend", default=[], metavar="NAME=VALUE", help=f"one of {', '.join(SETTABLE)}")
    option = parser.add_argument_group("recipe").add_argument
    option("--iterations", type=int, help=f"(default: {recipe.iterations or '12 epochs'})")
    option("--batch-size", type=int, help=f"per iteration, over all processes (default: {recipe.batch_size})")
    if recipe == Recipe():  # segmentation's, whose sgd has a learning rate of its own
        option("--optimizer", choices=("adamw", "sgd"), help="sgd: with section 4.1's other defaults (default: adamw)")
    option("--lr", type=float, help=f"peak rate (default: {recipe.lr or 'as released'})")
    option("--weight-decay", type=float, help=f"(default: {recipe.weight_decay})")
    option("--backbone-lr-multiplier", type=float, metavar="X", help=f"(default: {recipe.backbone_lr_multiplier})")
    option("--text-lr-multiplier", type=float, metavar="X", help="0: frozen (default: 0)")
    option("--warmup", type=int, metavar="ITERATIONS", help=f"(default: {recipe.warmup}, at most a tenth of the run)")
    option("--clip-grad", type=float, metavar="NORM", help=f"0: no clipping (default: {recipe.clip_grad})")
    option("--precision", choices=("fp32", "bf16"), help="(default: fp32)")
    option("--seed", type=int, default=0, help=d)
    option = parser.add_argument_group("run").add_argument
    option("--resume", nargs="?", const="", metavar="PATH", help="continue from last.pt in --out, or from PATH")
    option("--accumulate", type=int, default=1, metavar="STEPS", help=f"split each batch into this many steps {d}")
    option("--recompute", action="store_true", help="compute CLIP's blocks again for the gradient: less memory, slower")
    option("--eval-every", type=int, default=8_000, metavar="ITERATIONS", help=d)
    option("--log-every", type=int, default=50, metavar="ITERATIONS", help=d)
    option("--workers", type=int, default=min(4, os.cpu_count() or 1), help=f"loader processes per process {d}")
    option("--device", help="cuda, cuda:1, cpu, ... (default: cuda if available)")
    option("--no-check", dest="check", action="store_false", help="skip the check of all data before training")


def complete(recipe: Recipe, given: dict) -> Recipe:
    """`recipe` with what was given of its fields. A warm-up that was not given is at most a tenth of the run."""
    given = {name: value for name, value in given.items() if hasattr(Recipe, name) and value is not None}
    recipe = replace(recipe, **given)
    if given.get("warmup", 0) >= recipe.iterations:
        raise ValueError(f"--warmup {recipe.warmup} is as long as the run: it must end before --iterations")
    return recipe if "warmup" in given else replace(recipe, warmup=min(recipe.warmup, recipe.iterations // 10))


def find_run(out: Path, resume: str | None) -> Path | None:
    """The file to resume from, None for a new run. `resume`: "" is out/last.pt. An --out in use is refused."""
    path = None if resume is None else Path(resume or out / "last.pt")
    files = [out / name for name in ("last.pt", "best.pt", "log.jsonl")]
    if out.exists() and not out.is_dir() or any(file.exists() and not file.is_file() for file in files):
        raise ValueError(f"--out {out} is not a folder, or its last.pt, best.pt or log.jsonl is not a file")
    if path and not path.is_file():
        raise FileNotFoundError(f"--resume: {path}: no such file; leave --resume out to start this run")
    if any(file.exists() for file in files[:2]) and (path is None or path.resolve().parent != out.resolve()):
        raise ValueError(f"{out} already holds a run: continue it with --resume, or name another --out")
    return path


def choose_model(presets: dict, options: dict) -> tuple[str, dict, dict]:
    """By a script's options: the model's name, its settings, and where its weights come from (fields of Recipe)."""
    model, init, clip, pretrained = (options[name] for name in ("model", "init", "clip", "backbone_weights"))
    given = dict(pair.partition("=")[::2] for pair in options["set"])  # "gamma=1.0"; `resolve` checks types and ranges
    for name, text in given.items():
        if name not in SETTABLE or not text:
            raise ValueError(f"--set {name}: expected NAME=VALUE, with a name of {', '.join(SETTABLE)}")
        with contextlib.suppress(ValueError):
            given[name] = json.loads(text)
    settings = {k: v for k, v in (given | {name: options[name] for name in OWN}).items() if v is not None}
    source = init if init is None else options["resume"] or init  # a resumed run has the settings itself
    saved = {} if source is None else read_checkpoint(source)
    if source and saved["name"] not in ([model] if model else presets):
        raise ValueError(f"--init {source}: it holds {saved['name']}, not {model or ' or '.join(presets)}")
    theirs = saved.get("settings", {})
    if theirs.get("stored_text"):
        raise ValueError(f"--init {source}: freeze_text dropped its text encoder; give the checkpoint it was made from")
    if ":" in str(theirs.get("backbone")) and "backbone" not in settings:  # a checkpoint alone imports no code
        raise ValueError(f"--init {source}: its backbone is your own code: --backbone {theirs['backbone']} imports it")
    # Released code: a backbone that is not CLIP's gets the text encoder of ViT-B/16
    default = "vitb16" if settings.get("backbone") and "vitb16" in presets else next(iter(presets))
    name = model or saved.get("name", default)
    preset = getattr(presets[name], "encoder", presets[name])
    # of the checkpoint's settings, those that have an effect beside the options
    kind = {k: theirs[k] for k in ("prompting", "backbone", "head") if theirs.get(k)} | settings
    used = asdict(denseclip.resolve(Settings(**kind), preset))
    settings = {k: v for k, v in theirs.items() if used.get(k) is not None} | settings
    backbone = settings.get("backbone")
    if init and (clip or pretrained or "gamma" in given and theirs.get("gamma") is not None):
        raise ValueError(f"--init {init} has all weights: leave out --clip, --backbone-weights and gamma")
    plain = backbone and settings.get("prompting") == "none"  # has neither of CLIP's encoders
    if plain and clip not in (None, "none"):
        raise ValueError(f"--clip {clip} would have no effect: without prompting, --backbone has no part of CLIP")
    if not init:
        clip = clip or next((name for name, a in ARCHITECTURES.items() if a == preset.architecture and not plain), None)
        pretrained = pretrained or ("IMAGENET1K_V1" if backbone and ":" not in backbone else None)
    weights = {"init": init, "clip": clip, "backbone_weights": pretrained}
    return name, settings, {option: None if value == "none" else value for option, value in weights.items()}


def start_model(build, name: str, class_names: list[str], settings: dict, weights: dict, options: dict) -> tuple:
    """The model that training starts from, by `build_model` and what `choose_model` returned; this process's device."""
    rank, _, device = start_process(options["device"])
    torch.manual_seed(options["seed"])  # the same initial weights in every process
    here = rank == 0 and not options["resume"]  # one process reads weights, the others get its parameters
    try:
        model = build(name, class_names, **settings, **{k: v for k, v in weights.items() if here and k != "init"})
    except OSError as error:
        raise ValueError(f"{error}; or --clip none for random weights") from None
    if here and weights["init"]:
        load_fitting(model, weights["init"])
    return model, device


def load_fitting(model: nn.Module, path: str) -> None:
    """Copy a checkpoint's weights that fit into a model of other classes, and print what is new. Where the score map
    joins a convolution's input, the weights of the image's own channels are copied."""
    weights, own, encoder, new = read_checkpoint(path)["model"], model.state_dict(), model.encoder, []
    image = getattr(encoder.backbone, "channels", encoder.channels)[getattr(encoder.backbone, "score_level", -1)]
    for name, value in own.items():
        found = weights.get(name)
        if found is not None and found.shape == value.shape:
            value.copy_(found)
        elif found is not None and name.startswith("encoder.backbone.") and name.endswith("positional_embedding"):
            value.copy_(resize_positions(found, (round((len(value) - 1) ** 0.5),) * 2))  # of another crop size
        elif found is not None and found.ndim == 4 and found[:, :image].shape == value[:, :image].shape:
            value[:, :image] = found[:, :image]  # (out, C_i, k, k)
            new.append(f"{name} (score map)")
        else:
            new.append(name)
    if len(new) > len(own) // 2:
        raise ValueError(f"{path}: only {len(own) - len(new)} of the model's {len(own)} weights fit")
    load_weights(model, own, path)  # for its check that all are finite
    print(f"{path}: {len(own) - len(new)} of {len(own)} weights fit; new: {', '.join(new) or 'none'}")


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("train.py", "python train.py [options]", __doc__, formatter_class=raw)
    first = parser.add_argument_group("what most runs need").add_argument
    first("--train", nargs=2, metavar=("IMAGES", "MASKS"), help="two folders (default: those of --data)")
    first("--val", nargs=2, metavar=("IMAGES", "MASKS"), help="two folders (default: those of --data)")
    first("--classes", metavar="LIST", help='file, list in classes/, "sky, grass" (default: ROOT/classes.txt, ade20k)')
    add_options(parser, first, PRESETS, Recipe(), "runs/denseclip")
    option = parser.add_argument_group("data").add_argument
    option("--data", default="data/ADEChallengeData2016", metavar="ROOT", help="data set (default: %(default)s)")
    option("--ignore-index", type=int, default=IGNORE_INDEX, metavar="VALUE", help="mask value to ignore, besides 255")
    option("--reduce-zero-label", action=argparse.BooleanOptionalAction, help="ignore 0 (default: in ADE20K's layout)")
    option("--short-side", type=int, metavar="PIXELS", help="fit images in (2048, this) (default: the crop size)")
    args = parser.parse_args()
    check_ranges(vars(args))
    if args.train and not (args.val and args.classes):
        raise ValueError("--train also needs --val, two folders to score the model on, and --classes, a list of names")
    args.resume = find_run(args.out, args.resume)
    train_folders, val_folders = args.train or find_split(args.data, "train"), args.val or find_split(args.data, "val")
    listed, ade20k = Path(args.data, "classes.txt"), is_ade20k(train_folders[1])
    class_names, colors = read_classes(args.classes or (listed if listed.is_file() or not ade20k else "ade20k"))
    name, settings, weights = choose_model(PRESETS, vars(args))
    model, device = start_model(build_model, name, class_names, settings, weights, vars(args))
    torch.backends.cudnn.benchmark = True  # all crops have the same size
    reduce_zero_label = ade20k if args.reduce_zero_label is None else args.reduce_zero_label
    labels = {"ignore_index": args.ignore_index, "reduce_zero_label": reduce_zero_label}
    transform = TrainTransform(model.crop_size, (2048, model.short_side))
    train_set = SegmentationDataset(*train_folders, len(class_names), transform, **labels)
    val_set = SegmentationDataset(*val_folders, len(class_names), **labels)
    recipe = SGD if args.optimizer == "sgd" else SWIN if settings.get("backbone") in ("swin_t", "swin_s") else Recipe()
    recipe = complete(recipe, vars(args) | labels | weights)
    rank, world = this_process()
    if rank == 0:
        print(f"{model.name}, {world} x {device}, {len(train_set)} training and {len(val_set)} validation images")
        if reduce_zero_label:
            print("mask value 0 is ignored and 1 is the first class; --no-reduce-zero-label if your classes start at 0")
        if args.check and not args.resume:
            print(check_data(train_set, val_set, class_names, args.workers))
        print(f"writing to {args.out}; the same command with --resume continues an interrupted run")
    loop = {name: getattr(args, name) for name in LOOP}
    loop["data"] = {"colors": colors, "val": [str(Path(folder).resolve()) for folder in val_folders]}
    evaluate_model = partial(evaluate, dataset=val_set, device=device, workers=args.workers)
    metrics = train(model, train_set, recipe, args.out, device, evaluate_model=evaluate_model, **loop)
    if rank == 0:
        print(format_table(metrics, class_names))
        print(f"weights: {args.out / 'best.pt'} (best mIoU), {args.out / 'last.pt'}; log: {args.out / 'log.jsonl'}")


if __name__ == "__main__":
    run_script(main)
