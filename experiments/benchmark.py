"""Time and memory of this code beside the same model computed as the authors' release computes it, in one run.

    python -m experiments.benchmark                        # everything; over half an hour on two cores
    python -m experiments.benchmark inference training     # some of its parts
    python -m experiments.benchmark --device cuda --batch-size 32
    python -m experiments.benchmark data --images IMAGES --masks MASKS        # samples of your own files

Prints a table in Markdown: medians of several runs of both sides, which take turns, their ratio, and what share of this
machine's own fastest convolution or matrix product, measured in the same run, this code reached. Weights are random.
The ratio of times is how often as fast this code is; that of memory is how much of the released memory it needs.

"Released" is `as_released`: text encoder in every forward, one sequence per class name; attention as nn.Module or plain
products; channels-first layout; losses of whole batches at full size; in training gradients of the text encoder, too,
and anomaly detection. tests/test_golden.py holds it to the losses of the authors' own code. Memory is as the C library
has it by default. What it shares with this code: the activations, and up-sampling that is left out at the same size.
"""

import argparse
import contextlib
import ctypes
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from unittest import mock

if __name__ == "__main__":  # before torch, as train.py does; `default_memory` says where large pages are used
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import clip_model
import denseclip
from data import SegmentationDataset, TrainTransform, read_classes, resize_to_fit
from eval import SCALES, evaluate, predict_labels, window_starts
from heads import resize
from train import Recipe, build_optimizer, recompute_blocks

PARTS = ("inference", "sliding", "multiscale", "training", "memory", "text", "data", "evaluation")
SIZES = {"rn50": 512, "rn101": 512, "vitb16": 640}

# ------------------------------------------------------------------------------------------------ as released


def released_attention(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None) -> Tensor:
    q, k, v = (x.unflatten(2, (heads, -1)).transpose(1, 2) for x in (q, k, v))  # (B, heads, N or M, D / heads)
    x = (q * q.shape[-1] ** -0.5 @ k.transpose(2, 3)).softmax(dim=3) @ v  # (B, heads, N, D / heads)
    return x.transpose(1, 2).flatten(2)  # (B, N, D)


