"""`engine inspect`: what a file or a folder is, and the command that takes it."""

from __future__ import annotations

import itertools
import json
import shlex
import zipfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from engine.commands.completion import FILE, named
from engine.commands.options import import_option, normalisation_of, normalisation_options, weights_option
from engine.common.files import seeds_in

if TYPE_CHECKING:
    from torch import Tensor

    from engine.models.weights import LoadedModel
    from engine.pipelines.reading.folder import Files, ImageFolder

_MOST_ROWS = 20
_SAMPLED = 100
# Of all that a training notes of its best epoch.
_OF_BEST = ("epoch", "natural_accuracy", "robust_accuracy", "measured_on")
_LARGE = 128  # pixels a side, from which on a network is one for ImageNet


@dataclass(frozen=True)
class Found:
    """A file or a folder, described.

    kind: in words. facts: by name. columns, rows: of a table: a checkpoint's networks, or the classes of data.
    notes: sentences for the user. next: commands that take it.
    """

    kind: str
    facts: Mapping[str, Any]
    columns: tuple[str, ...] = ()
    rows: Sequence[tuple[Any, ...]] = ()
    notes: tuple[str, ...] = ()
    next: tuple[str, ...] = ()


@dataclass(frozen=True)
class Told:
    """Facts that the user tells of a checkpoint, as in `load_model`."""

    model: str | None = None
    weights: str | None = None
    normalize: Any = None
    options: tuple[str, ...] = field(default=())
    """The same as arguments of a command."""

    def load(self, path: Path) -> LoadedModel:
        """The network. Raises ValueError as `load_model` does."""
        from engine.models.weights import load_model

        return load_model(path, model=self.model, weights=self.weights, normalize=self.normalize)


@click.command("inspect")
@click.argument("path", type=FILE)
@click.option("--model", type=named("model"), help="Architecture, where a checkpoint does not tell.")
@weights_option
@normalisation_options
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("--save-safetensors", type=FILE, metavar="FILE", help="Write a checkpoint's network as safetensors.")
@import_option
def inspect(path: str, as_json: bool, save_safetensors: str | None, **options: Any) -> None:
    """Tell what a checkpoint, exported network, run, group of seeds, folder, zip or .beton file, or .npz file is.

    Nothing in it is run.
    """
    from engine.common import standard_streams
    from engine.common.console import ConsoleReporter

    given = {name.replace("_", "-"): value for name, value in options.items() if value is not None}
    given["weights-key"] = given.pop("weights", None)
    arguments = [part for name, value in given.items() if value is not None for part in (f"--{name}", value)]
    told = Told(normalize=normalisation_of(options), options=tuple(arguments), **options)
    found = look(Path(path), told)
    reporter = ConsoleReporter()
    if as_json:
        reporter.verbatim(json.dumps({"path": path} | asdict(found), indent=2))
    else:
        _show(reporter, path, found)
    if save_safetensors is not None:
        save(Path(path), told, Path(save_safetensors))
        if not as_json:
            reporter.message(f"Written: {save_safetensors}")
    standard_streams.check_stdout()


def look(path: Path, told: Told) -> Found:
    """Describe what is at a path. Raises ValueError, one line, where it is nothing that the engine reads."""
    try:
        return _look(path, told)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror or error}") from None


def _look(path: Path, told: Told) -> Found:
    from engine.deployment import opening
    from engine.pipelines.reading.beton import is_beton

    if not path.exists():
        raise ValueError(f"{path} does not exist")
    if path.is_dir() and (path / "config.yaml").is_file():
        return _run(path, told)
    if group := seeds_in(path):
        return _group(path, group)
    if is_beton(path):
        return _beton(path)
    if path.is_dir():
        return _folder(path)
    names = _names_in_zip(path)
    if names and all(name.endswith(".npy") for name in names):
        return _npz(path)
    if (exported := opening.format_of(path)) is not None:
        return _exported(path, exported)
    if names and not any(name.endswith("data.pkl") for name in names) and _has_images(names):
        return _folder(path)
    return _checkpoint(path, told)


def _names_in_zip(path: Path) -> list[str]:
    from engine.common.files import regular_file

    try:
        with zipfile.ZipFile(regular_file(path)) as file:
            return [name for name in file.namelist() if not name.endswith("/")]
    except Exception:  # a damaged archive may raise anything in zipfile
        return []


