from __future__ import annotations

import hashlib
import json
import os
import tarfile
from multiprocessing import Process
from pathlib import Path

import google_crc32c
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from webdataset.compat import WebDataset

from pretrain.data.__main__ import main
from pretrain.data.shards import sidecar
from pretrain.data.shards.catalog import ShardRow, fingerprint, read_rows
from pretrain.data.shards.dataset import Dataset
from pretrain.data.shards.index import _group, build_index, index_shard
from pretrain.data.shards.keys import split_name
from pretrain.data.shards.reader import Reader
from pretrain.data.shards.sidecar import read_sidecar
from pretrain.data.shards.tar import Member, TarError
from tests.data.tars import flip, image_bytes, make_shards, special, tar_bytes


def write_tar(path: Path, members, **options) -> str:
    path.write_bytes(tar_bytes(members, **options))
    return str(path)


def grouped(shard: str) -> list[tuple[str, list[str]]]:
    index = index_shard(shard, "first-dot")
    extensions = [index.extensions[number] for number in index.extension]
    return [(index.key(i), extensions[index.first[i] : index.first[i + 1]]) for i in range(len(index))]


keys = st.lists(st.sampled_from(["0", "a", "b_1", "__c", "é", "__d__"]), min_size=1, max_size=3).map("/".join)
extensions = st.lists(st.sampled_from(["jpg", "cls", "seg.png", "JSON", "txt"]), min_size=1, max_size=3, unique=True)


@settings(max_examples=100, deadline=None)
@given(samples=st.dictionaries(keys, extensions, min_size=1, max_size=5))
def test_samples_are_those_that_webdataset_makes(tmp_path_factory, samples):
    members = [(f"{key}.{extension}", key.encode()) for key, found in samples.items() for extension in found]
    shard = write_tar(tmp_path_factory.getbasetemp() / "group.tar", members)
    theirs = [
        (sample["__key__"], [name for name in sample if not name.startswith("__")])
        for sample in WebDataset(shard, shardshuffle=False, empty_check=False)
    ]
    assert grouped(shard) == theirs


def test_members_that_belong_to_no_sample_are_passed_over(tmp_path):
    members = [("__meta__/x.json", b"{}"), ("README", b"hi"), ("0.jpg", b"a"), (".DS_Store", b"x"), ("0.cls", b"1")]
    assert grouped(write_tar(tmp_path / "a.tar", members)) == [("0", ["jpg", "cls"])]


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("a/b.c/d.seg.PNG", ("a/b.c/d", "seg.png")),
        ("x.", ("x", "")),
        ("no_dot", None),
        ("a/.hidden", None),
        ("__meta__", None),
        ("__m__/a.jpg", None),
        ("a/__m__/a.jpg", ("a/__m__/a", "jpg")),
    ],
)
def test_a_key_ends_at_the_first_dot_of_the_last_part(name, parts):
    assert split_name(name) == parts


BAD = {
    "interleaved": [("a.jpg", b"1"), ("b.jpg", b"2"), ("a.cls", b"3")],
    "duplicate member": [("a.jpg", b"1"), ("a.JPG", b"2")],
    "reserved": [("a.jpg", b"1"), ("a.__url__", b"2")],
    "symbolic link": [("a.jpg", b"1"), special("b.jpg", tarfile.SYMTYPE, link="a.jpg")],
    r"'\.\.'": [("../evil.jpg", b"1")],
    "absolute": [("/tmp/evil.jpg", b"1")],
}


@pytest.mark.parametrize("reason", BAD)
def test_a_bad_shard_is_refused_naming_shard_and_member_and_nothing_is_written(tmp_path, reason, capsys):
    shard = write_tar(tmp_path / "data-0.tar", BAD[reason])
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match=reason) as error:
        build_index([shard])
    last = BAD[reason][-1]
    assert shard in str(error.value)
    assert (last if isinstance(last, tuple) else (last.name,))[0] in str(error.value)
    assert main(["index", shard, "--workers", "1"]) == 2
    assert "Traceback" not in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


