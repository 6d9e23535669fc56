"""(epoch, step) -> what trains; no torch, no model."""
