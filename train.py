"""Train a dehazing method.

    python train.py --model nedr --checkpoints checkpoints/train_example
    python train.py --model nedr --checkpoints checkpoints/sample train.steps=500 train.batch=4
    python train.py --model nedr --checkpoints checkpoints/train_example --resume

An experiment is a folder. It holds config.yml (what differs from configs.yml) before the run; the run adds
settings.yml (all settings in force), last.pt (everything, to go on from), weights.safetensors (for test.py; the best
validated ones, or the latest where nothing is validated), log.txt, log.jsonl and tensorboard/.
key=value on the command line lies over both files. CUDA_VISIBLE_DEVICES chooses the GPU.
"""

import argparse
import math
import signal
import time
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

import models
from data import datasets, images
from utils import checkpoint, config, errors, scoring
from utils.averaging import EMA, recalibrate
from utils.device import autocast, pick
from utils.errors import UserError
from utils.logging import RunLog
from utils.updater import Updater, schedule


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="nedr", help="the method; --list-models names them")
    parser.add_argument("--checkpoints", default="checkpoints/train_example", help="the experiment's folder")
    parser.add_argument("--resume", action="store_true", help="go on from last.pt in the folder, if there is one")
    parser.add_argument("--list-models", action="store_true", help="name the methods and leave")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="settings over those of the files")
    options = parser.parse_intermixed_args(arguments)
    if options.list_models:
        print("\n".join(models.names()))
        return 0
    folder = Path(options.checkpoints)
    settings = config.load(options.model, models.settings_types(), [folder / "config.yml"], options.settings)
    run = Run(settings, folder, options.resume)
    with run.log:
        return run.train()


