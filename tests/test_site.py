"""The site: nbdev's processing of every notebook, links, sidebar, no foreign hosts, one first screen."""

import contextlib
import importlib.util
import io
import json
import re
import shutil
from pathlib import Path

import pytest

from trajbook.run import load_claims

pytest.importorskip("nbdev", reason="skipped: nbdev is not installed (make setup)")

ROOT = Path(__file__).resolve().parents[1]
NBS = sorted(p for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)


def load_docs():
    "tools/docs.py as a module."
    spec = importlib.util.spec_from_file_location("docs", ROOT / "tools" / "docs.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def docs(tmp_path_factory):
    "tools/docs.py with every notebook processed into a temporary folder."
    module, folder = load_docs(), tmp_path_factory.mktemp("site")
    module.PROC, module.DOCS = folder / "_proc", folder / "_docs"
    module.process()
    return module


def processed(docs, name: str) -> dict:
    return json.loads((docs.PROC / name).read_text(encoding="utf-8"))


def test_every_notebook_is_processed(docs):
    names = [p.relative_to(ROOT / "nbs") for p in NBS]
    assert names and all((docs.PROC / name).exists() for name in names)
    assert (docs.PROC / "_quarto.yml").read_text() == (ROOT / "_quarto.yml").read_text()
    assert (docs.PROC / "assets" / "trajbook.png").exists()


@pytest.mark.parametrize("name", [p.relative_to(ROOT / "nbs").as_posix() for p in NBS])
def test_a_page_has_a_title_its_code_and_no_directives(docs, name):
    cells = processed(docs, name)["cells"]
    assert cells[0]["cell_type"] == "raw" and "title:" in "".join(cells[0]["source"])
    # Quarto joins the lines of one long string without their ends: tables and lists fall together.
    assert all(isinstance(c["source"], list) for c in cells if c["cell_type"] == "markdown")
    code = "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "code")
    assert not re.search(r"#\s*\|\s*(export|hide|default_exp)", code)
    source = json.loads((ROOT / "nbs" / name).read_text(encoding="utf-8"))
    for cell in source["cells"]:
        text = "".join(cell["source"])
        if cell["cell_type"] == "code" and text.startswith("#| export\n") and "\ndef " in text:
            first = next(line for line in text.split("\n") if line.startswith("def "))
            assert first in code, "exported code is missing from its page"


@pytest.mark.parametrize("name", [p.relative_to(ROOT / "nbs").as_posix() for p in NBS])
def test_outputs_need_no_kernel_and_no_other_host(docs, name):
    outputs = [o for c in processed(docs, name)["cells"] for o in c.get("outputs", [])]
    kinds = {kind for o in outputs for kind in o.get("data", {})}
    assert not kinds & {"text/html", "application/vnd.plotly.v1+json"}
    assert not [kind for kind in kinds if "widget" in kind]
    assert "widgets" not in processed(docs, name)["metadata"]
    assert not re.search(r"<script[^>]+src=\\?[\"'](https?:)?//", json.dumps(outputs))


def test_links_of_processed_pages_lead_somewhere(docs):
    assert docs.broken_links(docs.PROC) == []


def test_a_broken_link_is_found(docs, tmp_path):
    cells = [{"cell_type": "markdown", "source": ["[a](nowhere.ipynb) [b](#here) `[c](no.md)`"]}]
    (tmp_path / "page.ipynb").write_text(json.dumps({"cells": cells}))
    assert docs.broken_links(tmp_path) == ["page.ipynb: nowhere.ipynb"]


def test_the_sidebar_names_every_notebook(docs):
    named = docs.sidebar()
    assert sorted(named) == sorted(p.relative_to(ROOT / "nbs").as_posix() for p in NBS)
    assert len(named) == len(set(named))


def test_quarto_reads_one_configuration():
    link = ROOT / "nbs" / "_quarto.yml"
    assert link.read_text() == (ROOT / "_quarto.yml").read_text()
    assert "_quarto.yml" in {p.name for p in ROOT.iterdir()}


@pytest.fixture(scope="module")
def plain(docs):
    "What `make docs` prints and writes where Quarto is missing."
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(said):
        patch.setattr(docs, "process", lambda: None)  # the fixture `docs` did it
        patch.setattr(docs.shutil, "which", lambda name: None)
        patch.setattr(docs.sys, "argv", ["docs.py"])
        docs.main()
    return said.getvalue()


def page_text(docs, name: str) -> str:
    return (docs.DOCS / name).read_text(encoding="utf-8")


def test_without_quarto_it_says_how_to_get_it(plain):
    assert 'pip install "trajbook[docs]"' in plain and f"{len(NBS)} pages in _docs/" in plain


def test_plain_pages_ask_no_other_host(docs, plain):
    built = sorted(docs.DOCS.rglob("*.html"))
    assert len(built) == len(NBS)
    assert docs.foreign_hosts(docs.DOCS) == []
    names = {p.relative_to(docs.DOCS).as_posix() for p in built}
    assert {"index.html", "widgets.html", "book/claims.html"} <= names
    index = page_text(docs, "index.html")
    assert 'href="book/claims.html"' in index and not re.search(r'href="[^"]*\.ipynb', index)
    assert (
        len(
            re.findall(
                r'<div id="tb-\w+" class="trajbook-widget">', page_text(docs, "widgets.html")
            )
        )
        == 2
    )
    assert "prefers-color-scheme: dark" in page_text(docs, "assets/plain.css")


@pytest.mark.parametrize("name", [p.relative_to(ROOT / "nbs").as_posix() for p in NBS])
def test_formulas_are_drawn(docs, plain, name):
    "No page shows TeX to its reader; matplotlib must know every formula."
    file = docs.front_matter(processed(docs, name))["output-file"]
    html = page_text(docs, str(Path(name).with_name(file)))
    prose = re.sub(r"<(pre|code|script|svg)\b.*?</\1>", "", html, flags=re.S)
    assert "$" not in prose and "\\" not in prose
    tex = re.findall(r'<svg class="tex[^>]*aria-label="([^"]*)"', html)
    cells = [c for c in processed(docs, name)["cells"] if c["cell_type"] == "markdown"]
    text = re.sub(
        r"```.*?```|`[^`\n]*`", "", "\n".join("".join(c["source"]) for c in cells), flags=re.S
    )
    assert len(tex) == len(re.findall(r"\$\$.+?\$\$|\$[^$\n]+\$", text, flags=re.S))


def test_a_foreign_host_is_found(docs, tmp_path):
    page = '<script src="https://a.b/x.js"></script><a href="https://c.d">fine</a>'
    (tmp_path / "page.html").write_text(page + '<link rel="stylesheet" href="//e.f/x.css">')
    (tmp_path / "x.css").write_text("@import url(https://fonts.example.org/x);")
    assert len(docs.foreign_hosts(tmp_path)) == 3


@pytest.mark.skipif(shutil.which("quarto") is None, reason="skipped: no quarto")
def test_quarto_renders_every_page(docs):
    docs.render()
    built = {p.relative_to(docs.DOCS).as_posix() for p in docs.DOCS.rglob("*.html")}
    assert {"index.html", "widgets.html", "mae/model.html", "book/claims.html"} <= built
    assert docs.foreign_hosts(docs.DOCS) == []
    assert "trajbook-widget" in (docs.DOCS / "widgets.html").read_text(encoding="utf-8")
    index = (docs.DOCS / "index.html").read_text(encoding="utf-8")
    assert "<table" in index and "<pre" in index


def prose_of(name: str) -> str:
    "All prose of a notebook."
    cells = json.loads((ROOT / "nbs" / name).read_text(encoding="utf-8"))["cells"]
    return "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")


