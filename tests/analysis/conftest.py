"""The package that the statistics are compared with runs on Python 3.11 only."""

import sys

collect_ignore = ["test_against_cfprompt.py"] if sys.version_info >= (3, 12) else []
