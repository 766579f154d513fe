"""All metadata lives in settings.ini; edit there, not here."""

from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
ini = ConfigParser(delimiters=["="])
ini.read(here / "settings.ini", encoding="utf-8")
cfg = ini["DEFAULT"]


def words(key):
    return cfg.get(key, "").split()


extras = {k.removesuffix("_requirements"): words(k) for k in cfg if k.endswith("_requirements")}
extras["all"] = sorted({r for k in ("env", "log", "data", "notebook", "serve") for r in extras[k]})
setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    keywords=words("keywords"),
    author=cfg["author"],
    author_email=cfg["author_email"],
    license="Apache-2.0",
    license_files=["LICENSE"],
    url=cfg["git_url"],
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    packages=find_packages(include=["trajbook", "trajbook.*"]),
    python_requires=">=" + cfg["min_python"] + ",<3.13",
    install_requires=words("requirements"),
    extras_require=extras,
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: " + cfg["audience"],
        "Programming Language :: Python :: 3",
    ],
    entry_points={
        "console_scripts": [c.strip() for c in cfg["console_scripts"].splitlines() if c.strip()],
        "nbdev": [f"{cfg['lib_path']}={cfg['lib_path']}._modidx:d"],
    },
)
