"""A planted tag is found, with its place and its share of the relevance; a classifier without one has none."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from finetune.data.examples import Example
from finetune.data.reading import PHOTOS
from finetune.explain import shortcuts
from finetune.explain.data import ImageSet, open_images
from finetune.explain.subjects import ClassifierSubject
from tests.finetune.explain.planted import CLASSES, TAG, photos, shortcut_task, write_photos


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> ImageSet:
    folder = write_photos(tmp_path_factory.mktemp("shortcut") / "photos", count=12)
    return open_images(shortcut_task(), [str(folder)], None, reading=PHOTOS)


def test_the_tag_in_the_corner_of_a_class_is_found(images: ImageSet):
    found = shortcuts.seek(ClassifierSubject(shortcut_task(), "shortcut"), images)
    tagged = next(place for place in found.found if place.name == "tagged")
    assert tagged.is_shortcut and found.found[0] is tagged
    assert (tagged.rows, tagged.columns) == ((TAG[0].start, TAG[0].stop), (TAG[1].start, TAG[1].stop))
    assert tagged.relevance > 4 * tagged.area and tagged.relevance > 2 * tagged.elsewhere
    assert tagged.becomes > 0.9 and tagged.fall > 0.5
    assert tagged.line.startswith("tagged: a shortcut: rows 24 to 32, columns 24 to 32 (6% of the image)")
    assert not any(place.is_shortcut for place in found.found if place is not tagged)


def test_a_classifier_that_looks_everywhere_has_no_shortcut():
    class Bright(ClassifierSubject):
        """Bright or dark: the mean of all pixels decides."""

        tokens = None  # it has no attention to read: maps are those of occlusion

        def _logits(self, images):
            mean = images.mean((1, 2, 3))
            return 8 * mean[:, None] * mean.new_tensor([-1.0, 1.0])

    subject = Bright(shortcut_task(), "bright")
    dark, bright = photos(8, tagged=[False] * 8, seed=1) // 2, photos(8, tagged=[False] * 8, seed=2) // 2 + 120
    examples = [Example(i, str(i), one, None) for i, one in enumerate(np.concatenate([dark, bright]))]
    found = shortcuts.seek(subject, ImageSet(examples, labelled=False))
    assert {place.name for place in found.found} == set(CLASSES) and found.method == "occlusion"
    assert not any(place.is_shortcut for place in found.found)


def test_files_and_folders_name_the_same_images(images: ImageSet, tmp_path: Path):
    folder = write_photos(tmp_path / "photos", count=2)
    unlabelled = open_images(shortcut_task(), [str(folder / "plain")], None, reading=PHOTOS)
    assert not unlabelled.labelled and len(unlabelled) == 2 and images.labelled and len(images) == 24
