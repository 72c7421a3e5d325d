"""Configuration -> parts of a run: data, pipeline, student, teachers, learner.

Only `assemble` needs a session with its run directory; benchmarks build their steps with the functions below it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from engine import methods, models
from engine.attacks import table
from engine.attacks.kinds import Task
from engine.common.console import Reporter
from engine.common.files import expand_user
from engine.common.lookup import is_on
from engine.config import LABELLED_BY_TEACHER, LIBRARIES, RunConfig
from engine.evaluation import pseudo_labels
from engine.evaluation.measure import batch_of, few_images
from engine.methods import Method
from engine.models import pretrained
from engine.models.sync_batch_norm import synchronise
from engine.models.weights import Weights, fill, load_model, read_weights
from engine.pipelines import datasets, extra, selection
from engine.pipelines.base import Pipeline
from engine.pipelines.datasets import AnyDataset, AnySplit
from engine.pipelines.mixing import Mixing, MixingPipeline, PairSampling
from engine.pipelines.reading.beton import is_beton
from engine.pipelines.sampling import Extra, Sampling, Shard
from engine.pipelines.splits import Request, balanced
from engine.runs import provenance
from engine.runs.session import Session
from engine.runs.teachers import Teacher, TrainRun, card, obtain
from engine.system.distributed import World
from engine.system.precision import Precision
from engine.training import plan
from engine.training.learner import Learner
from engine.training.micro_batch import count_parts
from engine.training.performance.speed import Speedometer, forward_flops
from engine.training.telemetry import Telemetry


@dataclass(frozen=True, eq=False)
class RunData:
    """Data of a run.

    held_out: the images that epochs are compared on, from the split `selected_on`: "validation" or "test".
    pipeline: batches of the training images in the order of `sampling`. probe_images: training images that are
    measured after each epoch, BCHW in [0, 1], and their labels. labeller: the teacher that labelled extra images.
    """

    dataset: AnyDataset
    held_out: AnySplit
    selected_on: str
    pipeline: Pipeline
    pipeline_kind: str
    sampling: Sampling
    probe_images: tuple[Tensor, Tensor]
    labeller: Teacher | None = None

    @property
    def image_CHW(self) -> torch.Size:
        """Shape of an image."""
        return self.probe_images[0].shape[1:]


@dataclass(frozen=True, eq=False)
class InitialWeights:
    """First weights of a student, on the CPU, and notes on them for the user.

    name: the library's of pretrained ones. sha256: of the file, or of the library's tensors.
    """

    state: Mapping[str, Tensor]
    name: str | None
    sha256: str
    notes: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Parts:
    """Parts of a run, of which nothing is trained yet.

    teachers: by section, in evaluation mode. teachers_sha256, init_sha256: of the weights of each teacher, and of
    the file in `init`, if there is one. learner: holds the student.
    """

    data: RunData
    teachers: Mapping[str, nn.Module]
    teachers_sha256: Mapping[str, str]
    init_sha256: str | None
    telemetry: Telemetry
    speedometer: Speedometer
    learner: Learner


def assemble(
    session: Session,
    saved: Mapping[str, Any] | None,
    resources: ExitStack,
    train_teacher: TrainRun,
    dataset: AnyDataset | None = None,
) -> Parts:
    """Build the parts of a run, and write its provenance.json.

    saved: the checkpoint that it goes on from, with its data, teachers and kind of pipeline; None: it begins.
    resources: closes the pipeline. train_teacher: see `teachers.obtain`. dataset: that of a teacher's student;
    None: it is loaded. Raises ValueError for what does not fit together.
    """
    config, precision, world = session.config, session.precision, session.world
    data = _assemble_data(session, saved, resources, dataset, train_teacher)
    initial = None
    if config.init is not None and saved is None:
        initial = initial_weights(config, data.dataset, precision.dtype, world)
    init_sha256 = (saved or {}).get("init_sha256") if initial is None else initial.sha256
    if saved and saved["data_sha256"] != data.dataset.sha256:
        raise ValueError(f"--resume: {data.dataset.source} changed since {session.run.last} was written")
    if models.get(config.model).version:  # not of this package; told before teachers are trained
        _check_logits(config.model, build_student(config, data.dataset, precision), data.dataset, data.image_CHW)
    teachers = _obtain_teachers(session, data, saved, train_teacher)
    if world.is_main:
        provenance.write(
            session,
            data.dataset,
            teachers,
            step=saved["progress"]["step"] if saved else 0,
            pipeline=data.pipeline_kind,
            init_sha256=init_sha256,
            init_weights=initial.name if initial else None,
        )
    student = _student(session, data.dataset, initial)
    speedometer = Speedometer(student, data.image_CHW, precision)
    telemetry = build_telemetry(config, data.image_CHW, precision, world)
    networks = {section: teacher.model for section, teacher in teachers.items()}
    learner = build_learner(config, student, networks, precision, world=world, counts=telemetry.attack_counts)
    _tell_of_twins(session, learner)
    for network in networks.values():
        network.to("cpu")  # its twin runs; the original is asked once an epoch, in full precision
    return Parts(
        data=data,
        teachers=networks,
        teachers_sha256={section: teacher.sha256 for section, teacher in teachers.items()},
        init_sha256=init_sha256,
        telemetry=telemetry,
        speedometer=speedometer,
        learner=learner,
    )


def _assemble_data(
    session: Session,
    saved: Mapping[str, Any] | None,
    resources: ExitStack,
    given: AnyDataset | None,
    train_teacher: TrainRun,
) -> RunData:
    config, precision, world, console = session.config, session.precision, session.world, session.console
    # "auto" is settled once for the whole run: decoders differ by a grey level here and there.
    wanted = saved.get("pipeline", config.pipeline) if saved else config.pipeline
    dataset, labeller = given or _load_or_explain(session, wanted, is_new=saved is None), None
    if given is None and config.extra_data is not None:
        dataset, labeller = _with_extra(session, saved, dataset, train_teacher)
    world.check_same("the data set", dataset.sha256)
    _check_attacks(config, dataset)
    originals, held_out, selected_on = hold_out(dataset, config.validation)
    training = originals if dataset.extra is None else extra.join(originals, dataset.extra)
    if given is None and (warning := few_images(len(held_out))):
        console.message(f"Warning: the best epoch is chosen on {selected_on} images, {warning}")
    kind = _select_pipeline(session, wanted, training)
    beside = Extra(len(dataset.extra), config.extra_fraction) if dataset.extra is not None else None
    sampling = build_sampling(config, len(originals), shard=world.shard, extra=beside)
    pipeline = build_pipeline(
        config, training, precision, kind=kind, sampling=sampling, flips=dataset.flip, say=console.message
    )
    resources.callback(pipeline.close)
    probe_images = _probe_images(config, originals, precision)
    data = RunData(dataset, held_out, selected_on, pipeline, kind, sampling, probe_images, labeller)
    if fewest_images(config, sampling, world.size) == 1:
        check_one_image(config, dataset, data.image_CHW)
    return data


def _with_extra(
    session: Session, saved: Mapping[str, Any] | None, dataset: AnyDataset, train_teacher: TrainRun
) -> tuple[AnyDataset, Teacher | None]:
    """The data set with its extra images, labelled; and the teacher, if it labelled them."""
    precision, console, by = session.precision, session.console, session.config.extra_labels
    images = _read_extra(session, dataset)
    if by is None:
        return replace(dataset, extra=images), None
    teacher, version = None, None
    if by == LABELLED_BY_TEACHER:
        known = saved["teachers_sha256"] if saved else {}
        teacher = _checked_teacher(session, "teacher", dataset, train_teacher, known)
        network, name, source = teacher.model, teacher.name, "the teacher"
    else:
        try:
            loaded = load_model(by, class_names=dataset.class_names)
        except ValueError as error:
            raise ValueError(f"extra_labels: {error}") from None
        network, name, source = precision.place(loaded.module).eval(), loaded.name, by
    if teacher is None or "teacher" not in session.objects.teachers:  # the code of an object is not known
        version = f"{name} {models.get(name).version}"
    found = pseudo_labels.label(
        network, images, version=version, device=precision.device, world=session.world, stop=session.stop
    )
    console.message(f"Extra labels by {source}, {name}: {found.describe(dataset.class_names)}")
    return replace(dataset, extra=replace(images, labels=found.labels)), teacher


def _read_extra(session: Session, dataset: AnyDataset) -> AnySplit:
    """The extra images, of which the console is told; without labels where they are to be given others."""
    config, console = session.config, session.console
    place, keeps_labels = str(config.extra_data), config.extra_labels is None
    request = Request(progress=console.part_progress("reading extra"), on_bad_image=config.on_bad_image)
    try:
        images, notes = extra.find(place, dataset, request, with_labels=keeps_labels)
    finally:
        console.end()
    if keeps_labels and not extra.are_labelled(images):
        raise ValueError(f"extra_data: {place} has no labels; --extra-labels teacher, or a checkpoint, gives them")
    console.message(f"Extra data: {len(images):,} images from {place}")
    console.notes(notes)
    console.skipped("extra", images.skipped)
    return images


def _check_attacks(config: RunConfig, dataset: AnyDataset) -> None:
    """Raise ValueError where an attack of an evaluation to come is not defined for the data's classes."""
    names, ball = dataset.class_names, (config.attack.epsilon, config.attack.threat_model)
    task = Task(nn.Identity(), len(names), ball, config.seed, names)
    for attack in table.resolve((config.eval.attack, *config.eval.final)):
        table.check_defined(attack, len(names), config.attack.threat_model)
        attack.crafts_on(task)  # reads the checkpoint from which images are transferred


