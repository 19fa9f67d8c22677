"""The ``edge-phi3`` command: finds the verb, calls it, and turns errors into one line and an exit code.

Each verb is a module of `edge_phi3.commands`, imported when it is used, so that ``--help`` and mistakes answer at once.
"""

import importlib
import os
import signal
import sys
from collections.abc import Mapping
from typing import Any

import rich_click as click

from edge_phi3.errors import WrongUsageError
from edge_phi3.process import SurroundingsError, prepare, sentence_of
from edge_phi3.version import __version__

VERBS: Mapping[str, str] = {
    "serve": "Serve a model over HTTP.",
    "pull": "Bring a model into the store.",
    "models": "Show, check and clear what the store holds.",
    "convert": "Turn a checkpoint or an adapter into a GGUF file.",
    "quantize": "Make a GGUF file smaller.",
    "imatrix": "Measure which weights matter, for better quantisation.",
    "fit": "Tell which quantisations fit a machine's memory.",
    "bench": "Measure a running service, or the quantisations of a model.",
}
"""Each verb and what it does, in the order of ``--help``."""

FAILED, WRONG_USAGE, TERMINATED = 1, 2, 128 + signal.SIGTERM


class _Verb(click.RichCommand):
    """Stands for a verb until it is called."""

    def make_context(self, *args: Any, **kwargs: Any) -> click.Context:
        """Import the verb's module, and make the context of its command."""
        module = importlib.import_module(f"edge_phi3.commands.{self.name}")
        context: click.Context = module.command.make_context(*args, **kwargs)
        return context


class _Verbs(click.RichGroup):
    """The verbs, and the one place where errors become exit codes."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click's signature
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002 - click's signature
        return _Verb(name=cmd_name, help=VERBS[cmd_name]) if cmd_name in VERBS else None

    def main(self, *args: Any, **kwargs: Any) -> Any:
        try:
            try:
                return super().main(*args, **kwargs)
            finally:
                sys.stdout.flush()
        except Exception as error:  # noqa: BLE001 - no verb ever ends in a traceback
            click.echo(f"edge-phi3: {sentence_of(error)}", err=True)
            sys.exit(WRONG_USAGE if isinstance(error, WrongUsageError) else FAILED)


@click.group(cls=_Verbs, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="edge-phi3")
def app() -> None:
    """The Phi family on small GPUs: converted, quantised and served as transformers' `generate` would answer.

    Example: `edge-phi3 serve` serves the bundled demo model on port 8080.
    """


def main() -> None:
    """Run the command line; results go to stdout, everything else to stderr."""
    try:
        prepare()
    except SurroundingsError as error:
        sys.exit(f"edge-phi3: {error}")
    if sys.argv[1:2] == ["serve"]:
        # Until the server takes the signals over there is nothing to finish, and afterwards nothing left; a stop that
        # was requested is no failure.
        signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
        signal.signal(signal.SIGINT, lambda *_: os._exit(0))
    else:
        # As with Ctrl-C, a verb removes what it has not finished.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(TERMINATED))
    app(prog_name="edge-phi3")
