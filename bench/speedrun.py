"""Train from random weights to a robust accuracy, fast: `python -m bench.speedrun`; see README.md."""

from __future__ import annotations

import itertools
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import click
import torch
from rich import box
from rich.console import Console
from rich.table import Table

from bench.gate import CHECKOUT
from bench.lib import command, machine
from bench.lib.output import csv_rows
from bench.lib.output.csv_rows import TrialRow
from bench.lib.speedrun import records, rules, running, trials
from bench.lib.speedrun.records import DataFacts, SeedFigures, SpeedRecord
from bench.lib.speedrun.rules import SpeedRecipe, Track
from bench.lib.speedrun.running import Race, Say, SeedRun
from bench.lib.speedrun.trials import Trial
from engine import config
from engine.common import host_memory
from engine.common.numbers import percent
from engine.common.stopping import Interrupted, RunFailed
from engine.config import RunConfig
from engine.objectives import STUDENT
from engine.runs import assemble
from engine.runs import seeds as seed_lists
from engine.training import schedule

RECORDS = machine.BENCH / "results" / "speedrun"
WORK = CHECKOUT / "build" / "speedrun"
CHECKS = "check"
"""Folder of runs that check a record: none of them goes on with what another command has trained."""


@dataclass(frozen=True)
class Attempt:
    """A recipe that is run with some seeds on a track. quick: at the sizes of `--quick`."""

    recipe: SpeedRecipe
    track_name: str
    seeds: tuple[int, ...]
    quick: bool
    place: torch.device
    data: str | None = None

    @property
    def track(self) -> Track:
        """The track, of the sizes that are run."""
        track = rules.find_track(self.track_name)
        return track.tiny() if self.quick else track

    def complete(self) -> RunConfig:
        """The configuration. Raises ValueError where it is against the rules, or a warm-up does not fit."""
        complete = self.recipe.on(self.track, str(self.place), self.data)
        misfits = [] if self.quick else list(schedule.misfit_warmups(complete, assemble.method_of(complete)))
        if misfits:
            raise ValueError(f"recipe {self.recipe.name}: {misfits[0]}")
        return complete


# many parameters: the options of the command
@command.command
@click.argument("recipes", nargs=-1)
@click.option("--track", "track_name", default="cpu", show_default=True, help=f"[{', '.join(rules.TRACKS)}]")
@click.option("--seeds", "seed_list", default="0..2", show_default=True, help="As 0..4 or 0,3,5.")
@click.option("--device", help="cpu, cuda or cuda:N. [the track's]")
@click.option("--data", type=click.Path(), help="Where the data set lies.")
@click.option("--quick", is_flag=True, help="Few digits and two epochs: it shows that everything works.")
@click.option("--list", "lists", is_flag=True, help="Print the records of the track, and run nothing.")
@click.option("--check", "checked", type=click.Path(path_type=Path), help="Run the recipe of a record again.")
@click.option("--trials", "tried", type=click.Path(path_type=Path), help="Try the variants of a file; no records.")
@command.out_option("Folder of the tracks' records. [bench/results/speedrun; with --quick build/speedrun/quick]")
def main(
    recipes: Sequence[str],
    track_name: str,
    seed_list: str,
    device: str | None,
    data: str | None,
    quick: bool,
    lists: bool,
    checked: Path | None,
    tried: Path | None,
    out: Path | None,
) -> None:
    """Run RECIPES, names in bench/speedruns or paths of YAML files, and write a record of each."""
    console = command.new_console()
    folder = out or (WORK / "quick" if quick else RECORDS)
    with command.refused():
        if lists + (checked is not None) + (tried is not None) + bool(recipes) != 1:
            known = ", ".join(rules.known_recipes())
            raise ValueError(f"give RECIPES (known: {known}), --list, --check FILE or --trials FILE")
        if lists:
            print_leaderboard(console, folder, track_name)
            return
        if checked is not None:
            before = records.read(checked)
            attempts = [again(before, device, data)]
        else:
            place, seeds = rules.device_of(rules.find_track(track_name), device), seed_lists.parse(seed_list)
            variants = trials.read(tried) if tried is not None else []
            found = [each.recipe for each in variants] or [rules.find_recipe(name) for name in recipes]
            attempts = [Attempt(recipe, track_name, seeds, quick, place, data) for recipe in found]
        for each in attempts:
            each.complete()
    host_memory.keep_freed_memory()
    if checked is not None:
        check(attempts[0], before, console)
    elif tried is not None:
        try_variants(variants, attempts, folder / track_name / f"trials-{tried.stem}.csv", console)
    else:
        for each in attempts:
            measure(each, folder, console)


