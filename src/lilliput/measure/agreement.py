"""How far an exported ONNX model, run by ONNX Runtime, is from the oracle of its integer graph, and what explains it.

Three questions, at every tensor that has a grid. Given the oracle's inputs of a node, how many steps is its output off: a
node computes in float what the oracle computes in whole numbers, so a code near the middle between two may fall to the
other side. From the tokens on, with all that follows from such codes. And of these, which did not follow: what the
oracle makes of the inputs that the runtime itself came to, node by node. Where that is one step at most everywhere, the
runtime's answer is the answer of the definition with those codes moved by one step, and nothing else happened.

Then what such codes are worth: the oracle once more with as many moved at random. One alone moves those behind it until
a token that was as likely as another comes first, so an equal first token at every position is more than the definition
itself gives; an answer much farther off than these is not explained by single codes. It is the only thing that is asked
of the fused graph, of which nothing but the answer can be seen, and there where ONNX Runtime is told not to saturate.

A form that computes the definition itself, in whole numbers, is allowed no step at all.

The files that were exported are run; only what goes in and comes out is added to them, and no optimization touches them.
Then once more as a user would, fused as ONNX Runtime likes.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper
from pydantic import BaseModel, ConfigDict

from lilliput.artifact.integer import IntegerModel
from lilliput.core.errors import Unsupported
from lilliput.core.graph import Attend, Grid
from lilliput.core.progress import Progress, Silent
from lilliput.core.spec import EncoderSpec
from lilliput.engine.oracle import Oracle
from lilliput.export.onnx_graph import VECTOR

STEPS_ALLOWED: Final = 1
MIDDLE: Final = 1 / 8
"""Steps from the middle between two codes at which rounding may decide. In the widest sums, of 2**14 products, float32 is
typically off by 2**-25 of a product for each of them: 0.02 steps of 16 bits, and four times that in the worst of many."""
FARTHER: Final = 4.0
"""Times the KL divergence of single codes moved at random: at twice the distance."""
CONTROLS: Final = 4
"""Draws of codes to move."""
COSINE_NEEDED: Final = 0.99
"""One code on the other side moves those behind it, as for tokens; a vector that is made in another way is farther off."""
DECODED: Final = 16
"""Tokens that are fed one at a time."""
KINDS: Final = {8: TensorProto.INT8, 16: TensorProto.INT16}
REASONS: Final = {
    "embed": "the same float32 operations in the same order: none is expected",
    "linear": "a sum in float32 instead of 32 bits; a multiplier of 23 bits; halves to even instead of up",
    "norm": "a square root and a quotient in float32 instead of 30 bits",
    "rotate": "a multiplier of 23 bits; halves to even instead of up",
    "attend": "exponentials from tables of 2**-16 and shares of 1 / 65535 or 1 / 255, rounded, instead of float32 ones",
    "scores": "a multiplier of 23 bits; halves to even instead of up",
    "capped": "a tanh in float32 instead of a table's",
    "table": "the function in float32 instead of float64 when its table was made",
    "multiply": "a multiplier of 23 bits; halves to even instead of up",
    "sum": "multipliers of 30 bits; halves to even instead of up",
}

Array = npt.NDArray[Any]


class SiteRow(BaseModel):
    """One tensor on a grid. differ: share of codes that differ, 0..1; steps: how far the farthest is off.

    local_...: given the oracle's inputs of its node. margin: of the codes that differ so, how far the float number the
    node computed lies from the middle between two codes, in steps, at most; None where none differs, or inside a node.
    own_...: from the tokens on, beside what the oracle makes of the runtime's own inputs of the node.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    kind: str
    bits: int
    codes: int
    local_differ: float
    local_steps: int
    margin: float | None
    own_differ: float
    own_steps: int
    differ: float
    steps: int


