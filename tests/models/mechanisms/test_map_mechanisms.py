"""Laws of the mechanisms from maps to maps; that each equals its official code is in tests/golden."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from pretrain.models.layers.mixer import Layout
from pretrain.models.mechanisms.branch.cond_conv import CondConv
from pretrain.models.mechanisms.branch.dynamic_conv import DynamicConv
from pretrain.models.mechanisms.branch.selective_kernel import SelectiveKernel
from pretrain.models.mechanisms.branch.split_attention import SplitAttention
from pretrain.models.mechanisms.channel.channel_map import ChannelMap
from pretrain.models.mechanisms.channel.eca import ECA
from pretrain.models.mechanisms.channel.fca import FCA, RANKED, cosine_basis
from pretrain.models.mechanisms.channel.squeeze_excitation import SqueezeExcitation
from pretrain.models.mechanisms.channel.xca import XCA
from pretrain.models.mechanisms.channel_spatial.bam import BAM
from pretrain.models.mechanisms.channel_spatial.cbam import CBAM
from pretrain.models.mechanisms.channel_spatial.coordinate import CoordinateAttention
from pretrain.models.mechanisms.channel_spatial.global_context import GlobalContext
from pretrain.models.mechanisms.channel_spatial.lka import LKA, LKABlock
from pretrain.models.mechanisms.channel_spatial.simam import SimAM
from pretrain.models.mechanisms.contract import ConvMechanism, MapMechanism
from pretrain.models.mechanisms.spatial.criss_cross import CrissCross
from pretrain.models.mechanisms.spatial.deform_conv import DeformConv
from pretrain.models.mechanisms.spatial.em_attention import EMAttention
from pretrain.models.mechanisms.spatial.external import ExternalAttention
from pretrain.models.mechanisms.spatial.hamburger import Hamburger
from pretrain.models.mechanisms.spatial.non_local import NonLocal
from pretrain.models.mechanisms.spatial.position_attention import PositionAttention
from pretrain.models.mechanisms.spatial.spatial_transformer import SpatialTransformer
from pretrain.models.mechanisms.spatial.stand_alone import StandAloneAttention
from pretrain.models.mechanisms.temporal.tam import TAM

DIM = 32
SETS: dict[str, Callable[[], MapMechanism]] = {
    "se": lambda: SqueezeExcitation(DIM),
    "eca": lambda: ECA(DIM),
    "channel_map": lambda: ChannelMap(DIM),
    "channel_map_per_place": lambda: ChannelMap(DIM, per_place=True),
    "cbam_without_spatial": lambda: CBAM(DIM, pools=("avg", "max", "lp", "lse"), spatial=False),
    "simam": lambda: SimAM(DIM),
    "gc_add": lambda: GlobalContext(DIM),
    "gc_both": lambda: GlobalContext(DIM, fusion="both", pooling="mean"),
    "non_local": lambda: NonLocal(DIM),
    "non_local_gaussian": lambda: NonLocal(DIM, similarity="gaussian", norm=None),
    "non_local_dot": lambda: NonLocal(DIM, similarity="dot_product", norm="layer"),
    "non_local_concatenation": lambda: NonLocal(DIM, similarity="concatenation"),
    "position_attention": lambda: PositionAttention(DIM),
    "external": lambda: ExternalAttention(DIM, num_slots=8),
    "external_layer_norm": lambda: ExternalAttention(DIM, num_slots=8, norm="layer"),
    "em": lambda: EMAttention(DIM, num_bases=8),
    "hamburger_nmf": lambda: Hamburger(DIM, inner_dim=16, num_bases=4),
    "hamburger_vq": lambda: Hamburger(DIM, inner_dim=16, num_bases=4, factorization="vq", splits=2),
    "hamburger_cd": lambda: Hamburger(DIM, inner_dim=16, num_bases=4, factorization="cd", version="v2"),
    "hamburger_running": lambda: Hamburger(DIM, inner_dim=16, num_bases=4, version="v2+", random_bases=False),
}
GRIDS: dict[str, Callable[[], MapMechanism]] = {
    "fca": lambda: FCA(DIM),
    "cbam": lambda: CBAM(DIM),
    "bam": lambda: BAM(DIM),
    "coord": lambda: CoordinateAttention(DIM),
    "lka": lambda: LKA(DIM),
    "lka_block": lambda: LKABlock(DIM),
    "non_local_sub_sampled": lambda: NonLocal(DIM, sub_sample=True),
    "criss_cross": lambda: CrissCross(DIM),
    "hamburger_dual": lambda: Hamburger(DIM, inner_dim=16, num_bases=4, version="v2+", dual=True),
    "spatial_transformer": lambda: SpatialTransformer(DIM),
    "tam": lambda: TAM(DIM, num_frames=2),
}
CONVS: dict[str, Callable[[], ConvMechanism]] = {
    "condconv": lambda: CondConv(DIM, DIM, 3, 1, 1),
    "dynamic_conv": lambda: DynamicConv(DIM, DIM, 3, 1, 1),
    "selective_kernel": lambda: SelectiveKernel(DIM, DIM, 3, 1, 1),
    "split_attention": lambda: SplitAttention(DIM, DIM, 3, 1, 1),
    "deform_conv_v1": lambda: DeformConv(DIM, DIM, 3, 1, 1, modulated=False, offset_groups=2),
    "deform_conv_v2": lambda: DeformConv(DIM, DIM, 3, 1, 1),
    "stand_alone": lambda: StandAloneAttention(DIM, DIM, 3, 1, 1),
    "stand_alone_dilated": lambda: StandAloneAttention(DIM, DIM, 5, 1, 4, 2, groups=2, bias=True, border="zero"),
}
EVERY = SETS | GRIDS | CONVS


def trained(build: Callable[[], MapMechanism]) -> MapMechanism:
    """The mechanism in evaluation with weights that let everything through: no factor is 0."""
    torch.manual_seed(0)
    module = build().eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return module


def maps(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", SETS)
def test_a_set_does_not_see_the_order_of_the_places(name: str):
    module, x, order = trained(SETS[name]), maps(2, DIM, 42, 1), torch.randperm(42)
    torch.testing.assert_close(module(x[:, :, order]), module(x)[:, :, order], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(module(x.view(2, DIM, 6, 7)), module(x).view(2, DIM, 6, 7), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", [name for name in GRIDS if name != "tam"])
def test_a_grid_sees_the_order_of_the_places(name: str):
    module, x = trained(GRIDS[name]), maps(2, DIM, 7, 7)
    order = torch.randperm(49, generator=torch.Generator().manual_seed(2))
    mixed = module(x.flatten(2)[:, :, order].view_as(x)).flatten(2)
    assert (mixed - module(x).flatten(2)[:, :, order]).abs().max() > 1e-3


@pytest.mark.parametrize("name", EVERY)
def test_the_shape_stays_in_training_and_under_bf16(name: str):
    module, x = EVERY[name]().train(), maps(4, DIM, 8, 7).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        out = module(x)
    assert out.shape == x.shape
    out.float().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in [x, *module.parameters()] if p.grad is not None)


@pytest.mark.parametrize("name", EVERY)
def test_evaluation_is_deterministic_and_leaves_no_trace(name: str):
    module, x = trained(EVERY[name]), maps(4, DIM, 8, 7)
    before = {key: value.clone() for key, value in module.state_dict().items()}
    assert torch.equal(module(x), module(x))
    assert all(torch.equal(before[key], value) for key, value in module.state_dict().items())


@pytest.mark.parametrize("name", EVERY)
def test_an_image_alone_gives_what_it_gives_in_a_batch(name: str):
    module, x = trained(EVERY[name]), maps(4, DIM, 8, 7)
    torch.testing.assert_close(module(x)[:2], module(x[:2]), atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", EVERY)
def test_one_exported_graph_serves_every_batch_and_size(name: str):
    module = trained(EVERY[name])
    free = {0: torch.export.Dim.DYNAMIC, 2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC}
    if name == "fca":  # pooling to a fixed grid is another graph for every size
        free = {0: torch.export.Dim.DYNAMIC}
    if name == "tam":
        free[0] = 2 * torch.export.Dim("videos")
    graph = torch.export.export(module, (maps(4, DIM, 8, 10),), dynamic_shapes=(free,)).module()
    for b, height, width in [(4, 8, 10), (8, 8, 10), (6, 9, 7)]:
        x = maps(b, DIM, *((8, 10) if name == "fca" else (height, width)))
        torch.testing.assert_close(graph(x), module(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("build", "passes"),
    [
        (lambda: SqueezeExcitation(DIM), 0.5),
        (lambda: ECA(DIM), 0.5),
        (lambda: FCA(DIM), 0.5),
        (lambda: CBAM(DIM), 0.25),
        (lambda: CoordinateAttention(DIM), 0.25),
        (lambda: BAM(DIM), 1.5),
        (lambda: ChannelMap(DIM), 1.0),
        (lambda: GlobalContext(DIM), 1.0),
        (lambda: GlobalContext(DIM, fusion="scale"), 0.5),
    ],
)
def test_how_much_passes_at_the_start(build: Callable[[], MapMechanism], passes: float):
    torch.manual_seed(0)
    module, x = build(), maps(4, DIM, 8, 7)
    with torch.no_grad():
        ratio = float((module.eval()(x) * x).sum() / x.square().sum())
    assert ratio == pytest.approx(passes, abs=1e-6 if passes == 1 else 0.12 * passes)


def test_a_block_of_large_kernels_starts_close_to_an_identity():
    x = maps(2, DIM, 8, 7)
    assert (LKABlock(DIM).eval()(x) - x).abs().mean() < 0.05


def test_an_image_of_one_place_has_a_finite_simam():
    assert torch.isfinite(SimAM(DIM)(maps(2, DIM, 1, 1))).all()


def test_simam_keeps_its_statistics_out_of_16_bits():
    x = (maps(2, DIM, 8, 7) + 100).bfloat16()
    exact = SimAM(DIM)(x.double())
    assert (SimAM(DIM)(x).double() / exact - 1).abs().max() < 2e-2


def test_the_energy_per_place_does_not_grow_with_the_image():
    x, module = maps(2, DIM, 4, 4), ChannelMap(DIM, per_place=True)
    torch.nn.init.ones_(module.gamma)
    four = x.repeat(1, 1, 2, 2)
    torch.testing.assert_close(module(four), module(x).repeat(1, 1, 2, 2), atol=1e-5, rtol=1e-5)


def test_frequencies_are_orthonormal_and_ranked_without_repetition():
    for ranking, text in RANKED.items():
        pairs = [(int(pair[0]), int(pair[1])) for pair in text.split()]
        assert len(set(pairs)) == len(pairs) == 32, ranking
        for grid in [(7, 7), (14, 21)]:
            basis = cosine_basis(pairs, grid).flatten(1)
            torch.testing.assert_close(basis @ basis.T, torch.eye(32), atol=1e-5, rtol=0)


def test_the_lowest_frequency_alone_is_a_scaled_mean():
    module, x = FCA(DIM, ranking="low", num_frequencies=1, grid=(7, 14)), maps(2, DIM, 7, 14)
    squeezed = (x * module.basis).sum((2, 3))
    torch.testing.assert_close(squeezed, x.mean((2, 3)) * 98**0.5)


def test_xca_reads_a_set_of_tokens_and_computes_a_part_of_them():
    torch.manual_seed(0)
    module, x, order = XCA(DIM, 4).eval(), maps(2, 10, DIM), torch.randperm(10)
    layout = Layout((3, 3), 1)
    torch.testing.assert_close(module(x[:, order], layout=layout), module(x, layout=layout)[:, order])
    torch.testing.assert_close(module(x, slice(0, 1)), module(x)[:, :1])


@pytest.mark.slow
@pytest.mark.parametrize("groups", [1, 4])
def test_mixed_outputs_under_export_equal_mixed_kernels(groups: int):
    torch.manual_seed(0)
    for module in (
        CondConv(16, 24, 3, 2, 1, groups=groups, bias=True).eval(),
        DynamicConv(16, 24, 3, 2, 1, groups=groups).eval(),
    ):
        x = maps(3, 16, 9, 8)
        free = ({0: torch.export.Dim.DYNAMIC},)
        graph = torch.export.export(module, (x,), dynamic_shapes=free).module()
        torch.testing.assert_close(graph(x[:2]), module(x[:2]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("side", [8, 9, 10])
def test_same_padding_gives_the_size_over_the_stride(side: int):
    module = CondConv(4, 4, 3, stride=2, padding="same").eval()
    assert module(maps(2, 4, side, side)).shape[2:] == (-(-side // 2),) * 2


def test_the_temperature_falls_linearly_to_one_and_is_in_the_state():
    module = DynamicConv(8, 8, temperature=31.0, temperature_steps=3)
    found = []
    for _ in range(4):
        module.after_step()
        found.append(float(module.state_dict()["temperature"]))
    assert found == [21.0, 11.0, 1.0, 1.0]


def test_frames_of_one_video_do_not_reach_another():
    module, x = trained(lambda: TAM(DIM, num_frames=4)), maps(8, DIM, 3, 5)
    other = torch.cat([x[:4], torch.zeros_like(x[4:])])
    assert torch.equal(module(x)[:4], module(other)[:4])
    with pytest.raises(ValueError, match="videos of 4 frames, got a batch of 6"):
        module(x[:6])


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: ECA(DIM, kernel_size=4), "kernel_size of ECA must be odd, got 4"),
        (lambda: FCA(DIM, grid=(14, 6)), "at least 7 x 7, got 14 x 6"),
        (lambda: FCA(24), "divide dim 24, got 16"),
        (lambda: XCA(DIM, 4, qkv_bias="no_key"), "not no_key"),
        (lambda: CBAM(DIM, pools=("avg", "median")), "some of avg, max, lp, lse"),
        (lambda: CBAM(DIM, kernel_size=6), "must be odd, got 6"),
        (lambda: SelectiveKernel(DIM, DIM, 1, 1, 0), "replaces a 3x3 convolution"),
        (lambda: SelectiveKernel(DIM, DIM, branches=(3, 4)), "odd and at least 3"),
        (lambda: SelectiveKernel(DIM, DIM, bias=True), "set bias to false"),
        (lambda: SplitAttention(48, 48, groups=5), "groups 5 must divide the 32 hidden"),
        (lambda: DynamicConv(DIM, DIM, temperature=0.5), "at least 1, got 0.5"),
        (lambda: TAM(DIM, 8, kernel_size=5, padding=1), "use stride 1 and padding 2"),
    ],
)
def test_an_argument_that_cannot_work_is_refused(build: Callable[[], object], message: str):
    with pytest.raises(ValueError, match=message):
        build()
