"""Train a dehazing method.

    python train.py --model nedr --checkpoints checkpoints/train_example train.batch=4
    python train.py --model nedr --checkpoints checkpoints/train_example --resume

An experiment is a folder with a config.yml (what differs from configs.yml; key=value lies over both). The run adds
settings.yml (all settings in force), last.pt (everything, to go on from), weights.safetensors (for test.py; the best
validated ones, or the latest), log.txt, log.jsonl and tensorboard/. CUDA_VISIBLE_DEVICES chooses the GPU.
"""

import argparse
import math
import signal
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

import models
from data import datasets
from utils import checkpoint, config, errors, scoring
from utils.averaging import EMA, recalibrate
from utils.device import autocast, pick
from utils.errors import UserError
from utils.logging import RunLog
from utils.updater import Updater, finite


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="nedr", help="the method; --list-models names them")
    parser.add_argument("--checkpoints", default="checkpoints/train_example", help="the experiment's folder")
    parser.add_argument("--resume", action="store_true", help="go on from last.pt in the folder, if there is one")
    parser.add_argument("--list-models", action="store_true", help="print size and paper of every method and leave")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="settings over those of the files")
    options = parser.parse_intermixed_args(arguments)
    if options.list_models:
        print(models.listing())
        return 0
    folder = Path(options.checkpoints)
    settings = config.load(options.model, models.settings_types(), [folder / "config.yml"], options.settings)
    run = Run(settings, folder, options.resume)
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, lambda number, _: setattr(run, "signal", number)) for number in numbers]
    try:
        with run.log:
            return run.train()
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


