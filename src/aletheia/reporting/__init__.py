"""Figures, tables and the HTML page. Torch-free."""
