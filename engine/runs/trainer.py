"""Trainer: the epochs of a run, an evaluation after each, and its checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from engine import models
from engine.attacks import masking, overfitting, table
from engine.attacks.kinds import Task, craft
from engine.attacks.pgd import describe
from engine.common.files import write_json
from engine.common.lookup import look_up
from engine.common.numbers import percent
from engine.common.stopping import Interrupted, RunFailed
from engine.config import AttackSpec, epochs_of
from engine.evaluation.measure import OnPass, Result, evaluate, further
from engine.methods import Method
from engine.pipelines.datasets import AnySplit
from engine.runs import checkpoints
from engine.runs.assemble import Parts, method_of, student_flops
from engine.runs.checkpoints import Progress
from engine.runs.reporting import plots
from engine.runs.session import Session
from engine.system import memory
from engine.system.precision import Precision, on_device
from engine.training import plan, schedule, step_networks, telemetry
from engine.training.performance.forecast import ImageCounts, StepClock, operations, peak_memory, told
from engine.training.step import OnDevice, StepOutput

# By `overfitting_guard`: the last good epoch is kept, and one that overfits does not replace the best.
_KEEPS_GOOD = {"off": False, "warn": False, "stop": True, "rollback": True}


class Trainer:
    """Training of a run's parts from its progress to its last epoch.

    write_row: keeps a row of metrics. cut_rows: drops those beyond a size of the file, written after that step.
    on_step: is called after each step.
    """

    def __init__(
        self,
        session: Session,
        parts: Parts,
        progress: Progress,
        *,
        write_row: Callable[[Mapping[str, Any]], object] = lambda row: None,
        cut_rows: Callable[[int, int], object] = lambda size, step: None,
        on_step: Callable[[], object] = lambda: None,
    ) -> None:
        self.session, self.parts, self.progress = session, parts, progress
        self.write_row, self.cut_rows, self.on_step = write_row, cut_rows, on_step
        self.saver = checkpoints.Saver()
        self._clock: StepClock | None = None  # of the first epoch that is trained here, from its begin

    @property
    def method(self) -> Method:
        """The method that is trained after the warm-up."""
        return self.parts.learner.method

    @property
    def attack(self) -> AttackSpec:
        """The attack of the training, with the lengths and the steps that are in force in this epoch."""
        attack = schedule.attack(self.session.config, self.progress.epoch)
        return overfitting.in_force(attack, len(self.progress.rolled_back))

    @property
    def may_overfit(self) -> bool:
        """True if the training is one that `overfitting_guard` guards."""
        return self.method.needs_x_adv and overfitting.is_possible(self.session.config.attack)

    @property
    def criterion(self) -> str:
        """Key of a row by which the best epoch is chosen.

        Standard training has no robustness to choose by: what little there is falls as the network learns.
        """
        return "robust_accuracy" if self.method.needs_x_adv else "natural_accuracy"

    def fit(self) -> dict[str, Any]:
        """Train the epochs that are left, evaluate, and return summary.json."""
        config, console = self.session.config, self.session.console
        steps = config.epochs * self.parts.data.pipeline.steps_per_epoch
        console.begin(f"{self.method.name}, {config.model}", steps, self.progress.step)
        try:
            with self.saver:
                if not self.progress.step:
                    self._snapshot()
                if self.may_overfit:
                    self._begin_guard()
                while self.progress.epoch < config.epochs:
                    self.epoch()
        except Interrupted:
            # Nobody leaves while the main process still writes: the launcher would end it.
            self.session.world.barrier()
            raise
        finally:
            console.end()
            self.parts.learner.release()
        return self._finish_run()

    def epoch(self) -> None:
        """Train the steps that are left of the current epoch, evaluate, and save."""
        config, console, progress = self.session.config, self.session.console, self.progress
        data, learner = self.parts.data, self.parts.learner
        epoch, method = progress.epoch, self._method_of(progress.epoch)
        if self.method.needs_x_adv:
            self._use_attack()
        memory.forget_peak(self.session.precision.device)
        learner.student.train()
        console.at_epoch(epoch + 1, config.epochs)
        self.parts.telemetry.start_clock()
        if self._clock is None:
            self._clock = StepClock(is_synchronous=self.session.precision.device.type == "cpu")
        for batch in learner.batches(data.pipeline.epoch(epoch, progress.step_in_epoch)):
            lr = schedule.learning_rate(config, progress.step, data.pipeline.steps_per_epoch)
            size = data.sampling.size_of(progress.step_in_epoch)
            if learner.seeks_micro_batch:
                micro = learner.find_micro_batch(batch, method, epoch=epoch, global_batch_size=size)
                console.message(f"Micro-batches of {micro} images fit into the memory")
            progress.step_in_epoch += 1
            progress.step += 1
            self._seed_dropout()
            learner.learn(
                batch,
                method,
                lr,
                epoch=epoch,
                step=progress.step,
                global_batch_size=size,
                on_output=OnDevice(self._add),
            )
            console.advance(progress.step)
            self.on_step()
            self._after_step()
        self._finish_epoch()

    def save(self, *before: tuple[Path, dict[str, Any]], as_good: bool = False) -> None:
        """Write last.pt, which is the same on all processes. before: files to be written first.

        as_good: and good.pt, the same, to go back to.
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
        good = ((run.good, last),) if as_good else ()
        self.saver.save(*before, (run.last, last), *good)

    @cached_property
    def _may_draw(self) -> bool:
        """True if the student may draw random numbers; a network of this package draws none."""
        return bool(models.get(self.session.config.model).version)

    def _seed_dropout(self) -> None:
        """Seed what the student draws after so many steps."""
        if self._may_draw:
            step_networks.seed_dropout(self.session.config.seed, self.progress.step, self.session.world)

    def _add(self, output: StepOutput, labels: Tensor) -> None:
        self.parts.telemetry.update(output, labels, self.parts.learner.numbers.step)

    def _after_step(self) -> None:
        """Log, save and stop where it is time to."""
        config, progress, session = self.session.config, self.progress, self.session
        epoch_is_trained = progress.step_in_epoch == self.parts.data.pipeline.steps_per_epoch
        if has_waited := progress.step % config.log_every == 0 or epoch_is_trained:
            totals = self.parts.telemetry.read()
            progress.totals = telemetry.add(progress.totals, totals)
            row = self._row("step", totals)
            self.write_row(row)
            session.console.step(row)
        assert self._clock is not None
        seconds = self._clock.after_step(has_waited=has_waited, ends_epoch=epoch_is_trained)
        if seconds and session.world.is_main:
            self._tell_forecast(seconds)
        self._snapshot()
        every, asked_to_stop = config.checkpoint_every, session.world.delayed_any(session.stop.requested)
        if (every and progress.step % every == 0) or asked_to_stop:
            self.save()
        if asked_to_stop:
            raise Interrupted

    def _tell_forecast(self, seconds: float) -> None:
        """Tell how long the training will take, of so many seconds a step, and how much memory it needs."""
        config, progress, parts = self.session.config, self.progress, self.parts
        dataset, student, steps = parts.data.dataset, self.session.student, parts.data.pipeline.steps_per_epoch
        images = ImageCounts(parts.data.sampling.epoch_size, len(parts.data.held_out), len(dataset.test))
        per_second = images.training / steps / seconds  # the last batch of an epoch may be smaller
        work = operations(config, self.method, parts.speedometer.forward, images)
        flops_per_second = work.training[progress.epoch] / images.training * per_second
        left = work.left(progress.epoch, progress.step_in_epoch / steps) / flops_per_second
        texts = [f"{told(work, progress.epoch, left)}, at {per_second:,.0f} images/s"]
        if student is not None:
            forward = student_flops(student, dataset, parts.data.image_CHW)
            then = operations(student, method_of(student), forward, images)
            texts.append(told(then, 0, then.left(0) / flops_per_second, " of the student after it"))
        texts.append(peak_memory(self.session.precision.device))
        self.session.console.message("; ".join(filter(None, texts)))

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
        if (peak := memory.peak(self.session.precision.device)) is not None:
            row["peak_memory"] = peak
        if learner.average is not None:
            clean = parts.data.pipeline.epoch(progress.epoch)
            self._seed_dropout()
            learner.average.after_epoch(progress.epoch, clean, parts.data.sampling.epoch_size, world)
        try:
            accuracies = self._evaluate(
                parts.data.held_out, ("natural", attack), self._choosing, on_pass=self._tell_evaluation
            )
            self.session.console.doing("")
        except Interrupted:
            self.save()
            raise
        row |= {
            "natural_accuracy": accuracies["natural"].accuracy,
            "robust_accuracy": accuracies[attack].accuracy,
            "robust_masked": accuracies[attack].masked,
            "measured_on": parts.data.selected_on,
            "measured_n": accuracies[attack].n,
            "measured_in": self._choosing.passes,
        }
        row |= world.broadcast_from_main(self._probe)
        if overfits := overfitting.complaint(row, progress.last):
            row[overfitting.COMPLAINT] = overfits
        natural, robust = (percent(row[f"{name}_accuracy"]) for name in ("natural", "robust"))
        measured = (
            f"natural {natural}, {table.find(attack).title} {robust} "
            f"of {row['measured_n']:,} {row['measured_on']} images"
        )
        self.session.console.epoch(row, config.epochs, measured)
        if overfits and self._can_roll_back():
            self._roll_back(row)
            return
        self.write_row(row)
        progress.last = row
        progress.epoch, progress.step_in_epoch, progress.totals = progress.epoch + 1, 0, {}
        best = []
        may_be_best = not (overfits and self._keeps_good)
        if not progress.best or (may_be_best and row[self.criterion] > progress.best[self.criterion]):
            progress.best = row
            content = checkpoints.content(self._student_part(learner.evaluated), progress)
            best = [(self.session.run.best, content)]
        self.save(*best, as_good=self._keeps_good and not overfits)
        self._guard(row)
        self._guard_overfitting(row)

    def _probe(self) -> dict[str, Any]:
        """Reliability of teacher and student on the probe images."""
        config, precision, parts = self.session.config, self.session.precision, self.parts
        student, teacher, attack = parts.learner.evaluated, parts.teachers.get("teacher"), config.attack
        names, ball = parts.data.dataset.class_names, (attack.epsilon, attack.threat_model)
        task = Task(student, len(names), ball, config.seed, names, counter=0)
        with on_device(teacher, precision.device):
            found = telemetry.probe(
                student,
                teacher,
                *parts.data.probe_images,
                partial(craft, table.find(config.eval.attack), task),
                beta=config.loss.beta,
            )
            if precision.amp_dtype is not None and self.method.needs_x_adv:
                found |= masking.probe(
                    student, *parts.data.probe_images, self.attack, precision, seed=config.seed, teacher=teacher
                )
            if self.may_overfit:
                found |= overfitting.probe(
                    student, *parts.data.probe_images, self.attack, seed=config.seed, teacher=teacher
                )
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

    @property
    def _keeps_good(self) -> bool:
        guard = self.session.config.overfitting_guard
        return look_up("overfitting_guard", guard, _KEEPS_GOOD) and self.may_overfit

    def _begin_guard(self) -> None:
        """Take up the guard against overfitting where the run stands; it may have had another guard before."""
        progress = self.progress
        if self.session.config.overfitting_guard == "rollback" and overfitting.COMPLAINT in progress.last:
            if self._can_roll_back():
                self._roll_back(progress.last)
            else:
                self._guard_overfitting(progress.last)
            return
        is_good = not progress.step_in_epoch and overfitting.COMPLAINT not in progress.last
        if self._keeps_good and is_good:
            self.save(as_good=True)  # there is none yet, or a killed run had not written it

    def _guard_overfitting(self, row: Mapping[str, Any]) -> None:
        """Warn or stop where an epoch overfits to the attack of the training."""

        def stop(text: str, hint: str) -> None:
            raise RunFailed(f"{text}; everything is saved, and overfitting_guard={hint}")

        answers: dict[str, Callable[[str], None]] = {
            "off": lambda text: None,
            "warn": lambda text: self.session.console.message(f"Warning: {text}"),
            "stop": lambda text: stop(text, "rollback goes back and on with more steps, warn goes on"),
            "rollback": lambda text: stop(f"{text}; {self._why_not_back()}", "warn goes on"),
        }
        answer = look_up("overfitting_guard", self.session.config.overfitting_guard, answers)
        if overfits := row.get(overfitting.COMPLAINT):
            answer(f"epoch {row['epoch']} overfits to the attack of the training: {overfits}")

    def _can_roll_back(self) -> bool:
        """True if the run goes back where it overfits; then good.pt is on the disk."""
        if self.session.config.overfitting_guard != "rollback":
            return False
        if len(self.progress.rolled_back) >= overfitting.MOST_ROLLBACKS:
            return False

        def is_kept() -> bool:
            self.saver.wait()
            return self.session.run.good.exists()

        return self.session.world.broadcast_from_main(is_kept)

    def _why_not_back(self) -> str:
        done = len(self.progress.rolled_back)
        if done >= overfitting.MOST_ROLLBACKS:
            return f"after {done} rollbacks there is no further one"
        return "there is no checkpoint of a good epoch to go back to"

    def _roll_back(self, row: Mapping[str, Any]) -> None:
        """Go back to the last good epoch, and on from there with twice the steps of the attack.

        row: of the epoch that overfits. It stays as a row of the event "rollback"; the others of its epoch go.
        """
        run = self.session.run
        good = restored(self.parts, run.good, checkpoints.read(run.good))
        rows = [*self.progress.rolled_back, {**row, "event": "rollback", "back_to_epoch": good.epoch}]
        self.cut_rows(good.rows_size, good.step)
        for rolled_back in rows[len(good.rolled_back) :]:
            self.write_row(rolled_back)
        self.progress = good.model_copy(update={"rolled_back": rows})
        where = f"end of epoch {good.epoch}" if good.epoch else "beginning"
        which = f"rollback {len(rows)} of {overfitting.MOST_ROLLBACKS}"
        self.session.console.message(
            f"Epoch {row['epoch']} overfits to the attack of the training: {row[overfitting.COMPLAINT]}; {which}: "
            f"back to the {where}, and on with {describe(self.attack)}"
        )
        self.save()

    def _use_attack(self) -> None:
        """Give the learner and the telemetry the attack that is in force."""
        self.parts.learner.attack_with(self.attack)
        self.parts.telemetry.attack_entries = self.attack.num_steps * self.parts.data.image_CHW.numel()

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
            summary["test_of_last"] = summary["test_of_best"] = self._test(last)
            if best["epoch"] != last["epoch"]:
                checkpoints.load_best(run.best, self.parts.learner.evaluated, best["epoch"])
                summary["test_of_best"] = self._test(best)
        if self.session.world.is_main:
            plots.draw(run, best)
            write_json(run.summary, summary)
        return summary

    def _test(self, of_epoch: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        """Results of `eval.final` on the test images, and of the further attacks that these call for.

        of_epoch: the row of the student that is tested.
        """
        images, config, console = self.parts.data.dataset.test, self.session.config, self.session.console
        current = ""

        def tell(name: str, done: int, total: int, doing: str) -> None:
            nonlocal current
            if name != current:
                current = name
                console.begin("test", total)
                console.at_epoch(of_epoch["epoch"], config.epochs)
            console.doing(doing or table.find(name).title, is_uneven=doing != "")
            console.advance(done)

        try:
            results = self._evaluate(images, config.eval.final, on_pass=tell)
            results |= self._evaluate(images, further(results), on_pass=tell)
        finally:
            console.end()
        for result in results.values():
            for warning in result.warnings:
                self.session.console.message(f"Warning: {warning}")
        return {name: result.numbers() for name, result in results.items()}

    @property
    def _choosing(self) -> Precision:
        """Precision in which epochs are compared: of the training, unless the attack needs the network itself."""
        precision = self.session.precision
        in_any_form = table.find(self.session.config.eval.attack).takes_any_form
        return precision if in_any_form else replace(precision, amp_dtype=None)

    def _tell_evaluation(self, name: str, done: int, total: int, doing: str) -> None:
        """Show where the evaluation after an epoch is, beside the steps of the training."""
        self.session.console.doing(f"{doing or table.find(name).title} {done:,}/{total:,} images")

    def _evaluate(
        self,
        images: AnySplit,
        attacks: Sequence[str],
        precision: Precision | None = None,
        *,
        on_pass: OnPass,
    ) -> dict[str, Result]:
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
            on_pass=on_pass,
            stop=self.session.stop,
            world=self.session.world,
            precision=precision,
        )

    def _student_part(self, student: nn.Module) -> dict[str, Any]:
        return checkpoints.student_part(student, self.session.config, self.parts.data.dataset.class_names)

    def _row(self, event: str, totals: telemetry.Totals) -> dict[str, Any]:
        """A row of metrics.jsonl; epochs are counted from 1."""
        config, progress, parts = self.session.config, self.progress, self.parts
        method = self._method_of(progress.epoch)
        row = {
            "event": event,
            "epoch": progress.epoch + 1,
            "step": progress.step,
            "phase": method.name,
            "lr": schedule.learning_rate(config, progress.step - 1, parts.data.pipeline.steps_per_epoch),
        }
        if self.may_overfit or (self.method.needs_x_adv and config.attack.steps_warmup):
            row["attack_steps"] = self.attack.num_steps
        if self.method.needs_x_adv and config.attack.epsilon_warmup:
            row["attack_epsilon"] = self.attack.epsilon
        row |= telemetry.summarise(totals, method.term_names)
        passes = plan.passes(method, self.attack, config.forwards, in_warmup=method != self.method)
        of_one_process = totals["samples"] / totals["seconds"] / self.session.world.size
        return row | {"share_of_peak": parts.speedometer.share(of_one_process, passes)}

    def _method_of(self, epoch: int) -> Method:
        """The method to train with: the base method until the warm-up ends."""
        config = self.session.config
        warmup = epochs_of(config.loss.warmup, config.epochs)
        return self.method.warmup if self.method.warmup is not None and epoch < warmup else self.method


def restored(parts: Parts, path: Path, saved: Mapping[str, Any]) -> Progress:
    """Give the parts the state of a checkpoint, and return its progress.

    Raises ValueError, one line naming file and key, where it is not of this very training.
    """
    checkpoints.check_fit(path, saved, parts.learner, parts.data.pipeline.steps_per_epoch)
    parts.learner.student.load_state_dict(saved["student"])
    parts.learner.load_state_dict(saved)
    parts.telemetry.load_state_dict(saved["telemetry"])
    return Progress(**saved["progress"])
