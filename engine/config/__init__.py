"""The configuration of a run: frozen, typed, validated, and the facts of every key. Imports no torch.

A configuration is always complete. What the user leaves out comes from the table of defaults of the method and
the semantics (`engine.config.semantics`), so no field means "to be decided later"; see `load`.
"""

from __future__ import annotations

from engine.config.keys import GROUPS, Group, Key, collect, own, runtime, shared
from engine.config.loading import (
    as_begun,
    assignments,
    changes,
    check_reading,
    checked,
    differences,
    differing,
    epochs_of,
    explicit,
    load,
    merge,
    nested,
    parse_assignment,
    part,
    read_file,
    validated,
    with_absolute_paths,
)
from engine.config.sections import (
    DEFAULTS,
    KEYS,
    AttackSpec,
    AveragingConfig,
    AwpConfig,
    EvalConfig,
    ForwardsConfig,
    LossConfig,
    OptimConfig,
    RunConfig,
    Section,
    TeacherConfig,
    Tree,
    flat,
)
from engine.config.values import LARGEST_IMAGE

__all__ = [
    "DEFAULTS",
    "GROUPS",
    "KEYS",
    "LARGEST_IMAGE",
    "AttackSpec",
    "AveragingConfig",
    "AwpConfig",
    "EvalConfig",
    "ForwardsConfig",
    "Group",
    "Key",
    "LossConfig",
    "OptimConfig",
    "RunConfig",
    "Section",
    "TeacherConfig",
    "Tree",
    "as_begun",
    "assignments",
    "changes",
    "check_reading",
    "checked",
    "collect",
    "differences",
    "differing",
    "epochs_of",
    "explicit",
    "flat",
    "load",
    "merge",
    "nested",
    "own",
    "parse_assignment",
    "part",
    "read_file",
    "runtime",
    "shared",
    "validated",
    "with_absolute_paths",
]
