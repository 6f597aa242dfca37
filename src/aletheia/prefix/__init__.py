"""The frozen layers below the boundary: no backward through them, and what leaves them stored."""
