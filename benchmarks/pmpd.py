"""Quality and speed of schedules beside constant widths: prompt at one width, answer at falling ones.

    python benchmarks/pmpd.py --text valid.jsonl.gz [--mixed NAME=FILE[:FIELD] ..] [--work DIR] [--quick]
    python benchmarks/pmpd.py --part speed --speed-artifact 1.1b.lilliput --text valid.jsonl.gz

Quality is taken along the float model's greedy continuation of prompts cut out of held-out documents; the schedules are
fitted on prompts of other documents of the same files. Figures are means over prompts with 95 % intervals by bootstrap
over prompts, paired where two schedules are compared. The tail is the last third of each answer. The artifact, the
references and every figure of an answer are made once and kept in --work, so a stopped run goes on. --mixed adds a
population of several kinds of text, --text among them, where `kinds` has the steps searched for each kind by itself, what
knowing the kind is worth, and `knows` takes for each prompt the best choice of steps at thirds, having seen what all of
them lose on it: the most that choosing by prompt can gain.
Writes benchmarks/results/pmpd.jsonl.
"""

import argparse
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from harness import emit
from lilliput.apps.cli.output import table
from lilliput.artifact.schema import fingerprint
from lilliput.data.documents import read_documents
from lilliput.engine import Engine
from lilliput.engine.schedules.base import Schedule
from lilliput.engine.schedules.fixed import Constant, Static
from lilliput.engine.schedules.learned import Learned
from lilliput.engine.schedules.sure import Entropy
from lilliput.engine.schedules.text import parse
from lilliput.measure import along as follow
from lilliput.measure.continuations import Author, Case, Notebook, settled, write_answers
from lilliput.measure.rouge import rouge_l
from lilliput.scheduling import Found, ScheduleJob, find_schedule
from lilliput.scheduling.learn import PARTS, look
from lilliput.scheduling.search import choices_of, grid_of, static

F64 = npt.NDArray[np.float64]
ROOT = Path(__file__).parents[1]
MODEL = ROOT / "assets" / "tales7m"
LADDER = (4, 3, 2)
RESAMPLES = 2000
COLUMNS = {
    "schedule": "schedule",
    "average_bits": "bits",
    "kl": "KL",
    "kl_ci95": "95 %",
    "beside_constant": "less KL than constant",
    "beside_constant_ci95": "95 %",
    "beside_static": "than searched",
    "beside_static_ci95": "95 %",
    "tail_perplexity": "tail perplexity",
    "rouge_l": "ROUGE-L",
    "rouge_l_ci95": "95 %",
    "tokens_per_s": "tokens/s",
}


@dataclass(frozen=True)
class Size:
    """How much is measured: prompts to fit on and to measure on, tokens of an answer, rounds of timing."""

    fit: int
    test: int
    tokens: int
    rounds: int


FULL, QUICK = Size(48, 200, 256, 3), Size(24, 8, 24, 1)


class Kinds(dict[str, list[list[int]]]):
    """Prompts by the name of their source."""

    def all(self) -> list[list[int]]:
        """Every prompt, kind after kind."""
        return [prompt for prompts in self.values() for prompt in prompts]

    def of(self, cases: Sequence[Case]) -> list[str]:
        """The kind of each case."""
        names = {tuple(prompt): name for name, prompts in self.items() for prompt in prompts}
        return [names[case.prompt] for case in cases]


@dataclass
class Rows:
    """One schedule along every answer, (cases,) each. kl: mean nats. tail: summed nats of the last third's tokens."""

    kl: F64
    tail: F64
    tail_tokens: F64
    bits: F64
    forwards: F64
    rouge: F64 | None = None

    def average_bits(self, rows: Any = slice(None)) -> float:
        """Bits of all decode forwards over their number."""
        return float(self.bits[rows].sum() / self.forwards[rows].sum())


