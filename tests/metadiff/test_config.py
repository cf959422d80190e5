import json
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from pydantic import Field, ValidationError, model_validator

from metadiff.config import config, dump, load, merge, read_yaml, validate
from metadiff.errors import UserError


@config
class Augment:
    crop: Literal["none", "shift"] = "none"
    flip: bool = True


@config
class Train:
    learning_rate: Annotated[float, Field(gt=0)] = 0.1
    batch_size: Annotated[int, Field(ge=1)] = 8
    decay: float | None = None
    milestones: tuple[int, ...] = (90,)
    augment: Augment = Augment()

    @model_validator(mode="after")
    def _milestones_rise(self) -> "Train":
        if list(self.milestones) != sorted(self.milestones):
            raise ValueError(f"milestones={self.milestones} do not rise; sort them")
        return self


@config
class Glyphs:
    kind: Literal["glyphs"] = "glyphs"
    num_classes: int = 10


@config
class Folder:
    kind: Literal["folder"] = "folder"
    root: Path


@config
class Whole:
    name: str = "run"
    data: Annotated[Glyphs | Folder, Field(discriminator="kind")] = Glyphs()
    train: Train = Train()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text("name: mine\ndata: {kind: glyphs}\ntrain: {batch_size: 4}\n")
    return path


def refusal(path: Path, *overrides: str) -> str:
    """The one line with which the configuration is refused, without the file's name."""
    with pytest.raises(UserError) as caught:
        load(Whole, path, overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value).replace(str(path), "FILE")


def test_file_lies_over_defaults_and_overrides_over_the_file(path: Path) -> None:
    whole = load(Whole, path, ["train.augment.flip=false", "train.milestones=[3, 5]", "data.num_classes=7", "train.decay=null"])
    assert whole == Whole(
        name="mine", data=Glyphs(num_classes=7), train=Train(batch_size=4, milestones=(3, 5), augment=Augment(flip=False))
    )


def test_underlay_lies_beneath_what_the_user_wrote(path: Path) -> None:
    whole = load(Whole, path, ["train.decay=2"], lambda tree: {"name": tree["name"] + "?", "train": {"batch_size": 99, "learning_rate": 3}})
    assert (whole.name, whole.train.batch_size, whole.train.learning_rate, whole.train.decay) == ("mine", 4, 3.0, 2.0)


@pytest.mark.parametrize("text", ["1e-4", "1E-4", "0.0001", "'1e-4'"])
def test_numbers_are_read_as_people_write_them(path: Path, text: str) -> None:
    path.write_text(f"train: {{learning_rate: {text}}}")
    assert load(Whole, path).train.learning_rate == 1e-4
    assert load(Whole, path, [f"train.learning_rate={text}"]).train.learning_rate == 1e-4


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.batchsize=3", "unknown key 'train.batchsize'; did you mean 'batch_size'?"),
        ("train.augment.crp=none", "unknown key 'train.augment.crp'; did you mean 'crop'? (known here: crop, flip)"),
        ("nam=x", "unknown key 'nam'; did you mean 'name'? (known here: data, name, train)"),
        ("zzz=x", "unknown key 'zzz' (known here: data, name, train)"),
        ("train.batch_size=many", "train.batch_size='many': Input should be a valid integer"),
        ("train.batch_size=2.5", "train.batch_size=2.5: Input should be a valid integer"),
        ("train.batch_size=0", "train.batch_size=0: Input should be greater than or equal to 1"),
        ("train.batch_size=null", "train.batch_size=None: Input should be a valid integer"),
        ("train.decay=fast", "train.decay='fast': Input should be a valid number"),
        ("train.learning_rate=.nan", "train.learning_rate=nan: Input should be a finite number"),
        ("train.learning_rate=.inf", "train.learning_rate=inf: Input should be a finite number"),
        ("train.milestones=[3, x]", "train.milestones.1='x': Input should be a valid integer"),
        ("train.milestones=[9, 3]", "train: milestones=(9, 3) do not rise; sort them"),
        ("train.augment.crop=big", "train.augment.crop='big': Input should be 'none' or 'shift'"),
        ("train=3", "train: Input should be a dictionary"),
        ("name=2024-01-31", "name=datetime.date(2024, 1, 31): Input should be a valid string"),
    ],
)
def test_wrong_key_or_value_is_named(path: Path, override: str, message: str) -> None:
    assert refusal(path, override).startswith(f"config FILE: {message}")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.kind=glyph"], "data: Input tag 'glyph' found using 'kind' does not match any of the expected tags: 'glyphs', 'folder'"),
        (["data={rot: x}"], "data: Unable to extract tag using discriminator 'kind'"),
        (["data.kind=folder"], "data.root: Field required"),
        (["data.kind=folder", "data.rot=x"], "unknown key 'data.rot'; did you mean 'root'? (known here: kind, root)"),
        (["data.kind=glyphs", "data.root=x"], "unknown key 'data.root' (known here: kind, num_classes)"),
        (["data.kind=glyphs", "data.num_classes=x"], "data.num_classes='x': Input should be a valid integer"),
        (["data=x"], "data='x': Input should be a valid dictionary"),
    ],
)
def test_tagged_union_is_explained_as_the_user_wrote_it(path: Path, overrides: list[str], message: str) -> None:
    assert refusal(path, *overrides).startswith(f"config FILE: {message}")


