"""Selection policies, rank allocation, the cost model, its frontier and the Plan file. Torch-free."""
