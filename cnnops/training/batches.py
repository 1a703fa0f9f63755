"""Which images make up which batch: a function of seed, step and process alone.

No generator has a state that a checkpoint would have to keep: a run that goes on from step 1000 sees what an
uninterrupted one sees from there.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from cnnops.data import Split
from cnnops.data.augment import Augmentation

Batch = tuple[Tensor, Tensor]
"""Images float32 ``B x C x H x W``, labels int64 ``B``."""


def mixed(*numbers: int) -> int:
    """A seed that is decided by all of the numbers, from 0 to 2**63 - 1."""
    digest = hashlib.sha256(repr(numbers).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


class ShuffledBatches(Dataset[Batch]):
    """Item `step`, from 0 over all epochs, is that step's batch, or one process's even part of it.

    Every epoch goes through the images in an order of its own. The last images, too few for a batch, are
    left out: other ones in every epoch. Fewer images than a batch are one batch.
    """

    def __init__(
        self, split: Split, batch: int, seed: int, change: Augmentation, rank: int = 0, world: int = 1
    ) -> None:  # fmt: skip
        self.split, self.seed, self.change = split, seed, change
        self.batch = min(batch, len(split) // world * world)
        self.rank, self.part = rank, self.batch // world
        self.an_epoch = len(split) // self.batch
        """Steps an epoch."""
        self._epoch, self._order = -1, torch.empty(0)

    def __getitem__(self, step: int) -> Batch:
        epoch, place = divmod(step, self.an_epoch)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(mixed(self.seed, epoch))
            self._epoch, self._order = epoch, torch.randperm(len(self.split), generator=generator)
        first = place * self.batch + self.rank * self.part
        chosen = self._order[first : first + self.part]
        images = self.change(self.split.images(chosen), self.seed, epoch, chosen)
        return images, self.split.labels[chosen]

    def since(self, step: int, steps: int, workers: int, pinned: bool) -> Iterator[Batch]:
        """The batches from `step` to before `steps`, prepared ahead by so many processes."""
        return _loaded(self, range(step, steps), workers, pinned)


class OrderedBatches(Dataset[Batch]):
    """The images in their order, every `world`-th from `rank` on, in batches; the last one may be smaller."""

    def __init__(self, split: Split, batch: int, rank: int = 0, world: int = 1) -> None:
        self.split = split
        self.parts = torch.arange(rank, len(split), world).split(batch)

    def __getitem__(self, index: int) -> Batch:
        chosen = self.parts[index]
        return self.split.images(chosen), self.split.labels[chosen]

    def all(self, workers: int = 0, pinned: bool = False) -> Iterator[Batch]:
        return _loaded(self, range(len(self.parts)), workers, pinned)


def _loaded(batches: Dataset[Batch], chosen: range, workers: int, pinned: bool) -> Iterator[Batch]:
    # batch_size=None: an item is a batch already.
    loader = DataLoader(
        batches, batch_size=None, sampler=chosen, num_workers=workers, pin_memory=pinned,
        worker_init_fn=_start_worker,
    )  # fmt: skip
    return iter(loader)


def _start_worker(_: int) -> None:
    """Ctrl-C reaches every process of the terminal: the one that trains decides what it means."""
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)
