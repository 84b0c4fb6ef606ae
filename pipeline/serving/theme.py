"""The demo's look."""

import gradio as gr

THEME = gr.themes.Soft(
    primary_hue="indigo",
    font=["system-ui", "sans-serif"],
    font_mono=["ui-monospace", "monospace"],
)
CSS = """
.gradio-container { max-width: 1080px !important; margin: auto; }
#title h1 { margin-bottom: 0; }
.pixels img { image-rendering: pixelated; }
#gallery .caption-label { display: none; }
.strip, .strip .grid-wrap {
  min-height: 0 !important; height: auto !important; max-height: none !important;
}
@media (max-width: 640px) {
  .strip .grid-container { grid-template-columns: repeat(3, 1fr) !important; }
  .tab-wrapper, .tab-container { height: auto !important; flex-wrap: wrap; }
}
"""
