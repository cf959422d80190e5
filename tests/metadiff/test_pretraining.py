import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from metadiff.backbones import build_backbone, feature_dim
from metadiff.checkpoint import Checkpoints
from metadiff.config import validate
from metadiff.errors import UserError
from metadiff.images import AugmentConfig, Batch, ImageLoader, ImageSet, MemoryLoader
from metadiff.metrics import read_rows
from metadiff.parallel import Ranks
from metadiff.pretraining import BACKBONE, CHECKPOINT, METRICS, Classifier, PretrainConfig, load_backbone, pretrain

SIZE, CLASSES, EPOCHS = 16, 3, 3
CPU = torch.device("cpu")
PLAIN = AugmentConfig(crop="none", flip=False)


def settings(**options: Any) -> PretrainConfig:
    return PretrainConfig(**{"epochs": EPOCHS, "batch_size": 6, "precision": "fp32", "augment": PLAIN, "milestones": (2,)} | options)


def classifier(seed: int = 0) -> Classifier:
    backbone = build_backbone("conv4", seed)
    return Classifier(backbone, feature_dim(backbone, SIZE), CLASSES, seed)


@pytest.fixture
def images() -> ImageSet:
    """Three classes of red, green and blue noise."""
    labels = np.repeat(np.arange(CLASSES), 8)
    pixels = np.random.default_rng(0).integers(0, 150, (len(labels), SIZE, SIZE, 3), dtype=np.uint8)
    pixels[np.arange(len(labels)), :, :, labels] += 100
    return ImageSet(pixels, labels, ("red", "green", "blue"))


@pytest.fixture
def loader(images: ImageSet) -> MemoryLoader:
    return MemoryLoader(images, 6, AugmentConfig(crop="shift"), seed=0)


class Handwritten:
    """A loader that is nobody's subclass."""

    def __init__(self, batches: list[Batch], fail_at: tuple[int, int] | None = None) -> None:
        self.batches, self.fail_at, self.epochs = batches, fail_at, []

    @property
    def steps_per_epoch(self) -> int:
        return len(self.batches)

    def epoch(self, epoch: int) -> Iterator[Batch]:
        self.epochs.append(epoch)
        for step, batch in enumerate(self.batches):
            if (epoch, step) == self.fail_at:
                raise KeyboardInterrupt
            yield batch


def batches_of(loader: ImageLoader) -> list[Batch]:
    return list(loader.epoch(0))


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """The metrics without the seconds, which differ from run to run."""
    return [{key: value for key, value in row.items() if key != "seconds"} for row in read_rows(folder / METRICS)]


def run(folder: Path, loader: ImageLoader, validate: Callable[[nn.Module], float] | None = None, **options: Any) -> list[dict[str, Any]]:
    folder.mkdir(exist_ok=True)
    pretrain(classifier(), loader, settings(**options), folder, CPU, validate)
    return rows_of(folder)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_separable_set_is_learnt(tmp_path: Path, loader: MemoryLoader, precision: Any) -> None:
    model = classifier()
    pretrain(model, loader, settings(precision=precision, epochs=4, learning_rate=0.03), tmp_path, CPU, None)
    losses = [row["loss"] for row in rows_of(tmp_path)]
    assert losses[0] > 3 * losses[-1]
    assert losses[-1] < 0.2
    fresh, labels = next(MemoryLoader(loader.images, 24, PLAIN, 0).epoch(0))
    backbone = load_backbone(tmp_path / BACKBONE, build_backbone("conv4", 1))
    assert not backbone.training
    assert (model.head(backbone(fresh)).argmax(1) == labels).float().mean() > 0.9


def test_bf16_differs_from_fp32_and_stays_near(tmp_path: Path, loader: MemoryLoader) -> None:
    full = run(tmp_path / "full", loader, epochs=1, learning_rate=0.01)[0]["loss"]
    half = run(tmp_path / "half", loader, epochs=1, learning_rate=0.01, precision="bf16")[0]["loss"]
    assert half != full
    assert half == pytest.approx(full, rel=0.03)


