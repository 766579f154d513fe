"""Run notebooks and store their outputs, or (`--check`) compare the stored outputs with a fresh run.

python tools/notebooks.py                    every notebook, outputs stored in place
python tools/notebooks.py mae/10_data        only this one
python tools/notebooks.py --check 00_core    exit code 1 where a lesson ends in another value
"""

import argparse
import base64
import io
import os
import subprocess
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from PIL import Image

root = Path(__file__).resolve().parents[1]
nbs = root / "nbs"
# A fresh kernel with these settings gives the same outputs on every machine with the same versions.
os.environ.update(OMP_NUM_THREADS="1", TQDM_DISABLE="1")


def names() -> list[str]:
    "Every notebook in reading order, as `mae/10_data`."
    found = [p for p in nbs.rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts]
    paths = sorted(p.relative_to(nbs).with_suffix("").as_posix() for p in found)
    return sorted(paths, key=lambda n: (not Path(n).name[0].isdigit(), Path(n).name))


def execute(name: str) -> nbformat.NotebookNode:
    "The notebook with the outputs of a fresh kernel."
    path = nbs / f"{name}.ipynb"
    nb = nbformat.read(path, as_version=4)
    for cell in nb.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    resources = {"metadata": {"path": str(path.parent)}}
    quiet = ["--IPKernelApp.log_level=50"]  # the kernel's own warnings
    options = {"timeout": 900, "resources": resources, "extra_arguments": quiet}
    NotebookClient(nb, store_widget_state=True, **options).execute()
    for cell in nb.cells:  # progress bars, warnings with paths: not part of the book
        if cell.cell_type == "code":
            cell.outputs = [o for o in cell.outputs if o.get("name") != "stderr"]
    return nb


def shrink_pictures(nb: nbformat.NotebookNode) -> None:
    "Store drawings with 256 colors, which nobody sees, in a third of the bytes."
    shown = [o.get("data", {}) for c in nb.cells for o in c.get("outputs", [])]
    for data in shown:
        if "image/png" in data:
            image = Image.open(io.BytesIO(base64.b64decode(data["image/png"]))).convert("RGB")
            smaller = io.BytesIO()
            image.quantize(256, dither=Image.Dither.NONE).save(smaller, "PNG", optimize=True)
            text = base64.b64encode(smaller.getvalue()).decode()
            data["image/png"] = min(text, data["image/png"], key=len)


def values(nb: nbformat.NotebookNode) -> list[tuple[str, str]]:
    "What each lesson cell ends in: (first line of the cell, text)."
    found = []
    for cell in nb.cells:
        tags = cell.metadata.get("tags", [])
        if cell.cell_type == "code" and "lesson" in tags and "volatile" not in tags:
            for output in cell.outputs:
                text = output.get("data", {}).get("text/plain")
                if text and output.output_type == "execute_result" and " at 0x" not in text:
                    found.append((cell.source.split("\n")[0], text))
    return found


def store(name: str) -> None:
    "Run the notebook and write its outputs."
    start, path = time.time(), nbs / f"{name}.ipynb"
    nb = execute(name)
    shrink_pictures(nb)
    nbformat.write(nb, path)
    subprocess.run([Path(sys.executable).parent / "nbdev_clean", "--fname", path], check=True)
    size = path.stat().st_size
    print(f"{name}: {time.time() - start:.0f} s, {size / 1e3:.0f} kB", flush=True)
    if size > 1_000_000:
        sys.exit(f"{name} is larger than 1 MB: show smaller outputs")


def check(name: str) -> list[str]:
    "The lessons of this notebook that end in another value than the committed one."
    committed = values(nbformat.read(nbs / f"{name}.ipynb", as_version=4))
    fresh = values(execute(name))
    pairs = zip(committed, fresh, strict=False)
    wrong = [f"{a[0]!r}: {a[1]} is now {b[1]}" for a, b in pairs if a != b]
    if len(committed) != len(fresh):
        wrong.append(f"{len(committed)} lessons end in a value, now {len(fresh)}")
    return [f"{name}: {w}" for w in wrong]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", help="notebooks, e.g. mae/10_data (default: all)")
    parser.add_argument("--check", action="store_true", help="compare instead of storing")
    args = parser.parse_args()
    wrong = []
    for name in args.names or names():
        wrong += check(name) if args.check else store(name) or []
    if wrong:
        sys.exit("\n".join(wrong))
