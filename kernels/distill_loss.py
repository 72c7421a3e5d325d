"""The loss of every method: six terms per sample, weighted by the trust in the teacher.

Shape suffixes: B batch, C classes, K the six terms.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from engine.kernels import dispatch, reference
from engine.kernels.contract import (
    MAX_CLASSES,
    READS,
    DistillLoss,
    LossAndGradients,
    LossInputs,
    LossRow,
    check_device,
    check_labels,
)

_LOGITS = ("s_adv", "s_nat", "t_at_nat", "t_at_adv", "t_st_adv")
_FUSED = (torch.float32, torch.float16, torch.bfloat16)


# many parameters: all but the first two are given by name
def distill_loss(
    s_adv: Tensor | None,
    labels: Tensor,
    *,
    s_nat: Tensor | None = None,
    t_at_nat: Tensor | None = None,
    t_at_adv: Tensor | None = None,
    t_st_adv: Tensor | None = None,
    weights: Sequence[tuple[float, float]],
    tau: float = 1.0,
    tau_self: float = 1.0,
    beta: float = 0.1,
    detach_self: bool = False,
    sample_weights: Tensor | None = None,
    label_smoothing: float = 0.0,
) -> DistillLoss:
    """Weighted sum of the six terms of the paper's Table 1, averaged over the batch.

    loss = mean_i v_i sum_k (a_k + b_k alpha_i) l_ik,   alpha_i = softmax(T_at(x~_i))[y_i] ** beta   (Eq. 3-4)

    l_0 CE(S(x), y), l_1 CE(S(x~), y), l_2 KL(S(x) || S(x~)) at temperature tau_self, and at temperature tau
    l_3 KL(T_at(x) || S(x~)), l_4 KL(T_at(x~) || S(x~)), l_5 KL(T_st(x~) || S(x~)), with
    KL(p || q) = sum_c p_c (log p_c - log q_c). Any factor tau^2 belongs to the weights.

    s_adv, s_nat, t_at_nat, t_at_adv, t_st_adv: logits (B, C), finite, with any strides, None where absent.
    labels: (B,) int64. weights: six pairs (a, b). detach_self: no gradient into S(x) through l_2.
    sample_weights: v, (B,), default 1; the mean still divides by B. label_smoothing: of l_0 and l_1 alone.
    Half precision is computed in float32, float64 in float64. Only s_adv and s_nat receive a gradient; a fused
    implementation computes it in the forward pass, and so has no second derivative. An empty batch costs 0.

    Raises ValueError for a term of nonzero weight whose logits are absent, for shapes that do not fit, and on a
    CPU for a label out of range; on an accelerator the device asserts that, without a wait.
    """
    row = LossRow(
        tuple((float(a), float(b)) for a, b in weights), tau, tau_self, beta, detach_self, label_smoothing
    )
    given = LossInputs(s_adv, s_nat, t_at_nat, t_at_adv, t_st_adv, labels, sample_weights)
    _check(given, row)
    inputs = _needed(given, row)
    want_adv, want_nat = _wanted_gradients(inputs, row)
    compiling = torch.compiler.is_compiling()
    if _implementation(inputs) == "reference":  # the compiler can fuse it
        if not compiling:
            check_labels(inputs)
        return reference.distill_loss(inputs, row)
    if compiling:
        flat = [number for pair in row.weights for number in pair]
        return DistillLoss(*_op(*inputs, flat, *row[1:], want_adv, want_nat)[:4])
    function = FusedDistillLoss if torch._C._are_functorch_transforms_active() else _Fused
    return DistillLoss(*function.apply(*inputs, row, want_adv, want_nat)[:4])


def _needed(given: LossInputs, row: LossRow) -> LossInputs:
    """The inputs without logits that no term of nonzero weight reads; T_at(x~) stays, for alpha is returned."""
    needed = {name for reads, active in zip(READS.values(), row.active, strict=True) if active for name in reads}
    inputs = given._replace(
        s_adv=given.s_adv if "s_adv" in needed else None,
        s_nat=given.s_nat if "s_nat" in needed else None,
        t_at_nat=given.t_at_nat if "t_at_nat" in needed else None,
        t_st_adv=given.t_st_adv if "t_st_adv" in needed else None,
    )
    if inputs.s_adv is None and inputs.s_nat is None:  # all weights are 0
        inputs = inputs._replace(s_adv=given.s_adv, s_nat=given.s_nat)
    return inputs


def _wanted_gradients(inputs: LossInputs, row: LossRow) -> tuple[bool, bool]:
    """True where autograd wants the gradient to s_adv, and to s_nat."""
    enabled = torch.is_grad_enabled()
    want_adv = enabled and inputs.s_adv is not None and inputs.s_adv.requires_grad
    want_nat = enabled and inputs.s_nat is not None and inputs.s_nat.requires_grad
    return want_adv, want_nat and (row.active[0] or not row.detach_self)


def _implementation(inputs: LossInputs) -> str:
    logits = [given for given in inputs[:5] if given is not None]
    fused = all(given.dtype in _FUSED for given in logits)
    if logits[0].device.type != "cpu" and logits[0].shape[1] > MAX_CLASSES:
        fused = False
    implementation: str = dispatch.choose("distill_loss", logits[0].device, fused=fused)
    return implementation


def _compute(inputs: LossInputs, row: LossRow, want_adv: bool, want_nat: bool) -> LossAndGradients:
    """Loss and gradients by the fused implementation that serves here."""
    compute = dispatch.fused(_implementation(inputs), "distill_loss", "loss_and_gradients")
    output: LossAndGradients = compute(inputs, row, want_adv, want_nat)
    return output


def _scale(
    upstream: Tensor,
    grad_adv: Tensor | None,
    grad_nat: Tensor | None,
    dtype_adv: torch.dtype,
    dtype_nat: torch.dtype,
) -> tuple[Tensor | None, Tensor | None]:
    """`upstream * grad`, the backward: the gradients of the forward, scaled, in the dtypes of the logits."""
    given = grad_adv if grad_adv is not None else grad_nat
    if (
        given is not None
        and not torch._C._are_functorch_transforms_active()  # whose tensors have no memory
        and dispatch.choose("distill_loss", given.device, fused=given.dtype in _FUSED) == "triton"
    ):
        from engine.kernels.triton_ops import distill_loss as triton_distill_loss

        return triton_distill_loss.scale(upstream, grad_adv, grad_nat, dtype_adv, dtype_nat)
    return (
        None if grad_adv is None else (grad_adv * upstream).to(dtype_adv),
        None if grad_nat is None else (grad_nat * upstream).to(dtype_nat),
    )


# ---------------------------------------------------------------- autograd, eager, which needs no dispatcher


_ELSEWHERE = "the reference has one (ENGINE_KERNELS=reference)"


class _Fused(torch.autograd.Function):
    """Autograd function whose forward pass computes both gradients; the backward scales them."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, ...]:
        output = _compute(LossInputs(*arguments[:7]), *arguments[7:])
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*output[1:4])
        ctx.save_for_backward(*arguments[:2], *output[4:])
        return output[:4]

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if upstream is None:
            return (None,) * 10
        s_adv, s_nat, grad_adv, grad_nat = ctx.saved_tensors
        scaled = _scale(upstream, grad_adv, grad_nat, *_dtypes(s_adv, s_nat))
        if not torch.is_grad_enabled():
            return *scaled, *(None,) * 8
        # create_graph: a second derivative must raise, not treat the gradient as a constant.
        return *(None if grad is None else _Gradient.apply(grad, s_adv, s_nat) for grad in scaled), *(None,) * 8

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> None:
        raise RuntimeError(f"FusedDistillLoss has no forward-mode derivative; {_ELSEWHERE}")


