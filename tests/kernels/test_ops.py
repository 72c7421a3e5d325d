"""The ops as parts of torch: autograd, its transforms, registration, torch.compile, autocast, changes in place."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from engine.kernels import crop_flip, pgd_update
from tests.kernels import exact
from tests.kernels.cases import LOGITS, RANDOM_ROWS, STUDENT, in_numpy, table_arguments, table_loss
from tests.kernels.holding import numpy

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
WEIGHTS = RANDOM_ROWS[0]  # all six terms, each with a part that alpha multiplies
NUMBERS: dict[str, Any] = {"tau": 2.5, "tau_self": 0.8, "beta": 0.3, "detach_self": False, "label_smoothing": 0.1}


def arguments(
    device: str, batch: int = 5, classes: int = 7, dtype: torch.dtype = torch.float32, seed: int = 0
) -> dict[str, Any]:
    """A call of `distill_loss` in which everything is given; the student's logits ask for a gradient."""
    generator = torch.Generator().manual_seed(seed)
    result: dict[str, Any] = {}
    for name in LOGITS:
        logits_BC = 2 * torch.randn(batch, classes, generator=generator)
        result[name] = logits_BC.to(device, dtype).requires_grad_(name in STUDENT)
    result["labels"] = torch.randint(classes, (batch,), generator=generator).to(device)
    result["sample_weights"] = 2 * torch.rand(batch, generator=generator).to(device)
    return result | {"weights": WEIGHTS} | NUMBERS


def gradients(call: dict[str, Any], loss: Tensor, **keys: Any) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, (call["s_adv"], call["s_nat"]), **keys)


def loss_of_s_adv(call: dict[str, Any]) -> Callable[[Tensor], Tensor]:
    rest: dict[str, Any] = {
        name: value.detach() if isinstance(value, Tensor) else value for name, value in call.items()
    }
    return lambda s_adv: table_loss(**rest | {"s_adv": s_adv}).loss


# ---------------------------------------------------------------- autograd


