"""Predictions for photos: python example.py PHOTO... > predictions.json. Needs onnxruntime, numpy and Pillow only."""

import json
import sys  # noqa: F401
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image, ImageOps

HERE = Path(__file__).resolve().parent
FACTS = json.loads((HERE / "export.json").read_text(encoding="utf-8"))
HOW, ANSWER = FACTS["input"]["preparation"], FACTS["answer"]
SESSION = onnxruntime.InferenceSession(HERE / "model.onnx", providers=["CPUExecutionProvider"])


def run(**inputs):
    return [np.asarray(value) for value in SESSION.run(None, inputs)]


def opened(path):
    image = Image.open(path)
    return (ImageOps.exif_transpose(image) if HOW["upright"] else image).convert(HOW["mode"])
