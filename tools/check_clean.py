"""Fail where `nbdev_clean` or `nbdev_export` would change a file: the notebooks are the only source."""

import hashlib
import subprocess
import sys
from pathlib import Path

root = Path(__file__).resolve().parents[1]


def state(folder: str, pattern: str) -> dict:
    "Fingerprint of each file below `folder`."
    files = sorted((root / folder).rglob(pattern))
    skip = ("__pycache__", ".ipynb_checkpoints")
    return {
        p.relative_to(root).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in files
        if not any(s in p.parts for s in skip)
    }


def check(command: str, folder: str, pattern: str) -> list[str]:
    "Names of the files that `command` changes."
    before = state(folder, pattern)
    subprocess.run([str(Path(sys.executable).parent / command)], cwd=root, check=True)
    after = state(folder, pattern)
    return sorted(k for k in before.keys() | after.keys() if before.get(k) != after.get(k))


if __name__ == "__main__":
    print("[test] nbdev_clean and nbdev_export change nothing", flush=True)
    changed = check("nbdev_clean", "nbs", "*.ipynb") + check("nbdev_export", "trajbook", "*.py")
    if changed:
        sys.exit("these were not cleaned or exported (now they are): " + ", ".join(changed))
