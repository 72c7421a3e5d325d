"""The optimizers by name: the keys that each alone reads, and its usual numbers. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple


class Optimizer(NamedTuple):
    """Facts of a value of `optim.implementation`.

    keys: of the section `optim`, those that not every optimizer has. decays_all: weight decay is usual for norms
    and biases too. defaults: nested keys of a configuration, for what the user does not give. writes_halves: it
    writes copies of weights in half precision, too.
    """

    keys: tuple[str, ...]
    decays_all: bool
    defaults: Mapping[str, Any]
    writes_halves: bool = False


_SGD = Optimizer(("momentum", "nesterov"), decays_all=True, defaults={})

OPTIMIZERS: dict[str, Optimizer] = {
    "torch": _SGD._replace(writes_halves=True),
    "apex": _SGD,
    "adamw": Optimizer(("betas", "eps"), decays_all=False, defaults={"lr": 1e-3, "optim": {"weight_decay": 0.05}}),
}
