"""Where the metrics of a run go besides its history: one file for each service, over `base.Tracker`."""
