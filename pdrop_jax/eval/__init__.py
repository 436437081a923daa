"""Answers to question files, and their scores."""
