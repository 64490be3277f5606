import os
import pickle
import random
import zipfile
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from utils import checkpoint
from utils.errors import UserError

STATE = {"networks": {"a.weight": torch.arange(6.0).view(2, 3)}, "step": 3, "rate": 1e-4, "list": [1, "x", None]}


def equal(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    return a == b


def test_round_trip(tmp_path):
    path = tmp_path / "new" / "folder" / "last.pt"
    checkpoint.save(path, STATE)
    state = checkpoint.read(path)
    assert (state.pop("format"), state.pop("version")) == (checkpoint.FORMAT, checkpoint.VERSION)
    assert equal(state, STATE)
    assert [entry.name for entry in path.parent.iterdir()] == ["last.pt"]


class Interrupted(BaseException):
    """Like a KeyboardInterrupt: no Exception."""


@pytest.mark.parametrize("error", [RuntimeError, OSError, ValueError, Interrupted])
def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch, error):
    path = tmp_path / "last.pt"
    checkpoint.save(path, STATE)

    def fail(state, file):
        Path(file).write_bytes(b"half of it")
        raise error("disk trouble")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(UserError if error in (RuntimeError, OSError) else error, match="disk trouble"):
        checkpoint.save(path, {"step": 4})
    assert checkpoint.read(path)["step"] == 3
    assert [entry.name for entry in tmp_path.iterdir()] == ["last.pt"]


@pytest.mark.skipif(os.name != "posix", reason="needs a limit on file sizes")
def test_a_full_disk(tmp_path):
    """A real write that the system refuses half-way: no file may grow beyond 100 kB."""
    resource = pytest.importorskip("resource")
    checkpoint.save(tmp_path / "last.pt", {"step": 3})
    checkpoint.save_weights(tmp_path / "weights.safetensors", {"a": torch.ones(2)}, {"step": 3})
    limits, big = resource.getrlimit(resource.RLIMIT_FSIZE), torch.zeros(1_000_000)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(UserError, match="cannot write"):
            checkpoint.save(tmp_path / "last.pt", {"step": 4, "big": big})
        with pytest.raises(UserError, match="cannot write"):
            checkpoint.save_weights(tmp_path / "weights.safetensors", {"a": big}, {"step": 4})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert checkpoint.read(tmp_path / "last.pt")["step"] == 3
    assert checkpoint.read_safetensors(tmp_path / "weights.safetensors")[1] == {"step": 3}
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["last.pt", "weights.safetensors"]


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="cannot write"):
        checkpoint.save(tmp_path / "file" / "last.pt", STATE)


def test_absent_empty_or_a_folder(tmp_path):
    with pytest.raises(UserError, match="no checkpoint"):
        checkpoint.read(tmp_path / "absent.pt")
    with pytest.raises(UserError, match="no checkpoint"):
        checkpoint.read(tmp_path)
    (tmp_path / "empty.pt").touch()
    with pytest.raises(UserError, match="is empty"):
        checkpoint.read(tmp_path / "empty.pt")
    with pytest.raises(UserError, match="no checkpoint"):
        checkpoint.read_safetensors(tmp_path / "absent.safetensors")


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> dict[str, bytes]:
    """A checkpoint as each kind of file."""
    folder = tmp_path_factory.mktemp("whole")
    checkpoint.save(folder / "zip.pt", STATE)
    torch.save({"a": torch.ones(3)}, folder / "legacy.pt", _use_new_zipfile_serialization=False)
    checkpoint.save_weights(folder / "a.safetensors", {"a": torch.ones(3)}, {"model": "nedr"})
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@settings(max_examples=60, deadline=None)
@given(st.binary(min_size=1, max_size=80), st.sampled_from([b"", b"\x80\x02", b"PK\x03\x04", b"<html>"]))
def test_garbage(tmp_path_factory, body, head):
    path = tmp_path_factory.getbasetemp() / "garbage.pt"
    path.write_bytes(head + body)
    with pytest.raises(UserError):
        checkpoint.read(path)
    with pytest.raises(UserError):
        checkpoint.read_safetensors(path)


