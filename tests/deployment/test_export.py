"""Exported files, each run by its own runtime, give the logits of the network that was exported."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file

from engine.common.stopping import RunFailed
from engine.deployment.artefacts.facts import EXTRA_FILE, facts_of
from engine.deployment.exporting import agreement, formats, plain_source, programs, quantization, writers
from engine.models.weights import load_model
from tests.conftest import CLASSES, Cli
from tests.deployment.exports import SIZE, needs_onnx, subject, untrained, written
from tests.evaluation.saved import EPSILON, trained

NAMES = tuple(formats.FORMATS)


@pytest.fixture(scope="session")
def checkpoint(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.mktemp("exported") / "net.pt", tiny_folder)


@pytest.fixture(scope="session")
def exports(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    needs_onnx()
    return written(checkpoint, tmp_path_factory.mktemp("files") / "exports", NAMES)


def pictures(folder: Path) -> torch.Tensor:
    """The real images of `tiny_folder`, (N, 3, 8, 8) in [0, 1]."""
    files = sorted(folder.glob("test/*/*.png"))
    arrays = [np.asarray(Image.open(file)).copy() for file in files]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float() / 255


def logits_of_onnx(path: Path, images: torch.Tensor) -> torch.Tensor:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {"images": images.numpy()})
    return torch.from_numpy(logits)


def logits_of_pt2(path: Path, images: torch.Tensor) -> torch.Tensor:
    logits: torch.Tensor = torch.export.load(str(path)).module()(images)
    return logits


def logits_of_torchscript(path: Path, images: torch.Tensor) -> torch.Tensor:
    logits: torch.Tensor = torch.jit.load(str(path))(images)
    return logits


def logits_of_safetensors(path: Path, images: torch.Tensor) -> torch.Tensor:
    logits: torch.Tensor = load_model(path).module(images)
    return logits


RUNTIMES = {
    "onnx": logits_of_onnx,
    "pt2": logits_of_pt2,
    "torchscript": logits_of_torchscript,
    "safetensors": logits_of_safetensors,
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("batch", [1, 7])
@pytest.mark.parametrize("name", RUNTIMES)
def test_its_runtime_gives_the_logits_of_the_original(
    name: str, batch: int, checkpoint: Path, exports: Path, tiny_folder: Path
) -> None:
    images = pictures(tiny_folder)[:batch]
    with torch.no_grad():
        expected = load_model(checkpoint).module(images)
        found = RUNTIMES[name](exports / formats.FORMATS[name].main, images)
    assert found.shape == (batch, len(CLASSES))
    most = formats.FORMATS[name].tolerance.logits
    assert most is not None
    assert (found - expected).abs().max() <= most * max(1.0, float(expected.abs().max()))


def test_the_plain_file_runs_where_there_is_no_engine(
    checkpoint: Path, exports: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    images = pictures(tiny_folder)
    save_file({"one": images[:1].contiguous(), "seven": images[:7].contiguous()}, tmp_path / "images.safetensors")
    program = (
        "import sys; sys.modules['engine'] = None  # to import it is an error\n"
        f"sys.path.insert(0, {str(exports)!r})\n"
        "import model; from safetensors.torch import load_file, save_file\n"
        f"given = load_file({str(tmp_path / 'images.safetensors')!r}); network = model.load()\n"
        f"save_file({{k: network(x) for k, x in given.items()}}, {str(tmp_path / 'logits.safetensors')!r})\n"
    )
    done = subprocess.run([sys.executable, "-I", "-B", "-c", program], cwd="/", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    logits = load_file(tmp_path / "logits.safetensors")
    with torch.no_grad():
        network = load_model(checkpoint).module
        torch.testing.assert_close(logits["one"], network(images[:1]), rtol=0, atol=1e-5)
        torch.testing.assert_close(logits["seven"], network(images[:7]), rtol=0, atol=1e-5)


def test_the_plain_file_names_the_class_of_an_image(checkpoint: Path, exports: Path, tiny_folder: Path) -> None:
    file = tiny_folder / "test" / CLASSES[1] / "0000.png"
    done = subprocess.run(
        [sys.executable, "-I", "-B", str(exports / "model.py"), str(file)], cwd="/", capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    pixels = torch.from_numpy(np.asarray(Image.open(file)).copy()).permute(2, 0, 1)[None].float() / 255
    with torch.no_grad():
        shares = load_model(checkpoint).module(pixels).softmax(dim=1)[0]
    label = CLASSES[int(shares.argmax())]
    assert done.stdout.strip() == f"{file}: {label} ({float(shares.max()):.1%})"


def test_no_name_in_a_checkpoint_becomes_code_of_the_plain_file(checkpoint: Path) -> None:
    made = subject(checkpoint)
    evil = '"""\nimport os; os.system("true")\n"""'
    facts = made.facts.model_copy(update={"model": evil, "dataset": evil, "class_names": [evil, "b", "c\\"]})
    source = plain_source.source_of(made.program, facts)
    import ast

    tree = ast.parse(source)
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    assert imported == {"sys", "torch", "torch.nn.functional"}
    names = next(
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "CLASS_NAMES"
    )
    assert names == (evil, "b", "c\\")


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv2", "wrn10-1", "timm:resnet10t"])
def test_other_architectures(name: str, tmp_path: Path) -> None:
    """Random weights and images: the program of each has other operations."""
    if name.startswith("timm:"):
        pytest.importorskip("timm")
    loaded = untrained(name, tmp_path)
    size = (32, 32)
    made = writers.ExportSubject(loaded, size)
    images = programs.example(size, 8)
    usable = ["pt2", "torchscript", "plain"]
    if name == "timm:resnet10t":
        needs_onnx()
        usable.append("onnx")
    for each in usable:
        entry = formats.FORMATS[each]
        writers.write(entry, made, tmp_path)
        found = agreement.compare(entry, tmp_path, loaded.module, images)
        assert not found.faults, (each, found)
        assert found.n == 8
        assert found.same == 8


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_metadata_tells_all_of_the_network(checkpoint: Path, exports: Path) -> None:
    import onnx

    loaded = load_model(checkpoint)
    expected = facts_of(loaded, SIZE)
    assert expected.epsilon == pytest.approx(8 / 255)
    assert expected.threat_model == "Linf"
    assert expected.class_names == list(CLASSES)
    assert expected.checkpoint.sha256 == loaded.sha256
    model = onnx.load(str(exports / "model.onnx"))
    told = {entry.key: json.loads(entry.value) for entry in model.metadata_props}
    assert told == json.loads(expected.model_dump_json())
    text = {EXTRA_FILE: ""}
    torch.export.load(str(exports / "model.pt2"), extra_files=text)
    assert json.loads(text[EXTRA_FILE]) == told
    scripted = {EXTRA_FILE: ""}
    torch.jit.load(str(exports / "model.torchscript"), _extra_files=scripted)
    assert json.loads(scripted[EXTRA_FILE]) == told
    for file in ("model.onnx", "model.pt2", "model.torchscript"):
        content = (exports / file).read_bytes()
        assert b"stack_trace" not in content
        if file != "model.torchscript":  # whose debugging records name torch's own lines
            assert str(Path(__file__).parents[2]).encode() not in content.replace(str(checkpoint).encode(), b"")


def test_logits_that_differ_are_refused() -> None:
    entry = formats.FORMATS["onnx"]
    expected = torch.tensor([[4.0, 0.0], [0.0, 2.0]])
    assert agreement.judged(entry, expected, expected + 3.9e-4).faults == ()
    (fault,) = agreement.judged(entry, expected, expected + 4.1e-4).faults
    assert fault.startswith("its logits differ by 0.0001")
    swapped = agreement.judged(entry, expected, expected.flip(1))
    assert (swapped.same, len(swapped.faults)) == (0, 2)
    assert agreement.judged(entry, expected, expected * float("nan")).faults
    assert agreement.judged(entry, expected, expected[:1]).same == 0


def test_an_export_that_does_not_agree_is_not_kept(
    checkpoint: Path, tiny_folder: Path, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    def other(made: writers.ExportSubject, folder: Path) -> None:
        weights = made.program.state_dict
        weights["network.linear.bias"] = torch.nn.Parameter(weights["network.linear.bias"] + 0.01)
        right(made, folder)

    right = writers.WRITERS["pt2"]
    monkeypatch.setitem(writers.WRITERS, "pt2", other)
    out = tmp_path / "out"
    done = cli("export", str(checkpoint), "--format", "pt2", "--out", str(out), "--image-size", "8")
    assert done.code == 1
    assert "does not agree" in done.err
    assert list(tmp_path.iterdir()) == []


def test_the_command(checkpoint: Path, tiny_folder: Path, tmp_path: Path, cli: Cli) -> None:
    """Real images, all formats, the card; nothing of the exporters is printed."""
    needs_onnx()
    out = tmp_path / "out"
    arguments = ("export", str(checkpoint), "--data", str(tiny_folder), "--epsilon", EPSILON, "--out", str(out))
    done = cli(*arguments, "--format", "onnx,plain", "--check", "18", "--license", "MIT")
    assert done.code == 0, done.err
    assert done.err == ""
    lines = [line for line in done.out.splitlines() if not line.startswith("Note: ")]
    assert lines[0] == "Writing model.onnx"
    assert re.fullmatch(r"Written: .*/out", lines[-1])
    assert len(lines) < 12, lines
    assert sorted(path.name for path in out.iterdir()) == [
        "README.md",
        "model.onnx",
        "model.py",
        "model.safetensors",
    ]
    card = (out / "README.md").read_text()
    head = yaml.safe_load(card.split("---")[1])
    assert (head["license"], head["pipeline_tag"]) == ("MIT", "image-classification")
    check = card.partition("## Check under attack")[2]
    rows = [line.split(" | ") for line in check.splitlines() if line.endswith("| pass |")]
    assert [row[0].removeprefix("| ").partition(",")[0] for row in rows] == [
        "natural",
        "PGD-20 crafted on the original",
        "APGD-CE crafted on the original",
        "Square",
    ]
    assert all(row[2] == row[3] for row in rows)
    assert "L-inf, epsilon 24/255" in check
    again = cli(*arguments)
    assert (again.code, again.err) == (2, f"engine: --out: {out} exists\n")


def test_a_place_of_its_own_and_no_data(checkpoint: Path, tmp_path: Path, cli: Cli) -> None:
    path = tmp_path / "net.pt"
    path.write_bytes(checkpoint.read_bytes())
    for folder in ("net-export", "net-export-2"):
        done = cli("export", str(path), "--format", "safetensors", "--image-size", "8")
        assert done.code == 0, done.err
        assert "Note: no test images" in done.out
        card = (tmp_path / folder / "README.md").read_text()
        assert "seeded random images" in card
        assert "Not made: no test images" in card
        assert "Not stated" in card.partition("## Licence")[2]
    done = cli("export", str(path), "--format", "safetensors")
    assert (done.code, done.err) == (
        2,
        f"engine: {path}: --image-size: its images' height and width are not known\n",
    )


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--format", "onx"), "--format: 'onx' is not known; did you mean 'onnx'?"),
        (("--format", ","), "--format: name at least one of onnx, pt2"),
        (("--format", "pt2", "--quantize", "int8"), "--quantize int8: is made of the ONNX model"),
        (("--format", "onnx", "--quantize", "int4"), "--quantize: 'int4' is not known"),
    ],
)
def test_what_cannot_be_written_is_told_in_one_line(
    arguments: tuple[str, ...], told: str, checkpoint: Path, cli: Cli
) -> None:
    done = cli("export", str(checkpoint), *arguments)
    assert done.code == 2
    assert done.err.startswith(f"engine: {told}")
    assert done.err.count("\n") == 1


def test_a_package_that_is_absent_is_told_in_one_line(
    checkpoint: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    done = cli("export", str(checkpoint), "--format", "onnx")
    assert done.code == 2
    assert "--format onnx: onnx is not there: pip install 'iad-engine[export]'" in done.err


def test_eight_bits_that_are_badly_chosen_fail_in_the_card(
    checkpoint: Path, tiny_folder: Path, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ranges of black images clip the activations of all others."""
    needs_onnx()
    arguments = ("export", str(checkpoint), "--data", str(tiny_folder), "--epsilon", EPSILON, "--quantize", "int8")
    right = quantization.quantize

    def black(model: Path, out: Path, facts: Any, images: torch.Tensor) -> str:
        return right(model, out, facts, torch.zeros_like(images) + 0.001)

    monkeypatch.setattr(quantization, "quantize", black)
    done = cli(*arguments, "--check", "9", "--out", str(tmp_path / "bad"))
    assert done.code == 1, done.out
    assert "FAIL: model-int8.onnx" in done.out
    card = (tmp_path / "bad" / "README.md").read_text()
    assert "`model.onnx`: **pass**" in card
    assert "`model-int8.onnx`: **FAIL**" in card


