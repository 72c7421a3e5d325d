"""The command line: all commands and the exit codes. What computes imports torch, and nothing else does."""

from __future__ import annotations

import sys
from typing import NoReturn

import click

from engine import __version__
from engine.commands.data import data
from engine.commands.deployment.export import export
from engine.commands.deployment.predict import predict
from engine.commands.doctor import doctor
from engine.commands.evaluate import evaluate
from engine.commands.inspect import inspect
from engine.commands.lists import list_attacks, list_datasets, list_methods, list_models, list_recipes
from engine.commands.options import wrap_help_at_words
from engine.commands.reports.compare import compare_networks
from engine.commands.reports.report import report
from engine.commands.reports.verify import verify
from engine.commands.teachers import rank_teachers
from engine.commands.train import train
from engine.common import errors, standard_streams, wrapping
from engine.common.stopping import (
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_USER_ERROR,
    Interrupted,
    RunFailed,
    ignore_signals,
    interrupt_on_signals,
)


def main() -> NoReturn:
    """Run the command line: exit code 0, 1 (the run failed), 2 (user error) or 130 (interrupted)."""
    with standard_streams.guarded(), errors.report_thread_errors(_say):
        code = _run()
        ignore_signals()
    sys.exit(code)


def _run() -> int:
    try:
        interrupt_on_signals()
        if commands.main(standalone_mode=False) is not None:  # --help, --version
            standard_streams.check_stdout()
    except SystemExit as leaving:
        return leaving.code if isinstance(leaving.code, int) else EXIT_FAILED
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.ctx.get_help() if error.ctx else error.format_message())
        return EXIT_USER_ERROR
    except click.ClickException as error:
        _say(error.format_message())
        return EXIT_USER_ERROR
    except (KeyboardInterrupt, click.Abort):
        _say("interrupted")
        return EXIT_INTERRUPTED
    except Exception as error:
        told = errors.as_user_error(error)
        if isinstance(told, Interrupted) and told.command and sys.stderr.isatty():
            _say(f"{told.message}:")
            click.echo("\n".join(wrapping.wrapped_command(told.command, wrapping.columns())), err=True)
        else:
            _say(str(told))
        return next(code for kind, code in _CODES.items() if isinstance(told, kind))
    return 0


_CODES = {ValueError: EXIT_USER_ERROR, RunFailed: EXIT_FAILED, Interrupted: EXIT_INTERRUPTED}


def _say(message: str) -> None:
    if message:  # else another process of the run has said it
        told = f"engine: {errors.printable(message)}"
        click.echo(
            "\n".join(wrapping.wrapped(told, wrapping.columns())) if sys.stderr.isatty() else told, err=True
        )


@click.group(
    commands=[
        train,
        evaluate,
        predict,
        verify,
        export,
        rank_teachers,
        inspect,
        data,
        report,
        compare_networks,
        doctor,
        list_attacks,
        list_methods,
        list_models,
        list_datasets,
        list_recipes,
    ],
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(__version__, message="engine %(version)s")
def commands() -> None:
    """Train image classifiers that withstand adversarial images, by adversarial distillation.

    A first run, on any machine: engine train --method at --dataset digits --model resnet8 --epochs 3
    """


wrap_help_at_words(commands)

if __name__ == "__main__":
    main()
