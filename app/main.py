"""The script that Streamlit runs at every click: the view, the navigation, the screen, the model's lamp.

It imports no torch: the first page is there before the model is.
"""

import sys
from pathlib import Path

if (root := str(Path(__file__).parents[1])) not in sys.path:  # Streamlit runs a file, and puts only its folder on the path
    sys.path.insert(0, root)

import streamlit as st

from app import look, status, url
from app.screens import SCREENS, draw

st.set_page_config(page_title="mi-workbench", page_icon="🔬", layout="wide")
look.apply()
url.open_view()
page = st.navigation(
    [st.Page(draw(one), title=one.title, icon=one.icon, url_path=one.path, default=one.path == "home") for one in SCREENS]
)
with st.sidebar:
    status.model_chooser()
    status.lamp()
    status.link()
st.title(page.title)
page.run()
status.warm_up()
