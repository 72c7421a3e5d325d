"""`engine export`: a trained network as files for other runtimes, compared with the original; and a model card."""

from __future__ import annotations

import hashlib
import itertools
import shutil
import sys
import tempfile
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from engine.commands.completion import DIR, FILE, named, one_of
from engine.commands.options import (
    SEED,
    device_option,
    import_option,
    normalisation_of,
    normalisation_options,
    threat_model_option,
    weights_option,
)
from engine.common.files import checkpoint_of
from engine.common.stopping import EXIT_FAILED, RunFailed
from engine.deployment.exporting.formats import FORMATS, INT8

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from engine.common.console import ConsoleReporter
    from engine.deployment.exporting.formats import Format
    from engine.deployment.exporting.model_card import CheckRow, File
    from engine.deployment.exporting.writers import ExportSubject
    from engine.evaluation.evaluate_checkpoint import EvaluationConfig, Opened
    from engine.evaluation.files.artefact_check import ArtefactCheck

_COMPARED, _CALIBRATED = 64, 128
"""Images on which logits are compared, and by which the ranges of 8 bits are chosen."""


@click.command("export")
@click.argument("checkpoint", type=FILE)
@click.option(
    "--format",
    "formats",
    default="onnx",
    show_default=True,
    metavar="FORMAT[,FORMAT]",
    type=one_of(*FORMATS),
    help=f"Of {', '.join(FORMATS)}.",
)
@click.option(
    "--out", type=DIR, metavar="DIR", help="New folder for the files. [beside the checkpoint or its run]"
)
@click.option(
    "--quantize", type=one_of(INT8), help="int8: an ONNX model of 8 bits as well, compared and checked by itself."
)
@click.option(
    "--check",
    type=click.IntRange(0, 10**6),
    default=200,
    show_default=True,
    metavar="N",
    help="Test images on which each file is attacked beside the original; 0: none.",
)
@click.option("--license", "licence", metavar="TEXT", help="Licence of the weights, for the model card.")
@click.option("--dataset", type=named("dataset"), help="Data set. [the one it was trained on]")
@click.option("--data", type=FILE, help="Where the data set lies. [where it was in training]")
@click.option("--model", type=named("model"), help="Architecture, where the checkpoint does not tell.")
@weights_option
@normalisation_options
@click.option("--epsilon", help="Radius of the check, e.g. 8/255. [as in training, else 8/255]")
@threat_model_option
@click.option(
    "--image-size", type=click.IntRange(1, 4096), help="Height and width of its images. [as in training]"
)
@click.option("--seed", type=SEED, default=0, show_default=True, help="Seed of the check's attacks.")
@device_option
@import_option
def export(
    checkpoint: str,
    formats: str,
    out: str | None,
    quantize: str | None,
    check: int,
    licence: str | None,
    **options: Any,
) -> None:
    """Write a trained network for other runtimes: CHECKPOINT is a file, or a run directory for its best one.

    Each file takes float32 images (N, 3, H, W), RGB in [0, 1], and gives logits. One that does not agree with the
    original is not kept. README.md, the model card, has the accuracies and the check; the exit code is 1 where
    that fails.
    """
    from engine.deployment.exporting.formats import wanted

    chosen = wanted(formats)
    if quantize is not None:
        _check_quantize(quantize, chosen)
    options["normalize"] = normalisation_of(options)
    choices = _Choices(chosen, out, quantize is not None, check, licence)
    if not exported(checkpoint_of(checkpoint), choices, options):
        sys.exit(EXIT_FAILED)


@dataclass(frozen=True)
class _Choices:
    """Choices of an export, as the options of the command. check: images; 0: none."""

    formats: tuple[Format, ...]
    out: str | None
    quantizes: bool
    check: int
    licence: str | None


def exported(path: Path, choices: _Choices, options: Mapping[str, Any]) -> bool:
    """Write the files of a checkpoint and print what was found; True where every check passed.

    options: of `EvaluationConfig`. Raises ValueError and RunFailed in one line.
    """
    from engine.commands.tables import print_list
    from engine.common.console import ConsoleReporter
    from engine.deployment.exporting.formats import QUANTIZED, check_installed

    check_installed(choices.formats)
    reporter, check = ConsoleReporter(), choices.check
    limit = None if choices.quantizes else max(check, _COMPARED)  # the ranges of 8 bits are of other images
    subject, test = _opened(path, options, limit, reporter)
    if test.opened is not None and not check:
        test = replace(test, reason="--check 0")
    run = _Export(subject, test, check, options["seed"], reporter)
    with _new_folder(path, choices.out) as folder:
        files = [run.file(entry, folder.written) for entry in choices.formats]
        if choices.quantizes:
            files.append(run.quantized(QUANTIZED, folder.written))
        run.write_card(files, folder.written, choices.licence)
    print_list(
        ("file", "agrees on", "max logit difference", "under attack"),
        [
            (
                file.entry.main,
                f"{file.agreement.same} of {file.agreement.n}",
                f"{file.agreement.difference:.1e}",
                ("pass" if file.passed else "FAIL") if file.checks or not file.passed else "not checked",
            )
            for file in files
        ],
    )
    reporter.message(f"Written: {folder.final}")
    failed = [file.entry.main for file in files if not file.passed]
    if failed:
        reporter.message(f"FAIL: {', '.join(failed)}: see {folder.final / 'README.md'}")
    return not failed


