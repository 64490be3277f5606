"""What only a GPU can show: CPU = GPU, steps in every precision, no wait in a step, compile, a whole training.

    python -m pytest tests/test_cuda.py -n 0

Without a GPU all of it is skipped.
"""

import copy

import pytest
import torch
import torch.distributed as dist
from helpers import TINY
from torch import nn

import models
import train
from data import images, paths
from models.layers import BatchNorm
from models.nedr.discriminator import Discriminator
from utils import batchnorm, checkpoint, config, device
from utils.training import progress
from utils.training.compiling import compile_networks
from utils.training.divergence import Divergence
from utils.training.ema import EMA
from utils.training.updater import Updater

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch finds no GPU here")

CPU, GPU, SIZE = torch.device("cpu"), torch.device("cuda"), 128
SMALL = {
    "nedr": TINY,
    "d4": ("d4.base_channels=8", "d4.encoder_weights=none", "data.crop_size=128", "warm_start.steps=5"),
    "aknet": ("data.crop_size=128",),
    "kanet": ("data.crop_size=128", "kanet.contrastive_weight=0"),
    "dcp": (),
}
TRAINED = [name for name in SMALL if models.METHODS[name].stages]


def settings_of(name: str, *overrides: str) -> config.Settings:
    return config.load(name, models.settings_types(), overrides=(*SMALL[name], *overrides))


def started(values: config.Settings) -> models.Method:
    torch.manual_seed(0)
    method = models.build(values)
    method.start()
    return method


def batch(count: int = 4, place: torch.device = GPU) -> dict[str, torch.Tensor]:
    """What the stages of all methods ask of the data."""
    g = torch.Generator().manual_seed(1)
    clear = torch.rand(count, 3, SIZE, SIZE, generator=g)
    t = torch.rand(count, 1, SIZE, SIZE, generator=g) * 0.8 + 0.1
    A = torch.linspace(0.7, 1, count).view(-1, 1, 1, 1).expand(-1, 3, 1, 1)
    item = {"hazy": clear * t + A * (1 - t), "clear": clear, "transmission": t, "airlight": A}
    return {key: value.to(place) for key, value in (item | {"density": torch.ones(count)}).items()}


def updater_of(method: models.Method, values: config.Settings) -> tuple[Updater, str]:
    stage = progress.stages(values)[0]
    device.prepare(GPU, values.precision)
    return Updater(method.optimisers(stage.name, values), stage, values, GPU), stage.name


@pytest.mark.parametrize("name", SMALL)
def test_a_gpu_gives_the_numbers_of_a_cpu(name):
    device.prepare(GPU, "float32")
    method, hazy = started(settings_of(name)).eval(), batch(1, CPU)["hazy"][..., :100, :]
    expected = method.dehaze(hazy)
    found = method.to(GPU).dehaze(hazy.to(GPU)).cpu()
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-4)


@pytest.mark.parametrize("precision", ["float32", "tf32", "bf16", "fp16"])
@pytest.mark.parametrize("name", TRAINED)
def test_steps_in_every_precision(name, precision):
    values = settings_of(name, f"precision={precision}")
    method = started(values).to(GPU).train()
    before = copy.deepcopy(method.state_dict())
    updater, stage = updater_of(method, values)
    for _ in range(2):
        terms = updater.step(lambda data: method.losses(data, stage), [batch()])
    assert all(term.isfinite() for term in terms.values())
    assert all(value.isfinite().all() for value in method.state_dict().values())
    assert any(not torch.equal(value, before[key]) for key, value in method.state_dict().items())


@pytest.mark.parametrize("name", TRAINED)
def test_the_first_losses_are_those_of_a_cpu(name):
    values = settings_of(name)
    device.prepare(GPU, "float32")
    stage, losses = progress.stages(values)[0].name, []
    for place in (CPU, GPU):
        torch.manual_seed(0)
        method = started(values).to(place).train()
        losses.append(next(method.losses(batch(4, place), stage)).value.item())
    assert losses[1] == pytest.approx(losses[0], rel=2e-3)


