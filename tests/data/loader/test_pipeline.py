import io
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from pretrain.core.images import IMAGENET_MEAN, IMAGENET_STD
from pretrain.data.loader.pipeline import make_loader
from pretrain.data.loader.spec import LoaderSpec
from pretrain.data.sampling.bad_samples import MAX_SUBSTITUTES, BadSamples, TooManyBadSamplesError
from pretrain.data.shards.dataset import Dataset
from pretrain.data.shards.index import build_index
from pretrain.data.views import augment
from pretrain.data.views.masks import BlockMask, MultiBlockMask, RatioBlockMask, StratifiedBlockMask
from pretrain.data.views.specs import Blur, ColorJitter, Noise, ViewSpec
from tests.data.photos import stored
from tests.data.tars import flip, image_bytes, make_dataset, tar_bytes
from tests.data.views.test_decode import encoded, png_header

MEAN, STD = IMAGENET_MEAN, IMAGENET_STD
JITTER = ColorJitter(0.4, 0.4, 0.2, 0.1, prob=0.8)
VIEWS = [
    ViewSpec("crops", (32, 32), scale=(0.4, 1.0), jitter=JITTER, grayscale=0.2, blur=Blur(1.0)),
    ViewSpec("crops", (32, 32), scale=(0.4, 1.0), jitter=JITTER, grayscale=0.2, blur=Blur(0.1), solarize=0.2),
    ViewSpec("local", (16, 16), scale=(0.05, 0.4), count=3, jitter=JITTER, blur=Blur(0.5)),
    Noise("mask", (7,)),
]
MASKED = [
    ViewSpec("image", (16, 16)),
    ViewSpec("smaller", (8, 8), interpolation="lanczos", normalize=False, same_as="image"),
    BlockMask("blocks", (8, 8), 20, min_per_block=4),
    StratifiedBlockMask("strata", (8, 8)),
    MultiBlockMask("jepa", (8, 8), min_keep=2),
    Noise("together", (3,), of_step=True),
]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Dataset:
    return make_dataset(tmp_path_factory.mktemp("shards"), shards=5, samples=9)


def load(dataset: Dataset, views=VIEWS, **changes) -> list[dict]:
    """Batches of steps [start_step, total_steps); `changes` to the spec, or arguments of the loader."""
    first, end = changes.pop("start_step", 0), changes.pop("total_steps", 7)
    running = {name: changes.pop(name) for name in ("num_workers", "bad_samples") if name in changes}
    options = {
        "in_chans": 3,
        "mean": MEAN,
        "std": STD,
        "seed": 4,
        "block_shards": 2,
        "global_batch": 8,
        "micro_batch": 2,
    } | changes
    spec = LoaderSpec(views=views, **{"start_position": first * options["global_batch"]} | options)
    return list(make_loader(dataset, spec, num_steps=end - first, **running))


def joined(batches: list[dict]) -> dict[str, torch.Tensor]:
    names = [name for name in batches[0] if name != "bad"]
    return {name: torch.cat([batch[name] for batch in batches]) for name in names}


def assert_equal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name


def test_views_of_a_turned_photo_are_those_of_the_upright_one(tmp_path):
    shown = [np.random.default_rng(i).integers(0, 256, (24, 40, 3), dtype=np.uint8) for i in range(8)]
    files = {
        "upright": [encoded(image, "PNG") for image in shown],
        "turned": [stored(image, i + 1, "PNG") for i, image in enumerate(shown)],
    }
    sets = {}
    for name, images in files.items():
        (tmp_path / f"{name}.tar").write_bytes(tar_bytes([(f"{i}.png", data) for i, data in enumerate(images)]))
        build_index([str(tmp_path / f"{name}.tar")])
        sets[name] = Dataset.open(tmp_path / f"{name}.tar")
    small = {"total_steps": 2, "block_shards": 1, "global_batch": 4}
    upright = joined(load(sets["upright"], **small))
    assert_equal(joined(load(sets["turned"], **small)), upright)
    as_stored = joined(load(sets["turned"], orientation="stored", **small))
    assert not torch.equal(as_stored["crops"], upright["crops"])


def test_a_host_batch_has_the_entries_of_its_views(dataset):
    batch = load(dataset)[0]
    assert batch["position"].tolist() == [0, 1]
    assert batch["crops"].shape == (2, 2, 3, 32, 32)
    assert batch["local"].shape == (2, 3, 3, 16, 16)
    assert batch["crops"].dtype == batch["local"].dtype == torch.uint8
    assert batch["local.params"].shape == (2, 3, 10)
    assert batch["crops.params"].dtype == batch["mask"].dtype == torch.float32
    assert batch["mask"].shape == (2, 7)
    assert ((batch["mask"] >= 0) & (batch["mask"] < 1)).all()
    assert batch["bad"] == []