def again(record: SpeedRecord, device: str | None, data: str | None) -> Attempt:
    """The attempt of a record, to be made again. Raises ValueError for a device of another kind."""
    place = rules.device_of(rules.find_track(record.track), device)
    seeds = tuple(one.seed for one in record.seeds)
    return Attempt(SpeedRecipe(record.recipe, record.keys), record.track, seeds, record.quick, place, data)


def measure(attempt: Attempt, folder: Path, console: Console) -> None:
    """Run a recipe, write its record, and tell of it."""
    race, compile_s, results = run(attempt, WORK / attempt.track_name, console)
    logs = {seed: result.log() for seed, result in results.items()}
    facts = machine.facts(attempt.place)

    def make(files: Mapping[int, tuple[str, str]]) -> SpeedRecord:
        return record_of(attempt, race, facts, compile_s, results, files)

    stem = f"{attempt.recipe.name}-{facts['date'][:10]}"
    path = records.write(folder / attempt.track_name, stem, logs, make)
    _set_aside(race.place)
    for line in told(records.read(path), attempt.track):
        console.print(line)
    console.print(f"written: {path}")


def _set_aside(place: Path) -> None:
    """Give the folder of finished runs another name: the same command measures anew."""
    free = (place.with_name(f"{place.name}-{number}") for number in itertools.count(1))
    place.rename(next(path for path in free if not path.exists()))


def run(attempt: Attempt, root: Path, console: Console) -> tuple[Race, float, dict[int, SeedRun]]:
    """Warm up and run each seed, in a folder below root; seconds of compilation, and results by seed."""
    say = _named(attempt.recipe.name, console)
    with _ended_in_a_line(attempt.recipe.name):
        race = running.prepare(root, attempt.recipe.name, attempt.track, attempt.complete(), say)
        compile_s = running.warm_up(race)
        results = {}
        for seed in attempt.seeds:
            results[seed] = result = running.run_seed(race, seed)
            seconds = sum(cost.seconds for cost in result.costs.values())
            say(f"seed {seed}: {seconds:.1f} s, PGD-20 {percent(result.scores['pgd20'].accuracy)}")
    return race, compile_s, results


def _named(name: str, console: Console) -> Say:
    """Print lines that begin with a recipe's name."""
    return lambda text: console.print(f"{name}: {text}")


@contextmanager
def _ended_in_a_line(name: str) -> Iterator[None]:
    """Context in which a run of a recipe that stops or fails ends the command with one line."""
    try:
        with command.refused():
            yield
    except Interrupted:
        raise click.ClickException("stopped; the same command goes on") from None
    except (RunFailed, FloatingPointError) as error:
        raise click.ClickException(f"{name}: {error}") from None


def record_of(
    attempt: Attempt,
    race: Race,
    facts: machine.Facts,
    compile_s: float,
    results: Mapping[int, SeedRun],
    files: Mapping[int, tuple[str, str]],
) -> SpeedRecord:
    """The record of results by seed. files: name and digest of each seed's log."""
    track = attempt.track
    seeds = [figures_of(seed, result, *files[seed]) for seed, result in results.items()]
    return SpeedRecord(
        rules=rules.RULES_VERSION,
        track=attempt.track_name,
        recipe=attempt.recipe.name,
        quick=attempt.quick,
        facts=dict(facts),  # type: ignore[arg-type]
        data=DataFacts(
            name=track.dataset,
            images="image files" if "image files" in race.dataset.source else "as published",
            sha256=race.dataset.sha256,
        ),
        checked_by=track.checked_by,
        compile_s=compile_s,
        keys=dict(attempt.recipe.keys),
        config=running.placeless(race.complete),
        summary=records.summarise(seeds),
        verdict=records.judge(track, seeds, track.checked_by, quick=attempt.quick, version=rules.RULES_VERSION),
        seeds=seeds,
    )


