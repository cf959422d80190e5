"""Stages in one process: skipping, forcing, resuming after a kill, variants side by side, and what a run leaves."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from metadiff.__main__ import main
from metadiff.errors import UserError
from metadiff.estimator import MetaDiffClassifier
from metadiff.pipeline import load_config
from metadiff.stages import STAGES
from tests.tiny import TINY, write_config

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished tiny run."""
    folder = tmp_path_factory.mktemp("finished")
    assert main(["pipeline", str(write_config(folder))]) == 0
    return folder / "runs" / "tiny"


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of it to work on."""
    write_config(tmp_path)
    return Path(shutil.copytree(finished, tmp_path / "runs" / "tiny"))


def command(run: Path, *words: str) -> list[str]:
    stage, *rest = words
    return [stage, str(run.parents[1] / "tiny.yaml"), *rest]


def stamps(run: Path) -> dict[str, int]:
    return {str(path.relative_to(run)): path.stat().st_mtime_ns for path in sorted(run.rglob("manifest.json"))}


def test_every_stage_leaves_one_artifact(finished: Path) -> None:
    variant = {name: f"{name}/stable" if stage.variant else name for name, stage in STAGES.items()}
    assert set(stamps(finished)) == {f"{folder}/manifest.json" for folder in variant.values()}
    manifest = json.loads((finished / "train/stable/manifest.json").read_text())
    assert manifest["config"]["train"]["iterations"] == TINY["train"]["iterations"]
    assert set(manifest["inputs"]) == {"embed", "fit_targets"}
    assert manifest["inputs"]["embed"] == json.loads((finished / "embed/manifest.json").read_text())["content"]
    assert manifest["seconds"] > 0
    assert {"python", "torch", "numpy"} <= manifest["versions"].keys()


def test_results_have_the_agreed_form(finished: Path) -> None:
    results = json.loads((finished / "evaluate/stable/results.json").read_text())
    assert set(results) == {"protocol", "sampler", "rows"}
    assert results["sampler"]["1"]["taken"]["method"] == "eq8"
    assert results["sampler"]["1"]["evaluations"] == TINY["schedule"]["num_steps"]
    assert results["protocol"]["tuned_on"] is False
    rows = {(row["system"], row["shot"]): row for row in results["rows"]}
    assert set(rows) == {(name, shot) for name in ("metadiff", "class_mean", "gda", "identity", "untrained", "oracle") for shot in (1, 2)}
    for row in rows.values():
        assert 0 <= row["accuracy"] <= 1
        assert row["tasks"] == TINY["evaluate"]["num_tasks"]
        assert row["preset"] == "stable"


def test_the_page_is_there_and_named(run: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(command(run, "pipeline")) == 0
    shown = capsys.readouterr()
    page = run / "report" / "index.html"
    assert shown.out.rstrip().endswith(str(page))
    assert "class_mean" in shown.out
    assert "tiny" in page.read_text()


def test_what_is_done_is_skipped_and_said(run: Path, capsys: pytest.CaptureFixture) -> None:
    before = stamps(run)
    assert main(command(run, "pipeline")) == 0
    assert stamps(run) == before
    assert capsys.readouterr().err.count("done already, skipped") == len(STAGES)


def test_force_redoes_the_stage_and_identical_results_leave_the_rest_valid(run: Path, capsys: pytest.CaptureFixture) -> None:
    before = stamps(run)
    weights = (run / "pretrain/backbone.safetensors").read_bytes()
    assert main(command(run, "pretrain", "--force")) == 0
    after = stamps(run)
    assert [name for name in before if before[name] != after[name]] == ["pretrain/manifest.json"]
    assert (run / "pretrain/backbone.safetensors").read_bytes() == weights, "the same seed, the same bytes"


def test_changed_inputs_are_followed_up(run: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(command(run, "train", "--force", "train.learning_rate=0.01")) == 0
    assert main(command(run, "evaluate", "train.learning_rate=0.01")) == 0
    assert "evaluate: building" in (shown := capsys.readouterr().err)
    assert "train changed" in shown


def test_variants_stand_side_by_side(run: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(command(run, "pipeline", "denoiser.preset=consistent")) == 0
    shown = capsys.readouterr()
    assert {path.name for path in (run / "evaluate").iterdir()} == {"stable", "consistent"}
    assert "pretrain: done already" in shown.err
    assert "stable" in shown.out
    assert "consistent" in shown.out


def test_another_number_of_shots_leaves_the_targets_valid(run: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(command(run, "fit_targets", "episodes.shots=[3]")) == 0
    assert "fit_targets: done already" in capsys.readouterr().err
    assert main(command(run, "fit_targets", "episodes.way=4")) == 2
    assert "episodes.way=3" in capsys.readouterr().err


def test_force_mends_a_damaged_preparation(run: Path) -> None:
    (run / "prepare/base.labels.npy").write_bytes(b"short")
    assert main(command(run, "prepare")) == 2
    assert main(command(run, "prepare", "--force")) == 0
    assert main(command(run, "evaluate")) == 0


def test_page_follows_what_was_evaluated_since(run: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(command(run, "evaluate", "denoiser.preset=consistent")) == 0
    assert main(command(run, "pipeline")) == 0
    assert "evaluate/consistent changed" in capsys.readouterr().err
    assert "consistent" in (run / "report/results.csv").read_text()


def test_rows_of_another_backbone_do_not_stand_beside_new_ones(run: Path) -> None:
    assert main(command(run, "evaluate", "denoiser.preset=consistent")) == 0
    assert main(command(run, "pretrain", "--force", "pretrain.learning_rate=0.2")) == 0
    assert main(command(run, "pipeline", "pretrain.learning_rate=0.2")) == 0
    assert "consistent" not in (run / "report/results.csv").read_text()


@pytest.mark.parametrize(
    "options",
    [
        ("denoiser.preset=paper", "train.iterations=50"),
        ("denoiser.preset=official", "train.iterations=50", "train.ema_start=10"),
        ("run.variant=no-unet", "denoiser.body=none", "denoiser.output_mix=false"),
        ("run.variant=scale", "denoiser.body=scale", "denoiser.output_mix=false"),
        ("run.variant=ce", "denoiser.gradient=ce", "targets.kind=ce", "targets.pull=0.1", "targets.num_tasks=10"),
        ("run.variant=linear", "learner.kind=linear", "denoiser.gradient=ce", "targets.kind=ce", "targets.num_tasks=10"),
        ("run.variant=linear-consistent", "learner.kind=linear", "denoiser.preset=consistent", "targets.kind=ce", "targets.num_tasks=10"),
        ("run.variant=noisy", "sampler.stochastic=true"),
        ("run.variant=few", "sampler.method=ddim", "sampler.steps=5", "evaluate.ensemble=2"),
    ],
    ids=lambda options: options[0].partition("=")[2],
)
def test_options_run_end_to_end(run: Path, options: tuple[str, ...]) -> None:
    assert main(command(run, "evaluate", *options)) == 0


def test_dry_run_prints_the_configuration_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    config = write_config(tmp_path)
    before = {*tmp_path.rglob("*")}
    assert main(["pipeline", str(config), "--dry-run", "train.batch_size=7"]) == 0
    shown = capsys.readouterr()
    assert {*tmp_path.rglob("*")} == before
    assert "batch_size: 7" in shown.out
    assert shown.err.count("would run, not done yet") == len(STAGES)
    again = tmp_path / "printed.yaml"
    again.write_text(shown.out)
    assert load_config(again) == load_config(config, ["train.batch_size=7"]), "what it prints is a configuration"


@pytest.mark.parametrize("stage", ["prepare", "pretrain", "train"])
def test_killed_anywhere_and_started_again(stage: str, finished: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path)
    program = [sys.executable, "-m", "metadiff", "pipeline", str(config), "machine.num_threads=1"]
    partial = tmp_path / "runs/tiny" / (f"{stage}/stable.partial" if STAGES[stage].variant else f"{stage}.partial")
    process = subprocess.Popen(program, cwd=ROOT, stderr=subprocess.DEVNULL, env=os.environ | {"PYTHONWARNINGS": "default"})
    while not partial.exists() and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (partial.parent / partial.name.removesuffix(".partial") / "manifest.json").exists()
    assert main(["evaluate", str(config)]) == 0
    for name in ("pretrain/backbone.safetensors", "train/stable/1shot.safetensors", "train/stable/2shot.safetensors"):
        assert (tmp_path / "runs/tiny" / name).read_bytes() == (finished / name).read_bytes(), "the same as never interrupted"


def test_estimator_classifies_new_images(finished: Path) -> None:
    pixels, labels = np.load(finished / "prepare/novel.images.npy"), np.load(finished / "prepare/novel.labels.npy")
    few = [int(i) for c in range(4) for i in np.flatnonzero(labels == c)[: 2 + c]]
    classifier = MetaDiffClassifier(finished).fit(list(pixels[few]), [f"class {labels[i]}" for i in few])
    assert classifier.classes_ == ["class 0", "class 1", "class 2", "class 3"]
    probabilities = classifier.predict_proba(list(pixels[:10]))
    assert probabilities.shape == (10, 4)
    assert probabilities.sum(1) == pytest.approx(np.ones(10), abs=1e-5)
    assert set(classifier.predict(list(pixels[:10]))) <= set(classifier.classes_)


@pytest.mark.parametrize(
    ("images", "labels", "words"),
    [(2, ["a"], "2 images but 1 labels"), (2, ["a", "a"], "at least two"), (0, [], "at least two")],
)
def test_estimator_refuses(finished: Path, images: int, labels: list[str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        MetaDiffClassifier(finished).fit([np.zeros((20, 20, 3), np.uint8)] * images, labels)


def test_estimator_before_fit_and_without_a_run(finished: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="call fit"):
        MetaDiffClassifier(finished).predict([np.zeros((20, 20, 3), np.uint8)])
    with pytest.raises(UserError, match="not there or not finished"):
        MetaDiffClassifier(tmp_path)
    with pytest.raises(UserError, match="cannot be read"):
        MetaDiffClassifier(finished).fit([tmp_path / "a.png", tmp_path / "b.png"], ["a", "b"])


def test_estimator_refuses_parts_that_do_not_belong_together(run: Path) -> None:
    assert main(command(run, "pretrain", "--force", "pretrain.epochs=1")) == 0
    with pytest.raises(UserError, match="run the stage embed again"):
        MetaDiffClassifier(run)
