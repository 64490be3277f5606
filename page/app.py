"""The page itself, in gradio: what is on it, and what happens when something is dropped, chosen or moved."""

import html
import os
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # before gradio is imported, which would ask for its newest version

import gradio as gr

from data import sample
from models.method import Method
from page import work
from page.visitors import Visitors
from utils.errors import UserError

SAMPLES = ("train/hazy/motorcycle_left_2.png", "train/hazy/rocket_2.png", "test/hazy/coffee_2.png")
TITLE = """# Dehaze photographs
Drop one, or several. They stay on the machine that serves this page, and are deleted when you leave it.
"""
STRENGTH = "0: as it is; 1: as found; beyond: more"
NO_HAZE = "finds no transmission: there is none to show, and strength changes nothing"
LIGHT = "Transmission: share of light that comes through the haze (white: all)"
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
    pictures: int = 100  # at once


class Page:
    """The handlers. Each takes what is on the page, and the request, which tells the visitor."""

    def __init__(self, methods: dict[str, Method], visitors: Visitors, limits: Limits):
        self.methods, self.visitors, self.limits = methods, visitors, limits

    def take(self, files: list[str] | None, request: gr.Request) -> tuple:
        """Dropped files become the visitor's images: -> the choice of images, both buttons, words."""
        visitor, files = self.visitors.get(request.session_hash), files or []
        most = self.limits.pictures
        refused = visitor.take(files[:most], self.limits.megapixels)
        if len(files) > most:
            refused.append(f"{len(files) - most} more were left out: the page takes {most} at once")
        names = list(visitor.pictures)
        choice = gr.Dropdown(choices=names, value=names[0] if names else None, visible=len(names) > 1)
        together = gr.Button(f"Download all {len(names)} (zip)", visible=len(names) > 1)
        return choice, gr.Button(interactive=bool(names)), together, _words(refused)

    def drop_one(self, files: list[str] | None, event: gr.DeletedFileData, request: gr.Request) -> tuple:
        """A file was crossed out of the list, which may still have it."""
        return self.take([file for file in files or [] if file != event.file.path], request)

    def example(self, event: gr.SelectData, request: gr.Request) -> tuple:
        return self.take([str(_samples()[event.index])], request)

    def show(self, name: str | None, method: str, strength: float, words: str, request: gr.Request) -> tuple:
        """Run the network on the chosen image: -> before and after, transmission, words."""
        visitor = self.visitors.get(request.session_hash)
        path = visitor.pictures.get(name or "")
        if path is None:
            return None, None, words
        with self.visitors.at_work(visitor):
            try:
                visitor.view = view = work.look(path, self.methods[method])
                pair = visitor.show(view.hazy), visitor.show(view.clear(strength))
                if view.transmission is None:
                    return pair, None, words + _words([f"{method} {NO_HAZE}"])
                return pair, visitor.show(view.transmission), words
            except UserError as error:
                visitor.view = None
                return None, None, words + _words([work.told(error, path)])

    def strengthen(self, strength: float, shown: Any, request: gr.Request) -> Any:
        """The same finding at another strength; no network runs."""
        visitor = self.visitors.get(request.session_hash)
        if visitor.view is None or shown is None:
            return gr.skip()
        with self.visitors.at_work(visitor):
            return shown[0], visitor.show(visitor.view.clear(strength))

    def save(self, name: str | None, method: str, strength: float, request: gr.Request) -> tuple:
        """The chosen image at its full size: -> file, words."""
        visitor = self.visitors.get(request.session_hash)
        path = visitor.pictures.get(name or "")
        if path is None:
            return None, GONE
        with self.visitors.at_work(visitor):
            try:
                return str(work.write(path, self.methods[method], strength, visitor.new_folder())), ""
            except UserError as error:
                return None, _words([work.told(error, path)])

    def save_all(
        self,
        method: str,
        strength: float,
        request: gr.Request,
        progress: gr.Progress = gr.Progress(),  # noqa: B008  (gradio finds it by this default)
    ) -> tuple:
        """All images at full size: -> zip, words. Stops when the visitor leaves."""
        visitor = self.visitors.get(request.session_hash)
        paths = list(visitor.pictures.values())
        if not paths:
            return None, GONE

        def going(done: int) -> bool:
            progress((done, len(paths)), desc=paths[done].name, unit="pictures")
            return self.visitors.is_here(visitor)

        with self.visitors.at_work(visitor):
            try:
                archive = visitor.new_folder() / "dehazed.zip"
                write = partial(work.write, method=self.methods[method], strength=strength, folder=archive.parent)
                return str(archive), _words(work.write_zip(archive, paths, write, going))
            except UserError as error:  # the visitor has left
                return None, _words([str(error)])

    def leave(self, request: gr.Request) -> None:
        self.visitors.leave(request.session_hash)


class Controls(NamedTuple):
    drop: gr.File
    samples: gr.Gallery
    choice: gr.Dropdown
    method: gr.Radio
    strength: gr.Slider
    save: gr.Button
    together: gr.Button
    fetch: gr.DownloadButton  # not seen; a press of its own would need two by the visitor


class Results(NamedTuple):
    words: gr.HTML
    shown: gr.ImageSlider
    haze: gr.Image


def build(page: Page) -> gr.Blocks:
    """The page's parts and what connects them."""
    gr.set_static_paths([sample.make()])  # served from where they are, not as uploads, which are deleted
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
    samples, plain = [str(path) for path in _samples()], {"allow_preview": False, "buttons": [], "interactive": False}
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
        gr.Image(label=LIGHT, buttons=[], height=260, elem_id="haze", **plain),
    )


def _connect(page: Page, controls: Controls, results: Results) -> None:
    """``heavy`` events run the network, one at a time; ``quiet`` ones do not, and wait for nobody."""
    drop, samples, choice, method, strength, save, together, fetch = controls
    words, shown, haze = results
    quiet = {"api_visibility": "private", "show_progress": "hidden", "concurrency_limit": None}
    heavy = {"api_visibility": "private", "concurrency_id": "network", "concurrency_limit": 1}
    taken = [choice, save, together, words]
    show = dict(fn=page.show, inputs=[choice, method, strength, words], outputs=[shown, haze, words], **heavy)
    for event in (drop.upload, drop.clear):
        event(page.take, drop, taken, **quiet).then(**show)
    drop.delete(page.drop_one, drop, taken, **quiet).then(**show)
    samples.select(page.example, None, taken, **quiet).then(**show)
    for event in (choice.input, method.input):
        event(**show)
    strength.change(page.strengthen, [strength, shown], shown, trigger_mode="always_last", **quiet)
    save.click(page.save, [choice, method, strength], [fetch, words], **heavy).success(js=FETCH)
    together.click(page.save_all, [method, strength], [fetch, words], **heavy).success(js=FETCH)


def _samples() -> list[Path]:
    return [sample.make() / name for name in SAMPLES]


def _words(refused: list[str]) -> str:
    """What was refused, as a list that no file's name can turn into anything else."""
    return "".join(f'<p role="alert">{html.escape(each)}</p>' for each in refused)


GONE = _words(["there is no image here any more; drop it again"])
