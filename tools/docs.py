"""Build the site into _docs/ (`make docs`).

python tools/docs.py                      process every notebook, check links, render with Quarto
python tools/docs.py --plain              the same without Quarto: plain pages by nbconvert
python tools/docs.py --export NOTEBOOK    one notebook as one HTML page beside it, widgets included

Every page works without a network: widgets and plotly figures become HTML that computes in the
browser, and plotly itself is copied from the installed package. Without Quarto everything up to the
render is done, and plain pages are written in its place.
"""

import argparse
import ast
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import plotly
import yaml
from execnb.nbio import mk_cell
from nbconvert import HTMLExporter
from nbdev.config import get_config
from nbdev.process import Processor
from nbdev.processors import (
    FilterDefaults,
    add_fold,
    add_show_docs,
    clean_show_doc,
    exec_show_docs,
    mv_exports,
)
from nbdev.quarto import refresh_quarto_yml
from nbdev.serve_drv import exec_nb
from traitlets.config import Config

from trajbook.core import TrajbookError
from trajbook.widgets import PLOTLY, to_static

ROOT = Path(__file__).resolve().parents[1]
NBS, PROC, DOCS = ROOT / "nbs", ROOT / "_proc", ROOT / "_docs"
PLOTLY_JS = Path(plotly.__file__).parent / "package_data" / "plotly.min.js"
NO_QUARTO = (
    "[docs] Quarto is not on PATH: plain pages were written. For the full site install it with\n"
    '       pip install "trajbook[docs]"  (or from quarto.org), then run `make docs` again.'
)


def pages(folder: Path) -> list[Path]:
    "Every notebook below a folder, in reading order."
    found = [p for p in folder.rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts]
    return sorted(p for p in found if not p.relative_to(folder).parts[0].startswith("_"))


def plotly_src(page: Path, folder: Path) -> str:
    "Address of plotly as seen from a page."
    return "../" * (len(page.relative_to(folder).parts) - 1) + "assets/plotly.min.js"


class ShowCode(Processor):
    "Exported definitions stay on the page as they are, each with an anchor for links to its name."

    def begin(self) -> None:
        cells = []
        for cell in self.nb.cells:
            if cell.cell_type == "code" and "export" in cell.directives_:
                body = ast.parse(cell.source).body
                if not all(isinstance(node, ast.Import | ast.ImportFrom) for node in body):
                    cell.directives_.pop("export")
                    anchors = [f'<a id="{n.name}"></a>' for n in body if hasattr(n, "name")]
                    cells += [mk_cell("".join(anchors), "markdown")] if anchors else []
            cells.append(cell)
        self.nb.cells = cells


class Chapter(FilterDefaults):
    """nbdev's processors for a book: hidden cells go, code stays where the chapter has it.

    nbdev would execute every exported cell and put a table of arguments in its place. Here the
    arguments are documented in the code that the reader sees, and nothing is executed.
    """

    def base_procs(self) -> list:
        skipped = (add_show_docs, clean_show_doc, exec_show_docs, add_fold, mv_exports)
        return [ShowCode, *[p for p in super().base_procs() if p not in skipped]]


def local_links(text: str, up: str) -> str:
    "nbdev links names of the library to the address of the site; make that relative."
    cfg = get_config()
    return text.replace(f"{cfg.doc_host}{cfg.doc_baseurl}/", up)


def process() -> Path:
    "nbdev's processing of every notebook, then outputs that need no other host."
    os.chdir(ROOT)
    if not (NBS / "_quarto.yml").exists():  # a download without symbolic links
        shutil.copy(ROOT / "_quarto.yml", NBS / "_quarto.yml")
    refresh_quarto_yml()
    shutil.rmtree(PROC, ignore_errors=True)
    shutil.copytree(NBS, PROC, ignore=shutil.ignore_patterns("*.ipynb", ".*", "__pycache__"))
    needs_plotly = False
    for source in pages(NBS):
        page = PROC / source.relative_to(NBS)
        try:
            exec_nb(source, page, Chapter)
        except Exception as error:
            raise TrajbookError(
                f"nbdev cannot process {source.relative_to(ROOT)}: {error}"
            ) from error
        text = page.read_text(encoding="utf-8")
        needs_plotly |= PLOTLY in text
        src = plotly_src(page, PROC)
        text = local_links(text, src.removesuffix("assets/plotly.min.js"))
        page.write_text(json.dumps(to_static(json.loads(text), src)), encoding="utf-8")
    if needs_plotly:
        shutil.copy(PLOTLY_JS, PROC / "assets")
    return PROC


