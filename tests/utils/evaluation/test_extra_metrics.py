import importlib.machinery
import math
import sys
import types
import urllib.error
import warnings

import numpy as np
import pytest
import torch
from skimage.color import deltaE_ciede2000, rgb2lab

from utils import rounding
from utils.errors import UserError
from utils.evaluation import extra_metrics


def pictures(height=100, width=120):
    generator = torch.Generator().manual_seed(0)
    clear = torch.rand(3, height, width, generator=generator)
    return (clear + 0.1 * torch.randn(3, height, width, generator=generator)).clamp(0, 1), clear


def saved(picture):
    """(3,H,W) in [0,1] of 8 bit."""
    return torch.from_numpy(rounding.to_8bit(picture)).permute(2, 0, 1) / 255


@pytest.fixture
def package(monkeypatch):
    """Puts a package in place of the real one, or of none."""

    def put(name, **content):
        module = types.ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)

    return put


@pytest.fixture
def offline(package):
    def fail(*args, **options):
        raise urllib.error.URLError("Name or service not known")

    package("lpips", LPIPS=fail)
    package("pyiqa", create_metric=fail)


class Network:
    """What lpips and pyiqa hand out; remembers how it was made and called."""

    def __init__(self, *args, **options):
        print("Setting up, at length")
        warnings.warn("deprecated since long", stacklevel=2)
        self.made, self.calls = (args, options), []

    def to(self, device):
        self.device = device
        return self

    def eval(self):
        return self

    def __call__(self, *batches):
        assert not torch.is_grad_enabled()
        self.calls.append(batches)
        return torch.tensor([[0.25]])


def recorder():
    made = []

    def make(*args, **options):
        made.append(Network(*args, **options))
        return made[-1]

    return make, made


def test_ciede2000_is_that_of_scikit_image_in_strips_too(monkeypatch):
    dehazed, clear = pictures(37, 41)
    whole = deltaE_ciede2000(*(rgb2lab(rounding.to_8bit(picture)) for picture in (clear, dehazed))).mean()
    figure = extra_metrics.load(["ciede2000"])["ciede2000"]
    assert figure(dehazed, clear) == pytest.approx(whole)
    monkeypatch.setattr(extra_metrics, "STRIP", 100)
    assert figure(dehazed, clear) == pytest.approx(whole)


def test_ciede2000_of_known_colours():
    figure = extra_metrics.load(["ciede2000"])["ciede2000"]
    black, white = torch.zeros(3, 8, 8), torch.ones(3, 8, 8)
    assert figure(black, white) == pytest.approx(100, abs=1e-3)
    assert figure(white, white) == 0
    assert figure(white, white - 0.4 / 255) == 0  # saved as the same


def test_lpips_gets_images_in_minus_one_to_one(package, capsys, recwarn):
    make, made = recorder()
    package("lpips", LPIPS=make)
    figure = extra_metrics.load(["lpips"])["lpips"]
    dehazed, clear = pictures()
    assert figure(dehazed * 1.5 - 0.2, clear) == 0.25
    assert made[0].made == ((), {"net": "alex", "version": "0.1", "verbose": False})
    assert made[0].device == torch.device("cpu")
    first, second = made[0].calls[0]
    assert first.shape == second.shape == (1, 3, 100, 120)
    assert (first.min(), first.max()) == (-1, 1)
    torch.testing.assert_close(second[0], saved(clear) * 2 - 1)
    assert capsys.readouterr().out == ""
    assert not recwarn.list


@pytest.mark.parametrize("name", ["niqe", "brisque", "musiq"])
def test_pyiqa_gets_images_in_zero_to_one_and_no_clear_one(name, package):
    make, made = recorder()
    package("pyiqa", create_metric=make)
    figure = extra_metrics.load([name], torch.device("cpu"))[name]
    dehazed, clear = pictures()
    assert figure(dehazed, None) == figure(dehazed, clear) == 0.25
    assert made[0].made == ((name,), {"device": torch.device("cpu")})
    (batch,) = made[0].calls[0]
    torch.testing.assert_close(batch[0], saved(dehazed))


