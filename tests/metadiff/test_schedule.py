from itertools import pairwise
from typing import get_args

import pytest
import torch

from metadiff.config import validate
from metadiff.errors import UserError
from metadiff.schedule import Schedule, ScheduleConfig, Spacing


def test_tables_are_the_linear_schedule() -> None:
    schedule = Schedule()
    assert schedule.beta[0] == 1e-4
    assert schedule.beta[-1] == pytest.approx(0.02)
    assert float(schedule.abar[0]) == pytest.approx(0.9999)
    assert float(schedule.abar[-1]) == pytest.approx(4.0358e-5, rel=1e-4)  # prod(1 - linspace(1e-4, 0.02, 1000))
    torch.testing.assert_close(schedule.signal**2 + schedule.noise**2, torch.ones(1000))


def test_beta_of_any_length_has_both_ends() -> None:
    beta = Schedule(ScheduleConfig(num_steps=5, beta_start=0.1, beta_end=0.5)).beta
    torch.testing.assert_close(beta, torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5], dtype=torch.float64))


@pytest.mark.parametrize("t", [0, 250, 999])
def test_q_sample_has_the_moments_of_equation_2(t: int) -> None:
    schedule, n = Schedule(), 200_000
    eps = torch.randn(1, 1, n, generator=torch.Generator().manual_seed(t))
    w_t = schedule.q_sample(torch.full((1, 1, n), 2.0), torch.tensor([t]), eps)
    abar = float(schedule.abar[t])
    standard_error = ((1 - abar) / n) ** 0.5
    assert abs(float(w_t.mean()) - 2 * abar**0.5) < 4 * standard_error + 1e-6
    assert float(w_t.var()) == pytest.approx(1 - abar, rel=4 * (2 / n) ** 0.5)


def test_q_sample_takes_one_t_a_task_or_one_for_all() -> None:
    schedule, w_0, eps = Schedule(), torch.ones(3, 2, 4), torch.ones(3, 2, 4) * 2
    each = schedule.q_sample(w_0, torch.tensor([7, 500, 7]), eps)
    torch.testing.assert_close(each[[0, 2]], schedule.q_sample(w_0, torch.tensor(7), eps)[[0, 2]])
    torch.testing.assert_close(each[1], schedule.q_sample(w_0, torch.tensor(500), eps)[1])


def test_beta_of_one_is_refused() -> None:
    with pytest.raises(UserError, match="beta_end=1"):
        validate(ScheduleConfig, {"beta_end": 1}, "c.yaml")


@pytest.mark.parametrize("spacing", get_args(Spacing))
@pytest.mark.parametrize("total", [1, 2, 7, 20, 1000])
def test_kept_steps_go_down_from_the_noise_and_are_all_different(total: int, spacing: Spacing) -> None:
    schedule = Schedule(ScheduleConfig(num_steps=total))
    for steps in {*range(1, min(total, 60) + 1), total - 1, total} - {0}:
        kept = schedule.timesteps(steps, spacing)
        assert len(kept) == steps
        assert kept[0] == total - 1
        assert all(0 <= later < t for t, later in pairwise(kept))
    assert schedule.timesteps(None, spacing) == schedule.timesteps(total, spacing) == list(range(total - 1, -1, -1))


def test_even_steps_stride_down_to_w_0() -> None:
    schedule = Schedule()
    assert schedule.timesteps(5) == [999, 799, 599, 399, 199]
    assert schedule.timesteps(3) == [999, 666, 332]


def test_log_snr_steps_are_even_in_it_and_crowd_towards_w_0() -> None:
    schedule = Schedule()
    kept = schedule.timesteps(8, "log_snr")
    assert (kept[0], kept[-1]) == (999, 0)
    log_snr = (schedule.abar / (1 - schedule.abar)).log()[kept]
    assert log_snr.diff().tolist() == pytest.approx([float(log_snr[-1] - log_snr[0]) / 7] * 7, rel=0.1)
    assert schedule.timesteps(300, "log_snr")[-50:] == list(range(49, -1, -1))


def test_more_steps_than_there_are_are_refused() -> None:
    with pytest.raises(UserError, match=r"sampler\.steps=1001: the schedule has only 1000 .*lower it"):
        Schedule().timesteps(1001)