def _student(session: Session, dataset: AnyDataset, initial: InitialWeights | None) -> nn.Module:
    """The student with its initial weights, of which the console is told, ready for several processes."""
    config, precision = session.config, session.precision
    student = build_student(config, dataset, precision)
    if initial is not None:
        for note in initial.notes:
            session.console.message(note)
        student.load_state_dict(initial.state)
    if is_on("sync_bn", config.sync_bn) and session.world.size > 1:
        student = synchronise(student, precision.device)
    return student


def _tell_of_twins(session: Session, learner: Learner) -> None:
    """Tell the console of networks in whose frozen copies BatchNorm stays, as no tracer sees their operations."""
    twins = dict(learner.networks.teachers)
    if learner.networks.adversary is not None:
        twins["student under attack"] = learner.networks.adversary.twin
    for role, twin in twins.items():
        if twin.is_opaque:
            session.console.message(
                f"The {role} runs with its BatchNorm as it is, not folded into convolutions: no tracer sees "
                "through its forward"
            )


def _check_logits(name: str, network: nn.Module, dataset: AnyDataset, image_CHW: torch.Size) -> None:
    """Raise ValueError where a user's network gives no logits of the data's classes."""
    weight = next(network.parameters())
    images = torch.zeros(2, *image_CHW, device=weight.device, dtype=weight.dtype)
    models.check_logits(
        name, network, images.contiguous(memory_format=torch.channels_last), len(dataset.class_names)
    )


