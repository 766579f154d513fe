"""Widgets in a real browser: in a static page, in an exported page, and live in JupyterLab.

In each form a slider is moved; the picture must change, and no request may leave the machine.
"""

import functools
import importlib.util
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlparse

import nbformat
import numpy as np
import pytest

from trajbook.core import TrajbookError, rng
from trajbook.widgets import (
    COMMON_JS,
    FILL_JS,
    PLOTLY,
    WIDGET_VIEW,
    MaskReconstruction,
    TrajectoryViewer,
    linear_fill,
    pack,
    save_html,
    static_html,
    to_static,
    unpack,
)

ROOT = Path(__file__).resolve().parents[1]
CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update",
    "--enable-unsafe-swiftshader",
]  # fmt: skip
browser_only = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="skipped: no chromium (apt-get install chromium)"),
]


def examples() -> tuple[TrajectoryViewer, MaskReconstruction]:
    walk = rng(0, "walk").standard_normal((200, 3)).cumsum(0)
    truth = rng(1, "truth").standard_normal((60, 2)).cumsum(0)
    cases = {}
    for kind, length in (("steps", 1), ("blocks", 10)):
        for ratio in (0.2, 0.5, 0.8):
            mask = np.isin(np.arange(60) // length, np.arange(0, 60, 3)) | (
                np.arange(60) < 60 * ratio / 2
            )
            cases[kind, ratio] = (mask, {"model": truth + 0.1 * ratio, "hermite": truth - 0.2})
    return TrajectoryViewer({"walk": walk}, title="a walk"), MaskReconstruction(truth, cases, "ab")


@pytest.fixture(scope="module")
def browser():
    api = pytest.importorskip("playwright.sync_api", reason="skipped: no playwright (make setup)")
    with api.sync_playwright() as play:
        instance = play.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield instance
        instance.close()


@pytest.fixture
def page(browser):
    "A page that notes errors and every request to another host."
    page = browser.new_page(viewport={"width": 900, "height": 1000})
    page.foreign, page.errors = [], []

    def note(request) -> None:
        where = urlparse(request.url)
        if where.scheme in ("http", "https", "ws", "wss") and where.hostname not in (
            "127.0.0.1",
            "localhost",
        ):
            page.foreign.append(request.url)

    page.on("request", note)
    page.on("pageerror", lambda error: page.errors.append(str(error)))
    yield page
    page.close()


@pytest.fixture
def serve(tmp_path):
    "A web server on this machine for the files of `tmp_path`."

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args) -> None:
            pass

    handler = functools.partial(Quiet, directory=str(tmp_path))
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()


def picture(page, number: int) -> str:
    return page.evaluate(f"document.querySelectorAll('.tb canvas')[{number}].toDataURL()")


def background(page) -> str:
    return page.evaluate("getComputedStyle(document.querySelector('.tb')).backgroundColor")


def play_with_both(page) -> None:
    "Move every control of both widgets with the keyboard and the mouse; each must change the picture."
    page.wait_for_selector(".tb canvas >> nth=1", timeout=60_000)
    page.wait_for_function(
        "[...document.querySelectorAll('.tb canvas')].every((c) => c.width > 300)"
    )
    time_slider, share_slider = page.locator(".tb input[type=range]").all()
    clock = page.locator(".tb .bar output").first
    before, at = picture(page, 0), clock.inner_text()
    time_slider.focus()
    for _ in range(5):
        page.keyboard.press("ArrowRight")
    page.wait_for_function(f"document.querySelector('.tb .bar output').textContent !== {at!r}")
    moved = picture(page, 0)
    assert moved != before and clock.inner_text() != at
    canvas = page.locator(".tb canvas").first
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    page.mouse.move(box["x"] + 200, box["y"] + 100)
    page.mouse.down()
    page.mouse.move(box["x"] + 320, box["y"] + 140, steps=4)
    page.mouse.up()
    turned = picture(page, 0)
    assert turned != moved
    canvas.focus()
    page.keyboard.press("Home")
    assert picture(page, 0) == moved
    holes, error = picture(page, 1), page.locator("[data-error=model]")
    first = error.inner_text()
    share_slider.focus()
    page.keyboard.press("ArrowRight")
    page.wait_for_function(
        f"document.querySelector('[data-error=model]').textContent !== {first!r}"
    )
    more = picture(page, 1)
    assert more != holes and error.inner_text() != first
    page.locator(".tb select").select_option(label=page.locator(".tb option").last.inner_text())
    assert picture(page, 1) != more
    assert page.foreign == [] and page.errors == []


