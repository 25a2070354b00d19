from __future__ import annotations

import os
from pathlib import Path

import pytest

from pretrain.data.__main__ import main
from pretrain.data.shards.index import build_index
from pretrain.data.shards.verify import Damage, verify_shards
from tests.data.tars import flip, make_shards, tar_bytes


def damages(shards: list[str]) -> list[Damage]:
    return [damage for report in verify_shards(shards) for damage in report.damages]


def test_sound_shards_pass(tmp_path, capsys):
    shards = make_shards(tmp_path)
    assert damages(shards) == []
    assert main(["verify", str(tmp_path), "--workers", "2"]) == 0
    assert "12" in capsys.readouterr().out


@pytest.mark.slow
def test_every_flipped_byte_of_a_shard_is_caught_and_payloads_are_named(tmp_path):
    members = [("a/0.jpg", b"\xff" * 300), ("a/0.cls", b"1"), ("a/1.jpg", b"x" * 512), ("n" * 120 + ".jpg", b"y")]
    path = tmp_path / "a.tar"
    path.write_bytes(tar_bytes(members, trim=True))
    build_index([str(path)])
    for byte in range(path.stat().st_size):
        flip(path, byte, mask=1 << byte % 8)
        found = damages([str(path)])
        assert len(found) == 1, byte
        assert found[0].shard == str(path)
        in_payload = 512 <= byte < 812
        assert ((found[0].key, found[0].member) == ("a/0", "jpg")) == in_payload
        flip(path, byte, mask=1 << byte % 8)
    assert damages([str(path)]) == []


def test_each_damaged_payload_is_named(tmp_path, capsys):
    shards = make_shards(tmp_path)
    for shard, byte in ((shards[0], 600), (shards[2], 600)):
        flip(Path(shard), byte)
    data = Path(shards[0]).read_bytes()
    flip(Path(shards[0]), data.index(b"000003.cls") + 512)
    assert damages(shards) == [
        Damage(shards[0], "000000", "jpg", "crc32c mismatch"),
        Damage(shards[0], "000003", "cls", "crc32c mismatch"),
        Damage(shards[2], "000008", "jpg", "crc32c mismatch"),
    ]
    assert main(["verify", *shards, "--workers", "1"]) == 1
    out = capsys.readouterr().out
    assert f"{shards[0]}, sample 000003, member cls: crc32c mismatch" in out
    assert "damaged shards" in out


def test_the_report_of_a_truncated_shard_has_the_place_and_the_loss(tmp_path):
    (shard,) = make_shards(tmp_path, shards=1)
    os.truncate(shard, 1000)
    assert [str(damage) for damage in damages([shard])] == [
        f"{shard}: 1000 bytes, indexed with 20480",
        f"{shard}, sample 000000, member jpg: missing: the shard ends at byte 1000; "
        "8 members are lost, starting with this one",
    ]


def test_a_shard_that_cannot_be_opened_does_not_hide_the_others(tmp_path):
    shards = make_shards(tmp_path)
    Path(shards[0]).unlink()
    flip(Path(shards[2]), 600)
    assert [str(damage) for damage in damages(shards)] == [
        f"{shards[0]}: cannot open shard: No such file or directory",
        f"{shards[2]}, sample 000008, member jpg: crc32c mismatch",
    ]


def test_bytes_added_at_the_end_are_caught(tmp_path):
    (shard,) = make_shards(tmp_path, shards=1)
    with Path(shard).open("ab") as file:
        file.write(b"\0" * 512)
    assert "20992 bytes, indexed with 20480" in str(damages([shard])[0])


def test_a_damaged_index_is_damage_too(tmp_path):
    shards = make_shards(tmp_path)
    flip(Path(f"{shards[0]}.idx"), 100)
    Path(f"{shards[1]}.idx").write_bytes(Path(f"{shards[2]}.idx").read_bytes())
    found = damages(shards)
    assert found[0].shard == f"{shards[0]}.idx"
    assert "damaged index" in found[0].reason
    assert {damage.shard for damage in found[1:]} == {f"{shards[1]}.idx", shards[1]}
    catalog = tmp_path / "dataset.json"
    catalog.write_text(catalog.read_text().replace('"count": 4', '"count": 5'))
    assert damages(shards)[0].shard == str(catalog)
    assert main(["verify", str(tmp_path), "--workers", "1"]) == 1


def test_shards_that_were_never_indexed_are_the_user_s_to_index(tmp_path, capsys):
    (tmp_path / "a.tar").write_bytes(tar_bytes([("a.jpg", b"1")]))
    with pytest.raises(ValueError, match=r"run fovea data index on them: .*a\.tar"):
        list(verify_shards([str(tmp_path / "a.tar")]))
    assert main(["verify", str(tmp_path)]) == 2
    assert "fovea data index" in capsys.readouterr().err
