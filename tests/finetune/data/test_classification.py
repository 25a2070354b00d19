from __future__ import annotations

import csv
import io
import json
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from finetune.config import DataSource
from finetune.data.class_names import read_classes
from finetune.data.classification import open_examples
from finetune.data.examples import BadExample
from finetune.predictions import Classes
from pretrain.data.shards.index import build_index
from tests.data.tars import image_bytes, tar_bytes

GROCERY = Path(__file__).parents[3] / "samples" / "grocery"


def opened(images, trained=None, **options):
    return open_examples(None, DataSource(images=str(images), **options), classes=trained)


def picture(path: Path, level: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((6, 8, 3), level, np.uint8)).save(path)


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    for number, name in enumerate(["cat/a.png", "cat/deep/b.png", "dog/c.png"]):
        picture(tmp_path / "set" / name, 10 * number)
    return tmp_path / "set"


def test_a_sample_of_a_shard_has_the_class_of_its_cls_member():
    train, val = opened(GROCERY / "train"), opened(GROCERY / "val")
    named = json.loads((GROCERY / "train" / "classes.json").read_text())["classes"]
    assert (len(train), len(val), len(train.classes)) == (960, 296, 81)
    assert list(train.classes) == [row["name"] for row in named]
    assert not train.findings and set(np.unique(val.labels)) <= set(range(81))
    example = pickle.loads(pickle.dumps(train))[7]
    assert example.image.shape[2] == 3 and example.target == train.labels[7]
    assert example.name.startswith("grocery-train-000000.tar/")


def test_folders_are_classes_in_alphabetic_order(folders: Path):
    examples = opened(folders)
    assert list(examples.classes) == ["cat", "dog"]
    assert examples.labels.tolist() == [0, 0, 1]
    assert [int(examples[i].image[0, 0, 0]) for i in range(3)] == [0, 10, 20]


