"""`compress`: a model goes in, one verified artifact comes out, or nothing does."""

import hashlib
import json
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lilliput import __version__
from lilliput.artifact.schema import (
    SCHEMA_VERSION,
    DataFile,
    DataInfo,
    EmbeddingQuality,
    IntegerInfo,
    LayerRecord,
    Manifest,
    QualityEntry,
    SourceInfo,
    version_of,
)
from lilliput.artifact.write import ArtifactWriter, amend, check_output, partial_of, publish
from lilliput.core.errors import ConfigError, Interrupted, OutOfResource, QualityFailed, Unsupported
from lilliput.core.progress import Progress, Silent
from lilliput.core.recipe import Recipe, load_recipe
from lilliput.core.spec import EncoderSpec, ModelSpec, PatchInputs
from lilliput.data.documents import read_documents
from lilliput.data.images import Pictures, draw_pictures, find_pictures, probe_pictures
from lilliput.data.streams import Batches, batches, padded, sentences
from lilliput.data.tokenizer import Tokenizer
from lilliput.methods.base import BlockQuantizer, IntegerMethod, Method, ModelMethod
from lilliput.methods.fisher import gather_for
from lilliput.methods.journal import Journal, State, steps_done
from lilliput.methods.sources import CheckpointSource, DecoderSource, Source
from lilliput.methods.sweep import FLOAT, Job, Outcome, Sweep
from lilliput.models import Checkpoint, load_encoder
from lilliput.numerics.nested import Quantized
from lilliput.pipeline.budget import Target, allocate, check_target, largest
from lilliput.pipeline.card import model_card
from lilliput.pipeline.gate import (
    UNQUANTIZED,
    judge,
    measure,
    measure_integer,
    measure_integer_vectors,
    measure_vectors,
)
from lilliput.pipeline.integers import run_integer
from lilliput.pipeline.plan import Budget, Work, budget, plan_work
from lilliput.pipeline.report import CompressReport, WidthRow
from lilliput.pipeline.sensitivity import SLICE, Sensitivities
from lilliput.pipeline.train import run_model_methods
from lilliput.pipeline.tune import amended, run_tuners
from lilliput.pipeline.workspace import Workspace

PROBE_TOKENS = 128


@dataclass(frozen=True)
class Options:
    """What `compress` was asked for, beside model, place and recipe."""

    calibration: tuple[str, ...]
    field: str | None
    join: bool
    samples: int
    length: int
    seed: int
    max_ram: int | None
    resume: bool
    overwrite: bool
    gate: bool
    target: Target | None


