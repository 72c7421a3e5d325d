"""Pictures of an evaluation: images of the attack, counts of the results, names as they are."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from PIL import Image
from sklearn.metrics import confusion_matrix
from torch import Tensor, nn

from engine.attacks.auto import standard
from engine.attacks.pgd import pgd, presets
from engine.common.console import Reporter
from engine.common.pictures import fitted, png, shortened, style, wrapped
from engine.evaluation import evaluate_checkpoint as evaluation
from engine.evaluation.evaluate_checkpoint import EvaluationConfig
from engine.evaluation.files import epsilons, pictures
from engine.evaluation.files.class_plots import class_bars, confusion, count_confusions
from engine.evaluation.files.image_grid import AttackedImage, Guess, fallen, grid, scale_of
from engine.evaluation.files.kept_images import KeptImages
from engine.evaluation.measure import evaluate
from engine.evaluation.partial_results import PartialResults
from engine.evaluation.reports import path_of, read
from engine.evaluation.results import ClassAccuracy, Result
from engine.evaluation.statistics.intervals import wilson
from engine.system.distributed import World
from tests.conftest import CLASSES, Cli
from tests.evaluation.saved import EPSILON, SHORT, trained
from tests.processes import together

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BALL = {"Linf": 10 / 255, "L2": 0.25}
NAMES = ["a$b$_c", "<b>dog</b> & co.", r"100 % \frac{1}{2}", "m" * 60]


@pytest.fixture(autouse=True)
def drawing(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(standard, "STANDARD", SHORT)
    with style():
        yield


def network() -> nn.Module:
    torch.manual_seed(2)
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(128, 5)]
    return nn.Sequential(*layers).double().eval()


def labelled(model: nn.Module, count: int = 30) -> tuple[Tensor, Tensor]:
    """Images and the classes that the network sees, but a wrong one for every fifth."""
    x = torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    with torch.no_grad():
        labels = model(x).argmax(1)
    labels[::5] = (labels[::5] + 1) % 5
    return x, labels


def pixels_of(axes: Axes) -> Tensor:
    """Values of the picture in axes: an image HWC, or a matrix in which NaN stands for what is not there."""
    shown: Any = axes.images[0].get_array()
    return torch.from_numpy(shown.filled(torch.nan).copy())


def texts(figure: Figure) -> list[str]:
    """All texts of a figure."""
    from matplotlib.text import Text

    return [found.get_text() for found in figure.findobj(Text) if found.get_text()]


def check_texts_fit(figure: Figure) -> None:
    """All that is drawn lies inside the figure."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    box, (width, height) = figure.get_tightbbox(canvas.get_renderer()), figure.get_size_inches()
    assert box.x0 >= -0.01
    assert box.y0 >= -0.01
    assert box.x1 <= width + 0.01
    assert box.y1 <= height + 0.01


# ---------------------------------------------------------------- the measurement


@pytest.mark.parametrize("threat_model", ["Linf", "L2"])
def test_kept_images_are_those_of_the_attack(threat_model: str) -> None:
    model = network()
    x, labels = labelled(model)
    epsilon, chosen = BALL[threat_model], torch.tensor([17, 2, 9])
    expected = pgd(model, x, labels, presets(epsilon, threat_model)["pgd20"], seed=4, counter=zlib.crc32(b"pgd20"))
    with torch.no_grad():
        classes = model(expected).argmax(1)
    result = evaluate(
        model,
        (x, labels),
        ["pgd20"],
        epsilon=epsilon,
        threat_model=threat_model,
        batch_size=7,
        seed=4,
        keeps=chosen,
    )["pgd20"]
    assert result.attacked is not None
    torch.testing.assert_close(result.attacked, expected[chosen], rtol=0, atol=1e-12)
    assert torch.equal(result.predicted, classes)
    assert torch.equal(result.verdicts, classes == labels)
    assert 0 < result.correct < 24
    order = {"Linf": torch.inf, "L2": 2}[threat_model]
    assert (result.attacked - x[chosen]).flatten(1).norm(order, dim=1).max() <= epsilon + 1e-12
    told = result.as_dict()["images"]
    assert (told["samples"], told["predicted"]) == (list(range(30)), classes.tolist())
    assert told["correct"] == "".join(str(int(each)) for each in classes == labels)


