"""The report page and the terminal views, on runs made by hand."""

import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import matplotlib
import pytest
from rich.cells import cell_len
from rich.console import Console

from aletheia.anatomy.schema import Anatomy, DataIdentity, ModelIdentity, Module
from aletheia.errors import ArtifactError
from aletheia.planning.make import plan_frontier
from aletheia.planning.plan import Adapter, Plan, PlanSettings, Prediction, layer_ranges
from aletheia.probing.scores import ProbeSettings, Scores
from aletheia.reporting.comparison import (
    Speed,
    differences,
    held_out_points,
    repeat_command,
    run_labels,
    seconds_to_loss,
)
from aletheia.reporting.figures import smoothed
from aletheia.reporting.format import (
    bar,
    human_bytes,
    human_count,
    human_percent,
    human_seconds,
    model_name,
    rank_summary,
    shorten,
)
from aletheia.reporting.frontier import ROWS, frontier_figure, frontier_view
from aletheia.reporting.page import report
from aletheia.reporting.terminal import comparison_table, render
from aletheia.runs.schema import HeldOutPoint, Metrics, PhaseSeconds, Run, StartingAdapter, TrainPoint, UsedSettings

EVIL = "<script>alert('x')</script>\"><img src=http://evil.example/x onerror=alert(1)>"
VOID = {"meta", "img", "br", "link", "input", "hr"}
MODULES = (
    ("self_attn.q_proj", "attention", 64, 64),
    ("self_attn.k_proj", "attention", 64, 32),
    ("mlp.up_proj", "mlp", 64, 128),
    ("mlp.down_proj", "mlp", 128, 64),
)
PACKAGES = {"aletheia-tune": "0.1.0", "torch": "2.13.0"}
PROBE = ProbeSettings(
    score="gradient-norm", batches=5, batch_size=1, seed=0, dtype="float32", device="cpu",
    tokens=812, labelled_tokens=590, mean_loss=1.44, seconds=12.9,
)  # fmt: skip


def make_model(name="smol", fingerprint="9f2c" * 16):
    return ModelIdentity(name=name, fingerprint=fingerprint)


def make_data(name="train.jsonl", fingerprint="ab12" * 16):
    return DataIdentity(name=name, fingerprint=fingerprint, form="question, answer", rows=7473)


def make_scores(layer_count=6, model=None):
    modules = tuple(
        Module(name=f"model.layers.{layer}.{name}", layer=layer, role=role, in_features=i, out_features=o)
        for layer in range(layer_count)
        for name, role, i, o in MODULES
    )
    anatomy = Anatomy(
        model_type="llama", layer_count=layer_count, layer_path="model.layers", hidden_size=64, vocab_size=256,
        attention_width=64, parameters=10**6, embedding_parameters=2**14, layer_parameters=(2000,) * layer_count,
        modules=modules,
    )  # fmt: skip
    return Scores(
        model=model or make_model(),
        data=make_data(),
        probe=PROBE,
        packages=PACKAGES,
        layers=tuple(2.0 + layer % 4 for layer in range(layer_count)),
        modules={module.name: 1.0 + module.layer for module in modules},
        anatomy=anatomy,
    )


def make_plan(layers, policy="depth-aware", layer_count=6, model=None, mlp_rank=64):
    scores = make_scores(layer_count, model)
    adapters = []
    for module in scores.anatomy.modules:
        if module.layer in layers:
            rank = 16 if module.role == "attention" else mlp_rank
            parameters = module.lora_parameters(rank)
            adapters.append(
                Adapter(
                    name=module.name,
                    layer=module.layer,
                    role=module.role,
                    rank=rank,
                    alpha=2 * rank,
                    parameters=parameters,
                )
            )
    return Plan(
        model=scores.model,
        data=scores.data,
        probe=PROBE,
        packages=PACKAGES,
        settings=PlanSettings(
            policy=policy, percent=50, ranks="by-role", rank=16, attention_rank=16, mlp_rank=64, alpha=32, seed=0
        ),
        layer_count=layer_count,
        layers=tuple(layers),
        predicted=Prediction(relative_step_time=0.625, captured_importance=0.386),
        layer_scores=scores.layers,
        adapters=tuple(adapters),
    )