def _has_images(names: Iterable[str]) -> bool:
    from engine.pipelines.reading.decoding import is_named_as_image

    return any(is_named_as_image(name) or name.lower().endswith(".zip") for name in names)


def save(path: Path, told: Told, out: Path) -> None:
    """Write the network of a checkpoint, or of a run's best one, as safetensors. Raises ValueError, RunFailed."""
    from engine.common.files import checkpoint_of
    from engine.common.stopping import RunFailed
    from engine.models.weights import save_safetensors

    if out.exists():
        raise ValueError(f"--save-safetensors: {out} exists")
    try:
        save_safetensors(told.load(checkpoint_of(str(path))), out)
    except OSError as error:
        raise RunFailed(f"{out} was not written: {error.strerror or error}") from None


def _checkpoint(path: Path, told: Told) -> Found:
    """A checkpoint: its networks, and all of the one that is taken."""
    from engine.common.tensor_files import read_tensors
    from engine.models import matching, state_dicts

    content = read_tensors(path)
    facts: dict[str, Any] = {"bytes": path.stat().st_size, "sha256": content.sha256}
    if content.metadata:
        facts["metadata"] = ", ".join(sorted(content.metadata))
    rows: list[tuple[Any, ...]] = []
    following: tuple[str, ...] = ()
    if isinstance(content.value, Mapping | list | tuple):
        places = state_dicts.find(content.value)
        networks = matching.networks(places, told.model)
        rows = [_row(network) for network in networks]
        if not networks:
            rows = [
                (place, "", "no known architecture", None, *_counts(state))
                for place, state in itertools.islice(places.items(), _MOST_ROWS)
            ]
    try:
        loaded = told.load(path)
        facts |= _facts(loaded)
        notes = list(loaded.notes)
        data = () if loaded.dataset else ("--dataset", "DATASET")
        following = (shlex.join(("engine", "eval", str(path), *told.options, *data)),)
    except ValueError as error:
        notes = [content.note] if content.note else []
        notes.append(f"it cannot be used as it is: {str(error).removeprefix(f'{path}: ')}")
    columns = ("state dict", "prefix", "model", "classes", "tensors", "parameters", "numbers")
    return Found(f"checkpoint ({content.kind})", facts, columns, rows, tuple(notes), following)