def read(path: Path) -> None:
    (checkpoint.read_safetensors if path.suffix == ".safetensors" else checkpoint.read)(path)


@settings(max_examples=80, deadline=None)
@given(st.sampled_from(["zip.pt", "legacy.pt", "a.safetensors"]), st.floats(0, 0.999))
def test_truncated(tmp_path_factory, whole, name, share):
    path = tmp_path_factory.getbasetemp() / name
    path.write_bytes(whole[name][: int(share * len(whole[name]))])
    with pytest.raises(UserError, match=name):
        read(path)


@settings(max_examples=80, deadline=None)
@given(st.sampled_from(["zip.pt", "legacy.pt", "a.safetensors"]), st.floats(0, 0.999), st.integers(0, 7))
def test_a_flipped_bit_is_a_user_error(tmp_path_factory, whole, name, place, bit):
    damaged = bytearray(whole[name])
    damaged[int(place * len(damaged))] ^= 1 << bit
    path = tmp_path_factory.getbasetemp() / name
    path.write_bytes(damaged)
    try:  # a bit of a number may be lost unseen, anything else is refused in one line
        read(path)
    except UserError as error:
        assert name in str(error)  # noqa: PT017


class Evil:
    """Unpickled as a call that would leave a file behind."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("how", ["torch.save", "pickle"])
def test_code_in_a_file_is_never_executed(tmp_path, how):
    path, trace = tmp_path / "evil.pt", tmp_path / "trace"
    if how == "pickle":
        path.write_bytes(pickle.dumps({"a": Evil(trace)}, protocol=2))
    else:
        torch.save({"a": Evil(trace)}, path)
    with pytest.raises(UserError, match="code in checkpoints is never run"):
        checkpoint.read(path)
    assert not trace.exists()


class Author(nn.Module):
    """A network whose class only its authors have."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 3)


OBJECTS = {"the network": lambda net: net, "a network in a dict": lambda net: {"epoch": 1, "net": net}}


@pytest.mark.parametrize("case", OBJECTS)
def test_pickled_networks_are_refused_and_the_remedy_works(tmp_path, monkeypatch, case):
    network, path = Author(), tmp_path / "whole.pt"
    torch.save(OBJECTS[case](network), path)
    with pytest.raises(UserError, match=r"holds objects.*code in checkpoints is never run") as refusal:
        checkpoint.read(path)
    assert "\n" not in str(refusal.value)
    monkeypatch.chdir(tmp_path)
    exec(str(refusal.value).split('python -c "')[1].removesuffix('"'), {})
    assert equal(checkpoint.read_weights(tmp_path / "weights.pth", ["layer.weight"]), dict(network.state_dict()))


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_torchscript_files_are_refused_and_the_remedy_works(tmp_path, monkeypatch):
    torch.jit.trace(nn.Linear(2, 3), torch.ones(1, 2)).save(tmp_path / "program.pt")
    with pytest.raises(UserError, match="TorchScript") as refusal:
        checkpoint.read(tmp_path / "program.pt")
    monkeypatch.chdir(tmp_path)
    exec(str(refusal.value).split('python -c "')[1].removesuffix('"'), {})
    assert checkpoint.read(tmp_path / "weights.pth").keys() == {"weight", "bias"}


def test_another_pickle_protocol_is_reported(tmp_path):
    torch.save({"a.weight": torch.ones(2)}, tmp_path / "a.pt", pickle_protocol=4)
    with pytest.raises(UserError, match="pickle_protocol"):
        checkpoint.read(tmp_path / "a.pt")


def test_files_that_are_not_checkpoints_are_refused(tmp_path):
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(UserError, match="holds a list"):
        checkpoint.read(tmp_path / "list.pt")
    (tmp_path / "page.pt").write_text("<html>404 not found</html>")
    with pytest.raises(UserError, match="damaged, cut short or not a PyTorch file"):
        checkpoint.read(tmp_path / "page.pt")


