"""How each tensor of a model got its values."""
