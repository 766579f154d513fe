"""Build the site into _docs/ (`make docs`).

python tools/docs.py                      process every notebook, check links, render with Quarto
python tools/docs.py --plain              the same without Quarto: plain pages by nbconvert
python tools/docs.py --export NOTEBOOK    one notebook as one HTML page beside it, widgets included

Every page works without a network: widgets and plotly figures become HTML that computes in the
browser, and plotly itself is copied from the installed package. Without Quarto everything up to the
render is done, and plain pages are written in its place: no search, but the same text, pictures and
widgets, in light and in dark.
"""

import argparse
import ast
import json
import os
import re
import shutil
import subprocess
import sys
from html import escape, unescape
from pathlib import Path

import nbformat
import plotly
import yaml
from execnb.nbio import mk_cell
from matplotlib.textpath import TextPath
from nbconvert import HTMLExporter, TemplateExporter
from nbconvert.filters import Highlight2HTML
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
from pygments.formatters import HtmlFormatter
from traitlets.config import Config

from trajbook.core import TrajbookError
from trajbook.widgets import PLOTLY, to_static

ROOT = Path(__file__).resolve().parents[1]
NBS, PROC, DOCS = ROOT / "nbs", ROOT / "_proc", ROOT / "_docs"
PLOTLY_JS = Path(plotly.__file__).parent / "package_data" / "plotly.min.js"
PLAIN_CSS = Path(__file__).with_name("plain.css")
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


def anchors(source: str) -> str:
    "One anchor per definition and method, in the form that nbdev's links use."
    found = []
    for node in ast.parse(source).body:
        if hasattr(node, "name"):
            methods = [m.name for m in getattr(node, "body", []) if isinstance(m, ast.FunctionDef)]
            found += [node.name]
            found += [f"{node.name}.{m}" for m in methods if isinstance(node, ast.ClassDef)]
    return "".join(f'<a id="{name.lower()}"></a>' for name in found)


class ShowCode(Processor):
    "Exported definitions stay on the page as they are, below an anchor for links to their names."

    def begin(self) -> None:
        cells = []
        for cell in self.nb.cells:
            if cell.cell_type == "code" and "export" in cell.directives_:
                body = ast.parse(cell.source).body
                if not all(isinstance(node, ast.Import | ast.ImportFrom) for node in body):
                    cell.directives_.pop("export")
                    self.mark(cells, anchors(cell.source))
            cells.append(cell)
        self.nb.cells = cells

    def mark(self, cells: list, text: str) -> None:
        "Put anchors at the end of the prose above the code, where they take no room."
        last = cells[-1].source.rstrip().split("\n")[-1] if cells else "#"
        if text and cells[-1].cell_type == "markdown" and re.match(r"[\w`*$(\[]", last):
            cells[-1].source = cells[-1].source.rstrip() + text
        elif text:
            cells.append(mk_cell(text, "markdown"))


def front_matter(notebook: dict) -> dict:
    "Title, description and file name, which nbdev puts into a raw cell at the top."
    first = notebook["cells"][0]
    text = "".join(first["source"]).strip().strip("-") if first["cell_type"] == "raw" else ""
    return yaml.safe_load(text) or {}


class Chapter(FilterDefaults):
    """nbdev's processors for a book: hidden cells go, code stays where the chapter has it.

    nbdev would execute every exported cell and put a table of arguments in its place. Here the
    arguments are documented in the code that the reader sees, and nothing is executed.
    """

    def base_procs(self) -> list:
        skipped = (add_show_docs, clean_show_doc, exec_show_docs, add_fold, mv_exports)
        return [ShowCode, *[p for p in super().base_procs() if p not in skipped]]


