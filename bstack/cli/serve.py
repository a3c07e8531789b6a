"""``bstack serve``."""

from __future__ import annotations

import os

import click

import bstk
from bstack.cli import _common, _model


@click.command("serve")
@_common.place_argument
@_model.budget_option
@_model.device_option
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen at.")
@click.option("--port", type=click.IntRange(0, 65535), default=8080, show_default=True, help="Port; 0 for a free one.")
@click.option(
    "--api-key",
    metavar="KEY",
    envvar="BSTACK_API_KEY",
    help="Key that clients must send; also read from BSTACK_API_KEY, where other users do not see it.",
)
@click.option("--allow-host", metavar="NAME", multiple=True, help="A name of this machine in the Host header.")
@click.option("--allow-origin", metavar="URL", multiple=True, help="An origin whose pages may ask (CORS).")
@click.option("--name", help="The model's name for clients.  [default: that of FILE]")
@click.option("--parallel", type=click.IntRange(1, 64), default=8, show_default=True, help="Texts at a time.")
@click.option(
    "--queue", type=click.IntRange(0, 10000), default=64, show_default=True, help="Texts that wait; more are refused."
)
@click.option(
    "--cache-mb",
    type=_common.Parsed("MB", bstk.budget_bytes),
    default="512",
    show_default=True,
    help="Megabytes for keys and values, of texts that run and of prompts that are kept.",
)
@click.option(
    "--idle-after",
    type=_model.Finite(0, min_open=True),
    help="Seconds without a request, after which the model shrinks.",
)
@click.option(
    "--idle-mb",
    type=_common.Parsed("MB", bstk.budget_bytes),
    help="Its size then.  [default: the smallest; with it alone --idle-after is 300]",
)
@_common.strict_option
@_common.quiet_option
def command(
    file: str,
    budget: int | str | None,
    device: str,
    host: str,
    port: int,
    api_key: str | None,
    allow_host: tuple[str, ...],
    allow_origin: tuple[str, ...],
    name: str | None,
    parallel: int,
    queue: int,
    cache_mb: int,
    idle_after: float | None,
    idle_mb: int | None,
    strict: bool,
    quiet: bool,
) -> None:
    """Serve the model in FILE over HTTP: OpenAI's API under /v1, and a page to talk with it at /.

    Without a key only programs on this machine reach it. The page has a slider for the size of the model, which changes while
    it answers. Ctrl-C lets running answers end; a second one does not wait for them.

    \b
    Example:
      bstack serve model.bstk --mb 80
      curl http://127.0.0.1:8080/v1/chat/completions -d '{"messages": [{"role": "user", "content": "Hello"}]}'
    """
    from bstack.serve import server

    server.check(host, api_key, allow_host, allow_origin)
    log = _model.logger(quiet)
    with server.bind(host, port) as sock, _common.model_warnings(quiet):
        from bstack.engine.native.architecture import NotNativeError

        try:
            loaded = _model.load_model(file, budget, quiet, log, "native", strict, {}, device)
        except NotNativeError as error:
            error.option, error.hint = None, "bstack run and bstack chat take transformers for it."
            raise
        server.listen(sock)
        address, shown = sock.getsockname()[:2], f"[{host}]" if ":" in host else host
        click.echo(f"Listening at http://{shown}:{address[1]} ({_model.size(loaded.store)})", err=True)
        server.serve(
            loaded.model,
            loaded.tokenizer,
            sock,
            name=name or os.path.basename(file.partition("?")[0]).removesuffix(".bstk"),
            wanted=_model.AUTO if budget == _model.AUTO else loaded.store.budget,
            key=api_key,
            hosts=[*allow_host, host],
            origins=allow_origin,
            parallel=parallel,
            queue=queue,
            cache_bytes=cache_mb,
            idle_bytes=idle_mb,
            idle_after=300.0 if idle_after is None and idle_mb is not None else idle_after,
            log=log,
        )
        log("Stopped.")
