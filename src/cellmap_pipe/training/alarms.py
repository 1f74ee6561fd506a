"""What a training warns of once, because it wastes its time or a class: in the log, of a class in metrics.json."""

import logging
from collections.abc import Iterable, Sequence

from cellmap_pipe.training.sampling import Patches

logger = logging.getLogger(__name__)

# Every n-th step is looked at for positive voxels; a class drawn for one patch in a hundred is in 500 of them but with
# a probability of 1 in 150.
LOOK_EVERY = 10
ENOUGH_PATCHES = 500

# A device that waits for data for a larger share of the time is worth the user's while.
MOST_WAITING = 0.3


class Alarms:
    """The alarms of one training, by what they are about. quiet: this rank keeps them but leaves the log to the first.

    raised: those of an earlier process of the same training, which are not logged again; changed in place.
    """

    def __init__(self, raised: dict[str, str], *, quiet: bool = False) -> None:
        self.raised = raised
        self.quiet = quiet
        self._waited = False

    def raise_once(self, about: str, message: str) -> None:
        """Log the message and keep it, unless there was an alarm about the same before."""
        if about not in self.raised:
            self.raised[about] = message
            if not self.quiet:
                logger.warning("%s", message)

    def without_positives(self, patches: Patches, classes: Iterable[str]) -> None:
        """Look at what the store counted: a class without a positive voxel in any training crop is never learned."""
        for name in classes:
            counts = [patches.counts(crop, name) for crop in range(len(patches.crops))]
            if not any(positive for _, positive in counts):
                annotated = sum(known > 0 for known, _ in counts)
                self.raise_once(
                    f"class {name}",
                    f"class {name} is positive in no training crop of the fold (annotated in {annotated} of them), so "
                    "it is not learned: leave it out of the model's classes, or train on another fold",
                )

    def never_seen(self, classes: Sequence[str], positives: Sequence[int], looked_at: int) -> None:
        """Look at how many positive voxels each class had in the `looked_at` patches that were counted."""
        if looked_at >= ENOUGH_PATCHES:
            for name, positive in zip(classes, positives, strict=True):
                if not positive:
                    self.raise_once(
                        f"class {name}",
                        f"class {name} had no positive voxel in {ENOUGH_PATCHES} patches: raise "
                        "train.centred_fraction or lower train.class_power",
                    )

    def waiting(self, share: float) -> None:
        """Look at the share of the last interval in which the device waited for data.

        For the log alone, once per process: nothing of the clock reaches a result.
        """
        if share > MOST_WAITING and not (self._waited or self.quiet):
            self._waited = True
            logger.warning(
                "the device waits for data more than %.0f %% of the time: give the job more cores "
                "(resources.train.threads), a faster disk or fewer kinds of train.augment",
                100 * MOST_WAITING,
            )
