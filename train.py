"""Train a dehazing method.

    python train.py --model nedr --checkpoints checkpoints/train_example train.batch=4
    python train.py --model nedr --checkpoints checkpoints/train_example --resume

An experiment is a folder with a config.yml (what differs from configs.yml; key=value lies over both). The run adds
settings.yml (all settings in force), last.pt (everything, to go on from), weights.safetensors (for test.py; the best
validated ones of the present stage, or the latest), warm_start.safetensors (those of a warm start that is over),
log.txt, log.jsonl, tensorboard/ and nonfinite/ (images whose losses were no numbers). What may change over a resume
stands in utils/training/resuming.py. CUDA_VISIBLE_DEVICES chooses the GPU; torchrun --nproc_per_node N train.py ...
takes N of them (docs/distributed.md).
"""

import argparse
import contextlib
import functools
import math
import shutil
from collections.abc import Iterator, Sequence
from contextlib import closing
from itertools import chain, takewhile
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

import models
from data import datasets, images, loading
from data.cache import Cache
from utils import batchnorm, checkpoint, config, device, distributed, errors, files, lock, memory
from utils.batchnorm import recalibrate
from utils.device import autocast
from utils.errors import UserError
from utils.evaluation import scoring, selection
from utils.training import batch_size, progress, resuming, signals
from utils.training.compiling import compile_networks
from utils.training.divergence import Divergence, Step
from utils.training.ema import EMA, buffers_kept
from utils.training.progress import Progress
from utils.training.run_log import NullLog, RunLog, Speed
from utils.training.updater import Updater, finite, remedy

ASIDE = 4  # steps, and images of each batch, that are set aside where losses are no numbers


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
    memory.keep_memory()
    folder = Path(options.checkpoints)
    with distributed.group() as ranks:
        settings = config.load(options.model, models.settings_types(), [folder / "config.yml"], options.settings)
        with lock.held(folder) if ranks.first else contextlib.nullcontext("") as remark:
            run = Run(settings, folder, options.resume, ranks)
            ending = signals.handled(run.signal, at_once=ranks.world == 1)  # torchrun says everything twice
            with ending, run.log, device.determined(run.device):
                if remark:
                    run.log.say(f"warning: {remark}")
                return run.train()


