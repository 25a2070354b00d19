"""Mistakes in a fine-tuning configuration and its data are named before torch is imported."""

from __future__ import annotations

from pathlib import Path

import pytest

from finetune.__main__ import check, main
from finetune.config import DataSource, FinetuneConfig, ModelSource
from finetune.run import FREE_KEYS
from launch.cli import main as fovea
from pretrain.core.configlib import ConfigError, load_config
from pretrain.engine.session.folder import check_same_run, write_records
from tests.data.tars import image_bytes
from tests.finetune.runs import make_release, write_config
from tests.runs import SHARDS


def problems(tmp_path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as error:
        check(str(write_config(tmp_path, "run")), overrides, world_size=1)
    return str(error.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("task.name=clasification", "task.name: unknown name 'clasification' (did you mean classification?)"),
        ("model.relase=x", "model.relase: unknown key (did you mean release?)"),
        (
            "model.official=x.pth",
            "model: give exactly one of release, official, timm, huggingface, got release, official",
        ),
        ("model.weights=x.pth", "model: weights: only for a timm model"),
        ("model.mean=[123.7,116.3,103.5]", "model.mean.0: Input should be less than or equal to 1"),
        ("model.std=[0.5]", "model.std: 1 values for images of 3 channels"),
        (
            "data.train.fraction=0.5",
            "data.train: give one of fraction, per_class, limit, without_fraction, got fraction, limit",
        ),
        ("data.train.masks=x", "data.train.masks: given, but task classification does not read it; remove it"),
        ("data.val.format=yolo", "data.val.format: yolo is not read by classification; one of"),
        ("evaluate.every_epochs=1", "evaluate: give every_steps or every_epochs, not both"),
        ("engine.precision=fp16 engine.device=cpu", "engine.precision: fp16 needs a GPU"),
        ("optim.clip_grad=1 optim.clip_mode=per_module", "optim.clip_mode: per_module is for pretraining objectives"),
        ("engine.deepspeed.wall_clock_breakdown=true", "engine.deepspeed: given, but engine.name is accelerate"),
        ("engine.name=deepspeed engine.zero_stage=3", "engine.zero_stage: under ZeRO-3 no rank holds all weights"),
        ("optim.global_batch_size=81", "81 images per step, but the data set has only 80"),
        ("engine.accumulation_steps=3", "nearest: 9"),
        ("data.train.images=nowhere", "data.train"),
        ("optim.schedule=poly optim.power=0", "optim.power: Input should be greater than 0"),
    ],
)
def test_an_invalid_configuration_is_refused_with_the_remedy(tmp_path: Path, override: str, message: str):
    assert message in problems(tmp_path, *override.split())


def test_all_mistakes_are_reported_at_once(tmp_path: Path):
    said = problems(tmp_path, "optim.warmup_step=3", "model.imgsize=3", "seed=-1")
    assert said.count("\n") == 3


def test_limits_and_paths_may_change_on_resume_and_the_training_may_not(tmp_path: Path):
    config = load_config(FinetuneConfig, write_config(tmp_path, "run"), [])
    sets = {f"data.{name}": {"fingerprint": "0", "num_samples": 80} for name in ("train", "val")}
    (tmp_path / "run").mkdir()
    write_records(tmp_path / "run", config, sets, world_size=1, device="cpu")

    def goes_on(*changes: str) -> None:
        changed = load_config(FinetuneConfig, write_config(tmp_path, "run"), changes)
        check_same_run(tmp_path / "run", changed, dict.fromkeys(sets, "0"), free=FREE_KEYS)

    goes_on("data.max_bad_fraction=0.2", "data.strict=true", "evaluate.batch_size=1")
    goes_on("data.train.images=elsewhere", "data.train.classes=elsewhere/classes.json")
    with pytest.raises(ConfigError, match=r"data\.train\.subset_seed: the run was started with 0, now 1"):
        goes_on("data.train.subset_seed=1")


def test_a_timm_model_needs_weights_or_is_a_control():
    with pytest.raises(ValueError, match="give a local file or folder for the timm model, or random: true"):
        ModelSource(timm="vit_base_patch16_224")
    assert ModelSource(timm="vit_base_patch16_224", random=True).source == ("timm", "vit_base_patch16_224")
    assert ModelSource(release="x", img_size=(32, 64)).size == (32, 64)
    assert ModelSource(release="x", img_size=32).size == (32, 32)


