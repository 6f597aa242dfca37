"""Campaigns: models x arms x seeds; each row runs once, is stored, and reported from the store."""
