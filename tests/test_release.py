"""What a release says of the run it is of."""

from __future__ import annotations

import json
from pathlib import Path

from pretrain.config import PretrainConfig
from pretrain.core.configlib import load_config
from pretrain.release import _last_metrics

CONFIG = Path(__file__).parent.parent / "configs" / "debug" / "mae.yaml"


def test_a_row_cut_short_by_a_kill_or_written_just_now_does_not_keep_a_run_from_being_released(tmp_path: Path):
    config = load_config(PretrainConfig, CONFIG, ["probe={train_shards: a, val_shards: b}"])
    whole = [{"step": 0, "knn/cls": 0.1, "knn/pixels": 0.3}, {"step": 10, "knn/cls": 0.4}, {"step": 20, "knn/cls": 0.6}]
    text = "".join(json.dumps(row) + "\n" for row in whole)
    (tmp_path / "metrics.jsonl").write_text(text + '{"step": 21, "lo')
    assert _last_metrics(tmp_path / "metrics.jsonl", 15, config) == {"cls 20-NN top-1, cosine, T=0.07, b": 0.4}
