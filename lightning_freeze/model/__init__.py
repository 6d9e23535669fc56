"""What a model is made of: names, selectors, layer groups."""