class Run:
    """One training run: what it is made of (what can be refused is refused first), its loop, and what it remembers."""

    def __init__(self, settings: config.Settings, folder: Path, resume: bool, ranks: distributed.Ranks):
        self.settings = settings
        self.ranks = ranks
        self.folder = folder
        self.last = folder / "last.pt"
        self.weights = folder / "weights.safetensors"
        self.aside = folder / "nonfinite"
        self.signalled, self.ending = 0, 0  # signals: to this process, and as all agreed on
        self.terms: dict[str, Tensor] = {}
        self.check(resume)
        saved = checkpoint.read(self.last) if self.last.exists() else None
        changed = resuming.changes(saved, settings, self.last) if saved is not None else {}
        ranks.check_same(saved and [saved.get("stage"), saved.get("step")], self.last)
        self.build()
        self.restore(saved, changed)
        self.begin_log(changed)

    def check(self, resume: bool) -> None:
        """Refuse what cannot be trained, before anything is built; finds the device and the images."""
        settings = self.settings
        if self.last.exists() and not resume:
            raise UserError(
                f"{self.folder} holds a run already: go on with --resume, or remove {self.last} to start anew"
            )
        if self.weights.resolve() == models.shipped(settings.model) and not self.last.exists():
            raise UserError(
                f"{self.weights} ships with this project, and training in its folder would replace it: copy "
                f"{self.folder / 'config.yml'} into a new folder and name that"
            )
        self.device = self.ranks.pick(settings.device)
        self.autocast = lambda: autocast(self.device, settings.precision)
        self.autocast()
        device.prepare(self.device, settings.precision, settings.deterministic)
        models.check_training(settings)
        self.at = Progress(progress.stages(settings), self.ranks.world)
        kinds = models.METHODS[settings.model].stages
        cache = Cache(settings.data.cache / self.ranks.local_world, settings.data.border, settings.data.short_side)
        self.datasets = {
            each.name: datasets.training(settings, each.name, kinds[each.name], cache) for each in self.at.stages
        }
        self.validation = datasets.validation(settings)

    def build(self) -> None:
        """The method, alike in all processes, and its average."""
        settings, ranks = self.settings, self.ranks
        checkpoint.seed(settings.seed)
        torch.backends.cudnn.benchmark = not settings.deterministic
        self.method = models.build(settings)
        if not self.last.exists():
            models.start(self.method, settings.train.init)
        if settings.train.checkpointing:
            self.method.save_memory()
        self.method.to(self.device)
        ranks.broadcast(self.method)
        if settings.train.sync_batchnorm and ranks.world > 1:
            batchnorm.synchronise(self.method)
        self.ema = EMA(self.method, self.method.averaged, settings.train.ema)
        ranks.start(settings.seed)

    def restore(self, saved: dict | None, changed: dict) -> None:
        """Go on from the checkpoint ``saved``, of which the settings ``changed`` are others now; or from the start."""
        if saved is not None:
            self.load_state_dict(saved)
        if changed.keys() & resuming.CHOICE:
            self.at.best = -math.inf  # it was the best on other images
        self.updater = self.make_updater(saved and saved["updater"])
        networks = [self.method] if self.ema.average is None else [self.method, self.ema.average]
        self.divergence = Divergence(networks, self.at.global_step)
        self.saved = self.at.global_step

    def begin_log(self, changed: dict) -> None:
        """Open the log, with what is to be said first, and write settings.yml."""
        settings, first = self.settings, self.ranks.first
        self.log = RunLog(self.folder, self.at.global_step) if first else NullLog()
        if settings.compile:
            compile_networks(self.method.named_children(), self.device, self.log.say)
        for line in resuming.told(changed):
            self.log.say(line)
        sources = filter(None, (*self.datasets.values(), self.validation))
        remarks = device.remarks(self.device, settings.precision, settings.deterministic)
        for remark in (*remarks, *(remark for source in sources for remark in source.remarks)):
            self.log.say(f"warning: {remark}")
        if first:
            files.write_text(self.folder / "settings.yml", config.dump(settings))

    def signal(self, number: int) -> None:
        self.signalled = number

    def train(self) -> int:
        """All stages, from where the run stands. A signal ends it after a whole step; returns the exit status."""
        at, step = self.at, lambda: self.at.global_step
        self.log.say(f"{self.settings.model} on {self.device}{self.ranks.remark}, from step {step()}")
        self.train_stage(at.stage)
        while not (at.last_stage or self.ending):
            self.keep_weights()
            at.next_stage()
            self.updater = self.make_updater()
            self.train_stage(at.stage)
        if self.ending:
            self.log.say(f"stopped after step {step()}, saved in {self.last}; go on with --resume")
            return 128 + self.ending
        self.log.say(f"finished after step {step()}; weights in {self.weights}")
        return 0

    def make_updater(self, saved: dict | None = None) -> Updater:
        name = self.at.stage.name
        optimisers, epoch = self.method.optimisers(name, self.settings), self.datasets[name].epoch_length
        return Updater(
            optimisers, self.at.stage, self.settings, self.device, epoch, saved, ranks=self.ranks, ahead=self.at.ahead
        )

    def loader(self, stage: progress.Stage, start: int, batches: int) -> DataLoader:
        """So many batches for each process, from position ``start`` of the stage's images on."""
        stop, how = start + batches * stage.batch * self.ranks.world, {"pin": self.device.type == "cuda"}
        how |= {"workers": self.settings.data.workers, "rank": self.ranks.rank, "world": self.ranks.world}
        return loading.loader(self.datasets[stage.name], start, stop, stage.batch, **how)

    def train_stage(self, stage: progress.Stage) -> None:
        at, log = self.at, self.settings.log
        waiting = loading.Waiting(self.loader(stage, at.seen, (stage.steps - at.step) * stage.accumulate))
        speed, shown = Speed(at.step, at.per_step, waiting), {"disable": None if self.ranks.first else True}
        bar = tqdm(total=stage.steps, initial=at.step, desc=stage.name, unit="step", **shown)
        guard = batch_size.Guard(self.method, stage, self.settings, self.device, self.ranks)
        self.method.train()
        saves = False  # is it time to? Not after a step that was left out, but after the next
        with closing(loading.ahead(waiting, self.device)) as batches, bar:
            if not at.validated:
                self.validate(stage)
                self.save()
            while not at.stage_ends and (chunk := self.receive(batches, stage.accumulate)):
                self.terms = guard.step(self.updater, chunk)
                self.ranks.average_statistics(self.method)
                at.advance()
                self.divergence.after(at.global_step, self.updater.left_out, self.terms, chunk)
                saves = saves or at.due(log.save_every) or at.stage_ends
                self.check_steps(saves or at.due(log.every) or at.due(log.validate_every))
                if not self.divergence.row:
                    self.ema.update()
                bar.update()
                if at.due(log.every) and not self.divergence.row:
                    self.tell(stage, self.ranks.mean(speed.figures(at.step)), bar)
                if at.due(log.pictures_every) and self.ranks.first:
                    with self.looking() as method:
                        self.log.pictures(at.global_step, method.sample_images(chunk[-1]))
                if at.due(log.validate_every) or at.stage_ends:
                    self.validate(stage)
                if saves and not self.divergence.row:
                    self.save()
                    saves = False
        [self.ending] = self.ranks.all_max(self.signalled)
        if self.ending and not at.stage_ends:
            self.save()

    def tell(self, stage: progress.Stage, pace: dict[str, float], bar: tqdm) -> None:
        """Log the figures of the last step, and show some on the ``bar``."""
        figures, step = self.losses(), self.at.global_step
        bar.set_postfix({name: f"{figures[name]:.3f}" for name in self.updater.optimisers if name in figures})
        self.log.figures(stage.name, step, loss=figures, rate=self.updater.rates(), speed=pace)
        for remark in self.method.training_warnings(stage.name, self.at.step, figures):
            self.log.warn_once(remark)

    def check_steps(self, wait: bool) -> None:
        """Tell of the steps that were left out, and raise `UserError` after too many, or at the end of the stage."""
        for step in self.divergence.known(wait):
            self.log.warn_once(f"step {step.number} was left out: {step.what()}; images in {self.set_aside(step)}")
            row, ends = self.divergence.row, self.at.stage_ends and step.number == self.at.global_step
            if ends or row >= self.settings.train.nonfinite:
                if self.divergence.good > self.saved:
                    self.save()
                last = f"the last {row} steps were" if row > 1 else "the last step was"
                told = remedy(self.at.stage.name, self.settings.model)
                raise UserError(f"{last} left out (images in {self.aside}): {step.what()}; {told}")

    def set_aside(self, step: Step) -> Path:
        """Write the first images of a step that was left out, of a few steps; returns where they are."""
        folder = self.aside / f"step_{step.number}{f'_{self.ranks.rank}' if self.ranks.rank else ''}"
        if self.aside.is_dir() and len(list(self.aside.iterdir())) >= ASIDE:
            return self.aside
        for k, batch in enumerate(step.batches):
            shown = {name: value for name, value in batch.items() if isinstance(value, Tensor) and value.dim() == 4}
            for name, value in shown.items():
                for n, each in enumerate(value[:ASIDE] if value.shape[1] == 3 else ()):
                    images.write(folder / f"{k}_{n}_{name}.png", each.float().cpu().nan_to_num().clamp(0, 1))
        return folder

    def receive(self, batches: Iterator[dict], count: int) -> list[dict[str, Tensor]]:
        """The next batches, on the device; none after a signal. All processes go on together, or stop together.

        Images that could not be read were replaced and are named once.
        """
        received, failure = [], ""
        try:
            received = [] if self.signalled else [next(batches) for _ in range(count)]
        except UserError as error:  # not one image is left
            failure = str(error)
        skipped = [message for batch in received for message in batch.pop("skipped")]
        self.ending, failed, news = self.ranks.all_max(self.signalled, bool(failure), bool(skipped))
        for message in chain(*self.ranks.all_gather(skipped)) if news else ():
            self.log.warn_once(f"skipped: {message}")
        if failed:
            failure = next(filter(None, self.ranks.all_gather(failure)))
            if self.at.global_step:
                self.save()
            raise UserError(failure)
        return [] if self.ending else received

    @contextlib.contextmanager
    def looking(self) -> Iterator[models.Method]:
        """Inside, the averaged weights may be looked at; the run goes on as if nobody had."""
        with (
            checkpoint.unmoved_random_states(),
            device.varied_sizes(),
            self.ema.applied() as method,
            buffers_kept(method),
            self.autocast(),
        ):
            yield method

    def losses(self) -> dict[str, float]:
        """Those of the last step, over all processes. Raises `UserError` where one is no number."""
        return finite(self.ranks.mean(self.terms), self.at.stage.name, self.settings.model)

    def validate(self, stage: progress.Stage) -> None:
        """Score the averaged weights on the validation pairs and keep them if they are the best of their stage.

        A signal cuts it short; the resumed run then begins with it.
        """
        at, pairs, step = self.at, self.validation, self.at.global_step
        at.validated = False
        with self.looking() as method:
            scores = self.scores(stage, method)
            if None in scores:
                return
            at.validated = True
            if pairs is None:
                return self.export(method)
            mean = scoring.mean(scores)
            psnr, ssim, hazy = (mean[key] for key in ("ours.psnr", "ours.ssim", "hazy.psnr"))
            if better := psnr > at.best:
                at.best = psnr
                self.export(method)
        self.log.figures(stage.name, step, validation={"psnr": psnr, "ssim": ssim})
        self.log.say(
            f"step {step}: {psnr:.2f} dB, SSIM {ssim:.4f} on {len(pairs)} validation images "
            f"(hazy: {hazy:.2f} dB){', the best of this stage so far' if better else ''}"
        )

    def scores(self, stage: progress.Stage, method: models.Method) -> list[scoring.Score | None]:
        """Of the validation images, by all processes; with None among them where a signal came before the end."""
        count, ranks, pairs = self.settings.train.recalibrate, self.ranks, self.validation
        if count:
            recalibrate(method, takewhile(lambda _: not self.signalled, self.loader(stage, 0, count)), self.device)
            ranks.average_statistics(method)
        if any(ranks.all_max(self.signalled)):
            return [None]

        def dehaze(hazy: Tensor) -> Tensor:
            if self.signalled:
                raise signals.LeftError
            return method.dehaze(hazy, method.tile(hazy, self.settings.test.tile))

        def score(items: Sequence[dict]) -> list[scoring.Score | None]:
            try:
                return scoring.score(dehaze, items, device=self.device, bar="validating" if ranks.first else None)
            except signals.LeftError:
                return [None] * len(items)

        return [] if pairs is None else ranks.map(score, pairs)

    def export(self, method: models.Method) -> None:
        if self.ranks.first:
            metadata = {"step": self.at.global_step, "stage": self.at.stage.name, "chosen_on": self.chosen_on}
            metadata |= self.identity()
            weights = checkpoint.halved(method.inference_state(), self.settings.train.export)
            checkpoint.save_weights(self.weights, weights, metadata)

    @functools.cached_property
    def chosen_on(self) -> dict | None:
        """What the exported weights are chosen on; None where they are simply the latest."""
        if self.validation is None:
            return None
        data, truths = self.settings.data, dict.fromkeys(clear for _, clear in self.validation.pairs)
        names, prints = data.validation_pairs or [data.validation_clear], map(images.read, truths)
        return selection.chosen_on(names, len(self.validation), [selection.fingerprint(each) for each in prints])

    def keep_weights(self) -> None:
        """Put the weights of a stage that is over beside those of the next, under the stage's name.

        Where they are the next stage's already, whose beginning was not saved before the run died, it was done then.
        """
        if not (self.ranks.first and self.weights.exists()):
            return
        if checkpoint.read_metadata(self.weights).get("stage") == self.at.stage.name:
            with files.atomic(self.weights.with_stem(self.at.stage.name)) as temporary:
                shutil.copyfile(self.weights, temporary)

    def identity(self) -> dict:
        return {"model": self.settings.model, "settings": config.to_dict(self.settings)}

    def save(self) -> None:
        """Write last.pt; weights that are not finite are not saved."""
        state = self.identity() | self.at.state_dict() | self.ranks.states(self.method)
        state |= {"networks": self.method.state_dict(), "ema": self.ema.state_dict()}
        state |= {"updater": self.updater.state_dict()}
        checkpoint.check_finite(state["networks"] | state["ema"].get("weights", {}), self.last)
        if self.ranks.first:
            self.log.flush()  # first: what was logged up to a saved step is never lost
            checkpoint.save(self.last, state)
        self.saved = self.at.global_step
        self.remember()

    def remember(self) -> None:
        """What an error is to say of the state that is saved."""
        self.ranks.saved = f"{self.last} is from step {self.at.global_step}: go on with --resume"

    def load_state_dict(self, state: dict) -> None:
        checkpoint.load_strict(self.method, state["networks"], f"{self.last}")
        self.ema.load_state_dict(state["ema"])
        self.at.load_state_dict(state)
        self.ranks.restore(state, self.method, self.settings.seed, self.at.global_step)
        self.remember()


if __name__ == "__main__":
    errors.run(main)
