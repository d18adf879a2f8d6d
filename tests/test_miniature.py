"""experiments/miniature.py: captions name no places, the sets share no drawing, runs are paired and not repeated. The
outputs of walkthrough.ipynb are in it. Slow: a short pre-training beats chance in retrieval through load_clip, and the
notebook runs from beginning to end."""

import json
import math
from pathlib import Path

import nbclient
import nbformat
import numpy as np
import pytest

from demo import CLASSES, draw_scene
from denseclip import PRESETS, PROMPTING, Settings, resolve
from experiments import miniature
from train import Recipe

ROOT = Path(__file__).resolve().parents[1]


def test_captions_list_what_a_drawing_shows_and_never_where():
    random = np.random.default_rng(0)
    captions = {miniature.write_caption(["circle", "ring", "stripes"], random) for _ in range(500)}
    assert len(captions) == 6 * len(miniature.WORDINGS)  # every order
    words = {word for caption in captions for word in caption.replace(",", " ").replace(".", " ").split()}
    assert {"circle", "ring", "stripes"} <= words and not words & set(CLASSES) - {"circle", "ring", "stripes"}
    assert not words & {"left", "right", "top", "bottom", "above", "below", "under", "beside", "center", "corner"}


def test_the_sets_share_no_drawing():
    seeds = [*miniature.SEEDS.values()][:-1] + [miniature.SEEDS["training"] + seed for seed in range(20)]
    generators = [np.random.default_rng(seed) for seed in seeds]
    drawings = [draw_scene(random)[0].tobytes() for random in generators for _ in range(3)]
    assert len(set(drawings)) == len(drawings) == 3 * len(set(seeds))


@pytest.mark.parametrize("table", miniature.TABLES)
def test_every_row_trains_a_system_of_its_own(table):
    systems = []
    for options, _ in miniature.TABLES[table].values():
        settings = {key: value for key, value in options.items() if key in Settings.__annotations__}
        assert options["prompting"] in PROMPTING and {*options} - {*settings} <= {*vars(Recipe()), "labels", "times"}
        resolve(Settings(**settings), PRESETS["tiny"])  # refuses settings without effect
        systems.append(json.dumps(options, sort_keys=True))
    assert len(set(systems)) == len(systems)


def test_runs_are_paired_and_not_repeated(tmp_path, monkeypatch):
    calls = []

    def fake_run(out, options, seed, scored_on, iterations):
        calls.append((options, seed, scored_on))
        return {"miou": 10 * seed + 3 * (options.get("gamma") == 1.0) + 0.1 * seed * ("learn_gamma" in options)}

    monkeypatch.setattr(miniature, "run", fake_run)
    records = miniature.run_table(tmp_path, "gamma", seeds=3, iterations=5)
    assert len(calls) == 9 and {scored_on for _, _, scored_on in calls} == {"validation"}
    assert [record["seed"] for record in records["fixed at 1e-4"]] == [0, 1, 2]
    assert (
        miniature.run_table(tmp_path, "gamma", seeds=4, iterations=5)["learned from 1.0"][:3]
        == records["learned from 1.0"]
    )
    assert len(calls) == 12  # one seed more
    text = miniature.format_records("gamma", records)
    assert "| learned from 1e-4 | 10.0 ± 5.8 |" in text  # 0, 10, 20
    assert "| fixed at 1e-4 | +0.1 ± 0.1 |" in text  # 0, 0.1, 0.2: not beyond twice its error
    assert "| learned from 1.0 | **+3.0 ± 0.0** | **+2.9 ± 0.1** |" in text
    miniature.plot(records, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000


def test_mean_and_standard_error():
    mean, error = miniature.mean_and_error([1.0, 2.0, 3.0, 4.0])
    assert mean == 2.5 and error == pytest.approx(np.std([1, 2, 3, 4], ddof=1) / 2)
    assert math.isnan(miniature.mean_and_error([1.0])[1])


@pytest.mark.slow
def test_a_short_pretraining_beats_chance_in_retrieval(tmp_path):
    miniature.pretrain(tmp_path / "clip.pt", steps=150, drawings=1_500, batch_size=32)
    found = miniature.retrieval(tmp_path / "clip.pt", number=100)  # by load_clip, encode_image, encode_text
    assert found["recall@1, chance"] == 1
    assert found["recall@1, image to text"] > 5 and found["recall@1, text to image"] > 5


def test_the_walkthrough_has_its_outputs_and_is_small():
    notebook = nbformat.read(ROOT / "walkthrough.ipynb", as_version=4)
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]
    assert sum(any("image" in kind for kind in output.get("data", {})) for output in outputs) >= 5
    text = "".join(cell.source for cell in notebook.cells)
    assert all(f"## Eq. ({number})" in text or f"Eqs. (5) and ({number})" in text for number in (1, 2, 3, 6, 7))
    assert (ROOT / "walkthrough.ipynb").stat().st_size < 1_000_000


@pytest.mark.slow
def test_the_walkthrough_runs(tmp_path):
    """Every cell, with fewer steps."""
    notebook = nbformat.read(ROOT / "walkthrough.ipynb", as_version=4)
    fewer = {"steps=400": "steps=20", "drawings=2_000": "drawings=64", "iterations=480": "iterations=4"}
    fewer |= {"warmup=48": "warmup=0", "runs/walkthrough": str(tmp_path), "train=32, val=20": "train=8, val=5"}
    for old, new in fewer.items():
        assert any(old in cell.source for cell in notebook.cells), old
        for cell in notebook.cells:
            cell.source = cell.source.replace(old, new)
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(ROOT)}}).execute()