class Agreement(BaseModel):
    """argmax_agreement: share of positions where both put the same token first; kl: of the runtime's distributions from
    the oracle's, nats, the mean over positions; fused_...: with all optimizations on; moved_...: of the oracle with as many
    codes moved by one step at random, one of each edge at least. cosine: of an encoder, between both vectors of the text,
    instead of all these. saturates: the fused kernels of this CPU put the answer farther off than single codes explain, and
    do not where ONNX Runtime is told to be exact on x86-64 without VNNI (`session.x64quantprecision`).

    moved: codes of edges that the runtime's rounding moved; what else differs follows from them.

    decoded: tokens fed one at a time behind a prefill; decode_...: their codes at all edges, beside the oracle's, as for a
    site. reasons: why a kind of node may differ, for those that do.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    runtime: str
    positions: int
    sites: tuple[SiteRow, ...]
    moved: int
    argmax_agreement: float | None
    fused_argmax_agreement: float | None
    moved_argmax_agreement: float | None
    kl: float | None
    fused_kl: float | None
    moved_kl: float | None
    cosine: float | None
    fused_cosine: float | None
    saturates: bool
    decoded: int
    decode_local_differ: float
    decode_local_steps: int
    decode_differ: float
    decode_steps: int
    reasons: dict[str, str]
    problems: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Within one step a site, and what else differs follows from that."""
        return not self.problems


def compare(
    folder: str | Path,
    manifest: Mapping[str, Any],
    model: IntegerModel,
    tokens: Sequence[int] | npt.NDArray[np.integer[Any]],
    progress: Progress | None = None,
) -> Agreement:
    """Run the export in `folder` on `tokens`, as many as it has room for, beside the oracle of `model`.

    manifest: that of the folder. Raises Unsupported when ONNX Runtime cannot run the files.
    """
    progress = progress or Silent()
    runner = _Runner(Path(folder), manifest, model)
    ids = np.asarray(tokens, np.int64)[: runner.room]
    progress.begin("comparing with the oracle", 6)
    oracle = Oracle(model)
    truth = oracle.sites(ids, scores=True)
    progress.advance(1)
    local = runner.prefill(ids, given=truth)
    progress.advance(1)
    found = runner.prefill(ids)
    codes = {name.removesuffix(".codes"): value for name, value in found.items() if name.endswith(".codes")}
    own = oracle.sites(ids, scores=True, given=codes)
    progress.advance(1)
    rows = tuple(_rows(runner, truth, local, found, own))
    meant, wanted = (_answer(oracle, part[model.graph.output]) for part in (codes, truth))
    encoder = isinstance(model.spec, EncoderSpec)
    answers = {"": found[runner.answer], "fused_": runner.fused(ids), "exact_": runner.fused(ids, exact=True)}
    said = {
        f"{which}{name}": value
        for which, answer in answers.items()
        for name, value in (_alike if encoder else _beside)(answer, wanted).items()
    }
    if not encoder:
        controls = [_beside(_moved(oracle, ids, rows, seed), wanted) for seed in range(CONTROLS)]
        said |= {f"moved_{name}": float(np.mean([one[name] for one in controls])) for name in controls[0]}
    progress.advance(1)
    local_off, local_far, decoded = runner.decode(ids, truth, truth, given=True)
    off, far, _ = runner.decode(ids, found, truth)
    progress.advance(2)
    far_off = {which: _far_off(which, said) for which in answers}
    allowed = 0 if manifest["exact"] else STEPS_ALLOWED
    problems = [*_apart(rows, local_far, allowed), *_unlike(runner, found[runner.answer], meant)]
    problems += [text for which in ("", "exact_") if (text := far_off[which])]
    return Agreement(
        runtime=f"onnxruntime {ort.__version__}",
        positions=len(ids),
        sites=rows,
        moved=sum(round(row.own_differ * row.codes) for row in rows if row.name in model.graph.edges),
        argmax_agreement=said.get("argmax_agreement"),
        fused_argmax_agreement=said.get("fused_argmax_agreement"),
        moved_argmax_agreement=said.get("moved_argmax_agreement"),
        kl=said.get("kl"),
        fused_kl=said.get("fused_kl"),
        moved_kl=said.get("moved_kl"),
        cosine=said.get("cosine"),
        fused_cosine=said.get("fused_cosine"),
        saturates=far_off["fused_"] is not None and far_off["exact_"] is None,
        decoded=decoded,
        decode_local_differ=local_off,
        decode_local_steps=local_far,
        decode_differ=off,
        decode_steps=far,
        reasons={row.kind: REASONS[row.kind] for row in rows if row.local_differ},
        problems=tuple(problems),
    )


