"""What ``linear_assignment`` means, in plain PyTorch on the CPU."""

import torch
from torch import Tensor

# Larger magnitudes are guards such as finfo.max, not costs.
_LARGEST_COST = {torch.float32: 1e30, torch.float64: 1e300}


def linear_assignment_reference(cost: Tensor, num_targets: Tensor) -> Tensor:
    """See :func:`groupdetr_fast.ops.linear_assignment`; ``num_targets`` has the leading shape of ``cost``."""
    max_targets, num_queries = cost.shape[-2:]
    result = torch.full(cost.shape[:-1], -1)  # [..., T]
    num_problems = num_targets.numel()
    problems = cost.cpu().reshape(num_problems, max_targets, num_queries)
    sizes = num_targets.cpu().reshape(num_problems).clamp(0, max_targets).tolist()
    for size, problem, assigned in zip(sizes, problems, result.view(num_problems, max_targets), strict=True):
        if min(size, num_queries) == 0:
            continue
        usable = _usable_costs(problem[:size])  # [T_b, N]
        if size <= num_queries:
            assigned[:size] = _shortest_augmenting_paths(usable)
        else:
            assigned[_shortest_augmenting_paths(usable.t())] = torch.arange(num_queries)
    return result.to(cost.device)


def _usable_costs(cost: Tensor) -> Tensor:
    """``cost`` [T, N] in float64, its non-finite and absurd entries replaced by one cost above all the others.

    That cost is so high that an optimal assignment uses as few such pairs as possible, and so low that sums of costs
    keep their precision.
    """
    usable = cost.abs() <= _LARGEST_COST[cost.dtype]  # False for NaN
    cost = cost.double()
    if usable.all():
        return cost
    if not usable.any():
        return torch.zeros_like(cost)
    smallest, largest = cost[usable].aminmax()
    spread = largest - smallest
    if spread == 0:
        spread = largest.abs().clamp(min=1)
    return cost.where(usable, largest + (min(cost.shape) + 1) * spread)


def _shortest_augmenting_paths(cost: Tensor) -> Tensor:
    """Column of each row in an assignment of smallest total cost; ``cost`` [rows, columns] with rows <= columns.

    One row after the other is matched along the shortest path of reduced costs ``cost - row_dual - column_dual`` from
    it to a column that is still free; Dijkstra's algorithm finds the path.
    """
    num_rows, num_columns = cost.shape
    row_dual = cost.new_zeros(num_rows)
    column_dual = cost.new_zeros(num_columns)
    column_of_row = torch.full((num_rows,), -1)
    row_of_column = torch.full((num_columns,), -1)
    for source in range(num_rows):
        distance = torch.full_like(column_dual, torch.inf)  # of each column from `source`
        previous = torch.full_like(row_of_column, -1)  # row before each column on the way
        scanned = torch.zeros(num_columns, dtype=torch.bool)
        row: int | Tensor = source
        length: float | Tensor = 0.0
        rows_on_tree = [row]
        while True:
            candidate = length + cost[row] - row_dual[row] - column_dual
            shorter = (candidate < distance) & ~scanned
            distance[shorter] = candidate[shorter]
            previous[shorter] = row
            reachable = distance.masked_fill(scanned, torch.inf)
            length = reachable.min()
            nearest = reachable == length
            # Among the nearest columns a free one ends the search; otherwise the first one continues it.
            free = nearest & (row_of_column < 0)
            column = (free if free.any() else nearest).int().argmax()
            if row_of_column[column] < 0:
                break
            scanned[column] = True
            row = row_of_column[column]
            rows_on_tree.append(row)

        row_dual[source] += length
        for row in rows_on_tree[1:]:
            row_dual[row] += length - distance[column_of_row[row]]
        column_dual[scanned] -= length - distance[scanned]

        while True:  # Hand each column on the path to the row before it, back to the source.
            row = previous[column]
            row_of_column[column] = row
            column_of_row[row], column = column.clone(), column_of_row[row].clone()
            if row == source:
                break
    return column_of_row
