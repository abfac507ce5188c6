"""Codes chosen column by column, each column taking up what the ones before it got wrong (needs torch).

What is made small is the error of the layer's output, tr(D G D^T) with D = W - Q and G = sum x x^T, not that of the
weights. With U the upper factor of the inverse of the damped Gram matrix, U^T U = (G + damping)^-1, a column's error
e_i = (w_i - q_i) / U_ii moves the columns after it by -e_i U_ij, and D = E U, so the loss of the damped matrix is the sum
of squares of E and is known when the sweep ends.

A ladder of widths is swept together. Every width has weights of its own, moved by its own errors, and all widths share one
code, so the code of a column is the one that makes

    sum over widths b of share_b * (w_b,i - level_b(c >> (B - b)))^2

smallest. All codes up to 4 bits are tried, each with the best of its children at the wider widths. A share that is large
beside the others makes the sweep that of its width alone: a large one at the narrowest width fixes the top bits first and
leaves the wider widths to choose among their children, a large one at the widest truncates.

Source: Frantar et al., "GPTQ", ICLR 2023, algorithm 1, static groups; the factor is taken from the reversed matrix as in
any textbook, which spares the inverse.
Deviation: the joint sweep of a ladder and the refit of grids under the Gram matrix are ours.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from lilliput.numerics.grids import (
    F16_MAX,
    F16_MIN,
    byte_scale,
    byte_zero,
    in_bytes,
    ratio_of,
    round_ratio,
    row_units,
    spread,
)
from lilliput.numerics.nested import Quantized
from lilliput.numerics.packing import LEVEL_MIDDLE, TABLE_BITS, counted_bits

_STATE = 1 << 26  # numbers of the errors kept at once: 256 MiB
_MOST_DAMPING = 10.0


@dataclass(frozen=True)
class Factor:
    """The factor of a Gram matrix that a sweep needs.

    upper: (in, in) float32, U in the order of the sweep. order: (in,) int64, the columns as they are swept. damping: what
    was added to the diagonal, in means of it; infinite where no factor could be had and U is that of the diagonal alone.
    """

    upper: Tensor
    order: Tensor
    damping: float

    @classmethod
    def of(cls, gram: Tensor, damping: float = 0.01, act_order: bool = True) -> Self:
        """Factor a Gram matrix (in, in) float32.

        act_order: sweep the loudest inputs first, while there are most columns left to make up for them. The damping is
        raised tenfold until there is a factor. An input that was never active has only the damping, so its column is
        rounded to nearest and moves no other.
        """
        loud = gram.diagonal()
        count = len(loud)
        order = torch.argsort(loud, descending=True, stable=True) if act_order else torch.arange(count)
        mean = float(loud.mean(dtype=torch.float64))
        if not mean > 0:
            return cls(torch.eye(count), order, math.inf)
        # Reversed, lower and upper change places: with J G J = L L^T, R = J L J is upper, G = R R^T and U = R^-1.
        back = order.flip(0)
        matrix = gram[back][:, back].to(torch.float64).div_(mean)
        added = 0.0
        while damping <= _MOST_DAMPING:
            matrix.diagonal().add_(damping - added)
            added = damping
            lower, failed = torch.linalg.cholesky_ex(matrix)
            if not int(failed):
                del matrix
                inverse = torch.linalg.solve_triangular(lower, torch.eye(count, dtype=torch.float64), upper=False)
                return cls(inverse.flip(0, 1).to(torch.float32).contiguous(), order, damping)
            damping = max(10 * damping, 1e-6)
        alone = loud[order].to(torch.float64) / mean + 0.01
        return cls(torch.diag(alone.rsqrt()).to(torch.float32), order, math.inf)

    def importance(self, exponent: float) -> Tensor:
        """U_ii^-exponent of every column in the order of the weight: (in,) float32, the largest 1.

        With 2 it is the weight of a column's rounding error in the loss of the sweep.
        """
        share = self.upper.diagonal().to(torch.float64).pow(-exponent)
        found = torch.empty_like(share)
        found[self.order] = share / share.max()
        return found.to(torch.float32)


def sweep(
    weight: Tensor, factor: Factor, grid: Quantized, shares: Tensor | None = None, block: int = 128
) -> tuple[Quantized, Tensor]:
    """Choose codes on the grids of `grid`, whose own codes do not matter; see the module.

    weight: (out, in) float32. shares: (out, widths) float32, not negative, None for equal ones. block: columns between
    two large products; the result does not depend on it but for rounding. Returns the codes with those grids and
    (out, widths) float32, the sum of squares of E.
    """
    out, columns = weight.shape
    codes = torch.empty((out, columns), dtype=torch.uint8)
    losses = torch.empty((out, len(grid.bits)))
    shares = torch.ones_like(losses) if shares is None else shares
    rows = max(16, _STATE // (columns * len(grid.bits)))
    for at in range(0, out, rows):
        part = slice(at, at + rows)
        codes[part], losses[part] = _sweep(weight[part], factor, _Ladder(grid.rows(part), shares[part]), block)
    return replace(grid, codes=codes), losses


def _sweep(weight: Tensor, factor: Factor, ladder: "_Ladder", block: int) -> tuple[Tensor, Tensor]:
    out, columns = weight.shape
    widths = len(ladder.bits)
    size = columns if ladder.group_size == -1 else ladder.group_size
    groups = (factor.order // size).tolist()
    weight = weight.T[factor.order]
    codes = torch.empty((columns, out), dtype=torch.uint8)
    errors = torch.empty((columns, widths, out))
    for begin in range(0, columns, block):
        end = min(begin + block, columns)
        upper = factor.upper[:end, begin:end].T.contiguous()  # a column of U is a row here
        moved = (upper[:, :begin] @ errors[:begin].view(begin, widths * out)).view(end - begin, widths, out)
        target = weight[begin:end, None, :] - moved
        own = errors[begin:end].view(end - begin, widths * out)
        for i in range(end - begin):
            here = target[i]
            if i:
                here = here - (upper[i, begin : begin + i] @ own[:i]).view(widths, out)
            codes[begin + i], level = ladder.choose(here, groups[begin + i])
            torch.sub(here, level, out=errors[begin + i]).div_(float(upper[i, begin + i]))
    back = torch.empty_like(codes)
    back[factor.order] = codes
    return back.T.contiguous(), errors.square_().sum(0).T


class _Ladder:
    """The grids of a ladder, laid out so that a column's choice is a few operations on (codes, out)."""

    def __init__(self, grid: Quantized, shares: Tensor) -> None:
        self.bits, self.group_size = grid.bits, grid.group_size
        self._shares = shares.T[:, None, :].contiguous()
        grids = [grid.grid(b) for b in self.bits]
        self._scale = [scale.T.contiguous() for scale, _ in grids]
        none = torch.zeros_like(self._scale[0])
        self._zero = [none if zero is None else zero.T.contiguous() for _, zero in grids]
        self._shift = [zero + (2**b - 1) / 2 for zero, b in zip(self._zero, self.bits, strict=True)]
        self._divisor = [torch.where(scale > 0, scale, 1.0) for scale in self._scale]
        # Narrow widths are tried code by code; a uniform grid on its own, or one wider than that, is rounded to.
        self._tried = [b for b in self.bits if b in grid.table or (b <= TABLE_BITS and len(self.bits) > 1)]
        self._marks: list[Tensor] = []
        for b in self._tried:
            if b in grid.table:
                self._marks.append(grid.table[b].to(torch.float32).T.contiguous() - LEVEL_MIDDLE)
            else:
                self._marks.append((torch.arange(2**b, dtype=torch.float32) - (2**b - 1) / 2)[:, None])
        count = 2 ** self._tried[-1] if self._tried else 1
        self._first = torch.arange(count, dtype=torch.float32)[:, None]

    def choose(self, here: Tensor, group: int) -> tuple[Tensor, Tensor]:
        """Codes (out,) uint8 of a column of that group, and the levels they mean at each width: (widths, out).

        here: (widths, out), what each width has to meet.
        """
        cost, level = None, torch.empty_like(here)
        tried, width = [], 0
        for r, b in enumerate(self._tried):
            stand = (self._marks[r] - self._zero[r][group]).mul_(self._scale[r][group])  # (2**b, out)
            tried.append(stand)
            if len(self.bits) == 1:
                cost = (stand - here[r]).abs_()
            else:
                own = (stand - here[r]).square_().mul_(self._shares[r])
                cost = own if cost is None else own.add_(cost.repeat_interleave(2 ** (b - width), 0))
            width = b
        code = self._first
        for r in range(len(tried), len(self.bits)):
            b = self.bits[r]
            step, shift = self._scale[r][group], self._shift[r][group]
            want = here[r] / self._divisor[r][group] + shift
            first = code * 2 ** (b - width)
            code = torch.minimum(torch.maximum(want.round_(), first), first + (2 ** (b - width) - 1))
            if cost is not None:
                cost += (code - shift).mul_(step).sub_(here[r]).square_().mul_(self._shares[r])
            width = b
        best = cost.argmin(0, keepdim=True) if cost is not None else None
        if best is not None:
            code = code.expand(-1, here.shape[1]).gather(0, best)
        whole = code[0].to(torch.int64)
        for r, b in enumerate(self.bits):
            own_code = whole >> (self.bits[-1] - b)
            if r < len(tried):
                level[r] = tried[r].gather(0, own_code[None])[0]
            else:
                level[r] = (own_code - (2**b - 1) / 2 - self._zero[r][group]) * self._scale[r][group]
        return whole.to(torch.uint8), level