def test_what_is_left_and_what_is_logged(tmp_path: Path, loader: MemoryLoader) -> None:
    rows = run(tmp_path, loader, validate=lambda backbone: 0.5, validate_every=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == [BACKBONE, METRICS]
    assert [row["epoch"] for row in rows] == [1, 2, 3]
    assert ["val_accuracy" in row for row in rows] == [False, True, True]
    assert [row["learning_rate"] for row in rows] == pytest.approx([0.1, 0.01, 0.01])
    assert all(json.dumps(row) for row in rows)


def test_cosine_goes_to_zero(tmp_path: Path, loader: MemoryLoader) -> None:
    rates = [row["learning_rate"] for row in run(tmp_path, loader, decay="cosine", epochs=4)]
    assert rates == pytest.approx([0.05 * (1 + math.cos(math.pi * epoch / 4)) for epoch in (1, 2, 3, 4)], abs=1e-9)


def test_the_loader_may_be_anyone_s(tmp_path: Path, loader: MemoryLoader) -> None:
    handwritten = Handwritten(batches_of(loader)[:2])
    assert len(run(tmp_path, handwritten)) == EPOCHS
    assert handwritten.epochs == [0, 1, 2]


class Accuracies:
    """Validation with the given outcomes; keeps the weights it was shown."""

    def __init__(self, *outcomes: float | type[BaseException]) -> None:
        self.outcomes, self.shown = list(outcomes), []

    def __call__(self, backbone: nn.Module) -> float:
        self.shown.append({key: value.clone() for key, value in backbone.state_dict().items()})
        outcome = self.outcomes[len(self.shown) - 1]
        if isinstance(outcome, type):
            raise outcome
        return outcome


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize(("outcomes", "best"), [((0.3, 0.6, 0.5), 1), ((0.7, 0.6, 0.5), 0), ((0.2, 0.3, 0.4), 2), ((0.0, 0.0, 0.0), 2)])
def test_the_best_validated_weights_are_kept(tmp_path: Path, loader: MemoryLoader, outcomes: tuple[float, ...], best: int) -> None:
    accuracies = Accuracies(*outcomes)
    rows = run(tmp_path, loader, accuracies)
    assert [row["val_accuracy"] for row in rows] == list(outcomes)
    kept = {key.removeprefix("backbone."): value for key, value in load_file(tmp_path / BACKBONE).items()}
    assert [same(kept, shown) for shown in accuracies.shown] == [index == best for index in range(3)]


def test_weights_that_were_not_validated_are_not_kept(tmp_path: Path, loader: MemoryLoader) -> None:
    accuracies = Accuracies(0.0, KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, loader, accuracies, validate_every=2, epochs=4)
    kept = load_file(tmp_path / BACKBONE)
    assert same({f"backbone.{key}": value for key, value in accuracies.shown[0].items()}, kept)


class SomeAccuracy:
    """Some figure that depends on the weights; dies in the given call."""

    def __init__(self, dies_in: int | None = None) -> None:
        self.dies_in, self.calls = dies_in, 0

    def __call__(self, backbone: nn.Module) -> float:
        self.calls += 1
        if self.calls == self.dies_in:
            raise KeyboardInterrupt
        return abs(float(next(iter(backbone.parameters())).detach().sum())) % 1


OTHER_OPTIONS = {"precision": "bf16", "decay": "cosine", "rotation_weight": 0.5, "label_smoothing": 0.1, "validate_every": 2}


@pytest.mark.parametrize(
    ("options", "fail_at", "dies_in", "resumed_at"),
    [
        pytest.param({}, (0, 1), None, 0, id="before the first checkpoint"),
        pytest.param({}, (1, 1), None, 1, id="in an epoch"),
        pytest.param({}, None, 2, 1, id="in a validation"),
        pytest.param({}, None, 3, 2, id="in the last validation"),
        pytest.param(OTHER_OPTIONS, (1, 0), None, 1, id="other options, in an epoch"),
        pytest.param(OTHER_OPTIONS, None, 2, 2, id="other options, in the last validation"),
    ],
)
def test_a_killed_run_continues_to_the_same_bits(
    tmp_path: Path, loader: MemoryLoader, options: dict[str, Any], fail_at: tuple[int, int] | None, dies_in: int | None, resumed_at: int
) -> None:
    batches = batches_of(loader)[:2]
    whole = run(tmp_path / "whole", Handwritten(batches), SomeAccuracy(), **options)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "killed", Handwritten(batches, fail_at), SomeAccuracy(dies_in), **options)
    again = Handwritten(batches)
    assert run(tmp_path / "killed", again, SomeAccuracy(), **options) == whole
    assert again.epochs == list(range(resumed_at, EPOCHS))
    assert (tmp_path / "killed" / BACKBONE).read_bytes() == (tmp_path / "whole" / BACKBONE).read_bytes()
    assert sorted(path.name for path in (tmp_path / "killed").iterdir()) == [BACKBONE, METRICS]


