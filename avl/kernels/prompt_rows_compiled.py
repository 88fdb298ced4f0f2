"""One pass over each row of a block of products, on a processor.

`prompt_rows.py` says what the arguments are.

A row is read from memory once: its maximum, exponentials and every sum are taken while it lies in
    the nearest cache. Weights are exponentials that are not divided by their sum yet; each result
    is multiplied by its inverse instead.
"""

from __future__ import annotations

from numba import float32

from avl.kernels.compiled import compiled, larger, power_of_two


@compiled
def _dot(row, column):
    total = float32(0.0)
    for key in range(row.shape[0]):
        total += row[key] * column[key]
    return total


@compiled
def _add_scaled(target, row, factor):
    for key in range(row.shape[0]):
        target[key] += row[key] * factor


@compiled
def _copy_scaled(target, row, factor):
    for key in range(row.shape[0]):
        target[key] = row[key] * factor


@compiled
def largest(row):
    """The largest number of a row of at least one; minus infinity counts, NaN may not."""
    result = row[0]
    for key in range(row.shape[0]):
        result = larger(result, row[key])
    return result


@compiled
def exponentials(row, top, factor):
    """Replace x by 2^((x - top) * factor); returns their sum."""
    total = float32(0.0)
    for key in range(row.shape[0]):
        power = power_of_two((row[key] - top) * factor)
        row[key] = power
        total += power
    return total


@compiled
def _count(row, limit):
    # In float32, as wide as what is compared: counting in integers halves the speed.
    total = float32(0.0)
    for key in range(row.shape[0]):
        total += float32(1.0) if row[key] >= limit else float32(0.0)
    return total


@compiled
def add_rows(
    products,
    ends,
    scale,
    sinks,
    first,
    start,
    offset,
    ready,
    sets,
    rank_sets,
    columns,
    extents,
    sums,
    thresholds,
    above,
    picked_places,
    picked,
    raw_places,
    raw_heads,
    raw,
    groups,
    received,
    block,
    query_ranks,
    runs,
    ages,
):
    """Take everything that is wanted from a block of rows.

    Arrays that are not wanted have no elements.
    """
    rows, factor = products.shape[1], float32(scale)
    for number in range(products.shape[0]):
        head = offset + number
        own, own_ranks = sets[head], rank_sets[head]
        block[:] = float32(0.0)
        furthest = 0
        for at in range(rows):
            count, query = products.shape[2] if ready else ends[at], start + at
            if count == 0:
                continue
            # Parts of rows are handed on as slices: numba checks an index such as `first + key` for
            # being negative, and does not vectorise a loop that does.
            row = products[number, at, :count]
            top = largest(row)
            if top < float32(-3e38) or (ready and top == float32(0.0)):
                continue  # the row sees no key: all products are minus infinity, its weights are 0
            furthest = max(furthest, count)
            highest, total = top, float32(1.0)
            if sinks.shape[1] > 0:
                sink = sinks[number, min(query, sinks.shape[1] - 1)]
                highest = larger(top, sink)
                total = power_of_two((sink - highest) * factor)
                total += exponentials(row, highest, factor)
            elif not ready:
                total = exponentials(row, highest, factor)
            inverse = float32(1.0) / total

            for column in range(columns.shape[1]):
                low = max(extents[column, 0] - first, 0)
                high = min(extents[column, 1] - first, count)
                if low < high:
                    weighted = _dot(row[low:high], columns[own, column, first + low : first + high])
                    sums[head, column, query] = weighted * inverse
                elif total != total:
                    sums[head, column, query] = total
            if thresholds.shape[0] > 0:
                peak = top if ready else power_of_two((top - highest) * factor)
                for place in range(thresholds.shape[0]):
                    above[place, head, query] = _count(row, peak * thresholds[place])

            if picked_places[query] >= 0:
                _copy_scaled(
                    picked[head, picked_places[query], first : first + count], row, inverse
                )
            if raw.shape[0] > 0 and raw_heads[head] >= 0 and raw_places[query] >= 0:
                _copy_scaled(
                    raw[raw_heads[head], raw_places[query], first : first + count], row, inverse
                )
            for group in range(received.shape[1]):
                if groups[group, query] != float32(0.0):
                    _add_scaled(block[group, :count], row, inverse * groups[group, query])
            if ages.shape[1] > 0 and query_ranks[query] >= 0:
                for run in range(runs.shape[1]):
                    low = max(runs[own_ranks, run, 0] - first, 0)
                    high = min(runs[own_ranks, run, 1] - first, count)
                    oldest = query_ranks[query] - (
                        runs[own_ranks, run, 2] + first + low - runs[own_ranks, run, 0]
                    )
                    high = min(high, low + oldest + 1)  # keys behind the query have no age
                    if low < high:
                        # The oldest age comes first in `ages`, so that later keys lie behind
                        # earlier ones.
                        place = ages.shape[1] - 1 - oldest
                        _add_scaled(ages[head, place : place + high - low], row[low:high], inverse)
        # Sums over the rows of a block are added up apart: adding thousands of rows to one float32
        # number would lose digits.
        for group in range(received.shape[1]):
            _add_scaled(
                received[head, group, first : first + furthest],
                block[group, :furthest],
                float32(1.0),
            )
