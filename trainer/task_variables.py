"""What the launcher tells a node of money and time: names of variables in the task's environment."""

from __future__ import annotations

PRICES = "AEOLUS_PRICES"
"""What the plan's machines cost, wherever one may stand; its form: `trainer.supervisor.price.ListedPrice`."""
PLAN = "AEOLUS_PLAN"
"""What the plan promised of the run, as a JSON object."""
USD_PER_H = "AEOLUS_USD_PER_H"
"""Of machines of one's own, all nodes together; goes before the prices."""
BUDGET_USD = "AEOLUS_BUDGET_USD"
DEADLINE_H = "AEOLUS_DEADLINE_H"
"""Limits of the whole run, all attempts together."""