def _exported(path: Path, name: str) -> Found:
    """An exported file: the facts in it, and whether it runs. Nothing but a network's operations does."""
    import hashlib

    from engine.deployment import opening

    facts: dict[str, Any] = {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    kind = f"exported network ({name})"
    try:
        loaded = opening.load(path)
    except ValueError as error:
        return Found(kind, facts, notes=(f"it cannot be used as it is: {str(error).removeprefix(f'{path}: ')}",))
    assert isinstance(loaded, opening.Artefact)
    facts |= {
        "model": loaded.name,
        "classes": loaded.num_classes,
        "class names": None if loaded.class_names is None else list(loaded.class_names),
        "gradients": loaded.has_gradients,
        "trained on": loaded.dataset,
    }
    if (told := loaded.facts) is not None:
        facts |= {
            "images": "x".join(map(str, told.image_size)),
            "input": told.input,
            "epsilon": told.epsilon,
            "threat model": told.threat_model,
            "quantised": told.quantized,
            "checkpoint": told.checkpoint.path,
            "checkpoint's sha256": told.checkpoint.sha256,
            "written by": ", ".join(f"{key} {text}" for key, text in told.made_by.items()),
        }
    data = () if loaded.dataset else ("--dataset", "DATASET")
    return Found(kind, facts, notes=loaded.notes, next=(shlex.join(("engine", "eval", str(path), *data)),))


def _row(network: Any) -> tuple[Any, ...]:
    """Row of a table for a network in a file."""
    return (network.place, network.match.prefix, network.name, network.num_classes, *_counts(network.tensors()))


def _counts(state: Mapping[str, Tensor]) -> tuple[int, int, str]:
    """Tensors and parameters of a network, and the types of its floats."""
    dtypes = Counter(
        str(tensor.dtype).removeprefix("torch.") for tensor in state.values() if tensor.is_floating_point()
    )
    size = sum(
        tensor.numel()
        for key, tensor in state.items()
        if not key.rpartition(".")[2].startswith(("running", "num_"))
    )
    return len(state), size, ", ".join(dtypes)


def _facts(loaded: LoadedModel) -> dict[str, Any]:
    """Facts of a network that was loaded."""
    from engine.models.weights import weights_sha256

    parameters = list(loaded.module.parameters())
    facts = {
        "taken": loaded.taken,
        "prefix": loaded.prefix,
        "dropped": list(loaded.dropped),
        "model": loaded.name,
        "parameters": sum(parameter.numel() for parameter in parameters),
        "classes": loaded.num_classes,
        "class names": None if loaded.class_names is None else list(loaded.class_names),
        "loaded as": str(parameters[0].dtype).removeprefix("torch."),
        "normalisation": None if loaded.normalize is None else [list(numbers) for numbers in loaded.normalize],
        "weights_sha256": weights_sha256(loaded.module),
        "trained on": loaded.dataset,
    }
    if loaded.config is not None:
        facts["method"] = loaded.config.get("method")
    return facts


def _run(path: Path, told: Told) -> Found:
    """A run directory: how far it is, and its best checkpoint."""
    from engine.runs.run_directory import RunDir

    run, config = RunDir.existing(path)
    summary = run.read_summary()
    facts: dict[str, Any] = {
        "method": config.method,
        "semantics": config.semantics,
        "dataset": config.dataset,
        "data": config.data,
        "model": config.model,
        "epochs": config.epochs,
        "seed": config.seed,
        "finished": summary is not None,
    }
    notes: list[str] = []
    rows: list[tuple[Any, ...]] = []
    columns: tuple[str, ...] = ()
    if run.best.is_file():
        best = _checkpoint(run.best, told)
        facts |= {f"best.pt: {name}": value for name, value in best.facts.items()}
        notes, rows, columns = list(best.notes), list(best.rows), best.columns
    if summary is not None:
        facts |= {f"best: {name}": summary["best"].get(name) for name in _OF_BEST}
    quoted = shlex.quote(str(path))
    following = (
        (f"engine eval {quoted}", f"engine report {quoted}") if summary else (f"engine train --resume {quoted}",)
    )
    return Found("run directory", facts, columns, rows, tuple(notes), following)


def _group(path: Path, runs: Mapping[int, Path]) -> Found:
    """A group of seeds: how far each run is."""
    from engine.runs.run_directory import RunDir

    rows: list[tuple[Any, ...]] = []
    for seed, place in runs.items():
        summary = RunDir(place).read_summary()
        best = {} if summary is None else summary["best"]
        rows.append((seed, summary is not None, *(best.get(name) for name in _OF_BEST)))
    config = RunDir.existing(next(iter(runs.values())))[1]
    unfinished = sum(not finished for _, finished, *_ in rows)
    facts = {name: getattr(config, name) for name in ("method", "semantics", "dataset", "data", "model", "epochs")}
    facts |= {"seeds": len(rows), "unfinished": unfinished}
    quoted = shlex.quote(str(path))
    following = (
        (f"engine train --resume {quoted}",)
        if unfinished
        else (f"engine report {quoted}", f"engine eval {quoted}/seed-*")
    )
    columns = ("seed", "finished", *(f"best: {name}" for name in _OF_BEST))
    return Found("group of seeds", facts, columns, rows, (), following)


def _beton(path: Path) -> Found:
    from engine.commands.data import info

    files = [path] if path.is_file() else sorted(path.glob("*.beton")) or sorted(path.glob("*.ffcv"))
    facts: dict[str, Any] = {}
    rows: list[tuple[Any, ...]] = []
    columns: tuple[str, ...] = ()
    for file in files:
        found = info(file)
        of = "" if file == path else f"{file.name}: "
        for line in found.lines:
            name, _, text = line.partition(": ")
            facts[of + ("content" if name == str(file) else name)] = text
        columns = ("class", "label", *found.parts)
        rows += [(name, label, *counts) for name, label, counts in found.classes]
    return Found(".beton", facts, columns, rows, (), _commands_for(path))


def _folder(path: Path) -> Found:
    """A folder of images, or a zip archive of one."""
    found = _image_folder(path)
    splits = {"test": found.test} if found.train is found.test else {"train": found.train, "test": found.test}
    facts: dict[str, Any] = {"classes": len(found.test.class_names)}
    facts |= {f"{name} images": len(files) for name, files in splits.items()}
    sampled, sizes = _sampled(found.train)
    facts |= sampled
    facts["left out"] = sum(len(files.strays) for files in splits.values())
    rows = [
        (name, label, *(len(files.by_class[name]) for files in splits.values()))
        for label, name in enumerate(found.test.class_names)
    ]
    following = (
        _commands_for(path, sizes)
        if len(splits) == 2
        else (f"engine eval CHECKPOINT --dataset folder --data {shlex.quote(str(path))}",)
    )
    return Found("image folder", facts, ("class", "label", *splits), rows, found.notes, following)


def _image_folder(path: Path) -> ImageFolder:
    from engine.pipelines.reading.folder import Wanted, image_folder

    try:
        return image_folder(path)
    except ValueError as error:
        try:
            return image_folder(path, Wanted(only_test=True))
        except ValueError:
            reason = str(error).removeprefix("data: ").removeprefix(f"{path} ")
            raise ValueError(f"{path}: cannot be taken as a folder of images: {reason}") from None


def _sampled(files: Files) -> tuple[dict[str, Any], Counter[tuple[int, int]]]:
    """Facts of some of the images, and how many are of each width and height."""
    from engine.common.errors import printable
    from engine.pipelines.reading.decoding import open_image

    names = [name for of_class in files.by_class.values() for name in of_class]
    chosen = names[:: max(1, len(names) // _SAMPLED)]
    sizes: Counter[tuple[int, int]] = Counter()
    forms: Counter[str] = Counter()
    bad = []
    for name in chosen:
        try:
            with open_image(files.tree.read(name)) as image:
                sizes[image.size] += 1
                forms[f"{image.format} {image.mode}"] += 1
        except Exception as error:  # Pillow and zipfile raise nearly anything for a damaged file
            bad.append(f"{files.tree.where(name)}: {printable(error):.100}")
    facts: dict[str, Any] = {"looked at": len(chosen)}
    if sizes:
        least, most = min(sizes, key=lambda s: s[0] * s[1]), max(sizes, key=lambda s: s[0] * s[1])
        facts["pixels"] = f"{least[0]}x{least[1]}" + (f" to {most[0]}x{most[1]}" if len(sizes) > 1 else "")
    facts["formats"] = ", ".join(f"{count} {form}" for form, count in forms.most_common())
    if bad:
        facts["unreadable"] = bad[:3] if len(bad) > 3 else bad
    return facts, sizes


def _npz(path: Path) -> Found:
    from engine.pipelines.reading import npz

    found = npz.read(path)
    height, width = found.shape
    facts: dict[str, Any] = {
        "bytes": path.stat().st_size,
        "images": len(found),
        "pixels": f"{width}x{height}",
        "numbers": str(found.array.dtype),
        "labelled": found.labels is not None,
    }
    rows: list[tuple[Any, ...]] = []
    if found.labels is not None:
        counts = found.labels.unique(return_counts=True)
        rows = [(int(label), int(count)) for label, count in zip(*counts, strict=True)]
    return Found("images in an .npz file", facts, ("label", "images"), rows)


def _commands_for(path: Path, sizes: Mapping[tuple[int, int], int] | None = None) -> tuple[str, ...]:
    """The command that trains on such images, of those widths and heights."""
    from engine.pipelines.reading.encoded import usual_size

    sizes = sizes or {}
    side = usual_size([min(size) for size, count in sizes.items() for _ in range(count)])
    options = f" --image-size {side}" if len(sizes) > 1 else ""
    options += " --model resnet18-imagenet" if side >= _LARGE else ""
    return (f"engine train --dataset folder --data {shlex.quote(str(path))}{options}",)


def _show(reporter: Any, path: str, found: Found) -> None:
    """Print what was found."""
    from engine.commands.tables import print_list
    from engine.common.errors import printable

    print_list(
        (printable(path), found.kind),
        [(name, _text(value)) for name, value in found.facts.items() if value not in (None, "", [])],
    )
    if found.rows:
        shown = [tuple(_text(value) for value in row) for row in found.rows[:_MOST_ROWS]]
        print_list(found.columns, shown)
        if len(found.rows) > _MOST_ROWS:
            reporter.message(f"... and {len(found.rows) - _MOST_ROWS:,} more (--json has all)")
    for note in found.notes:
        reporter.message(f"Note: {printable(note)}")
    for command in found.next:
        reporter.message("Next:")
        reporter.command(shlex.split(command))


def _text(value: Any) -> str:
    from engine.common.errors import printable
    from engine.models.class_names import summary

    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list) and all(isinstance(each, str) for each in value):
        return printable(summary(value))
    return "" if value is None else printable(value)
