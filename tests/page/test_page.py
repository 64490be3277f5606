"""The page in headless Chromium, served by its own command. Needs gradio, playwright and Chromium.

make page && .venv/page/bin/python -m pip install playwright && .venv/page/bin/python -m pytest -n 0 tests/page
"""

import base64
import io
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import models
from data import images, sample

pytest.importorskip("gradio", reason="the page needs gradio: make page, or pip install -r requirements-page.txt")
sync_api = pytest.importorskip("playwright.sync_api", reason="the page's tests need playwright: pip install playwright")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
if not CHROMIUM:
    pytest.skip("the page's tests need Chromium", allow_module_level=True)

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 60_000  # ms
TAKE = """async (url) => {
    const bytes = new Uint8Array(await (await fetch(url)).arrayBuffer());
    return btoa(Array.from(bytes, (each) => String.fromCharCode(each)).join(""));
}"""

LISTEN = """() => {
    window.told = "";
    const note = () => document.querySelectorAll(".progress-level").forEach((each) => window.told += each.innerText);
    new MutationObserver(note).observe(document.body, {subtree: true, childList: true, characterData: true});
}"""


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """The page's address and the folder in which it keeps uploads."""
    temporary = tmp_path_factory.mktemp("server")
    command = [
        sys.executable,
        "-m",
        "page",
        "--port",
        "0",
        "--megapixels",
        "25",
        "--megabytes",
        "30",
        "--pictures",
        "4",
    ]
    env = os.environ | {"TMPDIR": str(temporary), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True)
    line = process.stdout.readline()
    match = re.search(r"http://127\.0\.0\.1:\d+", line)
    assert match, line
    yield match[0], temporary
    process.send_signal(signal.SIGTERM)
    process.wait(20)
    assert not list(temporary.glob("dehaze-page-*"))  # nothing stays


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def visit(server, browser):
    """Opens the page, as another visitor each time; in the end every request must have gone to the server itself."""
    opened, asked = [], []

    def visit():
        page = browser.new_context(viewport={"width": 1280, "height": 1000}).new_page()
        page.set_default_timeout(PATIENCE)
        page.on("request", lambda request: asked.append(request.url))
        page.on("websocket", lambda socket: asked.append(socket.url))
        page.goto(server[0])
        page.wait_for_selector("#drop input[type=file]", state="attached")
        opened.append(page)
        return page

    yield visit
    for page in opened:
        page.context.close()
    assert asked
    assert [url for url in asked if not url.startswith((server[0], "data:", "blob:"))] == []


def drop(page, *files):
    page.set_input_files("#drop input[type=file]", [str(file) for file in files])


def shown(page, not_before=()):
    """Before and after, as the browser has them, once there are two that are not among ``not_before``: addresses."""
    page.wait_for_function(
        """(old) => {
            const all = [...document.querySelectorAll("#shown img")];
            return all.length > 1 && all.every((each) => each.complete && each.naturalWidth)
                && !old.includes(all.at(-1).src) && new Set(all.map((each) => each.src)).size > 1;
        }""",
        arg=list(not_before),
    )
    return page.eval_on_selector_all("#shown img", "all => all.map((each) => each.src)")


def pixels(page, url):
    data = base64.b64decode(page.evaluate(TAKE, url))
    return torch.from_numpy(np.array(Image.open(io.BytesIO(data)).convert("RGB"))).permute(2, 0, 1) / 255


def is_close(a, b, most=0.012):  # JPEG
    assert a.shape == b.shape
    return (a - b).abs().mean() < most


def set_strength(page, value):
    page.fill("#strength input[type=number]", str(value))
    page.press("#strength input[type=number]", "Tab")


@pytest.fixture(scope="module")
def coffee():
    return sample.make() / "test/hazy/coffee_2.png"


@pytest.fixture(scope="module")
def estimates(coffee):
    return {name: models.load(name).estimate(images.read(coffee)[None]) for name in ("nedr", "dcp")}


