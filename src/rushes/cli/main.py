"""The `rushes` command: a table of subcommands, each imported only when it is called.

``rushes --help`` imports none of them, so that it answers at once.
"""

import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Final, NoReturn

import click

from rushes.cli.exits import Exit, status_of
from rushes.client.errors import RushesClientError
from rushes.errors import RushesError

COMMANDS: Final[dict[str, tuple[str, str]]] = {
    "demo": ("rushes.cli.demo:demo", "Start everything privately and run one request of every model."),
    "serve": ("rushes.cli.serve:serve", "Run the server: gateway, store and local workers."),
    "worker": ("rushes.cli.worker:worker", "Join an existing database as a worker."),
    "run": ("rushes.cli.run:run", "Submit a request, wait for it and download its outputs."),
    "result": ("rushes.cli.result:result", "Fetch a request that was submitted before."),
    "requests": ("rushes.cli.requests:requests", "List, show and cancel requests."),
    "models": ("rushes.cli.models:models", "List, show, check and import models."),
    "keys": ("rushes.cli.keys:keys", "Create, list and revoke API keys."),
    "doctor": ("rushes.cli.doctor:doctor", "Tell what is installed, reachable and missing."),
}
"""By name: where the command is, and its line in ``rushes --help``."""


class LazyGroup(click.Group):
    """A group that knows its commands' names and help without importing them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, _, name = COMMANDS[cmd_name][0].partition(":")
        command = getattr(import_module(module), name)
        assert isinstance(command, click.Command)
        return command

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            # the interpreter flushes standard output once more at its end
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return Exit.PIPE

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="rushes")
def cli() -> None:
    """Rushes: an open, durable model API for images and video on your own machines.

    `rushes demo` shows what it does; `rushes serve` starts a server.
    """


def execute(arguments: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit status.

    A command raises :class:`RushesError` or :class:`RushesClientError` for what the user should read, and
    may return its status as an int; anything else it returns counts as success.
    """
    try:
        value = cli.main(
            args=None if arguments is None else list(arguments), prog_name="rushes", standalone_mode=False
        )
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        return Exit.INTERRUPTED
    except (RushesError, RushesClientError) as error:
        from rushes.cli.show import complain

        complain(error)
        return status_of(error)
    return value if type(value) in (int, Exit) else Exit.OK


def main() -> NoReturn:
    """The entry point."""
    sys.exit(int(execute()))


if __name__ == "__main__":
    main()
