"""Every solver against diffusers' in double precision, step by step over whole trajectories of a real denoiser."""

from collections.abc import Callable
from typing import Literal

import pytest
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from torch import Tensor

from metadiff.denoiser import Denoiser, DenoiserConfig, build_denoiser
from metadiff.learners import PrototypeLearner, Support
from metadiff.samplers import SamplerConfig, denoise_steps, plan
from metadiff.schedule import Schedule, Spacing
from metadiff.solvers import Step, ddim, dpmpp_2m, equation_8, foresee, update

SCHEDULE = Schedule()
BETAS = {"num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear", "timestep_spacing": "trailing"}
COUNTS = [1, 2, 7, 50]
Algorithm = Literal["dpmsolver++", "sde-dpmsolver++"]
Predict = Callable[[Tensor, int], Tensor]
GRIDS = [*((steps, spacing) for steps in COUNTS for spacing in ("even", "log_snr")), (1000, "even")]
# diffusers', where it makes arrays of tensors.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning")


def _randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


SUPPORT = Support.of(_randn(3, 6, 12, seed=0) * 0.1, (torch.arange(6) % 3).expand(3, -1), 3)
W_T = _randn(3, 3, 12, seed=1)


@pytest.fixture(scope="module", params=["stable", "consistent"])
def denoiser(request: pytest.FixtureRequest) -> Denoiser:
    """In double precision; its last layer drawn anew, since that of the consistent form starts at zero."""
    built = build_denoiser(DenoiserConfig(preset=request.param), 12, PrototypeLearner(), SCHEDULE).double()
    built.get_submodule("body.db2.feature").load_state_dict({"weight": 0.1 * _randn(12, 6, seed=2), "bias": 0.1 * _randn(12, seed=3)})
    return built


@pytest.fixture(scope="module")
def predict(denoiser: Denoiser) -> Predict:
    """eps_hat as another sampler would ask for it."""
    return torch.no_grad()(lambda w, t: denoiser(w, SUPPORT, torch.tensor(t)))


def _path(denoiser: Denoiser, config: SamplerConfig) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0) if config.stochastic else None
    return [w for _, w in denoise_steps(denoiser, SCHEDULE, SUPPORT, W_T, config, generator)][1:]


def _compare(ours: list[Tensor], theirs: list[Tensor], tolerance: float = 1e-9) -> None:
    assert len(ours) == len(theirs)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=tolerance, atol=tolerance)


def _ddpm(timesteps: list[int]) -> DDPMScheduler:
    scheduler = DDPMScheduler(**BETAS, clip_sample=False, variance_type="fixed_large")
    # Its own table in double precision: it goes through x_0, and at large t dividing by sqrt(abar_t) magnifies float32's rounding.
    scheduler.alphas_cumprod = SCHEDULE.abar
    scheduler.set_timesteps(timesteps=timesteps)
    return scheduler


@pytest.mark.parametrize("stochastic", [False, True])
@pytest.mark.parametrize(("steps", "spacing"), GRIDS)
def test_equation_8_is_diffusers_ddpm(denoiser: Denoiser, predict: Predict, steps: int, spacing: Spacing, stochastic: bool) -> None:
    timesteps, generator, w = SCHEDULE.timesteps(steps, spacing), torch.Generator().manual_seed(0), W_T
    scheduler, theirs = _ddpm(timesteps), []
    for t in timesteps:
        if not stochastic or t == timesteps[-1]:  # it tells the last step by t = 0 alone, and would add noise to the w_0 of others
            scheduler._get_variance = lambda *_, **__: torch.tensor(0.0)  # type: ignore[method-assign]
        w = scheduler.step(predict(w, t), t, w, generator=generator).prev_sample  # type: ignore[union-attr]
        theirs.append(w)
    _compare(_path(denoiser, SamplerConfig(steps=steps, spacing=spacing, stochastic=stochastic)), theirs)


@pytest.mark.parametrize("stochastic", [False, True])
@pytest.mark.parametrize("steps", [1, 2, 10, 100])
def test_ddim_is_diffusers(denoiser: Denoiser, predict: Predict, steps: int, stochastic: bool) -> None:
    """It strides by T // steps, so for whole divisors alone; the next test has the others."""
    scheduler, generator, w, theirs = DDIMScheduler(**BETAS, clip_sample=False), torch.Generator().manual_seed(0), W_T, []
    scheduler.alphas_cumprod, scheduler.final_alpha_cumprod = SCHEDULE.abar, torch.tensor(1.0, dtype=torch.float64)
    scheduler.set_timesteps(steps)
    assert scheduler.timesteps.tolist() == SCHEDULE.timesteps(steps)
    for t in scheduler.timesteps.tolist():
        w = scheduler.step(predict(w, t), t, w, eta=float(stochastic), generator=generator).prev_sample  # type: ignore[union-attr]
        theirs.append(w)
    _compare(_path(denoiser, SamplerConfig(method="ddim", steps=steps, stochastic=stochastic)), theirs)


