"""The demo: a small real model, rows that every machine has, and a plan for speed next to uniform LoRA."""

import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch

from aletheia.adapters.adapt import adapt
from aletheia.anatomy.demo import demo_checkpoint
from aletheia.anatomy.load import Loaded, load
from aletheia.data.encode import encode, load_data
from aletheia.data.rows import load_rows
from aletheia.data.stdlib_task import write_stdlib_task
from aletheia.planning.make import plan as make_plan
from aletheia.probing.resident import probe
from aletheia.progress import Progress, Say, to_stderr
from aletheia.reporting.page import report
from aletheia.reporting.plan_text import plan_sentences
from aletheia.runs.folder import RunFolder
from aletheia.runs.schema import REPORT_FILE, SCORES_FILE, Run
from aletheia.training.settings import TrainSettings
from aletheia.training.train import Prepared, train

STEPS = 36
BATCH_SIZE = 4
HELD_OUT_ROWS = 24
ARMS = ("uniform", "plan")


@dataclass(frozen=True)
class Demo:
    """Results of the demo: two runs, their page, and an answer to a held-out prompt before and after the plan's run."""

    uniform: Run
    plan: Run
    page: Path
    prompt: str
    before: str
    after: str

    @property
    def runs(self) -> list[Run]:
        """Both runs; uniform LoRA, the baseline, comes first."""
        return [self.uniform, self.plan]


def demo(out: Path, steps: int = STEPS, seed: int = 0, overwrite: bool = False, say: Say = to_stderr) -> Demo:
    """Teach SmolLM2-135M to write the summary line of a function, with uniform LoRA and with a plan for speed.

    Both runs take the same steps on the same rows, computed in the same way. Only the plan differs.

    Args:
        out: folder for rows, scores, both runs and the page.
        steps: optimizer steps of each run, in one pass over as many rows as they need.
        seed: of the rows and of both runs.
        overwrite: replace an earlier demo.
        say: receives a line for each phase, and one at least every 30 seconds during it.

    Raises:
        ArtifactError: ``out`` holds other files or cannot be written.
        ModelError: the demo's packages are not installed.
    """
    with ExitStack() as stack:
        folders = {arm: stack.enter_context(RunFolder.claim(out / arm, overwrite, "never")) for arm in ARMS}
        files = write_stdlib_task(out, BATCH_SIZE * steps, HELD_OUT_ROWS, seed)
        say("load   SmolLM2-135M-Instruct; its task: write the summary line of a function of Python's library")
        started = time.perf_counter()
        with Progress("load", 0, "", say):
            base = load(str(demo_checkpoint()))
        seconds = {"load": time.perf_counter() - started}
        data, held_out_rows = load_data(str(files[0]), base.tokenizer), load_rows(str(files[1]))
        held_out = encode(held_out_rows, base.tokenizer)
        messages = held_out_rows.rows[0].messages
        assert messages is not None  # rows of a prompt and a completion are messages
        prompt = messages[0]["content"]
        before = answer(base, prompt, say)
        say("probe  scores the layers by their gradients on 5 rows")
        scores = probe(base.model, data, seed=seed, show_progress=say)
        scores.write(out / SCORES_FILE)
        plans = make_plan(scores, policy="uniform"), make_plan(scores, target="speed")
        settings = TrainSettings(steps=steps, batch_size=BATCH_SIZE, seed=seed, early_stop=False)
        runs: list[Run] = []
        after = ""
        for arm, plan in zip(ARMS, plans, strict=True):
            say(f"{arm:<6} {' '.join(plan_sentences(plan))}")
            model = adapt(base.model, plan, seed)
            runs.append(train(model, data, plan, folders[arm], held_out, settings, Prepared(seconds=seconds), say))
            after = answer(base, prompt, say)
            model.unload()
    uniform, ours = runs
    return Demo(uniform, ours, report(runs, out / REPORT_FILE), prompt, before, after)


@torch.no_grad()
def answer(base: Loaded, prompt: str, say: Say, max_new_tokens: int = 40) -> str:
    """The model's answer to one prompt, decoded greedily."""
    text = base.tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
    )
    inputs = base.tokenizer(text, return_tensors="pt", add_special_tokens=False).to(base.model.device)
    base.model.eval()
    say("answer a held-out prompt")
    with Progress("answer", 0, "", say):
        output_BT = base.model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)  # type: ignore[operator]
    return str(base.tokenizer.decode(output_BT[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)).strip()
