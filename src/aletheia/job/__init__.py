"""The whole job: load, probe, plan, adapt, train, report."""