def test_the_gradient_is_the_slope_of_the_exact_loss(implementation: str, device: str) -> None:
    """Differences of the loss in float64, in which neither autograd nor a formula for gradients has a part."""
    call = arguments(device, 3, 4)
    for name, gradient in zip(STUDENT, gradients(call, table_loss(**call).loss), strict=True):
        slopes = np.zeros((3, 4))
        for entry in itertools.product(range(3), range(4)):
            low, high = (call[name].detach().double() for _ in range(2))
            low[entry] -= 1e-4
            high[entry] += 1e-4
            calls = [in_numpy(table_arguments(**call | {name: logits})) for logits in (low, high)]
            losses = [exact.distill_loss(**one)["loss"].value for one in calls]
            slopes[entry] = (losses[1] - losses[0]) / 2e-4
        np.testing.assert_allclose(numpy(gradient), slopes, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("wanted", ["s_adv", "s_nat"])
def test_a_gradient_that_nobody_asks_for_changes_nothing(implementation: str, device: str, wanted: str) -> None:
    call = arguments(device)
    both = dict(zip(STUDENT, gradients(call, table_loss(**call).loss), strict=True))
    constant = "s_nat" if wanted == "s_adv" else "s_adv"
    (alone,) = torch.autograd.grad(table_loss(**call | {constant: call[constant].detach()}).loss, call[wanted])
    assert torch.equal(alone, both[wanted])


def test_one_tensor_may_be_both_of_the_students_logits(implementation: str, device: str) -> None:
    call = arguments(device)
    twin = call | {"s_nat": call["s_adv"].detach().clone().requires_grad_()}
    both = gradients(twin, table_loss(**twin).loss)
    (alone,) = torch.autograd.grad(table_loss(**call | {"s_nat": call["s_adv"]}).loss, call["s_adv"])
    torch.testing.assert_close(alone, both[0] + both[1], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_the_loss_is_the_same(implementation: str, device: str, mode: Callable[[], Any]) -> None:
    call = arguments(device)
    expected = table_loss(**call)
    with mode():
        result = table_loss(**call)
    assert not result.loss.requires_grad
    for got, wanted in zip(result, expected, strict=True):
        assert torch.equal(got, wanted)


def test_backward_twice_adds_the_gradient_twice(implementation: str, device: str) -> None:
    call = arguments(device)
    loss = table_loss(**call).loss
    once = gradients(call, loss, retain_graph=True)
    torch.autograd.backward(loss, retain_graph=True)
    torch.autograd.backward(loss)
    assert torch.equal(call["s_adv"].grad, 2 * once[0])
    assert torch.equal(call["s_nat"].grad, 2 * once[1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_gradient_from_above_is_multiplied_before_it_is_rounded(
    implementation: str, device: str, dtype: torch.dtype
) -> None:
    """A gradient scaler's 65536: in float16 most entries here would vanish without it."""
    call = arguments(device, 64, 100, dtype)
    call["sample_weights"] *= 1e-5
    once = gradients(call, table_loss(**call).loss, retain_graph=True)
    scaled = gradients(call, 65536 * table_loss(**call).loss)
    wide = {name: value.detach().float() for name, value in call.items() if name in LOGITS}
    wide |= {name: wide[name].requires_grad_() for name in STUDENT}
    right = gradients(call | wide, table_loss(**call | wide).loss)
    for small, large, wanted in zip(once, scaled, right, strict=True):
        assert small.dtype == large.dtype == dtype
        info = torch.finfo(dtype)
        expected = (65536 * wanted).to(dtype)
        torch.testing.assert_close(large, expected, rtol=info.eps, atol=info.smallest_normal * info.eps)
        if dtype == torch.float16:
            assert (small == 0).float().mean() > 0.5
            assert (large == 0).float().mean() < 0.05


class Dropped(torch.autograd.Function):
    """Hands no gradient back, not even zero."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor) -> Tensor:
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> None:
        return None


def test_a_loss_that_is_not_used_has_no_gradient(implementation: str, device: str) -> None:
    call = arguments(device)
    loss: Tensor = Dropped.apply(table_loss(**call).loss)
    torch.autograd.backward(loss + 0 * call["s_nat"].sum())
    assert call["s_adv"].grad is None or not call["s_adv"].grad.any()
    assert not call["s_nat"].grad.any()


@pytest.mark.usefixtures("fused")
def test_a_second_derivative_is_refused_by_name(device: str) -> None:
    call = arguments(device)
    loss = table_loss(**call).loss
    first, _ = gradients(call, loss, create_graph=True)
    for function in (first.square().sum(), loss + first.square().sum()):  # a penalty must not pass for a constant
        with pytest.raises(RuntimeError, match="FusedDistillLoss has no second derivative"):
            torch.autograd.backward(function, retain_graph=True)


# ---------------------------------------------------------------- torch.func


def test_func_grad_equals_autograd(implementation: str, device: str) -> None:
    call = arguments(device)
    expected, _ = gradients(call, table_loss(**call).loss)
    gradient, loss = torch.func.grad_and_value(loss_of_s_adv(call))(call["s_adv"].detach())
    assert torch.equal(gradient, expected)
    assert torch.equal(loss, table_loss(**call).loss)


@pytest.mark.parametrize(
    "transform",
    [
        lambda loss, s_adv: torch.func.vmap(loss)(torch.stack((s_adv, s_adv))),
        lambda loss, s_adv: torch.func.jvp(loss, (s_adv,), (torch.ones_like(s_adv),)),
        lambda loss, s_adv: torch.func.hessian(loss)(s_adv),
    ],
    ids=["vmap", "jvp", "hessian"],
)
@pytest.mark.usefixtures("fused")
def test_other_transforms_are_refused_by_name(
    device: str,
    transform: Callable[[Callable[[Tensor], Tensor], Tensor], object],
) -> None:
    call = arguments(device)
    with pytest.raises(RuntimeError, match="FusedDistillLoss"):
        transform(loss_of_s_adv(call), call["s_adv"].detach())


# ---------------------------------------------------------------- registration


def op_arguments(device: str, dtype: torch.dtype, *, given: tuple[str, ...] = LOGITS) -> tuple[Any, ...]:
    """Arguments of engine::distill_loss: all terms, kinds and a factor, or a cross-entropy of the only logits."""
    call = arguments(device, 4, 6, dtype)
    logits = [call[name].requires_grad_(name != "t_st_adv") for name in given]
    wants = [one.requires_grad for one in logits]
    if len(given) == 1:
        return logits, call["labels"], None, None, [0, 0, -1, 0, -1], [1.0, 0.0, 1.0], -1, 0.3, 0.1, wants
    terms = {  # kind, student, target, detach, factor: a, b, temperature
        (0, 1, -1, 0, -1): (0.7, -0.4, 1.0),
        (1, 0, 1, 0, 0): (0.5, 0.8, 0.8),
        (1, 0, 2, 1, -1): (1.2, -0.6, 2.5),
        (2, 0, -1, 0, -1): (0.3, 0.0, 1.0),
        (3, 0, 3, 0, 1): (0.2, 0.1, 2.0),
        (1, 0, 4, 0, -1): (-0.8, 0.1, 2.5),
    }
    factors = torch.rand(4, 2, generator=torch.Generator().manual_seed(1)).to(device)
    integers, numbers = (list(itertools.chain(*rows)) for rows in (terms, terms.values()))
    return logits, call["labels"], call["sample_weights"], factors, integers, numbers, 3, 0.3, 0.1, wants


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("given", [LOGITS, ("s_nat",)], ids=["all", "s_nat"])
@pytest.mark.usefixtures("fused")
def test_opcheck_of_distill_loss(device: str, dtype: torch.dtype, given: tuple[str, ...]) -> None:
    opcheck(torch.ops.engine.distill_loss.default, op_arguments(device, dtype, given=given))


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck_of_the_backward_of_distill_loss(implementation: str, device: str, dtype: torch.dtype) -> None:
    upstream, gradient_BC = torch.tensor(3.0, device=device), torch.randn(4, 6, device=device)
    opcheck(torch.ops.engine.distill_loss_backward.default, (upstream, gradient_BC, dtype))
    scaled_BC = torch.ops.engine.distill_loss_backward(upstream, gradient_BC, dtype)
    assert torch.equal(scaled_BC, (3 * gradient_BC).to(dtype))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("l2", [False, True])
@pytest.mark.parametrize("counting", [False, True])
def test_opcheck_of_pgd_update(
    implementation: str, device: str, dtype: torch.dtype, l2: bool, counting: bool
) -> None:
    images = torch.float64 if dtype == torch.float64 else torch.float32
    x_adv, grad, x_nat = (torch.rand(2, 3, 4, 5, dtype=each, device=device) for each in (images, dtype, images))
    counts = torch.zeros(2, dtype=torch.int64, device=device) if counting else None
    opcheck(torch.ops.engine.pgd_update.default, (x_adv, grad, x_nat, l2, 0.1, 0.05, counts))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("indexed", [False, True])
def test_opcheck_of_crop_flip(implementation: str, device: str, dtype: torch.dtype, indexed: bool) -> None:
    x_BCHW = torch.zeros((2, 3, 8, 8), dtype=dtype).to(memory_format=torch.channels_last)
    images = torch.randint(256, (4, 8, 8, 3), dtype=torch.uint8)
    tensors = (x_BCHW, torch.zeros(2, dtype=torch.int64), images, torch.arange(4), torch.tensor([3, 1]))
    operands = tuple(tensor.to(device) for tensor in tensors)
    index_B = torch.tensor([0, 2], device=device) if indexed else None
    opcheck(torch.ops.engine.crop_flip.default, (*operands, -1, 2**32 - 1, 4, True, True, index_B))


# ---------------------------------------------------------------- torch.compile


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """Graphs of one implementation are not for another."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def assert_alike(implementation: str, compiled: Any, eager: Any) -> None:
    """A fused implementation is called either way; the reference is fused anew, and rounds anew."""
    rtol, atol = (1e-5, 1e-6) if implementation == "reference" else (0, 0)
    torch.testing.assert_close(compiled, eager, rtol=rtol, atol=atol)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_compiled_distill_loss_equals_the_eager_one_for_every_batch_size(
    implementation: str, device: str, backend: str
) -> None:
    def training_loss(call: dict[str, Any]) -> tuple[Tensor, Tensor]:
        result = table_loss(**call)
        return 3 * result.loss, result.per_sample

    compiled = torch.compile(training_loss, fullgraph=True, dynamic=True, backend=backend)
    for batch in (6, 9, 23):
        call = arguments(device, batch, seed=batch)
        expected, expected_B = training_loss(call)
        with torch.compiler.set_stance("default" if batch == 6 else "fail_on_recompile"):
            loss, loss_B = compiled(call)
            assert_alike(implementation, (loss, loss_B), (expected, expected_B))
            assert_alike(implementation, gradients(call, loss), gradients(call, expected))


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_compiled_distill_loss_keeps_dtypes_and_leaves_out_what_is_not_needed(
    implementation: str, device: str, dtype: torch.dtype
) -> None:
    call = arguments(device, dtype=dtype)
    few = {"s_adv": None, "t_at_nat": None, "t_st_adv": None, "sample_weights": None}
    call |= few | {"weights": ((1.0, 0.5), *((0.0, 0.0),) * 5)}
    result = torch.compile(table_loss, fullgraph=True, backend="aot_eager")(**call)
    expected = table_loss(**call)
    assert_alike(implementation, tuple(result), tuple(expected))
    (got,), (wanted,) = (torch.autograd.grad(each.loss, call["s_nat"]) for each in (result, expected))
    assert got.dtype == dtype
    torch.testing.assert_close(got, wanted)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("threat_model", ["Linf", "L2"])
def test_a_compiled_pgd_update_equals_the_eager_one(implementation: str, device: str, threat_model: str) -> None:
    keys: dict[str, Any] = {"threat_model": threat_model, "epsilon": 0.2, "step_size": 0.1}

    def two_steps(x_adv: Tensor, grad: Tensor, x_nat: Tensor, counts: Tensor) -> Tensor:
        pgd_update(x_adv, grad, x_nat, counts=counts, **keys)
        return pgd_update(x_adv, grad.flip(0), x_nat, counts=counts, **keys) + 1

    outcomes = []
    for steps in (two_steps, torch.compile(two_steps, fullgraph=True, backend="aot_eager")):
        generator = torch.Generator().manual_seed(0)
        x_adv, x_nat = torch.rand(2, 3, 3, 8, 8, generator=generator).to(device)
        grad = torch.randn(3, 3, 8, 8, generator=generator).clamp_min(0).to(device)
        counts = torch.tensor([1, 2], device=device)
        outcomes.append((steps(x_adv, grad, x_nat, counts), x_adv, counts))
    assert all(map(torch.equal, *outcomes))
    assert outcomes[0][2].tolist() == [1 + 2 * int((grad == 0).sum()), 2]


@pytest.mark.usefixtures("fresh_compiler")
def test_a_compiled_crop_flip_equals_the_eager_one(implementation: str, device: str) -> None:
    images = torch.randint(256, (9, 8, 8, 3), dtype=torch.uint8, device=device)
    labels, sample_B = torch.arange(9, device=device), torch.tensor([8, 0, 3], device=device)

    def view(sample_B: Tensor, index_B: Tensor | None) -> tuple[Tensor, Tensor]:
        x_BCHW, labels_B = crop_flip(images, labels, sample_B, seed=2**64 - 1, epoch=2**32 - 1, index_B=index_B)
        return x_BCHW * 2, labels_B

    compiled = torch.compile(view, fullgraph=True, backend="aot_eager")
    for given in ((sample_B, None), (sample_B + 2**40, sample_B.flip(0))):
        assert all(map(torch.equal, compiled(*given), view(*given)))


# ---------------------------------------------------------------- numbers and modes


@pytest.mark.parametrize("dtype", DTYPES)
def test_autocast_changes_nothing(implementation: str, device: str, dtype: torch.dtype) -> None:
    call = arguments(device, dtype=dtype)
    expected = table_loss(**call)
    with torch.autocast(device, torch.bfloat16):
        result = table_loss(**call)
        loss = result.loss
    for got, wanted in zip(
        (*result, *gradients(call, loss)), (*expected, *gradients(call, expected.loss)), strict=True
    ):
        assert got.dtype == wanted.dtype
        assert torch.equal(got, wanted)


def test_whole_numbers_are_numbers_too(implementation: str, device: str) -> None:
    call = arguments(device) | {"tau": 2, "tau_self": 1, "beta": 1, "label_smoothing": 0, "weights": [(1, 1)] * 6}
    real = call | {"tau": 2.0, "tau_self": 1.0, "beta": 1.0, "label_smoothing": 0.0, "weights": [(1.0, 1.0)] * 6}
    for got, wanted in zip(table_loss(**call), table_loss(**real), strict=True):
        assert torch.equal(got, wanted)
    x_nat, grad = torch.rand(2, 2, 3, 4, 4, device=device)
    for threat_model in ("Linf", "L2"):
        keys: dict[str, Any] = {"threat_model": threat_model}
        whole = pgd_update(x_nat.clone(), grad, x_nat, epsilon=1, step_size=1, **keys)
        assert torch.equal(whole, pgd_update(x_nat.clone(), grad, x_nat, epsilon=1.0, step_size=1.0, **keys))


# ---------------------------------------------------------------- changes in place


def test_autograd_notices_a_change_in_place(implementation: str, device: str) -> None:
    x_nat, grad = torch.rand(2, 2, 3, 4, 4, device=device)
    counts = torch.zeros(2, dtype=torch.int64, device=device)
    x_adv, factor = x_nat.clone(), torch.ones((), requires_grad=True, device=device)
    square = (factor * x_adv).sum()
    pgd_update(x_adv, grad, x_nat, threat_model="Linf", epsilon=0.1, step_size=0.1, counts=counts)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.backward(square)

    images, labels = torch.zeros(4, 8, 8, 3, dtype=torch.uint8, device=device), torch.arange(4, device=device)
    out = crop_flip(images, labels, labels[:2], seed=0, epoch=0)
    square = (factor * out[0]).sum()
    crop_flip(images, labels, labels[:2], seed=0, epoch=1, out=out)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.backward(square)


def test_images_that_ask_for_a_gradient_are_not_changed_behind_its_back(implementation: str, device: str) -> None:
    x_adv, x_nat = torch.rand(2, 2, 3, 4, 4, device=device)
    keys: dict[str, Any] = {"threat_model": "Linf", "epsilon": 0.1, "step_size": 0.1}
    x_adv = x_adv.clone().requires_grad_()
    with pytest.raises(ValueError, match="torch.no_grad"):
        pgd_update(x_adv, x_nat, x_nat, **keys)
    with torch.no_grad():
        assert pgd_update(x_adv, x_nat, x_nat, **keys) is x_adv


def test_integers_that_are_read_may_have_gaps_and_those_that_are_written_not(
    implementation: str, device: str
) -> None:
    room = torch.arange(6, device=device).reshape(2, 3)
    x_nat = torch.zeros(1, 4, device=device)
    with pytest.raises(ValueError, match="counts: .*contiguous"):
        pgd_update(x_nat.clone(), x_nat, x_nat, threat_model="Linf", epsilon=1, step_size=1, counts=room[:, 1])

    images, labels = torch.zeros(4, 8, 8, 3, dtype=torch.uint8, device=device), torch.arange(8, device=device)[::2]
    samples = torch.tensor([3, 9, 1], device=device)[::2]
    x_BCHW, labels_B = crop_flip(images, labels, samples, seed=0, epoch=0)
    assert labels_B.tolist() == [6, 2]
    _, labels_B = crop_flip(images, labels.contiguous(), samples, seed=0, epoch=0, index_B=room[:, 0])
    assert labels_B.tolist() == [0, 6]
    with pytest.raises(ValueError, match=r"out\[1\]: .*contiguous"):
        crop_flip(images, labels, samples, seed=0, epoch=0, out=(x_BCHW, room[:, 1]))
    assert room.tolist() == [[0, 1, 2], [3, 4, 5]]
