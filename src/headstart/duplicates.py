"""Which pictures are copies: equal pixels, or the same picture re-encoded, resized, mirrored, cropped or recoloured.

Exact copies have equal decoded pixels. Near copies are looked for in two steps. Candidates are the nearest neighbours
of each picture's coarse version, of its mirror image and of a few crops of both, among the coarse versions of all.
Each candidate is then aligned: the crop of one that fits the other best, or else the other way round, is found by
Gauss-Newton steps on small grey pictures. What decides is the correlation of their local contrast, which brightness,
contrast and colour do not touch, and in which pictures that merely look alike do not agree. Perceptual hashes alone
lose cropped copies.
Reference for the alignment: Lucas and Kanade 1981.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]
Thumbs = npt.NDArray[np.uint8] | Sequence[npt.NDArray[np.uint8]]
Level = Callable[[Ints], Floats]
"""Local contrast of the pictures at these places, coarse or fine."""

COARSE_PX = 16
NEIGHBOURS = 3
COMPARED_AT_ONCE = 512
EXACT_UP_TO = 10_000  # pictures that are all compared with each other
PROBES = 16  # cells beyond that
CANDIDATE = 0.4  # correlation of coarse pictures from which a pair is aligned
LARGEST_CROP = 0.14  # of a side, in all
STEPS, LARGEST_MOVE = 4, 0.03  # Gauss-Newton steps a level, and the most a side of the crop moves in one, as a share
HOPELESS = 0.6  # correlation below which a pair is given up
ALIGNED_AT_ONCE = 256
INNER = 0.6  # the least correlation without the outer fifth all round, in which framed pictures are alike
SAME = 0.8  # correlation of local contrast after the alignment from which a pair counts as one picture
MIN_SPREAD = 4.0  # grey levels: below it a picture is blank, and correlation is noise


@dataclass(frozen=True)
class Pair:
    """Two pictures (positions in the table, a < b) that show the same; `score` is 1 for equal pixels."""

    a: int
    b: int
    score: float
    exact: bool
    mirrored: bool = False


def exact_pairs(digests: Sequence[bytes]) -> list[Pair]:
    """Each later copy beside the first picture with its pixels; empty digests (unreadable files) are left out."""
    first: dict[bytes, int] = {}
    pairs = []
    for i, digest in enumerate(digests):
        if digest and (a := first.setdefault(digest, i)) != i:
            pairs.append(Pair(a, i, 1.0, exact=True))
    return pairs


def near_pairs(thumbs: Thumbs, *, leave_out: Sequence[int] = ()) -> list[Pair]:
    """Pairs of near copies among N small grey pictures, each once.

    Args:
        thumbs: an array uint8 [N, P, P], or N of [P, P], which are then not put together.
        leave_out: positions not to look at, such as unreadable files and the second of two exact copies.
    """
    every = np.setdiff1d(np.arange(len(thumbs)), leave_out)
    where = every[np.concatenate([[], *(part.std(axis=(1, 2)) >= MIN_SPREAD for part in _parts(thumbs, every))]) > 0]
    if len(where) < 2:
        return []
    px = len(thumbs[0]) // 2
    coarse = np.empty((len(where), px, px), dtype=np.float32)
    for number, part in enumerate(_parts(thumbs, where)):
        start = number * COMPARED_AT_ONCE
        coarse[start : start + len(part)] = _local_contrast(_sample(part, _BOXES[0], px), 0.7, 2.5)

    def fine(places: Ints) -> Floats:  # of the few that are compared so far, when they are
        return _local_contrast(_in_floats(thumbs, where[places]), 0.7, 3.0)

    a, b, view = _candidates(coarse)
    scores = _align((lambda places: coarse[places], fine), a, b, view)
    pairs = []
    for i in np.flatnonzero(scores >= SAME):
        first, second = sorted((int(where[a[i]]), int(where[b[i]])))
        pairs.append(Pair(first, second, float(scores[i]), exact=False, mirrored=bool(view[i] >= len(_BOXES))))
    return sorted(pairs, key=lambda pair: (pair.a, pair.b))


def _parts(thumbs: Thumbs, places: Ints) -> Iterator[Floats]:
    """The pictures at these places in floating point, some at a time: all at once they would take four times their
    memory."""
    for start in range(0, len(places), COMPARED_AT_ONCE):
        yield _in_floats(thumbs, places[start : start + COMPARED_AT_ONCE])


def _in_floats(thumbs: Thumbs, places: Ints) -> Floats:
    out = np.empty((len(places), *thumbs[0].shape), dtype=np.float32)
    for row, place in enumerate(places.tolist()):
        out[row] = thumbs[place]
    return out


def groups_of(n: int, pairs: Sequence[Pair]) -> npt.NDArray[np.int64]:
    """Group number per picture, int64 [n]: pictures joined by pairs, directly or in a chain, share one; -1 for none."""
    if not pairs:
        return np.full(n, -1, dtype=np.int64)
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    ends = np.array([(pair.a, pair.b) for pair in pairs], dtype=np.int64).reshape(-1, 2)
    graph = coo_array((np.ones(len(ends)), (ends[:, 0], ends[:, 1])), shape=(n, n))
    _, member = connected_components(graph, directed=False)
    sizes = np.bincount(member, minlength=1)
    names = np.full(len(sizes), -1, dtype=np.int64)
    names[sizes > 1] = np.arange(int((sizes > 1).sum()))
    return np.asarray(names[member])


# ---- candidates ------------------------------------------------------------------------------------------------

# The crops of a picture that are looked for: (left, top, width, height) as shares of its sides.
_BOXES = ((0.0, 0.0, 1.0, 1.0), (0.05, 0.05, 0.9, 0.9), *((x, y, 0.9, 0.9) for x in (0.0, 0.1) for y in (0.0, 0.1)))


def _candidates(contrast: Floats) -> tuple[Ints, Ints, Ints]:
    """Pairs (a, b) and the view of a, each int64 [M]: that crop of picture a, or of its mirror image from view
    `len(_BOXES)` on, looks like the whole of picture b. Each two pictures come once, in their likest view."""
    whole = _seen(contrast, 0)
    ends, views, correlations = [], [], []
    for view in range(2 * len(_BOXES)):
        neighbour, correlation = _nearest(_seen(contrast, view), whole)
        a, column = np.nonzero(correlation >= CANDIDATE)
        ends.append(np.stack([a, neighbour[a, column]], axis=1))
        views.append(np.full(len(a), view))
        correlations.append(correlation[a, column])
    a, b = np.concatenate(ends).T
    chosen = _likeliest(np.stack([a, b], axis=1), np.concatenate(correlations), len(whole))
    return a[chosen], b[chosen], np.concatenate(views)[chosen]


def _seen(contrast: Floats, view: int) -> Floats:
    """A view of each picture as a unit row, [N, COARSE_PX * COARSE_PX]."""
    out = np.empty((len(contrast), COARSE_PX**2), dtype=np.float32)
    for start in range(0, len(contrast), COMPARED_AT_ONCE):
        part = contrast[start : start + COMPARED_AT_ONCE]
        turned = part[:, :, ::-1] if view >= len(_BOXES) else part
        out[start : start + len(part)] = _unit(_sample(turned, _BOXES[view % len(_BOXES)], COARSE_PX))
    return out


def _nearest(rows: Floats, among: Floats) -> tuple[Ints, Floats]:
    """The nearest of each unit row [N, D] among others [K, D], `NEIGHBOURS` and one more (which may be itself), nearest
    first: positions and correlations, [N, n]. With many pictures nearly always the nearest: see `_nearest_in_cells`."""
    n = min(NEIGHBOURS + 1, len(among))
    if len(among) > EXACT_UP_TO:
        return _nearest_in_cells(rows, among, n)
    parts = [_largest(rows[i : i + COMPARED_AT_ONCE] @ among.T, n) for i in range(0, len(rows), COMPARED_AT_ONCE)]
    positions, correlations = (np.concatenate(column) for column in zip(*parts, strict=True))
    return positions, correlations


def _nearest_in_cells(rows: Floats, among: Floats, n: int) -> tuple[Ints, Floats]:
    """The same, looked for in a few cells alone, so that twice the pictures take not four times the time but less than
    three.

    Each picture of `among` belongs to the cell of the centre it is nearest to; a row is compared with those in the
    `PROBES` cells whose centres are nearest to it. Centres are pictures, about as many as a cell has members.
    """
    centres = among[np.sort(np.random.default_rng(0).choice(len(among), int(len(among) ** 0.5), replace=False))]
    home = _by_parts(among, lambda part: (part @ centres.T).argmax(axis=1))
    probes = min(PROBES, len(centres))
    asked = _by_parts(rows, lambda part: np.argpartition(-(part @ centres.T), probes - 1, axis=1)[:, :probes]).ravel()
    who = np.repeat(np.arange(len(rows)), probes)[np.argsort(asked, kind="stable")]
    members, cells = np.argsort(home, kind="stable"), np.arange(len(centres) + 1)
    ends, asked_ends = np.searchsorted(np.sort(home), cells), np.searchsorted(np.sort(asked), cells)
    positions = np.zeros((len(rows), n), dtype=np.int64)
    correlations = np.full((len(rows), n), -np.inf, dtype=np.float32)
    for cell in range(len(centres)):
        inside = members[ends[cell] : ends[cell + 1]]
        for start in range(asked_ends[cell], asked_ends[cell + 1], COMPARED_AT_ONCE):
            mine = who[start : min(start + COMPARED_AT_ONCE, asked_ends[cell + 1])]  # each row once at the most
            found, values = _largest(rows[mine] @ among[inside].T, min(n, len(inside)))
            known = np.concatenate([correlations[mine], values], axis=1)
            places = np.concatenate([positions[mine], inside[found]], axis=1)
            best = np.argsort(-known, axis=1, kind="stable")[:, :n]
            positions[mine] = np.take_along_axis(places, best, axis=1)
            correlations[mine] = np.take_along_axis(known, best, axis=1)
    return positions, correlations


def _by_parts(rows: Floats, make: Callable[[Floats], Ints]) -> Ints:
    return np.concatenate([make(rows[i : i + COMPARED_AT_ONCE]) for i in range(0, len(rows), COMPARED_AT_ONCE)])


def _largest(correlation: Floats, n: int) -> tuple[Ints, Floats]:
    """Columns and values of the n largest of each row [N, K], the largest first; the rows are used up."""
    positions, values = np.empty((len(correlation), n), dtype=np.int64), np.empty((len(correlation), n), np.float32)
    each = np.arange(len(correlation))
    for column in range(n):
        best = correlation.argmax(axis=1)
        positions[:, column], values[:, column] = best, correlation[each, best]
        correlation[each, best] = -np.inf
    return positions, values


def _likeliest(ends: Ints, correlation: Floats, n: int) -> Ints:
    """Rows of `ends` [M, 2], each two pictures once, that are among the `NEIGHBOURS` likeliest of one of the two.

    Pictures of one scheme (aligned faces) all look alike from afar; the bound keeps the work in proportion to `n`.
    """
    order = np.argsort(-correlation, kind="stable")
    low, high = np.sort(ends[order], axis=1).T
    first = np.sort(np.unique(low * n + high, return_index=True)[1])  # of each two pictures the likeliest row
    first = first[low[first] != high[first]]
    taken = [0] * n
    chosen = []
    for i, one, other in zip(order[first].tolist(), low[first].tolist(), high[first].tolist(), strict=True):
        if min(taken[one], taken[other]) < NEIGHBOURS:
            taken[one] += 1
            taken[other] += 1
            chosen.append(i)
    return np.array(chosen, dtype=np.int64)


def _unit(pictures: Floats) -> Floats:
    flat = pictures.reshape(len(pictures), -1)
    flat = flat - flat.mean(axis=1, keepdims=True)
    return np.asarray(flat / np.maximum(np.linalg.norm(flat, axis=1, keepdims=True), 1e-6), dtype=np.float32)


def _sample(pictures: Floats, box: tuple[float, float, float, float], px: int) -> Floats:
    """The crop `box` of each picture, averaged down to [N, px, px]."""
    rows = _averaging(pictures.shape[1], box[1], box[3], px)
    columns = _averaging(pictures.shape[2], box[0], box[2], px)
    return np.asarray(np.einsum("ij,njk,lk->nil", rows, pictures, columns, optimize=True))


def _averaging(size: int, start: float, length: float, px: int) -> Floats:
    """[px, size]: each row averages an equal part of the stretch, counting pixels by their share in it."""
    edges = size * (start + length * np.arange(px + 1) / px)
    low, high = edges[:-1, None], edges[1:, None]
    pixels = np.arange(size)[None]
    overlap = np.clip(np.minimum(high, pixels + 1) - np.maximum(low, pixels), 0, None)
    return np.asarray(overlap / overlap.sum(axis=1, keepdims=True), dtype=np.float32)


# ---- alignment -------------------------------------------------------------------------------------------------


def _local_contrast(pictures: Floats, fine_px: float, coarse_px: float) -> Floats:
    """Pictures [N, P, P] with their noise smoothed and without their coarse brightness, which unlike ones share."""
    smooth, blur = (_smoothing(pictures.shape[1], px) for px in (fine_px, coarse_px))
    fine = smooth @ pictures @ smooth.T
    return np.asarray(fine - blur @ fine @ blur.T)


def _smoothing(size: int, sigma_px: float) -> Floats:
    """[size, size]: a Gaussian over four sigmas along a line of pixels that is mirrored at its ends."""
    reach = np.arange(-int(4 * sigma_px + 0.5), int(4 * sigma_px + 0.5) + 1)
    weights = np.exp(-0.5 * (reach / sigma_px) ** 2)
    at = (np.arange(size)[:, None] + reach) % (2 * size)
    matrix = np.zeros((size, size))
    np.add.at(matrix, (np.arange(size)[:, None], np.minimum(at, 2 * size - 1 - at)), weights / weights.sum())
    return np.asarray(matrix, dtype=np.float32)


def _align(levels: tuple[Level, Level], a: Ints, b: Ints, view: Ints) -> Floats:
    """Correlation [M] of the pictures of each pair where they overlap best, looked for from that view of a on; -1 where
    they are not alike."""
    scores, beyond = _align_crops(levels, a, b, view)
    turned = np.flatnonzero(beyond)  # it is a that was cut
    middle = 1 + len(_BOXES) * (view[turned] >= len(_BOXES))
    scores[turned] = _align_crops(levels, b[turned], a[turned], middle)[0]
    return scores


def _align_crops(levels: tuple[Level, Level], a: Ints, b: Ints, view: Ints) -> tuple[Floats, npt.NDArray[np.bool_]]:
    """Correlation [M] of picture b with the crop of picture a that fits it best, -1 where none does; and whether one
    would that reaches beyond the edges of a."""
    out, beyond = np.full(len(a), -1.0, dtype=np.float32), np.zeros(len(a), dtype=bool)
    for start in range(0, len(a), ALIGNED_AT_ONCE):
        going = np.arange(start, min(start + ALIGNED_AT_ONCE, len(a)))
        boxes = np.array(_BOXES, dtype=np.float32)[view[going] % len(_BOXES)]
        for contrast_of in levels:
            moving, target = contrast_of(a[going]), _standard(contrast_of(b[going]))
            mirrored = view[going] >= len(_BOXES)
            moving[mirrored] = moving[mirrored, :, ::-1]
            for _ in range(STEPS):
                boxes = boxes + _newton_step(moving, target, boxes)
            whole, inner = _agreement(moving, target, boxes)
            alike, allowed = whole >= HOPELESS, _allowed(boxes)
            beyond[going[alike & ~allowed]] = True
            hopeful = alike & allowed
            going, boxes, whole, inner = going[hopeful], boxes[hopeful], whole[hopeful], inner[hopeful]
        out[going] = np.where(inner >= INNER, whole, -1.0)
    return out, beyond


def _newton_step(moving: Floats, target: Floats, boxes: Floats) -> Floats:
    """The step [M, 4] that brings the crops at these boxes nearer to their targets."""
    m, px, _ = target.shape
    value, dx, dy, u, v = _crops(moving, boxes)
    spread = value.std(axis=(1, 2), keepdims=True) + 1e-6
    now = (value - value.mean(axis=(1, 2), keepdims=True)) / spread
    score = (now * target).mean(axis=(1, 2))
    dx, dy = dx * (px / spread), dy * (px / spread)
    slopes = np.stack([dx, dy, dx * u, dy * v], axis=1).reshape(m, 4, px * px)
    residual = (target * score[:, None, None] - now).reshape(m, px * px, 1)
    normal = slopes @ slopes.transpose(0, 2, 1) + 1e-3 * px * px * np.eye(4, dtype=np.float32)
    move = np.linalg.solve(normal, slopes @ residual)[..., 0]
    return np.asarray(np.clip(move, -LARGEST_MOVE, LARGEST_MOVE))


def _agreement(moving: Floats, target: Floats, boxes: Floats) -> tuple[Floats, Floats]:
    """Correlations [M] of the crops at these boxes with their targets: of the whole, and without the outer fifth all
    round, in which frames and black edges make pictures alike."""
    value, px = _crops(moving, boxes)[0], target.shape[1]
    inside = (slice(None), *[slice(px // 5, px - px // 5)] * 2)
    whole, inner = (
        (_standard(value[part]) * _standard(target[part])).mean(axis=(1, 2)) for part in ((slice(None),), inside)
    )
    return whole, inner


def _crops(pictures: Floats, boxes: Floats) -> tuple[Floats, Floats, Floats, Floats, Floats]:
    """Values [M, P, P] of the crops at these boxes, their slopes, and the pixels' places u [1, 1, P], v [1, P, 1] in
    them as shares of a side."""
    px = pictures.shape[1]
    grid = (np.arange(px, dtype=np.float32) + 0.5) / px
    u, v = grid[None, None, :], grid[None, :, None]
    left, top, width, height = (column[:, None, None] for column in boxes.T)
    return *_bilinear(pictures, (left + width * u) * px - 0.5, (top + height * v) * px - 0.5), u, v


def _allowed(params: Floats) -> npt.NDArray[np.bool_]:
    left, top, width, height = params.T
    slack = 0.02
    inside = (left > -slack) & (top > -slack) & (left + width < 1 + slack) & (top + height < 1 + slack)
    large = np.minimum(width, height) > 1 - LARGEST_CROP - slack
    return np.asarray(inside & large)


def _standard(pictures: Floats) -> Floats:
    centred = pictures - pictures.mean(axis=(1, 2), keepdims=True)
    return np.asarray(centred / (centred.std(axis=(1, 2), keepdims=True) + 1e-6))


def _bilinear(pictures: Floats, x: Floats, y: Floats) -> tuple[Floats, Floats, Floats]:
    """Values and slopes of pictures [M, P, P] at columns x [M, 1, P] and rows y [M, P, 1], clamped to the edge."""
    px = pictures.shape[1]
    across, step_across = (weights.transpose(0, 2, 1) for weights in _interpolating(x[:, 0], px))
    down, step_down = _interpolating(y[:, :, 0], px)
    # Matrix products, since gathering four neighbours of every point takes twice as long.
    rows, falls = np.matmul(down, pictures), np.matmul(step_down, pictures)
    return np.matmul(rows, across), np.matmul(rows, step_across), np.matmul(falls, across)


def _interpolating(at: Floats, size: int) -> tuple[Floats, Floats]:
    """[M, P, size] each: weights of the pixels on both sides of every place `at` [M, P], and of their difference."""
    at = np.clip(at, 0, size - 1.001)
    low = at.astype(np.int32)
    m, place = np.arange(len(at))[:, None], np.arange(at.shape[1])[None]
    weights, step = np.zeros((2, *at.shape, size), dtype=np.float32)
    weights[m, place, low], weights[m, place, low + 1] = 1 - (at - low), at - low
    step[m, place, low], step[m, place, low + 1] = -1, 1
    return weights, step


def likeness(one: npt.NDArray[np.uint8], other: npt.NDArray[np.uint8]) -> float:
    """Correlation of two small grey pictures as they lie, -1 .. 1; 0 where one is blank."""
    a, b = (picture.astype(np.float64) - picture.mean() for picture in (one, other))
    return float((a * b).mean() / (a.std() * b.std())) if a.std() and b.std() else 0.0
