from __future__ import annotations

import argparse
import os
import sys
import types
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn

from pretrain.models.importers.safe_pickle import read_tensors

ZIP = [True, False]
SOURCE = """
import torch
from torch import nn

class Conv(nn.Module):
    def __init__(self, n):
        super().__init__()
        self.n = n
        self.w = nn.Parameter(torch.randn(n, 2, 3, 3))
        self.b = nn.Parameter(torch.randn(n))

class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.Sequential(Conv(4), nn.BatchNorm2d(4), Conv(4))
        self.register_buffer("table", torch.arange(6).view(2, 3).t())
        self.tied = self.blocks[0].w
        self.options = {"act": torch.nn.functional.relu}
"""


def encoder() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """A module of a module that is gone once it is saved."""
    module = types.ModuleType("gone_encoder")
    exec(SOURCE, module.__dict__)
    sys.modules["gone_encoder"] = module
    made = module.Encoder()
    return made, {name: tensor.clone() for name, tensor in made.state_dict().items()}


@pytest.mark.parametrize("as_zip", ZIP)
def test_a_pickled_module_gives_its_state_dict_after_its_class_is_gone(tmp_path: Path, as_zip: bool):
    module, expected = encoder()
    torch.save(module, tmp_path / "encoder.pkl", _use_new_zipfile_serialization=as_zip)
    del sys.modules["gone_encoder"]
    with pytest.raises(ModuleNotFoundError):
        torch.load(tmp_path / "encoder.pkl", weights_only=False)
    found = read_tensors(tmp_path / "encoder.pkl")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype, name


@pytest.mark.parametrize("as_zip", ZIP)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool])
def test_a_training_checkpoint_gives_every_tensor_by_its_place(tmp_path: Path, as_zip: bool, dtype: torch.dtype):
    base = (torch.randn(4, 6) * 5).to(dtype)
    base.note = "an attribute"  # type: ignore[attr-defined]
    content = {
        "model": {"a.weight": base, "half": base[1:3, ::2], "empty": torch.empty(0, 3)},
        "optimizer": {"state": {0: {"exp_avg": base.t()}}, "param_groups": [{"params": [0], "lr": 0.1}]},
        "args": argparse.Namespace(lr=1, names={"x"}),
        "list": [torch.ones(2), 5],
    }
    torch.save(content, tmp_path / "c.pth", _use_new_zipfile_serialization=as_zip)
    found = read_tensors(tmp_path / "c.pth")
    expected = {
        "model.a.weight": base,
        "model.half": base[1:3, ::2],
        "model.empty": torch.empty(0, 3),
        "optimizer.state.0.exp_avg": base.t(),
        "list.0": torch.ones(2),
    }
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


class Evil:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


class EvilState:
    """Runs from __setstate__'s place, through a class that exists."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return argparse.Namespace, (), {"x": Evil(self.path)}


@pytest.mark.parametrize("as_zip", ZIP)
@pytest.mark.parametrize("kind", [Evil, EvilState])
def test_a_malicious_pickle_is_read_and_not_executed(tmp_path: Path, as_zip: bool, kind: type):
    canary = tmp_path / "canary"
    path = tmp_path / "evil.pth"
    torch.save({"w": torch.ones(2), "x": kind(canary)}, path, _use_new_zipfile_serialization=as_zip)
    torch.load(path, weights_only=False)
    assert canary.exists()  # the trap works
    canary.unlink()
    assert read_tensors(path).keys() == {"w"}
    assert not canary.exists()


@pytest.mark.parametrize(
    "code",
    [
        b'cbuiltins\neval\n(S\'open("canary", "w")\'\ntR.',
        b"cposix\nsystem\n(S'touch canary'\ntR.",
        b"\x80\x04\x8c\x08builtins\x8c\x07getattr\x93\x8c\x02os\x8c\x06system\x86R\x8c\x0ctouch canary\x85R.",
        b"ctorch.storage\n_load_from_bytes\n(S'x'\ntR.",
    ],
)
def test_hand_written_opcodes_call_nothing(tmp_path: Path, code: bytes, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    with zipfile.ZipFile(tmp_path / "x.pth", "w") as archive:
        archive.writestr("x/data.pkl", code)
    try:
        assert read_tensors(tmp_path / "x.pth") == {}
    except ValueError as error:
        assert "nothing in it was executed" in str(error)
    assert not (tmp_path / "canary").exists()


def test_a_tensor_outside_its_storage_is_refused(tmp_path: Path):
    torch.save({"w": torch.arange(4)}, tmp_path / "w.pth")
    with zipfile.ZipFile(tmp_path / "w.pth") as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    root = next(iter(entries)).partition("/")[0]
    with zipfile.ZipFile(tmp_path / "short.pth", "w") as archive:
        for name, data in entries.items():
            archive.writestr(name, data[:16] if name == f"{root}/data/0" else data)
    with pytest.raises(ValueError, match=r"short\.pth: not a readable torch file"):
        read_tensors(tmp_path / "short.pth")


@pytest.mark.parametrize("part", ["data/0", "data.pkl"])
def test_a_compressed_part_is_refused_for_it_could_swell_beyond_the_memory(tmp_path: Path, part: str):
    torch.save({"w": torch.zeros(10_000)}, tmp_path / "w.pth")
    with zipfile.ZipFile(tmp_path / "w.pth") as archive, zipfile.ZipFile(tmp_path / "bomb.pth", "w") as bomb:
        for name in archive.namelist():
            kind = zipfile.ZIP_DEFLATED if name.endswith(part) else zipfile.ZIP_STORED
            bomb.writestr(name, archive.read(name), compress_type=kind)
    with pytest.raises(ValueError, match=r"bomb\.pth: .*compressed"):
        read_tensors(tmp_path / "bomb.pth")


@pytest.mark.parametrize("cut", [0, 10, 200, 600])
def test_what_is_no_torch_file_is_refused(tmp_path: Path, cut: int):
    torch.save({"w": torch.randn(100)}, tmp_path / "w.pth", _use_new_zipfile_serialization=False)
    (tmp_path / "w.pth").write_bytes((tmp_path / "w.pth").read_bytes()[:cut])
    with pytest.raises(ValueError, match=r"w\.pth: "):
        read_tensors(tmp_path / "w.pth")
    with pytest.raises(ValueError, match="no such file"):
        read_tensors(tmp_path / "absent.pth")


def test_a_file_that_contains_itself_ends(tmp_path: Path):
    circle: dict = {"w": torch.ones(1)}
    circle["self"] = circle
    torch.save(circle, tmp_path / "c.pth")
    assert read_tensors(tmp_path / "c.pth").keys() == {"w"}
