"""Build script: the package `engine` with its two rooms kernels/ and pipelines/ reached through links."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent

for link in ("kernels", "pipelines"):
    if not (ROOT / "engine" / link / "__init__.py").is_file():
        raise SystemExit(
            f"setup.py: engine/{link} must be a link to ../{link}, and it is not. "
            f"On a file system without links, copy the folder {link}/ to engine/{link}/."
        )

VERSION = re.findall(r'^__version__ = "(.+)"$', (ROOT / "engine" / "__init__.py").read_text(), re.MULTILINE)[0]
TEST = ["pytest>=8", "pytest-timeout>=2.3", "hypothesis>=6.100"]
LINT = ["ruff", "mypy", "types-PyYAML"]

setup(
    name="iad-engine",
    version=VERSION,
    description="A fast training engine for adversarially robust image classifiers by adversarial distillation",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.10",
    packages=find_packages(include=["engine", "engine.*"]),
    package_data={"engine": ["py.typed", "recipes/*.yaml"]},
    install_requires=[
        "torch>=2.11",
        "torchvision>=0.26",
        "numpy",
        "pillow",
        "pydantic>=2.7",
        "pyyaml",
        "click>=8.1",
        "rich>=13",
        "matplotlib",
        "tensorboard",
        "scikit-learn",
        "pyautoattack>=0.2",
    ],
    extras_require={"test": TEST, "dev": TEST + LINT},
    entry_points={"console_scripts": ["engine=engine.cli:main"]},
)