def test_files_of_a_newer_version(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "VERSION", checkpoint.VERSION + 1)
    checkpoint.save(tmp_path / "last.pt", STATE)
    checkpoint.save_weights(tmp_path / "w.safetensors", {"a": torch.ones(1)}, {})
    monkeypatch.undo()
    for read in (
        lambda: checkpoint.read(tmp_path / "last.pt"),
        lambda: checkpoint.read_safetensors(tmp_path / "w.safetensors"),
    ):
        with pytest.raises(UserError, match="newer version"):
            read()


def test_safetensors_round_trip(tmp_path):
    path = tmp_path / "weights.safetensors"
    weights = {"a": torch.rand(3, 4).T, "n": torch.tensor(5), "h": torch.rand(2).half()}  # a.T is not contiguous
    metadata = {"model": "nedr", "settings": {"x": [1, 2.5, None, "ü"]}}
    checkpoint.save_weights(path, weights, metadata)
    read, found = checkpoint.read_safetensors(path)
    assert equal(read, weights)
    assert found == metadata


def test_safetensors_of_others(tmp_path):
    path = tmp_path / "foreign.safetensors"
    safetensors.torch.save_file({"a": torch.ones(2)}, path, {"format": "pt"})
    weights, metadata = checkpoint.read_safetensors(path)
    assert torch.equal(weights["a"], torch.ones(2))
    assert metadata is None


def test_read_weights_takes_the_set_with_most_of_the_names(tmp_path):
    weights, other = {"a.weight": torch.ones(2), "b.weight": torch.ones(1)}, {"a.weight": torch.zeros(2)}
    torch.save({"teacher": other, "state_dict": {f"module.{k}": v for k, v in weights.items()}}, tmp_path / "a.pth")
    torch.save(weights, tmp_path / "b.pth")
    for name in ("a.pth", "b.pth"):
        assert equal(checkpoint.read_weights(tmp_path / name, weights), weights)
    torch.save({"epoch": 3}, tmp_path / "none.pth")
    assert checkpoint.read_weights(tmp_path / "none.pth", weights) == {}


def draw() -> list:
    return [torch.rand(3).tolist(), random.random(), random.gauss(0, 1), np.random.rand(2).tolist(), np.random.randn()]


def test_random_states_through_a_file(tmp_path):
    draw()  # leaves a second normal number waiting in python's and numpy's generators
    checkpoint.save(tmp_path / "a.pt", {"random": checkpoint.random_states()})
    expected = draw()
    draw()
    checkpoint.set_random_states(checkpoint.read(tmp_path / "a.pt")["random"])
    assert draw() == expected


def test_load_strict():
    module, other = nn.Linear(2, 3), nn.Linear(2, 3)
    checkpoint.load_strict(module, other.state_dict(), "it")
    assert torch.equal(module.weight, other.weight)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bias": None}, r"1 missing \(bias\)"),
        ({"extra": torch.ones(1)}, r"1 unknown \(extra\)"),
        ({"bias": torch.ones(4)}, r"1 of another shape \(bias\)"),
        ({f"extra{k}": torch.ones(1) for k in range(9)}, r"9 unknown \(extra0, extra1, extra2, \.\.\.\)"),
    ],
)
def test_load_strict_refuses_and_changes_nothing(change, message):
    module = nn.Linear(2, 3)
    before = {key: value.clone() for key, value in module.state_dict().items()}
    state = {k: v for k, v in (nn.Linear(2, 3).state_dict() | change).items() if v is not None}
    with pytest.raises(UserError, match=message):
        checkpoint.load_strict(module, state, "it")
    assert equal(dict(module.state_dict()), before)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nonfinite_weights_never_replace_finite_ones(tmp_path, bad):
    file, good = tmp_path / "weights.safetensors", {"a": torch.ones(3), "steps": torch.tensor(7)}
    checkpoint.save_weights(file, good, {"step": 1})
    before = file.read_bytes()
    with pytest.raises(UserError, match=r"not written, the earlier file is kept: a of 2 weights hold NaN or infinity"):
        checkpoint.save_weights(file, good | {"a": torch.tensor([1, bad, 1])}, {"step": 2})
    assert file.read_bytes() == before