def figures_of(seed: int, result: SeedRun, log: str, log_sha256: str) -> SeedFigures:
    """The figures of a seed, its teachers' costs among them."""
    student = result.costs[STUDENT]
    teachers = [cost for name, cost in result.costs.items() if name != STUDENT]
    of_teachers = math.fsum(cost.seconds for cost in teachers), math.fsum(cost.flops for cost in teachers)
    return SeedFigures(
        seed=seed,
        seconds=student.seconds + of_teachers[0],
        teacher_seconds=of_teachers[0],
        flops=student.flops + of_teachers[1],
        teacher_flops=of_teachers[1],
        steps=student.steps,
        images=student.images,
        **result.scores,
        log=log,
        log_sha256=log_sha256,
        notes=list(result.notes),
    )


def told(record: SpeedRecord, track: Track) -> Iterator[str]:
    """Sentences on a record."""
    summary, verdict, seeds = record.summary, record.verdict, record.seeds
    many = f"{len(seeds)} seed{'s' * (len(seeds) > 1)}"
    yield (
        f"{record.recipe}: {summary.seconds:.1f} s (+- {summary.seconds_std:.1f}, {many}), "
        f"{tera(summary.flops)} TFLOP, and {record.compile_s:.1f} s of compilation that do not count"
    )
    yield (
        f"natural {percent(summary.natural)}, PGD-20 {percent(summary.pgd20)} (+- {100 * summary.pgd20_std:.2f}) "
        f"of {seeds[0].pgd20.n:,} test images, "
        f"{record.checked_by} {percent(summary.checked)} of {seeds[0].checked.n:,}"
    )
    if record.data.images != "as published":
        yield f"{record.data.name} was read from {record.data.images}, which are not the pixels that others have"
    where = "above" if verdict.points >= 0 else "below"
    yield f"{abs(verdict.points):.2f} points {where} the target of {track.target:.0%}"
    if verdict.refused:
        yield f"refused as a record: {'; '.join(verdict.refused)}"
    for note in dict.fromkeys(note for one in seeds for note in one.notes):
        yield f"Warning: {note}"


def tera(flops: float) -> str:
    """Operations in 10^12."""
    return f"{flops / 1e12:,.0f}" if flops >= 1e14 else f"{flops / 1e12:.3g}"


# ---------------------------------------------------------------- --trials


def try_variants(variants: Sequence[Trial], attempts: Sequence[Attempt], path: Path, console: Console) -> None:
    """Run trials with each seed, and write their rows when all are done.

    The same command goes on after a kill: what is trained or evaluated is kept.
    """
    with command.refused():
        if path.exists():
            raise ValueError(f"{path} exists: give --out, or the file of trials another name")
    rows = []
    for trial, attempt in zip(variants, attempts, strict=True):
        name = trial.recipe.name
        say = _named(name, console)
        with _ended_in_a_line(name):
            complete = trials.held_out(attempt.complete())
            race = running.prepare(WORK / "trials" / attempt.track_name, name, attempt.track, complete, say)
            running.warm_up(race)
            for seed in attempt.seeds:
                facts = machine.facts(attempt.place)
                rows.append(trials.run(race, trial, seed, file=path.stem, facts=facts))
                say(f"seed {seed}: {rows[-1].seconds:.1f} s, PGD-20 {percent(rows[-1].pgd20)}")
    path.parent.mkdir(parents=True, exist_ok=True)
    csv_rows.write(path, rows)
    console.print(table_of_trials(rows))
    console.print(f"written: {path}")


def table_of_trials(rows: Sequence[TrialRow]) -> Table:
    """Means of each variant, and its accuracies less those of the base."""
    result = Table(title=f"{rows[0].held_out:,} held-out training images", title_justify="left", box=box.SIMPLE)
    result.add_column("variant")
    for heading in ("seeds", "seconds", "TFLOP", "natural", "PGD-20", "natural - base", "PGD-20 - base"):
        result.add_column(heading, justify="right", no_wrap=True)
    for each in trials.means(rows):
        result.add_row(
            each.variant, str(each.seeds), f"{each.seconds:.1f}", tera(each.flops), percent(each.natural),
            percent(each.pgd20), f"{100 * each.natural_minus_base:+.2f}", f"{100 * each.pgd20_minus_base:+.2f}",
        )  # fmt: skip
    return result