def make_run(path="runs/plan", layers=(3, 4, 5), train=71.2, probe=12.9, after=0.742, **changes):
    """A run of 150 steps; ``changes`` go to the settings or the metrics, whichever has the name."""
    model = changes.pop("model", make_model())
    plan = make_plan(layers, changes.pop("policy", "depth-aware"), changes.pop("layer_count", 6), model)
    settings = {
        "batch_size": 4,
        "learning_rate": 2e-4,
        "max_length": 512,
        "dtype": "bfloat16",
        "device": "cpu",
        "seed": 0,
    }
    settings = {name: changes.pop(name, value) for name, value in settings.items()}
    steps = changes.get("steps", 150)
    before = 1.432
    fields = {
        "model": model,
        "data": make_data(),
        "held_out_data": make_data("test.jsonl", "cd34" * 16),
        "held_out_rows": 96,
        "held_out_tokens": 11840,
        "packages": PACKAGES,
        "steps": steps,
        "tokens": 104233,
        "labelled_tokens": 71020,
        "boundary": plan.boundary,
        "trainable_parameters": plan.trainable_parameters,
        "seconds": PhaseSeconds(load=3.1, probe=probe, plan=0.1 if probe else 0.0, train=train, eval=31.0),
        "peak_memory_bytes": 1_830_000_000,
        "held_out_loss_before": before,
        "held_out_loss_after": after,
        "train_curve": tuple(
            TrainPoint(step=step, loss=1.4 - step / 300, train_seconds=train * step / steps)
            for step in range(1, steps + 1)
        ),
        "held_out_curve": tuple(
            HeldOutPoint(step=step, loss=before + (after - before) * step / steps, train_seconds=train * step / steps)
            for step in (0, steps // 2, steps)
        ),
    }
    return Run(Path(path), Metrics(settings=UsedSettings(**settings), **(fields | changes)), plan)


def uniform(**changes):
    arguments = {"path": "runs/uniform", "layers": range(6), "train": 112.3, "probe": 0.0, "after": 0.731}
    return make_run(**(arguments | {"policy": "uniform"} | changes))


class Page(HTMLParser):
    """The page as a browser sees it: elements with attributes, text, and whether the tags close in order."""

    def __init__(self, html):
        super().__init__()
        self.elements, self.texts, self.open = [], [], []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.texts.append(data)

    @property
    def text(self):
        return " ".join("".join(self.texts).split())

    def count(self, tag):
        return sum(found == tag for found, _ in self.elements)


def page_of(runs, tmp_path, name="report.html"):
    return Page(report(runs, tmp_path / name).read_text(encoding="utf-8"))


def shown(renderable, width=80):
    console = Console(width=width, record=True, file=open("/dev/null", "w"), highlight=False)  # noqa: SIM115
    console.print(renderable)
    text = console.export_text()
    assert max(map(cell_len, text.splitlines())) <= width
    return text


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The page of uniform LoRA and a plan, as text."""
    out = tmp_path_factory.mktemp("two") / "report.html"
    return report([uniform(), make_run()], out).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """A page of three runs: two share a folder name, the third was not timed and its scores are zero."""
    other = make_run("b/plan", train=0.0, probe=0.0)
    flat = other.plan.model_copy(update={"layer_scores": (0.0,) * 6})
    runs = [make_run("a/plan"), uniform(seed=7, steps=300), Run(other.path, other.metrics, flat)]
    out = tmp_path_factory.mktemp("three") / "report.html"
    return report(runs, out).read_text(encoding="utf-8")


# the page


def test_summary_gives_both_ratios_to_the_digit(two):
    text = Page(two).text
    # 112.3 / 71.2 = 1.577, 1 - 71.2 / 112.3 = 0.366; counted 84.2: 1.334, 0.250
    assert (
        "plan trained in 71.2 s against 112 s for uniform : speed-up 1.58x, 37 % of the time saved, probe, planning "
        "and cache not counted. With these counted it took 84.2 s against 112 s: speed-up 1.33x, 25 % of the time "
        "saved. It ended at a held-out loss of 0.742 against 0.731 nats per token (1.432 before training)."
    ) in text.replace("uniform:", "uniform :")
    assert "no interval" in text
    assert "Not like for like" not in text


def test_table_holds_what_was_measured(two):
    page = Page(two)
    for cell in (
        "3 of 6", "3-5", "attention 16, mlp 64", "475 ms", "749 ms", "1.432", "0.742", "96 rows, 11,840 tokens",
        "1.70 GiB", "bfloat16", "146 s", "118 s", "not reached", "9f2c" * 16,
    ):  # fmt: skip
        assert cell in page.text
    assert page.count("svg") == 3 + 2 * 2


def test_slower_run_is_said_to_be_slower(three):
    assert "speed-up 0.63x, 58 % more time" in Page(three).text  # 71.2 / 112.3, 112.3 / 71.2 - 1


def test_untimed_run_and_scores_of_zero_are_drawn(three):
    page = Page(three)
    assert "no speed-up can be given" in page.text
    assert page.count("svg") == 3 + 2 * 3


def test_page_warns_of_other_conditions(three):
    assert "Not like for like. The runs differ in steps (150, 300); seed (0, 7)." in Page(three).text


def test_one_run_has_no_comparison(tmp_path):
    page = page_of([uniform()], tmp_path)
    assert page.count("svg") == 3 + 2
    assert "Speed-up" not in page.text
    assert "reference" not in page.text
    assert "fell from 1.432 to 0.731 nats per token over 96 rows" in page.text


def test_ids_are_unique_and_every_reference_resolves(three):
    ids = [attributes["id"] for _, attributes in Page(three).elements if "id" in attributes]
    assert len(ids) == len(set(ids)) > 0
    references = set(re.findall(r'(?:href="|url\()#([\w.-]+)', three))
    assert references == set(ids)


def test_page_is_self_contained(two):
    page = Page(two)
    assert page.count("script") == page.count("link") == page.count("img") == 0
    for _, attributes in page.elements:
        for name in ("src", "href", "xlink:href", "action", "data", "srcset"):
            assert attributes.get(name, "#").startswith("#")
        assert not [name for name in attributes if name.startswith("on")]
    assert re.findall(r"url\((?!#)", two) == []
    assert not {"http:", "https:", "@import"} & set(re.findall(r"https?:|@import", two))


def test_every_figure_has_a_name_and_follows_the_pages_colours(two):
    figures = [attributes for tag, attributes in Page(two).elements if tag == "svg"]
    assert all(figure["role"] == "img" and figure["aria-label"] and "width" not in figure for figure in figures)
    drawn = "".join(re.findall(r"<svg.*?</svg>", two, re.DOTALL))
    assert "currentColor" in drawn
    assert "var(--run-1" in drawn
    assert re.findall(r"(?<!, )#0[1-6]0[0-6]0\d", drawn) == []  # no sentinel is left
    assert "font-family" not in drawn
    assert "DejaVu" not in drawn


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """A page whose every name tries to be something else."""
    folder = "$x$ " + EVIL.replace("/", "\u2215")
    run = make_run(
        folder, model=make_model(EVIL), data=make_data(EVIL), held_out_data=make_data(EVIL + "2"),
        packages={EVIL: EVIL}, device=EVIL, dtype=EVIL,
    )  # fmt: skip
    broken = make_run("a\x1b[31m\x01b\udcff", model=make_model("m\x07\n"))
    like_ours = make_run('id="figure_1" #010101')
    out = tmp_path_factory.mktemp("hostile") / "report.html"
    return report([run, broken, like_ours], out).read_text(encoding="utf-8")


def test_names_cannot_become_markup(hostile):
    page = Page(hostile)
    assert page.count("script") == page.count("img") == 0
    assert not [name for _, attributes in page.elements for name in attributes if name.startswith("on")]
    assert EVIL in page.text  # shown as it is
    assert "$x$" in page.text


def test_control_and_broken_characters_do_no_harm(hostile):
    assert "\x1b" not in hostile
    assert "a\ufffd[31m\ufffdb\ufffd" in Page(hostile).text
    assert "\x1b" not in shown(render(make_run("a\x1b[31m", model=make_model("m\x07\n"))))


def test_names_that_look_like_our_own_marks_are_left_alone(hostile):
    drawn = "".join(re.findall(r"<text.*?</text>", hostile))
    assert 'id="figure_1" #010101' in drawn


def test_same_runs_give_the_same_bytes_whatever_the_users_settings(two, tmp_path):
    runs = [uniform(), make_run()]
    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "red", "svg.fonttype": "path"}):
        before = dict(matplotlib.rcParams)
        again = report(runs, tmp_path / "again.html").read_text(encoding="utf-8")
        assert dict(matplotlib.rcParams) == before
    assert again == two


def test_report_replaces_a_report_and_nothing_else(tmp_path):
    out = tmp_path / "deep" / "report.html"
    report([uniform()], out)
    report([make_run()], out)
    assert "plan" in Page(out.read_text(encoding="utf-8")).text
    out.write_text("<html>my thesis</html>")
    with pytest.raises(ArtifactError, match="no report of ours"):
        report([make_run()], out)
    assert out.read_text() == "<html>my thesis</html>"
    with pytest.raises(ArtifactError, match="another place"):
        report([make_run()], tmp_path)


def test_no_runs_are_refused(tmp_path):
    with pytest.raises(ArtifactError, match="no runs"):
        report([], tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()
    with pytest.raises(ArtifactError, match="no runs"):
        comparison_table([])


def test_boundary_is_marked_only_where_there_is_a_prefix(two):
    assert re.findall(r">boundary (\d+)</text>", two) == ["3"]  # in the plan's figure, not in uniform's
    assert "uniform: 6 of 6 layers, no frozen prefix" in Page(two).text


# what is compared


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model": make_model("other", "11" * 32)}, "model (smol, other)"),
        ({"model": make_model("smol", "11" * 32)}, "model (other content)"),
        ({"data": make_data("rows.csv", "22" * 32)}, "data (train.jsonl, rows.csv)"),
        ({"steps": 300}, "steps (150, 300)"),
        ({"batch_size": 8}, "batch size (4, 8)"),
        ({"max_length": 1024}, "max length (512, 1024)"),
        ({"seed": 7}, "seed (0, 7)"),
        ({"learning_rate": 1e-3}, "learning rate (0.0002, 0.001)"),
        ({"dtype": "float32"}, "dtype (bfloat16, float32)"),
        ({"held_out_rows": 48}, "held-out rows (96, 48)"),
    ],
)
def test_runs_under_other_conditions_are_named(changes, named):
    runs = [uniform(), make_run(**changes)]
    assert differences(runs) == (named,)
    assert "Not like for like" in shown(comparison_table(runs))


def test_a_data_set_of_another_name_but_the_same_content_is_comparable():
    assert differences([uniform(), make_run(data=make_data("copy.jsonl"))]) == ()


def test_equal_folder_names_are_told_apart():
    paths = ("a/plan", "b/plan", "c/uniform", "x/a/plan")
    assert run_labels([make_run(path) for path in paths]) == ("a/plan", "b/plan", "uniform", "a/plan (2)")
    same = run_labels([make_run("a/plan")] * 3)
    assert len(set(same)) == 3


def test_speed_in_both_forms():
    speed = Speed(seconds=80.0, reference_seconds=100.0)
    assert speed.speedup == pytest.approx(1.25)
    assert speed.time_saved == pytest.approx(0.2)
    assert Speed(0.0, 10.0).speedup is None


def test_held_out_curve_is_completed_by_its_ends():
    metrics = make_run(held_out_curve=()).metrics
    points = held_out_points(metrics)
    assert [(point.step, point.loss) for point in points] == [(0, 1.432), (150, 0.742)]
    assert seconds_to_loss(metrics, 0.742) == 71.2
    assert seconds_to_loss(metrics, 0.731) is None


def test_repeat_command_is_quoted_for_a_shell():
    run = make_run("runs/my run", model=make_model("a;rm -rf /"))
    command = " ".join(repeat_command(run))
    assert command == (
        "aletheia train 'a;rm -rf /' --data train.jsonl --eval-data test.jsonl --eval-rows 96 "
        "--plan 'my run/plan.json' --steps 150 --batch-size 4 --learning-rate 0.0002 "
        "--max-length 512 --dtype bfloat16 --seed 0 --cache off --keep last --averaging off "
        "--gradient-checkpointing off --out 'my run-again' --no-group-by-length --no-early-stop"
    )
    assert repeat_command(make_run(data=None)) == ()


def test_a_run_that_went_on_with_an_adapter_says_so_and_is_repeated_from_it():
    """The adapter brings its plan, which ``--plan`` would contradict."""
    run = make_run(went_on_from=StartingAdapter(name="first run", sha256="ef" * 32))
    command = repeat_command(run)
    assert command[0] == "aletheia train 'first run'"
    assert not any(part.startswith("--plan") for part in command)
    assert "first run" in shown(render(run))
    assert differences([make_run(), run]) == ("start (new adapters, first run)",)


def test_training_loss_is_the_mean_of_the_last_steps():
    curve = [TrainPoint(step=step, loss=float(step), train_seconds=0.0) for step in range(1, 41)]
    assert smoothed(curve)[:3] == [(1, 1.0), (2, 1.5), (3, 2.5)]  # two of forty points


# the terminal


def test_scores_in_the_terminal():
    text = shown(render(make_scores()))
    assert "smol" in text
    assert "gradient-norm, 5 batches of 1, seed 0" in text
    rows = re.findall(r"^ +(\d+) +([\d.]+) +█+\S* +([\d.]+ %)", text, re.MULTILINE)
    assert rows[3] == ("3", "5.000", "26 %")  # 5 of 19
    assert [int(row[0]) for row in rows] == list(range(6))
    first_module = text.split("top modules")[1].splitlines()[1]
    assert "model.layers.5." in first_module


def test_plan_in_the_terminal_says_what_was_chosen_why_and_what_it_gives_up():
    text = " ".join(shown(render(make_plan((3, 5)))).split())
    assert "Only layers 3, 5 learn: they hold the most score for the time they take." in text
    assert "Layers 3, 5 hold 42 % of the score. The others, with 58 %, never learn." in text
    assert "1.60x as fast as uniform LoRA in plain PEFT and Trainer over the run" in text
    assert "3, 5 42 % to the end 16: q, k; 64: up, down" in text
    assert "0-2, 4 58 % never" in text


def test_uniform_plan_says_where_its_speed_comes_from():
    timed = {"relative_step_time": 0.8, "captured_importance": 1.0}
    plan = make_plan(range(6), "uniform").model_copy(update={"predicted": Prediction(**timed)})
    text = " ".join(shown(render(plan)).split())
    assert "Every layer learns to the end. It gives up nothing." in text
    assert "1.25x as fast as uniform LoRA in plain PEFT and Trainer over the run. That comes from the language" in text
    measured = plan.model_copy(update={"predicted": Prediction(**timed, baseline_step_seconds=2.0)})
    text = " ".join(shown(render(measured)).split())
    assert "not from the choice of layers: logits at labelled tokens only" in text
    assert "every step 1.60 s 1.25x" in text
    plain = plan.model_copy(update={"predicted": Prediction(**timed | {"relative_step_time": 1.0})})
    assert "comes from" not in shown(render(plain))


def test_layers_that_freeze_are_told_with_their_share():
    plan = make_plan(range(6)).model_copy(update={"layers": (3, 4, 5), "early_layers": (0, 1, 2)})
    plan = plan.model_copy(update={"settings": plan.settings.model_copy(update={"freeze_after": 0.25})})
    text = " ".join(shown(render(plan)).split())
    assert "Every layer learns for the first 25 % of the steps, then only layers 3-5." in text
    assert "Layers 3-5 hold 53 % of the score. The others, with 47 %, freeze then." in text
    assert "0-2 47 % first 25 % of the steps 16: q, k; 64: up, down" in text


def test_a_plan_has_ranges_and_not_a_line_a_layer():
    every_other = shown(render(make_plan(range(0, 80, 2), layer_count=80)))
    assert len(every_other.splitlines()) < 40
    assert len(shown(render(make_plan(range(40, 80), layer_count=80))).splitlines()) < 20
    assert len(shown(render(make_scores(80))).splitlines()) < 80 + 20


def test_the_frontier_is_ten_rows_with_the_plan_among_them():
    for layers in [(3, 5), tuple(range(40, 80)), tuple(range(80))]:
        scores = make_scores(80)
        chosen = make_plan(layers, layer_count=80)
        text = shown(frontier_view(plan_frontier(scores), chosen))
        rows = [line for line in text.splitlines() if re.search(r"\d %( █|$)", line.rstrip())]
        assert len(rows) <= ROWS
    points = plan_frontier(make_scores(80))
    for point in points:
        chosen = make_plan(point.layers, layer_count=80)
        text = shown(frontier_view(points, chosen))
        assert sum(line.startswith(">") for line in text.splitlines()) == 1


def test_the_title_of_the_plotted_frontier_fits():
    scores = make_scores(model=make_model("organisation/a-model-with-quite-a-long-name-" * 4))
    chosen = make_plan((3, 5), model=scores.model)
    figure = frontier_figure(plan_frontier(scores), chosen)
    figure.draw_without_rendering()
    box = figure.axes[0].title.get_window_extent()
    assert box.x0 >= 0
    assert box.x1 <= figure.bbox.width


def test_run_in_the_terminal():
    text = shown(render(make_run()))
    for part in (
        "smol", "Only layers 3-5 learn", "150 of 4 rows", "104,233, 71,020 of them labelled",
        "475 ms each", "1.70 GiB at peak", "1.432 → 0.742", "96 rows", "on the processor",
    ):  # fmt: skip
        assert part in text
    assert "start A" not in text


def test_the_times_of_a_run_add_up_to_its_total():
    seconds = PhaseSeconds(
        load=21.64, probe=3.26, plan=0.04, cache=4.44, race=1.14, train=79.04, eval=12.94, other=1.74
    )
    text = shown(render(make_run(seconds=seconds)))
    listed = re.findall(r"^([A-Z][a-z -]+?) +([\d,.]+) s(?: |$)", text, re.MULTILINE)
    names, times = [name for name, _ in listed], [round(10 * float(time)) for _, time in listed]
    assert names[0] == "Loading the model"
    assert names[-1] == "Total"
    assert "Planning" not in names  # less than a tenth of a second
    assert sum(times[:-1]) == times[-1] == round(10 * seconds.total)


def test_the_held_out_losses_of_a_run_in_the_terminal():
    text = shown(render(make_run()))
    assert len(re.findall(r"^ +\d+ .*█", text, re.MULTILINE)) == 3


def test_comparison_in_the_terminal():
    text = shown(comparison_table([uniform(), make_run(), make_run("runs/top", (0, 2), 92.2)]))

    def cells(label):
        return re.split(r" {2,}", next(line for line in text.splitlines() if line.startswith(label)).strip())[1:]

    assert cells("Speed-up  ") == ["1.00x", "1.58x", "1.22x"]
    assert cells("Time saved  ") == ["reference", "37 %", "18 %"]
    assert cells("Time saved, all") == ["reference", "25 %", "6.3 %"]
    assert cells("Held-out loss after") == ["0.731", "0.742", "0.742"]
    assert "no interval" in " ".join(text.split())


def test_markup_in_names_is_shown_not_obeyed():
    run = make_run("runs/[bold]x[-bold]", model=make_model("[red]m[/red]"))
    assert "[red]m[/red]" in shown(render(run))
    assert "[bold]x[-bold]" in shown(comparison_table([run]))


def test_bars():
    assert bar(10, 10, 4) == "████"
    assert bar(5, 10, 5) == "██▌"
    assert bar(0, 10, 4) == bar(1, 0, 4) == ""
    assert bar(1e-9, 10, 4) == "▏"  # something is never nothing


# numbers


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0"),
        (9999, "9,999"),
        (10_000, "10.0 k"),
        (999_600, "1.00 M"),
        (4_884_480, "4.88 M"),
        (72_000_000_000, "72.0 B"),
    ],
)
def test_human_count(number, text):
    assert human_count(number) == text


@pytest.mark.parametrize(
    ("size", "text"),
    [(512, "512 B"), (1024, "1.00 KiB"), (1_830_000_000, "1.70 GiB"), (2**20 - 1, "1.00 MiB"), (2**41, "2.00 TiB")],
)
def test_human_bytes(size, text):
    assert human_bytes(size) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"), (0.0421, "42.1 ms"), (0.9996, "1.00 s"), (7.136, "7.14 s"), (9.999, "10.0 s"), (71.2, "71.2 s"),
        (112.3, "112 s"), (599.6, "10 min 00 s"), (725, "12 min 05 s"), (3599.7, "1 h 00 min"), (7499, "2 h 05 min"),
    ],
)  # fmt: skip
def test_human_seconds(seconds, text):
    assert human_seconds(seconds) == text


@pytest.mark.parametrize(
    ("share", "text"),
    [
        (0, "0 %"),
        (0.042, "4.2 %"),
        (0.0996, "10 %"),
        (0.366, "37 %"),
        (0.997, "99.7 %"),
        (1, "100 %"),
        (-0.12, "-12 %"),
    ],
)
def test_human_percent(share, text):
    assert human_percent(share) == text


def test_lists_and_names():
    assert model_name("/models/smol.gguf") == "smol.gguf"
    assert model_name("../models/smol/") == "smol"
    assert model_name("organisation/smol") == "organisation/smol"
    assert model_name("/") == "/"
    assert layer_ranges([29, 0, 1, 2, 8, 9]) == "0-2, 8-9, 29"
    assert shorten("abcdefghij", 7) == "abc…hij"
    assert rank_summary(make_plan((3,)).adapters) == "attention 16, mlp 64"


# the floor


def test_reporting_loads_no_torch_and_the_terminal_no_matplotlib():
    code = (
        "import sys, aletheia.reporting.terminal; assert 'matplotlib' not in sys.modules; "
        "import aletheia.reporting.page; "
        "unwanted = ('torch', 'transformers', 'peft', 'datasets', 'matplotlib.pyplot'); "
        "print([name for name in unwanted if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_run_that_ended_at_its_best_says_which_point_was_kept_and_what_it_saved(tmp_path):
    run = make_run(steps=150, planned_steps=200, kept_step=75)
    told = shown(render(run))
    assert "step 75 of 150, 50 steps saved" in told
    assert [line.split()[0] for line in told.splitlines() if line.rstrip().endswith(" kept")] == ["75"]
    page = page_of([run], tmp_path)
    assert "kept those of step 75 of 150, 50 steps saved" in page.text
    assert "150 steps, 50 saved" in page.text
    assert "--steps 200" in page.text