def test_a_typo_comes_before_its_consequences(path: Path) -> None:
    path.write_text("data: {kind: folder, rooot: x}\ntrain: {batch_size: x}")
    assert "'data.rooot'; did you mean 'root'" in refusal(path)


@pytest.mark.parametrize("override", ["batch_size", "=3", "a..b=3", "a.=3", "train batch_size=3", ""])
def test_override_without_key_and_value_is_refused(path: Path, override: str) -> None:
    assert refusal(path, override) == f"override {override!r}: expected key.subkey=value, for example train.batch_size=64"


@pytest.mark.parametrize("value", ["[1", "{a", "2024-02-30", "!!int x", "!!python/object/apply:os.getcwd []"])
def test_override_that_is_not_yaml_is_refused(path: Path, value: str) -> None:
    assert "the value is not valid YAML; quote it" in refusal(path, f"name={value}")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a: [1", "not valid YAML"),
        (b"a: b: c", "not valid YAML"),
        (b"\ttab: 1", "not valid YAML"),
        (b"name: 2024-02-30", "not valid YAML: day is out of range for month"),
        (b"\x00", "not valid YAML"),
        (b"\xff\xfe\xfa", "cannot be read"),
        (b"- name: x", "expected a mapping of sections at the top, found list"),
        (b"just text", "expected a mapping of sections at the top, found str"),
    ],
)
def test_file_that_is_no_mapping_is_refused(path: Path, content: bytes, message: str) -> None:
    path.write_bytes(content)
    assert refusal(path).startswith(f"config FILE: {message}")


def test_file_that_is_not_there_is_refused(path: Path) -> None:
    assert "no such file" in refusal(path.with_name("other.yaml"))
    assert "cannot be read" in refusal(path.parent)


def test_no_config_can_run_code(path: Path) -> None:
    made = path.with_name("made")
    path.write_text(f"name: !!python/object/apply:os.mkdir ['{made}']")
    assert "not valid YAML" in refusal(path)
    assert not made.exists()


def test_empty_file_is_all_defaults(path: Path) -> None:
    path.write_text("# nothing\n")
    assert load(Whole, path) == Whole()


def test_sections_are_frozen_and_validated_in_code() -> None:
    with pytest.raises(AttributeError):
        Train().batch_size = 3  # type: ignore[misc]
    with pytest.raises(ValidationError):
        Train(batch_size=0)
    with pytest.raises(ValidationError):
        Train(batchsize=1)  # type: ignore[call-arg]


def test_dump_is_json_and_reads_back() -> None:
    whole = Whole(data=Folder(root=Path("here")), train=Train(milestones=(1, 2)))
    tree = json.loads(json.dumps(dump(whole)))
    assert tree["data"] == {"kind": "folder", "root": "here"}
    assert validate(Whole, tree, "dump") == whole


def test_merge_leaves_its_arguments_alone() -> None:
    below: dict[str, Any] = {"a": {"b": 1, "c": {"d": 2}}, "e": {"f": 3}, "g": 4}
    above: dict[str, Any] = {"a": {"c": {"d": 5}}, "e": 6, "g": {"h": 7}}
    assert merge(below, above) == {"a": {"b": 1, "c": {"d": 5}}, "e": 6, "g": {"h": 7}}
    assert below == {"a": {"b": 1, "c": {"d": 2}}, "e": {"f": 3}, "g": 4}
    assert above == {"a": {"c": {"d": 5}}, "e": 6, "g": {"h": 7}}


def test_read_yaml_keeps_what_the_user_wrote(path: Path) -> None:
    assert read_yaml(path) == {"name": "mine", "data": {"kind": "glyphs"}, "train": {"batch_size": 4}}
