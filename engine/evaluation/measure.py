"""Accuracy on natural and on attacked images, measured in full precision and without a trace on the model.

Shape suffixes: B batch, N all samples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from engine.attacks import table
from engine.attacks.evaluated import prepared, undisturbed
from engine.attacks.kinds import AttackFunction, AutoAttackPart, EvaluationAttack, Task
from engine.attacks.parts import size_of_batch
from engine.attacks.pgd import presets
from engine.common.numbers import check_whole
from engine.common.stopping import Stop
from engine.evaluation.arguments import (
    Data,
    LabelledImages,
    check_data,
    check_names,
    check_place,
    count_classes,
)
from engine.evaluation.batches import Attack, BatchRunner, OnPass, batch_of
from engine.evaluation.partial_results import PartialResults
from engine.evaluation.results import UNMASKED, Result, few_images, further, is_chance, per_class
from engine.evaluation.whole_set import SetAttack, SetRunner
from engine.pipelines.splits import limited
from engine.system.distributed import World
from engine.system.precision import Precision

__all__ = [
    "UNMASKED",
    "LabelledImages",
    "OnPass",
    "Result",
    "batch_of",
    "check_names",
    "evaluate",
    "few_images",
    "further",
    "is_chance",
]


AttackLike = str | EvaluationAttack | AttackFunction | tuple[str, AttackFunction]
Attacks = Iterable[AttackLike] | Mapping[str, AttackFunction]
"""Names, and functions f(model, x, y) -> x_adv, which may have a name in a pair or a mapping."""


# many parameters: the public door, where each keyword is one choice of a measurement
# long: its docstring tells of every keyword
def evaluate(
    model: nn.Module,
    data: Data,
    attacks: Attacks,
    *,
    epsilon: float = 8 / 255,
    threat_model: str = "Linf",
    batch_size: int | None = None,
    limit: int | None = None,
    seed: int = 0,
    device: torch.device | str | None = None,
    on_batch: Callable[[str, int, int], object] | None = None,
    stop: Stop | None = None,
    world: World | None = None,
    partial: PartialResults | None = None,
    precision: Precision | None = None,
    keeps_images: bool = False,
    keeps: Tensor | None = None,
    on_pass: OnPass | None = None,
) -> dict[str, Result]:
    """Accuracy of the model on natural images and under each of the attacks, by name in the order given.

    data: (images, labels), images uint8 NHWC or float NCHW in [0, 1]; or a torch Dataset of pairs (image, label).
    attacks: names of `engine.attacks.table`; functions f(model, x, y) -> x_adv, by their own names or in pairs
    (name, f); or a mapping of names to functions. See `table.add` for what else f may ask for.
    epsilon, threat_model: the ball of every attack. device: the model's, unless given.
    batch_size: images per forward; None: see `size_of_batch`.
    limit: that many samples, of every class as equally many as there are, whatever the order of the data; the
    choice depends on the labels alone. None: all.
    on_batch: called with (attack, samples done, samples in all) after each batch; what it raises ends everything.
    stop: the user's wish to stop, looked at after each batch.
    world: processes that share the batches; each calls this with the same arguments, and all get all results,
    which are those of one process. partial: batches on the disk, not measured again.
    precision: of the network passes, as in a training's; None: the dtype of the parameters, float32 or float64,
    without autocast and TF32.
    keeps_images: of AutoAttack and its parts the images that broke are in the main process's results (`hits`);
    until then they lie beside the notes of partial, which is needed for it.
    keeps: indices in data, of those that are evaluated, whose images as attacked are in the results (`attacked`),
    in that order; of an image that AutoAttack has not broken the image as it is.
    on_pass: as on_batch, and in a batch too: see `OnPass`.

    Runs in eval mode. Attacks differentiate the model in the form of `prepared`, on a CPU with Winograd's
    convolutions. The model itself classifies, unless a precision is given, and a function gets it too. Every mode
    and flag and the global random state come back. A random start depends on the seed, the attack and the sample's
    index in data alone, so neither on the batch nor on the limit; so does AutoAttack. Its package and functions
    draw their numbers batch by batch.

    Raises ValueError for bad arguments, bad data, unknown attacks, and attacks that are not installed or not
    defined for the model's classes; FloatingPointError where logits are not finite; RunFailed where an attack
    leaves its ball; Interrupted after a stop.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    images_N, labels_N = check_data(data)
    presets(epsilon, threat_model)  # refuses a bad ball
    chosen = table.resolve(attacks)
    check_whole("seed", seed, least=0)
    if keeps_images and partial is None:
        raise ValueError("keeps_images: the images are kept beside the notes of partial, which is not given")
    sample_N = limited(labels_N, limit, 0, "limit")
    if keeps is not None and not torch.isin(keeps, sample_N).all():
        raise ValueError("keeps: only images that are evaluated can be kept")
    where, dtype = check_place(model, device)
    world, ball = world or World(), (epsilon, threat_model)

    def batch(sample_B: Tensor) -> tuple[Tensor, Tensor]:
        return batch_of(images_N, labels_N, sample_B, where, dtype)

    with undisturbed(model, where, precision):
        runner = BatchRunner(batch, ball, on_batch, stop or Stop(), world, partial, keeps, on_pass)
        first = batch(sample_N[:1])[0]
        size = size_of_batch(batch_size, where, *first.shape[2:])
        num_classes = count_classes(model, first, labels_N)
        task = Task(model, num_classes, ball, seed, _class_names(data), world.heartbeat)
        # All attacks are made, and refused, before the first batch.
        at = precision or Precision(where, dtype, winograd=where.type == "cpu")
        as_run = task._replace(model=prepared(model, at))
        classifier = model if precision is None else as_run.model
        about = f"{len(sample_N)} images, batch {size}"
        wanted = [
            _made_for_set(attack, task, about)
            if isinstance(attack, AutoAttackPart)
            else _made(attack, as_run if attack.takes_any_form else task, classifier, about)
            for attack in chosen
        ]
        whole = SetRunner(batch, on_batch, runner.stop, world, partial, keeps_images, keeps, on_pass)
        results = {
            attack.name: whole.result(attack, sample_N, size)
            if isinstance(attack, SetAttack)
            else runner.result(attack, sample_N, size)
            for attack in wanted
        }
    names = _class_names(data)
    return {name: _with_labels(each, labels_N, names) for name, each in results.items()}


def _with_labels(result: Result, labels_N: Tensor, names: tuple[str, ...] | None) -> Result:
    """The result with what the labels tell: accuracies by class, and the class of images that kept it."""
    predicted = torch.where(result.verdicts, labels_N[result.samples], result.predicted)
    return replace(result, per_class=per_class(result, labels_N, names), predicted=predicted)


def _class_names(data: Data) -> tuple[str, ...] | None:
    return tuple(getattr(data, "class_names", ())) or None


def _made(attack: EvaluationAttack, task: Task, classifier: nn.Module, size: str) -> Attack:
    """The attack, whose images the classifier gets. Raises ValueError where it cannot be made."""
    table.check_defined(attack, task.num_classes, task.ball[1])
    return Attack(
        attack.name,
        attack.describe(task, size),
        attack.make(task),
        classifier,
        attack.crafts_on(task),
        attack.parts(task.num_classes),
        attack.takes_whole_batches,
        attack.gradients,
    )


def _made_for_set(attack: AutoAttackPart, task: Task, size: str) -> SetAttack:
    """The same of an attack that is one of the whole set, on the network as it is."""
    table.check_defined(attack, task.num_classes, task.ball[1])
    return SetAttack(attack.name, attack.describe(task, size), attack.on(task), attack.parts(task.num_classes))