def test_fade_gets_an_8_bit_image_with_channels_last(package):
    calls = []
    package("pyfade", fade=lambda picture: calls.append(picture) or np.float64(0.5))
    figure = extra_metrics.load(["fade"])["fade"]
    dehazed, _ = pictures(20, 30)
    value = figure(dehazed, None)
    assert (value, type(value)) == (0.5, float)
    np.testing.assert_array_equal(calls[0], rounding.to_8bit(dehazed))


@pytest.mark.parametrize(
    "each", [each for each in extra_metrics.METRICS.values() if each.least > 1], ids=lambda each: each.name
)
def test_images_that_are_too_small_have_no_figure(each, package):
    package("lpips", LPIPS=Network)
    package("pyiqa", create_metric=Network)
    package("pyfade", fade=lambda picture: 0.25)
    figure = extra_metrics.load([each.name])[each.name]
    assert figure(*pictures(each.least, 200)) == 0.25
    assert math.isnan(figure(*pictures(each.least - 1, 200)))
    assert math.isnan(figure(*pictures(200, each.least - 1)))


def test_several_come_in_the_order_asked_and_once(package):
    package("pyfade", fade=lambda picture: 0.25)
    assert list(extra_metrics.load(["fade", "ciede2000", "fade"])) == ["fade", "ciede2000"]
    assert extra_metrics.load([]) == {}


def test_unknown_names_are_refused_with_the_nearest():
    with pytest.raises(UserError, match="there is no metric 'nique'; did you mean 'niqe'"):
        extra_metrics.load(["nique"])


def test_packages_that_are_not_installed_are_named_at_once(monkeypatch):
    for name in ("lpips", "pyfade", "pyiqa"):
        monkeypatch.setitem(sys.modules, name, None)
    assert [name for name in extra_metrics.METRICS if extra_metrics.installed(name)] == ["ciede2000"]
    message = "niqe, fade, musiq are not installed; pip install pyiqa fade-python, or take niqe, fade, musiq out"
    with pytest.raises(UserError, match=message):
        extra_metrics.load(["niqe", "ciede2000", "fade", "musiq"])


def test_installed_does_not_import(tmp_path, monkeypatch):
    (tmp_path / "pyfade.py").write_text("raise RuntimeError")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "pyfade", raising=False)
    assert extra_metrics.installed("fade")


def test_a_broken_package_is_named(tmp_path, monkeypatch):
    (tmp_path / "pyfade.py").write_text("import a_module_that_is_nowhere")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "pyfade", raising=False)
    with pytest.raises(UserError, match=r"cannot be imported \(No module named 'a_module_.*; pip install fade-python"):
        extra_metrics.load(["fade"])


@pytest.mark.parametrize(
    "each", [each for each in extra_metrics.METRICS.values() if each.weights], ids=lambda each: each.name
)
def test_without_a_network_the_file_and_its_place_are_named(each, offline, monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(UserError) as caught:
        extra_metrics.load([each.name])
    folder = tmp_path / "hub" / {"lpips": "checkpoints"}.get(each.name, "pyiqa")
    assert f"download {each.weights} elsewhere and put it into {folder}" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_images_that_cannot_be_compared_are_refused():
    figure = extra_metrics.load(["ciede2000"])["ciede2000"]
    with pytest.raises(UserError, match="cannot be compared"):
        figure(torch.zeros(3, 8, 8), torch.zeros(3, 8, 9))
    with pytest.raises(UserError, match="ciede2000 compares with a clear image, and there is none"):
        figure(torch.zeros(3, 8, 8), None)
    with pytest.raises(UserError, match=r"must be float in \[0,1\]"):
        figure(torch.zeros(3, 8, 8).byte(), torch.zeros(3, 8, 8).byte())


def test_every_metric_says_what_it_is():
    for name, each in extra_metrics.METRICS.items():
        assert each.name == name
        assert each.better in ("higher", "lower")
        assert each.title
        assert each.source
        assert each.package is None or each.package in extra_metrics.BUILDERS.keys() & extra_metrics.MODULES.keys()
        assert not each.weights or each.package in extra_metrics.WEIGHTS