def test_instances_of_a_view_differ_from_each_other_and_between_epochs(dataset):
    whole = joined(load(dataset, global_batch=9, micro_batch=9, total_steps=10))
    crops = whole["local"].flatten(0, 1).flatten(1)
    assert len(torch.unique(crops, dim=0)) == len(crops)
    assert len(torch.unique(whole["mask"], dim=0)) == 90


@pytest.mark.processes
@pytest.mark.parametrize("augment_on", ["device", "worker"])
@pytest.mark.parametrize("num_workers", [1, 3])
def test_batches_are_bitwise_equal_for_any_number_of_workers(dataset, num_workers, augment_on):
    alone = load(dataset, augment_on=augment_on, total_steps=3)
    workers = load(dataset, augment_on=augment_on, total_steps=3, num_workers=num_workers)
    assert len(alone) == len(workers) == 12
    for ours, theirs in zip(alone, workers, strict=True):
        assert ours.pop("bad") == theirs.pop("bad")
        assert_equal(ours, theirs)


@pytest.mark.parametrize("augment_on", ["device", "worker"])
@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_together_load_what_one_rank_loads(dataset, world_size, augment_on):
    alone = load(dataset, augment_on=augment_on)
    share = {"world_size": world_size, "micro_batch": 1, "augment_on": augment_on}
    ranks = [load(dataset, rank=rank, **share) for rank in range(world_size)]
    for step in range(7):
        micro = 8 // world_size
        together = [batch for rank in ranks for batch in rank[step * micro : (step + 1) * micro]]
        assert_equal(joined(together), joined(alone[step * 4 : (step + 1) * 4]))


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{"world_size": 2, "micro_batch": 1}, {"micro_batch": 4}, {"num_workers": 1}])
def test_masks_do_not_depend_on_ranks_micro_batches_or_workers(dataset, changes):
    alone = load(dataset, MASKED, micro_batch=8, total_steps=2)
    ranks = [load(dataset, MASKED, rank=rank, total_steps=2, **changes) for rank in range(changes.get("world_size", 1))]
    micro = len(ranks[0]) // 2
    for step in range(2):
        parts = [batch for rank in ranks for batch in rank[step * micro : (step + 1) * micro]]
        assert_equal(joined(parts), joined([alone[step]]))


def test_noise_of_a_step_is_the_same_for_its_samples_and_another_in_the_next(dataset):
    batches = [batch["together"] for batch in load(dataset, MASKED, total_steps=2)]  # 4 micro-batches a step
    first, second = torch.cat(batches[:4]), torch.cat(batches[4:])
    assert torch.equal(first, first[:1].expand(8, 3)) and torch.equal(second, second[:1].expand(8, 3))
    assert not torch.equal(first, second)


def test_masks_continue_at_the_cursor_after_another_batch_size(dataset):
    alone = load(dataset, MASKED, micro_batch=8, total_steps=3)
    resumed = load(dataset, MASKED, micro_batch=8, start_step=1, start_position=8, total_steps=3)
    for ours, theirs in zip(resumed, alone[1:], strict=True):
        assert_equal(joined([ours]), joined([theirs]))
    early = [batch["blocks"] for batch in load(dataset, MASKED, global_batch=4, total_steps=2)]
    assert torch.equal(torch.cat(early), alone[0]["blocks"])  # of single samples: whatever the batch is


def test_masks_that_start_with_an_epoch_start_with_its_first_sample(dataset):
    views = [ViewSpec("image", (8, 8)), RatioBlockMask("m", (8, 8), ratio=(0.4,), ratio_var=(0.1,), start_epoch=1)]
    hidden = joined(load(dataset, views, global_batch=5, micro_batch=5, total_steps=11))["m"].flatten(1).any(1)
    assert hidden.tolist() == [position >= 45 for position in range(55)]


def test_a_view_that_is_the_same_as_another_shows_the_same_crop_smaller(dataset):
    views = [
        ViewSpec("image", (16, 16), hflip=0.5, jitter=JITTER),
        ViewSpec("half", (8, 8), same_as="image", normalize=False),
    ]
    for host in load(dataset, views, total_steps=2):
        made = augment.apply(views, host, MEAN, STD, "cpu")
        assert made["half"].min() >= 0 and made["half"].max() <= 1  # pixels, not normalized
        norm = torch.tensor([MEAN, STD]).view(2, 1, 1, 3, 1, 1)
        shrunk = torch.nn.functional.avg_pool2d((made["image"] * norm[1] + norm[0])[:, 0], 2)
        apart = (made["half"][:, 0] - shrunk).abs().mean()
        assert apart < 0.25 * (shrunk.flip(-1) - shrunk).abs().mean()


