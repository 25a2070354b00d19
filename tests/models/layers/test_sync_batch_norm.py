from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from timm.layers import BatchNormAct2d  # pyright: ignore[reportPrivateImportUsage]
from torch import nn

from pretrain.models.layers.sync_batch_norm import BatchStatistics, SyncBatchNorm, synchronized
from tests.engine.ranks import launch
from tests.models.layers.norm_ranks import BATCH, both_halves, images, network, outcome, target


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list]:
    out = tmp_path_factory.mktemp("ranks")
    return out, launch(both_halves, world=2, out=out)


@pytest.mark.processes
def test_two_ranks_give_values_gradients_and_statistics_of_one_with_the_whole_batch(two_ranks):
    whole = outcome(network(), images(), target())
    halves = [load_file(two_ranks[0] / f"rank{rank}.safetensors") for rank in range(2)]
    for name, expected in whole.items():
        parts = [half[name] for half in halves]
        if name in ("out", "input"):
            # A mean over half the batch weighs each sample twice.
            got = torch.cat(parts) / (2 if name == "input" else 1)
        elif name.startswith("grad."):
            got = (parts[0] + parts[1]) / 2
        else:
            assert torch.equal(*parts), name
            got = parts[0]
        torch.testing.assert_close(got, expected, atol=1e-10, rtol=1e-10, msg=name)
    assert len(halves[0]["out"]) == BATCH // 2


@pytest.mark.processes
def test_bf16_input_gives_bf16_output_from_fp32_statistics(two_ranks):
    dtypes, means = zip(*(result["bf16"] for result in two_ranks[1]), strict=True)
    assert set(dtypes) == {"torch.bfloat16"}
    assert abs(sum(means)) < 1e-2, "over both ranks the mean is 0"


@pytest.mark.processes
def test_gathered_rows_stand_in_order_of_rank(two_ranks):
    assert all(result["gathered"] == [0.0, 0.0, 1.0, 1.0] for result in two_ranks[1])


@pytest.mark.processes
def test_one_sample_on_each_of_two_ranks_is_a_batch_of_two(two_ranks):
    assert all(result["one each"] == "no error" for result in two_ranks[1])


def test_alone_it_is_torchs_batch_norm_bit_by_bit():
    ours, theirs = outcome(synchronized(network()), images(), target()), outcome(network(), images(), target())
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_conversion_keeps_names_tensors_and_the_activation_of_timms_fused_layers():
    net = nn.Sequential(BatchNormAct2d(3, act_layer=nn.ReLU), nn.BatchNorm2d(3))
    before, x = dict(net.named_parameters()), torch.randn(4, 3, 5, 5)
    expected = net(x)
    converted = synchronized(net)
    assert all(isinstance(layer, SyncBatchNorm) for layer in converted)
    assert all(before[name] is parameter for name, parameter in converted.named_parameters())
    torch.testing.assert_close(converted(x), expected)
    assert (converted[0](x) == 0).any(), "the ReLU is still there"


def test_conversion_keeps_hooks_and_what_was_added_to_a_norm():
    norm = nn.BatchNorm2d(3)
    norm.add_module("added", nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)))
    norm.register_forward_hook(lambda module, _, out: module.added(out))
    net, x = nn.Sequential(norm), torch.randn(4, 3, 5, 5)
    names, expected = list(net.state_dict()), net(x)
    converted = synchronized(net)
    assert list(converted.state_dict()) == names
    assert isinstance(converted[0], SyncBatchNorm) and isinstance(converted[0].added[1], SyncBatchNorm)
    torch.testing.assert_close(converted(x), expected)


def test_a_batch_of_one_has_no_variance():
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        synchronized(nn.BatchNorm1d(2))(torch.zeros(1, 2))


def test_a_skipped_step_leaves_the_running_statistics_as_they_were():
    net = synchronized(network())
    before = {name: value.clone() for name, value in net.state_dict().items()}
    statistics = BatchStatistics(net)
    for scale in (1.0, float("nan")):  # two micro-batches
        statistics.remember()
        net(images() * scale)
    statistics.restore()
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    statistics.remember()
    net(images())
    statistics.keep()
    statistics.restore()
    assert net[1].num_batches_tracked == 1
