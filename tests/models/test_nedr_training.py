"""One step of training of every form of NeDR, and what it may move."""

from types import SimpleNamespace

import pytest
import torch
import torchvision
from helpers import D4, picture, tiny, tiny_settings

import models
from models.encoder import RELEASED
from utils import config, physics
from utils.errors import UserError
from utils.training import progress
from utils.training.updater import Updater

SMALLEST = (*D4, "data.crop_size=64")


def batch(size: int) -> dict[str, torch.Tensor]:
    """What both stages ask of the data."""
    clear, t = picture(1, 2, 3, size, size), picture(2, 2, 1, size, size) * 0.8 + 0.1
    A = torch.tensor([0.8, 0.9]).view(2, 1, 1, 1).expand(2, 3, 1, 1)
    return {"hazy": clear * t + A * (1 - t), "clear": clear, "transmission": t, "airlight": A, "density": torch.ones(2)}


def narrow_vgg(weights=None):
    """VGG-16's layers with 4 channels each, so that tests are quick."""
    cfg = [4, 4, "M", 4, 4, "M", 4, 4, 4, "M", 4, 4, 4, "M", 4, 4, 4, "M"]
    return SimpleNamespace(features=torchvision.models.vgg.make_layers(cfg))


def step(method: models.Method, values: config.Settings, name: str, size: int) -> dict[str, float]:
    """One step of stage ``name`` on the CPU; returns the loss terms, and each optimiser's whole loss by its name."""
    stage = next(stage for stage in progress.stages(values) if stage.name == name)
    updater = Updater(method.optimisers(name, values), stage, values, torch.device("cpu"))
    terms = updater.step(lambda data: method.train().losses(data, name), [batch(size)])
    return {name: term.item() for name, term in terms.items()}


def moved(method: models.Method, before: dict[str, torch.Tensor]) -> set[str]:
    return {name.split(".")[0] for name in moved_parameters(method, before)}


def moved_parameters(method: models.Method, before: dict[str, torch.Tensor]) -> set[str]:
    return {name for name, p in method.named_parameters() if not torch.equal(p, before[name])}


def parameters(method: models.Method) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in method.named_parameters()}


FORMS = {  # without KAN-CID a quarter of the pixels will do
    "published": (),
    "KAN-CID alone": ("nedr.idrm=false", "nedr.drem=false", "nedr.airlight=dark_channel"),
    "IDRM alone, hinge": ("nedr.kan_cid=false", "nedr.drem=false", "nedr.gan=hinge", "data.crop_size=64"),
    "DREM alone": ("nedr.kan_cid=false", "nedr.idrm=false", "data.crop_size=64"),
    "released, vanilla": (
        "nedr.variant=released",
        "nedr.airlight=max",
        "nedr.kan_cid=false",
        "nedr.gan=vanilla",
        "data.crop_size=64",
    ),
    "D4": (*SMALLEST, "nedr.airlight=max"),
}


@pytest.mark.parametrize("form", FORMS)
def test_one_step_of_each_stage(form):
    overrides = FORMS[form]
    method, values = tiny(*overrides), tiny_settings(*overrides)
    size = values.data.crop_size
    learned = method.settings.airlight == "learned"

    before = parameters(method)
    terms = step(method, values, "warm_start", size)
    expected = {"transmission", "clear", "density", "generators", "depth"}
    assert terms.keys() == expected | ({"airlight"} if learned else set())
    assert moved(method, before) == {"removal", "depth"}

    before = parameters(method)
    terms |= (adversarial := step(method, values, "train", size))
    expected = {
        "discriminator_clear",
        "discriminator_hazy",
        "gan",
        "cycle_clear",
        "cycle_hazy",
        "density",
        "pseudo_depth",
    }
    expected |= {"generators", "depth", "discriminators", "t_mean", "t_deviation"}
    assert adversarial.keys() == expected | ({"airlight"} if learned else set())
    assert moved(method, before) == {"removal", "production", "depth", "discriminator_clear", "discriminator_hazy"}

    assert all(torch.tensor(value).isfinite() for value in terms.values())
    assert all(p.isfinite().all() for p in method.parameters())
    still = {name for name, p in method.removal.named_parameters() if torch.equal(p, before[f"removal.{name}"])}
    assert not still  # nothing in the removal network is dead weight