def _load_or_explain(session: Session, pipeline: str, *, is_new: bool) -> AnyDataset:
    """`load_data`; what a resumed run misses may have been moved, and the error says how to name its new place."""
    try:
        return load_data(session.config, session.console, pipeline)
    except ValueError as error:
        if is_new or not str(error).startswith("data:"):
            raise
        raise ValueError(f"{error}; data that were moved: --resume {session.run.path} --data PATH") from None


def _select_pipeline(session: Session, wanted: str, training: AnySplit) -> str:
    """The kind of pipeline that the main process selects, for all of them; the console is told why."""
    device, augmentation = session.precision.device, session.config.augmentation

    def select() -> tuple[str, ...]:
        return tuple(selection.select(wanted, training, device, augmentation))

    kind, reason = session.world.broadcast_from_main(select)
    session.console.message(f"Pipeline: {kind} ({reason})")
    return kind


def _probe_images(config: RunConfig, training: AnySplit, precision: Precision) -> tuple[Tensor, Tensor]:
    """Training images as they are, the same ones in every epoch: (B, C, H, W) in [0, 1], and labels."""
    probe = balanced(training, max(config.eval.probe_size, len(training.class_names)))
    return batch_of(probe.images, probe.labels, torch.arange(len(probe)), precision.device, precision.dtype)


def _obtain_teachers(
    session: Session, data: RunData, saved: Mapping[str, Any] | None, train_teacher: TrainRun
) -> dict[str, Teacher]:
    """The teachers that the method needs, by section; the console is shown their cards."""
    known = saved["teachers_sha256"] if saved else {}
    found: dict[str, Teacher] = {}
    sections = teacher_sections(session.config)
    # Those from files first: a file that cannot serve is told of before hours of training the other.
    for section in sorted(sections, key=lambda name: getattr(session.config, name).checkpoint is None):
        teacher = data.labeller if section == "teacher" else None
        teacher = teacher or _checked_teacher(session, section, data.dataset, train_teacher, known)
        if section in session.objects.teachers:
            _check_logits(teacher.name, teacher.model, data.dataset, data.image_CHW)
        found[section] = teacher
        with session.console.speaking_of(section):
            for line in card(session, section, teacher, data.held_out):
                session.console.message(line)
    return found


def _checked_teacher(
    session: Session, section: str, dataset: AnyDataset, train_teacher: TrainRun, known: Mapping[str, str]
) -> Teacher:
    """The teacher of that section. known: the hashes of those that a resumed run has had."""
    teacher = obtain(session, section, dataset, train_teacher, known.get(section))
    if known.get(section, teacher.sha256) != teacher.sha256:
        raise ValueError(f"--resume: {section} is another than before, from {teacher.source}")
    return teacher


