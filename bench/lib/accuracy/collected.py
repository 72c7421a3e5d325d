"""Cells of a protocol that are measured, read together, and what they cost."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from bench.lib.accuracy import costs
from bench.lib.accuracy import protocol as protocols
from bench.lib.accuracy.cells import MeasuredCell, ResultFolder
from bench.lib.accuracy.costs import ProtocolCosts
from bench.lib.accuracy.protocol import AccuracyProtocol, ProtocolTable
from bench.lib.accuracy.statistics import ComparedTable, compare_rows
from bench.lib.machine import Facts

Hardware = tuple[str, str, int, int]
"""Device, processor, its cores, and torch's threads: seconds of others are not compared."""


@dataclass(frozen=True)
class RowCost:
    """A row of a table: seconds of an epoch and bytes, medians over seeds or rounds, and both by the baseline's.

    relative: median over the seeds of the ratios of a seed; None where the baseline has none of them.
    """

    row: str
    epoch_seconds: float | None
    relative: float | None
    peak_memory: float | None
    relative_memory: float | None


@dataclass(frozen=True)
class Collected:
    """All that is measured of a protocol.

    in_turn: seconds of steps that took turns. cells: by row and seed. teachers: by section. wanted: of cells.
    """

    protocol: AccuracyProtocol
    results: ResultFolder
    in_turn: ProtocolCosts | None
    cells: Mapping[tuple[str, int], MeasuredCell]
    teachers: Mapping[str, MeasuredCell]
    wanted: int

    def of_table(self, table: ProtocolTable) -> list[MeasuredCell]:
        """Cells of a table's rows."""
        return [cell for (row, _), cell in self.cells.items() if row in table.rows]

    def compared(self, table: ProtocolTable) -> list[ComparedTable]:
        """The table under each of its attacks."""
        found = []
        for attack in table.attacks:
            of_row = {
                row: {seed: cell.accuracies[attack] for (name, seed), cell in self.cells.items() if name == row}
                for row in table.rows
            }
            found.append(compare_rows(table, attack, of_row))
        return found

    def costs(self, table: ProtocolTable) -> tuple[Hardware, list[RowCost]] | None:
        """The hardware on which most cells of a table were measured, and costs of its cells there alone."""
        measured = Counter(hardware(cell) for cell in self.of_table(table))
        if not measured:
            return None
        ((most, _),) = measured.most_common(1)
        there = {key: cell for key, cell in self.cells.items() if hardware(cell) == most}
        return most, [self._in_turn(_cost(row, table.baseline, there), table) for row in table.rows]

    def _in_turn(self, cost: RowCost, table: ProtocolTable) -> RowCost:
        """The cost with the seconds of steps that took turns, where there are such."""
        if self.in_turn is None:
            return cost
        own, baseline = self.in_turn.rows[cost.row], self.in_turn.rows[table.baseline]
        return replace(cost, epoch_seconds=own.epoch_seconds, relative=own.relative_to(baseline))


def hardware(cell: MeasuredCell) -> Hardware:
    """The machine of a cell."""
    facts = cell.facts
    return facts["device"], facts["processor"], facts["cores"], facts["threads"]


def collect(protocol: AccuracyProtocol, results: ResultFolder) -> Collected:
    """Read all cells that are measured; those whose teachers are not are none of this protocol's.

    Raises ValueError for a damaged file, for one without all `Facts`, and for one of other settings.
    """
    teachers = {section: cell for section in protocol.teachers if (cell := results.read(section))}
    weights = {section: teacher.weights for section, teacher in teachers.items()}
    missing = {section: "" for section in protocol.teachers if section not in teachers}
    wanted = list(protocols.cells(protocol, weights | missing))
    found: dict[tuple[str, int], MeasuredCell] = {}
    for one in wanted:
        if not missing.keys() & one.teachers.keys() and (measured := results.measured(one)):
            found[one.row, one.seed] = measured
    for measured_cell in (*teachers.values(), *found.values()):
        if absent := Facts.__required_keys__ - measured_cell.facts.keys():
            raise ValueError(f"facts of {measured_cell.row!r}, seed {measured_cell.seed}: no {min(absent)!r}")
    return Collected(protocol, results, costs.read(protocol, results), found, teachers, len(wanted))


def _cost(row: str, baseline: str, cells: Mapping[tuple[str, int], MeasuredCell]) -> RowCost:
    own = {seed: cell for (name, seed), cell in cells.items() if name == row}
    pairs = [(cell, cells[baseline, seed]) for seed, cell in own.items() if (baseline, seed) in cells]
    return RowCost(
        row,
        _median(cell.epoch_seconds for cell in own.values()),
        _median(cell.epoch_seconds / other.epoch_seconds for cell, other in pairs if other.epoch_seconds),
        _median(cell.peak_memory for cell in own.values() if cell.peak_memory is not None),
        _median(
            cell.peak_memory / other.peak_memory
            for cell, other in pairs
            if cell.peak_memory is not None and other.peak_memory
        ),
    )


def _median(values: Iterable[float]) -> float | None:
    found = list(values)
    return statistics.median(found) if found else None
