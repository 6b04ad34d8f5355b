"""Distillation: a student learns from a teacher, on one process or many."""
