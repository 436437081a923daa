"""Standby tokens trained on the demo's grids, beside the two plain ways to show a picture by as few tokens."""
