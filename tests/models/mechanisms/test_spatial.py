"""Laws of the spatial mechanisms; the ones they share with all others are in test_map_mechanisms.py."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from timm.layers.non_local_attn import NonLocalAttn
from torch import Tensor

from pretrain.models.mechanisms.contract import MapMechanism
from pretrain.models.mechanisms.spatial.criss_cross import CrissCross
from pretrain.models.mechanisms.spatial.decomposition import CD, NMF, VQ
from pretrain.models.mechanisms.spatial.deform_conv import DeformConv
from pretrain.models.mechanisms.spatial.em_attention import EMAttention
from pretrain.models.mechanisms.spatial.external import ExternalAttention
from pretrain.models.mechanisms.spatial.ham import Ham
from pretrain.models.mechanisms.spatial.hamburger import Hamburger
from pretrain.models.mechanisms.spatial.non_local import NonLocal
from pretrain.models.mechanisms.spatial.places import place_norm
from pretrain.models.mechanisms.spatial.position_attention import PositionAttention
from pretrain.models.mechanisms.spatial.spatial_transformer import SpatialTransformer
from pretrain.models.mechanisms.spatial.stand_alone import StandAloneAttention
from pretrain.models.teachers.ema import EMA
from tests.models.mechanisms.test_map_mechanisms import DIM, maps, trained

RUNNING: dict[str, Callable[[], MapMechanism]] = {
    "em": lambda: EMAttention(DIM, num_bases=8),
    "hamburger": lambda: Hamburger(DIM, inner_dim=16, num_bases=4, random_bases=False),
}


def bases(module: MapMechanism) -> Tensor:
    return next(buffer for name, buffer in module.named_buffers() if name.endswith("bases"))


@pytest.mark.parametrize("build", [lambda: NonLocal(DIM), lambda: CrissCross(DIM), lambda: PositionAttention(DIM)])
def test_it_starts_as_the_identity_bit_by_bit(build: Callable[[], MapMechanism]):
    module, x = build().train(), maps(4, DIM, 6, 7)
    assert module.starts_as_identity and torch.equal(module(x), x)


def test_the_latest_hamburger_starts_as_a_relu():
    x = maps(4, DIM, 6, 7)
    assert torch.equal(Hamburger(DIM, inner_dim=16, num_bases=4, version="v2+").train()(x), x.relu())


def reach(module: CrissCross, at: tuple[int, int]) -> Tensor:
    """Which places of the input the output at one place depends on, bool [H, W]."""
    x = maps(1, DIM, 5, 6).requires_grad_()
    module(x)[0, :, at[0], at[1]].sum().backward()
    assert x.grad is not None
    return x.grad[0].abs().sum(0) > 0


def test_one_pass_reads_a_cross_and_two_read_everything():
    once, twice = (trained(lambda r=r: CrissCross(DIM, recurrence=r)) for r in (1, 2))
    cross = torch.zeros(5, 6, dtype=torch.bool)
    cross[1], cross[:, 4] = True, True
    assert torch.equal(reach(once, (1, 4)), cross)
    assert reach(twice, (1, 4)).all()


def test_the_weights_of_a_non_local_block_sum_to_one():
    x = maps(2, DIM, 6, 8)
    for sub_sample, keys in ((False, 48), (True, 12)):
        weights = trained(lambda s=sub_sample: NonLocal(DIM, sub_sample=s)).weights(x)
        assert weights.shape == (2, 48, keys)
        torch.testing.assert_close(weights.sum(2), torch.ones(2, 48))


def test_timms_non_local_block_without_a_scale_is_the_embedded_gaussian():
    theirs, mine = NonLocalAttn(DIM, use_scale=False, rd_channels=16).eval(), NonLocal(DIM).eval()
    names = {"t": "theta", "p": "phi", "g": "g", "z": "proj", "norm": "norm"}
    torch.nn.init.normal_(theirs.norm.weight)
    state = {
        name.replace(name.split(".")[0], names[name.split(".")[0]], 1): v for name, v in theirs.state_dict().items()
    }
    mine.load_state_dict({name: value.reshape(mine.state_dict()[name].shape) for name, value in state.items()})
    x = maps(2, DIM, 6, 7)
    torch.testing.assert_close(mine(x), theirs(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", RUNNING)
def test_running_bases_move_after_the_step_only(name: str):
    torch.manual_seed(0)
    module, x = RUNNING[name]().train(), maps(4, DIM, 6, 7)
    before = bases(module).clone()
    module(x)
    assert torch.equal(bases(module), before)
    module.discard_pending()
    module.after_step()
    torch.testing.assert_close(bases(module), before, atol=1e-6, rtol=0)
    module(x)
    module.after_step()
    assert (bases(module) - before).abs().max() > 1e-3
    moved = bases(module).clone()
    module.after_step()
    torch.testing.assert_close(bases(module), moved, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", RUNNING)
def test_micro_batches_move_running_bases_as_the_batch_does(name: str):
    torch.manual_seed(0)
    whole, x = RUNNING[name]().train(), maps(6, DIM, 6, 7)
    parts = copy.deepcopy(whole)
    whole(x)
    for part in (x[:2], x[2:]):  # of different sizes
        parts(part)
    for module in (whole, parts):
        module.after_step()
    torch.testing.assert_close(bases(whole), bases(parts), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", RUNNING)
def test_a_teacher_averages_running_bases_and_leaves_nothing_pending(name: str):
    torch.manual_seed(0)
    student, x = RUNNING[name]().train(), maps(4, DIM, 6, 7)
    teacher = EMA(student).train()
    first = bases(student).clone()
    student(x), teacher(x)
    student.after_step()
    teacher.update(student, 0.75)
    torch.testing.assert_close(bases(teacher.average), 0.75 * first + 0.25 * bases(student))
    kept = bases(teacher.average).clone()
    teacher.average.after_step()
    torch.testing.assert_close(F.normalize(bases(teacher.average), dim=1), F.normalize(kept, dim=1))


def test_the_projection_that_em_never_trains_is_frozen():
    module, x = EMAttention(DIM).train(), maps(2, DIM, 6, 7)
    module(x).sum().backward()
    for name, parameter in module.named_parameters():
        assert parameter.requires_grad == (parameter.grad is not None) == (not name.startswith("proj_in."))


def test_random_bases_are_new_in_every_step_and_the_same_within_it():
    torch.manual_seed(0)
    module, x = Hamburger(DIM, inner_dim=16, num_bases=4, norm="layer").train(), maps(4, DIM, 6, 7)
    first = module(x)
    assert torch.equal(module(x), first)
    torch.testing.assert_close(torch.cat([module(x[:1]), module(x[1:])]), first, atol=1e-5, rtol=1e-5)
    resumed = copy.deepcopy(module)
    module.after_step()
    second = module(x)
    assert (second - first).abs().max() > 1e-3
    resumed.load_state_dict(module.state_dict())
    assert torch.equal(resumed.train()(x), second)


def test_bases_of_channels_serve_any_number_of_places():
    ham = Ham(16, num_bases=4, vectors="channels").eval()
    x = maps(2, 16, 30).abs()
    torch.testing.assert_close(ham(x)[:1], ham(x[:1]))
    assert ham(maps(1, 16, 5000).abs()).shape == (1, 16, 5000)


def test_updates_of_nmf_never_raise_the_error_and_keep_the_sign():
    generator, of = torch.Generator().manual_seed(0), NMF()
    x, start = torch.rand(1, 12, 40, generator=generator), of.draw((1, 12, 3), generator)
    errors = []
    for steps in range(1, 30):
        found, coefficients = of.fit(x, start, steps)
        assert found.min() >= 0 and coefficients.min() >= 0
        errors.append(float((x - found @ coefficients.transpose(1, 2)).norm()))
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.95 * errors[0]


def test_concepts_leave_a_residual_that_is_orthogonal_to_them():
    generator, of = torch.Generator().manual_seed(0), CD(ridge=0)
    x = torch.randn(2, 12, 40, generator=generator).double()
    found, coefficients = of.fit(x, of.draw((2, 12, 3), generator).double(), 6)
    residual = x - found @ of.coefficients(x, found, coefficients).transpose(1, 2)
    assert (found.transpose(1, 2) @ residual).abs().max() < 1e-8
    torch.testing.assert_close(found.norm(dim=1), torch.ones(2, 3).double())


def test_a_sharp_quantization_gives_each_vector_its_nearest_base():
    generator, of = torch.Generator().manual_seed(0), VQ(sharpness=1e4)
    x, codes = torch.randn(1, 6, 40, generator=generator), of.draw((1, 6, 3), generator)
    nearest = (F.normalize(x, dim=1).transpose(1, 2) @ codes).argmax(2)
    torch.testing.assert_close(of.nearest(x, codes), F.one_hot(nearest, 3).float(), atol=1e-3, rtol=0)


def test_one_step_has_the_gradient_of_the_last_coefficients_only():
    ham, x = Ham(8, num_bases=3, factorization="cd", train_iterations=3).train(), maps(1, 8, 20).requires_grad_()
    ham(x).sum().backward()
    with torch.no_grad():
        found, _ = ham.decomposition.fit(x, ham.draw(1), 3)
    projection = found @ torch.linalg.inv(found.transpose(1, 2) @ found + 0.1 * torch.eye(3)) @ found.transpose(1, 2)
    torch.testing.assert_close(x.grad, projection.sum(1)[:, :, None].expand(1, 8, 20), atol=1e-5, rtol=1e-5)


def test_external_attention_depends_on_the_number_of_places_but_pam_not_on_repetition():
    x = maps(1, DIM, 12, 1)
    twice = torch.cat([x, x], dim=2)
    pam, external = trained(lambda: PositionAttention(DIM)), trained(lambda: ExternalAttention(DIM, num_slots=8))
    torch.testing.assert_close(pam(twice)[:, :, :12], pam(x), atol=1e-5, rtol=1e-5)
    memory = {name: value.data_ptr() for name, value in external.state_dict().items() if name.startswith("memory")}
    assert len(set(memory.values())) == 2  # two memories, two storages


def attend_by_loops(module: StandAloneAttention, x: Tensor) -> Tensor:
    """Eq. 2 and 3 of the paper, place by place."""
    q, k, v = (layer(x).unflatten(1, (module.num_heads, -1)) for layer in (module.query, module.key, module.value))
    out, half, step, stride = [], module.kernel[0] // 2, module.dilation[0], module.stride[0]
    for i in range(0, x.shape[2], stride):
        for j in range(0, x.shape[3], stride):
            scores, values = [], []
            for a in range(-half, half + 1):
                for b in range(-half, half + 1):
                    row, column = i + step * a, j + step * b
                    if not (0 <= row < x.shape[2] and 0 <= column < x.shape[3]):
                        continue
                    relative = torch.cat([module.rel_rows[:, a + half], module.rel_columns[:, b + half]])
                    scores.append((q[:, :, :, i, j] * (k[:, :, :, row, column] + relative)).sum(2))
                    values.append(v[:, :, :, row, column])
            weights = torch.stack(scores, 2).softmax(2)
            out.append((weights[:, :, None] * torch.stack(values, 3)).sum(3).flatten(1))
    rows = len(range(0, x.shape[2], stride))
    return torch.stack(out, 2).unflatten(2, (rows, -1))


@pytest.mark.parametrize(("stride", "dilation"), [(1, 1), (2, 1), (1, 2)])
def test_attention_over_a_window_is_its_formula(stride: int, dilation: int):
    torch.manual_seed(0)
    module = StandAloneAttention(6, 8, 3, stride, dilation, dilation, num_heads=2)
    x = maps(2, 6, 5, 6)
    out = module(x)
    assert out.shape == torch.nn.Conv2d(6, 8, 3, stride, dilation, dilation)(x).shape
    torch.testing.assert_close(out, attend_by_loops(module, x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("modulated", "share"), [(False, 1.0), (True, 0.5)])
def test_a_deformable_convolution_starts_as_a_plain_one(modulated: bool, share: float):
    torch.manual_seed(0)
    module, x = DeformConv(8, 12, 3, 2, 1, groups=2, bias=False, modulated=modulated), maps(2, 8, 9, 10)
    torch.testing.assert_close(module(x), share * module.conv(x), atol=1e-5, rtol=1e-5)


def test_whole_offsets_read_the_neighbours():
    torch.manual_seed(0)
    module, x = DeformConv(8, 8, 3, 1, 1, modulated=False), maps(1, 8, 9, 10)
    offsets = torch.zeros(1, 18, 9, 10)
    offsets[:, 0::2] = 1  # one row down
    moved = module.sample(x, offsets, None)
    torch.testing.assert_close(moved[:, :, 1:-2], module.conv(x)[:, :, 2:-1], atol=1e-5, rtol=1e-5)


def test_random_bases_can_be_built_without_memory():
    with torch.device("meta"):
        Hamburger(DIM, inner_dim=16, num_bases=4)


@pytest.mark.filterwarnings("ignore:Since version 1.3.0")
@pytest.mark.parametrize("align_corners", [True, False])
@pytest.mark.parametrize("size", [None, (6, 9), (1, 1)])
def test_a_spatial_transformer_has_the_grid_of_torch_and_starts_as_the_identity(size, align_corners: bool):
    torch.manual_seed(0)
    module, x = SpatialTransformer(3, size=size, align_corners=align_corners), maps(2, 3, 17, 23)
    to = (2, 3, *(size or (17, 23)))
    theta = maps(2, 2, 3)
    expect = F.affine_grid(theta, list(to), align_corners=align_corners)
    torch.testing.assert_close(module.grid(x, theta), expect, atol=1e-5, rtol=1e-5)
    assert torch.equal(module.locate(x), torch.eye(2, 3).expand(2, 2, 3))
    if size is None:
        torch.testing.assert_close(module(x), x, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: NonLocal(DIM, similarity="cosine"), "expected one of embedded_gaussian, gaussian"),
        (lambda: NonLocal(DIM, sub_sample=True).check_grid((9, 1)), "9 x 1 have too few"),
        (lambda: CrissCross(DIM, recurrence=0), "at least 1, got 0"),
        (lambda: EMAttention(DIM, iterations=0), "at least 1, got 0"),
        (lambda: place_norm("group", DIM), "expected batch or layer"),
        (lambda: Hamburger(DIM, version="v3"), "expected v1, v2 or v2+"),
        (lambda: Hamburger(DIM, dual=True), "dual=True is an option of v2+"),
        (lambda: Hamburger(DIM, factorization="svd"), "expected one of nmf, cd, vq"),
        (lambda: Ham(16, splits=3), "splits=3 must divide the 16 channels"),
        (lambda: Ham(16, vectors="rows"), "expected places or channels"),
        (lambda: Ham(16, vectors="channels", random_bases=False), "give `places`"),
        (
            lambda: Ham(16, vectors="channels", random_bases=False, places=9)(maps(1, 16, 8)),
            "of 9 places, the map has 8",
        ),
        (lambda: StandAloneAttention(8, 8, 4, padding=2), "kernel_size 4: a window around a place has an odd side"),
        (lambda: StandAloneAttention(8, 8, 3, padding=0), r"padding 0: windows around the places need \(1, 1\)"),
        (lambda: StandAloneAttention(8, 8, 3, 1, 1, num_heads=8), "divisible by twice the 8 heads"),
        (lambda: StandAloneAttention(8, 8, 3, 1, 1, border="wrap"), "expected masked or zero"),
        (lambda: DeformConv(8, 8, offset_groups=3), "offset_groups=3 must divide in_channels=8"),
    ],
)
def test_an_argument_that_cannot_work_is_refused(build: Callable[[], object], message: str):
    with pytest.raises(ValueError, match=message):
        build()