def written(folder: Path) -> tuple[Path, Path]:
    """A run and weights in ``folder``, of the same numbers every time."""
    weights = {f"{name}.weight": torch.arange(6.0).view(2, 3) + 1 for name in "cab"}
    checkpoint.save(folder / "last.pt", {"networks": weights, "step": 3})
    checkpoint.save_weights(folder / "weights.safetensors", weights, {"model": "nedr", "settings": {"x": 1}})
    return folder / "last.pt", folder / "weights.safetensors"


def test_the_same_state_gives_the_same_bytes_in_every_process(tmp_path, monkeypatch):
    one = written(tmp_path / "one")
    for pid in range(5):  # safetensors' own order of the header's texts changes from call to call
        monkeypatch.setattr(os, "getpid", lambda pid=pid: pid)
        for a, b in zip(one, written(tmp_path / "other"), strict=True):
            assert a.read_bytes() == b.read_bytes()


@pytest.mark.skipif(os.name != "posix", reason="needs umask")
@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o027, 0o640)])
def test_file_modes_follow_the_umask(tmp_path, mask, mode):
    before = os.umask(mask)
    try:
        assert [path.stat().st_mode & 0o777 for path in written(tmp_path)] == [mode, mode]
    finally:
        os.umask(before)


def test_every_flipped_bit_of_a_weight_is_detected(tmp_path):
    for path in written(tmp_path):
        data = path.read_bytes()
        place = data.index(np.float32([1, 2, 3, 4, 5, 6]).tobytes())
        for k in range(0, 24 * 8, 7):
            damaged = bytearray(data)
            damaged[place + k // 8] ^= 1 << k % 8
            path.write_bytes(damaged)
            with pytest.raises(UserError, match="has changed since it was written"):
                read(path)


def test_a_changed_value_is_detected_and_files_without_a_checksum_load(tmp_path):
    path, _ = written(tmp_path)
    state = torch.load(path)
    torch.save(state | {"step": 4}, path)
    with pytest.raises(UserError, match="has changed since it was written"):
        checkpoint.read(path)
    del state["checksum"]
    torch.save(state | {"step": 4}, path)
    assert checkpoint.read(path)["step"] == 4
    header = {"format": checkpoint.FORMAT, "version": "1", "metadata": '{"model": "nedr"}'}
    safetensors.torch.save_file({"a": torch.ones(2)}, tmp_path / "old.safetensors", header)
    assert checkpoint.read_safetensors(tmp_path / "old.safetensors")[1] == {"model": "nedr"}


ODD_FIELDS = {
    "version": ["1", None, 1.5, True, -1],
    "model": [3, ["nedr"]],
    "settings": ["x", {"a": b"x"}, {"a": 10**30}, {1: 2}],
    "step": [-1, "3", 2**70, None],
    "best": ["x"],
    "networks": [[], {"a": "x"}, {1: torch.ones(2)}],
    "ema": [{"weights": 3, "steps": 1}, {"weights": {}}, []],
    "updater": [3],
    "random": [[]],
    "others": [{}],
}


@pytest.mark.parametrize("field", ODD_FIELDS)
def test_fields_of_another_type_are_refused_by_name(tmp_path, field):
    for value in ODD_FIELDS[field]:
        torch.save({"format": checkpoint.FORMAT, "version": 1, "model": "nedr", field: value}, tmp_path / "last.pt")
        with pytest.raises(UserError, match=f"(its '|the ){field}"):
            checkpoint.read(tmp_path / "last.pt")


@pytest.mark.parametrize("text", ["[" * 1000 + "]" * 1000, "[1]", "3", "null", "{"])
def test_metadata_that_are_no_mapping_are_refused(tmp_path, text):
    header = {"format": checkpoint.FORMAT, "version": "1", "metadata": text}
    safetensors.torch.save_file({"a": torch.ones(2)}, tmp_path / "a.safetensors", header)
    for reading in (checkpoint.read_safetensors, checkpoint.read_metadata):
        with pytest.raises(UserError, match="its metadata is damaged"):
            reading(tmp_path / "a.safetensors")


def endless() -> dict:
    state = {"weight": torch.ones(2)}
    return state | {"module": state, "list": [state]}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.eye(2).to_sparse(), "sparse"),
        (torch.ones(2, device="meta"), "without data"),
        (torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8), "quantized"),
        (torch.ones(1).half().expand(2**15, 2**15), "many times the size of the file"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_unsupported_tensors_are_refused_by_name(tmp_path, value, message):
    torch.save({"net": {"a.weight": value}}, tmp_path / "a.pth")
    with pytest.raises(UserError, match=rf"'net\.a\.weight' .*{message}"):
        checkpoint.read(tmp_path / "a.pth")


def test_cyclic_structures_are_refused_and_shared_ones_are_not(tmp_path):
    torch.save(endless(), tmp_path / "a.pth")
    assert checkpoint.read(tmp_path / "a.pth").keys() == {"weight", "module", "list"}
    state = {"weight": torch.ones(2)}
    state["module"] = state
    torch.save(state, tmp_path / "a.pth")
    with pytest.raises(UserError, match="'module' contains itself"):
        checkpoint.read(tmp_path / "a.pth")


def test_archives_that_expand_too_far_are_refused(tmp_path):
    torch.save({"a.weight": torch.zeros(2**20)}, tmp_path / "a.pth")
    packed = zipfile.ZipFile(tmp_path / "b.pth", "w", zipfile.ZIP_DEFLATED)
    with zipfile.ZipFile(tmp_path / "a.pth") as old, packed as new:
        for member in old.infolist():
            new.writestr(member.filename, old.read(member))
    with pytest.raises(UserError, match="is compressed"):
        checkpoint.read(tmp_path / "b.pth")


BAD = {
    "text": ({"weight": "x"}, r"1 not tensors \(weight\)"),
    "whole numbers": ({"weight": torch.ones(3, 2, dtype=torch.int64)}, r"1 not floating-point \(weight\)"),
    "complex": ({"weight": torch.ones(3, 2, dtype=torch.complex64)}, r"1 not floating-point \(weight\)"),
    "NaN": ({"bias": torch.full((3,), torch.nan)}, "bias of 2 weights hold NaN or infinity; .* had diverged"),
    "zeros": ({"weight": torch.zeros(3, 2)}, r"all weights are zero \(weight, \.\.\.\)"),
}


@pytest.mark.parametrize("case", BAD)
def test_weights_that_are_not_tensors_are_refused_by_name(case):
    change, message = BAD[case]
    module = nn.Linear(2, 3)
    with pytest.raises(UserError, match=message):
        checkpoint.load_strict(module, module.state_dict() | change, "it")


def test_invalid_random_states_are_refused():
    states = checkpoint.random_states()
    kind, keys, _, *rest = states["numpy"]
    for change in ({"numpy": (kind, keys, 10**6, *rest)}, {"torch": torch.zeros(3)}, {"python": 3}):
        with pytest.raises(UserError, match="random states are damaged"):
            checkpoint.set_random_states(states | change)
    checkpoint.set_random_states(states)


def test_a_flipped_bit_in_a_foreign_file_is_detected(tmp_path):
    """By the CRC that torch.save writes; a file for which it was told to write none is read."""
    file = tmp_path / "official.pth"
    torch.save({"a": torch.zeros(1000), "b": torch.ones(3)}, file)
    whole = bytearray(file.read_bytes())
    whole[whole.index(bytes(2000)) + 7] ^= 4
    file.write_bytes(whole)
    with pytest.raises(UserError, match=r"official\.pth: .*data/0 in it has changed since it was written"):
        checkpoint.read(file)
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"a": torch.zeros(1000)}, file)
    finally:
        torch.serialization.set_crc32_options(before)
    assert len(checkpoint.read(file)["a"]) == 1000
