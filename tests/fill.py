"""Weights and inputs that follow from names alone, so that no checkpoint of the released code has to be stored.

The files in golden/ hold what the released code computes on these weights, in float32 on a CPU: for every tensor its
shape, its standard deviation and the values that `sample` takes.
"""

import zlib

import torch
from torch import Tensor


def generator(name: str) -> torch.Generator:
    return torch.Generator().manual_seed(zlib.crc32(name.encode()))


def tensor(name: str, shape: tuple[int, ...]) -> Tensor:
    """Normal numbers seeded by the name, scaled by what the name says of their part in a network."""
    shape = tuple(shape)
    last = name.split(".")[-1]
    x = torch.randn(shape, generator=generator(name))
    if last == "num_batches_tracked":
        return torch.ones(shape, dtype=torch.int64)
    if name.startswith("input."):
        return x
    if name == "gamma":
        return 0.5 + 0.1 * x
    if name == "contexts":
        return 0.5 * x
    if last == "running_var":
        return 0.75 + 0.5 * x.abs()
    if last == "running_mean":
        return 0.1 * x
    if last in ("positional_embedding", "class_embedding") or "token_embedding" in name:
        return 0.3 * x
    if x.ndim == 1:
        is_bias, ends_a_branch = "bias" in last, ".bn3." in name
        return 0.05 * x if is_bias else (0.4 if ends_a_branch else 1.0) + 0.1 * x
    if last in ("proj", "text_projection"):  # matrices that stand on the right: (in, out)
        return x * shape[0] ** -0.5
    if x.ndim == 4:
        is_transposed = ".fpn1." in name or ".fpn2." in name  # (in, out, k, k)
        return x * (2 / (shape[0] if is_transposed else x[0].numel())) ** 0.5
    return x * x[0].numel() ** -0.5


def labels(batch: int, height: int, width: int, num_classes: int = 150, block: int = 32, ignore: int = 255) -> Tensor:
    """(B, H, W) of squares of one class each, some pixels and the first image's top ignored."""
    g = generator("input.label")
    rows, columns = -(-height // block), -(-width // block)
    y = torch.randint(num_classes, (batch, rows, columns), generator=g)
    y = y.repeat_interleave(block, dim=1).repeat_interleave(block, dim=2)[:, :height, :width].clone()
    y[torch.rand(y.shape, generator=g) < 0.05] = ignore
    y[0, : height // 8] = ignore
    return y


def sample(x: Tensor, limit: int = 256) -> Tensor:
    """Evenly strided values of a tensor, at most `limit`."""
    x = x.detach().flatten()
    return x[:: max(1, x.numel() // limit)][:limit].clone()
