"""Every key of a run: its type, its default, its checks and its facts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from engine.common.lookup import nearest
from engine.config.keys import Key, collect, own, runtime, shared
from engine.config.values import (
    LARGEST_IMAGE,
    Augmentations,
    Auto,
    Count,
    CountOrZero,
    Few,
    Graphs,
    Guard,
    Length,
    Names,
    NotNegative,
    Number,
    OverfittingGuard,
    PartOfOne,
    PartOfRun,
    PathText,
    Positive,
    Seed,
    Switch,
    Triple,
    Utf8PathText,
)
from engine.objectives import ATTACK_LOSSES

Tree = dict[str, Any]


def _known_attack_loss(name: str) -> str:
    if name not in ATTACK_LOSSES:
        raise ValueError(f"{name!r} is not known; {nearest(name, ATTACK_LOSSES)}")
    return name


class Section(BaseModel):
    """A frozen group of keys; an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, validate_default=True)


class LossConfig(Section):
    """Hyper-parameters of the method's row of weights (paper: Eq. 3-4 and Section 5.1)."""

    tau: Annotated[Positive, own("temperature of the teachers' terms")] = 1.0
    tau_self: Annotated[Positive, own("temperature of the self term")] = 1.0
    beta: Annotated[NotNegative, own("exponent of alpha (Eq. 4)")] = 0.1
    gamma: Annotated[NotNegative | None, own("constant weight of the self term (Table 9)", null="1 - alpha")] = (
        None
    )
    lam: Annotated[
        Number,
        Field(ge=0, le=1),
        own(
            "lambda of ARD, IAD-I and AdaIAD: part of the clean cross-entropy; of RSLAD and AdaAD: part of the "
            "clean divergence; of SAAD: weight of it"
        ),
    ] = 0.0
    lam1: Annotated[NotNegative, own("lambda_1 of AKD2 and IAD-II: cross-entropy")] = 0.25
    lam2: Annotated[NotNegative, own("lambda_2: robust teacher")] = 0.5
    lam3: Annotated[NotNegative, own("lambda_3: standard teacher")] = 0.25
    trades_lambda: Annotated[NotNegative, own("weight of the self term of TRADES, and of MART")] = 6.0
    igdm: Annotated[
        NotNegative,
        own(
            "weight of the divergence of differences of SAAD and METHOD+igdm, at the end of its growth", later=True
        ),
    ] = 1.0
    growth_epochs: Annotated[
        Count | None,
        own(
            "epochs in which a weight grows to its value: in epoch e it is e / growth_epochs of it",
            null="all",
            later=True,
        ),
    ] = None
    balance_rate: Annotated[
        Number,
        Field(ge=0, le=1),
        own(
            "rate at which MTARD's weights follow the progress of both terms; it falls with the learning rate",
            later=True,
        ),
    ] = 0.025
    balance_floor: Annotated[
        NotNegative,
        own("added to the target in the logarithm of the terms that MTARD's weights follow", later=True),
    ] = 0.0
    entropy_order: Annotated[
        Positive, own("order of the Renyi entropy by which SAAD weighs samples; 1: Shannon's", later=True)
    ] = 1.0
    weights: Annotated[
        dict[str, Number | tuple[Number, Number]],
        own("cells of the method's row to replace, by term: a number, or `[a, b]` for a + b alpha"),
    ] = Field(default_factory=dict)
    warmup: Annotated[PartOfRun, own("part of the run in which alpha is 1 and the base method is trained")] = 0.0
    kl_mean: Annotated[
        Literal["batch", "elements"],
        own(
            "the divergences are averaged over the `batch`, or over all `elements`: batch and classes, as in "
            "the first ARD",
            later=True,
        ),
    ] = "batch"
    detach_self: Annotated[bool, own("no gradient into the self term's target S(x)")] = False
    label_smoothing: Annotated[Number, Field(ge=0, lt=1), own("smoothing of the cross-entropies' labels")] = 0.0


