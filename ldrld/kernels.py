def refusal(student, depth): return "no"
fused = None
