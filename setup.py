"""Build script: the package `engine` with its two rooms kernels/ and pipelines/ reached through links.

It holds the native library where CMake and a C++ compiler are found, and is pure Python elsewhere.
`ENGINE_NATIVE=1` makes a build without the library an error, `ENGINE_NATIVE=0` leaves it out.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
LIBRARY = "engine.kernels._native"
NATIVE = os.environ.get("ENGINE_NATIVE", "auto")
if NATIVE not in ("auto", "0", "1"):
    raise SystemExit(f"setup.py: ENGINE_NATIVE: {NATIVE!r} is unknown; known are auto, 0, 1")

for link in ("kernels", "pipelines"):
    if not (ROOT / "engine" / link / "__init__.py").is_file():
        raise SystemExit(
            f"setup.py: engine/{link} must be a link to ../{link}, and it is not. "
            f"On a file system without links, copy the folder {link}/ to engine/{link}/."
        )


class BuildNative(build_ext):  # type: ignore[misc]
    """Builds the library by CMake. It is no extension module: no Python's tag belongs into its name."""

    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", os.sep) + ".so"

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.unlink(missing_ok=True)
        if not shutil.which("cmake"):
            raise CompileError("cmake is not installed")
        folder = Path(self.build_temp).resolve() / "native"
        shutil.rmtree(
            folder, ignore_errors=True
        )  # another build's choices, of a compiler for instance, do not hold
        generator = ("-G", "Ninja") if shutil.which("ninja") else ()
        for command in (
            ("-S", str(ROOT), "-B", str(folder), *generator),
            ("--build", str(folder), "--parallel", str(os.cpu_count())),
        ):
            try:
                subprocess.run(("cmake", *command), check=True)  # noqa: S603, S607
            except subprocess.CalledProcessError:
                raise CompileError(f"cmake {command[0]} failed, as told above") from None
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_suffix(".part")  # half a library would kill the process that loads it
        shutil.copyfile(folder / target.name, part)
        part.replace(target)


class Wheel(bdist_wheel):  # type: ignore[misc]
    """One wheel serves every Python: for one platform with the library in it, for all of them without."""

    def run(self) -> None:
        self.run_command("build_ext")
        library = self.get_finalized_command("build_ext").get_ext_fullpath(LIBRARY)
        if not Path(library).is_file():
            self.distribution.ext_modules = None
            self.root_is_pure = True
        super().run()

    def get_tag(self) -> tuple[str, str, str]:
        return ("py3", "none", super().get_tag()[2])


VERSION = re.findall(r'^__version__ = "(.+)"$', (ROOT / "engine" / "__init__.py").read_text(), re.MULTILINE)[0]
TEST = ["pytest>=8", "pytest-timeout>=2.3", "pytest-xdist>=3.6", "hypothesis>=6.100"]
LINT = ["ruff", "mypy", "types-PyYAML"]
DALI = {cuda: [f"nvidia-dali-cuda{cuda}0>=2.2"] for cuda in (12, 13)}

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
    ext_modules=[] if NATIVE == "0" else [Extension(LIBRARY, [], optional=NATIVE == "auto")],
    cmdclass={"build_ext": BuildNative, "bdist_wheel": Wheel},
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
    extras_require={
        "test": TEST,
        "dev": TEST + LINT,
        "ffcv": ["ffcv>=1.0.2"],
        "dali": DALI[13],
        "dali-cuda12": DALI[12],
        "dali-cuda13": DALI[13],
    },
    entry_points={"console_scripts": ["engine=engine.commands.cli:main"]},
)