def test_the_size_of_micro_batches_changes_no_sample(dataset):
    assert_equal(joined(load(dataset, micro_batch=1)), joined(load(dataset, micro_batch=8)))


@pytest.mark.parametrize("step", [0, 1, 5, 6, 7])
def test_a_resumed_stream_is_the_tail_of_the_undisturbed_one(dataset, step):
    tail = load(dataset)[step * 4 :]
    resumed = load(dataset, start_step=step)
    assert len(resumed) == len(tail)
    if tail:
        assert_equal(joined(resumed), joined(tail))


def test_another_batch_size_continues_at_the_cursor(dataset):
    before = joined(load(dataset, total_steps=3))
    after = joined(load(dataset, global_batch=4, start_step=3, start_position=24, total_steps=5))
    assert torch.cat([before["position"], after["position"]]).tolist() == list(range(32))
    assert_equal(after, {name: value[24:] for name, value in joined(load(dataset, total_steps=4)).items()})


def test_every_sample_is_loaded_once_an_epoch(dataset):
    # Samples are identified by their pixels: the full image, at its own size, not mirrored.
    whole = [ViewSpec("image", (16, 24), scale=(1.0, 1.0), ratio=(1.5, 1.5), hflip=0.0)]
    images = joined(load(dataset, whole, global_batch=9, micro_batch=9, total_steps=10))["image"]
    counts = Counter(image.numpy().tobytes() for image in images)
    assert len(counts) == 45
    assert set(counts.values()) == {2}


def test_augmentation_in_workers_equals_the_device(dataset):
    for on_worker, host in zip(load(dataset, augment_on="worker"), load(dataset), strict=True):
        made = augment.apply(VIEWS, host, MEAN, STD, "cpu")
        assert_equal(augment.apply(VIEWS, on_worker, MEAN, STD, "cpu"), made)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"global_batch": 9}, "9 is not a multiple of 1 ranks x 2"),
        ({"world_size": 3}, "8 is not a multiple of 3 ranks"),
        ({"mean": (0.5,)}, "mean has 1"),
        ({"in_chans": 1, "mean": (0.5,), "std": (0.5,)}, "need 3 channels"),
        ({"augment_on": "gpu"}, "augment_on"),
        ({"views": [Noise("n", (1,))]}, "no ViewSpec"),
        ({"num_workers": 1, "stages": [lambda samples: samples]}, "define it at the top of a module"),
    ],
)
def test_impossible_loaders_are_refused_before_they_load(dataset, changes, message):
    with pytest.raises(ValueError, match=message):
        load(dataset, **changes)


# bad samples


