"""The site: nbdev's processing of every notebook, links, sidebar, no foreign hosts, one first screen."""

import importlib.util
import json
import re
import shutil
from pathlib import Path

import pytest

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


def test_plain_pages_ask_no_other_host(docs):
    docs.plain()
    built = sorted(docs.DOCS.rglob("*.html"))
    assert len(built) == len(NBS)
    assert docs.foreign_hosts(docs.DOCS) == []
    names = {p.relative_to(docs.DOCS).as_posix() for p in built}
    assert {"index.html", "widgets.html", "book/claims.html"} <= names
    index = (docs.DOCS / "index.html").read_text(encoding="utf-8")
    assert 'href="book/claims.html"' in index and not re.search(r'href="[^"]*\.ipynb', index)


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


def commands(text: str) -> list[str]:
    "The make commands of a first screen."
    return re.findall(r"^make \w+", text, re.M)


def test_readme_and_index_show_the_same_commands():
    index = json.loads((ROOT / "nbs" / "index.ipynb").read_text(encoding="utf-8"))
    prose = "\n".join("".join(c["source"]) for c in index["cells"])
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert commands(readme)[:3] == commands(prose)[:3] == ["make book", "make test", "make lab"]
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for command in {*commands(readme), *commands(prose)}:
        assert re.search(rf"^{command.split()[1]}:", makefile, re.M), f"no target for {command}"


def test_readme_names_only_what_exists():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)\)", readme):
        assert (ROOT / target).exists(), f"README links to {target}"
    tree = readme.split("```")[3]
    for folder in re.findall(r"^(\w+)/ ", tree, re.M):
        assert folder == "runs" or (ROOT / folder).is_dir(), f"README names {folder}/"
    for folder in re.findall(r"^  (\w+)/ ", tree, re.M):
        assert (ROOT / "nbs" / folder).is_dir(), f"README names nbs/{folder}/"
