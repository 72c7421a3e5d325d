"""The rows of a run: one stream to metrics.jsonl and to TensorBoard."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from engine.rundir import RunDir

_NOT_A_CURVE = ("event", "epoch", "step")


class Journal:
    """Writes rows; a resumed run drops what it had written after the checkpoint, and writes it again."""

    def __init__(self, run: RunDir, rows_size: int, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        run.truncate_rows(rows_size)
        self._run = run
        self._events = SummaryWriter(str(run.tensorboard), purge_step=step + 1)

    def write(self, row: Mapping[str, Any]) -> None:
        """Add one row; its numbers become points of TensorBoard's curves at the row's step."""
        self._run.append_row(row)
        for key, value in row.items():
            curves = value if isinstance(value, dict) else {None: value}
            for name, number in curves.items():
                if key in _NOT_A_CURVE or isinstance(number, bool) or not isinstance(number, int | float):
                    continue
                tag = f"{row['event']}/{key}" if name is None else f"{row['event']}/{key}/{name}"
                self._events.add_scalar(tag, number, row["step"])

    def close(self) -> None:
        """Flush TensorBoard's queue."""
        self._events.close()
