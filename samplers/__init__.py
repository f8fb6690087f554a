"""Schedules, and samplers as generators over pure steps."""
