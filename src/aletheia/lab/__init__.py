"""Tools for comparisons: campaigns, evaluation, statistics, and their reports."""
