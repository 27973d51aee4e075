"""Search for hyper-parameters: what may be tried, the study, its trials, and what came of it."""

import warnings

with warnings.catch_warnings():
    # in a notebook tqdm, which comes with Optuna, asks for widgets that nothing here draws
    warnings.simplefilter("ignore")
    import optuna  # noqa: F401
