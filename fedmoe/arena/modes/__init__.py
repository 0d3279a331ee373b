"""Training modes: how policies are assigned to seats, and how outcomes become rewards and advantages."""
