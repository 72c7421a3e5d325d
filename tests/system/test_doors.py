"""Attack surface of several processes at work: real runs, in a folder of hostile modules."""

from __future__ import annotations

import ipaddress
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from engine.system import launcher
from tests.system.test_launcher import plant

PATIENCE = 240.0
HOST_NAME = "no-such-host.invalid"

# Python runs it first in every process. What it notes is what this test looks for.
HOOK = """
import pickle, socket, traceback
from pathlib import Path

def noted(name, function):
    def call(*arguments, **keys):
        with open(Path(__file__).with_name("notes"), "a") as file:
            file.write(f"{name}\\n{''.join(traceback.format_stack(limit=4))}")
        return function(*arguments, **keys)
    return call

class Unpickler(pickle.Unpickler):
    load = noted("Unpickler", pickle.Unpickler.load)

pickle.Unpickler = Unpickler
for module, names in (
    (pickle, ("load", "loads")),
    (socket, ("getfqdn", "gethostbyname", "gethostbyname_ex", "gethostbyaddr", "getaddrinfo", "getnameinfo")),
):
    for name in names:
        setattr(module, name, noted(name, getattr(module, name)))
"""

COMMANDS = {
    "train": ["train", "--procs", "2"],
    "seeds": ["train", "--procs", "1", "--seeds", "0"],
    "eval": ["eval", "--procs", "2", "--attacks", "natural"],
}


@dataclass
class Seen:
    """The end of a command, the addresses at which its processes listened, and the calls that were noted."""

    name: str
    code: int
    printed: str
    processes: int
    listened: set[str]
    notes: str
    executed: bool
    host_name: str


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("seeds", "eval")]


@pytest.fixture(scope="module", params=["train", *SLOW])
def seen(request: pytest.FixtureRequest, tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Seen:
    root = tmp_path_factory.mktemp("doors")
    told = plant(root / "folder")
    hook = root / "hook"
    hook.mkdir()
    (hook / "sitecustomize.py").write_text(HOOK)
    if request.param == "eval":
        shutil.copy(tiny.teacher, root / "at.pt")
        flags = [str(root / "at.pt"), "--data", str(tiny.folder), "--device", "cpu"]
    else:
        _, *flags = tiny.flags(method="at", epochs=1, out=str(root / "run"))
    prefix = _renamed()
    environment = {"PYTHONPATH": str(hook), "ENGINE_CACHE": str(root / "cache"), "OMP_NUM_THREADS": "1"}
    # As where several machines train: on one, it must not count.
    environment["GLOO_SOCKET_IFNAME"] = socket.if_nameindex()[-1][1]
    with subprocess.Popen(
        [*prefix, *launcher.command(*COMMANDS[request.param], *flags)],
        cwd=told.parent, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env=os.environ | environment,
    ) as process:  # fmt: skip
        listened: set[str] = set()
        processes: set[int] = set()
        until = time.monotonic() + PATIENCE
        while process.poll() is None:
            assert time.monotonic() < until
            family = {process.pid, *_children(process.pid)}
            processes |= family
            listened |= {address for one in family for address in _listening(one)}
            time.sleep(0.02)
        printed = process.stdout.read() if process.stdout else ""
    notes = (hook / "notes").read_text() if (hook / "notes").exists() else ""
    host_name = HOST_NAME if prefix else socket.gethostname()
    return Seen(
        request.param, process.returncode, printed, len(processes), listened, notes, told.exists(), host_name
    )


def _renamed() -> list[str]:
    """Prefix of a command that gives the machine a name that does not resolve; [] where that is not allowed."""
    prefix = ["unshare", "--uts", "--map-root-user", "sh", "-c", f'hostname {HOST_NAME} && exec "$@"', "sh"]
    try:
        tried = subprocess.run([*prefix, "hostname"], capture_output=True, text=True, check=False)
    except OSError:
        return []
    return prefix if tried.stdout.strip() == HOST_NAME else []


def _children(process: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{process}/task/{process}/children").read_text().split()]
    except OSError:  # it has ended
        return []


def _listening(process: int) -> Iterator[str]:
    """Addresses at which a process waits for connections."""
    names = set()
    try:
        for entry in Path(f"/proc/{process}/fd").iterdir():
            with suppress(OSError):  # closed meanwhile
                names.add(str(entry.readlink()))
        tables = [Path(f"/proc/{process}/net/{table}").read_text() for table in ("tcp", "tcp6")]
    except OSError:
        return
    for row in (line.split() for table in tables for line in table.splitlines()[1:]):
        if row[3] == "0A" and f"socket:[{row[9]}]" in names:
            words = bytes.fromhex(row[1].partition(":")[0])
            yield str(ipaddress.ip_address(b"".join(words[i : i + 4][::-1] for i in range(0, len(words), 4))))


def test_what_a_process_listens_at_is_seen() -> None:
    """The other tests see nothing where this one fails."""
    everywhere = "0.0.0.0"  # noqa: S104  # for a moment, and nothing answers
    for family, address in ((socket.AF_INET, everywhere), (socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")):
        try:
            server = socket.create_server((address, 0), family=family)
        except OSError:
            assert family == socket.AF_INET6, "a machine without IPv6"
            continue
        with server:
            assert address in set(_listening(os.getpid()))


def test_the_run_succeeds(seen: Seen) -> None:
    assert seen.code == 0, seen.printed


def test_only_this_machine_can_connect(seen: Seen) -> None:
    launcher_and_children = 1 + int(COMMANDS[seen.name][2])
    assert seen.processes >= launcher_and_children
    assert bool(seen.listened) == (launcher_and_children > 2)
    assert all(ipaddress.ip_address(address).is_loopback for address in seen.listened), seen.listened


def test_nothing_is_unpickled_and_no_name_is_looked_up(seen: Seen) -> None:
    assert seen.notes == ""


def test_no_file_of_the_current_folder_is_run(seen: Seen) -> None:
    assert not seen.executed


def test_a_host_name_that_does_not_resolve_does_not_matter(seen: Seen) -> None:
    if seen.host_name != HOST_NAME:
        pytest.skip("this machine cannot be renamed for a process (unshare --uts)")
    assert seen.code == 0, seen.printed
