"""Dehaze photographs in a browser: before and after, strength, download at full size. Needs no network.

    python -m page [--host 127.0.0.1] [--port 7860] [--weights FILE ...]

The page is reachable from this computer only, unless --host is given.
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
# The browser may load fonts, scripts and images from this server only.
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; worker-src 'self' blob:; frame-ancestors 'none'"
)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    with tempfile.TemporaryDirectory(prefix="dehaze-page-") as root:
        os.environ["GRADIO_TEMP_DIR"] = root  # uploads are deleted with this folder, too
        try:
            import gradio  # noqa: F401
        except ImportError as error:
            raise UserError(
                f"{error.name} is not installed; run make page, or pip install -r requirements-page.txt"
            ) from error
        server = listen(options.host, options.port)
        methods = load_methods(options.weights or [], options.device)
        serve(methods, Path(root), options, server)
    return 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m page", description=__doc__, formatter_class=style)
    parser.add_argument("--host", default=LOCAL[0], help="address to serve at; 0.0.0.0: any that reaches this machine")
    parser.add_argument("--port", type=int, default=7860, help="0: any free port")
    parser.add_argument(
        "--weights", nargs="+", metavar="FILE", help="further weights to choose from, official ones too"
    )
    parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda or cuda:N")
    parser.add_argument("--megapixels", type=float, default=60, help="the largest image accepted (60)")
    parser.add_argument("--megabytes", type=float, default=100, help="the largest file accepted (100)")
    parser.add_argument("--pictures", type=int, default=100, help="the most images accepted at once (100)")
    return parser.parse_args(arguments)


def load_methods(files: list[str], device_name: str) -> dict[str, Method]:
    """The methods to choose from, by their labels: weights in checkpoints/NAME, those in ``files``, DCP.

    The label of a file is its name without extension, or its path if another file has the same name.
    """
    chosen = device.pick(device_name)
    shipped = [name for name in models.names() if models.shipped(name)]
    methods = {models.METHODS[name].__name__: models.load(name, chosen) for name in shipped}
    for file in map(Path, files):
        name = file.stem if file.stem not in methods else str(file.with_suffix(""))
        if name in methods:
            raise UserError(f"--weights {quoted(file)}: is named twice; remove one")
        methods[name] = models.load(file, chosen)
    methods["DCP (dark channel prior)"] = models.load("dcp", chosen)
    return methods


def listen(host: str, port: int) -> socket.socket:
    """A socket bound to the address. Raises `UserError` if that fails."""
    server = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        server.bind((host, port))
    except (OSError, OverflowError) as error:
        server.close()
        why = getattr(error, "strerror", None) or error
        message = f"the page cannot be served there ({why}); give another --host or --port"
        raise UserError(f"{quoted(host)}, port {port}: {message}") from error
    return server


class SecurityHeaders:
    """An ASGI application that adds `POLICY` to the headers of every response."""

    def __init__(self, app: Callable):
        self.app = app

    async def __call__(self, scope: dict, receive: Callable, send: Callable) -> None:
        async def add(message: dict) -> None:
            if message["type"] == "http.response.start":
                headers = {"content-security-policy": POLICY, "referrer-policy": "no-referrer"}
                message["headers"] = [*message["headers"], *((k.encode(), v.encode()) for k, v in headers.items())]
            await send(message)

        await self.app(scope, receive, add)


def serve(methods: dict[str, Method], root: Path, options: argparse.Namespace, server: socket.socket) -> None:
    """Serve until Ctrl-C or SIGTERM."""
    import gradio as gr
    import uvicorn
    from fastapi import FastAPI

    from page.app import CSS, Limits, Page, build
    from page.visitors import Visitors

    visitors = Visitors(root)
    limits = Limits(options.megapixels, options.megabytes, options.pictures)
    outer = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    style = {"theme": gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"]), "css": CSS}
    disabled = dict.fromkeys(("run_history", "ssr_mode", "mcp_server", "pwa", "enable_monitoring"), False)
    blocks = build(Page(methods, visitors, limits))
    port = server.getsockname()[1]
    max_bytes = int(limits.megabytes * 1e6)
    gr.mount_gradio_app(
        outer, blocks, "/", options.host, port, footer_links=[], max_file_size=max_bytes, **style, **disabled
    )
    sweep(visitors)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # a normal exit, which deletes the uploads
    print(f"the page: http://{options.host}:{port}  (Ctrl-C ends it)", flush=True)
    if options.host not in LOCAL:
        print("warning: anyone who reaches that address can use the page, without a password", file=sys.stderr)
    application = uvicorn.Config(SecurityHeaders(outer), log_level="warning", timeout_graceful_shutdown=2)
    uvicorn.Server(application).run(sockets=[server])


def sweep(visitors, seconds: float = 60) -> None:
    """Call `Visitors.sweep` every ``seconds``, in the background."""
    timer = threading.Timer(seconds, lambda: (visitors.sweep(), sweep(visitors, seconds)))
    timer.daemon = True
    timer.start()


if __name__ == "__main__":
    errors.run(main)
