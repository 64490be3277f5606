"""What holds for every method that the registry names, whichever they are."""

import argparse
import datetime
import json
import warnings
from pathlib import Path

import pytest
import safetensors.torch
import torch
from helpers import picture

import models
from models import official
from utils import checkpoint, config, foreign
from utils.errors import UserError
from utils.training import progress
from utils.training.updater import Updater, finite

NAMES = models.names()
TRAINED = [name for name in NAMES if models.METHODS[name].stages]
STAGES = [(name, stage) for name in TRAINED for stage in models.METHODS[name].stages]
SMALL = {  # settings with which tests are fast
    "nedr": ["nedr.base_channels=8", "nedr.encoder_weights=none", "nedr.encoder=test_efficientnet"],
    "d4": ["d4.base_channels=8", "d4.encoder_weights=none", "d4.encoder=test_efficientnet"],
    "aknet": ["aknet.width=8"],
    "kanet": ["kanet.width=8", "kanet.contrastive_weight=0"],
}
RELEASED = {  # what the released code can hold; test_nedr_export.py has the full width of the first two
    "nedr": ["nedr.base_channels=16", "nedr.variant=released", "nedr.airlight=max", "nedr.drem=false"],
    "d4": ["d4.base_channels=16"],
}


def settings(name: str, *overrides: str) -> config.Settings:
    return config.load(name, models.settings_types(), overrides=overrides)


def small(name: str) -> models.Method:
    torch.manual_seed(0)
    method = models.build(settings(name, *SMALL.get(name, [])))
    method.start()
    return method


@pytest.fixture(scope="module", params=NAMES)
def method(request) -> models.Method:
    return small(request.param).eval()


def test_a_method_has_its_citation_and_name(method):
    assert all(method.about)
    assert type(method) is models.METHODS[models.name_of(method)]


@pytest.mark.parametrize("size", [(1, 1), (3, 131), (67, 90)])
def test_any_size_is_dehazed(method, size):
    hazy = picture(1, 2, 3, *size)
    found = method.estimate(hazy)
    assert found["clear"].shape == hazy.shape
    assert found["clear"].dtype == torch.float32
    assert found["clear"].isfinite().all()
    assert 0 <= found["clear"].min() <= found["clear"].max() <= 1
    assert not found["clear"].requires_grad
    assert torch.equal(method.dehaze(hazy), found["clear"])


def test_tiles_keep_the_size(method):
    hazy = picture(2, 1, 3, 150, 310)
    clear = method.dehaze(hazy, tile=128)
    assert clear.shape == hazy.shape
    assert clear.isfinite().all()


@pytest.mark.parametrize(("name", "stage"), STAGES)
def test_a_step_of_training(name, stage):
    """Losses and gradients are finite, every parameter gets one, and every network moves."""
    method, values = small(name).train(), settings(name, *SMALL[name], "warm_start.steps=2", "train.steps=2")
    batch = {"hazy": picture(3, 2, 3, 128, 128), "clear": picture(4, 2, 3, 128, 128)}  # NeDR's smallest
    batch |= {"transmission": picture(5, 2, 1, 128, 128) * 0.8 + 0.1, "airlight": torch.full((2, 3, 1, 1), 0.9)}
    batch["density"] = torch.tensor([[0.9], [1.2]])
    optimisers = method.optimisers(stage, values)
    before = [[p.detach().clone() for p in optimiser.param_groups[0]["params"]] for optimiser in optimisers.values()]
    plan = next(each for each in progress.stages(values) if each.name == stage)
    updater = Updater(optimisers, plan, values, torch.device("cpu"))
    figures = finite(updater.step(lambda batch: method.losses(batch, stage), [batch]))
    assert optimisers.keys() <= figures.keys()
    for earlier, optimiser in zip(before, optimisers.values(), strict=True):
        parameters = optimiser.param_groups[0]["params"]
        without = [p.shape for p in parameters if p.grad is None]
        assert not without
        assert all(p.grad.isfinite().all() for p in parameters)
        assert any(not torch.equal(a, b) for a, b in zip(earlier, parameters, strict=True))
    for shown in method.eval().sample_images(batch).values():
        assert shown.shape[0] == 2
        assert shown.shape[1] in (1, 3)
        assert shown.isfinite().all()


