from __future__ import annotations

import csv
import io
import json
import os
import signal
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pretrain.data.__main__ import main
from pretrain.data.dataset import Dataset
from pretrain.data.images import UnreadableImageError, prepare
from pretrain.data.reader import Reader
from pretrain.data.write import WriteSettings, write

from .tars import image_bytes


@pytest.fixture
def folder(tmp_path):
    """Three classes of eight JPEGs."""
    return make_folder(tmp_path / "images")


def make_folder(root: Path, *, classes=("cat", "dog", "eel"), count=8, size=(24, 16)) -> Path:
    for c, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for i in range(count):
            (root / name / f"{name}.{i}.jpg").write_bytes(image_bytes(c * count + i, size=size))
    return root


def run(*arguments: object) -> int:
    return main(["write", *map(str, arguments), "--workers", "1"])


def samples_of(out: Path) -> dict[str, dict]:
    dataset = Dataset.open(out)
    reader = Reader(dataset)
    places = [(shard, i) for shard, count in enumerate(dataset.counts.tolist()) for i in range(count)]
    return {sample["__key__"]: sample for sample in (reader.read(*place) for place in places)}


def contents(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.iterdir() if path.is_file() and path.suffix != ".idx"}


def png_header_only(width: int, height: int) -> bytes:
    """A PNG that declares its size and holds a few bytes of pixels: to decode it would be to allocate it."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def test_a_folder_becomes_shards_that_hold_every_file_as_it_was(folder, tmp_path, capsys):
    assert run(folder, tmp_path / "out", "--samples-per-shard", 7) == 0
    samples = samples_of(tmp_path / "out")
    assert len(samples) == 24
    for label, name in enumerate(("cat", "dog", "eel")):
        for i in range(8):
            sample = samples[f"{name}/{name}_{i}"]
            assert sample["jpg"] == (folder / name / f"{name}.{i}.jpg").read_bytes()
            assert sample["cls"] == str(label).encode()
    classes = json.loads((tmp_path / "out" / "classes.json").read_bytes())["classes"]
    assert classes == [{"id": i, "name": name} for i, name in enumerate(("cat", "dog", "eel"))]
    assert sorted(p.name for p in (tmp_path / "out").glob("*.tar")) == [f"train-{i:06d}.tar" for i in range(4)]
    assert "24 images in 4 shards" in capsys.readouterr().out


def test_the_order_is_mixed_unless_it_is_asked_not_to_be(folder, tmp_path):
    for out, options in (("a", []), ("b", ["--shuffle-seed", 1]), ("c", ["--no-shuffle"])):
        assert run(folder, tmp_path / out, *options) == 0
    orders = [list(samples_of(tmp_path / out)) for out in "abc"]
    assert orders[2] == sorted(orders[2])
    assert sorted(orders[0]) == sorted(orders[1]) == orders[2]
    assert len({tuple(order) for order in orders}) == 3
    assert len({key.split("/")[0] for key in orders[0][:8]}) == 3


def test_webdataset_reads_our_shards_even_in_its_secure_mode(folder, tmp_path):
    assert run(folder, tmp_path / "out", "--samples-per-shard", 10) == 0
    code = (
        "import sys, json; from webdataset.compat import WebDataset;"
        "print(json.dumps([[s['__key__'], len(s['jpg']), s['cls'].decode()] for s in "
        "WebDataset(sys.argv[1], shardshuffle=False, empty_check=False)]))"
    )
    command = [sys.executable, "-c", code, f"{tmp_path}/out/train-{{000000..000002}}.tar"]
    found = json.loads(subprocess.check_output(command, env=os.environ | {"WDS_SECURE": "1"}))
    expected = samples_of(tmp_path / "out")
    assert found == [[key, len(sample["jpg"]), sample["cls"].decode()] for key, sample in expected.items()]


def test_unreadable_files_are_listed_with_a_reason_and_never_fatal(folder, tmp_path, capsys):
    whole = image_bytes(0, size=(200, 200))
    bad = {
        "empty.jpg": (b"", "empty file"),
        "text.jpg": (b"hello", "not a JPEG"),
        "cut.jpg": (whole[: len(whole) // 2], "truncated"),
        "bomb.png": (png_header_only(13_300, 13_300), "too large: 13300 x 13300"),
        "wide.png": (png_header_only(20_000, 10), "too large: 20000 x 10"),
        "huge.png": (png_header_only(60_000, 60_000), "too large"),
        "cut.png": (image_bytes(1, image_format="PNG")[:-40], "cannot be decoded"),
        "pickle.npy": (pickled_array(), "npy of object"),
        "float.npy": (saved(np.zeros((4, 4), np.float32)), "npy of float32"),
        "bomb.npy": (saved(np.zeros((1, 1), np.uint8)).replace(b"(1, 1)", b"(99999, 99999)"), "cannot be|too large"),
    }
    for name, (data, _) in bad.items():
        (folder / "cat" / name).write_bytes(data)
    (folder / "cat" / "dangling.jpg").symlink_to("nowhere")
    assert run(folder, tmp_path / "out") == 0
    lines = (tmp_path / "out" / "skipped.txt").read_text().splitlines()
    reasons = dict(line.split("\t") for line in lines)
    assert sorted(reasons) == sorted(f"cat/{name}" for name in (*bad, "dangling.jpg"))
    for name, (_, reason) in bad.items():
        assert any(part in reasons[f"cat/{name}"] for part in reason.split("|")), reasons[f"cat/{name}"]
    assert "No such file" in reasons["cat/dangling.jpg"]
    assert f"24 images in 1 shards, {size_of(tmp_path / 'out')}, 3 classes, 11 skipped" in capsys.readouterr().out


def size_of(out: Path) -> str:
    return f"{sum(path.stat().st_size for path in out.glob('*.tar')) / 1000:.1f} kB"


def saved(array: np.ndarray, *, allow_pickle: bool = False) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=allow_pickle)
    return file.getvalue()


def pickled_array() -> bytes:
    return saved(np.array([{"a": 1}], dtype=object), allow_pickle=True)


def test_strict_stops_at_an_unreadable_file_and_names_it(folder, tmp_path, capsys):
    (folder / "dog" / "bad.jpg").write_bytes(b"hello")
    assert run(folder, tmp_path / "out", "--strict") == 2
    error = capsys.readouterr().err
    assert str(folder / "dog" / "bad.jpg") in error
    assert "not a JPEG" in error
    assert not list((tmp_path / "out").glob("*.tar"))
    (folder / "dog" / "bad.jpg").unlink()
    assert run(folder, tmp_path / "other", "--strict") == 0


def test_odd_but_valid_images_keep_their_bytes_and_get_the_extension_of_their_content(tmp_path):
    odd = {
        "gray.jpg": image_bytes(0, mode="L"),
        "cmyk.jpg": image_bytes(1, mode="CMYK"),
        "deep.png": image_bytes(2, mode="I;16", image_format="PNG"),
        "one.png": image_bytes(3, size=(1, 1), image_format="PNG"),
        "alpha.webp": image_bytes(4, mode="RGBA", image_format="WEBP"),
        "really_png.JPEG": image_bytes(5, image_format="PNG"),
        "five_channels.npy": saved(np.arange(60, dtype=np.uint8).reshape(3, 4, 5)),
    }
    (tmp_path / "in").mkdir()
    for name, data in odd.items():
        (tmp_path / "in" / name).write_bytes(data)
    assert run(tmp_path / "in", tmp_path / "out", "--strict") == 0
    samples = samples_of(tmp_path / "out")
    for name, data in odd.items():
        extension = "png" if name.startswith("really") else Path(name).suffix[1:]
        assert samples[Path(name).stem][extension] == data


def test_labels_need_two_sub_folders_and_no_loose_image(tmp_path):
    make_folder(tmp_path / "one", classes=("images",), count=2)
    make_folder(tmp_path / "loose", count=2)
    (tmp_path / "loose" / "x.jpg").write_bytes(image_bytes(0))
    make_folder(tmp_path / "none", count=2)
    for name, options in (("one", []), ("loose", []), ("none", ["--labels", "none"])):
        assert run(tmp_path / name, tmp_path / "out" / name, *options) == 0
        assert not (tmp_path / "out" / name / "classes.json").exists()
        assert Dataset.open(tmp_path / "out" / name).extensions == ("jpg",)


def test_a_validation_set_takes_the_ids_of_the_training_set(folder, tmp_path, capsys):
    val = make_folder(tmp_path / "val", classes=("cat", "eel"), count=2)
    assert run(folder, tmp_path / "out") == 0
    assert run(val, tmp_path / "out", "--name", "val") == 0
    assert run(val, tmp_path / "apart", "--classes", tmp_path / "out" / "classes.json") == 0
    for shards in (f"{tmp_path}/out/val-*.tar", tmp_path / "apart"):
        reader = Reader(Dataset.open(shards))
        found = [reader.read(0, i) for i in range(4)]
        assert {(s["__key__"].split("/")[0], s["cls"]) for s in found} == {("cat", b"0"), ("eel", b"2")}
    (val / "fox").mkdir()
    (val / "fox" / "0.jpg").write_bytes(image_bytes(0))
    assert run(val, tmp_path / "out", "--name", "val2") == 2
    assert "not in the given classes: fox" in capsys.readouterr().err


def write_csv(path: Path, rows: list[dict]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def test_a_csv_keeps_integer_labels_and_numbers_names(folder, tmp_path):
    files = sorted(folder.rglob("*.jpg"))
    ints = [{"Filename": f"images/{f.parent.name}/{f.name}", "label": 10 + i % 3} for i, f in enumerate(files)]
    names = [{"path": str(f), "class_name": f.parent.name} for f in files]
    both = [row | {"class_name": f"class {row['label']}"} for row in ints]
    for name, rows in (("ints", ints), ("names", names), ("both", both)):
        assert run(write_csv(tmp_path / f"{name}.csv", rows), tmp_path / name, "--no-shuffle") == 0
    labels = {name: [int(s["cls"]) for s in samples_of(tmp_path / name).values()] for name in ("ints", "names", "both")}
    assert labels["ints"] == labels["both"] == [10 + i % 3 for i in range(24)]
    assert labels["names"] == [i // 8 for i in range(24)]
    assert not (tmp_path / "ints" / "classes.json").exists()
    assert [c["id"] for c in json.loads((tmp_path / "both" / "classes.json").read_bytes())["classes"]] == [10, 11, 12]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b\nx.jpg,1\n", "no column named filename"),
        ("filename,label\nx.jpg,1\nx.jpg,2\n", "x.jpg is listed more than once"),
        ("filename,label\nx.jpg,1\ny.jpg,\n", "line 3: y.jpg has no label"),
        ("filename,label\n,1\n", "line 2: no file name"),
        ("filename,label\nx.jpg,1\ny.jpg,cat\n", "some labels are integers"),
        ("filename,label,class_name\nx.jpg,1,a\ny.jpg,1,b\n", "label 1 is 'a' and 'b'"),
        ("filename\n", "no image found"),
        ("filename\nx.jpg\n", "none of 1 images can be read"),
    ],
)
def test_a_bad_csv_is_refused_by_line(tmp_path, capsys, text, message):
    (tmp_path / "list.csv").write_text(text)
    assert run(tmp_path / "list.csv", tmp_path / "out") == 2
    assert message in capsys.readouterr().err


def test_nothing_to_write_is_an_error(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    for source, message in (("in", "no image found"), ("nowhere", "no such folder or CSV")):
        assert run(tmp_path / source, tmp_path / "out") == 2
        assert message in capsys.readouterr().err
    (tmp_path / "in" / "scan.tif").write_bytes(b"II*\0")
    assert run(tmp_path / "in", tmp_path / "out") == 2
    assert "it has other files: .tif 1" in capsys.readouterr().err


def test_names_that_would_make_one_key_stay_apart(tmp_path):
    names = ["a.b.jpg", "a b.jpg", "a_b.png", "a_b.jpg", "__meta__/x.jpg", "été/漢字.jpg", "x" * 120 + ".jpg"]
    for i, name in enumerate(names):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        data = image_bytes(i, image_format="PNG" if name.endswith("png") else "JPEG")
        (tmp_path / "in" / name).write_bytes(data)
    assert run(tmp_path / "in", tmp_path / "out", "--strict") == 0
    keys = sorted(samples_of(tmp_path / "out"))
    assert keys == sorted(["a_b", "a_b~2", "a_b~3", "a_b~4", "_meta__/x", "été/漢字", "x" * 120])


def test_a_link_to_a_folder_above_does_not_loop(folder, tmp_path):
    (folder / "cat" / "up").symlink_to(folder)
    assert run(folder, tmp_path / "out") == 0
    assert len(samples_of(tmp_path / "out")) == 24


def test_shards_are_about_the_size_asked_for(tmp_path):
    folder = make_folder(tmp_path / "in", count=20, size=(120, 90))
    for out, options in (("kept", []), ("small", ["--size", 48])):
        assert run(folder, tmp_path / out, "--shard-size", "60kB", *options) == 0
        sizes = [path.stat().st_size for path in sorted((tmp_path / out).glob("*.tar"))]
        assert len(sizes) > 2
        assert all(45_000 < size < 76_000 for size in sizes[:-1])


@pytest.mark.parametrize(
    ("data", "extension", "mode"),
    [
        (image_bytes(0, size=(90, 60)), "jpg", "RGB"),
        (image_bytes(0, size=(90, 60), mode="L"), "jpg", "L"),
        (image_bytes(0, size=(90, 60), mode="CMYK"), "jpg", "RGB"),
        (image_bytes(0, size=(90, 60), mode="RGBA", image_format="PNG"), "png", "RGBA"),
        (image_bytes(0, size=(90, 60), mode="I;16", image_format="PNG"), "png", "I;16"),
        (image_bytes(0, size=(90, 60), image_format="WEBP"), "webp", "RGB"),
    ],
)
def test_a_resize_keeps_the_format_and_the_aspect(data, extension, mode):
    found, small = prepare(data, size=20, quality=90)
    image = Image.open(io.BytesIO(small))
    assert (found, image.size, image.mode) == (extension, (30, 20), mode)
    assert prepare(data, size=60, quality=90) == (extension, data)


def test_a_resize_of_16_bits_and_of_arrays_keeps_their_range():
    ramp = np.tile(np.linspace(0, 65535, 80).astype(np.uint16), (60, 1))
    file = io.BytesIO()
    Image.fromarray(ramp).save(file, "PNG")
    small = np.asarray(Image.open(io.BytesIO(prepare(file.getvalue(), size=30, quality=90)[1])))
    assert small.shape == (30, 40)
    assert small.max() > 64000
    assert abs(small.astype(float).mean() - 32767) < 100
    cube = np.tile(np.arange(5, dtype=np.uint8) * 50, (60, 80, 1))
    array = np.load(io.BytesIO(prepare(saved(cube), size=30, quality=90)[1]))
    assert array.shape == (30, 40, 5)
    assert (array == np.arange(5) * 50).all()


def test_a_rotated_photo_is_upright_after_a_resize_and_untouched_without():
    exif = Image.Exif()
    exif[0x0112] = 6
    file = io.BytesIO()
    Image.new("RGB", (90, 60)).save(file, "JPEG", exif=exif)
    assert prepare(file.getvalue(), size=None, quality=90)[1] == file.getvalue()
    for size, expected in ((30, (30, 45)), (500, (60, 90))):
        assert Image.open(io.BytesIO(prepare(file.getvalue(), size=size, quality=90)[1])).size == expected


def test_a_bomb_is_refused_before_its_pixels_are_allocated():
    import tracemalloc

    tracemalloc.start()
    for data in (png_header_only(13_300, 13_300), png_header_only(9_400, 9_400), png_header_only(20_000, 20_000)):
        with pytest.raises(UnreadableImageError, match="too large"):
            prepare(data, size=None, quality=90)
    assert tracemalloc.get_traced_memory()[1] < 5_000_000
    tracemalloc.stop()


def test_the_same_command_again_writes_nothing_and_another_is_refused(folder, tmp_path, capsys):
    out = tmp_path / "out"
    (folder / "cat" / "bad.jpg").write_bytes(b"hello")
    assert run(folder, out, "--samples-per-shard", 7) == 0
    before = contents(out)
    stamps = {path: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    assert run(folder, out, "--samples-per-shard", 7) == 0
    assert contents(out) == before
    assert {path: path.stat().st_mtime_ns for path in out.glob("*.tar")} == stamps
    assert "4 of them from before" in capsys.readouterr().out
    assert run(folder, out, "--samples-per-shard", 8, "--size", 8) == 2
    error = capsys.readouterr().err
    assert "samples_per_shard: 7 there, 8 now" in error
    assert "size: None there, 8 now" in error
    (folder / "cat" / "new.jpg").write_bytes(image_bytes(77))
    assert run(folder, out, "--samples-per-shard", 7) == 2
    assert "files: 25 there, 26 now" in capsys.readouterr().err
    assert contents(out) == before


def test_shards_of_someone_else_are_not_written_over(folder, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "train-000000.tar").write_bytes(b"precious")
    assert run(folder, tmp_path / "out") == 2
    assert "already holds train-000000.tar" in capsys.readouterr().err
    assert (tmp_path / "out" / "train-000000.tar").read_bytes() == b"precious"
    assert run(folder, tmp_path / "out", "--name", "mine") == 0


def test_workers_do_not_change_a_byte(folder, tmp_path):
    settings = WriteSettings(samples_per_shard=5)
    for workers in (1, 3):
        write(folder, tmp_path / str(workers), settings, workers=workers)
    assert contents(tmp_path / "1") == contents(tmp_path / "3")
    assert len(contents(tmp_path / "1")) == 5 + 3


def wait_for(condition, *, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.005)


@pytest.mark.parametrize("shards_before_the_kill", [1, 6])
def test_a_killed_write_is_finished_by_the_same_command_to_the_same_bytes(tmp_path, shards_before_the_kill):
    data = image_bytes(0, size=(640, 480))
    for i in range(150):
        (tmp_path / "in" / str(i % 3)).mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / str(i % 3) / f"{i:03d}.jpg").write_bytes(data if i % 40 else b"bad")
    out = tmp_path / "killed"
    options = ["--samples-per-shard", "10", "--workers", "2"]
    command = [sys.executable, "-m", "pretrain.data", "write", str(tmp_path / "in")]
    victim = subprocess.Popen([*command, str(out), *options], stderr=subprocess.DEVNULL, start_new_session=True)
    wait_for(lambda: len(list(out.glob("*.tar"))) >= shards_before_the_kill)
    children = descendants(victim.pid)
    os.kill(victim.pid, signal.SIGKILL)
    victim.wait()
    assert len(list(out.glob("*.tar"))) < 15, "finished before the kill"
    wait_for(lambda: not any(alive(pid) for pid in children), seconds=20)
    kept = {path: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    for again in (out, tmp_path / "undisturbed"):
        assert subprocess.run([*command, str(again), *options], capture_output=True, check=False).returncode == 0
    assert contents(out) == contents(tmp_path / "undisturbed")
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert not list(out.rglob("*.tmp"))
    assert Dataset.open(out).num_samples == 146


def descendants(pid: int) -> list[int]:
    children = [int(c) for c in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return [d for child in children for d in (child, *descendants(child))]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
