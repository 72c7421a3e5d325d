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
from engine.system.precision import AMP_DTYPES, is_fast


def write(
    session: Session,
    dataset: AnyDataset,
    teachers: Mapping[str, Teacher],
    *,
    step: int,
    pipeline: str,
    init_sha256: str | None = None,
    init_weights: str | None = None,
) -> None:
    """Write provenance.json for this session of the run; those before a resume are kept under earlier_sessions.

    And test_split.json, where the data set came without test images. init_weights: a library's name of the first
    weights, where this session took them from it.
    """
    config, run = session.config, session.run
    earlier, fast = run.sessions(), is_fast(config, session.precision.device)
    current = environment.session(session.precision) | {
        "from_step": step,
        "pipeline": pipeline,
        "cudnn": {"deterministic": not fast, "benchmark": fast},
        "processes": session.world.size,
        "seeds": {"run": config.seed},
        "data": {"name": config.dataset, "source": dataset.source, "sha256": dataset.sha256},
        "teachers": {
            section: {"model": teacher.name, "source": teacher.source, "sha256": teacher.sha256}
            for section, teacher in teachers.items()
        },
    }
    if dataset.extra is not None:
        current["data"] |= {
            "extra": {"source": config.extra_data, "images": len(dataset.extra), "labels": config.extra_labels}
        }
    if (plugins := imports.record(config)) and any(plugins.values()):
        current["plugins"] = plugins
    if init_sha256 is not None:
        before = earlier[-1].get("init", {}) if earlier else {}
        named = init_weights or before.get("weights")
        of_library = {} if named is None else {"weights": named}
        current["init"] = {"source": config.init, "sha256": init_sha256} | of_library
    if dataset.held_out is not None:
        dataset.held_out.write(run.test_split)
    write_json(run.provenance, current | {"earlier_sessions": earlier})


def amp_dtype(run: RunDir) -> str | None:
    """Format of the passes of a run, or of a teacher in training for it, by provenance.json; None: nothing yet."""
    for place in (run, RunDir(run.path / "teacher"), RunDir(run.path / "teacher_st")):
        if sessions := place.sessions():
            named = str(sessions[-1]["precision"]["training"]).rpartition(" ")[2]
            return named if named in AMP_DTYPES else None
    return None
