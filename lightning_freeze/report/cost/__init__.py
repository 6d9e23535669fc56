"""What a training step costs in each stage, in FLOPs, without weights and without training."""

from lightning_freeze.report.cost.step import StepCost, step_cost

__all__ = ["StepCost", "step_cost"]
