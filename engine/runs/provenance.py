"""provenance.json of a run: versions, hardware, data, teachers and plugins of each of its sessions."""

from __future__ import annotations

from collections.abc import Mapping

from engine.common.files import write_json
from engine.pipelines.datasets import AnyDataset
from engine.plugins import imports
from engine.runs.run_directory import RunDir
from engine.runs.session import Session
from engine.runs.teachers import Teacher
from engine.system import environment
from engine.system.precision import AMP_DTYPES


def write(
    session: Session,
    dataset: AnyDataset,
    teachers: Mapping[str, Teacher],
    *,
    step: int,
    pipeline: str,
    init_sha256: str | None = None,
) -> None:
    """Write provenance.json for this session of the run; those before a resume are kept under earlier_sessions."""
    config, run = session.config, session.run
    current = environment.session(session.precision) | {
        "from_step": step,
        "pipeline": pipeline,
        "processes": session.world.size,
        "seeds": {"run": config.seed},
        "data": {"name": config.dataset, "source": dataset.source, "sha256": dataset.sha256},
        "teachers": {
            section: {"model": teacher.name, "source": teacher.source, "sha256": teacher.sha256}
            for section, teacher in teachers.items()
        },
    }
    if (plugins := imports.record(config)) and any(plugins.values()):
        current["plugins"] = plugins
    if init_sha256 is not None:
        current["init"] = {"source": config.init, "sha256": init_sha256}
    write_json(run.provenance, current | {"earlier_sessions": run.sessions()})


def amp_dtype(run: RunDir) -> str | None:
    """Format of the passes of a run, or of a teacher in training for it, by provenance.json; None: nothing yet."""
    for place in (run, RunDir(run.path / "teacher"), RunDir(run.path / "teacher_st")):
        if sessions := place.sessions():
            named = str(sessions[-1]["precision"]["training"]).rpartition(" ")[2]
            return named if named in AMP_DTYPES else None
    return None
