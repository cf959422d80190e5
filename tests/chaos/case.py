"""One store that is to come out like the undisturbed one, and what is done to it on the way."""

import json
import random
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from shutil import copytree
from subprocess import CompletedProcess
from typing import Any

from tests.chaos.commands import NUM_BLOCKS, Fit, python, wait_until
from tests.chaos.ledger import Ledger
from tests.chaos.places import Place, blocks, contents, shard_name

_MOST_CASES = 6
ARRAYS = ("targets.npy", "classes.npy", "diagnostics.npy")


@dataclass(frozen=True)
class Reference:
    """What comes of it if it is left alone.

    Attributes:
        config: the configuration.
        run: a run's folder with all that fitting needs.
        store: the files of the store, by name.
        artifact: the files of the artifact that depend on the store.
    """

    config: Path
    run: Path
    store: Mapping[str, bytes]
    artifact: Mapping[str, bytes]


@dataclass
class Case:
    """A store under attack.

    Attributes:
        rng: draws moments, victims and places.
        place: where the store is.
        environment: of the commands.
        options: of all commands.
    """

    folder: Path
    rng: random.Random
    ledger: Ledger
    reference: Reference
    place: Place
    environment: Mapping[str, str]
    options: Sequence[str] = ()
    hits: Counter[str] = field(default_factory=Counter)
    fits: list[Fit] = field(default_factory=list)
    on_exit: ExitStack = field(default_factory=ExitStack)

    def fit(self, *options: str) -> Fit:
        """A run of its own on the store, not started yet."""
        run = self.folder / f"{len(self.fits)}" / "tiny"
        copytree(self.reference.run, run)
        fit = Fit(run, [str(self.reference.config), *self.place.options, *self.options, *options], self.environment)
        self.fits.append(fit)
        self.on_exit.callback(fit.close)
        return fit

    def hit(self, kind: str, count: int = 1) -> None:
        """A fault was seen to hit."""
        self.hits[kind] += count
        self.ledger.open[kind] += count

    def wait_for_commits(self, fit: Fit, count: int) -> bool:
        """Return when there are so many more; False if the fit comes to its end first."""
        before = len(blocks(self.place))
        wait_until(lambda: len(blocks(self.place)) >= before + count or not fit.running, "commits")
        return fit.running and self.left() > 0

    def left(self) -> int:
        """How many blocks have yet to be committed."""
        return NUM_BLOCKS - len(blocks(self.place))

    def fill(self, num_left: int) -> None:
        """Put the identity and all but so many shards there, as if a fit had been interrupted."""
        absent = set(self.rng.sample(range(NUM_BLOCKS), num_left))
        for name, content in self.reference.store.items():
            if name not in map(shard_name, absent):
                self.place.write(name, content)

    def pause(self, seconds: float) -> None:
        """Until a moment drawn from the seed, so many seconds away at most."""
        time.sleep(self.rng.uniform(0, seconds))

    def check_what_is_there(self) -> None:
        """What has been committed so far is what it is to be at the end."""
        wrong = [name for name, content in contents(self.place).items() if self.reference.store.get(name) != content]
        assert not wrong, f"{wrong}: other bytes than the undisturbed store's"

    def prove(self) -> None:
        """The store, and what the runs made of it, are those of the reference, to the byte."""
        self.check_what_is_there()
        assert set(self.place.names()) == set(self.reference.store), "nothing lost, nothing more"
        for fit in self.fits:
            assert fit.said, "every run has been started"
            assert artifact(fit.folder) == self.reference.artifact
        verified = self.verify()
        assert verified.returncode == 0, verified.stderr
        self.ledger.close(self.hits)
        self.hits = Counter()

    def verify(self) -> CompletedProcess[str]:
        """`python -m distributed.store verify`."""
        url, *rest = [option.partition("=")[2] for option in self.place.options]
        return python("-m", "distributed.store", "verify", url, *(["--endpoint-url", *rest] if rest else []), environment=self.environment)


def artifact(run: Path) -> dict[str, bytes]:
    """The run's finished targets."""
    folder = run / "fit_targets" / "stable"
    assert json.loads((folder / "manifest.json").read_text())["stage"] == "fit_targets"
    return {name: (folder / name).read_bytes() for name in ARRAYS}


def summary(fit: Fit) -> dict[str, Any]:
    """What the command's last start counted."""
    return json.loads((fit.folder / "fit_targets" / "stable.summary.json").read_text())


NewCase = Callable[..., Case]
"""Makes a case: in a new folder unless a `place` is given."""


def besiege(new_case: NewCase, attack: Callable[[Case, Fit], None], kind: str, wanted: int) -> Case:
    """Let runs be attacked, one after the other on a store of its own, until the fault has hit often enough; returns the last case.

    `attack` returns when it is enough or the run has come to its end.
    """
    for _ in range(_MOST_CASES):
        case = new_case()
        fit = case.fit().start()
        attack(case, fit)
        fit.finish()
        case.prove()
        if case.ledger.hits(kind) >= wanted:
            return case
    raise AssertionError(f"{kind}: hits too seldom")
