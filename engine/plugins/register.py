"""Registration of users' own methods, models, data sets, attacks and loggers.

```python
from engine import register

register.method("mine", terms={"ce_nat": 0.5, "kl_at_nat": 0.5}, summary="half of each")
```

A name may be used wherever a built-in one may; see docs/extending.md.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from engine import methods, models, objectives
from engine.attacks import table
from engine.attacks.kinds import AttackFunction
from engine.attacks.pgd import NORMS
from engine.config import LossConfig, RunConfig, checked, merge, semantics
from engine.methods import Cells, Row, Rule, Weight
from engine.models.architecture import Architecture
from engine.models.normalize import CONSTANTS, RGB, normalisation
from engine.pipelines.datasets import DATASETS, Entry
from engine.plugins import loggers, own_data
from engine.plugins.guests import named
from engine.plugins.origins import REGISTERED, claim

Loss = Callable[[dict[str, Tensor], Tensor], Tensor]
"""Logits by name, (B, C), and labels, (B,), to the loss of each sample, (B,)."""

Terms = Callable[[LossConfig], Mapping[str, float | tuple[float, float] | Weight]]
"""Hyper-parameters to weights of terms."""

_IMAGES = {
    view: formula.replace("x~", "x_adv").replace("x-", "x_mirrored") for view, formula in objectives.VIEWS.items()
}
_READS = {(logits.network, _IMAGES[logits.view]): name for name, logits in objectives.LOGITS.items()}
"""Names of logits by network and images, as ("student", "x_adv")."""


# many parameters: a public function, in which each keyword is one fact of a row.
def method(
    name: str,
    *,
    terms: Mapping[str, Any] | Terms | None = None,
    official: Mapping[str, Any] | Terms | None = None,
    loss: Loss | None = None,
    reads: Iterable[str | tuple[str, str]] = (),
    attack: Mapping[str, Any] | None = None,
    base: str | None = None,
    defaults: Mapping[str, Any] | None = None,
    summary: str = "",
    source: str = "",
) -> None:
    """Register a method by its weights of terms, or by a function that is its loss.

    terms: weights by name in `engine.objectives.TERMS`: numbers, or (a, b) for a + b alpha; or a function from
    `LossConfig` to them. official: those of semantics "official", where they differ.
    loss: a function of logits and labels. reads: its logits, as "s_adv" or ("student", "x_adv").
    attack: keys of `attack` by default; defaults: any keys, nested. base: the method of its warm-up.
    Raises ValueError, one line, for whatever is no such thing, and for a name that is taken.
    """
    if (terms is None) == (loss is None):
        raise ValueError(f"method {name!r}: give terms or a loss, one of both")
    origin = claim("method", name, methods.METHODS)
    tree = _default_keys(name, attack or {}, defaults or {})
    if loss is None:
        as_published = None if official is None else _rule(name, official)
        row = Row(summary, _rule(name, terms), as_published, base=base, source=source)
    else:
        if base is not None or official is not None:
            raise ValueError(f"method {name!r}: base and official are of terms, and not of a loss")
        _check_callable(f"method {name!r}: loss", loss, 2)
        logits = _logits(name, reads)
        row = Row(summary, lambda p: {}, source=source, function=named(f"method {name!r}", loss), reads=logits)
    before = methods.METHODS.get(name)
    methods.METHODS[name] = row
    try:
        for reading in semantics.NAMES:
            if reading == "paper" or official is not None:
                methods.get(name, semantics=reading, **tree.get("loss", {}))
    except ValueError as error:
        methods.METHODS.pop(name)
        if before is not None:
            methods.METHODS[name] = before
        raise ValueError(f"method {name!r}: {error}") from None
    semantics.set_defaults(name, tree)
    REGISTERED["method", name] = origin


def model(
    name: str, builder: Callable[[int], nn.Module], *, summary: str = "", input_sizes: Sequence[int] = (32,)
) -> None:
    """Register a network. builder: from the number of classes C to a module.

    The module maps images (B, 3, H, W) in [0, 1] to logits (B, C). Its parameters are initialised from torch's
    global generator, which the run seeds. input_sizes: heights and widths that it is meant for.
    Raises ValueError, one line, for whatever is no such thing, and for a name that is taken.
    """
    origin = claim("model", name, models.TABLE if models.find_family(str(name)) is None else (name,))
    _check_callable(f"model {name!r}: builder", builder, 1)
    sizes = tuple(input_sizes)
    if not sizes or not all(type(size) is int and size > 0 for size in sizes):
        raise ValueError(
            f"model {name!r}: input_sizes: whole numbers of pixels are expected, got {input_sizes!r:.100}"
        )
    models.TABLE[name] = architecture(name, builder, summary, sizes, origin.version)
    REGISTERED["model", name] = origin


def architecture(
    name: str, builder: Callable[[int], nn.Module], summary: str, input_sizes: tuple[int, ...], version: str
) -> Architecture:
    """The entry of a user's network. version: differs where the code of the builder does."""
    build = named(f"model {name!r}", builder)

    def network(num_classes: int) -> nn.Module:
        built = build(num_classes)
        if not isinstance(built, nn.Module):
            raise ValueError(f"model {name!r}: its builder gives {type(built).__name__}, and no torch.nn.Module")
        if next(built.parameters(), None) is None:
            raise ValueError(f"model {name!r}: {type(built).__name__} has no parameters to train")
        return built

    return Architecture(summary, network, input_sizes, version)


