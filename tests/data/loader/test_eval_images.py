import json

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms as v1

from pretrain.data.loader.eval_images import EvalImages
from pretrain.data.shards.dataset import Dataset
from pretrain.data.shards.index import build_index
from tests.data.photos import stored
from tests.data.tars import image_bytes, make_dataset, tar_bytes
from tests.data.views.test_crops import photo
from tests.data.views.test_decode import encoded

ZERO_ONE = {"in_chans": 3, "mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}


def one_shard(folder, members) -> Dataset:
    (folder / "a.tar").write_bytes(tar_bytes(members))
    build_index([str(folder / "a.tar")])
    return Dataset.open(folder / "a.tar")


def test_every_sample_comes_once_in_order_with_its_label(tmp_path):
    dataset = make_dataset(tmp_path, shards=3, samples=5)
    loader = EvalImages(dataset, (16, 16), batch_size=4, **ZERO_ONE)
    batches = list(loader)
    assert [len(labels) for _, labels in batches] == [4, 4, 4, 3]
    assert len(loader) == 4
    labels = torch.cat([labels for _, labels in batches])
    assert labels.tolist() == [number % 3 for number in range(15)]
    assert labels.dtype == torch.int64
    assert batches[0][0].shape == (4, 3, 16, 16)
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(batches, loader, strict=True))


@pytest.mark.parametrize("shape", [(375, 500), (500, 375), (300, 300), (40, 60)])
def test_an_image_is_resized_and_cut_as_the_official_evaluation_does(tmp_path, shape):
    image = photo(*shape)
    dataset = one_shard(tmp_path, [("a.png", encoded(image, "PNG")), ("a.cls", b"7")])
    ((ours, labels),) = EvalImages(dataset, (224, 224), batch_size=8, **ZERO_ONE)
    cut = v1.Compose([v1.Resize(256, interpolation=v1.InterpolationMode.BICUBIC), v1.CenterCrop(224), v1.ToTensor()])
    assert labels.tolist() == [7]
    assert (ours[0] - cut(Image.fromarray(image))).abs().max() <= 1.01 / 255


def test_a_turned_photo_is_evaluated_upright(tmp_path):
    shown = photo(30, 50)
    members = [("a.png", encoded(shown, "PNG")), ("b.png", stored(shown, 8, "PNG"))]
    dataset = one_shard(
        tmp_path, [member for name, data in members for member in ((name, data), (f"{name[0]}.cls", b"1"))]
    )
    ((ours, _),) = EvalImages(dataset, (16, 16), batch_size=8, **ZERO_ONE)
    assert torch.equal(ours[0], ours[1])
    ((ours, _),) = EvalImages(dataset, (16, 16), batch_size=8, orientation="stored", **ZERO_ONE)
    assert not torch.equal(ours[0], ours[1])


def test_images_are_normalized_and_need_not_be_square(tmp_path):
    image = np.full((50, 80, 3), (255, 0, 51), np.uint8)
    dataset = one_shard(tmp_path, [("a.png", encoded(image, "PNG")), ("a.cls", b"0")])
    mean, std = (0.5, 0.5, 0.2), (0.5, 0.25, 1.0)
    ((ours, _),) = EvalImages(dataset, (16, 24), in_chans=3, mean=mean, std=std, batch_size=1)
    assert ours.shape == (1, 3, 16, 24)
    assert torch.allclose(ours.mean((0, 2, 3)), torch.tensor([1.0, -2.0, 0.0]), atol=1e-6)


def test_bad_images_are_left_out_and_listed(tmp_path):
    members = []
    for number in range(6):
        data = b"no image" if number in (1, 4, 5) else image_bytes(number)
        members += [(f"{number}.jpg", data), (f"{number}.cls", str(number).encode())]
    loader = EvalImages(one_shard(tmp_path, members), (16, 16), batch_size=2, **ZERO_ONE)
    for _ in range(2):
        assert [labels.tolist() for _, labels in loader] == [[0], [2, 3]]
        assert [(shard, key) for shard, key, _ in loader.bad] == [("a.tar", "1"), ("a.tar", "4"), ("a.tar", "5")]
        assert "not a JPEG" in loader.bad[0][2]


def test_an_image_that_would_take_all_memory_is_left_out(tmp_path):
    members = [("a.png", encoded(np.zeros((1, 16_000, 3), np.uint8), "PNG")), ("a.cls", b"0")]
    loader = EvalImages(one_shard(tmp_path, members), (56, 56), batch_size=2, resize=64, **ZERO_ONE)
    assert list(loader) == []
    assert loader.bad == [("a.tar", "a", "too long: 16000 x 1 pixels would be resized to 1024000 x 64")]


@pytest.mark.processes
def test_workers_and_ranks_change_nothing(tmp_path):
    dataset = make_dataset(tmp_path, shards=2, samples=7)
    alone = list(EvalImages(dataset, (16, 16), batch_size=3, **ZERO_ONE))
    workers = list(EvalImages(dataset, (16, 16), batch_size=3, num_workers=2, **ZERO_ONE))
    ranks = [
        pair for r in range(3) for pair in EvalImages(dataset, (16, 16), batch_size=3, rank=r, world_size=3, **ZERO_ONE)
    ]
    for other in (workers, ranks):
        for index in (0, 1):
            assert torch.equal(torch.cat([pair[index] for pair in alone]), torch.cat([pair[index] for pair in other]))


def test_a_sample_of_the_samples_spans_the_data_set(tmp_path):
    dataset = make_dataset(tmp_path, shards=4, samples=5)
    whole = torch.cat([images for images, _ in EvalImages(dataset, (16, 16), batch_size=8, **ZERO_ONE)])
    some = torch.cat([images for images, _ in EvalImages(dataset, (16, 16), batch_size=8, max_samples=3, **ZERO_ONE)])
    assert torch.equal(some, whole[[0, 10, 19]])


def test_a_data_set_without_labels_is_refused_with_its_extensions(tmp_path):
    dataset = one_shard(tmp_path, [("a.jpg", image_bytes(0))])
    with pytest.raises(ValueError, match=r"no labels: a.tar .* hold jpg, and no \.cls"):
        EvalImages(dataset, (16, 16), batch_size=1, **ZERO_ONE)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("a.jpg", b""), ("b.jpg", b""), ("b.cls", b"1")], "a.tar/a has no label"),
        ([("a.jpg", b""), ("a.cls", b"cat")], "a.tar/a.cls holds b'cat', expected an integer"),
    ],
)
def test_a_sample_without_a_number_for_a_label_is_named(tmp_path, members, message):
    with pytest.raises(ValueError, match=message):
        list(EvalImages(one_shard(tmp_path, members), (16, 16), batch_size=2, **ZERO_ONE))


def test_labels_that_are_parts_of_a_data_set_are_refused(tmp_path):
    dataset = make_dataset(tmp_path)
    for names, refused in ((("train", "val", "test"), True), (("train", "bus", "car"), False)):
        (tmp_path / "classes.json").write_text(json.dumps(names))
        if refused:
            with pytest.raises(ValueError, match=r"its classes train, val, test are parts of a data set, not classes"):
                EvalImages(dataset, (16, 16), batch_size=1, **ZERO_ONE)
        else:
            EvalImages(dataset, (16, 16), batch_size=1, **ZERO_ONE)


def test_a_crop_larger_than_the_resized_image_is_refused(tmp_path):
    with pytest.raises(ValueError, match="resize=20 is smaller"):
        EvalImages(make_dataset(tmp_path), (24, 24), batch_size=2, resize=20, **ZERO_ONE)
