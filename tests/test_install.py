"""The installation as README.md tells it, and the same steps in the Dockerfile."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def instructions(name: str) -> list[str]:
    """Arguments of every instruction of that name."""
    text = (ROOT / "Dockerfile").read_text().replace("\\\n", " ")
    return [line.split(maxsplit=1)[1] for line in text.splitlines() if line.startswith(f"{name} ")]


def installed_by_the_readme() -> list[str]:
    """Arguments of its lines of pip install, in their order."""
    section = (ROOT / "README.md").read_text().partition("\n## Install\n")[2].partition("\n## ")[0]
    lines = section.partition("```sh\n")[2].partition("```")[0].splitlines()
    return [line.partition("#")[0].strip().removeprefix("pip install ") for line in lines if "pip install" in line]


def test_the_image_is_installed_by_the_steps_of_the_readme() -> None:
    torch_for_cpus, engine = installed_by_the_readme()
    (default,) = [argument for argument in instructions("ARG") if argument.startswith("TORCH=")]
    assert default == f'TORCH="{torch_for_cpus}"'
    runs = [run for run in instructions("RUN") if run.startswith("pip install")]
    assert runs[0] == "pip install ${TORCH}"
    assert runs[1].replace("'", "").replace("[export]", "") == f"pip install {engine}"
    assert "python3 -m venv .venv" in instructions("RUN")
