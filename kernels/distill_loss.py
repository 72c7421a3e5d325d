"""The loss of every method: terms that compare logits, each weighted per sample by the trust in the teacher.

Shape suffixes: B batch, C classes, K terms, L logits, G those of them with a gradient, F factors.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from engine.kernels import dispatch, reference
from engine.kernels.contract import (
    KINDS,
    MAX_CLASSES,
    DistillLoss,
    LossAndGradients,
    LossInputs,
    LossSpec,
    LossTerm,
    Term,
    check_device,
    check_labels,
    look_up,
)

_FUSED = (torch.float32, torch.float16, torch.bfloat16)
_AT_ONCE = 2**16  # numbers: of more, a CPU scales one gradient after the other, which its inner cache then holds


def distill_loss(
    logits: Mapping[str, Tensor],
    labels: Tensor,
    terms: Sequence[Term],
    *,
    trust: str | None = None,
    beta: float = 0.1,
    factors: Mapping[str, Tensor] | None = None,
    sample_weights: Tensor | None = None,
    label_smoothing: float = 0.0,
) -> DistillLoss:
    """Weighted sum of terms, averaged over the batch.

    loss = mean_i v_i sum_k (a_k + b_k alpha_i) f_ik l_ik,   alpha_i = softmax(trust_i)[y_i] ** beta   (Eq. 3-4)

    With the l of each `Term`, as CE(s, y) or KL(t || s) = sum_c p_c (log p_c - log q_c), where
    p = softmax(t / temperature), q = softmax(s / temperature). A factor temperature^2 belongs to the weights.

    logits: (B, C) by name, finite, with any strides; those that no term reads cost nothing. labels: (B,) int64.
    trust: name of the teacher's logits that alpha is made of; None: alpha is 1. factors: f, (B,) by name.
    sample_weights: v, (B,), default 1; the mean still divides by B. label_smoothing: of "ce" alone.
    Half precision is computed in float32, float64 in float64. Each logits that ask for a gradient receive it, and
    alpha, factors and sample_weights have none; a fused implementation computes gradients in the forward pass, and
    so has no second derivative. An empty batch costs 0.

    Raises ValueError for names that are absent or unknown, for numbers out of range, for shapes that do not fit,
    and on a CPU for a label out of range; on an accelerator the device asserts that, without a wait.
    """
    resolve = _resolve.__wrapped__ if torch.compiler.is_compiling() else _resolve
    call = resolve(tuple(terms), tuple(logits), trust, float(beta), float(label_smoothing), tuple(factors or ()))
    spec = call.spec
    given = tuple(logits[name] for name in call.logits)
    columns = {name: factors[name] for name in call.factors} if factors else {}
    _check(call, given, labels, sample_weights, columns)
    inputs = LossInputs(given, labels, sample_weights, _stacked(columns) if columns else None)
    implementation = _implementation(inputs, call.kinds)
    if implementation == "reference":  # the compiler can fuse it
        if not torch.compiler.is_compiling():
            check_labels(inputs)
        return reference.distill_loss(inputs, spec)
    enabled = torch.is_grad_enabled()
    wants = tuple(
        [enabled and one.requires_grad and reached for one, reached in zip(given, call.reached, strict=True)]
    )
    if torch.compiler.is_compiling():
        kinds = [number for term in spec.terms for number in _integers(term)]
        numbers = [number for term in spec.terms for number in (term.a, term.b, term.temperature)]
        return DistillLoss(*_op(list(given), *inputs[1:], kinds, numbers, *spec[1:], list(wants))[:4])
    function = FusedDistillLoss if torch._C._are_functorch_transforms_active() else _Fused
    return DistillLoss(*function.apply(*given, *inputs[1:], spec, wants, implementation)[:4])


class _Call(NamedTuple):
    """The terms of a call by the numbers of the logits and factors that they read, whose names these are.

    reached: True for logits that the loss has a gradient to. kinds: of the terms, each once.
    """

    spec: LossSpec
    logits: tuple[str, ...]
    factors: tuple[str, ...]
    reached: tuple[bool, ...]
    kinds: tuple[str, ...]


@functools.lru_cache(maxsize=256)
def _resolve(
    terms: tuple[Term, ...],
    logits: tuple[str, ...],
    trust: str | None,
    beta: float,
    label_smoothing: float,
    factors: tuple[str, ...],
) -> _Call:
    """Check the names and numbers of a call. Raises ValueError as `distill_loss` does."""
    if not terms:
        raise ValueError("terms: there is none, and so nothing to compute")
    if not beta >= 0:
        raise ValueError(f"beta must be 0 or more, got {beta:g}")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing must lie in [0, 1], got {label_smoothing:g}")
    for k, term in enumerate(terms):
        _check_term(f"terms[{k}]", term, logits, factors)
    if trust is not None and trust not in logits:
        raise ValueError(f"trust: {trust} is absent; given are {', '.join(logits) or 'no logits'}")
    if trust is None and any(term.weight[1] for term in terms):
        raise ValueError("trust: a weight depends on alpha, and no logits are named that it is made of")
    # In the order of the terms, so that equal calls are equal whatever else is given.
    read = dict.fromkeys(name for term in terms for name in (term.student, term.target) if name is not None)
    names = (*read, *(() if trust is None or trust in read else (trust,)))
    used = tuple(dict.fromkeys(term.factor for term in terms if term.factor is not None))
    spec = LossSpec(
        tuple(
            LossTerm(
                term.kind,
                names.index(term.student),
                -1 if term.target is None else names.index(term.target),
                float(term.weight[0]),
                float(term.weight[1]),
                float(term.temperature),
                term.detach,
                -1 if term.factor is None else used.index(term.factor),
            )
            for term in terms
        ),
        -1 if trust is None else names.index(trust),
        beta,
        label_smoothing,
    )
    reached = tuple(spec.reaches(number) for number in range(len(names)))
    return _Call(spec, names, used, reached, tuple(dict.fromkeys(term.kind for term in terms)))


def _check_term(place: str, term: Term, logits: tuple[str, ...], factors: tuple[str, ...]) -> None:
    compares_logits = look_up(f"{place}.kind", term.kind, KINDS)
    if compares_logits != (term.target is not None):
        needs = "a target" if compares_logits else "no target: it compares with the labels"
        raise ValueError(f"{place}: {term.kind!r} needs {needs}, got {term.target!r}")
    for name in (term.student, term.target):
        if name is not None and name not in logits:
            raise ValueError(f"{place}: {name} is absent, and {term.kind!r} of {term.student} needs it")
    if term.factor is not None and term.factor not in factors:
        raise ValueError(f"{place}: the factor {term.factor} is absent")
    if not term.temperature > 0:
        raise ValueError(f"{place}.temperature must be positive, got {term.temperature:g}")
    if not compares_logits and term.temperature != 1:
        raise ValueError(f"{place}.temperature: {term.kind!r} has none, got {term.temperature:g}")


def _stacked(factors: Mapping[str, Tensor]) -> Tensor:
    """The factors that terms read, (B, F) contiguous float32, or float64 where one is."""
    columns = [factor.detach() for factor in factors.values()]
    double = any(column.dtype == torch.float64 for column in columns)
    return torch.stack([column.to(torch.float64 if double else torch.float32) for column in columns], dim=1)


def _integers(term: LossTerm) -> tuple[int, int, int, int, int]:
    return list(KINDS).index(term.kind), term.student, term.target, int(term.detach), term.factor


def _implementation(inputs: LossInputs, kinds: tuple[str, ...]) -> str:
    first = inputs.logits[0]
    fused = True
    for one in inputs.logits:
        fused = fused and one.dtype in _FUSED
    if first.device.type != "cpu" and first.shape[1] > MAX_CLASSES:
        fused = False
    implementation: str = dispatch.choose("distill_loss", first.device, fused=fused, kinds=kinds)
    return implementation


def _compute(inputs: LossInputs, spec: LossSpec, wants: tuple[bool, ...], implementation: str) -> LossAndGradients:
    """Loss and gradients by a fused implementation."""
    compute = dispatch.fused(implementation, "distill_loss", "loss_and_gradients")
    output: LossAndGradients = compute(inputs, spec, wants)
    return output


def _scale_for(gradients: Tensor) -> Callable[[Tensor, Tensor, torch.dtype], Tensor]:
    """The backward where these gradients lie: a function of upstream, gradients, and the dtype of the logits."""
    if (
        not torch._C._are_functorch_transforms_active()  # whose tensors have no memory
        and dispatch.choose("distill_loss", gradients.device, fused=gradients.dtype in _FUSED) == "triton"
    ):
        from engine.kernels.triton_ops import distill_loss as triton_distill_loss

        return triton_distill_loss.scale
    return _scale


def _scale(upstream: Tensor, gradients: Tensor, dtype: torch.dtype) -> Tensor:
    return (gradients * upstream).to(dtype)


# ---------------------------------------------------------------- autograd, eager, which needs no dispatcher


_ELSEWHERE = "the reference has one (ENGINE_KERNELS=reference)"


class _Fused(torch.autograd.Function):
    """Autograd function whose forward pass computes all gradients; the backward scales them.

    Arguments: the logits, then labels, sample_weights, factors, the `LossSpec`, for each logits whether their
    gradient is wanted, and the implementation.
    """

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, ...]:
        inputs, spec, wants, implementation = _inputs(arguments)
        output = _compute(inputs, spec, wants, implementation)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*output[1:4])
        _save(ctx, inputs.logits, wants, output.gradients)
        return output[:4]

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        rest = (None,) * 6
        if upstream is None or not any(ctx.wants):
            return *(None,) * len(ctx.wants), *rest
        gradients_GBC, *learning = ctx.saved_tensors
        scaled = iter(_scaled(upstream, gradients_GBC, [logits.dtype for logits in learning]))
        found = [next(scaled) if wanted else None for wanted in ctx.wants]
        if torch.is_grad_enabled():
            # create_graph: a second derivative must raise, not treat the gradient as a constant.
            found = [None if grad is None else _Gradient.apply(grad, *learning) for grad in found]
        return *found, *rest

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> None:
        raise RuntimeError(f"FusedDistillLoss has no forward-mode derivative; {_ELSEWHERE}")


class FusedDistillLoss(_Fused):
    """The same with `setup_context`, which torch.func needs and which would double the time of an eager call."""

    @staticmethod
    def forward(*arguments: Any) -> LossAndGradients:  # type: ignore[override]
        return _compute(*_inputs(arguments))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: LossAndGradients) -> None:
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(given for given in output[1:] if given is not None))
        given, _, wants, _ = _inputs(inputs)
        _save(ctx, given.logits, wants, output[4])


def _inputs(arguments: tuple[Any, ...]) -> tuple[LossInputs, LossSpec, tuple[bool, ...], str]:
    *logits, labels, sample_weights, factors, spec, wants, implementation = arguments
    return LossInputs(tuple(logits), labels, sample_weights, factors), spec, wants, implementation


def _save(ctx: Any, logits: tuple[Tensor, ...], wants: tuple[bool, ...], gradients_GBC: Tensor | None) -> None:
    ctx.wants = wants
    learning = [one for one, wanted in zip(logits, wants, strict=True) if wanted]
    ctx.save_for_backward(gradients_GBC, *learning)


def _scaled(upstream: Tensor, gradients_GBC: Tensor, dtypes: Sequence[torch.dtype]) -> tuple[Tensor, ...]:
    """The scaled gradients of each of the logits, in their dtypes."""
    scale = _scale_for(gradients_GBC)
    at_once = gradients_GBC.device.type != "cpu" or gradients_GBC.numel() <= _AT_ONCE
    if at_once and len(set(dtypes)) == 1:
        return scale(upstream, gradients_GBC, dtypes[0]).unbind()
    pairs = zip(gradients_GBC.unbind(), dtypes, strict=True)
    return tuple(scale(upstream, gradient_BC, dtype) for gradient_BC, dtype in pairs)


class _Gradient(torch.autograd.Function):
    """A gradient as a function of the logits that has no derivative: asked for one, it raises RuntimeError."""

    @staticmethod
    def forward(grad: Tensor, *logits: Tensor) -> Tensor:
        return grad.view_as(grad)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        raise RuntimeError(f"FusedDistillLoss has no second derivative; {_ELSEWHERE}")


# ---------------------------------------------------------------- the same as registered ops, for torch.compile


# many parameters: the schema of an op is flat
@torch.library.custom_op("engine::distill_loss", mutates_args=())
def _op(
    logits: Sequence[Tensor],
    labels: Tensor,
    sample_weights: Tensor | None,
    factors: Tensor | None,
    integers: Sequence[int],
    numbers: Sequence[float],
    trust: int,
    beta: float,
    label_smoothing: float,
    wants: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    kinds = list(KINDS)
    terms = []
    for place in range(len(integers) // 5):
        kind, student, target, detach, factor = integers[5 * place : 5 * place + 5]
        a, b, temperature = numbers[3 * place : 3 * place + 3]
        terms.append(LossTerm(kinds[kind], student, target, a, b, temperature, bool(detach), factor))
    inputs = LossInputs(tuple(logits), labels, sample_weights, factors)
    spec = LossSpec(tuple(terms), trust, beta, label_smoothing)
    implementation = _implementation(inputs, tuple(term.kind for term in terms))
    loss, alpha, means, per_sample, gradients = _compute(inputs, spec, tuple(wants), implementation)
    return loss, alpha, means, per_sample, loss.new_empty(0) if gradients is None else gradients


@_op.register_fake
def _(
    logits: Sequence[Tensor],
    labels: Tensor,
    sample_weights: Tensor | None,
    factors: Tensor | None,
    integers: Sequence[int],
    *numbers: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    first, wanted = logits[0], sum(numbers[-1])
    dtype = torch.promote_types(first.dtype, torch.float32)
    return (
        first.new_empty((), dtype=dtype),
        first.new_empty(first.shape[0], dtype=dtype),
        first.new_empty(len(integers) // 5, dtype=dtype),
        first.new_empty(first.shape[0], dtype=dtype),
        first.new_empty((wanted, *first.shape) if wanted else 0, dtype=dtype),
    )


@torch.library.custom_op("engine::distill_loss_backward", mutates_args=())
def _op_backward(upstream: Tensor, gradient_BC: Tensor, dtype: torch.dtype) -> Tensor:
    return _scale_for(gradient_BC)(upstream, gradient_BC, dtype)


@_op_backward.register_fake
def _(upstream: Tensor, gradient_BC: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(gradient_BC, dtype=dtype)


def _save_op(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[4])
    ctx.dtypes = [logits.dtype for logits in inputs[0]]
    ctx.wants = inputs[-1]


def _backward(ctx: Any, upstream: Tensor | None, *_: None) -> tuple[Any, ...]:
    rest = (None,) * 9
    if upstream is None or not any(ctx.wants):
        return [None] * len(ctx.wants), *rest
    (gradients_GBC,) = ctx.saved_tensors
    scaled: list[Tensor | None] = []
    for dtype, wanted in zip(ctx.dtypes, ctx.wants, strict=True):
        number = sum(one is not None for one in scaled)
        scaled.append(_op_backward(upstream, gradients_GBC[number], dtype) if wanted else None)
    return scaled, *rest


_op.register_autograd(_backward, setup_context=_save_op)


# ---------------------------------------------------------------- checks


def _check(
    call: _Call,
    logits: tuple[Tensor, ...],
    labels: Tensor,
    sample_weights: Tensor | None,
    factors: Mapping[str, Tensor],
) -> None:
    """Raise ValueError for tensors whose shapes, dtypes or devices do not fit."""
    shape, device = logits[0].shape, logits[0].device
    for name, value in zip(call.logits, logits, strict=True):
        if value.dim() != 2 or value.shape != shape:
            raise ValueError(
                f"{name} has shape {tuple(value.shape)}, expected (B, C) as of {call.logits[0]}, {tuple(shape)}"
            )
        if not value.dtype.is_floating_point:
            raise ValueError(f"{name} has dtype {value.dtype}, expected a floating one")
    if "margin" in call.kinds and shape[1] < 2:
        raise ValueError(f"{call.logits[0]} has {shape[1]} class, and 'margin' needs two")
    given = (*logits, labels, sample_weights, *factors.values())
    if any(one is not None and one.device != device for one in given):
        check_device(**dict(zip((*call.logits, "labels", "sample_weights", *factors), given, strict=True)))
    if labels.shape != shape[:1] or labels.dtype != torch.int64:
        raise ValueError(
            f"labels: expected int64 of shape ({shape[0]},), got {labels.dtype} of shape {tuple(labels.shape)}"
        )
    if sample_weights is not None and sample_weights.shape != shape[:1]:
        raise ValueError(f"sample_weights: expected shape ({shape[0]},), got {tuple(sample_weights.shape)}")
    for name, factor in factors.items():
        if factor.shape != shape[:1]:
            raise ValueError(f"factors: {name} has shape {tuple(factor.shape)}, expected ({shape[0]},)")
