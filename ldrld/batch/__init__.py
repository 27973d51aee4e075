"""Many runs: a profile's batch, searches of hyper-parameters, and batches that travel to another machine."""
