"""What removing units does to the output of a group's projection, kept up to date while units change sides.

Two ways to measure tr((W - W') H (W - W')^T) for the units that are out, with W the dense projection (D × F), W' zero
in their columns and H (F × F) a second moment of the features: `PlainError` leaves the other columns as they were,
`LeastSquaresError` sets them as well as they can be, as least squares compensation does. Both begin with all units in
and have the same methods, so a search over sets of units needs not know which one it minimises.

Shape letters: U units of a group, B input features of the output projection per unit, F = U·B, D output features.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from adasearch.errors import TrialError
from adasearch.pruning.accumulators import damped
from adasearch.pruning.importance import GroupView


def inverse_second_moment(view: GroupView, damping: float, phase: str) -> Tensor:
    """Return the inverse of H = E[x x^T] + damping · mean diagonal · I (F × F, float64).

    Args:
        view: of the group, with its covariance.
        damping: as in `statistics.damped`.
        phase: of a trial, for the message.

    Raises:
        TrialError: H is not positive definite (kind ``nan``).
    """
    return _inverse(damped(view.covariance().matrix(), damping), view.group.output, phase)


def _inverse(matrix: Tensor, output: str, phase: str) -> Tensor:
    factor, failed = torch.linalg.cholesky_ex(matrix)
    if int(failed):
        raise TrialError("nan", f"E[x x^T] of {output} must be positive definite: raise the damping", phase)
    return torch.cholesky_inverse(factor)


def diagonal_blocks(matrix: Tensor, units: int) -> Tensor:
    """Return the blocks of a matrix (F × F) in which rows and columns belong to one unit (U × B × B)."""
    block = len(matrix) // units
    return matrix.view(units, block, units, block).diagonal(dim1=0, dim2=2).permute(2, 0, 1)


def block_errors(columns: Tensor, blocks: Tensor) -> Tensor:
    """Return tr(W_B P_B^-1 W_B^T) for each unit (U), the structured error of the optimal brain surgeon.

    Args:
        columns: W_B^T, U × B × D.
        blocks: P_B, U × B × B, positive definite.
    """
    if blocks.shape[-1] == 1:  # the same, without a factorisation for each number
        squares = columns.square() / blocks
    else:
        squares = torch.linalg.solve_triangular(torch.linalg.cholesky_ex(blocks).L, columns, upper=False).square()
    return squares.sum((1, 2))


class PlainError:
    """The error when units go and nothing makes up for them: the sum of M_uv over all pairs of units that are out.

    M_uv = tr(W_u H_uv W_v^T) with H = E[x x^T] (U × U). Any change of sides is read from it without the features.

    Args:
        view: of the group, with its covariance.
    """

    def __init__(self, view: GroupView) -> None:
        columns = view.output_weight().double()
        units, block = columns.shape[:2]
        flat = columns.flatten(0, 1)
        products = view.covariance().matrix() * (flat @ flat.T)
        self.pairwise = products.view(units, block, units, block).sum((1, 3))
        self.out = torch.zeros(units, dtype=torch.bool)
        self.error = 0.0

    def moves(self) -> Tensor:
        """Return how much the error changes when one unit alone changes sides (U): > 0 for leaving, as a rule."""
        shared = self.pairwise @ self.out.double()
        return self.pairwise.diagonal() + torch.where(self.out, -2.0, 2.0) * shared

    def exchanges(self, back: Tensor, away: Tensor) -> Tensor:
        """Return how much it changes when a unit of `back` returns and one of `away` leaves (back × away)."""
        moves = self.moves()
        return moves[back][:, None] + moves[away] - 2 * self.pairwise[back][:, away]

    def move(self, units: Sequence[int]) -> None:
        """Let units change sides, all of them at once."""
        at = torch.tensor(units)
        self.out[at] = ~self.out[at]
        self.error = float(self.pairwise[self.out][:, self.out].sum())


class LeastSquaresError:
    """The error when units go and the kept columns of the projection make up for them as well as they can.

    It holds the table [[H, H W^T], [W H, W H W^T]] after Gauss-Jordan pivots (the "sweep" of regression) on the
    features K that are in, with H = E[x x^T] + damping. Then the rows and columns of `square` in K are -(H_KK)^-1,
    those of the others R are the Schur complement H_RR - H_RK (H_KK)^-1 H_KR; `rows` are W'_K, fitted, and the
    covariance of the residual with R. A unit's block gives what its leaving costs, or its return gains: the optimal
    brain surgeon (ZipLM, arXiv 2302.04089; SlimGPT, arXiv 2412.18110) and its reverse. Moving units is one more pivot.

    Args:
        view: of the group, with its covariance.
        damping: added to the diagonal of E[x x^T] as a multiple of its mean.

    Raises:
        TrialError: H is not positive definite (kind ``nan``).
    """

    def __init__(self, view: GroupView, damping: float) -> None:
        self.output, self.units, self.block = view.group.output, view.group.units, view.group.output_block
        self.square = -inverse_second_moment(view, damping, "plan")
        self.rows = view.output_weight().double().flatten(0, 1).T.contiguous()
        self.out = torch.zeros(self.units, dtype=torch.bool)
        self.error = 0.0

    def _columns(self) -> Tensor:
        return self.rows.T.view(self.units, self.block, -1)

    def moves(self) -> Tensor:
        """Return how much the error changes when one unit alone changes sides (U): >= 0 for those that leave.

        For a unit B that is in, that is tr(W'_B ([H_KK^-1]_BB)^-1 W'_B^T); those of `square` are negative there.
        """
        sign = torch.where(self.out, 1.0, -1.0)
        blocks = sign[:, None, None] * diagonal_blocks(self.square, self.units)
        return -sign * block_errors(self._columns(), blocks)

    def exchanges(self, back: Tensor, away: Tensor) -> Tensor:
        """Return how much it changes when a unit of `back` returns and one of `away` leaves (back × away)."""
        moves, columns = self.moves(), self._columns()
        blocks = -diagonal_blocks(self.square, self.units)[away]
        by_unit = self.square.view(self.units, self.block, self.units, self.block)
        found = []
        for unit in back.tolist():
            across = by_unit[unit][:, away].transpose(0, 1)  # away × B of the one that returns × B
            solved = (_inverse(by_unit[unit, :, unit], self.output, "plan") @ across).mT
            leaving = block_errors(columns[away] - solved @ columns[unit], blocks + solved @ across)
            found.append(moves[unit] + leaving)
        return torch.stack(found)

    def move(self, units: Sequence[int]) -> None:
        """Let units that are all in, or all out, change sides at once.

        Raises:
            TrialError: their pivot is not positive definite (kind ``nan``).
        """
        enters = bool(self.out[units[0]])
        within = torch.arange(self.block)
        at = (torch.tensor(units)[:, None] * self.block + within).flatten()
        sign = 1.0 if enters else -1.0
        columns, rows = self.square[:, at], self.rows[:, at]
        inverse = sign * _inverse(sign * columns[at], self.output, "plan")
        solved, fitted = columns @ inverse, rows @ inverse
        self.error -= float((fitted * rows).sum())
        self.square.addmm_(solved, columns.T, alpha=-1)
        self.rows.addmm_(fitted, columns.T, alpha=-1)
        self.square[:, at], self.square[at] = sign * solved, sign * solved.T
        self.square[at[:, None], at] = -inverse
        self.rows[:, at] = sign * fitted
        self.out[torch.tensor(units)] = not enters
