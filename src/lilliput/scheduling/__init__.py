"""Finds the schedule that an artifact should follow on a task: an artifact and prompts to widths, with their figures."""

from lilliput.scheduling.job import Found, Frontier, ScheduleJob, find_schedule
from lilliput.scheduling.search import smallest

__all__ = ["Found", "Frontier", "ScheduleJob", "find_schedule", "smallest"]
