from __future__ import annotations

from pathlib import Path

import pytest

from pretrain.data.__main__ import main
from pretrain.data.image_list import read_list

HEAD = "filename,label,mae_loss,histogram_score,height,width\n"


def listed(folder: Path, count: int = 400, loss: float = 0.3) -> Path:
    path = folder / "all.csv"
    rows = [f"photos/{i}.jpg,{i % 3},{loss},{i % 10},{100 + i},640\n" for i in range(count)]
    path.write_text(HEAD + "".join(rows))
    return path


def files(path: Path) -> list[str]:
    return [row.file for row in read_list(path).rows]


def test_a_share_of_the_loss_is_kept_and_the_same_images_of_a_longer_list(tmp_path, capsys):
    source, out = listed(tmp_path), tmp_path / "some.csv"
    assert main(["curate", str(source), str(out), "--by-loss"]) == 0
    assert "of 400 images" in capsys.readouterr().out
    some = files(out)
    assert 80 < len(some) < 160  # 0.3 of 400, five standard deviations
    again = tmp_path / "again.csv"
    assert main(["curate", str(listed(tmp_path, 800)), str(again), "--by-loss"]) == 0
    assert files(again)[: len(some)] == some
    assert main(["curate", str(source), str(again), "--by-loss", "--seed", "1"]) == 0
    assert files(again)[: len(some)] != some
    assert main(["curate", str(listed(tmp_path, loss=1.5)), str(again), "--by-loss"]) == 0
    assert len(files(again)) == 400


def test_limits_drop_small_and_poor_images_and_every_column_stays(tmp_path):
    source, out = listed(tmp_path, 100), tmp_path / "some.csv"
    assert main(["curate", str(source), str(out), "--above", "4", "--min-side", "150"]) == 0
    assert files(out) == [f"photos/{i}.jpg" for i in range(50, 100) if i % 10 > 4]
    found = read_list(out, others=True)
    assert found.labelled and found.others == ("mae_loss", "histogram_score", "height", "width")
    assert found.rows[0].label == "1" and found.rows[0].others == ("0.3", "5", "155", "640")


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        (HEAD, [], "nothing to select by; give --by-loss, --above or --min-side"),
        ("filename,loss\na.jpg,1\n", ["--by-loss"], "no column named mae_loss; beside files and labels it has: loss"),
        (HEAD + "a.jpg,0,much,1,2,3\n", ["--by-loss"], "line 2: mae_loss is much, not a number"),
        (HEAD + "a.jpg,0,1,,2,3\n", ["--above", "1"], "line 2: histogram_score is nothing, not a number"),
    ],
)
def test_a_list_that_cannot_be_used_is_named(text, options, message, tmp_path, capsys):
    (tmp_path / "all.csv").write_text(text)
    assert main(["curate", str(tmp_path / "all.csv"), str(tmp_path / "out.csv"), *options]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out.csv").exists()


def test_the_list_stays_in_the_folder_of_its_files(tmp_path, capsys):
    (tmp_path / "other").mkdir()
    assert main(["curate", str(listed(tmp_path)), str(tmp_path / "other" / "out.csv"), "--min-side", "1"]) == 2
    assert "files are named relative to" in capsys.readouterr().err