def released_block(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
    y = self.ln_1(x).transpose(0, 1)  # (N, B, D)
    y = self.attn(y, y, y, need_weights=False, attn_mask=None if mask is None else ~mask)[0].transpose(0, 1)
    x = x + self.apply_drop_path(y)
    return x + self.apply_drop_path(self.mlp(self.ln_2(x)))


def released_texts(self, tokens: Tensor, contexts: Tensor) -> Tensor:
    """`TextEncoder.forward_shared`, (K, L) and (B, N, D) -> (B, K, C), with one sequence per class name."""
    (num_images, num_contexts), num_texts = contexts.shape[:2], len(tokens)  # (B, N), K
    x = self.token_embedding(tokens).expand(num_images, -1, -1, -1)  # (B, K, L, D)
    p = contexts[:, None].expand(-1, num_texts, -1, -1)  # (B, K, N, D)
    x = torch.cat([x[:, :, :1], p, x[:, :, 1:]], dim=2).flatten(0, 1)  # [SOT, p, e_k, EOT]: (BK, N + L, D)
    x = x + self.positional_embedding[: x.shape[1]]  # (BK, N + L, D)
    causal = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril()
    x = self.transformer(x, causal)[-1]  # (BK, N + L, D)
    end = (tokens.argmax(dim=1) + num_contexts).repeat(num_images)  # (BK,)
    x = self.ln_final(x[torch.arange(len(x), device=x.device), end]) @ self.text_projection  # at EOT: (BK, C)
    return x.view(num_images, num_texts, -1)  # (B, K, C)


def released_text(self, memory: Tensor) -> Tensor:
    return self.encode_text().expand(memory.shape[0], -1, -1)


def released_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    logits = resize(logits.float(), labels.shape[1:])  # (B, K, H, W)
    return F.cross_entropy(logits, labels, ignore_index=clip_model.IGNORE_INDEX, reduction="none").mean()


@contextlib.contextmanager
def as_released() -> Iterator[None]:
    """Within this context, models compute what they always do, in the released code's way."""
    with contextlib.ExitStack() as stack:
        for owner, name, function in (
            (clip_model, "attention", released_attention),
            (denseclip, "pixel_cross_entropy", released_cross_entropy),
            (clip_model.ResidualAttentionBlock, "forward", released_block),
            (clip_model.TextEncoder, "forward_shared", released_texts),
            (denseclip.LanguageGuidedEncoder, "embed_class_names", released_text),
        ):
            stack.enter_context(mock.patch.object(owner, name, function))
        yield


@torch.no_grad()
def released_labels(model, image: Tensor, size: tuple[int, int], short_side: int, multi_scale: bool = False) -> Tensor:
    """`eval.predict_labels`: one window after another, every variant at full size before the softmax."""
    window, stride, total = model.crop_size, model.crop_size * 2 // 3, 0
    for scale in SCALES if multi_scale else (1.0,):
        for flip in (False, True) if multi_scale else (False,):
            x = resize_to_fit(image[None], (int(2048 * scale), int(short_side * scale)))
            x = x.flip(-1) if flip else x
            logits, count = x.new_zeros(1, len(model.class_names), *x.shape[2:]), x.new_zeros(1, 1, *x.shape[2:])
            for top in window_starts(x.shape[2], window, stride):
                for left in window_starts(x.shape[3], window, stride):
                    area = (..., slice(top, top + window), slice(left, left + window))
                    logits[area] += model(x[area])
                    count[area] += 1
            probabilities = resize(logits / count, size).softmax(dim=1)
            total = total + (probabilities.flip(-1) if flip else probabilities)
    return total.argmax(dim=1)[0]


def default_memory(large_pages: bool = False) -> None:
    """Undo `denseclip.keep_memory`: glibc as it is after the first large blocks, which set its thresholds.
    large_pages: let Linux back large tensors with pages of 2 MB, where THP_MEM_ALLOC_ENABLE asks for them, as train.py
    does. Nothing else here uses them."""
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.prctl(41, int(not large_pages), 0, 0, 0)  # PR_SET_THP_DISABLE
        for option, value in ((-4, 65536), (-3, 2**25), (-1, 2**26)):  # M_MMAP_MAX, M_MMAP_THRESHOLD, M_TRIM_THRESHOLD
            libc.mallopt(option, value)
        libc.malloc_trim(0)


# ------------------------------------------------------------------------------------------------ measuring


class Benchmark:
    """What the parts have in common: device, number of runs, peaks, and the table."""

    def __init__(self, device: torch.device, runs: int, batch_size: int):
        self.device, self.runs, self.batch_size = device, runs, batch_size
        if device.type == "cuda":  # as train.py
            torch.set_float32_matmul_precision("high")
            torch.backends.cudnn.benchmark = True
        print("| work | precision | released | here | ratio | of the machine's peak |\n|---|---|---|---|---|---|")
        self.peaks = {p: self.measure_peaks(p) for p in ("fp32", "bf16")}  # (convolution, matrix) in FLOP/s

    def seconds(self, work: Callable[[], object]) -> float:
        if self.device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            work()
            end.record()
            end.synchronize()
            return start.elapsed_time(end) / 1000
        start = time.perf_counter()
        work()
        return time.perf_counter() - start

    def take_turns(self, *sides: Callable[[], object], memory: Callable = denseclip.keep_memory) -> list[float]:
        """The median seconds of each side. Two rounds; in each, a side first runs twice untimed. The first of several
        is the released code's, with memory as it is by default; memory: called before the others."""
        times = [[] for _ in sides]
        for _ in range(2):
            for i, work in enumerate(sides):
                default_memory()
                if i > 0 or len(sides) == 1:
                    memory()
                work()
                work()
                times[i] += [self.seconds(work) for _ in range(-(-self.runs // 2))]
        return [statistics.median(ts) for ts in times]

    def measure_peaks(self, precision: str) -> tuple[float, float]:
        """The fastest of several 3 x 3 convolutions and of several matrix products, as the models have them."""
        dtype, best = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision], [0.0, 0.0]
        images = self.batch_size if self.device.type == "cuda" else 1
        denseclip.keep_memory()
        for channels, side in ((64, 128), (128, 64), (256, 64), (256, 128), (512, 32)):
            for layout in (torch.channels_last, torch.contiguous_format):
                x = torch.randn(images, channels, side, side, device=self.device, dtype=dtype)
                w = torch.randn(channels, channels, 3, 3, device=self.device, dtype=dtype)
                x, w = x.to(memory_format=layout), w.to(memory_format=layout)
                (seconds,) = self.take_turns(lambda x=x, w=w: F.conv2d(x, w, padding=1))
                best[0] = max(best[0], 2 * 9 * x.numel() * channels / seconds)
        for m, n, k in ((1024, 1024, 1024), (2048, 2048, 2048), (1601 * images, 3072, 768), (1601 * images, 768, 3072)):
            a, b = (torch.randn(rows, k, device=self.device, dtype=dtype) for rows in (m, n))
            (seconds,) = self.take_turns(lambda a=a, b=b: F.linear(a, b))
            best[1] = max(best[1], 2 * m * n * k / seconds)
        print(f"| peak: convolution, matrix | {precision} | | {best[0] / 1e9:.0f}, {best[1] / 1e9:.0f} GFLOP/s | | |")
        return tuple(best)

    def row(
        self, work: str, precision: str, times: list[float], flops: float = 0, matrix: bool = False, note: str = ""
    ):
        (released, ours), peak = times, self.peaks[precision][matrix]
        share = f"{100 * flops / ours / peak:.0f} % of {'matrix' if matrix else 'convolution'}" if flops else note
        values = f"{released:.3f} s | {ours:.3f} s | {released / ours:.2f}x"
        print(f"| {work} | {precision} | {values} | {share} |", flush=True)

    def build(self, name: str) -> denseclip.DenseCLIP:
        torch.manual_seed(0)
        return denseclip.build_model(name, read_classes("ade20k")[0])

    def both(self, name: str) -> tuple[denseclip.DenseCLIP, denseclip.DenseCLIP]:
        """The same model for both sides: as built, and saved and loaded as users do."""
        released = self.build(name).eval().to(memory_format=torch.contiguous_format)
        with tempfile.TemporaryDirectory() as folder:
            denseclip.save_checkpoint(Path(folder, "model.pt"), released)
            ours = denseclip.load_checkpoint(Path(folder, "model.pt"))
        return released.to(self.device), ours.to(self.device)

    def autocast(self, precision: str) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=precision == "bf16")


def count_flops(work: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


# ------------------------------------------------------------------------------------------------ parts


@torch.inference_mode()
def inference(bench: Benchmark) -> None:
    for name, side in SIZES.items():
        (released, ours), images = bench.both(name), torch.randn(1, 3, side, side, device=bench.device)
        ours(images)  # keeps the text, which is then not counted
        flops = count_flops(lambda ours=ours, images=images: ours(images))
        outputs = {}
        for precision in ("fp32", "bf16"):

            def run_released(released=released, images=images):
                with as_released():
                    released(images)  # the released code has no autocast

            def run_ours(ours=ours, images=images, precision=precision):
                with bench.autocast(precision):
                    return ours(images)

            times, outputs[precision] = bench.take_turns(run_released, run_ours), run_ours().argmax(1)
            work = f"{name}, 1 x {side} x {side}, {flops / 1e9:.0f} GFLOP"
            bench.row(work, precision, times, flops, matrix=name == "vitb16")
        equal = (outputs["fp32"] == outputs["bf16"]).float().mean().item()
        print(f"| {name}: labels in bf16 equal to fp32's, random weights | | | {100 * equal:.2f} % | | |")


def sliding(bench: Benchmark) -> None:
    labels_of(bench, "rn50, labels of 512 x 683, sliding window", (512, 683))


def multiscale(bench: Benchmark) -> None:
    labels_of(bench, "rn50, labels of 256 x 341, 12 scaled and flipped variants", (256, 341), multi_scale=True)


def labels_of(bench: Benchmark, work: str, size: tuple[int, int], multi_scale: bool = False) -> None:
    (released, ours), image = bench.both("rn50"), torch.randn(3, *size, device=bench.device)
    for precision in ("fp32", "bf16"):

        def run_released():
            with as_released():
                released_labels(released, image, size, size[0], multi_scale)

        def run_ours(precision=precision):
            with bench.autocast(precision):
                predict_labels(ours, image, size, short_side=size[0], multi_scale=multi_scale)

        bench.row(work, precision, bench.take_turns(run_released, run_ours))


class Training:
    """A training step of rn50 on random images, of one side."""

    def __init__(self, bench: Benchmark, released: bool, precision: str = "fp32", recompute: bool = False):
        self.bench, self.released, self.precision = bench, released, precision
        self.model = bench.build("rn50").train().to(bench.device)
        if released:
            self.model.to(memory_format=torch.contiguous_format)
            self.model.encoder.text_encoder.requires_grad_(True)
            self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, foreach=False)
        else:
            self.optimizer = build_optimizer(self.model, Recipe())
            if recompute:
                recompute_blocks(self.model)
        self.images = torch.randn(bench.batch_size, 3, 512, 512, device=bench.device)
        self.labels = torch.randint(150, (bench.batch_size, 512, 512), device=bench.device)

    def __call__(self) -> None:
        with contextlib.ExitStack() as stack:
            if self.released:
                stack.enter_context(as_released())
                stack.enter_context(torch.autograd.set_detect_anomaly(True))
            with self.bench.autocast(self.precision):
                losses = self.model(self.images, self.labels)
            sum(losses.values()).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def training(bench: Benchmark) -> None:
    for precision in ("fp32", "bf16"):
        sides = Training(bench, True), Training(bench, False, precision), Training(bench, False, precision, True)
        flops = count_flops(sides[1])
        released, *ours = bench.take_turns(*sides, memory=partial(default_memory, large_pages=True))
        for how, seconds in zip(("training step", "with --recompute"), ours, strict=True):
            work = f"rn50, {how}, {bench.batch_size} x 512 x 512, {flops / 1e9:.0f} GFLOP"
            bench.row(work, precision, [released, seconds], flops)


def memory(bench: Benchmark) -> None:
    """Peak memory of two training steps: of a process that does nothing else, or of the GPU's allocator."""
    for precision in ("fp32", "bf16"):
        peaks = []
        for side in ("released", "here", "recompute"):
            command = [sys.executable, "-m", "experiments.benchmark", "--peak-memory", side, precision]
            command += ["--device", str(bench.device), "--batch-size", str(bench.batch_size)]
            peaks.append(int(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1]))
        released, *ours = (peak / 1e9 for peak in peaks)
        for how, peak in zip(("training step", "with --recompute"), ours, strict=True):
            values = f"{released:.2f} GB | {peak:.2f} GB | {peak / released:.2f}x"
            print(f"| rn50, {how}, peak memory | {precision} | {values} | |", flush=True)


def peak_memory(bench: Benchmark, side: str, precision: str) -> int:
    released = side == "released"  # which has no autocast
    default_memory(large_pages=not released)
    step = Training(bench, released, "fp32" if released else precision, side == "recompute")
    for _ in range(2):
        step()
    if bench.device.type == "cuda":
        return torch.cuda.max_memory_allocated(bench.device)
    # VmHWM in kB; getrusage would count the process that started this one, too
    return 1024 * int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])