def compress(
    model: str | Path,
    out: str | Path,
    *,
    recipe: str | Path | Recipe | Sequence[dict[str, Any]] = "nested",
    bits: Sequence[int] | None = None,
    group_size: int | None = None,
    target_bits: float | None = None,
    target_size: int | None = None,
    calibration: Sequence[str | Path] = (),
    field: str | None = None,
    join: bool = True,
    samples: int = 128,
    length: int = 512,
    seed: int = 0,
    max_ram: int | None = None,
    resume: bool = True,
    overwrite: bool = False,
    gate: bool = True,
    dry_run: bool = False,
    tower: str | None = None,
    progress: Progress | None = None,
) -> CompressReport:
    """Compress a model into one artifact folder, check it, and only then put it at `out`.

    model: a Hugging Face folder or hub id. out: the artifact, absent, empty, or with `overwrite` an artifact to be
    replaced. recipe: see `core.recipe.load_recipe`; bits and group_size change every stage that has them.
    target_bits, target_size: give every layer the width of its ladder that keeps the loss least while the artifact
    stays inside so many bits a quantized weight, scales and tables counted, or so many bytes of tensor files; it then
    serves one width. Needs calibration text, see docs/budgets.md.
    calibration: text files or a hub dataset for recipes that need one; `samples` rows of `length` tokens are drawn
    from it with `seed`, documents joined end to end or, without `join`, each row from one document; `field` names the
    text in JSONL or Parquet rows. max_ram: bytes of memory to stay below. resume: go on from an interrupted run of the same
    model, data, recipe and versions, whose work waits in OUT.partial. gate: fail when a width is far from the
    original. dry_run: only plan, reading no weights. tower: which encoder of a pair, "text" or "vision" of CLIP.
    An encoder of texts calibrates on lines of the text, one a row, of at most `length` tokens, one of pictures on
    `samples` files of the folder `calibration` names.

    The same arguments give the same bytes on the same machine, resumed or not. Raises LilliputError: ConfigError for options, InputMissing,
    InputCorrupt or InputUnsafe for the model and texts, Unsupported, OutOfResource, QualityFailed (the finished work
    stays, `gate=False` accepts it), Interrupted.
    """
    if not 0 <= seed < 1 << 63:
        raise ConfigError(f"seed is {seed}", where="seed", fix="Give a whole number from 0 to 2**63 - 1")
    target = Target.of(target_bits, target_size)
    options = Options(
        tuple(map(str, calibration)), field, join, samples, length, seed, max_ram, resume, overwrite, gate, target
    )
    out, progress = Path(out), progress or Silent()
    parsed = load_recipe(recipe).override(bits=None if bits is None else list(bits), group_size=group_size)
    checkpoint = Checkpoint.open(model, tower=tower)
    check_output(out, overwrite=overwrite)
    check_apart(out, checkpoint.folder)
    workspace = Workspace(out)
    workspace.check()
    work = plan_work(checkpoint, parsed)
    if target and work.maker:
        what = f"{work.maker.name} gives every block the same width"
        raise ConfigError(what, where="target", fix="Leave the budget out, or give its option bits")
    if target and not isinstance(checkpoint.spec, ModelSpec):
        what = (
            f"a budget weighs what a model loses in predicting tokens, which a {checkpoint.family} encoder does not do"
        )
        raise Unsupported(what, where="target", fix="Give --bits instead")
    if target:
        work = replace(work, needs_calibration=True)
        check_target(work, target)
    whole = bool(target or work.tuners or work.maker) or any(
        isinstance(method, ModelMethod) for run in work.runs for method in run
    )
    spent = budget(work, max_ram=max_ram, length=length, whole=whole)
    if work.needs_calibration and not calibration and not dry_run:
        learns = "widths are chosen by what the model loses on a" if target else "it has a method that learns from"
        what = f"{learns} {told_as(checkpoint)}, and none is given"
        raise ConfigError(what, where=f"recipe {parsed.name}", fix="Give --calibration FILE")
    report = plan_report(model, checkpoint, parsed, work, spent, options)
    if dry_run:
        return report
    check_space(workspace, report)
    torch.manual_seed(seed)
    with resumable(workspace, checkpoint.spec.num_layers + 2):
        return Run(checkpoint, str(model), workspace, parsed, work, spent, options, progress).finish(report)


def check_apart(out: Path, folder: Path) -> None:
    """Raise ConfigError when the artifact, or the folder it is made in, would be the model's, or inside it, or around."""
    there = folder.resolve()
    for here in (out.resolve(), partial_of(out).resolve()):
        if here == there or here in there.parents or there in here.parents:
            what = "the output, or the folder beside it where it is made, is the model's own or one is inside the other"
            raise ConfigError(what, where=str(out), fix="Give a folder apart from the model")


def check_space(workspace: Workspace, report: CompressReport) -> None:
    """Raise OutOfResource when the disk cannot hold the artifact and the work beside it."""
    parent = next(p for p in workspace.root.parents if p.exists())
    free = shutil.disk_usage(parent).free
    need = report.size_bytes + report.work_bytes - workspace.reserved_bytes()
    if free < need:
        what = f"{need:,} bytes are needed and {free:,} are free"
        raise OutOfResource(what, where=str(parent), fix="Free some space or choose another disk")