def _multistep(timesteps: list[int], algorithm: Algorithm, order: int) -> DPMSolverMultistepScheduler:
    scheduler = DPMSolverMultistepScheduler(**BETAS, algorithm_type=algorithm, solver_order=order, final_sigmas_type="zero")
    scheduler.set_timesteps(timesteps=timesteps)
    assert scheduler.timesteps.tolist() == timesteps
    return scheduler


def _multistep_path(predict: Predict, scheduler: DPMSolverMultistepScheduler, stochastic: bool) -> list[Tensor]:
    """What its `step` does, by its own formulas; `step` itself rounds to float32."""
    timesteps, generator, w, foreseen, path = scheduler.timesteps.tolist(), torch.Generator().manual_seed(0), W_T, [], []
    scheduler.sigmas = torch.cat([((1 - SCHEDULE.abar) / SCHEDULE.abar).sqrt()[timesteps], torch.zeros(1, dtype=torch.float64)])
    for i, t in enumerate(timesteps):
        z = torch.randn(w.shape, generator=generator, dtype=w.dtype) if stochastic else torch.zeros_like(w)
        scheduler._step_index = i
        foreseen.append(scheduler.convert_model_output(predict(w, t), sample=w))
        if scheduler.config["solver_order"] == 1 or i in (0, len(timesteps) - 1):
            w = scheduler.dpm_solver_first_order_update(foreseen[-1], sample=w, noise=z)
        else:
            w = scheduler.multistep_dpm_solver_second_order_update(foreseen[-2:], sample=w, noise=z)
        path.append(w)
    return path


@pytest.mark.parametrize(("steps", "spacing"), GRIDS)
def test_dpm_solver_2m_is_diffusers(denoiser: Denoiser, predict: Predict, steps: int, spacing: Spacing) -> None:
    theirs = _multistep_path(predict, _multistep(SCHEDULE.timesteps(steps, spacing), "dpmsolver++", 2), stochastic=False)
    _compare(_path(denoiser, SamplerConfig(method="dpmpp2m", steps=steps, spacing=spacing)), theirs)


@pytest.mark.parametrize("stochastic", [False, True])
@pytest.mark.parametrize("steps", COUNTS)
def test_second_order_equation_8_is_diffusers_sde_solver(denoiser: Denoiser, predict: Predict, steps: int, stochastic: bool) -> None:
    theirs = _multistep_path(predict, _multistep(SCHEDULE.timesteps(steps, "log_snr"), "sde-dpmsolver++", 2), stochastic)
    config = SamplerConfig(method="eq8_2m", steps=steps, spacing="log_snr", stochastic=stochastic)
    _compare(_path(denoiser, config), theirs)


@pytest.mark.parametrize(("algorithm", "method"), [("dpmsolver++", "ddim"), ("sde-dpmsolver++", "eq8")])
@pytest.mark.parametrize("steps", [3, 7, 30])
def test_first_orders_are_ddim_and_equation_8(denoiser: Denoiser, predict: Predict, steps: int, algorithm: Algorithm, method: str) -> None:
    theirs = _multistep_path(predict, _multistep(SCHEDULE.timesteps(steps), algorithm, 1), stochastic=False)
    _compare(_path(denoiser, SamplerConfig(method=method, steps=steps)), theirs)  # type: ignore[arg-type]


@pytest.mark.parametrize(("algorithm", "method"), [("dpmsolver++", "dpmpp2m"), ("sde-dpmsolver++", "eq8_2m")])
@pytest.mark.parametrize("steps", [1, 2, 3, 14, 15, 40])
def test_orders_at_both_ends_are_those_of_diffusers_step(
    denoiser: Denoiser, predict: Predict, steps: int, algorithm: Algorithm, method: str
) -> None:
    """In float32, where a step of another order would differ by far more than the rounding."""
    scheduler, w, theirs = _multistep(SCHEDULE.timesteps(steps), algorithm, 2), W_T, []
    for t in scheduler.timesteps.tolist():
        w = scheduler.step(predict(w, t), t, w, variance_noise=torch.zeros_like(w)).prev_sample  # type: ignore[union-attr]
        theirs.append(w)
    _compare(_path(denoiser, SamplerConfig(method=method, steps=steps)), theirs, tolerance=1e-3)  # type: ignore[arg-type]


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 10, 50, 333, 999, 1000])
def test_spacings_are_those_of_diffusers(steps: int) -> None:
    for scheduler in (DDPMScheduler(**BETAS), DPMSolverMultistepScheduler(**BETAS)):
        scheduler.set_timesteps(steps)
        assert scheduler.timesteps.tolist() == SCHEDULE.timesteps(steps)


@pytest.mark.parametrize("steps", [2, 5, 10, 20])
def test_log_snr_spacing_is_that_of_dpm_solver_but_for_rounding(steps: int) -> None:
    scheduler = DPMSolverMultistepScheduler(**BETAS, use_lu_lambdas=True)
    scheduler.set_timesteps(steps)
    assert (scheduler.timesteps - torch.tensor(SCHEDULE.timesteps(steps, "log_snr"))).abs().max() <= 1


