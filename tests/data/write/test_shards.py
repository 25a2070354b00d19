from __future__ import annotations

import csv
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pretrain.data.__main__ import main
from pretrain.data.shards.dataset import Dataset
from pretrain.data.shards.reader import Reader
from tests.data.tars import image_bytes, make_folder, png_header_only, samples_of, saved


@pytest.fixture
def folder(tmp_path):
    """Three classes of eight JPEGs."""
    return make_folder(tmp_path / "images")


def run(*arguments: object) -> int:
    return main(["write", *map(str, arguments), "--workers", "1"])


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


def test_the_order_is_shuffled_unless_disabled(folder, tmp_path):
    for out, options in (("a", []), ("b", ["--shuffle-seed", 1]), ("c", ["--no-shuffle"])):
        assert run(folder, tmp_path / out, *options) == 0
    orders = [list(samples_of(tmp_path / out)) for out in "abc"]
    assert orders[2] == sorted(orders[2])
    assert sorted(orders[0]) == sorted(orders[1]) == orders[2]
    assert len({tuple(order) for order in orders}) == 3
    assert len({key.split("/")[0] for key in orders[0][:8]}) == 3


@pytest.mark.processes
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
        "cut.jpg": (whole[: len(whole) // 2], "Premature end"),
        "bomb.png": (png_header_only(13_300, 13_300), "too large: 13300 x 13300"),
        "wide.png": (png_header_only(70_000, 10), "too large: 70000 x 10"),
        "huge.png": (png_header_only(60_000, 60_000), "too large"),
        "cut.png": (image_bytes(1, image_format="PNG")[:-40], "cannot be decoded"),
        "pickle.npy": (pickled_array(), "npy of object"),
        "float.npy": (saved(np.zeros((4, 4), np.float64)), "npy of float64"),
        "nan.npy": (saved(np.full((4, 4), np.nan, np.float32)), "holds NaN"),
        "bomb.npy": (saved(np.zeros((1, 1), np.uint8)).replace(b"(1, 1)", b"(99999, 99999)"), "cannot be|too large"),
    }
    for name, (data, _) in bad.items():
        (folder / "cat" / name).write_bytes(data)
    (folder / "cat" / "dangling.jpg").symlink_to("nowhere")
    (folder / "cat" / "itself.jpg").symlink_to("itself.jpg")
    assert run(folder, tmp_path / "out") == 0
    lines = (tmp_path / "out" / "skipped.txt").read_text().splitlines()
    reasons = dict(line.split("\t") for line in lines)
    assert sorted(reasons) == sorted(f"cat/{name}" for name in (*bad, "dangling.jpg", "itself.jpg"))
    for name, (_, reason) in bad.items():
        assert any(part in reasons[f"cat/{name}"] for part in reason.split("|")), reasons[f"cat/{name}"]
    assert "No such file" in reasons["cat/dangling.jpg"]
    assert f"24 images in 1 shards, {size_of(tmp_path / 'out')}, 3 classes, 13 skipped" in capsys.readouterr().out


def size_of(out: Path) -> str:
    return f"{sum(path.stat().st_size for path in out.glob('*.tar')) / 1000:.1f} kB"


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


def test_classes_that_contradict_those_of_the_folder_are_refused(folder, tmp_path, capsys):
    out = tmp_path / "out"
    val = make_folder(tmp_path / "val", classes=("cat", "eel"), count=2)
    assert run(folder, out) == 0
    before = (out / "classes.json").read_bytes()
    for classes, message in (
        ({0: "eel", 1: "cat"}, "id 0 is 'cat' there, and now 'eel' has id 0"),
        ({0: "cat", 7: "eel"}, "'eel' has id 2 there, and now 'eel' has id 7"),
    ):
        entries = [{"id": i, "name": name} for i, name in classes.items()]
        (tmp_path / "other.json").write_text(json.dumps({"classes": entries}))
        assert run(val, out, "--name", "val", "--classes", tmp_path / "other.json") == 2
        error = capsys.readouterr().err
        assert f"{message}; give --classes {out}/classes.json" in error
        assert (out / "classes.json").read_bytes() == before
    assert run(val, out, "--name", "val", "--classes", out / "classes.json") == 0
    assert (out / "classes.json").read_bytes() == before


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
    floats = [row | {"label": f"{row['label']}.0"} for row in ints]
    for name, rows in (("ints", ints), ("names", names), ("both", both), ("floats", floats)):
        assert run(write_csv(tmp_path / f"{name}.csv", rows), tmp_path / name, "--no-shuffle") == 0
    labels = {
        name: [int(s["cls"]) for s in samples_of(tmp_path / name).values()]
        for name in ("ints", "names", "both", "floats")
    }
    assert labels["ints"] == labels["both"] == labels["floats"] == [10 + i % 3 for i in range(24)]
    assert labels["names"] == [i // 8 for i in range(24)]
    assert not (tmp_path / "ints" / "classes.json").exists()
    assert [c["id"] for c in json.loads((tmp_path / "both" / "classes.json").read_bytes())["classes"]] == [10, 11, 12]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b\nx.jpg,1\n", "no column named filename"),
        ("filename,label\nx.jpg,1\nx.jpg,2\n", "x.jpg is listed more than once, with other labels (lines 2, 3)"),
        ("filename,label\nx.jpg,1\na, b.jpg,1\n", "line 3: 3 fields, but 2 columns; put quotes around"),
        ("filename,label\n,1\n", "line 2: no file name"),
        ("filename,label\nx.jpg,1\ny.jpg,cat\n", "some labels are integers"),
        (f"filename,label\nx.jpg,1\ny.jpg,{'9' * 30}\n", "is no number of a class (18 digits at most)"),
        ("filename,label,class_name\nx.jpg,1,a\ny.jpg,1,b\n", "label 1 is 'a' and 'b'"),
        ("filename\n", "no image found"),
        ('filename\n"x.jpg\ny.jpg\n', "after line 1: unexpected end of data; is a quote left open?"),
        ('filename\n"x.jpg\n' + "y.jpg\n" * 30_000, "field larger than field limit (131072); is a quote left open?"),
        ("filename\nx.jpg\n", "none of 1 images can be read"),
    ],
)
def test_a_bad_csv_is_refused_by_line(tmp_path, capsys, text, message):
    (tmp_path / "list.csv").write_text(text)
    assert run(tmp_path / "list.csv", tmp_path / "out") == 2
    assert message in capsys.readouterr().err


