from __future__ import annotations

import errno
import os
import pickle
import random
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest
from webdataset.compat import WebDataset

from pretrain.data.shards.dataset import Dataset
from pretrain.data.shards.index import build_index
from pretrain.data.shards.reader import BadSample, Reader
from pretrain.data.shards.verify import verify_shards
from tests.data.tars import flip, make_dataset, make_shards, tar_bytes


def everything(reader: Reader) -> list[dict]:
    counts = reader.dataset.counts.tolist()
    return [reader.read(shard, sample) for shard, count in enumerate(counts) for sample in range(count)]


def test_samples_are_those_that_webdataset_reads(tmp_path):
    dataset = make_dataset(tmp_path)
    theirs = list(WebDataset(list(dataset.paths), shardshuffle=False, empty_check=False))
    ours = everything(Reader(dataset))
    assert [{k: v for k, v in sample.items() if k != "__local_path__"} for sample in theirs] == ours
    assert len(ours) == dataset.num_samples == 12


def test_only_leaves_members_out(tmp_path):
    sample = Reader(make_dataset(tmp_path)).read(1, 2, only={"cls"})
    assert sample == {"__key__": "000006", "__url__": str(tmp_path / "train-000001.tar"), "cls": b"0"}


def test_every_flipped_payload_byte_is_a_bad_sample(tmp_path):
    dataset = make_dataset(tmp_path, shards=1, samples=2)
    path = Path(dataset.paths[0])
    reader = Reader(dataset)
    good = everything(reader)
    index = reader._shard(0)[1]
    flips = 0
    for member, (offset, length) in enumerate(zip(index.offset.tolist(), index.length.tolist(), strict=True)):
        sample, extension = member // 2, ("jpg", "cls")[member % 2]
        for byte in range(offset, offset + length):
            flip(path, byte, mask=1 << byte % 8)
            with pytest.raises(BadSample) as error:
                reader.read(0, sample)
            flip(path, byte, mask=1 << byte % 8)
            found = error.value
            assert (found.shard, found.key, found.member) == ("train-000000.tar", good[sample]["__key__"], extension)
            assert found.reason == "crc32c mismatch"
            flips += 1
    assert flips == sum(index.length) > 1000
    assert everything(reader) == good


def test_a_shard_cut_while_it_is_open_is_a_bad_sample(tmp_path):
    dataset = make_dataset(tmp_path)
    reader = Reader(dataset)
    reader.read(0, 0)
    os.truncate(dataset.paths[0], 700)
    with pytest.raises(BadSample, match=r"train-000000\.tar: sample 000000, member jpg: the shard ends inside it"):
        reader.read(0, 0)


def test_bytes_that_the_disk_does_not_give_are_a_bad_sample(tmp_path, monkeypatch):
    reader = Reader(make_dataset(tmp_path))

    def broken(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "pread", broken)
    with pytest.raises(BadSample, match=r"000000\.tar: sample 000000, member jpg: cannot be read: Input/output error"):
        reader.read(0, 0)


def test_a_file_system_that_gives_a_little_at_a_time_gives_all_of_it(tmp_path, monkeypatch):
    expected = everything(Reader(make_dataset(tmp_path)))
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda fd, length, offset: pread(fd, min(length, 100), offset))
    dataset = Dataset.open(build_and_list(tmp_path))
    assert everything(Reader(dataset)) == expected
    assert not [damage for report in verify_shards(list(dataset.paths)) for damage in report.damages]


def build_and_list(folder: Path) -> list[str]:
    shards = sorted(str(path) for path in folder.glob("*.tar"))
    build_index(shards, force=True)
    return shards


def test_a_shard_replaced_or_removed_after_opening_the_data_set_stops_the_reader(tmp_path):
    dataset = make_dataset(tmp_path)
    Path(dataset.paths[0]).write_bytes(b"other")
    Path(dataset.paths[1]).unlink()
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    with pytest.raises(ValueError, match=r"train-000000\.tar has 5 bytes, its index has \d+"):
        Reader(dataset).read(0, 0)
    with pytest.raises(ValueError, match=r"train-000001\.tar: cannot open shard: No such file"):
        Reader(dataset).read(1, 0)
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208


def test_a_sidecar_of_another_shard_is_refused(tmp_path):
    dataset = make_dataset(tmp_path)
    dataset.sidecar(0).write_bytes(dataset.sidecar(1).read_bytes())
    with pytest.raises(ValueError, match=r"not of the train-000000\.tar in dataset\.json"):
        Reader(dataset).read(0, 0)