class FusedDistillLoss(_Fused):
    """The same with `setup_context`, which torch.func needs and which would double the time of an eager call."""

    @staticmethod
    def forward(*arguments: Any) -> LossAndGradients:  # type: ignore[override]
        return _compute(LossInputs(*arguments[:7]), *arguments[7:])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: LossAndGradients) -> None:
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(given for given in output[1:] if given is not None))
        ctx.save_for_backward(*inputs[:2], *output[4:])


class _Gradient(torch.autograd.Function):
    """A gradient as a function of the logits that has no derivative: asked for one, it raises RuntimeError."""

    @staticmethod
    def forward(grad: Tensor, s_adv: Tensor | None, s_nat: Tensor | None) -> Tensor:
        return grad.view_as(grad)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        raise RuntimeError(f"FusedDistillLoss has no second derivative; {_ELSEWHERE}")


def _dtypes(s_adv: Tensor | None, s_nat: Tensor | None) -> tuple[torch.dtype, torch.dtype]:
    return (
        torch.float32 if s_adv is None else s_adv.dtype,
        torch.float32 if s_nat is None else s_nat.dtype,
    )


# ---------------------------------------------------------------- the same as registered ops, for torch.compile


# many parameters: the schema of an op is flat
@torch.library.custom_op("engine::distill_loss", mutates_args=())
def _op(
    s_adv: Tensor | None,
    s_nat: Tensor | None,
    t_at_nat: Tensor | None,
    t_at_adv: Tensor | None,
    t_st_adv: Tensor | None,
    labels: Tensor,
    sample_weights: Tensor | None,
    weights: Sequence[float],
    tau: float,
    tau_self: float,
    beta: float,
    detach_self: bool,
    label_smoothing: float,
    want_adv: bool,
    want_nat: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    inputs = LossInputs(s_adv, s_nat, t_at_nat, t_at_adv, t_st_adv, labels, sample_weights)
    pairs = tuple(zip(weights[::2], weights[1::2], strict=True))
    row = LossRow(pairs, tau, tau_self, beta, detach_self, label_smoothing)
    loss, alpha, terms, per_sample, *gradients = _compute(inputs, row, want_adv, want_nat)
    grad_adv, grad_nat = (loss.new_empty(0) if grad is None else grad for grad in gradients)
    return loss, alpha, terms, per_sample, grad_adv, grad_nat


@_op.register_fake
def _(
    s_adv: Tensor | None,
    s_nat: Tensor | None,
    t_at_nat: Tensor | None,
    t_at_adv: Tensor | None,
    t_st_adv: Tensor | None,
    labels: Tensor,
    sample_weights: Tensor | None,
    *numbers: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    student = LossInputs(s_adv, s_nat, t_at_nat, t_at_adv, t_st_adv, labels, sample_weights).student
    dtype = torch.promote_types(student.dtype, torch.float32)
    batch, classes = student.shape
    want_adv, want_nat = numbers[-2:]
    return (
        student.new_empty((), dtype=dtype),
        student.new_empty(batch, dtype=dtype),
        student.new_empty(6, dtype=dtype),
        student.new_empty(batch, dtype=dtype),
        student.new_empty((batch, classes) if want_adv else 0, dtype=dtype),
        student.new_empty((batch, classes) if want_nat else 0, dtype=dtype),
    )


@torch.library.custom_op("engine::distill_loss_backward", mutates_args=())
def _op_backward(
    upstream: Tensor, grad_adv: Tensor, grad_nat: Tensor, dtype_adv: torch.dtype, dtype_nat: torch.dtype
) -> tuple[Tensor, Tensor]:
    adv, nat = (grad if grad.dim() == 2 else None for grad in (grad_adv, grad_nat))
    scaled_adv, scaled_nat = _scale(upstream, adv, nat, dtype_adv, dtype_nat)
    return (
        torch.empty_like(grad_adv, dtype=dtype_adv) if scaled_adv is None else scaled_adv,
        torch.empty_like(grad_nat, dtype=dtype_nat) if scaled_nat is None else scaled_nat,
    )


@_op_backward.register_fake
def _(
    upstream: Tensor, grad_adv: Tensor, grad_nat: Tensor, dtype_adv: torch.dtype, dtype_nat: torch.dtype
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(grad_adv, dtype=dtype_adv), torch.empty_like(grad_nat, dtype=dtype_nat)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[4:])
    ctx.dtypes = _dtypes(*inputs[:2])
    ctx.wants = inputs[-2:]


def _backward(ctx: Any, upstream: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if upstream is None:
        return (None,) * 15
    scaled = _op_backward(upstream, *ctx.saved_tensors, *ctx.dtypes)
    return *(grad if want else None for grad, want in zip(scaled, ctx.wants, strict=True)), *(None,) * 13


_op.register_autograd(_backward, setup_context=_save)


# ---------------------------------------------------------------- checks


def _check(inputs: LossInputs, row: LossRow) -> None:
    if len(row.weights) != len(READS):
        raise ValueError(f"weights: {len(READS)} pairs (a, b) are needed, got {len(row.weights)}")
    given = {name: value for name, value in zip(_LOGITS, inputs, strict=False) if value is not None}
    for k, ((a, b), reads) in enumerate(zip(row.weights, READS.values(), strict=True)):
        needed = reads if (a or b) else ()
        for name in (*needed, *(("t_at_adv",) if b else ())):
            if name not in given:
                raise ValueError(f"{name} is absent, and weights[{k}] = ({a:g}, {b:g}) needs it")
    if "s_adv" not in given and "s_nat" not in given:
        raise ValueError("s_adv and s_nat are both absent: there is no student to train")
    first, shape = next((name, value.shape) for name, value in given.items())
    for name, value in given.items():
        if value.dim() != 2 or value.shape != shape:
            raise ValueError(
                f"{name} has shape {tuple(value.shape)}, expected (B, C) as of {first}, {tuple(shape)}"
            )
        if not value.dtype.is_floating_point:
            raise ValueError(f"{name} has dtype {value.dtype}, expected a floating one")
    labels, sample_weights = inputs.labels, inputs.sample_weights
    check_device(**given, labels=labels, sample_weights=sample_weights)
    if labels.shape != shape[:1] or labels.dtype != torch.int64:
        raise ValueError(
            f"labels: expected int64 of shape ({shape[0]},), got {labels.dtype} of shape {tuple(labels.shape)}"
        )
    if sample_weights is not None and sample_weights.shape != shape[:1]:
        raise ValueError(f"sample_weights: expected shape ({shape[0]},), got {tuple(sample_weights.shape)}")
    for name, temperature in (("tau", row.tau), ("tau_self", row.tau_self)):
        if not temperature > 0:
            raise ValueError(f"{name} must be positive, got {temperature:g}")
    if not row.beta >= 0:
        raise ValueError(f"beta must be 0 or more, got {row.beta:g}")
    if not 0 <= row.label_smoothing <= 1:
        raise ValueError(f"label_smoothing must lie in [0, 1], got {row.label_smoothing:g}")