def test_misprint_of_equation_8_is_not() -> None:
    w, eps_hat, scheduler = _randn(1, 2, 8, seed=0), _randn(1, 2, 8, seed=1), _ddpm(SCHEDULE.timesteps())
    scheduler._get_variance = lambda *_, **__: torch.tensor(0.0)  # type: ignore[method-assign]
    printed = {c.t: c for c in equation_8(SCHEDULE, SCHEDULE.timesteps(), as_printed=True)}
    for t in (999, 500, 1):
        ours = update(w, eps_hat.clone(), printed[t])
        right = scheduler.step(eps_hat, t, w, generator=torch.Generator().manual_seed(0)).prev_sample  # type: ignore[union-attr]
        assert (ours - right).abs().max() > 1e-3
        alpha = 1 - SCHEDULE.beta[t]
        torch.testing.assert_close(ours, (w - (1 - alpha) / (1 - alpha).sqrt() * eps_hat) / alpha.sqrt())


def test_equation_7_without_momentum_and_noise_is_gradient_descent() -> None:
    w, gradient, z, eta = _randn(1, 2, 8, seed=0), _randn(1, 2, 8, seed=1), _randn(1, 2, 8, seed=2), 0.3
    torch.testing.assert_close(update(w, gradient.clone(), Step(0, 1.0, eta), z), w - eta * gradient)
    seventh = (w - eta * gradient) + (1.5 - 1) * w + 0.2 * z
    torch.testing.assert_close(update(w, gradient.clone(), Step(0, 1.5, eta, 0.2), z), seventh)


def test_coefficients_are_those_of_equation_5() -> None:
    first, *_, last = equation_8(SCHEDULE, SCHEDULE.timesteps(), stochastic=True)
    assert first.t == 999
    assert first.gamma == pytest.approx(0.98**-0.5)
    assert first.eta == pytest.approx(0.02 / (0.98 * (1 - float(SCHEDULE.abar[999]))) ** 0.5)
    assert first.xi == pytest.approx(0.02**0.5)
    assert (last.t, last.xi) == (0, 0), "the last step adds no noise"
    assert equation_8(SCHEDULE, SCHEDULE.timesteps())[0].xi == 0


@pytest.mark.parametrize("config", [SamplerConfig(), *(SamplerConfig(method=m, steps=9) for m in ("eq8", "eq8_2m", "ddim", "dpmpp2m"))])  # type: ignore[arg-type]
def test_all_end_in_the_w_0_of_a_perfect_prediction(config: SamplerConfig) -> None:
    """Where the true noise of one w_0 is predicted at every t, every solver ends in that w_0."""
    w_0, w, before = _randn(2, 3, 4, seed=5), _randn(2, 3, 4, seed=6), None
    for c in plan(SCHEDULE, config):
        eps = (w - SCHEDULE.abar[c.t].sqrt() * w_0) / (1 - SCHEDULE.abar[c.t]).sqrt()
        if c.signal < 1:
            torch.testing.assert_close(foresee(w, eps, c), w_0)
        w, before = update(w, eps, c, None, before), w_0
    torch.testing.assert_close(w, w_0)


@pytest.mark.parametrize("steps", [1, 2, 10, 999])
def test_ddim_with_noise_has_the_mean_of_equation_8(steps: int) -> None:
    """Song et al. 2021, Section 4.1: with eta = 1 it is DDPM."""
    timesteps = SCHEDULE.timesteps(steps)
    for ours, paper in zip(ddim(SCHEDULE, timesteps, stochastic=True), equation_8(SCHEDULE, timesteps, stochastic=True), strict=True):
        assert ours[:3] == pytest.approx(paper[:3])
        assert ours.xi <= paper.xi


def test_second_order_is_of_second_order() -> None:
    """On the noiseless path through a smooth prediction, twice the steps bring first order half and second a quarter of the error."""

    def end(method: Callable[[list[int]], list[Step]], steps: int) -> Tensor:
        # A stretch far from both ends, over which the schedule is smooth; there is no last step into w_0.
        w, before = W_T, None
        for c in method([*range(800, 200, -600 // steps), 200])[:-1]:
            eps_hat = torch.tanh(2 * w)
            foreseen = (w - (1 - SCHEDULE.abar[c.t]).sqrt() * eps_hat) / SCHEDULE.abar[c.t].sqrt()
            w, before = update(w, eps_hat, c, None, before), foreseen
        return w

    def first(timesteps: list[int]) -> list[Step]:
        return equation_8(SCHEDULE, timesteps)

    def second(timesteps: list[int]) -> list[Step]:
        return dpmpp_2m(SCHEDULE, timesteps, sde=True)

    truth = end(second, 600)
    assert (end(first, 600) - truth).norm() < 0.01 * truth.norm(), "both follow the same path"
    for method, order in ((first, 1), (second, 2)):
        errors = [float((end(method, steps) - truth).norm()) for steps in (30, 60)]
        assert errors[0] / errors[1] == pytest.approx(2**order, rel=0.25)