def test_epochs_between_evaluations_become_steps(tmp_path: Path):
    config = load_config(FinetuneConfig, write_config(tmp_path, "run"), ["evaluate={every_epochs: 0.5}"])
    assert config.evaluate.period(11) == 6 and config.evaluate.period(1) == 1
    never = load_config(FinetuneConfig, write_config(tmp_path, "run"), ["evaluate={}"])
    assert never.evaluate.period(11) == 0


def test_checking_prints_what_would_run_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    make_release(tmp_path / "backbone")
    assert main([str(write_config(tmp_path, "run")), "--check", "model.random=true"]) == 0
    said = capsys.readouterr().out
    assert "train      80 images, 81 classes, 10 steps an epoch" in said and "val        21 images" in said
    assert "random weights (control)" in said and not (tmp_path / "run").exists()


def test_checking_finds_missing_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main([str(write_config(tmp_path, "run")), "--check", f"model.release={tmp_path}/none"]) == 2
    assert f"model.release: {tmp_path}/none does not exist" in capsys.readouterr().err


def test_checking_finds_a_damaged_release(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder = make_release(tmp_path / "backbone")
    assert main([str(write_config(tmp_path, "run")), "--check"]) == 0
    (folder / "heads.safetensors").write_bytes(b"")
    assert main([str(write_config(tmp_path, "run")), "--check"]) == 2
    assert f"model.release: {folder}: damaged: heads.safetensors has 0 bytes" in capsys.readouterr().err


@pytest.mark.slow
def test_checking_builds_the_task_as_the_run_does(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    make_release(tmp_path / "backbone")
    nuclei = [f"model.release={tmp_path / 'backbone'}", f"run_dir={tmp_path / 'run'}", "--check"]
    assert main(["configs/finetune/nuclei_small.yaml", *nuclei, "task.head.anchors=[10, 20]"]) == 2
    assert "2 anchor sizes for 3 levels: give one for each" in capsys.readouterr().err
    assert main(["configs/finetune/nuclei_small.yaml", *nuclei]) == 0
    assert not (tmp_path / "run").exists()


def test_configurations_of_the_other_kind_are_named_in_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for command in (["doctor", str(tmp_path)], ["scale", "run.yaml", "--gpus", "8", "--batch-per-gpu", "4"],
                    ["launch", "plan", "run.yaml", "--nodes", "2", "--gpu", "h200"]):  # fmt: skip
        (tmp_path / "config.yaml").write_text(Path("configs/finetune/nuclei_small.yaml").read_text())
        (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
        given = [str(tmp_path / "config.yaml") if word == "run.yaml" else word for word in command]
        assert fovea(given) == 2, command
        said = capsys.readouterr().err
        assert "1 problem\n  a configuration of fine-tuning (it has task, and no objective)" in said, said
    with pytest.raises(ConfigError, match="a configuration of pretraining"):
        load_config(FinetuneConfig, "configs/debug/mae.yaml")


def test_strict_refuses_wrong_annotations_and_the_default_counts_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    table = tmp_path / "labels.csv"
    for name in ("a", "c"):
        (tmp_path / f"{name}.png").write_bytes(image_bytes(0, image_format="PNG"))
    table.write_text("filename,label\na.png,x\nb.jpg,y\nc.png,x\n")
    make_release(tmp_path / "backbone")
    config = str(write_config(tmp_path, "run"))
    data = [f"data.{name}={{images: {table}, format: csv}}" for name in ("train", "val")]
    data.append("optim.global_batch_size=2")
    assert main([config, *data, "--check"]) == 2
    assert "1 of 3 labels cannot be used: 1 x missing image" in capsys.readouterr().err
    data.append("data.max_lost_fraction=0.5")
    assert main([config, *data, "--check"]) == 0
    said = capsys.readouterr().out
    assert "findings   train: 1 x" in said and "b.jpg" in said
    assert main([config, *data, "--check", "--strict"]) == 2
    assert "data.train (data.strict): " in capsys.readouterr().err


def test_a_source_can_be_a_list_of_shards():
    assert DataSource(images=[str(SHARDS / "train")]).images == [str(SHARDS / "train")]