def test_a_kill_before_the_checkpoint_repeats_no_row(tmp_path: Path, loader: MemoryLoader, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run(tmp_path / "whole", loader, SomeAccuracy())

    def dying(checkpoints: Checkpoints, step: int, state: dict[str, Any]) -> None:
        if step == 2:
            raise KeyboardInterrupt
        save(checkpoints, step, state)

    save = Checkpoints.save
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):  # noqa: PT012
        patch.setattr(Checkpoints, "save", dying)
        run(tmp_path / "killed", loader, SomeAccuracy())
    assert rows_of(tmp_path / "killed") == whole[:2]
    assert run(tmp_path / "killed", loader, SomeAccuracy()) == whole
    assert (tmp_path / "killed" / BACKBONE).read_bytes() == (tmp_path / "whole" / BACKBONE).read_bytes()


def test_a_killed_run_keeps_the_best_of_before(tmp_path: Path, loader: MemoryLoader) -> None:
    accuracies = Accuracies(0.9, 0.3, KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, loader, accuracies)
    assert len(run(tmp_path, loader, Accuracies(0.8))) == EPOCHS
    assert same({f"backbone.{key}": value for key, value in accuracies.shown[0].items()}, load_file(tmp_path / BACKBONE))


@pytest.mark.parametrize(("damaged", "resumed_at"), [((), 3), ((3,), 2), ((2, 3), 0)])
def test_a_damaged_checkpoint_changes_nothing_but_the_time(
    tmp_path: Path, images: ImageSet, capfd: pytest.CaptureFixture, damaged: tuple[int, ...], resumed_at: int
) -> None:
    batches = batches_of(MemoryLoader(images, 6, PLAIN, seed=0))[:2]
    whole = run(tmp_path / "whole", Handwritten(batches), SomeAccuracy(), epochs=4)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "killed", Handwritten(batches, (3, 1)), SomeAccuracy(), epochs=4)
    for epoch in damaged:
        path = tmp_path / "killed" / f"{CHECKPOINT}-{epoch}.safetensors"
        path.write_bytes(path.read_bytes()[:1000])
    again = Handwritten(batches)
    assert run(tmp_path / "killed", again, SomeAccuracy(), epochs=4) == whole
    assert again.epochs == list(range(resumed_at, 4))
    assert ("unfinished or damaged" in capfd.readouterr().err) == bool(damaged)
    assert (tmp_path / "killed" / BACKBONE).read_bytes() == (tmp_path / "whole" / BACKBONE).read_bytes()
    assert sorted(path.name for path in (tmp_path / "killed").iterdir()) == [BACKBONE, METRICS]


def test_each_row_is_logged_once_it_is_written(tmp_path: Path, loader: MemoryLoader) -> None:
    logged: list[tuple[int, dict[str, Any]]] = []
    pretrain(classifier(), loader, settings(), tmp_path, CPU, None, log=lambda epoch, row: logged.append((epoch, row)))
    assert logged == list(enumerate(read_rows(tmp_path / METRICS), 1))


def test_a_batch_that_cannot_be_shared_is_a_user_error(tmp_path: Path, loader: MemoryLoader) -> None:
    with pytest.raises(UserError, match=r"pretrain.batch_size=6: cannot be shared equally by 4 workers; .*multiple of 4.*ray.num_workers"):
        pretrain(classifier(), loader, settings(), tmp_path, CPU, None, ranks=Ranks(0, 4))
    assert list(tmp_path.iterdir()) == []


