"""The expert viewer and the server's page, in a real browser, without any other host."""

import json
import os
import subprocess
import sys
import time
import urllib.request

import numpy as np
import pytest
import torch
from test_widgets import CHROMIUM, browser, page, serve  # noqa: F401

from trajbook.checkpoint import save_checkpoint
from trajbook.moe.data import FAMILIES, DataConfig, ModelConfig, make_motions
from trajbook.moe.experts import ExpertViewer
from trajbook.moe.model import MoEForecaster, describe
from trajbook.widgets import save_html

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="skipped: no chromium (apt-get install chromium)"),
]


def picture(page, selector: str) -> str:  # noqa: F811
    return page.evaluate(f"document.querySelector('{selector}').toDataURL()")


def test_the_expert_viewer_works_without_python(page, serve, tmp_path):  # noqa: F811
    made = make_motions(FAMILIES, np.arange(5), DataConfig().time_s, 3, np.random.default_rng(0))
    draw = np.random.default_rng(1)
    gates = {n: draw.dirichlet(np.ones(4), (2, 16)) for n in FAMILIES}
    paths = dict(zip(FAMILIES, made.position, strict=True))
    usage = draw.dirichlet(np.ones(4), (2, 5))
    viewer = ExpertViewer(paths, gates, usage, FAMILIES, context=128, dt_s=0.01, title="experts")
    save_html(viewer, tmp_path / "viewer.html")
    page.goto(serve + "viewer.html")
    page.wait_for_function("document.querySelector('.tb canvas')?.width > 300")
    shown = [float(t) for t in page.locator(".tb [data-expert]").all_inner_texts()]
    token = gates["helix"][0, 8]  # the slider starts in the middle of the context
    np.testing.assert_allclose(shown, token, atol=0.006)
    before = picture(page, ".tb canvas")
    page.locator(".tb input[type=range]").focus()
    for _ in range(10):
        page.keyboard.press("ArrowRight")
    assert picture(page, ".tb canvas") != before
    page.select_option(".tb select >> nth=1", "1")
    page.select_option(".tb select >> nth=0", "3")
    shown = [float(t) for t in page.locator(".tb [data-expert]").all_inner_texts()]
    np.testing.assert_allclose(shown, gates["lorenz"][1, 9], atol=0.006)
    cells = page.locator(".tb td").all_inner_texts()
    np.testing.assert_allclose([float(c) for c in cells], usage[1].ravel(), atol=0.006)
    assert not page.errors and not page.foreign


@pytest.fixture
def address(tmp_path):
    "A running server with a small forecaster."
    torch.manual_seed(0)
    model = MoEForecaster(ModelConfig(d_model=32, n_heads=2, d_ff=32, head_width=32)).eval()
    extra = {"families": list(FAMILIES), "sampling_rate_hz": 100.0}
    save_checkpoint(tmp_path / "model", model, method="moe", extra=extra, **describe(model.config))
    url = f"http://127.0.0.1:{24000 + os.getpid() % 2000}"
    code = "import sys; from trajbook.apps.cli import main; sys.exit(main())"
    words = [
        sys.executable,
        "-c",
        code,
        "serve",
        str(tmp_path / "model"),
        "--port",
        url.rpartition(":")[2],
    ]
    server = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    for _ in range(300):
        try:
            urllib.request.urlopen(f"{url}/ready", timeout=2)
            break
        except OSError:
            assert server.poll() is None, server.stderr.read()
            time.sleep(0.1)
    yield url
    server.terminate()
    server.communicate()


def test_a_person_tries_the_model_on_its_page(page, address):  # noqa: F811
    page.goto(address)
    page.wait_for_function("document.getElementById('said').textContent.includes('steps foretold')")
    assert "mean distance from what came" in page.inner_text("#said")
    assert page.locator("#weights output").count() == 6
    assert page.locator("#experts output").count() == 8
    before = picture(page, "#space")
    page.select_option("#pick", label="lorenz")
    page.wait_for_function("document.getElementById('said').textContent.includes('steps foretold')")
    page.wait_for_timeout(300)
    assert picture(page, "#space") != before
    page.fill("#points", "0, 0, 0\n0.1, 0, 0\n0.2, 0.1, 0")
    page.fill("#horizon", "5")
    page.select_option("#mode", "autoregressive")
    page.click("#go")
    page.wait_for_function(
        "document.getElementById('said').textContent.startsWith('5 steps foretold')"
    )
    page.fill("#points", "0, 0\n1, 1")
    page.click("#go")
    page.wait_for_function("document.getElementById('said').textContent.includes('422')")
    assert "coordinates" in page.inner_text("#said")
    turned = picture(page, "#space")
    page.focus("#space")
    page.keyboard.press("ArrowLeft")
    assert picture(page, "#space") != turned
    assert not page.errors and not page.foreign
    found = json.loads(urllib.request.urlopen(f"{address}/v1/examples").read())
    assert len(found["examples"]) == len(FAMILIES)
