"""test.py on clips: every frame dehazed without flicker, with the sound and the timestamps of the original."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from data import video
from models.temporal import TemporalFilter
from utils import config, output
from utils.config import Settings
from utils.device import autocast
from utils.errors import UserError, quoted
from utils.evaluation import scoring
from utils.training import signals

if TYPE_CHECKING:
    from models.candidates import Tested

FOLDER = "videos"  # of the output
STOPPED = 130


def run(paths: Sequence[Path], tested: Sequence[Tested], settings: Settings, device: torch.device, out: Path) -> int:
    """Dehaze all ``paths`` by each method. -> exit status: 0; 2 if a clip was unusable or broken; 130 if stopped."""
    if video.is_clip(out) and len(tested) > 1:
        raise UserError(f"--output {quoted(out)}: one file for {len(tested)} methods; name a folder")
    status = 0
    for path in paths:
        for each in tested:
            folder = out / FOLDER / (each.folder if len(tested) > 1 else "")
            try:
                result = _dehaze_clip(path, each, settings, device, out if video.is_clip(out) else folder)
            except UserError as error:
                print(f"error: {error}", file=sys.stderr)
                result = 2
            if result == STOPPED:
                return result
            status = max(status, result)
    return status


def check(paths: Sequence[Path], test: config.Test) -> None:
    """Raise `UserError` for inputs and options that cannot be combined with clips."""
    if others := [path for path in paths if not video.is_clip(path)]:
        raise UserError(f"{others[0]} is no clip, but {paths[0]} is; give clips and images in two commands")
    if test.clear or test.metrics:
        raise UserError("clips are dehazed, not scored; leave out --clear and --metrics, or score a folder of frames")
    if video.is_clip(test.output or "") and len(paths) > 1:
        raise UserError(f"--output {quoted(test.output)}: one file for {len(paths)} clips; name a folder")
    names: dict[str, Path] = {}
    for path in paths:
        name = f"{path.stem}{video.extension(path)}"
        if (other := names.setdefault(name.casefold(), path)) != path:
            raise UserError(f"{other} and {path} would both be written as {name}; rename one, or give two commands")
    video.library()


def _dehaze_clip(path: Path, tested: Tested, settings: Settings, device: torch.device, out: Path) -> int:
    reader = video.Reader(path)
    try:
        target = out if video.is_clip(out) else out / _name(path, reader, settings.test.suffix)
        if target.exists() and not settings.test.overwrite:
            print(f"{target} is there already and left as it is (--overwrite replaces it)")
            return 0
        if target.suffix.lower() not in video.WRITTEN:
            raise UserError(f"--output {target}: clips are written as {', '.join(video.WRITTEN)}; use such a suffix")
        for remark in reader.remarks:
            print(f"{path}: {remark}", file=sys.stderr)
        frame_plan = plan(tested, settings, device, str(path), float(reader.rate))
        return _convert(reader, target, frame_plan, settings, device)
    finally:
        reader.close()


def _name(path: Path, reader: video.Reader, suffix: str | None) -> str:
    name = Path(video.name(path, reader))
    return f"{name.stem}{suffix or ''}{name.suffix}"


class Plan(NamedTuple):
    """How frames (1,3,H,W) are dehazed: a step that may run in parallel and one that runs in the frames' order."""

    parallel: Callable[[Tensor, int], Any]  # frame and its number -> intermediate result
    in_order: Callable[[Tensor, Any], Tensor]  # frame and intermediate result -> output


