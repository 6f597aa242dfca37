"""The whole job, top to bottom: load, probe, plan, adapt, train, report; what ``aletheia train`` does."""

import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from datetime import date
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Literal

from aletheia.adapters.adapt import adapt
from aletheia.anatomy.checkpoint import Checkpoint
from aletheia.anatomy.fingerprint import identify
from aletheia.anatomy.schema import ModelIdentity
from aletheia.anatomy.settings import LoadSettings
from aletheia.data.examples import Example, Examples
from aletheia.data.rows import Rows, load_rows
from aletheia.data.settings import DataSettings
from aletheia.data.templates import writes_date
from aletheia.errors import TrainingError
from aletheia.files import is_sealed, sibling, write_text
from aletheia.job.adapter import Start
from aletheia.job.finish import complete, push
from aletheia.job.ready import Ready
from aletheia.job.room import bytes_by, room_for
from aletheia.job.settings import JobSettings
from aletheia.job.source import (
    Source,
    check_whole,
    checkpoint_as_asked,
    is_streamed,
    load_for,
    show_first,
    split_for,
    stream_for,
)
from aletheia.planning.make import every_layer_bytes
from aletheia.planning.make import plan as make_plan
from aletheia.planning.plan import Plan, PlanSettings, layer_ranges
from aletheia.prefix.cache import PrefixCache
from aletheia.prefix.fill_streamed import fill_streamed, streamed_cache
from aletheia.probing import resident
from aletheia.probing import streamed as by_layer
from aletheia.probing.scores import Scores
from aletheia.progress import Progress, Say, say_nothing, to_stderr
from aletheia.reporting.plan_text import plan_sentences, speed_sentence
from aletheia.runs.folder import CONFIG_FILE, RunFolder
from aletheia.runs.manifest import TrainingCheckpoint, check_same_run, newest_checkpoint, verified
from aletheia.runs.saved import continue_adapter, plan_of_adapter
from aletheia.runs.schema import PLAN_FILE, SCORES_FILE, Run
from aletheia.settings import MOST_EPOCHS
from aletheia.training.interrupts import Interrupts, interrupts
from aletheia.training.loop import largest_batch, planned_passes, rows_of_steps, training_arguments
from aletheia.training.processes import Launch
from aletheia.training.settings import Recompute, TrainSettings
from aletheia.training.train import Prepared, train


def fine_tune(
    model: str | Mapping[str, Any] | LoadSettings,
    data: str | Mapping[str, Any] | DataSettings,
    out: str | Path,
    plan: str | Path | Mapping[str, Any] | PlanSettings | None = None,
    training: Mapping[str, Any] | TrainSettings | None = None,
    overwrite: bool = False,
    resume: Literal["auto", "never"] | str | Path = "auto",
    say: Say | None = None,
) -> Run:
    """Fine-tune the layers that matter: probe, plan, adapt, train and report, or follow a plan.

    The same as ``aletheia train``, with the same defaults. Called again with the same settings, an interrupted run
    resumes from its last complete checkpoint. Under ``torchrun`` or ``accelerate launch`` all processes call this
    function; the first one writes.

    Args:
        model: hub id, folder or file, or :class:`aletheia.LoadSettings`.
        data: rows to learn from, or :class:`aletheia.DataSettings`.
        out: the run folder.
        plan: a plan file, or :class:`aletheia.PlanSettings`.
        training: :class:`aletheia.TrainSettings`; all settings may be given as mappings, too.
        overwrite: replace a finished run in ``out``.
        resume: ``auto`` resumes an interrupted run in ``out``, ``never`` starts from the beginning, a path resumes
            from that checkpoint.
        say: receives a line for each phase, and one at least every 30 seconds during it, from another thread; by
            default, lines go to stderr.

    Returns:
        The finished run.

    Raises:
        AletheiaError: one line with the cause; settings and the folder are checked before anything is loaded.
    """
    settings = JobSettings.of(model, data, plan, training)
    training_arguments(settings.training, "")  # Trainer's own checks
    output = say or to_stderr
    with ExitStack() as stack:
        interrupted = stack.enter_context(interrupts())
        launch = stack.enter_context(Launch.join())
        folder = stack.enter_context(launch.claim(out, overwrite, "never" if resume == "never" else "auto"))
        interrupted.checkpoints = folder.checkpoints
        job = Job(settings, folder, launch, output if launch.is_first else say_nothing, interrupted)
        return job.run(None if resume in ("auto", "never") else Path(resume))


