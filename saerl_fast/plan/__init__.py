"""Which prompts a run trains on, in which order."""

from saerl_fast.config import SCHEDULES
from saerl_fast.plan.base import Plan
from saerl_fast.plan.build import build_plan
from saerl_fast.plan.file import load_plan, save_plan
from saerl_fast.plan.sampler import PlanBatchSampler, PlanSampler

__all__ = ["SCHEDULES", "Plan", "PlanBatchSampler", "PlanSampler", "build_plan", "load_plan", "save_plan"]