def cut(texts: Sequence[str], engine: Engine, count: int, seed: int) -> list[list[int]]:
    """Cut `count` prompts of 32 to 192 tokens out of documents, a few out of long ones, none overlapping."""
    draw, prompts = random.Random(seed), list[list[int]]()
    for text in texts:
        ids = engine.tokenizer.encode(text)
        for start in range(0, len(ids), max(512, len(ids) // 4)):
            piece = ids[start : start + draw.randint(32, 192)]
            if len(piece) >= 32:
                prompts.append(piece if start == 0 else [*ids[:1], *piece[1:]])  # BOS stands first
    draw.shuffle(prompts)
    return prompts[:count]


def parted(documents: Sequence[str], seed: int = 0) -> tuple[list[str], list[str]]:
    """A quarter of the documents to fit on, and the others."""
    order = list(documents)
    random.Random(seed).shuffle(order)
    return order[: max(1, len(order) // 4)], order[max(1, len(order) // 4) :]


def prompts_of(sources: Sequence[str], engine: Engine, size: Size) -> tuple[Kinds, Kinds]:
    """Prompts to fit on and to measure on by kind, as many of each. A source is NAME=FILE or NAME=FILE:FIELD."""
    fit, test = Kinds(), Kinds()
    for source in sources:
        name, _, place = source.partition("=")
        path, _, field = place.partition(":")
        mine, others = parted(_split(read_documents(path, field=field or None)))
        fit[name] = cut(mine, engine, -(-size.fit // len(sources)), 1)
        test[name] = cut(others, engine, -(-size.test // len(sources)), 2)
    return fit, test


def _split(documents: Sequence[str]) -> list[str]:
    """A plain text file is one document: cut it into parts of 4,000 characters."""
    if len(documents) > 1:
        return list(documents)
    return [documents[0][at : at + 4000] for at in range(0, len(documents[0]), 4000)]


def fitted(
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    author: Author,
    size: Size,
    work: Path,
    tolerances: Sequence[float],
) -> dict[str, Found]:
    """Search and learn on the prompts to fit on."""
    found: dict[str, Found] = {}
    for tolerance in tolerances:
        for method in ("learned", "features", "search"):
            job = ScheduleJob(
                method=method,
                tolerance=tolerance,
                max_new_tokens=size.tokens,
                ladder=LADDER,
                watch=min(8, size.tokens // 4),
            )
            found[f"{method} {tolerance:.0%}"] = one = find(engine, prompts, job, author, work)
            print(method, tolerance, one.schedule, flush=True)
    return found


def find(engine: Engine, prompts: Sequence[Sequence[int]], job: ScheduleJob, author: Author, work: Path) -> Found:
    """Do one job; all of them share a notebook, so no candidate is scored on a prompt twice."""
    return find_schedule(engine, prompts, job, author=author, author_name="float", notebook=work / "fit.jsonl")


def by_kind(
    engine: Engine, fit: Kinds, kinds: Sequence[str], author: Author, size: Size, work: Path, tolerance: float
) -> list[Schedule]:
    """For each case the steps searched on the prompts of its kind alone."""
    job = ScheduleJob(tolerance=tolerance, max_new_tokens=size.tokens, ladder=LADDER)
    steps = {name: find(engine, prompts, job, author, work).schedule for name, prompts in fit.items()}
    print("kinds", tolerance, {name: str(schedule) for name, schedule in steps.items()}, flush=True)
    return [steps[kind] for kind in kinds]


def shuffled(steps: Schedule, cases: Sequence[Case], seed: int = 0) -> list[Schedule]:
    """For each answer the widths of `steps`, dealt to its forwards at random."""
    draw, made, at = random.Random(seed), list[Schedule](), steps.steps()
    assert at is not None
    for case in cases:
        widths = [next(bits for start, bits in reversed(at) if start <= t) for t in range(case.forwards)]
        draw.shuffle(widths)
        runs, start = list[tuple[int, int]](), 0
        for bits, run in groupby(widths):
            runs.append((start, bits))
            start += len(list(run))
        made.append(Static(at=tuple(runs), allow_raise=True, prefill=at[0][1]))
    return made


def swapped(chooser: Learned, engine: Engine, cases: Sequence[Case], size: Size, seed: int = 0) -> list[Schedule]:
    """The steps the classifier chooses, each handed to another prompt: its prior without its insight."""
    job, chosen = ScheduleJob(max_new_tokens=size.tokens), list[Schedule]()
    for case in cases:
        found = look(engine, case, job, LADDER[0], 0)
        assert found is not None
        places = chooser.logits(found.keys, found.values).argmax(1)
        choice = chooser.ascending([chooser.grid[place] for place in places])
        chosen.append(static(LADDER, choice, size.tokens))
    random.Random(seed).shuffle(chosen)
    return chosen


def along(
    engine: Engine,
    author: Author,
    cases: Sequence[Case],
    runs: dict[str, Schedule | list[Schedule]],
    notebook: Notebook,
) -> dict[str, Rows]:
    """Follow every schedule along every answer, those that come to the same widths there once; the float model meets
    each answer once. What is in the notebook is not measured again."""
    told: dict[str, list[tuple[float, ...]]] = {name: [] for name in runs}
    for i, case in enumerate(cases):
        chosen = [settled(engine, case, run[i] if isinstance(run, list) else run) for run in runs.values()]
        keys, from_ = [f"{case.key} {one}" for one in chosen], len(case.answer) * 2 // 3
        absent = {key: one for key, one in zip(keys, chosen, strict=True) if key not in notebook}
        found = follow.along(engine, author, case, list(absent.values())) if absent else []
        for key, one in zip(absent, found, strict=True):
            tail, bits = one.surprise[from_:], one.widths
            notebook.note(key, [float(one.kl.mean()), float(tail.sum()), len(tail), sum(bits), len(bits)])
        for name, key in zip(runs, keys, strict=True):
            told[name].append(tuple(notebook[key]))
        if i % 10 == 9:
            print(f"{i + 1} of {len(cases)} answers", flush=True)
    return {name: Rows(*np.array(rows, dtype=np.float64).T) for name, rows in told.items()}


def knowing(choices: Sequence[Rows], widest: Rows, tolerance: float) -> Rows:
    """For each case the choice of the least loss plus price times bits, at the price of the fewest bits at which all
    together lose `tolerance` of the perplexity at most: choosing by prompt as well as can be."""
    kl = np.stack([row.kl for row in choices], axis=1)
    bits, of = np.stack([row.bits for row in choices], axis=1), np.arange(len(kl))
    mean_bits = bits / widest.forwards[:, None]
    allowed = widest.kl.mean() + np.log1p(tolerance)
    picks = [(kl + price * mean_bits).argmin(1) for price in [0.0, *np.logspace(-5, 1, 601)]]
    best = min((pick for pick in picks if kl[of, pick].mean() <= allowed), key=lambda pick: bits[of, pick].sum())

    def chosen(name: str) -> F64:
        return np.stack([getattr(row, name) for row in choices], axis=1)[of, best]

    return Rows(*(chosen(name) for name in ("kl", "tail", "tail_tokens", "bits", "forwards")))


def written(
    engine: Engine, cases: Sequence[Case], runs: dict[str, Schedule | list[Schedule]], rows: dict[str, Rows], size: Size
) -> None:
    """Add ROUGE-L of what every schedule writes."""
    for name, run in runs.items():
        scores = []
        for start in range(0, len(cases), 16):
            part = cases[start : start + 16]
            schedule = run[start : start + 16] if isinstance(run, list) else run
            made = engine.generate_batch([c.prompt for c in part], schedule=schedule, max_new_tokens=size.tokens)
            scores += [rouge_l(done.tokens, case.answer) for done, case in zip(made, part, strict=True)]
        rows[name].rouge = np.array(scores)
        print("written", name, flush=True)


def interpolated(rows: dict[str, Rows], names: Sequence[str], bits: float, of: Any) -> float:
    """The least KL at `bits` that handing some prompts one of the named schedules and others another comes to, on the
    cases `of`: the lower hull of their points."""
    points = sorted((rows[name].average_bits(of), float(rows[name].kl[of].mean())) for name in names)
    hull: list[tuple[float, float]] = []
    for b, k in points:
        while len(hull) > 1 and (hull[-1][1] - hull[-2][1]) * (b - hull[-2][0]) >= (k - hull[-2][1]) * (
            hull[-1][0] - hull[-2][0]
        ):
            hull.pop()
        hull.append((b, k))
    return float(np.interp(bits, [b for b, _ in hull], [k for _, k in hull]))


def interval(figure: Callable[[Any], float], cases: int, seed: int = 0) -> tuple[float, tuple[float, float]]:
    """A figure of all cases, and its 95 % interval over resampled ones."""
    draw = np.random.default_rng(seed)
    values = [figure(draw.integers(0, cases, cases)) for _ in range(RESAMPLES)]
    low, high = (float(f"{edge:.6g}") for edge in np.percentile(values, [2.5, 97.5]))
    return figure(slice(None)), (low, high)


def report(
    population: str,
    rows: dict[str, Rows],
    texts: dict[str, str],
    line: Sequence[str],
    size: Size,
    kinds: Sequence[str] = (),
    more: Sequence[Rows] = (),
) -> list[Any]:
    """One line a schedule: its figures, and its KL beside constants and searched steps of the same average bits.

    kinds: of the cases; where they differ a line also has the bits and the KL of each. more: steps the same for all
    prompts that have no line of their own, and stand among the searched ones.
    """
    count, told = len(next(iter(rows.values())).kl), []
    others = {f"choice {i}": row for i, row in enumerate(more)}
    for name, row in rows.items():
        kl, kl_ci = interval(lambda of, row=row: float(row.kl[of].mean()), count)
        fields: dict[str, Any] = {
            "part": "quality",
            "population": population,
            "schedule": name,
            "text": texts[name],
            "prompts": count,
            "average_bits": row.average_bits(),
            "kl": kl,
            "kl_ci95": kl_ci,
            "tail_perplexity": float(np.exp(row.tail.sum() / row.tail_tokens.sum())),
            "new_tokens": size.tokens,
        }
        for beside, names in (("constant", ["4", "3", "2"]), ("static", [*line, *others])):
            if name not in names:

                def less(of: Any, row: Rows = row, names: Sequence[str] = names) -> float:
                    return interpolated(rows | others, names, row.average_bits(of), of) - float(row.kl[of].mean())

                fields[f"beside_{beside}"], fields[f"beside_{beside}_ci95"] = interval(less, count)
        twins = {"3": "prompt 4, then 3", "2": "prompt 4, then 2", "random": "thirds", "swapped": "learned 1%"}
        for other, twin in twins.items():
            if other in rows and name == twin:
                gain = interval(lambda of, a=rows[other], b=row: float((a.kl[of] - b.kl[of]).mean()), count)
                fields[f"less_kl_than_{other}"], fields[f"less_kl_than_{other}_ci95"] = gain
        if len(set(kinds)) > 1:
            places = {kind: np.flatnonzero(np.array(kinds) == kind) for kind in dict.fromkeys(kinds)}
            fields["bits_by_kind"] = {k: round(row.average_bits(at), 3) for k, at in places.items()}
            fields["kl_by_kind"] = {k: float(f"{row.kl[at].mean():.4g}") for k, at in places.items()}
        if row.rouge is not None:
            fields["rouge_l"], fields["rouge_l_ci95"] = interval(lambda of, r=row.rouge: float(r[of].mean()), count)
        told.append(fields)
    return told


def quality(
    population: str, sources: Sequence[str], engine: Engine, author: Author, size: Size, work: Path
) -> list[Any]:
    """Fit, measure and report one population. Returns its lines."""
    fit, test = prompts_of(sources, engine, size)
    work.mkdir(parents=True, exist_ok=True)
    found = fitted(engine, fit.all(), author, size, work, (0.01, 0.05))
    notebook = Notebook(work / "test.jsonl", {"tokens": size.tokens, "model": str(engine.artifact.path)})
    cases = write_answers(test.all(), author, size.tokens, notebook)
    notebook.close()
    kinds = test.of(cases)
    thirds = static(LADDER, (size.tokens // 3, size.tokens * 2 // 3), size.tokens)
    runs: dict[str, Schedule | list[Schedule]] = {str(b): Constant(bits=b) for b in LADDER}
    if population == "tales":  # what falling as such does is asked of one kind of text; of several, what choosing does
        runs["prompt 4, then 2"] = parse("4@prompt,2@0")
        runs |= {"thirds": thirds, "random": shuffled(thirds, cases)}
    runs |= {name: one.schedule for name, one in found.items()}
    if len(fit) > 1:
        runs |= {f"kinds {t:.0%}": by_kind(engine, fit, kinds, author, size, work, t) for t in (0.01, 0.05)}
    chooser = found["learned 1%"].schedule
    assert isinstance(chooser, Learned)
    runs |= {"swapped": list(swapped(chooser, engine, cases, size)), "entropy": Entropy(ladder=LADDER)}
    every = ScheduleJob(tolerance=0.05, max_new_tokens=size.tokens, ladder=LADDER, exhaustive=True)
    best = [row.schedule for row in find(engine, fit.all(), every, author, work).frontier if row.best]
    line = [f"frontier {text}" for text in best[:: max(1, len(best) // 6)] if "@" in text]
    runs |= {name: parse(name.removeprefix("frontier ")) for name in line}
    choices: dict[str, Schedule | list[Schedule]] = {}
    if population != "tales":
        every_third = choices_of(grid_of(size.tokens, PARTS), len(LADDER) - 1)
        choices = {f"choice {one}": one for one in (static(LADDER, choice, size.tokens) for choice in every_third)}
    about = {"model": fingerprint(engine.artifact.manifest), "engine": [engine.kv, engine.activations]}
    notebook = Notebook(work / "along.jsonl", about | {"author": "float"})
    rows = along(engine, author, cases, runs | choices, notebook)
    notebook.close()
    thirds_of = {name: rows.pop(name) for name in choices}
    if thirds_of:
        rows |= {f"knows {t:.0%}": knowing(list(thirds_of.values()), rows["4"], t) for t in (0.01, 0.05)}
    writing = {"4", "3", "2", "thirds", "search 1%", "search 5%", "learned 1%", "features 1%", "entropy"}
    if population == "tales":  # the table of the mixed one is about KL
        written(engine, cases, {name: run for name, run in runs.items() if name in writing}, rows, size)
    fixed = {name: str(run) for name, run in runs.items() if not isinstance(run, list)}
    texts = {name: fixed.get(name, "one a prompt") for name in rows}
    same_for_all = ["4", *line, "search 1%", "search 5%", "3", "2"]
    told = report(population, rows, texts, same_for_all, size, kinds, list(thirds_of.values()))
    for fields in told:
        kept = {"fit_prompts": len(fit.all()), "sources": [source.partition("=")[0] for source in sources]}
        fields["answer_tokens"] = float(np.mean([len(case.answer) for case in cases]))
        emit("pmpd", **fields, **kept)
    return told


def speed(engine: Engine, runs: dict[str, dict[str, Any]], prompt: Sequence[int], size: Size) -> dict[str, Any]:
    """Decode speed of every run in interleaved rounds, the median, beside that of constant 4 in the same round."""
    engine.tokenizer.eos_ids = ()  # every answer is as long as asked for
    for options in runs.values():  # first touch of every width's pages
        engine.generate(prompt, max_new_tokens=4, **options)
    rates: dict[str, list[float]] = {name: [] for name in runs}
    made: dict[str, Any] = {}
    for _ in range(size.rounds):
        for name, options in runs.items():
            made[name] = engine.generate(prompt, max_new_tokens=size.tokens, **options)
            rates[name].append((len(made[name].tokens) - 1) / made[name].decode_s)
        print("round", {name: round(values[-1], 1) for name, values in rates.items()}, flush=True)
    told = {}
    for name, one in made.items():
        ratios = [a / b for a, b in zip(rates[name], rates["4"], strict=True)]
        fields = {
            "tokens_per_s": float(np.median(rates[name])),
            "times_constant_4": float(np.median(ratios)),
            "times_range": [min(ratios), max(ratios)],
            "average_bits": one.average_bits,
            "acceptance": one.acceptance,
            "same_tokens_as_4": one.tokens == made["4"].tokens,
        }
        told[name] = fields
        emit("pmpd", part="speed", artifact=engine.artifact.path.name, schedule=name, threads=engine.threads,
             rounds=size.rounds, new_tokens=size.tokens, prompt_tokens=len(prompt), **fields)  # fmt: skip
    return told


def speed_runs(texts: Sequence[str], size: Size, drafts: bool) -> dict[str, dict[str, Any]]:
    """Constant widths, drafts, the schedules of the given texts, and the widths of the last in random order."""
    runs: dict[str, dict[str, Any]] = {str(bits): {"schedule": Constant(bits=bits)} for bits in LADDER}
    if drafts:
        runs |= {f"4, drafts at {bits}": {"bits": 4, "draft_bits": bits} for bits in LADDER[1:]}
    runs |= {text: {"schedule": parse(text)} for text in texts}
    (dealt,) = shuffled(parse(texts[-1]), [Case((0,), (0,) * size.tokens)])
    return runs | {f"{texts[-1]} in random order": {"schedule": dealt}}


def made_artifact(work: Path, quick: bool) -> Path:
    """The nested artifact of tales7m, made once: gptq and a short tuning, for --quick round-to-nearest."""
    from lilliput.pipeline import compress

    folder = work / ("quick.lilliput" if quick else "tales7m.lilliput")
    if not folder.exists():
        wide = {"bits": [2, 3, 4, 8], "group_size": 64, "ragged": True, "end_bits": [4, 8]}
        recipe = [{"rtn": {**wide, "sym": False}}] if quick else [{"gptq": wide}, {"tune": {"steps": 60}}]
        data = () if quick else (MODEL / "calibration.txt",)
        compress(str(MODEL), folder, recipe=recipe, calibration=data, samples=64, length=256)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", required=True, help="held-out text, JSONL or plain")
    parser.add_argument("--mixed", action="append", default=[], metavar="NAME=FILE[:FIELD]")
    parser.add_argument("--part", choices=["all", "quality", "mixed", "speed"], default="all")
    parser.add_argument("--speed-artifact", type=Path, help="an artifact to time instead, such as a 1.1B one")
    parser.add_argument("--speed-schedule", action="append", default=[], metavar="TEXT", help="as 4@0,3@85,2@170")
    parser.add_argument("--no-drafts", action="store_true", help="time no drafts")
    parser.add_argument("--rounds", type=int, help="of timing; by default 3")
    parser.add_argument("--tokens", type=int, help="of an answer; by default 256")
    parser.add_argument("--prompts", type=int, help="to measure on, a population; by default 200")
    parser.add_argument("--fit", type=int, help="prompts to fit on; by default 48")
    parser.add_argument("--work", type=Path, default=Path("build/pmpd"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    from lilliput.measure.reference import WritingOriginal
    from lilliput.models import Checkpoint

    size, work = QUICK if arguments.quick else FULL, arguments.work
    size = replace(size, test=arguments.prompts or size.test, fit=arguments.fit or size.fit)
    size = replace(size, rounds=arguments.rounds or size.rounds, tokens=arguments.tokens or size.tokens)
    work.mkdir(parents=True, exist_ok=True)
    if arguments.part == "speed" and arguments.speed_artifact:
        time_it(Engine(arguments.speed_artifact, threads=arguments.threads), arguments, size)
        return
    engine = Engine(made_artifact(work, arguments.quick), threads=arguments.threads)
    own = f"tales={arguments.text}"
    for name, sources in (("tales", [own]), ("mixed", [own, *arguments.mixed])):
        part = "quality" if name == "tales" else "mixed"
        if arguments.part in ("all", part) and (name == "tales" or arguments.mixed):
            author = WritingOriginal(Checkpoint.open(MODEL), engine.tokenizer.eos_ids, threads=arguments.threads)
            told = quality(name, sources, engine, author, size, work / f"{name}{'-quick' * arguments.quick}")
            print(f"{name}: {told[0]['prompts']} prompts, answers of {told[0]['answer_tokens']:.0f} tokens")
            print(table(told, COLUMNS))
    if arguments.part in ("all", "speed"):
        place = arguments.speed_artifact
        time_it(Engine(place, threads=arguments.threads) if place else engine, arguments, size)


def time_it(engine: Engine, arguments: argparse.Namespace, size: Size) -> None:
    """Time every run on one artifact and print the table."""
    prompt = engine.tokenizer.encode(read_documents(arguments.text)[0])[:64]
    runs = speed_runs(arguments.speed_schedule or ["4@0,3@85,2@170"], size, not arguments.no_drafts)
    found = speed(engine, runs, [token % engine.spec.vocab_size for token in prompt], size)
    columns = {key: key.replace("_", " ") for key in ("schedule", *next(iter(found.values())))}
    print(table([{"schedule": name, **fields} for name, fields in found.items()], columns))


if __name__ == "__main__":
    main()
