"""The run folder: schema, writing, model card, loading an adapter again."""
