"""The rows that every arm of a campaign sees."""

from pathlib import Path
from typing import Any

from aletheia.data.encode import load_data
from aletheia.data.examples import Examples
from aletheia.errors import CampaignError
from aletheia.lab.campaign.spec import BehaviourCampaign, SpeedCampaign


def training_rows(campaign: SpeedCampaign | BehaviourCampaign, data_dir: Path, tokenizer: Any) -> Examples:
    """The first rows of the data that fit into ``max_length``; raises as :func:`_rows`."""
    return _rows(campaign, data_dir / campaign.data, tokenizer, 0, campaign.rows)


def held_out_rows(campaign: BehaviourCampaign, data_dir: Path, tokenizer: Any) -> Examples:
    """The first rows of the held-out file, else the rows after the training rows; raises as :func:`_rows`."""
    if campaign.held_out is None:
        return _rows(campaign, data_dir / campaign.data, tokenizer, campaign.rows, campaign.held_out_rows)
    return _rows(campaign, data_dir / campaign.held_out, tokenizer, 0, campaign.held_out_rows)


def _rows(campaign: SpeedCampaign | BehaviourCampaign, path: Path, tokenizer: Any, start: int, count: int) -> Examples:
    """Rows ``start`` to ``start + count`` of those in a file that fit into the campaign's ``max_length``.

    Raises:
        CampaignError: there are fewer.
        DataError: the file cannot be read.
    """
    every = load_data(str(path), tokenizer, max_length=campaign.max_length + 1, skip_unusable=True)
    fitting = [index for index, row in enumerate(every.examples) if len(row) <= campaign.max_length]
    if len(fitting) < start + count:
        raise CampaignError(
            f"{path}: found {len(fitting)} rows of up to {campaign.max_length} tokens; expected {start + count}; "
            "lower rows or raise max_length"
        )
    return every.subset(fitting[start : start + count])
