"""A mistake in a configuration is found before anything runs, all at once, by the user's own key."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field, model_validator

from pretrain.config import PretrainConfig
from pretrain.core.configlib import Config, ConfigError, dump, load_config, validate


class Circle(Config):
    name: Literal["circle"] = "circle"
    radius: float = Field(1.0, gt=0)


class Square(Config):
    name: Literal["square"] = "square"
    side_length: float = Field(1.0, gt=0)


class Paint(Config):
    colour: str = "red"
    coats: int = Field(1, ge=1)


class Drawing(Config):
    title: str
    shape: Annotated[Circle | Square, Field(discriminator="name")]
    paint: Paint = Paint()


class Wall(Config):
    num_under_coats: int = 1


class Studio(Config):
    paint: Paint = Paint()
    wall: Wall = Wall()


def validate_problems(model: type[Config], values: dict[str, object]) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        validate(model, values, source="test")
    return caught.value.problems


def write(folder: Path, text: str) -> Path:
    path = folder / "drawing.yaml"
    path.write_text(text)
    return path


def problems(path: Path, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_config(Drawing, path, overrides)
    return caught.value.problems


def test_a_file_and_its_overrides_become_one_typed_value(tmp_path: Path):
    path = write(tmp_path, "title: a\nshape: {name: circle, radius: 2}\n")
    drawing = load_config(Drawing, path, ["shape.radius=3", "paint.coats=2"])
    assert drawing == Drawing(title="a", shape=Circle(radius=3), paint=Paint(coats=2))


def test_the_dumped_configuration_is_a_valid_input_with_the_same_value(tmp_path: Path):
    drawing = Drawing(title="a", shape=Square(side_length=1e-4))
    path = write(tmp_path, dump(drawing))
    assert load_config(Drawing, path) == drawing


def test_every_problem_is_reported_at_once_by_the_users_own_key(tmp_path: Path):
    path = write(tmp_path, "titel: a\nshape: {name: square, sidelength: 2}\npaint: {coats: many}\n")
    found = problems(path)
    assert sorted(found) == [
        "paint.coats: Input should be a valid integer, unable to parse string as an integer, got 'many'",
        "shape.sidelength: unknown key (did you mean side_length?)",
        "titel: unknown key (did you mean title?)",
        "title: missing",
    ]


def test_a_key_of_another_section_is_named_by_its_whole_path(tmp_path: Path):
    path = write(tmp_path, "title: a\nshape: {name: circle}\ncoats: 2\nover_coats: 3\npaint: {under_coats: 4}\n")
    nested = validate_problems(Studio, {"under_coats": 1, "wall": {"coats": 2}, "zip": 3})
    assert sorted(problems(path)) == [
        "coats: unknown key (did you mean paint.coats?)",
        "over_coats: unknown key",
        "paint.under_coats: unknown key (did you mean coats?)",
    ]
    assert sorted(nested) == [
        "under_coats: unknown key (did you mean wall.num_under_coats?)",
        "wall.coats: unknown key (did you mean paint.coats?)",
        "zip: unknown key",
    ]


def test_an_option_of_another_name_is_said_to_be_one(tmp_path: Path):
    path = write(tmp_path, "title: a\nshape: {name: circle, side_length: 2, radiuss: 3}\n")
    assert problems(path) == [
        "shape.side_length: is an option of square, not of circle; leave it out",
        "shape.radiuss: unknown key (did you mean radius?)",
    ]


def test_a_value_in_the_place_of_a_section_names_what_is_in_it(tmp_path: Path):
    assert problems(write(tmp_path, "title: a\nshape: circle\npaint: red\n")) == [
        "shape: is a section, got the value 'circle' (did you mean shape.name=circle?)",
        "paint: is a section, got the value 'red' (its keys: colour, coats)",
    ]


def test_an_unknown_name_lists_the_known_ones_and_the_nearest(tmp_path: Path):
    path = write(tmp_path, "title: a\nshape: {name: circel}\n")
    assert problems(path) == ["shape.name: unknown name 'circel' (did you mean circle?); one of circle, square"]


def test_a_missing_name_is_said(tmp_path: Path):
    assert problems(write(tmp_path, "title: a\nshape: {radius: 2}\n")) == ["shape.name: missing; it chooses the shape"]


def test_a_number_written_as_1e_minus_4_is_a_number(tmp_path: Path):
    assert load_config(Drawing, write(tmp_path, "title: a\nshape: {name: circle, radius: 1e-4}")).shape.radius == 1e-4


def test_a_key_given_twice_is_refused(tmp_path: Path):
    path = write(tmp_path, "title: a\npaint: {}\nshape: {}\npaint: {}\n")
    assert "paint: given twice (line 4)" in problems(path)
    with pytest.raises(ConfigError, match=f"^{path}: 1 problem"):
        load_config(Drawing, path)


def test_values_that_are_not_numbers_are_refused(tmp_path: Path):
    path = write(tmp_path, "title: a\nshape: {name: circle, radius: .nan}\n")
    assert "shape.radius" in problems(path)[0]


def test_a_bad_override_is_named(tmp_path: Path):
    path = write(tmp_path, "title: a\nshape: {name: circle}\n")
    assert problems(path, "paint.coats", "title.x=1") == [
        "paint.coats: expected key.sub=value",
        "title.x=1: title is a value, not a section",
    ]


def test_a_missing_file_names_the_nearest_one(tmp_path: Path):
    write(tmp_path, "")
    assert problems(tmp_path / "drawng.yaml") == [f"no such file (did you mean {tmp_path / 'drawing.yaml'}?)"]


def test_a_folder_is_no_configuration(tmp_path: Path):
    assert problems(tmp_path) == ["is a folder; give one of the YAML files in it"]


@pytest.mark.parametrize(
    "text",
    [
        *("a: [", "- a\n- b\n", "a: !!python/object/apply:os.system ['true']"),
        *("title: {{name}}", "[1, 2]: a", "title: 2024-99-99", f"title: {'[' * 2000}", f"title: {'9' * 5000}"),
    ],
    ids=lambda text: text[:20],
)
def test_what_is_not_a_plain_mapping_is_refused(tmp_path: Path, text: str):
    assert len(problems(write(tmp_path, text))) == 1


def test_an_override_that_is_no_yaml_is_named(tmp_path: Path):
    path = write(tmp_path, "title: a\nshape: {name: circle}\n")
    found = problems(path, "title={{name}}", "paint.coats=[", "paint={coats: 1, coats: 2}")
    for problem, override in zip(found, ("title={{name}}", "paint.coats=[", "paint={coats: 1, coats: 2}"), strict=True):
        assert problem.startswith(f"{override}: value is not valid YAML")


@pytest.mark.parametrize(
    "text",
    [
        "/x/a #1",
        "/x/a: b",
        "- a",
        "@home",
        "*x",
        "a: b: c",
        "2024-99-99",
        "2024-01-31",
        "%d",
        "! x",
        "| x",
        "7 #1",
        "it's",
    ],
)
def test_an_override_is_the_text_that_was_written(tmp_path: Path, text: str):
    path = write(tmp_path, "title: a\nshape: {name: circle}\n")
    assert load_config(Drawing, path, [f"title={text}"]).title == text
    assert load_config(Drawing, path, [f'title="{text}"']).title == text


def test_an_integer_may_be_written_with_an_exponent(tmp_path: Path):
    path = write(tmp_path, "title: a\nshape: {name: circle}\npaint: {coats: 1e3}\n")
    assert load_config(Drawing, path).paint == Paint(coats=1000)
    assert load_config(Drawing, path, ["paint.coats=2E+1"]).paint == Paint(coats=20)
    assert "paint.coats" in problems(path, "paint.coats=1.5e0")[0]


@pytest.mark.parametrize("how", ["file", "override"])
def test_a_home_is_expanded_where_no_shell_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str):
    monkeypatch.setenv("HOME", "/home/me")
    path = write(tmp_path, f"title: {'~/run' if how == 'file' else 'a'}\nshape: {{name: circle}}\n")
    overrides = ["title=~/run"] if how == "override" else []
    assert load_config(Drawing, path, overrides).title == "/home/me/run"


def test_names_of_other_tools_are_translated(tmp_path: Path):
    path = write(tmp_path, "run_dir: a\nobjective: {name: mae}\ndata: {shards: a}\noptim: {lr: 1.0, epochs: 1}\n")
    overrides = ["learning_rate=1", "batch_size=8", "optim.max_epochs=3", "workers=2", "output_dir=a"]
    with pytest.raises(ConfigError) as error:
        load_config(PretrainConfig, path, overrides)
    said = "\n".join(error.value.problems)
    for name, key in (
        ("learning_rate", "optim.lr or optim.blr"),
        ("batch_size", "optim.global_batch_size"),
        ("optim.max_epochs", "optim.epochs"),
        ("workers", "data.num_workers"),
        ("output_dir", "run_dir"),
    ):
        assert f"{name}: unknown key (did you mean {key}?)" in said


def test_a_mapping_may_be_merged_into_another_and_overridden(tmp_path: Path):
    text = "title: a\nshape: {name: circle}\npaint: {<<: {colour: blue, coats: 2}, coats: 3}"
    drawing = load_config(Drawing, write(tmp_path, text))
    assert drawing.paint == Paint(colour="blue", coats=3)


def test_a_file_that_cannot_be_read_is_an_error_of_the_configuration():
    assert problems(Path("/proc/self/mem")) == ["cannot be read: Input/output error"]


@given(st.text(st.characters(categories=["Ll"]), min_size=1, max_size=12))
def test_any_unknown_key_fails(key: str):
    values = {"title": "a", "shape": {"name": "circle"}, "paint": {key: 1}}
    if key in Paint.model_fields:
        return
    with pytest.raises(ConfigError, match=f"paint.{key}: unknown key"):
        validate(Drawing, values, source="test")


class Frame(Config):
    width: float = 1
    height: float = 1

    @model_validator(mode="after")
    def _fits(self) -> Frame:
        found = [f"{side}: too large" for side in ("width", "height") if getattr(self, side) > 10]
        if found:
            raise ValueError("\n".join(found))
        return self


class Gallery(Config):
    frame: Frame = Frame()


def test_a_validator_may_report_several_problems_each_on_its_own_line():
    with pytest.raises(ConfigError) as caught:
        validate(Gallery, {"frame": {"width": 11, "height": 12}}, source="test")
    assert caught.value.problems == ["frame: width: too large", "frame: height: too large"]


@pytest.mark.parametrize("text", ["runs/a\nrm -rf b", "runs/\x1b[31m", "a\u2028b", "a\x85b"])
def test_a_control_character_in_any_key_or_value_is_refused_by_its_key(text: str):
    class Section(Config):
        paths: tuple[str, ...] = ()

    class Whole(Config):
        run_dir: str = "runs/x"
        data: Section = Section()

    for values, key in (({"run_dir": text}, "run_dir"), ({"data": {"paths": ["ok", text]}}, "data.paths")):
        with pytest.raises(ConfigError, match=f"{key}: control character in") as raised:
            validate(Whole, values, source="a.yaml")
        assert text not in str(raised.value), "the message itself must not send it"
    with pytest.raises(ConfigError, match="data: key: control character"):
        validate(Whole, {"data": {text: 1}}, source="a.yaml")