def test_the_error_for_a_missing_or_damaged_sidecar_has_the_command(tmp_path):
    dataset = make_dataset(tmp_path)
    flip(dataset.sidecar(0), 90)
    dataset.sidecar(1).unlink()
    with pytest.raises(ValueError, match=r"damaged index.*fovea data index --force"):
        Reader(dataset).read(0, 0)
    with pytest.raises(ValueError, match=r"no index; create it: fovea data index"):
        Reader(dataset).read(1, 0)


def test_places_outside_the_shard_are_an_error(tmp_path):
    reader = Reader(make_dataset(tmp_path))
    for sample in (-1, 4):
        with pytest.raises(IndexError, match=f"has 4 samples, requested {sample}"):
            reader.read(0, sample)


def test_open_shards_are_bounded_and_the_oldest_used_is_closed(tmp_path):
    reader = Reader(make_dataset(tmp_path, shards=6), max_open=3)
    for shard in (0, 1, 2, 0, 3):
        reader.read(shard, 0)
    assert sorted(reader._open) == [0, 2, 3]
    order = [(shard, sample) for shard in range(6) for sample in range(4)] * 5
    random.Random(0).shuffle(order)
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    for place in order:
        reader.read(*place)
        assert len(reader._open) <= 3
    assert len(os.listdir("/proc/self/fd")) <= before + 1  # noqa: PTH208
    reader.close()
    assert not reader._open


def test_a_reader_that_was_pickled_reads_the_same(tmp_path):
    reader = Reader(make_dataset(tmp_path))
    expected = everything(reader)
    assert everything(pickle.loads(pickle.dumps(reader))) == expected
    with ProcessPoolExecutor(1, mp_context=get_context("forkserver")) as pool:
        assert pool.submit(reader.read, 1, 2).result() == expected[6]


def test_a_bad_sample_survives_the_way_back_from_a_worker():
    error = pickle.loads(pickle.dumps(BadSample("a.tar", "k", "jpg", "crc32c mismatch")))
    assert (error.shard, error.key, error.member, error.reason) == ("a.tar", "k", "jpg", "crc32c mismatch")
    assert str(error) == "a.tar: sample k, member jpg: crc32c mismatch"


def test_zero_byte_members_are_read(tmp_path):
    path = tmp_path / "a.tar"
    path.write_bytes(tar_bytes([("a.jpg", b""), ("a.cls", b"1")]))
    build_index([str(path)])
    assert Reader(Dataset.open(path)).read(0, 0)["jpg"] == b""


def test_the_order_of_a_list_changes_nothing(tmp_path):
    shards = make_shards(tmp_path)
    one, other = Dataset.open(shards), Dataset.open(shards[::-1])
    assert (one.paths, one.fingerprint) == (other.paths, other.fingerprint)
    assert one.names == ("train-000000.tar", "train-000001.tar", "train-000002.tar")
    assert one.counts.tolist() == [4, 4, 4]
    assert one.extensions == ("cls", "jpg")


def test_the_error_for_a_missing_index_has_the_exact_command(tmp_path):
    path = tmp_path / "my shards.tar"
    path.write_bytes(tar_bytes([("a.jpg", b"")]))
    with pytest.raises(ValueError, match=rf"make it with: fovea data index '{path}'$"):
        Dataset.open(path)
    with pytest.raises(ValueError, match=rf"fovea data index '{path}' --out {tmp_path}/elsewhere$"):
        Dataset.open(path, index=tmp_path / "elsewhere")


def test_an_index_that_is_no_folder_is_named(tmp_path):
    shards = make_shards(tmp_path)
    with pytest.raises(ValueError, match=r"train-000000\.tar/dataset\.json: cannot read this index: Not a directory"):
        Dataset.open(shards, index=shards[0])


def test_a_shard_whose_size_differs_from_its_index_is_named(tmp_path):
    shards = make_shards(tmp_path)
    os.truncate(shards[1], 5000)
    with pytest.raises(ValueError, match=r"train-000001\.tar has 5000 bytes, its index has 20480"):
        Dataset.open(tmp_path)


def test_a_missing_shard_is_named(tmp_path):
    shards = make_shards(tmp_path)
    Path(shards[1]).unlink()
    with pytest.raises(ValueError, match=r"1 of 3 shards not found: .*train-000001\.tar"):
        Dataset.open(shards)


def test_a_data_set_without_samples_is_an_error(tmp_path):
    path = tmp_path / "a.tar"
    path.write_bytes(tar_bytes([]))
    build_index([str(path)])
    with pytest.raises(ValueError, match="no sample in 1 shards"):
        Dataset.open(path)
