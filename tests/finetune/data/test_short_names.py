from __future__ import annotations

import numpy as np

from finetune.data.examples import Example


def test_a_caption_has_the_file_and_its_folder_in_place_of_a_path_of_this_machine():
    image = np.zeros((2, 2, 3), np.uint8)
    for name in ("/home/me/photos/cat/1.jpg", "cat/1.jpg"):
        assert Example(0, name, image, None).as_picture().name == "cat/1.jpg"