def check_extra_labels(config: RunConfig) -> None:
    """Raise ValueError where a teacher is to label extra images, and the method has none."""
    if config.extra_labels == LABELLED_BY_TEACHER and "teacher" not in teacher_sections(config):
        raise ValueError(f"extra_labels: 'teacher', and {config.method} has none; name a checkpoint")


def method_of(config: RunConfig) -> Method:
    """The method that a configuration trains, after its warm-up. Raises ValueError for an unknown one."""
    return methods.get(config.method, semantics=config.semantics, loss=config.loss)


def teacher_sections(config: RunConfig) -> tuple[str, ...]:
    """Sections of the configuration ("teacher", "teacher_st") whose teachers the method and its attack need."""
    return plan.teachers(method_of(config), config.attack)


def load_data(config: RunConfig, console: Reporter, pipeline: str = "auto") -> AnyDataset:
    """The data set of a configuration as a pipeline of that kind wants it; the console is told of it.

    Raises ValueError where it is not found, cannot be read, or is no such data set.
    """
    request = Request(
        limit_train=config.limit_train,
        limit_test=config.limit_test,
        progress=console.part_progress("reading"),
        on_bad_image=config.on_bad_image,
        image_size=config.image_size,
        resident="never" if _reads_files(pipeline, config.data) else "if it fits",
    )
    try:
        dataset = datasets.find(config.dataset, config.data, request)
    except OSError as error:
        place = error.filename or config.data or config.dataset
        raise ValueError(f"data: cannot read {place}: {error.strerror or error}") from None
    finally:
        console.end()
    console.message(
        f"Data: {config.dataset}, {len(dataset.train.labels):,} training and {len(dataset.test.labels):,} test "
        f"images in {len(dataset.class_names)} classes, from {dataset.source}"
    )
    console.notes(dataset.notes)
    console.skipped("training", dataset.train.skipped)
    console.skipped("test", dataset.test.skipped)
    return dataset


def _reads_files(pipeline: str, data: str | None) -> bool:
    """True if a pipeline that the user chose loads images from where they lie, and not from memory."""
    in_beton = data is not None and is_beton(expand_user("data", data))
    return pipeline in ("dali", "image") or (pipeline == "ffcv" and in_beton)


def hold_out(dataset: AnyDataset, fraction: float) -> tuple[AnySplit, AnySplit, str]:
    """Training images, held-out images, and the latter's name: "validation", or "test" at fraction 0.

    The choice does not depend on the run's seed: a teacher must not have seen its student's held-out images.
    """
    if fraction == 0:
        return dataset.train, dataset.test, "test"
    training, held_out = datasets.split_validation(dataset.train, fraction, 0)
    return training, held_out, "validation"


def build_sampling(
    config: RunConfig,
    num_samples: int,
    *,
    shard: Shard | None = None,
    last: str = "keep",
    extra: Extra | None = None,
) -> Sampling:
    """Order of so many samples in the batches of a configuration. shard, last, extra: see `Sampling`."""
    return Sampling(num_samples, config.batch_size, config.seed, config.order, last, shard or Shard(), extra)


def build_pipeline(
    config: RunConfig,
    training: AnySplit,
    precision: Precision,
    *,
    kind: str | None = None,
    sampling: Sampling | None = None,
    flips: bool = True,
    say: Callable[[str], None] = lambda line: None,
) -> Pipeline:
    """Batches of the training images on the device, augmented as configured; the caller closes it.

    kind: of pipeline, by default what `selection.select` makes of `config.pipeline`. sampling: by default that of
    a single process. flips: mirror images where the configuration leaves it open, as the data set says. say: is
    told of files that are written first. Raises ValueError where the kind cannot serve these images.
    """
    options = selection.LoaderOptions(
        augment=config.augment,
        flip=flips if config.flip is None else config.flip,
        device=precision.device,
        dtype=precision.dtype,
        workers=config.workers,
        batches_ahead=config.batches_ahead,
        augmentation=config.augmentation,
        colour_jitter=config.colour_jitter,
    )
    kind = kind or selection.select(config.pipeline, training, precision.device, config.augmentation).kind
    sampling = sampling or build_sampling(config, len(training))
    mixing = Mixing(config.mixup, config.cutmix)
    if not mixing:
        return selection.build(kind, training, sampling, options, say)
    pairs = selection.build(kind, training, PairSampling(**vars(sampling)), options, say)
    return MixingPipeline(pairs, sampling, mixing, num_classes=len(training.class_names), shape=training.shape)


