"""Releases that timm cannot open carry graphs that were compared; one that cannot be had never fails a release."""

from __future__ import annotations

import importlib.util
import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain.models.backbones.vit import ViT
from pretrain.models.export import graph as graphs
from pretrain.models.release.folder import read_release, write_release
from pretrain.models.release.graphs import FeatureGraph, time_limit, write_graphs
from pretrain.models.release.manifest import FEATURES_ONNX, FEATURES_PT2, DamagedReleaseError, compare, files_to_seal
from tests.models.release.test_folder import perturbed_module, write

MEAN, STD = (0.5, 0.4, 0.3), (0.25, 0.2, 0.3)
WITH_ECA = [{"kind": "eca", "places": "blocks.*.mlp"}]


@pytest.fixture(autouse=True)
def with_graphs(without_graphs: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pretrain.models.release.graphs.MOST_BYTES", 1_000_000)


def test_weights_above_the_limit_have_no_graphs(tmp_path: Path):
    found = write_graphs(tmp_path, backbone(embed_dim=192, depth=1), mean=MEAN, std=STD)
    assert found["lacking"] == dict.fromkeys(
        (FEATURES_PT2, FEATURES_ONNX), "its weights are larger than 0.001 GB"
    ) and not list(tmp_path.iterdir())


def backbone(**changes: Any) -> ViT:
    torch.manual_seed(0)
    arguments = {"embed_dim": 16, "depth": 1, "num_heads": 2, "attention": WITH_ECA}
    return perturbed_module(ViT((32, 32), 8, **(arguments | changes)))


@pytest.mark.slow
def test_both_graphs_give_the_features_of_the_release_at_any_batch_and_size(tmp_path: Path):
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    write_release(
        tmp_path / "release", backbone(num_registers=1), objective="mae", extra_state={}, record={}, mean=MEAN, std=STD
    )
    folder = tmp_path / "release"
    model = read_release(folder).build().eval()
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    for batch, size in ((1, (32, 32)), (3, (48, 40))):
        pixels = torch.rand(batch, 3, *size)
        with torch.no_grad():
            tokens = model((pixels - mean) / std)
        for run in (graphs.run_program(folder / FEATURES_PT2), graphs.session(folder / FEATURES_ONNX)):
            features, found = run(pixels)
            assert torch.allclose(found, tokens, atol=1e-5) and torch.allclose(features, tokens[:, 0], atol=1e-5)

    record = json.loads((folder / "fovea.json").read_text())["graphs"]
    for rows in record["files"].values():
        assert len({row["batch"] for row in rows}) == 3 and len({tuple(row["size"]) for row in rows}) == 4
    listed = [file.name for file in compare(folder) or ()]
    assert {FEATURES_PT2, FEATURES_ONNX} <= set(listed) and set(files_to_seal(folder)) == set(listed)
    card = (folder / "README.md").read_text()
    assert f'torch.export.load("{FEATURES_PT2}")' in card and f'InferenceSession("{FEATURES_ONNX}")' in card
    (folder / FEATURES_ONNX).write_bytes(b"another")
    with pytest.raises(DamagedReleaseError, match=FEATURES_ONNX):
        read_release(folder)


def test_a_release_that_timm_opens_has_no_graphs(tmp_path: Path):
    folder = write(tmp_path / "release", backbone(attention=[]))
    assert (folder / "config.json").is_file() and not list(folder.glob("features.*"))
    assert "graphs" not in json.loads((folder / "fovea.json").read_text())


def test_a_failing_exporter_leaves_a_release_whose_card_gives_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def fail(*_: Any) -> None:
        raise TypeError("no such operator\nwith pages of hints")

    monkeypatch.setattr(graphs, "trace", fail)
    folder = write(tmp_path / "release", backbone())
    assert read_release(folder).build() and not list(folder.glob("features.*"))
    card = (folder / "README.md").read_text()
    assert "There is no `features.pt2`: no such operator." in card and "torch.export.load" not in card


def test_a_graph_that_computes_something_else_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(graphs, "trace", lambda *_: None)
    monkeypatch.setattr(torch.export, "save", lambda _, path: path.write_bytes(b"a graph"))
    monkeypatch.setattr(graphs, "run_program", lambda _: lambda pixels: shifted(graph(pixels)))
    monkeypatch.setattr(graphs, "write_onnx", lambda _, __, path: path.write_bytes(b"a graph"))
    monkeypatch.setattr(graphs, "session", lambda _: lambda pixels: graph(pixels))
    graph = FeatureGraph(backbone(), MEAN, STD)
    found = write_graphs(tmp_path, backbone(), mean=MEAN, std=STD)
    assert "largest difference 1.0e-02 from ViT;" in found["lacking"][FEATURES_PT2]
    assert list(found["files"]) == [FEATURES_ONNX] == [path.name for path in tmp_path.iterdir()]


def shifted(outputs: Any) -> Any:
    return tuple(output + 0.01 for output in outputs)


def test_without_onnx_there_is_only_the_other_graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    monkeypatch.setattr(graphs, "trace", lambda *_: None)
    monkeypatch.setattr(torch.export, "save", lambda _, path: path.write_bytes(b"a graph"))
    monkeypatch.setattr(graphs, "run_program", lambda _: graph)
    graph = FeatureGraph(backbone(), MEAN, STD)
    found = write_graphs(tmp_path, backbone(), mean=MEAN, std=STD)
    assert list(found["files"]) == [FEATURES_PT2]
    assert "onnx, onnxscript, onnxruntime is not installed" in found["lacking"][FEATURES_ONNX]


def test_an_export_that_takes_too_long_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def stubborn(*_: Any) -> None:
        while True:
            try:
                time.sleep(10)
            except Exception:  # as exporters hide errors
                continue

    monkeypatch.setattr(graphs, "trace", stubborn)
    found = write_graphs(tmp_path, backbone(), mean=MEAN, std=STD, seconds=0.05)
    assert found["lacking"][FEATURES_PT2] == "not done within 0.05 seconds"
    with time_limit(0.2):
        pass
    time.sleep(0.25)  # no alarm is left
