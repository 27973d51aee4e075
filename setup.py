"""Package metadata, all of it read from settings.ini."""

import shutil
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

root = Path(__file__).parent
config = ConfigParser(delimiters=["="], interpolation=None)
config.read(root / "settings.ini", encoding="utf-8")
cfg = config["DEFAULT"]
names = ("run", "lab", "dev", "hf", "timm", "torchdistill", "slurm", "lightning", "onnx", "site")
extras = {name: cfg[f"{name}_requirements"].split() for name in names}
extras["lab"] = extras["run"] + extras["lab"]
extras["dev"] = extras["lab"] + extras["dev"]


class WithPublishedNumbers(build_py):
    """Copies `data/published` into the package, where `ldrld.core.paths.published` finds it without a checkout."""

    def run(self):
        super().run()
        if not self.editable_mode:
            target = Path(self.build_lib, cfg["lib_path"], "published")
            shutil.copytree(root / "data" / "published", target, dirs_exist_ok=True)


setup(
    cmdclass={"build_py": WithPublishedNumbers},
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=(root / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author=cfg["author"],
    license="Apache-2.0",
    license_files=["LICENSE"],
    keywords=cfg["keywords"].split(),
    python_requires=f">={cfg['min_python']}",
    packages=find_packages(include=[cfg["lib_path"], f"{cfg['lib_path']}.*"]),
    package_data={cfg["lib_path"]: ["py.typed", "experiments/profiles/*.yaml"]},
    install_requires=cfg["requirements"].split(),
    extras_require=extras,
    entry_points={"console_scripts": cfg["console_scripts"].split()},
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    zip_safe=False,
)
