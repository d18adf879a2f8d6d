"""experiments/tables.py: parameters and multiply-adds equal those measured on the released code. Where they differ from
the paper's, the reason in the notes accounts for the difference."""

import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from helpers import run

from data import read_classes
from denseclip import build_model
from experiments import tables
from experiments.tables import NOTES, PLAIN, R50, R101, SWIN_S, SWIN_T, TABLES, measure

ROOT = Path(__file__).resolve().parents[1]


@cache
def cost_of(settings):
    with torch.device("meta"):
        return measure(build_model(class_names=read_classes("ade20k")[0], **dict(settings)))


def cost(**settings):
    return cost_of(tuple(settings.items()))


@pytest.mark.parametrize(
    "settings, parameters, multiply_adds",
    [
        ({"name": "rn50"} | PLAIN, 31.0425, 248.829),
        pytest.param({"name": "rn101"} | PLAIN, 50.0347, 326.620, marks=pytest.mark.slow),
        ({"name": "vitb16"} | PLAIN, 101.2827, 863.462),
        ({"name": "rn50"}, 50.2484, 269.827),
        pytest.param({"name": "rn101"}, 67.7952, 346.289, marks=pytest.mark.slow),
        ({"name": "vitb16"}, 105.2735, 869.157),
    ],
)
def test_equal_to_the_released_code(settings, parameters, multiply_adds):
    actual = cost(**settings)
    assert actual.parameters == pytest.approx(parameters, rel=1e-3)
    assert actual.multiply_adds == pytest.approx(multiply_adds, rel=1e-3)


def test_text_encoder_is_counted_separately():
    actual = cost(name="rn50")
    assert actual.text_parameters == pytest.approx(63.690, rel=1e-3)
    assert actual.text_multiply_adds == pytest.approx(74, rel=5e-3)
    assert cost(name="rn50", **PLAIN).text_multiply_adds == 0


def test_imagenet_baselines_equal_the_papers_except_for_the_stem():
    # ours: 7 x 7, 3 -> 64; theirs: 3 x 3, 3 -> 32 -> 32 -> 64, with two more batch norms; on 512 x 512 pixels
    ours, theirs = 49 * 3 * 64, 9 * (3 * 32 + 32 * 32 + 32 * 64)
    stem = (theirs - ours + 2 * 2 * 32) * 512 * 512 / 1e9
    assert f"{stem:.2f} G" in NOTES["a"]
    for settings, parameters, multiply_adds in ((R50, 31.0, 227.1), (R101, 50.0, 304.9)):
        actual = cost(**settings | PLAIN)
        assert actual.parameters == pytest.approx(parameters, rel=1e-3)
        assert actual.multiply_adds + stem == pytest.approx(multiply_adds, rel=1e-3)


def test_vit_equals_the_papers_if_counted_as_in_2021():
    # Transposed convolutions, 768 -> 768, 2 x 2: two from 64 x 64 to 128 x 128, one from there to 256 x 256. Counted
    # by its output, each costs four times what it costs counted by its input.
    by_input = 768 * 768 * 4 * (2 * 64 * 64 + 128 * 128) / 1e9
    assert f"{3 * by_input:.3f} G" in NOTES["c"]
    assert cost(name="vitb16").multiply_adds + 3 * by_input == pytest.approx(1043.1, rel=1e-3)
    assert cost(name="vitb16", **PLAIN).multiply_adds + 3 * by_input == pytest.approx(1037.4, rel=1e-3)
    assert cost(name="vitb16", crop_size=512, **PLAIN).parameters == pytest.approx(100.8, rel=1e-3)


def test_the_paper_left_out_the_final_upsampling():
    upsampling = 4 * 150 * 1024 * 1024 / 1e9
    assert f"{upsampling:.3f} G" in NOTES["b"]
    assert cost(name="rn50").multiply_adds - upsampling == pytest.approx(269.2, rel=1e-3)


def test_pre_model_decoder_has_the_published_size():
    actual = cost(name="rn50", prompting="pre")
    unused_positions = (77 - 13) * 512 / 1e6  # the released text encoder keeps the 13 that its texts use
    assert actual.parameters + actual.text_parameters - unused_positions == pytest.approx(116.9, abs=0.05)


def test_upernet_with_swin_has_the_size_that_swins_authors_report():
    for settings, parameters, multiply_adds in ((SWIN_T, 60, 945), (SWIN_S, 81, 1038)):
        actual = cost(**settings | PLAIN)
        assert actual.parameters == pytest.approx(parameters, abs=0.5)
        assert actual.multiply_adds == pytest.approx(multiply_adds, rel=5e-3)


def test_rows_and_notes_are_printed(monkeypatch, capsys):
    monkeypatch.setattr(tables, "TABLES", {title: rows[2:3] for title, rows in list(TABLES.items())[:2]})
    run(tables, monkeypatch)
    printed = capsys.readouterr().out
    assert "| DenseCLIP R50 | 43.5 / 44.7 | 50.25 | 50.3 | 269.83 | 269.2 | b |" in printed
    assert printed.count("\n| ") == 4 and all(note in printed for note in NOTES.values())


@pytest.mark.slow
def test_command_prints_every_row():
    command = [sys.executable, "-m", "experiments.tables"]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=True).stdout
    for row in (row for rows in TABLES.values() for row in rows):
        assert f"\n| {row.label} | {row.miou} | " in printed and set(row.notes) <= NOTES.keys()
