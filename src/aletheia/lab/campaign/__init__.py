"""Campaigns: models x arms x seeds, each row run once, kept, and reported from what is kept."""
