def write_evaluation_report(*a, **k): return "none"
