"""Build of the native library, where CMake and a C++ compiler are found; all else stands in pyproject.toml.

`ENGINE_NATIVE=1` makes a build without the library an error, `ENGINE_NATIVE=0` leaves it out.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from setuptools import Extension, setup
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
        # Another build's choices, of a compiler for instance, do not hold.
        shutil.rmtree(folder, ignore_errors=True)
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
        # Modules of an earlier build, moved since, must not get into this wheel.
        shutil.rmtree(self.get_finalized_command("build").build_lib, ignore_errors=True)
        self.run_command("build_ext")
        library = self.get_finalized_command("build_ext").get_ext_fullpath(LIBRARY)
        if not Path(library).is_file():
            self.distribution.ext_modules = None
            self.root_is_pure = True
        super().run()

    def get_tag(self) -> tuple[str, str, str]:
        return ("py3", "none", super().get_tag()[2])


setup(
    ext_modules=[] if NATIVE == "0" else [Extension(LIBRARY, [], optional=NATIVE == "auto")],
    cmdclass={"build_ext": BuildNative, "bdist_wheel": Wheel},
)