class Run:
    """One training run: what it is made of (what can be refused is refused first), its loop, and what it remembers."""

    def __init__(self, settings: config.Settings, folder: Path, resume: bool):
        self.settings, self.last, self.weights = settings, folder / "last.pt", folder / "weights.safetensors"
        if self.last.exists() and not resume:
            raise UserError(f"{folder} holds a run already: go on with --resume, or remove {self.last} to start anew")
        self.device = pick(settings.device)
        self.autocast = lambda: autocast(self.device, settings.precision)
        self.autocast()
        models.check_training(settings)
        self.stages = config.stages(settings)
        kinds = models.METHODS[settings.model].stages
        self.datasets = {each.name: datasets.training(settings, each.name, kinds[each.name]) for each in self.stages}
        self.validation = datasets.validation(settings)
        saved = checkpoint.read(self.last) if self.last.exists() else None

        torch.manual_seed(settings.seed)
        torch.backends.cudnn.benchmark = True
        self.method = models.build(settings)
        if saved is None:
            models.start(self.method, settings.train.init)
        self.method.to(self.device)
        self.ema = EMA(self.method, self.method.averaged, settings.train.ema)
        self.stage, self.step, self.best, self.signal = 0, 0, -math.inf, 0
        if saved is not None:
            self.load_state_dict(saved)
        self.updater = self.make_updater(saved and saved["updater"])
        self.log = RunLog(folder, self.global_step)
        for source in filter(None, (*self.datasets.values(), self.validation)):
            for remark in source.remarks:
                self.log.say(f"warning: {remark}")
        (folder / "settings.yml").write_text(config.dump(settings), encoding="utf-8")

    def train(self) -> int:
        """All stages, from where the run stands. A signal ends it after a whole step; returns the exit status."""
        self.log.say(f"{self.settings.model} on {self.device}, from step {self.global_step}")
        self.train_stage(self.stages[self.stage])
        while self.stage + 1 < len(self.stages) and not self.signal:
            self.stage, self.step = self.stage + 1, 0
            self.updater = self.make_updater()
            self.train_stage(self.stages[self.stage])
        if self.signal:
            self.log.say(f"stopped after step {self.global_step}, saved in {self.last}; go on with --resume")
            return 128 + self.signal
        self.log.say(f"finished after step {self.global_step}; weights in {self.weights}")
        return 0

    def make_updater(self, saved: dict | None = None) -> Updater:
        stage = self.stages[self.stage]
        optimisers, epoch = self.method.optimisers(stage.name, self.settings), self.datasets[stage.name].epoch_length
        return Updater(optimisers, stage, self.settings, self.device, epoch, saved)

    def train_stage(self, stage: config.Stage) -> None:
        source, log = self.datasets[stage.name], self.settings.log
        start, stop, workers = self.step * stage.per_step, stage.steps * stage.per_step, self.settings.data.workers
        loader = datasets.loader(source, start, stop, stage.batch, workers, pin=self.device.type == "cuda")
        bar = tqdm(total=stage.steps, initial=self.step, desc=stage.name, unit="step", disable=None)
        self.method.train()
        clock, since = time.perf_counter(), self.step
        with closing(iter(loader)) as batches, bar:
            while self.step < stage.steps and not self.signal:
                chunk = self.receive(batches, stage.accumulate)
                terms = self.updater.step(lambda batch: self.method.losses(batch, stage.name), chunk)
                self.ema.update()
                self.step += 1
                bar.update()
                last = self.step == stage.steps
                if self.due(log.every):
                    figures = finite(terms)
                    speed = {"steps_per_second": (self.step - since) / (time.perf_counter() - clock)}
                    bar.set_postfix(
                        {name: f"{figures[name]:.3f}" for name in self.updater.optimisers if name in figures}
                    )
                    self.log.figures(stage.name, self.global_step, loss=figures, rate=self.updater.rates(), speed=speed)
                    clock, since = time.perf_counter(), self.step
                if self.due(log.pictures_every):
                    with self.ema.applied() as method, self.autocast():
                        self.log.pictures(self.global_step, method.pictures(chunk[-1]))
                if self.due(log.validate_every) or last:
                    self.validate(stage)
                if self.due(log.save_every) or last or self.signal:
                    finite(terms)  # what is not finite is not saved
                    self.save()

    def receive(self, batches: Iterator[dict], count: int) -> list[dict[str, Tensor]]:
        """The next batches, on the device; pictures that could not be read were replaced and are named once."""
        try:
            received = [next(batches) for _ in range(count)]
        except UserError:  # not one picture is left
            if self.global_step:
                self.save()
            raise
        for message in (message for batch in received for message in batch.pop("skipped")):
            self.log.warn_once(f"skipped: {message}")
        return [{k: v.to(self.device, non_blocking=True) for k, v in batch.items()} for batch in received]

    def validate(self, stage: config.Stage) -> None:
        """Score the averaged weights on the validation pairs and keep them if they are the best so far."""
        count, source, workers = self.settings.train.recalibrate, self.datasets[stage.name], self.settings.data.workers
        with self.ema.applied() as method, self.autocast():
            if count:
                recalibrate(method, datasets.loader(source, 0, count * stage.batch, stage.batch, workers), self.device)
            if self.validation is None:
                return self.export(method)
            mean = scoring.mean(scoring.score(method.dehaze, self.validation, device=self.device, bar="validating"))
            psnr, ssim, hazy = (mean[key] for key in ("ours.psnr", "ours.ssim", "hazy.psnr"))
            if better := psnr > self.best:
                self.best = psnr
                self.export(method)
        self.log.figures(stage.name, self.global_step, validation={"psnr": psnr, "ssim": ssim})
        self.log.say(
            f"step {self.global_step}: {psnr:.2f} dB, SSIM {ssim:.4f} on {len(self.validation)} validation pictures "
            f"(hazy: {hazy:.2f} dB){', the best so far' if better else ''}"
        )

    def export(self, method: models.Method) -> None:
        checkpoint.save_weights(self.weights, method.inference_state(), {"step": self.global_step} | self.identity())

    def identity(self) -> dict:
        return {"model": self.settings.model, "settings": config.to_dict(self.settings)}

    @property
    def global_step(self) -> int:
        return sum(stage.steps for stage in self.stages[: self.stage]) + self.step

    def due(self, every: int) -> bool:
        return every > 0 and self.step % every == 0

    def save(self) -> None:
        state = self.identity() | {
            "networks": self.method.state_dict(),
            "ema": self.ema.state_dict(),
            "updater": self.updater.state_dict(),
            "stage": self.stages[self.stage].name,
            "step": self.step,
            "best": self.best,
            "random": checkpoint.random_states(),
        }
        checkpoint.save(self.last, state)

    def load_state_dict(self, state: dict) -> None:
        if state.get("model") != self.settings.model:
            raise UserError(f"{self.last} is a checkpoint of {state.get('model')}, not of {self.settings.model}")
        checkpoint.load_strict(self.method, state["networks"], f"{self.last}")
        self.ema.load_state_dict(state["ema"])
        if state["stage"] not in self.datasets:
            raise UserError(f"{self.last} stands in the stage {state['stage']}, which now has no steps; give it some")
        self.stage = list(self.datasets).index(state["stage"])
        self.step, self.best = state["step"], state["best"]
        checkpoint.set_random_states(state["random"])


if __name__ == "__main__":
    errors.run(main)
