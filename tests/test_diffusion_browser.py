"""The plan writer in a real browser, without Python and without any other host."""

import numpy as np
import pytest
import torch
from test_widgets import CHROMIUM, browser, page, serve  # noqa: F401

from trajbook.core import TrajbookError
from trajbook.masked_diffusion.data import (
    ModelConfig,
    TestWorlds,
    all_shortest_plans,
    corridor,
    task,
)
from trajbook.masked_diffusion.evaluate import Case
from trajbook.masked_diffusion.model import Planner
from trajbook.masked_diffusion.plans import PlanWriter, traces, writer_state
from trajbook.widgets import save_html

TestWorlds.__test__ = False  # not a test, whatever its name


@pytest.fixture(scope="module")
def found() -> dict:
    torch.manual_seed(0)
    model = Planner(ModelConfig(tasks=("many_plans",), d_model=32, n_heads=2, n_layers=1)).eval()
    w = corridor()(0, 30)
    best = all_shortest_plans(w, task("many_plans").actions)
    tests = TestWorlds(w, best.length, best.number, best.length)
    return traces(Case("many_plans", 0, tests, tests, None, 7), model, n=2)


def test_the_state_is_small_and_complete(found):
    state = writer_state(found, "plans")
    assert state["last"] == 16 and len(state["worlds"]) == 2
    for world in state["worlds"]:
        for trace in world["traces"]:
            assert len(trace["tokens"]) == len(trace["p"]) == 16
            assert len(trace["poses"]) >= 2 and trace["end"]
    many = {k: np.repeat(v, 200, 0) for k, v in found.items()}
    with pytest.raises(TrajbookError, match="fewer worlds"):
        writer_state(many)


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="skipped: no chromium (apt-get install chromium)")
def test_plans_appear_without_python(page, serve, found, tmp_path):  # noqa: F811
    save_html(PlanWriter(found, "plans"), tmp_path / "writer.html")
    page.goto(serve + "writer.html")
    page.wait_for_function("document.querySelector('.tb canvas')?.width > 300")
    canvas = page.locator(".tb canvas")

    def masked() -> int:
        return canvas.get_attribute("aria-label").count("?")

    slider, (world, order) = page.locator("input[type=range]"), page.locator("select").all()
    assert not page.errors, page.errors
    assert masked() == 8
    slider.fill("0")
    assert masked() == 16
    slider.fill("16")
    assert masked() == 0 and "solved" in page.locator("output").inner_text()
    before = canvas.evaluate("c => c.toDataURL()")
    order.select_option("2")
    slider.fill("5")
    words = canvas.get_attribute("aria-label").rpartition(": ")[2].split()
    assert "?" not in words[:5] and set(words[5:]) == {"?"}  # from left to right
    world.select_option("1")
    assert canvas.evaluate("c => c.toDataURL()") != before
    page.get_by_role("button", name="play").click()
    page.wait_for_function("document.querySelector('.tb input').value >= 7")
