"""Write the cases of test_huggingface.py: config.json, shapes and features of small networks of transformers.

    pip install transformers
    python -m tests.models.importers.make_huggingface

Weights are drawn by `drawn` from their names, so that a case holds shapes alone.
"""

from __future__ import annotations

import importlib
import json
import tempfile
import zlib
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

FOLDER = Path(__file__).parent / "huggingface"
SMALL: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 16}
SMALL |= {"patch_size": 8}
MLP = {"intermediate_size": 48}
RELATIVE = {"use_mean_pooling": False, "use_relative_position_bias": True, "use_shared_relative_position_bias": False}
SHARED = {"use_mean_pooling": False, "use_relative_position_bias": False, "use_shared_relative_position_bias": True}
# case -> (class of transformers without "Config" and "Model", options)
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("ViT", MLP),
    "deit": ("DeiT", MLP | {"num_attention_heads": 2}),
    "vit_mae": ("ViTMAE", MLP | {"mask_ratio": 0.0}),
    "vit_msn": ("ViTMSN", MLP),
    "ijepa": ("IJepa", MLP),
    "beit": ("Beit", MLP | RELATIVE),
    "beit_shared": ("Beit", MLP | SHARED | {"use_absolute_position_embeddings": True}),
    "data2vec": ("Data2VecVision", MLP | RELATIVE),
    "dinov2": ("Dinov2", {}),
    "dinov2_swiglu": ("Dinov2", {"use_swiglu_ffn": True}),
    "dinov2_registers": ("Dinov2WithRegisters", {}),
    "dinov3": ("DINOv3ViT", MLP | {"num_register_tokens": 4}),
    "dinov3_gated": ("DINOv3ViT", MLP | {"num_register_tokens": 4, "use_gated_mlp": True, "hidden_act": "silu"}),
    "dinov3_no_registers": ("DINOv3ViT", MLP | {"num_attention_heads": 2}),
}


def drawn(name: str, shape: list[int]) -> Tensor:
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    centre = 1.0 if "norm" in name and name.endswith("weight") else 0.0
    return torch.randn(shape, generator=generator) * 0.2 + centre


def images() -> Tensor:
    return torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def main() -> None:
    transformers = importlib.import_module("transformers")
    FOLDER.mkdir(exist_ok=True)
    for case, (name, options) in CASES.items():
        config = getattr(transformers, f"{name}Config")(**SMALL | options)
        model = getattr(transformers, f"{name}Model")(config).eval()
        with tempfile.TemporaryDirectory() as folder:  # the names in files are others than those of the modules
            path = Path(folder) / "model.safetensors"
            model.save_pretrained(folder)
            shapes = {key: list(value.shape) for key, value in load_file(path).items()}
            save_file({key: drawn(key, shape) for key, shape in shapes.items()}, path, metadata={"format": "pt"})
            model = type(model).from_pretrained(folder).eval()
        with torch.no_grad():
            given = {"noise": torch.arange(4.0)[None]} if name == "ViTMAE" else {}
            features = model(images(), **given).last_hidden_state[0]
        content = {
            "transformers": transformers.__version__,
            "config": json.loads(config.to_json_string(use_diff=False)),
            "shapes": shapes,
            "features": [[round(value, 5) for value in row] for row in features.tolist()],
        }
        (FOLDER / f"{case}.json").write_text(json.dumps(content) + "\n")


if __name__ == "__main__":
    main()