def dataset(
    name: str,
    loader: Callable[..., Any],
    *,
    class_names: Sequence[str] | None = None,
    flip: bool = True,
    normalize: tuple[RGB, RGB] | None = None,
    summary: str = "",
) -> None:
    """Register a data set.

    loader: gives (train, test), each a torch Dataset or a pair (images, labels) of tensors, see
    `own_data.as_images`; it gets what `data` of the configuration holds where it has a parameter. class_names:
    else those that the training images tell, else numbers. flip: a mirrored image is still of its class.
    normalize: mean and standard deviation of its pixels in [0, 1].
    Raises ValueError, one line, for whatever is no such thing, and for a name that is taken.
    """
    origin = claim("dataset", name, DATASETS)
    _check_callable(f"dataset {name!r}: loader", loader, None)
    if normalize is not None:
        CONSTANTS[name] = normalisation(normalize)
    DATASETS[name] = Entry(
        summary=summary,
        origin=origin.where,
        num_classes=None if class_names is None else len(class_names),
        image_size=None,
        flip=bool(flip),
        find=own_data.finder(name, loader, class_names, origin.where),
    )
    REGISTERED["dataset", name] = origin


def attack(
    name: str,
    function: AttackFunction,
    *,
    title: str | None = None,
    summary: str = "",
    source: str = "",
    least_classes: int = 2,
    threat_models: Iterable[str] = tuple(NORMS),
) -> None:
    """Register an attack for evaluations: f(model, x, y) -> x_adv, with the facts of `engine.attacks.table.add`.

    Raises ValueError, one line, for whatever is no such thing, and for a name that is taken.
    """
    origin = claim("attack", name, table.names())
    table.add(
        name,
        function,
        title=title,
        summary=summary,
        source=source,
        least_classes=least_classes,
        threat_models=threat_models,
    )
    REGISTERED["attack", name] = origin


def logger(name: str, function: Callable[..., object]) -> None:
    """Register a logger: f(row) is called with every row of metrics.jsonl, and f.close(), if any, at the end.

    By keyword f gets `run`, the path of the run directory, where it has such a parameter, and close `status`:
    "finished", "failed" or "killed". A run has those loggers that its key `loggers` names.
    Raises ValueError, one line, for whatever is no such thing, and for a name that is taken.
    """
    origin = claim("logger", name, loggers.known_names())
    _check_callable(f"logger {name!r}", function, 1, "run")
    loggers.LOGGERS[name] = function
    REGISTERED["logger", name] = origin


def _default_keys(name: str, attack: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The nested keys of a method's defaults. Raises ValueError for what is no configuration."""
    for argument, given in (("attack", attack), ("defaults", defaults)):
        if not isinstance(given, Mapping):
            raise ValueError(f"method {name!r}: {argument}: nested keys are expected, got {given!r:.100}")
    tree = merge(defaults, {"attack": attack} if attack else {})
    if refused := sorted({"method", "semantics"} & set(tree)):
        raise ValueError(f"method {name!r}: defaults: {refused[0]} is no default of a method")
    try:
        checked(merge(RunConfig().tree(), tree))
    except ValueError as error:
        raise ValueError(f"method {name!r}: defaults: {error}") from None
    return tree


def _rule(name: str, given: object) -> Rule:
    """The row as a function of the hyper-parameters."""
    if isinstance(given, Mapping):
        cells = {term: _cell(term, cell) for term, cell in given.items()}
        return lambda p: cells
    _check_callable(f"method {name!r}: terms", given, 1)
    assert callable(given)
    rule: Callable[[Any], object] = named(f"method {name!r}", given)

    def checked_rule(p: Any) -> Cells:
        cells = rule(p)
        if not isinstance(cells, Mapping):
            raise ValueError(f"its terms are a function that gives {type(cells).__name__}, and no dict of weights")
        return {term: _cell(term, cell) for term, cell in cells.items()}

    return checked_rule


def _cell(term: str, cell: object) -> float | Weight:
    """A weight. Raises ValueError for what is no number, no pair of two, and no `Weight`."""
    parts = (
        cell[:2] if isinstance(cell, Weight) else tuple(cell) if isinstance(cell, tuple | list) else (cell, 0.0)
    )
    if len(parts) != 2 or not all(type(part) in (int, float) and math.isfinite(part) for part in parts):
        raise ValueError(f"terms: {term}: a number, or (a, b) for a + b alpha, is expected, got {cell!r:.100}")
    return cell if isinstance(cell, Weight) else Weight(*parts)


def _logits(name: str, reads: Iterable[str | tuple[str, str]]) -> tuple[str, ...]:
    """Names of the logits that a loss reads. Raises ValueError for unknown ones, and where no student is read."""
    found = []
    for each in [reads] if isinstance(reads, str) else reads:
        logits = _READS.get(each, each) if isinstance(each, tuple) else each
        if not isinstance(logits, str) or logits not in objectives.LOGITS:
            pairs = ", ".join(f"{known} = ({network}, {view})" for (network, view), known in _READS.items())
            raise ValueError(f"method {name!r}: reads: {each!r} is not known; known: {pairs}")
        found.append(logits)
    if not objectives.of_network(found, objectives.STUDENT):
        raise ValueError(
            f"method {name!r}: reads: a loss reads logits of the student, as s_adv, got {list(reads)!r}"
        )
    return tuple(dict.fromkeys(found))


def _check_callable(argument: str, given: object, positional: int | None, *keywords: str) -> None:
    """Raise ValueError for what is no function of so many arguments. keywords: that it may have, too."""
    if not callable(given):
        raise ValueError(f"{argument}: a function is expected, got {type(given).__name__}")
    if positional is None:
        return
    try:
        signature = inspect.signature(given)
        signature.bind(*[None] * positional, **{key: None for key in keywords if key in signature.parameters})
    except TypeError as error:
        raise ValueError(
            f"{argument}: a function of {positional} argument{'s' * (positional > 1)} is expected: {error}"
        ) from None
    except ValueError:  # a builtin without a signature
        return
