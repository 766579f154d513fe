"""Say in one sentence why this Python cannot be used, before anything is installed."""

import importlib.util
import sys

version = sys.version_info[:2]
if not (3, 11) <= version <= (3, 12):
    sys.exit(
        f"trajbook needs Python 3.11 or 3.12, this is {version[0]}.{version[1]} "
        "(dm_control's labmaze has no wheel for later ones): make PYTHON=python3.12"
    )
if importlib.util.find_spec("ensurepip") is None:
    sys.exit("Python's venv module is incomplete: apt-get install python3-venv")
