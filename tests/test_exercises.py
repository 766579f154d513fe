"""The exercises: each has an unwritten starter, a check that says so, and a solution that passes it."""

import ast
from pathlib import Path

import nbformat
import pytest

from trajbook.core import root

NOTEBOOKS = sorted((root() / "nbs" / "exercises").glob("*.ipynb"))


def is_unwritten(node: ast.stmt) -> bool:
    "A function whose body is nothing but `...`."
    body = node.body if isinstance(node, ast.FunctionDef) else []
    return [ast.unparse(s) for s in body] == ["..."]


def functions(cell: nbformat.NotebookNode) -> list[ast.FunctionDef]:
    return [n for n in ast.parse(cell.source).body if isinstance(n, ast.FunctionDef)]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_an_exercise_is_task_starter_check_solution(path: Path):
    cells = nbformat.read(path, as_version=4).cells
    starts = [
        i
        for i, c in enumerate(cells)
        if c.cell_type == "code" and any(map(is_unwritten, functions(c)))
    ]
    assert 3 <= len(starts) <= 4
    for i in starts:
        task, starter, check, solution = cells[i - 1 : i + 3]
        name = functions(starter)[0].name.removeprefix("my_")
        assert "*Hint.*" in task.source and "*You should see*" in task.source
        assert check.source.endswith(f"\ncheck_{name}(my_{name})")
        assert "'not written yet'" in check.outputs[-1].data["text/plain"]
        assert "solution" in solution.metadata.tags
        assert solution.source.startswith("#| code-fold: true\n")
        assert f'\nassert check_{name}(solved_{name}) == "right"\n' in solution.source
        hints = [n for n in ast.walk(ast.parse(solution.source)) if isinstance(n, ast.Assert)]
        assert sum(isinstance(n.test.ops[0], ast.In) for n in hints) >= 2


@pytest.mark.parametrize("method", ["mae", "masked_diffusion", "moe"])
def test_every_chapter_of_a_method_has_exercises(method):
    chapters = {p.stem for p in (root() / "nbs" / method).glob("*.ipynb")}
    assert {f"{method}_{c}" for c in chapters} <= {p.stem for p in NOTEBOOKS}