def test_all_optional_terms(monkeypatch, tmp_path):
    monkeypatch.setattr(torchvision.models, "vgg16", narrow_vgg)
    state = {f"features.{key}": value for key, value in narrow_vgg().features.state_dict().items()}
    torch.save(state, tmp_path / "vgg16.pth")
    optional = ("perceptual", "dark_channel", "tv", "identity", "dark_channel_energy")
    weights = [f"nedr.{name}_weight=0.5" for name in optional]
    # Not started, as a resumed run: the perceptual loss must be there all the same.
    overrides = (*SMALLEST, *weights, f"nedr.perceptual.weights={tmp_path / 'vgg16.pth'}")
    method = tiny(*overrides, started=False)
    names = set(method.state_dict())
    terms = step(method, tiny_settings(*overrides), "train", 64)
    assert set(optional) <= terms.keys()
    assert all(value > 0 for name, value in terms.items() if name != "dark_channel")  # which noise may well have 0
    assert set(method.state_dict()) == names  # a loss is no part of the weights


def test_weights_of_zero_disable_losses():
    off = [f"nedr.{name}_weight=0" for name in ("gan", "density", "depth", "airlight")]
    overrides = (*SMALLEST, *off)
    method = tiny(*overrides)
    for discriminator in (method.discriminator_clear, method.discriminator_hazy):
        discriminator.register_forward_hook(lambda *_: pytest.fail("a discriminator ran"))
    before = parameters(method)
    terms = step(method, tiny_settings(*overrides), "train", 64)
    assert terms.keys() == {"cycle_clear", "cycle_hazy", "generators", "t_mean", "t_deviation"}
    assert moved(method, before) == {"removal", "production"}
    assert set(method.optimisers("train", tiny_settings(*overrides))) == {"generators"}


ENERGY = tuple(f"nedr.{name}_weight=0" for name in ("gan", "cycle", "density", "depth", "airlight"))
ENERGY = (*SMALLEST, *ENERGY, "nedr.dark_channel_energy_weight=1")


def test_the_energy_alone_computes_no_cycle():
    method, looks = tiny(*ENERGY), []
    for network in (method.production, method.depth, method.discriminator_clear, method.discriminator_hazy):
        network.register_forward_hook(lambda *_: pytest.fail("a network ran for a cycle without weight"))
    method.removal.register_forward_hook(lambda *_: looks.append(1))
    before = parameters(method)
    terms = step(method, tiny_settings(*ENERGY), "train", 64)
    assert terms.keys() == {"dark_channel_energy", "generators", "t_mean", "t_deviation"}
    assert len(looks) == 1
    assert moved(method, before) == {"removal"}
    still = {name for name, p in method.removal.named_parameters() if torch.equal(p, before[f"removal.{name}"])}
    assert still
    assert all(name.startswith(("airlight.", "density.")) for name in still)  # of which the energy knows nothing


def test_no_weight_at_all_is_refused():
    no_loss = (*ENERGY, "nedr.dark_channel_energy_weight=0")
    with pytest.raises(UserError, match=r"dark_channel_energy a weight"):
        models.check_training(tiny_settings(*no_loss, "train.steps=1"))
    models.check_training(tiny_settings(*no_loss, "warm_start.steps=1", "train.steps=0"))
    with pytest.raises(UserError, match=r"size=14: .*odd"):
        tiny_settings("nedr.dark_channel_energy.size=14")


def test_adversarial_training_reports_statistics_of_t():
    method, data = tiny(*ENERGY).eval(), batch(64)
    t = method.removal(data["hazy"], "learned").transmission.flatten(1)
    terms = next(method.losses(data, "train")).terms
    assert terms["t_mean"].item() == pytest.approx(t.mean().item())
    assert terms["t_deviation"].item() == pytest.approx(t.std(1).mean().item())


def test_replayed_images_have_the_loss_of_the_warm_start():
    """Their losses are those of the warm start, added with weight 1 to adversarial training's."""
    method, data = tiny(*SMALLEST).eval(), batch(64)
    hazy = {"hazy": data["hazy"].flip(3), "clear": data["clear"].flip(2)}
    replay = {f"replay_{name}": value for name, value in data.items()}
    totals = {}
    for name, losses in {
        "warm_start": method.losses(data, "warm_start"),
        "adversarial": method.losses(hazy, "train"),
        "both": method.losses(hazy | replay, "train"),
    }.items():
        torch.manual_seed(2)  # of the random haze
        found = list(losses)
        totals[name] = {loss.optimiser: loss.value.item() for loss in found}
        terms = found[-1].terms
    for optimiser in ("generators", "depth"):
        both = totals["warm_start"][optimiser] + totals["adversarial"][optimiser]
        assert totals["both"][optimiser] == pytest.approx(both, rel=1e-5)
    assert {"replay_transmission", "replay_clear", "replay_airlight", "cycle_clear"} <= terms.keys()


