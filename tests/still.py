"""The losses on logits as functions of their arguments, for tests that call each of them more than once."""

from ldrld import losses

STILL = {name: losses.registry.loss_class(name).alone for name in losses.available("logits")}
STILL = {name: args for name, args in STILL.items() if args}  # what needs a teacher's features is in test_rivals.py
STILL["tekap"] = {"noise": 0.0}  # its noise is new in each call: test_rivals.py


def still(name):
    """The loss called `name` with its defaults, without what changes from call to call."""
    return losses.build(name, **STILL.get(name, {}))


def inner(base):
    """Arguments of a wrapper around the loss called `base`."""
    return {"loss": base} | ({"loss_args": STILL[base]} if base in STILL else {})