def plan_report(
    model: str | Path,
    checkpoint: Checkpoint,
    recipe: Recipe,
    work: Work,
    spent: Budget,
    options: Options,
    allocated: bool = False,
) -> CompressReport:
    """Everything a dry run can tell. allocated: widths were chosen for the budget, if there is one."""
    plan = work.plan
    rows = [
        WidthRow(bits=b, size_bytes=plan.bytes_at(b), bits_per_weight=round(plan.bits_per_weight(b), 4))
        for b in plan.bits
    ]
    tokens = options.samples * options.length if work.needs_calibration else 0
    work_bytes = 2 * 4 * tokens * checkpoint.spec.hidden_size
    work_bytes += 2 * 4 * work.parameters if work.sensitive else 0  # the sums, and those that replace them
    if options.target:
        assert isinstance(checkpoint.spec, ModelSpec), "refused for encoders"
        work_bytes += 4 * (SLICE + options.length) * checkpoint.spec.vocab_size
    size_bytes, warnings = plan.total_bytes(), list(checkpoint.notes)
    if options.target and not allocated:
        size_bytes, rows = largest(work, options.target), []
        warnings.append("no weight was read, so no width is chosen yet; the size is the most it may be")
    if options.calibration and not work.needs_calibration:
        warnings.append(f"the recipe learns nothing from {told_as(checkpoint)}; the calibration files are not used")
    return CompressReport(
        path=None,
        source=str(model),
        recipe=[{k: dict(v) for k, v in stage.items()} for stage in recipe.data()],
        source_bytes=checkpoint.nbytes,
        size_bytes=size_bytes,
        rows=rows or [WidthRow(bits=UNQUANTIZED, size_bytes=size_bytes)] * (not options.target),
        layers=work.layers,
        expected_ram_bytes=spent.ram_bytes,
        work_bytes=work_bytes,
        warnings=warnings,
    )


def told_as(checkpoint: Checkpoint) -> str:
    """What the model reads, in a word."""
    spec = checkpoint.spec
    return "pictures" if isinstance(spec, EncoderSpec) and isinstance(spec.inputs, PatchInputs) else "text"