def refit(weight: Tensor, made: Quantized, gram: Tensor, widths: Sequence[int]) -> tuple[Quantized, Tensor]:
    """Scales and zeros that lower the error of the output for the codes there are, and the errors that are left.

    Group by group the best scale and zero are solved for while the other groups stay; what is stored of them is taken
    only where it lowers the error. weight: (out, in) float32. gram: (in, in) float32, damped. widths: some of the ladder,
    whose grids are fitted. Returns the same codes on new grids, and d G d^T of every row at each of
    those widths, d = w - q: (out, widths) float32.

    Of a shared grid only the ratios are fitted: its scales serve all widths, and codes were chosen for them.
    """
    if made.ratio:
        return _refit_ratios(weight, made, gram, widths)
    out, columns = weight.shape
    size = columns if made.group_size == -1 else made.group_size
    scales, zeros = dict(made.scale), dict(made.zero)
    errors = torch.empty((out, len(widths)))
    rows = max(16, _STATE // (4 * columns))
    for r, b in enumerate(widths):
        scale, zero = made.scale[b].clone(), made.zero[b].clone() if b in made.zero else None
        grid = _Rounding.of(scale, counted_bits(b, made.table))
        for at in range(0, out, rows):
            part = slice(at, at + rows)
            own = made.rows(part)
            mark = own.marks(b)
            away = weight[part] - own.dequantize(b)
            pull = away @ gram
            for g, begin in enumerate(range(0, columns, size)):
                here = slice(begin, min(begin + size, columns))
                zero_here = None if zero is None else zero[part, g]
                marks, pulls = mark[:, None, here], pull[:, None, here]
                change = _refit_group(marks, pulls, gram[here, here], scale[part, g], zero_here, grid.rows(part))[:, 0]
                away[:, here] += change
                pull.addmm_(change, gram[here])
            errors[part, r] = pull.mul_(away).sum(1)
        scales[b] = scale
        if zero is not None:
            zeros[b] = zero
    return replace(made, scale=scales, zero=zeros), errors.clamp_min_(0)


def _refit_ratios(weight: Tensor, made: Quantized, gram: Tensor, widths: Sequence[int]) -> tuple[Quantized, Tensor]:
    ratios = {b: ratio.clone() for b, ratio in made.ratio.items()}
    errors = torch.empty((len(weight), len(widths)))
    rows = max(16, _STATE // (4 * weight.shape[1]))
    for at in range(0, len(weight), rows):
        part = slice(at, at + rows)
        own = made.rows(part)
        away = weight[part] - _middles(own)
        felt = away @ gram
        energy = (felt * away).sum(1)
        for r, b in enumerate(widths):
            mark = own.dequantize(b) - weight[part] + away
            product, square = (felt * mark).sum(1), ((mark @ gram) * mark).sum(1)
            before = ratio_of(own.ratio[b])
            want = round_ratio(torch.where(square > 0, product / square.clamp_min(1e-30), 1.0) * before)
            times = ratio_of(want) / before
            better = times * (times * square - 2 * product) < square - 2 * product
            ratios[b][part] = torch.where(better, want, own.ratio[b])
            times = torch.where(better, times, 1.0)
            errors[part, r] = energy + times * (times * square - 2 * product)
    return replace(made, ratio=ratios), errors.clamp_min_(0)


def _middles(made: Quantized) -> Tensor:
    """Where the middles of the groups of a shared grid are, at every width: (out, in) float32."""
    scale, zero = made.grid(made.bits[0])
    return spread(torch.zeros_like(scale) if zero is None else -scale * zero, made.group_size, made.shape[1])


def rebase(weight: Tensor, made: Quantized, gram: Tensor, widths: Sequence[int], shares: Tensor) -> Quantized:
    """A shared grid moved to lower the sum of the errors of `widths` times shares, (out, widths), for the codes there are.

    As `refit` does, group by group. Widths that are left out lose by it until codes are chosen anew.
    """
    columns = weight.shape[1]
    size = columns if made.group_size == -1 else made.group_size
    first = made.bits[0]
    scales, zeros = made.scale[first].clone(), made.zero[first].clone() if made.zero else None
    grid = _Rounding.of(scales, first)
    rows = max(16, _STATE // (4 * columns * len(widths)))
    for at in range(0, len(weight), rows):
        part = slice(at, at + rows)
        own = made.rows(part)
        mark = torch.stack([own.marks(b).mul_(own.factor(b)) for b in widths], 1)  # (rows, widths, in)
        pull = torch.stack([weight[part] - own.dequantize(b) for b in widths], 1) @ gram
        share = shares[part][..., None]
        for g, begin in enumerate(range(0, columns, size)):
            here = slice(begin, min(begin + size, columns))
            zero_here = None if zeros is None else zeros[part, g]
            marks, pulls, own_gram = mark[..., here], pull[..., here], gram[here, here]
            change = _refit_group(marks, pulls, own_gram, scales[part, g], zero_here, grid.rows(part), share)
            pull += change @ gram[here]
    return replace(made, scale={first: scales}, zero={} if zeros is None else {first: zeros})


@dataclass(frozen=True)
class _Rounding:
    """How new scales and zeros of one group are rounded. unit: (out,) of the rows, None for float16; bits: of the grid."""

    unit: Tensor | None
    bits: int

    @classmethod
    def of(cls, scale: Tensor, bits: int) -> Self:
        """For a matrix with scales (out, groups)."""
        return cls(row_units(scale)[:, 0] if in_bytes(scale.shape[1]) else None, bits)

    def rows(self, part: slice) -> Self:
        """For some of the rows."""
        return self if self.unit is None else replace(self, unit=self.unit[part])

    def step(self, wanted: Tensor, step: Tensor) -> Tensor:
        """What is stored of a step, in float32; of the old one where the new one is no step of a grid."""
        fits = (wanted > 0) & (wanted <= F16_MAX) & (step > 0)
        wanted = torch.where(fits, wanted, step).clamp_min(0)
        if self.unit is not None:
            return byte_scale(wanted, self.unit)
        return wanted.to(torch.float16).clamp_min(F16_MIN).to(torch.float32) * (step > 0)

    def zero(self, wanted: Tensor) -> Tensor:
        """What is stored of a zero: (out,) float16."""
        kept = wanted.clamp(-F16_MAX, F16_MAX) if self.unit is None else byte_zero(wanted, self.bits)
        return kept.to(torch.float16)


def _refit_group(
    mark: Tensor,
    pull: Tensor,
    gram: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    rounding: _Rounding,
    share: Tensor | float = 1.0,
) -> Tensor:
    """Set the scale (out,) and zero (out,) of one group in place; return by how much its levels fell, as `mark`.

    mark: (out, widths, size), levels in steps from the middle, of all widths that the scale is for. pull: the same of
    (w - q) G. gram: (size, size). share: (out, widths, 1), how much each width counts.
    """
    step = scale.to(torch.float32)
    pressed = mark @ gram
    square = (share * pressed * mark).sum((1, 2))
    if zero is None:
        # With q = s x: the error changes by -2 t p + t^2 x G x for a step of t, p = x . (w - q) G.
        ask = (share * mark * pull).sum((1, 2))
        new = rounding.step(step + ask / square.clamp_min(1e-30), step)
        move = new - step
        better = (square > 0) & (move * (move * square - 2 * ask) < 0)
        scale.copy_(torch.where(better, new, step).to(torch.float16))
        return mark * torch.where(better, -move, 0.0)[:, None, None]
    offset = -step * zero.to(torch.float32)
    cross, plain = (share * pressed).sum((1, 2)), (share * torch.ones_like(mark[..., :1])).sum((1, 2)) * gram.sum()
    ask, ask_plain = (share * mark * pull).sum((1, 2)), (share * pull).sum((1, 2))
    width = square * plain - cross.square()
    bent = width > 1e-5 * square * plain  # else one level is in use, and any step serves
    move = torch.where(bent, (plain * ask - cross * ask_plain) / torch.where(bent, width, 1.0), 0.0)
    new = rounding.step(step + move, step)
    move = new - step
    shift = offset + (ask_plain - cross * move) / plain.clamp_min(1e-30)
    used = torch.where(new > 0, new, 1.0)
    new_zero = rounding.zero(torch.where(new > 0, -shift / used, 0.0))
    drift = -new * new_zero.to(torch.float32) - offset
    gain = move * (2 * ask - move * square - 2 * drift * cross) + drift * (2 * ask_plain - drift * plain)
    better = gain > 0
    scale.copy_(torch.where(better, new, step).to(torch.float16))
    zero.copy_(torch.where(better, new_zero, zero))
    move, drift = torch.where(better, move, 0.0)[:, None, None], torch.where(better, drift, 0.0)[:, None, None]
    return -(mark * move + drift)


def balance_shares(errors: Tensor, balance: float) -> Tensor:
    """How much each width counts, errors (out, widths) to shares of the same shape: error^-balance, a row's largest 1.

    0 counts errors as they are, so the narrowest width decides; 1 counts each in parts of itself, the first-order form of
    the sum of logarithms; more than that favours the wide widths.
    """
    share = (errors / errors.amax(1, keepdim=True).clamp_min(1e-30)).clamp_min(1e-9).pow(-balance)
    return share / share.amax(1, keepdim=True)


def damped(gram: Tensor, damping: float) -> Tensor:
    """A copy with `damping` means of the diagonal added to it."""
    made = gram.clone()
    made.diagonal().add_(damping * float(gram.diagonal().mean(dtype=torch.float64)))
    return made


def learn(
    weight: Tensor,
    gram: Tensor,
    tries: Sequence[tuple[Factor, Sequence[Quantized]]],
    balance: float,
    rounds: int,
    block: int,
) -> Quantized:
    """Sweep from each start, refit its grids to the codes and sweep again, `rounds` times; a row keeps the best it saw.

    Best: the smallest sum of errors times shares, the shares being those of the first start. rounds: 0 sweeps once and
    leaves the grids as they are. gram: (in, in) float32. tries: factors of it, each with the starts to sweep with it;
    whatever damping a factor has, errors are those under the least one.
    """
    loud = gram.diagonal()
    mean = float(loud.mean(dtype=torch.float64))
    mean = mean if mean > 0 else 0.0
    least_damping = min(_had(factor) for factor, _ in tries)
    gram = damped(gram, least_damping)
    # What rounding alone would cost if inputs were not correlated: enough to weigh widths, and no product with the Gram.
    first = tries[0][1][0]
    plain = torch.stack([(weight - first.dequantize(b)).square_() @ loud for b in first.bits], 1)
    shares = balance_shares(plain, balance)
    # A refit of many levels gains next to nothing and costs two products with the Gram matrix.
    fitted = [b for b in first.bits if b <= TABLE_BITS]
    best: Quantized | None = None
    least = torch.full((len(weight),), torch.inf)
    for factor, start in ((factor, start) for factor, starts in tries for start in starts):
        more, grid = (_had(factor) - least_damping) * mean, start
        for round_ in range(max(rounds, 1)):
            if grid.ratio and round_:
                grid = rebase(weight, grid, gram, fitted, shares[:, : len(fitted)])
                grid, _ = refit(weight, grid, gram, fitted)
            grid, errors = sweep(weight, factor, grid, shares, block)
            errors *= mean  # the factor is that of the Gram matrix over this mean
            if more:
                for r, b in enumerate(grid.bits):
                    errors[:, r] -= more * (weight - grid.dequantize(b)).square_().sum(1)
                errors.clamp_min_(0)
            if rounds:
                grid, errors[:, : len(fitted)] = refit(weight, grid, gram, fitted)
            score = (errors * shares).sum(1)
            best = grid if best is None else _merge(best, grid, score < least)
            least = torch.minimum(score, least)
    assert best is not None, "there is a start"
    return best


def _had(factor: Factor) -> float:
    """The damping that errors swept with a factor are counted with."""
    return factor.damping if math.isfinite(factor.damping) else 0.01


def _merge(one: Quantized, other: Quantized, take: Tensor) -> Quantized:
    """The rows of `other` where `take` (out,), of `one` elsewhere."""
    pick = take[:, None]
    return replace(
        one,
        codes=torch.where(pick, other.codes, one.codes),
        scale={b: torch.where(pick, other.scale[b], one.scale[b]) for b in one.scale},
        zero={b: torch.where(pick, other.zero[b], one.zero[b]) for b in one.zero},
        table={b: torch.where(pick, other.table[b], one.table[b]) for b in one.table},
        ratio={b: torch.where(take, other.ratio[b], one.ratio[b]) for b in one.ratio},
    )
