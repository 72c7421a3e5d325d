"""Tables of docs/configuration.md, from the facts of the keys: `python -m tests.key_tables`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

from engine.commands.completion import KNOWN_NAMES
from engine.common import yaml_text
from engine.config import DEFAULTS, KEYS

PAGE = Path(__file__).resolve().parents[1] / "docs" / "configuration.md"
BLOCK = re.compile(
    r"(<!-- keys of ([\w, ]+): python -m tests\.key_tables -->\n).*?(<!-- end of keys -->)", re.DOTALL
)


def written(page: str) -> str:
    """The page with the tables as they must be: in each block, of the sections that its first line names."""
    return BLOCK.sub(lambda found: "\n".join([found[1], *lines(found[2].split(", ")), "", found[3]]), page)


def lines(sections: list[str]) -> Iterator[str]:
    """The table of the keys of those sections; "run" is the one of keys without a section."""
    yield from ("| key | flag | default | meaning |", "|---|---|---|---|")
    for name, key in KEYS.items():
        if (name.rpartition(".")[0] or "run") not in sections:
            continue
        flag = f" `{key.flag.partition('/')[0]}`" if key.flag else ""
        names = (
            ", ".join(f"`{known}`" for known in KNOWN_NAMES[str(key.values)]()) if "{names}" in key.text else ""
        )
        text = key.text.replace("{names}", names) + (f"; `null`: {key.null}" if key.null else "")
        yield f"| `{name}` |{flag} | `{default(DEFAULTS[name])}` | {text} |"


def default(value: Any) -> str:
    """A default as one would write it: 8/255 where it is that many 255ths."""
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        return f"[{', '.join(map(default, value))}]"
    if isinstance(value, float):
        ratio = Fraction(value).limit_denominator(255)
        if ratio.denominator == 255 and float(ratio) == value:
            return str(ratio)
    return yaml_text.write(value).removesuffix("...\n").strip()


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
