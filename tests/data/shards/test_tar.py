from __future__ import annotations

import gzip
import hashlib
import io
import os
import string
import tarfile
from pathlib import Path

import google_crc32c
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.data.shards.tar import Member, TarError, Walker
from tests.data.tars import special, tar_bytes


def walk(data: bytes, path: Path) -> tuple[list[Member], Walker]:
    path.write_bytes(data)
    fd = os.open(path, os.O_RDONLY)
    try:
        walker = Walker(fd, "shard.tar")
        return list(walker), walker
    finally:
        os.close(fd)


part = st.text(string.ascii_letters + string.digits + "_-.é漢 ", min_size=1, max_size=90).filter(
    lambda text: text.strip(". ") == text
)
names = st.lists(part, min_size=1, max_size=4).map("/".join)
payloads = st.one_of(st.binary(max_size=40), st.integers(0, 3000).map(lambda n: bytes(i % 251 for i in range(n))))
FORMATS = {"pax": tarfile.PAX_FORMAT, "gnu": tarfile.GNU_FORMAT}


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(members=st.lists(st.tuples(names, payloads), max_size=8), tar_format=st.sampled_from(sorted(FORMATS)))
def test_the_walker_sees_what_python_tarfile_sees(tmp_path_factory, members, tar_format):
    data = tar_bytes(members, tar_format=FORMATS[tar_format])
    found, walker = walk(data, tmp_path_factory.getbasetemp() / "roundtrip.tar")
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        expected = [(info.name, info.offset_data, info.size) for info in tar]
    assert [(m.name, m.offset, m.length) for m in found] == expected
    assert [m.crc32c for m in found] == [google_crc32c.value(payload) for _, payload in members]
    assert (walker.sha256, walker.size) == (hashlib.sha256(data).digest(), len(data))


def test_ustar_prefixes_and_long_names_are_joined(tmp_path):
    name = "/".join(["d" * 60, "e" * 60, "f" * 60 + ".jpg"])
    for tar_format in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        found, _ = walk(tar_bytes([(name, b"x")], tar_format=tar_format), tmp_path / "t.tar")
        assert [m.name for m in found] == [name]


def test_folders_are_passed_over(tmp_path):
    found, _ = walk(tar_bytes([special("a", tarfile.DIRTYPE), ("a/1.jpg", b"x")]), tmp_path / "t.tar")
    assert [m.name for m in found] == ["a/1.jpg"]


def test_headers_of_old_and_of_gnu_tar_are_read_as_they_are_meant(tmp_path):
    folder = bytearray(tar_bytes([special("a/", tarfile.AREGTYPE)])[:512])
    folder[257:265] = bytes(8)  # before POSIX a name that ends in a slash was a folder's
    timed = bytearray(tar_bytes([("a/1.jpg", b"")], tar_format=tarfile.GNU_FORMAT)[:512])
    timed[345:357] = b"14524770013\0"  # GNU tar keeps times of access where others keep the start of the name
    found, _ = walk(checked(folder) + checked(timed) + b"\0" * 1024, tmp_path / "t.tar")
    assert [m.name for m in found] == ["a/1.jpg"]


def test_a_payload_longer_than_one_read_is_one_member(tmp_path):
    payload = os.urandom((4 << 20) * 2 + 77)
    found, _ = walk(tar_bytes([("big.npy", payload), ("z.cls", b"1")]), tmp_path / "t.tar")
    assert found[0].crc32c == google_crc32c.value(payload)
    assert [m.length for m in found] == [len(payload), 1]


SAMPLES = [("0.jpg", b"a" * 700), ("0.cls", b"1"), ("1.jpg", b""), ("1.cls", b"2" * 512)]


def test_a_cut_at_any_block_is_refused_unless_it_only_shortens_the_padding_at_the_end(tmp_path):
    data = tar_bytes(SAMPLES)
    end_of_archive = len(tar_bytes(SAMPLES, trim=True))
    refused = 0
    for cut in range(0, len(data), 512):
        if cut >= end_of_archive:
            assert len(walk(data[:cut], tmp_path / "t.tar")[0]) == len(SAMPLES)
            continue
        with pytest.raises(TarError, match="truncated"):
            walk(data[:cut], tmp_path / "t.tar")
        refused += 1
    assert refused == end_of_archive // 512


@pytest.mark.parametrize("cut", [1, 100, 511, 513, 700, 1211, 1213, 2000, 3333, -1, -511, -513])
def test_a_cut_inside_a_block_is_refused(tmp_path, cut):
    with pytest.raises(TarError, match="truncated"):
        walk(tar_bytes(SAMPLES)[:cut], tmp_path / "t.tar")


def test_a_truncation_names_the_last_member(tmp_path):
    with pytest.raises(
        TarError, match=r"shard\.tar: 0\.jpg: truncated: the file ends at byte 1000, inside its payload"
    ):
        walk(tar_bytes(SAMPLES)[:1000], tmp_path / "t.tar")


def pax_of(records: dict[str, str]) -> tarfile.TarInfo:
    info = tarfile.TarInfo("a.jpg")
    info.pax_headers = records
    return info


def nul_name() -> bytes:
    return tar_bytes([("a\0b.jpg", b"x")], tar_format=tarfile.GNU_FORMAT)


def full_folder() -> bytes:
    block = bytearray(tar_bytes([special("a", tarfile.DIRTYPE)])[:512])
    block[124:136] = b"00000001000\0"
    return checked(block) + b"x" * 512 + b"\0" * 1024


