"""The page of keys lists each key once."""

from __future__ import annotations

from launch.pages.configuration import page


def test_what_fine_tuning_shares_with_pretraining_is_listed_once_and_what_it_adds_is_named():
    pretrain, finetune = page().split("## fovea finetune")
    assert "| `global_batch_size` | to be given |" in pretrain and "| `global_batch_size` |" not in finetune
    assert "Keys of `optim` above, and:" in finetune and "| `layer_decay` | `1.0` |" in finetune
    assert "| `gram.weight` |" in pretrain and "| `head.num_queries (detr)` |" in finetune
