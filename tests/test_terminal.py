"""What a person reads while a command runs: a line at least every 30 seconds, and nothing but lines in a log."""

import re
import threading
from itertools import pairwise

import pytest
from rich.cells import cell_len
from tiny import make_model

import aletheia
from aletheia.job.source import FEW_HELD_OUT_ROWS, few_held_out
from aletheia.prefix.cache import MemoryCache
from aletheia.progress import EVERY_SECONDS, Progress, Stderr, human_duration, say_nothing
from aletheia.training.forecast import Outlook, outlook


class Clock:
    """A clock that goes on when it is told to, and work that is done as it goes."""

    def __init__(self):
        self.now, self.said = 0.0, []

    def __call__(self):
        return self.now

    def say(self, line):
        self.said.append((self.now, line))

    def wait(self, progress, seconds_per_part):
        """An ``Event.wait`` during which parts of the work get done; True once all are."""

        def wait(seconds):
            until = self.now + seconds
            while progress.done < progress.total and (progress.done + 1) * seconds_per_part <= until:
                self.now = (progress.done + 1) * seconds_per_part
                progress.advance()
            if progress.done == progress.total:
                return True
            self.now = until
            return False

        return wait


@pytest.fixture
def clock():
    return Clock()


def spoken(clock, parts, seconds_per_part):
    """The lines of some work, with the times at which they came."""
    progress = Progress("probe", parts, "batches", clock.say, clock=clock)
    progress.speak(clock.wait(progress, seconds_per_part))
    return clock.said


@pytest.mark.parametrize("seconds_per_part", [0.3, 7.0, 100.0])
def test_a_line_comes_at_least_every_30_seconds(clock, seconds_per_part):
    said = spoken(clock, int(600 / seconds_per_part), seconds_per_part)
    times = [0.0, *(at for at, _ in said), clock.now]
    assert max(after - before for before, after in pairwise(times)) <= EVERY_SECONDS + 1e-6
    assert len(said) <= clock.now / EVERY_SECONDS + 1  # and not many more


def test_a_line_says_how_far_the_work_is_and_how_long_it_takes(clock):
    said = spoken(clock, 20, 10.0)
    assert said[0] == (20.0, "probe  2 of 20 batches, about 3 min left")  # once two parts are done
    assert said[1] == (50.0, "probe  5 of 20 batches, about 2 min 30 s left")
    assert said[-1][1] == "probe  17 of 20 batches, about 30 s left"


def test_a_long_part_is_seen_to_go_on(clock):
    assert spoken(clock, 1, 95.0)[-1] == (90.0, "probe  0 of 1 batches, 1 min 30 s so far")


def test_short_work_says_nothing_of_its_own(clock):
    assert spoken(clock, 20, 0.5) == []


def test_work_that_goes_on_counts_only_what_it_does_itself(clock):
    progress = Progress("cache", 30, "layers", clock.say, done=10, clock=clock)
    clock.now = 20.0
    progress.advance(10)
    assert progress.left() == 20.0
    progress.skip(5)
    assert progress.left() == 10.0


def test_work_of_unknown_length_says_how_long_it_has_been(clock):
    progress = Progress("load", 0, "", clock.say, clock=clock)
    clock.now = 60.0
    progress.say()
    assert clock.said == [(60.0, "load   1 min so far")]


def test_silence_starts_no_thread_and_a_log_gets_no_bar(capsys):
    before = threading.active_count()
    with Progress("probe", 2, "batches", say_nothing) as progress:
        assert threading.active_count() == before
        progress.advance()
    with Progress("probe", 2, "batches") as progress:
        assert threading.active_count() == before + 1
        progress.advance()
    assert threading.active_count() == before
    assert capsys.readouterr() == ("", "")


def test_a_terminal_gets_a_bar_of_at_most_80_columns(monkeypatch, capsys):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "xterm")
    with Progress("train", 20_000, "steps", Stderr()) as progress:
        progress.advance(12_345, "loss 12.345, rate 1.2e-04, 12,345 tokens/s", 3600.0)
        progress.say("held-out loss 1.2345")
    drawn = capsys.readouterr().err
    assert "train  held-out loss 1.2345, 12,345 of 20,000 steps" in drawn
    frames = re.split(r"[\r\n]|\x1b\[2K", drawn)
    assert max(cell_len(re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", frame)) for frame in frames) <= 80
    assert "12345/20000" in drawn
    assert "1:00:00" in drawn


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "1 s"),
        (8.4, "8 s"),
        (33, "35 s"),
        (57.4, "55 s"),
        (59, "1 min"),
        (95, "1 min 30 s"),
        (700, "12 min"),
        (3570, "1 h 00 min"),
        (7900, "2 h 10 min"),
    ],
)
def test_durations_are_rounded_as_guesses_are(seconds, text):
    assert human_duration(seconds) == text


