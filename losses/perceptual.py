"""Perceptual loss (Johnson et al., 1603.08155) on features of torchvision's VGG or timm's EfficientNet."""

from collections.abc import Collection, Sequence

import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from utils import imagenet
from utils.checkpoint import read_weights, unmoved_random_states
from utils.errors import UserError, nearest, quoted
from utils.files import expand_home

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's
CONVS = {"vgg16": (2, 2, 3, 3, 3), "vgg19": (2, 2, 4, 4, 4)}


def layer_names(network: str) -> dict[str, int]:
    """relu1_1, relu1_2, relu2_1 ... -> index in torchvision's ``features``."""
    names, index = {}, 0
    for stage, count in enumerate(CONVS[network], 1):
        for conv in range(1, count + 1):
            names[f"relu{stage}_{conv}"] = index + 1
            index += 2
        index += 1  # the pooling
    return names


class VGGFeatures(nn.Module):
    """Feature maps of a frozen VGG by layer name. (N,3,H,W) in [0,1] -> {name: (N,C,h,w)}.

    Images are normalised here, by ImageNet's mean and deviation. ``network``: vgg16 or vgg19; ``layers``: names such as
    relu3_3; ``weights``: ``hub`` (torchvision's ImageNet weights) or a file of them (.pth or .safetensors). Raises
    `UserError` if the weights are unavailable; its message names the settings KEY.weights and KEY_weight.
    """

    def __init__(self, network: str, layers: Collection[str], weights: str, key: str):
        super().__init__()
        known = layer_names(network)
        _check_layers(network, layers, known, key)
        self.names = {known[name]: name for name in layers}
        self.features = _vgg(network, weights, key)[: max(self.names) + 1].eval().requires_grad_(False)
        self.register_buffer("mean", torch.tensor(MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(STD).view(1, 3, 1, 1), persistent=False)

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        x, maps = (image - self.mean) / self.std, {}
        for index, layer in enumerate(self.features):
            x = layer(x)
            if index in self.names:
                maps[self.names[index]] = x
        return maps

    def train(self, mode: bool = True) -> "VGGFeatures":
        return super().train(False)  # frozen: always in eval mode


class EfficientNetFeatures(nn.Module):
    """Maps of a frozen EfficientNet-lite0 by stride. (N,3,H,W) in [0,1] -> {name: (N,C,H/stride,W/stride)}.

    ``layers``: stride2, stride4, stride8, stride16, stride32; the first three preserve most of an image's appearance.
    Images are normalised here, by the mean and the deviation with which it was trained (0.5 and 0.5). ``weights``:
    hub | package | a file, as in `imagenet.load`. Raises `UserError` as `VGGFeatures`.
    """

    def __init__(self, network: str, layers: Collection[str], weights: str, key: str):
        super().__init__()
        known = {f"stride{2**k}": k - 1 for k in range(1, 6)}
        _check_layers(network, layers, known, key)
        self.names = sorted(layers, key=known.get)
        name = f"tf_{network}"
        indices = tuple(known[layer] for layer in self.names)
        with unmoved_random_states():
            features = timm.create_model(name, features_only=True, out_indices=indices, pretrained=False)
        state = imagenet.load(name, weights, f"{key}.weights")
        features.load_state_dict(imagenet.fit(features.state_dict(), state, name, weights))
        self.features = features.eval().requires_grad_(False)

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        return dict(zip(self.names, self.features(2 * image - 1), strict=True))

    def train(self, mode: bool = True) -> "EfficientNetFeatures":
        return super().train(False)


FEATURES = {"vgg16": VGGFeatures, "vgg19": VGGFeatures, "efficientnet_lite0": EfficientNetFeatures}


class PerceptualLoss(nn.Module):
    """Mean L1 distance of feature maps, averaged over layers. Two (N,3,H,W) in [0,1] -> scalar.

    ``network``: one of `FEATURES`. Arguments and errors as in `VGGFeatures` and `EfficientNetFeatures`.
    """

    def __init__(
        self,
        network: str = "vgg16",
        layers: Sequence[str] = ("relu1_2", "relu2_2", "relu3_3"),
        weights: str = "hub",
        key: str = "nedr.perceptual",
    ):
        super().__init__()
        self.features = FEATURES[network](network, layers, weights, key)

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        with torch.no_grad():
            targets = self.features(target)
        return torch.stack([F.l1_loss(each, targets[name]) for name, each in self.features(x).items()]).mean()


def _check_layers(network: str, layers: Collection[str], known: Collection[str], key: str) -> None:
    if not layers:
        raise UserError(f"{key}.layers is empty; name some of {', '.join(known)}")
    for name in layers:
        if name not in known:
            raise UserError(f"{network} has no layer '{quoted(name)}'{nearest(name, known)}")


@unmoved_random_states()  # created on first use, which in a resumed run is within a step
def _vgg(network: str, weights: str, key: str) -> nn.Sequential:
    create = {"vgg16": torchvision.models.vgg16, "vgg19": torchvision.models.vgg19}[network]
    if weights == "hub":
        try:
            features = create(weights="IMAGENET1K_V1").features
        except Exception as error:  # offline: URLError, HTTPError, a partial file; all have the same remedy
            raise UserError(
                f"the ImageNet weights of {network} cannot be loaded from the hub ({type(error).__name__}); put "
                f"torchvision's file on this machine and set {key}.weights=FILE, or switch the loss off with "
                f"{key}_weight=0"
            ) from None
    else:
        features = create(weights=None).features
        names = [f"features.{name}" for name in features.state_dict()]
        stored = read_weights(expand_home(weights), names)
        state = {k.removeprefix("features."): v for k, v in stored.items() if k.startswith("features.")}
        try:
            features.load_state_dict(state)
        except RuntimeError:
            raise UserError(f"{weights} does not hold torchvision's {network} (features.0.weight ...)") from None
    for layer in features:
        if isinstance(layer, nn.ReLU):
            layer.inplace = False  # else it would overwrite a collected map
    return features