def _check_quantize(quantize: str, chosen: tuple[Format, ...]) -> None:
    from engine.common.lookup import check_known

    check_known("--quantize", quantize, (INT8,))
    if "onnx" not in [entry.name for entry in chosen]:
        raise ValueError(f"--quantize {quantize}: is made of the ONNX model: --format onnx is needed too")


@dataclass(frozen=True)
class _Test:
    """Test images, and the network on the device of the check. reason: why there are none, "" where there are."""

    opened: Opened | None
    reason: str


def _opened(
    path: Path, options: Mapping[str, Any], limit: int | None, reporter: ConsoleReporter
) -> tuple[ExportSubject, _Test]:
    """The network to be exported, and the test images, if they are there. Raises ValueError in one line."""
    from engine.attacks import table
    from engine.deployment import opening
    from engine.deployment.exporting.writers import ExportSubject
    from engine.evaluation import evaluate_checkpoint
    from engine.evaluation.evaluate_checkpoint import EvaluationConfig

    if (name := opening.format_of(path)) is not None:
        raise ValueError(f"{path}: is an exported file ({name}) already; export its checkpoint")
    attacks = table.resolve(["natural"])
    config = EvaluationConfig(["natural"], limit=limit, **options)
    try:
        found = evaluate_checkpoint.opened(path, config, attacks)
    except ValueError as error:
        loaded = opening.load(
            path, model=config.model, weights=config.weights, normalize=config.normalize
        )  # the fault of a file comes before that of its data
        if options["dataset"] is not None or options["data"] is not None:
            raise
        reporter.message(f"Note: no test images: {error}; compared on random images, and not attacked")
        return ExportSubject(loaded, _size_without_data(config, loaded)), _Test(None, f"no test images: {error}")
    reporter.notes([*found.images.notes, *found.loaded.notes])
    height, width = found.images.test.shape
    return ExportSubject(found.loaded, (height, width)), _Test(found, "")


def _size_without_data(config: EvaluationConfig, loaded: Any) -> tuple[int, int]:
    """Height and width of a network's images: as chosen, as in training, or those of its data set.

    Raises ValueError where none of these tells.
    """
    from engine.deployment.views import view_for

    side = config.image_size or view_for(loaded)[0].size
    if side is None:
        raise ValueError(f"{loaded.path}: --image-size: its images' height and width are not known")
    return side, side


