"""The rows that every arm of a campaign sees."""

from pathlib import Path
from typing import Any

from aletheia.campaign.spec import BehaviourCampaign, SpeedCampaign
from aletheia.data.encode import load_data
from aletheia.data.examples import Examples
from aletheia.errors import CampaignError


def first_rows(campaign: SpeedCampaign | BehaviourCampaign, path: Path, tokenizer: Any, count: int) -> Examples:
    """The first ``count`` rows of a file that fit into the campaign's ``max_length``.

    Raises:
        CampaignError: there are fewer.
        DataError: the file cannot be read.
    """
    every = load_data(str(path), tokenizer, max_length=campaign.max_length + 1, skip_emptied=True)
    fitting = [index for index, row in enumerate(every.examples) if len(row) <= campaign.max_length]
    if len(fitting) < count:
        raise CampaignError(
            f"{path}: {len(fitting)} rows of up to {campaign.max_length} tokens, expected {count}; "
            "lower rows or raise max_length"
        )
    return every.subset(fitting[:count])
