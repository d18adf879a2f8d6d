"""tables.py: parameters and multiply-adds are those measured on the released code and, where they should be, the
paper's; where they differ from the paper, the reason given in the notes accounts for the difference."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from data import read_classes
from denseclip import build_model
from tables import NOTES, R50, R101, SWIN_S, SWIN_T, TABLES, measure

ROOT = Path(__file__).resolve().parents[1]
PLAIN = {"prompting": "none"}


@pytest.fixture(scope="module")
def cost():
    """settings -> Cost, each computed once."""
    names, _ = read_classes("ade20k")
    known = {}

    def compute(**settings):
        key = tuple(settings.items())
        if key not in known:
            with torch.device("meta"):
                model = build_model(class_names=names, **settings)
            known[key] = measure(model)
        return known[key]

    return compute


@pytest.mark.parametrize(
    "settings, parameters, multiply_adds",
    [
        ({"name": "rn50"} | PLAIN, 31.0425, 248.829),
        ({"name": "rn101"} | PLAIN, 50.0347, 326.620),
        ({"name": "vitb16"} | PLAIN, 101.2827, 863.462),
        ({"name": "rn50"}, 50.2484, 269.827),
        ({"name": "rn101"}, 67.7952, 346.289),
        ({"name": "vitb16"}, 105.2735, 869.157),
    ],
)
def test_equal_to_the_released_code(cost, settings, parameters, multiply_adds):
    found = cost(**settings)
    assert found.parameters == pytest.approx(parameters, rel=1e-3)
    assert found.multiply_adds == pytest.approx(multiply_adds, rel=1e-3)


def test_text_encoder_is_counted_apart(cost):
    found = cost(name="rn50")
    assert found.text_parameters == pytest.approx(63.690, rel=1e-3)
    assert found.text_multiply_adds == pytest.approx(74, rel=5e-3)
    assert cost(name="rn50", **PLAIN).text_multiply_adds == 0


def test_imagenet_baselines_are_the_papers_but_for_the_stem(cost):
    # 7 x 7, 3 -> 64 here; 3 x 3, 3 -> 32 -> 32 -> 64 there, with two more batch norms; on 512 x 512 pixels
    here, there = 49 * 3 * 64, 9 * (3 * 32 + 32 * 32 + 32 * 64)
    stem = (there - here + 2 * 2 * 32) * 512 * 512 / 1e9
    assert f"{stem:.2f} G" in NOTES["a"]
    for settings, parameters, multiply_adds in ((R50, 31.0, 227.1), (R101, 50.0, 304.9)):
        found = cost(**settings | PLAIN)
        assert found.parameters == pytest.approx(parameters, rel=1e-3)
        assert found.multiply_adds + stem == pytest.approx(multiply_adds, rel=1e-3)


def test_vit_of_the_paper_by_the_counting_of_2021(cost):
    # Its transposed convolutions, 768 -> 768, 2 x 2: from 64 x 64 to 128 x 128 twice, on to 256 x 256 once. By the
    # output each counts four times what it counts by the input.
    by_input = 768 * 768 * 4 * (2 * 64 * 64 + 128 * 128) / 1e9
    assert f"{3 * by_input:.3f} G" in NOTES["c"]
    assert cost(name="vitb16").multiply_adds + 3 * by_input == pytest.approx(1043.1, rel=1e-3)
    assert cost(name="vitb16", **PLAIN).multiply_adds + 3 * by_input == pytest.approx(1037.4, rel=1e-3)
    assert cost(name="vitb16", crop_size=512, **PLAIN).parameters == pytest.approx(100.8, rel=1e-3)


def test_final_upsampling_is_what_the_paper_left_out(cost):
    upsampling = 4 * 150 * 1024 * 1024 / 1e9
    assert f"{upsampling:.3f} G" in NOTES["b"]
    assert cost(name="rn50").multiply_adds - upsampling == pytest.approx(269.2, rel=1e-3)


def test_pre_model_decoder_has_the_published_size(cost):
    found = cost(name="rn50", prompting="pre")
    unused_positions = (77 - 13) * 512 / 1e6  # the released text encoder keeps the 13 that its texts reach
    assert found.parameters + found.text_parameters - unused_positions == pytest.approx(116.9, abs=0.05)


def test_upernet_with_swin_has_the_size_that_swins_authors_give(cost):
    auxiliary = (384 * 256 * 9 + 2 * 256 + 256 * 150 + 150) / 1e6  # the FCN head that is not here
    for settings, parameters, multiply_adds in ((SWIN_T, 60, 945), (SWIN_S, 81, 1038)):
        found = cost(**settings | PLAIN)
        assert found.parameters + auxiliary == pytest.approx(parameters, abs=0.5)
        assert found.multiply_adds == pytest.approx(multiply_adds, rel=5e-3)


def test_command_prints_every_row(cost):
    command = [sys.executable, str(ROOT / "tables.py")]
    printed = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    for rows in TABLES.values():
        for row in rows:
            line = next(line for line in printed.splitlines() if line.startswith(f"| {row.label} |"))
            assert line.count("|") == 8 and row.miou in line
            assert set(row.notes) <= NOTES.keys()
    assert "| DenseCLIP R50 | 43.5 / 44.7 | 50.25 | 50.3 | 269.8" in printed