@pytest.mark.parametrize("name", TRAINED)
def test_saved_and_loaded_it_is_the_same(name, tmp_path):
    method = small(name).eval()
    identity = {"model": name, "settings": config.to_dict(settings(name, *SMALL[name]))}
    checkpoint.save_weights(tmp_path / "weights.safetensors", method.inference_state(), identity)
    checkpoint.save(tmp_path / "last.pt", identity | {"networks": method.state_dict(), "ema": {}})
    hazy = picture(6, 1, 3, 70, 131)
    for file in ("weights.safetensors", "last.pt"):
        loaded = models.load(tmp_path / file)
        assert models.name_of(loaded) == name
        assert loaded.skipped is None
        assert torch.equal(loaded.dehaze(hazy), method.dehaze(hazy))
    assert {child for child, _ in models.load(tmp_path / "weights.safetensors").named_children()} == set(
        method.inference
    )


def test_methods_without_training_have_nothing_to_export():
    for name in set(NAMES) - set(TRAINED):
        with pytest.raises(UserError, match="nothing to export"):
            small(name).to_official()
        with pytest.raises(UserError, match="nothing to train"):
            models.check_training(settings(name))


def test_stages_that_a_method_has_not_are_refused():
    with pytest.raises(UserError, match=r"aknet has no stage warm_start; set warm_start\.steps=0"):
        models.check_training(settings("aknet", "warm_start.steps=3"))


def test_the_listing_names_all_methods():
    text = models.listing()
    assert max(map(len, text.splitlines())) <= 120
    for name in NAMES:
        assert text.count(f"\n{name} ") == 2
    assert next(line for line in text.splitlines() if line.startswith("dcp ")).split() == ["dcp", "-", "-", "nothing"]


# Released files.


@pytest.fixture(scope="module", params=TRAINED)
def released(request, tmp_path_factory) -> tuple[str, models.Method, Path]:
    """A method with random weights and the file that its authors' code would have saved of it."""
    torch.manual_seed(1)
    method = models.build(settings(request.param, *RELEASED.get(request.param, []))).eval()
    file = tmp_path_factory.mktemp("released") / "their.pkl"
    torch.save({"epoch": 3, "model": method.to_official()} if request.param == "kanet" else method.to_official(), file)
    return request.param, method, file


@pytest.fixture(scope="module")
def loaded(released) -> models.Method:
    with warnings.catch_warnings(action="ignore"):
        return models.load(released[2])


@pytest.fixture(scope="module")
def weights(released) -> dict[str, torch.Tensor]:
    """The tensors in the file. The fixture is shared: copy before changing."""
    return flat(torch.load(released[2]))


def dehazed(method: models.Method) -> torch.Tensor:
    return method.dehaze(picture(7, 1, 3, 130, 128))


def test_released_files_come_back(released, loaded, weights, tmp_path, capsys):
    """export -> inspect -> import -> export: the same keys, shapes and numbers, and the same images."""
    name, method, file = released
    assert models.name_of(loaded) == name
    assert loaded.skipped
    torch.testing.assert_close(dehazed(loaded), dehazed(method), rtol=0, atol=0)

    assert official.main(["inspect", str(file)]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"{file}: {name}, in its authors' format\n")
    assert f"{len(loaded.skipped)} in all" in printed

    ours, theirs = tmp_path / "ours.safetensors", tmp_path / "again" / "theirs.pth"
    assert official.main(["import", str(file), "--output", str(ours)]) == 0
    assert torch.equal(dehazed(models.load(ours)), dehazed(loaded))
    assert official.main(["export", str(ours), "--output", str(theirs)]) == 0
    written = flat(torch.load(theirs))
    assert written.keys() == weights.keys()
    assert all(torch.equal(written[key], weights[key]) for key in weights)


TRAINING = ("net_c2h", "net_depth", "discriminator_h2c", "discriminator_c2h")  # networks that do not dehaze
KEPT = {
    "model_state_dict, beside options": lambda w: {
        "model_state_dict": w,
        "args": argparse.Namespace(path=Path("data"), when=datetime.date(2024, 1, 1)),
    },
    "net_g, nested": lambda w: {"checkpoint": {"net_g": w, "epoch": 3}},
    "Lightning": lambda w: {"state_dict": {f"model.{k}": v for k, v in w.items()} | {"loss.0.weight": torch.ones(2)}},
    "compiled, parallel": lambda w: {f"_orig_mod.module.{k}": v for k, v in w.items()},
    "half": lambda w: {"params": {k: v.half() if v.is_floating_point() else v for k, v in w.items()}},
}


