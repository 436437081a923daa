"""Answering question files and scoring the answers."""
