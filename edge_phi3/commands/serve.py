"""``edge-phi3 serve``: the HTTP service, with every option of `Settings` as a flag."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import rich_click as click
import structlog

from edge_phi3.errors import WrongUsageError
from edge_phi3.options import choices_of, flag_of, group_of, metavar_of
from edge_phi3.settings import ENV_PREFIX, Settings, SettingsError, to_toml

if TYPE_CHECKING:
    from edge_phi3.api.service import Service

logger = structlog.get_logger(__name__)


def option_of(name: str, panel: str | None = None) -> click.Parameter:
    """Return the flag of one of the `Settings`, in the group `panel` of ``--help``, by default the field's own.

    Values stay texts: `Settings` reads them, from wherever they come.
    """
    field, flag = Settings.model_fields[name], flag_of(name)
    is_boolean, is_many = field.annotation is bool, isinstance(field.default, tuple)
    kinds: dict[Any, str] = {int: "INTEGER", float: "NUMBER"}
    metavar = metavar_of(field) or "|".join(choices_of(field)) or kinds.get(field.annotation, "TEXT")
    shown = str(field.default).lower() if is_boolean else field.default
    return click.RichOption(
        [f"{flag}/--no-{flag[2:]}" if is_boolean else flag],
        multiple=is_many,
        default=None,
        metavar=None if is_boolean else metavar,
        help=f"{field.description}" + ("" if shown in (None, ()) else f" [default: {shown}]"),
        panel=panel or group_of(field),
        **({"is_flag": True} if is_boolean else {"type": str}),
    )


def settings_of(flags: Mapping[str, Any], config: Path | None = None) -> Settings:
    """Return the `Settings` of some flags, of which those not given are None or empty; wrong ones are wrong usage."""
    try:
        return Settings.load({name: value for name, value in flags.items() if value not in (None, ())}, config)
    except SettingsError as error:
        raise WrongUsageError(str(error)) from None


def _serve(config: Path | None, print_config: bool, **flags: Any) -> None:
    settings = settings_of(flags, config)
    if print_config:
        click.echo(to_toml(settings), nl=False)
        return
    # --help and --print-config need neither the server nor the engine, which take half a second to import.
    from edge_phi3.api.server import run  # noqa: PLC0415 - see above
    from edge_phi3.commands.loading import load_pipeline  # noqa: PLC0415 - see above

    run(settings, functools.partial(load_pipeline, settings), _announce)


def _announce(service: Service, url: str) -> None:
    """Print where the service is, what it serves and an example for people; machines read the log."""
    from edge_phi3.api.server import example_command  # noqa: PLC0415 - as in _serve

    model = service.pipeline.model
    logger.info("ready", url=url, model=model.name, context_length=model.context_length)
    if service.settings.log_format == "text":
        click.echo(
            f"\nServing {model.name} ({model.description}) on {url}\n"
            f"The playground is at {url}/ui, the API's description at {url}/docs. Try it:\n\n"
            f"  {example_command(url)}\n",
            err=True,
        )


_MODEL = f"{Settings.model_fields['model'].description} [default: demo]"
command = click.RichCommand(
    name="serve",
    params=[
        click.RichArgument(["model"], required=False, metavar="[MODEL]", help=_MODEL),
        *(option_of(name) for name in Settings.model_fields if name != "model"),
        click.RichOption(
            ["--config"],
            type=click.Path(path_type=Path),
            envvar=f"{ENV_PREFIX}CONFIG",
            metavar="FILE",
            help="A TOML file with options; flags and environment variables win over it.",
            panel="Configuration",
        ),
        click.RichOption(
            ["--print-config"],
            is_flag=True,
            help="Print the options that are in effect, as a TOML file for --config, and exit.",
            panel="Configuration",
        ),
    ],
    callback=_serve,
    help="""Serve a model over HTTP until Ctrl-C or SIGTERM.

Each option is also an environment variable (`--ctx-size`: `EDGE_PHI3_CTX_SIZE`; several values with commas) and a key
of the TOML file given with `--config` (`ctx-size`).

Example: `edge-phi3 serve phi-3-mini-4k-instruct --quant Q4_K_M --host 0.0.0.0 --ctx-size 8192`
""",
)
"""The verb."""