@dataclass(frozen=True)
class _Export:
    """One export: writes files, compares and checks them."""

    subject: ExportSubject
    test: _Test
    check: int
    seed: int
    reporter: ConsoleReporter

    @cached_property
    def compared(self) -> Tensor:
        """Images on which logits are compared: of the test, balanced; seeded random ones where there are none."""
        from engine.deployment.exporting.programs import example
        from engine.pipelines.splits import limited

        if self.test.opened is None:
            return example(self.subject.image_size, _COMPARED)
        return self._taken(limited(self.test.opened.images.test.labels, _COMPARED, 0, "--check"))

    def _calibrating(self) -> Tensor | None:
        """Test images on which nothing is checked; None where there are none."""
        import torch

        from engine.pipelines.splits import limited

        if self.test.opened is None:
            return None
        labels = self.test.opened.images.test.labels
        free_N = torch.ones(len(labels), dtype=torch.bool)
        if self.check:
            free_N[limited(labels, self.check, 0, "--check")] = False
        chosen_N = free_N.nonzero().flatten()[:_CALIBRATED]
        return self._taken(chosen_N) if len(chosen_N) else None

    def _taken(self, sample_N: Tensor) -> Tensor:
        """Test images on the CPU, (N, 3, H, W) in [0, 1]."""
        import torch

        from engine.evaluation.batches import batch_of

        assert self.test.opened is not None
        test = self.test.opened.images.test
        return batch_of(test.images, test.labels, sample_N, torch.device("cpu"), torch.float32)[0]

    def file(self, entry: Format, folder: Path) -> File:
        """Write a format. Raises RunFailed where the file does not agree with the original."""
        from engine.deployment.exporting import agreement, writers

        self.reporter.message(f"Writing {', '.join(entry.files)}")
        writers.write(entry, self.subject, folder)
        found = agreement.compare(entry, folder, self.subject.network, self.compared)
        if found.faults:
            raise RunFailed(
                f"{entry.main}: does not agree with {self.subject.loaded.path}: {'; '.join(found.faults)}"
            )
        return self._described(entry, folder, found)

    def quantized(self, entry: Format, folder: Path) -> File:
        """Write the model of 8 bits. It is kept where it does not agree, and the card says so."""
        from engine.deployment.exporting import agreement, quantization

        self.reporter.message(f"Writing {entry.main}")
        scheme = quantization.quantize(
            folder / "model.onnx", folder / entry.main, self.subject.facts, self._calibrating()
        )
        self.reporter.message(f"Quantised: {scheme}")
        found = agreement.compare(entry, folder, self.subject.network, self.compared)
        return self._described(entry, folder, found)

    def _described(self, entry: Format, folder: Path, agreement: Any) -> File:
        from engine.deployment.exporting.model_card import File

        content = (folder / entry.main).read_bytes()
        digest = hashlib.sha256(content).hexdigest()
        return File(entry, len(content), digest, agreement, self._checked(folder / entry.main, entry))

    @cached_property
    def _check(self) -> ArtefactCheck:
        """The check under attack, of the original on its device."""
        from engine.evaluation.files.artefact_check import ArtefactCheck
        from engine.pipelines.splits import limited

        assert self.test.opened is not None
        loaded, config, images, _ = self.test.opened
        return ArtefactCheck(
            loaded.module,
            loaded.num_classes,
            (config.attack.epsilon, config.attack.threat_model),
            images.test,
            limited(images.test.labels, self.check, 0, "--check"),
            self.seed,
            self.reporter.task_progress(),
        )

    def _checked(self, path: Path, entry: Format) -> list[CheckRow]:
        """Rows of the check under attack; none where it is not made."""
        from engine.deployment import opening
        from engine.deployment.exporting.model_card import CheckRow

        if self.test.opened is None or not self.check or entry.name in _SAME_CODE:
            return []
        exported = opening.load(path, class_names=self.test.opened.images.class_names)
        try:
            rows = self._check.compare(exported.module, entry.tolerance.accuracy)
        except FloatingPointError as error:
            raise RunFailed(f"{path.name}: {error}") from None
        finally:
            self.reporter.end()
        return [
            CheckRow(
                row.title,
                row.n,
                row.original / row.n,
                row.exported / row.n,
                row.interval(),
                row.tolerance,
                row.passed,
                row.numbers,
            )
            for row in rows
        ]

    def write_card(self, files: list[File], folder: Path, licence: str | None) -> None:
        """Write the model card."""
        from engine.deployment.exporting.model_card import CARD, Card
        from engine.runs.reporting import card_facts

        loaded = self.subject.loaded
        count = len(self.compared)
        what = "seeded random images" if self.test.opened is None else "test images"
        card = Card(
            self.subject.facts,
            card_facts.training(loaded),
            card_facts.accuracies(loaded),
            files,
            f"{count} {what}",
            licence,
            self.test.reason,
        )
        (folder / CARD).write_text(card.text(), encoding="utf-8")


_SAME_CODE = ("safetensors", "plain")
"""Formats of which the weights are the original's, bit by bit, and the operations torch's own: not attacked."""


@dataclass
class _Folder:
    """A new folder. written: where it is until all is in it. final: where it will be."""

    written: Path
    final: Path


@contextmanager
def _new_folder(checkpoint: Path, out: str | None) -> Iterator[_Folder]:
    """A folder that gets its name where all in it is written, and is gone after an exception."""
    place = checkpoint.parent if (checkpoint.parent / "config.yaml").is_file() else checkpoint.with_suffix("")
    if out is not None and Path(out).exists():
        raise ValueError(f"--out: {out} exists")
    name = f"{place.resolve().name}-export"
    numbered = (place.with_name(f"{name}-{number}") for number in itertools.count(2))
    free = (path for path in itertools.chain([place.with_name(name)], numbered) if not path.exists())
    final = next(free) if out is None else Path(out)
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        written = Path(tempfile.mkdtemp(prefix=".export-", dir=final.parent))
    except OSError as error:
        raise ValueError(f"--out: cannot write to {final.parent}: {error.strerror}") from None
    try:
        yield _Folder(written, final)
        written.chmod(0o755)
        if final.exists():
            raise ValueError(f"--out: {final} exists")
        written.rename(final)
    except OSError as error:
        raise RunFailed(f"{final} was not written: {error.strerror or error}") from None
    finally:
        shutil.rmtree(written, ignore_errors=True)
