"""The page itself, in gradio: its components and their event handlers."""

import html
import os
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # set before the import of gradio, which would look for updates

import gradio as gr

from data import sample
from models.method import Method
from page import work
from page.visitors import Visitors
from utils.errors import UserError

SAMPLES = ("train/hazy/motorcycle_left_2.png", "train/hazy/rocket_2.png", "test/hazy/coffee_2.png")
TITLE = """# Dehaze photographs
Drop one or several. They stay on the machine that serves this page and are deleted when you leave it.
"""
STRENGTH = "0: unchanged; 1: as estimated; above: more"
NO_TRANSMISSION = "estimates no transmission: none is shown, and strength has no effect"
TRANSMISSION = "Transmission: share of light that passes through the haze (white: all)"
CSS = """
#words { min-height: 0 }
#words:has(.progress-level) { min-height: 6em }
#words p { padding: .5em .8em; border-left: 4px solid #e65100 }
#samples .grid-container { grid-template-columns: repeat(3, minmax(0, 1fr)) !important }
#samples .gallery-item, #samples .thumbnail-item { width: 100% !important; min-width: 0 !important }
#fetch { position: absolute; left: -9999px }
footer { display: none !important }
"""
FETCH = "() => setTimeout(() => document.querySelector('#fetch').click(), 100)"


class Limits(NamedTuple):
    megapixels: float = 60
    megabytes: float = 100  # of a file
    images: int = 100  # at once


class Page:
    """The event handlers. Each gets the values of components, and the request, which identifies the visitor."""

    def __init__(self, methods: dict[str, Method], visitors: Visitors, limits: Limits):
        self.methods = methods
        self.visitors = visitors
        self.limits = limits

    def take(self, files: list[str] | None, request: gr.Request) -> tuple:
        """Dropped files become the visitor's images: -> the choice of images, both buttons, messages."""
        visitor = self.visitors.get(request.session_hash)
        files = files or []
        most = self.limits.images
        refused = visitor.take(files[:most], self.limits.megapixels)
        if len(files) > most:
            refused.append(f"{len(files) - most} more were left out: the page accepts {most} at once")
        names = list(visitor.images)
        choice = gr.Dropdown(choices=names, value=names[0] if names else None, visible=len(names) > 1)
        download_all = gr.Button(f"Download all {len(names)} (zip)", visible=len(names) > 1)
        return choice, gr.Button(interactive=bool(names)), download_all, _messages(refused)

    def drop_one(self, files: list[str] | None, event: gr.DeletedFileData, request: gr.Request) -> tuple:
        """A file was removed from the list; ``files`` may still contain it."""
        return self.take([file for file in files or [] if file != event.file.path], request)

    def example(self, event: gr.SelectData, request: gr.Request) -> tuple:
        return self.take([str(_samples()[event.index])], request)

    def show(self, name: str | None, method: str, strength: float, messages: str, request: gr.Request) -> tuple:
        """Run the network on the chosen image: -> before and after, transmission, messages."""
        visitor = self.visitors.get(request.session_hash)
        path = visitor.images.get(name or "")
        if path is None:
            return None, None, messages
        with self.visitors.at_work(visitor):
            try:
                visitor.view = view = work.estimate(path, self.methods[method])
                visitor.strength = strength
                pair = visitor.show(view.hazy), visitor.show(view.clear(strength))
                if view.transmission is None:
                    return pair, None, messages + _messages([f"{method} {NO_TRANSMISSION}"])
                return pair, visitor.show(view.transmission), messages
            except UserError as error:
                visitor.view = None
                return None, None, messages + _messages([work.message(error, path)])

    def strengthen(self, strength: float, shown: Any, request: gr.Request) -> Any:
        """The same estimate at another strength; the network is not run."""
        visitor = self.visitors.get(request.session_hash)
        if visitor.view is None or shown is None or strength == visitor.strength:
            return gr.skip()
        with self.visitors.at_work(visitor):
            visitor.strength = strength
            return shown[0], visitor.show(visitor.view.clear(strength))

    def save(self, name: str | None, method: str, strength: float, request: gr.Request) -> tuple:
        """Dehaze the chosen image at its full size: -> file, messages."""
        visitor = self.visitors.get(request.session_hash)
        path = visitor.images.get(name or "")
        if path is None:
            return None, GONE
        with self.visitors.at_work(visitor):
            try:
                return str(work.write(path, self.methods[method], strength, visitor.result_folder())), ""
            except UserError as error:
                return None, _messages([work.message(error, path)])

    def save_all(
        self,
        method: str,
        strength: float,
        request: gr.Request,
        progress: gr.Progress = gr.Progress(),  # noqa: B008  (gradio finds it by this default)
    ) -> tuple:
        """Dehaze all images at full size: -> zip, messages. Stops when the visitor leaves."""
        visitor = self.visitors.get(request.session_hash)
        paths = list(visitor.images.values())
        if not paths:
            return None, GONE

        def proceed(done: int) -> bool:
            progress((done, len(paths)), desc=paths[done].name, unit="images")
            return self.visitors.is_here(visitor)

        with self.visitors.at_work(visitor):
            try:
                archive = visitor.result_folder() / "dehazed.zip"
                write = partial(work.write, method=self.methods[method], strength=strength, folder=archive.parent)
                return str(archive), _messages(work.write_zip(archive, paths, write, proceed))
            except UserError as error:  # the visitor has left
                return None, _messages([str(error)])

    def leave(self, request: gr.Request) -> None:
        self.visitors.leave(request.session_hash)