def test_replay_alone_is_a_loss():
    overrides = (*ENERGY, "nedr.dark_channel_energy_weight=0", "train.steps=1", "warm_start.replay=true")
    models.check_training(tiny_settings(*overrides))
    method, data = tiny(*overrides).eval(), batch(64)
    (replayed,) = method.losses(data | {f"replay_{name}": value for name, value in data.items()}, "train")
    (supervised,) = method.losses(data, "warm_start")
    torch.testing.assert_close(replayed.value, supervised.value)
    replayed.value.backward()


def test_frozen_statistics():
    """The batch norms that the warm start taught stay; their weights learn, and so does haze production as ever."""
    overrides = (*SMALLEST, "nedr.frozen_statistics=true")
    method, values = tiny(*overrides), tiny_settings(*overrides)
    buffers = lambda: {name: b.clone() for name, b in method.named_buffers() if "running" in name}  # noqa: E731
    before, weights = buffers(), parameters(method)
    step(method, values, "train", 64)
    changed = {name.split(".")[0] for name, b in buffers().items() if not torch.equal(b, before[name])}
    assert changed == {"production"}
    assert {"removal", "production", "depth"} <= moved(method, weights)
    before = buffers()
    step(method, values, "warm_start", 64)
    assert {name.split(".")[0] for name, b in buffers().items() if not torch.equal(b, before[name])} >= {"removal"}


def test_clear_images_of_the_identity_loss_leave_the_statistics_of_hazy_ones():
    statistics = []
    for weight in (0, 1):
        overrides = (*SMALLEST, "nedr.airlight_head=statistics", f"nedr.identity_weight={weight}")
        method = tiny(*overrides)
        terms = step(method, tiny_settings(*overrides), "train", 64)
        statistics.append({name: b for name, b in method.removal.named_buffers() if "running" in name})
    assert "identity" in terms
    torch.testing.assert_close(*statistics)
    assert all(norm.momentum for norm in method.removal.modules() if isinstance(norm, torch.nn.BatchNorm2d))


def test_the_psnr_of_the_restored_image_trains_t_and_airlight():
    overrides = (*SMALLEST, "nedr.airlight_head=statistics", "nedr.psnr_weight=0.01")
    method, images = tiny(*overrides), batch(64)
    [loss, *_] = method.losses(images, "warm_start")
    with torch.no_grad():
        haze = method.removal.estimate_haze(images["hazy"], "learned")
        restored = physics.unbounded(images["hazy"], haze.transmission, haze.airlight)
        psnr = -10 * ((restored - images["clear"]).square().mean((1, 2, 3)) + 1e-4).log10().mean()
    torch.testing.assert_close(loss.terms["psnr"], psnr)
    gradients = torch.autograd.grad(
        loss.terms["psnr"], [*method.removal.head.parameters(), *method.removal.airlight.parameters()]
    )
    assert all(gradient.abs().sum() > 0 for gradient in gradients)


def test_replay_trains_all_whatever_the_warm_start_trains():
    """Batch norm stays in training mode, so that a resumed run, whose networks are built anew, does the same."""
    overrides = (*SMALLEST, "nedr.airlight_head=statistics", "nedr.trained=weights", "warm_start.replay=true")
    method, images = tiny(*overrides), batch(64)
    images |= {f"replay_{name}": value for name, value in batch(64).items()}
    for _ in method.losses(images, "train"):
        pass
    assert all(norm.training for norm in method.removal.modules() if isinstance(norm, torch.nn.BatchNorm2d))