class Run:
    """One training run: what it is made of, what it remembers, and its loop."""

    def __init__(self, settings: config.Settings, folder: Path, resume: bool):
        self.settings, self.last, self.weights = settings, folder / "last.pt", folder / "weights.safetensors"
        if self.last.exists() and not resume:
            raise UserError(f"{folder} holds a run already: go on with --resume, or remove {self.last} to start anew")
        # What can be refused is refused here, before anything is built.
        self.device = pick(settings.device)
        self.autocast = lambda: autocast(self.device, settings.precision)
        self.autocast()
        self.stages = config.stages(settings)
        self.datasets = {stage.name: dataset(settings, stage.name) for stage in self.stages if stage.steps}
        self.pairs = validation_pairs(settings)
        saved = checkpoint.read(self.last) if self.last.exists() else None

        torch.manual_seed(settings.seed)
        torch.backends.cudnn.benchmark = True
        self.method = models.build(settings)
        if saved is None:
            self.method.start()
        self.method.to(self.device)
        self.ema = EMA(self.method, self.method.averaged, settings.train.ema)
        self.stage, self.step, self.best, self.signal = 0, 0, -math.inf, 0
        self.updater: Updater | None = None
        self.saved_updater: dict | None = None  # a resumed stage's, until its updater is made
        if saved is not None:
            self.load_state_dict(saved)
        self.log = RunLog(folder, self.global_step)
        (folder / "settings.yml").write_text(config.dump(settings), encoding="utf-8")
        self.log.say(f"{settings.model}, {self.device}, {settings.precision}, from step {self.global_step}")

    def train(self) -> int:
        """All stages, from where the run stands. A signal ends it after a whole step; returns the exit status."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda number, _: setattr(self, "signal", number))
        while not self.signal:
            if self.step < self.stages[self.stage].steps:
                self.train_stage(self.stages[self.stage])
            elif self.stage + 1 < len(self.stages):
                self.stage, self.step = self.stage + 1, 0
            else:
                break
        if self.signal:
            self.log.say(f"stopped after step {self.global_step}, saved in {self.last}; go on with --resume")
            return 128 + self.signal
        self.log.say(f"finished after step {self.global_step}; weights in {self.weights}")
        return 0

    def train_stage(self, stage: config.Stage) -> None:
        source, log = self.datasets[stage.name], self.settings.log
        start, stop = self.step * stage.per_step, stage.steps * stage.per_step
        pin = self.device.type == "cuda"
        batches = iter(datasets.loader(source, start, stop, stage.batch, self.settings.data.workers, pin))
        self.updater = self.make_updater(stage, source.epoch_length)
        self.method.train()
        clock, since = time.perf_counter(), self.step
        with tqdm(total=stage.steps, initial=self.step, desc=stage.name, unit="step", disable=None) as bar:
            while self.step < stage.steps and not self.signal:
                chunk = [self.receive(next(batches)) for _ in range(stage.accumulate)]
                terms = self.updater.step(lambda batch: self.method.losses(batch, stage.name), chunk)
                self.ema.update()
                self.step += 1
                bar.update()
                last = self.step == stage.steps
                if self.due(log.every):
                    figures = self.figures(terms)
                    bar.set_postfix({name: f"{value:.3f}" for name, value in figures.items()})
                    speed = (self.step - since) / (time.perf_counter() - clock)
                    speeds = {"steps_per_second": speed}
                    self.log.figures(
                        stage.name, self.global_step, loss=figures, learning_rate=self.rates(), speed=speeds
                    )
                    clock, since = time.perf_counter(), self.step
                if self.due(log.pictures_every):
                    with self.ema.applied() as method, self.autocast():
                        self.log.pictures(self.global_step, method.pictures(chunk[-1]))
                if self.due(log.validate_every) or last:
                    self.validate(stage)
                if self.due(log.save_every) or last or self.signal:
                    self.figures(terms)  # what is not finite is not saved
                    checkpoint.save(self.last, self.state_dict())

    def make_updater(self, stage: config.Stage, epoch_length: int) -> Updater:
        s, optimisers = self.settings, self.method.optimisers(stage.name)
        if stage.name == "warm_start":
            for group in (group for optimiser in optimisers.values() for group in optimiser.param_groups):
                group.update(lr=s.warm_start.learning_rate, weight_decay=s.warm_start.weight_decay)
        places = [epoch * epoch_length / stage.per_step for epoch in s.train.milestones]
        schedules = {k: schedule(o, stage.schedule, stage.steps, places, s.train.gamma) for k, o in optimisers.items()}
        updater = Updater(optimisers, schedules, self.device, s.precision, s.train.clip)
        if self.saved_updater is not None:
            updater.load_state_dict(self.saved_updater)
            self.saved_updater = None
        return updater

    def validate(self, stage: config.Stage) -> None:
        """Score the averaged weights on the validation pairs and keep them if they are the best so far."""
        count, source = self.settings.train.recalibrate, self.datasets[stage.name]
        with self.ema.applied() as method, self.autocast():
            if count:
                fresh = datasets.loader(source, 0, count * stage.batch, stage.batch, self.settings.data.workers)
                networks = [getattr(method, name) for name in method.inference]
                recalibrate(networks, (batch["hazy"].to(self.device) for batch in fresh))
            if not self.pairs:
                return self.export(method)
            with tqdm(total=len(self.pairs), desc="validating", leave=False, disable=None) as bar:
                pairs, tick = datasets.Paired(self.pairs), lambda *_: bar.update()
                means = scoring.mean(scoring.score(method.dehaze, pairs, device=self.device, on_result=tick))
            better = means.psnr > self.best
            if better:
                self.best = means.psnr
                self.export(method)
        figures = {"psnr": means.psnr, "ssim": means.ssim}
        self.log.figures(stage.name, self.global_step, validation=figures)
        self.log.say(
            f"step {self.global_step}: {means.psnr:.2f} dB, SSIM {means.ssim:.4f} on {len(self.pairs)} validation "
            f"pictures (hazy: {means.hazy_psnr:.2f} dB){', the best so far' if better else ''}"
        )

    def export(self, method: models.Method) -> None:
        weights = {k: v for k, v in method.state_dict().items() if k.split(".")[0] in method.inference}
        metadata = {"model": self.settings.model, "settings": config.to_dict(self.settings), "step": self.global_step}
        checkpoint.save_weights(self.weights, weights, metadata)

    @property
    def global_step(self) -> int:
        return sum(stage.steps for stage in self.stages[: self.stage]) + self.step

    def due(self, every: int) -> bool:
        return every > 0 and self.step % every == 0

    def receive(self, batch: dict) -> dict[str, Tensor]:
        """The batch on the device; pictures that could not be read were replaced and are named once."""
        for message in batch.pop("skipped"):
            self.log.warn_once(f"skipped: {message}")
        return {name: tensor.to(self.device, non_blocking=True) for name, tensor in batch.items()}

    def figures(self, terms: dict[str, Tensor]) -> dict[str, float]:
        figures = {name: term.item() for name, term in terms.items()}
        for name, value in figures.items():
            if not math.isfinite(value):
                raise UserError(
                    f"the loss '{name}' is {value} at step {self.global_step}; {self.last} is from before: lower the "
                    f"learning rate, set train.clip=1 or precision=float32, and go on with --resume"
                )
        return figures

    def rates(self) -> dict[str, float]:
        return {k: o.param_groups[0]["lr"] for k, o in self.updater.optimisers.items()}

    def state_dict(self) -> dict:
        return {
            "model": self.settings.model,
            "settings": config.to_dict(self.settings),
            "networks": self.method.state_dict(),
            "ema": self.ema.state_dict(),
            "updater": self.updater.state_dict(),
            "stage": self.stages[self.stage].name,
            "step": self.step,
            "best": self.best,
            "random": checkpoint.random_states(),
        }

    def load_state_dict(self, state: dict) -> None:
        if state.get("model") != self.settings.model:
            raise UserError(f"{self.last} is a checkpoint of {state.get('model')}, not of {self.settings.model}")
        checkpoint.load_strict(self.method, state["networks"], f"{self.last}")
        self.ema.load_state_dict(state["ema"])
        self.stage = [stage.name for stage in self.stages].index(state["stage"])
        self.step, self.best, self.saved_updater = state["step"], state["best"], state["updater"]
        checkpoint.set_random_states(state["random"])


def dataset(settings: config.Settings, stage: str) -> torch.utils.data.Dataset:
    """The stage's pictures. Raises `UserError` if they are not to be found."""
    data, warm, law = settings.data, settings.warm_start, settings.haze
    how = {"size": data.crop_size, "rule": data.crop, "flip": data.flip, "seed": settings.seed}
    how |= {"density": law.density, "airlight": law.airlight, "colour": law.colour}
    if stage == "warm_start":
        clear = required(warm.clear or data.clear, "warm_start.clear")
        return datasets.synthetic(clear, warm.depth, **how)
    return datasets.unpaired(data.hazy, required(data.clear, "data.clear"), data.depth, **how)


def required(source: str | None, key: str) -> str:
    if source is None:
        raise UserError(f"{key} is not set: name a folder or a .flist of clear pictures, on the command line {key}=PATH")
    return source


def validation_pairs(settings: config.Settings) -> list[tuple[Path, Path]]:
    """The validation pairs, or an evenly spread part of them; [] where none are set."""
    data, limit = settings.data, settings.log.validation_limit
    if data.validation_hazy is None:
        return []
    pairs = images.pair(data.validation_hazy, required(data.validation_clear, "data.validation_clear"))
    return pairs[:: max(1, math.ceil(len(pairs) / limit))] if limit else pairs


if __name__ == "__main__":
    errors.run(main)
