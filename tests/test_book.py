"""The rules that make the notebooks a book and the book a library (DESIGN and STYLE, enforced)."""

import ast
import re
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from trajbook.config import methods
from trajbook.core import root

ROOT = root()
NBS = sorted(p for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
MODULES = sorted(
    p for p in (ROOT / "trajbook").rglob("*.py") if p.name not in ("__init__.py", "_modidx.py")
)
EXPORT = re.compile(r"^#\s*\|\s*export", re.M)
DIRECTIVE = re.compile(r"^\s*#\s*\|")


def name(path: Path) -> str:
    return path.relative_to(ROOT / "nbs").with_suffix("").as_posix()


def code_cells(path: Path) -> list[str]:
    nb = nbformat.read(path, as_version=4)
    return [c.source for c in nb.cells if c.cell_type == "code"]


def lines(source: str) -> int:
    return sum(bool(s.strip()) and not DIRECTIVE.match(s) for s in source.splitlines())


def exported(path: Path) -> list[str]:
    return [s for s in code_cells(path) if EXPORT.search(s)]


def is_import(node: ast.stmt) -> bool:
    return isinstance(node, ast.Import | ast.ImportFrom)


def numbered() -> dict[str, int]:
    "Module name (`mae.model`) → number of its notebook."
    found = {}
    for path in NBS:
        match = re.fullmatch(r"(\d\d)_(\w+)", path.stem)
        if match:
            parts = [*path.relative_to(ROOT / "nbs").parent.parts, match[2]]
            found[".".join(parts)] = int(match[1])
    return found


@pytest.mark.parametrize("path", [p for p in NBS if p.stem[0].isdigit()], ids=name)
def test_mirror_rule(path):
    "Drop the number and you have the module, and every module has its notebook."
    expected = ".".join([*path.relative_to(ROOT / "nbs").parent.parts, path.stem[3:]])
    found = re.findall(r"^#\s*\|\s*default_exp\s+(\S+)", "\n".join(code_cells(path)), re.M)
    assert found == [expected]
    assert not re.search(r"^#[ \t]*\|[ \t]*export[ \t]+\S", "\n".join(code_cells(path)), re.M)


def test_every_module_has_a_notebook():
    parts = [p.relative_to(ROOT / "trajbook").with_suffix("").parts for p in MODULES]
    assert {".".join(p) for p in parts} == set(numbered())


def absolute(node: ast.ImportFrom, own: str) -> str:
    "Module that is imported from; nbdev writes imports of the package as relative ones."
    if not node.level:
        return node.module
    folder = ["trajbook", *own.split(".")][: -node.level]
    return ".".join([*folder, *([node.module] if node.module else [])])


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_imports_go_one_way(path):
    "A module imports only lower numbers; a method never imports another method."
    numbers = numbered()
    own = ".".join(path.relative_to(ROOT / "trajbook").with_suffix("").parts)
    for node in ast.walk(ast.parse(path.read_text())):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            source = absolute(node, own)
            assert node.names[0].name != "*", f"star import from {source}"
            joined = [f"{source}.{a.name}" for a in node.names]
            names = [source, *[j for j in joined if j.removeprefix("trajbook.") in numbers]]
        for other in [n.removeprefix("trajbook.") for n in names if n.startswith("trajbook.")]:
            if other not in numbers:
                continue  # a package or a name inside a module
            assert numbers[other] < numbers[own], f"{own} imports {other}"
            part, folder = other.partition(".")[0], own.partition(".")[0]
            is_method = "." in other and part != "apps"
            assert not is_method or folder in (part, "apps"), f"{own} imports {other}"


@pytest.mark.parametrize("path", NBS, ids=name)
def test_imports_stand_alone(path):
    "A cell is imports only or has none: the docs build runs import cells by themselves."
    for source in code_cells(path):
        if source.lstrip().startswith(("!", "%")):
            continue
        body = ast.parse(source).body
        kinds = {is_import(node) for node in body}
        assert len(kinds) < 2, f"imports and code in one cell:\n{source}"


@pytest.mark.parametrize("path", [p for p in NBS if exported(p)], ids=name)
def test_exported_cells_hold_one_idea(path):
    cells = [s for s in exported(path) if not all(map(is_import, ast.parse(s).body))]
    sizes = [lines(s) for s in cells]
    assert max(sizes) <= 75, f"a cell of {max(sizes)} lines"
    assert statistics.median(sizes) <= 25, f"median {statistics.median(sizes)} lines"


def test_median_of_the_whole_book():
    cells = [s for p in NBS for s in exported(p)]
    sizes = [lines(s) for s in cells if not all(map(is_import, ast.parse(s).body))]
    assert statistics.median(sizes) <= 15


@pytest.mark.parametrize("path", [p for p in NBS if exported(p)], ids=name)
def test_prose_and_lessons(path):
    "Literate code, not a .py file in a costume."
    nb = nbformat.read(path, as_version=4)
    words = sum(len(c.source.split()) for c in nb.cells if c.cell_type == "markdown")
    lessons = [c for c in nb.cells if "lesson" in c.metadata.get("tags", [])]
    definitions = [s for s in exported(path) if not all(map(is_import, ast.parse(s).body))]
    assert nb.cells[0].cell_type == "markdown" and nb.cells[0].source.startswith("# ")
    assert "\n> " in nb.cells[0].source, "the one-sentence summary under the title"
    assert words >= 600, f"{words} words of prose"
    assert 2 * len(lessons) >= len(definitions), f"{len(lessons)} lessons, {len(definitions)} cells"


@pytest.mark.parametrize("path", NBS, ids=name)
def test_size_and_outputs(path):
    assert path.stat().st_size <= 1_000_000
    nb = nbformat.read(path, as_version=4)
    for cell in nb.cells:
        for output in cell.get("outputs", []):
            assert output.output_type != "error", f"a stored error in {path.name}"
            text = str(output.get("data", {}).get("text/plain", "")) + str(output.get("text", ""))
            assert str(Path.home()) not in text and str(ROOT) not in text, "a path of this machine"


@pytest.mark.parametrize("path", NBS, ids=name)
def test_a_lesson_that_ends_in_a_value_shows_it(path):
    "A cell whose output was never stored is an empty place on the page."
    nb = nbformat.read(path, as_version=4)
    for cell in nb.cells:
        if "lesson" in cell.metadata.get("tags", []) and not cell.outputs:
            last = ast.parse(cell.source).body[-1]
            is_value = isinstance(last, ast.Expr) and not isinstance(last.value, ast.Call)
            assert not is_value, f"run tools/notebooks.py: no output of {ast.unparse(last)}"


def test_size_of_all_notebooks():
    assert sum(p.stat().st_size for p in NBS) <= 12_000_000


def stage_notebooks() -> list[Path]:
    "Notebooks of the methods, which all have a stage."
    return [p for p in NBS if p.parent.name in methods()]


@pytest.mark.parametrize("path", stage_notebooks(), ids=name)
def test_parameters_cell(path):
    "Stage notebooks have exactly one parameters cell, of literals, with the agreed names."
    nb = nbformat.read(path, as_version=4)
    cells = [c for c in nb.cells if "parameters" in c.metadata.get("tags", [])]
    assert len(cells) == 1
    body = ast.parse(cells[0].source).body
    values = {node.targets[0].id: ast.literal_eval(node.value) for node in body}
    expected = {"preset": "tiny", "overrides": {}, "seed": 0, "run_dir": "", "device": "auto"}
    assert values == expected


def test_parameters_tag_survives_cleaning(tmp_path):
    "nbdev_clean removes cell tags by default; ours must stay, or papermill has nowhere to inject."
    source = stage_notebooks()[0]
    copy = tmp_path / "nbs" / source.name
    copy.parent.mkdir()
    shutil.copy(source, copy)
    for extra in ("settings.ini", "pyproject.toml"):
        shutil.copy(ROOT / extra, tmp_path / extra)
    clean = Path(sys.executable).parent / "nbdev_clean"
    subprocess.run([clean, "--fname", copy], cwd=tmp_path, check=True)
    tags = [t for c in nbformat.read(copy, 4).cells for t in c.metadata.get("tags", [])]
    assert "parameters" in tags and "lesson" in tags


@pytest.mark.parametrize("module", ["trajbook", "trajbook.config", "trajbook.data", "trajbook.run"])
def test_light_modules_import_no_torch(module):
    "Help texts, configs and data workers must start fast."
    code = f"import sys, {module}; print('torch' in sys.modules, 'matplotlib' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


@pytest.mark.slow
def test_every_module_imports_alone():
    "Each module in a fresh interpreter: no import order hides a missing name."
    names = [".".join(("trajbook", *n.split("."))) for n in numbered()]
    code = (
        "import importlib, sys\n"
        "for name in sys.argv[1:]:\n"
        "    [sys.modules.pop(m) for m in list(sys.modules) if m.startswith('trajbook')]\n"
        "    importlib.import_module(name)\n"
    )
    subprocess.run([sys.executable, "-c", code, *names], check=True)


GROUND = [p for p in NBS if p.parent == ROOT / "nbs" and re.match(r"0[0-6]_", p.stem)]


@pytest.mark.slow
@pytest.mark.parametrize("path", GROUND, ids=name)
def test_committed_outputs_are_fresh(path):
    "What the lessons of the ground end in is what a fresh run ends in."
    script = ROOT / "tools" / "notebooks.py"
    done = subprocess.run(
        [sys.executable, script, "--check", name(path)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
