"""AutoAttack of a whole set: details, verdicts of any batches, notes on the disk, networks that hide gradients."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.attacks.auto import standard
from engine.attacks.autoattack import AA_PARTS
from engine.evaluation.measure import Result, evaluate
from engine.evaluation.partial_results import PartialResults
from engine.system.distributed import World
from tests.processes import together

AUTO = ["aa"]
"""The attacks that no network here may deceive."""


def short(monkeypatch: pytest.MonkeyPatch, num_queries: int = 60) -> None:
    monkeypatch.setattr(standard, "STANDARD", standard.STANDARD._replace(square=num_queries))


@pytest.fixture(autouse=True)
def short_square(monkeypatch: pytest.MonkeyPatch) -> None:
    """Square with fewer queries."""
    short(monkeypatch)


def network(classes: int = 5) -> nn.Module:
    torch.manual_seed(2)
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(128, classes)]
    return nn.Sequential(*layers).eval()


def data_of(model: nn.Module, count: int = 40) -> tuple[Tensor, Tensor]:
    """Images and the classes that the network sees, but a wrong one for every fifth."""
    x = torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        logits = model(x)
    labels = logits.argmax(dim=1)
    labels[::5] = (labels[::5] + 1) % logits.shape[1]
    return x, labels


def run(model: nn.Module, data: tuple[Tensor, Tensor], **keys: Any) -> Result:
    return evaluate(model, data, AUTO, **{"epsilon": 0.012, **keys})["aa"]


def without_seconds(result: Result) -> dict[str, Any]:
    numbers = result.as_dict() | {"seconds": 0, "description": ""}
    return numbers | {"details": {part: found | {"seconds": 0} for part, found in numbers["details"].items()}}


class Rounded(nn.Module):
    """A network that notes how convolutions of float32 are computed on a GPU, in its passes and its twin's."""

    seen: ClassVar[dict[bool, set[str]]] = {}

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.original = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), id(self)
        self.rest = nn.Sequential(nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(128, 5))

    def forward(self, images: Tensor) -> Tensor:
        form = torch.backends.cudnn.conv.fp32_precision  # type: ignore[attr-defined]
        if type(images) is Tensor and len(images) > 1:  # neither traced nor looked at for its layers
            self.seen.setdefault(self.original == id(self), set()).add(form)
        logits: Tensor = self.rest(self.norm(self.conv(images)))
        return logits


