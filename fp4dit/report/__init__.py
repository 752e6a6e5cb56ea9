"""HTML reports: images side by side, plots and tables in one page.

`fp4dit.report.page.render_page` writes the page, and `assets/` holds its HTML, CSS and JavaScript.
"""
