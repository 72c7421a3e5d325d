"""The rows of a run: one stream to metrics.jsonl and to TensorBoard."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping
from typing import Any

from engine.plugins.builtin_loggers import numbers_of
from engine.runs.run_directory import RunDir


class MetricsWriter:
    """Writes rows; a resumed run drops what it had written after the checkpoint, and writes it again.

    A row is on its way to the disk when `write` returns: torch's SummaryWriter would keep TensorBoard's for two
    minutes, and its thread has nobody to tell of a full disk. Raises OSError where the files cannot be written.
    """

    def __init__(self, run: RunDir, rows_size: int, step: int) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._run, self._event, self._summary = run, Event, Summary
        run.tensorboard.mkdir(exist_ok=True)
        name = f"events.out.tfevents.{time.time_ns()}.{socket.gethostname()}.{os.getpid()}"  # read in this order
        self._file = (run.tensorboard / name).open("xb", buffering=0)
        self._records = RecordWriter(self._file)
        self._start = SessionLog(status=SessionLog.START)
        self._add(file_version="brain.Event:2")
        self.cut(rows_size, step)

    def cut(self, rows_size: int, step: int) -> None:
        """Drop the rows beyond that size of metrics.jsonl, and TensorBoard's points after the step."""
        self._run.truncate_rows(rows_size)
        # TensorBoard drops the points from this step on that were written before.
        self._add(step=step + 1, session_log=self._start)

    def write(self, row: Mapping[str, Any]) -> None:
        """Add one row; its numbers become points of TensorBoard's curves at the row's step."""
        self._run.append_row(row)
        points = [
            self._summary.Value(tag=tag, simple_value=number) for tag, number in numbers_of.curves(row).items()
        ]
        self._add(step=row["step"], summary=self._summary(value=points))

    def close(self) -> None:
        """Close TensorBoard's file."""
        self._file.close()

    def _add(self, **content: Any) -> None:
        self._records.write(self._event(wall_time=time.time(), **content).SerializeToString())