@pytest.mark.parametrize(("attack", "form"), [("aa", "ieee"), ("aa:tf32", "tf32")])
def test_only_the_search_may_be_in_tf32(attack: str, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = Rounded().eval()
    before = torch.backends.cudnn.conv.fp32_precision  # type: ignore[attr-defined]
    data = data_of(model, 10)
    monkeypatch.setattr(Rounded, "seen", {})
    result = evaluate(model, data, [attack], epsilon=0.012)[attack]
    assert Rounded.seen == {True: {"ieee"}, False: {form}}
    assert torch.backends.cudnn.conv.fp32_precision == before  # type: ignore[attr-defined]
    assert ("searched in TF32 on a GPU" in result.description) == (attack == "aa:tf32")
    assert result.parts.keys() == dict.fromkeys(AA_PARTS).keys()


def test_details_follow_the_images_through_the_parts() -> None:
    model = network()
    result = run(model, data_of(model))
    assert list(result.details) == list(AA_PARTS)
    entering = 40
    for part, found in result.details.items():
        assert found.images == entering
        assert result.parts[part] == found.stood / 40
        assert found.seconds >= 0
        entering = found.stood
    assert 0 < result.correct == entering == int(result.verdicts.sum()) < 32
    natural, ce, targeted, fab, square = result.details.values()
    assert (natural.stood, natural.forward, natural.backward) == (32, 40, 0)
    fell = ce.images - ce.stood
    assert 101 * ce.stood + fell <= ce.forward <= 101 * ce.images
    assert ce.forward - ce.backward == ce.images
    assert 4 * 101 * targeted.stood <= targeted.forward
    assert fab.forward == 2 * fab.backward >= 4 * 200 * fab.stood
    assert square.backward == 0
    assert square.forward >= 61 * square.stood
    assert result.seconds == pytest.approx(sum(found.seconds for found in result.details.values()))


@pytest.mark.parametrize("threat_model", ["Linf", "L2"])
def test_verdicts_depend_on_neither_batch_size_nor_limit(threat_model: str) -> None:
    model = network()
    data = data_of(model, 150)
    keys: dict[str, Any] = {"threat_model": threat_model, "epsilon": {"Linf": 0.012, "L2": 0.12}[threat_model]}
    whole = run(model, data, **keys)
    for size in (64, 100):
        assert without_seconds(run(model, data, batch_size=size, **keys)) == without_seconds(whole)
    limited = run(model, data, limit=60, **keys)
    assert torch.equal(limited.verdicts, whole.verdicts[limited.samples])
    assert 0 < limited.correct < whole.correct


class Asked(nn.Module):
    """Counts the images that it classifies."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.count = inner, 0

    def forward(self, images: Tensor) -> Tensor:
        self.count += len(images)
        logits: Tensor = self.inner(images)
        return logits


def test_notes_are_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An evaluation that ends within Square goes on there: nothing before it is done again."""
    model = Asked(network())
    data = data_of(model)

    def partial() -> PartialResults:
        found = PartialResults(tmp_path, {"aa": "0123456789abcdef"})
        found.hold()
        return found

    def broken(*arguments: Any) -> Any:
        raise RuntimeError("the power fails")

    whole = run(model, data)
    notes = partial()
    with monkeypatch.context() as patch:
        patch.setitem(standard._SEARCHES, "square", broken)
        with pytest.raises(RuntimeError, match="the power fails"):
            run(model, data, partial=notes)
    notes.release(done=False)
    model.count, notes = 0, partial()
    resumed = run(model, data, partial=notes)
    notes.release(done=True)
    assert without_seconds(resumed) == without_seconds(whole)
    # 61 steps of the fewest slots, hits that are verified, the look and the checks.
    assert model.count < 64 * (61 + 40)
    assert not tmp_path.exists() or not list(tmp_path.iterdir())


def evaluated_here(world: World, out: str) -> None:
    with pytest.MonkeyPatch.context() as patched:
        short(patched)
        model = network()
        result = run(model, data_of(model), world=world)
    content = [without_seconds(result), result.verdicts.tolist()]
    Path(out, f"{world.size}-{world.rank}.json").write_text(json.dumps(content))


def test_two_processes_give_the_result_of_one(tmp_path: Path) -> None:
    for size in (1, 2):
        together(size, evaluated_here, str(tmp_path))
    one, *others = (json.loads((tmp_path / name).read_text()) for name in ("1-0.json", "2-0.json", "2-1.json"))
    assert others == [one, one]


# ---------------------------------------------------------------- networks that must not look robust


class Wrapped(nn.Module):
    """A network between two functions."""

    def __init__(self, before: Callable[[Tensor], Tensor], after: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.inner, self.before, self.after = network(), before, after

    def forward(self, images: Tensor) -> Tensor:
        return self.after(self.inner(self.before(images)))


def same(values: Tensor) -> Tensor:
    return values


def with_gradient(logits: Tensor) -> Tensor:
    with torch.enable_grad():
        weight = torch.ones((), requires_grad=True)
        torch.autograd.grad(weight.square(), weight)
    return logits


@pytest.mark.parametrize(
    ("before", "after"),
    [(same, lambda logits: 1e4 * logits), (lambda images: (images * 7).round() / 7, same)],
    ids=["scaled", "quantised"],
)
@pytest.mark.parametrize("name", AUTO)
def test_a_network_that_hides_its_gradients_falls(
    name: str,
    before: Callable[[Tensor], Tensor],
    after: Callable[[Tensor], Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    short(monkeypatch, 1000)
    model = Wrapped(before, after)
    result = evaluate(model, data_of(model), [name], epsilon=0.25)[name]
    assert result.parts["natural"] == 0.8
    assert result.correct <= 2


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        (lambda images: images, lambda logits: F.dropout(logits, 0.3, True), "gets other logits each time"),
        (same, lambda logits: logits.softmax(dim=1), "gives probabilities"),
        (same, with_gradient, "computes gradients as it classifies"),
        (lambda images: (images * 7).round() / 7, same, "gradient of the DLR loss or of the margin is zero"),
        (same, same, None),
    ],
    ids=["random", "softmax", "dynamic", "quantised", "plain"],
)
@pytest.mark.parametrize("name", AUTO)
def test_a_doubtful_network_is_flagged(
    name: str, before: Callable[[Tensor], Tensor], after: Callable[[Tensor], Tensor], words: str | None
) -> None:
    model = Wrapped(before, after)
    # Images that stay: with a ball of nearly nothing even the targeted attack has something to do.
    warnings = evaluate(model, data_of(Wrapped(before, same)), [name], epsilon=1e-4)[name].warnings
    assert any(words in text for text in warnings) if words else not warnings


@pytest.mark.parametrize("name", AUTO)
def test_logits_that_are_not_finite_under_attack_are_no_result(name: str) -> None:
    x, _ = data_of(network())
    known = {float(each) for each in (x * 255).round().div(255).flatten(1).sum(dim=1)}

    class Nan(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = network()

        def forward(self, images: Tensor) -> Tensor:
            fresh = [min(abs(float(each) - old) for old in known) > 1e-3 for each in images.flatten(1).sum(dim=1)]
            logits: Tensor = self.inner(images)
            return logits.masked_fill(torch.tensor(fresh)[:, None], torch.nan)

    x = (x * 255).round() / 255
    with torch.no_grad():
        labels = network()(x).argmax(dim=1)
    with pytest.raises(FloatingPointError, match="NaN or infinite; no result"):
        evaluate(Nan(), (x, labels), [name], epsilon=0.03)