def sidebar(entries: list | None = None) -> list[str]:
    "The pages that the sidebar names, in its order."
    if entries is None:
        config = yaml.safe_load((ROOT / "_quarto.yml").read_text(encoding="utf-8"))
        entries = config["website"]["sidebar"]["contents"]
    named = []
    for entry in entries:
        if isinstance(entry, str):
            named.append(entry)
        else:
            named += [entry["href"]] if "href" in entry else sidebar(entry["contents"])
    return named


def broken_links(folder: Path) -> list[str]:
    "Links and pictures in the prose of processed pages that lead nowhere."
    broken = []
    for page in pages(folder):
        cells = json.loads(page.read_text(encoding="utf-8"))["cells"]
        prose = [re.sub(r"```.*?```|`[^`\n]*`", "", "".join(c["source"]), flags=re.S)
                 for c in cells if c["cell_type"] == "markdown"]  # fmt: skip
        for target in re.findall(r"\]\(([^)\s]+)(?:\s+\"[^\"]*\")?\)", "\n".join(prose)):
            path = target.partition("#")[0]
            if path and not re.match(r"[a-z]+:", path) and not (page.parent / path).exists():
                broken.append(f"{page.relative_to(folder).as_posix()}: {target}")
    return broken


def foreign_hosts(folder: Path) -> list[str]:
    "Everything in the built pages and styles that a browser would fetch from another host."
    tags = r"<(?:script|img|iframe|source|video|audio)\b[^>]*?\ssrc\s*=\s*[\"']?(?:https?:)?//[^\s\"'>]+"
    sheets = r"<link\b(?=[^>]*rel=[\"']?(?:stylesheet|preload|modulepreload|icon|preconnect))[^>]*?href=[\"']?(?:https?:)?//[^\s\"'>]+"
    styles = r"(?:@import\s+(?:url\()?|url\()\s*[\"']?(?:https?:)?//[^\s\"')]+"
    found = []
    for path in [*folder.rglob("*.html"), *folder.rglob("*.css")]:
        text = path.read_text(encoding="utf-8", errors="replace")
        patterns = [styles] if path.suffix == ".css" else [tags, sheets, styles]
        if path.suffix == ".html":
            text = re.sub(r"<pre\b.*?</pre>", "", text, flags=re.S)
        hits = [m.group(0) for p in patterns for m in re.finditer(p, text, flags=re.I)]
        found += [f"{path.relative_to(folder).as_posix()}: {hit[:120]}" for hit in hits]
    return found


def render() -> None:
    "The full site, by Quarto."
    subprocess.run(["quarto", "render", "--no-cache"], cwd=PROC, check=True)
    shutil.rmtree(DOCS, ignore_errors=True)
    shutil.move(PROC / DOCS.name, DOCS)


def plain_html(notebook: dict, title: str, header: str = "") -> str:
    "A notebook as one page by nbconvert, without any of its links to other hosts."
    hidden = {"enabled": True, "remove_input_tags": {"no_input"}}
    exporter = HTMLExporter(template_name="lab", config=Config(TagRemovePreprocessor=hidden))
    exporter.exclude_input_prompt = exporter.exclude_output_prompt = True
    for name in ("require_js_url", "mathjax_url", "mermaid_js_url", "jquery_url"):
        setattr(exporter, name, "")
    exporter.mermaid_layout_elk_js_url = ""
    node = nbformat.reads(json.dumps(notebook), as_version=4)
    html = exporter.from_notebook_node(node, {"metadata": {"name": title}})[0]
    html = re.sub(r"<script src=\"\">\s*</script>", "", html)
    html = re.sub(r"<script[^>]*>(?:(?!</script>).)*mermaid.*?</script>", "", html, flags=re.S)
    return re.sub(r"(<body[^>]*>)", lambda m: m[1] + header, html, count=1)


