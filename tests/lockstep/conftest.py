"""Hypothesis without bounds on time, which say nothing on a machine that others use too."""

from __future__ import annotations

import hypothesis

hypothesis.settings.register_profile("lockstep", deadline=None, suppress_health_check=list(hypothesis.HealthCheck))
hypothesis.settings.load_profile("lockstep")
