"""Running a command of the command line in this process."""

from pathlib import Path

from typer.testing import CliRunner, Result

from aqlm_tensor.cli.app import app

QUICK = ["--scheme", "2x4g8", "--nsamples", "4", "--seqlen", "64"]


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])
