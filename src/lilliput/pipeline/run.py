"""One compression on its way: the work in its workspace, the gate, and the artifact at its place; and what that will take."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lilliput import __version__
from lilliput.artifact.amend import amend
from lilliput.artifact.entries import DataInfo, EmbeddingQuality, IntegerInfo, LayerRecord, QualityEntry, SourceInfo
from lilliput.artifact.publish import publish
from lilliput.artifact.schema import SCHEMA_VERSION, Manifest, version_of
from lilliput.artifact.stored import StoredOutliers
from lilliput.artifact.write import ArtifactWriter
from lilliput.core.errors import QualityFailed
from lilliput.core.progress import Progress
from lilliput.core.recipe import Recipe
from lilliput.core.spec import EncoderSpec, ModelSpec
from lilliput.data.images import Pictures
from lilliput.data.streams import Batches
from lilliput.methods.base import BlockQuantizer, IntegerMethod, Method
from lilliput.methods.fisher import gather_for
from lilliput.methods.journal import Journal, State
from lilliput.methods.sources import CheckpointSource, DecoderSource, Source
from lilliput.methods.sweep import FLOAT, Job, Outcome, Sweep
from lilliput.models import Checkpoint, load_encoder
from lilliput.numerics.nested import Quantized
from lilliput.numerics.outliers import Outliers
from lilliput.pipeline.budget import allocate, labels_for, largest
from lilliput.pipeline.card import model_card
from lilliput.pipeline.gate import (
    UNQUANTIZED,
    judge,
    measure,
    measure_integer,
    measure_integer_vectors,
    measure_vectors,
)
from lilliput.pipeline.inputs import Options, calibration, probe, tokenizer_of, told_as
from lilliput.pipeline.integers import run_integer
from lilliput.pipeline.plan import Budget, Work, plan_work
from lilliput.pipeline.report import CompressReport, WidthRow
from lilliput.pipeline.sensitivity import SLICE, Sensitivities
from lilliput.pipeline.train import run_model_methods
from lilliput.pipeline.tune import amended, run_tuners
from lilliput.pipeline.workspace import Workspace


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
        found = "the size is the most it may be"
        if len(options.target.bits) > 1:
            found = f"it will serve {', '.join(map(str, labels_for(work, options.target)))} bits, and {found}"
        warnings.append(f"no weight was read, so no width is chosen yet; {found}")
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
        spec = self.checkpoint.spec
        tokenizer = None if self.pictures else tokenizer_of(self.checkpoint)
        data: Batches | Pictures | None = None
        told: DataInfo | None = None
        if self.work.needs_calibration:
            bos = self.work.maker is not None
            data, told = calibration(spec, self.options, tokenizer, self.spent.batch, bos=bos)
        shown = probe(spec, tokenizer)
        parts = self._parts(tools, told)
        key = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
        with self.workspace:
            resumed = self.workspace.claim(key, parts, resume=self.options.resume)
            if self.options.target:
                report = self._allocate(data, torch.from_numpy(shown), report)
            outcome = self._sweep(key, torch.from_numpy(shown), data, tools, told)
            logits = {name: value.numpy() for name, value in outcome.logits.items()}
            self.progress.say("opening the artifact and comparing it with the original")
            quality: Sequence[QualityEntry | EmbeddingQuality]
            if isinstance(spec, EncoderSpec):
                probe_is = "pictures made by rule" if self.pictures else "sentences of the probe text"
                probe_is = f"the {probe_is} shipped with lilliput"
                quality = measure_vectors(self.folder, shown, logits, probe_is)
            else:
                quality = measure(self.folder, shown[0].tolist(), logits)
            graph: QualityEntry | EmbeddingQuality | None = None
            if self.work.maker:
                bits = self.work.maker.bits
                if isinstance(spec, EncoderSpec):
                    graph = measure_integer_vectors(self.folder, shown, logits[FLOAT], bits, probe_is)
                else:
                    graph = measure_integer(self.folder, shown[0].tolist(), logits[FLOAT], bits)
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

    @property
    def pictures(self) -> bool:
        """Whether the model reads pictures, and so has no tokenizer."""
        return told_as(self.checkpoint) == "pictures"

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
        ratio = {b: r.numpy() for b, r in value.ratio.items()}
        self._writer.put_quantized(name, value.codes.numpy(), scale, zero, table, ratio, _stored(value.outliers))

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


def _stored(outliers: Outliers | None) -> StoredOutliers | None:
    if outliers is None:
        return None
    counts, columns = (part.numpy().astype(np.uint16) for part in (outliers.counts, outliers.columns))
    return StoredOutliers(counts, columns, outliers.values.numpy())
