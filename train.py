"""Train a dehazing method.

    python train.py --model nedr --checkpoints checkpoints/train_example train.batch=4
    python train.py --model nedr --checkpoints checkpoints/train_example --resume

An experiment is a folder with a config.yml (overrides of configs.yml; key=value overrides both). The run adds
settings.yml (all settings in force), last.pt (the complete state, for --resume), weights.safetensors (for test.py; the
best validated weights of the current stage, or the latest), warm_start.safetensors (the weights of a finished warm
start), log.txt, log.jsonl, tensorboard/ and nonfinite/ (images whose losses were NaN or infinite). Which settings may
change on --resume is defined in utils/training/resuming.py. CUDA_VISIBLE_DEVICES chooses the GPU;
torchrun --nproc_per_node N train.py ... uses N of them (docs/distributed.md).
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
from utils.training import batch_size, resuming, signals
from utils.training.compiling import compile_networks
from utils.training.divergence import Divergence, Step
from utils.training.ema import EMA, buffers_restored
from utils.training.progress import Progress, Stage, stages
from utils.training.run_log import NullLog, RunLog, Speed
from utils.training.updater import Updater, finite, remedy

MAX_REJECTED = 4  # steps, and images of each of their batches, that are saved where losses are NaN or infinite


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="nedr", help="the method; --list-models names them")
    parser.add_argument("--checkpoints", default="checkpoints/train_example", help="the experiment's folder")
    parser.add_argument("--resume", action="store_true", help="continue from last.pt in the folder, if there is one")
    parser.add_argument("--list-models", action="store_true", help="print size and paper of every method and exit")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="overrides of the settings in the files")
    options = parser.parse_intermixed_args(arguments)
    if options.list_models:
        print(models.listing())
        return 0
    memory.keep_memory()
    folder = files.expand_home(options.checkpoints)
    with distributed.group() as ranks:
        settings = config.load(options.model, models.settings_types(), [folder / "config.yml"], options.settings)
        with lock.held(folder) if ranks.first else contextlib.nullcontext("") as warning:
            run = Run(settings, folder, options.resume, ranks)
            handler = signals.handled(run.signal, at_once=ranks.world == 1)  # torchrun sends every signal twice
            with handler, run.log, device.deterministic_errors(run.device):
                if warning:
                    run.log.say(f"warning: {warning}")
                return run.train()


class Run:
    """One training run: its parts (checked before they are built), its loop, and its state."""

    def __init__(self, settings: config.Settings, folder: Path, resume: bool, ranks: distributed.Ranks):
        self.settings = settings
        self.ranks = ranks
        self.folder = folder
        self.last = folder / "last.pt"
        self.weights = folder / "weights.safetensors"
        self.rejected_images = folder / "nonfinite"
        self.signalled = 0  # the number of a signal to this process
        self.ending = 0  # the same, agreed on by all processes
        self.terms: dict[str, Tensor] = {}
        self.check(resume)
        saved = checkpoint.read(self.last) if self.last.exists() else None
        changed = resuming.changes(saved, settings, self.last) if saved is not None else {}
        ranks.check_same(saved and [saved.get("stage"), saved.get("step")], self.last)
        self.build()
        self.restore(saved, changed)
        self.begin_log(changed)

    def check(self, resume: bool) -> None:
        """Refuse what cannot be trained, before anything is built; also selects the device and lists the images."""
        settings = self.settings
        if self.last.exists() and not resume:
            raise UserError(
                f"{self.folder} holds a run already: continue with --resume, or remove {self.last} to start again"
            )
        if self.weights.resolve() in map(models.shipped, models.names()) and not self.last.exists():
            raise UserError(
                f"{self.weights} ships with this project, and training in its folder would replace it: copy "
                f"{self.folder / 'config.yml'} into a new folder and train there"
            )
        self.device = self.ranks.pick(settings.device)
        self.autocast = lambda: autocast(self.device, settings.precision)
        self.autocast()
        device.prepare(self.device, settings.precision, settings.deterministic)
        models.check_training(settings)
        self.progress = Progress(stages(settings), self.ranks.world)
        kinds = models.METHODS[settings.model].stages
        cache = Cache(settings.data.cache / self.ranks.local_world, settings.data.border, settings.data.short_side)
        self.datasets = {
            each.name: datasets.training(settings, each.name, kinds[each.name], cache) for each in self.progress.stages
        }
        self.validation = datasets.validation(settings)

    def build(self) -> None:
        """Build the method, with the same weights in all processes, and its average."""
        settings = self.settings
        ranks = self.ranks
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
        """Continue from the checkpoint ``saved``, whose settings ``changed`` differ now; or start at step 0."""
        if saved is not None:
            self.load_state_dict(saved)
        if changed.keys() & resuming.VALIDATION_SETTINGS:
            self.progress.best = -math.inf  # the recorded score is of other images
        if f"{self.progress.stage.name}.steps" in changed and self.progress.stage_ends:
            self.progress.validated = False  # the last step has become another one, which is not validated
        self.updater = self.make_updater(saved and saved["updater"])
        networks = [self.method] if self.ema.average is None else [self.method, self.ema.average]
        self.divergence = Divergence(networks, self.progress.global_step)
        self.saved = self.progress.global_step

    def begin_log(self, changed: dict) -> None:
        """Open the log, write its first lines, and write settings.yml."""
        settings = self.settings
        first = self.ranks.first
        self.log = RunLog(self.folder, self.progress.global_step) if first else NullLog()
        if settings.compile:
            compile_networks(self.method.named_children(), self.device, self.log.say)
        for line in resuming.log_lines(changed):
            self.log.say(line)
        sources = filter(None, (*self.datasets.values(), self.validation))
        warnings = device.warnings(self.device, settings.precision, settings.deterministic)
        if self.validation is None and settings.data.validation_clear is not None:
            warnings = [*warnings, "nothing is validated: data.validation_clear is set, data.validation_hazy is not"]
        for warning in (*warnings, *(remark for source in sources for remark in source.remarks)):
            self.log.say(f"warning: {warning}")
        if first:
            files.write_text(self.folder / "settings.yml", config.dump(settings))

    def signal(self, number: int) -> None:
        self.signalled = number

    def train(self) -> int:
        """Train all remaining stages. A signal ends the run after a complete step. Returns the exit status."""
        progress = self.progress
        self.log.say(f"{self.settings.model} on {self.device}{self.ranks.remark}, from step {progress.global_step}")
        self.train_stage(progress.stage)
        while not (progress.last_stage or self.ending):
            self.keep_weights()
            progress.next_stage()
            self.updater = self.make_updater()
            self.train_stage(progress.stage)
        if self.ending:
            self.log.say(f"stopped after step {progress.global_step}, saved in {self.last}; continue with --resume")
            return 128 + self.ending
        self.log.say(f"finished after step {progress.global_step}; weights in {self.weights}")
        return 0

    def make_updater(self, saved: dict | None = None) -> Updater:
        stage = self.progress.stage
        optimisers = self.method.optimisers(stage.name, self.settings)
        epoch = self.datasets[stage.name].epoch_length
        ahead = self.progress.ahead
        return Updater(optimisers, stage, self.settings, self.device, epoch, saved, ranks=self.ranks, ahead=ahead)

    def loader(self, stage: Stage, start: int, batches: int) -> DataLoader:
        """A loader of ``batches`` batches for each process, from position ``start`` of the stage's images on."""
        stop = start + batches * stage.batch * self.ranks.world
        options = {"pin": self.device.type == "cuda", "workers": self.settings.data.workers}
        options |= {"rank": self.ranks.rank, "world": self.ranks.world}
        return loading.loader(self.datasets[stage.name], start, stop, stage.batch, **options)

    def train_stage(self, stage: Stage) -> None:
        progress = self.progress
        log = self.settings.log
        waiting = loading.Waiting(self.loader(stage, progress.seen, (stage.steps - progress.step) * stage.accumulate))
        speed = Speed(progress.step, progress.per_step, waiting)
        hidden = None if self.ranks.first else True
        bar = tqdm(total=stage.steps, initial=progress.step, desc=stage.name, unit="step", disable=hidden)
        guard = batch_size.MemoryGuard(self.method, stage, self.settings, self.device, self.ranks)
        self.method.train()
        save_due = False  # postponed over steps that were left out
        with closing(loading.ahead(waiting, self.device)) as batches, bar:
            if not progress.validated:
                self.validate(stage)
                self.save()
            while not progress.stage_ends and (chunk := self.next_batches(batches, stage.accumulate)):
                self.terms = guard.step(self.updater, chunk)
                self.ranks.average_statistics(self.method)
                progress.advance()
                self.divergence.record(progress.global_step, self.updater.left_out, self.terms, chunk)
                save_due = save_due or progress.due(log.save_every) or progress.stage_ends
                self.check_steps(save_due or progress.due(log.every) or progress.due(log.validate_every))
                if not self.divergence.consecutive:
                    self.ema.update()
                bar.update()
                if progress.due(log.every) and not self.divergence.consecutive:
                    self.log_step(stage, self.ranks.mean(speed.figures(progress.step)), bar)
                with speed.paused():
                    if progress.due(log.pictures_every) and self.ranks.first:
                        with self.evaluating() as method:
                            self.log.pictures(progress.global_step, method.sample_images(chunk[-1]))
                    if progress.due(log.validate_every) or progress.stage_ends:
                        with self.saved_on_failure():
                            self.validate(stage)
                    if save_due and not self.divergence.consecutive:
                        self.save()
                        save_due = False
        [self.ending] = self.ranks.all_max(self.signalled)
        if self.ending and not progress.stage_ends:
            self.save()

    def log_step(self, stage: Stage, speed: dict[str, float], bar: tqdm) -> None:
        """Log the figures of the last step, and show some on the ``bar``."""
        figures = self.losses()
        bar.set_postfix({name: f"{figures[name]:.3f}" for name in self.updater.optimisers if name in figures})
        self.log.figures(stage.name, self.progress.global_step, loss=figures, rate=self.updater.rates(), speed=speed)
        for warning in self.method.training_warnings(stage.name, self.progress.step, figures):
            self.log.warn_once(warning)

    def check_steps(self, wait: bool) -> None:
        """Warn of steps that were left out, and raise `UserError` after too many, or at the end of the stage."""
        progress = self.progress
        for step in self.divergence.detected(wait):
            self.log.warn_once(f"step {step.number} was left out: {step.cause()}; images in {self.save_rejected(step)}")
            count = self.divergence.consecutive
            is_last = progress.stage_ends and step.number == progress.global_step
            if is_last or count >= self.settings.train.nonfinite:
                progress.validated &= not is_last  # the stage is validated on --resume
                if self.divergence.last_good > self.saved:
                    self.save()
                steps = f"the last {count} steps were" if count > 1 else "the last step was"
                advice = remedy(progress.stage.name, self.settings.model)
                raise UserError(f"{steps} left out (images in {self.rejected_images}): {step.cause()}; {advice}")

    def save_rejected(self, step: Step) -> Path:
        """Write the first images of a step that was left out, of a few steps; returns the folder that has them."""
        folder = self.rejected_images / f"step_{step.number}{f'_{self.ranks.rank}' if self.ranks.rank else ''}"
        if self.rejected_images.is_dir() and len(list(self.rejected_images.iterdir())) >= MAX_REJECTED:
            return self.rejected_images
        for k, batch in enumerate(step.batches):
            shown = {name: value for name, value in batch.items() if isinstance(value, Tensor) and value.dim() == 4}
            for name, value in shown.items():
                for n, each in enumerate(value[:MAX_REJECTED] if value.shape[1] == 3 else ()):
                    images.write(folder / f"{k}_{n}_{name}.png", each.float().cpu().nan_to_num().clamp(0, 1))
        return folder

    def next_batches(self, batches: Iterator[dict], count: int) -> list[dict[str, Tensor]]:
        """The next batches, on the device; none after a signal. All processes continue together, or stop together.

        Images that could not be read were replaced by others; each is logged once.
        """
        received = []
        failure = ""
        try:
            received = [] if self.signalled else [next(batches) for _ in range(count)]
        except UserError as error:  # no readable image is left
            failure = str(error)
        skipped = [message for batch in received for message in batch.pop("skipped")]
        self.ending, failed, any_skipped = self.ranks.all_max(self.signalled, bool(failure), bool(skipped))
        for message in chain(*self.ranks.all_gather(skipped)) if any_skipped else ():
            self.log.warn_once(f"skipped: {message}")
        if failed:
            failure = next(filter(None, self.ranks.all_gather(failure)))
            if self.progress.global_step:
                self.save()
            raise UserError(failure)
        return [] if self.ending else received

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[models.Method]:
        """Inside, the method has the averaged weights, for evaluation; the training state is restored afterwards."""
        with (
            checkpoint.unmoved_random_states(),
            device.without_benchmark(),
            self.ema.applied() as method,
            buffers_restored(method),
            self.autocast(),
        ):
            yield method

    def losses(self) -> dict[str, float]:
        """The losses of the last step, means over all processes. Raises `UserError` where one is NaN or infinite."""
        return finite(self.ranks.mean(self.terms), self.progress.stage.name, self.settings.model)

    def validate(self, stage: Stage) -> None:
        """Score the averaged weights on the validation pairs and export them if they are the best of their stage.

        A signal interrupts it; the resumed run then begins with it.
        """
        progress = self.progress
        pairs = self.validation
        step = progress.global_step
        progress.validated = False
        with self.evaluating() as method:
            scores = self.scores(stage, method)
            if None in scores:
                return
            if pairs is None:
                self.export(method)
                progress.validated = True
                return
            mean = scoring.mean(scores)
            psnr, ssim, hazy = (mean[key] for key in ("ours.psnr", "ours.ssim", "hazy.psnr"))
            if better := psnr > progress.best:
                self.export(method)
                progress.best = psnr
            progress.validated = True
        self.log.figures(stage.name, step, validation={"psnr": psnr, "ssim": ssim})
        self.log.say(
            f"step {step}: {psnr:.2f} dB, SSIM {ssim:.4f} on {len(pairs)} validation images "
            f"(hazy: {hazy:.2f} dB){', the best of this stage so far' if better else ''}"
        )

    @contextlib.contextmanager
    def saved_on_failure(self) -> Iterator[None]:
        """A context for validating: if an image cannot be scored, no step is lost, and the resumed run validates first.

        Of several processes the others do not know of the failure, so there the last save is the one before.
        """
        try:
            yield
        except UserError:
            if self.ranks.world == 1 and not self.divergence.consecutive:
                with contextlib.suppress(UserError):  # the first failure is the one to report
                    self.save()
            raise

    def scores(self, stage: Stage, method: models.Method) -> list[scoring.Score | None]:
        """Scores of the validation images, shared out among all processes; some are None if a signal interrupted it."""
        count = self.settings.train.recalibrate
        ranks = self.ranks
        pairs = self.validation
        if count:
            recalibrate(method, takewhile(lambda _: not self.signalled, self.loader(stage, 0, count)), self.device)
            ranks.average_statistics(method)
        if any(ranks.all_max(self.signalled)):
            return [None]

        def dehaze(hazy: Tensor) -> Tensor:
            if self.signalled:
                raise signals.InterruptedWorkError
            return method.dehaze(hazy, method.tile(hazy, self.settings.test.tile))

        def score(items: Sequence[dict]) -> list[scoring.Score | None]:
            try:
                return scoring.score(dehaze, items, device=self.device, bar="validating" if ranks.first else None)
            except signals.InterruptedWorkError:
                return [None] * len(items)

        return [] if pairs is None else ranks.map(score, pairs)

    def export(self, method: models.Method) -> None:
        if self.ranks.first:
            metadata = {"step": self.progress.global_step, "stage": self.progress.stage.name}
            metadata |= {"chosen_on": self.chosen_on} | self.identity()
            weights = checkpoint.cast_matrices(method.inference_state(), self.settings.train.export)
            checkpoint.save_weights(self.weights, weights, metadata)

    @functools.cached_property
    def chosen_on(self) -> dict | None:
        """The validation images that the exported weights are chosen on; None where they are simply the latest."""
        if self.validation is None:
            return None
        data = self.settings.data
        names = data.validation_pairs or [data.validation_clear]
        truths = dict.fromkeys(clear for _, clear in self.validation.pairs)
        fingerprints = [selection.fingerprint(images.read(path)) for path in truths]
        return selection.chosen_on(names, len(self.validation), fingerprints)

    def keep_weights(self) -> None:
        """Copy the weights of a finished stage to a file with the stage's name, before the next stage replaces them.

        A run that died early in the next stage, before it was saved, has copied them already: its weights are then of
        that stage, and are not copied.
        """
        if not (self.ranks.first and self.weights.exists()):
            return
        if checkpoint.read_metadata(self.weights).get("stage") == self.progress.stage.name:
            with files.atomic(self.weights.with_stem(self.progress.stage.name)) as temporary:
                shutil.copyfile(self.weights, temporary)

    def identity(self) -> dict:
        return {"model": self.settings.model, "settings": config.to_dict(self.settings)}

    def save(self) -> None:
        """Write last.pt; weights that are not finite are not saved."""
        state = self.identity() | self.progress.state_dict() | self.ranks.states(self.method)
        state |= {"networks": self.method.state_dict(), "ema": self.ema.state_dict()}
        state |= {"updater": self.updater.state_dict()}
        checkpoint.check_finite(state["networks"] | state["ema"].get("weights", {}), self.last)
        if self.ranks.first:
            self.log.flush()  # before the checkpoint, so that the log of a saved step is never lost
            checkpoint.save(self.last, state)
        self.saved = self.progress.global_step
        self.update_error_hint()

    def update_error_hint(self) -> None:
        """Set what error messages say of the last saved state."""
        self.ranks.saved = f"{self.last} is from step {self.progress.global_step}: continue with --resume"

    def load_state_dict(self, state: dict) -> None:
        checkpoint.load_strict(self.method, state["networks"], f"{self.last}")
        self.ema.load_state_dict(state["ema"])
        self.progress.load_state_dict(state)
        self.ranks.restore(state, self.method, self.settings.seed, self.progress.global_step)
        self.update_error_hint()


if __name__ == "__main__":
    errors.run(main)