README = (ROOT / "README.md").read_text(encoding="utf-8")
INDEX = prose_of("index.ipynb")


def commands(text: str) -> list[str]:
    "The make commands of a first screen."
    return re.findall(r"^make \w+", text, re.M)


def test_readme_and_index_show_the_same_commands():
    assert commands(README)[:3] == commands(INDEX) == ["make book", "make test", "make lab"]
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for command in {*commands(README), *commands(INDEX)}:
        assert re.search(rf"^{command.split()[1]}:", makefile, re.M), f"no target for {command}"


def test_readme_and_index_show_the_same_picture():
    pictures = [re.findall(r"!\[(.+?)\]\((.+?)\)", text) for text in (README, INDEX)]
    assert len(pictures[0]) == len(pictures[1]) == 1
    (said, path), (said_too, path_too) = pictures[0][0], pictures[1][0]
    assert said == said_too and path == f"nbs/{path_too}" and (ROOT / path).exists()


def tree(text: str) -> str:
    return re.search(r"```text\n(nbs/.*?)```", text, re.S)[1]


def test_readme_and_index_show_the_same_tree():
    "Sentence, picture, commands, tree: in this order, and the tree names what there is."
    assert tree(README) == tree(INDEX)
    order = [README.index(part) for part in ("An executable", "![", "make book", "```text")]
    assert order == sorted(order) and order[-1] < 2500
    inside = ROOT
    for line in tree(README).splitlines():
        indent, name = re.match(r"( *)(\S+)", line).groups()
        inside = ROOT if not indent else ROOT / "nbs" if len(indent) == 2 else inside
        path = inside / (name if name.endswith("/") else f"{name}.ipynb")
        assert path.exists() or name == "runs/", f"the tree names {name}"
        inside = path if name.endswith("/") else inside
    methods = {p.parent.name for p in NBS if p.parent != ROOT / "nbs"}
    assert {f"{m}/" for m in methods} <= set(tree(README).split())