def test_kept_images_of_autoattack_are_hits_or_the_images_as_they_are() -> None:
    model = network()
    x, labels = labelled(model)
    with torch.no_grad():
        natural = model(x).argmax(1)
    chosen = torch.arange(30)
    result = evaluate(model, (x, labels), ["aa"], epsilon=BALL["Linf"], keeps=chosen)["aa"]
    assert result.attacked is not None
    assert 0 < result.correct < 24
    with torch.no_grad():
        classes = model(result.attacked).argmax(1)
    assert torch.equal(result.predicted, classes)
    assert torch.equal(classes == labels, result.verdicts)
    as_they_are = (result.attacked == x).flatten(1).all(1)
    assert torch.equal(as_they_are, result.verdicts | (natural != labels))
    assert torch.equal(result.predicted[::5], natural[::5])
    assert (result.attacked - x).abs().max() <= BALL["Linf"]


def test_a_class_that_the_network_does_not_give_again_is_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    model = network()
    x, labels = labelled(model)

    def as_labelled(network: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
        return labels[:1].expand(len(images)), torch.ones(len(images), dtype=torch.bool)

    monkeypatch.setattr("engine.evaluation.whole_set.classified", as_labelled)
    result = evaluate(model, (x, labels), ["apgd-ce"], epsilon=BALL["Linf"])["apgd-ce"]
    fell = ~result.verdicts
    same = labels == labels[0]
    assert (result.predicted[fell & same] == -1).all()
    assert (result.predicted[fell & ~same] == labels[0]).all()
    assert (fell & same).any()
    assert torch.equal(result.predicted[~fell], labels[~fell])
    told = result.as_dict()["images"]["predicted"]
    assert [label is None for label in told] == (fell & same).tolist()


@pytest.mark.parametrize("attack", ["pgd20", "aa"])
def test_kept_images_are_the_same_after_a_stop(attack: str, tmp_path: Path) -> None:
    """Notes without images do not serve for the images that are kept, and serve for all others."""
    model = network()
    data = labelled(model)
    keys: dict[str, Any] = {"epsilon": BALL["Linf"], "batch_size": 6, "keeps": torch.tensor([1, 8, 26])}
    whole = evaluate(model, data, [attack], **keys)[attack]

    def notes(rank: int) -> PartialResults:
        found = PartialResults(tmp_path / "notes", {attack: "0123456789abcdef"}, rank)
        found.hold()
        return found

    class Stopping(Exception):
        pass

    def stop(name: str, done: int, total: int) -> None:
        if done > 0.5 * total:
            raise Stopping

    first = notes(2)
    with pytest.raises(Stopping):
        evaluate(model, data, [attack], partial=first, on_batch=stop, **keys)
    first.release(done=False)
    known = notes(1)  # whose file is read before that of the stopped one
    before = len(known.notes(attack))
    resumed = evaluate(model, data, [attack], partial=known, **keys)[attack]
    if attack == "pgd20":  # five batches, of which three were noted, and two of them have images that are kept
        assert (before, len(known.notes(attack))) == (3, 3 + 2 + 2)
    for name in ("attacked", "predicted", "verdicts"):
        assert torch.equal(getattr(resumed, name), getattr(whole, name)), name
    noted = evaluate(model, data, [attack], partial=notes(0), **keys | {"keeps": None})[attack]
    assert torch.equal(noted.predicted, whole.predicted)
    assert noted.attacked is None


def test_notes_of_another_form_are_left_out(tmp_path: Path) -> None:
    model = network()
    data = labelled(model)
    found = PartialResults(tmp_path / "notes", {"pgd20": "0123456789abcdef", "aa": "0123456789abcdee"})
    found.hold()
    before = {"batch": 0, "survived": "1" * 30, "excess": 0.0, "seconds": 1.0, "entries": 1, "zeros": 0}
    found.add_note("pgd20", before | {"not_finite": 0, "masked": 0, "flags": 0})
    part = {"part": 0, "images": [0, 1], "stood": "00", "forward": [1, 1], "backward": [0, 0]}
    found.add_note("aa", part | {"seconds": 1.0, "flags": 0})
    for attack in ("pgd20", "aa"):
        expected = evaluate(model, data, [attack], epsilon=BALL["Linf"])[attack]
        result = evaluate(model, data, [attack], epsilon=BALL["Linf"], partial=found)[attack]
        assert torch.equal(result.verdicts, expected.verdicts)
        assert torch.equal(result.predicted, expected.predicted)


def measured_here(world: World, out: str) -> None:
    standard.STANDARD = SHORT
    model = network()
    keys: dict[str, Any] = {"epsilon": BALL["Linf"], "batch_size": 7, "keeps": torch.tensor([1, 8, 26])}
    results = evaluate(model, labelled(model), ["pgd20", "aa"], world=world, **keys)
    tensors = {name: (result.attacked, result.predicted) for name, result in results.items()}
    torch.save(tensors, Path(out, f"{world.size}-{world.rank}.pt"))


def test_two_processes_keep_the_images_of_one(tmp_path: Path) -> None:
    measured_here(World(), str(tmp_path))
    together(2, measured_here, str(tmp_path))
    one, *others = (torch.load(tmp_path / name) for name in ("1-0.pt", "2-0.pt", "2-1.pt"))
    for other in others:
        for attack, tensors in one.items():
            assert all(torch.equal(*pair) for pair in zip(tensors, other[attack], strict=True))


def test_only_images_that_are_evaluated_can_be_kept() -> None:
    model = network()
    with pytest.raises(ValueError, match="keeps: only images that are evaluated"):
        evaluate(model, labelled(model), ["natural"], keeps=torch.tensor([30]))
    assert KeptImages(None).gathered(World(), lambda sample: (sample, sample)) is None


# ---------------------------------------------------------------- the chosen images


def test_chosen_images_are_correct_balanced_and_in_every_set() -> None:
    labels = torch.arange(40) % 4
    verdicts = torch.ones(40, dtype=torch.bool)
    verdicts[:8] = False
    natural = Result("natural", 32, 40, "", 0.0, samples=torch.arange(40), verdicts=verdicts)
    small = torch.arange(0, 24)
    chosen = pictures.choose(natural, labels, 8, [torch.arange(40), small])
    assert chosen.tolist() == sorted(chosen.tolist())
    assert labels[chosen].bincount().tolist() == [2, 2, 2, 2]
    assert ((chosen >= 8) & (chosen < 24)).all()
    assert torch.equal(chosen, pictures.choose(natural, labels, 8, [small]))
    assert pictures.choose(natural, labels, 99, [small]).tolist() == list(range(8, 24))
    assert pictures.choose(natural, labels, 8, [torch.arange(8)]).tolist() == []


# ---------------------------------------------------------------- the grid


def attacked(side: int = 8, channels: int = 3, *, fell: bool = True, name: str = "cat") -> AttackedImage:
    x = torch.linspace(0.2, 0.8, channels * side * side).reshape(channels, side, side)
    sign = (torch.arange(channels * side * side) % 3 - 1).reshape(channels, side, side)
    return AttackedImage(x, x + sign * 8 / 255, name, Guess(name, 0.934), Guess("dog", 0.71), fell)


def test_the_grid_shows_the_pixels_of_the_images() -> None:
    images = [attacked(), attacked(fell=False)._replace(after=None), attacked()]
    figure = grid(f"a title\n{fallen(images)}", images)
    assert len(figure.axes) == 9
    for place, image in enumerate(images):
        of_block = figure.axes[3 * place : 3 * place + 3]
        shown = [pixels_of(axes).permute(2, 0, 1) for axes in of_block]
        assert torch.equal(shown[0], image.x_nat)
        assert torch.equal(shown[1], image.x_adv)
        torch.testing.assert_close((shown[2] - 0.5) / 8, image.x_adv - image.x_nat)
        assert all(axes.images[0].get_interpolation() == "nearest" for axes in of_block)
    told = texts(figure)
    assert "a title\nchosen among the correctly classified images; 2 of 3 fell" in told
    assert told.count("(x~ - x) x 8") == 2
    assert (told.count("x: cat, 93.4%"), told.count("x~: dog, 71.0%")) == (3, 2)
    assert told.count("x~: none found") == 1
    assert told.count("cat") == 3
    check_texts_fit(figure)


@pytest.mark.parametrize(
    ("difference", "factor"), [(8 / 255, 8), (28 / 255, 4), (0.5, 1), (0.9, 1), (0.0, 1), (1 / 255, 64)]
)
def test_the_factor_is_the_largest_that_keeps_every_sign(difference: float, factor: int) -> None:
    x = torch.zeros(3, 2, 2)
    found = scale_of([AttackedImage(x, x + difference, "", Guess("", 1), None, fell=False)])
    assert found == factor


def test_grey_images_are_grey_and_photographs_are_made_smaller() -> None:
    grey = pixels_of(grid("", [attacked(28, 1)]).axes[0])
    assert grey.shape == (28, 28, 3)
    assert (grey == grey[..., :1]).all()
    photograph = attacked(400)
    shown = pixels_of(grid("", [photograph]).axes[0]).permute(2, 0, 1)
    assert shown.shape[1] < 400
    torch.testing.assert_close(shown.mean((1, 2)), photograph.x_nat.mean((1, 2)), rtol=0, atol=2e-3)


@pytest.mark.parametrize("side", [8, 128])
def test_names_are_shown_as_they_are_and_fit(side: int) -> None:
    images = [attacked(side, name=name) for name in NAMES]
    figure = grid("\n".join(NAMES[:3]), images)
    check_texts_fit(figure)
    told = texts(figure)
    assert all(name in told for name in NAMES[:3])
    assert "\n".join(NAMES[:3]) in told
    long = next(text for text in told if text.startswith("mmmm") and "\n" not in text)
    assert "…" in long
    for text in figure.texts[1:]:  # the blocks of a row do not meet
        box = text.get_window_extent()
        assert side == 128 or box.x1 <= 500 or box.x0 >= 500
    assert png(figure)[:4] == b"\x89PNG"


# ---------------------------------------------------------------- classes


def test_confusions_are_those_of_another_library_and_rows_sum_to_the_classes() -> None:
    chance = torch.Generator().manual_seed(0)
    for classes in (2, 7, 50):
        labels, predicted = (torch.randint(classes, (200,), generator=chance) for _ in range(2))
        counts = count_confusions(labels, predicted, classes)
        assert counts.tolist() == confusion_matrix(labels, predicted, labels=range(classes)).tolist()
        assert torch.equal(counts.sum(1), labels.bincount(minlength=classes))
    by_hand = count_confusions(torch.tensor([0, 0, 1, 2, 2]), torch.tensor([0, 2, -1, 1, 1]), 3)
    assert by_hand.tolist() == [[1, 0, 1], [0, 0, 0], [0, 2, 0]]


@pytest.mark.parametrize("classes", [1, 4, 12])
def test_a_matrix_of_few_classes_has_its_counts(classes: int) -> None:
    counts = (torch.arange(classes**2).reshape(classes, classes) * 37) % 1250
    counts[-1] = 0  # a class without images
    names = (NAMES * 3)[:classes]
    figure = confusion("title", counts, names)
    axes = figure.axes[0]
    cells = {text.get_position(): int(text.get_text()) for text in axes.texts}
    assert cells == {(col, row): int(counts[row, col]) for row in range(classes) for col in range(classes)}
    shares = pixels_of(axes)
    assert shares[-1].isnan().all()
    if classes > 1:
        torch.testing.assert_close(shares[:-1].sum(1), torch.ones(classes - 1))
    assert [label.get_text() for label in axes.get_yticklabels()] == [fitted(name, 0.8, 8) for name in names]
    assert (axes.get_ylabel(), axes.get_xlabel()) == ("true class", "predicted class")
    check_texts_fit(figure)


def test_a_matrix_of_more_classes_has_no_counts() -> None:
    figure = confusion("title", torch.eye(20).long(), [str(label) for label in range(20)])
    assert not figure.axes[0].texts
    assert figure.axes[0].images


def test_of_200_classes_the_most_frequent_confusions_are_listed() -> None:
    names = [f"{label:03d}" + "m" * 57 for label in range(200)]
    counts = torch.eye(200).long() * 50
    counts[3, 150] = 9
    counts[150, 3] = 4
    for label in range(25):
        counts[label, label + 30] = 2
    figure = confusion("title", counts, names)
    patches: Any = figure.axes[0].patches
    bars = [round(bar.get_width()) for bar in patches]
    assert bars == [9, 4] + [2] * 18
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert labels[0] == f"{fitted(names[3], 1, 8)} → {fitted(names[150], 1, 8)}"
    assert labels[0].startswith("003mm")
    assert texts(figure)[-1].startswith("title\nthe 20 most frequent of 27 confusions (true →")
    check_texts_fit(figure)
    empty = confusion("title", torch.eye(200).long(), names)
    assert not empty.axes[0].patches
    assert any("0 images misclassified" in text for text in texts(empty))
    check_texts_fit(empty)


def test_bars_are_the_accuracies_with_their_intervals() -> None:
    first = {name: ClassAccuracy(count / 20, 20) for name, count in zip(NAMES, (20, 0, 7, 13), strict=True)}
    second = {NAMES[2]: ClassAccuracy(0.25, 8)}  # fewer images, so fewer classes
    figure = class_bars("title", {"Natural": first, "PGD-20": second})
    axes = figure.axes[0]
    natural, attack = axes.containers[1], axes.containers[3]
    assert [bar.get_width() for bar in natural] == [1, 0, 0.35, 0.65]
    assert [bar.get_width() for bar in attack] == [0.25]
    assert round(attack[0].get_y() + attack[0].get_height() / 2) == 2
    lines: Any = axes.collections[0]
    for segment, count in zip(lines.get_segments(), (20, 0, 7, 13), strict=True):
        assert segment[:, 0].tolist() == pytest.approx(wilson(count, 20), abs=1e-9)
    assert [label.get_text() for label in axes.get_yticklabels()][:3] == NAMES[:3]
    assert [label.get_text() for label in axes.get_xticklabels()][-1] == "100%"
    check_texts_fit(figure)


def test_of_200_classes_the_worst_and_the_best_have_bars() -> None:
    order = torch.randperm(200, generator=torch.Generator().manual_seed(0)).tolist()
    attack = {f"class {label}": ClassAccuracy(rank / 400, 400) for rank, label in enumerate(order)}
    natural = {name: ClassAccuracy(1.0, 400) for name in attack}
    figure = class_bars("title", {"Natural": natural, "PGD-20": attack})
    axes = figure.axes[0]
    expected = [f"class {label}" for label in (*order[:10], *order[-10:])]
    assert [label.get_text() for label in axes.get_yticklabels()] == expected
    assert [bar.get_width() for bar in axes.containers[3]] == [
        *(rank / 400 for rank in range(10)),
        *(rank / 400 for rank in range(190, 200)),
    ]
    assert "title\nthe 10 worst and the 10 best of 200 classes under PGD-20" in texts(figure)
    many = class_bars("title", {f"attack {number}": natural for number in range(9)})
    looks = {(bar[0].get_facecolor(), bar[0].get_hatch()) for bar in many.axes[0].containers[1::2]}
    assert len(looks) == 9


def test_long_texts_keep_their_ends() -> None:
    assert shortened("abcdefghij", 10) == "abcdefghij"
    assert shortened("abcdefghijk", 10) == "abcde…hijk"
    assert shortened("a\n b", 5) == "a b"
    assert fitted("ab", 1, 8) == "ab"
    assert 2 * len(fitted("m" * 60, 1, 8)) < len(fitted("i" * 60, 1, 8))
    assert wrapped("aa bb\ncc", 2) == "aa\nbb\ncc"


# ---------------------------------------------------------------- a whole evaluation


@pytest.fixture(scope="module")
def checkpoint(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.mktemp("network") / "at.pt", tiny_folder)


def nothing(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """An attack under which nothing falls."""
    return x


def test_an_evaluation_writes_its_pictures_beside_the_report(
    checkpoint: Path, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: dict[str, list[AttackedImage]] = {}

    def spy(shown: pictures.Shown, result: Result, sample: Tensor) -> list[AttackedImage]:
        drawn[result.attack] = found(shown, result, sample)
        return drawn[result.attack]

    found = pictures.attacked_images
    monkeypatch.setattr(pictures, "attacked_images", spy)
    keys: dict[str, Any] = {"data": str(tiny_folder), "epsilon": EPSILON, "device": "cpu", "batch_size": 5}
    config = EvaluationConfig(["fgsm", nothing, "square"], pictures=7, limit_aa=9, **keys)
    report = tmp_path / "best.pt.eval.json"
    evaluation.run(checkpoint, config, Reporter(), out=report)
    entries = {entry["attack"]: entry for entry in read(report)}
    assert list(entries) == ["fgsm", "nothing", "square"]  # natural decided the choice, and was not asked for
    folder = tmp_path / "best.pt.eval.pictures"
    names = sorted(path.name.rpartition("-")[0] for path in folder.iterdir())
    of_attacks = [f"{attack}-{kind}" for attack in entries for kind in ("confusion", "images")]
    assert names == sorted(["classes", *of_attacks])
    for path in folder.iterdir():
        with Image.open(path) as picture:
            assert picture.size[0] == 1000
    opened = evaluation.opened(checkpoint, config, [])
    data: Any = opened.images.test
    model = opened.loaded.module.eval()
    for attack, images in drawn.items():
        told = entries[attack]["images"]
        assert 0 < len(images) <= 7
        assert told["correct"].count("1") == entries[attack]["correct"]
        x_nat, x_adv = (torch.stack([getattr(each, name) for each in images]) for name in ("x_nat", "x_adv"))
        with torch.no_grad():
            before, after = model(x_nat).softmax(1), model(x_adv).softmax(1)
        assert (x_nat - x_adv).abs().max() <= 24 / 255 + 1e-6
        assert (attack == "nothing") == torch.equal(x_nat, x_adv)
        for row, image in enumerate(images):
            assert any(torch.equal((image.x_nat * 255).round().byte().permute(1, 2, 0), x) for x in data.images)
            assert (image.true_name, image.before.name) == (CLASSES[int(before[row].argmax())],) * 2
            assert image.before.probability == pytest.approx(float(before[row].max()), abs=1e-4)
            if image.after is not None:
                assert image.after.name == CLASSES[int(after[row].argmax())]
                assert image.after.probability == pytest.approx(float(after[row].max()), abs=1e-4)
            assert image.fell == (CLASSES[int(after[row].argmax())] != image.true_name)
        assert fallen(images).endswith(f"{sum(each.fell for each in images)} of {len(images)} fell")
    assert not any(image.fell for image in drawn["nothing"])
    assert any(image.fell for image in drawn["fgsm"])
    assert len({tuple(image.true_name for image in images) for images in drawn.values()}) == 1


def test_pictures_of_other_parameters_stay(cli: Cli, checkpoint: Path, tiny_folder: Path, tmp_path: Path) -> None:
    def files(*more: str) -> dict[str, int]:
        arguments = ["--attacks", "natural,fgsm", "--data", str(tiny_folder), "--out", str(tmp_path)]
        done = cli("eval", str(checkpoint), *arguments, "--device", "cpu", *more)
        assert done.code == 0, done.err
        found = pictures.folder_of(path_of(checkpoint, tmp_path))
        return {path.name: path.stat().st_mtime_ns for path in found.iterdir()} if found.exists() else {}

    assert files() == {}
    first = files("--pictures", "3")
    assert len(first) == 4
    again = files("--pictures", "5")
    assert again.keys() == first.keys()
    assert all(again[name] > first[name] for name in first)
    radii = files("--pictures", "3", "--epsilon", "60/255,200/255")
    assert {name: radii[name] for name in again if "natural" not in name} == {
        name: time for name, time in again.items() if "natural" not in name
    }
    # natural, by itself and as it was; of each radius the grid, the confusions and the classes
    assert len(radii) == len(first) + 2 * 3
    assert epsilons.picture_of(path_of(checkpoint, tmp_path)).exists()


@pytest.mark.parametrize("count", ["101", "-1"])
def test_other_numbers_of_pictures_are_refused(count: str, cli: Cli, checkpoint: Path, tmp_path: Path) -> None:
    done = cli("eval", str(checkpoint), "--pictures", count, "--out", str(tmp_path / "out"))
    assert (done.code, "--pictures" in done.err) == (2, True)
    assert not (tmp_path / "out").exists()


def test_pictures_need_a_report(checkpoint: Path) -> None:
    with pytest.raises(ValueError, match="--pictures: needs a report"):
        evaluation.run(checkpoint, EvaluationConfig(["natural"], pictures=3), Reporter())


def test_without_a_correct_image_there_is_no_grid(
    checkpoint: Path, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pictures, "choose", lambda *given: torch.empty(0, dtype=torch.int64))
    said: list[str] = []
    reporter = Reporter()
    monkeypatch.setattr(reporter, "message", said.append)
    config = EvaluationConfig(["natural", "fgsm"], pictures=3, data=str(tiny_folder), device="cpu")
    evaluation.run(checkpoint, config, reporter, out=tmp_path / "x.eval.json")
    names = sorted(path.name.rpartition("-")[0] for path in (tmp_path / "x.eval.pictures").iterdir())
    assert names == ["classes", "fgsm-confusion", "natural-confusion"]
    assert any("no image is classified correctly" in line for line in said)


def test_pictures_that_cannot_be_written_are_one_line(
    cli: Cli, checkpoint: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    report = path_of(checkpoint, tmp_path)
    folder = pictures.folder_of(report)
    folder.write_text("a file")
    arguments = ["--attacks", "natural", "--data", str(tiny_folder), "--device", "cpu", "--out", str(tmp_path)]
    done = cli("eval", str(checkpoint), *arguments, "--pictures", "1")
    assert done.code not in (0, 2)
    assert f"{folder}: cannot be written: File exists; the report is complete" in done.err
    assert [entry["attack"] for entry in read(report)] == ["natural"]
    assert folder.read_text() == "a file"
