"""What a run learns: one file per task, behind `Task`."""