def text(bench: Benchmark) -> None:
    """Text encoder of rn50 and learned contexts, forward and backward, for K class names of at most 3 tokens."""
    encoder = bench.build("rn50").encoder.to(bench.device)
    for k in (19, 150, 847, 1203):
        tokens = encoder.tokens.repeat(-(-k // 150), 1)[:k]  # (K, 5)

        def run_released(tokens=tokens):
            encoder.text_encoder.requires_grad_(True)
            with as_released():
                encoder.text_encoder.forward_shared(tokens, encoder.contexts).sum().backward()
            encoder.text_encoder.zero_grad()

        def run_ours(tokens=tokens):
            encoder.text_encoder.requires_grad_(False)
            encoder.text_encoder.forward_shared(tokens, encoder.contexts).sum().backward()

        bench.row(f"text encoder, forward and backward, K = {k}", "fp32", bench.take_turns(run_released, run_ours))


# ------------------------------------------------------------------------------------------------ data


def make_files(folder: Path, number: int) -> tuple[Path, Path]:
    """JPEG images of 683 x 512 pixels and PNG masks of patches, somewhat like photos in their size as files."""
    generator = torch.Generator().manual_seed(0)
    for name in ("images", "masks"):
        (folder / name).mkdir()
    for i in range(number):
        image = sum(resize(torch.randn(1, 3, n, n, generator=generator), (512, 683)) for n in (4, 16, 64, 256))[0]
        image = (image * 40 + 128).clamp(0, 255).permute(1, 2, 0).to(torch.uint8).numpy()
        patches = resize(torch.randn(1, 151, 5, 5, generator=generator), (512, 683)).argmax(1)[0]
        Image.fromarray(image).save(folder / "images" / f"{i}.jpg", quality=90)
        Image.fromarray(patches.to(torch.uint8).numpy()).save(folder / "masks" / f"{i}.png")
    return folder / "images", folder / "masks"


def released_sample(image_path: Path, mask_path: Path, crop: int = 512) -> tuple[np.ndarray, np.ndarray]:
    """A training sample by the released pipeline's steps, in its order, with NumPy and OpenCV."""
    import cv2

    def coin() -> bool:
        return np.random.randint(2) == 1

    image = cv2.imread(str(image_path))  # BGR (H, W, 3)
    label = cv2.imread(str(mask_path), cv2.IMREAD_UNCHANGED)  # (H, W)
    label[label == 0] = 255
    label = label - 1
    label[label == 254] = 255
    ratio, (h, w) = np.random.uniform(0.5, 2), label.shape
    factor = min(int(2048 * ratio) / max(h, w), int(512 * ratio) / min(h, w))
    size = int(w * factor + 0.5), int(h * factor + 0.5)
    image = cv2.resize(image, size, interpolation=cv2.INTER_LINEAR)
    label = cv2.resize(label, size, interpolation=cv2.INTER_NEAREST)
    for _ in range(11):
        top = np.random.randint(max(label.shape[0] - crop, 0) + 1)
        left = np.random.randint(max(label.shape[1] - crop, 0) + 1)
        classes, counts = np.unique(label[top : top + crop, left : left + crop], return_counts=True)
        counts = counts[classes != 255]
        if len(counts) > 1 and counts.max() / counts.sum() < 0.75:
            break
    image, label = image[top : top + crop, left : left + crop], label[top : top + crop, left : left + crop]
    if coin():
        image, label = cv2.flip(image, 1), cv2.flip(label, 1)

    def scale(x: np.ndarray, alpha: float = 1, beta: float = 0) -> np.ndarray:
        return np.clip(x.astype(np.float32) * alpha + beta, 0, 255).astype(np.uint8)

    if coin():
        image = scale(image, beta=np.random.uniform(-32, 32))
    contrast_first = coin()
    if contrast_first and coin():
        image = scale(image, np.random.uniform(0.5, 1.5))
    if coin():
        image = cv2.cvtColor(image, cv2.COLOR_BGR2HSV)
        image[:, :, 1] = scale(image[:, :, 1], np.random.uniform(0.5, 1.5))
        image = cv2.cvtColor(image, cv2.COLOR_HSV2BGR)
    if coin():
        image = cv2.cvtColor(image, cv2.COLOR_BGR2HSV)
        image[:, :, 0] = (image[:, :, 0].astype(int) + np.random.randint(-18, 18)) % 180
        image = cv2.cvtColor(image, cv2.COLOR_HSV2BGR)
    if not contrast_first and coin():
        image = scale(image, np.random.uniform(0.5, 1.5))
    image = cv2.cvtColor(image.astype(np.float32), cv2.COLOR_BGR2RGB)
    cv2.subtract(image, np.array([clip_model.MEAN]) * 255, image)
    cv2.multiply(image, 1 / (np.array([clip_model.STD]) * 255), image)
    bottom, right = crop - image.shape[0], crop - image.shape[1]
    image = cv2.copyMakeBorder(image, 0, bottom, 0, right, cv2.BORDER_CONSTANT, value=0)
    label = cv2.copyMakeBorder(label, 0, bottom, 0, right, cv2.BORDER_CONSTANT, value=255)
    return np.ascontiguousarray(image.transpose(2, 0, 1)), label.astype(np.int64)


def data(bench: Benchmark, folders: tuple[str, str] | None = None) -> None:
    """Training samples of one core, as one process of a loader makes them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        folders = folders or make_files(Path(temporary), 20)
        dataset = SegmentationDataset(*folders, 150, TrainTransform(), reduce_zero_label=True)
        samples = range(min(40, len(dataset)))

        def run_ours():
            for i in samples:
                dataset[i, i]

        try:
            import cv2

            cv2.setNumThreads(1)
        except ImportError:
            (seconds,) = bench.take_turns(run_ours)
            value = f"{len(samples) / seconds:.0f} /s"
            print(f"| training samples, one core | | needs opencv-python-headless | {value} | | |")
        else:

            def run_released():
                np.random.seed(0)
                for i in samples:
                    released_sample(*dataset.pairs[i])

            times = [seconds / len(samples) for seconds in bench.take_turns(run_released, run_ours)]
            released, ours = (f"{1 / seconds:.0f} /s" for seconds in times)
            print(f"| training samples, one core | | {released} | {ours} | {times[0] / times[1]:.2f}x | |", flush=True)
    torch.set_num_threads(threads)


def evaluation(bench: Benchmark) -> None:
    """Images from files to scores."""
    with tempfile.TemporaryDirectory() as temporary:
        dataset = SegmentationDataset(*make_files(Path(temporary), 2), 150, reduce_zero_label=True)
        released, ours = bench.both("rn50")

        def run_released():
            with as_released():
                for image, label, _ in dataset:
                    released_labels(released, image.to(bench.device), label.shape, 512)

        times = bench.take_turns(run_released, lambda: evaluate(ours, dataset, bench.device))
        bench.row("rn50, evaluation of an image file of 512 x 683", "fp32", [seconds / 2 for seconds in times])


# ------------------------------------------------------------------------------------------------ command line


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m experiments.benchmark", None, __doc__, formatter_class=raw)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)} (default: all)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1), help="default: %(default)s")
    parser.add_argument("--runs", type=int, default=6, help="of each side, at least (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=2, help="of the training step (default: %(default)s)")
    parser.add_argument("--images", metavar="DIR", help="for the part data, with --masks: your own files")
    parser.add_argument("--masks", metavar="DIR", help="0 is ignored, as in ADE20K")
    parser.add_argument("--peak-memory", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if wrong := set(args.parts) - set(PARTS):
        parser.error(f"no part named {wrong.pop()}: choose from {', '.join(PARTS)}")
    if bool(args.images) != bool(args.masks):
        parser.error("--images and --masks belong together")
    torch.set_num_threads(args.threads)
    if args.peak_memory:
        with mock.patch.object(Benchmark, "measure_peaks"):
            print(peak_memory(Benchmark(torch.device(args.device), 1, args.batch_size), *args.peak_memory))
        return
    cpu = platform.processor() or platform.machine()
    name = torch.cuda.get_device_name() if args.device.startswith("cuda") else cpu
    print(f"{name}, {args.threads} threads, PyTorch {torch.__version__}, medians of {args.runs} runs\n")
    bench = Benchmark(torch.device(args.device), args.runs, args.batch_size)
    for part in args.parts or PARTS:
        if part == "data":
            data(bench, (args.images, args.masks) if args.images else None)
        else:
            globals()[part](bench)


if __name__ == "__main__":
    main()