@pytest.mark.parametrize("precision", ["float32", "bf16"])
@pytest.mark.parametrize("name", TRAINED)
def test_a_step_never_waits_for_the_gpu(name, precision):
    """What is waited for leaves the GPU idle until the next step is queued."""
    values = settings_of(name, f"precision={precision}", "train.ema=0.9")
    method, data = started(values).to(GPU).train(), batch()
    ema = EMA(method, method.averaged, 0.9)
    updater, stage = updater_of(method, values)
    divergence = Divergence([method, ema.average], 0)
    for number in range(3):
        torch.cuda.set_sync_debug_mode("error" if number == 2 else "default")
        try:
            terms = updater.step(lambda data: method.losses(data, stage), [data])
            divergence.record(number, updater.left_out, terms, [data])
            divergence.detected()
            ema.update()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("precision", ["float32", "fp16"])
def test_a_step_without_numbers_changes_no_weight(precision):
    """The optimiser sees to that on the GPU; the host learns of it when it waits."""
    values = settings_of("aknet", f"precision={precision}")
    method, data = started(values).to(GPU).train(), batch()
    updater, stage = updater_of(method, values)
    divergence, before = Divergence([method], 0), copy.deepcopy(method.state_dict())
    data["clear"][0, 0, 0, 0] = torch.nan
    terms = updater.step(lambda data: method.losses(data, stage), [data])
    divergence.record(1, updater.left_out, terms, [data])
    assert [step.number for step in divergence.detected(wait=True)] == [1]
    assert all(torch.equal(value, before[key]) for key, value in method.state_dict().items())


def test_networks_compile():
    said, values = [], settings_of("nedr")
    device.prepare(GPU, "float32")
    method, data = started(values).to(GPU).train(), batch()
    plain = next(copy.deepcopy(method).losses(data, "warm_start")).value.item()
    compile_networks(method.named_children(), GPU, said.append)
    compiled = next(method.losses(data, "warm_start")).value
    compiled.backward()
    assert said == []
    assert compiled.item() == pytest.approx(plain, rel=1e-3)


def test_large_weights_of_a_discriminator_do_not_overflow_in_half_precision():
    discriminator, image = Discriminator().to(GPU).eval(), torch.rand(2, 3, 64, 64, device=GPU)
    for conv in discriminator.convs:
        conv.weight_orig.data *= 300
    for _ in range(20):
        discriminator.train()(image)
    discriminator.eval()
    with device.autocast(GPU, "fp16"):
        half = discriminator(image)
    assert half.isfinite().all()
    torch.testing.assert_close(half, discriminator(image), rtol=0.05, atol=0.02)


def test_synchronised_batch_norm_is_batch_norm_where_there_is_one_process(tmp_path):
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("cpu:gloo,cuda:nccl", store=store, rank=0, world_size=1)
    try:
        norm = BatchNorm(8, act=nn.ReLU6()).to(GPU).train()
        other, x = copy.deepcopy(norm), torch.randn(4, 8, 16, 16, device=GPU).mul(3)
        batchnorm.synchronise(other)
        torch.testing.assert_close(other(x), norm(x), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(other.state_dict(), norm.state_dict(), rtol=1e-4, atol=1e-4)
    finally:
        dist.destroy_process_group()


def test_a_whole_training(tmp_path):
    """Two stages, interrupted between steps and gone on with; its weights dehaze on a CPU."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yml").touch()
    run = ["--model", "nedr", "--checkpoints", str(tmp_path / "run")]
    how = [*TINY[:-1], "data.hazy=sample:train/hazy", "data.clear=sample:train/clear", "warm_start.batch=2"]
    how += ["data.crop=short_side", "warm_start.depth=sample:train/depth", "train.batch=2", "device=cuda"]
    how += ["precision=bf16", "log.every=1", "log.pictures_every=2", "data.workers=1"]
    assert train.main([*run, *how, "warm_start.steps=2", "train.steps=0"]) == 0
    assert train.main([*run, "--resume", *how, "warm_start.steps=3", "train.steps=2"]) == 0
    _, metadata = checkpoint.read_safetensors(tmp_path / "run" / "weights.safetensors")
    assert metadata["step"] == 5
    hazy = images.read(paths.find("sample:test/hazy")[0])[None]
    assert models.load(tmp_path / "run" / "weights.safetensors").dehaze(hazy).isfinite().all()