def front_matter(notebook: dict) -> tuple[str, str]:
    "Take title and file name from the raw cell that nbdev puts first, and make a heading of it."
    first = notebook["cells"][0]
    if first["cell_type"] != "raw":
        return "", ""
    meta = yaml.safe_load("".join(first["source"]).strip().strip("-")) or {}
    heading = f"# {meta.get('title', '')}\n\n*{meta.get('description', '')}*"
    notebook["cells"][0] = {
        "cell_type": "markdown",
        "id": "heading",
        "metadata": {},
        "source": heading,
    }
    return meta.get("title", ""), meta.get("output-file", "")


def plain() -> None:
    "The same pages without Quarto: readable, with widgets, without search and themes."
    shutil.rmtree(DOCS, ignore_errors=True)
    loaded = {p: json.loads(p.read_text(encoding="utf-8")) for p in pages(PROC)}
    meta = {p.relative_to(PROC).as_posix(): front_matter(nb) for p, nb in loaded.items()}
    target = {k: str(Path(k).with_name(m[1] or Path(k).stem + ".html")) for k, m in meta.items()}
    for page, notebook in loaded.items():
        name = page.relative_to(PROC).as_posix()
        up = "../" * name.count("/")
        for cell in notebook["cells"]:
            if "".join(cell["source"]).startswith("#| echo: false"):
                cell["metadata"].setdefault("tags", []).append("no_input")
            for output in cell.get("outputs", []):
                raw = re.fullmatch(r"`{6}\{=html\}\n(.*)\n`{6}\n", "".join(output.get("data", {}).get("text/markdown", "")), re.S)  # fmt: skip
                if raw:
                    output["data"] = {"text/html": raw[1]}
        links = [f'<a href="{up}{target[s]}">{meta[s][0] or s}</a>' for s in sidebar() if s in meta]
        header = f"<nav style='padding:12px 24px;font:14px system-ui'>{' · '.join(links)}</nav>"
        html = plain_html(notebook, meta[name][0] or name, header)
        for other, file in target.items():  # links between notebooks become links between pages
            relative = os.path.relpath(other, Path(name).parent).replace(os.sep, "/")
            html = html.replace(
                f'href="{relative}', f'href="{os.path.relpath(file, Path(name).parent)}'
            )
        out = DOCS / target[name]
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(html, encoding="utf-8")
    if (PROC / "assets").exists():
        shutil.copytree(PROC / "assets", DOCS / "assets", dirs_exist_ok=True)


def export(path: Path) -> Path:
    "One notebook as one page beside it, with its saved widgets."
    notebook = json.loads(path.read_text(encoding="utf-8"))
    if PLOTLY in path.read_text(encoding="utf-8"):
        shutil.copy(PLOTLY_JS, path.parent)
    html = plain_html(to_static(notebook, PLOTLY_JS.name, raw=False), path.stem)
    path.with_suffix(".html").write_text(html, encoding="utf-8")
    return path.with_suffix(".html")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--plain", action="store_true", help="plain pages, also with Quarto there")
    parser.add_argument("--export", type=Path, metavar="NOTEBOOK", help="one notebook as one page")
    args = parser.parse_args()
    if args.export:
        print(export(args.export))
        return
    print("[docs] processing every notebook (nbdev)", flush=True)
    process()
    absent = {p.relative_to(NBS).as_posix() for p in pages(NBS)} ^ set(sidebar())
    problems = [f"sidebar of _quarto.yml and nbs/ differ: {name}" for name in sorted(absent)]
    problems += [f"broken link in {link}" for link in broken_links(PROC)]
    has_quarto = shutil.which("quarto") is not None
    render() if has_quarto and not args.plain else plain()
    problems += [f"a page would fetch from another host: {f}" for f in foreign_hosts(DOCS)]
    if not has_quarto:
        print(NO_QUARTO)
    if problems:
        sys.exit("\n".join(f"[docs] {p}" for p in problems))
    print(f"[docs] {len(list(DOCS.rglob('*.html')))} pages in {DOCS.relative_to(ROOT)}/")


if __name__ == "__main__":
    main()
