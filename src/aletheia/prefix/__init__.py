"""The frozen prefix, the layers below the boundary: no backward through them, and a cache of their outputs."""
