"""Evidence, for those who compare: campaigns, evaluation, statistics, and their reports."""
