"""Tables of the speedrun's rules in bench/README.md, from the code: `python -m tests.bench.speedrun_tables`."""

from __future__ import annotations

import re

from bench.lib.speedrun import rules
from tests.bench.readme import README

BLOCK = re.compile(
    r"(<!-- rules: python -m tests\.bench\.speedrun_tables -->\n).*?(<!-- end of rules -->)", re.DOTALL
)


def written(page: str) -> str:
    """The page with the tables as they must be."""
    return BLOCK.sub(lambda found: "\n".join([found[1], *rules.tables(), "", found[2]]), page)


if __name__ == "__main__":
    README.write_text(written(README.read_text(encoding="utf-8")), encoding="utf-8")