def test_eight_bits(checkpoint: Path, exports: Path, tiny_folder: Path, tmp_path: Path) -> None:
    """Well calibrated they keep the classes, and say what they are."""
    import onnx

    images = pictures(tiny_folder)
    made = subject(checkpoint)
    with torch.no_grad():
        expected = load_model(checkpoint).module(images)
    for given, told in ((images, "static QDQ, 18 images"), (None, "dynamic")):
        out = tmp_path / f"{told[:6]}.onnx"
        scheme = quantization.quantize(exports / "model.onnx", out, made.facts, given)
        assert told in scheme
        found = logits_of_onnx(out, images)
        assert (found.argmax(1) == expected.argmax(1)).float().mean() >= formats.QUANTIZED.tolerance.same_class
        assert not torch.equal(found, expected)
        model = onnx.load(str(out))
        assert json.loads({entry.key: entry.value for entry in model.metadata_props}["quantized"]) == scheme
        assert "QuantizeLinear" in {node.op_type for node in model.graph.node} or given is None


def test_a_source_that_does_not_run_is_a_fault(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "model.py").write_text("import engine\n")
    with pytest.raises(RunFailed, match=r"model.py does not run by itself"):
        agreement.compare(formats.FORMATS["plain"], tmp_path, torch.nn.Identity(), torch.zeros(1, 3, 8, 8))


def test_agreement_on_photographs(real_images: Path, tmp_path: Path) -> None:
    """Images of CIFAR-10, float32 of onnxruntime against torch."""
    from engine.pipelines import datasets

    needs_onnx()
    test = datasets.load("cifar10", str(real_images), limit_train=10, limit_test=40).test
    images = test.images.permute(0, 3, 1, 2).float() / 255
    loaded = untrained("resnet8", tmp_path)
    writers.write(formats.FORMATS["onnx"], writers.ExportSubject(loaded, (32, 32)), tmp_path)
    with torch.no_grad():
        expected = loaded.module(images)
    found = logits_of_onnx(tmp_path / "model.onnx", images)
    assert (found - expected).abs().max() <= 1e-4 * max(1.0, float(expected.abs().max()))
    assert torch.equal(found.argmax(1), expected.argmax(1))