def build_student(config: RunConfig, data: AnyDataset | AnySplit, precision: Precision) -> nn.Module:
    """A fresh network for the data's classes, placed on the device; its weights depend on `config.seed` alone."""
    return precision.place(_drawn(config, data))


def student_flops(
    config: RunConfig, data: AnyDataset | AnySplit, image_CHW: tuple[int, ...]
) -> tuple[float, float]:
    """`forward_flops` of the configuration's student, which is made on the CPU for it."""
    return forward_flops(_drawn(config, data), image_CHW)


def _drawn(config: RunConfig, data: AnyDataset | AnySplit) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return models.build(
            config.model,
            len(data.class_names),
            normalize=config.normalize,
            dataset=config.dataset,
        )


def build_telemetry(
    config: RunConfig, image_CHW: tuple[int, ...], precision: Precision, world: World | None = None
) -> Telemetry:
    """Sums over the steps of the method on such images; `attack_counts` of it are the learner's `counts`."""
    method = method_of(config)
    entries = config.attack.num_steps * torch.Size(image_CHW).numel() if method.needs_x_adv else 0
    names = dict.fromkeys(term for phase in method.phases for term in phase.term_names)
    return Telemetry(precision.device, entries, world, terms=tuple(names))


def build_learner(
    config: RunConfig,
    student: nn.Module,
    teachers: Mapping[str, nn.Module],
    precision: Precision,
    *,
    world: World | None = None,
    counts: Tensor | None = None,
) -> Learner:
    """The learner of the configuration's method. teachers: by section, as `teacher_sections` names them."""
    return Learner(student, teachers, method_of(config), config, precision, world, counts)


def initial_weights(config: RunConfig, dataset: AnyDataset, dtype: torch.dtype, world: World) -> InitialWeights:
    """The weights that `config.init` names, in the student's network; for other classes its head is as drawn.

    A library downloads them in the main process first. Raises ValueError where they are not of the network.
    """
    given, classes = str(config.init), dataset.class_names
    if given in LIBRARIES:
        mine: list[Weights] = []  # of the main process alone: it fetched them

        def fetch() -> str:
            mine.append(pretrained.load(given, config.model, classes))
            return mine[0].sha256

        world.broadcast_from_main(fetch)
        found = mine[0] if mine else pretrained.load(given, config.model, classes)
        name, source = found.taken, f"{found.taken} of {given}"
    else:
        try:
            found = read_weights(given, model=config.model)
        except ValueError as error:
            raise ValueError(f"init: {error}") from None
        name, source = None, given
    network = _drawn(config, dataset).to(dtype)
    try:
        if models.get(config.model).normalization is None and found.normalize != config.normalize:
            does = "normalises its images" if found.normalize else "does not normalise its images"
            raise ValueError(f"the network {does}, and normalize is {str(config.normalize).lower()}")
        notes = fill(network, replace(found, model=config.model), classes, new_head=True)
    except ValueError as error:
        raise ValueError(f"init: {given}: {error}") from None
    line = f"Initial weights: {config.model} of {source}"
    return InitialWeights(network.state_dict(), name, found.sha256, (line, *notes))


def fewest_images(config: RunConfig, sampling: Sampling, processes: int) -> int:
    """Images of the smallest part of a batch that BatchNorm sees at once, in any process."""
    micro_batch = config.micro_batch if isinstance(config.micro_batch, int) else None
    fewest = []
    for size in (sampling.size_of(0), sampling.size_of(sampling.steps_per_epoch - 1)):
        parts = count_parts(size, micro_batch, processes)
        fewest.append((size if is_on("sync_bn", config.sync_bn) else size // processes) // parts)
    return max(1, min(fewest))


def check_one_image(config: RunConfig, dataset: AnyDataset, image_CHW: torch.Size) -> None:
    """Raise ValueError where one image alone cannot be trained on: BatchNorm sees a single value of a channel."""
    network = models.build_to_fill(config.model, len(dataset.class_names))
    values: list[int] = []
    for module in network.eval().modules():
        if isinstance(module, _BatchNorm):
            module.register_forward_hook(lambda module, given, out: values.append(out.numel() // out.shape[1]))
    with torch.no_grad():
        network(torch.zeros(1, *image_CHW, device=next(network.parameters()).device))
    if min(values, default=2) == 1:
        raise ValueError(
            f"batch_size: a batch or a part of one has a single image, and {config.model} has maps of 1x1 for "
            f"{image_CHW[1]}x{image_CHW[2]} images, of which BatchNorm has no variance; choose another batch_size"
        )
