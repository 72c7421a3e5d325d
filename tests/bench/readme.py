"""Contents of bench/README.md."""

from __future__ import annotations

import re
from pathlib import Path

README = Path(__file__).resolve().parents[2] / "bench" / "README.md"


def documented(heading: str) -> list[str]:
    """Names in the first cells of the table below a heading."""
    section = re.split(r"^#+ ", README.read_text().partition(f"# {heading}\n")[2], flags=re.MULTILINE)[0]
    return re.findall(r"`(\w+)`", "".join(re.findall(r"^\| (`[^|]*) \|", section, re.MULTILINE)))