def test_lasting_trivial_solutions_are_reported():
    method = tiny(*SMALLEST, started=False)
    said = {
        step: [warning.split(" ")[0:4] for warning in method.training_warnings("train", step, figures)]
        for step, figures in (
            (50, {"t_deviation": 0.02, "discriminator_clear": 0.001, "discriminator_hazy": 0.2}),
            (
                200,
                {"t_deviation": 0.02, "discriminator_clear": 0.3, "discriminator_hazy": 0.2},
            ),  # the discriminator is back
            (250, {"t_deviation": 0.02, "discriminator_clear": 0.001, "discriminator_hazy": 0.2}),
            (350, {"t_deviation": 0.02, "discriminator_clear": 0.001, "discriminator_hazy": 0.2}),
            (550, {"t_deviation": 0.1, "discriminator_clear": 0.001}),
        )
    }
    assert said == {
        50: [],
        200: [],
        250: [],
        350: [["t", "has", "been", "flat"]],
        550: [["the", "discriminator", "of", "clear"]],
    }
    assert not list(method.training_warnings("warm_start", 900, {"t_deviation": 0.0}))
    warnings = [
        *method.training_warnings("train", 600, {"discriminator_clear": 0}),
        *method.training_warnings("train", 650, {"discriminator_clear": 0}),
    ]
    assert len(set(warnings)) == 1  # so that the log says it once
    assert "nedr.discriminator_rate" in warnings[0]


def test_weights_scale_the_terms():
    data, values = batch(64), []
    for weight in (1, 3):
        overrides = ("nedr.gan_weight=0", "nedr.density_weight=0", "nedr.airlight_weight=0", "nedr.depth_weight=0")
        method = tiny(*SMALLEST, *overrides, f"nedr.cycle_weight={weight}").eval()
        torch.manual_seed(0)
        values.append(next(method.losses(data, "train")).value.item())
    assert values[1] == pytest.approx(3 * values[0], rel=1e-5)


@pytest.mark.parametrize("airlight", ["learned", "max"])
def test_random_haze(airlight):
    method = tiny(*SMALLEST, f"nedr.airlight={airlight}", "nedr.airlight_range=[0.8, 0.9]", started=False)
    beta, A = method._random_haze(torch.zeros(500, 3, 1, 1))
    assert beta.shape == (500, 1, 1, 1)
    assert 0.6 <= beta.min() < 0.65
    assert 1.75 < beta.max() <= 1.8
    if airlight == "max":
        assert A is None
    else:
        assert A.shape == (500, 3, 1, 1)
        assert torch.equal(A[:, 0], A[:, 2])  # grey
        assert A.min() >= 0.8
        assert A.max() <= 0.9


def test_learning_rates():
    overrides = ("nedr.learning_rate=2e-4", "nedr.discriminator_rate=0.1", "warm_start.learning_rate=3e-4")
    method, values = tiny(*SMALLEST, started=False), tiny_settings(*SMALLEST, *overrides)
    method.settings = values.method
    rates = {
        stage: {name: o.param_groups[0]["lr"] for name, o in method.optimisers(stage, values).items()}
        for stage in method.stages
    }
    assert rates["train"] == pytest.approx({"generators": 2e-4, "depth": 2e-4, "discriminators": 2e-5})
    assert rates["warm_start"] == pytest.approx({"generators": 3e-4, "depth": 3e-4})


def test_sample_images_for_the_log():
    method = tiny(*SMALLEST).eval()
    shown = method.sample_images(batch(64))
    assert {"hazy", "dehazed", "rehazed", "clear", "synthetic", "transmission", "depth"} == shown.keys()
    for image in shown.values():
        assert image.shape[0] == 2
        assert image.shape[2:] == (64, 64)
        assert image.min() >= 0
        assert image.max() <= 1
        assert not image.requires_grad


def test_the_released_start():
    method = tiny(*SMALLEST)
    for network in (method.production, method.depth.head, method.removal.head):
        convs = [m for m in network.modules() if isinstance(m, torch.nn.Conv2d)]
        assert convs
        assert not any(conv.bias.any() for conv in convs)
    norms = torch.cat([m.weight for m in method.production.modules() if isinstance(m, torch.nn.BatchNorm2d)])
    assert norms.mean().item() == pytest.approx(1, abs=0.01)
    assert norms.std().item() == pytest.approx(0.02, rel=0.3)


@pytest.mark.parametrize("module", ["kan_cid", "idrm", "drem"])
def test_a_disabled_module_is_not_built(module):
    sizes = [
        sum(p.numel() for p in tiny(f"nedr.{module}={on}", started=False).removal.parameters())
        for on in ("true", "false")
    ]
    assert sizes[0] > sizes[1]


