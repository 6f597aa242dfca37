"""Rows of every accepted form, chat templates, tokens, labels and batches."""
