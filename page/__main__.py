"""Dehaze photographs in a browser: before and after, strength, download at full size. Needs no network.

    python -m page [--host 127.0.0.1] [--port 7860] [--weights FILE ...]

Only this computer can see the page, unless --host says otherwise.
"""

import argparse
import os
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

import models
from models.method import Method
from utils import device, errors
from utils.errors import UserError, quoted

LOCAL = ("127.0.0.1", "localhost", "::1")
# What the browser may load for the page, and nothing from elsewhere: fonts, scripts and images are the server's own.
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; worker-src 'self' blob:; frame-ancestors 'none'"
)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    with tempfile.TemporaryDirectory(prefix="dehaze-page-") as root:
        os.environ["GRADIO_TEMP_DIR"] = root  # uploads too go with this folder
        try:
            import gradio  # noqa: F401
        except ImportError as error:
            raise UserError(
                f"{error.name} is not installed; run make page, or pip install -r requirements-page.txt"
            ) from error
        listening = listen(options.host, options.port)
        methods = offered(options.weights or [], options.device)
        serve(methods, Path(root), options, listening)
    return 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m page", description=__doc__, formatter_class=style)
    parser.add_argument("--host", default=LOCAL[0], help="address to serve at; 0.0.0.0: whoever reaches this machine")
    parser.add_argument("--port", type=int, default=7860, help="0: any that is free")
    parser.add_argument("--weights", nargs="+", metavar="FILE", help="further weights to pick from, official ones too")
    parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda or cuda:N")
    parser.add_argument("--megapixels", type=float, default=60, help="the largest image taken (60)")
    parser.add_argument("--megabytes", type=float, default=100, help="the largest file taken (100)")
    parser.add_argument("--pictures", type=int, default=100, help="the most taken at once (100)")
    return parser.parse_args(arguments)


def offered(files: list[str], place: str) -> dict[str, Method]:
    """The methods to pick from, by what the page calls them: weights in checkpoints/NAME, those in ``files``, DCP.

    A file is called as it is named, and by its folder, too, where another has that name.
    """
    where = device.pick(place)
    at_hand = [name for name in models.names() if models.shipped(name)]
    methods = {models.METHODS[name].__name__: models.load(name, where) for name in at_hand}
    for file in map(Path, files):
        name = file.stem if file.stem not in methods else str(file.with_suffix(""))
        if name in methods:
            raise UserError(f"--weights {quoted(file)}: is named twice; leave one out")
        methods[name] = models.load(file, where)
    methods["DCP (dark channel prior)"] = models.load("dcp", where)
    return methods


def listen(host: str, port: int) -> socket.socket:
    """A socket at that address. Raises `UserError` if it cannot be had."""
    listening = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
    except (OSError, OverflowError) as error:
        listening.close()
        why = getattr(error, "strerror", None) or error
        told = f"the page cannot be served there ({why}); give another --host or --port"
        raise UserError(f"{quoted(host)}, port {port}: {told}") from error
    return listening


class Guarded:
    """An ASGI application whose answers tell the browser `POLICY`."""

    def __init__(self, app: Callable):
        self.app = app

    async def __call__(self, scope: dict, receive: Callable, send: Callable) -> None:
        async def add(message: dict) -> None:
            if message["type"] == "http.response.start":
                own = {"content-security-policy": POLICY, "referrer-policy": "no-referrer"}
                message["headers"] = [*message["headers"], *((k.encode(), v.encode()) for k, v in own.items())]
            await send(message)

        await self.app(scope, receive, add)


def serve(methods: dict[str, Method], root: Path, options: argparse.Namespace, listening: socket.socket) -> None:
    """Serve until Ctrl-C or SIGTERM."""
    import gradio as gr
    import uvicorn
    from fastapi import FastAPI

    from page.app import CSS, Limits, Page, build
    from page.visitors import Visitors

    visitors = Visitors(root)
    limits = Limits(options.megapixels, options.megabytes, options.pictures)
    outer = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    look = {"theme": gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"]), "css": CSS}
    less = dict.fromkeys(("run_history", "ssr_mode", "mcp_server", "pwa", "enable_monitoring"), False)
    blocks, port = build(Page(methods, visitors, limits)), listening.getsockname()[1]
    most = int(limits.megabytes * 1e6)
    gr.mount_gradio_app(outer, blocks, "/", options.host, port, footer_links=[], max_file_size=most, **look, **less)
    sweep(visitors)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that uploads are deleted then too
    print(f"the page: http://{options.host}:{port}  (Ctrl-C ends it)", flush=True)
    if options.host not in LOCAL:
        print("warning: whoever reaches that address can use the page; it asks for no password", file=sys.stderr)
    server = uvicorn.Server(uvicorn.Config(Guarded(outer), log_level="warning", timeout_graceful_shutdown=2))
    server.run(sockets=[listening])


def sweep(visitors, seconds: float = 60) -> None:
    """Have `Visitors.sweep` done once a minute, in the background."""
    timer = threading.Timer(seconds, lambda: (visitors.sweep(), sweep(visitors, seconds)))
    timer.daemon = True
    timer.start()


if __name__ == "__main__":
    errors.run(main)
