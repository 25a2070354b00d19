from __future__ import annotations

from pathlib import Path

import pytest

from pretrain.data.__main__ import main
from pretrain.data.shards.dataset import Dataset
from pretrain.data.shards.listing import expand
from pretrain.data.shards.opener import open_shard


@pytest.fixture
def folder(tmp_path):
    for name in ("a-000.tar", "a-001.tar", "a-002.tar", "b-000.tar", "notes.txt"):
        (tmp_path / name).touch()
    return tmp_path


def names(shards):
    return [Path(shard).name for shard in shards]


def test_brace_ranges_globs_folders_and_lists_name_the_same_shards(folder):
    expected = ["a-000.tar", "a-001.tar", "a-002.tar"]
    assert names(expand(f"{folder}/a-{{000..002}}.tar")) == expected
    assert names(expand(f"{folder}/a-*.tar")) == expected
    assert names(expand([folder / name for name in expected])) == expected
    assert names(expand(f"{folder}/{{a-000,a-001,a-002}}.tar")) == expected
    assert names(expand(folder)) == [*expected, "b-000.tar"]
    assert names(expand([f"{folder}/a-{{000..001}}.tar", f"{folder}/b-*.tar"])) == [
        "a-000.tar",
        "a-001.tar",
        "b-000.tar",
    ]


def test_a_list_in_braces_may_be_longer_than_a_file_name(tmp_path):
    listed = [f"shard-{i:06d}-of-000020" for i in range(20)]
    for name in listed:
        (tmp_path / f"{name}.tar").touch()
    assert names(expand(f"{tmp_path}/{{{','.join(listed)}}}.tar")) == [f"{name}.tar" for name in listed]


def test_a_name_that_looks_like_a_pattern_but_exists_is_itself(tmp_path):
    odd = tmp_path / "a-{1..3}[x].tar"
    odd.touch()
    assert expand(str(odd)) == [str(odd)]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("{folder}/a-{{000..004}}.tar", r"2 of 5 shards not found: .*a-003\.tar, .*a-004\.tar"),
        ("{folder}/c-*.tar", "nothing matches"),
        ("{folder}/a-{{000..002.tar", "bad brace expression|not found"),
        ("{folder}/a-{{000..99999999}}.tar", "more than 1000000 shards"),
    ],
)
def test_missing_shards_are_named(folder, spec, message):
    with pytest.raises(ValueError, match=message):
        expand(spec.format(folder=folder))


def test_an_empty_list_or_folder_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="empty"):
        expand([])
    with pytest.raises(ValueError, match=r"no \*\.tar in folder"):
        expand(tmp_path)


def test_the_error_for_a_folder_of_photos_has_the_command_and_a_missing_path_is_no_shard(tmp_path):
    (tmp_path / "day 1").mkdir()
    (tmp_path / "day 1" / "a.JPG").touch()
    with pytest.raises(ValueError, match=r"no \*\.tar in folder .*; it holds images; `fovea data write"):
        expand(tmp_path)
    with pytest.raises(ValueError, match=r"nowhere: no such file or folder$"):
        expand(tmp_path / "nowhere")


def test_a_shard_listed_twice_is_an_error(folder):
    with pytest.raises(ValueError, match=r"listed twice: .*a-000\.tar"):
        expand([f"{folder}/a-000.tar", f"{folder}/a-*.tar"])


PIPES = ["pipe:touch {canary}", "PIPE:touch {canary}", "{{pipe:touch {canary},x}}.tar"]


@pytest.mark.parametrize("spec", PIPES)
def test_a_pipe_is_refused_by_name_and_never_run(tmp_path, monkeypatch, spec, capsys):
    monkeypatch.chdir(tmp_path)
    canary = tmp_path / "canary"
    spec = spec.format(canary=canary)
    with pytest.raises(ValueError, match="pipe:"):
        expand(spec)
    with pytest.raises(ValueError, match="pipe:"):
        Dataset.open([spec])
    with pytest.raises(ValueError, match="pipe:"):
        open_shard(f"pipe:touch {canary}")
    for command in ("index", "verify", "show"):
        assert main([command, spec]) == 2
        assert "pipe:" in capsys.readouterr().err
    assert not canary.exists()


@pytest.mark.parametrize("url", ["http://169.254.169.254/x.tar", "s3://b/x.tar", "file:///etc/passwd", "hf://a/b.tar"])
def test_other_schemes_are_refused_by_name(url, capsys):
    with pytest.raises(ValueError, match="remote stores are not supported yet"):
        expand(url)
    assert main(["index", url]) == 2
    assert url in capsys.readouterr().err


def test_a_name_like_an_option_is_refused_and_a_colon_has_a_way_out(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "v:1.tar").touch()
    with pytest.raises(ValueError, match="starts with '-'"):
        expand(["--checkpoint-action=exec"])
    with pytest.raises(ValueError, match=r"written \./v:1\.tar"):
        expand("v:1.tar")
    assert expand("./v:1.tar") == ["./v:1.tar"]