def test_rows_without_a_label_are_written_without_one_and_counted(folder, tmp_path, capsys):
    rows = [{"file": f"images/cat/cat.{i}.jpg", "label": label} for i, label in enumerate(("1", "", "NaN", "1"))]
    assert run(write_csv(tmp_path / "list.csv", rows), tmp_path / "out") == 0
    assert "integer labels, 2 images without a label" in capsys.readouterr().out
    found = {key: sample.get("cls") for key, sample in samples_of(tmp_path / "out").items()}
    assert list(dict(sorted(found.items())).values()) == [b"1", None, None, b"1"]


@pytest.mark.parametrize("inside", ["cat", ""])
def test_folders_that_are_parts_of_a_data_set_are_no_classes(tmp_path, capsys, inside):
    for split in ("train", "Val"):
        make_folder(tmp_path / "in" / split, classes=(inside, "dog") if inside else (), count=2)
        (tmp_path / "in" / split).mkdir(parents=True, exist_ok=True)
        if not inside:
            (tmp_path / "in" / split / "0.jpg").write_bytes(image_bytes(0))
    assert run(tmp_path / "in", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert (
        f"{tmp_path}/in: its folders train, Val are parts of a data set" in error and f"({tmp_path}/in/train)" in error
    )
    assert run(tmp_path / "in", tmp_path / "out", "--labels", "none") == 0
    if inside:
        assert run(tmp_path / "in" / "train", tmp_path / "train") == 0
        assert "2 classes" in capsys.readouterr().out


def test_a_csv_that_is_not_utf_8_is_named(tmp_path, capsys):
    (tmp_path / "list.csv").write_bytes("filename\né.jpg\n".encode("latin-1"))
    assert run(tmp_path / "list.csv", tmp_path / "out") == 2
    assert f"{tmp_path}/list.csv: not UTF-8" in capsys.readouterr().err


def test_a_file_name_that_is_not_text_can_be_printed(folder, tmp_path, capsys):
    Path(os.fsdecode(bytes(folder / "cat") + b"/caf\xe9.jpg")).write_bytes(b"bad")
    assert run(folder, tmp_path / "out") == 0
    assert "skipped cat/caf\\udce9.jpg: not a JPEG" in capsys.readouterr().out


def test_nothing_to_write_is_an_error(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    (tmp_path / "a.tar").write_bytes(b"")
    named = (
        ("in", "no image found"),
        ("nowhere", "no such folder or CSV"),
        ("a.tar", "a shard already: `fovea data index"),
    )
    for source, message in named:
        assert run(tmp_path / source, tmp_path / "out") == 2
        assert message in capsys.readouterr().err
    (tmp_path / "in" / "scan.bmp").write_bytes(b"BM")
    assert run(tmp_path / "in", tmp_path / "out") == 2
    assert "it has other files: .bmp 1" in capsys.readouterr().err


def test_names_with_equal_keys_get_different_keys(tmp_path):
    names = ["a.b.jpg", "a b.jpg", "a_b.png", "a_b.jpg", "__meta__/x.jpg", "été/漢字.jpg", "x" * 120 + ".jpg",
             "v1.0/b (1).jpg", "v1.0/c\n.jpg"]  # fmt: skip
    for i, name in enumerate(names):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        data = image_bytes(i, image_format="PNG" if name.endswith("png") else "JPEG")
        (tmp_path / "in" / name).write_bytes(data)
    assert run(tmp_path / "in", tmp_path / "out", "--strict") == 0
    keys = sorted(samples_of(tmp_path / "out"))
    kept = ["a b", "a_b", "été/漢字", "x" * 120, "v1.0/b (1)"]
    assert keys == sorted([*kept, "a%2Eb%2Ejpg", "a_b%2Epng", "_meta__/x", "v1.0/c_"])


def test_a_link_to_a_folder_above_does_not_loop(folder, tmp_path):
    (folder / "cat" / "up").symlink_to(folder)
    assert run(folder, tmp_path / "out") == 0
    assert len(samples_of(tmp_path / "out")) == 24


def test_shards_have_about_the_requested_size(tmp_path):
    folder = make_folder(tmp_path / "in", count=20, size=(120, 90))
    for out, options in (("kept", []), ("small", ["--size", 48])):
        assert run(folder, tmp_path / out, "--shard-size", "60kB", *options) == 0
        sizes = [path.stat().st_size for path in sorted((tmp_path / out).glob("*.tar"))]
        assert len(sizes) > 2
        assert all(45_000 < size < 76_000 for size in sizes[:-1])


def test_a_jpeg_above_the_limit_is_decoded_at_a_smaller_scale_for_its_size(folder, tmp_path, capsys):
    (folder / "cat" / "phone.jpg").write_bytes(image_bytes(0, size=(400, 300)))
    (folder / "cat" / "phone.png").write_bytes(image_bytes(1, size=(400, 300), image_format="PNG"))
    assert run(folder, tmp_path / "out", "--size", "40", "--max-pixels", "60000") == 0
    printed = capsys.readouterr().out
    assert "reduced cat/phone.jpg: above --max-pixels, decoded at 1/2" in printed
    assert "skipped cat/phone.png: too large: 400 x 300 pixels" in printed
    sample = next(sample for key, sample in samples_of(tmp_path / "out").items() if key.endswith("phone"))
    assert Image.open(io.BytesIO(sample["jpg"])).size == (53, 40)
    assert run(folder, tmp_path / "whole", "--size", "40", "--max-pixels", "120000") == 0
    assert "reduced" not in (printed := capsys.readouterr().out) and "0 skipped" in printed


def test_a_jpeg_is_never_reduced_below_the_size(folder, tmp_path, capsys):
    (folder / "cat" / "phone.jpg").write_bytes(image_bytes(0, size=(400, 300)))
    assert run(folder, tmp_path / "out", "--size", "200", "--max-pixels", "60000") == 0
    assert "skipped cat/phone.jpg: too large" in capsys.readouterr().out