def _apart(rows: Sequence[SiteRow], decode: int, allowed: int) -> Iterator[str]:
    """Nodes that do not compute what the definition says, up to rounding where steps are allowed."""

    def steps(count: int) -> str:
        return "1 step" if count == 1 else f"{count} steps"

    for row in rows:
        if row.local_steps > allowed:
            yield f"{row.name} is {steps(row.local_steps)} from the oracle given the same inputs"
        elif row.margin is not None and row.margin > MIDDLE:
            yield f"{row.name} differs {row.margin:.2f} steps from the middle of two codes given the same inputs"
    if decode > allowed:
        yield f"decode.onnx is {steps(decode)} from the oracle given the same inputs"
    for row in rows:
        if row.own_steps > allowed:
            yield f"{row.name} is {steps(row.own_steps)} from what the oracle makes of the runtime's own inputs"


def _unlike(runner: "_Runner", answer: Array, meant: Array) -> Iterator[str]:
    """An answer that is not what the runtime's last codes stand for, to half a step."""
    off = float(np.abs(answer - meant).max())
    step = runner.grids[runner.graph.output].scale
    if not off < step / 2:
        yield f"{runner.answer} is {off / step:.2f} steps from what its own codes stand for"


def _far_off(which: str, said: Mapping[str, float]) -> str | None:
    """What is wrong where an answer is farther from the oracle's than single codes explain."""
    name, kl = (
        {"": "the graph", "fused_": "the fused graph", "exact_": "the fused graph"}[which],
        said.get(f"{which}kl"),
    )
    if kl is None:
        cosine = said[f"{which}cosine"]
        low = not cosine >= COSINE_NEEDED
        return (
            f"the vector of {name} has a cosine of {cosine:.5f} to the oracle's, less than {COSINE_NEEDED}"
            if low
            else None
        )
    known = f"more than {FARTHER:.0f} times the {said['moved_kl']:.3g} of single codes moved in the oracle"
    return None if kl <= FARTHER * said["moved_kl"] else f"{name} has a KL divergence of {kl:.3g}, {known}"


def _answer(oracle: Oracle, codes: Array) -> Array:
    """What codes of the graph's output stand for: logits, (length, vocab), or a vector, (embedding_size,)."""
    spec = oracle.spec
    return oracle.pool(codes, spec.pooling) if isinstance(spec, EncoderSpec) else oracle.finish(codes)


def _alike(vector: Array, wanted: Array) -> dict[str, float]:
    return {"cosine": float(vector @ wanted / max(float(np.linalg.norm(vector) * np.linalg.norm(wanted)), 1e-12))}


def _beside(found: Array, logits: Array) -> dict[str, float]:
    """Share of positions with the same first token, and mean KL divergence from `logits`; (length, vocab) each."""
    same = float((found.argmax(axis=1) == logits.argmax(axis=1)).mean())
    kls = []
    for one, other in zip(logits, found, strict=True):
        p, q = (row - np.logaddexp.reduce(row) for row in (one.astype(np.float64), other.astype(np.float64)))
        kls.append(float(np.exp(p) @ (p - q)))
    return {"argmax_agreement": same, "kl": float(np.mean(kls))}


