"""The report page and the terminal views, on runs made by hand."""

import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from browser import CHROMIUM, open_page
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
from aletheia.reporting.figures import loss_window, smoothed
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
from aletheia.reporting.svg import marker_path, run_class, run_dash
from aletheia.reporting.terminal import comparison_table, render
from aletheia.reporting.times import time_parts, time_table
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
    settings |= {name: changes.pop(name) for name in ("machine", "processes") if name in changes}
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


def drawn(html):
    """The titles of the figures, each once."""
    return list(dict.fromkeys(re.findall(r'<svg class="(?:desk|phone)"[^>]*><title[^>]*>([^<]*)</title>', html)))


def early_run(**changes):
    """Layers 0-2 learn in the first 50 of 150 steps."""
    run = make_run(layers=range(6), **({"early_steps": 50, "boundary": 3} | changes))
    plan = run.plan.model_copy(update={"layers": (3, 4, 5), "early_layers": (0, 1, 2)})
    return Run(run.path, run.metrics, plan)


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
    # 112.3 / 71.2 = 1.577; in all 146.4 / 118.3 = 1.238
    assert (
        "plan trained 1.58 times as fast as uniform: 71.2 s against 112 s. With everything counted it took 118 s "
        "against 146 s, 1.24 times as fast. It ended at a held-out loss of 0.742 against 0.731 nats per token, from "
        "1.432 before training."
    ) in Page(two).text
    assert "no interval" in Page(two).text
    assert "Not like for like" not in two


def test_table_holds_what_was_measured(two):
    page = Page(two)
    for cell in (
        "3 of 6", "3-5", "attention 16, mlp 64", "475 ms", "749 ms", "1.432", "0.742", "96 rows, 11,840 tokens",
        "1.70 GiB", "bfloat16", "146 s", "118 s", "not reached", "9f2c" * 16,
    ):  # fmt: skip
        assert cell in page.text
    assert drawn(two) == ["Loss by optimizer step", "Loss by training time (s)", "Layers of uniform", "Layers of plan",
                          "Where the time went"]  # fmt: skip


def test_slower_run_is_said_to_be_slower(tmp_path):
    assert "uniform trained 1.58 times as long as plan" in page_of([make_run(), uniform()], tmp_path).text


def test_untimed_run_and_scores_of_zero_are_drawn(three):
    assert "No ratio is given: a run was not timed." in Page(three).text
    assert len(drawn(three)) == 3 + 3
    assert len(re.findall(">Score of each layer", three)) == 2 * 2  # for desk and phone; not of scores that are zero


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"model": make_model("other", "11" * 32)}, "model (smol, other)"),
        ({"data": make_data("rows.csv", "22" * 32)}, "data (train.jsonl, rows.csv)"),
        ({"machine": "cpu AVX2 with 4 threads"}, "machine (cpu AVX512 with 2 threads, cpu AVX2 with 4 threads)"),
        ({"dtype": "float32"}, "dtype (bfloat16, float32)"),
        ({"steps": 120, "planned_steps": 150, "kept_step": 120}, "steps (150, 120 of 150)"),
        ({"processes": 2}, "processes (1, 2)"),
    ],
)
def test_a_ratio_stands_only_between_runs_that_did_the_same_work_on_the_same_machine(tmp_path, changes, why):
    runs = [
        uniform(machine="cpu AVX512 with 2 threads"),
        make_run(**({"machine": "cpu AVX512 with 2 threads"} | changes)),
    ]
    html = page_of(runs, tmp_path).text
    assert f"Not like for like. The runs differ in {why}." in html
    assert "No ratio to uniform is given, because the two runs are not comparable." in html
    assert not re.findall(r"[\d.]+ times as (?:fast|long)|\d\.\d\dx(?! over)|Time saved|Speed-up", html)


def test_a_seed_or_a_rate_of_its_own_is_named_and_forbids_no_ratio(tmp_path):
    text = page_of([uniform(), make_run(seed=7, learning_rate=1e-3)], tmp_path).text
    assert "Besides the plan, the runs differ in seed (0, 7); learning rate (0.0002, 0.001)." in text
    assert "1.58 times as fast" in text


def test_of_three_runs_the_alike_ones_are_compared(three):
    text = Page(three).text
    assert "Not like for like. The runs differ in steps (150, 300)." in text
    assert "uniform trained in 112 s. No ratio to a/plan is given" in text


def test_losses_over_other_held_out_rows_are_not_set_against_each_other(tmp_path):
    text = page_of([uniform(), make_run(held_out_rows=48)], tmp_path).text
    assert "Its held-out loss went from 1.432 to 0.742 nats per token." in text
    assert "Train time to" not in text
    assert "dotted line" not in text