@pytest.mark.parametrize("case", KEPT)
def test_packaged_released_weights_load(released, weights, tmp_path, case):
    name, method, _ = released
    dehazing = {key: value for key, value in weights.items() if key.split(".")[0] not in TRAINING}
    torch.save(KEPT[case](dehazing), tmp_path / "kept.ckpt")
    with warnings.catch_warnings(action="ignore"):
        loaded = models.load(tmp_path / "kept.ckpt")
    assert models.name_of(loaded) == name
    own = method.state_dict()
    for key, value in loaded.state_dict().items():
        if key in own and ".random." not in key:  # which official files do not hold
            torch.testing.assert_close(value, own[key].half().to(value.dtype) if case == "half" else own[key])


def flat(state: dict) -> dict[str, torch.Tensor]:
    return foreign.find(state, lambda each: any(kind.recognises(each) for kind in models.METHODS.values()))


def test_files_with_missing_or_unknown_keys_are_refused(released, loaded, weights):
    name = released[0]
    own = [key for key in weights if key.startswith("net_h2c.")] or list(weights)
    lost = [key for key in own if key.endswith("weight") and key not in loaded.skipped][-1]
    for state, word in ((weights.keys() - {lost}, "1 missing"), (weights.keys() | {"x.weight"}, r"x\.weight")):
        damaged = {key: weights.get(key, torch.ones(2)) for key in state}
        with warnings.catch_warnings(action="ignore"), pytest.raises(UserError, match=word) as caught:
            models.METHODS[name].from_official(damaged, settings(name).method)
        assert len(str(caught.value)) < 300


def test_damaged_and_foreign_files_are_refused(released, weights, tmp_path):
    name, _, file = released
    cut = tmp_path / "cut.pkl"
    with file.open("rb") as whole:
        cut.write_bytes(whole.read(file.stat().st_size // 2))
    with pytest.raises(UserError, match=r"cut\.pkl.*damaged or cut short"):
        official.main(["import", str(cut), "--output", str(tmp_path / "out.safetensors")])
    assert not (tmp_path / "out.safetensors").exists()
    for other in set(TRAINED) - {name}:
        assert models.METHODS[other].from_official(weights, settings(other).method) is None


def file_of(folder: Path, *overrides: str, **change: torch.Tensor) -> Path:
    """The weights of a small AKNet as a file of before there were checksums, some of them changed."""
    values = settings("aknet", *SMALL["aknet"])
    weights, saved = small("aknet").state_dict(), config.to_dict(values)
    saved["aknet"] |= dict(text.split("=") for text in overrides)
    header = {
        "format": checkpoint.FORMAT,
        "version": "1",
        "metadata": json.dumps({"model": "aknet", "settings": saved}),
    }
    safetensors.torch.save_file(weights | change, folder / "weights.safetensors", header)
    return folder / "weights.safetensors"


def test_nonfinite_weights_are_named_when_read(tmp_path):
    file = file_of(tmp_path, **{"network.stem.bias": torch.full((8,), torch.nan)})
    for reading in (
        lambda: official.main(["inspect", str(file)]),
        lambda: models.start(small("aknet"), file),
        lambda: models.load(file),
    ):
        with pytest.raises(UserError, match=r"network\.stem\.bias of \d+ weights hold NaN or infinity"):
            reading()


def test_the_weights_to_begin_with_leave_the_random_numbers_of_the_training_as_they_are(tmp_path):
    method, drawn = small("aknet"), []
    for file in (None, file_of(tmp_path)):
        torch.manual_seed(3)
        models.start(method, file)
        drawn.append(torch.rand(4))
    assert torch.equal(*drawn)


def test_a_small_file_cannot_request_a_large_network(tmp_path):
    assert models.load(file_of(tmp_path)).settings.width == 8
    with pytest.raises(UserError, match="asks for networks far larger than its"):
        models.load(file_of(tmp_path, "width=512"))


def test_nothing_is_fetched_that_a_file_names():
    with pytest.raises(UserError, match="nothing is fetched"):
        models.build(settings("d4", *SMALL["d4"], "d4.encoder=hf-hub:someone/something"))
