"""The benchmark of training and sampling: its textbook computes the same thing, and all of it runs."""

import json

import pytest
import torch

from benchmarks.diffusion import forward_flops, main, of_textbook, training_flops
from benchmarks.tasks import DIM, Tasks, new_denoiser
from benchmarks.textbook import Textbook
from metadiff.diffusion import draw
from metadiff.optimisation import Optimisation, TrainConfig
from metadiff.samplers import sample
from metadiff.schedule import Schedule, ScheduleConfig

SCHEDULE = Schedule(ScheduleConfig(num_steps=20))


@pytest.fixture(scope="module")
def tasks() -> Tasks:
    return Tasks(10)


def test_the_textbook_learns_the_same(tasks: Tasks) -> None:
    denoiser, textbook = new_denoiser("official", SCHEDULE), Textbook(DIM, SCHEDULE.num_steps)
    textbook.denoiser.load_state_dict(of_textbook(denoiser))
    state = Optimisation(denoiser, SCHEDULE, TrainConfig(batch_size=4), 0)
    for step in range(3):
        w_0, support = tasks.batch(step, 4)
        t, eps = draw(0, step, w_0, SCHEDULE.num_steps)
        theirs = textbook.descend(w_0, support.features, support.labels, t, eps)
        assert float(state.iterate(step, w_0, support)) == pytest.approx(theirs, rel=1e-4)
        for name, parameter in textbook.denoiser.named_parameters() if not step else ():
            gradient = denoiser.get_parameter(f"body.{name}").grad
            assert parameter.grad is not None
            torch.testing.assert_close(gradient, parameter.grad, rtol=1e-4, atol=1e-5 * float(parameter.grad.abs().max()), msg=name)


def test_the_textbook_samples_the_same(tasks: Tasks) -> None:
    denoiser, textbook, block = new_denoiser("official", SCHEDULE), Textbook(DIM, SCHEDULE.num_steps), tasks.block(range(3))
    textbook.denoiser.load_state_dict(of_textbook(denoiser))
    found = sample(denoiser, SCHEDULE, block.support, block.w_T)
    for w, *one in zip(found, block.support.features, block.support.labels, block.w_T, strict=True):
        torch.testing.assert_close(textbook.sample(*one), w, rtol=1e-3, atol=1e-3 * float(w.abs().max()))


def test_work_is_that_of_the_linear_layers() -> None:
    """Per task: 344,064 weights see 5 rows, and 460,960 the time embedding."""
    denoiser = new_denoiser("official", SCHEDULE)
    assert forward_flops(denoiser) == 2 * 5 * 344_064
    without_gradient = 2 * 5 * 512 * 256 + 2 * (320 * 1280 + 320 * 160)
    assert training_flops(denoiser) == 3 * 2 * (5 * 344_064 + 460_960) - without_gradient


def test_unseen_tasks_are_of_other_classes(tasks: Tasks) -> None:
    seen, unseen = tasks.batch(0, 64)[0].flatten(0, 1), tasks.block(range(20)).full_means.flatten(0, 1)
    assert float((seen[:, None] - unseen).norm(dim=-1).min()) > 0.1


def test_everything_is_measured(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--quick", "--threads", "1"]) == 0
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    for name in ("train_ratio_5shot_b512", "train_ratio_5shot_b8", "train_share_of_gemm_peak", "sample_ratio_600_tasks"):
        assert figures[name] > 0
    for name in ("sample_share_of_gemm_peak", "fewstep_ratio", "features_over_images", "textbook_share"):
        assert figures[name] > 0
    assert figures["sample_difference_to_textbook"] < 1e-3
