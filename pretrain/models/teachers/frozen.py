"""Networks that an objective uses but never trains: tokenizers and teachers from files.

Checkpoints do not contain their weights, which never change, but their fingerprint: with another file, a resumed run
would not be the same run.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pretrain.core.configlib import ConfigError


class Frozen(nn.Module):
    """Holds networks whose tensors are fp32 buffers outside the state dict, always in evaluation mode."""

    def hold(self, network: nn.Module) -> None:
        """Replace every parameter and buffer of `network` by a buffer that is not saved. Call it for each network."""
        for module in network.modules():
            tensors = {**module._parameters, **module._buffers}
            module._parameters.clear()
            module._buffers.clear()
            for name, tensor in tensors.items():
                if tensor is not None:
                    tensor = tensor.detach().float() if tensor.is_floating_point() else tensor.detach()
                module.register_buffer(name, tensor, persistent=False)
        network.eval()

    def train(self, mode: bool = True) -> Frozen:
        """Stays in evaluation mode."""
        del mode
        return super().train(False)


class Fingerprint(nn.Module):
    """The sha256 of an opened file or release, as a buffer of 32 numbers; loading another value is refused.

    Args:
        key: the configuration's key, for the message. path: the file or release.
    """

    sha256: Tensor

    def __init__(self, key: str, path: Path | str, digest: bytes):
        super().__init__()
        self.key, self.path = key, str(path)
        # fp32, like every buffer: engines that cast or reduce buffers keep integers below 256 exact.
        self.register_buffer("sha256", torch.tensor(list(digest), dtype=torch.float32))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        saved = state_dict.get(f"{prefix}sha256")
        if saved is not None and not torch.equal(saved.cpu(), self.sha256.cpu()):
            raise ConfigError(
                self.key,
                [
                    f"{self.path} is not what these weights were trained with: sha256 {_hex(self.sha256)[:12]}, "
                    f"expected {_hex(saved)[:12]}; give the original file or release, or start a new run",
                ],
            )
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def digest_of(path: Path) -> bytes:
    """sha256 of a file, or of the weights and heads of a release folder.

    Raises:
        ValueError: the file does not exist, or the folder is not a release.
    """
    files = [path] if path.is_file() else [path / "model.safetensors", path / "heads.safetensors"]
    result = hashlib.sha256()
    for file in files:
        if not file.is_file():
            raise ValueError(f"{path}: no such file, and no release folder; `fovea release RUN OUT` writes one")
        with file.open("rb") as handle:
            while block := handle.read(1 << 20):
                result.update(block)
    return result.digest()


def _hex(sha256: Tensor) -> str:
    return bytes(int(number) for number in sha256.tolist()).hex()
