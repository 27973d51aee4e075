"""Registry of data sets by name. A new data set is a file in `ldrld/data` that calls `register`."""
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules

from ldrld.data.image_list import ImageList
from ldrld.data.images import ImageData

__all__ = ["OWN", "LOADERS", "CLASSES", "LISTS", "Loader", "import_all", "register", "register_list", "registered"]

OWN = "own:"  # begins the name of a user's images, see `ldrld.data.own_images`; known only while they are in memory

Loader = Callable[[Path, bool], ImageData]  # (folder of the data sets, whether to download) -> the data
ListLoader = Callable[[Path], ImageList]  # folder of the data sets -> the files

LOADERS: dict[str, Loader] = {}
LISTS: dict[str, ListLoader] = {}  # data sets that stay in files
CLASSES: dict[str, int] = {}  # number of classes of each, known without loading the images


def register(
    name: str,  # as `ldrld.data.load` takes it
    classes: int,  # their number, known without loading the images
) -> Callable[[Loader], Loader]:
    """Decorator that registers a function (root, download) -> ImageData as the data set `name`.

    ValueError if the name is taken by another data set.
    """
    def add(load: Loader) -> Loader:
        taken = LOADERS.get(name)
        if taken is not None and taken.__qualname__ != load.__qualname__:
            raise ValueError(f"name {name!r} is taken by {taken.__qualname__}; choose another for {load.__qualname__}")
        LOADERS[name], CLASSES[name] = load, classes
        return load
    return add


def register_list(
    name: str,  # as `ldrld.data.load_list` takes it
    classes: int,  # their number, known without reading the files
) -> Callable[[ListLoader], ListLoader]:
    """Decorator that registers a function (root) -> ImageList as the data set `name`, whose images stay in files."""
    def add(load: ListLoader) -> ListLoader:
        LISTS[name], CLASSES[name] = load, classes
        return load
    return add


@contextmanager
def registered(
    images: ImageData,  # with the name that runs and records use, which begins with `own:`
) -> Iterator[str]:  # the name
    """Context in which images that are in memory are a data set, under their own name.

    ValueError for a name without `own:`.
    """
    name = images.name
    if not name.startswith(OWN): raise ValueError(f"images.name={name!r}: expected a name that begins with {OWN!r}")
    LOADERS[name], CLASSES[name] = lambda root, download: images, len(images.classes)
    try: yield name
    finally: del LOADERS[name], CLASSES[name]


def import_all(
    leave: tuple[str, ...] = (),  # names of modules that are left out
) -> None:
    """Import the modules of this folder, each of which registers its data sets."""
    for module in iter_modules([str(Path(__file__).parent)]):
        if module.name not in leave: import_module(f"{__package__}.{module.name}")
