"""The report of a campaign, from its store alone: a page, Markdown and CSV. The same store gives the same bytes."""

import csv
import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from aletheia.errors import CampaignError
from aletheia.files import write_text
from aletheia.lab.campaign.spec import SpeedCampaign
from aletheia.lab.campaign.store import Record, Store
from aletheia.lab.reporting.behaviour_page import behaviour_page
from aletheia.lab.reporting.speed_page import speed_page
from aletheia.names import markdown, printable
from aletheia.reporting.blocks import Block, Page, Panels, Pre, Table
from aletheia.reporting.page import refuse_foreign, to_html

HTML, MARKDOWN, CSV = "report.html", "report.md", "report.csv"


def write_report(store: Store, folder: Path) -> list[Path]:
    """Write the three files and return their paths.

    Raises:
        CampaignError: no row is done.
        ArtifactError: ``folder`` holds another report.html, or cannot be written.
    """
    records = store.records()
    if not any(record.status == "done" for record in records):
        raise CampaignError("no row of the campaign is done; expected at least one; see 'aletheia campaign status'")
    page = _page(store, records)
    refuse_foreign(folder / HTML)
    texts = {HTML: to_html(page), MARKDOWN: to_markdown(page), CSV: to_csv(records)}
    for name, text in texts.items():
        write_text(folder / name, text)
    return [folder / name for name in texts]


def _page(store: Store, records: Sequence[Record]) -> Page:
    campaign = store.campaign
    page = speed_page(campaign, records) if isinstance(campaign, SpeedCampaign) else behaviour_page(campaign, records)
    return Page(page.title, page.verdict, page.cards, (*page.blocks, *_about(store, records)))


def _about(store: Store, records: Sequence[Record]) -> list[Block]:
    """Failures, what the results were made with, and how to repeat them."""
    failed = [record for record in records if record.status == "failed"]
    rows = [(r.row.model, r.row.arm, str(r.row.seed), r.reason or "") for r in failed]
    done = sum(record.status == "done" for record in records)
    counted = f"{done} of {len(records)} rows done, {len(failed)} failed."
    made = sorted({_made_with(record.result["about"]) for record in records if record.result})
    spec = yaml.safe_dump(store.campaign.model_dump(mode="json"), sort_keys=False, width=110)
    return [
        Table("What failed, and why" if failed else "Rows", ("model", "arm", "seed", "reason"), rows, counted),
        Table("Made with", ("code", "packages", "machine"), made),
        Pre("How to repeat it", f"aletheia campaign run SPEC.yaml --out OUT\n\n# SPEC.yaml\n{spec}"),
    ]


def _made_with(about: Mapping[str, Any]) -> tuple[str, str, str]:
    commit = (about["commit"] or "")[:12]
    code = f"commit {commit}{', changed since' if about['is_dirty'] else ''}" if commit else "installed package"
    packages = ", ".join(f"{name} {version}" for name, version in about["packages"].items())
    threads = f"{about['threads']} thread{'s' if about['threads'] != 1 else ''}"
    machine = f"{about['machine']}, {about['device']}, {threads}, Python {about['python']}"
    return code, packages, machine


def to_markdown(page: Page) -> str:
    """Tables and text of the page; figures are left out."""
    lines = [f"# {markdown(page.title)}", "", page.verdict, ""]
    lines += [f"- {markdown(card.name)}: {markdown(card.value)} ({markdown(card.note)})" for card in page.cards]
    for block in page.blocks:
        lines += ["", f"## {markdown(block.title)}", ""]
        if isinstance(block, Pre):
            fence = "`" * (
                3 + max(map(len, re.findall("`+", block.text)), default=0)
            )  # longer than any in the text, so that no value can close it
            lines += [fence, *map(printable, block.text.rstrip().splitlines()), fence]
        elif isinstance(block, Panels):
            lines += [markdown(block.note)]
            for panel in block.panels:
                if isinstance(panel, Table):
                    lines += ["", f"### {markdown(panel.title)}", "", *_table_lines(panel)]
        else:
            lines += [markdown(block.note), ""] if block.note else []
            lines += _table_lines(block)
    return "\n".join(lines) + "\n"


def _table_lines(table: Table) -> list[str]:
    if not table.rows:
        return []
    return [_line(table.columns), _line(["---"] * len(table.columns)), *map(_line, table.rows)]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(markdown(cell) for cell in cells)} |"


def to_csv(records: Sequence[Record]) -> str:
    """A line per row: status, reason, and every value of the result that is single or a list.

    Fractions have six significant digits.
    """
    flat = [_flat(record.result or {}) for record in records]
    names = sorted({name for values in flat for name in values})
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["model", "arm", "seed", "status", "reason", *names])
    for record, values in zip(records, flat, strict=True):
        row = record.row
        writer.writerow(
            [
                row.model,
                row.arm,
                row.seed,
                record.status,
                record.reason or "",
                *(values.get(name, "") for name in names),
            ]
        )
    return out.getvalue()


def _flat(result: Mapping[str, Any], at: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in result.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{at}{name}.")
        elif isinstance(value, list):
            found[f"{at}{name}"] = " ".join(map(_brief, value))
        elif isinstance(value, str) and Path(value).is_absolute():
            found[f"{at}{name}"] = Path(value).name  # its folder is private
        else:
            found[f"{at}{name}"] = "" if value is None else _brief(value)
    return found


def _brief(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_brief, value))}]"
    return f"{value:.6g}" if isinstance(value, float) else str(value)