def local_links(text: str, page: str, up: str) -> str:
    """nbdev links names of the library to the address of the site: make that relative.

    A common word such as `speed` links only on the page that defines it, since elsewhere it means
    something else as often as not.
    """
    cfg = get_config()
    site = re.escape(f"{cfg.doc_host}{cfg.doc_baseurl}/")

    def link(m: re.Match) -> str:
        name, target = m[1], m[2]
        is_word = re.fullmatch(r"[a-z]+", name)
        return (
            f"`{name}`"
            if is_word and target.partition("#")[0] != page
            else f"[`{name}`]({up}{target})"
        )

    return re.sub(rf"\[`([^`\]]+)`\]\({site}([^)]*)\)", link, text)


def process() -> Path:
    "nbdev's processing of every notebook, then outputs that need no other host."
    os.chdir(ROOT)
    link, config = NBS / "_quarto.yml", ROOT / "_quarto.yml"
    if not link.exists() or link.read_text() != config.read_text():  # a ZIP file knows no links
        link.unlink(missing_ok=True)
        shutil.copy(config, link)
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
        src, notebook = plotly_src(page, PROC), json.loads(text)
        own = page.relative_to(PROC).with_name(front_matter(notebook).get("output-file", ""))
        for cell in notebook["cells"]:
            if cell["cell_type"] == "markdown":
                prose = "".join(cell["source"])
                cell["source"] = local_links(
                    prose, own.as_posix(), src.removesuffix("assets/plotly.min.js")
                ).splitlines(keepends=True)
        page.write_text(json.dumps(to_static(notebook, src)), encoding="utf-8")
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
    broken, prose, anchored = [], {}, {}
    for page in pages(folder):
        notebook = json.loads(page.read_text(encoding="utf-8"))
        texts = ["".join(c["source"]) for c in notebook["cells"] if c["cell_type"] == "markdown"]
        built = page.with_name(front_matter(notebook).get("output-file", page.stem + ".html"))
        anchored[built] = set(re.findall(r'id="([^"]+)"', "".join(texts)))
        # names in back-ticks stand as [`name`](target); other code holds no links
        prose[page] = re.sub(r"```.*?```|(?<!\[)`[^`\n]*`(?!\])", "", "\n".join(texts), flags=re.S)
    for page, text in prose.items():
        for target in re.findall(r"\]\(([^)\s]+)(?:\s+\"[^\"]*\")?\)", text):
            path, _, anchor = target.partition("#")
            file = Path(os.path.normpath(page.parent / path))
            known = file.exists() or anchor in anchored.get(file, ())
            if path and not re.match(r"[a-z]+:", path) and not known:
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
    # pandoc writes the dot of a derivative as a combining mark, which browsers put beside the letter
    for page in DOCS.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        page.write_text(text.replace(COMBINING_DOT, DOT), encoding="utf-8")


