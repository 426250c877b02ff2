"""The web page: Gradio as the shell (pages, dropdowns, sliders), our own chat view for tokens.

Only this package imports Gradio, and only in a background thread of the server (`modules.ui.gradio_app`).
"""
