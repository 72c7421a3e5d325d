"""Pack a folder of results into few files of limited size: `python -m bench.pack RESULTS TO [FILE...]`.

TO gets summary.txt, results.tar.xz with all that is small, and the FILEs, the most wanted first, in pieces that
`cat` joins. Each file is written beside its place and renamed: whoever is killed leaves what was there before.
What is cut or left out is told, here and at the end of summary.txt. Needs nothing but Python itself.
"""

from __future__ import annotations

import hashlib
import io
import math
import re
import sys
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path

MIB = 2**20
FILES, FILE_BYTES, TOTAL_BYTES = 8, 16 * MIB, 64 * MIB  # what may be in TO, at any moment
PIECE_BYTES = FILE_BYTES - MIB
LOG_HEAD, LOG_TAIL = 64 * 1024, 192 * 1024  # bytes that are kept of a longer log
SUMMARY, ARCHIVE, PART = "summary.txt", "results.tar.xz", ".part"
PIECE = re.compile(r"\.\d+of\d+$")


def pack(results: Path, to: Path, wanted: Sequence[Path] = ()) -> list[str]:
    """Pack, and return a line for each file that is in pieces, cut or left out.

    Raises OSError, and ValueError where other files leave no room.
    """
    to.mkdir(parents=True, exist_ok=True)
    archive, lines = _archive(results, {*wanted})
    others = [path for path in to.rglob("*") if path.is_file() and not _ours(path)]
    files = FILES - 3 - len(others)  # the summary, the archive, and the one that is being written
    room = TOTAL_BYTES - MIB - 2 * len(archive) - sum(path.stat().st_size for path in others)
    if files < 0 or room < 0:
        raise ValueError(f"{to} holds {len(others)} files of others, which leave no room")
    pieces: dict[str, bytes] = {}
    for path in (path for path in wanted if path.exists()):
        content, name = path.read_bytes(), "-".join(path.relative_to(results).parts)
        count = math.ceil(len(content) / PIECE_BYTES)
        if count > files or len(content) > room:
            lines.append(f"left out: {path.relative_to(results)}, {len(content) / MIB:.1f} MiB, for want of room")
            continue
        files, room = files - count, room - len(content)
        for index in range(count):
            pieces[f"{name}.{index + 1}of{count}"] = content[index * PIECE_BYTES : (index + 1) * PIECE_BYTES]
        lines.append(f"cat {name}.* gives {name}, sha256 {hashlib.sha256(content).hexdigest()}")
    for path in to.iterdir():  # pieces of older contents, before there are more files than may be
        if _ours(path) and path.name not in {SUMMARY, ARCHIVE} and not _holds(path, pieces.get(path.name)):
            path.unlink()
    summary = (results / SUMMARY).read_text(encoding="utf-8") + "".join(f"{line}\n" for line in lines)
    for name, content in {ARCHIVE: archive, **pieces, SUMMARY: summary.encode()[:MIB]}.items():
        if not _holds(to / name, content):
            (to / (name + PART)).write_bytes(content)
            (to / (name + PART)).replace(to / name)
    return lines


def _archive(results: Path, wanted: set[Path]) -> tuple[bytes, list[str]]:
    """All files but checkpoints and the wanted, the smallest first, and what is cut or left out.

    They fit as they are, so they fit compressed.
    """
    lines: list[str] = []
    packed, used = io.BytesIO(), 0
    with tarfile.open(fileobj=packed, mode="w:xz", preset=2) as tar:
        for path in sorted(_files(results), key=lambda path: (path.stat().st_size, path)):
            name, size = path.relative_to(results).as_posix(), path.stat().st_size
            kept = min(size, LOG_HEAD + LOG_TAIL) if path.suffix == ".log" else size
            if path in wanted:
                continue
            if path.suffix == ".pt" or used + kept > PIECE_BYTES:
                lines.append(f"left out: {name}, {size / MIB:.1f} MiB")
                continue
            content = path.read_bytes()
            if kept < size:
                gap = f"\n[{size - kept} bytes are left out here]\n"
                lines.append(f"cut: {name}, {size / MIB:.1f} MiB, to its beginning and its end")
                content = content[:LOG_HEAD] + gap.encode() + content[-LOG_TAIL:]
            entry = tarfile.TarInfo(name)
            entry.size, entry.mtime = len(content), int(path.stat().st_mtime)
            tar.addfile(entry, io.BytesIO(content))
            used += len(content) + 4 * tarfile.BLOCKSIZE
    return packed.getvalue(), lines


def _files(results: Path) -> Iterator[Path]:
    """Those that are whole."""
    for path in results.rglob("*"):
        if path.is_file() and not path.is_symlink() and not path.name.endswith((".tmp", PART)):
            yield path


def _ours(path: Path) -> bool:
    name = path.name.removesuffix(PART)
    return name in {SUMMARY, ARCHIVE} or PIECE.search(name) is not None


def _holds(path: Path, content: bytes | None) -> bool:
    return content is not None and path.exists() and path.read_bytes() == content


def main() -> None:
    """Print the lines, and what is there in the end; exit code 1 where nothing could be packed."""
    results, to, *wanted = map(Path, sys.argv[1:])
    try:
        lines = pack(results, to, wanted)
    except (OSError, ValueError) as error:
        sys.exit(f"not packed: {error}")
    sizes = [path.stat().st_size for path in to.rglob("*") if path.is_file()]
    lines.append(f"packed: {len(sizes)} files, {sum(sizes) / MIB:.1f} MiB in {to}")
    sys.stdout.write("".join(f"{line}\n" for line in lines))


if __name__ == "__main__":
    main()