def global_path() -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT, pax_headers={"path": "everything.jpg"}) as tar:
        tar.addfile(tarfile.TarInfo("a.jpg"))
    return file.getvalue()


def endless_pax() -> bytes:
    block = bytearray(tar_bytes([("x", b"")])[:512])
    block[156:157] = b"x"
    block[124:136] = b"37777777777\0"  # 4 GiB
    return checked(block) + b"\0" * 1024


def negative_size() -> bytes:
    block = bytearray(tar_bytes([("a.jpg", b"")])[:512])
    block[124:136] = b"\xff" * 12
    return checked(block) + b"\0" * 1024


def checked(block: bytearray) -> bytes:
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def orphan_extension() -> bytes:
    long_name = tar_bytes([("n" * 200 + ".jpg", b"")], tar_format=tarfile.GNU_FORMAT)
    return long_name[:1024] + b"\0" * 1024


GOOD = ("good.jpg", b"x" * 10)
BAD = {
    "hard link": (tar_bytes([GOOD, special("l.jpg", tarfile.LNKTYPE, link="good.jpg")]), "l.jpg"),
    "symbolic link": (tar_bytes([GOOD, special("s.jpg", tarfile.SYMTYPE, link="/etc/passwd")]), "s.jpg"),
    "character device": (tar_bytes([GOOD, special("c.jpg", tarfile.CHRTYPE)]), "c.jpg"),
    "block device": (tar_bytes([GOOD, special("b.jpg", tarfile.BLKTYPE)]), "b.jpg"),
    "named pipe": (tar_bytes([GOOD, special("f.jpg", tarfile.FIFOTYPE)]), "f.jpg"),
    "sparse file": (tar_bytes([pax_of({"GNU.sparse.major": "1"})]), "a.jpg"),
    "unknown member type": (tar_bytes([GOOD, special("q.jpg", b"Q")]), "q.jpg"),
    r"has '\.\.' in its name": (tar_bytes([GOOD, ("a/../../x.jpg", b"x")]), "a/../../x.jpg"),
    "absolute name": (tar_bytes([GOOD, ("/etc/x.jpg", b"x")]), "/etc/x.jpg"),
    "NUL byte": (nul_name(), "a\\x00b.jpg"),
    "has a NUL byte": (tar_bytes([pax_of({"path": "a\0b.jpg"})]), "a\\x00b.jpg"),
    "concatenated": (tar_bytes([GOOD]) + tar_bytes([("second.jpg", b"y")]), "good.jpg"),
    "lone zero block": (tar_bytes([GOOD], trim=True)[:-1024] + b"\0" * 512 + tar_bytes([GOOD]), "good.jpg"),
    "global pax header sets path": (global_path(), ""),
    "extended header of 4294967295 bytes": (endless_pax(), ""),
    "negative": (negative_size(), ""),
    "extended header without a member": (orphan_extension(), ""),
    "compressed with gzip": (gzip.compress(os.urandom(2000)), ""),
    "not a tar": (b"<html>" + b"not found" * 200, ""),
    "folder with 512 bytes of data": (full_folder(), "a"),
    "malformed pax header": (tar_bytes([pax_of({"comment": "x"})]).replace(b" comment=x\n", b" comment=xy"), ""),
    "pax size is not a number": (tar_bytes([pax_of({"size": "-1"})]), ""),
    "empty name": (tar_bytes([("", b"x")]), ""),
}


@pytest.mark.parametrize("reason", BAD)
def test_members_that_a_lenient_reader_would_skip_are_refused_by_name(tmp_path, reason):
    data, member = BAD[reason]
    with pytest.raises(TarError, match=reason) as error:
        walk(data, tmp_path / "t.tar")
    assert "shard.tar" in str(error.value)
    assert member in str(error.value)


@pytest.mark.parametrize("byte", range(0, 512, 7))
def test_a_flipped_header_byte_is_refused(tmp_path, byte):
    data = bytearray(tar_bytes([GOOD, ("second.jpg", b"y")]))
    if byte in range(148, 156) and data[byte] in b" \0":
        return  # the space around the checksum's digits
    data[1024 + byte] ^= 0x41
    with pytest.raises(TarError, match=r"good\.jpg: bad header checksum at byte 1024"):
        walk(bytes(data), tmp_path / "t.tar")


def test_a_size_in_a_pax_header_is_that_of_its_member_alone(tmp_path):
    pax = tar_bytes([pax_of({"size": "3", "comment": "more than the header can say"})], trim=True)[:-1024]
    data = pax + b"abc".ljust(512, b"\0") + tar_bytes([("b.jpg", b"de")])
    found, _ = walk(data, tmp_path / "t.tar")
    assert [(m.name, m.length, m.crc32c) for m in found] == [
        ("a.jpg", 3, google_crc32c.value(b"abc")),
        ("b.jpg", 2, google_crc32c.value(b"de")),
    ]


def test_a_size_in_base_256_is_read(tmp_path):
    block = bytearray(tar_bytes([("a.jpg", b"")])[:512])
    block[124:136] = b"\x80" + (3).to_bytes(11, "big")
    found, _ = walk(checked(block) + b"abc".ljust(512, b"\0") + b"\0" * 1024, tmp_path / "t.tar")
    assert found == [Member("a.jpg", 512, 3, google_crc32c.value(b"abc"))]
