"""Pages and tables of campaigns and evaluations."""
