"""Figures without a full training: plan, bench, scaling, closed forms."""