def test_all_bad_shards_are_listed_at_once_and_the_good_ones_are_done(tmp_path):
    shards = [write_tar(tmp_path / f"{reason[:4]}-{i}.tar", BAD[reason]) for i, reason in enumerate(BAD)]
    good = write_tar(tmp_path / "good.tar", [("a.jpg", b"1")])
    with pytest.raises(ValueError, match="6 of 7 shards cannot be indexed") as error:
        build_index([*shards, good], workers=2)
    assert all(shard in str(error.value) for shard in shards)
    assert len(read_sidecar(Path(f"{good}.idx"))) == 1
    assert read_rows(tmp_path) == {}


def test_the_index_has_the_offset_of_every_member(tmp_path):
    members = [(f"{i:03d}.{e}", os.urandom(i * 37)) for i in range(40) for e in ("jpg", "json")]
    shard = write_tar(tmp_path / "a.tar", members)
    (row,) = build_index([shard])
    index, data = read_sidecar(tmp_path / "a.tar.idx"), (tmp_path / "a.tar").read_bytes()
    found = [data[o : o + n] for o, n in zip(index.offset.tolist(), index.length.tolist(), strict=True)]
    assert found == [payload for _, payload in members]
    assert index.crc32c.tolist() == [google_crc32c.value(payload) for payload in found]
    assert row == ShardRow("a.tar", len(data), hashlib.sha256(data).hexdigest(), 40, ("jpg", "json"))
    assert (index.sha256, index.shard_bytes) == (row.sha256, row.bytes)


def test_the_index_costs_about_fifty_bytes_a_sample(tmp_path):
    shard = write_tar(tmp_path / "a.tar", [(f"{i:08d}.{e}", b"x") for i in range(1000) for e in ("jpg", "cls")])
    build_index([shard])
    assert (tmp_path / "a.tar.idx").stat().st_size <= 55 * 1000


def test_any_changed_byte_of_a_sidecar_is_named_damage(tmp_path):
    shard = write_tar(tmp_path / "a.tar", [("a.jpg", b"1"), ("a.cls", b"2"), ("b.jpg", b"3")])
    build_index([shard])
    path = tmp_path / "a.tar.idx"
    for byte in range(path.stat().st_size):
        flip(path, byte)
        with pytest.raises(ValueError, match=r"a\.tar\.idx: damaged.*fovea data index --force"):
            read_sidecar(path)
        flip(path, byte)
    whole = path.read_bytes()
    for cut in range(len(whole)):
        path.write_bytes(whole[:cut])
        with pytest.raises(ValueError, match="damaged"):
            read_sidecar(path)


def test_shards_that_are_indexed_already_are_not_read_again(tmp_path):
    shards = make_shards(tmp_path)
    first = read_rows(tmp_path)
    stamps = {shard: Path(f"{shard}.idx").stat().st_mtime_ns for shard in shards}
    Path(f"{shards[1]}.idx").write_bytes(b"damaged")
    data = Path(shards[2]).read_bytes()
    Path(shards[2]).write_bytes(data)  # the same bytes, a new time
    build_index(shards)
    changed = [shard for shard in shards if Path(f"{shard}.idx").stat().st_mtime_ns != stamps[shard]]
    assert changed == shards[1:]
    assert read_rows(tmp_path) == first
    build_index(shards, force=True)
    assert Path(f"{shards[0]}.idx").stat().st_mtime_ns != stamps[shards[0]]


def test_a_shard_that_was_made_anew_is_indexed_anew(tmp_path):
    shards = make_shards(tmp_path)
    before = Dataset.open(tmp_path)
    write_tar(Path(shards[1]), [("new.jpg", b"1")])
    with pytest.raises(ValueError, match=r"train-000001\.tar has 10240 bytes"):
        Dataset.open(tmp_path)
    build_index(shards)
    after = Dataset.open(tmp_path)
    assert after.counts.tolist() == [4, 1, 4]
    assert after.fingerprint != before.fingerprint


