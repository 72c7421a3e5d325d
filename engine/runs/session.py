"""Session of a run: what everything that trains it shares."""

from __future__ import annotations

from dataclasses import dataclass, field

from engine.common.console import Reporter
from engine.common.stopping import Stop
from engine.config import RunConfig
from engine.plugins.objects import Objects
from engine.runs.run_directory import RunDir
from engine.system.distributed import World
from engine.system.precision import Precision


@dataclass(frozen=True, eq=False)
class Session:
    """Context of a run from its begin, or from where it goes on, to its end.

    config: complete, as the run goes on with it. world: the processes that train together, all with a session of
    their own. console: is told of the progress. stop: is set by a signal. run: the run's directory. objects: of a
    Python program, in place of names. student: the configuration that is trained next, where this run is of a
    teacher of it.
    """

    config: RunConfig
    precision: Precision
    world: World
    console: Reporter
    stop: Stop
    run: RunDir
    objects: Objects = field(default_factory=Objects)
    student: RunConfig | None = None
