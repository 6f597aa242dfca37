"""What a model is made of: decoder layers, modules, roles, shapes, parameters, FLOPs."""
