"""A data set as a sequence of samples."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pretrain.data.loader.eval_images import EvalImages
from pretrain.data.loader.samples import Samples
from pretrain.data.shards.dataset import Dataset
from pretrain.data.shards.index import build_index
from pretrain.data.shards.reader import BadSample
from tests.data.tars import flip, image_bytes, tar_bytes
from tests.runs import SHARDS


@pytest.fixture(scope="module")
def samples() -> Samples:
    return Samples(Dataset.open(SHARDS / "val"))


def test_it_has_every_sample_once_in_canonical_order(samples: Samples):
    assert len(samples) == sum(samples.shards.values()) == len({(s.shard, s.key) for s in samples})
    images = EvalImages(samples.dataset, (8, 8), in_chans=3, mean=(0,) * 3, std=(1,) * 3, batch_size=len(samples))
    ((_, labels),) = images
    assert [sample.label for sample in samples] == labels.tolist()


def test_indices_count_from_both_ends_and_slices_are_lists(samples: Samples):
    assert samples[-1] == samples[len(samples) - 1]
    assert samples[1:5:2] == [samples[1], samples[3]]
    for number in (len(samples), -len(samples) - 1):
        with pytest.raises(IndexError, match=f"of {len(samples)}"):
            samples[number]


def test_a_sample_decodes_its_image(samples: Samples):
    sample = samples[3]
    with Image.open(io.BytesIO(sample.members["jpg"])) as image:
        assert sample.image().shape == (image.height, image.width, 3)
    assert sample.image(1).dtype == np.uint8 and f"Sample({sample.key}: " in repr(sample)


def test_the_fingerprint_is_that_of_the_data_set(samples: Samples):
    assert samples.fingerprint == samples.dataset.fingerprint and samples.fingerprint[:12] in repr(samples)


def test_a_sample_without_a_label_has_none_and_damaged_bytes_are_an_error(tmp_path: Path):
    path = tmp_path / "a.tar"
    path.write_bytes(tar_bytes([("x.jpg", image_bytes(0)), ("y.jpg", image_bytes(1)), ("y.cls", b"cat")]))
    build_index([str(path)])
    samples = Samples(Dataset.open(path))
    assert samples[0].label is None
    with pytest.raises(ValueError, match=r"y\.cls holds b'cat', expected an integer"):
        _ = samples[1].label
    flip(path, 600)
    with pytest.raises(BadSample, match="crc32c"):
        samples[0]
