"""Tests of what only the rig's kernel shows. On the host nothing here is collected: tests/integration runs it there."""

from edgehold.testing.rig import inside

collect_ignore_glob = [] if inside() else ["test_*.py"]