@dataclass
class Job:
    """One call of :func:`fine_tune`, step by step; a streamed probe keeps its files in ``work``."""

    settings: JobSettings
    folder: RunFolder
    launch: Launch
    say: Say
    interrupted: Interrupts
    seconds: dict[str, float] = field(default_factory=dict)
    work: Path | None = None
    started: float = field(default_factory=time.perf_counter)

    def ready(self, resume: Path | None = None, shows_row: bool = True) -> Ready:
        """Load, probe and plan; with ``shows_row``, also say how the model sees the first row."""
        settings = self.settings
        start = Start.of(settings)
        given = self._given()
        found = self._checkpoint(resume)
        asked = settings.data
        self._set_date(found)
        settings = self.settings
        skip = settings.data.skip_unusable
        rows = load_rows(settings.data.data, skip)
        eval_rows = load_rows(settings.data.eval_data, skip) if settings.data.eval_data else None
        self.say(f"load   {settings.model.model}")
        with self._timed("load"), Progress("load", 0, "", self.say):
            base, data = self._load(rows, start)
        if not writes_date(base.tokenizer):  # the date changes neither such a run nor its record
            self.settings = settings = settings.model_copy(update={"data": asked})
        if shows_row:
            show_first(data, base.tokenizer, self.say)
        data, held_out = split_for(base, data, eval_rows, settings.data, settings.training.seed, self.say)
        if start is None:
            scores, plan = self._plan(base, data, held_out, given, found)
            adapted = None
        else:
            scores, plan, adapted = self._go_on(base, data, start, found)
        return Ready(base, data, held_out, plan, scores, start, adapted, found)

    def run(self, resume: Path | None = None) -> Run:
        """Load, probe, plan, adapt, train, report."""
        ready = self.ready(resume)
        settings, folder = self.settings, self.folder
        base, data, held_out, plan, scores = ready.base, ready.data, ready.held_out, ready.plan, ready.scores
        start, adapted, prefix = ready.start, ready.adapted, None
        if adapted is None:
            prefix = self._prefix(base, plan, data, held_out)
            adapted = self._adapted(base, plan)
        self.say(f"plan   {' '.join((*plan_sentences(plan), speed_sentence(plan)))}")
        training = settings.training.model_copy(update={"gradient_checkpointing": self.recompute(ready)})
        if self.launch.is_first:
            self._keep(plan, scores)
        unquantized = None
        if settings.training.correct_quantization:
            unquantized = checkpoint_as_asked(settings.model)
        record = start.record if start is not None else None
        about = self.settings.about() | ({"adapter_sha256": record.sha256} if record is not None else {})
        self.seconds["other"] = time.perf_counter() - self.started - sum(self.seconds.values())
        prepared = Prepared(prefix, unquantized, self.seconds, about, record, ready.found)
        run = train(adapted, data, plan, folder, held_out, training, prepared, self.say)
        if self.launch.is_first:
            with self.interrupted.put_off():
                complete(run, self.settings, base.tokenizer, scores, self.say)
            push(run, settings.training, self.say)
        return run

    @contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[phase] = time.perf_counter() - started

    # --- an interrupted run

    def _checkpoint(self, resume: Path | None) -> TrainingCheckpoint | None:
        """The checkpoint to resume from, of a job with the same settings; damaged ones are reported and skipped."""
        if resume is not None:
            found: TrainingCheckpoint | None = verified(resume)
        elif self.folder.resumes:
            faults: list[str] = []
            found = newest_checkpoint(self.folder.checkpoints, faults)
            for fault in faults:
                self.say(f"note: {fault}")
        else:
            return None
        if found is None:
            self.say("note: the interrupted run left no complete checkpoint; training starts from the beginning")
            return None
        now = self.settings.about()
        check_same_run(
            {name: found.manifest.about[name] for name in now if name in found.manifest.about}, now, self.folder.path
        )
        return found

    def _set_date(self, found: TrainingCheckpoint | None) -> None:
        """Set the date for chat templates that write one: the given date, else the interrupted run's, else today."""
        data = self.settings.data
        if data.template_date is None:
            begun = found.manifest.about.get("template_date") if found is not None else None
            day = date.fromisoformat(begun) if begun else self.launch.computed_by_first(date.today)
            self.settings = self.settings.model_copy(update={"data": data.model_copy(update={"template_date": day})})

    def _given(self) -> Plan | None:
        """The plan to follow, if one was given."""
        file = self.settings.plan.file
        if file is None:
            return None
        given = Plan.read(file)
        if not is_sealed(file):
            self.say(f"note: {file} has no sha256 checksum, so it is treated as edited by hand")
        return given

    def _keep(self, plan: Plan, scores: Scores | None) -> None:
        """Write what a resumed run needs as well as its checkpoints."""
        folder = self.folder.checkpoints
        folder.mkdir(parents=True, exist_ok=True)
        plan.write(folder / PLAN_FILE)
        write_text(folder / CONFIG_FILE, self.settings.to_yaml())
        if scores is not None:
            scores.write(folder / SCORES_FILE)

    # --- load

    def _load(self, rows: Rows, start: Start | None) -> tuple[Source, Examples]:
        if start is not None:
            check_whole(start.base)
            return load_for(start.base, rows, start.data(self.settings.data), self.say)
        how = self.settings.model
        if is_streamed(how, self.say):
            self.settings.check_streamed()
            return stream_for(how, rows, self.settings.data, self.say)
        return load_for(how, rows, self.settings.data, self.say)

    # --- plan

    def _plan(
        self, base: Source, data: Examples, held_out: Examples, given: Plan | None, found: TrainingCheckpoint | None
    ) -> tuple[Scores | None, Plan]:
        """The plan to follow, and the scores that it was made from if it was made here."""
        if found is not None:
            kept = found.path.parent
            scores = Scores.read(kept / SCORES_FILE) if (kept / SCORES_FILE).exists() else None
            plan = Plan.read(kept / PLAN_FILE)
            plan.check_model(self._model_identity(base))
            return scores, plan
        if given is not None:
            self._check_plan(given, base, data, held_out)
            return None, given
        return self.launch.computed_by_first(partial(self._probe_and_plan, base, data, held_out))

    def _probe_and_plan(self, base: Source, data: Examples, held_out: Examples) -> tuple[Scores, Plan]:
        with self._timed("probe"):
            scores = self._probe(base, data)
        with self._timed("plan"):
            plan = self._make_plan(scores, base, data, held_out)
        return scores, plan

    def _go_on(
        self, base: Source, data: Examples, start: Start, found: TrainingCheckpoint | None
    ) -> tuple[Scores | None, Plan, Any]:
        """Scores, plan and model of an adapter that is trained further."""
        assert not isinstance(base, Checkpoint), "the base of an adapter is loaded as a whole"
        own = start.own_plan
        scores = self.launch.computed_by_first(partial(self._probe, base, data)) if own is None else own[0]
        adapted = continue_adapter(base.model, start.folder, self.settings.model.allow_pickle, data.tokenizer)
        plan = plan_of_adapter(adapted, scores) if own is None else own[1]  # type: ignore[arg-type]
        where = plan.model.model_copy(update={"name": base.model.name_or_path})  # the base may have been moved
        plan = plan.model_copy(update={"model": where})
        self.say(f"adapt  trains {start.folder} further on {start.base.model}")
        return scores, plan, adapted

    def _adapted(self, base: Source, plan: Plan) -> Any:
        """The model with the adapters of the plan."""
        seed = self.settings.training.seed
        if isinstance(base, Checkpoint):
            return adapt(base.suffix(plan.boundary), plan, seed, plan.model)
        return adapt(base.model, plan, seed)

    def _model_identity(self, base: Source) -> ModelIdentity:
        if isinstance(base, Checkpoint):
            return base.identity(ahead=self.settings.model.max_memory is None)
        return identify(base.model)

    def _probe(self, base: Source, data: Examples) -> Scores:
        seed = self.settings.training.seed
        self.say("probe  scores the layers by their gradients on 5 rows")
        if isinstance(base, Checkpoint):
            work = self.work or sibling(self.folder.path, ".partial")
            cap = self.settings.model.max_memory
            return by_layer.probe_streamed(base, data, seed=seed, work=work, max_memory=cap, show_progress=self.say)
        return resident.probe(base.model, data, seed=seed, show_progress=self.say)

    def _make_plan(self, scores: Scores, base: Source, data: Examples, held_out: Examples) -> Plan:
        """A plan that fits in memory; lower layers learn at first if they fit, too."""
        settings, is_streamed = self.settings, isinstance(base, Checkpoint)
        upper_alone = is_streamed or settings.training.free_prefix
        asked: dict[str, Any] = {"epochs": self._passes(data), "seed": settings.training.seed}
        asked |= {name: getattr(settings.plan, name) for name in settings.plan.model_fields_set if name != "file"}
        choice = PlanSettings(**asked)
        room, step = room_for(base, data, held_out, settings)
        bounded = is_streamed or room.max_memory is not None
        step = room.fitting(step, partial(every_layer_bytes, scores, choice))
        alone = replace(step, held_out=None)  # evaluation takes the same, whatever learns
        obstacle = room.why_no_early_layers(every_layer_bytes(scores, choice, alone), is_streamed)
        if upper_alone and not is_streamed:
            obstacle = "`free_prefix` drops them from memory"
        if obstacle and choice.freeze_after is None and (upper_alone or not bounded):
            choice = choice.model_copy(update={"freeze_after": 0.0, "target": None})
        made = make_plan(scores, choice, max_memory=room.usable_bytes if bounded else None, step=step)
        if obstacle and settings.plan.freeze_after is None and made.settings.policy == "depth-aware":
            unlike = f", unlike `target` {settings.plan.target} says" if settings.plan.target else ""
            self.say(f"note: layers below {made.boundary} do not learn{unlike}: {obstacle}")
        return made

    def recompute(self, ready: Ready) -> Recompute:
        """The gradient checkpointing with which the plan fits; a resumed run keeps its own.

        Says so if it was not asked for, and warns if the plan may not fit.
        """
        if ready.found is not None:
            kept: Recompute = ready.found.manifest.about["gradient_checkpointing"]
            return kept
        room, step = room_for(ready.base, ready.data, ready.held_out, self.settings)
        needed = bytes_by(ready.base, ready.plan)
        fitting = room.fitting(step, needed)
        taken = needed(fitting)
        if len(room.kinds) > 1 and fitting.recompute != "off":
            self.say(room.about_recomputation(fitting.recompute, needed(step), taken))
        fits = needed(replace(fitting, held_out=None)) <= room.usable_bytes
        if (warning := room.warning(taken, fitting.held_out if fits else None)) is not None:
            self.say(warning)
        return fitting.recompute

    def _passes(self, data: Examples) -> float:
        """Passes over the data that the plan counts; without a cache, later ones cost as much as the first."""
        training = self.settings.training
        if training.cache == "off":
            return 1.0
        return min(planned_passes(len(data), training, self.launch.processes), MOST_EPOCHS)

    def _check_plan(self, plan: Plan, base: Source, data: Examples, held_out: Examples) -> None:
        """Check that the given plan belongs to the model and fits in memory; other data only get a note."""
        plan.check_model(self._model_identity(base))
        plan.check_tokenizer(data.tokenizer)
        if plan.data and plan.data.fingerprint != data.identity.fingerprint:
            self.say(f"note: the plan was made from {plan.data.name}, this run trains on {data.identity.name}")
        if isinstance(base, Checkpoint):
            _check_plan_streamed(plan)
        room, step = room_for(base, data, held_out, self.settings)
        needed = bytes_by(base, plan)(step)
        if room.max_memory is not None and needed > room.max_memory:
            raise TrainingError(
                f"`max_memory` is {room.max_memory / 1e9:.1f} GB; the plan takes up to {needed / 1e9:.1f} GB with "
                f"batches of {step.tokens:,} tokens and held-out rows of up to "
                f"{max(map(len, held_out.examples)):,}; make a plan with that `max_memory`, or use smaller batches or "
                "shorter rows"
            )

    # --- train

    def _prefix(self, base: Source, plan: Plan, data: Examples, held_out: Examples) -> PrefixCache | None:
        """For a streamed model: the inputs of the boundary layer, for every row that the run will see."""
        if not isinstance(base, Checkpoint):
            return None
        training = self.settings.training
        rows: Iterable[Example] = data.examples
        if training.steps is not None:
            rows = chain.from_iterable(rows_of_steps(data, training, training.steps, self.launch.processes))
        used = [*rows, *held_out.examples]
        most = largest_batch(data, training, self.launch.processes) // max(map(len, used))  # rows of that length
        with self._timed("cache"):
            cache = streamed_cache(base, plan.boundary, training.cache_dir)
            for note in cache.notes:
                self.say(f"note: {note}")
            cap = self.settings.model.max_memory
            self.say(f"cache  the output of layers {layer_ranges(range(plan.boundary))}, computed once for each row")
            size = max(1, min(most, training.batch_size))
            fill_streamed(base, plan.boundary, used, cache, size, data.pad_token_id, cap, self.say)
        return cache


def _check_plan_streamed(plan: Plan) -> None:
    if plan.early_layers:
        raise TrainingError(
            f"the plan adapts layers {layer_ranges(plan.early_layers)} at first, and a streamed model does not have "
            "them in memory; expected a plan made with `freeze_after` 0"
        )
    if plan.boundary == 0:
        raise TrainingError(
            "the plan adapts layer 0, and a streamed model needs frozen layers at the bottom; expected another plan"
        )