# a run


@pytest.fixture(scope="module")
def scores(examples):
    return aletheia.probe(make_model("llama"), examples, batches=2, show_progress=False)


@pytest.fixture(scope="module")
def plan(scores):
    """Layers 2 and 3 to the end, 0 and 1 for the first half of the steps."""
    return aletheia.plan(scores, policy="last", freeze_after=0.5)


def lines_of(plan, examples, out, **settings):
    said = []
    data, held_out = examples.subset(range(20)), examples.subset(range(20, 26))
    model = aletheia.adapt(make_model("llama"), plan)
    return aletheia.train(model, data, plan, out, held_out, show_progress=said.append, **settings), said


def test_a_run_says_its_phases_and_every_held_out_loss(plan, examples, tmp_path, capsys):
    run, said = lines_of(plan, examples, tmp_path / "run", steps=20, evaluations=4, averaging="off")
    assert capsys.readouterr() == ("", "")  # all of it goes to the function, and no library prints
    assert re.fullmatch(r"train  20 steps of 4 rows, learning rate \S+; held-out loss every 5 steps", said[0])
    losses = [line for line in said if line.startswith("train  held-out loss")]
    assert len(losses) == len(run.metrics.held_out_curve) == 5
    for line, point in zip(losses[1:], run.metrics.held_out_curve[1:], strict=True):
        found = re.fullmatch(
            r"train  held-out loss ([\d.]+), (\d+) of 20 steps, loss [\d.]+, rate \S+, [\d,]+ tokens/s, .*", line
        )
        assert (found[1], int(found[2])) == (f"{point.loss:.4f}", point.step)
    freeze = said.index("freeze layers 0-1 are frozen from here on; 2-3 learn")
    assert said.index(losses[1]) < freeze < said.index(losses[3])
    assert not any("\r" in line or "\n" in line for line in said)


def test_the_time_left_knows_of_the_frozen_layers(plan):
    """Two of four steps with every layer, then one that fills the cache, then one that reads it."""
    predicted = plan.predicted
    seen = outlook(plan, [7, 8, 9, 10], 1, reads_cache=True, is_filled=False)
    early, step, stored = (
        predicted.relative_early_step_time, predicted.relative_step_time, predicted.relative_cached_step_time,
    )  # fmt: skip
    assert early > step > stored
    assert seen.times == [early, early, step, stored]
    assert seen.times_so_far[-1] == pytest.approx(2 * early + step + stored)
    assert seen.freezes.startswith("layers 0-1 are frozen")
    assert outlook(plan, [7] * 4, 1, reads_cache=False, is_filled=False).times == [early, early, step, step]
    assert Outlook((), ()).times_so_far == [0.0]


def test_probe_and_cache_say_how_far_they_are(examples, monkeypatch):
    """As if every part took a minute."""
    from aletheia.prefix.fill import fill

    monkeypatch.setattr("aletheia.progress.WORTH_SAYING_SECONDS", 0.0)
    said, model = [], make_model("llama")
    aletheia.probe(model, examples, batches=3, show_progress=said.append)
    assert re.fullmatch(r"probe  2 of 3 batches, about \d+ s left", said.pop())
    fill(model, 2, examples.examples[:6], MemoryCache(), 2, said.append)
    assert re.fullmatch(r"cache  2 of \d rows, about \d+ s left", said.pop())
    assert said == []


@pytest.mark.parametrize("rows", [1, 2])
def test_few_held_out_rows_earn_a_warning(run, model_folder, data_file, examples, rows):
    train = ("train", model_folder, "--data", data_file, "--steps", 2, "--json", "--eval-rows")
    code, _, err = run(*train, rows, "--out", "few")
    assert code in (0, 3), err
    (warning,) = [line for line in err.splitlines() if line.startswith("warning: only")]
    assert f"only {rows} row{' is' if rows == 1 else 's are'} held out" in warning
    assert "--eval-fraction" in warning
    assert "--eval-data" in warning
    assert f"with {examples.subset(range(rows)).labelled_tokens} labelled tokens" in few_held_out(
        examples.subset(range(rows))
    )
    assert "warning: only" not in run(*train, FEW_HELD_OUT_ROWS, "--eval-fraction", 0.5, "--out", "enough")[2]
