"""Configuration of the site: `make site` puts its sources together (sources.py), and Sphinx with MyST-NB reads them.

Tried, and why not: Jupyter Book 2 and mystmd 1.11 fetch their theme from api.mystmd.org whenever they build, so a build
without a network ends there; and they do not list a package's API. Sphinx builds with what is installed.
"""

from configparser import ConfigParser
from importlib.util import find_spec
from pathlib import Path

settings = ConfigParser(delimiters=["="], interpolation=None)
settings.read(Path(__file__).resolve().parent.parent / "settings.ini", encoding="utf-8")
metadata = settings["DEFAULT"]

project = metadata["title"]
author = metadata["author"]
copyright = metadata["copyright"]
version = release = metadata["version"]
html_title = f"{project} {version}"

extensions = ["myst_nb", "sphinx.ext.mathjax"]
exclude_patterns = ["files"]
maximum_signature_line_length = 88
toc_object_entries = False  # modules are enough: thousands of names in every page's navigation take a minute
python_display_short_literal_types = True
# A type's short name in a signature may stand for two classes (`Batch`), and nothing says which to link. Not a mistake.
# No intersphinx, which downloads inventories: types of torch and others are not linked.
suppress_warnings = ["ref.python"]

myst_enable_extensions = ["dollarmath", "amsmath", "colon_fence"]
myst_heading_anchors = 3
nb_execution_mode = "off"
nb_render_markdown_format = "myst"
nb_ipywidgets_js = {}  # these would be loaded from elsewhere
nb_merge_streams = True

# MathJax 3 with its fonts, as a package: formulas need no network
MATHJAX = Path(find_spec("sphinx-mathjax-offline").submodule_search_locations[0]) / "static"
html_static_path = ["static", str(MATHJAX)]
mathjax_path = "mathjax/tex-chtml.js"
mathjax3_config: dict = {}

html_theme = "sphinx_book_theme"
html_css_files = ["site.css"]
html_context = {"default_mode": "auto"}  # light or dark, as the reader's system is set
html_copy_source = False
html_theme_options = {
    "show_navbar_depth": 1,
    "use_download_button": False,
    "use_fullscreen_button": False,
    "show_toc_level": 2,
    "navbar_start": [],  # the bar above the page would repeat the search
    "navbar_center": [],
    "navbar_end": [],
    "navbar_persistent": [],
}
