"""Exports: a run, an adapter or a plan in the formats that other programs serve or train."""