def load_docs():
    pytest.importorskip("nbdev", reason="skipped: nbdev is not installed (make setup)")
    spec = importlib.util.spec_from_file_location("docs", ROOT / "tools" / "docs.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class TestState:
    "What needs no browser."

    def test_the_chapter_keeps_the_state_of_its_widgets(self):
        text = (ROOT / "nbs" / "09_widgets.ipynb").read_text(encoding="utf-8")
        views = [o for c in json.loads(text)["cells"] for o in c.get("outputs", [])
                 if WIDGET_VIEW in o.get("data", {})]  # fmt: skip
        static = to_static(json.loads(text))
        blocks = [o["data"].get("text/markdown", "") for c in static["cells"] for o in c.get("outputs", [])
                  if "data" in o]  # fmt: skip
        assert len(views) == 2 == sum("trajbook-widget" in "".join(b) for b in blocks)

    def test_cleaning_keeps_the_state_of_widgets(self, tmp_path):
        copy = tmp_path / "nbs" / "09_widgets.ipynb"
        copy.parent.mkdir()
        shutil.copy(ROOT / "nbs" / "09_widgets.ipynb", copy)
        shutil.copy(ROOT / "settings.ini", tmp_path)
        clean = Path(sys.executable).parent / "nbdev_clean"
        if not clean.exists():
            pytest.skip("skipped: nbdev is not installed (make setup)")
        subprocess.run([clean, "--fname", copy], cwd=tmp_path, check=True)
        assert nbformat.read(copy, 4).metadata.widgets == nbformat.read(
            ROOT / "nbs" / "09_widgets.ipynb", 4
        ).metadata.widgets  # fmt: skip

    def test_a_widget_of_the_mae_part_is_small(self):
        walk = rng(2, "size").standard_normal((250, 5)).cumsum(0)
        cases = {}
        for kind in ("steps", "patches", "blocks"):
            for ratio in (0.25, 0.5, 0.75, 0.9):
                mask = rng(kind, int(100 * ratio)).random(250) < ratio
                cases[kind, ratio] = (mask, {"model": walk, "hermite": walk})
        widget = MaskReconstruction(walk, cases, [*"abcde"])
        viewer = TrajectoryViewer({str(n): walk[:, :3] for n in range(6)}, max_points=2000)
        assert len(static_html(widget.get_state())) < 300_000
        assert len(static_html(viewer.get_state())) < 300_000

    @pytest.mark.parametrize("bad", [np.full((9, 3), np.nan), np.zeros((1, 3)), np.zeros((9, 2))])
    def test_bad_trajectories_are_refused(self, bad):
        with pytest.raises(TrajbookError):
            TrajectoryViewer({"bad": bad})

    def test_two_copies_of_a_widget_have_two_names(self):
        state = examples()[0].get_state()
        view = {
            "output_type": "display_data",
            "metadata": {},
            "data": {WIDGET_VIEW: {"model_id": "m"}},
        }
        cells = [{"cell_type": "code", "source": "", "outputs": [dict(view), dict(view)]}]
        kind = "application/vnd.jupyter.widget-state+json"
        metadata = {"widgets": {kind: {"state": {"m": {"state": state}}}}}
        static = to_static({"cells": cells, "metadata": metadata})
        names = re.findall(r'<div id="(tb-\w+)"', json.dumps(static).replace('\\"', '"'))
        assert len(names) == len(set(names)) == 2


class TestBrowser:
    pytestmark = browser_only

    def test_javascript_and_python_compute_the_same(self, page):
        values = rng(3, "js").standard_normal((40, 3)).cumsum(0)
        mask = rng(4, "js").random(40) < 0.7
        page.goto("about:blank")
        call = "unpack(p), T = 40, D = 3; return [[...values], [...ruler(values, mask, T, D)]]"
        code = f"(([p, mask]) => {{ {COMMON_JS} {FILL_JS} const values = {call}; }})"
        seen, filled = page.evaluate(code, [pack(values), mask.astype(int).tolist()])
        assert np.allclose(np.reshape(seen, (40, 3)), unpack(pack(values)))
        assert np.allclose(np.reshape(filled, (40, 3)), linear_fill(unpack(pack(values)), mask))

    def test_a_file_opened_from_disk(self, page, tmp_path):
        path = save_html(examples()[0], tmp_path / "walk.html")
        page.goto(path.as_uri())
        page.wait_for_function("document.querySelector('.tb canvas')?.width > 300")
        assert page.foreign == [] and page.errors == []

    @pytest.mark.parametrize(
        "color, card", [("#101214", "rgb(22, 25, 29)"), ("#fff", "rgb(255, 255, 255)")]
    )
    def test_it_follows_the_theme_of_the_page(self, page, tmp_path, color, card):
        path = save_html(examples()[0], tmp_path / "walk.html")
        path.write_text(path.read_text().replace("<body>", f'<body style="background:{color}">'))
        page.goto(path.as_uri())
        drawn = "document.querySelector('.tb canvas')?.width > 300"
        page.wait_for_function(drawn)
        assert background(page) == card

    def test_it_follows_the_choice_of_the_reader(self, page, tmp_path):
        "A page that is not painted: the widget goes dark at the moment when the reader does."
        page.goto(save_html(examples()[1], tmp_path / "holes.html").as_uri())
        page.wait_for_function("document.querySelector('.tb canvas')?.width > 300")
        light = background(page), picture(page, 0)
        page.emulate_media(color_scheme="dark")
        page.wait_for_function("document.querySelector('.tb').style.colorScheme === 'dark'")
        assert background(page) != light[0] and picture(page, 0) != light[1]

    def test_narrow_screen(self, page, tmp_path):
        "On a telephone nothing is cut off, and the widget draws again when it is turned."
        for number, widget in enumerate(examples()):
            page.set_viewport_size({"width": 340, "height": 700})
            page.goto(save_html(widget, tmp_path / f"{number}.html").as_uri())
            page.wait_for_function("document.querySelector('.tb canvas')?.width > 100")
            assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
            narrow = page.evaluate("document.querySelector('.tb canvas').width")
            page.set_viewport_size({"width": 700, "height": 340})
            page.wait_for_function(f"document.querySelector('.tb canvas').width > {narrow} + 200")

    def test_keyboard_alone(self, page, tmp_path):
        "Every control is reached by the tab key, and every key does something."
        page.goto(save_html(examples()[0], tmp_path / "walk.html").as_uri())
        page.wait_for_function("document.querySelector('.tb canvas')?.width > 300")
        reached, seen = [], [picture(page, 0)]
        for _ in range(4):
            page.keyboard.press("Tab")
            reached.append(
                page.evaluate("document.activeElement.type ?? document.activeElement.tagName")
            )
        assert reached == ["CANVAS", "button", "range", "checkbox"]
        page.locator(".tb canvas").focus()
        for key in ("-", "ArrowLeft", "ArrowUp", "+", "ArrowRight", "Home"):
            page.keyboard.press(key)
            seen.append(picture(page, 0))
        assert len(set(seen[:-1])) == 6 and seen[-1] == seen[0]
        page.locator(".tb input[type=checkbox]").focus()
        page.keyboard.press("Space")
        assert picture(page, 0) != seen[0], "the curve is still there"
        page.locator(".tb button").press("Enter")
        page.wait_for_function("document.querySelector('.tb button').textContent === 'pause'")
        page.keyboard.press("Enter")
        assert page.locator(".tb button").inner_text() == "play"

    def test_static_page(self, page, tmp_path, serve):
        "The raw blocks that the docs build hands to Quarto, in a page of their own."
        notebook = json.loads((ROOT / "nbs" / "09_widgets.ipynb").read_text(encoding="utf-8"))
        outputs = [
            o["data"]
            for c in to_static(notebook)["cells"]
            for o in c.get("outputs", [])
            if "data" in o
        ]
        blocks = ["".join(d.get("text/markdown", "")) for d in outputs]
        html = [
            b.split("\n", 1)[1].rsplit("``````", 1)[0]
            for b in blocks
            if b.startswith("``````{=html}")
        ]
        (tmp_path / "page.html").write_text("<!doctype html><body>" + "\n".join(html) + "</body>")
        page.goto(serve + "page.html")
        play_with_both(page)

    def test_exported_page(self, page, tmp_path, serve):
        "nbconvert through tools/docs.py --export."
        shutil.copy(ROOT / "nbs" / "09_widgets.ipynb", tmp_path)
        page_path = load_docs().export(tmp_path / "09_widgets.ipynb")
        page.goto(serve + page_path.name)
        play_with_both(page)

    def test_plotly_slider_on_a_static_page(self, page, tmp_path, serve):
        "The frames of a 3D figure move with its slider, from a local copy of plotly."
        shutil.copy(ROOT / "nbs" / "08_viz.ipynb", tmp_path)
        notebook = json.loads((tmp_path / "08_viz.ipynb").read_text(encoding="utf-8"))
        kinds = [
            k for c in notebook["cells"] for o in c.get("outputs", []) for k in o.get("data", {})
        ]
        assert PLOTLY in kinds
        page.goto(serve + load_docs().export(tmp_path / "08_viz.ipynb").name)
        page.wait_for_selector(
            ".trajbook-plotly .slider-rail-touch-rect", state="attached", timeout=60_000
        )
        figure = "document.querySelector('.trajbook-plotly')"
        page.wait_for_function(f"{figure}._transitionData?._frames.length === 50")
        head = f"[...{figure}._fullData.at(-1).z].join()"
        before = page.evaluate(head)
        rail = page.locator(".trajbook-plotly .slider-rail-touch-rect")
        rail.scroll_into_view_if_needed()
        box = rail.bounding_box()
        page.mouse.click(box["x"] + 0.8 * box["width"], box["y"] + box["height"] / 2)
        page.wait_for_function(f"{head} !== {before!r}")
        assert page.foreign == [] and page.errors == []

    def test_live_jupyterlab(self, page, tmp_path):
        "Run the cells in JupyterLab; the slider talks to Python."
        pytest.importorskip("jupyterlab", reason="skipped: no jupyterlab (make setup)")
        lines = ["import sys", f"sys.path.insert(0, {str(ROOT / 'tests')!r})",
                 "from test_widgets import examples", "viewer, holes = examples()"]  # fmt: skip
        sources = ["\n".join(lines), "viewer", "holes"]
        nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(s) for s in sources])
        nb.metadata["kernelspec"] = {
            "name": "python3",
            "display_name": "python3",
            "language": "python",
        }
        nbformat.write(nb, tmp_path / "live.ipynb")
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        base = f"http://127.0.0.1:{port}"
        command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ip=127.0.0.1",
                   f"--port={port}", "--IdentityProvider.token=", "--ServerApp.password=",
                   f"--ServerApp.root_dir={tmp_path}", "--LabApp.news_url=None", "--expose-app-in-browser",
                   "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate"]  # fmt: skip
        home = {
            k: str(tmp_path / k) for k in ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "IPYTHONDIR")
        }
        with (tmp_path / "lab.log").open("w") as log:
            server = subprocess.Popen(command, env=os.environ | home, stdout=log, stderr=log)
        try:
            for _ in range(300):
                try:
                    urllib.request.urlopen(f"{base}/api/status", timeout=1).close()
                    break
                except OSError:
                    assert server.poll() is None, (tmp_path / "lab.log").read_text()[-2000:]
                    time.sleep(0.2)
            page.goto(f"{base}/lab/tree/live.ipynb")
            context = "window.jupyterapp?.shell.currentWidget?.sessionContext"
            page.wait_for_function(f"{context}?.isReady", timeout=60_000)
            page.wait_for_function(f"{context}.session?.kernel?.status === 'idle'", timeout=60_000)
            page.evaluate("window.jupyterapp.commands.execute('notebook:run-all-cells')")
            play_with_both(page)
            value = page.evaluate(
                """async () => {
                  const panel = window.jupyterapp.shell.currentWidget, kernel = panel.sessionContext.session.kernel;
                  const run = kernel.requestExecute({ code: "print(viewer.step, holes.ratio)" });
                  let text = "";
                  run.onIOPub = (m) => { if (m.header.msg_type === "stream") text += m.content.text; };
                  await run.done;
                  return text;
                }"""
            )
            assert value.split() == [str(199 // 3 + 5), "2"], "Python does not know the slider"
        finally:
            server.terminate()
            server.wait(20)