def test_a_tar_of_class_folders_is_read_as_the_folders_are(folders: Path, tmp_path: Path):
    with tarfile.open(tmp_path / "set.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        for path in sorted(folders.rglob("*.png")):
            tar.add(path, str(path.relative_to(folders)))
    inside, outside = opened(tmp_path / "set.tar"), opened(folders)
    assert inside.labels.tolist() == outside.labels.tolist()
    assert [inside[i].image.tolist() for i in range(3)] == [outside[i].image.tolist() for i in range(3)]


def test_a_csv_names_files_and_classes_and_problems_are_listed_by_line(folders: Path):
    rows = [("cat/a.png", "cat"), ("dog/c.png", "dog"), ("gone.png", "cat"), ("cat/a.png", "dog"),
            ("cat/deep/b.png", "")]  # fmt: skip
    text = io.StringIO()
    csv.writer(text).writerows([("filename", "label"), *rows])
    (folders / "labels.csv").write_text(text.getvalue())
    examples = opened(folders / "labels.csv")
    assert examples.labels.tolist() == [0, 1]
    assert [(finding.kind, finding.id) for finding in examples.findings.found] == [
        ("missing image", "line 4"),
        ("image listed twice", "line 5"),
        ("no label", "line 6"),
    ]
    numbered = opened(folders / "labels.csv", trained=Classes(["x", "cat", "dog"]))
    assert numbered.labels.tolist() == [1, 2]


def test_a_csv_without_its_columns_is_refused(folders: Path):
    (folders / "labels.csv").write_text("where,label\na.png,1\n")
    with pytest.raises(ValueError, match=r"no column named filename or .*its first line has: where, label"):
        opened(folders / "labels.csv")
    (folders / "labels.csv").write_text("file\na.png\n")
    with pytest.raises(ValueError, match="has no column label or class_name"):
        opened(folders / "labels.csv")


def test_labels_that_are_not_plain_numbers_are_names(folders: Path):
    for texts, names in ((("01", "10"), ["01", "10"]), (("2", "10"), ["2", "10"]), (("-1", "1"), ["-1", "1"])):
        (folders / "labels.csv").write_text(f"filename,label\ncat/a.png,{texts[0]}\ndog/c.png,{texts[1]}\n")
        examples = opened(folders / "labels.csv")
        assert list(examples.classes) == names and not examples.findings
        assert [names[label] for label in examples.labels] == list(texts)
    (folders / "labels.csv").write_text("filename,label\ncat/a.png,1\ndog/c.png,10\n")
    assert opened(folders / "labels.csv", Classes(["01", "10"])).labels.tolist() == [1], "1 is neither 01 nor class 1"
    assert opened(folders / "labels.csv", Classes([str(i) for i in range(11)])).labels.tolist() == [1, 10]
    assert opened(folders / "labels.csv", Classes(list("abcdefghijk"))).labels.tolist() == [1, 10]


def test_a_quote_that_is_never_closed_swallows_no_lines(folders: Path):
    (folders / "labels.csv").write_text('filename,label\ncat/a.png,"6 inch\ndog/c.png,dog\n')
    with pytest.raises(ValueError, match=r"labels\.csv, after line 1: unexpected end of data"):
        opened(folders / "labels.csv")


def test_a_csv_reads_only_the_files_it_names(folders: Path, monkeypatch: pytest.MonkeyPatch):
    picture(folders.parent / "out.png", 3)
    rows = ("cat/a.png,cat", "../out.png,cat", f"{folders}/cat/a.png,cat", "gone.png,cat", "cat,cat")
    (folders / "labels.csv").write_text("\n".join(("filename,label", *rows)))
    monkeypatch.setattr("finetune.data.files.walk", lambda folder: pytest.fail("it was walked"))
    examples = opened(folders / "labels.csv")
    assert len(examples) == 2 and examples[1].image.shape == (6, 8, 3)
    assert examples.findings.counts() == {"missing image": 2, "image listed twice": 1}
    (folders / "labels.csv").write_text("filename,label\ngone.png,cat\n")
    with pytest.raises(ValueError, match=r"no image with a label.*\n.*line 2: gone\.png is not in"):
        opened(folders / "labels.csv")


def test_a_run_next_to_the_csv_does_not_change_the_fingerprint(folders: Path):
    (folders / "labels.csv").write_text("filename,label\ncat/a.png,cat\n")
    before = opened(folders / "labels.csv").fingerprint
    (folders / "runs").mkdir()
    (folders / "runs" / "log.txt").write_text("started")
    assert opened(folders / "labels.csv").fingerprint == before


def test_images_without_a_class_are_listed_and_left_out(folders: Path):
    picture(folders / "stray.png", 0)
    (folders / "empty").mkdir()
    examples = opened(folders)
    assert list(examples.classes) == ["cat", "dog", "empty"] and len(examples) == 3
    assert examples.findings.counts() == {"no label": 1, "class without images": 1}
    other = opened(folders, trained=Classes(["cat"]))
    assert other.labels.tolist() == [0, 0]
    assert other.findings.counts()["unknown class"] == 1
    with pytest.raises(ValueError, match=r"stray\.png: is not in a class folder"):
        other.findings.check(True)


def test_the_classes_of_the_training_set_decide_the_labels_of_another(folders: Path):
    examples = opened(folders, trained=Classes(["zebra", "dog", "cat"]))
    assert examples.labels.tolist() == [2, 2, 1]


def test_a_set_that_names_fewer_classes_has_the_labels_of_the_training_set(folders: Path, tmp_path: Path):
    (tmp_path / "classes.json").write_text(json.dumps({"1": "dog"}))
    assert opened(folders, Classes(["cat", "dog"]), classes=str(tmp_path / "classes.json")).labels.tolist() == [0, 0, 1]


def test_a_set_with_another_name_for_a_class_is_refused(folders: Path, tmp_path: Path):
    (tmp_path / "classes.json").write_text(json.dumps(["dog", "cat"]))
    with pytest.raises(ValueError, match="class 0 is dog here, but cat in the training set"):
        opened(folders, Classes(["cat", "dog"]), classes=str(tmp_path / "classes.json"))


def test_an_invalid_label_is_listed_with_its_sample(tmp_path: Path):
    members = []
    for key, label in (("a", b"0"), ("b", b"7"), ("c", b"cat"), ("d", b"-1")):
        members += [(f"{key}.jpg", image_bytes(0)), (f"{key}.cls", label)]
    (tmp_path / "s-000000.tar").write_bytes(tar_bytes(members))
    build_index([str(tmp_path / "s-000000.tar")])
    (tmp_path / "classes.json").write_text(json.dumps({"0": "cat", "1": "dog"}))
    examples = opened(tmp_path)
    assert examples.labels.tolist() == [0]
    found = {(finding.kind, finding.id) for finding in examples.findings.found}
    assert found == {("unknown class", "b"), ("no label", "c"), ("unknown class", "d")}


def test_no_labelled_image_is_an_error_with_the_reason(folders: Path):
    with pytest.raises(ValueError, match=r"no image with a label .*\.csv of filename.*\n.*folder cat is not one of"):
        opened(folders, trained=Classes(["horse", "cow"]))


def test_an_image_that_cannot_be_decoded_is_named(folders: Path):
    (folders / "dog" / "broken.png").write_bytes(b"nothing")
    examples = opened(folders)
    with pytest.raises(BadExample, match=r"dog/broken\.png"):
        _ = examples[[name for name in examples.names].index("dog/broken.png")]


def test_the_fingerprint_follows_content_and_labels(folders: Path):
    before = opened(folders).fingerprint
    assert opened(folders).fingerprint == before
    assert opened(folders, trained=Classes(["dog", "cat"])).fingerprint != before
    picture(folders / "dog" / "d.png", 3)
    assert opened(folders).fingerprint != before


def test_class_files_have_three_forms_and_duplicates_are_refused(tmp_path: Path):
    path = tmp_path / "classes.json"
    for content in (["a", "b"], {"0": "a", "1": "b"}, {"classes": [{"id": 1, "name": "b"}, {"id": 0, "name": "a"}]}):
        path.write_text(json.dumps(content))
        assert list(read_classes(path)) == ["a", "b"] and read_classes(path).category_ids == (0, 1)
    path.write_text(json.dumps(["a", "a"]))
    with pytest.raises(ValueError, match="the name a is used by two classes"):
        read_classes(path)
    path.write_text("{}x")
    with pytest.raises(ValueError, match="not valid json"):
        read_classes(path)
