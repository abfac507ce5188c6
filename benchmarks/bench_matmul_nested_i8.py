"""matmul_nested_i8, each variant and width: one token, with even levels and with tables, from memory and from cache,
against the raw read rate; and many tokens, in products a second.

From memory: copies of a matrix, together about 300 MB, one after the other; a round times a plain read of one and the
same memory and then every variant, so that a ratio sees one state of the machine. Many tokens: the best of rounds that go
through all variants, in processor time, so that other work on the machine counts less. One thread. The call itself
costs a few microseconds.
"""

import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from harness import emit
from lilliput.artifact.read import StoredLinear
from lilliput.engine import native
from lilliput.numerics.packing import TABLE_BITS, fields_of, tile_table

LADDER, GROUP, TOTAL, ROUNDS = (2, 3, 4, 8), 64, 300e6, 5


def linear_in(buffers: list[np.ndarray], out: int, columns: int) -> StoredLinear:
    """A matrix whose fields and scales are `buffers`."""
    *planes, scale = buffers
    fields, tiles = fields_of(LADDER), out // 16
    shaped = tuple(p.reshape(tiles, columns // 32, 64 * f) for p, f in zip(planes, fields, strict=True))
    scales = dict.fromkeys(LADDER, scale.view(np.float16).reshape(tiles, columns // GROUP, 16))
    return StoredLinear(
        name="matrix", out=out, columns=columns, group_size=GROUP, groups=columns // GROUP, bits=LADDER, fields=fields,
        planes=shaped, scale=scales, zero={}, bias=None,
    )  # fmt: skip


def seconds(function: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> float:
    start = clock()
    function()
    return clock() - start


def random_planes(rng: np.random.Generator, weights: int, bits: int) -> list[np.ndarray]:
    """Fields of the ladder: random ones as far as `bits` reads them, zeros behind."""
    fields = fields_of(LADDER)
    return [
        rng.integers(0, 256, weights * f // 8, np.uint8)
        if sum(fields[: n + 1]) <= bits
        else np.zeros(weights * f // 8, np.uint8)
        for n, f in enumerate(fields)
    ]


def many_tokens(rng: np.random.Generator) -> None:
    """Products a second of 256 tokens, with scales alone and with zeros, quantizing the tokens included."""
    tokens, names = 256, native.variants("matmul_nested_i8")[1:]
    for out, columns in ((1024, 768), (1024, 2048), (512, 5632)):
        x = rng.standard_normal((tokens, columns), dtype=np.float32)
        for bits in LADDER:
            scale = rng.integers(0x1000, 0x2000, out * columns // GROUP, np.uint16).view(np.uint8)
            plain = linear_in([*random_planes(rng, out * columns, bits), scale], out, columns)
            for kind, m in (("scales", plain), ("zeros", replace(plain, zero=plain.scale))):
                best = dict.fromkeys(names, float("inf"))
                for _ in range(ROUNDS):
                    for name in names:
                        spent = seconds(
                            lambda n=name, m=m, b=bits, x=x: native.matmul_nested_i8(m, b, x, variant=n),
                            clock=time.thread_time,
                        )
                        best[name] = min(best[name], spent)
                for name in names:
                    emit("matmul_nested_i8_many", variant=name, grid=kind, bits=bits, out=out, columns=columns, tokens=tokens,
                         g_products_per_s=tokens * out * columns / best[name] / 1e9)  # fmt: skip


def one_token(rng: np.random.Generator) -> None:
    for out, columns in ((2048, 2048), (5632, 2048)):
        x = rng.standard_normal((1, columns), dtype=np.float32)
        for bits in LADDER:
            used = out * columns * bits // 8 + out * columns // GROUP * 2
            count = max(2, int(TOTAL / used))
            weights = out * columns
            copies = []
            for _ in range(count):
                planes = random_planes(rng, weights, bits)
                scale = rng.integers(0x1000, 0x2000, weights // GROUP, np.uint16).view(np.uint8)
                copies.append(linear_in([*planes, scale], out, columns))
            read = [
                [p.reshape(-1).view(np.uint64) for n, p in enumerate(c.planes) if sum(c.fields[: n + 1]) <= bits]
                for c in copies
            ]
            kinds = {"even": copies}
            if bits <= TABLE_BITS:
                table = {bits: tile_table(np.sort(rng.integers(0, 128, (out, 1 << bits), np.uint8), axis=1))}
                kinds["table"] = [replace(m, table=table) for m in copies]
            names = [(name, kind) for name in native.variants("matmul_nested_i8")[1:] for kind in kinds]
            raw: list[float] = []
            spent: dict[tuple[str, str], list[float]] = {name: [] for name in names}
            for _ in range(ROUNDS):
                raw.append(seconds(lambda read=read: [p.max() for planes in read for p in planes]))
                for name in names:
                    spent[name].append(
                        seconds(
                            lambda n=name[0], c=kinds[name[1]], b=bits, x=x: [
                                native.matmul_nested_i8(m, b, x, variant=n) for m in c
                            ]
                        )
                    )
            for name in names:
                small = kinds[name[1]][0]
                hot = min(
                    seconds(lambda n=name[0], m=small, b=bits, x=x: native.matmul_nested_i8(m, b, x, variant=n))
                    for _ in range(30)
                )
                rate = used * count / np.median(spent[name]) / 1e9
                share = float(np.median([r / s for r, s in zip(raw, spent[name], strict=True)]))
                emit("matmul_nested_i8", variant=name[0], levels=name[1], bits=bits, out=out, columns=columns, gb_per_s=rate, share_of_read=share,
                     read_gb_per_s=used * count / np.median(raw) / 1e9, in_cache_gb_per_s=used / hot / 1e9,
                     us=float(np.median(spent[name])) / count * 1e6, in_cache_us=hot * 1e6)  # fmt: skip


def main() -> None:
    rng = np.random.default_rng(0)
    many_tokens(rng)
    one_token(rng)


if __name__ == "__main__":
    main()
