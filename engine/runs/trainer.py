"""Trainer: the epochs of a run, an evaluation after each, and its checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from engine.attacks import masking
from engine.attacks.pgd import preset
from engine.common.files import write_json
from engine.common.lookup import look_up
from engine.common.stopping import Interrupted, RunFailed
from engine.config import TERMS, epochs_of
from engine.evaluation.measure import Result, evaluate, further
from engine.methods import Method
from engine.pipelines.datasets import AnySplit
from engine.runs import checkpoints, plots
from engine.runs.assemble import Parts
from engine.runs.checkpoints import Progress
from engine.runs.session import Session
from engine.system.precision import on_device
from engine.training import plan, schedule, telemetry
from engine.training.step import StepOutput


class Trainer:
    """Training of a run's parts from its progress to its last epoch.

    write_row: keeps a row of metrics. on_step: is called after each step.
    """

    def __init__(
        self,
        session: Session,
        parts: Parts,
        progress: Progress,
        *,
        write_row: Callable[[Mapping[str, Any]], object] = lambda row: None,
        on_step: Callable[[], object] = lambda: None,
    ) -> None:
        self.session, self.parts, self.progress = session, parts, progress
        self.write_row, self.on_step = write_row, on_step
        self.saver = checkpoints.Saver()

    @property
    def method(self) -> Method:
        """The method that is trained after the warm-up."""
        return self.parts.learner.method

    @property
    def criterion(self) -> str:
        """Key of a row by which the best epoch is chosen.

        Standard training has no robustness to choose by: what little there is falls as the network learns.
        """
        return "robust_accuracy" if self.method.needs_x_adv else "natural_accuracy"

    def fit(self) -> dict[str, Any]:
        """Train the epochs that are left, evaluate, and return summary.json."""
        config, console, progress = self.session.config, self.session.console, self.progress
        steps = config.epochs * self.parts.data.pipeline.steps_per_epoch
        console.begin(f"{self.method.name} {config.model}", steps, progress.step)
        try:
            with self.saver:
                if not progress.step:
                    self._snapshot()
                while progress.epoch < config.epochs:
                    self.epoch()
        except Interrupted:
            # Nobody leaves while the main process still writes: the launcher would end it.
            self.session.world.barrier()
            raise
        finally:
            console.end()
        return self._finish_run()

    def epoch(self) -> None:
        """Train the steps that are left of the current epoch, evaluate, and save."""
        config, console, progress = self.session.config, self.session.console, self.progress
        data, learner = self.parts.data, self.parts.learner
        epoch, method = progress.epoch, self._method_of(progress.epoch)
        learner.student.train()
        self.parts.telemetry.start_clock()
        for batch in learner.batches(data.pipeline.epoch(epoch, progress.step_in_epoch)):
            lr = schedule.learning_rate(config, progress.step, data.pipeline.steps_per_epoch)
            size = data.sampling.size_of(progress.step_in_epoch)
            if learner.seeks_micro_batch:
                micro = learner.find_micro_batch(batch, method, epoch=epoch, global_batch_size=size)
                console.message(f"Micro-batches of {micro} images fit into the memory")
            progress.step_in_epoch += 1
            progress.step += 1
            learner.learn(batch, method, lr, epoch=epoch, global_batch_size=size, on_output=self._add)
            console.advance(progress.step)
            self.on_step()
            self._after_step()
        self._finish_epoch()

    def save(self, *before: tuple[Path, dict[str, Any]]) -> None:
        """Write last.pt, which is the same on all processes. before: files to be written first.

        Raises FloatingPointError where weights are not finite: the file stays as it was.
        """
        parts, progress, run = self.parts, self.progress, self.session.run
        sums = parts.telemetry.state_dict()
        student = parts.learner.student
        if not torch.stack([value.isfinite().all() for value in student.parameters()]).all():
            raise FloatingPointError(f"the weights after step {progress.step} are not finite")
        if not self.session.world.is_main:
            return
        progress.rows_size = run.rows_size()
        last = checkpoints.content(
            self._student_part(student),
            progress,
            telemetry=sums,
            data_sha256=parts.data.dataset.sha256,
            pipeline=parts.data.pipeline_kind,
            teachers_sha256=dict(parts.teachers_sha256),
            init_sha256=parts.init_sha256,
            **parts.learner.state_dict(),
        )
        self.saver.save(*before, (run.last, last))

    def _add(self, output: StepOutput, labels: Tensor) -> None:
        self.parts.telemetry.update(output, labels, self.progress.step)

    def _after_step(self) -> None:
        """Log, save and stop where it is time to."""
        config, progress, session = self.session.config, self.progress, self.session
        epoch_is_trained = progress.step_in_epoch == self.parts.data.pipeline.steps_per_epoch
        if progress.step % config.log_every == 0 or epoch_is_trained:
            totals = self.parts.telemetry.read()
            progress.totals = telemetry.add(progress.totals, totals)
            row = self._row("step", totals)
            self.write_row(row)
            session.console.step(row)
        self._snapshot()
        every, asked_to_stop = config.checkpoint_every, session.world.delayed_any(session.stop.requested)
        if (every and progress.step % every == 0) or asked_to_stop:
            self.save()
        if asked_to_stop:
            raise Interrupted

    def _snapshot(self) -> None:
        """Keep the weights as they are after this step, to be compared with those of another program."""
        step, every, run = self.progress.step, self.session.config.snapshot_every, self.session.run
        if every and step % every == 0 and self.session.world.is_main:
            run.snapshots.mkdir(exist_ok=True)
            content = self._student_part(self.parts.learner.student) | {"step": step}
            self.saver.save((run.snapshots / f"step-{step}.pt", content))

    def _finish_epoch(self) -> None:
        """Evaluate, write the epoch's row, and save; a run that is interrupted here evaluates again."""
        config, progress, parts, learner = self.session.config, self.progress, self.parts, self.parts.learner
        attack, world = config.eval.attack, self.session.world
        row = self._row("epoch", progress.totals)
        if learner.average is not None:
            clean = parts.data.pipeline.epoch(progress.epoch)
            learner.average.after_epoch(progress.epoch, clean, parts.data.sampling.num_samples, world)
        try:
            accuracies = self._evaluate(parts.data.held_out, ("natural", attack))
        except Interrupted:
            self.save()
            raise
        row |= {
            "natural_accuracy": accuracies["natural"].accuracy,
            "robust_accuracy": accuracies[attack].accuracy,
            "robust_masked": accuracies[attack].masked,
            "measured_on": parts.data.selected_on,
        }
        row |= world.broadcast_from_main(self._probe)
        self.write_row(row)
        self.session.console.epoch(row, config.epochs)
        progress.last = row
        progress.epoch, progress.step_in_epoch, progress.totals = progress.epoch + 1, 0, {}
        best = []
        if not progress.best or row[self.criterion] > progress.best[self.criterion]:
            progress.best = row
            content = checkpoints.content(self._student_part(learner.evaluated), progress)
            best = [(self.session.run.best, content)]
        self.save(*best)
        self._guard(row)

    def _probe(self) -> dict[str, Any]:
        """Reliability of teacher and student on the probe images."""
        config, precision, parts = self.session.config, self.session.precision, self.parts
        student, teacher, attack = parts.learner.evaluated, parts.teachers.get("teacher"), config.attack
        with on_device(teacher, precision.device):
            found = telemetry.probe(
                student,
                teacher,
                *parts.data.probe_images,
                preset(config.eval.attack, attack.epsilon, attack.threat_model),
                beta=config.loss.beta,
                seed=config.seed,
            )
        if precision.amp_dtype is not None and self.method.needs_x_adv:
            found |= masking.probe(student, *parts.data.probe_images, attack, precision, seed=config.seed)
        return found

    def _guard(self, row: dict[str, Any]) -> None:
        """Warn or stop where the attack of the training is weaker than it seems."""

        def stop(complaint: str) -> None:
            raise RunFailed(f"{complaint}; everything is saved, and masking_guard=warn goes on")

        answers: dict[str, Callable[[str], None]] = {
            "off": lambda complaint: None,
            "warn": lambda complaint: self.session.console.message(f"Warning: {complaint}"),
            "stop": stop,
        }
        answer = look_up("masking_guard", self.session.config.masking_guard, answers)
        if complaint := masking.complaint(row):
            answer(f"the attack of epoch {row['epoch']} may be masked: {complaint}")

    def _finish_run(self) -> dict[str, Any]:
        """Evaluate the last and the best student on the test images, draw the pictures, write summary.json."""
        config, run, dataset = self.session.config, self.session.run, self.parts.data.dataset
        best, last = self.progress.best, self.progress.last
        summary: dict[str, Any] = {
            "method": self.method.name,
            "semantics": config.semantics,
            "model": config.model,
            "dataset": config.dataset,
            "selected_on": self.parts.data.selected_on,
            "selected_by": self.criterion,
            "skipped_images": {"train": len(dataset.train.skipped), "test": len(dataset.test.skipped)},
            "best": best,
            "last": last,
        }
        if config.eval.final:
            summary["test_of_last"] = summary["test_of_best"] = self._test()
            if best["epoch"] != last["epoch"]:
                checkpoints.load_best(run.best, self.parts.learner.evaluated, best["epoch"])
                summary["test_of_best"] = self._test()
        if self.session.world.is_main:
            plots.draw(run)
            write_json(run.summary, summary)
        return summary

    def _test(self) -> dict[str, dict[str, Any]]:
        """Results of `eval.final` on the test images, and of the further attacks that these call for."""
        images = self.parts.data.dataset.test
        results = self._evaluate(images, self.session.config.eval.final)
        results |= self._evaluate(images, further(results))
        for result in results.values():
            for warning in result.warnings:
                self.session.console.message(f"Warning: {warning}")
        return {name: result.as_dict() for name, result in results.items()}

    def _evaluate(self, images: AnySplit, attacks: Sequence[str]) -> dict[str, Result]:
        config = self.session.config
        return evaluate(
            self.parts.learner.evaluated,
            images,
            attacks,
            epsilon=config.attack.epsilon,
            threat_model=config.attack.threat_model,
            batch_size=config.eval.batch_size,
            seed=config.seed,
            device=self.session.precision.device,
            stop=self.session.stop,
            world=self.session.world,
        )

    def _student_part(self, student: nn.Module) -> dict[str, Any]:
        return checkpoints.student_part(student, self.session.config, self.parts.data.dataset.class_names)

    def _row(self, event: str, totals: telemetry.Totals) -> dict[str, Any]:
        """A row of metrics.jsonl; epochs are counted from 1."""
        config, progress, parts = self.session.config, self.progress, self.parts
        method = self._method_of(progress.epoch)
        terms = tuple(term for term, weight in zip(TERMS, method.weights, strict=True) if weight != (0, 0))
        row = {
            "event": event,
            "epoch": progress.epoch + 1,
            "step": progress.step,
            "phase": method.name,
            "lr": schedule.learning_rate(config, progress.step - 1, parts.data.pipeline.steps_per_epoch),
        }
        row |= telemetry.summarise(totals, terms)
        passes = plan.passes(method, config.attack, config.forwards, in_warmup=method != self.method)
        of_one_process = totals["samples"] / totals["seconds"] / self.session.world.size
        return row | {"share_of_peak": parts.speedometer.share(of_one_process, passes)}

    def _method_of(self, epoch: int) -> Method:
        """The method to train with: the base method until the warm-up ends."""
        config = self.session.config
        warmup = epochs_of(config.loss.warmup, config.epochs)
        return self.method.warmup if self.method.warmup is not None and epoch < warmup else self.method