class AttackSpec(Section):
    """A projected-gradient attack on images in [0,1]; epsilon and step_size are in those units (Eq. 2)."""

    threat_model: Annotated[Literal["Linf", "L2"], shared("`Linf` or `L2`; the evaluation uses the same")] = "Linf"
    epsilon: Annotated[Length, shared("radius of the ball, images in [0, 1]; the evaluation uses the same")] = (
        8 / 255
    )
    epsilon_warmup: Annotated[
        PartOfRun,
        shared(
            "part of the run in which the training's attack grows to its size: of E epochs the first has 1/E of "
            "`epsilon`, `step_size` and the lengths of the start; the evaluation has all of it at any time",
            later=True,
        ),
    ] = 0.0
    step_size: Annotated[Length, shared("length of a step")] = 2 / 255
    num_steps: Annotated[CountOrZero, shared("number of steps")] = 10
    steps_warmup: Annotated[
        PartOfRun,
        shared(
            "part of the run in which the training's attack grows from one step to `num_steps`, by whole steps "
            "from epoch to epoch: in the last one it has all of them",
            later=True,
        ),
    ] = 0.0
    random_start: Annotated[
        Literal["none", "uniform", "gaussian"], own("`none`, `uniform` in the ball, or `gaussian`")
    ] = "uniform"
    start_epsilon: Annotated[
        Length | None, own("radius of the ball of the uniform start", null="`epsilon`", later=True)
    ] = None
    gaussian_std: Annotated[Positive, own("standard deviation of the gaussian start")] = 0.001
    clamp_start: Annotated[bool, own("clamp the start to [0, 1]")] = True
    project: Annotated[
        bool,
        own("project every step onto the ball of `epsilon`; `false`: images stay in [0, 1] alone", later=True),
    ] = True
    loss: Annotated[
        str,
        AfterValidator(_known_attack_loss),
        own(
            "loss to maximise: {names}, see [loss.md](loss.md#losses-of-an-attack)",
            values="attack loss",
        ),
    ] = "ce"
    slope: Annotated[
        Number,
        own("of `kl-teacher-linear`: part of the gradient of T(x)_y along which the target moves", later=True),
    ] = 1.0
    kappa: Annotated[NotNegative, own("confidence of the margin")] = 50.0
    bn: Annotated[
        Literal["train", "eval", "batch"],
        own(
            "BatchNorm in the training attack: `train` batch statistics, and running ones move; `eval` running "
            "statistics; `batch` batch statistics, and running ones stay",
            flag="--attack-bn",
            group="method",
        ),
    ] = "eval"


class ForwardsConfig(Section):
    """Forwards of the student: their order, and those whose output no term needs.

    Both matter through BatchNorm's running statistics alone, which every forward moves.
    """

    first: Annotated[
        Literal["adv", "nat"], own("the first of `adv` S(x~) and `nat` S(x); S(x-) follows S(x~)", later=True)
    ] = "adv"
    clean: Annotated[
        Literal["skip", "no_grad", "grad"], own("S(x) where no term reads it: `skip`, `no_grad` or `grad`")
    ] = "skip"
    idle: Annotated[
        Literal[False, True, "iad1", "trades", "adaiad"],
        own(
            "further forwards: `false`: none; `iad1`: S(x~) again, and after the warm-up S(x) too, as "
            "published; `trades`: S(x) before S(x~), as published; `adaiad`: S(x) before S(x~), and after the "
            "warm-up S(x) at the end too, as published; `true`: those of `iad1`, after the warm-up alone"
        ),
    ] = False


