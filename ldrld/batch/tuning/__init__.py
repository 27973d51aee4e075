"""Search for hyper-parameters: the space, the study, its trials, and the report."""

import warnings

with warnings.catch_warnings():
    # in a notebook tqdm, which comes with Optuna, warns about missing widgets
    warnings.simplefilter("ignore")
    import optuna  # noqa: F401
