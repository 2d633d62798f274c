"""Sphinx's configuration for ``make docs``: one page per public name, from its docstring."""

project = "throughtime"
extensions = ["sphinx.ext.autodoc", "sphinx.ext.autosummary", "sphinx.ext.napoleon"]
templates_path = ["."]  # page.jinja
highlight_language = "none"  # equations; examples are highlighted all the same
html_theme = "furo"
html_title = "throughtime"
html_extra_path = ["torch.csv", "programs.csv"]  # which the page of compatibility links
html_show_copyright = False
autodoc_typehints = "none"  # Args say it, with shapes
autodoc_member_order = "bysource"
napoleon_use_ivar = True  # a list of attributes instead of a block for each
python_maximum_signature_line_length = 80
