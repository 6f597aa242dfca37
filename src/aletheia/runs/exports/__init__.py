"""Ways out: a run, an adapter or a plan in the forms that other programs serve or train."""