def plan(tested: Tested, settings: Settings, device: torch.device, name: str, rate: float = 25.0) -> Plan:
    """Averages over time; a method that estimates no transmission runs frame by frame, with a warning.

    The output is t if test.show=transmission. ``name`` appears in the error for too little memory.
    """
    method, test = tested.method.to(device), settings.test
    if test.self_ensemble:
        raise UserError("test.self_ensemble=true: of single images, not over time; leave it out")
    memory = scoring.Remedies("set test.tile=512 or shrink the frames")

    def apply(function: Callable, hazy: Tensor, *options: Any) -> Any:
        item = {"hazy": hazy[0], "name": name}
        with scoring.enough_memory(item, device, memory), autocast(device, settings.precision):
            return function(hazy, *options, method.tile(hazy, test.tile))

    outputs = method.estimate(torch.zeros(1, 3, 32, 32, device=device))
    if "airlight" not in outputs:
        if test.show == "transmission" or test.strength != 1:
            method.require_haze(outputs, f"test.show={test.show}, test.strength={test.strength:g}")
        print(f"{tested.name} finds no transmission, so it goes frame by frame and may flicker", file=sys.stderr)
        return Plan(lambda hazy, number: apply(method.dehaze, hazy), lambda hazy, clear: clear)
    average = TemporalFilter(method, test.smoothing, rate, test.strength, test.every)
    shown = "transmission" if test.show == "transmission" else "clear"
    return Plan(partial(apply, average.estimate_haze), lambda hazy, haze: apply(average.dehaze_next, hazy, haze)[shown])


def _convert(reader: video.Reader, target: Path, frame_plan: Plan, settings: Settings, device: torch.device) -> int:
    """Dehaze frame by frame until the clip ends, breaks or is stopped; the file written so far is playable."""
    height, width = reader.size
    double = settings.test.show == "side_by_side"
    crf = round(51 - 0.36 * settings.test.quality)  # 95: 17, visually lossless; 50: 33
    writer = video.Writer(target, reader, crf, (height, width * (1 + double)))
    stopped: list[int] = []
    errors: list[str] = []
    count = 0
    started = time.perf_counter()

    def stop(number: int) -> None:
        if stopped:
            raise KeyboardInterrupt
        stopped.append(number)

    bar = tqdm(total=reader.total, desc=target.name, unit="frame", leave=False, disable=None)
    with signals.handled(stop), bar, closing(_processed(reader, writer, frame_plan.parallel, device)) as frames:
        try:
            for frame, hazy, intermediate in frames:
                if stopped:
                    break
                result = frame_plan.in_order(hazy, intermediate)[0].float()
                writer.write(output.shown(hazy[0], result, settings.test), frame.pts, frame.duration)
                count += 1
                bar.update()
        except video.UnwrittenError:
            raise
        except UserError as error:
            errors.append(str(error))
    writer.close()
    return _report(reader, target, count, time.perf_counter() - started, stopped, errors)


def _processed(
    reader: video.Reader, writer: video.Writer, function: Callable, device: torch.device
) -> Iterator[tuple[video.Frame, Tensor, Any]]:
    """The frames in order, each with its result of ``function``; sound is passed on to ``writer`` meanwhile.

    On a CPU one frame per PyTorch thread, each with one thread: threads that share a frame wait for each other.
    """
    threads = torch.get_num_threads()
    workers = threads if device.type == "cpu" else 1
    waiting: deque[tuple[video.Frame, Tensor, Future]] = deque()
    number = 0
    pool = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,))
    try:
        torch.set_num_threads(1)
        for each in reader:
            if not isinstance(each, video.Frame):
                writer.pass_on(each)
                continue
            hazy = each.pixels.to(device)
            waiting.append((each, hazy, pool.submit(function, hazy, number)))
            number += 1
            if len(waiting) > workers:
                frame, hazy, future = waiting.popleft()
                yield frame, hazy, future.result()
        for frame, hazy, future in waiting:
            yield frame, hazy, future.result()
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)


def _report(
    reader: video.Reader, target: Path, count: int, seconds: float, stopped: list[int], errors: list[str]
) -> int:
    total = f" of {reader.total}" if stopped and reader.total else ""
    pace = f"{count / max(seconds, 1e-9):.1f} frames/s"
    print(f"{count}{total} frames done in {seconds:.1f} s ({pace}){', stopped' if stopped else ''}; see {target}")
    for message in [*errors, *(f"{reader.path}: {problem}" for problem in reader.broken)]:
        print(f"error: {message}", file=sys.stderr)
    return STOPPED if stopped else 2 if errors or reader.broken else 0
