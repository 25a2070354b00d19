"""One list of images is one set of labels, for whichever command reads it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from finetune.config import DataSource
from finetune.data.classification import open_examples
from pretrain.data.__main__ import main
from pretrain.data.image_list import read_list
from pretrain.data.labels import number_labels, splits_among
from tests.data.tars import image_bytes, samples_of

LISTS = {
    "path": "path,label\n0.jpg,a\n1.jpg,b\n",
    "upper": "Filename,Label\n0.jpg,a\n1.jpg,b\n",
    "spaces": "filename, label\n0.jpg, a\n1.jpg, b\n",
    "semicolons": "file;class\n0.jpg;a\n1.jpg;b\n",
    "tabs": "label\timage\na\t0.jpg\nb\t1.jpg\n",
    "mark": '\ufeff"file_name","class_name"\n"0.jpg","a"\n"1.jpg","b"\n',
    "index": ",filename,label\n0,0.jpg,a\n1,1.jpg,b\n\n",
    "folders": "path,label\nC:\\photos\\0.jpg,a\n/photos/1.jpg,b\n",
    "numbers": "path,label\n0.jpg,3\n1.jpg,7\n",
    "decimals": "path,label\n0.jpg,3.0\n1.jpg,7.0\n",
    "negative": "path,label\n0.jpg,-1\n1.jpg,1\n",
    "zeros": "path,label\n0.jpg,007\n1.jpg,010\n",
    "both": "path,label,class_name\n0.jpg,3,a\n1.jpg,7,b\n",
    "unlabelled": "path,label\n0.jpg,a\n1.jpg,b\n2.jpg,\n3.jpg,nan\n",
    "twice": "path,label\n0.jpg,a\n./0.jpg,a\n1.jpg,b\n",
}


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for number in range(4):
        (tmp_path / f"{number}.jpg").write_bytes(image_bytes(number))
    return tmp_path


@pytest.mark.parametrize("name", LISTS)
def test_writing_and_fine_tuning_read_the_same_labels(photos: Path, name: str):
    (photos / "list.csv").write_text(LISTS[name])
    assert main(["write", str(photos / "list.csv"), str(photos / "out"), "--workers", "1"]) == 0
    direct = open_examples(None, DataSource(images=str(photos / "list.csv")))
    written = open_examples(None, DataSource(images=str(photos / "out")))
    assert len(direct) == len(written) == 2
    names = {"numbers": ("3", "7"), "decimals": ("3", "7"), "negative": ("-1", "1"), "zeros": ("007", "010")}
    expected = names.get(name, ("a", "b"))
    assert tuple(direct.classes[label] for label in direct.labels) == expected
    by_key = {Path(written[i].name).name: written.classes[written.labels[i]] for i in range(2)}
    assert tuple(by_key[key] for key in sorted(by_key)) == expected
    assert np.array_equal(direct[0].image, next(written[i].image for i in range(2) if written[i].name.endswith("0")))


def test_labels_of_which_some_are_numbers_are_refused_unless_the_classes_are_given(photos: Path, capsys):
    (photos / "list.csv").write_text("path,label\n0.jpg,1\n1.jpg,cat\n")
    message = r"some labels are integers (1) and some are names (cat); correct them, or give a classes.json"
    assert main(["write", str(photos / "list.csv"), str(photos / "out")]) == 2 and message in capsys.readouterr().err
    with pytest.raises(ValueError, match="some labels are integers"):
        open_examples(None, DataSource(images=str(photos / "list.csv")))
    (photos / "names.json").write_text(json.dumps(["1", "cat"]))
    given = ["--classes", str(photos / "names.json"), "--workers", "1"]
    assert main(["write", str(photos / "list.csv"), str(photos / "out"), *given]) == 0
    assert sorted(sample["cls"] for sample in samples_of(photos / "out").values()) == [b"0", b"1"]
    found = open_examples(None, DataSource(images=str(photos / "list.csv"), classes=str(photos / "names.json")))
    assert found.labels.tolist() == [0, 1]


def test_a_class_that_is_not_given_has_no_number(photos: Path):
    (photos / "list.csv").write_text("path,label\n0.jpg,cat\n1.jpg,fox\n2.jpg,1\n")
    rows = read_list(photos / "list.csv").rows
    assert number_labels("list", rows, {0: "dog", 1: "cat"}) == ([1, None, 1], {0: "dog", 1: "cat"})


def test_parts_of_a_data_set_are_told_from_classes():
    assert splits_among(["test", "Train"]) == ["Train", "test"] and splits_among(["train"]) == ["train"]
    assert splits_among(["car", "train", "valid", "validation"]) == ["train", "valid", "validation"]
    assert splits_among(["bus", "car", "train"]) == [] and splits_among([]) == []
