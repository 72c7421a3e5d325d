"""Exported files as networks to be attacked, and files from strangers."""

from __future__ import annotations

import contextlib
import io
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from engine.attacks import table
from engine.common.tensor_files import exported_format
from engine.deployment import opening
from engine.deployment.artefacts import archives
from engine.deployment.artefacts.black_box import BlackBox
from engine.evaluation import evaluate_checkpoint, measure
from engine.evaluation.files.artefact_check import ArtefactCheck, Compared
from engine.evaluation.statistics.intervals import wilson
from engine.models.weights import load_model
from engine.pipelines.splits import Split
from tests.conftest import CLASSES, Cli
from tests.deployment.exports import needs_onnx, written
from tests.evaluation.saved import EPSILON, shorten, trained

Rewrite = Callable[[dict[str, bytes]], object]


@pytest.fixture(scope="session")
def checkpoint(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.mktemp("attacked") / "net.pt", tiny_folder)


@pytest.fixture(scope="session")
def exports(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    needs_onnx()
    return written(checkpoint, tmp_path_factory.mktemp("files") / "exports", ("onnx", "pt2", "torchscript"))


FILES = ("model.onnx", "model.pt2", "model.torchscript")


@pytest.mark.parametrize("name", FILES)
def test_the_content_tells_the_format_and_the_metadata_the_rest(
    name: str, checkpoint: Path, exports: Path, tmp_path: Path
) -> None:
    renamed = tmp_path / "file.bin"
    renamed.write_bytes((exports / name).read_bytes())
    loaded, original = opening.load(renamed), load_model(checkpoint)
    assert isinstance(loaded, opening.Artefact)
    assert loaded.exported == name.partition(".")[2]
    assert (loaded.name, loaded.num_classes, loaded.class_names) == ("resnet8", 3, CLASSES)
    assert (loaded.dataset, loaded.config) == ("folder", original.config)
    assert loaded.has_gradients == (name != "model.onnx")
    assert loaded.original() == checkpoint
    assert opening.format_of(checkpoint) is None
    with pytest.raises(ValueError, match="the exported network takes images of 8x8, got 9x8"):
        loaded.module(torch.zeros(1, 3, 9, 8))


def test_a_checkpoint_is_loaded_as_ever(checkpoint: Path) -> None:
    loaded, expected = opening.load(checkpoint, class_names=CLASSES[::-1]), load_model(checkpoint)
    images = torch.rand(3, 3, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(loaded.module(images), expected.module(images).flip(1), rtol=0, atol=1e-6)
    assert loaded.exported == ""


def test_outputs_follow_the_order_of_the_data(exports: Path, checkpoint: Path) -> None:
    order = (CLASSES[2], CLASSES[0], CLASSES[1])
    images = torch.rand(5, 3, 8, 8)
    for name in FILES:
        with torch.no_grad():
            found = opening.load(exports / name, class_names=order).module(images)
            expected = load_model(checkpoint, class_names=order).module(images)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match="gives 3 logits, the data set has 4 classes"):
        opening.load(exports / "model.onnx", num_classes=4)


def results(path: Path) -> dict[str, dict[str, Any]]:
    content = json.loads(path.with_name(path.name + ".eval.json").read_text())
    return {entry["attack"]: entry for entry in content["results"]}


def test_an_evaluation_attacks_the_file_itself(
    checkpoint: Path, exports: Path, tiny_folder: Path, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By default natural, Square and images transferred from the original: numbers of the original's network."""
    shorten(monkeypatch)
    attacks = ["natural", "square", f"transfer:{checkpoint}:pgd20", f"transfer:{checkpoint}:apgd-ce"]
    common = ("--data", str(tiny_folder), "--epsilon", EPSILON, "--device", "cpu")
    path, copy = tmp_path / "model.onnx", tmp_path / "copy.pt"
    path.write_bytes((exports / "model.onnx").read_bytes())
    copy.write_bytes(checkpoint.read_bytes())
    done = cli("eval", str(path), *common)
    assert done.code == 0, done.err
    assert cli("eval", str(copy), *common, "--attacks", ",".join(attacks)).code == 0
    found, expected = results(path), results(copy)
    assert list(found) == attacks
    for attack in found:
        assert found[attack]["correct"] == expected[attack]["correct"]
        assert found[attack]["n"] == 18
    assert found["natural"]["correct"] > found[attacks[2]]["correct"]
    about = found["square"]["exported"]
    assert (about["format"], about["has_gradients"]) == ("onnx", False)
    assert about["facts"]["checkpoint"]["sha256"] == load_model(checkpoint).sha256
    assert "exported" not in expected["natural"]


def test_gradients_of_a_program_are_the_originals(checkpoint: Path, exports: Path, tiny_folder: Path) -> None:
    x, labels = torch.rand(12, 3, 8, 8), torch.arange(12) % 3
    expected = measure.evaluate(load_model(checkpoint).module, (x, labels), ["pgd5"], epsilon=24 / 255)
    for name in ("model.pt2", "model.torchscript"):
        network = opening.load(exports / name).module
        found = measure.evaluate(network, (x, labels), ["pgd5"], epsilon=24 / 255)
        assert torch.equal(found["pgd5"].verdicts, expected["pgd5"].verdicts)
        images = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(network(images)[:, 0].sum(), images)
        images = x.clone().requires_grad_()
        (wanted,) = torch.autograd.grad(load_model(checkpoint).module(images)[:, 0].sum(), images)
        torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-5)


def test_an_attack_that_needs_gradients_is_refused_before_anything_is_measured(
    exports: Path, tiny_folder: Path, tmp_path: Path, cli: Cli
) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes((exports / "model.onnx").read_bytes())
    for attack in ("pgd20", "apgd-ce", "aa", "aa-fast", "cw"):
        done = cli("eval", str(path), "--data", str(tiny_folder), "--attacks", f"natural,{attack}")
        assert done.code == 2
        assert done.err.startswith(
            f"engine: {attack}: needs gradients, and {path} has none; these need none: natural"
        )
        assert "square, transfer:CKPT" in done.err
        assert done.err.count("\n") == 1
    assert not path.with_name("model.onnx.eval.json").exists()
    for name in ("natural", "square", f"transfer:{path}:pgd20"):
        assert not table.find(name).needs_gradients


def test_a_function_that_asks_for_gradients_in_vain_is_told(exports: Path) -> None:
    def by_gradient(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        images = x.requires_grad_()
        return x + torch.autograd.grad(model(images).sum(), images)[0].sign() / 255

    network = opening.load(exports / "model.onnx").module
    with pytest.raises(RuntimeError, match="has no gradients, and an attack asked for them"):
        measure.evaluate(network, (torch.rand(4, 3, 8, 8), torch.tensor([0, 1, 2, 0])), [by_gradient])


def test_usual_attacks(checkpoint: Path, exports: Path, tmp_path: Path) -> None:
    assert evaluate_checkpoint.usual_attacks(checkpoint) == ["natural", "fgsm", "pgd20", "cw"]
    named = [f"transfer:{checkpoint}:{attack}" for attack in ("pgd20", "apgd-ce")]
    assert evaluate_checkpoint.usual_attacks(exports / "model.pt2") == ["natural", "square", *named]
    content = checkpoint.read_bytes()
    try:
        checkpoint.write_bytes(content + b"\0")  # another checkpoint is at its place
        assert evaluate_checkpoint.usual_attacks(exports / "model.pt2") == ["natural", "square"]
    finally:
        checkpoint.write_bytes(content)


@pytest.mark.parametrize("name", FILES)
def test_predictions_are_those_of_the_checkpoint(
    name: str, checkpoint: Path, exports: Path, tiny_folder: Path, cli: Cli
) -> None:
    answers = [
        json.loads(cli("predict", str(path), str(tiny_folder / "test"), "--format", "json").out)["images"]
        for path in (checkpoint, exports / name)
    ]
    told = [[(row["file"], row["class"]) for row in rows] for rows in answers]
    assert told[0] == told[1]
    assert len({name for _, name in told[0]}) > 1
    probabilities = [torch.tensor([row["probability"] for row in rows]) for rows in answers]
    torch.testing.assert_close(*probabilities, rtol=0, atol=1e-4)


def test_a_prediction_under_attack_needs_gradients(exports: Path, tiny_folder: Path, cli: Cli) -> None:
    images = str(tiny_folder / "test")
    outcome = cli("predict", str(exports / "model.onnx"), images, "--attack", "pgd10")
    assert (outcome.code, outcome.err.count("\n")) == (2, 1)
    assert "pgd10: needs gradients" in outcome.err
    outcome = cli("predict", str(exports / "model.pt2"), images, "--attack", "pgd10", "--format", "json")
    assert {type(row["attacked"]["holds"]) for row in json.loads(outcome.out)["images"]} == {bool}


def test_what_the_options_tell_of_a_checkpoint_is_refused(exports: Path) -> None:
    with pytest.raises(ValueError, match="normalize: an exported file tells that itself"):
        opening.load(exports / "model.onnx", normalize="cifar10")


def test_inspect_says_what_it_is(exports: Path, cli: Cli) -> None:
    for name in FILES:
        done = cli("inspect", str(exports / name), "--json")
        assert done.code == 0
        found = json.loads(done.out)
        assert found["kind"] == f"exported network ({name.partition('.')[2]})"
        assert (found["facts"]["model"], found["facts"]["images"]) == ("resnet8", "8x8")
        assert found["facts"]["class names"] == list(CLASSES)
        assert found["next"] == [f"engine eval {exports / name}"]


# ---------------------------------------------------------------- the check under attack


class Rounded(nn.Module):
    """Logits in steps: Square, which climbs by small differences of them, stands still."""

    def __init__(self, network: nn.Module, step: float) -> None:
        super().__init__()
        self.network, self.step = network, step

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        exact: torch.Tensor = self.network(images)
        return torch.round(exact / self.step) * self.step


def check(checkpoint: Path, tiny_folder: Path) -> ArtefactCheck:
    from engine.pipelines import datasets

    found = datasets.load("folder", str(tiny_folder))
    test = found.test
    assert isinstance(test, Split)
    loaded = load_model(checkpoint, class_names=found.class_names)
    return ArtefactCheck(loaded.module, 3, (24 / 255, "Linf"), test, torch.arange(len(test)))


def test_the_check_compares_the_same_images(checkpoint: Path, exports: Path, tiny_folder: Path) -> None:
    """Against accuracies that `evaluate` measures on its own."""
    checking = check(checkpoint, tiny_folder)
    rows = checking.compare(opening.load(exports / "model.onnx").module, 0.01)
    assert all(row.passed and row.original == row.exported for row in rows)
    data = (checking.images.images, checking.images.labels)
    attacks = ["natural", "pgd20", "apgd-ce"]
    measured = measure.evaluate(checking.original, data, attacks, epsilon=24 / 255)  # type: ignore[arg-type]
    assert [row.original for row in rows[:3]] == [result.correct for result in measured.values()]
    assert rows[0].interval() == wilson(rows[0].exported, 18)
    assert rows[3].original <= rows[0].original


def test_a_broken_file_fails_the_check(checkpoint: Path, tiny_folder: Path) -> None:
    checking = check(checkpoint, tiny_folder)
    natural, *_ = rows = checking.compare(Rounded(checking.original, 100.0), 0.01)
    assert not natural.passed  # all logits are 0, and every image is of the first class
    assert natural.exported == 6
    flipped = checking.compare(nn.Sequential(checking.original, nn.Linear(3, 3)), 0.01)
    assert not all(row.passed for row in flipped)
    assert len(rows) == 4
    with pytest.raises(FloatingPointError, match="NaN"):
        checking.compare(nn.Sequential(checking.original, nn.Threshold(1e9, float("nan"))), 0.01)


def test_the_tolerance_of_a_row() -> None:
    rows = [Compared("a", 200, 100, 100 + moved, 0.01, "") for moved in (0, 1, 2, 3, -2, -3)]
    assert [row.passed for row in rows] == [True, True, True, False, True, False]
    assert [Compared("a", 20, 10, found, 0.01, "").passed for found in (9, 11, 8, 12)] == [
        True,
        True,
        False,
        False,
    ]


# ---------------------------------------------------------------- files from strangers


def rewritten(path: Path, out: Path, change: Rewrite) -> Path:
    """An archive of torch with other records, by their names without the archive's folder."""
    with zipfile.ZipFile(path) as archive:
        folder = archive.namelist()[0].partition("/")[0]
        records = {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}
    change(records)
    with zipfile.ZipFile(out, "w") as archive:
        for name, content in records.items():
            archive.writestr(f"{folder}/{name}", content)
    return out


class Evil:
    """Writes a file as it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.mark,))


def pickled(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def edit(name: str, change: Callable[[Any], object]) -> Rewrite:
    def rewrite(records: dict[str, bytes]) -> None:
        content = json.loads(records[name])
        change(content)
        records[name] = json.dumps(content).encode()

    return rewrite


WEIGHTS, PROGRAM = "data/weights/model_weights_config.json", "models/model.json"


def nodes(content: Any) -> Any:
    return content["graph_module"]["graph"]["nodes"]


ATTACKS: dict[str, tuple[Callable[[Path], Rewrite], str]] = {
    "sample inputs": (
        lambda mark: lambda records: records.update({"data/sample_inputs/model.pt": pickled(Evil(mark))}),
        "its sample inputs are no plain tensors",
    ),
    "a pickled weight": (
        lambda mark: edit(WEIGHTS, lambda c: next(iter(c["config"].values())).update(use_pickle=True)),
        "is a pickle, whose code would run",
    ),
    "weights of the older format": (
        lambda mark: lambda records: records.update({"data/weights/model.pt": pickled(Evil(mark))}),
        "holds 'data/weights/model.pt', which no plain exported network does",
    ),
    "a constant that is an object": (
        lambda mark: lambda records: records.update({"data/constants/opaque_obj_0": b"x"}),
        "holds 'data/constants/opaque_obj_0'",
    ),
    "native code": (
        lambda mark: lambda records: records.update({"data/aotinductor/model/x.so": b"x"}),
        "holds 'data/aotinductor/model/x.so'",
    ),
    "a function that is called": (
        lambda mark: edit(PROGRAM, lambda c: nodes(c)[0].update(target="torch.serialization.os.system")),
        "calls 'torch.serialization.os.system'",
    ),
    "a file that is mapped": (
        lambda mark: edit(PROGRAM, lambda c: nodes(c)[0].update(target="torch.ops.aten.from_file.default")),
        "calls 'torch.ops.aten.from_file.default'",
    ),
    "a size that is evaluated": (
        lambda mark: edit(
            PROGRAM,
            lambda c: next(iter(c["graph_module"]["graph"]["tensor_values"].values()))["sizes"].append(
                {"as_expr": {"expr_str": f"__import__('os').mknod('{mark}')", "hint": None}}
            ),
        ),
        "which torch would evaluate",
    ),
    "a name of a size": (
        lambda mark: edit(PROGRAM, lambda c: c["range_constraints"].update({f"open('{mark}', 'w')": {}})),
        "which torch would evaluate",
    ),
    "an input that is an object": (
        lambda mark: edit(
            PROGRAM,
            lambda c: c["graph_module"]["module_call_graph"][0]["signature"].update(
                in_spec=json.dumps([1, {"type": "collections.defaultdict", "context": "[]", "children_spec": []}])
            ),
        ),
        "takes or gives 'collections.defaultdict', which is no tensor",
    ),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_an_exported_program_runs_nothing_else(name: str, exports: Path, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    make, told = ATTACKS[name]
    path = rewritten(exports / "model.pt2", tmp_path / "evil.pt2", make(mark))
    with pytest.raises(ValueError, match="^" + str(path)) as refused:
        opening.load(path)
    assert told in str(refused.value)
    assert "\n" not in str(refused.value)
    assert not mark.exists()


def test_torch_itself_would_have_run_it(exports: Path, tmp_path: Path) -> None:
    """The danger is there, or the check is not needed."""
    mark = tmp_path / "mark"
    path = rewritten(exports / "model.pt2", tmp_path / "evil.pt2", ATTACKS["sample inputs"][0](mark))
    with contextlib.suppress(Exception):  # it fails after the code has run
        torch.export.load(str(path))
    assert mark.exists()


def test_torchscript_opens_no_files(exports: Path, tmp_path: Path) -> None:
    def saving(records: dict[str, bytes]) -> None:
        # Where the process has traced such a network before, its class has a name of its own.
        (name,) = [name for name, code in records.items() if b"    linear = self.linear\n" in code]
        text = records[name].decode()
        records[name] = text.replace(
            "    linear = self.linear\n", '    torch.save(x_BCHW, "/tmp/x")\n    linear = self.linear\n'
        ).encode()
        assert records[name].decode() != text

    path = rewritten(exports / "model.torchscript", tmp_path / "evil.ts", saving)
    with pytest.raises(ValueError, match="its code calls save, which opens files"):
        opening.load(path)

    def calling(records: dict[str, bytes]) -> None:
        records["code/__torch__/x.py"] = b"def f(x):\n  return ops.cuda.launch(x)\n"

    with pytest.raises(ValueError, match="its code calls operations of 'cuda'"):
        opening.load(rewritten(exports / "model.torchscript", tmp_path / "other.ts", calling))


@pytest.mark.parametrize("location", ["/etc/passwd", "../../secret", "beside.bin"])
def test_an_onnx_model_names_no_other_file(location: str, exports: Path, tmp_path: Path) -> None:
    import onnx

    model = onnx.load(str(exports / "model.onnx"))
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=location)
    path = tmp_path / "evil.onnx"
    path.write_bytes(model.SerializeToString())
    with pytest.raises(ValueError, match="its weights lie in another file"):
        opening.load(path)


def test_cut_and_changed_files_are_one_line(exports: Path, tmp_path: Path) -> None:
    for name in FILES:
        data = (exports / name).read_bytes()
        assert exported_format(io.BytesIO(data)) == name.partition(".")[2]
        for number, damaged in enumerate((data[: len(data) // 2], data[:200], data[:-100] + bytes(100))):
            path = tmp_path / f"{number}-{name}"
            path.write_bytes(damaged)
            with pytest.raises(ValueError, match=f"^{path}: ") as refused:
                opening.load(path)
            assert "\n" not in str(refused.value)


def test_metadata_that_lies_is_refused(exports: Path, tmp_path: Path) -> None:
    import onnx

    for key, text, told in (
        ("num_classes", "4", "names 3 classes, and 4 are told"),
        ("engine_format", "2", "its metadata is none of this version"),
        ("epsilon", '"much"', "its metadata is none of this version"),
        ("class_names", '["a", "a", "b"]', "names 3 classes"),
    ):
        model = onnx.load(str(exports / "model.onnx"))
        for entry in model.metadata_props:
            if entry.key == key:
                entry.value = text
        path = tmp_path / f"{key}.onnx"
        path.write_bytes(model.SerializeToString())
        with pytest.raises(ValueError, match=f"^{path}: ") as refused:
            opening.load(path)
        assert told in str(refused.value)


def test_a_file_of_another_program(exports: Path, tmp_path: Path) -> None:
    """Without facts: what it is for is the user's to say."""
    import onnx

    model = onnx.load(str(exports / "model.onnx"))
    del model.metadata_props[:]
    path = tmp_path / "theirs.onnx"
    path.write_bytes(model.SerializeToString())
    loaded = opening.load(path)
    assert isinstance(loaded, opening.Artefact)
    assert isinstance(loaded.module, BlackBox)
    assert (loaded.facts, loaded.class_names, loaded.num_classes, loaded.config) == (None, None, 3, None)
    assert "another program has written it" in loaded.notes[1]
    assert loaded.original() is None


def test_onnx_without_its_packages_is_told_in_one_line(exports: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ValueError, match=r"pip install 'iad-engine\[export\]'"):
        opening.load(exports / "model.onnx")
    assert archives.NO_ONNX.startswith("ONNX needs packages")
