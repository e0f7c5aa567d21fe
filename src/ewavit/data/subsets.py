"""Which samples of a training set a run trains on, and which others it may be evaluated on."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ewavit.data.arrays import Ints
from ewavit.data.batches import entropy
from ewavit.data.options import DataOptions
from ewavit.errors import EwavitError

DRAW = int.from_bytes(b"draw", "big")  # no epoch has this number, whose order is drawn from (seed, epoch)


def split(
    count: int, options: DataOptions, labels: Callable[[], Ints] | None = None
) -> tuple[Ints, Ints | None]:
    """Split the training samples of a set.

    Args:
        count: number of training samples.
        options: `limit`, `shots`, `resample`, `test_on_rest`, `holdout`, `fold` and `seed`.
        labels: gives the classes of the samples, (samples,); None where a sample has no single class.

    Returns:
        The indices to train on, and those to evaluate on; None for the evaluation set.

    Raises:
        EwavitError: a side would be empty, or too few classes or samples of a class are left.
    """
    chosen = choose(count, options, labels)
    if options.test_on_rest:
        rest = np.setdiff1d(np.arange(count), chosen)
        if not len(rest):
            raise EwavitError(f"test_on_rest has no rest: all {count} training samples are trained on")
        return chosen, rest
    if not options.holdout:
        return chosen, None
    first, end = bounds(len(chosen), options)
    if not 0 < end - first < len(chosen):
        raise EwavitError(
            f"holdout {options.holdout} of {len(chosen)} training samples leaves one side empty: change it"
        )
    order = np.random.default_rng(0).permutation(len(chosen))
    held = np.zeros(len(chosen), bool)
    held[order[first:end]] = True
    return chosen[~held], chosen[held]


def bounds(count: int, options: DataOptions) -> tuple[int, int]:
    """The first and the end of the share that `options.fold` holds out of so many shuffled samples."""
    return round(options.holdout * count * options.fold), round(options.holdout * count * (options.fold + 1))


def choose(count: int, options: DataOptions, labels: Callable[[], Ints] | None = None) -> Ints:
    """The training samples that `limit` or `shots` leave; arguments as of `split`.

    They are the first ones; `limit` takes a set stored class by class from each class in turn. With
    `resample` they are drawn from the seed alone, so that runs of one seed share them.
    """
    limit, shots, order = options.limit, options.shots, np.arange(count)
    if limit is None and shots is None:
        return order
    if options.resample:
        order = np.random.default_rng(entropy(options.seed, DRAW)).permutation(count)
    if labels is None:
        if shots is not None:
            raise EwavitError(f"shots {shots} needs samples of one class each: give limit instead")
        return order[:limit] if not options.resample else np.sort(order[:limit])
    classes = labels()
    by_class = np.argsort(classes[order], kind="stable")
    _, starts, sizes = np.unique(classes[order][by_class], return_index=True, return_counts=True)
    if shots is not None:
        if sizes.min() < shots:
            raise EwavitError(f"shots {shots} is more than the {sizes.min()} samples of a class: give fewer")
        place = np.arange(count) - np.repeat(starts, sizes)
        return np.sort(order[by_class[place < shots]])
    if not options.resample and (np.diff(classes) >= 0).all():
        order = np.lexsort((classes, order - np.repeat(starts, sizes)))
    chosen = np.sort(order[:limit]) if options.resample else order[:limit]
    if len(np.unique(classes[chosen])) < 2:
        raise EwavitError(f"limit {limit} leaves one class only: raise it")
    return chosen
