"""What the DeepSpeed engine refuses by name, and what it passes on. (That it trains right: test_engines.)"""

from __future__ import annotations

import pytest

from pretrain.engine.build import build_engine
from pretrain.engine.deepspeed import deepspeed_config
from pretrain.engine.optim.optimizer import OptimSettings
from pretrain.engine.trainable import EngineSettings


def config_of(stage: int = 2, **raw):
    settings = EngineSettings(name="deepspeed", zero_stage=stage, micro_batch=4, accumulation_steps=3, deepspeed=raw)
    return deepspeed_config(settings)


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
    with pytest.raises(ValueError, match=rf"engine\.deepspeed: {name}: set by optim and engine"):
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


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="zero_stage 4"):
        config_of(4)
    with pytest.raises(ValueError, match="engine 'fsdp': expected one of accelerate, deepspeed"):
        build_engine(
            None,  # type: ignore[arg-type]
            optim=OptimSettings(lr=1.0, total_steps=1),
            settings=EngineSettings(name="fsdp"),
            world=None,  # type: ignore[arg-type]
            seed=0,
        )
