"""Who is compared: a line for each contender. Another recipe of ours, or another setting of a peer's, is one more line."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

OURS = "lilliput"
ALL = {4: {}, 3: {}, 2: {}}


@dataclass(frozen=True)
class Contender:
    """One way to make a model of each width.

    peer: whose environment it runs in. worker: the program. options: given to it at every width, then those of the
    width; a width that is not in `widths` the peer does not have. learns: from text, so that seeds matter.
    """

    peer: str
    worker: str
    options: Mapping[str, Any] = field(default_factory=dict)
    widths: Mapping[int, Mapping[str, Any]] = field(default_factory=lambda: ALL)
    learns: bool = True


def ours(
    *stages: Mapping[str, Any],
    learns: bool = True,
    shared: bool = False,
    targets: Mapping[int, float] | Sequence[float] = (),
) -> Contender:
    """A recipe of ours, "$bits", "$group_size" and "$steps" standing for numbers.

    shared: one artifact for all widths. targets: bits a weight by the width it is compared at; layers get widths of their
    own, among those of the recipe, that keep to it. Or, for one artifact, those of all its widths, ascending.
    """
    options: dict[str, Any] = {"recipe": list(stages), "shared": shared}
    widths: Mapping[int, Mapping[str, Any]] = ALL
    if isinstance(targets, Mapping):
        widths = {bits: {"target_bits": most} for bits, most in targets.items()}
    elif targets:
        options["target_bits"] = list(targets)
    return Contender(OURS, "run_lilliput.py", options, widths, learns)


BLOCKS = {"group_size": "$group_size", "ragged": True, "embeddings": False, "head": False}
"""Only the matrices of the blocks, at the group size all are given."""
NESTED = {**BLOCKS, "shared": True}
TUNE = {"tune": {"steps": "$steps", "written": True}}
SMALL = {"gptq": {"bits": [2, 3, 4, 5, 6], **BLOCKS, "group_size": 128}}
"""What widths a layer are chosen from, for as many bits as groups of 64 have at one width."""
AS_ONE_WIDTH = {4: 4.3, 3: 3.28, 2: 2.276}
LADDERS = {"gptq": {"bits": [2, 3, 4, 5, 6], **NESTED, "group_size": 128}}
"""What ladders of a nested artifact are chosen from, for budgets."""


def gguf(importance: bool, **ftypes: str) -> Contender:
    """Types of llama.cpp by width, given as b4="Q4_K_M"."""
    widths = {int(key[1:]): {"ftype": ftype} for key, ftype in ftypes.items()}
    return Contender("llama.cpp", "run_llama_cpp_quant.py", {"importance": importance}, widths, learns=importance)


CONTENDERS: dict[str, Contender] = {
    "lilliput rtn": ours({"rtn": {"bits": ["$bits"], **BLOCKS}}, learns=False),
    "lilliput rtn nested": ours({"rtn": {"bits": [2, 3, 4, 8], **NESTED}}, learns=False, shared=True),
    "lilliput gptq": ours({"gptq": {"bits": ["$bits"], **BLOCKS}}),
    "lilliput gptq nested": ours({"gptq": {"bits": [2, 3, 4, 8], **NESTED}}, shared=True),
    "lilliput gptq paper": ours({"gptq": {"bits": ["$bits"], **BLOCKS, "clip": False, "rounds": 0}}),
    "lilliput leanquant": ours({"leanquant": {"bits": ["$bits"], **BLOCKS}}),
    "lilliput leanquant tables": ours(
        {"leanquant": {"bits": ["$bits"], **BLOCKS, "group_size": -1, "nonuniform": True}}
    ),
    "lilliput any_precision": ours({"any_precision": {"bits": [2, 3, 4], **BLOCKS}}, shared=True),
    "lilliput awq": ours({"awq": {}}, {"rtn": {"bits": ["$bits"], **BLOCKS}}),
    "lilliput omniquant": ours({"omniquant": {"bits": ["$bits"], **BLOCKS}}),
    "lilliput tuned": ours({"gptq": {"bits": ["$bits"], **BLOCKS}}, TUNE),
    "lilliput tuned nested": ours({"gptq": {"bits": [2, 3, 4], **NESTED}}, TUNE, shared=True),
    "lilliput tuned nested own": ours({"gptq": {"bits": [2, 3, 4], **BLOCKS}}, TUNE, shared=True),
    "lilliput tuned by heart": ours(
        {"gptq": {"bits": ["$bits"], **BLOCKS}}, {"tune": {"steps": "$steps", "written": False}}
    ),
    "lilliput tuned mixed": ours(
        {"gptq": {"bits": [2, 3, 4, 5, 6], **BLOCKS}},
        TUNE,
        targets={4: 4.75, 3: 3.8, 2: 2.885},
    ),  # with alignment as many bits as llama.cpp's K_M, whose layers have several widths too
    # groups of 128 leave an eighth of a bit to choose with
    "lilliput tuned mixed small": ours(SMALL, TUNE, targets=AS_ONE_WIDTH),
    # about as long as auto-round takes with its best settings
    "lilliput best": ours(SMALL, {"tune": {"steps": 600, "written": True}}, targets=AS_ONE_WIDTH),
    "lilliput tuned nested mixed": ours(
        LADDERS,
        TUNE,
        shared=True,
        targets=[2.3, 3.33, 4.35],
    ),  # as many bits as one width for all layers has, nested in groups of 64
    "lilliput tuned nested mixed larger": ours(
        LADDERS,
        TUNE,
        shared=True,
        targets=[2.33, 3.42, 4.6],
    ),
    "llm-compressor rtn": Contender("llm-compressor", "run_llm_compressor.py", {"method": "rtn"}, learns=False),
    "llm-compressor gptq": Contender("llm-compressor", "run_llm_compressor.py", {"method": "gptq"}),
    "llm-compressor awq": Contender("llm-compressor", "run_llm_compressor.py", {"method": "awq"}),
    "gptqmodel gptq": Contender("gptqmodel", "run_gptqmodel.py", {"sym": True}),
    "gptqmodel gptq asym": Contender("gptqmodel", "run_gptqmodel.py", {"sym": False}),
    "gptqmodel gptq asym mse": Contender("gptqmodel", "run_gptqmodel.py", {"sym": False, "mse": 2.0}),
    "auto-round": Contender("auto-round", "run_auto_round.py", {"sym": False}),
    "auto-round sym": Contender("auto-round", "run_auto_round.py", {"sym": True}),
    "auto-round best": Contender("auto-round", "run_auto_round.py", {"sym": False, "iters": 1000}),
    "auto-round best ext": Contender(
        "auto-round", "run_auto_round.py", {"sym": True, "iters": 1000, "enable_alg_ext": True}
    ),  # what its authors advise for 2 bits; the extension has no zero points
    "hqq": Contender("hqq", "run_hqq.py", {"axis": 1}, learns=False),
    "hqq axis 0": Contender("hqq", "run_hqq.py", {"axis": 0}, learns=False),
    "llama.cpp k": gguf(False, b4="Q4_K_M", b3="Q3_K_M", b2="Q2_K"),
    "llama.cpp k imatrix": gguf(True, b4="Q4_K_M", b3="Q3_K_M", b2="Q2_K"),
    "llama.cpp ks imatrix": gguf(True, b4="Q4_K_S", b3="Q3_K_S", b2="Q2_K_S"),
    "llama.cpp iq imatrix": gguf(True, b4="IQ4_XS", b3="IQ3_XXS", b2="IQ2_XS"),
    "llama.cpp iq s imatrix": gguf(True, b4="IQ4_NL", b3="IQ3_XS", b2="IQ2_S"),
    "llama.cpp iq m imatrix": gguf(True, b3="IQ3_S", b2="IQ2_M"),
    "quanto": Contender("quanto", "run_quanto.py", widths={4: {}, 2: {}}, learns=False),
}