class OptimConfig(Section):
    """Optimizer; with milestones, the rate is lr before the first, and lr * lr_factors[i] from milestone i on."""

    implementation: Annotated[
        Literal["torch", "apex", "adamw"],
        shared(
            "`torch`: SGD, torch's fused one; `apex`: SGD, FusedSGD of NVIDIA's apex, where that is installed; "
            "`adamw`: torch's fused AdamW, for which `lr` is 0.001 and `optim.weight_decay` 0.05 unless they are "
            "given",
            flag="--optimizer",
            group="method",
        ),
    ] = "torch"
    momentum: Annotated[Number, Field(ge=0, lt=1), shared("momentum of SGD")] = 0.9
    nesterov: Annotated[bool, shared("Nesterov's momentum, of SGD")] = False
    betas: Annotated[
        tuple[PartOfOne, PartOfOne],
        shared("decay of the averages of the gradient and of its square, of `adamw`", later=True),
    ] = (0.9, 0.999)
    eps: Annotated[
        Positive, shared("added to the root of the second average in the denominator, of `adamw`", later=True)
    ] = 1e-8
    weight_decay: Annotated[NotNegative, shared("weight decay, see `optim.decay_norms_and_biases`")] = 2e-4
    decay_norms_and_biases: Annotated[
        bool | None,
        shared(
            "weight decay of norms, biases and other vectors, and of embeddings of positions and classes, too",
            null="`true` for SGD, `false` for `adamw`",
            later=True,
        ),
    ] = None
    layer_decay: Annotated[
        Number,
        Field(gt=0, le=1),
        own(
            "layer-wise decay of the learning rate: the head has the rate itself, and every layer this factor of "
            "the next one's, see [recipes.md](recipes.md#fine-tuning)",
            later=True,
        ),
    ] = 1.0
    schedule: Annotated[
        Literal["milestones", "cosine", "one-cycle", "cyclic"],
        shared(
            "`milestones`; `cosine`: half a wave down to 0; `one-cycle`: up from `lr`/25 in 30 % of the run, "
            "then down to nothing; `cyclic`: straight up from 0 in the first half of the run, straight down to 0 "
            "in the second"
        ),
    ] = "milestones"
    milestones: Annotated[tuple[PartOfRun, ...], shared("parts of the run, ascending")] = (0.5, 0.75)
    lr_factors: Annotated[tuple[NotNegative, ...], shared("as many factors of the initial rate")] = (0.1, 0.01)
    lr_warmup: Annotated[
        PartOfRun, shared("part of the run in which the rate rises linearly; the cosine begins after it")
    ] = 0.0
    clip_norm: Annotated[
        Positive | None, shared("largest norm of the gradient of all weights together", null="none")
    ] = None


class AveragingConfig(Section):
    """Averages of the weights, which are evaluated and kept as the best in place of the weights themselves.

    ema: exponential, w <- decay * w + (1 - decay) * student after every step, running statistics alike.
    swa: the mean of the students at the end of each epoch from start on, with statistics measured for it.
    """

    kind: Annotated[
        Literal["none", "ema", "swa"], own("`none`, `ema` (after every step) or `swa` (after every epoch)")
    ] = "none"
    decay: Annotated[Number, Field(ge=0, lt=1), own("decay of the exponential average")] = 0.999
    start: Annotated[
        PartOfRun | None, own("part of the run before it begins", null="0 for `ema`, 0.75 for `swa`")
    ] = None


class AwpConfig(Section):
    """Adversarial weight perturbation (Wu et al., 2020)."""

    gamma: Annotated[
        NotNegative, own("size of the perturbation of each layer's weights, relative to them; 0: none")
    ] = 0.0
    start: Annotated[PartOfRun, own("part of the run before it begins")] = 0.0


class ColourJitterConfig(Section):
    """Strengths of the augmentation `colour-jitter`, as torchvision's ColorJitter takes them."""

    brightness: Annotated[
        NotNegative, shared("the factor of the brightness is 1 - this, or 0, to 1 + this", later=True)
    ] = 0.4
    contrast: Annotated[NotNegative, shared("the same of the contrast", later=True)] = 0.4
    saturation: Annotated[NotNegative, shared("the same of the saturation", later=True)] = 0.4
    hue: Annotated[
        Number, Field(ge=0, le=0.5), shared("the hue turns by at most this part of the circle", later=True)
    ] = 0.1


