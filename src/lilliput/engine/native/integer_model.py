"""The decoder that is an integer graph."""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Final

from lilliput.artifact.integer import IntegerModel as StoredInteger
from lilliput.core.errors import InputCorrupt
from lilliput.core.graph import Embed, Graph, Linear
from lilliput.engine.native.arrays import F32, Codes, as_bytes, as_codes, as_f32, group_of, kernels, stored
from lilliput.engine.native.model import Made, numbers
from lilliput.engine.sampling import Sampling

_EMBEDDING: Final = "an embedding is not finite"


class IntegerModel:
    """An integer graph in C++ over arrays that stay where they are; `docs/integer.md` has the arithmetic.

    Its codes are those of `engine.oracle`, whatever the variant, the threads and the company in a batch. `bits` of its
    methods changes nothing: matrices of a graph have one width each.
    """

    def __init__(self, model: StoredInteger, *, threads: int, variant: str = "") -> None:
        """variant: runs every op that has it in that variant; for tests.

        Raises InputCorrupt for a graph the kernels do not run, such as one whose layers have heads of different widths.
        """
        self._model = model  # whose arrays are read in place
        self._core = kernels().IntegerModel(model.spec.model_dump(), model.graph.model_dump(), threads, variant)
        try:
            for name, values in model.constants.items():
                self._core.add_constant(name, as_bytes(values))
            for name in _matrices(model.graph):
                if name in model.linears:
                    m = model.linears[name]
                    self._core.add_nested(name, *stored(m), m.out, m.columns, group_of(m))
                else:
                    weight = model.floats[f"{name}.weight"]
                    self._core.add_float(name, as_bytes(weight.data), weight.dtype, *weight.shape)
            self._core.finish()
        except ValueError as error:
            fix = "Run it with other activations, or make the artifact again"
            raise InputCorrupt(str(error), where="integer graph", fix=fix) from error

    @property
    def threads(self) -> int:
        """Threads that share the work."""
        return int(self._core.threads)

    def cache_bytes(self, positions: int) -> int:
        """Bytes of the codes of keys and values of one sequence, in whole pages."""
        return int(self._core.cache_bytes(positions))

    def logits(self, tokens: Sequence[int], bits: int = 0) -> F32:
        """Return (tokens, vocab) for a fresh sequence: scale * (code - zero), through the soft-cap if there is one."""
        with numbers(_EMBEDDING):
            return as_f32(self._core.logits(list(tokens)))

    def sites(self, tokens: Sequence[int], *, chunk: int = 256) -> dict[str, Codes]:
        """Return the codes of every edge for one fresh sequence run `chunk` tokens at a time, (tokens, width) each."""
        with numbers(_EMBEDDING):
            found = self._core.sites(list(tokens), chunk)
        return {name: as_codes(codes) for name, codes in found.items()}

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        bits: int = 0,
        max_new_tokens: int,
        context: int,
        eos: Sequence[int],
        sampling: Sampling,
        on_token: Callable[[int, int], bool] | None = None,
        on_prefill: Callable[[int, int], bool | None] | None = None,
    ) -> list[Made]:
        """Continue every prompt, as `Model.generate` does. bits: what its one width is called in the results."""
        options = (bits, max_new_tokens, context, list(eos), asdict(sampling), on_token, on_prefill)
        with numbers(_EMBEDDING):
            made = self._core.generate([list(p) for p in prompts], *options)
        return [Made(*result) for result in made]


def _matrices(graph: Graph) -> list[str]:
    """Names of the matrices a graph reads."""
    found = {node.matrix for node in graph.nodes if isinstance(node, Embed | Linear)}
    found |= {node.positions for node in graph.nodes if isinstance(node, Embed) and node.positions is not None}
    return sorted(found)