# ---------------------------------------------------------------- --list


def print_leaderboard(console: Console, folder: Path, track_name: str) -> None:
    """Print the records of a track, the fastest first, and what is none with the reasons."""
    track = rules.find_track(track_name)
    valid, others = records.leaderboard(folder / track_name, track)
    if valid:
        console.print(table(track_name, track, [record for _, record in valid]))
    else:
        console.print(f"no records on the track {track_name} yet")
    for path, reason in others:
        console.print(f"no record: {path.name}: {reason}")


def table(track_name: str, track: Track, found: Sequence[SpeedRecord]) -> Table:
    """Table of records in their order."""
    title = f"{track_name}: {track.dataset} to {track.target:.0%} under PGD-20, rules {rules.RULES_VERSION}"
    result = Table(title=title, title_justify="left", box=box.SIMPLE)
    for heading in ("", "seconds", "TFLOP", "PGD-20", track.checked_by, "seeds"):
        result.add_column(heading, justify="right", no_wrap=True)
    for heading in ("recipe", "images", "machine", "date", "commit"):
        result.add_column(heading)
    for number, record in enumerate(found, 1):
        summary, facts = record.summary, record.facts
        result.add_row(
            str(number), f"{summary.seconds:.1f} +- {summary.seconds_std:.1f}", tera(summary.flops),
            f"{percent(summary.pgd20)} +- {100 * summary.pgd20_std:.2f}", percent(summary.checked),
            str(len(record.seeds)), record.recipe, record.data.images, record.machine, str(facts["date"])[:10],
            str(facts["commit"])[:7],
        )  # fmt: skip
    return result


# ---------------------------------------------------------------- --check


def check(attempt: Attempt, before: SpeedRecord, console: Console) -> None:
    """Run the recipe of a record again, and tell what agrees; exit code 1 where what must agree does not."""
    race, compile_s, results = run(attempt, WORK / CHECKS, console)
    unwritten = dict.fromkeys(results, ("unwritten", ""))
    after = record_of(attempt, race, machine.facts(attempt.place), compile_s, results, unwritten)
    shutil.rmtree(race.place)
    if not agrees(before, after, lambda text: console.print(text)):
        raise click.ClickException("the recipe does not give what the record says")


def agrees(before: SpeedRecord, after: SpeedRecord, say: Say) -> bool:
    """True if a record is confirmed by one that was made now; what agrees and what does not is told.

    Rules, keys, images, operations and the verdict must agree. Scores and seconds are compared, and may differ.
    """
    flat = [config.flat(record.config) for record in (before, after)]
    changed = sorted(name for name in flat[0].keys() | flat[1].keys() if flat[0].get(name) != flat[1].get(name))
    musts: dict[str, tuple[bool, str]] = {
        "rules": (before.rules == after.rules, f"{before.rules}, now {after.rules}"),
        "configuration": (not changed, ", ".join(changed)),
        "images": (before.data == after.data, f"{before.data.images}, now {after.data.images}"),
        "operations": (
            math.isclose(before.summary.flops, after.summary.flops, rel_tol=1e-9),
            f"{before.summary.flops:.6g}, now {after.summary.flops:.6g}",
        ),
        "verdict": (
            (before.verdict.reached, not before.verdict.refused)
            == (after.verdict.reached, not after.verdict.refused),
            f"{before.verdict.points:+.2f} points from the target, now {after.verdict.points:+.2f}",
        ),
    }
    for name, (same, difference) in musts.items():
        say(f"{name}: {'agrees' if same else f'DIFFERS: {difference}'}")
    for one, other in zip(before.seeds, after.seeds, strict=True):
        pairs = [(name, getattr(one, name), getattr(other, name)) for name in ("natural", "pgd20", "checked")]
        shown = [
            f"{name} {old.correct:,}, now {new.correct:,} of {new.n:,}" for name, old, new in pairs if old != new
        ]
        say(f"seed {one.seed}: {'; '.join(shown) or 'every score is the same to the image'}")
    ratio = after.summary.seconds / before.summary.seconds
    say(f"seconds: {before.summary.seconds:.1f}, now {after.summary.seconds:.1f} ({ratio:.2f} x)")
    return all(same for same, _ in musts.values())


if __name__ == "__main__":
    main()