def test_parts_of_the_time_have_names_and_add_up_to_the_total(tmp_path):
    run = early_run()
    parts = time_parts(run)
    assert [part.name for part in parts] == [
        "Loading the model", "Probe", "Planning", "Training layers 0-5", "Training layers 3-5", "Held-out evaluation",
    ]  # fmt: skip
    assert sum(part.seconds for part in parts) == pytest.approx(run.metrics.seconds.total)
    assert [part.seconds for part in parts][3:5] == pytest.approx([71.2 / 3, 2 * 71.2 / 3])
    text = page_of([run], tmp_path).text
    assert "118 s in all" in text
    assert "84.2 s" not in text  # a sum without loading and evaluation is no total
    assert {key for key, _, _ in time_table([run, uniform()])} == {"load", "probe", "plan", "early", "train", "eval"}


def test_layers_that_freeze_on_the_way_are_drawn_as_such(tmp_path):
    html = report([early_run()], tmp_path / "report.html").read_text(encoding="utf-8")
    text = Page(html).text
    assert "Layers 3-5 of 6 learned for 150 steps. Layers 0-2 learned in the first 50 only." in text
    assert "No backward pass runs below layer 3 from then on." in text
    assert html.count(">layers 0-2 freeze</text>") == html.count(">Steps in which a layer learns</text>") == 2
    ended = early_run(steps=40, planned_steps=150, early_steps=40, kept_step=40)
    text = page_of([ended], tmp_path, "ended.html").text
    assert "All 6 layers learned for 40 steps. Training ended before the planned 150 steps" in text
    assert "freeze" not in text


def test_a_run_that_got_worse_says_so_first(tmp_path):
    text = page_of([make_run(after=1.9, verdict="worse")], tmp_path).text
    assert "training made the model worse. Its held-out loss rose from 1.432 to 1.900 nats per token." in text
    assert text.index("made the model worse") < text.index("The held-out loss rose")


def test_provenance_counts_training_and_held_out_rows(tmp_path):
    text = page_of([make_run()], tmp_path).text
    assert re.search(r"Rows in the data ?7,473 Rows trained on ?7,473", text)
    assert re.search(r"Rows held out ?96", text)
    split = page_of([make_run(held_out_data=make_data())], tmp_path, "split.html").text
    assert re.search(r"Rows trained on ?7,377", split)


@pytest.mark.parametrize(
    ("curves", "train", "low_is_zero", "is_cut_at_the_top"),
    [
        ([[1.43, 0.9, 0.8]], [1.3], False, False),
        ([[1.43, 0.5, 0.1]], [], True, False),
        ([[5.6, 5.13, 5.12, 5.10], [5.6, 5.12, 5.11, 5.09]], [], False, True),  # else they differ by a pixel
        ([[5.6, 5.13, 5.12, 5.10], [5.6, 5.12, 5.11, 5.09]], [5.07], False, True),  # a line across below all
        ([[5.6, 5.12], [5.6, 5.09]], [], False, False),  # two steep lines say nothing
        ([[1.4, 1.2, 0.6], [1.4, 1.1, 0.7]], [], False, False),
    ],
)
def test_what_the_loss_axis_leaves_out_is_marked(curves, train, low_is_zero, is_cut_at_the_top):
    window = loss_window(curves, train)
    assert (window.low == 0, window.cut_top) == (low_is_zero, is_cut_at_the_top)
    assert all(window.low <= loss <= window.high for curve in curves for loss in [*curve[1:], *train])
    assert ("bottom" in window.words or "both" in window.words) is not low_is_zero
    assert ("both" in window.words) is is_cut_at_the_top


def test_the_cut_is_drawn(two, tmp_path):
    assert two.count("(axis cut at the bottom)</text>") == 4
    zigzags = re.findall(r'class="axis" d="M[^"]*l0 \d+(?:\.\d)?-4 2.5 8 3.5-8 3.5 4 2.5', two)
    assert len(zigzags) == 4  # two figures, for desk and phone
    whole = report([make_run(after=0.02)], tmp_path / "report.html").read_text(encoding="utf-8")
    assert "axis cut" not in whole


def test_every_figure_is_drawn_for_a_phone_as_well(two):
    """As wide as the phone's column, with text that is not scaled down."""
    widths = {css: set(re.findall(rf'<svg class="{css}" viewBox="0 0 (\d+) ', two)) for css in ("desk", "phone")}
    assert widths["phone"] == {"350"}
    assert widths["desk"] == {"480", "880"}
    assert two.count('<svg class="phone"') == two.count('<svg class="desk"') == 5
    assert ".phone { display: none" in two
    assert re.search(r"@media \(max-width: 40rem\) {\s+\.desk { display: none", two)
    assert float(re.search(r"figure > svg {[^}]*font-size: ([\d.]+)px", two)[1]) >= 12


