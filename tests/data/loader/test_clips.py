"""Clips: which frames are read and shown, and what they share."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pretrain.core.images import IMAGENET_MEAN, IMAGENET_STD
from pretrain.data.loader.eval_images import EvalImages
from pretrain.data.loader.microbatch import MicroBatches
from pretrain.data.loader.spec import LoaderSpec
from pretrain.data.shards.dataset import Dataset
from pretrain.data.shards.index import build_index
from pretrain.data.views.augment import apply
from pretrain.data.views.specs import ColorJitter, ViewSpec, stacks
from tests.data.tars import flip, image_bytes, tar_bytes

SAMPLES, FRAMES = 6, 12
WHOLE = {"scale": (1.0, 1.0), "ratio": (1.0, 1.0), "hflip": 0.0, "normalize": False}


def frame(value: int, size: tuple[int, int] = (8, 8)) -> bytes:
    """A PNG of one gray value."""
    file = io.BytesIO()
    Image.fromarray(np.full((*size, 3), value, np.uint8)).save(file, "PNG")
    return file.getvalue()


def shard(path: Path, members: list[tuple[str, bytes]]) -> Dataset:
    path.write_bytes(tar_bytes(members))
    build_index([str(path)])
    return Dataset.open([str(path)])


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    """Frame f of clip c has the value 20 c + f. Its members are in no order."""
    numbers = [(c, f) for c in range(SAMPLES) for f in (*range(0, FRAMES, 2), *range(1, FRAMES, 2))]
    return shard(tmp_path / "clips-000000.tar", [(f"clip{c}.{f:04d}.png", frame(20 * c + f)) for c, f in numbers])


def batches(dataset: Dataset, views: list[ViewSpec], **changes) -> MicroBatches:
    options: dict[str, Any] = {"in_chans": 3, "mean": IMAGENET_MEAN, "std": IMAGENET_STD, "seed": 3, "block_shards": 1}
    options |= {"global_batch": 4, "micro_batch": 4} | changes
    return MicroBatches(dataset, LoaderSpec(views=views, **options))


def values(batch: dict, name: str = "clip") -> torch.Tensor:
    """The gray value of every frame, int64 [b, n]."""
    return batch[name].float().mean((2, 3, 4)).round().long()


def test_a_view_shows_frames_a_stride_apart_from_a_random_start_of_the_position(dataset: Dataset):
    view = ViewSpec("clip", (8, 8), frames=3, stride=2, count=2, **WHOLE)
    whole = batches(dataset, [view], global_batch=12, micro_batch=12)
    found = torch.cat([values(whole[i]) for i in range(4)]).unflatten(1, (2, 3))
    assert (found.diff(dim=2) == 2).all()
    starts = found[..., 0] % 20
    assert set(starts.flatten().tolist()) == set(range(FRAMES - 4))
    assert (starts[:, 0] != starts[:, 1]).any()
    parts = batches(dataset, [view], global_batch=12, micro_batch=3, rank=1, world_size=2)
    assert torch.equal(torch.cat([values(parts[i]) for i in range(2)]), values(whole[0])[6:])


def test_only_the_members_that_are_shown_are_read(dataset: Dataset, monkeypatch: pytest.MonkeyPatch):
    of = batches(dataset, [ViewSpec("clip", (8, 8), frames=3, stride=2, **WHOLE)])
    read, asked = of.reader.read, []
    monkeypatch.setattr(of.reader, "read", lambda *at, only: asked.append(sorted(only)) or read(*at, only=only))
    shown = values(of[0]) % 20
    assert asked == [[f"{number:04d}.png" for number in row] for row in shown.tolist()]


def test_crop_flip_and_colours_are_those_of_all_frames_and_of_views_with_same_as(tmp_path: Path):
    still = image_bytes(5, size=(40, 30))
    dataset = shard(tmp_path / "a-000000.tar", [(f"c{c}.{f:04d}.jpg", still) for c in range(4) for f in range(4)])
    views = [
        ViewSpec("clip", (8, 8), scale=(0.1, 0.5), frames=4, jitter=ColorJitter(0.4, 0.4, 0.2, 0.1)),
        ViewSpec("pixels", (8, 8), normalize=False, same_as="clip"),
    ]
    assert [spec.num_images for _, spec in stacks(views)["pixels"]] == [4]
    host = batches(dataset, views)[0]
    done = apply(views, host, IMAGENET_MEAN, IMAGENET_STD, "cpu")
    assert done["clip"].shape == (4, 4, 3, 8, 8)
    assert torch.equal(done["clip"], done["clip"][:, :1].expand_as(done["clip"]))
    assert not torch.equal(done["clip"][0], done["clip"][1])
    norm = torch.tensor([IMAGENET_MEAN, IMAGENET_STD]).view(2, 3, 1, 1)
    torch.testing.assert_close(done["pixels"], done["clip"] * norm[1] + norm[0])


def test_a_short_clip_repeats_its_last_frame_and_an_image_is_a_still_clip(tmp_path: Path):
    members = [("a.0000.png", frame(1)), ("a.0001.png", frame(2)), ("b.png", frame(9))]
    of = batches(shard(tmp_path / "a-000000.tar", members), [ViewSpec("clip", (8, 8), frames=4, **WHOLE)])
    assert {tuple(row) for row in values(of[0]).tolist()} == {(1, 2, 2, 2), (9, 9, 9, 9)}


def test_a_damaged_frame_is_a_bad_sample_where_it_is_shown(dataset: Dataset, tmp_path: Path):
    path = Path(dataset.paths[0])
    at = path.read_bytes().index(b"clip0.0011.png") + 512 + 30
    flip(path, at)
    early, late = (batches(dataset, [ViewSpec("clip", (8, 8), frames=n, **WHOLE)]) for n in (1, FRAMES))
    assert not any(of["bad"] for of in [early[0]]) or values(early[0]).numel() == 4
    records = [record for i in range(2) for record in late[i]["bad"]]
    assert {record["key"] for record in records} == {"clip0"}
    assert all(record["reason"] == "0011.png: crc32c mismatch" and record["substitute"] for record in records)


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ([("a.0000.png", frame(1)), ("a.0001.png", frame(1, (8, 9)))], "its frames differ in size"),
        ([("a.txt", b"hello")], "no frames"),
    ],
)
def test_what_is_no_clip_is_a_bad_sample_with_the_reason(tmp_path: Path, members, reason: str):
    of = batches(
        shard(tmp_path / "a-000000.tar", [*members, ("b.png", frame(9))]), [ViewSpec("clip", (8, 8), frames=2, **WHOLE)]
    )
    batch = of[0]
    assert values(batch).tolist() == [[9, 9]] * 4
    assert {record["key"] for record in batch["bad"]} == {"a"}
    assert all(record["reason"].startswith(reason) for record in batch["bad"])


def test_frames_of_four_digits_are_a_clip_and_shorter_numbers_are_refused(tmp_path: Path):
    members = [(f"a.{number:03d}.png", frame(1)) for number in range(3)]
    with pytest.raises(ValueError, match="images are hidden by dots"):
        shard(tmp_path / "a-000000.tar", members)
    build_index([str(tmp_path / "a-000000.tar")], key_rule="first-dot")
    of = batches(Dataset.open([str(tmp_path / "a-000000.tar")]), [ViewSpec("clip", (8, 8), frames=2, **WHOLE)])
    assert values(of[0]).tolist() == [[1, 1]] * 4


def test_clips_next_to_images_are_refused_and_so_are_impossible_numbers():
    clip = ViewSpec("clip", (8, 8), frames=2)
    with pytest.raises(ValueError, match="next to views of images"):
        stacks([clip, ViewSpec("image", (8, 8))])
    with pytest.raises(ValueError, match="frames must be at least 0 and stride at least 1, got 2 and 0"):
        ViewSpec("clip", (8, 8), frames=2, stride=0)


def test_probes_see_the_frames_in_the_middle_and_images_as_still_clips(dataset: Dataset, tmp_path: Path):
    how: dict[str, Any] = {
        "in_chans": 3,
        "mean": (0.0, 0.0, 0.0),
        "std": (1.0, 1.0, 1.0),
        "batch_size": 4,
        "labelled": False,
    }

    def shown(of: Dataset, frames: int, stride: int) -> list[list[int]]:
        batches = EvalImages(of, (8, 8), resize=8, frames=frames, stride=stride, **how)
        return torch.cat([(clips * 255).mean((2, 3, 4)).round().long() for clips, _ in batches]).tolist()

    assert shown(dataset, 3, 2) == [[20 * c + f for f in (3, 5, 7)] for c in range(SAMPLES)]
    assert shown(dataset, 12, 1) == [[20 * c + f for f in range(12)] for c in range(SAMPLES)]
    short = shard(tmp_path / "a-000000.tar", [("a.0000.png", frame(1)), ("a.0001.png", frame(2)), ("b.png", frame(9))])
    assert shown(short, 3, 1) == [[1, 2, 2], [9, 9, 9]]
