"""What the conversion of a crop will read and write, from its geometry alone: no voxel and no file is looked at.

The choices are those of the conversion, by the same functions; it can differ only where chunks of the chosen EM level
are not on disk (`em.choose_level`). Axis order is (z, y, x), lengths are in nm.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from cellmap_pipe.errors import BudgetError, GeometryError
from cellmap_pipe.geometry import Lattice, Shape3, Vec3, nearest_level, shape3, vec3
from cellmap_pipe.prepare.resample import axis_weights

Box = tuple[Shape3, Shape3]  # first voxel, and the one after the last


@dataclass(frozen=True)
class CropPlan:
    """How a crop comes to a grid.

    level, em: number and lattice of the EM level that is read. label: lattice of the class arrays. em_factors,
    label_factors: target voxel / source voxel; below 1 the source is upsampled. target: the voxels of image and label
    map. stored: the same with the EM context that the training store keeps. em_box: voxels of the EM level that
    `stored` draws on. em_inside: share of the label box that lies inside the EM.
    """

    level: int
    em: Lattice
    label: Lattice
    em_factors: Vec3
    label_factors: Vec3
    target: Lattice
    stored: Lattice
    em_box: Box
    em_inside: float

    @property
    def image_bytes(self) -> int:
        """Bytes of the uint8 image, context included."""
        return self.stored.voxels

    @property
    def label_bytes(self) -> int:
        """Bytes of the label map, as large as the image; twice that if its state table needs uint16."""
        return self.stored.voxels

    @property
    def em_bytes_read(self) -> int:
        """Bytes of EM voxels that are read, uncompressed; whole chunks are a little more."""
        return math.prod(hi - lo for lo, hi in zip(*self.em_box, strict=True))

    @property
    def label_bytes_read(self) -> int:
        """Bytes that are read of each class array, uncompressed, if it is uint8: all of its voxels, to count them."""
        return self.label.voxels


def plan_crop(
    em_levels: Sequence[Lattice],
    label: Lattice,
    voxel_nm: Vec3 | None,
    *,
    max_upsample: float,
    context_nm: float = 0,
) -> CropPlan:
    """Return how a crop is converted to voxels of `voxel_nm` (z, y, x; None: its label voxel, the native grid).

    em_levels: levels of the EM that are on disk, in any order. label: lattice of the label arrays. max_upsample: bound
    on the upsampling of EM and labels. context_nm: EM that the training store keeps round the label box.
    Raises GeometryError with the reason if there is no such conversion: EM too coarse, labels too coarse, or the label
    box outside the EM.
    """
    target = target_lattice(label, voxel_nm)
    level = nearest_level(em_levels, target.voxel_nm, max_upsample)
    em = em_levels[level]
    check_label_voxel(label, target, max_upsample)
    finest = min(em_levels, key=lambda lattice: math.prod(lattice.voxel_nm))
    em_inside = label.overlap_fraction(finest)
    if em_inside == 0:
        raise GeometryError(
            f"outside EM: the label box from {_nm(label.lower_nm)} to {_nm(label.upper_nm)} nm does not touch the EM, "
            f"which reaches from {_nm(finest.lower_nm)} to {_nm(finest.upper_nm)} nm"
        )
    stored, _ = grown_box(target, em, context_nm)
    return CropPlan(
        level=level,
        em=em,
        label=label,
        em_factors=_ratios(target, em),
        label_factors=_ratios(target, label),
        target=target,
        stored=stored,
        em_box=_drawn_on(em, stored),
        em_inside=em_inside,
    )


def target_lattice(label: Lattice, voxel_nm: Vec3 | None) -> Lattice:
    """Return the voxels of `voxel_nm` over the label box; None: those of the labels."""
    return label if voxel_nm is None else Lattice.covering(label.lower_nm, label.upper_nm, voxel_nm)


def check_label_voxel(label: Lattice, target: Lattice, max_upsample: float) -> None:
    """Raise GeometryError if labels would be upsampled more than `max_upsample` times to the target's voxel."""
    factor = max(v / t for v, t in zip(label.voxel_nm, target.voxel_nm, strict=True))
    if factor > max_upsample * (1 + 1e-6):
        raise GeometryError(
            f"labels of {'x'.join(f'{v:g}' for v in label.voxel_nm)} nm would be upsampled {factor:.2f} "
            f"times; raise max_upsample (now {max_upsample:g}) or use a coarser grid"
        )


def check_budget(target: Lattice, context_nm: float, max_train_gb: float | None) -> None:
    """Raise BudgetError if image and label map on `target` take more than `max_train_gb` (10^9 bytes; None = no limit).

    Both are counted with a byte per voxel and as much EM context as there can be.
    """
    need = 2 * grown_box(target, None, context_nm)[0].voxels
    if max_train_gb is not None and need > max_train_gb * 1e9:
        shape = "x".join(map(str, target.shape))
        raise BudgetError(
            f"image and labels of {shape} voxels take {need / 1e9:.3g} GB with their context, quality.max_train_gb is "
            f"{max_train_gb:g}; raise it, or leave this crop to a coarser grid"
        )


def grown_box(box: Lattice, em: Lattice | None, context_nm: float) -> tuple[Lattice, Shape3]:
    """Return `box` grown by `context_nm`, rounded up to whole voxels, and the voxel of it where `box` begins.

    It grows no further than `em` reaches with whole voxels (None: as far as it likes), and never shrinks.
    """
    wanted = [math.ceil(context_nm / v - 1e-6) for v in box.voxel_nm]
    before, after = list(wanted), list(wanted)
    if em is not None:
        room = [(lo - reach) / v for lo, reach, v in zip(box.lower_nm, em.lower_nm, box.voxel_nm, strict=True)]
        before = [max(0, min(w, math.floor(r + 1e-6))) for w, r in zip(wanted, room, strict=True)]
        room = [(reach - hi) / v for hi, reach, v in zip(box.upper_nm, em.upper_nm, box.voxel_nm, strict=True)]
        after = [max(0, min(w, math.floor(r + 1e-6))) for w, r in zip(wanted, room, strict=True)]
    return box.padded(before, after), shape3(before)


def _drawn_on(em: Lattice, target: Lattice) -> Box:
    """Return the EM voxels that the target's draw on: from those of its first voxel to those of its last."""
    first, last = target.window([0, 0, 0], [1, 1, 1]), target.window([n - 1 for n in target.shape], [1, 1, 1])
    lower, upper = ([axis_weights(em, end, axis) for axis in range(3)] for end in (first, last))
    return shape3([weights.start for weights in lower]), shape3([weights.stop for weights in upper])


def _ratios(target: Lattice, source: Lattice) -> Vec3:
    return vec3([t / v for t, v in zip(target.voxel_nm, source.voxel_nm, strict=True)])


def _nm(corner: Vec3) -> str:
    return "x".join(f"{v:g}" for v in corner)
