"""Measurements of the engine on an idle machine: decode steps, and kernels against ceilings."""
