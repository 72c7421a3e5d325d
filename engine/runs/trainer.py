"""Training runs: epochs, an evaluation after each, checkpoints, and everything a run leaves behind.

from engine import train
result = train({"method": "at", "dataset": "digits", "model": "resnet8", "epochs": 2})
print(result.summary["best"]["robust_accuracy"])
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from engine.runs import checkpoints, plots, resuming, teachers
from engine import config, methods, models, semantics
from engine.attacks import masking
from engine.training import optimizer, plan, schedule, telemetry
from engine.runs import provenance
from engine.system import precision
from engine.attacks.pgd import preset
from engine.runs.checkpoints import Progress
from engine.config import TERMS, RunConfig
from engine.system.distributed import World, is_launched, too_few
from engine.evaluation.measure import Result, batch_of, check_names, evaluate, few_images, further
from engine.common.files import expanded
from engine.runs.metrics_writer import Journal
from engine.kernels import dispatch
from engine.training.learner import Learner
from engine.models.sync_batch_norm import synchronise
from engine.common.lookup import is_on, look_up, nearest
from engine.pipelines import choice, datasets
from engine.pipelines.beton import is_beton
from engine.pipelines.sampling import Sampling
from engine.pipelines.splits import Request, balanced
from engine.training.profiling import Profiler
from engine.common.console import Reporter
from engine.common.files import write_json
from engine.runs.run_directory import Begun, RunDir
from engine.training.speed import Speedometer
from engine.training.step import StepOutput
from engine.common.stopping import Interrupted, RunFailed, Stop, graceful_stop
from engine.models.weights import LoadedModel, load_model, origin


@dataclass(frozen=True)
class RunResult:
    """Where a run lies, and its summary.json."""

    path: Path
    summary: dict[str, Any]


def train(
    run_config: RunConfig | Mapping[str, Any] | None = None,
    reporter: Reporter | None = None,
    *,
    profile: int = 0,
    world: World | None = None,
    again: bool = False,
    **keys: Any,
) -> RunResult:
    """Train a configuration in a new run directory.

    run_config: a RunConfig, or nested keys of one; keys: further ones, e.g. epochs=2, which win.
    reporter: who tells the user; None says nothing.
    profile: that many steps are traced, see `engine.training.profiling`. world: processes that train together; all call
    this with the same arguments. again: see `begin`.
    Raises ValueError for what the user can mend, RunFailed for a run that cannot go on, and Interrupted after a
    signal, when everything is saved for `resume`.
    """
    world = world or World()
    complete = _complete(run_config, keys)
    mine: list[Begun] = []  # of the main process alone: it made them

    def begun() -> tuple[str, dict[str, Any]]:
        say = (reporter or Reporter()).message
        mine.append(begin(complete, again=again, processes=world.size, say=say))
        return str(mine[0].run.path), dict(mine[0].changes)

    path, changes = world.broadcast_from_main(begun)
    with mine[0].or_nothing() if mine else nullcontext():
        return resume(path, reporter, profile=profile, world=world, **changes)


def begin(
    complete: RunConfig, *, again: bool = False, processes: int = 1, say: Callable[[str], None] = lambda line: None
) -> Begun:
    """The directory of a new run of a configuration, with nothing but that in it: `resume` does the rest.

    again: go on where such a run was stopped: the one in `out`, or without `out` the latest unfinished one below
    runs/; where there is none a new one begins. processes: how many will train. say: is told what was decided.
    Raises ValueError for a configuration that cannot be run, and for an `out` that is taken.
    """
    complete = config.with_absolute_paths(complete)
    _check(complete)
    if complete.batch_size % processes:
        raise ValueError(f"batch_size {complete.batch_size} must be a multiple of the {processes} processes")
    found = RunDir.find(complete) if again else None
    return found or RunDir.create(precision.settled(complete, say=say))


def resume(
    path: Path | str,
    reporter: Reporter | None = None,
    *,
    profile: int = 0,
    world: World | None = None,
    **changes: Any,
) -> RunResult:
    """Continue the run in that directory from its last checkpoint; a finished run is returned as it is.

    The number of processes may be another than before. changes: keys that are given anew, see `engine.runs.resuming`;
    more epochs extend the run, a finished one too. Raises as `train` does.
    """
    run, begun = RunDir.existing(Path(path))
    reporter, world = reporter or Reporter(), world or World()
    complete = resuming.carried_on(begun, resuming.changed(begun, changes))
    if summary := world.broadcast_from_main(lambda: run.result(complete)):
        reporter.message(f"{path} is finished: nothing to resume")
        return RunResult(run.path, summary)
    if complete.amp and complete.amp_dtype == "auto":  # config.yaml is older than the key
        kept = world.broadcast_from_main(lambda: provenance.amp_dtype(run) or precision.settled(complete).amp_dtype)
        complete = complete.model_copy(update={"amp_dtype": kept})
    return _until_stopped(run, complete, reporter, profile, world)


def _complete(given: RunConfig | Mapping[str, Any] | None, keys: Mapping[str, Any]) -> RunConfig:
    if isinstance(given, RunConfig):
        return config.load(given.tree(), keys) if keys else given
    if given is None or isinstance(given, Mapping):
        return config.load(given or {}, keys)
    raise ValueError(f"run_config: a RunConfig or a mapping of its keys is expected, got {given!r:.200}")


def _check(complete: RunConfig) -> None:
    """Refuse what would fail only after data were loaded, before a run directory is made."""
    methods.get(complete.method, semantics=complete.semantics, loss=complete.loss)
    models.check(complete.model)
    datasets.check(complete.dataset)
    for section in ("teacher", "teacher_st"):
        name, known = getattr(complete, section).method, semantics.TEACHER_METHODS
        if name not in known:
            raise ValueError(f"{section}.method: {name!r} trains no teacher; {nearest(name, known)}")
    preset(complete.eval.attack, complete.attack.epsilon)
    check_names(complete.eval.final)
    if complete.optim.implementation == "apex":
        optimizer.check_apex()
    precision.device(complete.device)


def _until_stopped(run: RunDir, complete: RunConfig, reporter: Reporter, profile: int, world: World) -> RunResult:
    with graceful_stop(reporter.message, launched=is_launched()) as stop:
        try:
            with world.watching(stop):
                return _run(run, complete, reporter, stop, world, profile=profile)
        except Interrupted:
            raise Interrupted(f"interrupted, all saved; to continue: engine train --resume {run.path}") from None


def _run(
    run: RunDir,
    complete: RunConfig,
    reporter: Reporter,
    stop: Stop,
    world: World,
    dataset: datasets.AnyDataset | None = None,
    *,
    profile: int = 0,
) -> RunResult:
    trainer = None
    try:
        with precision.deterministic(amp=complete.amp), ExitStack() as held:
            world.broadcast_from_main(lambda: held.enter_context(run.locked()))
            trainer = Trainer(run, complete, reporter, stop, world, dataset)
            if profile and world.is_main:
                trainer.profiler = Profiler(profile, run.path, trainer.precision.device, reporter)
            return RunResult(run.path, trainer.fit())
    except FloatingPointError as error:
        good = f"the last good checkpoint is {run.last}" if run.last.exists() else "there is no checkpoint yet"
        raise RunFailed(f"{error}; {good}") from None
    except OSError as error:
        raise RunFailed(
            f"{error.filename or run.path}: {error.strerror or error}; what was saved before is whole"
        ) from error
    finally:
        reporter.end()
        if trainer is not None:
            trainer.pipeline.close()
            if trainer.profiler is not None:
                trainer.profiler.close()
            if trainer.journal is not None:
                trainer.journal.close()


class Trainer:
    """One run: its data, its student, its teachers, and how far it has come."""

    def __init__(
        self,
        run: RunDir,
        complete: RunConfig,
        reporter: Reporter,
        stop: Stop,
        world: World,
        dataset: datasets.AnyDataset | None = None,
    ) -> None:
        saved = checkpoints.read(run.last) if world.broadcast_from_main(run.last.exists) else None
        complete = _carried_on(run, saved, complete, reporter)
        world.broadcast_from_main(run.sessions)  # a damaged provenance.json is told of before the work
        self.run, self.config, self.reporter, self.stop, self.world = run, complete, reporter, stop, world
        self.method = methods.get(complete.method, semantics=complete.semantics, loss=complete.loss)
        # Standard training has no robustness to choose by: what little there is falls as the network learns.
        self.criterion = "robust_accuracy" if self.method.needs_x_adv else "natural_accuracy"
        self.precision = precision.choose(complete, world.local_rank)
        reporter.message(dispatch.describe(self.precision.device, fused=self.precision.fused))
        if world.size > 1:
            share = complete.batch_size // world.size
            of = f"all {complete.batch_size}" if is_on("sync_bn", complete.sync_bn) else f"its own {share}"
            reporter.message(f"Processes: {world.size}, {share} images each; BatchNorm in each by {of} images")
            if self.precision.device.type == "cuda" and (warning := too_few(share)):
                reporter.message(warning)

        if saved and self.precision.note:
            reporter.message(self.precision.note)
        for note in origin(saved) if saved else ():
            reporter.message(f"Note: {run.last} is {note}")
        # What "auto" chose holds for the whole run: decoders differ by a grey level here and there.
        wanted = (saved or {}).get("pipeline", complete.pipeline)
        self.dataset = dataset or self._load_data(wanted, is_new=saved is None)
        world.check_same("the data set", self.dataset.sha256)
        training, self.held_out, self.selected_on = hold_out(self.dataset, complete.validation)
        if dataset is None and (warning := few_images(len(self.held_out))):  # a teacher's are its student's
            reporter.message(f"Warning: the best epoch is chosen on {self.selected_on} images, {warning}")
        told = world.broadcast_from_main(lambda: tuple(choice.choose(wanted, training, self.precision.device)))
        self.pipeline_choice = choice.Choice(*told)
        reporter.message(f"Pipeline: {self.pipeline_choice.kind} ({self.pipeline_choice.reason})")
        self.sampling = Sampling(
            len(training), complete.batch_size, complete.seed, complete.order, shard=world.shard
        )
        self.pipeline = choice.build(
            self.pipeline_choice.kind,
            training,
            self.sampling,
            augment=complete.augment,
            flip=self.dataset.flip if complete.flip is None else complete.flip,
            device=self.precision.device,
            dtype=self.precision.dtype,
            workers=complete.workers,
            batches_ahead=complete.batches_ahead,
            say=reporter.message,
        )
        self.probe_images = self._probe_images(training)
        if self._fewest_images() == 1:
            check_one_image(complete, self.dataset, self.probe_images[0].shape[1:])
        initial = None if saved or complete.init is None else initial_weights(complete, self.dataset)
        self.init_sha256: str | None = None if initial is None else initial.sha256

        self.progress = Progress()
        self.teachers_sha256: dict[str, str] = {}
        if saved:
            if saved["data_sha256"] != self.dataset.sha256:
                raise ValueError(f"--resume: {self.dataset.source} changed since {run.last} was written")
            self.progress = Progress(**saved["progress"])
            self.teachers_sha256 = saved["teachers_sha256"]
            self.init_sha256 = saved.get("init_sha256")
        self.teachers = self._obtain_teachers()
        student = build_student(complete, self.dataset, self.precision)
        if initial is not None:
            for note in (f"Initial weights: {initial.name} of {complete.init}", *initial.notes):
                reporter.message(note)
            student.load_state_dict(initial.module.state_dict())
        if is_on("sync_bn", complete.sync_bn) and world.size > 1:
            student = synchronise(student, self.precision.device)
        self.speedometer = Speedometer(student, self.probe_images[0].shape[1:], self.precision)
        self.telemetry = telemetry.Telemetry(self.precision.device, self._attack_entries(), world)
        self.learner = Learner(
            student, self.teachers, self.method, complete, self.precision, world, self.telemetry.attack_counts
        )
        for teacher in self.teachers.values():
            teacher.to("cpu")  # its twin runs; the original is asked once an epoch, in full precision
        if saved:
            checkpoints.check_fit(run.last, saved, self.learner, self.pipeline.steps_per_epoch)
            student.load_state_dict(saved["student"])
            self.learner.load_state_dict(saved)
            self.telemetry.load_state_dict(saved["telemetry"])
        if world.is_main:
            run.update(complete)  # what was given anew fits: the hashes are those of before
        self.saver = checkpoints.Saver()
        self.profiler: Profiler | None = None
        self.journal = Journal(run, self.progress.rows_size, self.progress.step) if world.is_main else None

    def _load_data(self, pipeline: str, *, is_new: bool) -> datasets.AnyDataset:
        try:
            return load_data(self.config, self.reporter, pipeline)
        except ValueError as error:
            if is_new or not str(error).startswith("data:"):
                raise
            raise ValueError(f"{error}; data that were moved: --resume {self.run.path} --data PATH") from None

    def fit(self) -> dict[str, Any]:
        """Train the epochs that are left, evaluate, and return summary.json."""
        progress, steps = self.progress, self.pipeline.steps_per_epoch
        self.reporter.begin(f"{self.method.name} {self.config.model}", self.config.epochs * steps, progress.step)
        try:
            with self.saver:
                if not progress.step:
                    self._snapshot()
                while progress.epoch < self.config.epochs:
                    self._train_epoch()
                    self._finish_epoch()
        except Interrupted:
            self.world.barrier()  # nobody leaves while the main process still writes: the launcher would end it
            raise
        return self._finish_run()

    def _train_epoch(self) -> None:
        progress = self.progress
        epoch, steps = progress.epoch, self.pipeline.steps_per_epoch
        method = self._method_of(epoch)
        self.learner.student.train()
        self.telemetry.start_clock()
        for batch in self.learner.batches(self.pipeline.epoch(epoch, progress.step_in_epoch)):
            lr = schedule.learning_rate(self.config, progress.step, steps)
            whole = self.sampling.size_of(progress.step_in_epoch)
            if self.learner.seeks_micro_batch:
                size = self.learner.find_micro_batch(batch, method, epoch=epoch, global_batch_size=whole)
                self.reporter.message(f"Micro-batches of {size} images fit into the memory")
            progress.step_in_epoch += 1
            progress.step += 1
            self.learner.learn(batch, method, lr, epoch=epoch, global_batch_size=whole, on_output=self._note)
            self.reporter.advance(progress.step)
            if self.profiler is not None:
                self.profiler.step()
            self._after_step()

    def _note(self, output: StepOutput, labels: Tensor) -> None:
        self.telemetry.update(output, labels, self.progress.step)

    def _after_step(self) -> None:
        """Log, save and stop where it is time to."""
        progress = self.progress
        epoch_is_trained = progress.step_in_epoch == self.pipeline.steps_per_epoch
        if progress.step % self.config.log_every == 0 or epoch_is_trained:
            totals = self.telemetry.read()
            progress.totals = telemetry.add(progress.totals, totals)
            row = self._row("step", totals)
            self._write(row)
            self.reporter.step(row)
        self._snapshot()
        every, asked_to_stop = self.config.checkpoint_every, self.world.any_of_last_time(self.stop.requested)
        if (every and progress.step % every == 0) or asked_to_stop:
            self._save()
        if asked_to_stop:
            raise Interrupted

    def _snapshot(self) -> None:
        """Keep the weights as they are after this step, to be compared with those of another program."""
        step, every = self.progress.step, self.config.snapshot_every
        if every and step % every == 0 and self.world.is_main:
            self.run.snapshots.mkdir(exist_ok=True)
            content = self._student_part(self.learner.student) | {"step": step}
            self.saver.save((self.run.snapshots / f"step-{step}.pt", content))

    def _finish_epoch(self) -> None:
        """Evaluate, write the epoch's row, and save; a run that is interrupted here evaluates again."""
        progress, attack = self.progress, self.config.eval.attack
        row = self._row("epoch", progress.totals)
        learner = self.learner
        if learner.average is not None:
            clean = self.pipeline.epoch(progress.epoch)
            learner.average.after_epoch(progress.epoch, clean, self.sampling.num_samples, self.world)
        try:
            accuracies = self._evaluate(self.held_out, ("natural", attack))
        except Interrupted:
            self._save()
            raise
        row |= {
            "natural_accuracy": accuracies["natural"].accuracy,
            "robust_accuracy": accuracies[attack].accuracy,
            "robust_masked": accuracies[attack].masked,
            "measured_on": self.selected_on,
        }
        row |= self.world.broadcast_from_main(self._probe)
        self._write(row)
        self.reporter.epoch(row, self.config.epochs)
        progress.last = row
        progress.epoch, progress.step_in_epoch, progress.totals = progress.epoch + 1, 0, {}
        best = []
        if not progress.best or row[self.criterion] > progress.best[self.criterion]:
            progress.best = row
            best = [(self.run.best, checkpoints.content(self._student_part(learner.evaluated), progress))]
        self._save(*best)
        self._guard(row)

    def _probe(self) -> dict[str, Any]:
        """What is measured on the same training images in every epoch."""
        teacher, attack, student = self.teachers.get("teacher"), self.config.attack, self.learner.evaluated
        with precision.visiting(teacher, self.precision.device):
            found = telemetry.probe(
                student,
                teacher,
                *self.probe_images,
                preset(self.config.eval.attack, attack.epsilon, attack.threat_model),
                beta=self.config.loss.beta,
                seed=self.config.seed,
            )
        if self.precision.amp_dtype is not None and self.method.needs_x_adv:
            found |= masking.probe(student, *self.probe_images, attack, self.precision, seed=self.config.seed)
        return found

    def _write(self, row: dict[str, Any]) -> None:
        if self.journal is not None:
            self.journal.write(row)

    def _guard(self, row: dict[str, Any]) -> None:
        """Warn or stop where the attack of the training is weaker than it seems."""

        def stop(complaint: str) -> None:
            raise RunFailed(f"{complaint}; everything is saved, and masking_guard=warn goes on")

        answers: dict[str, Callable[[str], None]] = {
            "off": lambda complaint: None,
            "warn": lambda complaint: self.reporter.message(f"Warning: {complaint}"),
            "stop": stop,
        }
        answer = look_up("masking_guard", self.config.masking_guard, answers)
        if complaint := masking.complaint(row):
            answer(f"the attack of epoch {row['epoch']} may be masked: {complaint}")

    def _finish_run(self) -> dict[str, Any]:
        """Evaluate the last and the best student on the test images, draw the pictures, write summary.json."""
        self.reporter.end()
        progress, final = self.progress, self.config.eval.final
        summary: dict[str, Any] = {
            "method": self.method.name,
            "semantics": self.config.semantics,
            "model": self.config.model,
            "dataset": self.config.dataset,
            "selected_on": self.selected_on,
            "selected_by": self.criterion,
            "skipped_images": {"train": len(self.dataset.train.skipped), "test": len(self.dataset.test.skipped)},
            "best": progress.best,
            "last": progress.last,
        }
        if final:
            summary["test_of_last"] = summary["test_of_best"] = self._tested()
            if progress.best["epoch"] != progress.last["epoch"]:
                checkpoints.load_best(self.run.best, self.learner.evaluated, progress.best["epoch"])
                summary["test_of_best"] = self._tested()
        if self.world.is_main:
            plots.draw(self.run)
            write_json(self.run.summary, summary)
        return summary

    def _tested(self) -> dict[str, dict[str, Any]]:
        """What `eval.final` finds on the test images, and what further attacks find that are needed then."""
        results = self._evaluate(self.dataset.test, self.config.eval.final)
        results |= self._evaluate(self.dataset.test, further(results))
        for result in results.values():
            for warning in result.warnings:
                self.reporter.message(f"Warning: {warning}")
        return {name: result.as_dict() for name, result in results.items()}

    def _evaluate(self, images: datasets.AnySplit, attacks: Sequence[str]) -> dict[str, Result]:
        return evaluate(
            self.learner.evaluated,
            images,
            attacks,
            epsilon=self.config.attack.epsilon,
            threat_model=self.config.attack.threat_model,
            batch_size=self.config.eval.batch_size,
            seed=self.config.seed,
            device=self.precision.device,
            stop=self.stop,
            world=self.world,
        )

    def _save(self, *before: tuple[Path, dict[str, Any]]) -> None:
        """Write last.pt, which is the same on all processes. before: files to be written first."""
        sums = self.telemetry.state_dict()
        student = self.learner.student
        if not torch.stack([value.isfinite().all() for value in student.parameters()]).all():
            raise FloatingPointError(f"the weights after step {self.progress.step} are not finite")
        if not self.world.is_main:
            return
        self.progress.rows_size = self.run.rows_size()
        last = checkpoints.content(
            self._student_part(student),
            self.progress,
            telemetry=sums,
            data_sha256=self.dataset.sha256,
            pipeline=self.pipeline_choice.kind,
            teachers_sha256=self.teachers_sha256,
            init_sha256=self.init_sha256,
            **self.learner.state_dict(),
        )
        self.saver.save(*before, (self.run.last, last))

    def _probe_images(self, training: datasets.AnySplit) -> tuple[Tensor, Tensor]:
        """Training images as they are, the same ones in every epoch: (B, C, H, W) in [0, 1], and labels."""
        probe = balanced(training, max(self.config.eval.probe_size, len(self.dataset.class_names)))
        return batch_of(
            probe.images,
            probe.labels,
            torch.arange(len(probe)),
            self.precision.device,
            self.precision.dtype,
        )

    def _fewest_images(self) -> int:
        """Images of the smallest part of a batch that BatchNorm sees at once, in any process."""
        of_all = is_on("sync_bn", self.config.sync_bn)
        sampling, size, micro = self.sampling, self.world.size, self.config.micro_batch
        fewest = []
        for whole in (sampling.size_of(0), sampling.size_of(sampling.steps_per_epoch - 1)):
            parts = -(-whole // (size * micro)) if isinstance(micro, int) else 1
            fewest.append((whole if of_all else whole // size) // parts)
        return max(1, min(fewest))

    def _attack_entries(self) -> int:
        """Entries of the input gradients that crafting one image computes."""
        return self.config.attack.num_steps * self.probe_images[0][0].numel() if self.method.needs_x_adv else 0

    def _student_part(self, student: nn.Module) -> dict[str, Any]:
        return checkpoints.student_part(student, self.config, self.dataset.class_names)

    def _row(self, event: str, totals: telemetry.Totals) -> dict[str, Any]:
        """A row of metrics.jsonl; epochs are counted from 1."""
        epoch = self.progress.epoch
        method = self._method_of(epoch)
        terms = tuple(term for term, weight in zip(TERMS, method.weights, strict=True) if weight != (0, 0))
        row = {
            "event": event,
            "epoch": epoch + 1,
            "step": self.progress.step,
            "phase": method.name,
            "lr": schedule.learning_rate(self.config, self.progress.step - 1, self.pipeline.steps_per_epoch),
        }
        row |= telemetry.summarise(totals, terms)
        passes = plan.passes(method, self.config.attack, self.config.forwards, in_warmup=method is not self.method)
        of_one_process = totals["samples"] / totals["seconds"] / self.world.size
        return row | {"share_of_peak": self.speedometer.share(of_one_process, passes)}

    def _method_of(self, epoch: int) -> methods.Method:
        """The row to train with: the base method's until the warm-up ends."""
        warmup = config.epochs_of(self.config.loss.warmup, self.config.epochs)
        return self.method.warmup if self.method.warmup is not None and epoch < warmup else self.method

    def _obtain_teachers(self) -> dict[str, nn.Module]:
        """Find or train the teachers, show their cards, and write provenance.json; by section."""
        found: dict[str, teachers.Teacher] = {}
        needed = {"teacher": self.method.needs_teacher, "teacher_st": self.method.needs_teacher_st}
        # Those from files first: a file that cannot serve is told of before hours of training the other.
        for section in sorted(needed, key=lambda name: getattr(self.config, name).checkpoint is None):
            if needed[section]:
                found[section] = teachers.obtain(
                    self.config,
                    section,
                    self.dataset,
                    self.precision,
                    self.run.path,
                    self._train_teacher,
                    self.reporter.message,
                    self.world,
                    self.stop,
                    self.teachers_sha256.get(section),
                )
                digest = found[section].sha256
                if self.teachers_sha256.setdefault(section, digest) != digest:
                    raise ValueError(f"--resume: {section} is another than before, from {found[section].source}")
                for line in teachers.card(
                    section, found[section], self.held_out, self.config, self.precision, self.stop, self.world
                ):
                    self.reporter.message(line)
        if self.world.is_main:
            provenance.write(
                self.run,
                self.config,
                self.precision,
                self.dataset,
                found,
                self.progress.step,
                self.pipeline_choice.kind,
                self.world.size,
                self.init_sha256,
            )
        return {section: teacher.model for section, teacher in found.items()}

    def _train_teacher(self, wanted: RunConfig, path: Path) -> Path:
        complete, run = wanted.model_copy(update={"out": str(path)}), RunDir(path)
        begun = Begun(run)

        def begin() -> bool:
            nonlocal begun
            if not run.config.exists():
                begun = RunDir.create(complete)
            elif config.differing(RunDir.existing(path)[1], wanted):
                raise ValueError(
                    f"--out: {path} holds the run of another teacher; remove it, or choose another --out"
                )
            if run.result(complete) is None:
                return False
            if checkpoints.read(run.last)["data_sha256"] != self.dataset.sha256:
                raise ValueError(
                    f"--out: {path} holds a teacher of other data; remove it, or choose another --out"
                )
            return True

        finished = self.world.broadcast_from_main(begin)
        with begun.or_nothing():
            if not finished:
                _run(run, complete, self.reporter, self.stop, self.world, self.dataset)
        return run.best


def _carried_on(
    run: RunDir, saved: Mapping[str, Any] | None, complete: RunConfig, reporter: Reporter
) -> RunConfig:
    """The configuration that a run goes on with, after what its last checkpoint was trained with."""
    if saved is None:
        if run.summary.exists():
            raise ValueError(f"--resume: {run.last} is gone, and with it the state to go on from")
        return complete
    begun, progress = config.load(saved["config"]), saved["progress"]
    complete = resuming.carried_on(begun, complete, progress["epoch"] + (progress["step_in_epoch"] > 0))
    if complete.epochs > begun.epochs:
        reporter.message(resuming.describe(begun, complete))
    return complete


def check_one_image(complete: RunConfig, dataset: datasets.AnyDataset, image_CHW: torch.Size) -> None:
    """Raise ValueError where one image alone cannot be trained on: BatchNorm sees a single value of a channel."""
    with torch.device("meta"):
        network = models.build(complete.model, len(dataset.class_names))
    values: list[int] = []
    for module in network.eval().modules():
        if isinstance(module, _BatchNorm):
            module.register_forward_hook(lambda module, given, out: values.append(out[0, 0].numel()))
    with torch.no_grad():
        network(torch.empty(1, *image_CHW, device="meta"))
    if min(values, default=2) == 1:
        raise ValueError(
            f"batch_size: a batch or a part of one has a single image, and {complete.model} has maps of 1x1 for "
            f"{image_CHW[1]}x{image_CHW[2]} images, of which BatchNorm has no variance; choose another batch_size"
        )


def load_data(complete: RunConfig, reporter: Reporter, pipeline: str = "auto") -> datasets.AnyDataset:
    """The data set of a configuration as a pipeline wants it, with a line that says what it is."""
    request = Request(
        limit_train=complete.limit_train,
        limit_test=complete.limit_test,
        progress=reporter.by_part("reading"),
        on_bad_image=complete.on_bad_image,
        image_size=complete.image_size,
        resident="never" if _reads_files(pipeline, complete.data) else "if it fits",
    )
    try:
        dataset = datasets.find(complete.dataset, complete.data, request)
    except OSError as error:
        place = error.filename or complete.data or complete.dataset
        raise ValueError(f"data: cannot read {place}: {error.strerror or error}") from None
    reporter.end()
    reporter.message(
        f"Data: {complete.dataset}, {len(dataset.train.labels):,} training and {len(dataset.test.labels):,} test "
        f"images in {len(dataset.class_names)} classes, from {dataset.source}"
    )
    reporter.skipped("training", dataset.train.skipped)
    reporter.skipped("test", dataset.test.skipped)
    return dataset


def _reads_files(pipeline: str, data: str | None) -> bool:
    """Whether a pipeline that the user chose loads images from where they lie, and not from memory."""
    return pipeline == "dali" or (pipeline == "ffcv" and data is not None and is_beton(expanded("data", data)))


def hold_out(dataset: datasets.AnyDataset, fraction: float) -> tuple[datasets.AnySplit, datasets.AnySplit, str]:
    """Training images, held-out images, and what the latter are: "validation", or "test" at fraction 0.

    The choice does not depend on the run's seed: a teacher must not have seen its student's held-out images.
    """
    if fraction == 0:
        return dataset.train, dataset.test, "test"
    training, held_out = datasets.split_validation(dataset.train, fraction, 0)
    return training, held_out, "validation"


def initial_weights(complete: RunConfig, dataset: datasets.AnyDataset) -> LoadedModel:
    """The network in `init`. Raises ValueError where it is not the one that is to be trained."""
    path = str(complete.init)
    try:
        found = load_model(path, model=complete.model, class_names=dataset.class_names)
        if (found.normalize is not None) != complete.normalize:
            does = "normalises its images" if found.normalize else "does not normalise its images"
            raise ValueError(f"{path}: the network {does}, and normalize is {str(complete.normalize).lower()}")
    except ValueError as error:
        raise ValueError(f"init: {error}") from None
    return found


def build_student(complete: RunConfig, dataset: datasets.AnyDataset, at: precision.Precision) -> nn.Module:
    """A fresh network; its weights depend on the run's seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(complete.seed)
        student = models.build(
            complete.model,
            len(dataset.class_names),
            normalize=complete.normalize,
            dataset=complete.dataset,
        )
    return at.place(student)
