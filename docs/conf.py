"""How Sphinx builds these pages: `make docs`."""

from qeval import __version__

project = "qeval"
author = "the qeval authors"
copyright = "the qeval authors, Apache-2.0"
version = release = __version__

extensions = ["myst_parser", "sphinx_copybutton"]
exclude_patterns = ["_build"]
myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 4
nitpicky = True
smartquotes = False  # it would turn the dashes of --flags into one

html_theme = "furo"
html_title = "qeval"
html_static_path = ["_static"]
html_css_files = ["qeval.css"]
html_show_sphinx = False
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True
