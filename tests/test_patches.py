"""Leaves cover every pixel exactly once, budgets are met exactly or refused, plans are those of a plain walk down the
tree, and what cannot be cut is named."""

import heapq
import zlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sfa_core.tokens.density import area_resize, as_pixels, estimate_density, load_density
from sfa_core.documents.generate import make_document
from sfa_core.tokens.patches import (
    GUARD,
    PALE_GUARD,
    PATCH,
    PRESETS,
    PatchConfig,
    PatchPlan,
)
from sfa_core.tokens.planning import plan_patches, plan_tiles, tree_order
from sfa_core.tokens.recall import tokens_on


def squares(values, side):
    "Cut an array into squares of some cells: (rows, side, columns, side, ...)."
    rows, columns = values.shape[0] // side, values.shape[1] // side
    return values[: rows * side, : columns * side].reshape(rows, side, columns, side, *values.shape[2:])


def merge_error(page, size):
    "What a page loses in every square of a size: the largest difference from the mean of what becomes one pixel."
    parts = squares(page, size // PATCH)
    lost = np.abs(parts - parts.mean((1, 3), keepdims=True)).max((1, 3, 4))
    return squares(lost, PATCH).max((1, 3))


def tree_walk(page, density, config, grid):
    """Cut a page square by square, as the definition says: leaves (y, x, size) row by row, and how many are unsafe."""
    height, width = grid[0] * PATCH, grid[1] * PATCH
    if page.shape[0] > height:
        page = area_resize(torch.from_numpy(page).permute(2, 0, 1), (height, width)).permute(1, 2, 0).numpy()
    draw = np.random.default_rng([config.random or 0, zlib.crc32(np.ascontiguousarray(page).tobytes())])
    urgency = {}
    for size in config.sizes:
        shape = height // size, width // size
        error, dense, limit = np.zeros(shape), np.zeros(shape), {7: None, PATCH: config.fine}.get(size, config.coarse)
        if config.random is not None:
            dense, limit = draw.random(shape), None
        elif size > PATCH:
            error, dense = merge_error(page, size), squares(density, size // PATCH).max((1, 3))
        else:
            dense = density.repeat(PATCH // size, 0).repeat(PATCH // size, 1)
        guard = config.guard if config.random is None and size > PATCH else None
        for row, column in np.ndindex(shape):
            worse = guard is not None and error[row, column] > guard + 1e-6
            denser = limit is not None and dense[row, column] > limit
            urgency[size, row, column] = worse, denser, dense[row, column], error[row, column].round(5)

    def quarters(size, row, column):
        parts = [(size // 2, 2 * row + down, 2 * column + across) for down in (0, 1) for across in (0, 1)]
        return [(s, r, c) for s, r, c in parts if r * s < height and c * s < width]

    largest, smallest = config.sizes[-1], config.sizes[0]
    waiting = [(largest, row, column) for row in range(-(-height // largest)) for column in range(-(-width // largest))]
    leaves = set()
    while waiting:
        square = waiting.pop()
        may = square in urgency and (config.budget is not None or square[0] == smallest or not any(urgency[square][:2]))
        leaves, waiting = (leaves | {square}, waiting) if may else (leaves, waiting + quarters(*square))
    key = lambda square: (*(-float(part) for part in urgency[square]), -square[0], *square[1:])
    heap = [(key(square), square) for square in leaves if square[0] > smallest]
    heapq.heapify(heap)
    while config.budget is not None and len(leaves) < config.budget:
        square = heapq.heappop(heap)[1]
        leaves = leaves - {square} | set(quarters(*square))
        for part in quarters(*square):
            if part[0] > smallest:
                heapq.heappush(heap, (key(part), part))
    unsafe = sum(bool(urgency[square][0]) for square in leaves)
    return sorted((row * size, column * size, size) for size, row, column in leaves), unsafe


SIZE_SETS = [(14,), (14, 28), (14, 28, 56), (7, 14), (7, 14, 28), (7, 14, 28, 56)]


@st.composite
def tiles(draw):
    "A page with some blocks of ink, its density, a grid and a rule."
    grid, sizes = (draw(st.integers(1, 9)), draw(st.integers(1, 9))), draw(st.sampled_from(SIZE_SETS))
    rng, scale = np.random.default_rng(draw(st.integers(0, 2**16))), 2 if 7 in sizes else 1
    page = np.ones((scale * grid[0] * PATCH, scale * grid[1] * PATCH, 3), np.float32)
    for _ in range(draw(st.integers(0, 4))):
        y, x = rng.integers(page.shape[0]), rng.integers(page.shape[1])
        page[y : y + rng.integers(1, 30), x : x + rng.integers(1, 30)] = rng.random(3)
    low = draw(st.floats(0, 0.5))
    guard, coarse = draw(st.sampled_from([None, GUARD, PALE_GUARD, 0.0])), draw(st.sampled_from([None, low]))
    return page, rng.random(grid).round(2), grid, PatchConfig(sizes, coarse=coarse, fine=draw(st.floats(0.55, 1)),
                                                              guard=guard)


def check_cover(plan, grid):
    covered = np.zeros((grid[0] * PATCH, grid[1] * PATCH), int)
    for x0, y0, x1, y1 in plan.boxes:
        assert 0 <= y0 < y1 <= covered.shape[0] and 0 <= x0 < x1 <= covered.shape[1]
        covered[y0:y1, x0:x1] += 1
    assert (covered == 1).all() and plan.area.sum() == grid[0] * grid[1]


@settings(max_examples=60, deadline=None)
@given(tiles())
def test_leaves_cover_every_pixel_exactly_once_and_keep_the_rule(tile):
    page, density, grid, config = tile
    plan = plan_patches(page, density, config, grid)
    check_cover(plan, grid)
    assert set(plan.size) <= set(config.sizes) and plan.unsafe == 0
    small = page if page.shape[0] == grid[0] * PATCH else page.reshape(grid[0] * PATCH, 2, grid[1] * PATCH, 2,
                                                                       3).mean((1, 3))
    for (x0, y0, x1, y1), size in zip(plan.boxes, plan.size):
        if size > PATCH:
            if config.guard is not None:
                assert merge_error(small[y0:y1, x0:x1], int(size)).max() <= config.guard + 1e-5
            if config.coarse is not None:
                assert density[y0 // PATCH : y1 // PATCH, x0 // PATCH : x1 // PATCH].max() <= config.coarse
        if size < PATCH:
            assert density[y0 // PATCH, x0 // PATCH] > config.fine


def leaves_of(plan):
    return list(zip(plan.y.tolist(), plan.x.tolist(), plan.size.tolist()))


@settings(max_examples=150, deadline=None)
@given(tiles(), st.sampled_from([None, 0, 3]), st.integers(0, 100), st.booleans())
def test_plans_are_those_of_a_plain_walk_down_the_tree(tile, random, more, bytes_in):
    """Thresholds, budgets and random trees, of pages of floats and of bytes; a budget is a start and some splits."""
    page, density, grid, config = tile
    page = (page * 255).round().astype(np.uint8) if bytes_in else page
    as_float = page.astype(np.float32) / np.float32(255) if bytes_in else page
    if more:
        least, _ = tree_walk(as_float, density, replace(config, budget=1), grid)
        most = grid[0] * grid[1] * (PATCH // config.sizes[0]) ** 2
        config = replace(config, budget=min(len(least) + 3 * more, most - (most - len(least)) % 3), random=random)
    plan = plan_patches(page, density, config, grid)
    leaves, unsafe = tree_walk(as_float, density, config, grid)
    assert leaves_of(plan) == leaves and plan.unsafe == unsafe
    by_hand = PatchPlan(grid, plan.y, plan.x, plan.size)  # proves that it covers every pixel once
    assert np.array_equal(by_hand.owner, plan.owner)


def test_real_pages_are_cut_alike_alone_in_a_batch_and_in_any_layout():
    pages = [make_document(kind, seed, preset="rich").pixels for kind in ("bar", "table") for seed in range(2)]
    pages = np.stack(pages)
    pixels = as_pixels(pages)
    density = estimate_density(load_density()[0], pixels, (32, 32))
    for config in (PatchConfig(), PatchConfig(coarse=None), PatchConfig(budget=400), PatchConfig(budget=400, random=2)):
        together, packed = (plan_tiles(given, density, config) for given in (pixels, pixels.contiguous()))
        for page, own, plan, same in zip(pages, density.numpy(), together, packed):
            assert leaves_of(plan) == leaves_of(same) == leaves_of(plan_patches(page, own, config))
            assert leaves_of(plan) == tree_walk(page.astype(np.float32) / np.float32(255), own, config, (32, 32))[0]


@settings(max_examples=60, deadline=None)
@given(tiles(), st.integers(1, 340), st.sampled_from([None, 3]))
def test_a_budget_is_met_exactly_or_refused_with_the_nearest(tile, budget, random):
    page, density, grid, config = tile
    config = replace(config, budget=budget, random=random)
    try:
        plan = plan_patches(page, density, config, grid)
    except ValueError as error:
        assert f"a budget of {budget} leaves cannot be met" in str(error)
        words = str(error).replace(",", " ").split()
        least, most = (int(words[words.index("expected") + step]) for step in (1, 3))
        assert not least <= budget <= most or (budget - least) % 3
        assert len(plan_patches(page, density, replace(config, budget=int(words[-1])),
                                grid)) == int(words[-1]), "the budget it names can be met"
        return
    assert len(plan) == budget
    check_cover(plan, grid)


@settings(max_examples=40, deadline=None)
@given(tiles(), st.sampled_from([1, 2]))
def test_only_copies_are_dropped_in_the_language_model(tile, merge):
    page, density, grid, config = tile
    grid = tuple(side - side % merge for side in grid)
    if min(grid) < 1:
        return
    scale = 2 if 7 in config.sizes else 1
    plan = plan_patches(page[: scale * grid[0] * PATCH, : scale * grid[1] * PATCH], density[: grid[0], : grid[1]],
                        config)
    kept, owner = plan.kept(merge), plan.owner
    seen, expected = set(), []
    for row in range(grid[0] // merge):
        for column in range(grid[1] // merge):
            own = owner[2 * merge * row : 2 * merge * (row + 1), 2 * merge * column : 2 * merge * (column + 1)]
            copy = (own == own[0, 0]).all() and own[0, 0] in seen
            expected.append(not copy)
            seen |= {own[0, 0]} if (own == own[0, 0]).all() else set()
    assert kept.tolist() == expected


def test_density_decides_which_leaves_a_budget_keeps_fine():
    page, density = np.ones((112, 112, 3), np.float32), np.zeros((8, 8))
    page[14:28, 70:98, :] = np.indices((14, 28)).sum(0)[..., None] % 2  # ink
    density[5, 1] = 1  # and density elsewhere
    plans = [plan_patches(page, density, config)
             for config in (PatchConfig(budget=13, coarse=None), PatchConfig(budget=13, guard=None))]
    by_guard, by_density = ({tuple(map(int, box[:2])) for box in plan.boxes[plan.size == PATCH]} for plan in plans)
    assert (70, 14) in by_guard and (14, 70) not in by_guard and (14, 70) in by_density and (70, 14) not in by_density
    too_few = plan_patches(page, density, PatchConfig(budget=4))
    assert too_few.unsafe == 1, "a leaf that loses ink is counted, not hidden"


def test_a_random_tree_looks_at_nothing_but_differs_from_page_to_page():
    rng, config = np.random.default_rng(0), PatchConfig(budget=40, random=1)
    first, second = rng.random((112, 112, 3)).astype(np.float32), rng.random((112, 112, 3)).astype(np.float32)
    plans = [plan_patches(page, density, config, (8, 8)).boxes.tolist() for page in (first, second)
             for density in (None, np.ones((8, 8)))]
    assert plans[0] == plans[1] and plans[2] == plans[3] and plans[0] != plans[2]
    assert plan_patches(first, None, replace(config, random=2), (8, 8)).boxes.tolist() != plans[0]


def test_the_guard_keeps_text_that_the_naive_rule_merges():
    estimator, _ = load_density()
    merged = {name: [] for name in PRESETS}
    for seed in range(4):
        document = make_document("table" if seed % 2 else "bar", 600 + seed, preset="rich")
        page, boxes = document.pixels, [t["box"] for t in document.row()["texts"]]
        density = estimate_density(estimator, as_pixels(page[None]), (32, 32))[0].numpy()
        for name in merged:
            merged[name].append(tokens_on(plan_patches(page, density, PRESETS[name]), boxes)[1])
    shares = {name: np.mean(values) for name, values in merged.items()}
    assert shares["published"] == shares["guard only"] == 0 and shares["published, no guard"] > 0.01, shares


def test_tokens_on_a_text_are_counted_by_leaf_and_by_cell():
    plan = plan_patches(np.ones((56, 56, 3), np.float32), None, PatchConfig(coarse=None, sizes=(14, 28)))
    split = plan_patches(np.ones((56, 56, 3), np.float32), None, PatchConfig(coarse=None, sizes=(14, 28), budget=7))
    assert tokens_on(plan, [(1, 1, 20, 5)]) == (1, 1.0) and tokens_on(plan, [(20, 20, 30, 30)]) == (4, 1.0)
    assert [tokens_on(split, [(1, 1, 55, 55)])[0], tokens_on(split, [(1, 1, 55, 55)])[1]] == [7, 12 / 16]
    assert tokens_on(plan, [])[0] == 0 and np.isnan(tokens_on(plan, [])[1])


def test_a_grid_that_the_largest_square_does_not_divide_is_covered():
    page = np.ones((384, 384, 3), np.float32)
    plan = plan_patches(page, None, PatchConfig(coarse=None), (27, 27))
    check_cover(plan, (27, 27))
    assert set(plan.size) == {14, 28, 56} and len(plan) < 729 / 4


def test_orders_of_leaves_are_free_but_gaps_and_overlaps_are_refused():
    plan = plan_patches(np.ones((56, 56, 3), np.float32), None, PatchConfig(coarse=None, sizes=(14, 28)))
    back = PatchPlan(plan.grid, plan.y[::-1], plan.x[::-1], plan.size[::-1])
    assert np.array_equal(len(plan) - 1 - back.owner, plan.owner)
    for y, x, size in (([0], [0], [28]), ([0, 0], [0, 14], [28, 28]), ([7], [0], [56]),
                       ([0, 0, 28, 28, 0], [0, 28, 0, 28, 0], [28] * 5)):
        with pytest.raises(ValueError, match="exactly once"):
            PatchPlan((4, 4), y, x, size)


PAGE, MAP = np.ones((112, 112, 3), np.float32), np.zeros((8, 8))


@pytest.mark.parametrize(("message", "call"), {
    r"the image has shape \(0, 0, 3\)": lambda: plan_patches(np.zeros((0, 0, 3), np.uint8), MAP),
    r"the image has shape \(112, 112\)": lambda: plan_patches(PAGE[..., 0], MAP),
    "not finite": lambda: plan_patches(PAGE * np.nan, MAP),
    "there is no density": lambda: plan_patches(PAGE, None),
    "100 x 112 px does not divide": lambda: plan_patches(PAGE[:100], None, PatchConfig(coarse=None)),
    "113 x 113 px does not divide into 8 x 8": lambda: plan_patches(np.ones((113, 113, 3), np.float32), MAP),
    "expected at least one patch": lambda: plan_patches(PAGE[:10, :10], None, PatchConfig(coarse=None)),
    "density has shape": lambda: plan_patches(PAGE, MAP[:4], grid=(8, 8)),
    "expected .8, 8. in 0..1": lambda: plan_patches(PAGE, MAP + 2),
    "source of at least 1.5 times": lambda: plan_patches(PAGE, MAP, PatchConfig(sizes=(7, 14))),
    "0 <= coarse < fine <= 1": lambda: PatchConfig(coarse=0.7, fine=0.3),
    "patch sizes are": lambda: PatchConfig(sizes=(8, 14, 32)),
    "neighbours of": lambda: PatchConfig(sizes=(28, 56)),
    "embedding is 'bicubic'": lambda: PatchConfig(embedding="bicubic"),
    "guard is": lambda: PatchConfig(guard=16),
    "a random tree has no budget": lambda: PatchConfig(random=0),
    "make no language tokens": lambda: plan_patches(PAGE, MAP).kept(3),
}.items())
def test_what_cannot_be_cut_is_named(message, call):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_source_of_one_and_a_half_tiles_allows_the_fine_size_only_where_it_is_dense():
    page, density = np.ones((168, 168, 3), np.float32), np.zeros((8, 8))
    density[0, 0] = 1
    plan = plan_patches(page, density, PatchConfig(sizes=(7, 14, 28, 56)))
    assert (plan.size == 7).sum() == 4 and plan.boxes[plan.size == 7].max() == PATCH


def test_torch_pages_and_bytes_give_the_same_plan():
    page = make_document("bar", 3).pixels
    as_float = torch.from_numpy(page).float().div(255).numpy()
    assert np.array_equal(plan_patches(page, MAP).boxes, plan_patches(as_float, MAP).boxes)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 7), st.integers(1, 7), st.integers(1, 3), st.integers(0, 2**16))
def test_squares_come_in_the_order_of_a_walk_with_a_heap(rows, columns, levels, seed):
    """Sorting by the key of `tree_order` is popping the most urgent square and pushing the four inside it, also where
    a grid leaves squares at its edges that lie in none."""
    shapes = [(rows // 2**finer, columns // 2**finer) for finer in range(levels)][::-1]  # the coarsest first
    counts = [down * across for down, across in shapes]
    ranks, ends = np.random.default_rng(seed).permutation(sum(counts)), np.cumsum([0, *counts])
    parts = [ranks[begin:end].reshape(1, *shape) for begin, end, shape in zip(ends, ends[1:], shapes)]
    inside = {}  # square -> the larger one that it lies in
    for level in range(1, levels):
        for row, column in np.ndindex(shapes[level]):
            if row // 2 < shapes[level - 1][0] and column // 2 < shapes[level - 1][1]:
                inside[level, row, column] = level - 1, row // 2, column // 2
    squares = [(level, row, column) for level in range(levels) for row, column in np.ndindex(shapes[level])]
    rank = lambda square: int(parts[square[0]][0, square[1], square[2]])
    waiting = [(rank(square), square) for square in squares if square not in inside]
    heapq.heapify(waiting)
    walked = []
    while waiting:
        walked.append(heapq.heappop(waiting)[1])
        for square in squares:
            if inside.get(square) == walked[-1]:
                heapq.heappush(waiting, (rank(square), square))
    order = tree_order(parts)[0].argsort()
    assert [squares[place] for place in order] == walked
