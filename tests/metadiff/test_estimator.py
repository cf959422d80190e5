"""Which sampler the estimator takes: the run's own choice only where the gate let it through, for the way and shots it was tried with."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from metadiff import artifact
from metadiff.__main__ import main
from metadiff.config import validate
from metadiff.errors import UserError
from metadiff.estimator import MetaDiffClassifier
from metadiff.samplers import SamplerConfig
from tests.tiny import write_config

# With eps_hat = s(t) g, Eq. 8 ends on class means however many its steps: the gate lets a few through.
GATED = {
    "denoiser": {"body": "scale"},
    "schedule": {"beta_end": 0.5},
    "train": {"learning_rate": 1e-6},
    "evaluate": {"sampler": "auto", "gate_tasks": 20, "gda_steps": 1},
}
ALL = SamplerConfig()


@pytest.fixture(scope="module")
def gated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny run whose evaluation chose a sampler."""
    folder = tmp_path_factory.mktemp("gated")
    assert main(["evaluate", str(write_config(folder, **GATED))]) == 0
    return folder / "runs" / "tiny"


@pytest.fixture
def run(gated: Path, tmp_path: Path) -> Path:
    """A copy of it to work on."""
    return Path(shutil.copytree(gated, tmp_path / "runs" / "tiny"))


def learned(run: Path, shots: tuple[int, ...], sampler: SamplerConfig | None = None) -> np.ndarray:
    """(20, way) probabilities after as many images of each class as `shots` says."""
    pixels, labels = np.load(run / "prepare/novel.images.npy"), np.load(run / "prepare/novel.labels.npy")
    few = [int(i) for c, shot in enumerate(shots) for i in np.flatnonzero(labels == c)[:shot]]
    classifier = MetaDiffClassifier(run, sampler=sampler).fit(list(pixels[few]), labels[few].tolist())
    return classifier.predict_proba(list(pixels[:20]))


def passed(run: Path, shot: int) -> SamplerConfig:
    """What the evaluation let through."""
    record = json.loads((run / "evaluate/stable/results.json").read_text())["sampler"][str(shot)]
    assert record["gated"]
    return validate(SamplerConfig, record["taken"], "results.json")


@pytest.mark.parametrize("shot", [1, 2])
def test_it_takes_the_sampler_that_passed(gated: Path, shot: int) -> None:
    few = passed(gated, shot)
    assert few.evaluations(20) < 20
    assert np.array_equal(learned(gated, (shot,) * 3), learned(gated, (shot,) * 3, few))
    assert not np.array_equal(learned(gated, (shot,) * 3), learned(gated, (shot,) * 3, ALL))


@pytest.mark.parametrize("shots", [(3, 3, 3), (1, 1), (1, 1, 1, 1), (1, 2, 3)], ids=["shots", "fewer ways", "more ways", "mixed"])
def test_what_was_not_tried_gets_all_steps(gated: Path, shots: tuple[int, ...]) -> None:
    assert np.array_equal(learned(gated, shots), learned(gated, shots, ALL))
    assert not np.array_equal(learned(gated, shots), learned(gated, shots, passed(gated, min(shots[0], 2))))


def test_a_choice_for_denoisers_that_were_trained_anew_is_void(run: Path) -> None:
    config = write_config(run.parents[1], **GATED)
    assert main(["train", str(config), "--force", "train.iterations=50"]) == 0
    assert np.array_equal(learned(run, (1, 1, 1)), learned(run, (1, 1, 1), ALL))


def test_without_an_evaluation_it_takes_all_steps(run: Path) -> None:
    shutil.rmtree(run / "evaluate")
    assert np.array_equal(learned(run, (1, 1, 1)), learned(run, (1, 1, 1), ALL))


def test_a_given_few_step_sampler_is_never_taken_by_itself(run: Path) -> None:
    config = write_config(run.parents[1], **{**GATED, "evaluate": {"gda_steps": 1}}, sampler={"steps": 1})
    assert main(["evaluate", str(config), "--force"]) == 0
    record = json.loads((run / "evaluate/stable/results.json").read_text())["sampler"]["1"]
    assert (record["taken"]["steps"], record["gated"]) == (1, False)
    assert np.array_equal(learned(run, (1, 1, 1)), learned(run, (1, 1, 1), ALL))


def test_results_from_before_there_was_a_gate_are_read(run: Path) -> None:
    path, folder = run / "evaluate/stable", run / "evaluate/stable.partial"
    made = artifact.read(path)
    results = json.loads((path / "results.json").read_text())
    del results["sampler"]
    path.rename(folder)
    (folder / "manifest.json").unlink()
    (folder / "results.json").write_text(json.dumps(results))
    artifact.commit(folder, path, "evaluate", made.manifest["config"], made.manifest["inputs"], 0.0)
    assert np.array_equal(learned(run, (1, 1, 1)), learned(run, (1, 1, 1), ALL))


def test_noise_comes_from_the_seed(gated: Path) -> None:
    noisy = SamplerConfig(stochastic=True)
    assert np.array_equal(learned(gated, (1, 1, 1), noisy), learned(gated, (1, 1, 1), noisy))
    assert not np.allclose(learned(gated, (1, 1, 1), noisy), learned(gated, (1, 1, 1), ALL))


def test_more_steps_than_it_was_trained_for_are_refused(gated: Path) -> None:
    with pytest.raises(UserError, match=r"sampler\.steps=21: the schedule has only 20"):
        MetaDiffClassifier(gated, sampler=SamplerConfig(steps=21))
