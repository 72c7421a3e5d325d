"""Model card of an export: README.md, of plain facts, with the head that model hubs read."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from engine.deployment.artefacts.facts import ArtefactFacts
from engine.deployment.exporting.agreement import Agreement
from engine.deployment.exporting.formats import Format, loading

CARD = "README.md"
_NO_LICENCE = "unknown"


class Accuracy(NamedTuple):
    """An accuracy of the original. interval: of 95 %. source: the file that has it."""

    attack: str
    accuracy: float
    interval: tuple[float, float]
    n: int
    numbers: str
    source: str


class CheckRow(NamedTuple):
    """Accuracies of the original and of an exported file on the same n images.

    interval: of the latter. numbers: of the attack, in words.
    """

    attack: str
    n: int
    original: float
    exported: float
    interval: tuple[float, float]
    tolerance: float
    passed: bool
    numbers: str


@dataclass(frozen=True)
class File:
    """An exported file. checks: under attack; empty where it was not checked."""

    entry: Format
    size: int
    sha256: str
    agreement: Agreement
    checks: Sequence[CheckRow] = ()

    @property
    def passed(self) -> bool:
        """True if it agrees with the original, and no check failed."""
        return not self.agreement.faults and all(row.passed for row in self.checks)


@dataclass(frozen=True)
class Card:
    """All that a model card says.

    training: names and texts. images: on which the files were compared, in words.
    licence: as it was given; None: the user's to state. unchecked: reason why no attack was run; "" where it was.
    """

    facts: ArtefactFacts
    training: Sequence[tuple[str, str]]
    accuracies: Sequence[Accuracy]
    files: Sequence[File]
    images: str
    licence: str | None
    unchecked: str = ""

    def text(self) -> str:
        """The card in Markdown."""
        parts = (
            self._head(),
            f"# {_escaped(self._title())}",
            self._network(),
            self._files(),
            self._loading(),
            self._accuracies(),
            self._checks(),
            _LIMITS.format(
                ball=self._ball(), data=_escaped(self.facts.dataset or "data that the file does not name")
            ),
            self._licence(),
        )
        return "\n\n".join(part.strip() for part in parts if part) + "\n"

    def _title(self) -> str:
        method = next((text for name, text in self.training if name == "method"), "")
        return f"{self.facts.model}{f', {self.facts.dataset}' if self.facts.dataset else ''}" + (
            f", trained by {method}" if method else ""
        )

    def _head(self) -> str:
        lines = [
            "---",
            f"license: {json.dumps(self.licence or _NO_LICENCE)}",
            "pipeline_tag: image-classification",
            "tags: [image-classification, adversarial-robustness, adversarial-distillation]",
            "metrics: [accuracy]",
        ]
        if self.facts.dataset:
            lines.append(f"datasets: [{json.dumps(self.facts.dataset)}]")
        return "\n".join((*lines, "---"))

    def _network(self) -> str:
        facts, names = self.facts, self.facts.class_names
        rows: list[tuple[str, str]] = [
            ("architecture", facts.model),
            ("input", f"{facts.input}; {facts.image_size[0]}x{facts.image_size[1]} pixels"),
            ("output", facts.output),
            (
                "classes",
                f"{facts.num_classes}: {', '.join(names)}" if names else f"{facts.num_classes}, not named",
            ),
            *self.training,
            ("ball of the training", self._ball()),
            ("checkpoint", f"sha256 {facts.checkpoint.sha256}"),
            ("written by", ", ".join(f"{name} {text}" for name, text in facts.made_by.items())),
        ]
        return "## Network\n\n" + _table(("", ""), rows)

    def _ball(self) -> str:
        facts = self.facts
        if facts.epsilon is None or facts.threat_model is None:
            return "not told by the checkpoint"
        level = f"{facts.epsilon * 255:.4g}/255" if facts.threat_model == "Linf" else f"{facts.epsilon:.4g}"
        return f"{facts.threat_model}, epsilon {level}"

    def _files(self) -> str:
        rows = []
        for file in self.files:
            most, least, _ = file.entry.tolerance
            agreement = file.agreement
            rows.append(
                (
                    f"`{file.entry.main}`",
                    file.entry.summary,
                    f"{file.size:,} bytes",
                    f"{agreement.difference:.1e} ({'any' if most is None else f'at most {most:.0e}'})",
                    f"{agreement.same} of {agreement.n} (at least {least:.1%})",
                    _verdict(not agreement.faults),
                )
            )
        columns = ("file", "format", "size", "max logit difference", "same class", "agrees")
        hashes = "\n".join(f"- `{file.entry.main}`: sha256 {file.sha256}" for file in self.files)
        return (
            f"## Files\n\nCompared with the original on {_escaped(self.images)}, each by its own runtime, in "
            "batches of 1, of 7 and of more. Differences are relative to max(1, largest logit); tolerances stand "
            f"in brackets.\n\n{_table(columns, rows, escape=False)}\n\n{hashes}"
        )

    def _loading(self) -> str:
        height, width = self.facts.image_size
        blocks = (
            f"{file.entry.name}:\n\n```python\n{loading(file.entry, (height, width))}\n```" for file in self.files
        )
        return "## Loading\n\n" + "\n\n".join(blocks)

    def _accuracies(self) -> str:
        if not self.accuracies:
            return (
                "## Accuracy of the original\n\nNone is recorded beside the checkpoint: `engine eval CHECKPOINT` "
                "measures it."
            )
        rows = [
            (
                each.attack,
                f"{each.accuracy:.2%}",
                _interval(each.interval),
                f"{each.n:,}",
                each.numbers,
                each.source,
            )
            for each in self.accuracies
        ]
        columns = ("attack", "accuracy", "95 % interval", "n", "its numbers", "file")
        return f"## Accuracy of the original\n\nOn test images.\n\n{_table(columns, rows)}"

    def _checks(self) -> str:
        if self.unchecked:
            return f"## Check under attack\n\nNot made: {_escaped(self.unchecked)}."
        parts = [
            "## Check under attack\n\nThe exported files and the original on the same test images, balanced over "
            "the classes. A row passes where both accuracies differ by no more than the tolerance or one image."
        ]
        for file in self.files:
            if not file.checks:
                parts.append(
                    f"`{file.entry.main}`: not attacked: it has the weights and the operations of the original."
                )
                continue
            rows = [
                (
                    row.attack,
                    f"{row.n}",
                    f"{row.original:.2%}",
                    f"{row.exported:.2%}",
                    _interval(row.interval),
                    f"{row.tolerance:.0%}",
                    _verdict(row.passed),
                )
                for row in file.checks
            ]
            columns = ("images", "n", "original", "exported", "95 % interval", "tolerance", "")
            parts.append(f"`{file.entry.main}`: **{_verdict(file.passed)}**\n\n{_table(columns, rows)}")
        numbers = {row.attack: row.numbers for file in self.files for row in file.checks}
        parts.append("\n".join(f"- {name}: {_escaped(told)}" for name, told in numbers.items()))
        return "\n\n".join(parts)

    def _licence(self) -> str:
        if self.licence is not None:
            return f"## Licence\n\n{_escaped(self.licence)}"
        return (
            "## Licence\n\nNot stated: whoever publishes these weights says under which licence, by `--license`."
        )


def _verdict(passed: bool) -> str:
    return "pass" if passed else "FAIL"


def _interval(bounds: tuple[float, float]) -> str:
    return f"{bounds[0]:.1%} to {bounds[1]:.1%}"


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]], *, escape: bool = True) -> str:
    lines = [" | ".join(columns), " | ".join("---" for _ in columns)]
    lines += [" | ".join(_escaped(cell) if escape else cell for cell in row) for row in rows]
    return "\n".join(f"| {line} |" for line in lines)


def _escaped(text: str) -> str:
    """Text without a meaning in Markdown and HTML, in one line."""
    plain = " ".join(str(text).split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]|!#])", r"\\\1", plain)


_LIMITS = """\
## Limits

- Accuracy under attack is empirical: an upper bound of the robust accuracy, by the attacks named above. A stronger
  attack may find more; nothing here is certified.
- It holds for {ball}: perturbations inside that ball around an image in [0, 1]. It says nothing of larger ones, of
  other norms, or of rotations, weather, patches and other changes of an image.
- The images are those of {data}. On images of another origin, size or preparation the accuracy is unknown.
- The network always answers with one of its classes, also for images of none of them.
"""