def _moved(oracle: Oracle, ids: Array, rows: Sequence[SiteRow], seed: int) -> Array:
    """Logits of the oracle with as many codes of each edge moved by one step as the runtime moved, one at least."""
    random = np.random.default_rng(seed)
    counts = {row.name: max(1, round(row.own_differ * row.codes)) for row in rows}

    def change(name: str, codes: npt.NDArray[np.int16]) -> npt.NDArray[np.int16]:
        grid, flat = oracle.graph.edges[name].grid, codes.reshape(-1).copy()
        places = random.choice(flat.size, counts[name], replace=False)
        step = np.where(random.random(len(places)) < 0.5, -1, 1)
        step = np.where(flat[places] == grid.low, 1, np.where(flat[places] == grid.high, -1, step))
        flat[places] += step.astype(np.int16)
        return flat.reshape(codes.shape)

    return oracle.finish(oracle.sites(ids, change=change)[oracle.graph.output])


class _Runner:
    def __init__(self, folder: Path, manifest: Mapping[str, Any], model: IntegerModel) -> None:
        self.folder, self.manifest, self.model, self.graph = folder, manifest, model, model.graph
        self.length: int | None = manifest["length"]
        self.room = min(self.graph.positions, self.length or self.graph.positions)
        self.grids = {
            name: Grid(bits=s["bits"], scale=s["scale"], zero=s["zero"]) for name, s in manifest["sites"].items()
        }
        self.edges = [name for name, site in manifest["sites"].items() if site["edge"]]
        self.first = next(iter(manifest["models"]))
        nodes = onnx.load(self.folder / self.first, load_external_data=False).graph.node
        made = {name for node in nodes for name in node.output}
        self.floats = [f"{edge}.float" for edge in self.edges if f"{edge}.float" in made]
        self.answer = VECTOR if isinstance(model.spec, EncoderSpec) else self.graph.output
        """The output that is compared in the end: logits, or a vector."""

    def prefill(self, ids: npt.NDArray[np.int64], given: Mapping[str, Array] | None = None) -> dict[str, Array]:
        """The codes of every site, (length, width), or (heads, length, length) inside attention, and the answer as
        `fused` has it.

        given: codes that readers of an edge get instead of what was computed; then the float numbers too, "E.float", of
        edges that are computed in float.
        """
        names = [f"{site}.codes" for site in self.grids]
        names += self.floats if given else [self.answer]
        feed = self._feed(ids)
        if given:
            feed |= self._given(given, slice(0, len(ids)), self.length or len(ids))
        session = self._session(self.first, names, cut=given)
        found = dict(zip(names, session.run(names, feed), strict=True))
        answer = found.pop(self.answer, None)
        result = {name: self._plain(name, value, len(ids)) for name, value in found.items()}
        if answer is not None:
            result[self.answer] = self._own(answer, ids)
        return result

    def _own(self, answer: Array, ids: npt.NDArray[np.int64]) -> Array:
        """What is said of the tokens themselves: their logits, (length, vocab), or the vector, (embedding_size,)."""
        return answer[0] if self.answer == VECTOR else answer[0, : len(ids)]

    def fused(self, ids: npt.NDArray[np.int64], *, exact: bool = False) -> Array:
        """Logits or vector with the optimizations that ONNX Runtime has on when nothing is said. exact: told not to use
        kernels that saturate on x86-64 without VNNI.
        """
        options = ort.SessionOptions()
        if exact:
            options.add_session_config_entry("session.x64quantprecision", "1")
        session = self._load(self.folder / self.first, options)
        return self._own(session.run([self.answer], self._feed(ids))[0], ids)

    def decode(
        self,
        ids: npt.NDArray[np.int64],
        before: Mapping[str, Array],
        truth: Mapping[str, Array],
        *,
        given: bool = False,
    ) -> tuple[float, int, int]:
        """Feed the last tokens one at a time, behind keys and values of `before`, which has codes of all positions.

        given: each node gets the codes of `truth`, the oracle's; otherwise what came before it. Returns the share of
        codes, of all edges, that differ from `truth`, the most steps, and the number of tokens.
        """
        if "decode.onnx" not in self.manifest["models"]:
            return 0.0, 0, 0
        cache = self.manifest["cache"]
        names = [*(f"{edge}.codes" for edge in self.edges), *(entry["new"] for entry in cache)]
        session = self._session("decode.onnx", names, cut=truth if given else None)
        start = max(1, len(ids) - DECODED)
        past: dict[str, Array] = {}
        for entry in cache:
            name, shape = entry["past"].removeprefix("past."), (-1, entry["heads"], entry["head_dim"])
            codes = before.get(name, before.get(f"{name}.codes"))
            assert codes is not None, "keys and values are edges"
            slots = self.length or start
            full = np.full((1, entry["heads"], slots, entry["head_dim"]), entry["fill"], f"int{entry['bits']}")
            full[0, :, :start] = codes[:start].reshape(shape).transpose(1, 0, 2)
            past[entry["past"]] = full
        differ = far = total = 0
        for at in range(start, len(ids)):
            feed = past | {"input_ids": ids[None, at : at + 1], "past_length": np.array([at])}
            if given:
                feed |= self._given(truth, slice(at, at + 1), 1, slots=self.length or at)
            found = dict(zip(names, session.run(names, feed), strict=True))
            for edge in self.edges:
                off = np.abs(found[f"{edge}.codes"][0].astype(np.int64) - truth[edge][at])
                differ, far, total = differ + int((off > 0).sum()), max(far, int(off.max())), total + off.size
            for entry in cache:  # given the oracle's codes, those are also what it puts out as new
                if self.length is None:
                    past[entry["past"]] = np.concatenate([past[entry["past"]], found[entry["new"]]], axis=2)
                elif at < self.length:
                    past[entry["past"]][:, :, at] = found[entry["new"]][:, :, 0]
        return differ / max(total, 1), far, len(ids) - start

    def _given(self, truth: Mapping[str, Array], rows: slice, height: int, slots: int = 0) -> dict[str, Array]:
        """The oracle's codes of some positions as inputs; `height` rows, of which the others hold the code of zero.

        slots: of keys before these positions, which for scores stand in front.
        """
        feed: dict[str, Array] = {}
        for name, grid in self.grids.items():
            if name not in truth:
                continue
            codes = truth[name]
            if name in self.graph.edges:
                full: Array = np.full((height, codes.shape[1]), grid.zero)
                full[: rows.stop - rows.start] = codes[rows]
            else:
                full = np.full((len(codes), height, slots + height), grid.zero)
                part, now = codes[:, rows], rows.stop - rows.start
                before = rows.start if slots else 0
                full[:, :now, :before] = part[:, :, :before]
                full[:, :now, slots : slots + now] = part[:, :, rows]
                full = full.reshape(1, self._kv_heads(name), -1, slots + height)
            feed[f"{name}.given"] = full.astype(f"int{grid.bits}")
        return feed

    def _attend(self, site: str) -> Attend:
        """The node that a site is inside of."""
        for node in self.graph.nodes:
            if isinstance(node, Attend) and site.startswith(f"{node.y.removesuffix('.mixed')}."):
                return node
        raise AssertionError(f"{site} is inside no node")

    def _kv_heads(self, site: str) -> int:
        return self._attend(site).kv_heads

    def seen(self, site: str, length: int) -> npt.NDArray[np.bool_]:
        """Which scores are of any concern, (length, length)."""
        node = self._attend(site)
        age = np.arange(length)[:, None] - np.arange(length)
        return ((age >= 0) | (not node.causal)) & ((age < node.window) | (not node.window))

    def _feed(self, ids: npt.NDArray[np.int64]) -> dict[str, Array]:
        row = np.zeros((1, self.length or len(ids)), np.int64)
        row[0, : len(ids)] = ids
        feed: dict[str, Array] = {"input_ids": row}
        if any(port["name"] == "length" for port in self.manifest["models"][self.first]["inputs"]):
            feed["length"] = np.array([len(ids)])
        return feed

    def _plain(self, name: str, value: Array, length: int) -> Array:
        if value.ndim < 4:
            return value[:length].reshape(length, -1)
        heads = value.reshape(-1, self.length or length, value.shape[-1])  # from (1, kv heads, queries of a group, ..)
        if name.endswith(".codes"):
            return heads[:, :length, :length]
        return heads[:, :length].swapaxes(0, 1).reshape(length, -1)

    def _session(
        self, file: str, names: Sequence[str], *, cut: Mapping[str, Array] | None = None
    ) -> ort.InferenceSession:
        """The file with more outputs; `cut`: with the readers of these sites fed from outside."""
        proto = onnx.load(self.folder / file, load_external_data=False)
        if cut:
            fed = [site for site in self.grids if site in cut]
            outside = {f"{site}.codes": f"{site}.given" for site in fed}
            for node in proto.graph.node:
                for place, name in enumerate(node.input):
                    node.input[place] = outside.get(name, name)
            for site in fed:
                kind, edge = KINDS[self.grids[site].bits], self.graph.edges.get(site)
                shape = [None, edge.width] if edge else [1, self._kv_heads(site), None, None]
                proto.graph.input.append(helper.make_tensor_value_info(f"{site}.given", kind, shape))
        there = {value.name for value in proto.graph.output}
        for name in names:
            if name not in there:
                site, _, what = name.rpartition(".")
                kind = TensorProto.FLOAT if what == "float" else KINDS[self.grids[site].bits]
                proto.graph.output.append(helper.make_tensor_value_info(name, kind, None))
        options = ort.SessionOptions()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(self.folder))
        return self._load(proto.SerializeToString(), options)

    def _load(self, model: Path | bytes, options: ort.SessionOptions) -> ort.InferenceSession:
        options.log_severity_level = 3
        options.enable_mem_reuse = False  # planning it takes half a minute for 2700 nodes of unknown shapes
        try:
            return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # of a dozen kinds that have no base of their own
            what = f"onnxruntime {ort.__version__} cannot load it: {str(error).splitlines()[0]}"
            raise Unsupported(what, str(self.folder), "Take a newer onnxruntime") from error