class TeacherConfig(Section):
    """Origin of a teacher: a checkpoint, else the cache, else a training by `method`, which is then cached."""

    checkpoint: Annotated[
        PathText | None,
        Key(
            "checkpoint of the {teacher} teacher, of this project or another's; or a run directory for its best",
            null="from the [teacher cache](run-directory.md#teachers), else trained",
            flag="--{section}",
            group="method",
            values="file",
            resume="place",
        ),
    ] = None
    method: Annotated[str, Key("how it is trained: {names}", values="teacher method")] = "at"
    model: Annotated[
        str | None,
        Key(
            "its architecture",
            null="what the checkpoint tells, and the student's where one is trained",
            values="model",
        ),
    ] = None
    epochs: Annotated[Count | None, Key("epochs of its training", null="the student's")] = None
    lr: Annotated[Positive | None, Key("its learning rate", null="the student's")] = None
    seed: Annotated[
        Seed | None, Key("its seed", null="the student's + 1 for the robust teacher, + 2 for the standard one")
    ] = None
    weights: Annotated[
        str | None,
        Key("which state dict of the checkpoint: `state_dict_ema`, say", null="the usual one"),
    ] = None
    normalize: Annotated[
        str | tuple[Triple, Triple] | None,
        Key(
            "what its loader subtracted and divided by: {names}, or `[[R, G, B], [R, G, B]]`, mean and standard "
            "deviation in [0, 1]",
            null="as the checkpoint tells",
            values="normalisation",
        ),
    ] = None


class EvalConfig(Section):
    """Measurements during and after the training."""

    attack: Annotated[
        str,
        Key(
            "attack of `robust_accuracy` after each epoch, which chooses the best checkpoint, and of the probe",
            values="attack",
        ),
    ] = "pgd10"
    final: Annotated[
        tuple[str, ...],
        Key("attacks on the test images at the end, of the last and the best student; `[]`: none"),
    ] = ("natural", "fgsm", "pgd20")
    batch_size: Annotated[
        Count | None,
        Key(
            "images per forward",
            null="250; of large images as many as have the pixels of 32 of 224x224",
            teacher=True,
        ),
    ] = None
    probe_size: Annotated[
        Count,
        Key(
            "training images of the [reliability probe](run-directory.md#reliability-of-the-teacher) and "
            "held-out images of the teacher card, at least one a class",
            teacher=True,
        ),
    ] = 256