COMBINING_DOT, DOT = (f'<mo accent="true">{mark}</mo>' for mark in ("\u0307", "\u02d9"))
SHELL = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>{style}</head>
<body>{nav}<main>{body}</main></body></html>
"""


def simple_tex(
    tex: str,  # As an author writes it
    is_block: bool,  # A line of its own: fractions in full size
) -> str:  # In the words that matplotlib knows
    "TeX for matplotlib."
    tex = " ".join(tex.split())
    for theirs, ours in {
        r"\\frac": r"\\dfrac" if is_block else r"\\frac", r"\\tfrac": r"\\frac",
        r"(\\d?frac)\s*(\w)": r"\1{\2}", r"(\\d?frac\{[^{}]*\})\s*(\w)": r"\1{\2}",
        r"\\[lr]Vert(?![a-z])": r"\\|", r"\\(?:textstyle|[bB]igg?[lr]?)(?![a-z])": "",
        r"\\text(?=\{)": r"\\mathrm", r"\\texttt": r"\\mathtt", r"\\mathcal\s*(\w)": r"\\mathcal{\1}",
        r"\\operatorname(\{\w+\})": r"\\mathrm\1\\,", r"\\sqrt\s*(\w)": r"\\sqrt{\1}",
        r"\\ne(?![a-z])": r"\\neq", r"\\le(?![a-z])": r"\\leq",
        r"(\\(?:hat|bar|dot))\s*(\w|\\[a-z]+(?:\s\w)?)": r"\1{\2}",
    }.items():  # fmt: skip
        tex = re.sub(theirs, ours, tex)
    return tex


def formula(tex: str, is_block: bool) -> str:
    "A formula as a drawing in the color of the text, since math on the web needs a program."
    letters = {1: "M", 2: "L", 3: "Q", 4: "C", 79: "Z"}
    try:
        drawn = TextPath((0, 0), f"${simple_tex(tex, is_block)}$", size=16)
    except ValueError:  # beyond matplotlib's TeX: better its source than nothing
        return f"<code>{escape(tex)}</code>"
    d = ""
    for points, code in drawn.iter_segments(simplify=False):
        flipped = [] if code == 79 else [v if i % 2 == 0 else -v for i, v in enumerate(points)]
        d += letters[int(code)] + " ".join(f"{v:.1f}" for v in flipped)
    box = drawn.get_extents().padded(0.6)
    size = f'width="{box.width:.1f}" viewBox="{box.x0:.1f} {-box.y1:.1f} {box.width:.1f} {box.height:.1f}"'
    look = 'class="tex block"' if is_block else f'class="tex" style="vertical-align:{box.y0:.1f}px"'
    return f'<svg {look} {size} role="img" aria-label="{escape(tex)}"><path d="{d}"/></svg>'


def with_formulas(html: str) -> str:
    "Draw every formula that nbconvert left as TeX, outside of code."
    skip = r"<(pre|code|script|style)\b.*?</\1>"
    return re.sub(
        rf"{skip}|\$\$(?P<block>.+?)\$\$|\$(?P<inline>[^$<]+?)\$",
        lambda m: (
            formula(unescape(tex), bool(m["block"])) if (tex := m["block"] or m["inline"]) else m[0]
        ),
        html,
        flags=re.S,
    )


def colors_of_code() -> str:
    "Style sheet of highlighted code, in light and in dark."
    light, dark = (HtmlFormatter(style=s).get_style_defs(".highlight") for s in ("default", "github-dark"))  # fmt: skip
    return f"{light}\n@media (prefers-color-scheme: dark) {{\n{dark}\n}}\n"


def plain_html(notebook: dict, title: str, style: str, nav: str = "") -> str:
    "A notebook as one page by nbconvert, without any of its links to other hosts."
    hidden = {"enabled": True, "remove_input_tags": {"no_input"}}
    exporter = HTMLExporter(template_name="basic", config=Config(TagRemovePreprocessor=hidden))
    exporter.exclude_input_prompt = exporter.exclude_output_prompt = True
    exporter.register_filter("highlight_code", Highlight2HTML(pygments_lexer="python"))
    exporter.register_filter("clean_html", lambda text: text)  # our own code: nothing to clean
    node = nbformat.reads(json.dumps(notebook), as_version=4)
    # HTMLExporter would parse each page once more, which takes longer than all the rest
    body = TemplateExporter.from_notebook_node(exporter, node, {"metadata": {"name": title}})[0]
    body = with_formulas(body).replace("<img src=", '<img alt="picture" src=')
    return SHELL.format(title=escape(title), style=style, nav=nav, body=body)


def navigation(names: dict[str, tuple[str, str]], own: str) -> tuple[str, str]:
    "The list of all pages, and the links to the pages before and after this one."
    at = Path(own).parent

    def link(name: str, text: str = "") -> str:
        title, file = names[name]
        here = ' aria-current="page"' if name == own else ""
        return f'<a href="{os.path.relpath(file, at)}"{here}>{text or escape(title)}</a>'

    config = yaml.safe_load((ROOT / "_quarto.yml").read_text(encoding="utf-8"))
    parts = []
    for entry in config["website"]["sidebar"]["contents"]:
        inside = [n for n in sidebar([entry]) if n in names]
        parts += [f"<b>{entry['section']}</b>"] if "section" in entry else []
        parts += ["<ul>", *(f"<li>{link(n)}</li>" for n in inside), "</ul>"]
    order = [n for n in sidebar() if n in names]
    place = order.index(own) if own in order else 0
    before = link(order[place - 1], f"← {names[order[place - 1]][0]}") if place else ""
    after = (
        link(order[place + 1], f"{names[order[place + 1]][0]} →") if place + 1 < len(order) else ""
    )
    closed = "<script>document.querySelector('nav details').open = innerWidth > 960</script>"
    nav = f"<nav><details open><summary>Chapters</summary>{''.join(parts)}</details></nav>{closed}"
    return nav, f"<footer><span>{before}</span><span>{after}</span></footer>"


def plain_outputs(notebook: dict) -> dict:
    "What `process` has prepared for Quarto, in the form that nbconvert reads."
    for cell in notebook["cells"]:
        if "".join(cell["source"]).startswith("#| echo: false"):
            cell["metadata"].setdefault("tags", []).append("no_input")
        for output in cell.get("outputs", []):
            text = "".join(output.get("data", {}).get("text/markdown", ""))
            if raw := re.fullmatch(r"`{6}\{=html\}\n(.*)\n`{6}\n", text, re.S):
                output["data"] = {"text/html": raw[1]}
    return notebook


def plain() -> None:
    "The same pages without Quarto: readable, with widgets, in light and dark, without search."
    shutil.rmtree(DOCS, ignore_errors=True)
    shutil.copytree(PROC / "assets", DOCS / "assets")
    (DOCS / "assets" / "plain.css").write_text(PLAIN_CSS.read_text() + colors_of_code())
    loaded = {p: json.loads(p.read_text(encoding="utf-8")) for p in pages(PROC)}
    names = {}
    for page, notebook in loaded.items():
        meta, name = front_matter(notebook), page.relative_to(PROC).as_posix()
        file = str(Path(name).with_name(meta.get("output-file", page.stem + ".html")))
        names[name] = meta.get("title", name), file
        heading = f"# {meta.get('title', '')}\n\n*{meta.get('description', '')}*"
        if meta:
            notebook["cells"][0] |= {"cell_type": "markdown", "source": heading}
    for page, notebook in loaded.items():
        name = page.relative_to(PROC).as_posix()
        title, file = names[name]
        style = f'<link rel="stylesheet" href="{"../" * name.count("/")}assets/plain.css">'
        nav, footer = navigation(names, name)
        html = plain_html(plain_outputs(notebook), title, style, nav)
        html = html.replace("</main>", f"{footer}</main>")
        at = Path(name).parent
        for other, (
            _,
            target,
        ) in names.items():  # links between notebooks become links between pages
            html = html.replace(
                f'href="{os.path.relpath(other, at)}', f'href="{os.path.relpath(target, at)}'
            )
        (DOCS / file).parent.mkdir(parents=True, exist_ok=True)
        (DOCS / file).write_text(html, encoding="utf-8")


def export(path: Path) -> Path:
    "One notebook as one page beside it, with its saved widgets."
    text = path.read_text(encoding="utf-8")
    if PLOTLY in text:
        shutil.copy(PLOTLY_JS, path.parent)
    style = f"<style>{PLAIN_CSS.read_text()}{colors_of_code()}body {{ display: block }}</style>"
    html = plain_html(to_static(json.loads(text), PLOTLY_JS.name, raw=False), path.stem, style)
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
    print(f"[docs] {len(list(DOCS.rglob('*.html')))} pages in {DOCS.name}/")
    print(f"[docs] to search them, too: python -m http.server -d {DOCS.name}")


if __name__ == "__main__":
    main()