def _rows(
    runner: _Runner,
    truth: Mapping[str, Array],
    local: Mapping[str, Array],
    found: Mapping[str, Array],
    own: Mapping[str, Array],
) -> Iterator[SiteRow]:
    for site, grid in runner.grids.items():
        if site not in truth:  # the oracle keeps no probabilities
            continue
        exact, end = truth[site].astype(np.int64), found[f"{site}.codes"].astype(np.int64)
        here, there = np.abs(local[f"{site}.codes"].astype(np.int64) - exact), np.abs(end - exact)
        moved = np.abs(end - own[site].astype(np.int64))
        inside = site not in runner.graph.edges
        if inside:
            seen = runner.seen(site, exact.shape[-1])
            here, there, moved = here[:, seen], there[:, seen], moved[:, seen]
        margin = None
        if f"{site}.float" in local and here.any():
            exact_steps = local[f"{site}.float"].astype(np.float64)[here > 0] / grid.scale
            margin = float(np.abs(exact_steps - np.floor(exact_steps) - 0.5).max())
        yield SiteRow(
            name=site,
            kind=runner.manifest["sites"][site]["kind"],
            bits=grid.bits,
            codes=int(here.size),
            local_differ=float((here > 0).mean()),
            local_steps=int(here.max()),
            margin=margin,
            own_differ=float((moved > 0).mean()),
            own_steps=int(moved.max()),
            differ=float((there > 0).mean()),
            steps=int(there.max()),
        )