def test_a_folder_that_cannot_be_written_to_has_a_way_out_before_anything_is_read(tmp_path, monkeypatch):
    shards = make_shards(tmp_path, shards=1)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(ValueError, match=f"{tmp_path} is not writable; write the index elsewhere with --out DIR"):
        build_index(shards)


def test_a_member_of_four_gigabytes_is_refused():
    with pytest.raises(TarError, match=r"s\.tar: a\.npy: 4294967296 bytes; a member holds less than 4 GiB"):
        _group([Member("a.npy", 512, 1 << 32, 0)], "s.tar")


def test_workers_do_not_change_the_result(tmp_path):
    shards = make_shards(tmp_path, shards=5)
    for workers, out in ((1, tmp_path / "one"), (3, tmp_path / "three")):
        build_index(shards, out=out, workers=workers)
    one, three = ({f.name: f.read_bytes() for f in (tmp_path / n).iterdir()} for n in ("one", "three"))
    assert one == three
    assert len(one) == 6


def test_a_folder_of_two_sets_has_one_dataset_json(tmp_path):
    make_shards(tmp_path, name="train")
    make_shards(tmp_path, name="val", shards=1)
    assert Dataset.open(f"{tmp_path}/val-*.tar").num_samples == 4
    assert Dataset.open(f"{tmp_path}/train-*.tar").num_samples == 12
    assert Dataset.open(tmp_path).num_samples == 16


def test_two_shards_of_one_name_cannot_share_an_index_folder(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write_tar(tmp_path / name / "000.tar", [("x.jpg", name.encode())])
    shards = [str(tmp_path / name / "000.tar") for name in ("a", "b")]
    with pytest.raises(ValueError, match=r"a/000\.tar and .*b/000\.tar would share the index"):
        build_index(shards, out=tmp_path / "index")
    build_index(shards)
    assert Dataset.open(shards).num_samples == 2


def test_a_changed_dataset_json_is_named_damage(tmp_path):
    make_shards(tmp_path)
    path = tmp_path / "dataset.json"
    content = json.loads(path.read_bytes())
    content["shards"][0]["count"] += 1
    for damaged in (json.dumps(content), path.read_text()[:-10], "[]", ""):
        path.write_text(damaged)
        with pytest.raises(ValueError, match=r"dataset\.json: "):
            Dataset.open(tmp_path)


def test_an_index_of_another_version_is_refused_by_its_version(tmp_path, monkeypatch):
    monkeypatch.setattr(sidecar, "INDEX_VERSION", 7)
    make_shards(tmp_path, shards=1)
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"index version 7, but this program reads 1; .*fovea data index --force"):
        read_sidecar(tmp_path / "train-000000.tar.idx")
    path = tmp_path / "dataset.json"
    path.write_text(path.read_text().replace('"version": 1', '"version": 7'))
    with pytest.raises(ValueError, match=r"dataset\.json: version 7, but this program reads 1"):
        read_rows(tmp_path)


def test_the_fingerprint_knows_content_and_not_order():
    rows = [ShardRow(f"{i}.tar", i, f"{i:064x}", i, ("jpg",)) for i in range(5)]
    assert fingerprint(rows) == fingerprint(rows[::-1])
    assert fingerprint(rows) != fingerprint([*rows[:-1], rows[-1]._replace(sha256="f" * 64)])
    assert fingerprint(rows) != fingerprint(rows[:-1])


def test_a_shard_that_grows_while_it_is_indexed_is_refused(tmp_path, monkeypatch):
    shard = write_tar(tmp_path / "a.tar", [("a.jpg", b"1")])
    fstat, calls = os.fstat, []

    def growing(fd):
        calls.append(fd)
        if len(calls) == 3:  # of the kind of file, before reading, after it
            os.utime(shard, ns=(1, 1))
        return fstat(fd)

    monkeypatch.setattr(os, "fstat", growing)
    with pytest.raises(ValueError, match="changed while it was being indexed"):
        index_shard(shard)