class Run:
    """One compression on its way, in its workspace."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        model: str,
        workspace: Workspace,
        recipe: Recipe,
        work: Work,
        spent: Budget,
        options: Options,
        progress: Progress,
    ) -> None:
        self.checkpoint, self.model, self.recipe = checkpoint, model, recipe
        self.workspace, self.folder, self.notes = workspace, workspace.artifact, workspace.work
        self.work, self.spent, self.options, self.progress = work, spent, options, progress

    def finish(self, report: CompressReport) -> CompressReport:
        """Do what is left to do and publish; see `compress`."""
        self.progress.say("reading the model's files for their checksum")
        tools = {"lilliput": __version__} | {name: version(name) for name in ("torch", "numpy", "tokenizers")}
        tokenizer = None if self.pictures else self._tokenizer()
        data, told = self._calibration(tokenizer)
        probe = self._probe(tokenizer)
        parts = self._parts(tools, told)
        key = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
        with self.workspace:
            resumed = self.workspace.claim(key, parts, resume=self.options.resume)
            if self.options.target:
                report = self._allocate(data, torch.from_numpy(probe), report)
            outcome = self._sweep(key, torch.from_numpy(probe), data, tools, told)
            logits = {name: value.numpy() for name, value in outcome.logits.items()}
            self.progress.say("opening the artifact and comparing it with the original")
            quality: Sequence[QualityEntry | EmbeddingQuality]
            if isinstance(self.checkpoint.spec, EncoderSpec):
                probe_is = "pictures made by rule" if self.pictures else "sentences of the probe text"
                probe_is = f"the {probe_is} shipped with lilliput"
                quality = measure_vectors(self.folder, probe, logits, probe_is)
            else:
                quality = measure(self.folder, probe[0].tolist(), logits)
            graph: QualityEntry | EmbeddingQuality | None = None
            if self.work.maker:
                bits = self.work.maker.bits
                if isinstance(self.checkpoint.spec, EncoderSpec):
                    graph = measure_integer_vectors(self.folder, probe, logits[FLOAT], bits, probe_is)
                else:
                    graph = measure_integer(self.folder, probe[0].tolist(), logits[FLOAT], bits)
            self._describe(quality, graph)
            problems = judge(quality, graph)
            if problems and self.options.gate:
                fix = (
                    "Use other widths or another recipe, or repeat with --no-gate to accept it, which costs no new work"
                )
                raise QualityFailed("; ".join(problems), where="quality gate", fix=fix)
            publish(self.folder, self.workspace.out, overwrite=self.options.overwrite)
            self.workspace.finished()
        by_width = {row.bits: row.model_dump() for row in quality}
        told_of = ("kl", "top1_agreement", "cosine", "error")
        rows = [row.model_copy(update={k: by_width[row.bits].get(k) for k in told_of}) for row in report.rows]
        found = {"path": str(self.workspace.out), "rows": rows, "resumed": resumed}
        return report.model_copy(update=found | {"warnings": [*report.warnings, *problems]})

    # ---- what goes in

    @property
    def pictures(self) -> bool:
        """Whether the model reads pictures, and so has no tokenizer."""
        return told_as(self.checkpoint) == "pictures"

    def _tokenizer(self) -> Tokenizer:
        with TemporaryDirectory() as folder:
            self.checkpoint.export_tokenizer(Path(folder))
            return Tokenizer.open(Path(folder))

    def _calibration(self, tokenizer: Tokenizer | None) -> tuple[Batches | Pictures | None, DataInfo | None]:
        if not self.work.needs_calibration:
            return None, None
        options, spec = self.options, self.checkpoint.spec
        if isinstance(spec, EncoderSpec) and isinstance(spec.inputs, PatchInputs):
            files = [file for source in options.calibration for file in find_pictures(source)]
            shown = draw_pictures(
                files, spec.inputs, samples=options.samples, batch_size=self.spent.batch, seed=options.seed
            )
            folders = tuple(DataFile(name=Path(path).name, sha256=shown.sha256) for path in options.calibration)
            return shown, DataInfo(files=folders, sha256=shown.sha256, tokens=shown.tokens)
        assert tokenizer is not None, "a model that reads no pictures reads text"
        texts = {path: read_documents(path, field=options.field) for path in options.calibration}
        every = [text for documents in texts.values() for text in documents]
        sizes = {"length": min(options.length, spec.context), "samples": options.samples, "seed": options.seed}
        sizes |= {"batch_size": self.spent.batch}
        if isinstance(spec, EncoderSpec):
            drawn = sentences(every, tokenizer, **sizes)
        else:
            drawn = batches(every, tokenizer, join=options.join, bos=self.work.maker is not None, **sizes)
        named = tuple(
            DataFile(name=Path(path).name, sha256=hashlib.sha256("\0".join(documents).encode()).hexdigest())
            for path, documents in texts.items()
        )
        return drawn, DataInfo(files=named, sha256=drawn.sha256, tokens=drawn.tokens)

    def _probe(self, tokenizer: Tokenizer | None) -> npt.NDArray[Any]:
        """What every width is followed through: (1, length) int64 token ids of the shipped text, or a few ids where it
        has no tokens; for an encoder the text's sentences, (sentences, length), or pictures, (pictures, patches, columns).
        """
        spec = self.checkpoint.spec
        inputs = spec.inputs if isinstance(spec, EncoderSpec) else None
        if isinstance(inputs, PatchInputs):
            return probe_pictures(inputs)
        assert tokenizer is not None, "a model that reads no pictures reads text"
        text = files("lilliput.pipeline").joinpath("probe.txt").read_text("utf-8")
        limit = min(PROBE_TOKENS, spec.context)
        if isinstance(spec, ModelSpec):
            known, rows = spec.vocab_size, [tokenizer.encode(text)[:limit]]
        else:
            assert inputs is not None, "an encoder has inputs"
            known = inputs.vocab_size
            rows = [tokenizer.whole(part, limit) for part in re.split(r"(?<=[.?!])\s+", text) if part]
        rows = [[i for i in row if i < known] for row in rows]
        return padded([row if len(row) > 1 else list(range(min(16, known))) for row in rows])

    def _parts(self, tools: dict[str, str], data: DataInfo | None) -> dict[str, Any]:
        """All the bytes depend on, by the word a message would use for it."""
        return {
            "model": self.checkpoint.fingerprint(),
            "part of the model": self.checkpoint.family,
            "recipe": self.recipe.data(),
            "budget": None if self.options.target is None else self.options.target.text,
            "calibration text": None if data is None else data.sha256,
            "seed": self.options.seed,
            "version of lilliput, torch or numpy": {**tools, "schema": SCHEMA_VERSION},
            "--max-ram": [self.spent.batch, self.spent.slice_rows],
            "number of threads": torch.get_num_threads(),
        }

    # ---- the work

    def _allocate(self, data: Batches | Pictures | None, probe: Tensor, report: CompressReport) -> CompressReport:
        """Choose every layer's width for the budget; from here on the recipe is one that names them."""
        target = self.options.target
        assert isinstance(data, Batches), "seen to before any work"
        assert target is not None, "called with a target"
        source, _ = self._source(data, probe)
        notes = self.notes / "budget"
        notes.mkdir(exist_ok=True)
        fisher = gather_for(source, self.work.methods, data, self.notes / "fisher.safetensors", self.progress)
        losses = Sensitivities(source, self.work.methods, data.rows, fisher, notes, self.progress).measure()
        self.recipe, frontier = allocate(self.recipe, self.work, target, losses)
        self.work = replace(plan_work(self.checkpoint, self.recipe), needs_calibration=True)
        planned = plan_report(
            report.source, self.checkpoint, self.recipe, self.work, self.spent, self.options, allocated=True
        )
        return planned.model_copy(update={"frontier": frontier})

    def _sweep(
        self, key: str, probe: Tensor, data: Batches | Pictures | None, tools: dict[str, str], told: DataInfo | None
    ) -> Outcome:
        """Write the artifact's tensors and manifest, or take them from a run that got this far."""
        kept = Journal(self.notes / "outcome")
        if (self.folder / "manifest.json").exists() and (state := kept.load()).step:
            return Outcome(state.streams, state.records)
        source, reference = self._source(data, probe)
        work, slice_rows = self.work, self.spent.slice_rows
        if work.maker:
            return self._integer(key, work.maker, source, reference, probe, data, kept, tools, told)
        texts = data if isinstance(data, Batches) else None  # planning refuses what needs a Fisher for pictures
        fisher = gather_for(source, work.methods, texts, self.notes / "fisher.safetensors", self.progress)
        streamed = data if self._streams() else None
        job = Job(work.methods, work.plan.bits, probe, streamed, slice_rows, work.blocks, fisher)
        records: list[dict[str, Any]] = []
        if work.tuners:
            assert isinstance(data, Batches), "a Tuner needs text, which planning has seen to"
            tuned = run_tuners(
                self.checkpoint, source, job, work.tuners, data, self.notes, self.options.seed, self.progress
            )
            source, job, records = (
                tuned.source,
                replace(job, methods=tuned.methods, calibration=None, blocks=()),
                tuned.records,
            )
            reference = tuned.reference if reference is None else reference
        with ArtifactWriter.start(self.folder, self.work.plan, key) as writer:
            outcome = Sweep(source, Tensors(writer), job, Journal(self.notes), self.progress).run()
            if reference is not None:
                outcome.logits[FLOAT] = reference
            outcome = Outcome(outcome.logits, amended(outcome.records, records, work.tuners))
            kept.save(State(1, outcome.logits, outcome.records))
            self._seal(writer, outcome, tools, told)
        return outcome

    def _integer(
        self,
        key: str,
        maker: IntegerMethod,
        source: Source,
        reference: Tensor | None,
        probe: Tensor,
        data: Batches | Pictures | None,
        kept: Journal,
        tools: dict[str, str],
        told: DataInfo | None,
    ) -> Outcome:
        """As `_sweep`, with the codes that an IntegerMethod made, and their graph."""
        assert isinstance(data, Batches), "an IntegerMethod needs text, which planning has seen to"
        encodes = isinstance(source.spec, EncoderSpec)
        model = load_encoder(self.checkpoint) if encodes else source.whole()
        if reference is None:
            with torch.no_grad():
                reference = model(probe) if encodes else model(probe)[0]
        seed = self.options.seed + sum(map(len, self.work.runs))
        made = run_integer(maker, model, data, self.notes, seed, self.progress)
        last = DecoderSource(made.integers.model, made_by=maker.name)
        job = Job(made.methods(), self.work.plan.bits, probe, slice_rows=self.spent.slice_rows)
        with ArtifactWriter.start(self.folder, self.work.plan, key) as writer:
            swept = Sweep(last, Tensors(writer), job, Journal(self.notes), self.progress).run()
            records = [{**record, "method": maker.name} for record in swept.records]
            outcome = Outcome(swept.logits | {FLOAT: reference}, records)
            kept.save(State(1, outcome.logits, outcome.records))
            made.write(self.folder)
            self._seal(writer, outcome, tools, told, IntegerInfo(record=dict(made.integers.record)))
        return outcome

    def _seal(
        self,
        writer: ArtifactWriter,
        outcome: Outcome,
        tools: dict[str, str],
        told: DataInfo | None,
        integer: IntegerInfo | None = None,
    ) -> None:
        """Put what stands beside the tensors there and finish the folder."""
        self._side_files()
        writer.finish(
            source=self._provenance(),
            recipe=json.loads(json.dumps(self.recipe.data())),
            seed=self.options.seed,
            data=told,
            tools=tools,
            layers=[LayerRecord.model_validate(record) for record in outcome.records],
            integer=integer,
        )

    def _streams(self) -> bool:
        """Whether the calibration text has to be followed through the blocks."""
        chains = (m for chain in self.work.methods.values() for m in chain)
        return bool(self.work.blocks) or any(m.needs.streamed or isinstance(m, BlockQuantizer) for m in chains)

    def _source(self, data: Batches | Pictures | None, probe: Tensor) -> tuple[Source, Tensor | None]:
        """Where the final sweep reads, and the original's probe logits when that is no longer the original."""
        earlier: list[list[Method]] = self.work.runs[:-1]
        if not earlier:
            return CheckpointSource(self.checkpoint), None
        assert not isinstance(data, Pictures), "planning refuses methods of the whole model for an encoder"
        decoder, reference = run_model_methods(
            self.checkpoint, earlier, data, probe, self.notes, self.options.seed, self.progress
        )
        last = earlier[-1][-1]
        return DecoderSource(decoder, made_by=last.name), reference

    # ---- what stands beside the tensors

    def _provenance(self) -> SourceInfo:
        names = self.checkpoint.names()
        return SourceInfo(
            name=self.model if not Path(self.model).exists() else self.checkpoint.folder.resolve().name,
            sha256=self.checkpoint.fingerprint(),
            architecture=self.checkpoint.spec.family,
            parameters=self.checkpoint.parameters,
            dtype=self.checkpoint.info(names[0]).dtype,
            size_bytes=self.checkpoint.nbytes,
        )

    def _side_files(self) -> None:
        plan = self.work.plan
        if not self.pictures:
            self.checkpoint.export_tokenizer(self.folder)
        schema = version_of(plan.spec, plan.entries, integer=self.work.maker is not None)
        told = {"quant_method": "lilliput", "bits": list(plan.bits), "schema_version": schema}
        config = {**self.checkpoint.config, "quantization_config": told}
        if isinstance(plan.spec, ModelSpec) and plan.spec != self.checkpoint.spec:
            config["tie_word_embeddings"] = plan.spec.tied_head
        (self.folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", "utf-8")
        (self.folder / "recipe.yaml").write_text(self.recipe.text(), "utf-8")

    def _describe(
        self,
        quality: Sequence[QualityEntry | EmbeddingQuality],
        graph: QualityEntry | EmbeddingQuality | None,
    ) -> Manifest:
        card = model_card(self._provenance(), self.work.plan, self.recipe, quality, graph)
        (self.folder / "README.md").write_text(card, "utf-8")
        return amend(self.folder, quality=quality, graph_quality=graph)


class Tensors:
    """A sweep's Sink that writes into an artifact."""

    def __init__(self, writer: ArtifactWriter) -> None:
        self._writer = writer

    def quantized(self, name: str, value: Quantized, weight: Tensor) -> None:
        """Write codes, grids and tables."""
        scale = {b: s.numpy() for b, s in value.scale.items()}
        zero = {b: z.numpy() for b, z in value.zero.items()}
        table = {b: t.numpy() for b, t in value.table.items()}
        self._writer.put_quantized(name, value.codes.numpy(), scale, zero, table)

    def floating(self, name: str, value: Tensor) -> None:
        """Write a tensor in the dtype its entry has; bfloat16 goes as its bits."""
        dtype = self._writer.plan.floats[name].dtype
        cast = (
            value.detach().to({"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[dtype]).contiguous()
        )
        array = cast.view(torch.int16).numpy().view(np.uint16) if dtype == "BF16" else cast.numpy()
        self._writer.put_float(name, array)

    def settle(self) -> None:
        """Have it on disk."""
        self._writer.sync()


@contextmanager
def resumable(workspace: Workspace, steps: int) -> Iterator[None]:
    """Turn Ctrl-C into an error that says how far the work is and how to go on."""
    try:
        yield
    except KeyboardInterrupt:
        what = f"stopped after {steps_done(workspace.work)} of {steps} steps"
        if workspace.root.exists():
            what += f"; what is done is kept in {workspace.root}"
        fix = "Repeat the same command to go on from there"
        raise Interrupted(what, where=str(workspace.out), fix=fix) from None
