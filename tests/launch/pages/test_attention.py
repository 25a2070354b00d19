"""Every cell of the table mechanism x objective trains for a step on tiny sizes, or is refused by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError

from launch.pages.attention import GOLDEN, IN_TIMM, WORKS, model, objectives, page, placeable, verdict
from pretrain.config import PretrainConfig
from pretrain.models.backbones.timm_backbone import TimmBackbone
from pretrain.models.mechanisms import ATTENTION, MECHANISMS
from tests.launch.pages.test_backbones import trains
from tests.objectives.released import reads
from tests.objectives.tiny import small_settings
from tests.runs import ROOT

SMALLER = {"embed_dim": 32, "num_heads": 2, "mlp_ratio": 2.0}
SIZE = (64, 64)
CELLS = [(kind, name, verdict(kind, name)) for kind in placeable() for name in objectives()]


def configured(kind: str, name: str, **placed: Any) -> PretrainConfig:
    own = model(kind)
    own["attention"] = [own["attention"][0] | placed]
    if name == "ijepa" and not own["name"].startswith("timm/"):
        own["class_token"] = False
    section = {"name": name, **small_settings(name), **reads(name, SIZE, 3)}
    return PretrainConfig.model_validate(
        {
            "run_dir": "unused",
            "objective": section,
            "model": own if own["name"].startswith("timm/") else own | SMALLER,
            "data": {"shards": "unused"},
            "optim": {"lr": 1e-3, "global_batch_size": 4, "total_steps": 2},
        }
    )


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "name", "expected"), CELLS)
def test_a_cell_holds(kind: str, name: str, expected: str):
    if expected == WORKS:
        trains(configured(kind, name))
    elif expected == "not last":
        with pytest.raises(ValidationError, match=rf"model\.attention: {kind}: places: .*only the class token is read"):
            configured(kind, name)
        trains(configured(kind, name, places="blocks.0.mlp"))
    else:
        with pytest.raises(ValidationError, match=rf"model\.(attention|name): {name} "):
            configured(kind, name)


def test_every_mechanism_has_golden_cases_and_every_case_that_is_named_is_there():
    assert GOLDEN.keys() == MECHANISMS.keys() - {ATTENTION, "general"}
    cases = {path.stem for path in (ROOT / "tests" / "golden" / "cases").glob("*.json")}
    assert {name for names in GOLDEN.values() for name in names.split(", ")} <= cases


@pytest.mark.slow
@pytest.mark.parametrize("kind", IN_TIMM)
def test_timms_models_with_a_mechanism_of_their_own_can_be_built(kind: str):
    name, arguments = IN_TIMM[kind]
    with torch.device("meta"):
        found = TimmBackbone(name, (64, 64), **arguments)
    names = {type(module).__name__ for module in found.modules()}
    assert names & {
        *("SEModule", "EcaModule", "CbamModule", "CoordAttn", "GlobalContext", "NonLocalAttn"),
        *("XCA", "SelectiveKernel", "SplitAttn", "CondConv2d"),
    }


def test_a_page_without_the_markers_of_a_table_is_refused():
    with pytest.raises(ValueError, match="the page has no lines <!-- mechanisms -->"):
        page("# Attention\n")
