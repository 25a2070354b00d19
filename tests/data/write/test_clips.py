"""Clips from folders of frames and from video files."""

import re
from pathlib import Path

import numpy as np
import pytest

from pretrain.data.__main__ import main
from pretrain.data.shards.image_files import frame_members
from pretrain.data.views.decode import decode_file
from tests.data.tars import image_bytes, samples_of

av = pytest.importorskip("av")
FPS, LENGTH = 10, 20


def run(*arguments: object) -> int:
    return main(["write", *map(str, arguments), "--workers", "1"])


def frames_in(folder: Path, count: int, start: int = 0) -> Path:
    """Frames named as exported by other tools, without leading zeros."""
    folder.mkdir(parents=True)
    for number in range(count):
        (folder / f"img_{number}.jpg").write_bytes(image_bytes(start + number))
    return folder


def video(path: Path, *, codec: str = "mpeg4", size: tuple[int, int] = (64, 48)) -> Path:
    """LENGTH pictures at FPS; picture n has the gray value 10 n."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=FPS)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        stream.bit_rate = 4_000_000
        for number in range(LENGTH):
            picture = np.full((size[1], size[0], 3), 10 * number, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
    return path


def gray(data: bytes) -> int:
    return round(float(decode_file(data, 3).mean()) / 10)


def test_folders_become_clips_with_their_frames_in_the_order_of_their_numbers(tmp_path: Path, capsys):
    for label in ("walk", "run"):
        frames_in(tmp_path / "in" / label / "a", 12, start=100 * len(label))
        frames_in(tmp_path / "in" / label / "b.c", 3)
    assert run(tmp_path / "in", tmp_path / "out", "--clips") == 0
    assert "4 clips in 1 shards" in capsys.readouterr().out
    assert main(["show", str(tmp_path / "out"), "--out", str(tmp_path / "sheet.png")]) == 0
    assert re.search(r"unreadable\W+0\b", capsys.readouterr().out) and (tmp_path / "sheet.png").exists()
    assert main(["index", str(tmp_path / "out")]) == 0
    assert "no sample has an image" not in capsys.readouterr().out
    samples = samples_of(tmp_path / "out")
    assert sorted(samples) == ["run/a", "run/b", "walk/a", "walk/b"]
    found = samples["walk/a"]
    assert frame_members(found) == [f"{number:04d}.jpg" for number in range(12)] and found["cls"] == b"1"
    folder = tmp_path / "in" / "walk" / "a"
    assert [found[f"{n:04d}.jpg"] for n in range(12)] == [(folder / f"img_{n}.jpg").read_bytes() for n in range(12)]


def test_a_video_gives_its_pictures_at_a_rate_and_a_size(tmp_path: Path):
    video(tmp_path / "in" / "a.mp4")
    video(tmp_path / "in" / "b.avi")
    assert run(tmp_path / "in", tmp_path / "all", "--video") == 0
    assert run(tmp_path / "in", tmp_path / "some", "--video", "--fps", 2.5, "--size", 24) == 0
    for key in "ab":
        whole, some = samples_of(tmp_path / "all")[key], samples_of(tmp_path / "some")[key]
        assert [gray(whole[name]) for name in frame_members(whole)] == list(range(LENGTH))
        assert [gray(some[name]) for name in frame_members(some)] == list(range(0, LENGTH, 4))
        assert decode_file(some["0000.jpg"], 3).shape == (24, 32, 3)


def test_long_videos_are_cut_into_clips_of_one_length(tmp_path: Path):
    video(tmp_path / "in" / "walk" / "a.mp4")
    video(tmp_path / "in" / "run" / "b.mp4")
    assert run(tmp_path / "in", tmp_path / "out", "--video", "--clip-frames", 8, "--no-shuffle") == 0
    samples = samples_of(tmp_path / "out")
    assert list(samples) == [f"{name}/{start:06d}" for name in ("run/b", "walk/a") for start in (0, 8)]
    second = samples["walk/a/000008"]
    assert [gray(second[name]) for name in frame_members(second)] == list(range(8, 16))
    assert second["cls"] == b"1" and samples["run/b/000000"]["cls"] == b"0"


def test_unreadable_videos_and_frames_are_listed_with_the_reason(tmp_path: Path):
    whole = video(tmp_path / "in" / "good.mp4").read_bytes()
    (tmp_path / "in" / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "in" / "list.avi").write_text("#EXTM3U\n#EXTINF:1,\nfile:///etc/hostname\n")
    assert run(tmp_path / "in", tmp_path / "out", "--video") == 0
    lines = dict(line.split("\t") for line in (tmp_path / "out" / "skipped.txt").read_text().splitlines())
    assert lines.keys() == {"cut.mp4", "list.avi"}
    assert all(reason.startswith("cannot be decoded: ") for reason in lines.values())
    for name in "ab":
        frames_in(tmp_path / "frames" / name, 2)
    (tmp_path / "frames" / "b" / "img_1.jpg").write_bytes(b"hello")
    assert run(tmp_path / "frames", tmp_path / "clips", "--clips") == 0
    assert (tmp_path / "clips" / "skipped.txt").read_text().startswith("b\tframe img_1.jpg: not a JPEG")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--fps", 2], "--fps: is of video files; give --video"),
        (["--clip-frames", 2], "--clip-frames: is of clips"),
        (["--clips", "--tile", 8], "--tile: cuts images, not clips"),
        (["--clips"], "holds images itself; a clip is a folder of frames below it"),
        (["--video"], "no video found (looked for .avi, .m4v"),
    ],
)
def test_options_that_do_not_fit_are_refused(tmp_path: Path, capsys, options, message: str):
    frames_in(tmp_path / "in", 2)
    assert run(tmp_path / "in", tmp_path / "out", *options) == 2
    assert message in capsys.readouterr().err