def test_the_command_prints_what_it_found(tmp_path, capsys):
    make_shards(tmp_path, shards=2)
    assert main(["index", f"{tmp_path}/train-{{000000..000001}}.tar", "--workers", "1", "--force"]) == 0
    out = capsys.readouterr().out
    assert "8 samples in 2 shards" in out
    assert "cls, jpg" in out
    assert Dataset.open(tmp_path).fingerprint in out


def test_training_never_silently_omits_a_missing_shard_of_the_index(tmp_path, capsys):
    paths = make_shards(tmp_path)
    Path(paths[1]).unlink()
    for spec in (tmp_path, f"{tmp_path}/train-*.tar", [str(tmp_path)]):
        with pytest.raises(ValueError, match=r"but missing: .*train-000001\.tar; .*--forget"):
            Dataset.open(spec)
    assert Dataset.open([paths[0], paths[2]]).num_samples == 8, "a list names what it wants"
    assert main(["verify", str(tmp_path)]) == 1
    assert "train-000001.tar: missing, but listed in dataset.json" in capsys.readouterr().out
    assert main(["index", str(tmp_path)]) == 2
    assert main(["index", str(tmp_path), "--forget"]) == 0
    assert Dataset.open(tmp_path).num_samples == 8
    assert not Path(f"{paths[1]}.idx").exists()


def test_a_shard_whose_name_ends_in_capitals_is_a_shard_of_the_folder(tmp_path):
    make_shards(tmp_path, shards=2)
    (tmp_path / "train-000001.tar").rename(tmp_path / "train-000001.TAR")
    with pytest.raises(ValueError, match=r"not in an index .*train-000001\.TAR"):
        Dataset.open(tmp_path)


def test_changed_extensions_in_dataset_json_are_named_damage(tmp_path):
    make_shards(tmp_path)
    path = tmp_path / "dataset.json"
    path.write_text(path.read_text().replace('"cls", ', ""))
    with pytest.raises(ValueError, match="its rows do not match its fingerprint"):
        Dataset.open(tmp_path)


@pytest.mark.slow
def test_processes_that_index_one_folder_at_the_same_time_lose_no_row(tmp_path):
    paths = make_shards(tmp_path, shards=12, samples=1)
    rows = read_rows(tmp_path)
    for _ in range(3):
        (tmp_path / "dataset.json").unlink()
        workers = [Process(target=build_index, args=([path],)) for path in paths]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        assert read_rows(tmp_path) == rows


def test_dots_in_names_that_hide_images_are_refused_and_the_last_dot_is_the_way_out(tmp_path, capsys):
    names = [f"img_1.{i}.jpg" for i in range(20)]
    shard = write_tar(tmp_path / "a.tar", [(name, image_bytes(i)) for i, name in enumerate(names)])
    assert main(["index", shard]) == 2
    assert "img_1.0.jpg: 20 images are hidden by dots in their names" in capsys.readouterr().err
    assert main(["index", shard, "--key-rule", "last-dot"]) == 0
    dataset = Dataset.open(tmp_path)
    assert dataset.num_samples == 20 and dataset.extensions == ("jpg",)
    assert Reader(dataset).read(0, 3)["__key__"] == "img_1.3"


def test_an_image_that_another_of_the_same_first_part_would_swallow_is_refused(tmp_path):
    members = [(f"{i:03d}.jpg", b"x") for i in range(4)] + [("cat.jpg", b"x"), ("cat.old.jpg", b"y")]
    with pytest.raises(ValueError, match=r"cat\.old\.jpg: 1 images are hidden"):
        index_shard(write_tar(tmp_path / "a.tar", members))
    assert len(index_shard(write_tar(tmp_path / "a.tar", members), "first-dot")) == 5


def test_an_extension_with_a_dot_that_most_samples_have_is_meant(tmp_path):
    members = [(f"{i:03d}.{extension}", b"x") for i in range(4) for extension in ("jpg", "seg.png")]
    assert len(index_shard(write_tar(tmp_path / "a.tar", members))) == 4
