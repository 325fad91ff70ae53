"""Reading texts: files and data sets as records of fields, each checked, for the profiler and the evaluation alike."""