def odd_images() -> dict[str, tuple[bytes, str | None]]:
    """Member name -> (bytes, None if it is a good image, else what its reason says)."""
    good = image_bytes(0)
    wide = (np.arange(40 * 56).reshape(40, 56) * 29).astype(np.uint16)
    noise = encoded(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8), "JPEG")
    return {
        "empty.jpg": (b"", "empty"),
        "text.jpg": (b"not an image at all", "not a JPEG"),
        "cut.jpg": (noise[: len(noise) // 2], "JPEG"),
        "bomb.png": (png_header(13_300, 13_300), "too large"),
        "nothing.txt": (b"no image member", "no image member"),
        "gray.jpg": (image_bytes(1, mode="L"), None),
        "cmyk.jpg": (image_bytes(2, mode="CMYK"), None),
        "deep.png": (encoded(wide, "PNG"), None),
        "dot.png": (encoded(np.full((1, 1, 3), 9, np.uint8), "PNG"), None),
        **{f"good{i}.jpg": (good, None) for i in range(15)},
    }


@pytest.fixture(scope="module")
def odd(tmp_path_factory) -> Dataset:
    shard = tmp_path_factory.mktemp("odd") / "odd.tar"
    shard.write_bytes(tar_bytes([(name, data) for name, (data, _) in odd_images().items()]))
    build_index([str(shard)])
    return Dataset.open(shard)


def flat(batches: list[dict]) -> list[dict]:
    return sorted((record for batch in batches for record in batch["bad"]), key=lambda r: (r["position"], r["reason"]))


def test_odd_images_are_decoded_and_bad_ones_replaced_and_named(odd):
    batches = load(odd, total_steps=3)  # one epoch of 24
    first_tries = {record["key"]: record for record in reversed(flat(batches))}
    expected = {name.split(".")[0]: reason for name, (_, reason) in odd_images().items() if reason}
    assert first_tries.keys() == expected.keys()
    for key, reason in expected.items():
        assert reason in first_tries[key]["reason"]
        assert first_tries[key]["shard"] == "odd.tar"
        assert first_tries[key]["substitute"].startswith("odd.tar/")
        assert first_tries[key]["substitute"].split("/")[1] not in expected
    assert sum(len(batch["position"]) for batch in batches) == 24


@pytest.mark.processes
def test_substitutes_are_the_same_for_any_ranks_and_workers(odd):
    alone = load(odd)
    workers = load(odd, num_workers=2)
    ranks = [batch for rank in range(4) for batch in load(odd, rank=rank, world_size=4)]
    assert flat(alone) == flat(workers) == flat(ranks)
    by_position = joined(ranks)
    ordered = by_position["position"].argsort()
    assert_equal({name: value[ordered] for name, value in by_position.items()}, joined(alone))
    assert_equal(joined(workers), joined(alone))


def test_a_flipped_bit_is_caught_by_the_checksum_and_replaced(tmp_path):
    data = make_dataset(tmp_path, shards=1, samples=8)
    path = Path(data.paths[0])
    body = path.read_bytes()
    flip(path, body.index(b"\xff\xd8") + 300)
    records = flat(load(data, total_steps=1))
    assert {(record["key"], record["reason"]) for record in records} == {("000000", "jpg: crc32c mismatch")}
    assert records[0]["substitute"] != "train-000000.tar/000000"


def test_a_set_of_only_bad_samples_stops_at_once_naming_one(tmp_path):
    shard = tmp_path / "bad.tar"
    shard.write_bytes(tar_bytes([(f"{i}.jpg", b"no") for i in range(20)]))
    build_index([str(shard)])
    with pytest.raises(ValueError, match=rf"bad.tar/\d+ cannot be used .*its {MAX_SUBSTITUTES} substitutes"):
        load(Dataset.open(shard))


def test_a_loader_reports_to_the_counter_and_the_counter_stops_the_loader(odd):
    counter = BadSamples(0.5)
    batches = load(odd, bad_samples=counter, total_steps=3)
    assert counter.num_seen == 24
    assert counter.num_bad == sum(len(batch["bad"]) for batch in batches) > 0
    with pytest.raises(TooManyBadSamplesError):
        load(odd, bad_samples=BadSamples(0.01, min_seen=8))


# user stages


def redden(samples):
    for sample in samples:
        yield {**sample, "jpg": encoded(np.full((16, 16, 3), (255, 0, 0), np.uint8), "PNG")}


def drop_some(samples):
    for number, sample in enumerate(samples):
        if number != 1:
            yield sample


def repeat(samples):
    for sample in samples:
        yield sample
        yield sample


def shorten(samples):
    for sample in samples:
        yield {**sample, "jpg": sample["jpg"][:40] if int(sample["cls"]) == 0 else sample["jpg"]}


@pytest.mark.processes
@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_user_stage_receives_and_changes_sample_dicts(dataset, num_workers):
    seen = joined(load(dataset, stages=[redden], num_workers=num_workers, total_steps=1))["crops"]
    assert (seen[:, :, 0] == 255).all()
    assert (seen[:, :, 1:] == 0).all()


@pytest.mark.parametrize(("stage", "count"), [(drop_some, 1), (repeat, 4)])
def test_a_stage_that_loses_or_adds_samples_is_named(dataset, stage, count):
    with pytest.raises(ValueError, match=f"stage {stage.__name__} yielded {count} samples for 2"):
        load(dataset, stages=[redden, stage])


def test_a_sample_damaged_by_a_stage_is_replaced_by_one_that_passed_the_stage(dataset):
    alone = load(dataset, stages=[shorten])
    records = flat(alone)
    assert len({record["position"] for record in records}) > 10
    ranks = [batch for rank in range(2) for batch in load(dataset, stages=[shorten], rank=rank, world_size=2)]
    assert flat(ranks) == records


def test_other_than_three_channels_come_from_npy(tmp_path):
    members = []
    for number in range(6):
        out = io.BytesIO()
        np.save(out, np.random.default_rng(number).integers(0, 256, (20, 30, 5), dtype=np.uint8))
        members.append((f"{number}.npy", out.getvalue()))
    (tmp_path / "five.tar").write_bytes(tar_bytes(members))
    build_index([str(tmp_path / "five.tar")])
    views = [ViewSpec("image", (16, 16), jitter=ColorJitter(0.4, 0.4), blur=Blur(1.0))]
    options = {
        "in_chans": 5,
        "mean": [0.5] * 5,
        "std": [0.2] * 5,
        "global_batch": 6,
        "micro_batch": 6,
        "total_steps": 1,
    }
    (batch,) = load(Dataset.open(tmp_path / "five.tar"), views, **options)
    assert batch["image"].shape == (6, 1, 5, 16, 16)
    assert augment.apply(views, batch, [0.5] * 5, [0.2] * 5, "cpu")["image"].shape == (6, 1, 5, 16, 16)