def test_readme_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / target).exists(), f"README links to {target}"


def run_cells(name: str) -> dict:
    "The names that a page's cells define."
    cells = json.loads((ROOT / "nbs" / name).read_text(encoding="utf-8"))["cells"]
    found = {}
    for cell in cells:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), found)
    return found


@pytest.fixture
def published(tmp_path, monkeypatch):
    "An invented result with a number for every claim."
    monkeypatch.setenv("TRAJBOOK_RESULTS", str(tmp_path))
    metrics = {c["key"]: {"value": 1234.5, "unit": "1", "ci95": [1230.0, 1239.0], "better": None}
               for c in load_claims() if c.get("key")}  # fmt: skip
    hardware = {"cpu": "a processor", "cores": 2, "memory_gb": 8, "gpu": None}
    made = {
        "commit": "0" * 40,
        "code_hash": "old",
        "hardware": hardware,
        "threads": 1,
        "seeds": [0],
    }
    made |= {"command": "trajbook run mae", "wall_s": 60.0, "cpu_s": 60.0, "peak_rss_mb": 900.0}
    made |= {"date": "2026-01-01", "versions": {"torch": "2"}, "peak_gpu_mb": 0.0}
    for method, preset in {(c["method"], c["preset"]) for c in load_claims() if c.get("key")}:
        result = {"method": method, "preset": preset, "name": preset, "metrics": metrics}
        result |= {"provenance": made}
        (tmp_path / method).mkdir(exist_ok=True)
        (tmp_path / method / f"{preset}-cpu.json").write_text(json.dumps(result))


def test_claims_without_a_published_run_are_open(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TRAJBOOK_RESULTS", str(tmp_path))
    page = run_cells("book/claims.ipynb")
    keyed = [c for c in page["claims"] if c.get("key")]
    assert keyed and all("no published run" in page["number"](c) for c in keyed)
    assert {page["verdict"](c) for c in keyed} == {"open"}
    assert "trajbook publish" in page["lines"][0]


def test_claims_show_the_published_number(published, capsys):
    page = run_cells("book/claims.ipynb")
    keyed = [c for c in page["claims"] if c.get("key")]
    assert all(page["number"](c).startswith("1,234.5 ± 4.5<br>") for c in keyed)
    assert all("(stale)" in page["number"](c) for c in keyed)
    assert [page["verdict"](c) for c in keyed] == [c["status"] for c in keyed]
    assert "Stale" in page["lines"][0]


def test_hardware_lists_published_runs(published):
    page = run_cells("book/hardware.ipynb")
    assert page["row"](page["results"][0])[1] == "a processor, 2 cores"
    assert "stale" in page["row"](page["results"][0])[0]
