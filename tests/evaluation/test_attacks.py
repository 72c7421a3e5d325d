"""Attacks of evaluations against loops by hand and the package itself; users' functions and data sets."""

from __future__ import annotations

import copy
import json
import zlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset, Subset, TensorDataset

from engine.attacks import kinds, table
from engine.attacks.auto import standard
from engine.attacks.pgd import pgd, preset, started
from engine.common.stopping import RunFailed
from engine.evaluation.measure import Result, evaluate, further
from engine.models.weights import load_model
from tests.conftest import CLASSES, write_checkpoint
from tests.evaluation.test_measure import Rounding, footprint, labelled, network


@pytest.fixture(autouse=True)
def no_attacks_of_users(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "_added", {})


def floats(images: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    return (images.permute(0, 3, 1, 2).to(dtype) / 255).contiguous()


def right(model: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
    with torch.no_grad():
        predicted: Tensor = copy.deepcopy(model).eval()(x).argmax(1)
    return predicted == labels


# ---------------------------------------------------------------- any number of steps


def test_pgd50_is_fifty_steps_by_hand_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    model, epsilon = network(), 3 / 255
    images, labels = labelled(model)
    twin, x = copy.deepcopy(model).eval(), floats(images, torch.float64)
    x_adv = started(x, preset("pgd50", epsilon), seed=5, counter=zlib.crc32(b"pgd50"))
    for _ in range(50):
        x_adv.requires_grad_()
        (gradient,) = torch.autograd.grad(F.cross_entropy(twin(x_adv), labels, reduction="sum"), x_adv)
        x_adv = x_adv.detach() + epsilon / 4 * gradient.sign()
        x_adv = torch.min(torch.max(x_adv, x - epsilon), x + epsilon).clamp(0, 1)
    expected = right(model, x_adv, labels)
    assert 0 < expected.sum() < right(model, x, labels).sum()
    crafted: list[Tensor] = []

    def spy(*arguments: Any, **keys: Any) -> Tensor:
        crafted.append(pgd(*arguments, **keys))
        return crafted[-1]

    monkeypatch.setattr(kinds, "pgd", spy)
    result = evaluate(model, (images, labels), ["pgd50"], epsilon=epsilon, seed=5, batch_size=7)["pgd50"]
    torch.testing.assert_close(torch.cat(crafted), x_adv, rtol=0, atol=1e-12)
    assert torch.equal(result.verdicts, expected)
    assert result.description == (
        "L-inf, epsilon 3/255, 50 steps of 0.75/255, random start, cross-entropy, BN eval"
    )
    weaker = evaluate(model, (images, labels), ["pgd1"], epsilon=epsilon, seed=5)["pgd1"]
    assert weaker.correct > result.correct


# ---------------------------------------------------------------- the parts of AutoAttack


@pytest.fixture
def short_square(monkeypatch: pytest.MonkeyPatch) -> None:
    """Square with fewer queries, ours and the package's alike."""
    square = pytest.importorskip("pyautoattack.square", reason="pyautoattack is not installed").SquareAttack
    perturb = square.perturb

    def shorter(self: Any, x: Tensor, y: Tensor) -> Tensor:
        assert self.n_queries == 5000
        self.n_queries = 300
        images: Tensor = perturb(self, x, y)
        self.n_queries = 5000
        return images

    monkeypatch.setattr(square, "perturb", shorter)
    monkeypatch.setattr(standard, "STANDARD", standard.STANDARD._replace(square=300))


def parts_by_hand(model: nn.Module, norm: str, epsilon: float, seed: int) -> dict[str, Callable[..., Tensor]]:
    """The package's own classes, with the numbers of its paper."""
    autopgd = pytest.importorskip("pyautoattack.autopgd_base", reason="pyautoattack is not installed")
    from pyautoattack.fab_pt import FABAttack_PT
    from pyautoattack.square import SquareAttack

    classes = model(torch.zeros(1, 3, 8, 8)).shape[1]
    ball: dict[str, Any] = {"norm": norm, "eps": epsilon, "seed": seed, "device": "cpu"}
    found = {
        "apgd-ce": autopgd.APGDAttack(model, n_iter=100, n_restarts=1, loss="ce", **ball),
        "apgd-dlr": autopgd.APGDAttack(model, n_iter=100, n_restarts=1, loss="dlr", **ball),
        "apgd-t": autopgd.APGDAttack_targeted(
            model, n_iter=100, n_restarts=1, n_target_classes=classes - 1, **ball
        ),
        "fab-t": FABAttack_PT(
            model, n_iter=100, n_restarts=1, targeted=True, n_target_classes=classes - 1, **ball
        ),
        "square": SquareAttack(model, n_queries=5000, p_init=0.8, n_restarts=1, resc_schedule=False, **ball),
    }
    return {name: attack.perturb for name, attack in found.items()}


def stand(model: nn.Module, x: Tensor, labels: Tensor, attacks: list[Callable[..., Tensor]]) -> list[Tensor]:
    """True for the images that stand no attack, and that stand each and those before, which starts from x."""
    left = [right(model, x, labels)]
    for attack in attacks:
        survived, (now,) = left[-1].clone(), left[-1].nonzero(as_tuple=True)
        if len(now):
            with torch.random.fork_rng(), torch.no_grad():
                survived[now] = right(model, attack(x[now], labels[now]), labels[now])
        left.append(survived)
    return left


@pytest.mark.parametrize(
    ("name", "norm", "epsilon"),
    [
        ("apgd-ce", "Linf", 6 / 255), ("apgd-dlr", "Linf", 6 / 255), ("apgd-t", "Linf", 6 / 255),
        ("fab-t", "Linf", 6 / 255), ("square", "Linf", 9 / 255), ("apgd-dlr", "L2", 0.3), ("apgd-t", "L2", 0.3),
    ],
)  # fmt: skip
def test_a_part_finds_what_the_package_s_finds(name: str, norm: str, epsilon: float, short_square: None) -> None:
    model = network(5, torch.float32)
    images, labels = labelled(model, 8)
    frozen = copy.deepcopy(model).eval().requires_grad_(False)
    natural, expected = stand(model, floats(images), labels, [parts_by_hand(frozen, norm, epsilon, 4)[name]])
    before = footprint(model)
    result = evaluate(model, (images, labels), [name], epsilon=epsilon, threat_model=norm, seed=4)[name]
    # From other random starts an image at the edge of the ball may go the other way.
    assert (result.verdicts != expected).sum() <= (0 if name == "fab-t" else 3)
    assert 0 < expected.sum() < natural.sum()
    assert result.parts == {"natural": natural.double().mean(), name: result.verdicts.double().mean()}
    assert not (result.verdicts & ~natural).any()
    assert result.masked is result.zero_gradients is None
    assert result.description.startswith(table.find(name).numbers(5, (epsilon, norm)))
    assert result.description.endswith("8 images, batch 64, seed 4")
    assert footprint(model) == before


@pytest.mark.parametrize("classes", [2, 3])
def test_autoattack_of_few_classes_runs_the_parts_that_are_defined(classes: int, short_square: None) -> None:
    model = network(classes, torch.float32)
    images, labels = labelled(model, 12)
    epsilon = 8 / 255
    frozen = copy.deepcopy(model).eval().requires_grad_(False)
    by_hand = parts_by_hand(frozen, "Linf", epsilon, 1)
    names = ["apgd-ce", "fab-t", "square"]
    expected = stand(model, floats(images), labels, [by_hand[name] for name in names])
    result = evaluate(model, (images, labels), ["aa"], epsilon=epsilon, seed=1)["aa"]
    assert torch.equal(result.verdicts, expected[-1])
    assert result.parts == {
        part: stood.double().mean() for part, stood in zip(["natural", *names], expected, strict=True)
    }
    assert result.correct < expected[0].sum()
    assert "standard" not in result.description
    assert f"AutoAttack without APGD-T, which {classes} classes do not define" in result.description
    assert table.title("aa", result.as_dict()) == "AA without APGD-T"


@pytest.mark.parametrize(("name", "classes", "least"), [("apgd-t", 3, 4), ("apgd-dlr", 2, 3), ("pgd10", 1, 2)])
def test_what_few_classes_do_not_define_is_refused(name: str, classes: int, least: int) -> None:
    model = network(classes)
    data = torch.zeros(4, 8, 8, 3, dtype=torch.uint8), torch.zeros(4, dtype=torch.int64)
    with pytest.raises(
        ValueError, match=f"{name}: needs {least} classes, and the model has {classes}; defined: nat"
    ):
        evaluate(model, data, ["natural", name])


# ---------------------------------------------------------------- images from another network


EPSILON = 4 / 255
IMAGES = torch.randint(256, (12, 8, 8, 3), generator=torch.Generator().manual_seed(2), dtype=torch.uint8)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A checkpoint whose network gives the images different classes."""
    model: Any = load_model(write_checkpoint(tmp_path / "random.pt", 1)).module
    with torch.no_grad():
        model.linear.bias -= model(floats(IMAGES)).mean(dim=0)
    torch.save({"net": model.state_dict(), "classes": CLASSES}, tmp_path / "a.pt")
    return tmp_path / "a.pt"


@pytest.fixture
def student(source: Path) -> nn.Module:
    """The network of the source with a little noise: what breaks one breaks the other, mostly."""
    model = load_model(source).module
    torch.manual_seed(3)
    with torch.no_grad():
        for value in model.parameters():
            value.add_(0.1 * value.std(correction=0) * torch.randn(value.shape))
    return model.eval()


def split(model: nn.Module, names: tuple[str, ...] = CLASSES) -> SimpleNamespace:
    with torch.no_grad():
        labels = model(floats(IMAGES)).argmax(1)
    return SimpleNamespace(images=IMAGES, labels=labels, class_names=names)


def permuted(path: Path, out: Path, order: list[int]) -> Path:
    """The same checkpoint with its classes in another order."""
    state = load_model(path).module.state_dict()
    head = {key: state[key][order] for key in ("linear.weight", "linear.bias")}
    torch.save({"net": state | head, "classes": [CLASSES[index] for index in order]}, out)
    return out


@pytest.mark.parametrize(("name", "inner"), [("transfer:{}", "pgd20"), ("transfer:{}:pgd5-dlr", "pgd5-dlr")])
def test_transferred_images_are_those_of_the_other_network(
    name: str, inner: str, source: Path, student: nn.Module
) -> None:
    name, data, network = name.format(source), split(student), load_model(source).module
    counter, epsilon = zlib.crc32(inner.encode()), EPSILON
    x_adv = pgd(network, floats(IMAGES), data.labels, preset(inner, epsilon), seed=2, counter=counter)
    found = evaluate(student, data, [name, inner], epsilon=epsilon, seed=2, batch_size=5)
    assert torch.equal(found[name].verdicts, right(student, x_adv, data.labels))
    assert found[inner].correct < found[name].correct < 12
    numbers = table.find(inner).numbers(3, (epsilon, "Linf"))
    assert found[name].description == f"crafted on {source} (resnet8): {numbers}"
    itself = evaluate(network, data, [name, inner], epsilon=epsilon, seed=2)
    assert torch.equal(itself[name].verdicts, itself[inner].verdicts)


def test_the_other_network_s_classes_are_compared_by_name(
    tmp_path: Path, source: Path, student: nn.Module
) -> None:
    data = split(student)
    names = [f"transfer:{source}", f"transfer:{permuted(source, tmp_path / 'b.pt', [2, 0, 1])}"]
    same, other = evaluate(student, data, names, epsilon=EPSILON).values()
    assert same.correct < 12
    assert torch.equal(same.verdicts, other.verdicts)
    with pytest.raises(ValueError, match=r"a.pt: its 3 classes are not the 3 of the data: it has 'circle'"):
        evaluate(student, split(student, ("a", "b", "c")), names)
    with pytest.raises(ValueError, match=r"a.pt: the checkpoint's head has 3 classes, the data set has 10"):
        evaluate(network(), labelled(network()), names)


def test_the_other_network_is_a_part_of_what_is_noted(tmp_path: Path, student: nn.Module) -> None:
    first, second = (write_checkpoint(tmp_path / f"{seed}.pt", seed) for seed in (1, 2))
    task = kinds.Task(student, 3, (0.2, "Linf"), 0, CLASSES)
    before = table.find(f"transfer:{first}").parameters(task, 250)
    assert before["crafted_on"]["sha256"] == load_model(first).sha256
    assert {key: before[key] for key in before if key != "crafted_on"} == table.find("pgd20").parameters(task, 250)
    second.replace(first)
    assert table.find(f"transfer:{first}").parameters(task, 250)["crafted_on"] != before["crafted_on"]


def test_another_network_without_gradients_is_told_of(source: Path, student: nn.Module) -> None:
    state = load_model(source).module.state_dict()
    head = {key: value * 1e9 for key, value in state.items() if key.startswith("linear")}
    torch.save({"net": state | head, "classes": CLASSES}, source)
    name = f"transfer:{source}"
    found = evaluate(student, split(student), [name], epsilon=0.2)
    assert (found[name].masked or 0) > 0.1
    assert "kept their class although their gradient was zero" in found[name].warnings[0]
    assert further(found) == []  # it says nothing of the network that is judged


# ---------------------------------------------------------------- functions


def shifted(model: nn.Module, x: Tensor, y: Tensor, *, epsilon: float) -> Tensor:
    return (x + epsilon * (x.roll(1, dims=3) - 0.5).sign()).clamp(0, 1)


def test_a_function_is_judged_as_every_attack_is() -> None:
    model = network()
    images, labels = labelled(model)
    found = evaluate(model, (images, labels), [shifted, ("b", shifted), "natural"], epsilon=0.1, batch_size=5)
    assert list(found) == ["shifted", "b", "natural"]
    x = floats(images, torch.float64)
    expected = right(model, shifted(model, x, labels, epsilon=0.1), labels)
    assert 0 < expected.sum() < 20
    for name in ("shifted", "b"):
        assert torch.equal(found[name].verdicts, expected)
    place = f"{__name__}.shifted"
    assert found["b"].description == f"L-inf, epsilon 25.5/255, {place}, 24 images, batch 5, seed 0"
    assert evaluate(model, (images, labels), {"c": shifted}, epsilon=0.1)["c"].correct == expected.sum()


def test_a_function_has_gradients_and_gets_what_it_names() -> None:
    model = network()
    images, labels = labelled(model)
    seen: list[dict[str, Any]] = []

    def mine(model: nn.Module, x: Tensor, y: Tensor, sample: Tensor, **others: Any) -> Tensor:
        x.requires_grad_()
        assert not model.training
        assert not any(parameter.requires_grad for parameter in model.parameters())
        (gradient,) = torch.autograd.grad(F.cross_entropy(model(x), y, reduction="sum"), x)
        seen.append({"sample": sample.tolist(), **others})
        return (x + 3 / 255 * gradient.sign()).clamp(0, 1)

    def every(model: nn.Module, x: Tensor, y: Tensor, threat_model: str, seed: int, epsilon: float) -> Tensor:
        seen.append({"threat_model": threat_model, "seed": seed, "epsilon": epsilon})
        return x

    keys: dict[str, Any] = {"epsilon": 3 / 255, "batch_size": 10, "seed": 9}
    found = evaluate(model, (images, labels), [mine, ("e", every)], **keys)
    assert seen[:3] == [{"sample": [*range(*part)]} for part in ((0, 10), (10, 20), (20, 24))]
    assert seen[3:] == [{"threat_model": "Linf", "seed": 9, "epsilon": 3 / 255}] * 3
    assert found["mine"].correct == evaluate(model, (images, labels), ["fgsm"], **keys)["fgsm"].correct
    assert found["mine"].zero_gradients == 0


def test_random_numbers_of_a_function_depend_on_the_seed_alone() -> None:
    model = network()
    data = labelled(model)
    drawn: list[Tensor] = []

    def noisy(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        drawn.append(torch.rand(3))
        return x

    before = footprint(model)
    for seed in (0, 0, 1):
        torch.rand(7)
        evaluate(model, data, [noisy], seed=seed, batch_size=12)
    first, again, other = drawn[:2], drawn[2:4], drawn[4:]
    assert all(torch.equal(one, two) for one, two in zip(first, again, strict=True))
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[0], other[0])
    torch.rand(1)
    assert footprint(model)[0] == before[0]


def cheat(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return x.add_(0.5).clamp_(0, 1)  # the image itself, too


def train_mode(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    model.train()
    with torch.no_grad():
        model(x)
    return x


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda model, x, y: x + 0.2, r"mine: an image lies .* outside the ball or \[0, 1\]"),
        (lambda model, x, y: x - 0.05, r"mine: an image lies .* outside the ball or \[0, 1\]"),
        (lambda model, x, y: x * torch.nan, "mine: the logits of 24 of 24 images are NaN"),
        (cheat, "mine: an image lies .* outside"),
        (lambda model, x, y: x[:1], r"mine: expected \(24, 3, 8, 8\) on cpu from the attack, got \(1, 3, 8, 8\)"),
        (lambda model, x, y: None, "mine: expected .* from the attack, got NoneType"),
        (lambda model, x, y: (x, y), "mine: expected .* from the attack, got tuple"),
        (train_mode, "mine: the attack changed the network's tensors; no result"),
    ],
)
def test_a_function_that_breaks_the_rules_has_no_result(function: Any, message: str) -> None:
    model = network()
    with pytest.raises((RunFailed, FloatingPointError), match=message):
        evaluate(model, labelled(model), {"mine": function}, epsilon=0.1)
    assert model.training


def test_a_function_that_leaves_the_model_in_train_mode_is_judged_in_eval_mode() -> None:
    model = network()
    data = labelled(model)
    result = evaluate(model, data, {"mine": lambda model, x, y: model.train() and x})["mine"]
    assert result.correct == 20


def test_the_code_of_a_function_is_a_part_of_what_is_noted() -> None:
    task = kinds.Task(network(), 10, (0.1, "Linf"))
    table.add("mine", shifted)
    found = table.find("mine").parameters(task, 7)
    assert found == {
        "threat_model": "Linf", "epsilon": 0.1, "batch_size": 7, "function": f"{__name__}.shifted",
        "code": found["code"],
    }  # fmt: skip
    assert len(found["code"]) == 64
    epsilon = 0.5
    (closure,) = table.resolve({"c": lambda model, x, y: x + epsilon})
    assert closure.parameters(task, 7)["code"] is None  # of its file alone: epsilon may be any


# ---------------------------------------------------------------- torch's data sets


class Pairs(Dataset[Any]):
    """Items as given, by a function of the index."""

    def __init__(self, item: Callable[[int], Any], size: int = 24) -> None:
        self.item, self.size = item, size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Any:
        return self.item(index)


def test_a_data_set_of_torch_gives_the_numbers_of_its_tensors() -> None:
    model = network(dtype=torch.float32)
    images, labels = labelled(model)
    x = floats(images)
    keys: dict[str, Any] = {"epsilon": 3 / 255, "batch_size": 7, "limit": 20}

    def verdicts(data: Any) -> list[Any]:
        result: Result = evaluate(model, data, ["pgd10"], **keys)["pgd10"]
        return [result.samples.tolist(), result.verdicts.tolist()]

    expected = verdicts((images, labels))
    for data in (
        TensorDataset(x, labels),
        TensorDataset(images, labels.int()),
        TensorDataset(images.permute(0, 3, 1, 2), labels),
        Pairs(lambda index: [x[index], int(labels[index])]),
        Subset(TensorDataset(x, labels), range(24)),
    ):
        assert verdicts(data) == expected


class Endless(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter(())


IMAGE = torch.zeros(3, 8, 8)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (Endless(), "data: expected a Dataset with a length and items, got Endless"),
        (Pairs(lambda index: (IMAGE, 0), 0), "data: there is nothing to evaluate in 0 images"),
        (Pairs(lambda index: IMAGE), r"data: item 0: expected \(tensor, label\), got Tensor"),
        (Pairs(lambda index: {"image": IMAGE}), r"item 0: expected \(tensor, label\), got dict"),
        (Pairs(lambda index: (IMAGE.numpy(), 0)), r"item 0: expected \(tensor, label\), got \(ndarray, int\)"),
        (Pairs(lambda index: (IMAGE, 0, 1)), r"got \(Tensor, int, int\)"),
        (Pairs(lambda index: (IMAGE, 0.5)), "item 0: expected a whole number as label, got 0.5"),
        (Pairs(lambda index: (IMAGE, torch.zeros(2))), "item 0: expected a whole number as label"),
        (Pairs(lambda index: (IMAGE, 4 - index)), "labels: expected 0 <= label, got -1"),
        (
            Pairs(lambda index: (IMAGE + (index == 3) * 1.5, 0)),
            r"item 3: floats must lie in \[0, 1\], got 1.5..1.5",
        ),
        (Pairs(lambda index: (IMAGE * torch.nan, 0)), r"item 0: floats must lie in \[0, 1\]"),
        (Pairs(lambda index: (IMAGE.int(), 0)), r"item 0: expected an image float .* got torch.int32 \(3, 8, 8\)"),
        (Pairs(lambda index: (IMAGE[0], 0)), r"item 0: expected an image .* got torch.float32 \(8, 8\)"),
        (
            Pairs(lambda index: (torch.zeros(3, 8, 8 + index), 0)),
            r"item 1 is torch.float32 \(3, 8, 9\), and others",
        ),
        (Pairs(lambda index: (torch.zeros(8, 8, 8).byte(), 0)), r"data: in uint8 \(8, 8, 8\) either the first or"),
        (Pairs(lambda index: (torch.zeros(3, 8, 3).byte(), 0)), r"data: in uint8 \(3, 8, 3\) either the first or"),
        (Pairs(lambda index: (IMAGE, 11)), "labels: up to 11, and the model has 10 classes"),
    ],
)
def test_items_that_are_no_labelled_images_are_refused_in_one_line(data: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        evaluate(network(), data, ["natural"])
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------- with masked gradients


def test_a_part_without_gradients_is_told_of() -> None:
    model = Rounding()
    result = evaluate(model, labelled(model, 6), ["apgd-t"])["apgd-t"]
    assert "there are images whose gradient of the DLR loss or of the margin is zero" in result.warnings[0]
    assert json.loads(json.dumps(result.as_dict()))["parts"].keys() == {"natural", "apgd-t"}