def test_runs_differ_in_dash_and_mark_as_well_as_in_colour():
    looks = [(run_class(index), run_dash(index), marker_path(index)) for index in range(21)]
    assert len({look[1:] for look in looks[:7]}) == 7  # seven runs without any colour
    assert len(set(looks)) == 21


def test_one_run_has_no_comparison(tmp_path):
    html = report([uniform()], tmp_path / "report.html").read_text(encoding="utf-8")
    text = Page(html).text
    assert drawn(html) == ["Loss by optimizer step", "Layers of uniform", "Where the time went"]
    assert "Speed-up" not in text
    assert "reference" not in text
    assert "The held-out loss fell from 1.432 to 0.731 nats per token." in text


def test_ids_are_unique_and_every_reference_resolves(three):
    ids = [attributes["id"] for _, attributes in Page(three).elements if "id" in attributes]
    assert len(ids) == len(set(ids)) > 0
    named = {name for found in re.findall(r'aria-labelledby="([^"]+)"', three) for name in found.split()}
    assert named == set(ids)


def test_page_is_self_contained(two):
    page = Page(two)
    assert page.count("script") == page.count("link") == page.count("img") == 0
    for _, attributes in page.elements:
        for name in ("src", "href", "xlink:href", "action", "data", "srcset"):
            assert attributes.get(name, "#").startswith("#")
        assert not [name for name in attributes if name.startswith("on")]
    assert re.findall(r"url\((?!#)", two) == []
    assert not {"http:", "https:", "@import"} & set(re.findall(r"https?:|@import", two))


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
@pytest.mark.parametrize("width", [390, 1280])
def test_page_opens_in_a_browser_without_overflow_errors_or_requests(tmp_path, width):
    path = report([uniform(), early_run(path="runs/a-run-with-a-rather-long-name-of-its-own")], tmp_path / "page.html")
    opened = open_page(path, width, tmp_path / "browser")
    assert opened.overflowing == []
    assert opened.scroll_width <= width
    assert opened.requests == [path.as_uri()]
    assert opened.errors == []


def test_every_figure_has_a_name_and_follows_the_pages_colours(two):
    figures = [attributes for tag, attributes in Page(two).elements if tag == "svg" and "role" in attributes]
    assert len(figures) == 10
    for figure in figures:
        title, words = (re.search(f'id="{name}">([^<]+)<', two)[1] for name in figure["aria-labelledby"].split())
        assert title
        assert words
    inside = "".join(re.findall(r"<svg.*?</svg>", two, re.DOTALL))
    assert not re.findall(r"style=|fill=|stroke=|font|#[0-9a-f]{3}", inside)  # all is the style sheet's
    classes = {name for found in re.findall(r'class="([^"]+)"', inside) for name in found.split()}
    sheet = two[: two.index("</style>")]
    assert {name for name in classes if not re.search(rf"\.{name}\b", sheet)} == set()


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
    texts = "".join(re.findall(r"<text.*?</text>", hostile))
    assert "id=&#34;figure_1&#34; #010101" in texts


def test_same_runs_give_the_same_bytes(two, tmp_path):
    assert report([uniform(), make_run()], tmp_path / "again.html").read_text(encoding="utf-8") == two


def test_report_replaces_a_report_and_nothing_else(tmp_path):
    out = tmp_path / "deep" / "report.html"
    report([uniform()], out)
    report([make_run()], out)
    assert "plan" in Page(out.read_text(encoding="utf-8")).text
    out.write_text("<html>my thesis</html>")
    with pytest.raises(ArtifactError, match="not a report of Aletheia"):
        report([make_run()], out)
    assert out.read_text() == "<html>my thesis</html>"
    with pytest.raises(ArtifactError, match="another `out`"):
        report([make_run()], tmp_path)


def test_no_runs_are_refused(tmp_path):
    with pytest.raises(ArtifactError, match="no runs"):
        report([], tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()
    with pytest.raises(ArtifactError, match="no runs"):
        comparison_table([])


def test_boundary_is_marked_only_where_there_is_a_prefix(two):
    assert two.count('class="boundary"') == 2  # in the plan's figure for desk and phone, not in uniform's
    assert "All 6 layers learn to the end. Policy: uniform." in Page(two).text
    assert "Layers 3-5 of 6 learn to the end." in Page(two).text


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
    assert cells("Time saved, all") == ["reference", "19 %", "4.8 %"]  # 1 - 118.3 / 146.4, 1 - 139.3 / 146.4
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


def test_reporting_loads_neither_torch_nor_matplotlib():
    code = (
        "import sys, aletheia.reporting.terminal, aletheia.reporting.page; "
        "unwanted = ('torch', 'transformers', 'peft', 'datasets', 'matplotlib'); "
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
    assert "Training ended before the planned 200 steps, because the loss no longer fell." in page.text
    assert "The adapter of step 75 was kept." in page.text
    assert "150 steps, 50 saved" in page.text
    assert "--steps 200" in page.text