class Controls(NamedTuple):
    drop: gr.File
    samples: gr.Gallery
    choice: gr.Dropdown
    method: gr.Radio
    strength: gr.Slider
    save: gr.Button
    save_all: gr.Button
    fetch: gr.DownloadButton  # hidden and clicked by `FETCH`; else the visitor would have to click twice


class Results(NamedTuple):
    messages: gr.HTML
    shown: gr.ImageSlider
    transmission: gr.Image


def build(page: Page) -> gr.Blocks:
    """The components of the page and their connections."""
    gr.set_static_paths([sample.make()])  # served from their folder, not as uploads, which are deleted
    with gr.Blocks(title="NeDR-Dehaze", analytics_enabled=False) as blocks:
        gr.Markdown(TITLE)
        with gr.Row():
            with gr.Column(scale=1, min_width=300):
                controls = _controls(list(page.methods))
            with gr.Column(scale=3):
                results = _results()
        _connect(page, controls, results)
        blocks.unload(page.leave)
    return blocks


def _controls(methods: list[str]) -> Controls:
    samples = [str(path) for path in _samples()]
    plain = {"allow_preview": False, "buttons": [], "interactive": False}
    return Controls(
        gr.File(label="Photographs", file_count="multiple", height=150, elem_id="drop"),
        gr.Gallery(samples, label="Or try one of these", columns=3, height=115, elem_id="samples", **plain),
        gr.Dropdown(label="Shown", visible=False, elem_id="choice"),
        gr.Radio(methods, value=methods[0], label="Method", elem_id="method"),
        gr.Slider(0, 1.5, 1, step=0.05, label="Strength", info=STRENGTH, elem_id="strength"),
        gr.Button("Download at full size", variant="primary", interactive=False, elem_id="save"),
        gr.Button(visible=False, elem_id="save-all"),
        gr.DownloadButton(elem_id="fetch"),
    )


def _results() -> Results:
    plain = {"type": "filepath", "interactive": False}
    pair = {"label": "Before and after", "buttons": ["fullscreen"], "max_height": 640, "elem_id": "shown"}
    return Results(
        gr.HTML(elem_id="words"),
        gr.ImageSlider(**pair, **plain),
        gr.Image(label=TRANSMISSION, buttons=[], height=260, elem_id="haze", **plain),
    )


def _connect(page: Page, controls: Controls, results: Results) -> None:
    """Connect events to handlers: ``heavy`` ones run the network, one at a time; ``quiet`` ones never wait."""
    drop, samples, choice, method, strength, save, save_all, fetch = controls
    messages, shown, transmission = results
    quiet = {"api_visibility": "private", "show_progress": "hidden", "concurrency_limit": None}
    heavy = {"api_visibility": "private", "concurrency_id": "network", "concurrency_limit": 1}
    taken = [choice, save, save_all, messages]
    show = dict(
        fn=page.show, inputs=[choice, method, strength, messages], outputs=[shown, transmission, messages], **heavy
    )
    strengthen = dict(fn=page.strengthen, inputs=[strength, shown], outputs=shown, **quiet)
    requests = [event(page.take, drop, taken, **quiet).then(**show) for event in (drop.upload, drop.clear)]
    requests.append(drop.delete(page.drop_one, drop, taken, **quiet).then(**show))
    requests.append(samples.select(page.example, None, taken, **quiet).then(**show))
    requests += [event(**show) for event in (choice.input, method.input)]
    for request in requests:  # the strength may have been changed while the network ran
        request.then(**strengthen)
    strength.change(**strengthen, trigger_mode="always_last")
    save.click(page.save, [choice, method, strength], [fetch, messages], **heavy).success(js=FETCH)
    save_all.click(page.save_all, [method, strength], [fetch, messages], **heavy).success(js=FETCH)


def _samples() -> list[Path]:
    return [sample.make() / name for name in SAMPLES]


def _messages(lines: list[str]) -> str:
    """Messages as HTML, with file names escaped."""
    return "".join(f'<p role="alert">{html.escape(line)}</p>' for line in lines)


GONE = _messages(["the image is no longer here; drop it again"])