def test_published_size():
    """13,376,701 parameters as released, less 490,187 of mcc and the other dead ones, plus DREM's that are not."""
    sizes = (f"nedr.encoder={RELEASED}", "nedr.base_channels=64", "nedr.idrm_hidden=256", "nedr.drem_growth=64")
    settings = tiny_settings(*sizes, "nedr.variant=released", "nedr.airlight=max").method
    count = lambda network: sum(p.numel() for p in network.parameters())  # noqa: E731
    method = models.METHODS["nedr"](settings)
    kan_dead = 2 * sum(c * c + c for c in (32, 64, 128, 256))
    unit = 2 * (256 * 256 * 9 + 256)
    drem_dead = 2 * (64 * 3 * 25 + 64)
    assert count(method.removal.drem) == 1_476_768 - drem_dead
    assert count(method.removal) - count(method.removal.drem) == 13_376_701 - 490_187 - kan_dead - unit
    assert count(method.production) == 1_484_483
    assert count(method.depth) == 10_689_233 - unit
    assert count(method.discriminator_clear) == 2_763_776


# The encoder's weights.


def encoder_of(method: models.Method) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in method.removal.pyramid.encoder.state_dict().items()}


@pytest.mark.parametrize("extension", ["pth", "safetensors"])
def test_encoder_weights_from_a_file(tmp_path, extension):
    import safetensors.torch

    file, source = tmp_path / f"encoder.{extension}", tiny(*SMALLEST, started=False)
    weights = {k: torch.randn(v.shape) if v.is_floating_point() else v for k, v in encoder_of(source).items()}
    whole = weights | {"classifier.weight": torch.zeros(10, 4)}  # timm's whole network holds more
    if extension == "pth":
        torch.save({"state_dict": whole}, file)
    else:
        safetensors.torch.save_file(whole, file)
    method = tiny(*SMALLEST, f"nedr.encoder_weights={file}")
    for network in (method.removal, method.depth):
        assert all(torch.equal(v, weights[k]) for k, v in network.pyramid.encoder.state_dict().items())


@pytest.mark.parametrize("fault", ["missing", "shape"])
def test_encoder_weights_that_do_not_fit(tmp_path, fault):
    weights = encoder_of(tiny(*SMALLEST, started=False))
    if fault == "missing":
        del weights["conv_stem.weight"]
    else:
        weights["conv_stem.weight"] = torch.zeros(1)
    torch.save(weights, tmp_path / "encoder.pth")
    with pytest.raises(UserError, match=r"test_efficientnet.*conv_stem\.weight"):
        tiny(*SMALLEST, f"nedr.encoder_weights={tmp_path / 'encoder.pth'}")


def test_encoder_weights_absent(tmp_path):
    with pytest.raises(UserError, match="no checkpoint"):
        tiny(*SMALLEST, f"nedr.encoder_weights={tmp_path / 'none.pth'}")


def test_encoder_weights_offline(monkeypatch):
    import timm

    method, make = tiny(*SMALLEST, "nedr.encoder_weights=hub", started=False), timm.create_model

    def offline(name, pretrained=False, **options):
        if pretrained:
            raise ConnectionError("no network")
        return make(name, pretrained=False, **options)

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(UserError, match=r"ConnectionError.*nedr\.encoder_weights=FILE"):
        method.start()


# Settings that cannot work.


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("nedr.base_channels=10", "multiple of 4"),
        ("nedr.base_channels=4", "at least 8"),
        ("nedr.density_range=[1.8, 0.6]", r"nedr\.density_range"),
        ("nedr.density_range=[0, 1]", r"nedr\.density_range"),
        ("nedr.airlight_range=[0.5, 1.5]", r"nedr\.airlight_range"),
        ("nedr.betas=[0.9, 1]", r"nedr\.betas"),
        ("nedr.variant=released", "no airlight head"),
        ("nedr.gan=wgan", "lsgan, vanilla, hinge"),
    ],
)
def test_refused_settings(override, message):
    with pytest.raises(UserError, match=message):
        tiny_settings(override)


@pytest.mark.parametrize("size", [96, 130])
def test_refused_crops(size):
    with pytest.raises(UserError, match=rf"data\.crop_size={size}"):
        models.check_training(tiny_settings(f"data.crop_size={size}"))