def test_loss_with_all_its_options_equals_the_formula() -> None:
    model, generator = classifier().eval(), torch.Generator().manual_seed(0)
    images, labels = torch.randn(4, 3, SIZE, SIZE, generator=generator), torch.tensor([0, 1, 2, 2])
    turned = [torch.rot90(images, turns, (2, 3)) for turns in range(4)]
    logits = torch.stack([model.head(model.backbone(each)) for each in turned]).log_softmax(-1)
    true, uniform = logits.gather(2, labels.expand(4, 4)[..., None])[..., 0], logits.mean(-1)
    turn_logits = torch.stack([model.rotation_head(model.backbone(each)) for each in turned]).log_softmax(-1)
    turns = -torch.stack([turn_logits[turn, :, turn] for turn in range(4)]).mean()
    torch.testing.assert_close(model(images, labels, 0.0, 0.0), -true[0].mean())
    torch.testing.assert_close(model(images, labels, 0.1, 0.0), -(0.9 * true[0] + 0.1 * uniform[0]).mean())
    torch.testing.assert_close(model(images, labels, 0.1, 0.5), -(0.9 * true + 0.1 * uniform).mean() + 0.5 * turns)


@pytest.mark.parametrize("options", [{"label_smoothing": 0.1}, {"rotation_weight": 1.0}])
def test_options_change_the_training(tmp_path: Path, loader: MemoryLoader, options: dict[str, Any]) -> None:
    plain = run(tmp_path / "plain", loader, epochs=1)[0]["loss"]
    assert run(tmp_path / "option", loader, epochs=1, **options)[0]["loss"] > plain + 0.05


@pytest.mark.parametrize(("value", "loss"), [(math.nan, "nan"), (math.inf, "nan")])
def test_a_loss_that_is_not_finite_is_a_user_error(tmp_path: Path, loader: MemoryLoader, value: float, loss: str) -> None:
    images, labels = batches_of(loader)[0]
    with pytest.raises(UserError, match=rf"pretrain: the loss is {loss} in epoch 1; lower pretrain.learning_rate"):
        run(tmp_path, Handwritten([(images * value, labels)]))
    assert not (tmp_path / BACKBONE).exists()


def test_an_infinite_loss_is_a_user_error(tmp_path: Path, loader: MemoryLoader) -> None:
    model = classifier()
    model.forward = lambda *_: nn.Parameter(torch.tensor(math.inf))  # type: ignore[method-assign]
    with pytest.raises(UserError, match="pretrain: the loss is inf in epoch 1"):
        pretrain(model, loader, settings(), tmp_path, CPU, None)


def test_weights_of_another_backbone_are_a_user_error(tmp_path: Path, loader: MemoryLoader) -> None:
    run(tmp_path, loader, epochs=1)
    with pytest.raises(UserError, match=r"not weights of ResNet12 \(.*\); expected what pretrain left for it") as caught:
        load_backbone(tmp_path / BACKBONE, build_backbone("resnet12", 0))
    assert "\n" not in str(caught.value)


def test_heads_come_from_the_seed_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("the GPU's global generator was seeded"))
    torch.default_generator.manual_seed(1)
    state, backbone = torch.get_rng_state(), build_backbone("conv4", 0)
    first = Classifier(backbone, 64, CLASSES, 3)
    assert torch.equal(torch.get_rng_state(), state)
    torch.default_generator.manual_seed(2)
    assert torch.equal(first.head.weight, Classifier(backbone, 64, CLASSES, 3).head.weight)
    assert not torch.equal(first.head.weight, Classifier(backbone, 64, CLASSES, 4).head.weight)


@pytest.mark.parametrize("option", [{"batch_size": 1}, {"epochs": 0}, {"learning_rate": 0}, {"label_smoothing": 1}, {"momentum": 1}])
def test_impossible_options_are_refused(option: dict[str, float]) -> None:
    with pytest.raises(UserError, match=f"{next(iter(option))}="):
        validate(PretrainConfig, option, "c.yaml")
