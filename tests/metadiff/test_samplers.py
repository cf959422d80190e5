import pytest
import torch
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

from metadiff.denoiser import Denoiser, DenoiserConfig, build_denoiser
from metadiff.learners import Learner, LinearLearner, PrototypeLearner, Support
from metadiff.samplers import SamplerConfig, StepCoefficients, coefficients, denoise_steps, sample, step
from metadiff.schedule import Schedule, ScheduleConfig

SCHEDULE = Schedule()
SHORT = Schedule(ScheduleConfig(num_steps=20, beta_end=0.5))


def _randn(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _support(tasks: int = 5) -> Support:
    return Support.of(_randn(tasks, 9, 16, seed=0) * 0.1, (torch.arange(9) % 3).expand(tasks, -1), 3)


def _denoiser(schedule: Schedule = SHORT, learner: Learner | None = None, preset: str = "stable") -> Denoiser:
    return build_denoiser(DenoiserConfig(preset=preset), 16, learner or PrototypeLearner(), schedule)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def ddpm() -> DDPMScheduler:
    """diffusers' step with the same betas and without the noise: its posterior mean."""
    scheduler = DDPMScheduler(num_train_timesteps=1000, beta_start=1e-4, beta_end=0.02, beta_schedule="linear", clip_sample=False)
    # Its own tables in double precision: it goes through x_0, and at large t dividing by sqrt(abar_t) magnifies float32's rounding.
    scheduler.alphas_cumprod = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
    scheduler._get_variance = lambda *_, **__: torch.tensor(0.0)  # type: ignore[method-assign]
    return scheduler


def test_every_step_of_equation_8_is_diffusers_mean(ddpm: DDPMScheduler) -> None:
    w = ours = _randn(2, 5, 8, seed=0).double()
    for t in reversed(range(1000)):
        eps_hat = torch.tanh(w * (1 + t / 1000)) + 0.1 * _randn(2, 5, 8, seed=t).double()
        w = ddpm.step(eps_hat, t, w, generator=torch.Generator().manual_seed(0)).prev_sample  # type: ignore[union-attr]
        ours = step(ours, eps_hat, coefficients(SCHEDULE, t, SamplerConfig()))
        torch.testing.assert_close(ours, w, rtol=1e-9, atol=1e-9)


def test_misprint_of_equation_8_is_not(ddpm: DDPMScheduler) -> None:
    w, eps_hat = _randn(1, 2, 8, seed=0).double(), _randn(1, 2, 8, seed=1).double()
    for t in (999, 500, 1):
        printed = step(w, eps_hat, coefficients(SCHEDULE, t, SamplerConfig(eq8_as_printed=True)))
        right = ddpm.step(eps_hat, t, w, generator=torch.Generator().manual_seed(0)).prev_sample  # type: ignore[union-attr]
        assert (printed - right).abs().max() > 1e-3
        alpha = 1 - SCHEDULE.beta[t]
        torch.testing.assert_close(printed, (w - (1 - alpha) / (1 - alpha).sqrt() * eps_hat) / alpha.sqrt())


def test_equation_7_without_momentum_and_noise_is_gradient_descent() -> None:
    w, gradient, z, eta = _randn(1, 2, 8, seed=0), _randn(1, 2, 8, seed=1), _randn(1, 2, 8, seed=2), 0.3
    torch.testing.assert_close(step(w, gradient, StepCoefficients(1.0, eta, 0.0), z), w - eta * gradient)
    seventh = (w - eta * gradient) + (1.5 - 1) * w + 0.2 * z
    torch.testing.assert_close(step(w, gradient, StepCoefficients(1.5, eta, 0.2), z), seventh)


def test_coefficients_are_those_of_equation_5() -> None:
    gamma, eta, xi = coefficients(SCHEDULE, 999, SamplerConfig(stochastic=True))
    assert gamma == pytest.approx(0.98**-0.5)
    assert eta == pytest.approx(0.02 / (0.98 * (1 - float(SCHEDULE.abar[999]))) ** 0.5)
    assert xi == pytest.approx(0.02**0.5)
    assert coefficients(SCHEDULE, 999, SamplerConfig()).xi == 0


@pytest.mark.parametrize("learner", [PrototypeLearner(), LinearLearner()])
def test_untrained_consistent_denoiser_is_its_anchor(learner: Learner) -> None:
    support, queries = _support(), _randn(5, 30, 16, seed=3)
    anchor = learner.anchor(support)
    w_0 = sample(_denoiser(SCHEDULE, learner, "consistent"), SCHEDULE, support, _randn(5, 3, 16, seed=4))
    torch.testing.assert_close(w_0, anchor, rtol=0, atol=1e-5)
    assert torch.equal(learner.logits(w_0, queries).argmax(-1), learner.logits(anchor, queries).argmax(-1))


def test_raw_gradient_lands_on_class_means() -> None:
    """Eq. 8 with eps_hat = w - c shrinks the noise; it keeps most of c. Table 3 (iii)."""
    support = _support()
    w_0 = sample(_denoiser(SCHEDULE).network_off(), SCHEDULE, support, _randn(5, 3, 16, seed=4))
    assert torch.nn.functional.cosine_similarity(w_0, support.means, dim=-1).min() > 0.99


def test_steps_count_down_from_the_start_to_w_0() -> None:
    denoiser, support, w_T = _denoiser(), _support(), _randn(5, 3, 16, seed=4)
    path = dict(denoise_steps(denoiser, SHORT, support, w_T))
    assert list(path) == list(range(20, -1, -1))
    assert torch.equal(path[20], w_T)
    torch.testing.assert_close(path[0], sample(denoiser, SHORT, support, w_T))
    with torch.no_grad():
        by_hand = step(w_T, denoiser(w_T, support, torch.tensor([19] * 5)), coefficients(SHORT, 19, SamplerConfig()))
    torch.testing.assert_close(path[19], by_hand)


@pytest.mark.parametrize("stochastic", [False, True])
def test_chunks_change_nothing(stochastic: bool) -> None:
    def run(chunk: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0) if stochastic else None
        config = SamplerConfig(chunk=chunk, stochastic=stochastic)
        return sample(_denoiser(), SHORT, _support(), _randn(5, 3, 16, seed=4), config, generator)

    torch.testing.assert_close(run(2), run(5))


def test_noise_is_the_generators_and_makes_a_difference() -> None:
    args = _denoiser(), SHORT, _support(), _randn(5, 3, 16, seed=4)
    noisy = [sample(*args, SamplerConfig(stochastic=True), torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert torch.equal(noisy[0], noisy[1])
    assert not torch.allclose(noisy[0], noisy[2], atol=0.1)


@pytest.mark.parametrize("preset", ["paper", "stable", "consistent"])
def test_bfloat16_products_barely_move_w_0(preset: str) -> None:
    support, w_T = _support(), _randn(5, 3, 16, seed=4)
    denoiser = _denoiser(SHORT, preset=preset)
    full, rounded = (sample(denoiser, SHORT, support, w_T, SamplerConfig(precision=precision)) for precision in ("fp32", "bf16"))
    assert (full - rounded).norm() < 0.02 * full.norm()
    assert preset == "consistent" or not torch.equal(full, rounded)
    assert denoiser.body is not None
    assert {p.dtype for p in denoiser.body.parameters()} == {torch.float32}


def test_w_0_can_be_trained_on() -> None:
    w_0 = sample(_denoiser(), SHORT, _support(), _randn(5, 3, 16, seed=4))
    head = torch.nn.Linear(16, 1)
    head(w_0).sum().backward()
    assert head.weight.grad is not None
