"""Many runs: a profile's batch, hyper-parameter searches, and batches packed for another machine."""