def test_checkpointing_changes_no_number():
    results = []
    for saving in (False, True):
        method, values = tiny(), tiny_settings()
        if saving:
            method.save_memory()
        torch.manual_seed(1)
        terms = step(method, values, "train", values.data.crop_size)
        results.append((terms, parameters(method)))
    (terms, plain), (again, recomputed) = results
    assert terms == again
    assert all(torch.equal(plain[name], recomputed[name]) for name in plain)


@pytest.mark.parametrize("trained", ["all", "weights", "airlight"])
def test_the_warm_start_trains_only_the_selected_part(trained):
    overrides = (*SMALLEST, f"nedr.trained={trained}", "nedr.airlight_head=statistics", "nedr.found_airlight_weight=1")
    method, values = tiny(*overrides), tiny_settings(*overrides)
    buffers = {name: b.clone() for name, b in method.removal.named_buffers() if "running" in name}
    before = parameters(method)
    step(method, values, "warm_start", 64)
    changed = {name.split(".")[1] for name in moved_parameters(method, before) if name.startswith("removal")}
    assert "airlight" in changed
    assert ({"head", "pyramid"} <= changed) == (trained != "airlight")
    changed = {
        name.split(".")[0] for name, b in method.removal.named_buffers() if not torch.equal(b, buffers.get(name, b))
    }
    assert changed == ({"airlight", "pyramid"} if trained == "all" else {"airlight"})


def test_training_a_part_needs_trained_weights():
    with pytest.raises(UserError, match=r"trained=airlight.*train\.init=FILE"):
        models.NeDR.check(tiny_settings("nedr.trained=airlight", "warm_start.steps=2"))
    with pytest.raises(UserError, match=r"airlight=learned"):
        models.NeDR.check(tiny_settings("nedr.trained=airlight", "nedr.airlight=max", "train.init=a.pt"))


def test_balance_takes_a_cast_out_before_the_haze_is_estimated():
    """A cast of the whole image, (I c) = (J c) t + (A c) (1-t), moves nothing but the colours of J and A."""
    method = tiny(*SMALLEST, "nedr.balance=image", "nedr.airlight_head=statistics").eval()
    hazy, cast = batch(64)["hazy"], torch.tensor([1.0, 0.8, 0.6]).view(1, 3, 1, 1)
    hazy = (
        0.6 * hazy / physics.bright_colour(hazy) * torch.tensor([1.0, 0.85, 0.85]).view(1, 3, 1, 1)
    )  # red is brightest
    with torch.no_grad():
        for working_size in (0, 32):
            method.settings.working_size = working_size
            plain, shifted = method.predict_any_size(hazy), method.predict_any_size(hazy * cast)
            torch.testing.assert_close(shifted["transmission"], plain["transmission"], atol=1e-4, rtol=0)
            torch.testing.assert_close(shifted["airlight"], plain["airlight"] * cast, atol=1e-4, rtol=0)
            torch.testing.assert_close(shifted["clear"], plain["clear"] * cast, atol=1e-3, rtol=0)
            method.settings.balance = "none"
            unbalanced = method.predict_any_size(hazy * cast)["airlight"]
            assert (unbalanced - plain["airlight"] * cast).abs().max() > 1e-2
            method.settings.balance = "image"


@pytest.mark.parametrize("working_size", [0, 32])
def test_balance_leaves_white_things_white(working_size):
    """A sign in the fog that is brighter than the cast: J is not limited to the colour of the airlight."""
    method = tiny(*SMALLEST, "nedr.balance=image", "nedr.airlight_head=statistics").eval()
    hazy = torch.linspace(0.2, 0.6, 128).view(1, 1, 128, 1) * torch.tensor([1.0, 0.8, 0.5]).view(1, 3, 1, 1)
    hazy = hazy.expand(1, 3, 128, 128).contiguous()
    hazy[:, :, 8:12, 8:12] = 0.98
    method.settings.working_size = working_size
    outputs = method.predict_any_size(hazy)
    expected = physics.restore(hazy, outputs["transmission"], outputs["airlight"])
    torch.testing.assert_close(outputs["clear"], expected, atol=1e-6, rtol=0)
    assert outputs["clear"][0, :, 10, 10].min() > 0.97


def test_balance_is_refused_in_adversarial_training():
    with pytest.raises(UserError, match=r"balance=image.*train\.steps=0"):
        models.NeDR.check(tiny_settings("nedr.balance=image", "train.steps=2"))
