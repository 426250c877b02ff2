"""The web page: Gradio as the shell (pages, dropdowns, sliders), our own chat view for tokens.

gradio_app       the page put together      access      what it asks of the server
models, parameters, settings_page           dropdowns, load options, the parameter panel, settings
*_tab, views     our own views inside Gradio: JavaScript in static/js, with theme and static/css
lean_gradio      what Gradio's import does without

Only this package imports Gradio, and only in a background thread of the server (`modules.ui.gradio_app`).
"""

from modules.ui import lean_gradio

lean_gradio.install()