class RunConfig(Section):
    """Everything that decides a run's result."""

    method: Annotated[
        str,
        own(
            "a row of the [table of methods](loss.md): {names}",
            flag="--method",
            group="essentials",
            values="method",
        ),
    ] = "iad1"
    semantics: Annotated[
        Literal["paper", "official"],
        shared(
            "reading of the methods: of the `paper`, or `official`: as the published code",
            flag="--semantics",
            group="method",
        ),
    ] = "paper"
    model: Annotated[
        str,
        shared(
            "architecture of the student: {names}; or any other that `engine models` names by its form, such as "
            "`wrn28-10` or `timm:convnext_tiny`, see [api.md](api.md#modelsbuild)",
            flag="--model",
            group="essentials",
            values="model",
        ),
    ] = "resnet18"
    normalize: Annotated[
        bool,
        shared(
            "the network's first layer subtracts the data set's mean and divides by its standard deviation; "
            "images and epsilon stay in [0, 1]"
        ),
    ] = False
    init: Annotated[
        PathText | None,
        own(
            "checkpoint of any origin with the student's first weights, of `model` and `normalize`, or a run "
            "directory for its best; or `timm` or `torchvision`: pretrained weights of that library. For other "
            "classes the head is a new one",
            null="drawn from `seed`",
            flag="--init",
            group="method",
            values="file",
            later=True,
        ),
    ] = None
    dataset: Annotated[
        str, shared("data set: {names}", flag="--dataset", group="essentials", values="dataset")
    ] = "cifar10"
    data: Annotated[
        PathText | None,
        Key(
            "the only place to look for the data set, a [.beton file](data.md#beton-files) for one",
            null="`$ENGINE_DATA`, `./data`, the cache, else a download into the cache",
            flag="--data",
            group="data",
            values="path",
            teacher=True,
            resume="place",
        ),
    ] = None
    limit_train: Annotated[
        Count | None,
        shared("so many training images, balanced over classes", null="all", flag="--limit-train", group="data"),
    ] = None
    limit_test: Annotated[
        Count | None,
        shared("so many test images, balanced over classes", null="all", flag="--limit-test", group="data"),
    ] = None
    extra_data: Annotated[
        PathText | None,
        Key(
            "[extra images](data.md#extra-images) to train on: an .npz file, or a folder of the data's class "
            "folders or of images without labels",
            null="none",
            flag="--extra-data",
            group="data",
            values="path",
            teacher=True,
            resume="place",
        ),
    ] = None
    extra_fraction: Annotated[
        Number,
        Field(gt=0, lt=1),
        shared("part of each batch that is extra images", flag="--extra-fraction", group="data", later=True),
    ] = 0.7
    extra_labels: Annotated[
        PathText | None,
        Key(
            "who labels the extra images: `teacher`, the run's robust one, which is then trained without them, or "
            "a checkpoint of any origin, or a run directory for its best",
            null="their file or folder",
            flag="--extra-labels",
            group="data",
            values="file",
            teacher=True,
            resume="place",
        ),
    ] = None
    validation: Annotated[
        Number,
        Field(ge=0, lt=1),
        shared(
            "fraction of the training images held out to choose the best checkpoint, stratified; 0: choose on "
            "the test images"
        ),
    ] = 0.02
    augment: Annotated[
        bool,
        shared(
            "zero-padded random crop (padding 4), with `image_size` a random window, and a random flip where "
            "`flip` allows it"
        ),
    ] = True
    augmentation: Annotated[
        Augmentations,
        shared(
            "[further augmentation](data.md#augmentation), in order: `random-resized-crop`, `trivial-augment`, "
            "`colour-jitter`, with commas between them",
            flag="--augmentation",
            group="data",
            later=True,
        ),
    ] = ()
    mixup: Annotated[
        NotNegative,
        shared(
            "a of the Beta(a, a) of [mixup](data.md#mixed-images); 0: none; 0.2, say",
            flag="--mixup",
            group="data",
            later=True,
        ),
    ] = 0.0
    cutmix: Annotated[
        NotNegative,
        shared(
            "a of the Beta(a, a) of [CutMix](data.md#mixed-images); 0: none; 1, say; with `mixup`, each image "
            "draws one of both",
            flag="--cutmix",
            group="data",
            later=True,
        ),
    ] = 0.0
    flip: Annotated[
        bool | None,
        shared(
            "random horizontal flip",
            null="as the data set says, no for `digits` and `svhn`, yes for the others",
        ),
    ] = None
    image_size: Annotated[
        Annotated[Count, Field(le=LARGEST_IMAGE)] | None,
        shared(
            "side of the views that are cut from images of any size, see [data.md](data.md)",
            null="all images are of one size",
            flag="--image-size",
            group="data",
        ),
    ] = None
    on_bad_image: Annotated[
        Literal["fail", "skip"],
        shared("`fail` at an image that cannot be read, or `skip` it", flag="--on-bad-image", group="data"),
    ] = "fail"
    pipeline: Annotated[
        Literal["auto", "tensor", "ffcv", "dali", "image"],
        Key(
            "[what loads the images](data.md): `auto`, `tensor`, `ffcv`, `dali` or `image`",
            flag="--pipeline",
            group="data",
            teacher=True,
        ),
    ] = "auto"
    order: Annotated[
        Literal["random", "quasi-random"],
        shared(
            "`random`, or `quasi-random`: within windows of neighbouring images, for data that are read from a "
            "disk"
        ),
    ] = "random"
    workers: Annotated[
        Few | None,
        runtime(
            "threads that load images",
            null="as many as this process has processors, one for raw .beton files",
            flag="--workers",
            group="data",
        ),
    ] = None
    batches_ahead: Annotated[Few, runtime("batches that are loaded in advance")] = 2
    epochs: Annotated[
        Count,
        shared(
            "length of the run; fractions of it scale with it",
            flag="--epochs",
            group="essentials",
            resume="longer",
        ),
    ] = 200
    batch_size: Annotated[
        Count,
        shared(
            "images per step, of all [processes](scale.md) together; the last batch of an epoch may be smaller",
            flag="--batch-size",
            group="method",
        ),
    ] = 128
    micro_batch: Annotated[
        Count | Literal["auto"] | None,
        shared(
            "images that a process computes at a time: a number, or `auto`: as many as fit into its memory, see "
            "[scale.md](scale.md#micro-batches)",
            null="all of its part of the batch",
            flag="--micro-batch",
            group="speed",
        ),
    ] = None
    sync_bn: Annotated[
        Switch,
        shared(
            "BatchNorm in the training by the images of all processes, `on`, or of each, `off`: see "
            "[scale.md](scale.md#what-depends-on-the-number-of-processes)",
            flag="--sync-bn",
            group="many processes",
        ),
    ] = "off"
    lr: Annotated[
        Positive,
        shared(
            "learning rate: the initial one, or the highest of a schedule that rises",
            flag="--lr",
            group="method",
        ),
    ] = 0.1
    lr_scale: Annotated[
        Literal["none", "linear"],
        shared("`linear`: `lr` times `batch_size` / 128; `none`: as it is", flag="--lr-scale", group="method"),
    ] = "none"
    dtype: Annotated[
        Literal["float32", "float64"], shared("`float32` or `float64`, of parameters, images and losses")
    ] = "float32"
    amp: Annotated[
        bool,
        shared(
            "network passes of training and of its attack in half precision, see "
            "[architecture.md](architecture.md#precision)",
            flag="--amp/--no-amp",
            group="speed",
        ),
    ] = False
    # In a teacher's place in the cache it is part of amp.
    amp_dtype: Annotated[
        Literal["auto", "bfloat16", "float16", "float32"],
        Key(
            "format of those passes: `bfloat16`, `float16` or `float32`; `auto`: what is fast on the device, "
            "decided when a run begins and then kept in its `config.yaml`",
            flag="--amp-dtype",
            group="speed",
            teacher=True,
        ),
    ] = "auto"
    winograd: Annotated[
        Auto,
        Key(
            "3x3 convolutions in float32 on a CPU by Winograd's algorithm: `on`, `off`, or `auto`: where they are "
            "faster so, decided when a run begins and then kept in its `config.yaml`, see "
            "[performance.md](performance.md#winograd-on-a-cpu)",
            flag="--winograd",
            group="speed",
            teacher=True,
        ),
    ] = "auto"
    compile: Annotated[
        Auto,
        Key(
            "`torch.compile` for the network passes: `on`, `off`, or `auto`: on a GPU only, see "
            "[performance.md](performance.md)",
            flag="--compile",
            group="speed",
            teacher=True,
        ),
    ] = "auto"
    lanes: Annotated[
        Switch,
        runtime(
            "`on`: on a GPU, teachers and the next batch run on CUDA streams of their own; `off`: on one, with "
            "the same bits",
            flag="--lanes",
            group="speed",
        ),
    ] = "on"
    graphs: Annotated[
        Graphs,
        runtime(
            "on a GPU, what is captured as a CUDA graph, with the same bits: `step`: the whole training step, "
            "with micro-batches, `awp`, `sync_bn` or apex its attack alone; `attack`; `off`: nothing, with less "
            "memory",
            flag="--graphs",
            group="speed",
        ),
    ] = "step"
    fast: Annotated[
        bool,
        runtime(
            "on a GPU cuDNN times its plans once and keeps the fastest, whose sums may have no fixed order, and "
            "without AMP products are TF32: the same seed no longer gives the same bits; nothing on a CPU",
            flag="--fast/--no-fast",
            group="speed",
        ),
    ] = False
    checkpoint_activations: Annotated[
        bool,
        runtime(
            "keep the inputs of residual blocks alone and run them again in the backward: less memory, more "
            "time, the same result",
            flag="--checkpoint-activations",
            group="speed",
        ),
    ] = False
    masking_guard: Annotated[
        Guard,
        runtime(
            "where the attack may be masked (many zero gradients, AMP far from full precision): `warn`, `stop` "
            "the run, or `off`",
            flag="--masking-guard",
            group="method",
        ),
    ] = "warn"
    overfitting_guard: Annotated[
        OverfittingGuard,
        Key(
            "where one-step training overfits to its own attack: `warn`, `stop` the run, `rollback`: go back to "
            "the last good epoch and on with more steps, or `off`, see "
            "[run-directory.md](run-directory.md#overfitting-of-one-step-training)",
            flag="--overfitting-guard",
            group="method",
            resume="free",
        ),
    ] = "warn"
    device: Annotated[
        str,
        runtime(
            "device of the run: `auto`, `cpu`, `cuda` or `cuda:N`",
            flag="--device",
            group="essentials",
            values="device",
        ),
    ] = "auto"
    seed: Annotated[
        Seed,
        own("seed of initial weights, order, augmentation and attacks", flag="--seed", group="essentials"),
    ] = 0
    out: Annotated[
        Utf8PathText | None,
        Key(
            "run directory",
            null="`runs/METHOD-DATASET-MODEL-TIME`",
            flag="--out",
            group="output",
            values="dir",
            resume="free",
        ),
    ] = None
    checkpoint_every: Annotated[
        CountOrZero,
        runtime("steps between checkpoints within an epoch; 0: only at an epoch's end and on a signal"),
    ] = 0
    snapshot_every: Annotated[
        CountOrZero,
        Key(
            "steps between files of the student's weights in `snapshots/`, from `step-0.pt` on; 0: none",
            resume="free",
        ),
    ] = 0
    log_every: Annotated[Count, runtime("steps between rows of `metrics.jsonl`")] = 50
    imports: Annotated[
        tuple[PathText, ...],
        runtime(
            "Python files and modules that register [names of your own](extending.md) in this run; `--import` "
            "alone runs them"
        ),
    ] = ()
    loggers: Annotated[
        Names,
        runtime(
            "who gets every row of `metrics.jsonl`: {names}, see [loggers.md](loggers.md), or "
            "[loggers of your own](extending.md#a-logger)",
            flag="--log-to",
            group="output",
            values="logger",
        ),
    ] = ()
    loss: LossConfig = LossConfig()
    attack: AttackSpec = AttackSpec()
    forwards: ForwardsConfig = ForwardsConfig()
    optim: OptimConfig = OptimConfig()
    averaging: AveragingConfig = AveragingConfig()
    colour_jitter: ColourJitterConfig = ColourJitterConfig()
    awp: AwpConfig = AwpConfig()
    teacher: Annotated[TeacherConfig, Field(title="robust")] = TeacherConfig()
    teacher_st: Annotated[TeacherConfig, Field(title="standard")] = TeacherConfig(method="st")
    eval: EvalConfig = EvalConfig()

    def tree(self) -> Tree:
        """Return plain nested dicts, lists and numbers, as `config.yaml` holds them."""
        return self.model_dump(mode="json")


KEYS: dict[str, Key] = dict(collect(RunConfig))
"""The facts of every key, by its name, e.g. "attack.bn"."""


def flat(tree: Mapping[str, Any], prefix: str = "") -> Tree:
    """The values of a tree by the names of `KEYS`."""
    result: Tree = {}
    for name, value in tree.items():
        result |= {prefix + name: value} if prefix + name in KEYS else flat(value, f"{prefix}{name}.")
    return result


DEFAULTS = flat(RunConfig().tree())
"""The value of every key where neither the user nor a method decides it, by its name."""
