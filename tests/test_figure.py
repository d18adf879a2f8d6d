"""experiments/figure.py: the committed figure is what the script draws; it has every equation and names of the code."""

import re
from pathlib import Path
from xml.etree import ElementTree

from experiments.figure import BOXES, FIGURE, draw

ROOT = Path(__file__).resolve().parents[1]


def test_committed_figure_is_what_the_script_draws():
    assert FIGURE.read_text(encoding="utf-8") == draw()


def test_figure_has_every_equation_and_names_of_the_code():
    texts = [element.text for element in ElementTree.fromstring(draw()).iter() if element.tag.endswith("text")]
    assert all(any(f"Eq. ({number})" in text for text in texts) for number in range(1, 8))
    code = (ROOT / "denseclip.py").read_text(encoding="utf-8")
    for *_, title, name in (box[:7] for box in BOXES.values()):
        assert {title, name} <= set(texts) and set(re.findall(r"\w+", name)) <= set(re.findall(r"\w+", code)), name