def test_a_dropped_photograph_is_shown_dehazed(visit, coffee, estimates):
    page = visit()
    drop(page, coffee)
    urls = shown(page)
    assert any(is_close(pixels(page, url), images.read(coffee)) for url in urls)
    assert any(is_close(pixels(page, url), estimates["nedr"]["clear"][0]) for url in urls)
    haze = page.wait_for_selector("#haze img").get_attribute("src")
    assert is_close(pixels(page, haze), estimates["nedr"]["transmission"][0].expand(3, -1, -1))
    page.wait_for_timeout(500)  # the slider comes to rest
    seen = Image.open(io.BytesIO(page.locator("#shown img").first.screenshot())).convert("RGB")
    seen = torch.from_numpy(np.array(seen)).permute(2, 0, 1) / 255
    size = seen.shape[1:]
    hazy, clear = (
        F.interpolate(each, size, mode="bilinear", antialias=True)[0]
        for each in (images.read(coffee)[None], estimates["nedr"]["clear"])
    )
    rows = slice(size[0] // 6, None)  # below the label
    third = size[1] // 3
    assert is_close(seen[:, rows, :third], hazy[:, rows, :third], 0.04)  # left of the slider before, right of it after
    assert is_close(seen[:, rows, -third:], clear[:, rows, -third:], 0.04)
    assert not is_close(seen[:, rows, -third:], hazy[:, rows, -third:], 0.04)


def test_strength_method_and_download(visit, coffee, estimates):
    page = visit()
    drop(page, coffee)
    old = shown(page)
    set_strength(page, 0.5)
    new = shown(page, old)
    nedr, hazy = estimates["nedr"], images.read(coffee)[None]
    weaker = ((hazy - nedr["airlight"]) / nedr["transmission"] ** 0.5 + nedr["airlight"]).clamp(0, 1)[0]
    assert is_close(pixels(page, new[-1]), weaker)
    with page.expect_download() as download:
        page.click("#save")
    assert download.value.suggested_filename == "coffee_2_dehazed.png"
    assert (images.read(download.value.path()) - weaker).abs().max() < 0.5 / 255 + 1e-4
    page.get_by_label("DCP (dark channel prior)").check()
    set_strength(page, 1)
    page.wait_for_function("(old) => [...document.querySelectorAll('#shown img')].at(-1).src != old", arg=new[-1])
    for _ in range(40):  # the change of method and that of strength are two events; the last one decides
        if is_close(pixels(page, shown(page, new)[-1]), estimates["dcp"]["clear"][0]):
            break
        page.wait_for_timeout(500)
    assert is_close(pixels(page, shown(page, new)[-1]), estimates["dcp"]["clear"][0])


def test_a_jpeg_keeps_its_format_profile_and_exif(visit, coffee, tmp_path):
    exif = Image.Exif()
    exif[271] = "a maker"
    profile = b"\0" * 16 + b"RGB " + b"\0" * 108
    photo = tmp_path / "Nebel über <b>Bergen & #1.jpg"
    Image.open(coffee).save(photo, exif=exif, icc_profile=profile)
    page = visit()
    drop(page, photo)
    shown(page)
    with page.expect_download() as download:
        page.click("#save")
    assert download.value.suggested_filename.endswith("_dehazed.jpg")
    with Image.open(download.value.path()) as image:
        assert (image.format, image.size) == ("JPEG", Image.open(coffee).size)
        assert image.getexif()[271] == "a maker"
        assert image.info["icc_profile"] == profile


def test_several_uploads_with_invalid_ones_among_them(visit, coffee, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(coffee.read_bytes()[:20000])
    notes = tmp_path / "notes.jpg"
    notes.write_text("no image")
    chelsea = coffee.with_name("chelsea_1.png")
    page = visit()
    drop(page, coffee, notes, chelsea, broken, coffee.with_name("chelsea_2.png"))
    old = shown(page)
    alerts = page.locator("#words [role=alert]").all_inner_texts()
    assert len(alerts) == 2
    assert alerts[0].startswith("notes.jpg: cannot be read as an image (of no known image format")
    assert alerts[1] == "1 more were left out: the page accepts 4 at once"
    page.evaluate(LISTEN)
    with page.expect_download() as download:
        page.click("#save-all")
    assert "chelsea_1.png" in page.evaluate("window.told")  # the progress bar
    with zipfile.ZipFile(download.value.path()) as archive:
        assert sorted(archive.namelist()) == ["chelsea_1_dehazed.png", "coffee_2_dehazed.png"]
    page.wait_for_function("() => document.querySelector('#words').innerText.includes('broken.png: cannot be read')")
    page.click("#choice input")
    page.get_by_role("option", name="chelsea_1.png").click()
    assert any(is_close(pixels(page, url), images.read(chelsea)) for url in shown(page, old))
    for _ in range(2):  # coffee and the notes are crossed out
        page.locator("#drop button[aria-label='Remove this file']").first.click()
        page.wait_for_timeout(1000)
    page.wait_for_function("() => document.querySelector('#choice input').value == 'chelsea_1.png'")


def test_invalid_and_too_large_files_are_answered_with_a_message(visit, tmp_path):
    (tmp_path / "notes.txt").write_text("no image")
    Image.new("1", (6000, 5000)).save(tmp_path / "poster.png")
    page = visit()
    drop(page, tmp_path / "notes.txt", tmp_path / "poster.png")
    page.wait_for_selector("#words [role=alert]")
    alerts = page.locator("#words [role=alert]").all_inner_texts()
    assert "cannot be read as an image" in alerts[0]
    assert alerts[1].startswith("poster.png: 6000x5000 are 30 megapixels, and this page accepts 25; shrink it")
    assert page.locator("#shown img").count() == 0
    assert page.locator("#save").is_disabled()
    (tmp_path / "heavy.png").write_bytes(bytes(31_000_000))
    other = visit()
    drop(other, tmp_path / "heavy.png")
    other.wait_for_selector("text=/maximum allowed size/i")


def test_twenty_megapixels(visit, coffee, tmp_path):
    Image.open(coffee).resize((5480, 3650)).save(tmp_path / "large.jpg", quality=90)
    page = visit()
    drop(page, tmp_path / "large.jpg")
    urls = shown(page)
    assert pixels(page, urls[-1]).shape[2] == 1280
    with page.expect_download() as download:
        page.click("#save")
    with Image.open(download.value.path()) as image:
        assert image.size == (5480, 3650)


def test_concurrent_visitors_see_their_own_images(visit, coffee, estimates):
    one, other = visit(), visit()
    chelsea = coffee.with_name("chelsea_2.png")
    drop(one, coffee)
    drop(other, chelsea)
    for page, path in ((one, coffee), (other, chelsea)):
        clear = models.load().dehaze(images.read(path)[None])[0]
        assert any(is_close(pixels(page, url), clear) for url in shown(page))


def test_an_example_can_be_selected(visit):
    page = visit()
    page.locator("#samples button img").first.click()
    assert len(shown(page)) >= 2


def test_uploads_are_deleted_when_the_page_is_closed(visit, server, coffee):
    page = visit()
    drop(page, coffee)
    shown(page)
    folders = list(server[1].glob("dehaze-page-*/visitor-*"))
    assert folders
    page.click("#save")
    page.context.close()
    until = time.monotonic() + 40
    while any(folder.exists() for folder in folders) and time.monotonic() < until:
        time.sleep(0.5)
    assert not any(folder.exists() for folder in folders)


def test_the_page_is_local_by_default_and_reports_a_port_in_use(server):
    port = server[0].rsplit(":", 1)[1]
    command = [sys.executable, "-m", "page", "--port", port]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: 127.0.0.1, port {port}: the page cannot be served there (Address already in")
