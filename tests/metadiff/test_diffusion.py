import pytest
import torch

from metadiff.denoiser import DenoiserConfig, build_denoiser
from metadiff.diffusion import diffusion_loss, draw, loss_weights
from metadiff.learners import PrototypeLearner, Support
from metadiff.parallel import Ranks
from metadiff.schedule import Schedule

SCHEDULE = Schedule()


def _randn(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


SUPPORT = Support.of(_randn(3, 4, 8, seed=0) * 0.1, torch.tensor([[0, 1, 0, 1]] * 3), 2)


def test_draw_is_the_iterations_and_covers_every_step() -> None:
    w_0 = torch.zeros(4000, 2, 3)
    t, eps = draw(0, 7, w_0, 10)
    assert t.unique().tolist() == list(range(10))
    assert abs(float(eps.mean())) < 4 / 24000**0.5
    assert float(eps.std()) == pytest.approx(1, abs=0.03)
    assert len(eps.flatten().unique()) > 23_900, "no stream twice"
    for same, again in zip((t, eps), draw(0, 7, w_0, 10), strict=True):
        assert torch.equal(same, again)
    for other in (draw(1, 7, w_0, 10), draw(0, 8, w_0, 10)):
        assert not torch.equal(other[0], t)
        assert not torch.equal(other[1], eps)


def test_threads_draw_the_same() -> None:
    one = draw(3, 4, torch.zeros(300, 2, 3), 10)
    torch.set_num_threads(2)
    try:
        two = draw(3, 4, torch.zeros(300, 2, 3), 10)
    finally:
        torch.set_num_threads(1)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("size", [6, 64, 200])
@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_ranks_draw_their_shares_of_the_same_batch(size: int, world: int) -> None:
    whole = draw(0, 1, torch.zeros(size, 2, 3), 10)
    everyone = [Ranks(rank, world, elastic=True) for rank in range(world)]
    lengths = [ranks.share(size).stop - ranks.share(size).start for ranks in everyone]
    shares = [draw(0, 1, torch.zeros(length, 2, 3), 10, ranks, size) for ranks, length in zip(everyone, lengths, strict=True)]
    for drawn, parts in zip(whole, zip(*shares, strict=True), strict=True):
        assert torch.equal(drawn, torch.cat(parts))


def test_loss_is_the_mean_over_all_elements_of_equation_12() -> None:
    denoiser = build_denoiser(DenoiserConfig(), 8, PrototypeLearner(), SCHEDULE)
    w_0, t, eps = _randn(3, 2, 8, seed=1), torch.tensor([0, 400, 999]), _randn(3, 2, 8, seed=2)
    abar = SCHEDULE.abar[t].float()[:, None, None]
    w_t = abar.sqrt() * w_0 + (1 - abar).sqrt() * eps
    expected = ((eps - denoiser(w_t, SUPPORT, t)) ** 2).sum() / eps.numel()
    torch.testing.assert_close(diffusion_loss(denoiser, SCHEDULE, w_0, SUPPORT, t, eps), expected)


def test_plain_weighting_of_an_untrained_consistent_denoiser_is_its_anchors_error() -> None:
    """delta is zero, so the error of a - w_0 is (c - w_0)^2 whatever the t."""
    denoiser = build_denoiser(DenoiserConfig(preset="consistent"), 8, PrototypeLearner(), SCHEDULE)
    w_0, eps = SUPPORT.means + 0.1 * _randn(3, 2, 8, seed=1), _randn(3, 2, 8, seed=2)
    for t in ([0, 100, 300], [700, 900, 999]):
        loss = diffusion_loss(denoiser, SCHEDULE, w_0, SUPPORT, torch.tensor(t), eps, loss_weights(SCHEDULE, "x0").float())
        torch.testing.assert_close(loss, (SUPPORT.means - w_0).square().mean(), rtol=1e-3, atol=0)


def test_weights_of_each_step() -> None:
    snr = SCHEDULE.abar / (1 - SCHEDULE.abar)
    assert (loss_weights(SCHEDULE, "eps") == 1).all()
    min_snr = loss_weights(SCHEDULE, "min_snr")
    assert float(min_snr[0]) == pytest.approx(5 / 9999, rel=1e-6)
    assert (min_snr[snr < 5] == 1).all()
    torch.testing.assert_close(loss_weights(SCHEDULE, "x0") * snr, torch.ones_like(snr))
