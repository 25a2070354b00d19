"""Several labels of an image: every form of the lists, and what cannot be one."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from finetune.config import DataSource
from finetune.data import classification, multi_label
from finetune.data.subset import subset
from finetune.predictions import Classes

GROCERY = Path(__file__).parents[3] / "samples" / "grocery"
FORMS = {
    "bars": "filename,labels\na.png,cat|dog\nb.png,cat\nc.png,dog|sky\n",
    "semicolons": "file;labels\na.png;dog,cat\nb.png;cat\nc.png;sky,dog\n",
    "quoted": 'image,label\na.png,"cat, dog"\nb.png,cat\nc.png,"dog, sky"\n',
    "rows": "filename,class\na.png,cat\na.png,dog\nb.png,cat\nc.png,sky\nc.png,dog\n",
    "columns": "filename,cat,dog,sky\na.png,1,1,0\nb.png,1.0,0,0\nc.png,false,true,true\n",
}


def opened(
    folder: Path, text: str, trained: Classes | None = None, classes: str | None = None
) -> multi_label.MultiLabelled:
    for name, level in (("a", 10), ("b", 90), ("c", 200)):
        Image.fromarray(np.full((6, 8, 3), level, np.uint8)).save(folder / f"{name}.png")
    (folder / "list.csv").write_text(text)
    source = DataSource.model_validate({"images": str(folder / "list.csv"), "classes": classes})
    return multi_label.open_examples(None, source, classes=trained)


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_list_gives_the_same_labels(tmp_path: Path, form: str):
    found = opened(tmp_path, FORMS[form])
    assert found.classes == ("cat", "dog", "sky") and not found.findings.found
    assert found.targets.astype(int).tolist() == [[1, 1, 0], [1, 0, 0], [0, 1, 1]]
    example = pickle.loads(pickle.dumps(found))[2]
    assert example.target.tolist() == [0, 1, 1] and example.image[0, 0].tolist() == [200, 200, 200]
    rest = FORMS[form].rpartition("c.png")[0]
    assert opened(tmp_path, rest).fingerprint != found.fingerprint


def test_words_are_labels_only_where_the_classes_say_so(tmp_path: Path):
    text = "image_name,labels\na.png,haze primary\nb.png,haze\n"
    with pytest.raises(ValueError, match=r"line 2: haze primary may be one label or several"):
        opened(tmp_path, text)
    found = opened(tmp_path, text, Classes(["primary", "haze"]))
    assert found.targets.astype(int).tolist() == [[1, 1], [0, 1]]
    found = opened(tmp_path, text, Classes(["haze primary", "haze"]))
    assert found.targets.astype(int).tolist() == [[1, 0], [0, 1]]


def test_rows_that_cannot_be_used_are_named_and_left_out(tmp_path: Path):
    text = "filename,labels\na.png,cat|dog\ngone.png,cat\nb.png,\nc.png,cat|bird\n"
    found = opened(tmp_path, text, Classes(["cat", "dog", "sky"]))
    assert found.names == ("a.png",)
    assert found.findings.lost == {"missing image": 1, "no label": 1, "unknown class": 1}
    assert found.findings.counts()["class without images"] == 1 and found.findings.labels == 4
    text = "filename,cat,dog\na.png,1,0\nb.png,-1,0\nc.png,0,0\na.png,0,1\n"
    found = opened(tmp_path, text)
    assert found.names == ("a.png", "c.png") and found.targets.astype(int).tolist() == [[1, 0], [0, 0]]
    assert found.findings.lost == {"bad label": 1, "image listed twice": 1}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("filename,age,cat\na.png,31,1\n", "age is '31', neither 0 nor 1 in every row; name the columns"),
        ("filename\na.png\n", "no column of labels"),
        ("filename,labels\na.png,\n", "no image with a label"),
        ("filename,cat,dog\na.png,0,0\n", "no image with a label"),
    ],
)
def test_lists_without_labels_are_refused(tmp_path: Path, text: str, reason: str):
    with pytest.raises(ValueError, match=reason):
        opened(tmp_path, text)


def test_columns_are_chosen_by_the_classes(tmp_path: Path):
    (tmp_path / "classes.json").write_text('["dog", "cat"]')
    text = "filename,age,cat,dog\na.png,31,1,0\nb.png,8,1,1\n"
    found = opened(tmp_path, text, classes=str(tmp_path / "classes.json"))
    assert found.classes == ("dog", "cat") and found.targets.astype(int).tolist() == [[0, 1], [1, 1]]


def test_a_classifier_of_one_class_names_the_task_for_several(tmp_path: Path):
    opened(tmp_path, FORMS["bars"])
    with pytest.raises(ValueError, match=r"line 2: cat\|dog is several labels; task\.name=multi_label"):
        classification.open_examples(None, DataSource.model_validate({"images": str(tmp_path / "list.csv")}))


def test_the_list_names_images_of_shards_and_parts_of_it_are_taken():
    keys = {"images": str(GROCERY / "train"), "annotations": str(GROCERY / "train_words.csv")}
    found = multi_label.open_examples(None, DataSource.model_validate(keys))
    assert len(found) == 529 and len(found.classes) == 22 and not found.findings.found
    assert found[0].image.ndim == 3 and 1 <= found[0].target.sum() <= 6
    part = subset(found, DataSource.model_validate({**keys, "fraction": 0.1}))
    assert 50 <= len(part) <= 54
    with pytest.raises(ValueError, match="no class labels"):
        subset(found, DataSource.model_validate({**keys, "per_class": 2}))
    with pytest.raises(ValueError, match="from a csv"):
        multi_label.open_examples(None, DataSource.model_validate({"images": str(GROCERY / "train")}))
