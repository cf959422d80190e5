"""How many workers a training may have: one number, or the fewest and the most."""

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

from distributed.config import load
from distributed.pipeline import main
from distributed.resources import RayConfig, check_resources, room
from metadiff.config import dump, validate
from metadiff.errors import UserError
from tests.refusal import only_error
from tests.tiny import write_config


@pytest.mark.parametrize(
    ("value", "workers", "most"), [(0, (0, 0), 1), (1, (1, 1), 1), (3, (3, 3), 3), ([1, 3], (1, 3), 3), ([2, 2], (2, 2), 2)]
)
def test_one_number_or_two(value: Any, workers: tuple[int, int], most: int) -> None:
    settings = validate(RayConfig, {"num_workers": value}, "here")
    assert settings.workers == workers
    assert settings.most == most
    assert json.loads(json.dumps(dump(settings)))["num_workers"] == value


@pytest.mark.parametrize("value", [[3, 1], [0, 2], [0, 0], [-1, 1], [1], [1, 2, 3], [], [1.5, 2], "1-3", 1.5, -1, True, None, [True, 2]])
def test_anything_else_is_refused_in_one_line(value: Any) -> None:
    with pytest.raises(UserError, match=rf"num_workers={re.escape(repr(value))}: expected .*\[1, 3\]$") as caught:
        validate(RayConfig, {"num_workers": value}, "here")
    assert "\n" not in str(caught.value)


def test_the_fewest_have_to_fit_and_the_most_need_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    check_resources(RayConfig(num_workers=(1, 50)))
    check_resources(RayConfig(num_workers=(3, 50), address="head:6379"))
    assert room(RayConfig(num_workers=(1, 50), cpus_per_worker=2))["cpus"] == (2, 2)
    with pytest.raises(
        UserError, match=r"ray\.num_workers=\[3, 50\]: with ray\.cpus_per_worker=1 it asks for 3 CPUs at least, this machine"
    ):
        check_resources(RayConfig(num_workers=(3, 50)))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("ray.num_workers=[3, 1]",), ("ray.num_workers=[3, 1]", "[fewest, most]")),
        (("ray.num_workers=[500, 501]",), ("ray.num_workers=[500, 501]", "500 CPUs at least")),
        (("ray.num_workers=[1, 5]", "train.batch_size=4"), ("train.batch_size=4", "5 workers without a part")),
    ],
)
def test_the_command_refuses_before_it_begins(
    options: tuple[str, ...], words: tuple[str, ...], tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    config = write_config(tmp_path, loader={"kind": "memory"}, ray={"num_actors": 0})
    assert main([str(config), *options], "train") == 2
    only_error(capfd, *words)
    assert {*tmp_path.iterdir()} == {config}


def test_a_pair_comes_from_files_and_from_the_command_line(tmp_path: Path) -> None:
    config = write_config(tmp_path, ray={"num_workers": [1, 3]})
    assert load(config).ray.workers == (1, 3)
    assert load(config, ["ray.num_workers=[2, 4]"]).ray.workers == (2, 4)
