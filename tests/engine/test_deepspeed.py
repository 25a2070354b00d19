"""What the DeepSpeed engine refuses by name, and what it passes on. (That it trains right: test_engines.)"""

from __future__ import annotations

import pytest

from pretrain.engine.deepspeed import deepspeed_config
from tests.engine.settings import settings


def config_of(stage: int = 2, **raw):
    section = {"name": "deepspeed", "zero_stage": stage, "accumulation_steps": 3, "deepspeed": raw}
    chosen = settings(lr=1.0, total_steps=1, micro_batch=4, engine=section)
    return deepspeed_config(chosen["config"], chosen["plan"])


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_what_deepspeed_would_do_behind_our_back_is_off(stage):
    config = config_of(stage)
    assert config["gradient_clipping"] == 0.0
    assert config["train_micro_batch_size_per_gpu"] == 4
    assert config["gradient_accumulation_steps"] == 3
    assert config["zero_optimization"]["stage"] == stage
    assert not {"fp16", "bf16", "torch_autocast", "optimizer", "scheduler"} & config.keys()


def test_raw_keys_are_passed_on():
    config = config_of(communication_data_type="bf16", zero_optimization={"reduce_bucket_size": 1000})
    assert config["communication_data_type"] == "bf16"
    assert config["zero_optimization"]["reduce_bucket_size"] == 1000
    assert config["zero_optimization"]["stage"] == 2


@pytest.mark.parametrize(
    "raw",
    [
        {"train_batch_size": 8},
        {"gradient_clipping": 1.0},
        {"bf16": {"enabled": True}},
        {"torch_autocast": {}},
        {"optimizer": {}},
        {"zero_optimization": {"stage": 1}},
    ],
    ids=lambda raw: next(iter(raw)),
)
def test_raw_keys_we_own_are_refused_by_name(raw):
    name = "zero_optimization.stage" if "zero_optimization" in raw else next(iter(raw))
    with pytest.raises(ValueError, match=rf"{name}: set by optim and engine"):
        config_of(**raw)


@pytest.mark.parametrize(
    ("zero", "message"),
    [
        ({"offload_param": {"device": "cpu"}}, "offload_param: not supported"),
        ({"offload_optimizer": {"device": "nvme"}}, "works with device cpu"),
        ({"offload_optimizer": {"device": "cpu", "ratio": 0.5}}, "ratio 1"),
        ({"round_robin_gradients": True}, "round_robin_gradients: not supported"),
    ],
)
def test_what_our_fragments_cannot_follow_is_refused_by_name(zero, message):
    with pytest.raises(ValueError, match=message):
        config_of(3, zero_optimization=zero)
